"""The tests: offline, on the CPU, in about a minute.   pytest test_smoke.py"""

import csv
import gzip
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import repeat
from PIL import Image

import checkpoints
import cnn_cifar10
import data as datasets
import diagnose
import early_stopping
import mlp_mnist
import optimizers
import outputs
import plot
import schedulers
import train
import vit

HERE = Path(__file__).parent
VIT = dict(image_size=32, patch_size=4, num_classes=10, dim=32, depth=2, heads=2, mlp_dim=64)


def models():
    return {
        "mlp": mlp_mnist.MLP(),
        "mlp of the articles": mlp_mnist.MLP(hidden=(256, 128, 64), batch_norm=False),
        "cnn": cnn_cifar10.CNN(widths=(16, 32, 32)),
        "cnn plain": cnn_cifar10.CNN(arch="plain"),
        "vit mean": vit.ViT(**VIT, pool="mean"),
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
    monkeypatch.setattr(plot, "draw", lambda runs, path: Path(path).write_bytes(b"picture"))
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
    if not (isinstance(model, cnn_cifar10.CNN) and model.model_args["arch"] == "plain"):  # has torch's own start
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
    assert count(cnn_cifar10.CNN()) == 1_973_186
    args = train.parse_args(["--model", "vit"])[0]
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
    env = os.environ | dict(CUDA_VISIBLE_DEVICES="", MPLBACKEND="Agg")
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
        assert call(*TINY_MLP, "--opt", opt, "--sched", sched, "--out", out, "--epochs", 1) == 0
        state = checkpoints.load(out / "last.pt")
        assert state["step"] == 2
        assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())


@pytest.mark.parametrize("opt", optimizers.OPTIMIZERS)
def test_every_optimizer_learns_at_its_own_rate(opt):
    """Each one lowers a simple loss at the rate that it gets when nobody says another."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 3)
    images, labels = torch.randn(64, 8), torch.arange(64) % 3
    labels = (images[:, :3] + images[:, 3:6]).argmax(1)
    args = train.parse_args(["--opt", opt])[0]
    optimizer = train.make_optimizer(args, model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    for step in range(250):

        def gradient():
            return train.backward(model, images, labels, args, "fp32", scaler, optimizer)

        if opt == "lbfgs":
            losses.append(train.step_with_closure(optimizer, gradient, step)[0].item())
        else:
            losses.append(gradient()[0].item())
            optimizer.step()
    assert losses[-1] < 0.93 * losses[0], losses[::30]


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


def test_pieces_add_up_to_the_batch():
    model = mlp_mnist.MLP(hidden=(16,), batch_norm=False, dropout=0)
    images, labels = images_for(model, 23), torch.arange(23) % 10
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    gradients, results = [], []
    for accum in (1, 4):
        args = train.parse_args(["--accum", str(accum), "--smoothing", "0.1"])[0]
        results.append(train.backward(model, images, labels, args, "fp32", scaler, optimizer))
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
    assert torch.equal(datasets.crop_and_flip(place, 0, False, datasets.seeded(0)), place)
    flipped = datasets.crop_and_flip(place, 0, True, datasets.seeded(0))
    mirrored = (flipped != place).flatten(1).any(1)
    assert torch.equal(flipped[mirrored], place[mirrored].flip(3)) and 200 < mirrored.sum() < 300
    padded = F.pad(place.float(), (3, 3, 3, 3), mode="reflect").byte()
    windows = {padded[0, 0, y : y + 8, x : x + 8].numpy().tobytes() for y in range(7) for x in range(7)}
    crops = datasets.crop_and_flip(place, 3, False, datasets.seeded(0))
    assert torch.equal(crops[:, 0], crops[:, 1])
    assert {crop.numpy().tobytes() for crop in crops[:, 0]} == windows  # nothing else, and each of the 49


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
    assert datasets.bounds(9, 4) == [(0, 4), (4, 9)]
    assert datasets.bounds(10, 4) == [(0, 4), (4, 8), (8, 10)]
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
        import socket

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
    result = json.loads(Path("runs/cnn-shapes-sgd-onecycle/result.json").read_text())
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

    def evaluate(model, part, *rest):
        if len(part[1]) == 14:
            return 1.0, next(values)
        return real(model, part, *rest)

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
    acc = [json.loads(Path(f"{name}/result.json").read_text())["test_acc"] for name in ("clean", "poisoned")]
    assert acc[0] != acc[1]


def test_the_test_set_is_read_once_with_the_best_weights(tiny, monkeypatch):
    read, real = [], train.evaluate

    def evaluate(model, part, *rest):
        if len(part[1]) == 40:
            read.append({k: v.clone() for k, v in model.state_dict().items()})
        return real(model, part, *rest)

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


@pytest.mark.parametrize("opt, sched", [("adamw", "cosine"), ("sgd", "plateau"), ("lbfgs", "restarts")])
def test_resuming_gives_the_same_bits(opt, sched, tiny, monkeypatch):
    flags = [*TINY_MLP, "--epochs", 4, "--opt", opt, "--sched", sched]
    assert call(*flags, "--out", "straight") == 0
    real, calls = train.backward, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:  # inside the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(train, "backward", interrupted)
    assert call(*flags, "--out", "halted") == 130
    result = json.loads(Path("halted/result.json").read_text())
    assert result["stopped"] == "interrupted" and result["test_acc"] is None
    assert call("--resume", "halted/last.pt") == 0
    a, b = (checkpoints.load(f"{name}/last.pt") for name in ("straight", "halted"))
    assert same(without_times(a), without_times(b))
    assert same(dict(weights("straight/best.pt")), dict(weights("halted/best.pt")))


def test_resume_refuses_another_run(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    assert call("--resume", "run/last.pt", "--lr", 0.5) == 2
    assert "--lr 0.5" in capsys.readouterr().err
    assert call("--resume", "run/last.pt", "--epochs", 2, "--batch-size", 64) == 0
    assert checkpoints.load("run/last.pt")["step"] == 4


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


@pytest.mark.parametrize("flags", [["--lr", "1e30"], ["--lr", "1e30", "--opt", "sgd", "--clip-grad", "1e38"]])
def test_a_loss_that_is_not_finite_ends_the_run(flags, tiny, capsys):
    assert call(*TINY_MLP, "--epochs", 5, "--warmup-epochs", 0, "--out", "run", *flags) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert "at step" in said and "learning rate" in said and "lower --lr" in said
    assert json.loads(Path("run/result.json").read_text())["stopped"] == "non-finite loss"


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
    "--model resnet", "--opt adamax", "--sched cosinus", "--loss ce", "--data nowhere", "--epochs 0", "--epochs nan",
    "--epochs -1", "--lr -0.1", "--lr 0", "--lr inf", "--batch-size 0", "--batch-size 1.5", "--accum 0", "--accum 65",
    "--seed -1", "--device tpu", "--device cuda:99", "--amp fp8", "--val-split -0.1", "--val-split 0.5.5",
    "--val-split 126.5", "--val-split 140", "--limit 0", "--limit 1000", "--crop-pad -1", "--crop-pad 32",
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
        flag = [w for w in wrong.split() if w.startswith("--")][-1].removeprefix("--").replace("wd", "weight-decay")
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
    "min_delta": ("--epochs 6 --monitor val_loss", "--min-delta 0.5", "best"),
    "opt": ("--lr 0.01", "--opt sgd", "weights"),
    "lr": ("", "--lr 0.01", "weights"),
    "weight_decay": ("", "--weight-decay 9", "weights"),
    "decay_all": ("--wd 9", "--decay-all", "weights"),
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
}


def test_no_dead_flag(tiny, capsys):
    """Every flag of every model is in the table above, and changes there what it says."""
    flags = {dest for name in train.MODELS for dest in vars(train.make_parser(name).parse_args([]))}
    assert flags == set(EFFECTS)
    write_folder(tiny / "pets", (16, 16), train_count=70)
    base = "--model mlp --hidden 16 --data shapes --epochs 1 --batch-size 64"
    small_vit = "--model vit --patch-size 16 --dim 16 --depth 1 --heads 2 --mlp-dim 16"
    ran = {}

    def observe(line):
        if line not in ran:
            shutil.rmtree("runs", ignore_errors=True)
            words = line.split()
            if "--model cnn" in line or "--model vit" in line:
                words = [w for i, w in enumerate(words) if w != "--hidden" and words[i - 1] != "--hidden"]
            status = call(*words)
            (out,) = Path("runs").glob("*") if Path("runs").exists() else ("",)
            seen = dict(
                status=status, log=len(capsys.readouterr().out.splitlines()), folder=sorted(map(str, Path().rglob("*")))
            )
            if out:
                seen |= dict(weights=dict(weights(out / "last.pt")), best=checkpoints.load(out / "best.pt")["epoch"])
            ran[line] = seen
        return ran[line]

    for dest, (both, second, what) in EFFECTS.items():
        both = f"{base} {both}".replace("{vit}", small_vit)
        a, b = observe(both).get(what), observe(f"{both} {second}").get(what)
        assert a is not None and not same(a, b), dest


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
     "--opt adamax", "--data nowhere"],
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
    "early_stopping.py": "from early_stopping import *; assert best_row([dict(epoch=1, val_acc=1.)], 'val_acc')",
    "checkpoints.py": "import checkpoints; checkpoints.save({'a': 1}, 'a.pt'); checkpoints.load('a.pt', keys={'a'})",
    "devices.py": "import devices; devices.choose_precision('auto', devices.choose_device('auto'))",
    "outputs.py": "import outputs; outputs.claim(None, 'runs/a'); assert outputs.claim(None, 'runs/a').name == 'a-2'",
    "plot.py": "import plot; r = dict(epoch=1, lr=1, train_loss=1, train_acc=0, val_loss=1, val_acc=0); "
    "plot.draw({'a': [r, r | dict(epoch=2)]}, 'a.png')",
}


def test_every_ground_floor_file_runs_alone(tmp_path):
    above = {"train.py", "test_smoke.py", "predict.py", "diagnose.py", "bench.py"}
    assert set(ALONE) == {file.name for file in HERE.glob("*.py")} - above
    running = {}
    for file, code in ALONE.items():
        folder = tmp_path / file.removesuffix(".py")
        folder.mkdir()
        shutil.copy(HERE / file, folder)
        start = f"import sys; sys.path.insert(0, {str(folder)!r}); import torch; "
        running[file] = subprocess.Popen(
            [sys.executable, "-I", "-c", start + code], cwd=folder, stderr=subprocess.PIPE, text=True
        )
    for file, process in running.items():
        assert process.communicate(timeout=120)[1] == "" and process.returncode == 0, file


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
