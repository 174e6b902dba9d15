"""Tests: files alone."""

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

ALONE = {
    "mlp_mnist.py": "from mlp_mnist import MLP; MLP()(torch.randn(4, 1, 28, 28)).sum().backward()",
    "cnn_cifar10.py": "from cnn_cifar10 import CNN; CNN(widths=(4, 8))(torch.randn(4, 3, 32, 32)).sum().backward()",
    "vit.py": "from vit import ViT; m = ViT(image_size=32, patch_size=8, num_classes=10, dim=16, depth=1, heads=2, "
    "mlp_dim=16); m(torch.randn(4, 3, 32, 32)).sum().backward()",
    "schedulers.py": "from schedulers import schedule; assert schedule('cosine', lr=1, epochs=2)(1) == 0.5",
    "data.py": "import data; d = data.shapes(40, 20); t, v = data.split(d.train, 0.5, 0); "
    "x, y = next(data.batches(t, 8, d.mean, d.std, 'cpu', key=(0, 0), crop_pad=2)); assert x.shape == (8, 3, 32, 32)",
    "optimizers.py": "from optimizers import *; m = torch.nn.Linear(2, 2); "
    "OPTIMIZERS['sgd'](parameter_groups(m, weight_decay=1), lr=1, momentum=0, nesterov=False).step()",
    "losses.py": "from losses import *; x = torch.randn(4, 3, requires_grad=True); "
    "parse('ce+0.5*cosine', 0.1)(x, torch.tensor([0, 1, 2, 0])).backward()",
    "utils/ema.py": "from ema import *; m = torch.nn.Linear(2, 2); Average(m, 0.9).update(m)",
    "early_stopping.py": "from early_stopping import *; assert best_row([dict(epoch=1, val_acc=1.)], 'val_acc')",
    "utils/checkpoints.py": "import checkpoints; checkpoints.save({'a': 1}, 'a.pt'); "
    "checkpoints.load('a.pt', keys={'a': int})",
    "utils/finetune.py": "from finetune import *; m = torch.nn.Linear(2, 2); load_matching(m, m.state_dict()); "
    "freeze(m, ['bias']); train_mode(m)",
    "utils/report.py": "from report import *; m = confusion(torch.tensor([0, 1]), torch.tensor([0, 0]), 2); "
    "assert m.tolist() == [[1, 0], [1, 0]]; draw_confusion(m, ['a', 'b'], 'a.png')",
    "utils/devices.py": "import devices; devices.choose_precision('auto', devices.choose_device('auto'))",
    "utils/run_folder.py": "import run_folder; a = run_folder.claim(None, 'runs/a'); "
    "b = run_folder.claim(None, 'runs/a'); assert b[0].name == 'a-2'",
    "utils/ranges.py": "import ranges; assert ranges.flag_name('batch_size') == '--batch-size'",
    "utils/budget.py": "import budget, time; "
    "assert 4 < budget.steps_within(0.2, lambda: time.sleep(0.001), 9, []) < 199",
    "utils/distributed.py": "import distributed; assert distributed.count() == 1 and distributed.once(lambda: 3) == 3",
    "plot.py": "import plot; r = dict(epoch=1, lr=1, train_loss=1, train_acc=0, val_loss=1, val_acc=0); "
    "plot.draw({'a': [r, r | dict(epoch=2)]}, 'a.png')",
}


WITHOUT_TORCH = ("schedulers.py", "early_stopping.py", "utils/run_folder.py", "utils/ranges.py", "plot.py")


FORK = """
import os, sys, torch
for file, code in {alone!r}.items():
    if not (child := os.fork()):
        folder = os.path.abspath(os.path.basename(file).removesuffix(".py"))
        os.chdir(folder)
        sys.path.insert(0, folder)
        exec(code, dict(torch=torch))
        sys.stderr.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, file
"""


def test_every_ground_floor_file_runs_alone(tmp_path):
    """Each in an interpreter that knows none of the others; those that need torch share its import."""
    above = {"train.py", "test_smoke.py", "predict.py", "diagnose.py", "bench.py", "compare.py"}
    above |= {"utils/__init__.py", "utils/arguments.py"}
    files = {str(file.relative_to(HERE)) for pattern in ("*.py", "utils/*.py") for file in HERE.glob(pattern)}
    assert set(ALONE) == files - above
    for file in ALONE:
        folder = tmp_path / Path(file).stem
        folder.mkdir()
        shutil.copy(HERE / file, folder)
    for file in WITHOUT_TORCH:
        code = f"import sys; sys.path.insert(0, ''); sys.modules['torch'] = None; {ALONE[file]}"
        done = python("-I", "-c", code, cwd=tmp_path / Path(file).stem)
        assert (done.returncode, done.stderr) == (0, ""), (file, done.stderr)
    with_torch = {file: code for file, code in ALONE.items() if file not in WITHOUT_TORCH}
    done = python("-I", "-c", FORK.format(alone=with_torch), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


@pytest.mark.parametrize("file", ["mlp_mnist.py", "cnn_cifar10.py", "vit.py"])
def test_model_files_describe_themselves(file, tmp_path, monkeypatch, capsys):
    module = {"mlp_mnist.py": mlp_mnist, "cnn_cifar10.py": cnn_cifar10, "vit.py": vit}[file]
    monkeypatch.setattr(sys, "argv", [file])
    module.main()
    said = capsys.readouterr().out
    assert "parameters" in said and "images/s" in said and "-> (64, 10)" in said and "python train.py --model" in said


def test_multiply_adds_are_right(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mlp_mnist.py", "--hidden", "128", "--no-batch-norm"])
    mlp_mnist.main()
    assert f"{784 * 128 + 128 * 10:,} an image" in capsys.readouterr().out


def test_bench_measures_each_way_of_training(tiny, monkeypatch):
    assert bench.main("--models mlp --data shapes --turns 1 --seconds 0.05 --out a.json".split()) == 0
    one = json.loads(Path("a.json").read_text())["mlp"]
    *textbook, ours, fixed = one["images_per_second"].values()
    assert one["b_over_a"] == pytest.approx(ours / max(textbook)) and one["b_over_c"] == pytest.approx(ours / fixed)
    assert one["flops_an_image"] == 3 * 2 * (3 * 32 * 32 * 256 + 256 * 128 + 128 * 64 + 64 * 10)
    assert min(textbook) > 0 and one["matrix_flops_per_second"] > 1e9 and one["peak_memory_mb"] > 50
    assert bench.main("--until 0.01 --data shapes --out b.json".split()) == 0
    times = json.loads(Path("b.json").read_text())["until"]
    assert list(times) == ["textbook, 0 workers", "textbook, 2 workers", "train.py"]
    assert {one["epochs"] for one in times.values()} == {1}
    # A machine that is ten times as fast in each next turn: the ratios are those of turns beside each other.
    turns = iter([10, 1, 30, 30, 100, 1, 200, 400, 1000, 1, 4000, 4000])
    monkeypatch.setattr(bench, "rate", lambda *args: next(turns))
    assert bench.main("--models mlp --data shapes --turns 3 --out a.json".split()) == 0
    one = json.loads(Path("a.json").read_text())["mlp"]
    assert (one["b_over_a"], one["b_over_c"]) == (3, 1) and one["images_per_second"]["train.py"] == 200
    for wrong in ("--turns 0", "--seconds nan", "--models resnet"):
        with pytest.raises(SystemExit, match="2"):
            bench.main(wrong.split())
    assert bench.main(["--data", "nowhere"]) == 2
