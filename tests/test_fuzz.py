"""Cases drawn at random, of each kind that once failed: all end in success or in one line, and touch nothing else.

FUZZ_SEED draws other cases, FUZZ_TIMES so many times more of them.
"""

import collections
import contextlib
import copy
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import HERE, TINY_MLP, assert_same_run, call, end_as_torch_does, replaced, write_folder, write_mnist
from test_faults import SEED, any_run

import augment
import bench
import cnn_cifar10
import compare
import data as datasets
import diagnose
import mlp_mnist
import plot
import predict
import schedulers
import train
import vit
from utils import checkpoints, errors

TIMES = int(os.environ.get("FUZZ_TIMES", 1))
PROGRAMS = {
    f"{module.__name__}.py": module.main
    for module in (augment, bench, cnn_cifar10, compare, diagnose, mlp_mnist, plot, predict, schedulers, train, vit)
}


class Hang(BaseException):
    pass


def run(program, *argv, seconds=60):
    """A command in this process. Returns its exit status; raises Hang if it takes longer."""

    def hang(number, frame):
        raise Hang

    old, sys.argv = sys.argv, [program, *map(str, argv)]
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about tensors without elements
            return PROGRAMS[program]() or 0
    except SystemExit as stop:
        return stop.code or 0
    finally:
        signal.alarm(0)
        sys.argv = old


class Judge:
    """Counts how cases end, and keeps those that end in any other way than success or one line."""

    def __init__(self, capsys):
        self.capsys, self.ends, self.wrong = capsys, collections.Counter(), []
        capsys.readouterr()

    def __call__(self, case, program, *argv):
        try:
            status = run(program, *argv)
        except (Exception, Hang) as error:
            status = repr(error)[:300]
        said = re.sub("^(Downloading|note:|hint:|wrote) .*\n", "", self.capsys.readouterr().err, flags=re.MULTILINE)
        lines = len(said.splitlines())
        self.ends[program, status] += 1
        if status not in (0, 1, 2) or (lines != (status == 2) and not (status == 1 and lines == 1)) or len(said) > 1200:
            self.wrong.append(f"{case}: {program} {' '.join(map(str, argv))}: {status}, {said[-600:]!r}")
        return status

    def verdict(self):
        print(sum(self.ends.values()), "cases", dict(self.ends))
        if self.wrong:
            pytest.fail("\n".join([f"{len(self.wrong)} wrong", *self.wrong[:20]]), pytrace=False)


def snapshot(folder):
    """What every plain file in a folder holds."""
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------- checkpoints


ODD = [None, True, -1, 0, 10**30, 0.5, float("nan"), float("inf"), "x", "", "vit", "/", b"x", [], [1], {}, {"a": 1}, ()]

ODD += [torch.zeros(3), torch.tensor(1), torch.zeros(2, 2)]


def places(content, *start):
    """The ways to every value in nested dicts, lists and tuples."""
    if not isinstance(content, (dict, list, tuple)):
        return
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*start, key)
        yield from places(value, *start, key)


def odd_tensors(tensor, draw):
    """A tensor that says it's like this one and lies in memory otherwise, or is of another kind."""
    kinds = [
        lambda t: t.new_zeros(1).expand(t.shape) if t.ndim else t,
        lambda t: t.T.contiguous().T if t.ndim == 2 else t.flip(0) if t.ndim else t,
        lambda t: t.to_sparse(),
        lambda t: t.to(torch.complex64),
        lambda t: t.to(torch.float8_e4m3fn),
        lambda t: t.double(),
        lambda t: t.to(torch.int8),
        lambda t: t.flatten()[:1],
        lambda t: t[None],
        lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else -t,
        lambda t: torch.full_like(t, 1e38) if t.is_floating_point() else t + 2**20,
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        lambda t: t.new_zeros(0),
        lambda t: t.to("meta"),
        lambda t: t.requires_grad_(t.is_floating_point()),
    ]
    with contextlib.suppress(RuntimeError):  # this kind has no tensor of this type or shape
        return draw.choice(kinds)(tensor.clone())
    return tensor


def damage(content, draw):
    """A copy with one value replaced, removed, added or moved."""
    place = draw.choice(list(places(content)))
    value, holder = content, None
    for key in place:
        holder, value = value, value[key]
    if isinstance(value, torch.Tensor) and draw.random() < 0.7:
        return replaced(content, place, odd_tensors(value, draw))
    kind = draw.randrange(4)
    if kind == 0 and isinstance(holder, dict):
        return replaced(content, place[:-1], {k: v for k, v in holder.items() if k != place[-1]})
    if kind == 1 and isinstance(value, dict):
        return replaced(content, place, value | {draw.choice(["x", 0, 10**6]): draw.choice(ODD)})
    if kind == 2 and isinstance(value, list):
        return replaced(content, place, value * draw.choice([0, 2, 1000]))
    other = content
    if draw.random() < 0.3:  # a value from elsewhere in the same checkpoint
        for key in draw.choice(list(places(content))):
            other = other[key]
        return replaced(content, place, copy.deepcopy(other))
    return replaced(content, place, draw.choice(ODD))


@pytest.mark.slow
def test_checkpoints_of_any_content(tiny, capsys):
    more = "--data shapes --epochs 2 --batch-size 64 --device cpu".split()
    runs = {
        "mlp": ["--model", "mlp", "--hidden", 8, "--ema", 0.9, *more],
        "lbfgs": ["--model", "mlp", "--hidden", 8, "--opt", "lbfgs", "--limit", 64, *more],
        "plateau": ["--model", "mlp", "--hidden", 8, "--opt", "sgd", "--sched", "plateau", *more],
        "cnn": ["--model", "cnn", "--widths", "4,4", *more],
        "vit": ["--model", "vit", "--patch-size", 8, "--dim", 8, "--depth", 2, "--heads", 2, "--mlp-dim", 8, *more],
    }
    good = {}
    for name, flags in runs.items():
        assert call(*flags, "--out", name) == 0
        good[name] = checkpoints.load(f"{name}/last.pt")
    Path("images").mkdir()
    torch.manual_seed(0)
    augment.show(torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8), "images/a.png")
    draw, judge, resumed = random.Random(SEED), Judge(capsys), collections.Counter()
    for case in range(40 * TIMES):
        name = draw.choice(list(runs))
        bad = good[name]
        for _ in range(draw.choice([1, 1, 1, 3])):
            bad = damage(bad, draw)
        torch.save(bad, f"{name}/bad.pt")
        before = snapshot(".")
        out = ["--out", "new"]
        for program, *argv in (
            ["train.py", "--resume", f"{name}/bad.pt", "--epochs", 3, *out],
            ["train.py", "--eval", f"{name}/bad.pt"],
            ["train.py", *runs[name], "--init", f"{name}/bad.pt", *out],
            ["train.py", *TINY_MLP, "--teacher", f"{name}/bad.pt", *out],
            ["predict.py", f"{name}/bad.pt", "images"],
            ["predict.py", f"{name}/bad.pt", "--report", "shapes", *out],
        ):
            status = judge(case, program, *argv)
            if "--resume" in argv:  # the one use that reads every value
                resumed[status] += 1
            shutil.rmtree("new", ignore_errors=True)
        if snapshot(".") != before:
            judge.wrong.append(f"{case}: files were changed")
    judge.verdict()
    assert resumed[2] > 2 * resumed[0] > 0, resumed
    assert judge.ends["train.py", 2] > 10 * TIMES


# ---------------------------------------------------------------------------------------------- kinds of files


def zip_of(path, name, content):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, content)
    end_as_torch_does(path)


FILES = {
    "a pipe": lambda path: os.mkfifo(path),
    "a folder": lambda path: path.mkdir(),
    "a folder with a file": lambda path: (path.mkdir(), (path / "a.txt").write_text("mine")),
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("thesis\n" * 20),
    "a long line": lambda path: path.write_text("x" * 10**6),
    "brackets": lambda path: path.write_text("[" * 10**5),
    "numbers": lambda path: path.write_text("1,2,3\n" * 20),
    "JSON": lambda path: path.write_text('{"a": [1, null, {}]}'),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x80" * 99),
    "escape codes": lambda path: path.write_text("\x1b]0;owned\x07\x1b[31mred\n"),
    "long and sparse": lambda path: (path.touch(), os.truncate(path, 2**27)),
    "a zip of text": lambda path: zip_of(path, "a.txt", "text"),
    "a zip with a pickle": lambda path: zip_of(path, "a/data.pkl", b"cos\nsystem\n(S'touch owned'\ntR."),
    "a link to itself": lambda path: path.symlink_to(path),
    "a broken link": lambda path: path.symlink_to("nowhere/at/all"),
    "a link to its folder": lambda path: path.symlink_to(path.parent),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to /dev/full": lambda path: path.symlink_to("/dev/full"),
    "a link to another file": lambda path: path.symlink_to(Path("precious.txt").absolute()),
    "a bare tensor": lambda path: torch.save(torch.zeros(3), path),
}
PETS = "--model cnn --widths 4 --val-split 0.4 --data pets --img-size 8 --epochs 1 --device cpu --out new".split()
DIGITS = "--model mlp --hidden 8 --data mnist --epochs 1 --device cpu --out new".split()
COMPARE = "--model mlp --hidden 8 --data shapes --epochs 1 --device cpu --vary lr=0.1,0.01 --out cmp".split()
# Where a file is expected, and the command that reads or writes it.
ROLES = [
    ("run/last.pt", "train.py", "--resume", "run/last.pt", "--epochs", 2),
    ("run/best.pt", "train.py", "--resume", "run/last.pt", "--epochs", 2),
    ("run/log.txt", "train.py", "--resume", "run/last.pt", "--epochs", 2),
    ("run/metrics.csv", "train.py", "--resume", "run/last.pt", "--epochs", 2),
    ("run/last.pt.tmp", "train.py", "--resume", "run/last.pt", "--epochs", 2),
    ("run/best.pt", "train.py", "--eval", "run/best.pt"),
    ("run/best.pt", "train.py", *TINY_MLP, "--init", "run/best.pt", "--out", "new"),
    ("run/best.pt", "train.py", *TINY_MLP, "--teacher", "run/best.pt", "--out", "new"),
    ("run/best.pt", "predict.py", "run/best.pt", "pets/test"),
    ("run/best.pt", "diagnose.py", *TINY_MLP, "--init", "run/best.pt"),
    ("run/metrics.csv", "plot.py", "run"),
    ("run/result.json", "plot.py", "run"),
    ("curves.png", "plot.py", "run"),
    ("new", "train.py", *TINY_MLP, "--out", "new"),
    ("new/log.txt", "train.py", *TINY_MLP, "--out", "new"),
    ("new/metrics.csv", "train.py", *TINY_MLP, "--out", "new"),
    ("flags.args", "train.py", "@flags.args"),
    ("flags.args", "compare.py", "@flags.args"),
    ("pets/train/cat/0.png", "train.py", *PETS),
    ("pets/train/cat", "train.py", *PETS),
    ("pets/test", "train.py", *PETS),
    ("pets", "train.py", *PETS),
    ("data", "train.py", *PETS),
    ("data/cache", "train.py", *PETS),
    ("data/MNIST/raw/train-images-idx3-ubyte", "train.py", *DIGITS),
    ("data/MNIST/raw/t10k-labels-idx1-ubyte", "train.py", *DIGITS),
    ("pets/test/cat/0.png", "predict.py", "run/best.pt", "pets/test/cat/0.png", "pets/test/cat/1.png"),
    ("pets/test/cat/0.png", "predict.py", "run/best.pt", "--report", "pets"),
    ("net.pt2", "predict.py", "run/best.pt", "--export", "net.pt2"),
    ("cmp", "compare.py", *COMPARE),
    ("cmp/compare.json", "compare.py", *COMPARE),
    ("cmp/lr-0.1", "compare.py", *COMPARE),
    ("cmp/lr-0.1/seed-0/result.json", "compare.py", *COMPARE),
    ("s.png", "schedulers.py", "--sched", "all", "--plot", "s.png"),
    ("pets/train/cat/0.png", "augment.py", "--show", "a.png", "--crop-pad", "2", "pets/train/cat/0.png"),
    ("a.png", "augment.py", "--show", "a.png", "--crop-pad", "2"),
]


@pytest.mark.slow
def test_files_of_any_kind_in_any_place(tiny, monkeypatch, capsys):
    """What lies in the place of a file stays as it is, unless the command is there to write it; so does all else."""
    monkeypatch.setattr(datasets, "_fetch", no_network)
    template, world = tiny / "template", tiny / "world"
    template.mkdir()
    monkeypatch.chdir(template)
    assert call(*TINY_MLP, "--out", "run") == 0
    assert run("compare.py", *COMPARE) == 0
    write_folder(template / "pets", (8, 8))
    write_mnist(template / "data")
    Path("precious.txt").write_text("mine\n")
    draw, judge = random.Random(SEED), Judge(capsys)
    cases = [(role, kind) for role in ROLES for kind in FILES]
    for role, kind in draw.sample(cases, min(len(cases), 150 * TIMES)):
        path, program, *argv = role
        if kind == "a pipe" and path == "curves.png":
            continue  # whoever plots into a pipe reads from it
        output = next(
            (argv[i + 1] for i, flag in enumerate(argv) if flag in ("--plot", "--show", "--export")), "curves.png"
        )
        shutil.copytree(template, world, symlinks=True)
        monkeypatch.chdir(world)
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        FILES[kind](Path(path).absolute())
        before = snapshot(".")
        judge(f"{kind} as {path}", program, *argv)
        after = snapshot(".")
        for name, content in before.items():
            folder = {"compare.py": "cmp", "train.py": "run" if "--resume" in argv else None}.get(program)
            written = name.parts[0] == folder or name == Path(path) == Path(output)
            # Whoever links so wants it so, but for a name that is nobody's.
            linked = kind == "a link to another file" and name.name == "precious.txt" and ".tmp" not in str(path)
            if content and after.get(name) != content and (not written or name.name == "a.txt") and not linked:
                judge.wrong.append(f"{kind} as {path}: {program} {argv}: {name} was changed")
        assert not Path("owned").exists()
        monkeypatch.chdir(tiny)
        shutil.rmtree(world)
    judge.verdict()
    assert {0, 2} <= {status for _, status in judge.ends}


def no_network(*args, **options):
    raise OSError("no network")


# ---------------------------------------------------------------------------------------------- signals


@contextlib.contextmanager
def counted_calls(at=None, number=None):
    """Count the calls of this repository's functions within a command, and send a signal in the one numbered `at`."""
    calls = [0]

    def count(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(HERE)):
            calls[0] += 1
            if calls[0] == at:
                sys.setprofile(None)
                os.kill(os.getpid(), number)

    command = train.command

    def profiled(argv):
        sys.setprofile(count)
        try:
            return command(argv)
        finally:
            sys.setprofile(None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "command", profiled)
        yield calls


def in_a_copy(at, number, argv):
    """Run train.py with a signal in a copy of this process. Returns its exit status and what it says on stderr."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            sys.stderr, sys.stdout = open("said.txt", "w"), open(os.devnull, "w")
            with counted_calls(at, number):
                status = run("train.py", *argv)
            sys.stderr.flush()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), Path("said.txt").read_text()


@pytest.mark.slow
def test_signals_at_any_call_of_a_function(tiny, capsys):
    draw, ends = random.Random(SEED), collections.Counter()
    while sum(ends.values()) < 40 * TIMES:
        flags = any_run(draw)
        for name in ("straight", "halted"):
            shutil.rmtree(name, ignore_errors=True)
        with counted_calls() as calls:
            if run("train.py", *flags, "--out", "straight"):
                continue
        for at in sorted(draw.sample(range(1, int(0.95 * calls[0])), 4)):
            shutil.rmtree("halted", ignore_errors=True)
            number = draw.choice(errors.ending_signals())
            status, said = in_a_copy(at, number, [*flags, "--out", "halted"])
            case = f"signal {number} in call {at} of {calls[0]}: {' '.join(flags)}"
            assert (status, said) == (128 + number, ""), case
            result = Path("halted/result.json")
            stopped = json.loads(result.read_text())["stopped"] if result.exists() else "killed"
            if not Path("halted/last.pt").exists():
                assert run("train.py", *flags, "--out", "halted") == 0, (case, capsys.readouterr().err)
            elif stopped in ("killed", "interrupted"):
                assert run("train.py", "--resume", "halted/last.pt") == 0, (case, capsys.readouterr().err)
            assert_same_run("straight", "halted")
            ends[number.name, stopped] += 1
    print(sum(ends.values()), "cases", dict(ends))


# ---------------------------------------------------------------------------------------------- tables and results

CELLS = ["", "x", "nan", "inf", "-1", "1e400", "0", "9" * 5000, '"', ",,", "\0", "\n", "\ufeff", "1;2", "é"]
JSON = [None, True, -1, 0, 10**400, 0.5, float("nan"), float("inf"), "x", "", "\x1b[31m", "$", [], [1], {}, {"a": 1}]


@pytest.mark.slow
def test_tables_and_results_of_any_content(tiny, monkeypatch, capsys):
    """plot.py and compare.py on the files of a run, changed."""
    assert call(*TINY_MLP, "--out", "run", "--epochs", 2) == 0
    assert run("compare.py", *COMPARE) == 0
    monkeypatch.setattr(plot, "draw", draw_curves)
    table, result = (Path("run", name).read_text() for name in ("metrics.csv", "result.json"))
    variant = Path("cmp/lr-0.1/seed-0/result.json")
    tested, curve = variant.read_text(), variant.with_name("metrics.csv").read_text()
    draw, judge = random.Random(SEED), Judge(capsys)
    for case in range(30 * TIMES):
        words = re.split(r"([,\n])", table)
        for _ in range(draw.choice([1, 1, 2, 9])):
            words[draw.randrange(len(words))] = draw.choice(CELLS)
        content = json.loads(draw.choice([result, tested]))
        for _ in range(draw.choice([1, 1, 3])):
            content = replaced(content, draw.choice([(), *places(content)]), draw.choice(JSON))
        text = json.dumps(content)
        Path("run/metrics.csv").write_text("".join(words))
        judge(case, "plot.py", "run", "--out", "a.png")
        Path("run/metrics.csv").write_text(table)
        Path("run/result.json").write_text(text)
        judge(case, "plot.py", "run", "--out", "a.png")
        variant.write_text(text)
        judge(case, "compare.py", *COMPARE)
        variant.write_text(tested)
        variant.with_name("metrics.csv").write_text("".join(words))
        judge(case, "compare.py", *COMPARE)
        variant.with_name("metrics.csv").write_text(curve)
        Path("run/result.json").write_text(result)
    judge.verdict()


draw_curves = plot.draw  # the fixture `tiny` replaces it


# ---------------------------------------------------------------------------------------------- flags

VALUES = ["0", "1", "-1", "2", "7", "0.5", "1e-320", "1e9", "1e308", "1e400", "nan", "inf", "-inf", "1" + "0" * 13]
VALUES += ["9" * 400, "x", "", ",", "1,2", "1,", "all", "none", "/dev/null", "$x$", "\x1b[31m", "é", "a.png"]
TINY_VIT = "--patch-size 8 --dim 8 --depth 1 --heads 1 --mlp-dim 8".split()
BASES = {
    "augment.py": ["--show", "a.png"],
    "bench.py": "--models mlp --data shapes --turns 1 --seconds 0.001".split(),
    "cnn_cifar10.py": [],
    "compare.py": "--model mlp --hidden 8 --data shapes --epochs 1 --device cpu --vary lr=0.1,0.01 --out cmp".split(),
    "diagnose.py": TINY_MLP,
    "mlp_mnist.py": [],
    "plot.py": ["run", "--out", "a.png"],
    "predict.py": ["run/best.pt", "--report", "shapes"],
    "schedulers.py": [],
    "vit.py": TINY_VIT,
}
LONG = {"--seconds", "--turns", "--until", "--runs", "--epochs", "--minutes", "--depth"}  # what is allowed takes long


@pytest.mark.slow
def test_flags_of_any_command_with_any_value(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    flags = {}
    for program in BASES:
        capsys.readouterr()
        run(program, "--help")
        flags[program] = sorted(set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", capsys.readouterr().out, re.MULTILINE)))
    draw, judge = random.Random(SEED), Judge(capsys)
    for case in range(1000 * TIMES):
        program = draw.choice(["diagnose.py", "bench.py", *[name for name in BASES if name not in ("bench.py",)] * 3])
        argv = []
        for flag in draw.sample(flags[program], min(len(flags[program]), draw.choice([1, 1, 2]))):
            values = ["0", "-1", "nan", "x", ""] if flag in LONG else VALUES
            argv.append(draw.choice([f"{flag}={draw.choice(values)}"] * 3 + [flag]))
        judge(case, program, *BASES[program], *argv)
        for made in ("new", "cmp", "runs"):
            shutil.rmtree(made, ignore_errors=True)
    judge.verdict()
    assert all(judge.ends[program, status] for program in BASES for status in (0, 2))


# ---------------------------------------------------------------------------------------------- environments

NUMBERS = ["0", "1", "2", "-1", "x", "", "9" * 30]
ENVIRONMENTS = {
    "RANK": NUMBERS,
    "WORLD_SIZE": ["1", "0", "-1", "x", ""],  # a group of two would wait for the other one
    "LOCAL_RANK": NUMBERS,
    "LOCAL_WORLD_SIZE": NUMBERS,
    "MASTER_ADDR": ["localhost", "nowhere.invalid", ""],
    "MASTER_PORT": ["0", "-1", "99999999", "x", ""],
    "TORCHELASTIC_RESTART_COUNT": NUMBERS,
    "OMP_NUM_THREADS": ["1", "0", "-1", "x", ""],
    "MPLBACKEND": ["Agg", "nonsense", ""],
    "MPLCONFIGDIR": ["/dev/null/nowhere", "/dev/null", ""],
    "HOME": ["/dev/null/nowhere", "", None],
    "LANG": ["C", "POSIX", "nonsense", "tr_TR.UTF-8"],
    "LC_ALL": ["C", "POSIX", "nonsense"],
    "PYTHONUTF8": ["0", "1"],
    "PYTHONIOENCODING": ["ascii", "latin-1", "utf-16"],
    "PYTHONWARNINGS": ["error", "ignore", "nonsense"],
    "PYTHONOPTIMIZE": ["1", "2"],
    "PYTHONHASHSEED": ["0", "1"],
    "PYTHONPATH": ["stranger"],
    "COLUMNS": ["1", "0", "x"],
    "TERM": ["dumb", "", None],
    "TMPDIR": ["/dev/null/nowhere", "/dev/null"],
    "PATH": ["", None],
    "CUDA_VISIBLE_DEVICES": ["", "-1", "x", "0,0"],
}
STREAMS = ["", ">&-", "2>&-", ">&- 2>&-", "<&-", ">/dev/full", "2>/dev/full", "| head -1"]


@pytest.mark.slow
def test_any_environment(tiny, capfd):
    """In processes: a run, and commands on it, with variables, names and standard streams drawn at random."""
    assert call(*TINY_MLP, "--out", "run") == 0
    (tiny / "stranger").mkdir()
    for name in ("data.py", "augment.py", "plot.py", "utils.py", "losses.py"):  # not those that are meant
        Path("stranger", name).write_text("raise SystemExit('a stranger')")
    draw, ends, wrong = random.Random(SEED), collections.Counter(), []
    for _ in range(6 * TIMES):
        env = dict(os.environ)
        for name in draw.sample(sorted(ENVIRONMENTS), draw.choice([1, 2, 4])):
            value = draw.choice(ENVIRONMENTS[name])
            env.pop(name, None)
            if value is not None:
                env[name] = value
        out = draw.choice(["new", "né", "$x$", "a b", "\x1b[31m"])
        command = draw.choice(
            [["train.py", *TINY_MLP, "--out", out]] * 2
            + [["predict.py", "run/best.pt", "--report", "shapes"], ["plot.py", "run", "--out", "a.png"]]
            + [["schedulers.py", "--sched", "step"], ["vit.py", "--dim", "64", "--heads", "2"]]
        )
        stream = draw.choice(STREAMS)
        line = f"{shlex.join([sys.executable, str(HERE / command[0]), *command[1:]])} {stream}"
        try:
            done = subprocess.run(["/bin/sh", "-c", line], env=env, capture_output=True, timeout=120, cwd=tiny)
        except subprocess.TimeoutExpired:
            wrong.append(f"{line}: a hang")
            continue
        said = done.stderr.decode(errors="replace")
        ends[command[0], done.returncode] += 1
        odd = {name: env.get(name) for name in ENVIRONMENTS if env.get(name) != os.environ.get(name)}
        expected = (0, 1, 2) if "/dev/full" in stream else (0, 2)
        if stream == "2>/dev/full" and env.get("PYTHONWARNINGS") == "nonsense":
            expected = (0, 1, 2, 120)  # Python itself can't say that it's nonsense
        if "Traceback" in said or "Exception ignored" in said or done.returncode not in expected:
            wrong.append(f"{odd} {line}: {done.returncode} {said[-800:]}")
        shutil.rmtree(out, ignore_errors=True)
    print(sum(ends.values()), "cases", dict(ends))
    if wrong:
        pytest.fail("\n".join([f"{len(wrong)} wrong", *wrong[:20]]), pytrace=False)
