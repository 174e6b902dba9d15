"""Tests: faults."""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    EFFECTS,
    HERE,
    TINY_MLP,
    assert_same_run,
    call,
    halt,
    python,
    rejected,
    write_folder,
    write_mnist,
)

import data as datasets
import optimizers
import plot
import schedulers
import train
from utils import arguments, checkpoints, models

SEED = int(os.environ.get("FUZZ_SEED", 0))  # another one draws other cases


def any_run(random) -> list[str]:
    """Flags of a small run, drawn at random; some are rejected."""

    def maybe(chance, *flags):
        return random.choice(flags).split() if random.random() < chance else []

    models_flags = (
        "mlp --hidden 8",
        "mlp --hidden 8,8,8",
        "cnn --widths 4,4",
        "vit --patch-size 8 --dim 8 --depth 2 --heads 2",
    )
    return [
        *f"--model {random.choice(models_flags)} --data shapes --device cpu".split(),
        *f"--batch-size {random.choice((16, 20, 64))} --epochs {random.choice((1.3, 2, 3.5, 4))}".split(),
        *f"--opt {random.choice(list(optimizers.OPTIMIZERS))} --seed {random.randrange(99)}".split(),
        *maybe(0.6, *(f"--sched {name}" for name in schedulers.SCHEDULES)),
        *maybe(0.4, "--val-split 0", "--val-split 0.3", "--val-split 20"),
        *maybe(0.3, "--ema 0.5", "--ema 0.9"),
        *maybe(0.4, "--mixup 0.5", "--cutmix 1"),
        *maybe(0.3, "--augment strong", "--reprob 0.5"),
        *maybe(0.3, "--save-every 1", "--save-every 3"),
        *maybe(0.3, "--tta", "--dropout 0.3", "--accum 2", "--limit 50", "--patience 1", "--monitor val_loss"),
    ]


@pytest.mark.slow
def test_any_run_halted_anywhere_goes_on_to_the_same_bits(tiny, monkeypatch, capsys):
    drawn = random.Random(SEED)
    resumed = tried = 0
    while resumed < 60:
        tried += 1
        assert tried < 600  # most can be run
        flags = any_run(drawn)
        for name in ("straight", "halted"):
            shutil.rmtree(name, ignore_errors=True)
        if rejected(*flags, "--out", "straight"):
            continue
        at = drawn.randint(1, checkpoints.load("straight/last.pt")["step"])
        with monkeypatch.context() as patch:
            halt(patch, at)
            assert call(*flags, "--out", "halted") == 130, (flags, at)
        assert call("--resume", "halted/last.pt") == 0, (flags, at, capsys.readouterr().err)
        assert_same_run("straight", "halted")
        resumed += 1


def forked(argv):
    """Start train.main in a copy of this process, which has imported everything. Returns its number."""
    if pid := os.fork():
        return pid
    sys.stdout = sys.stderr = open("said.txt", "a")
    os._exit(train.main([str(a) for a in argv]))


def kill_loop(kills):
    """Kill a run at random moments, resume it each time, compare it with an unbroken one; again until `kills` kills."""
    drawn = datasets.shapes(140, 40)
    datasets.shapes = lambda: datasets.Dataset(*(getattr(drawn, f) for f in datasets.Dataset.__dataclass_fields__))
    plot.draw = lambda *args, **more: None
    flags = "--hidden 64 --data shapes --batch-size 5 --epochs 5 --save-every 2 --device cpu --dropout 0.5".split()
    start = time.perf_counter()
    assert os.waitpid(forked([*flags, "--out", "straight"]), 0)[1] == 0, Path("said.txt").read_text()[-2000:]
    seconds, draw = time.perf_counter() - start, random.Random(SEED)
    killed = runs = 0
    while killed < kills:
        run, runs = Path(f"run-{runs}"), runs + 1
        status = None
        while status != 0:
            if (run / "last.pt").exists():
                pid = forked(["--resume", run / "last.pt"])
            else:
                shutil.rmtree(run, ignore_errors=True)
                pid = forked([*flags, "--out", run])
            end = time.perf_counter() + draw.uniform(0, seconds)
            while not (over := os.waitpid(pid, os.WNOHANG))[0] and time.perf_counter() < end:
                time.sleep(0.0005)
            if not over[0]:
                os.kill(pid, signal.SIGKILL)
                over = os.waitpid(pid, 0)
            status = over[1]
            assert status in (0, signal.SIGKILL), Path("said.txt").read_text()[-2000:]
            killed += status == signal.SIGKILL
        assert_same_run("straight", run)
    print(f"{killed} kills in {runs} runs, all with the bits of the unbroken one")


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path):
    folders = [str(HERE), str(HERE / "tests")]
    code = f"import sys; sys.path[:0] = {folders}; import test_faults; test_faults.kill_loop(60)"
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)


NUMBERS = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "64",
    "0.5",
    "1e-9",
    "1e9",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "1" + "0" * 13,
    "x",
]


FUZZED = {
    dest: [*NUMBERS, "", "2,3", "0.9,0.99", "0,0", ",", "1,", "-1,2", "nan,nan", "9" * 30]
    for dest in EFFECTS
    if dest not in ("resume", "eval", "epochs", "out", "data_dir")
} | dict(
    model=[*models.MODELS, "", "MLP"], opt=[*optimizers.OPTIMIZERS, "Adam"], sched=[*schedulers.SCHEDULES, "x"],
    data=["shapes", "pets", "nowhere", "", "/", "pets/train", "file"], epochs=["0.5", "1", "2", "0", "nan", "x"],
    amp=["auto", "off", "bf16", "fp16", "x"], device=["cpu", "auto", "cuda", "cpu:1", "meta", ""],
    depth=["0", "1", "2", "x"], runs=["-1", "0", "1", "2", "1e400", "nan", "x", ""],
    monitor=["val_acc", "val_loss", "x"], pool=["cls", "mean", "x"], arch=["residual", "plain", "x"],
    stem=["patch", "conv", "x"],
)  # fmt: skip


@pytest.mark.slow
def test_random_flags_end_in_success_or_in_one_line(tiny, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)  # it would take half a minute each time
    write_folder(tiny / "pets", (8, 8), train_count=9)
    Path("file").write_text("no folder")
    draw, ends, faults = random.Random(SEED), {}, []
    small = {"mlp": "--hidden 8", "cnn": "--widths 4,4", "vit": "--patch-size 4 --dim 8 --depth 1 --heads 1"}
    for case in range(3000):
        model = draw.choice([*models.MODELS])
        argv = ["--model", model, *small[model].split(), "--epochs", "1", "--data", "shapes", "--out", f"run-{case}"]
        dests = list(vars(arguments.make_parser(model).parse_args([])))
        for dest in draw.sample(sorted(FUZZED.keys() & dests), draw.choice([1, 1, 2, 3])):
            flag = arguments.flag_name(dest)
            no_value = isinstance(vars(arguments.make_parser(model).parse_args([]))[dest], bool)
            argv += [flag] if no_value else [f"{flag}={draw.choice(FUZZED[dest])}"]
        try:
            status, error = rejected(*argv), None
        except Exception as traceback:
            status, error = None, repr(traceback)[:200]
        said = capsys.readouterr().err
        ends[status] = ends.get(status, 0) + 1
        if status is None or len(said.splitlines()) != (status == 2) or (status == 2 and Path(f"run-{case}").exists()):
            faults.append((" ".join(argv[6:]), status, error or said))
        shutil.rmtree(f"run-{case}", ignore_errors=True)
    print(ends)
    assert not faults, "\n".join(map(str, faults))
    assert min(ends[0], ends[2]) > 300


@pytest.mark.slow
def test_random_damage_to_files_ends_in_success_or_in_one_line(tiny, capsys):
    """Bits flipped, cut out, put in, in each kind of file that a run reads."""
    assert call(*TINY_MLP, "--out", "run") == 0
    write_mnist(tiny / "data")
    write_folder(tiny / "pets", (8, 8))
    cnn = "--model cnn --widths 4 --epochs 1 --val-split 0.4 --out new --data pets".split()
    assert call(*cnn) == 0
    cases = {
        Path("run/last.pt"): ["--resume", "run/last.pt", "--out", "new"],
        Path("run/best.pt"): ["--eval", "run/best.pt"],
        Path("data/MNIST/raw/train-images-idx3-ubyte"): "--hidden 8 --data mnist --epochs 1 --out new".split(),
        Path("data/MNIST/raw/t10k-labels-idx1-ubyte"): "--hidden 8 --data mnist --epochs 1 --out new".split(),
        Path("pets/train/cat/0.png"): cnn,
        next(Path("data/cache").iterdir()): cnn,
    }
    draw, ends = random.Random(SEED), {}
    for path, argv in cases.items():
        good, times = path.read_bytes(), os.stat(path)
        for _ in range(200):
            raw = bytearray(good)
            for _ in range(draw.choice([1, 1, 5, 50])):
                at = draw.randrange(min(len(raw), draw.choice([40, 10**9])))
                kind = draw.randrange(4)
                if kind == 0:
                    raw[at] ^= 1 << draw.randrange(8)
                elif kind == 1:
                    del raw[at : draw.choice([at + 1, at + 8, len(raw)])]
                    raw = raw or bytearray(1)
                elif kind == 2:
                    raw[at:at] = draw.randbytes(draw.randrange(1, 9))
                else:
                    raw[at] = draw.choice([0, 255])
            path.write_bytes(raw)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            shutil.rmtree("new", ignore_errors=True)
            capsys.readouterr()
            status = call(*argv)
            said = capsys.readouterr().err
            assert status in (0, 1, 2) and len(said.splitlines()) == (status == 2), (path, status, said)
            key = (path.name, status)
            ends[key] = ends.get(key, 0) + 1
        path.write_bytes(good)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    print(ends)
    assert ends.get(("best.pt", 2), 0) > 150
    assert ends.get(("last.pt", 0), 0) < 20  # a checksum guards it: nearly every change is seen
