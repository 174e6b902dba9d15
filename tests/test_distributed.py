"""Tests: distributed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import HERE, TINY_MLP, Killed, assert_same_run, call, halt, python

import data as datasets
from utils import arguments, build, checkpoints, distributed, errors, evaluation, models


def torchrun(count, *argv, cwd, restarts=0):
    options = ["--nproc_per_node", count, "--max-restarts", restarts, "--monitor-interval", 0.1]
    return python("-m", "torch.distributed.run", *options, *argv, cwd=cwd)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_processes_follow_the_run_of_one(count, tmp_path):
    # The last batch has one image: fewer than there are processes.
    flags = "--hidden 32 --no-batch-norm --dropout 0 --data shapes --epochs 2 --limit 301 --val-split 501"
    flags = [*flags.split(), *"--batch-size 100 --amp off --device cpu --clip-grad 1 --out".split()]
    assert python(HERE / "train.py", *flags, "one", cwd=tmp_path).returncode == 0
    done = torchrun(count, HERE / "train.py", *flags, "many", "--accum", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("epoch ")]) == 2
    one, many = (checkpoints.load(tmp_path / run / "last.pt", keys=checkpoints.RESUME_KEYS) for run in ("one", "many"))
    assert one["step"] == many["step"] == 8
    for a, b in zip(one["history"], many["history"], strict=True):
        assert a["val_acc"] == b["val_acc"] and a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-5)
        assert a["train_acc"] == b["train_acc"] and a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
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
    loss, acc = evaluation.evaluate(models.rebuild(best), part, data, torch.device("cpu"), "fp32")
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
from utils import distributed
import train
real, calls = train.backward, []
def backward(*args):
    calls.append(1)
    if distributed.rank() == 1 and len(calls) == 25 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
train.backward = backward
sys.exit(train.main())
"""


TWO = "--hidden 32 --data shapes --limit 1000 --batch-size 100 --epochs 4 --save-every 4 --device cpu --out run".split()


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_process_that_dies_ends_the_run_or_starts_it_anew(restarts, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    done = torchrun(2, "dying.py", *TWO, cwd=tmp_path, restarts=restarts)
    assert "train.py: error: process 0 stops" in done.stderr
    last = checkpoints.load(tmp_path / "run" / "last.pt", keys=checkpoints.RESUME_KEYS)
    assert (done.returncode == 0) == bool(restarts) and last["epoch"] == (4 if restarts else 2)
    assert last["step"] == (40 if restarts else 24)  # inside an epoch, where the totals aren't zero
    if restarts:
        straight = torchrun(2, HERE / "train.py", *TWO[:-1], "straight", cwd=tmp_path)
        assert straight.returncode == 0
        assert_same_run(tmp_path / "straight", tmp_path / "run")


@pytest.mark.slow
def test_a_process_that_is_stopped_ends_the_run(tmp_path):
    stopping = DYING.replace("SIGKILL", "SIGSTOP")
    soon = "import datetime\ndistributed.TIME_LIMIT = datetime.timedelta(seconds=5)\nimport train"
    (tmp_path / "stopping.py").write_text(stopping.replace("import train", soon, 1))
    done = torchrun(2, "stopping.py", *TWO, cwd=tmp_path)  # 30 s of it are torchrun's, before it kills what is stopped
    assert done.returncode
    assert "train.py: error: process 0 stops: another one was silent for 0:00:05" in done.stderr


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
    try:
        said = "".join(agent.communicate(timeout=240)[1] for agent in agents)
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "process 0 stops" in said
    assert checkpoints.load(tmp_path / "run" / "last.pt", keys=checkpoints.RESUME_KEYS)["epoch"] == 4


def test_a_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"^device mps is for one process, not 2: use --device cpu$"):
        distributed.local_device(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name, value in dict(LOCAL_RANK=1, LOCAL_WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    assert distributed.local_device(torch.device("cuda")) == torch.device("cuda", 1)
    assert distributed.local_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--nproc_per_node 3 must be at most 2"):  # in all of them: the first says it
        distributed.local_device(torch.device("cuda"))


def test_a_run_for_minutes_is_started_anew(tiny, monkeypatch):
    flags = [word for word in TINY_MLP if word not in ("--epochs", "1")]
    flags += ["--minutes", 0.01, "--out", "run"]
    assert call(*flags) == 0
    assert call(*flags, "--resume", "run/last.pt") == 2
    monkeypatch.setattr(distributed, "restarted", lambda: True)
    assert call(*flags) == 2  # it has ended: torchrun found the folder taken, and tries again
    Path("run/result.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(arguments, "typed", lambda: "python train.py --another run")
        assert call(*flags) == 2
    assert call(*flags) == 0


@pytest.mark.parametrize("more", [[], ["--resume", "first/last.pt"]])
def test_a_run_that_was_interrupted_or_moved_is_started_anew(more, tiny, monkeypatch):
    """A signal to one of the workers ends all: torchrun starts them anew."""
    flags = [*(more or TINY_MLP), "--epochs", 3, "--out", "run"]
    assert call(*TINY_MLP, "--out", "first") == 0
    with monkeypatch.context() as patch:
        halt(patch, 4)
        assert call(*flags) == 130
    assert json.loads(Path("run/result.json").read_text())["stopped"] == "interrupted"
    monkeypatch.setattr(distributed, "restarted", lambda: True)
    assert call(*flags) == 0
    assert checkpoints.load("run/last.pt")["epoch"] == 3


def test_a_moved_run_that_dies_in_its_first_epoch_is_started_anew(tiny, monkeypatch):
    assert call(*TINY_MLP, "--out", "first") == 0
    flags = ["--resume", "first/last.pt", "--epochs", 3, "--out", "run"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        halt(patch, 1, killed=True)
        call(*flags)
    monkeypatch.setattr(distributed, "restarted", lambda: True)
    assert call(*flags) == 0
    assert checkpoints.load("run/last.pt")["epoch"] == 3


def test_processes_that_differ_in_precision_are_rejected(tiny, monkeypatch, capsys):
    """The gradients of one in fp16 are scaled, those of another aren't."""
    monkeypatch.setattr(distributed, "all_gather", lambda value: [value, "fp16"])
    assert call(*TINY_MLP, "--amp", "bf16", "--out", "run") == 2
    assert "amp is bf16 and fp16 in different processes" in capsys.readouterr().err


def test_a_lost_process_is_not_the_fault_of_a_checkpoint():
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(RuntimeError, match="closed by peer"), checkpoints.blaming("run/last.pt"):
        raise lost


def test_in_a_group_a_mistake_keeps_its_place(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert "test_distributed.py:" in errors.unforeseen(caught.value)
    assert "stops" in errors.unforeseen(RuntimeError("Connection closed by peer"))


def test_other_batches_with_another_number_of_processes_are_rejected(tiny, monkeypatch, capsys):
    """A last batch of 3 images is one of two processes with batch norm only if it joins the one before."""
    flags = ["--model", "mlp", "--hidden", 8, "--data", "shapes", "--limit", 103, "--batch-size", 50, "--device", "cpu"]
    assert call(*flags, "--epochs", 1, "--out", "run") == 0
    content = checkpoints.load("run/last.pt", keys=checkpoints.RESUME_KEYS)
    assert content["step"] == 3
    checkpoints.save(content | {"rng": content["rng"] * 2}, "run/last.pt")
    capsys.readouterr()
    assert call("--resume", "run/last.pt", "--epochs", 2) == 2
    assert "with 2 processes its epochs had other batches" in capsys.readouterr().err


def test_processes_with_other_images_are_rejected(tiny, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "on_local_main", lambda function: function())
    monkeypatch.setattr(distributed, "all_gather", lambda value: [value, (value[0], value[1] + 1)])
    with pytest.raises(ValueError, match="data shapes isn't the same in all processes"):
        build.load_data(arguments.parse(TINY_MLP)[0])


def test_what_is_wrong_in_one_process_alone_is_said_there(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: None)

    def command():
        raise ValueError("no teacher here")

    assert errors.exit_status("train.py", command) == 2
    assert capsys.readouterr().err == "train.py: error: process 1: no teacher here\n"


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


@pytest.mark.parametrize(
    "error", [ValueError("wrong"), OSError("no space"), KeyError("unforeseen"), RuntimeError("odd")]
)
def test_whatever_fails_in_one_process_is_handed_to_all(error):
    def fails():
        raise error

    result, handed = distributed._outcome(fails)
    assert result is None and isinstance(handed, (ValueError, OSError)) and error.args[0] in str(handed)


@pytest.mark.parametrize(
    "name, value, wanted",
    [
        ("RANK", "5", "from 0 to 1"),
        ("RANK", "-1", "from 0 to 1"),
        ("WORLD_SIZE", "two", "from 1 to 100000"),
        ("MASTER_PORT", "999999", "from 0 to 65535"),
        ("LOCAL_RANK", "2", "from 0 to 1"),
        ("TORCHELASTIC_RESTART_COUNT", "x", "from 0 to"),
    ],
)
def test_an_odd_environment_is_one_line(name, value, wanted, monkeypatch):
    known = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for key, setting in {**known, name: value}.items():
        monkeypatch.setenv(key, setting)
    with pytest.raises(ValueError, match=f"^{name} {value} must be {wanted}"):
        distributed.init()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_waits_for_the_others_can_be_ended(number, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = subprocess.Popen([sys.executable, HERE / "train.py"], env=env, cwd=tmp_path, stderr=subprocess.PIPE)
    try:
        for _ in range(600):  # until it listens
            time.sleep(0.1)
            with socket.socket() as caller:
                if caller.connect_ex(("127.0.0.1", port)) == 0:
                    break
        else:
            pytest.fail("it never listened")
        time.sleep(0.5)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -number and said == b""


def test_a_process_may_have_other_seconds_in_its_history_than_process_0(tiny, monkeypatch):
    real = distributed.on_main

    def on_main(function):
        result = real(function)
        if isinstance(result, dict) and "metrics" in result:  # best.pt, as process 0 has loaded it
            result["metrics"]["seconds"] += 1.0
        return result

    monkeypatch.setattr(distributed, "on_main", on_main)
    assert call(*TINY_MLP, "--out", "run") == 0
