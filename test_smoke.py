"""The smoke test: every model, optimizer, schedule and loss, every file that can be copied, one run and its resume.

pytest test_smoke.py        # under half a minute, offline, on the CPU
pytest                      # all the tests, in tests/
pytest -m slow              # those that take minutes
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import losses
import optimizers
import schedulers
import train
from cnn_cifar10 import CNN
from mlp_mnist import MLP
from vit import ViT

torch.set_num_threads(1)  # the models are small: a second thread would mostly wait
ROOT = Path(__file__).parent
SMALL_VIT = dict(image_size=32, patch_size=8, num_classes=10, dim=32, depth=2, heads=2, mlp_dim=32)
MODELS = {
    "mlp": lambda: MLP(image_size=32, channels=3, hidden=(32,), dropout=0.2, batch_norm=True),
    "mlp, no norm": lambda: MLP(image_size=32, channels=3, hidden=(32, 16)),
    "cnn": lambda: CNN(widths=(8, 16)),
    "cnn, plain": lambda: CNN(arch="plain"),
    "vit": lambda: ViT(**SMALL_VIT),
    "vit, mean and convolutions": lambda: ViT(**SMALL_VIT, pool="mean", stem="conv"),
}
SMALL_RUN = "--model mlp --hidden 32 --data shapes --limit 500 --batch-size 100 --warmup-epochs 0 --device cpu".split()


def run(*argv, cwd):
    """A command in a fresh interpreter; its standard output."""
    command = [sys.executable, *map(str, argv)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def some_images(count=16):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    return images, torch.arange(count) % 10


@pytest.mark.parametrize("name", MODELS)
def test_a_model_learns(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    images, labels = some_images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_an_optimizer_lowers_the_loss(name):
    torch.manual_seed(0)
    model = MLP(image_size=32, channels=3, hidden=(32, 32))
    images, labels = some_images()
    groups = optimizers.parameter_groups(model, weight_decay=0.0, use_muon=name == "muon")
    optimizer = optimizers.OPTIMIZERS[name](groups, **optimizers.DEFAULTS[name])
    values = []

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        values.append(loss.item())
        return loss

    for _ in range(15):
        optimizer.step(closure)
    assert values[-1] < values[0]


@pytest.mark.parametrize("name", schedulers.SCHEDULES)
def test_a_schedule_stays_within_its_learning_rate(name):
    multiplier = schedulers.schedule(name, lr=0.1, epochs=10, warmup_epochs=2)
    values = [multiplier(step / 10, [0.5] * (step // 10)) for step in range(100)]
    assert 0 < values[0] < 0.1 and max(values) <= 1 and min(values) >= 0


@pytest.mark.parametrize("name", [*losses.LOSSES, "ce+0.5*cosine"])
def test_a_loss_is_lower_for_the_right_class(name):
    loss = losses.parse(name, smoothing=0.1)
    right = torch.eye(10)
    labels = torch.arange(10)
    assert loss(right, labels) < loss(right.roll(1, 0), labels)
    assert loss(right, right).item() == pytest.approx(loss(right, labels).item())


COPIED = {
    "mlp_mnist.py": "from mlp_mnist import MLP; MLP()(torch.randn(2, 1, 28, 28))",
    "cnn_cifar10.py": "from cnn_cifar10 import CNN; CNN()(torch.randn(2, 3, 32, 32))",
    "vit.py": "from vit import ViT; ViT(image_size=8, patch_size=4, num_classes=2, dim=8, depth=1, heads=1, mlp_dim=8)",
    "schedulers.py": "from schedulers import schedule; schedule('cosine', lr=0.1, epochs=9)(4.5)",
    "optimizers.py": "import optimizers; optimizers.parameter_groups(torch.nn.Linear(2, 2), weight_decay=0.1)",
    "losses.py": "from losses import parse; parse('mse')(torch.eye(2), torch.tensor([0, 1]))",
    "early_stopping.py": "from early_stopping import best_row; best_row([dict(epoch=1, val_acc=0.5)], 'val_acc')",
    "data.py": "import data; data.split(data.shapes(40, 20).train, 0.5, seed=0)",
    "augment.py": "import augment; next(augment.batches((torch.zeros(9, 3, 8, 8, dtype=torch.uint8), "
    "torch.zeros(9, dtype=torch.int64)), 4, (0.5,) * 3, (0.5,) * 3, 'cpu', key=(0, 0), crop_pad=2, flip=True))",
}


def test_every_file_that_can_be_copied_works_alone(tmp_path):
    for file in COPIED:
        folder = tmp_path / Path(file).stem
        folder.mkdir()
        shutil.copy(ROOT / file, folder)
    code = "import os, sys, torch\n"
    for file, use in COPIED.items():
        name = Path(file).stem
        code += f"sys.path.insert(0, {str(tmp_path / name)!r})\n{use}\nsys.path.pop(0)\n"
    run("-I", "-c", code, cwd=tmp_path)


def test_a_run_and_its_resume_give_what_one_run_gives(tmp_path, monkeypatch, capsys):
    run(ROOT / "train.py", *SMALL_RUN, "--sched", "none", "--epochs", 2, "--out", "straight", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    assert train.main([*SMALL_RUN, "--sched", "none", "--epochs", "1", "--out", "broken"]) == 0
    assert train.main(["--resume", "broken/last.pt", "--epochs", "2"]) == 0
    result = json.loads(Path("broken/result.json").read_text())
    assert result["epochs_run"] == 2 and 0 <= result["test_acc"] <= 1 and result["stopped"] == "finished"
    assert result["test_acc"] == json.loads(Path("straight/result.json").read_text())["test_acc"]
    capsys.readouterr()
    assert train.main(["--eval", "broken/best.pt", "--device", "cpu"]) == 0
    assert f"test acc {result['test_acc']:.4f}" in capsys.readouterr().out
