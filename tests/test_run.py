"""Tests: run."""

import csv
import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_MLP, Killed, assert_same_run, call, halt, one_line, same, scripted, weights

import data as datasets
import mlp_mnist
import plot
import schedulers
import train
from utils import arguments, build, checkpoints, devices, evaluation


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
        "args", "images",
    }  # fmt: skip
    model = mlp_mnist.MLP(**checkpoint["model_args"])
    model.load_state_dict(checkpoint["state_dict"])
    data = datasets.shapes()
    loss, acc = evaluation.evaluate(model, data.test, data, torch.device("cpu"), result["amp"])
    assert (loss, acc) == (result["test_loss"], result["test_acc"])

    assert call("--eval", out / "best.pt") == 0
    assert capsys.readouterr().out == f"test acc {acc:.4f}  loss {loss:.4f}  (shapes, 40 images)\n"
    assert call(*TINY_MLP) == 0 and (tiny / "runs" / "mlp-shapes-adamw-cosine-2" / "result.json").exists()


def test_a_resumed_run_does_not_say_that_it_reads_the_test_set_once(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    assert "(shapes, 40 images, read once)" in capsys.readouterr().out
    assert call("--resume", "run/last.pt", "--epochs", 2) == 0
    assert "(shapes, 40 images)" in capsys.readouterr().out


def test_a_folder_in_place_of_a_checkpoint_is_told_which_file(tiny, capsys):
    Path("run").mkdir()
    for flag, name in (("--resume", "last.pt"), ("--eval", "best.pt")):
        assert call(flag, "run") == 2
        one_line(capsys, f"run doesn't exist or is no file: expected a checkpoint such as runs/.../{name}")


def test_same_seed_same_bits(tiny):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert call(*TINY_MLP, "--epochs", 2, "--seed", seed, "--out", name) == 0
    assert same(dict(weights("a/last.pt")), dict(weights("b/last.pt")))
    assert not same(dict(weights("a/last.pt")), dict(weights("c/last.pt")))


@pytest.mark.parametrize(
    "flags, steps",
    [
        ("", range(1, 9)),
        ("--opt sgd --sched plateau --dropout 0.5", (3, 4)),
        ("--opt lbfgs --sched restarts", (3, 9)),
        ("--opt muon --hidden 8,8,8", (3,)),
        ("--val-split 0", (2, 5)),  # no validation: its numbers are NaN
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
    with monkeypatch.context() as patch, pytest.raises(Killed):
        halt(patch, 20, killed=True)
        call(*flags, "--out", "killed")
    assert checkpoints.load("killed/last.pt")["step"] == 15
    assert call("--resume", "killed/last.pt") == 0
    assert_same_run("straight", "killed")


def test_a_kill_between_last_and_best_loses_nothing(tiny, monkeypatch):
    assert call(*TINY_MLP, "--epochs", 2, "--out", "straight") == 0
    real = checkpoints.save

    def save(content, path):
        if path.name == "best.pt":
            raise Killed
        real(content, path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoints, "save", save)
        call(*TINY_MLP, "--epochs", 2, "--out", "killed")
    assert call("--resume", "killed/last.pt") == 0
    assert_same_run("straight", "killed")


def test_resuming_elsewhere_and_for_longer(tiny, capsys):
    assert call(*TINY_MLP, "--epochs", 2, "--lr", 0.1, "--out", "run") == 0
    assert call("--resume", "run/last.pt", "--epochs", 3, "--out", "longer") == 0
    assert "--epochs 2.0 -> 3" in Path("longer/log.txt").read_text()
    result = json.loads(Path("longer/result.json").read_text())
    assert result["epochs_run"] == 3 and result["args"]["epochs"] == 3
    stretched = schedulers.schedule("cosine", lr=0.1, epochs=3, warmup_epochs=0.4)
    assert plot.read("longer")[-1]["lr"] == pytest.approx(0.1 * stretched(2.5))  # of the last of six steps
    shutil.move("longer", "moved")  # a folder may be renamed: last.pt's own place counts
    assert call("--resume", "moved/last.pt", "--epochs", 4) == 0
    assert not Path("longer").exists() and checkpoints.load("moved/last.pt")["epoch"] == 4


def test_a_moved_run_takes_its_best_epoch_along(tiny, monkeypatch):
    scripted(monkeypatch, [0.4, 0.3])
    assert call(*TINY_MLP, "--epochs", 2, "--out", "run") == 0
    best = weights("run/best.pt")
    scripted(monkeypatch, [0.2])
    assert call("--resume", "run/last.pt", "--epochs", 3, "--out", "longer") == 0
    assert checkpoints.load("longer/best.pt")["epoch"] == 1 and same(dict(weights("longer/best.pt")), dict(best))
    assert json.loads(Path("longer/result.json").read_text())["best_epoch"] == 1


def test_each_epoch_has_an_order_of_its_own_and_each_seed_its_own(tiny):
    def prepared(seed):
        return train.prepare(arguments.parse([*TINY_MLP, "--batch-size", "20", "--seed", str(seed)])[0])

    def epochs(run):
        n = run.steps_per_epoch
        labels = [y for _, y, _ in itertools.islice(build.training_batches(run, 0), 2 * n)]
        return torch.cat(labels[:n]), torch.cat(labels[n:])

    run = prepared(seed=0)
    first, second = epochs(run)
    assert not torch.equal(first, second) and torch.equal(first.sort()[0], second.sort()[0])
    other_order, _ = epochs(dataclasses.replace(run, args=arguments.changed(run.args, seed=1)))
    assert not torch.equal(first, other_order) and not same(run.val_set, prepared(seed=1).val_set)


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
    more.train = datasets.Split(*(torch.cat((t, t)) for t in more.train))
    monkeypatch.setattr(datasets, "shapes", lambda: more)
    assert call("--resume", "run/last.pt", "--epochs", 2) == 2
    said = capsys.readouterr().err
    assert "not those that it was trained on" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "seconds, on_processor, policy, said",
    [(10, 9, "", False), (10, 4, "", True), (10, 4, "passive", False), (1, 0.4, "", False)],
)
def test_a_shared_machine_is_hinted_at_once(seconds, on_processor, policy, said, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    lines = []
    for device in ("cpu", "cuda"):
        shared = devices.SharedMachineHint(torch.device(device), lines.append)
        shared.tell(seconds, on_processor)
        shared.tell(seconds, on_processor)
    assert len(lines) == said
    assert not said or ("40%" in lines[0] and "OMP_WAIT_POLICY=passive" in lines[0])


def test_a_result_tells_the_arithmetic_of_its_training(tiny):
    """A linear model needs two products a weight forward and two backward: none for the gradient of its input."""
    flags = ["--model", "mlp", "--hidden", "none", "--data", "shapes", "--epochs", 2, "--device", "cpu", "--runs", 2]
    assert call(*flags, "--out", "linear") == 0
    images = 2 * 126  # two epochs of what is not held out
    expected = 4 * 3072 * 10 * images / 1e15
    for path in ("linear/seed-0/result.json", "linear/result.json"):
        assert json.loads(Path(path).read_text())["train_pflops"] == pytest.approx(expected)
    assert call(*flags[:-2], "--teacher", "linear/seed-0/best.pt", "--out", "pupil") == 0  # one product a weight more
    assert json.loads(Path("pupil/result.json").read_text())["train_pflops"] == pytest.approx(1.5 * expected)


def test_every_evaluation_of_a_line_search_is_arithmetic(tiny, monkeypatch):
    flags = ["--model", "mlp", "--hidden", "none", "--data", "shapes", "--epochs", 2, "--device", "cpu"]
    real, seen = train.backward, []

    def backward(run, images, *others):
        seen.append(len(images))
        return real(run, images, *others)

    monkeypatch.setattr(train, "backward", backward)
    assert call(*flags, "--opt", "lbfgs", "--batch-size", 63, "--out", "run") == 0
    assert len(seen) > 2 * 4  # more than once for each of two batches in two epochs
    expected = 4 * 3072 * 10 * sum(seen) / 1e15
    assert json.loads(Path("run/result.json").read_text())["train_pflops"] == pytest.approx(expected)
