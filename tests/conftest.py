"""What several test files use: small models, small sets, small runs."""

import copy
import dataclasses
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import cnn_cifar10
import data as datasets
import losses
import mlp_mnist
import optimizers
import plot
import train
import vit
from utils import build, checkpoints, devices, evaluation

HERE = Path(__file__).parent.parent


for variable in ("RANK", "WORLD_SIZE", "PYTHONOPTIMIZE", "PYTHONDEVMODE"):  # of a batch system, of the user
    os.environ.pop(variable, None)
torch.set_num_threads(1)  # the models are small: a second thread would mostly wait
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with these ignored,
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and the runs of tests would ignore them, too


SMALL = datasets.shapes(140, 40)


VIT = dict(image_size=32, patch_size=4, num_classes=10, dim=32, depth=2, heads=2, mlp_dim=64)


def models():
    return {
        "mlp": mlp_mnist.MLP(hidden=(1024, 1024), dropout=0.2, batch_norm=True),
        "mlp of the articles": mlp_mnist.MLP(hidden=(256, 128, 64), dropout=0.2),
        "cnn": cnn_cifar10.CNN(widths=(16, 32, 32)),
        "cnn plain": cnn_cifar10.CNN(arch="plain"),
        "cnn relu": cnn_cifar10.CNN(arch="relu"),
        "vit mean": vit.ViT(**VIT, pool="mean"),
        "vit conv": vit.ViT(**VIT, pool="mean", stem="conv"),
        "vit cls": vit.ViT(**VIT, pool="cls", dropout=0.1, emb_dropout=0.1, drop_path=0.1),
    }


def images_for(model, count=8):
    size, channels = model.model_args["image_size"], model.model_args["channels"]
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=models().keys())
def model(request):
    torch.manual_seed(0)
    return models()[request.param]


@pytest.fixture(autouse=True)
def auto_is_the_cpu(monkeypatch):
    """Numbers are compared to the last digit: only tests that name a GPU use one."""
    choose = devices.choose_device
    monkeypatch.setattr(devices, "choose_device", lambda name: choose("cpu" if name == "auto" else name))


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Runs in an empty folder, on a small 'shapes', without drawing curves."""
    small = copy.deepcopy(SMALL)  # a test may change its images

    def shapes():
        return dataclasses.replace(small)

    monkeypatch.setattr(datasets, "shapes", shapes)
    monkeypatch.setattr(plot, "draw", lambda runs, path, best=None: Path(path).write_bytes(b"picture"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


TINY = "--data shapes --epochs 1 --batch-size 64 --device cpu".split()


TINY_MLP = ["--model", "mlp", "--hidden", "16", *TINY]


class Killed(BaseException):
    """As by SIGKILL: nothing is saved after it."""


def call(*argv):
    """train.main in this process."""
    return train.main([str(a) for a in argv])


def one_line(capsys, *words):
    """Standard error is one line of bounded length that holds these words."""
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and len(said) < 1200, said[:2000]
    assert all(word in said for word in words), said


def run_of(args, model):
    """A run without data, as far as train.train_step needs it."""
    device = torch.device("cpu")
    return train.Run(
        args=args,
        dataset=None,
        train_set=None,
        val_set=None,
        device=device,
        precision="fp32",
        model=model,
        train_model=model,
        ema=None,
        loss=losses.parse(args.loss, args.smoothing),
        teacher=None,
        optimizer=build.make_optimizer(args, model),
        scaler=devices.grad_scaler(device, "fp32"),
        schedule=None,
    )


def weights(path):
    return checkpoints.load(path)["state_dict"]


def same(a, b):
    """Bitwise identical, in nested dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b or (a != a and b != b)


def give_head_weights(model):
    """The zero head hides what lies below: no gradient, the same logits for all images."""
    torch.nn.init.normal_(model.head.weight)
    return model


def count(model):
    return sum(p.numel() for p in model.parameters())


def python(*argv, cwd=None, **more):
    """A command in a fresh interpreter, without a GPU and without the network's proxies."""
    env = os.environ | dict(CUDA_VISIBLE_DEVICES="", MPLBACKEND="Agg", OMP_NUM_THREADS="1")
    return subprocess.run(
        [sys.executable, *map(str, argv)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, **more
    )


def end_as_torch_does(path):
    """Give an archive that Python wrote the longer end that torch writes, and expects."""
    raw = Path(path).read_bytes()
    *_, count, length, start, _ = struct.unpack("<4sHHHHIIH", raw[-22:])
    longer = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(raw) - 22, 1)
    Path(path).write_bytes(raw[:-22] + longer + locator + raw[-22:])


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.numpy().tobytes())


def write_mnist(root, folder="MNIST", count=30):
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    arrays = {}
    for part, n in (("train", count), ("t10k", 10)):
        arrays[part] = torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8), torch.arange(n, dtype=torch.uint8) % 10
        write_idx(raw / f"{part}-images-idx3-ubyte", arrays[part][0])
        write_idx(raw / f"{part}-labels-idx1-ubyte", arrays[part][1])
    return arrays


def write_folder(root, size=(20, 24), mode="RGB", classes=("cat", "dog"), train_count=6, test_count=3):
    random = torch.Generator().manual_seed(0)
    for part, n in (("train", train_count), ("test", test_count)):
        for name in classes:
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                pixels = torch.randint(0, 256, (size[1], size[0], len(mode)), dtype=torch.uint8, generator=random)
                image = Image.fromarray(pixels.squeeze(2).numpy() if mode == "L" else pixels.numpy())
                image.save(root / part / name / f"{i}.png")
    return root


def rows(values, **more):
    return [dict(epoch=i + 1, val_acc=v, val_loss=-v, train_loss=1.0, lr=0.1) | more for i, v in enumerate(values)]


def scripted(monkeypatch, accuracies):
    """Make validation give these accuracies; a test of any other size is passed through."""
    real, values = evaluation.evaluate, iter(accuracies)

    def evaluate(model, split, *rest, **options):
        if len(split.labels) == 14:
            return 1.0, next(values)
        return real(model, split, *rest, **options)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)


def without_times(checkpoint):
    history = [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in checkpoint["history"]
    ]
    return {k: v for k, v in checkpoint.items() if k not in ("seconds", "args", "metrics")} | dict(history=history)


def halt(monkeypatch, at, killed=False):
    """Send this process a Ctrl-C during the given step of a run, or raise Killed there."""
    real, calls = train.backward, []

    def backward(*args):
        calls.append(1)
        if len(calls) == at and killed:
            raise Killed
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(train, "backward", backward)


def assert_same_run(a, b):
    """The same bits in best.pt, last.pt and metrics.csv, times aside."""
    assert same(*(without_times(checkpoints.load(f"{run}/last.pt")) for run in (a, b)))
    assert same(*(dict(weights(f"{run}/best.pt")) for run in (a, b)))
    assert checkpoints.load(f"{a}/best.pt")["epoch"] == checkpoints.load(f"{b}/best.pt")["epoch"]
    tables = [[line.rsplit(",", 2)[0] for line in Path(run, "metrics.csv").read_text().split()] for run in (a, b)]
    assert tables[0] == tables[1] and len(tables[0]) > 1


def rejected(*argv):
    """The exit status, be it returned or argparse's own way out."""
    try:
        return call(*argv)
    except SystemExit as stop:
        return stop.code


# What each flag changes, against the tiny run: (flags of both runs, flags of the second, what differs).
EFFECTS = {
    "mean": ("", "--mean 0.1", "weights"),
    "std": ("", "--std 1", "weights"),
    "sched_monitor": (
        "--sched plateau --lr 0.1 --epochs 5 --patience-epochs 0",
        "--sched-monitor val_loss",
        "weights",
    ),
    "no_test": ("", "--no-test", "log"),
    "model": ("", "--model vit --dim 16 --depth 1 --heads 2", "weights"),
    "epochs": ("", "--epochs 2", "weights"),
    "batch_size": ("", "--batch-size 32", "weights"),
    "accum": ("", "--accum 3", "weights"),
    "seed": ("", "--seed 1", "weights"),
    "device": ("", "--device nowhere", "status"),
    "amp": ("--amp off", "--amp bf16", "weights"),
    "out": ("", "--out elsewhere", "folder"),
    "log_interval": ("", "--log-interval 1", "log"),
    "save_every": ("", "--save-every 1", "saves"),
    "resume": ("", "--resume nowhere.pt", "status"),
    "eval": ("", "--eval nowhere.pt", "status"),
    "data": ("", "--data pets", "weights"),
    "data_dir": ("--data pets", "--data-dir elsewhere", "folder"),
    "img_size": ("--data pets", "--img-size 8", "weights"),
    "val_split": ("", "--val-split 0.3", "weights"),
    "limit": ("", "--limit 80", "weights"),
    "crop_pad": ("", "--crop-pad 3", "weights"),
    "flip": ("", "--flip", "weights"),
    "smoothing": ("", "--smoothing 0.3", "weights"),
    "monitor": ("--epochs 6 --lr 0.1", "--monitor val_loss", "best"),
    "patience": ("--epochs 6 --lr 0.1", "--patience 1", "weights"),
    "min_delta": ("--epochs 12 --monitor val_loss --val-split 0.5", "--min-delta 0.5", "best"),
    "opt": ("--lr 0.01", "--opt sgd", "weights"),
    "lr": ("", "--lr 0.01", "weights"),
    "weight_decay": ("", "--weight-decay 9", "weights"),
    "decay_all": ("--weight-decay 9", "--decay-all", "weights"),
    "layer_decay": ("", "--layer-decay 0.5", "weights"),
    "lr_scale": ("", "--lr-scale head=0.1", "weights"),
    "momentum": ("--opt sgd", "--momentum 0.5", "weights"),
    "nesterov": ("--opt sgd", "--nesterov", "weights"),
    "opt_betas": ("", "--opt-betas 0.5,0.6", "weights"),
    "clip_grad": ("--opt sgd", "--clip-grad 0.001", "weights"),
    "sched": ("", "--sched none", "weights"),
    "warmup_epochs": ("", "--warmup-epochs 0.5", "weights"),
    "min_lr": ("", "--min-lr 0.001", "weights"),
    "gamma": ("--sched exp", "--gamma 0.1", "weights"),
    "step_size": ("--sched step --epochs 2", "--step-size 1", "weights"),
    "milestones": ("--sched multistep --epochs 2", "--milestones 0.5", "weights"),
    "t_max": ("", "--t-max 0.7", "weights"),
    "t_0": ("--sched restarts", "--t-0 0.3", "weights"),
    "t_mult": ("--sched restarts --t-0 0.3 --epochs 2", "--t-mult 2", "weights"),
    "patience_epochs": ("--sched plateau --lr 0.1 --epochs 5", "--patience-epochs 0", "weights"),
    "hidden": ("", "--hidden 8", "weights"),
    "dropout": ("", "--dropout 0.5", "weights"),
    "batch_norm": ("", "--no-batch-norm", "weights"),
    "arch": ("--model cnn --widths 4,4", "--arch plain", "weights"),
    "widths": ("--model cnn --widths 4,4", "--widths 4,8", "weights"),
    "patch_size": ("{vit}", "--patch-size 8", "weights"),
    "dim": ("{vit}", "--dim 8", "weights"),
    "depth": ("{vit}", "--depth 2", "weights"),
    "heads": ("{vit}", "--heads 1", "weights"),
    "mlp_dim": ("{vit}", "--mlp-dim 8", "weights"),
    "dim_head": ("{vit}", "--dim-head 4", "weights"),
    "pool": ("{vit}", "--pool cls", "weights"),
    "emb_dropout": ("{vit}", "--emb-dropout 0.5", "weights"),
    "drop_path": ("{vit} --depth 2", "--drop-path 0.5", "weights"),
    "stem": ("{vit}", "--stem conv", "weights"),
    "qkv_bias": ("{vit}", "--qkv-bias", "weights"),
    "norm_eps": ("{vit}", "--norm-eps 0.1", "weights"),
    "init": ("", "--init nowhere.pt", "status"),
    "freeze": ("", "--freeze layers", "weights"),
    "tensorboard": ("", "--tensorboard", "log"),
    "minutes": ("", "--minutes 1", "status"),  # --epochs is given too; see test_minutes
    "runs": ("", "--runs 2", "folder"),
    "augment": ("", "--augment strong", "weights"),
    "reprob": ("", "--reprob 1", "weights"),
    "mixup": ("", "--mixup 1", "weights"),
    "cutmix": ("", "--cutmix 1", "weights"),
    "mixup_off_epoch": ("--epochs 2 --mixup 1", "--mixup-off-epoch 1", "weights"),
    "tta": ("--epochs 2", "--tta", "val_loss"),
    "loss": ("", "--loss mse", "weights"),
    "teacher": ("", "--teacher teacher.pt", "weights"),
    "distill": ("--teacher teacher.pt", "--distill 2", "weights"),
    "temperature": ("--epochs 2 --teacher teacher.pt", "--temperature 9", "weights"),
    "ema": ("", "--ema 0.9", "weights"),
    "compile": ("", "--compile", "compiled"),
    "cuda_graph": ("--device cpu", "--cuda-graph", "status"),
}


def replaced(content, place, value):
    """A copy with another value at this place."""
    if not place:
        return value
    copied = dict(content) if isinstance(content, dict) else list(content)
    copied[place[0]] = replaced(content[place[0]], place[1:], value)
    return tuple(copied) if isinstance(content, tuple) else copied


def rates(model, **options):
    """By parameter name its rate, at lr 1."""
    groups = optimizers.parameter_groups(model, lr=1.0, weight_decay=0.1, **options)
    assert all(group["initial_lr"] == group["lr"] for group in groups)
    by_id = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(by_id) == len(list(model.parameters()))
    return {name: by_id[id(p)] for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def middling():
    """A part of 'shapes' with enough images to learn from."""
    return datasets.shapes(600, 100)


def missing(monkeypatch, *packages):
    """Make imports of packages fail, as if they weren't installed."""
    for name in [*packages, *(m for m in sys.modules if m.split(".")[0] in packages)]:
        monkeypatch.setitem(sys.modules, name, None)
