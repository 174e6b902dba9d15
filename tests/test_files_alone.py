"""Files that are copied alone: they import nothing of the repo, and the examples in their docstrings run as printed."""

import ast
import inspect
import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import HERE, python

import bench
import cnn_cifar10
import mlp_mnist
import vit

PIECES = (
    "mlp_mnist", "cnn_cifar10", "vit", "schedulers", "optimizers", "losses", "early_stopping", "data", "augment",
    "plot", "utils/ema", "utils/checkpoints", "utils/finetune", "utils/distributed", "utils/devices", "utils/plateau",
    "utils/report",
)  # fmt: skip
WITHOUT_TORCH = ("schedulers", "early_stopping", "plot", "utils/plateau")
# Where the docstring has no example, or one that shows less than the file is for.
MORE = {
    "augment": "x, y = next(batches((images, labels), 8, mean, std, 'cpu', key=(0, 0), mixup=1, num_classes=10))\n"
    "assert y.shape == (8, 10)",
    "vit": "assert logits.shape == (8, 10)",
    "cnn_cifar10": "assert logits.shape == (8, 10)",
    "mlp_mnist": "assert logits.shape == (8, 10)",
    "optimizers": "model(torch.randn(2, 2)).sum().backward()\noptimizer.step()",
    "schedulers": "assert 0 < groups[0]['lr'] < 1e-4",
    "early_stopping": "assert epoch == 4",
    "utils/checkpoints": "assert content['epoch'] == 3",
    "utils/ema": "assert ema.updates == 10",
    "utils/distributed": "import distributed; assert distributed.world_size() == 1",
    "utils/devices": "import devices; devices.choose_precision('auto', devices.choose_device('cpu'))",
    "utils/plateau": "import plateau; assert plateau.trend([3, 2, 1], 0) == -1",
    "plot": "import plot; row = dict(epoch=1, lr=1, train_loss=1, train_acc=0, val_loss=1, val_acc=0)\n"
    "plot.draw({'a': [row, row | dict(epoch=2)]}, 'a.png')",
}
FORK = """
import os, sys, torch
for name, code in {examples!r}.items():
    if not (child := os.fork()):
        os.chdir(name.replace("/", "-"))
        sys.path.insert(0, os.getcwd())
        exec(code, dict())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


def example(name):
    """The Python code that a file's docstring shows, and what is added to it here."""
    docstring = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text()), clean=False) or ""
    lines = [line[4:] for line in docstring.splitlines()[1:] if line.startswith("    ") or not line.strip()]
    lines = [line for line in lines if not line.startswith(("python ", "torchrun ", "pytest "))]
    return "\n".join(lines) + "\n" + MORE.get(name, "")


@pytest.mark.slow  # the smoke test runs those that users copy
def test_every_piece_runs_alone_as_its_docstring_shows(tmp_path):
    """Each in an interpreter that knows none of the others; those that need torch share its import."""
    examples = {name: example(name) for name in PIECES}
    for name, code in examples.items():
        assert code.strip(), name
        folder = tmp_path / name.replace("/", "-")
        folder.mkdir()
        shutil.copy(HERE / f"{name}.py", folder)
    for name in WITHOUT_TORCH:
        code = f"import sys; sys.path.insert(0, ''); sys.modules['torch'] = None\n{examples.pop(name)}"
        done = python("-I", "-c", code, cwd=tmp_path / name.replace("/", "-"))
        assert (done.returncode, done.stderr) == (0, ""), (name, done.stderr)
    done = python("-I", "-c", FORK.format(examples=examples), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def imports(path):
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_down_only():
    """Commands -> train.py -> utils/ -> pieces and models, which import nothing of the repo."""
    commands = {"compare", "predict", "diagnose", "bench"}
    root = {path.stem for path in HERE.glob("*.py")}
    assert root == {name for name in PIECES if "/" not in name} | commands | {"train", "test_smoke"}
    for name in PIECES:
        found = {module.split(".")[0] for module in imports(HERE / f"{name}.py")}
        assert not found & (root | {"utils"}), name
    for path in HERE.glob("utils/*.py"):
        found = {module.split(".")[0] for module in imports(path)}
        assert not found & (commands | {"train"}), path
    assert not {module.split(".")[0] for module in imports(HERE / "train.py")} & commands


@pytest.mark.slow  # two seconds of sleep
def test_the_budget_is_that_of_its_docstring(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(HERE)!r})\n{example('utils/budget')}\nassert 4 < steps < 600, steps"
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", [mlp_mnist, cnn_cifar10, vit])
def test_model_files_describe_themselves(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module.__name__])
    module.main()
    said = capsys.readouterr().out
    assert "parameters" in said and "an image" in said and "-> (1, 10)" in said and "python train.py --model" in said
    assert len(inspect.getsource(module.main).splitlines()) <= 25


def test_multiply_adds_are_right(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mlp_mnist.py", "--hidden", "128", "--no-batch-norm"])
    mlp_mnist.main()
    assert f"{784 * 128 + 128 * 10:,} an image" in capsys.readouterr().out


def test_bench_measures_each_way_of_training(tiny, monkeypatch):
    assert bench.main("--models mlp --data shapes --turns 1 --seconds 0.05 --out a.json".split()) == 0
    one = json.loads(Path("a.json").read_text())["mlp"]
    *baseline, ours, cached = one["images_per_second"].values()
    assert one["b_over_a"] == pytest.approx(ours / max(baseline)) and one["b_over_c"] == pytest.approx(ours / cached)
    # A product of the forward pass, two of the backward pass; one in the first layer, as images need no gradient.
    assert one["flops_an_image"] == 2 * (2 * 3 * 32 * 32 * 256 + 3 * (256 * 128 + 128 * 64 + 64 * 10))
    assert min(baseline) > 0 and one["matrix_flops_per_second"] > 0 and one["peak_memory_mb"] > 50
    assert bench.main("--until 0.01 --data shapes --out b.json".split()) == 0
    times = json.loads(Path("b.json").read_text())["until"]
    assert list(times) == ["DataLoader, 0 workers", "DataLoader, 2 workers", "train.py"]
    assert {one["epochs"] for one in times.values()} == {1}
    # A machine that is ten times as fast in each next turn: the ratios are those of turns beside each other.
    turns = iter([10, 1, 30, 30, 100, 1, 200, 400, 1000, 1, 4000, 4000])
    monkeypatch.setattr(bench, "speed", lambda *args: next(turns))
    assert bench.main("--models mlp --data shapes --turns 3 --out a.json".split()) == 0
    one = json.loads(Path("a.json").read_text())["mlp"]
    assert (one["b_over_a"], one["b_over_c"]) == (3, 1) and one["images_per_second"]["train.py"] == 200
    for wrong in (
        "--turns 0",
        "--seconds nan",
        "--models resnet",
        "--until -1",
        "--out no/where.json",
        "--data nowhere",
    ):
        assert bench.main(wrong.split()) == 2
