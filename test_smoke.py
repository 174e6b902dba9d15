"""The tests: offline, on the CPU, in about a minute.   pytest test_smoke.py"""

import contextlib
import copy
import csv
import gzip
import hashlib
import importlib.util
import json
import math
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import repeat
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import arguments
import averaging
import bench
import checkpoints
import cnn_cifar10
import data as datasets
import devices
import diagnose
import early_stopping
import finetune
import losses
import mlp_mnist
import optimizers
import outputs
import plot
import predict
import processes
import ranges
import report
import schedulers
import train
import vit

HERE = Path(__file__).parent
torch.set_num_threads(1)  # the models are small: a second thread would mostly wait
VIT = dict(image_size=32, patch_size=4, num_classes=10, dim=32, depth=2, heads=2, mlp_dim=64)


def models():
    return {
        "mlp": mlp_mnist.MLP(),
        "mlp of the articles": mlp_mnist.MLP(hidden=(256, 128, 64), batch_norm=False),
        "cnn": cnn_cifar10.CNN(widths=(16, 32, 32)),
        "cnn plain": cnn_cifar10.CNN(arch="plain"),
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


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Runs in an empty folder, on a small 'shapes', without drawing curves."""
    small = datasets.shapes(140, 40)

    def shapes():
        return datasets.Data(small.name, small.classes, small.mean, small.std, small.train, small.test)

    monkeypatch.setattr(datasets, "shapes", shapes)
    monkeypatch.setattr(plot, "draw", lambda runs, path, best: Path(path).write_bytes(b"picture"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


TINY = "--data shapes --epochs 1 --batch-size 64 --device cpu".split()
TINY_MLP = ["--model", "mlp", "--hidden", "16", *TINY]


def call(*argv):
    """train.main in this process."""
    return train.main([str(a) for a in argv])


def weights(path):
    return checkpoints.load(path)["state_dict"]


def same(a, b):
    """Equal to the bit, in nested dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b or (a != a and b != b)


# ---------------------------------------------------------------------------------------------- models


def test_shapes_and_first_loss(model):
    images = images_for(model)
    logits = model.eval()(images)
    assert logits.shape == (8, 10)
    articles = model.model_args.get("arch") == "plain" or model.model_args.get("batch_norm") is False
    if not articles:  # theirs start as torch starts them
        loss = F.cross_entropy(logits, torch.arange(8))
        assert loss.item() == pytest.approx(math.log(10))


def give_head_weights(model):
    """The zero head hides what lies below: no gradient, the same logits for all images."""
    torch.nn.init.normal_(model.head.weight)
    return model


def test_gradient_reaches_every_parameter(model):
    give_head_weights(model).train()
    for module in model.modules():
        if isinstance(module, vit.DropPath):
            module.p = 0.0
    F.cross_entropy(model(images_for(model, 64)), torch.arange(64) % 10).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_eval_treats_each_image_alone_and_train_drops_at_random(model):
    images = images_for(model)
    give_head_weights(model).eval()
    logits, order = model(images), torch.randperm(8)
    assert torch.allclose(model(images[order]), logits[order], atol=1e-4)
    assert torch.equal(model(images), logits)
    model.train()
    drops = any(getattr(m, "p", 0) > 0 for m in model.modules())
    assert torch.equal(model(images), model(images)) != drops


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit mean"])
def test_memorises_a_batch(name):
    torch.manual_seed(0)
    model = models()[name].train()
    images, labels = images_for(model, 16), torch.arange(16) % 10
    images = images + torch.randn(16, images.shape[1], 1, 1)  # a tint each: averages over noise are all alike
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        logits = model(images)
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    assert (logits.argmax(1) == labels).all()


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts():
    assert count(mlp_mnist.MLP(hidden=(256, 128, 64), dropout=0.2, batch_norm=False)) == 242_762
    assert count(mlp_mnist.MLP(hidden=(128,), dropout=0, batch_norm=False)) == 784 * 128 + 128 + 128 * 10 + 10
    assert count(cnn_cifar10.CNN(arch="plain")) == 145_578
    assert count(cnn_cifar10.CNN()) == 1_972_802
    args = arguments.parse(["--model", "vit"])[0]
    assert count(vit.build(args, image_size=32, channels=3, num_classes=10)) == 1_802_698


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    attention = vit.Attention(dim=32, heads=4, dim_head=8, dropout=0.0)
    x = torch.randn(2, 5, 32)
    q, k, v = attention.to_qkv(x).reshape(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)
    out = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(8), dim=-1) @ v
    expected = attention.to_out(out.transpose(1, 2).reshape(2, 5, 32))
    assert torch.allclose(attention(x), expected, atol=1e-6)
    fused = F.scaled_dot_product_attention(q, k, v)  # what other devices use
    assert torch.allclose(fused, out, atol=1e-6)


def test_vit_features_and_class_token():
    model = vit.ViT(**VIT | dict(num_classes=0))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 32)
    # The two einops patterns of the article are one and the same for a token of (1, 1, dim).
    token = torch.randn(1, 1, 32)
    assert torch.equal(repeat(token, "() n d -> b n d", b=3), repeat(token, "1 1 d -> b 1 d", b=3))
    assert model.pos_embedding.shape == (1, 65, 32)
    assert vit.ViT(**VIT, pool="mean").cls_token is None


def test_vit_takes_what_vit_pytorch_takes():
    model = vit.ViT(
        image_size=(16, 32), patch_size=(8, 16), num_classes=7, dim=64, depth=1, heads=4, mlp_dim=32, pool="mean",
        channels=1, dim_head=8, dropout=0.1, emb_dropout=0.1,
    )  # fmt: skip
    assert model(torch.randn(2, 1, 16, 32)).shape == (2, 7)


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    drop = vit.DropPath(0.25)
    out = drop(torch.ones(20_000, 1, 1))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(drop.eval()(out), out)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(patch_size=5), ["5", "32", "1, 2, 4, 8, 16, 32"]),
        (dict(heads=3), ["3", "32", "1, 2, 4, 8, 16"]),
        (dict(pool="max"), ["max", "cls, mean"]),
        (dict(depth=0), ["depth 0"]),
        (dict(dropout=1.0), ["dropout 1.0"]),
    ],
)
def test_vit_refuses_with_numbers(wrong, words):
    with pytest.raises(ValueError) as error:
        vit.ViT(**VIT | wrong)
    assert all(word in str(error.value) for word in words), error.value


def test_vit_refuses_images_of_another_size():
    with pytest.raises(ValueError, match=r"28x28.*32x32"):
        vit.ViT(**VIT)(torch.randn(1, 3, 28, 28))


@pytest.mark.parametrize(
    "build",
    [
        lambda: cnn_cifar10.CNN(arch="deep"),
        lambda: cnn_cifar10.CNN(widths=(8,) * 6),
        lambda: cnn_cifar10.CNN(widths=(0, 8)),
        lambda: mlp_mnist.MLP(hidden=()),
        lambda: mlp_mnist.MLP(hidden=(8, 0)),
        lambda: mlp_mnist.MLP(dropout=math.nan),
    ],
)
def test_models_refuse_what_makes_no_network(build):
    with pytest.raises(ValueError, match=r"--\w+ "):
        build()


# ---------------------------------------------------------------------------------------------- schedules

LR, EPOCHS = 0.1, 12


def torch_schedule(name, optimizer, length):
    from torch.optim import lr_scheduler as torch_schedulers

    return {
        "none": lambda: torch_schedulers.ConstantLR(optimizer, factor=1),
        "step": lambda: torch_schedulers.StepLR(optimizer, 3, 0.8),
        "multistep": lambda: torch_schedulers.MultiStepLR(optimizer, [2, 7], 0.1),
        "exp": lambda: torch_schedulers.ExponentialLR(optimizer, 0.9),
        "cosine": lambda: torch_schedulers.CosineAnnealingLR(optimizer, 5, 0.01),
        "restarts": lambda: torch_schedulers.CosineAnnealingWarmRestarts(optimizer, 2, 2, 0.01),
        "linear": lambda: torch_schedulers.LinearLR(optimizer, 1, 0.1, length),
        "onecycle": lambda: torch_schedulers.OneCycleLR(optimizer, LR, total_steps=length + 1, cycle_momentum=False),
        "plateau": lambda: torch_schedulers.ReduceLROnPlateau(optimizer, "max", 0.1, 2, min_lr=1e-4),
    }[name]()


OPTIONS = {
    "none": {},
    "step": dict(step_size=3, gamma=0.8),
    "multistep": dict(milestones=(2, 7)),
    "exp": dict(gamma=0.9),
    "cosine": dict(t_max=5, min_lr=0.01),
    "restarts": dict(t_0=2, t_mult=2, min_lr=0.01),
    "linear": dict(min_lr=0.01),
    "onecycle": {},
    "plateau": dict(patience_epochs=2, min_lr=1e-4),
}
MONITORED = [0.1, 0.3, 0.3, 0.3, math.nan, 0.3, 0.31, 0.2, 0.2, 0.2, 0.2, 0.2]


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", schedulers.SCHEDULES)
def test_schedule_equals_torch_at_every_epoch_boundary(name, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], LR)
    theirs = torch_schedule(name, optimizer, EPOCHS - warmup)
    first = optimizer.param_groups[0]["lr"]
    expected = [first * (0.01 + 0.99 * epoch / warmup) for epoch in range(warmup)]
    for epoch in range(warmup, EPOCHS + 1):
        expected.append(optimizer.param_groups[0]["lr"])
        if epoch < EPOCHS:
            optimizer.step()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs.step(*([MONITORED[epoch]] if name == "plateau" else []))
    factor = schedulers.schedule(name, lr=LR, epochs=EPOCHS, warmup_epochs=warmup, mode="max", **OPTIONS[name])
    ours = [LR * factor(epoch, MONITORED[:epoch]) for epoch in range(EPOCHS + 1)]
    assert ours == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if name != "none":
        assert len({f"{lr:.9f}" for lr in ours[warmup:]}) > 1  # a constant would not pass


def test_steps_are_on_time_after_a_fractional_warmup():
    for warmup in (0.1, 0.3, 0.7, 1.1, 2.3):
        factor = schedulers.schedule("step", lr=1, epochs=40, warmup_epochs=warmup, step_size=1, gamma=0.5)
        for n in range(1, 30):
            step = round((warmup + n) * 10)  # of 10 steps an epoch
            assert factor(step / 10) == 0.5**n and factor((step - 1) / 10) == 0.5 ** (n - 1), (warmup, n)


def test_plateau_for_a_loss():
    factor = schedulers.schedule("plateau", lr=1, epochs=9, patience_epochs=1, mode="min", gamma=0.5)
    values = [1.0, 0.9, 0.9, 0.95, 0.8, 0.8, 0.8, 0.8]
    assert [factor(n, values[:n]) for n in range(9)] == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("name", schedulers.SCHEDULES)
@pytest.mark.parametrize("epochs, warmup", [(1, 0), (1, 0.5), (2.5, 0), (30, 2.25), (300, 299)])
def test_schedule_stays_in_range(name, epochs, warmup):
    factor = schedulers.schedule(name, lr=0.1, epochs=epochs, warmup_epochs=warmup)
    rates = [factor(epochs * i / 997) for i in range(997)]
    assert all(0 < rate <= 1 + 1e-12 for rate in rates)
    if warmup and name != "onecycle":
        assert rates[0] == pytest.approx(0.01) and factor(warmup) == 1
        rising = [factor(warmup * i / 50) for i in range(51)]
        assert rising == sorted(rising)


def test_schedules_are_smooth_inside_an_epoch():
    for name in ("cosine", "linear", "exp", "onecycle"):
        factor = schedulers.schedule(name, lr=0.1, epochs=4)
        inside = [factor(2 + i / 10) for i in range(11)]
        assert inside == sorted(inside, reverse=True) and len(set(inside)) == 11, name
    for name in ("step", "multistep", "none"):
        factor = schedulers.schedule(name, lr=0.1, epochs=4, step_size=1, milestones=(1, 2, 3))
        assert factor(2) == factor(2.99), name


def test_a_schedule_is_added_by_one_function(monkeypatch, tiny):
    def half(t, *, length):
        return 1.0 if t < length / 2 else 0.5

    monkeypatch.setitem(schedulers.SCHEDULES, "half", half)
    assert call(*TINY_MLP, "--sched", "half", "--epochs", 4, "--warmup-epochs", 0) == 0
    with open("runs/mlp-shapes-adamw-half/metrics.csv") as file:
        assert [float(row["lr"]) for row in csv.DictReader(file)] == [0.002, 0.002, 0.001, 0.001]


@pytest.mark.parametrize(
    "wrong",
    [
        dict(sched="cosinus"), dict(epochs=0), dict(epochs=math.nan), dict(lr=-1.0), dict(warmup_epochs=12),
        dict(min_lr=1.0), dict(gamma=0.0), dict(gamma=2.0), dict(step_size=0), dict(milestones=(5, 3)),
        dict(t_max=-1), dict(t_0=math.inf), dict(t_mult=0), dict(patience_epochs=-1),
    ],
)  # fmt: skip
def test_schedule_refuses(wrong):
    with pytest.raises(ValueError, match=f"--{next(iter(wrong)).replace('_', '-')} "):
        schedulers.schedule(**dict(sched="cosine", lr=0.1, epochs=12) | wrong)


def python(*argv, cwd=None, **more):
    """A command in a fresh interpreter, without a GPU and without the network's proxies."""
    env = os.environ | dict(CUDA_VISIBLE_DEVICES="", MPLBACKEND="Agg", OMP_NUM_THREADS="1")
    return subprocess.run(
        [sys.executable, *map(str, argv)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, **more
    )


def test_schedulers_command_line(tmp_path):
    done = python(HERE / "schedulers.py", "--sched", "step", "--lr", 1, "--epochs", 4, "--step-size", 2)
    assert done.stdout.splitlines() == ["epoch,lr", "0,1", "1,1", "2,0.1", "3,0.1", "4,0.01"]
    done = python(HERE / "schedulers.py", "--sched", "all", "--plot", tmp_path / "all.png")
    assert done.returncode == 0 and Image.open(tmp_path / "all.png").width > 600
    for wrong in (["--sched", "all"], ["--gamma", "7"], ["--epochs", "nan"], ["--sched", "nope"]):
        done = python(HERE / "schedulers.py", *wrong)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


# ---------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("opt", optimizers.OPTIMIZERS)
def test_every_optimizer_with_every_schedule(opt, tiny):
    for sched in schedulers.SCHEDULES:
        out = tiny / f"{opt}-{sched}"
        assert call(*TINY_MLP, "--hidden", "8,8", "--opt", opt, "--sched", sched, "--out", out, "--epochs", 1) == 0
        state = checkpoints.load(out / "last.pt")
        assert state["step"] == 2
        assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())


def test_compile_changes_no_name_and_no_number(tiny, monkeypatch, capsys):
    """With a compiler that leaves everything as it is; the true one needs a C++ compiler and half a minute."""
    compile_model = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compile_model(model, backend="eager"))
    assert call(*TINY_MLP, "--out", "plain") == 0 and call(*TINY_MLP, "--out", "compiled", "--compile") == 0
    plain, compiled = (checkpoints.load(f"{name}/best.pt") for name in ("plain", "compiled"))
    assert same(plain["state_dict"], compiled["state_dict"]) and "compiled\n" in capsys.readouterr().out

    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compile_model(model, backend=broken))
    assert call(*TINY_MLP, "--compile") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--no-compile" in line


class ReadsNothing(TorchDispatchMode):
    """Refuses what makes the host wait for the device: a number that is read from a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
@pytest.mark.parametrize(
    "flags",
    [
        "--model mlp --data shapes --hidden 8",
        "--model cnn --data shapes --widths 4,8",
        "--model vit --data shapes --dim 16 --depth 1 --heads 2 --drop-path 0.1 --augment strong --reprob 0.5",
    ],
)
def test_no_step_waits_for_the_device(device, flags, monkeypatch):
    monkeypatch.setattr(datasets, "AT_ONCE", 1)  # so that each step augments images, too
    steps = bench.ours(bench.set_up([*flags.split(), "--device", device]), False)
    next(steps)
    with contextlib.ExitStack() as watch:
        watch.enter_context(ReadsNothing())
        if device == "cuda":  # torch sees other waits there, too
            torch.cuda.set_sync_debug_mode("error")
            watch.callback(torch.cuda.set_sync_debug_mode, "default")
        for _ in range(3):
            next(steps)
    with pytest.raises(AssertionError), ReadsNothing():
        torch.ones(1).item()


def test_lbfgs_with_convolutions(tiny):
    """It flattens gradients, which channels_last would forbid."""
    assert call("--model", "cnn", "--widths", "4", *TINY, "--opt", "lbfgs") == 0


@pytest.mark.parametrize("opt", optimizers.OPTIMIZERS)
def test_every_optimizer_learns_at_its_own_rate(opt):
    """Each one lowers a simple loss at the rate that it gets when nobody says another."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 3)
    if opt == "muon":  # it's for hidden layers
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 3))
    images, labels = torch.randn(64, 8), torch.arange(64) % 3
    labels = (images[:, :3] + images[:, 3:6]).argmax(1)
    args = arguments.parse(["--opt", opt])[0]
    optimizer, loss = train.make_optimizer(args, model), train.make_loss(args, None, None, None)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    for step in range(20 if opt == "lbfgs" else 250):

        def gradient():
            return train.backward(model, images, labels, 64, loss, args, "fp32", scaler, optimizer)

        if opt == "lbfgs":
            losses.append(optimizers.step_with_closure(optimizer, gradient, step)[0].item())
        else:
            losses.append(gradient()[0].item())
            optimizer.step()
    assert losses[-1] < 0.93 * losses[0], losses[::30]


def test_whitening_takes_the_correlation_out():
    torch.manual_seed(0)
    images = torch.randn(200, 3, 16, 16).cumsum(2).cumsum(3)
    model = cnn_cifar10.CNN(image_size=16, widths=(4, 8))
    model.whiten(images)
    outputs = model.body[0](images) - model.body[0].bias[:, None, None]
    outputs = outputs.transpose(0, 1).flatten(1)
    assert torch.allclose(outputs[:12], -outputs[12:], atol=1e-4)
    assert torch.allclose(outputs[:12] @ outputs[:12].T / outputs.shape[1], torch.eye(12), atol=0.05)
    assert not model.body[0].weight.requires_grad and model.body[0].bias.requires_grad
    plain = cnn_cifar10.CNN(arch="plain", image_size=16)
    plain.whiten(images)
    assert all(p.requires_grad for p in plain.parameters())


def test_convolutions_start_as_the_identity_of_their_inputs():
    conv = cnn_cifar10.conv_norm_act(4, 8)["conv"]
    images = torch.randn(2, 4, 6, 6)
    assert torch.equal(conv(images)[:, :4], images) and not torch.equal(conv(images)[:, 4:], images)


def test_rates_by_pattern():
    model = cnn_cifar10.CNN(widths=(4, 8))
    groups = optimizers.parameter_groups(model, weight_decay=0, lr=0.5, lr_scale=[("*.norm.bias", 64.0), ("head", 2)])
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rate[id(parameter)] == 0.5 * (64 if name.endswith("norm.bias") else 2 if "head" in name else 1), name
    with pytest.raises(ValueError, match=r"--lr-scale \*\.nrom\.bias: no parameter"):
        optimizers.parameter_groups(model, weight_decay=0, lr=1, lr_scale=[("*.nrom.bias", 64.0)])


def test_weight_decay_is_for_matrices():
    model = vit.ViT(**VIT)
    spared, decayed = ({}, {})
    for group in optimizers.parameter_groups(model, weight_decay=0.1):
        names = {n for n, p in model.named_parameters() if any(p is q for q in group["params"])}
        (decayed if group["weight_decay"] else spared).update(dict.fromkeys(names))
    assert set(spared) | set(decayed) == {n for n, _ in model.named_parameters()} and not set(spared) & set(decayed)
    assert {"cls_token", "pos_embedding", "norm.weight", "head.bias"} <= set(spared)
    assert all(n.endswith("weight") and "norm" not in n for n in decayed)
    groups = optimizers.parameter_groups(model, weight_decay=0.1, decay_all=True)
    assert [g["weight_decay"] for g in groups] == [0.1] and len(groups[0]["params"]) == len(list(model.parameters()))


def test_adam_couples_weight_decay_and_adamw_does_not():
    """With a gradient of 0, AdamW shrinks a weight by lr * decay; Adam turns the decay into a full step of lr."""
    after = {}
    for opt in ("adam", "adamw"):
        weight = torch.nn.Parameter(torch.full((2, 2), 5.0))
        groups = [dict(params=[weight], weight_decay=0.1)]
        optimizer = optimizers.OPTIMIZERS[opt](groups, lr=0.01, opt_betas=(0.9, 0.999))
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        after[opt] = weight[0, 0].item()
    assert after["adamw"] == pytest.approx(5 * (1 - 0.01 * 0.1))
    assert after["adam"] == pytest.approx(5 - 0.01)


def test_muon_without_a_hidden_layer_is_refused(tiny, capsys):
    assert call(*TINY_MLP, "--hidden", "8", "--opt", "muon") == 2
    assert "--opt adamw" in capsys.readouterr().err
    assert call(*TINY_MLP, "--hidden", "8,4", "--opt", "muon") == 0
    assert "32 by Muon" in capsys.readouterr().out
    last = checkpoints.load(next(Path("runs").glob("*/last.pt")), keys=checkpoints.RESUME_KEYS)
    for state in last["optimizer"]["state"].values():
        state.pop("momentum_buffer", None)
    checkpoints.save(last, Path("odd.pt"))
    assert call("--resume", "odd.pt", "--epochs", 2) == 0  # as if it had not begun yet


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16)])
def test_orthogonal_makes_singular_values_alike(shape):
    torch.manual_seed(0)
    result = optimizers.orthogonal(torch.randn(3, *shape)).float()
    assert result.shape == (3, *shape)
    values = torch.linalg.svdvals(result)
    assert 0.5 < values.min() and values.max() < 1.4


def test_muon_is_for_hidden_matrices_and_adamw_for_the_rest():
    torch.manual_seed(0)
    model = cnn_cifar10.CNN(image_size=8, widths=(8, 96)).to(memory_format=torch.channels_last)  # 96 by 72: a tall one
    parts = [parameter for _, parameter in model.named_parameters()]
    names = [name for name, _ in model.named_parameters()]
    options = dict(lr=0.01, weight_decay=0.5)
    optimizer = optimizers.muon(
        optimizers.parameter_groups(model, **options, hidden=True), lr=0.01, momentum=0.9, opt_betas=(0.9, 0.99)
    )
    marked = {id(p) for group in optimizer.param_groups if group["hidden"] for p in group["params"]}
    assert {n for n, p in zip(names, parts, strict=True) if id(p) in marked} == {
        n for n in names if n.endswith("conv.weight")
    }
    twin = copy.deepcopy(model)
    adamw = torch.optim.AdamW(optimizers.parameter_groups(twin, **options), 0.01, (0.9, 0.99), fused=True)
    before = [parameter.detach().clone() for parameter in parts]
    for pair in zip(parts, twin.parameters(), strict=True):
        pair[0].grad = torch.randn_like(pair[0])
        pair[1].grad = pair[0].grad.clone()
    optimizer.step()
    adamw.step()
    for old, new, other in zip(before, parts, twin.parameters(), strict=True):
        if id(new) in marked:
            moved = (new - 0.995 * old).flatten(1)
            values = torch.linalg.svdvals(moved) / (0.01 * 0.2 * max(moved.shape) ** 0.5)
            assert 0.5 < values.min() and values.max() < 1.4
        else:
            assert torch.equal(new, other)


def test_pieces_add_up_to_the_batch():
    model = mlp_mnist.MLP(hidden=(16,), batch_norm=False, dropout=0)
    images, labels = images_for(model, 23), torch.arange(23) % 10
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    gradients, results = [], []
    for accum in (1, 4):
        args = arguments.parse(["--accum", str(accum), "--smoothing", "0.1"])[0]
        loss = train.make_loss(args, None, None, None)
        results.append(train.backward(model, images, labels, 23, loss, args, "fp32", scaler, optimizer))
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert torch.allclose(results[0], results[1], rtol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


# ---------------------------------------------------------------------------------------------- data


def test_shapes_are_the_same_on_every_machine():
    data = datasets.shapes()
    assert data.train[0].shape == (5000, 3, 32, 32) and data.test[0].shape == (1000, 3, 32, 32)
    assert torch.bincount(data.train[1]).tolist() == [500] * 10
    assert hashlib.sha256(data.train[0].numpy().tobytes()).hexdigest()[:12] == "f1bf678381ae"
    assert not same(data.train[0][:1000], data.test[0])


def test_pixel_stats():
    images = torch.randint(0, 256, (50, 3, 9, 7), dtype=torch.uint8)
    mean, std = datasets.pixel_stats(images)
    scaled = images.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=6e-5)
    assert std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), abs=6e-5)


@pytest.mark.parametrize("held_out, size", [(0.1, 100), (250, 250), (0, 0), (0.0333, 33), (999, 999)])
def test_split_is_stratified_and_disjoint(held_out, size):
    labels = torch.arange(1000) % 10
    ids = torch.arange(1000)
    (train_ids, train_labels), (val_ids, val_labels) = datasets.split((ids, labels), held_out, seed=1)
    assert len(val_ids) == size
    assert sorted([*train_ids.tolist(), *val_ids.tolist()]) == ids.tolist()
    assert torch.equal(labels[train_ids], train_labels) and torch.equal(labels[val_ids], val_labels)
    counts = torch.bincount(val_labels, minlength=10)
    assert counts.max() - counts.min() <= 1
    again = datasets.split((ids, labels), held_out, seed=1)[1][0]
    assert torch.equal(again, val_ids)
    if 0 < size < 900:
        assert not torch.equal(datasets.split((ids, labels), held_out, seed=2)[1][0], val_ids)


@pytest.mark.parametrize("held_out", [1000, 1e9, 1e-9, math.nan, -1])
def test_split_refuses(held_out):
    with pytest.raises(ValueError, match="--val-split"):
        datasets.split((torch.arange(1000), torch.zeros(1000, dtype=torch.int64)), held_out, seed=0)


def test_crops_stay_inside_and_flips_are_exact():
    # Every pixel says where it is, so that a crop tells its own offset.
    place = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(500, 2, 8, 8)
    assert torch.equal(datasets.crop_and_flip(place, 0, None, datasets.seeded(0)), place)
    mirrored = torch.arange(500) % 3 == 0
    flipped = datasets.crop_and_flip(place, 0, mirrored, datasets.seeded(0))
    assert torch.equal(flipped[mirrored], place[mirrored].flip(3)) and torch.equal(flipped[~mirrored], place[~mirrored])
    padded = F.pad(place.float(), (3, 3, 3, 3), mode="reflect").byte()
    windows = {padded[0, 0, y : y + 8, x : x + 8].numpy().tobytes() for y in range(7) for x in range(7)}
    crops = datasets.crop_and_flip(place, 3, None, datasets.seeded(0))
    assert torch.equal(crops[:, 0], crops[:, 1])
    assert {crop.numpy().tobytes() for crop in crops[:, 0]} == windows  # nothing else, and each of the 49


@pytest.mark.parametrize("augment", ["none", "strong"])
def test_two_epochs_show_both_sides_of_every_image(augment):
    part = torch.zeros(300, 1, 8, 8, dtype=torch.uint8), torch.arange(300)
    part[0][..., :3] = 200

    def mirrored(epoch):
        key = dict(key=(7, epoch), flip=True, augment=augment)
        images, labels = next(datasets.batches(part, 300, (0.5,), (0.5,), "cpu", **key))
        return (images[..., 4:].mean((1, 2, 3)) > images[..., :4].mean((1, 2, 3)))[labels.argsort()]

    first = mirrored(0)
    assert 100 < first.sum() < 200
    assert torch.equal(mirrored(1), ~first) and torch.equal(mirrored(2), first)


def test_order_depends_on_seed_and_epoch_alone():
    part = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 1, 8, 8), torch.arange(50)

    def epoch(key, **more):
        torch.rand(1)  # other random numbers don't matter
        return list(datasets.batches(part, 16, (0.5,), (0.5,), "cpu", key=key, crop_pad=2, flip=True, **more))

    first = epoch((0, 0))
    assert same(first, epoch((0, 0))) and same(first[2:], epoch((0, 0), first=2))
    assert sorted(torch.cat([labels for _, labels in first]).tolist()) == list(range(50))
    for other in ((0, 1), (1, 0)):
        assert not torch.equal(first[0][1], epoch(other)[0][1])
    plain = list(datasets.batches(part, 16, (0.5,), (0.5,), "cpu"))
    assert torch.cat([labels for _, labels in plain]).tolist() == list(range(50))
    assert torch.allclose(plain[0][0][3, 0, 0, 0], torch.tensor((3 / 255 - 0.5) / 0.5))


def test_no_batch_of_one():
    assert datasets.bounds(9, 4, least=2) == [(0, 4), (4, 9)]
    assert datasets.bounds(10, 4, least=2) == [(0, 4), (4, 8), (8, 10)]
    assert datasets.bounds(9, 4) == [(0, 4), (4, 8), (8, 9)]
    assert datasets.bounds(1, 4) == [(0, 1)] and datasets.bounds(0, 4) == []


def test_limit_is_stratified():
    labels = torch.arange(300) % 3
    ids, some = datasets.limit((torch.arange(300), labels), 31, seed=0)
    assert len(set(ids.tolist())) == 31 and torch.bincount(some).tolist() in ([11, 10, 10], [10, 11, 10], [10, 10, 11])
    with pytest.raises(ValueError, match="--limit 301"):
        datasets.limit((torch.arange(300), labels), 301, seed=0)


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


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_files(name, folder, tmp_path):
    arrays = write_mnist(tmp_path, folder)
    data = datasets.load(name, tmp_path)
    assert torch.equal(data.train[0][:, 0], arrays["train"][0]) and torch.equal(data.test[0][:, 0], arrays["t10k"][0])
    assert data.train[1].tolist() == arrays["train"][1].tolist() and data.train[1].dtype == torch.int64
    assert len(data.classes) == 10 and (name != "mnist" or (data.classes[3], data.mean) == ("3", (0.1307,)))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_files(name, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10, CIFAR100

    cls = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    folder, classes = tmp_path / cls.base_folder, int(name[5:])
    folder.mkdir()
    pixels, key = {}, "labels" if name == "cifar10" else "fine_labels"

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    for files in ("train_list", "test_list"):
        listed = []
        for file, _ in getattr(cls, files):
            pixels[file] = torch.randint(0, 256, (10, 3072), dtype=torch.uint8)
            listed.append([file, write(file, {"data": pixels[file].numpy(), key: list(range(10))})])
        monkeypatch.setattr(cls, files, listed)
    names = [f"class {i}" for i in range(classes)]
    monkeypatch.setattr(cls, "meta", cls.meta | dict(md5=write(cls.meta["filename"], {cls.meta["key"]: names})))

    data = datasets.load(name, tmp_path)
    first = cls.train_list[0][0]
    assert torch.equal(data.train[0][:10], pixels[first].view(10, 3, 32, 32))
    assert len(data.train[1]) == 10 * len(cls.train_list) and len(data.test[1]) == 10 and data.classes == names
    assert data.mean == datasets.CONSTANTS.get(name, (datasets.pixel_stats(data.train[0])[0],))[0]


class NoNetwork:
    """Stands for urllib.request.urlopen: records the time limit in force, then fails as a silent host does."""

    def __call__(self, *args, **kwargs):

        self.timeout = socket.getdefaulttimeout()
        raise TimeoutError("timed out")


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", failing := NoNetwork())
    return failing


@pytest.mark.parametrize("name, file", [("cifar10", "cifar-10-python.tar.gz"), ("mnist", "t10k-labels-idx1-ubyte.gz")])
def test_download_fails_with_all_that_is_needed_by_hand(name, file, no_network, tmp_path):
    with pytest.raises(datasets.Unavailable) as error:
        datasets.load(name, tmp_path / "new")
    assert no_network.timeout == datasets.SILENCE
    for word in (name, "http", "timed out", file, str(tmp_path / "new")):
        assert word in str(error.value)
    assert not (tmp_path / "new").exists()  # nothing half-made is left


def test_files_put_by_hand_are_taken(no_network, tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    write_mnist(tmp_path)
    raw, resources = tmp_path / "MNIST" / "raw", []
    for file in list(raw.iterdir()):
        packed = raw / f"{file.name}.gz"
        packed.write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
        resources.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))
    monkeypatch.setattr(MNIST, "resources", resources)
    assert len(datasets.load("mnist", tmp_path).train[1]) == 30


def test_fallback_to_shapes_is_said_and_named(tiny, no_network, capsys):
    assert call("--model", "cnn", "--widths", "4,8", "--epochs", 1, "--batch-size", 64) == 0
    said = capsys.readouterr().out
    assert "cifar10 is not in data" in said and "cifar-10-python.tar.gz" in said and "shapes" in said
    result = json.loads(Path("runs/cnn-shapes-muon-onecycle/result.json").read_text())
    assert result["data"] == "shapes" and result["args"]["data"] == "shapes"
    assert call("--model", "cnn", "--data", "cifar10") == 2  # asked for by name, it's an error


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


def test_folder_is_decoded_once_and_again_when_it_changes(tmp_path, monkeypatch):
    root, cache = write_folder(tmp_path / "pets"), tmp_path / "data"
    decoded = []
    decode = datasets.decode
    monkeypatch.setattr(datasets, "decode", lambda path, size: (decoded.append(path), decode(path, size))[1])
    data = datasets.load(str(root), cache)
    assert data.name == "pets" and data.classes == ["cat", "dog"] and data.note == ""
    assert data.train[0].shape == (12, 3, 20, 20) and data.test[1].tolist() == [0] * 3 + [1] * 3
    assert len(decoded) == 18
    again = datasets.load(str(root), cache)
    assert len(decoded) == 18 and torch.equal(again.train[0], data.train[0]) and again.mean == data.mean

    Image.new("RGB", (20, 24), (255, 0, 0)).save(root / "train" / "dog" / "0.png")
    changed = datasets.load(str(root), cache)
    assert len(decoded) == 36 and "changed" in changed.note
    assert changed.train[0][6, :, 0, 0].tolist() == [255, 0, 0]

    (file,) = (cache / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert "damaged" in datasets.load(str(root), cache).note and len(decoded) == 54
    assert datasets.load(str(root), cache, img_size=8).train[0].shape == (12, 3, 8, 8)


def test_grey_folder_has_one_channel(tmp_path):
    data = datasets.load(str(write_folder(tmp_path / "digits", (28, 28), "L")), tmp_path)
    assert data.train[0].shape == (12, 1, 28, 28) and len(data.mean) == 1


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda root: shutil.rmtree(root / "train"), ["train", "can't be read"]),
        (lambda root: shutil.rmtree(root / "test"), ["test", "can't be read"]),
        (lambda root: [f.unlink() for f in (root / "train" / "cat").iterdir()], ["cat", "holds no images"]),
        (lambda root: (root / "test" / "cow").mkdir(), ["cow", "class"]),
        (lambda root: (root / "train" / "dog" / "2.png").write_bytes(b"no image"), ["1 of 18", "2.png"]),
    ],
)
def test_bad_folders_are_refused(spoil, words, tiny, capsys):
    spoil(write_folder(tiny / "pets"))
    assert call("--model", "cnn", "--widths", "8", "--data", tiny / "pets") == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and all(word in said for word in words), said
    assert not Path("runs").exists()


# ---------------------------------------------------------------------------------------------- best and stopping


def rows(values, **more):
    return [dict(epoch=i + 1, val_acc=v, val_loss=-v, train_loss=1.0, lr=0.1) | more for i, v in enumerate(values)]


@pytest.mark.parametrize("monitor", ["val_acc", "val_loss"])
def test_best_is_the_best(monitor):
    for values, epoch in (
        ([0.5, 0.4, 0.3], 1),
        ([0.5, 0.5, 0.5], 1),
        ([0.5, math.nan, 0.6, math.nan], 3),
        ([math.nan, 0.1], 2),
        ([0.1, 0.3, 0.2, 0.4, 0.1], 4),
    ):
        assert early_stopping.best_row(rows(values), monitor)["epoch"] == epoch, values
    assert early_stopping.best_row(rows([math.nan]), monitor) is None
    assert early_stopping.best_row(rows([0.5, 0.55, 0.61]), monitor, min_delta=0.1)["epoch"] == 3
    assert early_stopping.best_row(rows([0.5, 0.55, 0.6]), monitor, min_delta=0.2)["epoch"] == 1


def test_waiting_counts_evaluations_after_the_best_and_the_warmup():
    history = rows([0.5, 0.4, 0.4, 0.4])
    best = early_stopping.best_row(history, "val_acc")
    assert [early_stopping.waited(history[:n], best) for n in range(1, 5)] == [0, 1, 2, 3]
    assert early_stopping.waited(history, best, warmup_epochs=3) == 1
    assert early_stopping.waited(rows([math.nan] * 3), None) == 3


def scripted(monkeypatch, accuracies):
    """Make validation give these accuracies; a test of any other size is passed through."""
    real, values = train.evaluate, iter(accuracies)

    def evaluate(model, part, *rest, **scoring):
        if len(part[1]) == 14:
            return 1.0, next(values)
        return real(model, part, *rest, **scoring)

    monkeypatch.setattr(train, "evaluate", evaluate)


@pytest.mark.parametrize(
    "accuracies, flags, epochs, best",
    [
        ([0.1, 0.2, 0.3, 0.3, 0.3, 0.3], ["--patience", 2], 5, 3),
        ([0.1, 0.2, 0.3, 0.2, 0.4, 0.3, 0.3, 0.3], ["--patience", 3], 8, 5),
        ([0.4, 0.3, 0.3, 0.3], ["--patience", 2, "--warmup-epochs", 2], 4, 1),
        ([0.4, 0.41, 0.42, 0.43, 0.44, 0.45], ["--patience", 2, "--min-delta", 0.1], 3, 1),
        ([0.4] + [0.3] * 9, ["--patience", 0], 10, 1),
    ],
)
def test_early_stopping_fires_exactly_when_it_should(accuracies, flags, epochs, best, tiny, monkeypatch, capsys):
    scripted(monkeypatch, accuracies)
    assert call(*TINY_MLP, "--epochs", 10, "--warmup-epochs", 0, "--out", "run", *flags) == 0
    result = json.loads(Path("run/result.json").read_text())
    assert (result["epochs_run"], result["best_epoch"]) == (epochs, best)
    assert result["stopped"] == ("early stop" if epochs < 10 else "finished")
    assert checkpoints.load("run/best.pt")["epoch"] == best and checkpoints.load("run/last.pt")["epoch"] == epochs
    said = capsys.readouterr().out
    assert ("no better val_acc" in said and "--sched cosine were not reached" in said) == (epochs < 10)


def test_poisoned_test_labels_change_no_training(tiny, monkeypatch):
    real = datasets.shapes
    assert call(*TINY_MLP, "--epochs", 3, "--out", "clean") == 0

    def poisoned():
        data = real()
        data.test = (data.test[0], (data.test[1] + 1) % 10)
        return data

    monkeypatch.setattr(datasets, "shapes", poisoned)
    assert call(*TINY_MLP, "--epochs", 3, "--out", "poisoned") == 0
    clean, poisoned = (checkpoints.load(f"{name}/last.pt") for name in ("clean", "poisoned"))
    untimed = [k for k in outputs.COLUMNS if k not in ("seconds", "images_per_second")]
    assert [[r[k] for k in untimed] for r in clean["history"]] == [[r[k] for k in untimed] for r in poisoned["history"]]
    assert same(clean["state_dict"], poisoned["state_dict"]) and same(
        weights("clean/best.pt"), weights("poisoned/best.pt")
    )
    loss = [json.loads(Path(f"{name}/result.json").read_text())["test_loss"] for name in ("clean", "poisoned")]
    assert loss[0] != loss[1]


def test_the_test_set_is_read_once_with_the_best_weights(tiny, monkeypatch):
    read, real = [], train.evaluate

    def evaluate(model, part, *rest, **scoring):
        if len(part[1]) == 40:
            read.append({k: v.clone() for k, v in model.state_dict().items()})
        return real(model, part, *rest, **scoring)

    monkeypatch.setattr(train, "evaluate", evaluate)
    assert call(*TINY_MLP, "--epochs", 4, "--out", "run") == 0
    assert len(read) == 1 and same(read[0], dict(weights("run/best.pt")))


def test_without_validation_the_last_weights_are_the_result(tiny, capsys):
    assert call(*TINY_MLP, "--epochs", 2, "--val-split", 0, "--out", "run") == 0
    assert "none was held out" in capsys.readouterr().out
    result = json.loads(Path("run/result.json").read_text())
    assert result["best_epoch"] == 2 and result["best_val_acc"] is None and result["test_acc"] is not None
    assert same(dict(weights("run/best.pt")), dict(weights("run/last.pt")))
    assert call(*TINY_MLP, "--val-split", 0, "--patience", 3) == 2


# ---------------------------------------------------------------------------------------------- a run


def test_every_output_is_there_and_says_the_same(tiny, capsys):
    assert call(*TINY_MLP, "--epochs", 3) == 0
    out = tiny / "runs" / "mlp-shapes-adamw-cosine"
    assert {f.name for f in out.iterdir()} == {
        "best.pt", "last.pt", "metrics.csv", "result.json", "log.txt", "curves.png",
    }  # fmt: skip
    assert (out / "log.txt").read_text() == capsys.readouterr().out
    with open(out / "metrics.csv") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == "epoch step lr train_loss train_acc val_loss val_acc seconds images_per_second".split()
    assert [(row["epoch"], row["step"]) for row in table] == [("1", "2"), ("2", "4"), ("3", "6")]
    result = json.loads((out / "result.json").read_text())
    assert set(result) >= set(
        "model data test_acc test_loss best_epoch best_val_acc best_val_loss epochs_run stopped train_seconds "
        "images_per_second params seed device amp torch args".split()
    )
    best = max(table, key=lambda row: float(row["val_acc"]))
    assert result["best_epoch"] == int(best["epoch"]) and result["best_val_acc"] == float(best["val_acc"])
    assert 0 <= result["test_acc"] <= 1 and result["stopped"] == "finished"

    checkpoint = torch.load(out / "best.pt", weights_only=True)
    assert set(checkpoint) == {
        "model", "model_args", "state_dict", "classes", "image_size", "channels", "mean", "std", "epoch", "metrics",
        "args",
    }  # fmt: skip
    model = mlp_mnist.MLP(**checkpoint["model_args"])
    model.load_state_dict(checkpoint["state_dict"])
    data = datasets.shapes()
    loss, acc = train.evaluate(model, data.test, data, torch.device("cpu"), result["amp"])
    assert (loss, acc) == (result["test_loss"], result["test_acc"])

    assert call("--eval", out / "best.pt") == 0
    assert capsys.readouterr().out == f"test acc {acc:.4f}  loss {loss:.4f}  (shapes, 40 images)\n"
    assert call(*TINY_MLP) == 0 and (tiny / "runs" / "mlp-shapes-adamw-cosine-2" / "result.json").exists()


def test_same_seed_same_bits(tiny):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert call(*TINY_MLP, "--epochs", 2, "--seed", seed, "--out", name) == 0
    assert same(dict(weights("a/last.pt")), dict(weights("b/last.pt")))
    assert not same(dict(weights("a/last.pt")), dict(weights("c/last.pt")))


def without_times(checkpoint):
    history = [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in checkpoint["history"]
    ]
    return {k: v for k, v in checkpoint.items() if k not in ("seconds", "args", "metrics")} | dict(history=history)


def halt(monkeypatch, at):
    """Send this process a Ctrl-C during the given step of a run."""
    real, calls = train.backward, []

    def backward(*args):
        calls.append(1)
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


@pytest.mark.parametrize(
    "flags, steps",
    [
        ("", range(1, 9)),
        ("--opt sgd --sched plateau --dropout 0.5", (3, 4)),
        ("--opt lbfgs --sched restarts", (3, 9)),
        ("--opt muon --hidden 8,8,8", (3,)),
    ],
)
def test_resuming_gives_the_same_bits(flags, steps, tiny, monkeypatch):
    flags = [*TINY_MLP, "--epochs", 4, *flags.split()]
    assert call(*flags, "--out", "straight") == 0
    for at in steps:
        with monkeypatch.context() as patch:
            halt(patch, at)
            assert call(*flags, "--out", f"halted-{at}") == 130
        result = json.loads(Path(f"halted-{at}/result.json").read_text())
        assert result["stopped"] == "interrupted" and result["test_acc"] is None
        assert call("--resume", f"halted-{at}/last.pt") == 0
        assert_same_run("straight", f"halted-{at}")


def test_saves_inside_an_epoch(tiny, monkeypatch):
    flags = [*TINY_MLP, "--batch-size", 10, "--epochs", 2, "--save-every", 5]
    assert call(*flags, "--out", "straight") == 0
    real, calls = train.backward, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 20:
            raise KeyError("as a kill: nothing is saved after this")
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(train, "backward", dies)
        call(*flags, "--out", "killed")
    assert checkpoints.load("killed/last.pt")["step"] == 15
    assert call("--resume", "killed/last.pt") == 0
    assert_same_run("straight", "killed")


def test_a_kill_between_last_and_best_loses_nothing(tiny, monkeypatch):
    assert call(*TINY_MLP, "--epochs", 2, "--out", "straight") == 0
    real = checkpoints.save

    def save(content, path):
        if path.name == "best.pt":
            raise KeyError("killed here")
        real(content, path)

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(checkpoints, "save", save)
        call(*TINY_MLP, "--epochs", 2, "--out", "killed")
    assert call("--resume", "killed/last.pt") == 0
    assert_same_run("straight", "killed")


def test_resuming_elsewhere_and_for_longer(tiny, capsys):
    assert call(*TINY_MLP, "--epochs", 2, "--lr", 0.1, "--out", "run") == 0
    best = weights("run/best.pt")
    assert call("--resume", "run/last.pt", "--epochs", 3, "--out", "longer") == 0
    assert "--epochs 2.0 -> 3.0" in Path("longer/log.txt").read_text()
    result = json.loads(Path("longer/result.json").read_text())
    assert result["epochs_run"] == 3 and result["args"]["epochs"] == 3
    if result["best_epoch"] < 3:
        assert same(dict(weights("longer/best.pt")), dict(best))
    shutil.move("longer", "moved")  # a folder may be renamed: last.pt's own place counts
    assert call("--resume", "moved/last.pt", "--epochs", 4) == 0
    assert not Path("longer").exists() and checkpoints.load("moved/last.pt")["epoch"] == 4


def test_a_resume_misses_the_best_epoch_at_the_door(tiny, monkeypatch, capsys):
    scripted(monkeypatch, [0.4, 0.3])
    assert call(*TINY_MLP, "--epochs", 2, "--out", "run") == 0
    Path("run/best.pt").unlink()
    for more in ([], ["--out", "new"]):
        assert call("--resume", "run/last.pt", "--epochs", 3, *more) == 2
        assert "run/best.pt doesn't exist" in capsys.readouterr().err and not Path("new").exists()


def test_an_early_stop_survives_a_resume(tiny, monkeypatch):
    scripted(monkeypatch, [0.4, 0.3, 0.3])
    flags = [*TINY_MLP, "--epochs", 9, "--warmup-epochs", 0, "--patience", 2]
    assert call(*flags, "--out", "run") == 0
    scripted(monkeypatch, [])
    assert call("--resume", "run/last.pt") == 0  # it has waited long enough already: no further epoch
    assert json.loads(Path("run/result.json").read_text())["stopped"] == "early stop"


def test_resume_refuses_another_run(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    before = Path("run/last.pt").read_bytes()
    for flags, words in (
        (["--lr", 0.5], ["--lr 0.5", "0.002"]),
        (["--batch-size", 32], ["--batch-size 32", "64"]),
        (["--seed", 1], ["--seed 1", "0"]),
        (["--hidden", 8], ["--hidden (8,)", "(16,)"]),
        (["--model", "vit"], ["--model vit", "mlp"]),
    ):
        assert call("--resume", "run/last.pt", *flags) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words) and len(said.splitlines()) == 1, said
    assert Path("run/last.pt").read_bytes() == before


def test_resume_refuses_other_images(tiny, monkeypatch, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    more = datasets.shapes()
    more.train = tuple(torch.cat((t, t)) for t in more.train)
    monkeypatch.setattr(datasets, "shapes", lambda: more)
    assert call("--resume", "run/last.pt", "--epochs", 2) == 2
    said = capsys.readouterr().err
    assert "2 steps" in said and len(said.splitlines()) == 1


# ---------------------------------------------------------------------------------------------- tricks in a run


@pytest.mark.parametrize(
    "flags", ["--ema 0.9", "--mixup 1 --cutmix 1 --augment strong --reprob 0.5", "--loss mse+cosine"]
)
def test_resuming_with_tricks_gives_the_same_bits(flags, tiny, monkeypatch):
    flags = [*TINY_MLP, "--epochs", 4, *flags.split()]
    assert call(*flags, "--out", "straight") == 0
    with monkeypatch.context() as patch:
        halt(patch, 5)
        assert call(*flags, "--out", "halted") == 130
    assert call("--resume", "halted/last.pt") == 0
    assert_same_run("straight", "halted")


def test_the_average_is_judged_and_kept(tiny, monkeypatch):
    averages = []
    real = averaging.Average.update

    def update(self, model):
        real(self, model)
        averages.append({k: v.clone() for k, v in self.model.state_dict().items()})

    monkeypatch.setattr(averaging.Average, "update", update)
    assert call(*TINY_MLP, "--epochs", 2, "--ema", 0.9, "--val-split", 0, "--out", "run") == 0
    assert same(dict(weights("run/best.pt")), averages[-1]) and len(averages) == 6
    last = checkpoints.load("run/last.pt")
    assert same(dict(last["state_dict"]), averages[-1]) and not same(dict(last["ema"]["trained"]), averages[-1])


def test_the_teacher_stays_as_it_is_and_is_followed(tiny, monkeypatch, capsys):
    assert call(*TINY_MLP, "--epochs", 3, "--out", "teacher") == 0
    before, seen = Path("teacher/best.pt").read_bytes(), []
    real = train.make_loss

    def make_loss(*args):
        loss = real(*args)
        (cell,) = [c.cell_contents for c in loss.__closure__ if isinstance(c.cell_contents, torch.nn.Module)]
        seen.append((cell, {k: v.clone() for k, v in cell.state_dict().items()}))
        return loss

    monkeypatch.setattr(train, "make_loss", make_loss)
    assert call(*TINY_MLP, "--epochs", 2, "--teacher", "teacher/best.pt", "--distill", 1, "--out", "pupil") == 0
    ((teacher, start),) = seen
    assert not teacher.training and same(start, dict(teacher.state_dict()))
    assert Path("teacher/best.pt").read_bytes() == before
    monkeypatch.undo()
    monkeypatch.chdir(tiny)
    write_folder(tiny / "pets", (32, 32))
    assert call(*TINY_MLP, "--data", "pets", "--teacher", "teacher/best.pt") == 2
    assert "other classes" in capsys.readouterr().err


def test_views_are_labelled_wherever_the_figure_stands(tiny, capsys):
    assert call(*TINY_MLP, "--tta", "--out", "run") == 0
    assert "mean of views" in capsys.readouterr().out
    result = json.loads(Path("run/result.json").read_text())
    assert result["args"]["tta"] is True
    assert call("--eval", "run/best.pt") == 0
    said = capsys.readouterr().out
    assert "mean of views" in said and f"{result['test_acc']:.4f}" in said and f"{result['test_loss']:.4f}" in said


def test_runs_report_mean_and_deviation(tiny, capsys):
    assert call(*TINY_MLP, "--runs", 3, "--seed", 4, "--out", "many") == 0
    result = json.loads(Path("many/result.json").read_text())
    each = [json.loads(Path(f"many/seed-{seed}/result.json").read_text()) for seed in (4, 5, 6)]
    accs = torch.tensor([one["test_acc"] for one in each], dtype=torch.float64)
    assert result["test_acc"] == pytest.approx(accs.mean().item()) and result["n"] == 3
    assert result["test_acc_std"] == pytest.approx(accs.std().item())
    assert [one["seed"] for one in result["runs"]] == [4, 5, 6] and len(set(accs.tolist())) > 1
    assert f"{result['test_acc']:.4f} +- {result['test_acc_std']:.4f}" in capsys.readouterr().out
    assert call(*TINY_MLP, "--seed", 5, "--out", "one") == 0
    assert same(dict(weights("one/best.pt")), dict(weights("many/seed-5/best.pt")))
    assert call(*TINY_MLP, "--runs", 3, "--out", "many") == 2


def test_minutes(tiny, monkeypatch, capsys):
    """The run lands on time, its schedule at its end; a replay by --epochs needs no clock."""
    real = train.backward

    def slow(*args):
        time.sleep(0.01)  # so that other load on the machine matters less
        return real(*args)

    monkeypatch.setattr(train, "backward", slow)
    flags = [word for word in TINY_MLP if word not in ("--epochs", "1")]
    start = time.perf_counter()
    assert call(*flags, "--minutes", 0.08, "--batch-size", 8, "--out", "timed") == 0
    assert 0.7 * 4.8 < time.perf_counter() - start < 1.4 * 4.8
    result = json.loads(Path("timed/result.json").read_text())
    assert result["stopped"] == "time budget" and result["args"]["warmup_epochs"] <= result["args"]["epochs"] / 5
    steps = checkpoints.load("timed/last.pt")["step"]
    assert steps == round(result["args"]["epochs"] * 16) > 100
    rows = list(csv.DictReader(Path("timed/metrics.csv").open()))
    assert float(rows[-1]["lr"]) < 1e-3 * 0.002
    monkeypatch.setattr(train, "backward", real)
    assert call(*flags, "--epochs", result["args"]["epochs"], "--batch-size", 8, "--out", "replay") == 0
    assert same(dict(weights("timed/last.pt")), dict(weights("replay/last.pt")))


def test_sigterm_saves(tmp_path):
    command = [sys.executable, HERE / "train.py", *TINY_MLP, "--epochs", "500", "--out", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch"):
            process.send_signal(signal.SIGTERM)
            break
    assert "--resume run/last.pt" in process.stdout.read()
    assert process.wait(timeout=60) == 143
    assert checkpoints.load(tmp_path / "run" / "last.pt", keys=checkpoints.RESUME_KEYS)["step"] > 0


def test_a_second_signal_leaves_at_once(tmp_path):
    command = [sys.executable, HERE / "train.py", *TINY_MLP, "--epochs", "500", "--out", "run", "--save-every", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch"):
            process.send_signal(signal.SIGSTOP)  # so that both wait for it together
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGCONT)
            break
    process.stdout.read()
    assert process.wait(timeout=60) in (-signal.SIGTERM, -signal.SIGINT, 130, 143)
    assert checkpoints.load(tmp_path / "run" / "last.pt", keys=checkpoints.RESUME_KEYS)["step"] > 0


def test_a_run_that_ended_inside_an_epoch_can_be_prolonged(tiny):
    """The epoch that was cut gets a second row, for the rest of its images."""
    assert call(*TINY_MLP, "--batch-size", 20, "--epochs", 1.5, "--out", "run") == 0
    assert call("--resume", "run/last.pt", "--epochs", 3) == 0
    with open("run/metrics.csv") as file:
        rows = [(row["epoch"], row["step"]) for row in csv.DictReader(file)]
    assert rows == [("1", "7"), ("2", "10"), ("3", "14"), ("4", "21")]
    last = checkpoints.load("run/last.pt", keys=checkpoints.RESUME_KEYS)
    assert last["epoch"] == last["metrics"]["epoch"] == 4
    images = [row["images_per_second"] * row["seconds"] for row in last["history"]]
    assert images == pytest.approx([126, 60, 66, 126])
    assert json.loads(Path("run/result.json").read_text())["epochs_run"] == 4


def test_a_folder_may_be_called_shapes(tiny):
    write_folder(tiny / "mine" / "shapes", train_count=40)
    assert call("--model", "cnn", "--widths", 4, "--data", "mine/shapes", "--epochs", 1, "--out", "run") == 0
    assert json.loads(Path("run/result.json").read_text())["args"]["data"] == "mine/shapes"
    assert call("--resume", "run/last.pt", "--epochs", 2) == 0


def test_one_image_is_no_batch_for_a_batch_norm(tiny, capsys):
    for flags in ("--batch-size 1", "--limit 1"):
        assert call(*TINY_MLP, "--out", "run", *flags.split()) == 2
        assert "at least 2" in capsys.readouterr().err and not Path("run").exists()
    for i, flags in enumerate(("--batch-size 8 --accum 8", "--limit 99 --batch-size 4 --accum 2")):
        assert call(*TINY_MLP, *flags.split(), "--out", f"run-{i}") == 0
    assert call(*TINY_MLP, "--batch-size", 1, "--no-batch-norm", "--limit", 3, "--out", "run") == 0


def test_runs_in_part(tiny, monkeypatch, capsys):
    assert call(*TINY_MLP, "--runs", 2, "--data", "nowhere", "--out", "many") == 2 and not Path("many").exists()
    assert call(*TINY_MLP, "--runs", 2, "--hidden", 10**13, "--out", "many") == 2 and not Path("many").exists()
    real, calls = train.backward, []

    def backward(net, images, *rest):
        calls.append(1)
        return real(net, images * math.nan if len(calls) == 5 else images, *rest)

    monkeypatch.setattr(train, "backward", backward)
    assert call(*TINY_MLP, "--runs", 3, "--out", "many") == 1
    result = json.loads(Path("many/result.json").read_text())
    assert result["n"] == 2 and len(result["runs"]) == 2


def test_eval_uses_the_precision_of_the_run(tiny, capsys):
    assert call(*TINY_MLP, "--amp", "off", "--epochs", 3, "--out", "run") == 0
    result = json.loads(Path("run/result.json").read_text())
    capsys.readouterr()
    assert call("--eval", "run/best.pt") == 0
    assert f"loss {result['test_loss']:.4f}" in capsys.readouterr().out
    assert result["amp"] == "fp32"


def test_two_runs_do_not_share_a_folder(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    _, held = outputs.claim("run", "run", going_on=True)  # as a run that is alive has it
    with open("run/log.txt", "a") as log:
        before = log.tell()
        for flags in (["--resume", "run/last.pt", "--epochs", 2], [*TINY_MLP, "--out", "run"]):
            assert call(*flags) == 2
            assert "alive" in capsys.readouterr().err
        assert log.seek(0, 2) == before
    del held
    assert call("--resume", "run/last.pt", "--epochs", 2) == 0  # the lock went with its owner


def test_a_refused_run_deletes_nothing_that_it_did_not_make(tiny):
    Path("mine/deep").mkdir(parents=True)
    Path("mine/deep/thesis.txt").write_text("years of work")
    assert call(*TINY_MLP, "--runs", 2, "--hidden", 10**13, "--out", "mine") == 2
    assert Path("mine/deep/thesis.txt").read_text() == "years of work"
    Path("empty").mkdir()
    assert call(*TINY_MLP, "--runs", 2, "--hidden", 10**13, "--out", "empty") == 2
    assert Path("empty").is_dir() and not list(Path("empty").iterdir())


def test_a_checkpoint_does_not_say_what_is_started_or_written(tiny):
    """A stranger's last.pt may claim any arguments: it goes on as one run, where it lies."""
    write_folder(tiny / "pets", (8, 8))
    run = "--model cnn --widths 4 --data pets --epochs 1 --val-split 0.4 --device cpu --out run".split()
    assert call(*run) == 0
    Path("victim").mkdir()
    Path("victim/thesis.txt").write_text("years of work")
    last = checkpoints.load("run/last.pt", keys=checkpoints.RESUME_KEYS)
    last["args"] |= dict(runs=2, out=str(tiny / "victim"), data_dir=str(tiny / "elsewhere"), eval="run/best.pt")
    checkpoints.save(last, Path("run/last.pt"))
    assert call("--resume", "run/last.pt", "--epochs", 2) == 0
    assert [path.name for path in Path("victim").iterdir()] == ["thesis.txt"] and not Path("elsewhere").exists()
    assert checkpoints.load("run/last.pt")["epoch"] == 2


@pytest.mark.parametrize("kept", ["best.pt", "last.pt", "metrics.csv", "result.json", "curves.png"])
def test_a_folder_that_holds_anything_of_a_run_is_not_taken(kept, tiny, capsys):
    Path("run").mkdir()
    Path("run", kept).write_text("of a run")
    for more in ([], ["--runs", 2]):
        assert call(*TINY_MLP, "--out", "run", *more) == 2
        assert "holds a run already" in capsys.readouterr().err
    assert Path("run", kept).read_text() == "of a run" and [path.name for path in Path("run").iterdir()] == [kept]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_whose_folder_was_moved_writes_nothing_into_another(replaced, tiny, monkeypatch, capsys):
    real, calls = train.backward, []

    def backward(*args):
        calls.append(1)
        if len(calls) == 3:
            os.rename("run", "moved")
            if replaced:
                Path("run").mkdir()
                Path("run/last.pt").write_text("of another run")
        return real(*args)

    monkeypatch.setattr(train, "backward", backward)
    assert call(*TINY_MLP, "--epochs", 3, "--out", "run") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "was moved away or replaced" in line
    assert not replaced or [path.name for path in Path("run").iterdir()] == ["last.pt"]
    assert replaced or not Path("run").exists()
    monkeypatch.setattr(train, "backward", real)
    assert call("--resume", "moved/last.pt") == 0


def test_a_rotated_log_gives_no_run_away(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    _, log = outputs.claim("run", "run", going_on=True)  # as a run that is alive has it
    os.rename("run/log.txt", "run/log.txt.1")
    assert call("--resume", "run/last.pt", "--epochs", 2) == 2
    assert "alive" in capsys.readouterr().err
    del log


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tiny, monkeypatch, capsys):
    real, calls = os.fsync, []

    def fsync(file):
        calls.append(1)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    assert call(*TINY_MLP, "--epochs", 9, "--out", "run") == 1
    said = capsys.readouterr().err
    assert "No space left" in said and len(said.splitlines()) == 1
    assert checkpoints.load("run/last.pt")["epoch"] >= 1 and not list(Path("run").glob("*.tmp"))
    monkeypatch.setattr(os, "fsync", real)
    assert call("--resume", "run/last.pt") == 0


def test_a_file_limit_is_met_in_a_real_process(tmp_path):
    """The system itself refuses to write more than 100 kB; the checkpoint has twice as much."""
    code = "import resource, sys, train; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    done = python("-c", code + f"sys.exit(train.main({[*TINY_MLP, '--out', str(tmp_path / 'run')]}))", cwd=HERE)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "too large" in done.stderr, done.stderr
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"log.txt"}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_one_line(error, tiny, monkeypatch, capsys):
    def backward(*args):
        raise error

    monkeypatch.setattr(train, "backward", backward)
    assert call(*TINY_MLP) == 1
    said = capsys.readouterr().err
    assert "--batch-size 64" in said and "--accum" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--lr", "1e30"], ["--lr", "1e30", "--opt", "sgd", "--clip-grad", "1e38"]])
def test_a_loss_that_is_not_finite_ends_the_run(flags, tiny, capsys):
    assert call(*TINY_MLP, "--epochs", 5, "--warmup-epochs", 0, "--out", "run", *flags) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert "at step" in said and "learning rate" in said and "lower --lr" in said
    assert json.loads(Path("run/result.json").read_text())["stopped"] == "non-finite loss"


@pytest.mark.parametrize("more", [[], ["--log-interval", 1], ["--save-every", 1]])
def test_a_loss_that_is_not_finite_keeps_what_was_good(more, tiny, monkeypatch, capsys):
    real, calls = train.backward, []

    def backward(net, images, *rest):
        calls.append(1)
        return real(net, images * math.nan if len(calls) == 5 else images, *rest)

    monkeypatch.setattr(train, "backward", backward)
    assert call(*TINY_MLP, "--batch-size", 32, "--epochs", 3, "--out", "run", *more) == 1
    assert "the training loss is nan at step 5, learning rate" in capsys.readouterr().out
    assert len(calls) == (5 if more else 8)  # within one report
    assert checkpoints.load("run/best.pt")["epoch"] == 1  # load refuses weights that are not finite
    assert checkpoints.load("run/last.pt")["epoch"] == 1


def test_models_learn_on_shapes_from_the_command_line(tmp_path):
    """End to end, in a fresh interpreter, on the real embedded set; the bar is above a linear model's 0.46."""
    done = python(
        HERE / "train.py", "--model", "mlp", "--data", "shapes", "--hidden", "512,512", "--epochs", 10, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "mlp-shapes-adamw-cosine"
    assert json.loads((out / "result.json").read_text())["test_acc"] > 0.6
    assert Image.open(out / "curves.png").width > 600


# ---------------------------------------------------------------------------------------------- the command line

WRONG = [
    "--model resnet", "--opt adamax", "--sched cosinus", "--loss l1", "--loss ce+", "--data nowhere", "--epochs 0",
    "--epochs nan", "--epochs -1", "--lr -0.1", "--lr 0", "--lr inf", "--batch-size 0", "--batch-size 1.5",
    "--accum 0", "--accum 65",
    "--seed -1", "--device tpu", "--device cuda:99", "--amp fp8", "--val-split -0.1", "--val-split 0.5.5",
    "--val-split 126.5", "--val-split 140", "--val-split=-inf", "--limit 0", "--limit 1000", "--crop-pad -1",
    "--crop-pad 32",
    "--smoothing 1", "--monitor test_acc", "--patience -1", "--min-delta nan", "--weight-decay -1",
    "--momentum 0.9", "--opt sgd --momentum 1", "--opt sgd --momentum 0 --nesterov", "--opt-betas 0.9",
    "--opt-betas 0.9,1", "--clip-grad 0", "--warmup-epochs 1", "--warmup-epochs -1", "--min-lr 1", "--gamma 0.1",
    "--sched step --gamma 0", "--sched step --step-size 0", "--sched multistep --milestones 5,3",
    "--sched multistep --milestones a", "--t-max 0", "--t-max -1", "--sched restarts --t-0 -1",
    "--sched restarts --t-mult 0", "--sched plateau --patience-epochs -1",
    "--sched plateau --patience 5 --patience-epochs 5", "--hidden 0",
    "--hidden a", "--dropout 1", "--log-interval -1", "--img-size 0", "--resume nowhere.pt", "--eval nowhere.pt",
    "--epoch 3", "--model vit --patch-size 5", "--model vit --heads 5", "--model vit --pool max",
    "--model cnn --arch deep", "--model cnn --widths 1,1,1,1,1,1", "--opt lbfgs --amp fp16", "--opt lbfgs --wd 0.1",
    "--val-split 0 --sched plateau", "--out taken", "--out file", "--out file/below",
    "--init nowhere.pt", "--freeze lay", "--model vit --norm-eps 0", "--layer-decay 0", "--layer-decay 1.5",
    "--lr-scale haed=2", "--lr-scale head=0", "--lr-scale head", "--opt lbfgs --layer-decay 0.5", "--augment weak",
    "--opt lbfgs --lr-scale head=2", "--reprob 2", "--mixup -1", "--cutmix nan", "--ema 1", "--mixup-off-epoch 1",
    "--distill 1", "--temperature 2", "--teacher nowhere.pt", "--minutes 1", "--minutes 0", "--runs 0",
]  # fmt: skip


def refused(*argv):
    """The exit status, be it returned or argparse's own way out."""
    try:
        return call(*argv)
    except SystemExit as stop:
        return stop.code


def test_wrong_input_is_one_line_and_status_2(tiny, capsys):
    Path("taken").mkdir()
    Path("taken/log.txt").write_text("a run")
    Path("file").write_text("not a folder")
    before = sorted(tiny.rglob("*"))
    for wrong in WRONG:
        status = refused(*TINY, *wrong.split())
        said = capsys.readouterr().err
        assert status == 2, wrong
        assert len(said.splitlines()) == 1 and "error: " in said, (wrong, said)
        flag = (
            [w for w in wrong.split() if w.startswith("--")][-1]
            .split("=")[0]
            .removeprefix("--")
            .replace("wd", "weight-decay")
        )
        value = wrong.split()[-1]
        assert flag in said.replace("_", "-") or value in said, (wrong, said)
        assert sorted(tiny.rglob("*")) == before, f"{wrong} left something behind"
    assert Path("taken/log.txt").read_text() == "a run"


def test_unknown_names_list_the_known_ones(tiny, capsys):
    for flag, known in (("--model", "mlp"), ("--opt", "adagrad"), ("--sched", "onecycle"), ("--data", "fashion-mnist")):
        assert refused(flag, "unknown") == 2
        assert known in capsys.readouterr().err


def test_eval_refuses_what_does_not_fit(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    write_folder(tiny / "pets", (32, 32))
    for flags, words in (
        (["--model", "vit"], ["mlp", "vit"]),
        (["--data", tiny / "pets"], ["cat", "disk"]),
        (["--lr", 0.1], ["--lr"]),
    ):
        assert call("--eval", "run/best.pt", *flags) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
    Path("text.pt").write_text("no checkpoint")
    torch.save({"weights": torch.zeros(3)}, "other.pt")
    for file in ("text.pt", "other.pt", tiny):
        assert call("--eval", file) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


class Harm:
    """A pickle of this leaves a file behind when it's loaded carelessly."""

    def __reduce__(self):
        return os.mkdir, ("harmed",)


def damaged_checkpoints(good):
    """name -> a function that writes a bad checkpoint to a path, given the content of a good one."""

    def changed(**more):
        return lambda path: torch.save(good | more, path)

    def repacked(compression=zipfile.ZIP_STORED, alter=lambda name, raw: raw):
        def write(path):
            torch.save(good, path)
            with zipfile.ZipFile(path) as file:
                entries = [(name, file.read(name)) for name in file.namelist()]
            with zipfile.ZipFile(path, "w", compression) as file:
                for name, raw in entries:
                    file.writestr(name, alter(name, raw))

        return write

    def flipped(path):
        torch.save(good, path)
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)

    first = next(iter(good["state_dict"]))
    big = torch.zeros(1).as_strided((10**6, 10**6), (0, 0))  # claims 4 TB, holds 4 bytes
    bad_weights = good["state_dict"] | {first: good["state_dict"][first] * math.nan}
    return {
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("no checkpoint"),
        "picture": lambda path: Image.new("RGB", (8, 8)).save(path, "png"),
        "truncated": lambda path: (torch.save(good, path), path.write_bytes(path.read_bytes()[:-2000])),
        "half": lambda path: (torch.save(good, path), path.write_bytes(path.read_bytes()[:1000])),
        "one bit flipped": flipped,
        "only weights": lambda path: torch.save(good["state_dict"], path),
        "a list": lambda path: torch.save([good], path),
        "a whole model": lambda path: torch.save(mlp_mnist.MLP(hidden=(4,)), path),
        "code": lambda path: torch.save(good | dict(metrics=Harm()), path),
        "code in a plain pickle": lambda path: path.write_bytes(pickle.dumps(good | dict(metrics=Harm()))),
        "missing keys": lambda path: torch.save({k: v for k, v in good.items() if k != "classes"}, path),
        "wrong types": changed(model_args="hidden=16"),
        "another model's name": changed(model="resnet"),
        "another version": changed(model_args=good["model_args"] | dict(width=3)),
        "other sizes": changed(model_args=good["model_args"] | dict(hidden=(17,))),
        "huge sizes": changed(model_args=good["model_args"] | dict(hidden=(10**7, 10**7))),
        "a huge tensor": changed(state_dict=good["state_dict"] | {first: big}),
        "weights of text": changed(state_dict=good["state_dict"] | {first: "text"}),
        "NaN weights": changed(state_dict=bad_weights),
        "compressed": repacked(
            zipfile.ZIP_DEFLATED, lambda name, raw: raw + bytes(10**7) if "data.pkl" in name else raw
        ),
        "storage cut short": repacked(alter=lambda name, raw: raw[:4] if "/data/" in name else raw),
    }


def test_bad_checkpoints_are_refused(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    good = checkpoints.load("run/last.pt")
    capsys.readouterr()
    for name, write in damaged_checkpoints(good).items():
        write(path := tiny / "bad.pt")
        for flag in ("--eval", "--resume"):
            assert refused(flag, path) == 2, (name, flag)
            said = capsys.readouterr().err
            assert len(said.splitlines()) == 1 and len(said) < 500, (name, said)
            assert sorted(f.name for f in tiny.iterdir()) == ["bad.pt", "run"], name


def test_resume_refuses_what_does_not_fit(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    good = checkpoints.load("run/last.pt")
    for change in (
        dict(history=[dict(epoch=1)]), dict(history=[3]), dict(optimizer={}), dict(seen=torch.zeros(9, 3)),
        dict(rng=[3]), dict(args=good["args"] | dict(colour="red")), dict(args={}),
    ):  # fmt: skip
        torch.save(good | change, "run/last.pt")
        capsys.readouterr()
        assert call("--resume", "run/last.pt") == 2, change
        said = capsys.readouterr().err
        assert ("--resume" in said or "run/last.pt" in said) and len(said.splitlines()) == 1, said


def spoiled_mnist(root):
    """name -> a function that damages the files of write_mnist, and a word of the message."""
    raw = root / "MNIST" / "raw"
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"

    def cut(path, start=0, end=None):
        return lambda: path.write_bytes(path.read_bytes()[start:end])

    return {
        "wrong magic number": lambda: images.write_bytes(b"\x01\x02\x03\x04" + images.read_bytes()[4:]),
        "short": cut(images, end=-100),
        "empty": cut(images, end=0),
        "only a header": cut(images, end=16),
        "labels short": cut(labels, end=-1),
        "a label out of range": lambda: labels.write_bytes(labels.read_bytes()[:-1] + b"\x0b"),
        "fewer labels than images": lambda: write_idx(labels, torch.zeros(20, dtype=torch.uint8)),
    }


@pytest.mark.parametrize("case", spoiled_mnist(Path()).keys())
def test_bad_mnist_files_are_refused(case, tiny, capsys):
    write_mnist(tiny / "data")
    spoiled_mnist(tiny / "data")[case]()
    assert call("--model", "mlp", "--hidden", 8) == 2  # files that are there but damaged are no reason for a fallback
    said = capsys.readouterr().err
    assert "mnist" in said and "damaged" in said and len(said.splitlines()) == 1, said
    assert not Path("runs").exists()


def test_images_of_many_modes_and_odd_names(tmp_path):
    root = tmp_path / "my images"
    for part in ("train", "test"):
        for name in ("Käse und Brot", "猫"):
            (root / part / name).mkdir(parents=True)
            Image.new("RGB", (12, 12)).save(root / part / name / "plain.png")
    folder = root / "train" / "猫"
    Image.new("L", (12, 40), 200).save(folder / "grey und schmal.png")
    Image.new("LA", (40, 12), (200, 10)).save(folder / "grey alpha.png")
    Image.new("RGBA", (12, 12), (200, 0, 0, 0)).save(folder / "alpha.png")
    Image.new("P", (12, 12), 3).save(folder / "palette.gif")
    Image.new("1", (12, 12), 1).save(folder / "bits.png")
    Image.new("CMYK", (12, 12), (0, 255, 255, 0)).save(folder / "cmyk.jpg")
    Image.fromarray(torch.full((12, 12), 51_400).to(torch.uint16).numpy()).save(folder / "16 bit.png")
    frames = [Image.new("RGB", (12, 12), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    (folder / ".hidden.png").write_bytes(b"not looked at")
    (folder / "notes.txt").write_text("not looked at")
    data = datasets.load(str(root), tmp_path)
    first = {Path(p).name: image[:, 6, 6].tolist() for p, image in zip(
        sorted(str(f) for f in folder.iterdir() if f.suffix != ".txt" and f.name[0] != "."),
        data.train[0][data.train[1] == 1], strict=True)}  # fmt: skip
    assert data.classes == ["Käse und Brot", "猫"] and len(first) == 9
    assert first["grey und schmal.png"] == first["grey alpha.png"] == first["16 bit.png"] == [200] * 3
    assert first["alpha.png"] == [200, 0, 0] and first["bits.png"] == [255] * 3
    assert first["animated.gif"] == pytest.approx([255, 0, 0], abs=2)
    assert first["cmyk.jpg"][0] > 200 and max(first["cmyk.jpg"][1:]) < 60


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda root: (root / "train" / "dog" / "loop.png").symlink_to("loop.png"), ["loop.png"]),
        (lambda root: (root / "train" / "dog" / "gone.png").symlink_to("nowhere.png"), ["gone.png"]),
        (lambda root: (root / "train" / "dog" / "deep.png").mkdir(), ["deep.png"]),
        (lambda root: (root / "train" / "dog" / "cut.png").write_bytes(
            (root / "train" / "dog" / "1.png").read_bytes()[:300]), ["1 of 19", "cut.png"]),
    ],
)  # fmt: skip
def test_odd_files_in_a_folder_are_named(spoil, words, tiny, capsys):
    spoil(write_folder(tiny / "pets"))
    assert call("--model", "cnn", "--widths", "8", "--data", tiny / "pets") == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and all(word in said for word in words), said


def test_a_folder_that_changes_while_it_is_decoded(tiny, monkeypatch, capsys):
    root, decode = write_folder(tiny / "pets"), datasets.decode

    def changing(path, size):
        Path(path).touch()
        os.utime(path, (1, 1))
        return decode(path, size)

    monkeypatch.setattr(datasets, "decode", changing)
    assert call("--model", "cnn", "--widths", "8", "--data", root) == 2
    assert "changed while" in capsys.readouterr().err and not Path("data/cache").exists()


# What each flag changes, against the tiny run: (flags of both runs, flags of the second, what differs).
EFFECTS = {
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
    "decay_all": ("--wd 9", "--decay-all", "weights"),
    "layer_decay": ("", "--layer-decay 0.5", "weights"),
    "lr_scale": ("", "--lr-scale head=0.1", "weights"),
    "momentum": ("--opt sgd", "--momentum 0.5", "weights"),
    "nesterov": ("--opt sgd", "--nesterov", "weights"),
    "opt_betas": ("", "--opt-betas 0.5,0.6", "weights"),
    "clip_grad": ("", "--clip-grad 0.001 --opt sgd", "weights"),
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
}


def test_no_dead_flag(tiny, monkeypatch, capsys):
    """Every flag of every model is in the table above, and changes there what it says."""
    flags = {dest for name in arguments.MODELS for dest in vars(arguments.make_parser(name).parse_args([]))}
    assert flags == set(EFFECTS)
    write_folder(tiny / "pets", (16, 16), train_count=70)
    base = "--model mlp --hidden 16 --data shapes --epochs 1 --batch-size 64"
    small_vit = "--model vit --patch-size 16 --dim 16 --depth 1 --heads 2 --mlp-dim 16"
    ran, saved, save, compiled = {}, [], checkpoints.save, []
    monkeypatch.setattr(checkpoints, "save", lambda content, path: (saved.append(path), save(content, path)))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compiled.append(model))

    def observe(line):
        if line not in ran:
            saved.clear()
            compiled.clear()
            shutil.rmtree("runs", ignore_errors=True)
            words = line.split()
            if "--model cnn" in line or "--model vit" in line:
                words = [w for i, w in enumerate(words) if w != "--hidden" and words[i - 1] != "--hidden"]
            status = call(*words)
            (out,) = Path("runs").glob("*") if Path("runs").exists() else ("",)
            seen = dict(
                status=status, log=len(capsys.readouterr().out.splitlines()), folder=sorted(map(str, Path().rglob("*")))
            )
            if out and (out / "last.pt").exists():
                last, best = (checkpoints.load(out / name) for name in ("last.pt", "best.pt"))
                seen |= dict(weights=dict(last["state_dict"]), best=best["epoch"], val_loss=last["metrics"]["val_loss"])
            seen |= dict(saves=len(saved), compiled=len(compiled))
            ran[line] = seen
        return ran[line]

    observe(base)
    (best,) = Path("runs").glob("*/best.pt")
    shutil.copy(best, "teacher.pt")
    for dest, (both, second, what) in EFFECTS.items():
        both = f"{base} {both}".replace("{vit}", small_vit)
        a, b = observe(both).get(what), observe(f"{both} {second}").get(what)
        assert a is not None and not same(a, b), dest


# ---------------------------------------------------------------------------------------------- several processes


def torchrun(count, *argv, cwd, restarts=0):
    options = ["--nproc_per_node", count, "--max-restarts", restarts, "--monitor-interval", 0.1]
    return python("-m", "torch.distributed.run", *options, *argv, cwd=cwd)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_follow_the_run_of_one(count, tmp_path):
    # The last batch has one image: fewer than there are processes.
    flags = "--hidden 32 --no-batch-norm --dropout 0 --data shapes --epochs 2 --limit 301 --val-split 501"
    flags = [*flags.split(), *"--batch-size 100 --amp off --device cpu --clip-grad 1 --out".split()]
    assert python(HERE / "train.py", *flags, "one", cwd=tmp_path).returncode == 0
    done = torchrun(count, HERE / "train.py", *flags, "many", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("epoch ")]) == 2
    one, many = (checkpoints.load(tmp_path / run / "last.pt", keys=checkpoints.RESUME_KEYS) for run in ("one", "many"))
    assert torch.allclose(one["seen"], many["seen"], rtol=1e-5) and len(one["seen"]) == 4
    for a, b in zip(one["history"], many["history"], strict=True):
        assert a["val_acc"] == b["val_acc"] and a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-5)
        assert a["train_acc"] == b["train_acc"]
    results = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("one", "many")]
    assert results[0]["test_acc"] == results[1]["test_acc"]
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], rel=1e-5)
    assert not any(name.startswith("module.") for name in many["state_dict"])


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--ema 0.9"])
def test_processes_validate_one_model_though_batch_norms_differ(more, tmp_path):
    flags = "--hidden 32 --data shapes --epochs 2 --limit 501 --val-split 2000 --batch-size 100 --amp off --device cpu"
    assert torchrun(2, HERE / "train.py", *flags.split(), *more.split(), "--out", "run", cwd=tmp_path).returncode == 0
    best = checkpoints.load(tmp_path / "run" / "best.pt")
    data = datasets.shapes()
    part = datasets.split(data.train, 2000, 0)[1]
    loss, acc = train.evaluate(arguments.rebuild(best), part, data, torch.device("cpu"), "fp32")
    assert best["metrics"]["val_acc"] == acc and best["metrics"]["val_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_mistakes_are_said_once(tmp_path):
    for wrong in (["--lr", -1], ["--data", "nowhere"], ["--opt", "lbfgs"], ["--epohcs", 3]):
        done = torchrun(2, HERE / "train.py", "--data", "shapes", *wrong, cwd=tmp_path)
        assert done.returncode and done.stderr.count("train.py: error:") == 1, (wrong, done.stderr)
        assert not list(tmp_path.iterdir())


DYING = f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import processes, train
real, calls = train.backward, []
def backward(*args):
    calls.append(1)
    if processes.rank() == 1 and len(calls) == 25 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
train.backward = backward
sys.exit(train.main())
"""
TWO = "--hidden 32 --data shapes --limit 1000 --batch-size 100 --epochs 4 --device cpu --out run".split()


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_process_that_dies_ends_the_run_or_starts_it_anew(restarts, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    start = time.perf_counter()
    done = torchrun(2, "dying.py", *TWO, cwd=tmp_path, restarts=restarts)
    assert time.perf_counter() - start < 60
    assert "train.py: error: process 0 stops" in done.stderr
    last = checkpoints.load(tmp_path / "run" / "last.pt", keys=checkpoints.RESUME_KEYS)
    assert (done.returncode == 0) == bool(restarts) and last["epoch"] == (4 if restarts else 2)
    if restarts:
        straight = torchrun(2, HERE / "train.py", *TWO[:-1], "straight", cwd=tmp_path)
        assert straight.returncode == 0
        assert_same_run(tmp_path / "straight", tmp_path / "run")


@pytest.mark.slow
def test_machines_start_anew_together(tmp_path):
    """Two agents of torchrun, as on two machines. Only one of them counts the failure as its own."""
    (tmp_path / "dying.py").write_text(DYING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = f"--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port} --local-addr 127.0.0.1 --monitor-interval 0.1"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--max-restarts", "3", *meeting.split()]
    env = os.environ | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    output = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    agents = [subprocess.Popen([*command, "dying.py", *TWO], cwd=tmp_path, env=env, **output) for _ in range(2)]
    said = "".join(agent.communicate(timeout=120)[1] for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "process 0 stops" in said
    assert checkpoints.load(tmp_path / "run" / "last.pt", keys=checkpoints.RESUME_KEYS)["epoch"] == 4


def test_a_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in dict(LOCAL_RANK=1, LOCAL_WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    assert processes.own_device(torch.device("cuda")) == torch.device("cuda", 1)
    assert processes.own_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--nproc_per_node 3 must be at most 2"):  # in all of them: the first says it
        processes.own_device(torch.device("cuda"))


def test_a_run_for_minutes_is_started_anew(tiny, monkeypatch):
    flags = [word for word in TINY_MLP if word not in ("--epochs", "1")]
    flags += ["--minutes", 0.01, "--out", "run"]
    assert call(*flags) == 0
    assert call(*flags, "--resume", "run/last.pt") == 2
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert call(*flags) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_in_every_process(number, tmp_path):
    flags = "--hidden 32 --data shapes --epochs 500 --device cpu --out run".split()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", HERE / "train.py", *flags]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch"):
            process.send_signal(number)
            break
    said = process.communicate(timeout=60)[0]
    assert "--resume run/last.pt" in said
    last = checkpoints.load(tmp_path / "run" / "last.pt", keys=checkpoints.RESUME_KEYS)
    assert last["step"] > 0 and len(last["rng"]) == 2


# ---------------------------------------------------------------------------------------------- long tests


def forked(argv):
    """Start train.main in a copy of this process, which has imported everything. Returns its number."""
    if pid := os.fork():
        return pid
    sys.stdout = sys.stderr = open("said.txt", "a")
    os._exit(train.main([str(a) for a in argv]))


def kill_loop(kills):
    """Kill a run at random moments, resume it each time, compare it with an unbroken one; again until `kills` kills."""
    drawn = datasets.shapes(140, 40)
    datasets.shapes = lambda: datasets.Data(*(getattr(drawn, f) for f in datasets.Data.__dataclass_fields__))
    plot.draw = lambda *args, **more: None
    flags = "--hidden 64 --data shapes --batch-size 5 --epochs 5 --save-every 2 --device cpu --dropout 0.5".split()
    start = time.perf_counter()
    assert os.waitpid(forked([*flags, "--out", "straight"]), 0)[1] == 0, Path("said.txt").read_text()[-2000:]
    seconds, draw = time.perf_counter() - start, random.Random(0)
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
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_smoke; test_smoke.kill_loop(60)"
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
    model=[*arguments.MODELS, "", "MLP"], opt=[*optimizers.OPTIMIZERS, "Adam"], sched=[*schedulers.SCHEDULES, "x"],
    data=["shapes", "pets", "nowhere", "", "/", "pets/train", "file"], epochs=["0.5", "1", "2", "0", "nan", "x"],
    amp=["auto", "off", "bf16", "fp16", "x"], device=["cpu", "auto", "cuda", "cpu:1", "meta", ""],
    depth=["0", "1", "2", "x"], runs=["-1", "0", "1", "2", "1e400", "nan", "x", ""],
    monitor=["val_acc", "val_loss", "x"], pool=["cls", "mean", "x"], arch=["residual", "plain", "x"],
    stem=["patch", "conv", "x"],
)  # fmt: skip


@pytest.mark.slow
def test_random_flags_end_in_success_or_in_one_line(tiny, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: None)  # it would take half a minute each time
    write_folder(tiny / "pets", (8, 8), train_count=9)
    Path("file").write_text("no folder")
    draw, ends, faults = random.Random(0), {}, []
    small = {"mlp": "--hidden 8", "cnn": "--widths 4,4", "vit": "--patch-size 4 --dim 8 --depth 1 --heads 1"}
    for case in range(3000):
        model = draw.choice([*arguments.MODELS])
        argv = ["--model", model, *small[model].split(), "--epochs", "1", "--data", "shapes", "--out", f"run-{case}"]
        dests = list(vars(arguments.make_parser(model).parse_args([])))
        for dest in draw.sample(sorted(FUZZED.keys() & dests), draw.choice([1, 1, 2, 3])):
            flag = ranges.flag_name(dest)
            no_value = isinstance(vars(arguments.make_parser(model).parse_args([]))[dest], bool)
            argv += [flag] if no_value else [f"{flag}={draw.choice(FUZZED[dest])}"]
        try:
            status, error = refused(*argv), None
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
    draw, ends = random.Random(0), {}
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
    assert ends.get(("last.pt", 0), 0) < 20  # a checksum guards it: nearly every change is seen


ODD = [None, True, -1, 0, 10**30, 0.5, math.nan, math.inf, "x", "", "vit", "/", b"x", [], [1], {}, {"a": 1}, ()]
ODD += [torch.zeros(3), torch.tensor(1), torch.zeros(2, 2)]


def places(content, *start):
    """The ways to every value in nested dicts, lists and tuples."""
    if not isinstance(content, (dict, list, tuple)):
        return
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*start, key)
        yield from places(value, *start, key)


def replaced(content, place, value):
    """A copy with another value at this place."""
    if not place:
        return value
    copied = dict(content) if isinstance(content, dict) else list(content)
    copied[place[0]] = replaced(content[place[0]], place[1:], value)
    return tuple(copied) if isinstance(content, tuple) else copied


@pytest.mark.slow
def test_random_values_in_checkpoints_end_in_success_or_in_one_line(tiny, capsys):
    assert call(*TINY_MLP, "--epochs", 2, "--ema", 0.9, "--out", "run") == 0
    good, draw, ends = checkpoints.load("run/last.pt"), random.Random(0), {}
    for _ in range(300):
        bad = replaced(good, draw.choice(list(places(good))), draw.choice(ODD))
        checkpoints.save(bad, "run/bad.pt")
        ways = (
            ["--resume", "run/bad.pt", "--epochs", 3],
            ["--eval", "run/bad.pt"],
            [*TINY_MLP, "--init", "run/bad.pt"],
        )
        for argv in ways:
            shutil.rmtree("new", ignore_errors=True)
            capsys.readouterr()
            with warnings.catch_warnings(action="ignore"):  # torch's, about tensors without elements
                status = call(*argv, *(["--out", "new"] if "--eval" not in argv else []))
            said = capsys.readouterr().err
            assert status in (0, 1, 2) and len(said.splitlines()) == (status > 0), (argv[0], status, said)
            ends[argv[0], status] = ends.get((argv[0], status), 0) + 1
    print(ends)
    assert ends["--resume", 2] > 150


# ---------------------------------------------------------------------------------------------- losses, averages, views


SCORES = torch.tensor([[2.0, 0.0, -1.0], [0.5, 3.0, 4.0]])
LABELS = torch.tensor([0, 2])
HOT = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("ce", -(HOT * SCORES.log_softmax(1)).sum(1).mean()),
        ("mse", ((SCORES - HOT) ** 2).mean()),
        ("euclidean", ((SCORES - HOT) ** 2).sum(1).sqrt().mean()),
        ("cosine", 1 - (SCORES[[0, 1], LABELS] / (SCORES**2).sum(1).sqrt()).mean()),
    ],
)
def test_losses_compare_scores_with_one_hot_targets(expression, expected):
    loss = losses.parse(expression)
    assert loss(SCORES, LABELS).item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss(SCORES, HOT).item() == pytest.approx(expected.item(), rel=1e-6)  # labels as distributions
    doubled = losses.parse(f" 2*{expression} + ce")
    assert doubled(SCORES, LABELS).item() == pytest.approx((2 * expected + losses.parse("ce")(SCORES, HOT)).item())


@pytest.mark.parametrize("expression", [*losses.LOSSES, "ce+0.5*cosine"])
def test_losses_with_soft_targets_in_pieces_and_at_the_start(expression):
    torch.manual_seed(0)
    scores, labels = torch.randn(7, 5), torch.arange(7) % 5
    loss, smoothed = losses.parse(expression), losses.parse(expression, smoothing=0.2)
    soft = losses.targets(labels, 5, 0.2)
    assert soft[0].tolist() == pytest.approx([0.84, 0.04, 0.04, 0.04, 0.04])
    assert torch.allclose(soft, losses.targets(losses.targets(labels, 5), 5, 0.2))
    assert smoothed(scores, labels).item() == pytest.approx(loss(scores, soft).item(), rel=1e-5)
    pieces = sum(loss(s, y) * len(s) / 7 for s, y in zip(scores.split(3), labels.split(3), strict=True))
    assert pieces.item() == pytest.approx(loss(scores, labels).item(), rel=1e-5)
    start = torch.zeros(7, 5, requires_grad=True)  # what a head gives that starts at 0
    loss(start, labels).backward()
    assert (start.grad[0, 0] < 0) and 1e-3 < start.grad.abs().max() < 1


@pytest.mark.parametrize("expression", losses.LOSSES)
def test_every_loss_trains(expression):
    torch.manual_seed(0)
    images = torch.randn(200, 8)
    labels = images[:, :4].argmax(1)
    model, loss = torch.nn.Linear(8, 4), losses.parse(expression, smoothing=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss(model(images), labels).backward()
        optimizer.step()
    assert (model(images).argmax(1) == labels).float().mean() > 0.75  # chance: 0.25


@pytest.mark.parametrize(
    "wrong", ["", "l1", "ce+", "0*ce", "-1*ce", "ce*2", "nan*ce", "inf*mse", "a*ce", "ce-mse", "2*"]
)
def test_wrong_losses_are_refused_with_the_grammar(wrong):
    with pytest.raises(ValueError, match=r"--loss .* must be one of ce, mse, euclidean, cosine, or a sum .*ce\+0.5"):
        losses.parse(wrong)


def test_distillation_is_scaled_divergence():
    teacher, temperature = SCORES.flip(0), 3.0
    p, q = (teacher / temperature).softmax(1), (SCORES / temperature).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    assert losses.distillation(SCORES, teacher, temperature).item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses.distillation(teacher, teacher + 5, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_average_equals_one_by_hand():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    average, expected = averaging.Average(model, decay=0.5), {k: v.clone() for k, v in model.state_dict().items()}
    for t in range(14):
        model(torch.randn(8, 4))  # moves the batch norm's statistics
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
        average.update(model)
        decay = min(0.5, (1 + t) / (10 + t))  # 0.1, 0.18 ... 0.5 from t = 8 on
        for name, value in model.state_dict().items():
            mixed = decay * expected[name] + (1 - decay) * value
            expected[name] = mixed if value.is_floating_point() else value.clone()
        if t == 6:  # stopped, and gone on with
            state, average = average.state_dict(), averaging.Average(model, decay=0.5)
            average.load_state_dict(state)
    assert expected["1.num_batches_tracked"] == 14
    for name, value in average.model.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name
    assert not any(p.requires_grad for p in average.model.parameters()) and not average.model.training
    assert all(p.requires_grad for p in model.parameters()) and model.training
    with pytest.raises(ValueError, match="--ema 1"):
        averaging.Average(model, 1)


def test_views_and_their_mean():
    images = torch.arange(64.0).view(1, 1, 8, 8).expand(3, 2, 8, 8)
    as_it_is, up_left, down_right, *mirrored = datasets.views(images, flip=True, shift=2)
    assert torch.equal(as_it_is, images) and len(mirrored) == 3
    assert torch.equal(up_left[..., 2:, 2:], images[..., :-2, :-2])
    assert torch.equal(down_right[..., :-2, :-2], images[..., 2:, 2:])
    assert torch.equal(mirrored[1], up_left.flip(3))
    assert len(datasets.views(images, flip=False)) == 3 and len(datasets.views(images, flip=False, shift=0)) == 1
    torch.manual_seed(0)
    model, images = give_head_weights(mlp_mnist.MLP(hidden=(16,))).eval(), torch.randn(5, 1, 28, 28)
    scores = [model(view) for view in datasets.views(images, flip=True)]
    assert len(scores) == 6 and torch.allclose(datasets.tta(model, images, flip=True), sum(scores) / 6, atol=1e-6)


# ---------------------------------------------------------------------------------------------- rates by layer


def rates(model, **options):
    """By parameter name its rate, at lr 1."""
    groups = optimizers.parameter_groups(model, lr=1.0, weight_decay=0.1, **options)
    assert all(group["initial_lr"] == group["lr"] for group in groups)
    by_id = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(by_id) == len(list(model.parameters()))
    return {name: by_id[id(p)] for name, p in model.named_parameters()}


def test_layer_rates_are_powers_of_the_decay_by_depth_from_the_top():
    found = rates(vit.ViT(**VIT), layer_decay=0.5)  # two blocks
    for name, rate in found.items():
        above = {"head": 0, "norm": 0, "blocks": 1}.get(name.split(".")[0], 3)
        above += name.startswith("blocks.0.")
        assert rate == 0.5**above, name
    assert {"cls_token", "pos_embedding", "patch_embedding.weight"} <= {n for n, rate in found.items() if rate == 0.125}

    found = rates(mlp_mnist.MLP(hidden=(32, 16)), layer_decay=0.5)  # linear 1, norm 2, linear 5, norm 6
    assert all(
        rate == {"layers.1": 0.25, "layers.2": 0.25}.get(n[:8], 0.5) for n, rate in found.items() if "head" not in n
    )
    assert found["head.weight"] == found["head.bias"] == 1

    found = rates(cnn_cifar10.CNN(widths=(4, 8)), layer_decay=0.5)
    assert found["head.weight"] == 1 and found["body.0.weight"] == found["body.0.bias"] == 0.5**5
    weights = [rate for name, rate in found.items() if name.startswith("body") and rate and name.endswith("weight")]
    assert weights == sorted(weights) and set(weights) == {0.5**k for k in range(1, 6)}
    assert rates(cnn_cifar10.CNN(arch="plain"), layer_decay=0.1)["body.0.bias"] == pytest.approx(1e-4)


def test_layer_rates_by_prefix():
    model = vit.ViT(**VIT | dict(depth=11))
    found = rates(model, lr_scale=[("blocks.1", 0.5), ("head", 3.0), ("blocks", 0.1)])
    assert found["blocks.1.norm_1.bias"] == 0.05 and found["blocks.10.norm_1.bias"] == 0.1  # 1 isn't 10
    assert found["head.weight"] == 3 and found["cls_token"] == 1
    with pytest.raises(ValueError, match=r"--lr-scale pos_embeding: .* pos_embedding"):
        rates(model, lr_scale=[("pos_embeding", 1)])
    with pytest.raises(ValueError, match="patch_embedding, blocks, norm, head"):
        rates(model, lr_scale=[("qqq", 1)])
    for wrong in (
        dict(lr_scale=[("head", 0)]),
        dict(lr_scale=[("head", math.nan)]),
        dict(layer_decay=0),
        dict(layer_decay=2),
    ):
        with pytest.raises(ValueError, match="must be"):
            rates(model, **wrong)
    with pytest.raises(ValueError, match="need lr"):
        optimizers.parameter_groups(model, weight_decay=0, layer_decay=0.5)


def test_groups_are_described_by_rate():
    model = vit.ViT(**VIT)
    options = dict(lr=0.01, weight_decay=0.1, layer_decay=0.5, lr_scale=[("blocks.1.mlp", 2)])
    lines = optimizers.describe_groups(model, optimizers.parameter_groups(model, **options))
    assert lines[0] == "lr 0.01: blocks.1.mlp, norm, head (4,586 parameters, 4,416 with weight decay)"
    assert lines[1].startswith("lr 0.005: blocks.1.norm_1, blocks.1.attention, blocks.1.norm_2 (")
    assert lines[3].startswith("lr 0.00125: cls_token, pos_embedding, patch_embedding (3,680 parameters, 1,536 with")
    assert len(lines) == 4


# ---------------------------------------------------------------------------------------------- augmentation


def digits(count=64, size=28):
    """A bright square in the middle of each."""
    images = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    images[:, :, 9:-9, 9:-9] = 200
    return images


def test_distort_moves_every_image_alone_and_keeps_it():
    images = digits(200)
    out = datasets.distort(images, 2, None, datasets.seeded(0))
    assert out.shape == images.shape and out.dtype == torch.float32 and 0 <= out.min() and out.max() < 200.01
    assert len({image.numpy().tobytes() for image in out}) == 200
    area = (out > 100).float().sum((1, 2, 3)) / (images[0] > 100).sum()
    assert 0.5 < area.min() and area.max() < 2 and 0.9 < area.mean() < 1.1
    middle = (out.sum(2) * torch.arange(28)).sum((1, 2)) / out.sum((1, 2, 3))  # the centre's column
    assert middle.mean().item() == pytest.approx(13.5, abs=0.3) and 0.8 < middle.std() < 2
    assert torch.equal(out, datasets.distort(images, 2, None, datasets.seeded(0)))


def test_distort_mirrors_and_recolours():
    left = torch.full((400, 3, 32, 32), 100, dtype=torch.uint8)
    left[..., :16] = 150
    left[:, 0] //= 2
    mirrored = torch.arange(400) % 3 == 0
    out = datasets.distort(left, 0, mirrored, datasets.seeded(0))
    assert torch.equal(out[..., :8].mean((1, 2, 3)) < out[..., -8:].mean((1, 2, 3)), mirrored)
    assert not (datasets.distort(left, 0, None, datasets.seeded(0))[..., :8].mean() < 90)
    brightness = out.mean((1, 2, 3)) / left.float().mean()
    assert 0.65 < brightness.min() < 0.8 and 1.2 < brightness.max() < 1.35
    colour = (out[:, 1] - out[:, 0]).mean((1, 2))  # 62.5 as it is
    assert colour.min() < 40 and colour.max() > 90


def test_erasing_takes_a_rectangle_from_that_share():
    images = torch.full((1000, 2, 20, 24), 7.0)
    out = datasets.erase_some(images, 0.25, datasets.seeded(0))
    changed = out != images
    assert torch.equal(changed[:, 0], changed[:, 1])
    some = changed[:, 0][changed.flatten(1).any(1)]
    assert 200 < len(some) < 300
    for mask in some:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns) and mask.sum() <= 0.4 * mask.numel()
        for side in (rows, columns):
            assert side.diff().sum() <= 2  # one piece
    noise = out[changed]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert torch.equal(datasets.erase_some(images, 1e-9, datasets.seeded(0)), images)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0), (0.01, 0), (0, 1.0), (0.8, 1.0)])
def test_mixed_labels_sum_to_one_and_weigh_what_the_images_do(mixup, cutmix):
    labels = torch.arange(100) % 10
    images = labels[:, None, None, None].float().expand(100, 3, 16, 16)  # an image's pixels are its label
    x, y = datasets.mix(images, labels, 10, mixup, cutmix, datasets.seeded(1))
    assert x.shape == images.shape and y.shape == (100, 10) and y.dtype == torch.float32
    assert torch.allclose(y.sum(1), torch.ones(100)) and (y >= 0).all() and ((y > 0).sum(1) <= 2).all()
    assert torch.allclose((y * torch.arange(10)).sum(1), x.mean((1, 2, 3)), atol=1e-4)
    cut = all(len(image.unique()) <= 2 and set(image.unique().tolist()) <= set(range(10)) for image in x)
    assert cut or not (cutmix and not mixup)
    own = y[torch.arange(100), labels]
    assert len(own.unique()) > 10 and 0.3 < own.mean() < 0.7


def test_a_batch_takes_mixup_or_cutmix_at_random():
    images, labels = torch.randn(8, 1, 16, 16), torch.arange(8)
    kinds = set()
    for seed in range(12):
        x, _ = datasets.mix(images, labels, 8, 1.0, 1.0, datasets.seeded(seed))
        kinds.add(bool(torch.isin(x, images).all()))  # only cutmix keeps every pixel
    assert kinds == {True, False}


def test_augmented_batches_depend_on_the_key_alone():
    data = datasets.shapes(60, 20)
    options = dict(crop_pad=2, flip=True, augment="strong", erase=0.5, mixup=0.8, cutmix=1.0, num_classes=10)

    def epoch(key, **more):
        torch.rand(1)
        return list(datasets.batches(data.train, 16, data.mean, data.std, "cpu", key=key, **more))

    first = epoch((0, 0), **options)
    assert same(first, epoch((0, 0), **options)) and same(first[2:], epoch((0, 0), first=2, **options))
    plain = epoch((0, 0))
    assert plain[0][1].dtype == torch.int64 and first[0][1].shape == (16, 10)
    hot = [F.one_hot(y, 10).bool() for _, y in plain]
    own = torch.cat([y[h] for (_, y), h in zip(first, hot, strict=True)])
    assert (own > 0).float().mean() > 0.9  # the order is that of the plain ones, whatever the augmentation
    for name, value in options.items():
        if name not in ("num_classes", "flip"):
            changed = epoch((0, 0), **{name: value}, num_classes=10)
            assert not torch.equal(changed[0][0], plain[0][0]), name
            assert changed[0][1].ndim == (2 if name in ("mixup", "cutmix") else 1)


def test_picture_of_augmentation(tmp_path, monkeypatch, capsys):
    small = datasets.shapes(80, 20)
    monkeypatch.setattr(datasets, "shapes", lambda: small)
    monkeypatch.setattr(
        sys, "argv", ["data.py", *f"--show {tmp_path}/a.png --augment strong --cutmix 1 --flip".split()]
    )
    datasets.main()
    picture = Image.open(tmp_path / "a.png")
    assert picture.height == 5 * 116  # as they are, three of them, all
    cells = [picture.crop((110, 116 * row, 206, 116 * row + 96)).tobytes() for row in range(5)]
    assert len(set(cells)) >= 3 and str(tmp_path / "a.png") in capsys.readouterr().out
    for wrong in ("--data nowhere", f"--show {tmp_path}/none/a.png", "--augment weak"):
        monkeypatch.setattr(sys, "argv", ["data.py", "--show", f"{tmp_path}/b.png", *wrong.split()])
        with pytest.raises(SystemExit) as stop:
            datasets.main()
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# ---------------------------------------------------------------------------------------------- why it stands still


def falling(start, end, count=10, noise=0.0, seed=0):
    random = torch.Generator().manual_seed(seed)
    line = torch.linspace(start, end, count) + noise * torch.randn(count, generator=random)
    return line.tolist()


def told(train_loss, val_loss, lr=0.1, best=1):
    """The verdict on these losses, with the best epoch at `best`."""
    rates = lr if isinstance(lr, list) else [lr] * len(val_loss)
    history = [
        dict(epoch=i + 1, lr=rate, train_loss=t, val_loss=v, val_acc=0.5 - (i + 1 != best) / 10, train_acc=0.5)
        for i, (rate, t, v) in enumerate(zip(rates, train_loss, val_loss, strict=True))
    ]
    row = early_stopping.best_row(history, "val_acc")
    line = early_stopping.explain(history, row, "val_acc", chance=math.log(10))
    assert row["epoch"] == best and "\n" not in line and f"of epoch {best} in {len(history)} epochs" in line
    found = early_stopping.verdict(history, row, chance=math.log(10))
    assert early_stopping.ADVICE[found] in line
    return found


EARLY = falling(2.2, 0.8, 6)  # the epochs before the loss stands still
BLOW_UP = [10.0**i for i in range(8)]
CASES = [
    ("not learning", dict(train_loss=[2.3026] * 8, val_loss=[2.3026] * 8)),
    ("not learning", dict(train_loss=falling(2.303, 2.303, noise=0.002), val_loss=falling(2.303, 2.303, noise=0.002))),
    ("too small", dict(train_loss=falling(2.3026, 2.3, 8), val_loss=falling(2.3026, 2.3005, 8))),
    ("too small", dict(train_loss=EARLY + falling(0.8, 0.6), val_loss=EARLY + falling(0.8, 0.7), best=6)),
    ("too small", dict(train_loss=[2.3, 2.2], val_loss=[2.3, 2.2])),
    ("too high", dict(train_loss=[2.3, 60.0, 8.0, 90.0, 4.0], val_loss=[2.3, 2.4, 9.0, 3.0, 70.0])),
    ("too high", dict(train_loss=EARLY + [0.7] * 8, val_loss=EARLY + [0.9, 2.0] * 4, best=6)),
    ("too high", dict(train_loss=EARLY + falling(0.8, 2.3), val_loss=EARLY + falling(0.8, 2.3), best=6)),
    ("too high", dict(train_loss=[9.0, 2.4, 2.35, 2.34, 2.32], val_loss=[5.0, 2.4, 2.36, 2.33, 2.32], best=3)),
    ("too high", dict(train_loss=EARLY + BLOW_UP, val_loss=EARLY + BLOW_UP, best=6)),
    ("overfitting", dict(train_loss=EARLY + falling(0.8, 0.3), val_loss=EARLY + falling(0.9, 1.3), best=6)),
    ("overfitting", dict(train_loss=EARLY + falling(0.8, 0.3), val_loss=EARLY + falling(0.9, 1.3, noise=0.03), best=6)),
    ("overfitting", dict(train_loss=EARLY + [0.001] * 10, val_loss=EARLY + falling(0.9, 1.3), best=6)),
    ("overfitting", dict(train_loss=falling(2.3, 0.5), val_loss=falling(2.31, 3.5))),  # labels by chance
    ("converged", dict(train_loss=EARLY + [0.8] * 10, val_loss=EARLY + [0.9] * 10, best=6)),
    (
        "converged",
        dict(train_loss=EARLY + falling(0.8, 0.8, noise=0.01), val_loss=EARLY + falling(0.9, 0.9, noise=0.02), best=6),
    ),
    ("decayed", dict(train_loss=EARLY + [0.8] * 10, val_loss=EARLY + [0.9] * 10, lr=[0.1] * 6 + [9e-4] * 10, best=6)),
    ("risen", dict(train_loss=[*EARLY, 0.9, 1.1], val_loss=[*EARLY, 1.0, 1.2], lr=[0.1] * 4 + [0.01] * 2 + [0.1] * 2,
                   best=6)),
]  # fmt: skip


@pytest.mark.parametrize("verdict, history", CASES)
def test_a_standstill_is_told_from_the_history(verdict, history):
    assert told(**history) == verdict


def test_every_verdict_has_a_case():
    assert {verdict for verdict, _ in CASES} == set(early_stopping.ADVICE)


# A real run that provokes each verdict, and the word for it in the run's last line of advice.
STANDSTILLS = [
    ("learns nothing", "--hidden 16 --lr 1e-12 --sched none --epochs 8 --patience 4"),
    ("may be too small", "--hidden 16 --lr 1e-4 --sched none --epochs 8 --patience 6 --min-delta 0.5"),
    ("too high", "--hidden 16 --lr 3 --sched none --epochs 20 --patience 6"),
    ("overfits", "--hidden 256 --dropout 0 --crop-pad 0 --sched none --epochs 40 --patience 8 --monitor val_loss"),
    ("under a hundredth", "--hidden 16 --sched step --step-size 5 --gamma 0.0001 --epochs 40 --patience 10"),
    ("has converged", "--hidden 64 --sched none --epochs 60 --patience 6 --monitor val_loss --min-delta 0.02"),
]


@pytest.fixture(scope="module")
def middling():
    """A part of 'shapes' with enough images to learn from."""
    return datasets.shapes(600, 100)


def easy():
    """Ten images, one a class, with a little noise: soon there is nothing left to learn."""
    random = torch.Generator().manual_seed(0)
    images, labels = torch.randint(0, 240, (10, 3, 32, 32), generator=random), torch.arange(700) % 10
    images = (images[labels] + torch.randint(0, 16, (700, 3, 32, 32), generator=random)).to(torch.uint8)
    mean, std = datasets.pixel_stats(images)
    return datasets.Data(
        "shapes", list("0123456789"), mean, std, (images[:600], labels[:600]), (images[600:], labels[600:])
    )


@pytest.mark.parametrize("words, flags", STANDSTILLS)
def test_a_real_standstill_is_told(words, flags, tiny, monkeypatch, middling, capsys):
    data = easy() if words == "has converged" else middling
    monkeypatch.setattr(datasets, "shapes", lambda: data)
    run = "--model mlp --data shapes --batch-size 64 --device cpu --amp off --out run"
    assert call(*run.split(), *flags.split()) == 0
    advice = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no better")]
    assert len(advice) >= 2 and words in advice[-1], advice


def test_half_of_the_patience_is_told_once_and_again_after_a_resume(tiny, monkeypatch, capsys):
    accuracies = [0.1, 0.4, 0.3, 0.3, 0.3, 0.3]
    run = [*TINY_MLP, "--epochs", 9, "--patience", 4, "--sched", "none", "--warmup-epochs", 0]

    def advice():
        said = capsys.readouterr().out.splitlines()
        return [said[i - 1].split()[1] + line for i, line in enumerate(said) if line.startswith("no better")]

    scripted(monkeypatch, accuracies)
    assert call(*run, "--out", "straight") == 0
    straight = advice()
    assert [line.split("no better")[0] for line in straight] == ["4/9", "6/9"]

    real, calls = train.backward, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 9:  # inside the fifth epoch
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    scripted(monkeypatch, accuracies)
    monkeypatch.setattr(train, "backward", interrupted)
    assert call(*run, "--out", "halted") == 130
    assert advice() == straight[:1]
    assert call("--resume", "halted/last.pt") == 0
    assert advice() == straight[1:]


# ---------------------------------------------------------------------------------------------- diagnose.py

DIAGNOSE = "--model mlp --hidden 64 --data shapes --batch-size 64 --epochs 4 --device cpu".split()


def diagnosed(*argv):
    try:
        return diagnose.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def failed_checks(said):
    return {line[4:19].strip() for line in said.splitlines() if line.startswith("FAIL")}


def plant_in_data(monkeypatch, data, change):
    """Let a set-up see its data after `change`. The test labels are gone: reading them would raise."""
    data = datasets.Data(data.name, data.classes, data.mean, data.std, data.train, data.test)
    change(data)
    real = train.load_data

    def load_data(*args):
        loaded, *parts = real(*args)
        loaded.test = (loaded.test[0], None)
        return loaded, *parts

    monkeypatch.setattr(datasets, "shapes", lambda: data)
    monkeypatch.setattr(train, "load_data", load_data)


def plant_in_model(monkeypatch, change):
    real = train.build

    def build(*args):
        model = real(*args)
        change(model)
        return model

    monkeypatch.setattr(train, "build", build)


def wrong_constants(data):
    data.mean, data.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def shuffled_labels(data):
    images, labels = data.train
    data.train = images, labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


def copies_in_train(data):
    images, labels = data.train
    data.train = torch.cat([images, images[:50]]), torch.cat([labels, labels[:50]])


def copies_in_test(data):
    data.test = torch.cat([data.train[0][:1], data.test[0]]), torch.cat([data.train[1][:1], data.test[1]])


def frozen_layer(model):
    model.layers[1].weight.requires_grad_(False)


def dead_model(model):
    model.layers.register_forward_hook(lambda module, inputs, out: out * 0)


def sees_the_batch(model):
    model.register_forward_hook(lambda module, inputs, out: out - out.mean(0))


def loud_head(model):
    torch.nn.init.normal_(model.head.weight)


@pytest.mark.parametrize(
    "data_fault, model_fault, flags, found",
    [
        (None, None, "", set()),
        (wrong_constants, None, "", {"normalisation"}),
        (None, frozen_layer, "", {"gradients"}),
        (shuffled_labels, None, "", {"labels"}),
        (copies_in_train, None, "", {"overlap"}),
        (copies_in_test, None, "", {"overlap"}),
        (None, None, "--lr 2", {"rate"}),
        (None, dead_model, "", {"memory", "gradients"}),
        (None, sees_the_batch, "", {"alone"}),
        (None, loud_head, "", {"first loss"}),
        (None, None, "--t-max 1", {"schedule"}),
    ],
)
def test_diagnose_finds_planted_faults(data_fault, model_fault, flags, found, tiny, monkeypatch, middling, capsys):
    plant_in_data(monkeypatch, middling, data_fault or (lambda data: None))
    plant_in_model(monkeypatch, model_fault or (lambda model: None))
    assert diagnosed(*DIAGNOSE, *flags.split()) == (1 if found else 0)
    said = capsys.readouterr().out
    assert failed_checks(said) == found, said
    assert len(said.splitlines()) == len(diagnose.CHECKS) + 1
    assert list(tiny.iterdir()) == []


@pytest.mark.parametrize(
    "flags", ["--opt lbfgs", "--opt sgd --sched plateau --amp bf16", "--accum 9", "--val-split 0", "--smoothing 0.5"]
)
def test_diagnose_takes_other_set_ups(flags, tiny, monkeypatch, middling, capsys):
    plant_in_data(monkeypatch, middling, lambda data: None)
    assert diagnosed(*DIAGNOSE, *flags.split()) == 0, capsys.readouterr().out


@pytest.mark.parametrize("flags, frozen", [("", 1), ("--freeze body.0 --freeze body.2", 5)])
def test_diagnose_knows_what_is_frozen_on_purpose(flags, frozen, tiny, monkeypatch, middling, capsys):
    plant_in_data(monkeypatch, middling, lambda data: None)
    diagnosed("--model", "cnn", "--widths", "16,16", "--data", "shapes", *flags.split())
    said = capsys.readouterr().out
    assert f"parameters learn ({frozen} are frozen)" in said and "gradients" not in failed_checks(said), said


def test_diagnose_of_few_images_says_that_they_are_few(tiny, capsys):
    assert diagnosed(*TINY_MLP, "--epochs", 2) == 0
    assert "too few to tell" in capsys.readouterr().out


def test_find_lr_leaves_the_weights_alone_and_suggests_a_rate_that_learns(tiny, monkeypatch, middling, capsys):
    monkeypatch.setattr(datasets, "shapes", lambda: middling)
    s = diagnose.set_up(*diagnose.parse_args(DIAGNOSE)[:2])
    before = {k: v.clone() for k, v in s.model.state_dict().items()}
    rates, smooth, suggestion = diagnose.find_lr(s)
    assert same(before, dict(s.model.state_dict()))
    assert rates[0] == 1e-7 and len(rates) == len(smooth) and rates == sorted(rates)
    assert 1e-4 < suggestion < 0.1
    losses = {}
    for lr in (suggestion, suggestion / 100, suggestion * 100):
        assert call(*DIAGNOSE, "--lr", lr, "--out", f"lr{lr}") == 0
        losses[lr] = checkpoints.load(f"lr{lr}/last.pt")["metrics"]["train_loss"]
    assert min(losses, key=losses.get) == suggestion, losses

    capsys.readouterr()
    assert diagnosed(*DIAGNOSE, "--find-lr", "rates.png") == 0
    assert f"try --lr {suggestion:.1g} " in capsys.readouterr().out and Image.open("rates.png").width > 600


def test_find_lr_stops_when_the_loss_diverges(tiny, monkeypatch, middling):
    monkeypatch.setattr(datasets, "shapes", lambda: middling)
    args = diagnose.parse_args([*DIAGNOSE, "--opt", "sgd", "--no-batch-norm"])[:2]
    rates, smooth, _ = diagnose.find_lr(diagnose.set_up(*args))
    assert rates[-1] < 9 and not smooth[-1] < 2 * min(smooth) and all(x < 2 * min(smooth) for x in smooth[:-1])


@pytest.mark.parametrize(
    "wrong",
    ["--find-lr a.jpg", "--find-lr nowhere/a.png", "--find-lr --opt lbfgs", "--find", "--eval best.pt", "--lr -1",
     "--opt adamax", "--data nowhere", "--opt muon", "--lr-scale haed=2"],
)  # fmt: skip
def test_diagnose_refuses_in_one_line(wrong, tiny, capsys):
    Path("best.pt").touch()
    assert diagnosed(*DIAGNOSE, *wrong.split()) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "error: " in said and wrong.split()[0] in said, said


def test_diagnose_command_line(tmp_path, capsys):
    assert diagnosed("--help") == 0
    said = capsys.readouterr().out
    assert "--find-lr" in said and "train.py" in said
    done = python(HERE / "diagnose.py", "--opt", "adamax", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("diagnose.py: error: ")


# ---------------------------------------------------------------------------------------------- see it and use it


DRAW = plot.draw  # which the fixture tiny replaces


def missing(monkeypatch, *packages):
    """Make imports of packages fail, as if they weren't installed."""
    for name in [*packages, *(m for m in sys.modules if m.split(".")[0] in packages)]:
        monkeypatch.setitem(sys.modules, name, None)


def curve_rows(accuracies, lr=0.1):
    return [dict(r, train_acc=r["val_acc"], val_loss=1.0) for r in rows(accuracies, lr=lr)]


def fake_run(folder, accuracies, best_epoch=None, **args):
    folder.mkdir(parents=True)
    names = {k: 0 for k in outputs.COLUMNS}
    outputs.write_metrics([names | row for row in curve_rows(accuracies)], folder / "metrics.csv")
    args = dict(model="mlp", data="a/long/path", opt="adamw", lr=0.1, out=str(folder), seed=0, flip=False) | args
    result = dict(data="pets", seed=args["seed"], best_epoch=best_epoch or len(accuracies), args=args)
    outputs.write_result(result, folder / "result.json")
    return folder


def test_runs_are_named_by_what_differs(tmp_path):
    def named(*arguments):
        folders = [fake_run(tmp_path / f"{len(list(tmp_path.iterdir()))}", [0.5, 0.6], **a) for a in arguments]
        return [name.removeprefix(f"{tmp_path}/") for name in plot.collect(folders)[0]]

    assert named(dict(opt="sgd"), dict(opt="adamw")) == ["sgd", "adamw"]
    assert named(dict(opt="sgd", lr=1.0), dict(opt="sgd", lr=0.1), dict(seed=1)) == ["sgd, lr 1", "sgd, lr 0.1",
                                                                                      "adamw, lr 0.1"]  # fmt: skip
    assert named(dict(flip=True), dict(seed=3)) == ["flip", "no flip"]
    assert named(dict(hidden=[8]), dict(hidden=[8, 8])) == ["hidden [8]", "hidden [8, 8]"]
    assert named(dict(opt="sgd"), dict(seed=1), dict(seed=2)) == [
        "sgd",
        "adamw (mean \N{PLUS-MINUS SIGN} sd of 2 seeds)",
    ]
    before = len(list(tmp_path.iterdir()))
    assert named({}, {}) == [f"{before}", f"{before + 1}"]  # the same run twice isn't two seeds
    (tmp_path / "0" / "result.json").unlink()  # as while it goes on
    assert next(iter(plot.collect([tmp_path / "0", tmp_path / "1"])[0])) == str(tmp_path / "0")


def test_seeds_become_mean_and_band_as_far_as_all_of_them_go():
    epochs, means, spreads = plot.mean_and_spread(curve_rows([0.2, 0.5, 0.9]) + curve_rows([0.4, 0.5]), "val_acc")
    assert epochs == [1, 2] and means == pytest.approx([0.3, 0.5]) and spreads == pytest.approx([0.02**0.5, 0])


def test_plot_command_line(tmp_path):
    for name, more in (("a", {}), ("b", dict(seed=1)), ("c", dict(opt="sgd"))):
        fake_run(tmp_path / name, [0.5, 0.7, 0.6], **more)
    done = python(HERE / "plot.py", "a", "b", "c", "--out", "three.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "three.png").size == (1500, 558)
    for wrong, word in ((["nowhere"], "nowhere"), (["a", *(f"r{i}" for i in range(9))], "10 curves")):
        if "r0" in wrong:
            for i in range(9):
                fake_run(tmp_path / f"r{i}", [0.5], lr=float(i + 1))
        done = python(HERE / "plot.py", *wrong, cwd=tmp_path)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and word in done.stderr, done.stderr


@pytest.mark.parametrize("accuracies", [[0.5], [math.nan, math.nan], [0.5, math.nan, 0.7]])
def test_curves_of_short_runs_and_without_validation(accuracies, tmp_path):
    plot.draw({"a run": curve_rows(accuracies)}, tmp_path / "a.png", best={"a run": 1})
    assert Image.open(tmp_path / "a.png").size == (1500, 558)


def test_curves_are_drawn_on_the_way(tiny, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "draw", lambda runs, path, best: drawn.append((len(runs["run"]), best["run"])))
    monkeypatch.setattr(train, "DRAW_EVERY", 0)
    scripted(monkeypatch, [0.1, 0.3, 0.2])
    assert call(*TINY_MLP, "--epochs", 3, "--out", "run") == 0
    assert drawn == [(1, 1), (2, 2), (3, 2), (3, 2)]


def test_a_run_without_matplotlib_and_tensorboard(tiny, monkeypatch, capsys):
    monkeypatch.setattr(plot, "draw", DRAW)
    missing(monkeypatch, "matplotlib", "tensorboard", "torch.utils.tensorboard")
    assert call(*TINY_MLP, "--tensorboard", "--out", "run") == 0
    said = capsys.readouterr().out
    assert "pip install matplotlib" in said and "pip install tensorboard" in said
    assert not Path("run/curves.png").exists() and Path("run/result.json").exists()


def test_tensorboard_gets_what_the_table_has(tiny, monkeypatch):
    written = {}

    class SummaryWriter:
        def __init__(self, folder):
            self.flush = lambda: None

        def add_scalar(self, name, value, step):
            written[name, step] = value

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("fake", (), dict(SummaryWriter=SummaryWriter)))
    assert call(*TINY_MLP, "--epochs", 2, "--val-split", 0, "--tensorboard", "--out", "run") == 0
    history = checkpoints.load("run/last.pt", keys=checkpoints.RESUME_KEYS)["history"]
    names = {"lr", "train_loss", "train_acc", "seconds", "images_per_second"}  # nothing was validated
    assert written == {(name, row["step"]): row[name] for row in history for name in names}


@pytest.fixture
def trained(tiny):
    """Tiny checkpoints by name, of models with random heads, made without training."""

    def make(name, model, data, **more):
        content = dict(model=name.split("-")[0], model_args=model.model_args, classes=data.classes, epoch=1, metrics={})
        content |= dict(image_size=data.test[0].shape[-1], channels=data.test[0].shape[1], mean=data.mean, std=data.std)
        content |= dict(
            state_dict=give_head_weights(model).state_dict(), args=dict(val_split=0.1, seed=0, data=data.name)
        )
        checkpoints.save(content | more, f"{name}.pt")

    torch.manual_seed(0)
    shapes = datasets.shapes()
    grey = [
        (images.float().mean(1, keepdim=True).byte()[:, :, :28, :28], y) for images, y in (shapes.train, shapes.test)
    ]
    grey = datasets.Data("grey", [str(i) for i in range(10)], (0.13,), (0.31,), *grey)
    make("mlp", mlp_mnist.MLP(hidden=(32,)), grey)
    make("cnn", cnn_cifar10.CNN(widths=(4, 8)), shapes)
    small = dict(image_size=32, patch_size=8, num_classes=10, dim=16, depth=2, heads=2, mlp_dim=16)
    make("vit-mean", vit.ViT(**small, pool="mean"), shapes)
    make("vit-cls", vit.ViT(**small, pool="cls"), shapes)
    return grey, shapes


def save_images(images, folder):
    folder.mkdir()
    for i, image in enumerate(images):
        image = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(image.numpy()).save(folder / f"{i:03}.png")


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_predictions_of_saved_images_are_those_of_the_tensors(name, trained, tiny, capsys):
    data = trained[name == "cnn"]
    save_images(data.test[0], tiny / "images")
    assert predict.main([f"{name}.pt", "images", "--json", "--top", "10"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    checkpoint = checkpoints.load(f"{name}.pt")
    device = torch.device("cpu")
    model = arguments.rebuild(checkpoint).eval()
    expected = predict.logits_of(model, data.test[0], checkpoint, device).softmax(1)
    assert [line["file"] for line in lines] == [f"images/{i:03}.png" for i in range(40)]
    assert [line["class"] for line in lines] == [data.classes[i] for i in expected.argmax(1)]
    assert [line["probability"] for line in lines] == pytest.approx(expected.amax(1).tolist(), abs=1e-6)
    assert all(sum(c["probability"] for c in line["top"]) == pytest.approx(1, abs=1e-4) for line in lines)
    right = sum(line["class"] == data.classes[y] for line, y in zip(lines, data.test[1], strict=True)) / 40
    assert right == train.evaluate(model, data.test, data, device, devices.choose_precision("auto", device))[1]


def test_predict_as_text_crops_inverts_and_hints(trained, tiny, capsys):
    digit = trained[0].test[0][0, 0]
    Image.fromarray(digit.numpy()).save("dark.png")
    wide = torch.full((28, 40), 255, dtype=torch.uint8)
    wide[:, 6:34] = 255 - digit
    Image.fromarray(wide.numpy()).save("photo.png")
    light = Image.fromarray(torch.stack([wide] * 3, 2).numpy()).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 270 degrees
    light.save("turned.png", exif=exif)
    Image.new("L", (28, 28), 255).save("white.png")
    assert predict.main(["mlp.pt", "dark.png", "--top", "2"]) == 0
    expected = capsys.readouterr().out.removeprefix("dark.png: ")
    assert expected.count(" %") == 2 and expected.count(",") == 1
    assert predict.main(["mlp.pt", "photo.png", "turned.png", "--top", "2", "--invert"]) == 0
    said = capsys.readouterr()
    assert said.out == f"photo.png: {expected}turned.png: {expected}"
    assert "2 of 2 images aren't square" in said.err and "hint" not in said.err
    assert predict.main(["mlp.pt", "white.png", "dark.png"]) == 0
    assert "1 of 2 images look dark on light" in capsys.readouterr().err
    assert predict.main(["cnn.pt", "white.png"]) == 0  # of colour models light backgrounds are no surprise
    assert "hint" not in capsys.readouterr().err


def test_predict_names_what_is_no_image_and_reads_the_rest(trained, tiny, capsys):
    save_images(trained[1].test[0][:2], tiny / "images")
    Path("images/000a.png").write_bytes(b"no image")
    Path("images/notes.txt").write_text("not looked at")
    assert predict.main(["cnn.pt", "images"]) == 2
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert len(said.err.splitlines()) == 1 and "000a.png can't be read as an image" in said.err


PREDICT_WRONG = [
    "nowhere.pt image.png", "text.pt image.png", "cnn.pt", "cnn.pt nowhere.png", "cnn.pt empty", "cnn.pt text.pt",
    "cnn.pt image.png --top 0", "cnn.pt image.png --top 11", "cnn.pt image.png --device tpu",
    "cnn.pt image.png --out x", "cnn.pt image.png --data-dir x",
    "cnn.pt --report nowhere", "cnn.pt --report pets", "cnn.pt image.png --report shapes", "mlp.pt --report shapes",
    "cnn.pt --report shapes --top 0", "cnn.pt --report shapes --export x.pt2", "cnn.pt image.png --attention a.png",
    "vit-cls.pt --attention a.png", "vit-cls.pt image.png image.png --attention a.png", "cnn.pt --export model.txt",
    "vit-cls.pt image.png --attention a.nothing", "cnn.pt --export nowhere/model.pt2", "cnn.pt --export x.pt2 --invert",
]  # fmt: skip


def test_predict_refuses_in_one_line(trained, tiny, capsys):
    Image.new("RGB", (32, 32)).save("image.png")
    Path("text.pt").write_text("no checkpoint")
    Path("empty").mkdir()
    write_folder(tiny / "pets", (32, 32))
    before = {path for path in tiny.rglob("*") if "data" not in path.parts[-3:]}
    for wrong in PREDICT_WRONG:
        assert predict.main(wrong.split()) == 2, wrong
        said = capsys.readouterr()
        assert len(said.err.splitlines()) == 1 and "predict.py: error: " in said.err and said.out == "", (wrong, said)
        after = {path for path in tiny.rglob("*") if "data" not in path.parts[-3:]}
        assert after == before, f"{wrong} left something behind"


def test_confusion_and_shares_are_those_of_a_count_by_hand():
    labels, predicted = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 0, 1, 1, 0, 1])
    matrix = report.confusion(labels, predicted, 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    precision, recall = report.precision_and_recall(matrix)
    assert precision.tolist() == pytest.approx([2 / 3, 1 / 3, math.nan, math.nan], nan_ok=True)
    assert recall.tolist() == pytest.approx([2 / 3, 1 / 2, math.nan, 0], nan_ok=True)
    text = report.as_text(matrix, ["ant", "bee", "cow", "dog"]).splitlines()
    assert text[1].split() == ["ant", "0.6667", "0.6667", "3"] and text[3].split() == ["cow", "-", "-", "0"]
    assert text[-4].split() == ["ant", "2", "1", ".", "."]
    many = report.as_text(torch.eye(30, dtype=torch.int64) + (torch.arange(900) == 31).view(30, 30), ["x"] * 29 + ["y"])
    assert "most frequent errors" in many


def test_calibration_error_is_that_of_a_case_by_hand():
    def logits(*probabilities):
        p = torch.tensor(probabilities)
        return torch.stack((p, 1 - p), 1).log()

    # In (0.9, 1]: confidences 0.95, 0.95, one right. In (0.5, 0.6]: 0.55, right. In (0.7, 0.8]: 0.75 of class 1, right.
    values, labels = logits(0.95, 0.95, 0.55, 0.25), torch.tensor([0, 1, 0, 1])
    error, bins = report.calibration(values, labels, bins=10)
    assert error == pytest.approx((2 * 0.45 + 0.45 + 0.25) / 4, abs=1e-6)
    assert [n for n, _, _ in bins] == [0, 0, 0, 0, 0, 1, 0, 1, 0, 2]
    assert bins[9][1:] == pytest.approx((0.95, 0.5))
    assert report.calibration(torch.tensor([[100.0, 0.0]]), torch.tensor([0]))[0] == 0


def test_temperature_is_found():
    generator = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial(true.softmax(1), 1, generator=generator).flatten()
    assert report.fit_temperature(true, labels) == pytest.approx(1, abs=0.1)
    t = report.fit_temperature(true * 3, labels)
    assert t == pytest.approx(3 * report.fit_temperature(true, labels), rel=1e-6)
    losses = [F.cross_entropy(true * 3 / x, labels) for x in (0.97 * t, t, 1.03 * t)]
    assert losses[1] < losses[0] and losses[1] < losses[2]
    assert report.fit_temperature(torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == pytest.approx(0.01)  # all right


def test_report(trained, tiny, capsys):
    assert predict.main(["cnn.pt", "--report", "shapes"]) == 0
    said = capsys.readouterr()
    assert call("--eval", "cnn.pt") == 0
    assert said.out.splitlines()[0] == capsys.readouterr().out.strip()
    assert "temperature fitted on 14 validation images" in said.out and "report-shapes" in said.err
    sizes = {f.name: Image.open(f).size for f in Path("report-shapes").iterdir()}
    assert sizes == {"confusion.png": (1185, 1065), "mistakes.png": (1350, 1800), "reliability.png": (900, 900)}


def test_report_of_a_perfect_model_has_no_mistakes_to_draw(tmp_path):
    images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    report.draw_mistakes(images, F.one_hot(labels).float(), labels, ["a", "b"], tmp_path / "none.png")
    assert Image.open(tmp_path / "none.png").width == 1350


def test_predict_without_matplotlib_and_onnx(trained, tiny, monkeypatch, capsys):
    missing(monkeypatch, "matplotlib", "onnx", "onnxscript")
    Image.new("RGB", (32, 32)).save("image.png")
    assert predict.main(["cnn.pt", "--report", "shapes", "--json", "--out", "there"]) == 0
    said = capsys.readouterr()
    assert "pip install matplotlib" in said.err and Path("there").is_dir()
    figures = json.loads(said.out)
    assert sum(map(sum, figures["confusion"])) == 40 and set(figures["precision"]) == set(trained[1].classes)
    assert figures["test_acc"] == sum(figures["confusion"][i][i] for i in range(10)) / 40
    for words in ("vit-cls.pt image.png --attention a.png", "cnn.pt --export a.onnx"):
        assert predict.main(words.split()) == 1
        said = capsys.readouterr().err
        assert "pip install" in said and len(said.splitlines()) == 1, said


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_attention_maps_and_rollout(pool):
    torch.manual_seed(0)
    model = give_head_weights(vit.ViT(**VIT | dict(depth=3), pool=pool)).eval()
    images = images_for(model, 2)
    before = model(images)
    maps = model.attention_maps(images)
    tokens = 64 + (pool == "cls")
    assert maps.shape == (3, 2, 2, tokens, tokens)
    assert torch.allclose(maps.sum(-1), torch.ones(3, 2, 2, tokens), atol=1e-5)
    assert torch.equal(model(images), before)
    # The first layer's, from the definition.
    x = model.blocks[0].norm_1(model.embed(images))
    q, k, _ = model.blocks[0].attention.to_qkv(x).reshape(2, tokens, 3, 2, 16).permute(2, 0, 3, 1, 4)
    assert torch.allclose(maps[0], (q @ k.transpose(2, 3) / 4).softmax(-1), atol=1e-6)

    flow = vit.rollout(maps)
    assert flow.shape == (2, tokens, tokens)
    assert torch.allclose(flow.sum(-1), torch.ones(2, tokens), atol=1e-5)
    eye = torch.eye(tokens)
    first, second, third = ((layer.mean(1) + eye) / 2 for layer in maps)
    assert torch.allclose(flow, third @ second @ first, atol=1e-6)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_attention_picture(pool, trained, tiny, capsys):
    save_images(trained[1].test[0][:1], tiny / "images")
    assert predict.main([f"vit-{pool}.pt", "images/000.png", "--attention", "a.png"]) == 0
    assert Image.open("a.png").size == (1200, 427) and "wrote a.png" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cnn", "vit-cls"])
def test_exported_program_equals_the_model(name, trained, tiny, capsys):
    assert predict.main([f"{name}.pt", "--export", "model.pt2"]) == 0
    assert "differs from the model by" in capsys.readouterr().out
    model, program = arguments.rebuild(checkpoints.load(f"{name}.pt")).eval(), torch.export.load("model.pt2").module()
    for count in (1, 3, 8):
        images = images_for(model, count)
        assert torch.allclose(program(images), model(images), atol=1e-5)


def test_a_wrong_export_is_not_kept(trained, tiny, monkeypatch, capsys):
    class Other:
        def module(self):
            return lambda images: torch.zeros(len(images), 10)

    monkeypatch.setattr(torch.export, "export", lambda *args, **more: None)
    monkeypatch.setattr(torch.export, "save", lambda program, path: path.write_bytes(b"a program"))
    monkeypatch.setattr(torch.export, "load", lambda path: Other())
    assert predict.main(["cnn.pt", "--export", "model.pt2"]) == 1
    assert "differs from the model" in capsys.readouterr().err and not Path("model.pt2").exists()


# ---------------------------------------------------------------------------------------------- other people's weights


def timm_weights(dim=128, depth=2, mlp_dim=32, patch=4, side=2, classes=3):
    """A state dict with the names and shapes of timm's VisionTransformer, filled by seed."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, side * side + 1, dim)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    for i in range(depth):
        for name, size in (
            ("norm1", (dim,)), ("attn.qkv", (3 * dim, dim)), ("attn.proj", (dim, dim)),
            ("norm2", (dim,)), ("mlp.fc1", (mlp_dim, dim)), ("mlp.fc2", (dim, mlp_dim)),
        ):  # fmt: skip
            shapes |= {f"blocks.{i}.{name}.weight": size, f"blocks.{i}.{name}.bias": size[:1]}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,), "head.weight": (classes, dim), "head.bias": (classes,)}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# What timm's VisionTransformer(img_size=8, patch_size=4, embed_dim=128, depth=2, num_heads=2, mlp_ratio=0.25,
# num_classes=3) gives with timm_weights() for torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).
TIMM_OUTPUT = [[0.371553, 0.148592, 0.346703], [-0.05809, 0.221442, 0.064326]]


def test_timm_weights_give_timm_output():
    keywords, state = vit.from_timm(timm_weights())
    model = vit.ViT(**keywords).eval()
    model.load_state_dict(state)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(images), torch.tensor(TIMM_OUTPUT), rtol=0, atol=3e-6)  # an eps of 1e-5 gives 9e-6
    assert keywords["heads"] == 2 and keywords["qkv_bias"] and keywords["norm_eps"] == 1e-6


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.pop("pos_embed"),
        lambda w: w.update({"fc_norm.weight": torch.ones(128)}),
        lambda w: w.update({"blocks.0.ls1.gamma": torch.ones(128)}),
        lambda w: w.pop("blocks.1.mlp.fc2.bias"),
        lambda w: w.update(pos_embed=torch.zeros(1, 4, 128)),
        lambda w: [w.pop(name) for name in list(w) if name.startswith("blocks.")],
    ],
)
def test_other_weights_of_timm_are_refused(change, tiny, capsys):
    weights = timm_weights()
    change(weights)
    with pytest.raises(ValueError, match="timm"):
        vit.from_timm(weights)
    torch.save(weights, "timm.pt")
    assert call("--model", "vit", "--init", "timm.pt", *TINY) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "timm.pt" in said


def test_positions_are_interpolated():
    torch.manual_seed(0)
    ramp = torch.arange(64.0).view(1, 64, 1).expand(1, 64, 32)
    for pool, first in (("cls", 1), ("mean", 0)):
        model = vit.ViT(**VIT | dict(image_size=64), pool=pool)  # 16 x 16 patches
        state = dict(cls_token=torch.zeros(1, 1, 32), pos_embedding=torch.cat([torch.full((1, 1, 32), 9.0), ramp], 1))
        new = model.resize_positions(state)["pos_embedding"]
        assert new.shape == model.pos_embedding.shape
        assert (new[:, :first] == 9).all()
        grid = new[0, first:, 0].view(16, 16)
        assert grid.mean().item() == pytest.approx(31.5, abs=0.1)
        inner = grid[4:12, 4:12]  # a linear ramp stays one: half a step each way
        assert torch.allclose(inner.diff(dim=1), torch.full((8, 7), 0.5), atol=1e-2)
        assert torch.allclose(inner.diff(dim=0), torch.full((7, 8), 4.0), atol=1e-1)
    model = vit.ViT(**VIT)
    state = model.state_dict()
    assert model.resize_positions(state) is state


def test_init_from_timm(tiny, capsys):
    torch.save(timm_weights(), "timm.pt")
    assert (
        call(*TINY, "--model", "vit", "--init", "timm.pt", "--freeze", "blocks", "--freeze", "norm", "--out", "run")
        == 0
    )
    said = capsys.readouterr().out
    assert "30 of the model's 32 tensors loaded" in said and "skipped for their shape: head.bias (3,) for (10,)" in said
    assert "positions resized from (1, 5, 128) to (1, 65, 128)" in said
    checkpoint = checkpoints.load("run/best.pt")
    assert checkpoint["model_args"]["dim"] == 128 and checkpoint["model_args"]["qkv_bias"]
    after, before = checkpoint["state_dict"], vit.from_timm(timm_weights())[1]
    for name in before:
        if name.startswith(("blocks.", "norm.")):
            assert torch.equal(after[name], before[name]), name
    assert not torch.equal(after["patch_embedding.weight"], before["patch_embedding.weight"])
    Path("timm.pt").unlink()  # a resumed run needs it no more, and keeps what is frozen
    assert call("--resume", "run/last.pt", "--epochs", 2) == 0
    assert torch.equal(weights("run/last.pt")["blocks.0.mlp.0.weight"], before["blocks.0.mlp.0.weight"])


def test_init_from_a_checkpoint(tiny, capsys):
    assert call(*TINY_MLP, "--out", "first") == 0
    assert call("--data", "shapes", "--init", "first/best.pt", "--epochs", 1, "--lr", "1e-12", "--out", "second") == 0
    assert "tensors loaded" in capsys.readouterr().out
    second = checkpoints.load("second/best.pt")
    assert second["model_args"]["hidden"] == (16,)  # the file says so, no flag
    for name, tensor in weights("first/best.pt").items():
        assert torch.allclose(second["state_dict"][name], tensor, atol=1e-6) or "running" in name or "num" in name, name
    write_folder(tiny / "pets", (32, 32), classes="abcdefghij")  # as many classes, but others
    assert call("--data", "pets", "--init", "first/best.pt", "--epochs", 1, "--out", "third") == 0
    assert "started afresh: head.bias, head.weight" in capsys.readouterr().out
    for wrong in (
        ["--model", "vit", "--init", "first/best.pt"],
        ["--model", "cnn", "--init", "first/best.pt"],
        ["--model", "mlp", "--init", "timm.pt"],
        ["--model", "vit", "--init", "other.pt"],
    ):
        torch.save(timm_weights(), "timm.pt")
        torch.save({"weights": torch.zeros(3)}, "other.pt")
        assert call(*TINY, *wrong) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and wrong[-1] in said, said


def test_safetensors(tiny, monkeypatch, capsys):
    Path("timm.safetensors").write_bytes(b"")
    with monkeypatch.context() as patch:
        missing(patch, "safetensors")
        assert call(*TINY, "--model", "vit", "--init", "timm.safetensors") == 2
    assert "pip install safetensors" in capsys.readouterr().err
    fake = type("fake", (), dict(load_file=lambda path: timm_weights()))
    monkeypatch.setitem(sys.modules, "safetensors", type("fake", (), {}))
    monkeypatch.setitem(sys.modules, "safetensors.torch", fake)
    assert call(*TINY, "--model", "vit", "--init", "timm.safetensors", "--out", "run") == 0
    assert checkpoints.load("run/best.pt")["model_args"]["depth"] == 2


def test_frozen_parts_stay_to_the_bit(tiny, capsys):
    flags = "--model cnn --widths 4,8 --freeze body.0 --freeze body.2 --wd 1 --out run".split()
    assert call(*TINY, *flags) == 0
    torch.manual_seed(0)
    before = cnn_cifar10.CNN(widths=(4, 8)).state_dict()
    after = weights("run/last.pt")
    for name in before:  # running statistics of frozen norms, too
        frozen = name.startswith(("body.0.bias", "body.2."))  # body.0.weight has been whitened
        assert torch.equal(after[name], before[name]) == frozen, name
    assert call(*TINY, "--model", "vit", "--freeze", "block") == 2
    assert "blocks" in capsys.readouterr().err
    assert call(*TINY_MLP, "--freeze", "layers", "--freeze", "head") == 2
    assert "nothing to train" in capsys.readouterr().err


def test_freeze_takes_whole_parts_of_names():
    model = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(11)))
    finetune.freeze(model, ["1"])
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["1.weight", "1.bias"]


# ---------------------------------------------------------------------------------------------- files alone

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
    "averaging.py": "from averaging import *; m = torch.nn.Linear(2, 2); Average(m, 0.9).update(m)",
    "early_stopping.py": "from early_stopping import *; assert best_row([dict(epoch=1, val_acc=1.)], 'val_acc')",
    "checkpoints.py": "import checkpoints; checkpoints.save({'a': 1}, 'a.pt'); "
    "checkpoints.load('a.pt', keys={'a': int})",
    "finetune.py": "from finetune import *; m = torch.nn.Linear(2, 2); load_matching(m, m.state_dict()); "
    "freeze(m, ['bias']); train_mode(m)",
    "report.py": "from report import *; m = confusion(torch.tensor([0, 1]), torch.tensor([0, 0]), 2); "
    "assert m.tolist() == [[1, 0], [1, 0]]; draw_confusion(m, ['a', 'b'], 'a.png')",
    "devices.py": "import devices; devices.choose_precision('auto', devices.choose_device('auto'))",
    "outputs.py": "import outputs; a = outputs.claim(None, 'runs/a'); b = outputs.claim(None, 'runs/a'); "
    "assert b[0].name == 'a-2'",
    "ranges.py": "import ranges; assert ranges.flag_name('batch_size') == '--batch-size'",
    "budget.py": "import budget, time; assert 4 < budget.steps_within(0.2, lambda: time.sleep(0.001), 9, []) < 199",
    "processes.py": "import processes; assert processes.count() == 1 and processes.once(lambda: 3) == 3",
    "plot.py": "import plot; r = dict(epoch=1, lr=1, train_loss=1, train_acc=0, val_loss=1, val_acc=0); "
    "plot.draw({'a': [r, r | dict(epoch=2)]}, 'a.png')",
}


WITHOUT_TORCH = ("schedulers.py", "early_stopping.py", "outputs.py", "ranges.py", "plot.py")
FORK = """
import os, sys, torch
for file, code in {alone!r}.items():
    if not (child := os.fork()):
        folder = os.path.abspath(file.removesuffix(".py"))
        os.chdir(folder)
        sys.path.insert(0, folder)
        exec(code, dict(torch=torch))
        sys.stderr.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, file
"""


def test_every_ground_floor_file_runs_alone(tmp_path):
    """Each in an interpreter that knows none of the others; those that need torch share its import."""
    above = {"train.py", "arguments.py", "test_smoke.py", "predict.py", "diagnose.py", "bench.py"}
    assert set(ALONE) == {file.name for file in HERE.glob("*.py")} - above
    for file in ALONE:
        folder = tmp_path / file.removesuffix(".py")
        folder.mkdir()
        shutil.copy(HERE / file, folder)
    for file in WITHOUT_TORCH:
        code = f"import sys; sys.path.insert(0, ''); sys.modules['torch'] = None; {ALONE[file]}"
        done = python("-I", "-c", code, cwd=tmp_path / file.removesuffix(".py"))
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


# ---------------------------------------------------------------------------------------------- README

RESULTS = HERE / "results"


def results_table():
    """The rows of README's table of figures, made from the files that runs wrote."""
    names = {"cifar10-images": "CIFAR-10 as JPEG", "mnist": "MNIST", "shapes": "`shapes`"}
    for path in sorted(RESULTS.glob("runs/*.json")):
        result = json.loads(path.read_text())
        command, acc = result["command"].removeprefix("python "), f"{100 * result['test_acc']:.2f} %"
        if "n" in result:
            acc += f" ± {100 * result['test_acc_std']:.2f}, n = {result['n']}"
        if result["args"]["tta"]:
            acc += ", mean of views"
        file, seconds = f"[{path.stem}](results/runs/{path.name})", result["train_seconds"]
        took = f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"
        yield f"| `{command}` | {names[result['data']]} | {acc} | {took} | {file} |"


def test_figures_of_the_readme_are_those_of_the_result_files():
    text, rows = (HERE / "README.md").read_text(), list(results_table())
    assert rows and all(row in text for row in rows), "README.md should have these rows:\n" + "\n".join(rows)
    assert text.count("](results/runs/") == len(rows)


def speed_table():
    """The rows of README's table of speeds, made from what bench.py wrote, and the times to an accuracy."""
    for path in sorted(RESULTS.glob("bench-cpu-*.json")):
        for name, one in json.loads(path.read_text()).items():
            if isinstance(one, dict):
                *textbook, ours, _ = one["images_per_second"].values()
                rate, share = one["flops_per_second"] / 1e9, one["flops_per_second"] / one["matrix_flops_per_second"]
                row = f"| `{name}` | {max(textbook):,.0f} | {ours:,.0f} | {one['b_over_a']:.1f} | {one['b_over_c']:.2f}"
                row += f" | {rate:,.0f} GFLOP/s, {share:.0%} | {one['peak_memory_mb']:,.0f} MB |"
                yield row
    for name, one in json.loads((RESULTS / "until-cpu.json").read_text())["until"].items():
        yield f"| {name} | {one['epochs']} | {one['seconds']:.1f} s |"


def test_speeds_of_the_readme_are_those_of_bench():
    text, rows = (HERE / "README.md").read_text(), list(speed_table())
    assert len(rows) == 6 and all(row in text for row in rows), "README.md should have these rows:\n" + "\n".join(rows)


def test_figures_of_the_comparisons_are_those_of_the_result_files():
    spec = importlib.util.spec_from_file_location("compare", RESULTS / "compare.py")
    spec.loader.exec_module(compare := importlib.util.module_from_spec(spec))
    text = (RESULTS / "COMPARISONS.md").read_text()
    for name in compare.SETS:
        rows = list(compare.table(name))
        assert rows and "\n".join(rows) in text, f"COMPARISONS.md should have for {name}:\n" + "\n".join(rows)
