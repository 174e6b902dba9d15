"""Tests: plateau."""

import math
import os
import signal

import pytest
import torch
from conftest import TINY_MLP, call, scripted

import data as datasets
import early_stopping
import train
from utils import plateau


def falling(start, end, count=10, noise=0.0, seed=0):
    random = torch.Generator().manual_seed(seed)
    line = torch.linspace(start, end, count) + noise * torch.randn(count, generator=random)
    return line.tolist()


def diagnosed(train_loss, val_loss, lr=0.1, best=1):
    """The verdict on these losses, with the best epoch at `best`."""
    rates = lr if isinstance(lr, list) else [lr] * len(val_loss)
    history = [
        dict(epoch=i + 1, lr=rate, train_loss=t, val_loss=v, val_acc=0.5 - (i + 1 != best) / 10, train_acc=0.5)
        for i, (rate, t, v) in enumerate(zip(rates, train_loss, val_loss, strict=True))
    ]
    row = early_stopping.best_row(history, "val_acc")
    line = plateau.explain(history, row, "val_acc", chance=math.log(10))
    assert row["epoch"] == best and "\n" not in line and f"of epoch {best} in {len(history)} epochs" in line
    found = plateau.verdict(history, row, chance=math.log(10))
    assert plateau.ADVICE[found] in line
    return found


EARLY = falling(2.2, 0.8, 6)  # the epochs before the loss stands still


BLOW_UP = [10.0**i for i in range(8)]


CASES = [
    ("not learning", dict(train_loss=[2.3026] * 8, val_loss=[2.3026] * 8)),
    ("not learning", dict(train_loss=falling(2.303, 2.303, noise=0.002), val_loss=falling(2.303, 2.303, noise=0.002))),
    ("not learning", dict(train_loss=falling(2.30262, 2.30258), val_loss=falling(2.30258, 2.30262))),
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
    ("overfitting", dict(train_loss=falling(5.0, 3.9), val_loss=[2.29] * 10)),  # a teacher's term lies in the first
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
    assert diagnosed(**history) == verdict


def test_every_verdict_has_a_case():
    assert {verdict for verdict, _ in CASES} == set(plateau.ADVICE)


# A real run that provokes each verdict, and the word for it in the run's last line of advice.
STANDSTILLS = [
    ("learns nothing", "--hidden 16 --lr 1e-12 --sched none --epochs 8 --patience 4"),
    ("may be too small", "--hidden 16 --lr 1e-4 --sched none --epochs 8 --patience 6 --min-delta 0.5"),
    ("too high", "--hidden 16 --lr 3 --sched none --epochs 20 --patience 6"),
    ("overfits", "--hidden 256 --dropout 0 --crop-pad 0 --sched none --epochs 40 --patience 8 --monitor val_loss"),
    ("under a hundredth", "--hidden 16 --sched step --step-size 5 --gamma 0.0001 --epochs 40 --patience 10"),
    ("has converged", "--hidden 64 --sched none --epochs 60 --patience 6 --monitor val_loss --min-delta 0.02"),
]


def easy():
    """Ten images, one a class, with a little noise: soon there is nothing left to learn."""
    random = torch.Generator().manual_seed(0)
    images, labels = torch.randint(0, 240, (10, 3, 32, 32), generator=random), torch.arange(700) % 10
    images = (images[labels] + torch.randint(0, 16, (700, 3, 32, 32), generator=random)).to(torch.uint8)
    mean, std = datasets.pixel_stats(images)
    return datasets.Dataset(
        "shapes",
        list("0123456789"),
        mean,
        std,
        datasets.Split(images[:600], labels[:600]),
        datasets.Split(images[600:], labels[600:]),
    )


@pytest.mark.slow  # the reasons are told apart in CASES; these are real runs
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
