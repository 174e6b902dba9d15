"""What nobody thought of: it ends in one line or in a right result, never in a lost file, a hang or a crash."""

import collections
import copy
import dataclasses
import errno
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import (
    HERE,
    TINY,
    TINY_MLP,
    Killed,
    call,
    end_as_torch_does,
    halt,
    one_line,
    python,
    rejected,
    rows,
    same,
    weights,
    write_folder,
    write_idx,
    write_mnist,
)
from PIL import Image

import augment
import bench
import compare
import data as datasets
import diagnose
import mlp_mnist
import optimizers
import plot
import predict
import schedulers
import train
import vit
from utils import arguments, checkpoints, devices, distributed, errors, report, run_folder


def last():
    return checkpoints.load("run/last.pt", keys=checkpoints.RESUME_KEYS)


def change_state(function):
    """Apply a function to every tensor of the optimizer's state that has its parameter's shape."""

    def change(content):
        for state in content["optimizer"]["state"].values():
            for name, value in state.items():
                if value.ndim:
                    state[name] = function(value)

    return change


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def shared(depth):
    value = ["x"] * 10
    for _ in range(depth):
        value = [value] * 10
    return value


LAST = {
    "an expanded tensor": change_state(lambda t: torch.zeros(1).expand(t.shape)),
    "a transposed tensor": change_state(
        lambda t: t.T if t.ndim == 2 else t[::2].repeat(2)[: len(t)].flip(0)[:, None][:, 0]
    ),
    "a sparse tensor": change_state(lambda t: t.to_sparse()),
    "a complex tensor": change_state(lambda t: t.to(torch.complex64)),
    "a float8 tensor": change_state(lambda t: t.to(torch.float8_e4m3fn)),
    "a smaller tensor": change_state(lambda t: t.flatten()[:1]),
    "no numbers": change_state(lambda t: t.fill_(float("nan"))),
    "no optimizer's state": lambda c: c["optimizer"].update(state={}),
    "a name too few": lambda c: [state.pop("exp_avg_sq") for state in c["optimizer"]["state"].values()],
    "a step of the optimizer that never was": lambda c: c["optimizer"]["state"][0].update(step=torch.tensor(-1.0)),
    "negative squares": change_state(lambda t: t - 1),
    "whole numbers": change_state(lambda t: t.long()),
    "a step too many": lambda c: c.update(step=c["step"] + 1),
    "totals below 0": lambda c: c.update(totals=torch.tensor([0.0, 0.0, -200.0], dtype=torch.float64)),
    "an accuracy of 9": lambda c: c["history"][0].update(val_acc=9.0),
    "no accuracy": lambda c: c["history"][0].update(val_acc=float("nan")),
    "an epoch twice": lambda c: c.update(history=2 * c["history"]),
    "a scaler of nothing": lambda c: c.update(scaler={"scale": float("nan")}),
    "an odd scaler": lambda c: c.update(
        scaler=dict(scale=1.0, growth_factor=2.0, backoff_factor=0.0, growth_interval=0, _growth_tracker=0)
    ),
    "a limit of a half": lambda c: c["args"].update(limit=100.5),
    "another split": lambda c: c["args"].update(val_split=0.0),
    "no random-number states": lambda c: c.update(rng=[]),
    "shared lists in classes": lambda c: c.update(classes=shared(7)),
    "shared lists in args": lambda c: c["args"].update(data=shared(7)),
    "deep lists": lambda c: c.update(classes=nested(400)),
    "a step that never was": lambda c: c.update(step=10**30),
    "a million classes": lambda c: c.update(classes=["x"] * 1_000_001),
    "many classes": lambda c: c.update(classes=[f"class {i}" for i in range(5000)]),
    "no mean": lambda c: c.update(mean=()),
    "text for a mean": lambda c: c.update(mean=("a",) * 3),
    "a std of 0": lambda c: c.update(std=(0.0,) * 3),
    "another mean": lambda c: c.update(mean=(0.1,) * 3),
    "other classes": lambda c: c.update(classes=c["classes"][::-1]),
    "other images": lambda c: c.update(images=1),
    "an image size of 0": lambda c: c.update(image_size=0),
    "a tensor among the arguments": lambda c: c["args"].update(loss=torch.zeros(3)),
    "an odd amp": lambda c: c["args"].update(amp=[]),
    "an unknown amp": lambda c: c["args"].update(amp="/"),
    "an unknown sched_monitor": lambda c: c["args"].update(sched_monitor="loss"),
    "no arguments": lambda c: c.update(args={}),
    "a history from the future": lambda c: c["history"][0].update(step=99),
    "a negative number of updates": lambda c: c.update(ema={"trained": {}, "updates": -1}),
}


@pytest.mark.parametrize("kind", LAST)
def test_a_last_pt_that_no_run_left_is_one_line(kind, tiny, capsys):
    assert call(*TINY_MLP, "--opt", "adamw", "--out", "run") == 0
    content = last()
    LAST[kind](content)
    torch.save(content, "run/last.pt")
    capsys.readouterr()
    before = sorted(Path().rglob("*"))
    assert call("--resume", "run/last.pt", "--epochs", 2) == 2
    one_line(capsys)
    assert sorted(Path().rglob("*")) == before


def test_state_that_lies_in_memory_in_another_order_is_laid_out_again(tiny, capsys):
    """Channels last in the run, contiguous in the file: the same numbers, so the same run."""
    cnn = "--model cnn --widths 4,8 --data shapes --batch-size 64 --device cpu".split()
    assert call(*cnn, "--opt", "adamw", "--epochs", 2, "--sched", "none", "--out", "straight") == 0
    assert call(*cnn, "--opt", "adamw", "--epochs", 1, "--sched", "none", "--out", "run") == 0
    content = last()
    change_state(lambda t: t.contiguous())(content)
    checkpoints.save(content, "run/last.pt")
    assert call("--resume", "run/last.pt", "--epochs", 2) == 0
    assert same(dict(weights("straight/last.pt")), dict(weights("run/last.pt")))


@pytest.mark.parametrize(
    "name, value",
    [
        ("old_dirs", [torch.zeros(3)]),
        ("t", "x"),
        ("t", float("nan")),
        ("ro", [torch.zeros(2)]),
        ("d", 3),
        ("d", None),
        ("al", []),
        ("n_iter", -1),
    ],
)
def test_an_odd_state_of_lbfgs_is_one_line(name, value, tiny, capsys):
    assert call(*TINY_MLP, "--opt", "lbfgs", "--limit", 64, "--out", "run") == 0
    content = last()
    state = content["optimizer"]["state"][0]
    state[name] = value
    if value is None:
        del state[name]
    if isinstance(value, float):
        state[name] = torch.tensor(value)
    torch.save(content, "run/last.pt")
    capsys.readouterr()
    assert call("--resume", "run/last.pt", "--epochs", 2) == 2
    one_line(capsys, "--resume")


BEST = {
    "fewer classes": lambda c: c.update(classes=c["classes"][:9]),
    "another image size": lambda c: c.update(image_size=16),
    "one channel": lambda c: c.update(channels=1, mean=(0.5,), std=(0.5,)),
    "weights in double": lambda c: c.update(state_dict={k: v.double() for k, v in c["state_dict"].items()}),
    "sparse weights": lambda c: c.update(state_dict={k: v.to_sparse() for k, v in c["state_dict"].items()}),
    "weights named by numbers": lambda c: c.update(state_dict=dict(enumerate(c["state_dict"].values()))),
    "a terminal's escape codes": lambda c: c.update(model="\x1b]0;owned\x07\x1b[31mred"),
}


@pytest.mark.parametrize("kind", BEST)
def test_a_best_pt_that_contradicts_itself_is_one_line_wherever_it_is_used(kind, tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    content = checkpoints.load("run/best.pt")
    BEST[kind](content)
    torch.save(content, "odd.pt")
    torch.save({}, "image.png")
    capsys.readouterr()
    for use in (
        lambda: call("--eval", "odd.pt"),
        lambda: call(*TINY_MLP, "--teacher", "odd.pt"),
        lambda: predict.main(["odd.pt", "--report", "shapes"]),
        lambda: predict.main(["odd.pt", "--export", "a.pt2"]),
    ):
        assert use() == 2
        one_line(capsys)


def test_the_best_epoch_of_another_run_is_not_taken_for_this_ones(tiny, monkeypatch, capsys):
    flags = [*TINY_MLP, "--epochs", 3, "--lr", 0.3, "--monitor", "val_loss"]
    assert call(*flags, "--out", "run") == 0 and call(*flags, "--seed", 1, "--out", "other") == 0
    Path("run/best.pt").write_bytes(Path("other/best.pt").read_bytes())
    capsys.readouterr()
    assert call("--resume", "run/last.pt", "--epochs", 4) == 2
    one_line(capsys, "run/best.pt is not the best epoch")


@pytest.mark.parametrize("how", ["copied beside another", "linked", "in its place", "an older one"])
def test_a_resume_overwrites_no_other_run(how, tiny, capsys):
    flags = [*TINY_MLP, "--epochs", 2, "--val-split", 0]
    assert call(*flags, "--out", "run") == 0 and call(*flags, "--seed", 1, "--out", "other") == 0
    path = {"linked": "other/link.pt", "in its place": "other/last.pt"}.get(how, "other/copy.pt")
    if how == "linked":
        os.symlink("../run/last.pt", path)
    else:
        shutil.copy("other/last.pt" if how == "an older one" else "run/last.pt", path)
    if how == "an older one":
        assert call("--resume", "other/last.pt", "--epochs", 3) == 0
    before = {file.name: file.read_bytes() for file in Path("other").iterdir()}
    capsys.readouterr()
    assert call("--resume", path, "--epochs", 4) == 2
    one_line(capsys, "other/")
    assert before == {file.name: file.read_bytes() for file in Path("other").iterdir()}


def test_a_device_or_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe is in the way"):
        checkpoints.write(b"content", tmp_path / "pipe")
    assert not (tmp_path / "pipe").is_file()


def test_a_link_by_the_name_of_a_temporary_file_is_not_written_through(tmp_path):
    (tmp_path / "precious.txt").write_text("precious")
    (tmp_path / "last.pt.tmp").symlink_to("precious.txt")
    with pytest.raises(OSError, match=r"last\.pt\.tmp is a link"):
        checkpoints.write(b"content", tmp_path / "last.pt")
    assert (tmp_path / "precious.txt").read_text() == "precious"


@pytest.mark.parametrize("use, where", [("--eval", "mean"), ("--resume", "args"), ("--resume", "metrics")])
def test_one_string_in_many_places_is_not_written_out(use, where, tiny, capsys):
    """20 kB that a file shares 90,000 times would make messages of 1.8 GB."""
    assert call(*TINY_MLP, "--out", "run") == 0
    content, text = last(), 20_000 * "a"
    odd = {"mean": (text,) * 90_000, "args": content["args"] | {"seed": [text] * 90_000}}
    odd["metrics"] = {f"{i:06}{994 * 'k'}": 0.0 for i in range(3)} | {"x": [text] * 90_000}
    torch.save(content | {where: odd[where]}, "odd.pt")
    assert Path("odd.pt").stat().st_size < 10**7
    capsys.readouterr()
    assert call(use, "odd.pt") == 2
    one_line(capsys, "more text than the file could")


def test_sizes_that_are_no_lists_contradict_the_weights(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    content = checkpoints.load("run/best.pt")
    sizes = {"model_args": content["model_args"] | {"hidden": 5}, "args": content["args"] | {"hidden": 5}}
    checkpoints.save(content | sizes, "odd.pt")
    capsys.readouterr()
    assert call(*TINY_MLP, "--teacher", "odd.pt", "--out", "pupil") == 2
    one_line(capsys, "odd.pt holds weights that don't fit its model mlp: hidden 5 must be")


def test_a_test_loss_that_is_not_finite_is_no_result(tiny, monkeypatch, capsys):
    real = train.score

    def score(run, split):
        return (float("nan"), 0.1) if split is run.dataset.test else real(run, split)

    monkeypatch.setattr(train, "score", score)
    assert call(*TINY_MLP, "--runs", 2, "--out", "many") == 1
    said = capsys.readouterr()
    assert "the test loss is nan: try --eval many/seed-1/best.pt --amp off" in said.out and said.err == ""
    result = json.loads(Path("many/seed-1/result.json").read_text())
    assert result["stopped"] == "non-finite loss" and result["test_loss"] is result["test_acc"] is None


def test_files_of_flags_that_name_each_other_end(tiny, capsys):
    Path("0.args").write_text("--lr 1")
    for i in range(1, 40):
        Path(f"{i}.args").write_text(f"@{i - 1}.args\n@{i - 1}.args\n")
    assert call("@39.args") == 2
    one_line(capsys, "more than 10,000 words")
    Path("0.args").write_text("@1.args")
    assert call("@1.args") == 2
    one_line(capsys, "without end")


def test_many_images_on_the_command_line_are_no_files_of_flags():
    args = predict.make_parser().parse_intermixed_args(["best.pt", *(["a.png"] * 20_000)])
    assert len(args.images) == 20_000


def test_a_damaged_best_that_is_not_needed_is_rejected_with_a_way_out(tiny, capsys):
    assert call(*TINY_MLP, "--val-split", 0, "--out", "run") == 0
    best = Path("run/best.pt")
    best.write_bytes(best.read_bytes()[:1000])
    capsys.readouterr()
    assert call("--resume", "run/last.pt", "--epochs", 2) == 2
    one_line(capsys, "run/best.pt", "remove it")
    best.unlink()
    assert call("--resume", "run/last.pt", "--epochs", 2) == 0 and best.exists()


def test_the_log_of_an_endless_line_is_not_read_whole(tiny, capsys):
    Path("run").mkdir()
    with open("run/log.txt", "wb") as file:
        file.truncate(10**13)
    assert call(*TINY_MLP, "--out", "run") == 2
    one_line(capsys, "--out run holds a run already")


def test_the_folder_of_the_data_is_not_that_of_the_run(tiny, capsys):
    assert call("--model", "mlp", "--data-dir", "x", "--out", "./x/") == 2  # it would wait for its own lock
    one_line(capsys, "--out ./x/ is --data-dir, too")
    assert compare.main([*map(str, TINY_MLP), "--data-dir", "x", "--vary", "lr=0.1,0.001", "--out", "x"]) == 2
    one_line(capsys, "--out x is --data-dir, too")


@pytest.mark.parametrize("flag", ["--out", "--data-dir"])
@pytest.mark.parametrize("folder", ["images/train/run", "images/test", "link/cat/run", "images/runs/../test/cat"])
def test_nothing_is_written_among_the_images(flag, folder, tiny, capsys):
    write_folder(tiny / "images")
    os.symlink("images/train", "link")
    before = sorted(Path("images").rglob("*"))
    assert call(*TINY_MLP, "--data", "images", flag, folder) == 2
    one_line(capsys, f"{flag} {folder} is among the images of images: name another place")
    assert sorted(Path("images").rglob("*")) == before


def test_nothing_is_written_where_links_to_classes_lead(tiny, capsys):
    write_folder(tiny / "images")
    for part in ("train", "test"):
        Path("links", part).mkdir(parents=True)
        for name in ("cat", "dog"):
            os.symlink(tiny / "images" / part / name, Path("links", part, name))
    assert call(*TINY_MLP, "--data", "links", "--out", "images/train/cat/run") == 2
    one_line(capsys, "among the images of links")


def test_a_plot_of_learning_rates_is_not_written_among_the_images(tiny, capsys):
    write_folder(tiny / "images")
    assert diagnose.main([*TINY_MLP, "--data", "images", "--find-lr", "images/train/cat/lr.png"]) == 2
    one_line(capsys, "--find-lr images/train/cat/lr.png is among the images")


def test_a_run_beside_its_images_is_fine(tiny):
    write_folder(tiny / "images")
    assert call(*TINY_MLP, "--data", "images", "--batch-size", 4, "--out", "images/run", "--data-dir", "images") == 0


def test_many_layers_are_described_in_time():
    names = [f"blocks.{block}.{part}" for block in range(1000) for part in ("norm.weight", "mlp.weight", "mlp.bias")]
    start = time.process_time()
    found = run_folder.prefixes({name for name in names if "mlp" in name or ".7." in name}, names)
    assert time.process_time() - start < 1
    assert found == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp", "...", "blocks.998.mlp", "blocks.999.mlp"]


def test_a_diverged_seed_is_left_out_of_the_mean_and_named(tiny, monkeypatch, capsys):
    real = train.train

    def diverges(run, *others):
        if run.args.seed == 1:
            raise errors.Diverged("the training loss is nan", 1, 0.1)
        return real(run, *others)

    monkeypatch.setattr(train, "train", diverges)
    assert call(*TINY_MLP, "--runs", 3, "--out", "many") == 1
    result = json.loads(Path("many/result.json").read_text())
    assert result["n"] == 2 and result["failed_seeds"] == [1] and [run["seed"] for run in result["runs"]] == [0, 2]
    assert "failed: the runs with seed 1; 2 are left" in capsys.readouterr().out


def test_a_resume_knows_its_images_and_labels_again(tiny, capsys):
    write_folder(tiny / "pets", (8, 8), classes=("ant", "bee"))
    run = "--model cnn --widths 4 --data pets --epochs 1 --val-split 0.4 --device cpu --out run".split()
    assert call(*run) == 0
    for part in ("train", "test"):
        os.rename(f"pets/{part}/ant", f"pets/{part}/cow")  # sorts behind bee now
    capsys.readouterr()
    assert call("--resume", "run/last.pt", "--epochs", 2) == 2
    one_line(capsys, "classes")


def test_a_resume_knows_its_teacher_again(tiny, capsys):
    assert call(*TINY_MLP, "--out", "teacher") == 0 and call(*TINY_MLP, "--seed", 1, "--out", "other") == 0
    assert call(*TINY_MLP, "--teacher", "teacher/best.pt", "--out", "run") == 0
    shutil.copy("other/best.pt", "teacher/best.pt")
    capsys.readouterr()
    assert call("--resume", "run/last.pt", "--epochs", 2) == 2
    one_line(capsys, "teacher")


@pytest.mark.parametrize("flag", ["--resume", "--eval", "--teacher", "--init"])
def test_a_pipe_or_device_in_place_of_a_file_is_one_line(flag, tiny, capsys):
    os.mkfifo("pipe")
    for path in ("pipe", "/dev/zero", str(tiny)):
        assert rejected(*([] if flag == "--eval" else TINY_MLP), flag, path) == 2
        one_line(capsys, "is no file")
    assert predict.main(["pipe", "image.png"]) == 2
    one_line(capsys, "is no file")


def test_a_pipe_among_the_images_is_one_line(tiny, capsys):
    write_folder(tiny / "pets", (8, 8))
    os.mkfifo("pets/train/cat/pipe.jpg")
    assert call("--model", "cnn", "--widths", 4, "--data", "pets") == 2
    one_line(capsys, "pipe.jpg")


@pytest.mark.parametrize("path", ["pipe", "/dev/zero", "long"])
def test_flags_are_read_from_files_alone(path, tiny, capsys):
    os.mkfifo("pipe")
    Path("long").touch()
    os.truncate("long", 2**30)
    Path("more.args").write_text(f"--lr 0.1\n@{path}\n")
    for name in (path, "more.args"):
        assert rejected(f"@{name}") == 2
        one_line(capsys, f"@{path} must be a file of flags")


def test_pipes_beside_a_run_are_not_waited_for(tiny, monkeypatch, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    for name in ("last.pt.tmp", "result.json"):
        Path("run", name).unlink(missing_ok=True)
        os.mkfifo(Path("run", name))
    capsys.readouterr()
    assert call("--resume", "run/last.pt", "--epochs", 2) == 1
    one_line(capsys, "run/last.pt.tmp is in the way")
    assert plot.read_result("run") == {"args": {}}
    with pytest.raises(ValueError, match="is no file"):
        augment.read_images([Path("run", "result.json")])


@pytest.mark.parametrize("flag", ["--eval", "--resume", "--teacher", "--init", "--out", "--data"])
def test_an_empty_value_is_no_value(flag, tiny, capsys):
    assert rejected(*TINY_MLP, flag, "") == 2
    one_line(capsys, flag)
    assert not Path("runs").exists()


def test_a_run_that_was_killed_in_its_first_epoch_starts_again_by_the_same_command(tiny, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        halt(patch, 1, killed=True)
        call(*TINY_MLP, "--out", "run")
    assert [path.name for path in Path("run").iterdir()] == ["log.txt"]
    with monkeypatch.context() as patch:
        patch.setattr(arguments, "typed", lambda: "python train.py --another run")
        assert call(*TINY_MLP, "--out", "run") == 2
    assert call(*TINY_MLP, "--out", "run") == 0


def test_runs_that_were_interrupted_go_on_by_the_same_command(tiny, monkeypatch):
    assert call(*TINY_MLP, "--epochs", 2, "--runs", 3, "--out", "straight") == 0
    with monkeypatch.context() as patch:
        halt(patch, 9)  # inside the second run
        assert call(*TINY_MLP, "--epochs", 2, "--runs", 3, "--out", "many") == 130
    first = Path("many/seed-0/result.json").read_text()
    assert call(*TINY_MLP, "--epochs", 2, "--runs", 3, "--batch-size", 32, "--out", "many") == 2
    assert call(*TINY_MLP, "--epochs", 2, "--runs", 3, "--out", "many") == 0
    assert Path("many/seed-0/result.json").read_text() == first
    results = [json.loads(Path(f"{name}/result.json").read_text()) for name in ("straight", "many")]
    assert results[0]["test_acc"] == results[1]["test_acc"] and results[1]["n"] == 3


def test_runs_without_out_say_how_they_go_on(tiny, monkeypatch, capsys):
    flags = [*TINY_MLP, "--runs", 2]
    with monkeypatch.context() as patch:
        halt(patch, 3)  # inside the second run
        assert call(*flags) == 130
    out = "runs/mlp-shapes-adamw-cosine-x2"
    assert f"interrupted: with --out {out} the same command goes on from here" in capsys.readouterr().out
    assert call(*flags, "--out", out) == 0
    assert "seed-0 is finished" in capsys.readouterr().out and Path(out, "result.json").exists()


@pytest.mark.parametrize(
    "error", [RuntimeError("latex was not found"), OSError(28, "No space left on device"), KeyError(1)]
)
def test_a_plot_that_fails_costs_a_line_and_not_the_run(error, tiny, monkeypatch, capsys):
    def draw(*args, **options):
        raise error

    monkeypatch.setattr(plot, "draw", draw)
    assert call(*TINY_MLP, "--out", "run") == 0
    assert "no curves.png" in capsys.readouterr().out
    assert json.loads(Path("run/result.json").read_text())["test_acc"] is not None


@pytest.mark.slow
def test_a_terminal_that_goes_away_does_not_end_training(tmp_path):
    command = [sys.executable, HERE / "train.py", *TINY_MLP, "--epochs", "3", "--out", "run"]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()  # ... | head -1
    said = process.stderr.read()
    assert process.wait(timeout=120) == 0 and "Traceback" not in said, said
    assert json.loads((tmp_path / "run" / "result.json").read_text())["stopped"] == "finished"


@pytest.mark.slow
def test_closed_standard_streams(tmp_path):
    command = shlex.join([sys.executable, str(HERE / "train.py"), *TINY_MLP, "--out", "run"])
    command = f"exec {command} >&- 2>&-"
    env = os.environ | dict(OMP_NUM_THREADS="1")
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, env=env, timeout=120).returncode == 0
    assert (tmp_path / "run" / "result.json").exists()


def test_a_lost_connection_saves_and_ends(tiny, monkeypatch):
    real, calls = train.backward, []

    def backward(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGHUP)
        return real(*args)

    monkeypatch.setattr(train, "backward", backward)
    assert call(*TINY_MLP, "--epochs", 3, "--out", "run") == 128 + signal.SIGHUP
    assert last()["step"] == 2


@pytest.mark.parametrize("where", ["load", "evaluate"])
def test_a_signal_outside_of_training_is_an_exit_status_and_no_traceback(where, tiny, monkeypatch, capsys):
    from utils import evaluation

    module, real = (datasets, datasets.load) if where == "load" else (evaluation, evaluation.evaluate)

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    monkeypatch.setattr(module, where, interrupted)
    assert call(*TINY_MLP, "--out", "run") == 143
    assert capsys.readouterr().err == ""


def test_a_signal_in_the_last_validation_is_not_swallowed(tiny, monkeypatch):
    from utils import evaluation

    real = evaluation.evaluate

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", interrupted)
        assert call(*TINY_MLP, "--out", "run") == 143
    assert json.loads(Path("run/result.json").read_text())["stopped"] == "interrupted"
    assert call("--resume", "run/last.pt") == 0
    assert json.loads(Path("run/result.json").read_text())["stopped"] == "finished"


def test_messages_are_one_printable_line_of_bounded_length():
    assert errors.one_line("a\x1b[31m\nb") == "a\\x1b[31m b"
    assert errors.one_line("\udcff") == "\\udcff"
    assert len(errors.one_line("x" * 10**6)) < 1100


def test_names_that_are_no_utf_8_are_read_all_the_same(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    for name in (b"1.png", b"\xff.png", b"z\n.png"):
        Image.new("RGB", (32, 32)).save(os.fsdecode(name))
    capsys.readouterr()
    assert predict.main(["run/best.pt", "1.png", os.fsdecode(b"\xff.png"), "z\n.png"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    "flags", ["--batch-size 1", "--limit 1", "--find-lr --weight-decay 1e37", "--temperature 1e200"]
)
def test_diagnose_rejects_what_training_rejects(flags, tiny, capsys):
    assert diagnose.main([*TINY_MLP, *flags.split()]) == 2
    one_line(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["-OO", "-W error", "-I"])
def test_other_ways_to_start_python(options, tmp_path):
    others = [f"{name}.py --help" for name in ("train", "predict", "compare", "diagnose", "plot", "bench")]
    for command in ("mlp_mnist.py", "schedulers.py", *others):
        done = python(*options.split(), HERE / command.split()[0], *command.split()[1:], cwd=tmp_path)
        assert done.returncode == 0 and "Traceback" not in done.stderr, (command, done.stderr)


def test_the_environment_of_half_a_group_is_one_line(monkeypatch):
    for name, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ValueError, match="MASTER_PORT isn't"):
        distributed.init()
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(ValueError, match="MASTER_ADDR isn't"):  # each would train alone and write the same files
        distributed.init()


def test_a_restart_count_that_was_left_in_the_environment_means_nothing(tiny, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert call(*TINY_MLP, "--out", "run") == 0
    assert call(*TINY_MLP, "--out", "run") == 2


def test_fused_sgd_starts_from_zeros_though_the_first_step_was_skipped():
    from optimizers import OPTIMIZERS

    weight = torch.nn.Parameter(torch.ones(100))
    optimizer = OPTIMIZERS["sgd"]([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(100)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    optimizer.step()
    assert (optimizer.state[weight]["momentum_buffer"] == 0).all()


def test_swapped_files_are_seen(tiny):
    write_folder(tiny / "pets", (8, 8))
    before = datasets.load("pets", tiny / "data")
    a, b = Path("pets/train/cat"), Path("pets/train/dog")
    one, two = sorted(a.iterdir())[0], sorted(b.iterdir())[0]
    times = [os.stat(path) for path in (one, two)]
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    for path, info in zip((one, two), times, strict=True):
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    after = datasets.load("pets", tiny / "data")
    assert not torch.equal(before.train.images, after.train.images)


def test_a_copy_of_a_run_is_not_needed_to_check_it(tiny):
    """validate() changes nothing in what it looks at."""
    assert call(*TINY_MLP, "--out", "run") == 0
    content = last()
    before = copy.deepcopy(content)
    checkpoints.validate("x", content, checkpoints.RESUME_KEYS, 10**9)
    assert same(before, content)


def test_nested_images_belong_to_their_class(tiny):
    write_folder(tiny / "pets", (16, 16))
    flat = datasets.load("pets", "cache")
    inside = Path("pets/train/cat/old/older")
    inside.mkdir(parents=True)
    Path("pets/train/cat/5.png").rename(inside / "9.png")
    os.symlink("..", inside / "up")
    nested = datasets.load("pets", "cache")
    assert torch.equal(flat.train.images, nested.train.images) and torch.equal(flat.train.labels, nested.train.labels)


def test_files_of_mnist_are_not_taken_for_fashion_mnist(tmp_path):
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        images = torch.zeros(count, 28, 28, dtype=torch.uint8)
        images[:, :4] = 250 if part == "train" else 249  # as dark as digits
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", (torch.arange(count) % 10).byte())
    with pytest.raises(ValueError, match="it holds the images of mnist"):
        datasets.load("fashion-mnist", tmp_path)
    (tmp_path / "FashionMNIST").rename(tmp_path / "MNIST")
    assert len(datasets.load("mnist", tmp_path).train.labels) == 60_000


def test_a_signal_while_the_cache_is_written_leaves_no_half_of_it(tiny, monkeypatch):
    write_folder(tiny / "pets", (16, 16))

    def interrupted(images, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        datasets.load("pets", "kept")
    assert not list(Path("kept").rglob("*.*"))


def test_rejected_runs_leave_no_folder(tiny, capsys):
    assert call(*TINY_MLP, "--runs", 2, "--limit", 1) == 2
    assert not Path("runs").exists()


def test_plot_writes_the_file_that_it_names(tiny, monkeypatch, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["plot.py", "run", "--out", "plot"])
    with pytest.raises(SystemExit) as stop:
        plot.main()
    assert stop.value.code == 2
    one_line(capsys, "--out plot must end in .png")


def test_letters_that_a_font_lacks_are_no_warning(tmp_path, recwarn):
    plot.draw({"\N{CJK UNIFIED IDEOGRAPH-65E5}": rows([0.5, 0.6], train_acc=0.5)}, tmp_path / "plot.png")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


@pytest.mark.parametrize(
    "command",
    "train.py predict.py compare.py diagnose.py bench.py augment.py vit.py cnn_cifar10.py mlp_mnist.py".split(),
)
def test_ctrl_c_during_the_imports_is_no_traceback(command, tmp_path):
    """torch is replaced by a module that takes its time, so that the signal comes while it is imported."""
    (tmp_path / "torch.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    for part in ("plot.py", "train.py"):  # what compare.py imports first
        (tmp_path / part).write_text("import torch\n")
    code = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); runpy.run_path({command!r}, run_name='__main__')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT and said == b""


def test_what_argparse_rejects_is_escaped_too(tiny, capsys):
    assert rejected(*TINY_MLP, "\x1b[31mred\n") == 2
    one_line(capsys, "\\x1b[31mred")


def test_two_dashes_are_no_value(tiny, capsys):
    assert rejected(*TINY_MLP, "--cutmix=--") == 2
    one_line(capsys, "--cutmix: -- is no value")


def test_runs_go_on_with_the_same_data_and_patience_or_not_at_all(tiny, capsys):
    flags = [*TINY_MLP, "--epochs", 2, "--runs", 2, "--out", "many"]
    assert call(*flags) == 0
    Path("many/result.json").unlink()  # as if it had been stopped before the end
    write_folder(tiny / "pets", (32, 32))
    for other in (["--patience", 1], ["--data", "pets"]):
        assert call(*flags, *other) == 2
        one_line(capsys, f"another {other[0]}")
    assert call(*flags) == 0


def test_runs_for_minutes_go_on_with_the_length_that_was_measured(tiny, monkeypatch):
    flags = [word for word in TINY_MLP if word not in ("--epochs", "1")] + ["--minutes", 0.02, "--runs", 2]
    with monkeypatch.context() as patch:
        real = train.train_until

        def train_until(*args):
            if Path("many/seed-0").exists():
                os.kill(os.getpid(), signal.SIGINT)
            return real(*args)

        patch.setattr(train, "train_until", train_until)
        assert call(*flags, "--out", "many") == 130
    before = checkpoints.load("many/seed-0/last.pt", keys=checkpoints.RESUME_KEYS)
    assert call(*flags, "--out", "many") == 0
    after = checkpoints.load("many/seed-0/last.pt", keys=checkpoints.RESUME_KEYS)
    assert after["args"]["epochs"] == before["args"]["epochs"] != mlp_mnist.RECIPE["epochs"]
    assert after["args"]["warmup_epochs"] == before["args"]["warmup_epochs"] and after["step"] > before["step"]


def test_a_run_that_diverged_at_once_is_finished_for_the_same_command(tiny, capsys):
    flags = [*TINY_MLP, "--lr", "1e37", "--opt", "sgd", "--runs", 2, "--out", "many"]
    assert call(*flags) == 1 and not Path("many/seed-0/last.pt").exists()
    assert call(*flags) == 1
    assert capsys.readouterr().err == ""


def test_a_signal_in_the_last_test_stops_the_runs_that_follow(tiny, monkeypatch):
    real = train.finish

    def finish(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    flags = [*TINY_MLP, "--runs", 2, "--out", "many"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", finish)
        assert call(*flags) == 143
    assert not Path("many/seed-1").exists()
    assert json.loads(Path("many/seed-0/result.json").read_text())["stopped"] == "finished"
    assert call(*flags) == 0


def test_a_run_is_not_shortened_to_within_an_epoch(tiny, monkeypatch, capsys):
    flags = [*TINY_MLP, "--batch-size", 10, "--epochs", 3, "--save-every", 5]  # 13 steps an epoch
    with monkeypatch.context() as patch, pytest.raises(Killed):
        halt(patch, 22, killed=True)
        call(*flags, "--out", "run")
    assert checkpoints.load("run/last.pt", keys=checkpoints.RESUME_KEYS)["step"] == 20
    assert call("--resume", "run/last.pt", "--epochs", 1.5) == 2
    one_line(capsys, "--epochs 1.5 end by step 20, and it stopped at step 20")
    assert call("--resume", "run/last.pt", "--epochs", 2) == 0


def test_seeds_without_an_accuracy_are_rejected(tiny, capsys):
    assert call(*TINY_MLP, "--runs", 2, "--no-test", "--val-split", 0) == 2
    one_line(capsys, "--runs 2")


def test_attention_of_cudnn_is_off():
    """Its gradients can be NaN with 64 tokens, which is what a ViT of CIFAR-10 has."""
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision()
    try:
        devices.speed_up(torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before[0])
        torch.set_float32_matmul_precision(before[1])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c["model_args"].update(depth=10**9),  # no end of modules, of no size
        lambda c: c["model_args"].update(dim=10**6),
        lambda c: c["model_args"].update(dim=16.0),
        lambda c: c["state_dict"].pop("pos_embedding"),
        lambda c: c["state_dict"].update(pos_embedding=torch.zeros(3)),
        lambda c: c["args"].update(dim=10**6),
    ],
    ids=["depth", "dim", "float", "without positions", "odd positions", "args"],
)
def test_sizes_that_the_weights_do_not_have_are_one_line_wherever_they_are_used(spoil, tiny, capsys):
    small = ["--model", "vit", "--dim", 16, "--depth", 1, "--heads", 2, "--patch-size", 8, *TINY]
    assert call(*small, "--out", "run") == 0
    capsys.readouterr()
    content = checkpoints.load("run/last.pt", keys=checkpoints.RESUME_KEYS)
    spoil(content)
    torch.save(content, "run/last.pt")
    uses = [["--init", "run/last.pt", *TINY, "--model", "vit"], ["--teacher", "run/last.pt", *small]]
    for use in [*uses, ["--resume", "run/last.pt"], ["--eval", "run/last.pt"]]:
        assert call(*use) == 2, use
        one_line(capsys, "run/last.pt")
    assert predict.main(["run/last.pt", "--export", "x.pt2"]) == 2
    one_line(capsys, "run/last.pt")


def test_a_word_of_blanks_is_no_argument(tiny, capsys):
    assert rejected(*TINY, " ") == 2
    one_line(capsys, "unrecognized arguments: : see train.py")


@pytest.mark.parametrize("model, name", [("mlp", "hidden"), ("cnn", "widths")])
@pytest.mark.parametrize("where", ["model_args", "args"])
def test_sizes_beyond_all_machines_are_one_line(model, name, where, tiny, capsys):
    """Either in the description of the model, or left out of it and in the arguments that a resume would build."""
    assert call("--model", model, *TINY, "--out", "run") == 0
    content = checkpoints.load("run/last.pt", keys=checkpoints.RESUME_KEYS)
    content["model_args"].pop(name) if where == "args" else content["model_args"].update({name: (10**7,)})
    content["args"][name] = (10**7,)
    torch.save(content, "run/last.pt")
    capsys.readouterr()
    assert call("--resume", "run/last.pt") == 2
    lacks = f"run/last.pt lacks {name} in its model_args: start a new run from its weights with --init"
    one_line(capsys, lacks if where == "args" else "run/last.pt holds weights that don't fit its model")


def test_a_small_file_makes_no_large_objects(tiny, capsys):
    class Large:
        def __reduce__(self):
            return bytearray, (2**33,)

    torch.save({"state_dict": {}, "more": Large()}, "large.pt")
    for use in ("--eval", "--resume", "--init"):
        assert call(*TINY_MLP, use, "large.pt") == 2 if use == "--init" else call(use, "large.pt") == 2
        one_line(capsys, "it holds a __builtin__.bytearray")


@pytest.mark.parametrize("where, status", [("prepare", 2), ("backward", 1), ("finish", 1)])
def test_what_no_rule_foresaw_is_one_line_with_its_place(where, status, tiny, monkeypatch, capsys):
    monkeypatch.setattr(train, where, lambda *args: {}["a mistake of one's own"])
    assert call(*TINY_MLP, "--out", "run") == status
    one_line(capsys, "KeyError", "a mistake of one's own", "test_hostile.py:", "python -X dev")


@pytest.mark.slow  # three seconds for one line of errors.py
def test_python_in_development_mode_shows_the_traceback(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import train; train.prepare = lambda args: 1 / 0; train.main()"
    )
    command = [sys.executable, "-X", "dev", "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "ZeroDivisionError" in done.stderr and "Traceback" in done.stderr


def with_pickle(path, pickled):
    """A copy of a checkpoint with another pickle in it."""
    with zipfile.ZipFile("run/best.pt") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith(".pkl") else old.read(name))
    end_as_torch_does(path)


def test_pickles_that_end_the_interpreter_or_fill_the_memory_are_one_line(tiny, capsys):
    """As keys, tuples a million deep, whose hash has no guard, and 2^60 in one another; objects of any size."""
    assert call(*TINY_MLP, "--out", "run") == 0
    with_pickle("deep.pt", b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"K\x01s.")
    with_pickle("wide.pt", b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"}h\x00K\x01s.")
    with_pickle("large.pt", b"\x80\x02}ctorch\nTensor\n]\x85R.")
    with_pickle("call.pt", b"\x80\x02]q\x00" + b"]q\x00h\x00a" * 60 + b")R.")
    with_pickle("name.pt", b"\x80\x02(]q\x00" + b"X\x01\x00\x00\x00x" * 4 + b"tQ.")
    with_pickle("short.pt", b"\x80\x02(]q\x00" + b"X\x01\x00\x00\x00x" * 3 + b"tQ.")
    encode = b"c_codecs\nencode\n"
    with_pickle(
        "bomb.pt", b"\x80\x02}" + encode * 100 + b"X\x01\x00\x00\x00x" + b"X\x03\x00\x00\x00hex\x86R" * 100 + b"."
    )
    capsys.readouterr()
    for name, words in (
        ("deep.pt", "too deep or too often within each other"),
        ("wide.pt", "too deep or too often within each other"),
        ("bomb.pt", "it holds a _codecs.encode"),
        ("large.pt", "it holds a torch.Tensor"),
        ("call.pt", "it calls what is no function"),
        ("name.pt", "it names no storage"),
        ("short.pt", "it names no storage"),
    ):
        for use in (["--eval"], ["--resume"], [*TINY_MLP, "--init"], [*TINY_MLP, "--teacher"]):
            assert call(*use, name) == 2
            one_line(capsys, name, words)


def test_a_long_history_is_not_deep(tiny, monkeypatch):
    """Python pickles a list a thousand values at a time: none of these steps is a level."""
    monkeypatch.setattr(checkpoints, "DEEPEST_PICKLE", 8)
    content = {"rows": [{"epoch": i} for i in range(10_000)], "names": {str(i): (i, i) for i in range(10_000)}}
    checkpoints.save(content, "long.pt")
    assert checkpoints.load("long.pt", keys={}) == content


def test_weights_that_share_their_memory_make_no_large_model(tiny, capsys):
    assert call(*TINY_MLP, "--hidden", "64,64,64,64,64", "--no-batch-norm", "--out", "run") == 0
    content = checkpoints.load("run/best.pt")
    largest = max(content["state_dict"].values(), key=torch.Tensor.numel)
    content["state_dict"] |= {f"more.{i}": largest for i in range(50)}
    torch.save(content, "shared.pt")
    capsys.readouterr()
    assert call("--eval", "shared.pt") == 2
    one_line(capsys, "shared.pt", "no tensor that the file could hold")


def test_a_depth_without_end_is_one_line(tiny, capsys):
    assert call("--model", "vit", *TINY, "--depth", 10**9) == 2
    one_line(capsys, "--depth 1000000000 must be at most 1000")


def test_finished_seeds_of_other_images_are_not_averaged(tiny, monkeypatch, capsys):
    assert call(*TINY_MLP, "--runs", 2, "--out", "many") == 0
    Path("many/result.json").unlink()  # as if a third seed had been interrupted
    monkeypatch.setattr(datasets, "shapes", lambda real=datasets.shapes: brighter(real()))
    capsys.readouterr()
    assert call(*TINY_MLP, "--runs", 2, "--out", "many") == 2
    one_line(capsys, "many holds runs on other images or labels")


def brighter(dataset):
    images, labels = dataset.train
    return dataclasses.replace(dataset, train=datasets.Split(images // 2 + 100, labels))


def test_a_resumed_seed_is_still_where_it_was(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        halt(patch, 3)
        assert call(*TINY_MLP, "--epochs", 3, "--runs", 2, "--out", "many") == 130
    assert call(*TINY_MLP, "--epochs", 3, "--runs", 2, "--out", "many") == 0
    log = Path("many/seed-0/log.txt").read_text()
    assert "going on after step" in log and "-> None" not in log
    assert json.loads(Path("many/seed-0/result.json").read_text())["args"]["out"] == "many/seed-0"


def test_lines_are_printed_without_control_characters(tiny, monkeypatch, capsys):
    """A stranger's last.pt may say anything of where it was written."""
    assert call(*TINY_MLP, "--out", "run") == 0
    content = last()
    content["args"]["out"] = "\x1b]0;owned\x07" + 5000 * "x"
    torch.save(content, "run/last.pt")
    capsys.readouterr()
    assert call("--resume", "run/last.pt", "--epochs", 2, "--out", "new") == 0
    said = capsys.readouterr().out
    assert r"--out \x1b]0;owned\x07xx" in said and "\x1b" not in said and max(map(len, said.splitlines())) < 1000


def test_a_failed_run_is_not_said_to_have_a_checkpoint(tiny, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(train, "backward", lambda *args: 1 / 0)
        assert call(*TINY_MLP, "--out", "run") == 1
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(arguments, "typed", lambda: "python train.py --another run")
        assert call(*TINY_MLP, "--seed", 7, "--out", "run") == 2
    said = capsys.readouterr().err
    assert "holds a run already: name another folder" in said and "--resume its last.pt" not in said
    assert call(*TINY_MLP, "--out", "run2") == 0 and call(*TINY_MLP, "--out", "run2") == 2
    assert "--resume its last.pt" in capsys.readouterr().err


def test_a_test_set_of_another_set_is_noticed(tmp_path):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for part, count, bright in (("train", 60_000, 4), ("t10k", 10_000, 8)):
        images = torch.zeros(count, 28, 28, dtype=torch.uint8)
        images[:, :bright] = 250
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", (torch.arange(count) % 10).byte())
    with pytest.raises(ValueError, match="it holds the images of fashion-mnist"):
        datasets.load("mnist", tmp_path)


def test_linked_folders_of_images_are_counted_as_left_out(tiny):
    write_folder(tiny / "pets", (16, 16))
    Path("elsewhere").mkdir()
    os.symlink(Path("elsewhere").resolve(), "pets/train/cat/more")
    assert "left out: 1" in datasets.load("pets", "cache").note


def test_predictions_need_no_standard_output(tiny, monkeypatch):
    assert call(*TINY_MLP, "--out", "run") == 0
    Image.new("RGB", (32, 32)).save("a.png")
    monkeypatch.setattr(sys, "stdout", None)
    assert predict.main(["run/best.pt", "a.png"]) == 0


@pytest.mark.slow
def test_a_full_disk_costs_an_export_one_line(tiny):
    """Torch's own writer would end the process, and leave its file."""
    assert call(*TINY_MLP, "--out", "run") == 0
    code = "import resource, sys; sys.path.insert(0, sys.argv[1]); import predict; "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); sys.exit(predict.main(sys.argv[2:]))"
    done = python("-c", code, HERE, "run/best.pt", "--export", "model.pt2", cwd=tiny)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "too large" in done.stderr, done.stderr
    assert not list(tiny.glob("model*"))


def test_images_of_a_pixel_have_no_shifted_views(tiny, capsys):
    write_folder(tiny / "pets", (4, 4))
    flags = "--model mlp --hidden 8 --data pets --img-size 1 --crop-pad 0 --epochs 1 --val-split 4 --device cpu".split()
    assert call(*flags, "--tta", "--out", "run") == 2
    one_line(capsys, "--tta translates images by a pixel")
    assert not Path("run").exists() and call(*flags, "--out", "run") == 0


@pytest.mark.parametrize(
    "train_count, test_count, size, said",
    [(10, 30, (28, 28), "have changed places"), (30, 10, (56, 14), "expected squares"), (30, 10, (14, 56), "squares")],
)
def test_files_of_mnist_that_no_mnist_has(train_count, test_count, size, said, tmp_path):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for part, count in (("train", train_count), ("t10k", test_count)):
        write_idx(raw / f"{part}-images-idx3-ubyte", torch.zeros(count, *size, dtype=torch.uint8))
        write_idx(raw / f"{part}-labels-idx1-ubyte", (torch.arange(count) % 10).byte())
    with pytest.raises(ValueError, match=said):
        datasets.load("mnist", tmp_path)


def test_of_several_that_need_a_set_one_downloads_it(tmp_path, monkeypatch):
    calls, loaded = [], []

    def download(name, cls, root, new):
        calls.append(name)
        time.sleep(0.3)
        write_mnist(root)

    monkeypatch.setattr(datasets, "_download", download)
    root = tmp_path / "data"
    threads = [threading.Thread(target=lambda: loaded.append(datasets.load("mnist", root))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert calls == ["mnist"] and len(loaded) == 3
    assert all(torch.equal(one.train.images, loaded[0].train.images) for one in loaded)


def test_names_of_runs_that_are_no_utf_8_are_drawn(tmp_path):
    plot.draw({"run\udcff": rows([0.1, 0.2], train_acc=0.1)}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("command", ["plot", "schedulers", "augment", "attention"])
def test_a_plot_into_a_pipe_is_one_line(command, tiny, monkeypatch, capsys):
    os.mkfifo("pipe.pdf")
    os.mkfifo("pipe.png")
    Path("run").mkdir()
    Path("run/metrics.csv").write_text(",".join(plot.COLUMNS) + "\n1,1,1,1,1,1\n")
    argv = {
        "plot": ["run", "--out", "pipe.pdf"],
        "schedulers": ["--plot", "pipe.pdf"],
        "augment": ["--show", "pipe.png", "--flip"],
    }
    if command == "attention":
        flags = "--model vit --depth 1 --dim 8 --heads 1 --mlp-dim 8 --patch-size 16 --out vit"
        assert call(*TINY, *flags.split()) == 0
        Image.new("RGB", (32, 32)).save("a.png")
        capsys.readouterr()
        assert predict.main(["vit/best.pt", "a.png", "--attention", "pipe.png"]) == 2
    else:
        monkeypatch.setattr(sys, "argv", [f"{command}.py", *argv[command]])
        with pytest.raises(SystemExit) as stop:
            {"plot": plot, "schedulers": schedulers, "augment": augment}[command].main()
        assert stop.value.code == 2
    one_line(capsys, "pipe")


def test_a_learning_rate_is_not_sought_for_a_plot_into_a_pipe(tiny, capsys):
    os.mkfifo("pipe.png")
    assert diagnose.main([*TINY_MLP, "--find-lr", "pipe.png"]) == 2
    one_line(capsys, "--find-lr pipe.png")


def test_a_plot_ends_in_a_name_of_a_format(tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["schedulers.py", "--plot", "x."])
    with pytest.raises(SystemExit):
        schedulers.main()
    one_line(capsys, "must end in")


FILES_ALONE = {
    "augment.py": ["--flip", "--show"],
    "schedulers.py": ["--plot"],
    "plot.py": ["run", "--out"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", FILES_ALONE)
def test_the_last_line_of_a_plot_needs_no_terminal(command, tmp_path):
    """Neither its alphabet nor a disk that isn't full: the plot is there."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text(",".join(plot.COLUMNS) + "\n1,1,1,1,1,1\n")
    words = [sys.executable, HERE / command, *FILES_ALONE[command], "caf\xe9.png"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    options = {"cwd": tmp_path, "stderr": subprocess.PIPE, "text": True}
    ascii_only = subprocess.run(words, stdout=subprocess.PIPE, env=env | {"PYTHONIOENCODING": "ascii"}, **options)
    assert (ascii_only.returncode, ascii_only.stdout, ascii_only.stderr) == (0, "wrote caf\\xe9.png\n", "")
    for more in ({}, {"PYTHONUNBUFFERED": "1"}):
        with open("/dev/full", "w") as full:
            done = subprocess.run(words, stdout=full, env=env | more, **options)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_note_on_a_full_disk_costs_nothing(tiny):
    assert call(*TINY_MLP, "--out", "run") == 0
    Image.new("RGB", (40, 32)).save("wide.png")
    with open("/dev/full", "w") as full:
        words = [sys.executable, HERE / "predict.py", "run/best.pt", "wide.png"]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.returncode == 0 and done.stdout.startswith("wide.png: ")


@pytest.mark.parametrize("module", [schedulers, plot, augment])
def test_files_alone_reject_in_one_printable_line(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--odd\x1b[31m\n" + 5000 * "x"])
    with pytest.raises(SystemExit):
        module.main()
    one_line(capsys)


def test_pillow_warns_of_no_image_that_is_shown(tiny, monkeypatch, recwarn):
    image = Image.new("P", (32, 32))
    image.putpalette([i % 256 for i in range(768)])
    image.save("palette.png", transparency=bytes(range(256)))
    monkeypatch.setattr(sys, "argv", ["augment.py", "palette.png", "--flip", "--show", "a.png"])
    augment.main()
    assert not recwarn.list and Path("a.png").exists()


def test_a_benchmark_looks_where_it_writes_before_it_measures(tiny, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", None)
    os.mkfifo("pipe.json")
    Path("b.json.tmp").mkdir()
    for out in ("pipe.json", "b.json", "nowhere/b.json", ".", "new/", 253 * "x"):
        assert bench.main(["--out", out]) == 2
        one_line(capsys, "--out", out)
        assert not Path(out).is_file()


def test_a_plot_of_learning_rates_that_fails_is_one_line(tiny, monkeypatch, capsys):
    monkeypatch.setattr(diagnose, "find_lr", lambda run: ([0.1] * 5, [1.0] * 5, 0.1))

    def save(figure, path):
        raise RuntimeError("latex could not be found")

    monkeypatch.setattr(report, "save", save)
    assert diagnose.main([str(word) for word in [*TINY_MLP, "--find-lr", "lr.png"]]) == 1
    one_line(capsys, "diagnose.py: error: matplotlib can't draw the plot: latex could not be found")


def test_a_plot_that_fails_is_not_the_checkpoints_fault(tiny, monkeypatch, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0

    def draw(*args):
        raise RuntimeError("latex could not be found")

    monkeypatch.setattr(predict.report, "draw_confusion", draw)
    capsys.readouterr()
    assert predict.main(["run/best.pt", "--report", "shapes"]) == 1
    one_line(capsys, "latex could not be found")


def test_a_folder_that_is_rejected_leaves_none_above_it(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    capsys.readouterr()
    for out in (f"new/{300 * 'x'}", "new/../run"):
        assert call(*TINY_MLP, "--out", out) == 2
        one_line(capsys)
        assert not Path("new").exists()


def test_a_move_that_fails_leaves_no_folder(tiny, monkeypatch, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:

        def fsync(file):
            raise OSError("no space left on device")

        patch.setattr(os, "fsync", fsync)
        assert call("--resume", "run/last.pt", "--epochs", 2, "--out", "moved") == 2
    one_line(capsys, "no space left")
    assert not Path("moved").exists()
    assert call("--resume", "run/last.pt", "--epochs", 2, "--out", "moved") == 0


def test_other_names_of_a_file_keep_its_content(tiny, capsys):
    Path("hard").mkdir()
    Path("precious").write_text("mine")
    os.link("precious", "hard/last.pt.tmp")
    assert call(*TINY_MLP, "--out", "hard") == 0
    assert Path("precious").read_text() == "mine" and not Path("hard/last.pt.tmp").exists()
    Path("soft").mkdir()
    os.symlink("../victim", "soft/log.txt")
    capsys.readouterr()
    assert call(*TINY_MLP, "--out", "soft") == 2
    one_line(capsys, "log.txt")
    assert not Path("victim").exists()


def test_a_folder_by_the_name_of_a_set_is_not_it(tiny, capsys):
    Path("shapes").mkdir()
    assert call(*TINY_MLP, "--img-size", 16) == 2
    one_line(capsys, "--img-size")


@pytest.mark.parametrize("replace", ["folder", "parent"])
def test_seeds_in_a_folder_that_is_replaced_stop(replace, tiny, monkeypatch, capsys):
    real = train.run_once

    def run_once(*args):
        done = real(*args)
        os.rename("parent", "moved")
        if replace == "folder":
            Path("parent/many").mkdir(parents=True)
        else:
            Path("parent").write_text("of somebody else")
        return done

    monkeypatch.setattr(train, "run_once", run_once)
    assert call(*TINY_MLP, "--runs", 2, "--out", "parent/many") == 1
    one_line(capsys, "moved away or replaced")
    assert not list(Path("parent").glob("many/*"))


def test_a_plot_that_cannot_be_drawn_replaces_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/metrics.csv").write_text(",".join(plot.COLUMNS) + "\n1,1,1,1,1,1\n")
    for name in ("old.png", "old.ps"):
        Path(name).write_text("mine")
    Path("drawn.png").write_text(augment.MARK)

    def savefig(self, target, *args, **options):
        if not hasattr(target, "write"):
            open(target, "wb").close()
        raise RuntimeError("no LaTeX")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    monkeypatch.setattr("PIL.Image.Image.save", savefig)
    for module, *argv in (
        (plot, "run", "--out", "old.png"),
        (plot, "run", "--out", "old.ps"),
        (schedulers, "--plot", "old.png"),
        (augment, "--flip", "--show", "drawn.png"),
    ):
        monkeypatch.setattr(sys, "argv", [module.__name__, *argv])
        with pytest.raises((SystemExit, RuntimeError)):
            module.main()
    assert {path.read_text() for path in Path().glob("old.*")} == {"mine"}
    assert Path("drawn.png").read_text() == augment.MARK


def test_runs_are_not_mixed_up_in_a_plot(tiny):
    for name, lr in (("mlp", None), ("other", 0.002), ("a", 0.003), ("b", 0.003000001)):
        Path(name).mkdir()
        Path(name, "metrics.csv").write_text(",".join(plot.COLUMNS) + "\n1,1,1,1,1,1\n")
        if lr:
            result = {"args": {"model": "mlp", "data": "shapes", "lr": lr}, "data": "shapes", "seed": len(name)}
            Path(name, "result.json").write_text(json.dumps(result | {"seed": ord(name[0])}))
    assert len(plot.collect(["mlp", "other"])[0]) == 2 and len(plot.collect(["a", "b"])[0]) == 2
    Path("a/metrics.csv").write_text(",".join(plot.COLUMNS) + "\n1e308,1,1,1,1,1\n-1e308,1,1,1,1,1\n")
    with pytest.raises(ValueError, match="epochs"):
        plot.read("a")


def test_names_of_variants_are_printable_and_not_long(tiny, capsys):
    for name, rule in (("x\x1b[31m", "printable"), ("two\nlines", "printable"), (300 * "y", "at most 200 bytes")):
        assert compare.main([*TINY_MLP, "--case", f"{name}: --lr 0.1", "--case", "b: --lr 1", "--out", "c"]) == 2
        one_line(capsys, rule)
    assert compare.main([*TINY_MLP, "--vary", f"lr=0.1;0.{200 * '0'}1", "--out", "c"]) == 2
    one_line(capsys, "at most 200 bytes")


def test_a_report_is_rejected_before_it_is_computed(tiny, monkeypatch, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    monkeypatch.setattr(predict, "logits_of", None)
    Path("file").write_text("mine")
    Path("folder").mkdir()
    os.mkfifo("folder/mistakes.png")
    capsys.readouterr()
    for out in ("file", "folder"):
        assert predict.main(["run/best.pt", "--report", "shapes", "--out", out]) == 2
        one_line(capsys, out)


def test_a_report_whose_loss_is_infinite_is_no_json(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    content = checkpoints.load("run/best.pt")
    content["state_dict"]["head.bias"] = torch.tensor([3e38, -3e38] * 5)
    checkpoints.save(content, "odd.pt")
    capsys.readouterr()
    assert predict.main(["odd.pt", "--report", "shapes", "--json"]) == 2
    one_line(capsys, "odd.pt")


def test_a_map_of_many_tokens_is_rejected(tiny, monkeypatch, capsys):
    flags = "--model vit --depth 1 --dim 8 --heads 1 --mlp-dim 8 --patch-size 4 --out vit"
    assert call(*TINY, *flags.split()) == 0
    Image.new("RGB", (32, 32)).save("a.png")
    monkeypatch.setattr(predict, "MOST_TOKENS", 63)
    capsys.readouterr()
    assert predict.main(["vit/best.pt", "a.png", "--attention", "map.png"]) == 2
    one_line(capsys, "64 tokens")
    assert predict.main(["vit/best.pt", "a.png", "--attention", "vit/best.pt"]) == 2


def test_a_benchmark_until_an_accuracy_rejects_what_has_no_effect(capsys):
    for idle in ("--models vit", "--turns 9", "--seconds 3"):
        assert bench.main(["--until", "0.5", *idle.split()]) == 2
        one_line(capsys, idle.split()[0])


@pytest.mark.parametrize(
    "module, argv", [(vit, "--dim 300000 --heads 3 --mlp-dim 900000"), (mlp_mnist, "--hidden 900000,900000")]
)
def test_what_a_model_costs_takes_no_memory(module, argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module.__name__, *argv.split()])
    module.main()
    assert "parameters" in capsys.readouterr().out


def test_what_is_removed_is_this_runs_own(tiny):
    folder = run_folder.open_folder("new", "default")
    os.rename("new", "old")
    Path("new").mkdir()
    Path("new/best.pt").write_text("of another run")
    folder.discard("best.pt")
    assert Path("new/best.pt").exists() and Path("old/log.txt").exists()


def test_a_folder_that_another_run_has_just_made_stays(tiny, monkeypatch):
    """The other one has made and locked it, and not yet written its log, when this one looks."""
    real, others = Path.mkdir, []

    def mkdir(path, *args, **options):
        real(path, *args, **options)
        if not others:
            others.append(os.open(path, os.O_RDONLY))
            assert run_folder.lock(others[0])

    monkeypatch.setattr(Path, "mkdir", mkdir)
    mine = run_folder.open_folder(None, "default")
    assert mine.path == Path("default-2") and Path("default").is_dir()
    mine.close()
    os.close(others[0])


@pytest.mark.parametrize("opt", ["adamw", "adagrad"])
def test_a_state_whose_steps_were_all_skipped_is_taken_in_fp16_alone(opt):
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = optimizers.OPTIMIZERS[opt]([{"params": [parameter]}], lr=0.1)
    parameter.grad = torch.ones(2, 2)
    if opt == "adamw":
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
    saved = optimizer.state_dict()
    assert checkpoints.optimizer_state(optimizer, saved, may_be_empty=True)["state"][0]["step"] == 0
    with pytest.raises(ValueError, match="step"):
        checkpoints.optimizer_state(optimizer, saved)


def test_a_folder_that_torch_cannot_read_from_is_rejected_before_training(tiny, capsys):
    assert call(*TINY_MLP, "--out", "r\udcff") == 2
    one_line(capsys, "can't be written")
    assert not list(tiny.iterdir())
    write_folder(tiny / "p\udcff", (16, 16))
    assert call("--data", "p\udcff", "--epochs", 1, "--hidden", 8, "--device", "cpu") == 0
    assert [path.name for path in Path("runs").iterdir()] == ["mlp-p\\udcff-adamw-cosine"]


def test_lbfgs_without_a_gradient_goes_on(tiny, capsys):
    flags = [*TINY_MLP, "--opt", "lbfgs", "--amp", "auto", "--freeze", "head"]
    assert call(*flags, "--out", "run") == 0
    assert last()["optimizer"]["state"][0]["n_iter"] == 0
    assert call(*flags, "--epochs", 2, "--resume", "run/last.pt") == 0  # --amp auto is what it was, too


@pytest.mark.parametrize("content", ["", '{"stopped": "finished", "args": {}}', '{"stopped": []}', "[1]"])
def test_a_result_of_a_seed_that_is_none_is_named(content, tiny, capsys):
    flags = [*TINY_MLP, "--runs", 2, "--out", "many"]
    assert call(*flags) == 0
    Path("many/result.json").unlink()
    Path("many/seed-0/result.json").write_text(content)
    capsys.readouterr()
    assert call(*flags) == 2
    one_line(capsys, "many/seed-0/result.json", "remove it")


def test_the_command_to_continue_can_be_pasted(tiny, monkeypatch, capsys):
    halt(monkeypatch, 2)
    assert call(*TINY_MLP, "--out", "my run") == 130
    assert "--resume 'my run/last.pt'" in capsys.readouterr().out


OWN_SET = "--model mlp --hidden 16 --epochs 1 --batch-size 64 --device cpu".split()  # without --data


def found(monkeypatch, times):
    """Make `times` say for each loading of MNIST whether it's there; shapes stand for it. Returns the loadings."""
    loadings = []

    def from_torchvision(name, root, read_only):
        loadings.append(times[len(loadings)])
        if not loadings[-1]:
            raise datasets.Unavailable("there is no network")
        return dataclasses.replace(datasets.shapes(), name=name)

    monkeypatch.setattr(datasets, "_from_torchvision", from_torchvision)
    return loadings


def test_all_runs_of_a_comparison_train_on_the_set_that_the_first_one_found(tiny, monkeypatch, capsys):
    loadings = found(monkeypatch, [False, True, True])
    assert compare.main([*OWN_SET, "--vary", "lr=0.1,0.01", "--runs", "2", "--test", "none", "--out", "c"]) == 0
    results = [json.loads(path.read_text()) for path in Path("c").glob("*/seed-*/result.json")]
    assert len(results) == 4 and {result["data"] for result in results} == {"shapes"}
    assert loadings == [False]


def test_a_set_that_vanishes_between_two_seeds_is_not_replaced_by_another(tiny, monkeypatch, capsys):
    found(monkeypatch, [True, True, False])  # for the folder's name, for both seeds
    assert call(*OWN_SET, "--runs", 2, "--out", "many") == 2
    assert "there is no network" in capsys.readouterr().err
    assert json.loads(Path("many/seed-0/result.json").read_text())["data"] == "mnist"
    assert not Path("many/result.json").exists() and not Path("many/seed-1").exists()


@pytest.mark.parametrize("flag", ["--teacher", "--init"])
def test_seeds_that_started_from_another_file_are_not_averaged(flag, tiny, monkeypatch, capsys):
    assert call(*TINY_MLP, "--out", "before") == 0
    flags = [*TINY_MLP, flag, "before/best.pt", "--runs", 2, "--out", "many"]
    with monkeypatch.context() as patch:
        halt(patch, 4)  # in the second
        assert call(*flags) == 130
    os.rename("before", "kept")
    assert call(*TINY_MLP, "--seed", 1, "--out", "before") == 0
    capsys.readouterr()
    assert call(*flags) == 2
    one_line(capsys, f"--out many holds runs from before {flag} before/best.pt changed")
    shutil.rmtree("before")
    shutil.copytree("kept", "before")
    assert call(*flags) == 0
    assert json.loads(Path("many/result.json").read_text())["n"] == 2
    Path("many/result.json").unlink()
    content = checkpoints.load("many/seed-1/last.pt", keys=checkpoints.RESUME_KEYS)
    del content["init"], content["teacher"]  # as of an older version
    checkpoints.save(content, "many/seed-1/last.pt")
    assert call(*flags) == 0


def test_weights_that_are_not_finite_replace_no_last_pt(tiny, capsys):
    flags = "--batch-size 10 --opt sgd --lr 1e21 --sched none --warmup-epochs 0 --save-every 1 --epochs 2".split()
    assert call(*TINY_MLP, *flags, "--out", "run") == 1
    assert "a weight is not finite by step 2" in capsys.readouterr().out
    assert last()["step"] == 1
    assert call(*TINY_MLP, *flags, "--runs", 2, "--out", "many") == 1
    before = Path("many/seed-0/log.txt").read_text()
    assert call(*TINY_MLP, *flags, "--runs", 2, "--out", "many") == 1  # not run again
    assert Path("many/seed-0/log.txt").read_text() == before


def test_a_seed_that_was_killed_in_its_first_epoch_goes_on_by_another_command(tiny, monkeypatch):
    flags = [*TINY_MLP, "--runs", 2, "--out", "many"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        halt(patch, 1, killed=True)
        call(*flags)
    monkeypatch.setattr(arguments, "typed", lambda: "python train.py --other words")
    assert call(*flags, "--no-cuda-graph") == 0
    assert Path("many/seed-0/log.txt").read_text().count("$ python train.py --other words") == 1


def test_a_best_pt_that_was_replaced_is_not_tested(tiny, monkeypatch, capsys):
    assert call(*TINY_MLP, "--seed", 1, "--out", "other") == 0
    real = train.finish

    def finish(*args):
        shutil.copy("other/best.pt", "run/best.pt")
        return real(*args)

    monkeypatch.setattr(train, "finish", finish)
    capsys.readouterr()
    assert call(*TINY_MLP, "--out", "run") == 1
    one_line(capsys, "run/best.pt was replaced")
    assert not Path("run/result.json").exists()


def test_metrics_that_vanish_cost_the_plot_and_not_the_table(tiny, monkeypatch):
    real = compare.test_some

    def test_some(*args):
        for path in Path("c").glob("*/seed-0/metrics.csv"):
            path.unlink()
        return real(*args)

    monkeypatch.setattr(compare, "test_some", test_some)
    assert compare.main([*TINY_MLP, "--vary", "lr=0.1,0.01", "--out", "c"]) == 0
    assert "no compare.png" in Path("c/compare.md").read_text()


def test_a_result_of_brackets_counts_as_failed(tiny, capsys):
    flags = [*TINY_MLP, "--vary", "lr=0.1,0.01", "--out", "c"]
    assert compare.main(flags) == 0
    Path("c/lr-0.1/seed-0/result.json").write_text("[" * 100_000)
    assert compare.main(flags) == 1
    rows = {row["name"]: row["n"] for row in json.loads(Path("c/compare.json").read_text())["variants"]}
    assert rows == {"lr 0.1": 0, "lr 0.01": 1}


def test_a_comparison_names_all_devices_that_it_ran_on(tiny):
    flags = [*TINY_MLP, "--vary", "lr=0.1,0.01", "--out", "c"]
    assert compare.main(flags) == 0
    path = Path("c/lr-0.1/seed-0/result.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "a GPU"}))
    assert compare.main(flags) == 0
    device = json.loads(Path("c/compare.json").read_text())["device"]
    assert device.startswith("a GPU, cpu") and f"Trained on shapes; {device}; " in Path("c/compare.md").read_text()


def test_a_finished_run_is_not_shortened(tiny, capsys):
    assert call(*TINY_MLP, "--epochs", 2, "--out", "run") == 0
    before = Path("run/result.json").read_text()
    assert call("--resume", "run/last.pt", "--epochs", 1) == 2
    one_line(capsys, "--epochs 1 end by step 2, and it stopped at step 4")
    assert Path("run/result.json").read_text() == before


def test_a_checkpoint_without_a_value_for_a_flag_is_rejected(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    for name in ("log_interval", "seed", "tta"):
        torch.save(content := last() | {"args": last()["args"] | {name: None}}, "odd.pt")
        assert content["args"][name] is None and call("--resume", "odd.pt", "--epochs", 2, "--out", "new") == 2
        one_line(capsys, f"--resume holds no {arguments.flag_name(name)}")


def test_seeds_of_another_version_are_rejected(tiny, monkeypatch, capsys):
    flags = [*TINY_MLP, "--runs", 2, "--out", "many"]
    with monkeypatch.context() as patch:
        halt(patch, 1)
        assert call(*flags) == 130
    content = checkpoints.load("many/seed-0/last.pt", keys=checkpoints.RESUME_KEYS)
    content["args"]["flag_of_another_version"] = 1
    checkpoints.save(content, "many/seed-0/last.pt")
    capsys.readouterr()
    assert call(*flags) == 2
    one_line(capsys, "another version of train.py")


def test_the_commit_is_that_of_this_code_within_a_git_hook(tiny, monkeypatch):
    expected = run_folder.commit()
    subprocess.run(["git", "init", "-q", "elsewhere"], check=expected is not None)
    monkeypatch.setenv("GIT_DIR", str(tiny / "elsewhere" / ".git"))
    assert run_folder.commit() == expected


def test_a_log_ends_with_the_reason_why_its_run_failed(tiny, monkeypatch, capsys):
    def backward(*args):
        raise RuntimeError("a mistake of mine")

    monkeypatch.setattr(train, "backward", backward)
    assert call(*TINY_MLP, "--out", "run") == 1
    assert "a mistake of mine" in capsys.readouterr().err
    assert Path("run/log.txt").read_text().splitlines()[-1].startswith("failed: RuntimeError: a mistake of mine")


def test_files_that_were_left_out_are_said_by_every_command_that_reads_a_folder(tiny, capsys):
    write_folder(tiny / "pets", (32, 32))
    Path("pets/test/cat/photo.heic").write_text("in a format that isn't read")
    assert call(*TINY_MLP, "--data", "pets", "--batch-size", 6, "--out", "run") == 0
    assert "left out: 1 ('.heic')" in capsys.readouterr().out
    assert call("--eval", "run/best.pt", "--device", "cpu") == 0
    assert "left out: 1 ('.heic')" in capsys.readouterr().out
    assert predict.main(["run/best.pt", "--report", "pets", "--out", "report"]) == 0
    assert "left out: 1 ('.heic')" in capsys.readouterr().err


def test_a_report_says_where_its_loss_is_another_than_the_runs(tiny, capsys):
    for loss in ("ce", "mse"):
        assert call(*TINY_MLP, "--loss", loss, "--out", loss) == 0
        capsys.readouterr()
        assert predict.main([f"{loss}/best.pt", "--report", "shapes"]) == 0
        assert ("the loss is cross-entropy" in capsys.readouterr().out) == (loss == "mse")


def test_a_map_of_very_many_heads_is_rejected(tiny, capsys):
    flags = "--model vit --patch-size 16 --dim 65 --heads 65 --dim-head 1 --depth 1 --mlp-dim 8".split()
    assert call(*flags, *TINY, "--out", "run") == 0
    capsys.readouterr()
    Image.new("RGB", (32, 32)).save("photo.png")
    assert predict.main(["run/best.pt", "photo.png", "--attention", "map.png"]) == 2
    one_line(capsys, "65 heads are too many to plot, at most 64")


def test_a_cache_that_changes_does_not_change_what_was_loaded(tiny):
    write_folder(tiny / "pets", (32, 32))
    datasets.load("pets", "data")
    before = datasets.load("pets", "data")  # from the cache
    images = before.test.images.clone()
    (cache,) = Path("data/cache").glob("*.pt")
    with open(cache, "r+b") as file:  # in place, as cp and rsync --inplace do
        file.write(bytes(cache.stat().st_size))
    assert images.any() and torch.equal(before.test.images, images)


def test_files_that_cannot_be_read_are_not_called_damaged(tiny, monkeypatch):
    def denied(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(datasets, "_open_or_download", denied)
    with pytest.raises(ValueError, match=r"Permission denied.*change its permissions"):
        datasets.load("mnist", "data")


def test_too_little_memory_is_not_blamed_on_the_data(tiny, monkeypatch):
    def too_large(*args):
        raise MemoryError

    write_folder(tiny / "pets", (32, 32))
    monkeypatch.setattr(datasets, "_open_or_download", too_large)
    monkeypatch.setattr(datasets, "decode", too_large)
    for name in ("mnist", "pets"):
        with pytest.raises(MemoryError):
            datasets.load(name, "data")


def test_augment_reads_images_as_a_run_does(tiny):
    assert augment.FORMATS == datasets.FORMATS  # each file can be copied alone
    photo = Image.new("RGB", (32, 32), "white")
    photo.paste("black", (0, 0, 32, 16))  # dark above, turned by the camera
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save("turned.jpg", exif=exif)
    assert (augment.read_images(["turned.jpg"])[0].int() - datasets.decode("turned.jpg", 32)).abs().max() < 20
    Image.new("I;16", (32, 32), 30_000).save("deep.png")
    Path("program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n")
    for name, rule in (("deep.png", "more than 8 bits"), ("program.png", "cannot identify")):
        with pytest.raises(ValueError, match=rule):
            augment.read_images([name])


def test_a_noisy_start_does_not_end_the_search_for_a_learning_rate(tiny, monkeypatch):
    def search(*losses):
        monkeypatch.setattr(diagnose, "descend", lambda *args: [(loss, 0, 1) for loss in losses])
        args, _ = diagnose.parse_args([*TINY_MLP, "--find-lr"])
        return diagnose.find_lr(train.prepare(args))

    lrs, _, suggestion = search(0.02, 0.3, 0.1, *[0.1] * 10, *[1.0] * 80)
    assert 10 < len(lrs) < 90 and lrs[0] < suggestion < lrs[-1]
    with pytest.raises(ValueError, match="the loss is 0"):
        search(*[0.0] * 97)
    with pytest.raises(ValueError, match="isn't finite in the first steps"):
        search(1.0, float("nan"))


def test_a_benchmark_removes_no_file_of_the_user(tiny, capsys):
    Path("b.json.tmp").write_text("mine")
    assert bench.main(["--out", "b.json", "--device", "nowhere"]) == 2
    assert Path("b.json.tmp").read_text() == "mine"


def test_a_log_that_cannot_be_written_hides_no_failure_and_frees_the_folder(tiny):
    folder = run_folder.open_folder("run", "run")
    folder.file.close()
    folder.file = open("/dev/full", "w", buffering=1)
    with pytest.raises(errors.Failed, match="the reason"), folder:
        raise errors.Failed("the reason")
    run_folder.open_folder("run", "run").close()


def test_signals_that_are_ignored_stay_ignored_after_another_one(monkeypatch):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with errors.caught_signals() as caught:
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught == [signal.SIGTERM] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, old)


def test_statistics_that_are_not_finite_replace_no_last_pt(tiny, monkeypatch, capsys):
    real = train.train_step

    def train_step(run, *args):
        totals = real(run, *args)
        if run.optimizer.param_groups[0]["lr"] < 5e-4:  # in the second epoch
            norm = next(m for m in run.model.modules() if isinstance(m, torch.nn.BatchNorm1d))
            norm.running_var.fill_(float("inf"))  # the loss stays finite: its outputs are 0
        return totals

    monkeypatch.setattr(train, "train_step", train_step)
    assert call(*TINY_MLP, "--epochs", 2, "--warmup-epochs", 0, "--out", "run") == 1
    assert "a weight is not finite" in capsys.readouterr().out
    assert last()["epoch"] == checkpoints.load("run/best.pt")["epoch"] == 1


def test_a_file_system_that_syncs_no_folders_will_do(tiny, monkeypatch):
    real = os.fsync

    def fsync(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    assert call(*TINY_MLP, "--out", "run") == 0


def test_gradients_that_are_never_finite_end_the_run(tiny, monkeypatch, capsys):
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 0.0)
    assert call(*TINY_MLP, "--out", "run") == 1
    assert "no gradient is finite by step" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, rule",
    [
        ("--opt-betas 0.9", "--opt-betas: 0.9 must be two numbers, as in 0.9,0.95"),
        ("--lr-scale 0.1", "--lr-scale: 0.1 must be a layer's name and a number, as in head=0.1"),
        ("--milestones 1,x --sched multistep", "--milestones: 1,x must be numbers, as in 30,80"),
        ("--mean a", "--mean: a must be a number, or one a channel, as in 0.5,0.5,0.5"),
        ("--hidden 1,,2", "--hidden: 1,,2 must be whole numbers, as in 256,128, or none"),
        ("--model cnn --widths 1.5", "--widths: 1.5 must be whole numbers, as in 64,256,256"),
        ("--patch-size 8", "unrecognized arguments: --patch-size 8: --patch-size is a flag of --model vit"),
        ("--leraning-rate 1", "--leraning-rate 1: see train.py --model mlp --help; quote names with spaces"),
        ("--epoch 1", "unrecognized arguments: --epoch 1: did you mean --epochs?"),
        ("recipes/mlp.args", "recipes/mlp.args: did you mean @recipes/mlp.args?"),
        ("--flags=mlp.args", "--flags=mlp.args: see train.py --model mlp --help"),
        ("runs/best.pt", "runs/best.pt: see train.py --model mlp --help"),
        ("--model cnn --dropout 0", "--dropout is a flag of --model mlp and vit"),
        ("@flags.args", "@flags.args must be a file of flags"),
        ("--data nowhere --img-size 8", "--data nowhere is no folder and no known set: choose cifar10, "),
        ("--model vit --dim 1", "--heads 3 must divide dim 1: try 1"),
    ],
)
def test_a_wrong_value_is_named_with_what_to_type(flags, rule, tiny, capsys):
    words = [word for word in TINY if word not in ("--data", "shapes")] if "--data" in flags else TINY
    assert rejected(*words, *flags.split()) == 2
    one_line(capsys, rule)


def test_a_best_pt_is_no_place_to_go_on_from(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    capsys.readouterr()
    assert call("--resume", "run/best.pt", "--epochs", 2) == 2
    one_line(capsys, "run/best.pt can't be resumed, only a run's last.pt can")


def test_a_comparison_that_falls_back_says_so(tiny, monkeypatch, capsys):
    found(monkeypatch, [False])
    assert compare.main([*OWN_SET, "--vary", "lr=0.1,0.01", "--test", "none", "--out", "c"]) == 0
    said = capsys.readouterr().out
    assert said.count("note: mnist wasn't available, the others train on shapes, too: c/lr-0.1/seed-0/log.txt") == 1


def test_an_archive_in_which_torch_could_see_other_entries_is_rejected(tiny):
    assert call(*TINY_MLP, "--out", "run") == 0
    raw = Path("run/best.pt").read_bytes()
    checkpoints.load("run/best.pt")

    def one_less(at):
        number = int.from_bytes(raw[at : at + 8], "little") - 1
        return raw[:at] + number.to_bytes(8, "little") + raw[at + 8 :]

    changed = {
        "the directory starts elsewhere": one_less(len(raw) - 50),
        "the longer end lies elsewhere": one_less(len(raw) - 34),
        "a comment": raw[:-2] + b"\1\0x",
        "no longer end": raw[:-98] + raw[-22:],
        "bytes before it": b"x" + raw,
    }
    for name, content in changed.items():
        Path("odd.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"doesn't end as the files of torch\.save do"):
            checkpoints.load("odd.pt")
            pytest.fail(name)


def test_a_dict_with_methods_of_its_own_hides_nothing(tiny):
    assert call(*TINY_MLP, "--out", "run") == 0
    counter = b"ccollections\nCounter\n}X\x01\x00\x00\x00aK\x01s\x85R"
    with_pickle("odd.pt", b"\x80\x02" + counter + b"}X\x05\x00\x00\x00itemsccollections\nOrderedDict\nsb.")
    with pytest.raises(ValueError, match="it is no plain dict"):
        checkpoints.load("odd.pt", keys={})
    with_pickle("odd.pt", b"\x80\x02" + counter + b"}X\x03\x00\x00\x00getK\x01sb.")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        checkpoints.load("odd.pt")


def test_what_lies_beside_the_weights_of_a_checkpoint_does_not_reach_torch(tiny):
    assert call(*TINY_MLP, "--out", "run") == 0
    content = checkpoints.load("run/best.pt")
    content["state_dict"] = collections.OrderedDict(content["state_dict"])
    content["state_dict"]._metadata = {"": {"assign_to_params_buffers": True}}
    torch.save(content, "odd.pt")
    loaded = checkpoints.load("odd.pt")["state_dict"]
    assert type(loaded) is dict and same(loaded, dict(content["state_dict"]))


@pytest.mark.parametrize(
    "hidden, message",
    [
        (dict.fromkeys(range(1, 1000)), "hidden {1: None"),
        ((8,) * 100_000, "hidden (8, 8"),  # which would take long to build
    ],
)
def test_widths_that_are_no_list_or_too_many_make_no_model(hidden, message, tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    content = checkpoints.load("run/best.pt")
    content["model_args"]["hidden"] = hidden
    del content["args"]["hidden"]
    torch.save(content, "odd.pt")
    capsys.readouterr()
    assert call("--eval", "odd.pt", "--device", "cpu") == 2
    one_line(capsys, f"odd.pt holds weights that don't fit its model mlp: {message}")


def test_a_tensor_with_a_sign_to_be_changed_is_no_plain_one(tiny):
    torch.save({"x": torch._neg_view(torch.ones(3))}, "odd.pt")
    with pytest.raises(ValueError, match="x is no plain tensor"):
        checkpoints.load("odd.pt", keys={})


def test_a_plot_replaces_no_photo(tiny, monkeypatch, capsys):
    def show(path):
        monkeypatch.setattr(sys, "argv", ["augment.py", "--flip", "--show", path])
        augment.main()

    Image.new("RGB", (32, 32), "red").save("photo.png")
    before = Path("photo.png").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        show("photo.png")
    one_line(capsys, "photo.png is no plot")
    assert diagnose.main([*TINY_MLP, "--find-lr", "photo.png"]) == 2
    one_line(capsys, "photo.png is no plot")
    assert call("--model", "vit", "--dim", 16, "--depth", 1, "--heads", 2, *TINY, "--out", "run") == 0
    Image.new("RGB", (32, 32)).save("other.png")
    capsys.readouterr()
    assert predict.main(["run/best.pt", "other.png", "--attention", "photo.png"]) == 2
    one_line(capsys, "photo.png is no plot")
    assert Path("photo.png").read_bytes() == before
    for _ in range(2):  # their own they replace
        show("plot.png")
        assert predict.main(["run/best.pt", "other.png", "--attention", "map.png"]) == 0


def test_a_map_of_attention_is_not_put_among_the_images(tiny, capsys):
    write_folder(tiny / "pets", (32, 32))
    vit_flags = "--model vit --dim 16 --depth 1 --heads 2 --epochs 1 --batch-size 6".split()
    assert call(*vit_flags, "--data", "pets", "--device", "cpu", "--out", "run") == 0
    capsys.readouterr()
    assert predict.main(["run/best.pt", "pets/test/cat/0.png", "--attention", "pets/test/cat/map.png"]) == 2
    one_line(capsys, "--attention pets/test/cat/map.png is among the images of pets")


def test_a_benchmark_writes_json(tiny, capsys):
    Path("notes.txt").write_text("mine")
    assert bench.main(["--out", "notes.txt"]) == 2
    one_line(capsys, "--out notes.txt must end in .json")


def test_a_seed_that_diverged_is_no_part_of_a_plotted_mean(tiny, capsys):
    for seed in (0, 1, 2):
        assert call(*TINY_MLP, "--epochs", 2, "--seed", seed, "--out", f"many/seed-{seed}") == 0
    path = Path("many/seed-2/result.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stopped": "non-finite loss"}))
    capsys.readouterr()
    runs, _ = plot.collect(plot.with_metrics(["many"]))
    assert [len(rows) for rows in runs.values()] == [4] and "of 2 seeds" in next(iter(runs))
    one_line(capsys, "many/seed-2 is left out of the mean")
    assert len(plot.collect(["many/seed-0", "many/seed-2"])[0]) == 2 and capsys.readouterr().err == ""  # no mean
    shutil.copytree("many/seed-1", "again")
    path = Path("again/result.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stopped": "interrupted"}))
    runs, _ = plot.collect(["many/seed-0", "many/seed-1", "again"])
    assert len(runs) == 1 and "of 2 seeds" in next(iter(runs))
    one_line(capsys, "again is left out of the mean")


def test_results_name_the_code_of_all_their_runs(tiny, monkeypatch):
    flags = [*TINY_MLP, "--vary", "lr=0.1,0.01", "--out", "c"]
    monkeypatch.setattr(run_folder, "commit", lambda: "a")
    assert compare.main(flags) == 0
    shutil.rmtree("c/lr-0.1")
    monkeypatch.setattr(run_folder, "commit", lambda: "b")
    assert compare.main(flags) == 0
    assert json.loads(Path("c/compare.json").read_text())["commit"] == "a, b"


def test_a_tie_is_said(tiny):
    flags = ["--case", "a: --lr 0.01", "--case", "b: --lr 0.01", "--out", "c"]
    assert compare.main([*TINY_MLP, *flags]) == 0
    assert "a and b validate alike: the one named first was tested." in Path("c/compare.md").read_text()


def test_a_schedule_that_cannot_act_in_the_time_is_said(tiny, capsys):
    flags = [word for word in TINY_MLP if word not in ("--epochs", "1")]
    more = "--minutes 0.01 --sched step --step-size 1e6 --out run".split()
    assert call(*flags, *more) == 0
    assert "note: --step-size 1e+06 can't take effect in" in capsys.readouterr().out


def test_an_error_of_the_device_is_not_blamed_on_a_file(tiny, monkeypatch, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0

    def prepare(args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(train, "prepare", prepare)
    capsys.readouterr()
    assert call("--resume", "run/last.pt", "--epochs", 2) == 2
    one_line(capsys, "RuntimeError: CUDA error: an illegal memory access was encountered (test_hostile.py")


def test_what_few_images_need_is_said_unless_it_was_chosen(tiny, capsys):
    flags = [word for word in TINY_MLP if word not in ("--batch-size", "64")]
    assert call(*flags, "--out", "run") == 0
    assert "note: an epoch is one step of all images: lower --batch-size, now 256" in capsys.readouterr().out
    assert call(*flags, "--batch-size", 256, "--out", "chosen") == 0
    assert "an epoch is one step" not in capsys.readouterr().out
    assert call("--resume", "run/last.pt", "--epochs", 2) == 0
    said = capsys.readouterr().out
    assert "--epochs 1.0 -> 2\n" in said and "an epoch is one step" not in said
