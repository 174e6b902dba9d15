"""Tests: diagnose."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import HERE, TINY_MLP, call, python, same
from PIL import Image

import data as datasets
import diagnose
import train
from utils import build, checkpoints, report

DIAGNOSE = "--model mlp --hidden 64 --data shapes --batch-size 64 --epochs 4 --device cpu".split()


def diagnosed(*argv):
    try:
        return diagnose.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def failed_checks(said):
    return {line[6:28].strip() for line in said.splitlines() if line.startswith("FAIL")}


def plant_in_data(monkeypatch, data, change):
    """Let a set-up see its data after `change`. The test labels are gone: reading them would raise."""
    data = dataclasses.replace(data)
    change(data)
    real = build.load_data

    def load_data(*args):
        loaded, *splits = real(*args)
        loaded.test = datasets.Split(loaded.test.images, None)
        return loaded, *splits

    monkeypatch.setattr(datasets, "shapes", lambda: data)
    monkeypatch.setattr(build, "load_data", load_data)


def plant_in_model(monkeypatch, change):
    real = build.make_model

    def make_model(*args):
        model = real(*args)
        change(model)
        return model

    monkeypatch.setattr(build, "make_model", make_model)


def wrong_constants(data):
    data.mean, data.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def shuffled_labels(data):
    images, labels = data.train
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    data.train = datasets.Split(images, labels[order])


def copies_in_train(data):
    images, labels = data.train
    data.train = datasets.Split(torch.cat([images, images[:50]]), torch.cat([labels, labels[:50]]))


def copies_in_test(data):
    images = torch.cat([data.train.images[:1], data.test.images])
    data.test = datasets.Split(images, torch.cat([data.train.labels[:1], data.test.labels]))


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
        (None, None, "--lr 2", {"learning rate"}),
        (None, dead_model, "", {"overfit a batch", "gradients"}),
        (None, sees_the_batch, "", {"batch independence"}),
        (None, loud_head, "", {"loss at initialisation"}),
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
    outcome = f"{len(found)} of 9 checks failed" if found else "all 9 checks passed"
    assert said.endswith(f"\n{outcome}, on shapes\n")
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
    assert f"weight tensors learn ({frozen} frozen)" in said and "gradients" not in failed_checks(said), said


def test_diagnose_of_few_images_says_that_they_are_few(tiny, capsys):
    assert diagnosed(*TINY_MLP, "--epochs", 2) == 0
    assert "too few to tell" in capsys.readouterr().out


def test_find_lr_leaves_the_weights_alone_and_suggests_a_rate_that_learns(tiny, monkeypatch, middling, capsys):
    monkeypatch.setattr(datasets, "shapes", lambda: middling)
    run = train.prepare(diagnose.parse_args(DIAGNOSE)[0])
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    rates, smooth, suggestion = diagnose.find_lr(run)
    assert same(before, dict(run.model.state_dict()))
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
    args, _ = diagnose.parse_args([*DIAGNOSE, "--opt", "sgd", "--no-batch-norm"])
    rates, smooth, _ = diagnose.find_lr(train.prepare(args))
    assert rates[-1] < 9 and not smooth[-1] < 2 * min(smooth) and all(x < 2 * min(smooth) for x in smooth[:-1])


@pytest.mark.parametrize(
    "wrong",
    ["--find-lr a.jpg", "--find-lr=", "--find-lr nowhere/a.png", "--find-lr --opt lbfgs", "--find", "--eval best.pt",
     "--lr -1", "--opt adamax", "--data nowhere", "--opt muon", "--lr-scale haed=2"],
)  # fmt: skip
def test_diagnose_refuses_in_one_line(wrong, tiny, capsys):
    Path("best.pt").touch()
    assert diagnosed(*DIAGNOSE, *wrong.split()) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "error: " in said and wrong.split()[0].rstrip("=") in said, said


def test_diagnose_command_line(tmp_path, capsys):
    assert diagnosed("--help") == 0
    said = capsys.readouterr().out
    assert "--find-lr" in said and "train.py" in said
    done = python(HERE / "diagnose.py", "--opt", "adamax", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("diagnose.py: error: ")


def test_diagnose_takes_the_flags_of_a_run(tiny, monkeypatch, middling, capsys):
    monkeypatch.setattr(datasets, "shapes", lambda: dataclasses.replace(middling))
    run = "--tta --ema 0.9 --patience 3 --monitor val_loss --runs 3 --log-interval 5".split()
    assert diagnosed(*DIAGNOSE, *run) == 0


def test_diagnose_of_weights_that_know_the_classes(tiny, monkeypatch, middling, capsys):
    monkeypatch.setattr(datasets, "shapes", lambda: dataclasses.replace(middling))
    assert call(*"--model mlp --hidden 128 --data shapes --epochs 20 --batch-size 32 --out run".split()) == 0
    capsys.readouterr()
    diagnosed("--model", "mlp", "--data", "shapes", "--init", "run/best.pt")
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if "before training" in line)
    assert line.startswith("ok") and float(re.search(r"([0-9.]+) before", line)[1]) < 0.8 * math.log(10), line


def test_the_plot_of_find_lr_has_readable_numbers(tiny, monkeypatch):
    figures, save = [], report.save

    def saved(figure, path):
        save(figure, path)
        figures.append(figure)

    monkeypatch.setattr(report, "save", saved)
    assert diagnose.main([*TINY_MLP, "--find-lr", "lr.png"]) == 0
    labels = [label.get_text() for label in figures[0].axes[0].get_xticklabels()]
    assert "0.001" in labels and not any("$" in label for label in labels)
