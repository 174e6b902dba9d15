"""Tests: schedulers."""

import csv
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import HERE, TINY_MLP, call, python
from PIL import Image

import schedulers
import train

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


def test_fractional_lengths_are_on_time():
    """0.6 // 0.2 is 2, and 0.6 % 0.2 is nearly 0.2."""
    for length in (0.1, 0.2, 0.3, 0.7):
        steps = schedulers.schedule("step", lr=1, epochs=30, step_size=length, gamma=0.5)
        restarts = schedulers.schedule("restarts", lr=1, epochs=30, t_0=length)
        for n in range(1, 30):
            t = round(10 * n * length) / 10
            assert steps(t) == 0.5**n and restarts(t) == pytest.approx(1), (length, n)


def test_milestones_that_are_left_out_are_on_time():
    """At 1/2 and 3/4 of 1.6 - 0.4 epochs, which isn't 1.2 in binary."""
    factor = schedulers.schedule("multistep", lr=1, epochs=1.6, warmup_epochs=0.4)
    assert [round(factor(step / 10), 9) for step in (9, 10, 12, 13)] == [1, 0.1, 0.1, 0.01]


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
        dict(mode="maximum"),
    ],
)  # fmt: skip
def test_schedule_refuses(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} "):
        schedulers.schedule(**dict(sched="cosine", lr=0.1, epochs=12) | wrong)


def test_schedulers_command_line(tmp_path):
    done = python(HERE / "schedulers.py", "--sched", "step", "--lr", 1, "--epochs", 4, "--step-size", 2)
    assert done.stdout.splitlines() == ["epoch,lr", "0,1", "1,1", "2,0.1", "3,0.1", "4,0.01"]
    with open("/dev/full", "w") as full:
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        options = {"stdout": full, "stderr": subprocess.PIPE, "text": True, "env": buffered}
        done = subprocess.run([sys.executable, HERE / "schedulers.py"], **options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "standard output can't be written" in done.stderr
    done = python(HERE / "schedulers.py", "--sched", "all", "--plot", tmp_path / "all.png")
    assert done.returncode == 0 and Image.open(tmp_path / "all.png").width > 600
    for wrong in (["--sched", "all"], ["--plot", "x"], ["--gamma", "7"], ["--epochs", "nan"], ["--sched", "nope"]):
        done = python(HERE / "schedulers.py", *wrong)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_every_step_is_taken_at_the_learning_rate_of_the_schedule(tiny, monkeypatch):
    real, seen = train.train_step, []

    def step(run, *batch):
        seen.append([(group["initial_lr"], group["lr"]) for group in run.optimizer.param_groups])
        return real(run, *batch)

    monkeypatch.setattr(train, "train_step", step)
    assert call(*TINY_MLP, "--hidden", "8,8", "--layer-decay", 0.5, "--epochs", 3, "--warmup-epochs", 0) == 0
    multiplier = schedulers.schedule("cosine", lr=0.002, epochs=3)
    assert sorted({initial for initial, _ in seen[0]}) == pytest.approx([0.0005, 0.001, 0.002]) and len(seen) == 6
    for i, groups in enumerate(seen):
        assert all(lr == pytest.approx(initial * multiplier(i / 2)) for initial, lr in groups)
