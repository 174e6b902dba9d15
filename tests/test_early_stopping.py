"""Tests: early stopping."""

import json
import math
from pathlib import Path

import pytest
from conftest import TINY, TINY_MLP, call, rows, same, scripted, weights

import data as datasets
import early_stopping
from utils import checkpoints, evaluation


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
    assert ("no better val_acc" in said and "--sched cosine was not reached" in said) == (epochs < 10)


def test_a_cosine_that_climbs_back_has_no_low_end_to_reach(tiny, monkeypatch, capsys):
    scripted(monkeypatch, [0.4] + [0.3] * 9)
    assert call(*TINY_MLP, "--epochs", 10, "--t-max", 2, "--warmup-epochs", 0, "--patience", 4, "--out", "run") == 0
    said = capsys.readouterr().out
    assert "no better val_acc" in said and "was not reached" not in said


@pytest.mark.parametrize("model", ["--hidden 16", "--model cnn --widths 4,8 --tta"])
def test_a_poisoned_test_set_changes_no_training(model, tiny, monkeypatch):
    real, flags = datasets.shapes, [*TINY, *model.split(), "--epochs", 3]
    assert call(*flags, "--out", "clean") == 0

    def poisoned():
        data = real()
        data.test = datasets.Split(255 - data.test.images, (data.test.labels + 1) % 10)
        return data

    monkeypatch.setattr(datasets, "shapes", poisoned)
    assert call(*flags, "--out", "poisoned") == 0
    clean, poisoned = (checkpoints.load(f"{name}/last.pt") for name in ("clean", "poisoned"))
    untimed = [k for k in checkpoints.COLUMNS if k not in ("seconds", "images_per_second")]
    assert [[r[k] for k in untimed] for r in clean["history"]] == [[r[k] for k in untimed] for r in poisoned["history"]]
    assert same(clean["state_dict"], poisoned["state_dict"]) and same(
        weights("clean/best.pt"), weights("poisoned/best.pt")
    )
    loss = [json.loads(Path(f"{name}/result.json").read_text())["test_loss"] for name in ("clean", "poisoned")]
    assert loss[0] != loss[1]


def test_the_test_set_is_read_once_with_the_best_weights(tiny, monkeypatch):
    scripted(monkeypatch, [0.4, 0.3, 0.2, 0.1, 0.5])
    read, real = [], evaluation.evaluate

    def evaluate(model, split, *rest, **options):
        if len(split.labels) == 40:
            read.append({k: v.clone() for k, v in model.state_dict().items()})
        return real(model, split, *rest, **options)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    assert call(*TINY_MLP, "--epochs", 4, "--out", "run") == 0
    assert len(read) == 1 and same(read[0], dict(weights("run/best.pt")))
    assert checkpoints.load("run/best.pt")["epoch"] == 1
    read.clear()
    assert call(*TINY_MLP, "--no-test", "--out", "closed") == 0 and not read


def test_without_validation_the_last_weights_are_the_result(tiny, capsys):
    assert call(*TINY_MLP, "--epochs", 2, "--val-split", 0, "--out", "run") == 0
    assert "no images were held out" in capsys.readouterr().out
    result = json.loads(Path("run/result.json").read_text())
    assert result["best_epoch"] == 2 and result["best_val_acc"] is None and result["test_acc"] is not None
    assert same(dict(weights("run/best.pt")), dict(weights("run/last.pt")))
    assert call(*TINY_MLP, "--val-split", 0, "--patience", 3) == 2
