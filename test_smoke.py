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
import devices
import early_stopping
import finetune
import mlp_mnist
import optimizers
import outputs
import plot
import predict
import report
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
    "--init nowhere.pt", "--freeze lay", "--model vit --norm-eps 0",
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
    "qkv_bias": ("{vit}", "--qkv-bias", "weights"),
    "norm_eps": ("{vit}", "--norm-eps 0.1", "weights"),
    "init": ("", "--init nowhere.pt", "status"),
    "freeze": ("", "--freeze layers", "weights"),
    "tensorboard": ("", "--tensorboard", "log"),
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
    model = train.rebuild(checkpoint).eval()
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
    model, program = train.rebuild(checkpoints.load(f"{name}.pt")).eval(), torch.export.load("model.pt2").module()
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
    assert (
        call(
            *TINY,
            "--model",
            "cnn",
            "--widths",
            "4,8",
            "--freeze",
            "body.0",
            "--freeze",
            "body.1",
            "--wd",
            1,
            "--out",
            "run",
        )
        == 0
    )
    torch.manual_seed(0)
    before = cnn_cifar10.CNN(widths=(4, 8)).state_dict()
    after = weights("run/last.pt")
    for name in before:  # running statistics of frozen norms, too
        frozen = name.startswith(("body.0.", "body.1."))
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
    "early_stopping.py": "from early_stopping import *; assert best_row([dict(epoch=1, val_acc=1.)], 'val_acc')",
    "checkpoints.py": "import checkpoints; checkpoints.save({'a': 1}, 'a.pt'); checkpoints.load('a.pt', keys={'a'})",
    "finetune.py": "from finetune import *; m = torch.nn.Linear(2, 2); load_matching(m, m.state_dict()); "
    "freeze(m, ['bias']); train_mode(m)",
    "report.py": "from report import *; m = confusion(torch.tensor([0, 1]), torch.tensor([0, 0]), 2); "
    "assert m.tolist() == [[1, 0], [1, 0]]; draw_confusion(m, ['a', 'b'], 'a.png')",
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
