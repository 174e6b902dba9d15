"""Tests: tricks."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import HERE, TINY_MLP, assert_same_run, call, halt, python, same, weights, write_folder
from PIL import Image

import train
from utils import budget, checkpoints, ema, errors, models, run_folder


@pytest.mark.parametrize(
    "flags", ["--ema 0.9", "--mixup 1 --cutmix 1 --augment strong --reprob 0.5", "--loss mse+cosine"]
)
def test_resuming_with_tricks_is_bitwise_identical(flags, tiny, monkeypatch):
    flags = [*TINY_MLP, "--epochs", 4, *flags.split()]
    assert call(*flags, "--out", "straight") == 0
    with monkeypatch.context() as patch:
        halt(patch, 5)
        assert call(*flags, "--out", "halted") == 130
    assert call("--resume", "halted/last.pt") == 0
    assert_same_run("straight", "halted")


def test_the_ema_is_validated_and_kept(tiny, monkeypatch):
    averages = []
    real = ema.Ema.update

    def update(self, model):
        real(self, model)
        averages.append({k: v.clone() for k, v in self.model.state_dict().items()})

    monkeypatch.setattr(ema.Ema, "update", update)
    assert call(*TINY_MLP, "--epochs", 2, "--ema", 0.9, "--val-split", 0, "--out", "run") == 0
    assert same(dict(weights("run/best.pt")), averages[-1]) and len(averages) == 6
    last = checkpoints.load("run/last.pt")
    assert same(dict(last["state_dict"]), averages[-1]) and not same(dict(last["ema"]["trained"]), averages[-1])


def test_the_teacher_stays_as_it_is_and_is_followed(tiny, monkeypatch, capsys):
    assert call(*TINY_MLP, "--epochs", 3, "--out", "teacher") == 0
    before, seen = Path("teacher/best.pt").read_bytes(), []
    real = models.rebuild

    def rebuild(*args):
        model = real(*args)
        seen.append((model, {k: v.clone() for k, v in model.state_dict().items()}))
        return model

    with monkeypatch.context() as patch:
        patch.setattr(models, "rebuild", rebuild)
        assert call(*TINY_MLP, "--epochs", 2, "--teacher", "teacher/best.pt", "--distill", 1, "--out", "pupil") == 0
    _, (teacher, start) = seen  # the first is the pupil's, tried before training
    assert not teacher.training and same(start, dict(teacher.state_dict()))
    assert Path("teacher/best.pt").read_bytes() == before
    write_folder(tiny / "pets", (32, 32))
    assert call(*TINY_MLP, "--data", "pets", "--teacher", "teacher/best.pt") == 2
    assert "other classes" in capsys.readouterr().err


def test_tta_is_labelled_wherever_the_number_stands(tiny, capsys):
    assert call(*TINY_MLP, "--tta", "--out", "run") == 0
    assert "with TTA" in capsys.readouterr().out
    result = json.loads(Path("run/result.json").read_text())
    assert result["args"]["tta"] is True
    assert call("--eval", "run/best.pt") == 0
    said = capsys.readouterr().out
    assert "with TTA" in said and f"{result['test_acc']:.4f}" in said and f"{result['test_loss']:.4f}" in said


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


@pytest.mark.parametrize("seconds", [1.25, 1.5, 2.0, 2.13, 9.9])
def test_the_steps_of_minutes_leave_time_for_what_comes_after_an_epoch(seconds, monkeypatch):
    """On a clock on which a step takes 10 ms, and validation after 100 of them, or after the last, 0.2 s."""
    clock = [0.0]

    def takes(duration):
        clock[0] += duration

    monkeypatch.setattr(budget, "now", lambda: clock[0])
    monkeypatch.setattr(budget.time, "perf_counter", lambda: 0.0)  # the measuring itself apart
    steps = budget.steps_within(seconds, lambda: takes(0.01), 100, [(lambda: takes(0.1), 2.0)])
    needed = 0.01 * steps + 0.2 * -(-steps // 100)
    assert seconds - 0.25 < needed < seconds + 1e-6


@pytest.mark.slow
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
    assert 0.7 * 4.8 < time.perf_counter() - start < 1.6 * 4.8
    result = json.loads(Path("timed/result.json").read_text())
    assert result["stopped"] == "time budget" and result["args"]["warmup_epochs"] <= result["args"]["epochs"] / 5
    steps = checkpoints.load("timed/last.pt")["step"]
    assert steps == round(result["args"]["epochs"] * 16) > 100
    rows = list(csv.DictReader(Path("timed/metrics.csv").open()))
    assert float(rows[-1]["lr"]) < 1e-3 * 0.002
    monkeypatch.setattr(train, "backward", real)
    assert call(*flags, "--epochs", result["args"]["epochs"], "--batch-size", 8, "--out", "replay") == 0
    assert same(dict(weights("timed/last.pt")), dict(weights("replay/last.pt")))


@pytest.mark.slow
def test_sigterm_saves(tmp_path):
    command = [sys.executable, HERE / "train.py", *TINY_MLP, "--epochs", "500", "--out", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith("epoch"):
                process.send_signal(signal.SIGTERM)
                break
        assert "--resume run/last.pt" in process.stdout.read()
        assert process.wait(timeout=60) == 143
    finally:
        process.kill()
    assert checkpoints.load(tmp_path / "run" / "last.pt", keys=checkpoints.RESUME_KEYS)["step"] > 0


def test_the_signal_after_the_first_one_ends_the_process_at_once():
    with errors.caught_signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        assert {signal.getsignal(number) for number in errors.ending_signals()} == {signal.SIG_DFL}


@pytest.mark.slow
def test_two_signals_at_once_leave_whole_files(tmp_path):
    command = [sys.executable, HERE / "train.py", *TINY_MLP, "--epochs", "500", "--out", "run", "--save-every", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith("epoch"):
                process.send_signal(signal.SIGSTOP)  # so that both wait for it together
                process.send_signal(signal.SIGINT)
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGCONT)
                break
        process.stdout.read()
        assert process.wait(timeout=60) in (-signal.SIGTERM, -signal.SIGINT, 130, 143)
    finally:
        process.kill()
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
        assert ">= 2" in capsys.readouterr().err and not Path("run").exists()
    for i, flags in enumerate(("--batch-size 8 --accum 8", "--limit 99 --batch-size 4 --accum 2")):
        assert call(*TINY_MLP, *flags.split(), "--out", f"run-{i}") == 0
    assert call(*TINY_MLP, "--batch-size", 1, "--no-batch-norm", "--limit", 3, "--out", "run") == 0


def test_runs_in_part(tiny, monkeypatch, capsys):
    assert call(*TINY_MLP, "--runs", 2, "--data", "nowhere", "--out", "many") == 2 and not Path("many").exists()
    assert call(*TINY_MLP, "--runs", 2, "--hidden", 10**13, "--out", "many") == 2 and not Path("many").exists()
    real, calls = train.backward, []

    def backward(run, images, *rest):
        calls.append(1)
        return real(run, images * math.nan if len(calls) == 5 else images, *rest)

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
    held = run_folder.open_folder("run", "run", going_on=True)  # as a run that is alive has it
    with open("run/log.txt", "a") as log:
        before = log.tell()
        for flags in (["--resume", "run/last.pt", "--epochs", 2], [*TINY_MLP, "--out", "run"]):
            assert call(*flags) == 2
            assert "alive" in capsys.readouterr().err
        assert log.seek(0, 2) == before
    held.close()
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
    folder = run_folder.open_folder("run", "run", going_on=True)  # as a run that is alive has it
    os.rename("run/log.txt", "run/log.txt.1")
    assert call("--resume", "run/last.pt", "--epochs", 2) == 2
    assert "alive" in capsys.readouterr().err
    folder.close()


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


@pytest.mark.slow
def test_a_file_limit_is_met_in_a_real_process(tmp_path):
    """The system itself refuses to write more than 100 kB; the checkpoint has twice as much."""
    code = "import resource, sys, train; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    done = python("-c", code + f"sys.exit(train.main({[*TINY_MLP, '--out', str(tmp_path / 'run')]}))", cwd=HERE)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "too large" in done.stderr, done.stderr
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"log.txt"}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_is_one_line(error, tiny, monkeypatch, capsys):
    def backward(*args):
        raise error

    monkeypatch.setattr(train, "backward", backward)
    assert call(*TINY_MLP) == 1
    said = capsys.readouterr().err
    assert "--batch-size 64 runs out of memory: " in said and "--accum" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--lr", "1e30"], ["--lr", "1e30", "--opt", "sgd", "--clip-grad", "1e38"]])
def test_a_loss_that_is_not_finite_ends_the_run(flags, tiny, capsys):
    assert call(*TINY_MLP, "--epochs", 5, "--warmup-epochs", 0, "--out", "run", *flags) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert "loss is" in said and "step" in said and "learning rate" in said and "lower --lr" in said
    assert json.loads(Path("run/result.json").read_text())["stopped"] == "non-finite loss"


@pytest.mark.parametrize("more", [[], ["--log-interval", 1], ["--save-every", 1]])
def test_a_loss_that_is_not_finite_keeps_what_was_good(more, tiny, monkeypatch, capsys):
    real, calls = train.backward, []

    def backward(run, images, *rest):
        calls.append(1)
        return real(run, images * math.nan if len(calls) == 5 else images, *rest)

    monkeypatch.setattr(train, "backward", backward)
    assert call(*TINY_MLP, "--batch-size", 32, "--epochs", 3, "--out", "run", *more) == 1
    assert f"the training loss is nan by step {5 if more else 8}, learning rate" in capsys.readouterr().out
    assert len(calls) == (5 if more else 8)  # within one report
    assert checkpoints.load("run/best.pt")["epoch"] == 1  # load refuses weights that are not finite
    assert checkpoints.load("run/last.pt")["epoch"] == 1


@pytest.mark.slow
def test_models_learn_on_shapes_from_the_command_line(tmp_path):
    """End to end, in a fresh interpreter, on the real embedded set; the bar is above a linear model's 0.46."""
    done = python(
        HERE / "train.py", "--model", "mlp", "--data", "shapes", "--hidden", "512,512", "--epochs", 10, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "mlp-shapes-adamw-cosine"
    assert json.loads((out / "result.json").read_text())["test_acc"] > 0.6
    assert Image.open(out / "curves.png").width > 600


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(file):
        calls.append("folder" if os.path.samestat(os.fstat(file), os.stat(tmp_path)) else "file")
        fsync(file)

    def replaced(*names):
        calls.append("replace")
        replace(*names)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    checkpoints.write(b"x", tmp_path / "a.pt")
    assert calls == ["file", "replace", "folder"]


def test_a_file_that_another_program_reads_is_replaced_a_little_later(tmp_path, monkeypatch):
    waited, replace = [], os.replace

    def denied_twice(*names):
        if len(waited) < 2:
            raise PermissionError("[WinError 5] Access is denied")
        replace(*names)

    monkeypatch.setattr(os, "replace", denied_twice)
    monkeypatch.setattr(checkpoints.time, "sleep", waited.append)
    checkpoints.write(b"x", tmp_path / "a.pt")
    assert waited == [0.1, 0.5] and [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_failed_save_leaves_no_view_of_its_memory(tmp_path, monkeypatch):
    """Python 3.13 would complain of it on standard error."""
    views = []

    def write(content, path):
        views.append(content)
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints, "write", write)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save({"a": torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="released"):
        views[0].tobytes()
