"""Tests: what a GPU alone can show. They are skipped where there is none."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from conftest import HERE, TINY_MLP, call, images_for, models

import data
import train
from utils import arguments, build, checkpoints, graphs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SMALL = {
    "mlp": "--model mlp --hidden 64 --dropout 0",
    "sgd": "--model mlp --hidden 64 --dropout 0 --opt sgd --amp off --accum 2",
    "dropout": "--model mlp --hidden 64 --dropout 0.5",
    "adam": "--model mlp --hidden 64 --dropout 0 --opt adam --mixup 1 --clip-grad 1",
    "cnn": "--model cnn --widths 16,32,32",
    "vit": "--model vit --dim 32 --depth 2 --heads 2",
    "stem": "--model vit --dim 32 --depth 2 --heads 2 --stem conv --opt muon --cutmix 1 --ema 0.9 --augment strong",
}


@pytest.fixture
def few_images(monkeypatch, middling):
    monkeypatch.setattr(data, "shapes", lambda: dataclasses.replace(middling))


def prepared(flags):
    options = "--data shapes --batch-size 64 --epochs 9 --device cuda --val-split 0"
    return train.prepare(arguments.parse([*flags.split(), *options.split()])[0])


def after_steps(flags, count=50, lines=None):
    """The weights before and after some steps; with `lines`, where its messages go, as a graph."""
    run = prepared(f"{flags} {'--no-cuda-graph' if lines is None else '--cuda-graph'}")
    before = [p.detach().clone() for p in run.model.parameters()]
    take_step = graphs.recorded(train.train_step, run, None if lines is None else lines.append)
    run.model.train()
    for step, batch in enumerate(itertools.islice(build.training_batches(run, 0), count)):
        for group in run.optimizer.param_groups:  # a replay must see what a schedule changes
            group["lr"] = group["initial_lr"] * (1 + step % 5) / 5
        take_step(run, *batch)
        if run.ema:
            run.ema.update(run.model)
    return before, [p.detach() for p in run.model.parameters()]


def distance(a, b):
    return sum((x.double() - y.double()).square().sum() for x, y in zip(a, b, strict=True)).sqrt().item()


@pytest.mark.parametrize("flags", SMALL.values(), ids=SMALL)
def test_steps_of_a_graph_are_those_of_train(flags, few_images):
    """Some kernels don't repeat all their digits, so two eager runs tell what rounding does in 50 steps."""
    lines = []
    before, eager = after_steps(flags)
    _, again = after_steps(flags)
    _, graphed = after_steps(flags, lines=lines)
    gone, rounding, differ = distance(before, eager), distance(eager, again), distance(eager, graphed)
    print(f"went {gone:.4g}; eager again differs by {rounding / gone:.2g}, the graph by {differ / gone:.2g} of it")
    assert len(lines) == 1 and "replays" in lines[0]
    assert differ <= 5 * rounding + 0.01 * gone


def test_a_failed_recording_leaves_all_as_it_was():
    """A step that waits for the device can't be recorded; the run goes on, with dropout and random numbers."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True)

    def step(images, labels):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        assert loss.item() > 0  # waits
        optimizer.step()
        return loss.detach()[None]

    lines = []
    graphed = graphs.GraphedStep(step, model, optimizer, batch_size=16, log=lines.append)
    images, labels = torch.randn(16, 8, device="cuda"), torch.arange(16, device="cuda") % 2
    for _ in range(8):
        totals = graphed(images, labels)
    assert totals.isfinite().all() and len(lines) == 1 and "\n" not in lines[0]
    assert not torch.equal(torch.rand(9, device="cuda"), torch.rand(9, device="cuda"))
    model(images).sum().item()


def test_a_killed_run_goes_on(tiny):
    command = [sys.executable, HERE / "train.py", "--model", "mlp", "--hidden", "16", "--data", "shapes"]
    command += ["--device", "cuda", "--epochs", "20", "--batch-size", "64", "--save-every", "20", "--out", "run"]
    with subprocess.Popen(list(map(str, command)), env=os.environ | {"MPLBACKEND": "Agg"}) as process:
        deadline = time.monotonic() + 60
        while not (tiny / "run/last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    step = checkpoints.load("run/last.pt")["step"]
    ended = subprocess.run(
        [sys.executable, HERE / "train.py", "--resume", "run/last.pt"], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert checkpoints.load("run/last.pt")["step"] > step and (tiny / "run/result.json").exists()


@pytest.mark.parametrize("flags", SMALL.values(), ids=SMALL)
def test_more_steps_wait_no_more(flags, tiny):
    """The host waits for the device when it reads an epoch's totals, validates and saves: not in the steps."""
    few, many = [], []
    for size, found in ((64, few), (16, many)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                options = "--data shapes --epochs 1 --warmup-epochs 0 --device cuda --no-cuda-graph".split()
                assert call(*flags.split(), *options, "--batch-size", size, "--out", f"run-{size}") == 0
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found += [f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    assert few and len(many) <= len(few), sorted(set(many))


def test_fp16_with_sgd_learns(tiny):
    options = ["--device", "cuda", "--amp", "fp16", "--opt", "sgd", "--lr", "0.05", "--epochs", 6]
    assert call(*TINY_MLP, *options, "--out", "run") == 0
    history = checkpoints.load("run/last.pt")["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_a_checkpoint_of_the_gpu_is_tested_on_the_cpu(tiny, capsys):
    assert call(*TINY_MLP, "--device", "cuda", "--epochs", 3, "--out", "run") == 0
    assert call("--eval", "run/best.pt", "--device", "cuda") == 0
    assert call("--eval", "run/best.pt", "--device", "cpu") == 0
    on_cuda, on_cpu = [line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith("test acc")][
        -2:
    ]
    assert abs(float(on_cuda) - float(on_cpu)) < 0.05


@torch.no_grad()
def test_the_models_compute_the_same_on_both():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    for name, model in models().items():
        torch.nn.init.normal_(model.head.weight, std=0.02)
        images = images_for(model)
        on_cpu = model.eval()(images)
        on_cuda = model.cuda()(images.cuda()).cpu()
        assert torch.allclose(on_cpu, on_cuda, rtol=1e-2, atol=1e-2), name  # convolutions multiply in TF32
    torch.set_float32_matmul_precision(before)
