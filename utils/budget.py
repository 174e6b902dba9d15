"""How many steps of training fit into a given time? Measured before the run, on a copy of it.

    import time
    from utils.budget import steps_within

    steps = steps_within(0.5, lambda: time.sleep(0.001), 100, others=[(lambda: time.sleep(0.01), 2.0)])

These are steps of a millisecond and, after each 100 of them, 20 milliseconds of something else.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import data
from utils import arguments, build, checkpoints, devices, finetune

SOME = 2000  # images on which validation is timed


def within_minutes(run, trial, take_step, score):
    """The same run, with as many whole steps as fit into --minutes, validation and saving included.

    `trial` is a throw-away copy of the run, of which `take_step` takes a step. `score` is train.score: train.py imports
    this file, not this one it.
    """
    rng = devices.rng_state(trial.device)
    per_epoch = trial.steps_per_epoch
    batches = build.training_batches(trial, 0)
    finetune.train_mode(trial.model)

    def step():
        take_step(trial, *next(batches))
        if trial.ema:
            trial.ema.update(trial.model)

    def save():  # what takes time in last.pt and best.pt
        weights, optimizer = trial.model.state_dict(), trial.optimizer.state_dict()
        best = trial.eval_model.state_dict()  # the same tensors without --ema: then last.pt holds them once
        with tempfile.TemporaryDirectory() as folder:
            checkpoints.save({"weights": weights, "optimizer": optimizer, "best": best}, Path(folder) / "last.pt")
            checkpoints.save({"best": best}, Path(folder) / "best.pt")

    others = [(save, 1.0)]
    images, labels = trial.val_set
    if len(labels):
        some = data.Split(images[:SOME], labels[:SOME])
        others.append((lambda: score(trial, some), len(labels) / len(some.labels)))
    steps = steps_within(60 * trial.args.minutes, step, per_epoch, others)
    devices.restore_rng(rng, trial.device)
    length = min(steps / per_epoch, 1e9)  # the largest --epochs
    warmup = arguments.warmup_within(run.args, run.args.given, length)
    args = arguments.changed(run.args, epochs=length, warmup_epochs=warmup)
    try:
        arguments.check_lengths(args)
    except ValueError as error:  # no reason to stop: nobody could know the length
        run.dataset.note += f"\nnote: {error}"
    return dataclasses.replace(run, args=args, schedule=arguments.make_schedule(args))


def steps_within(seconds: float, step: Callable, per_epoch: int, others: list[tuple[Callable, float]]) -> int:
    """The number of steps that fit into this time, the measuring itself included, at least 1.

    `step` takes a step; an epoch has `per_epoch` of them. `others` are (function, scale) pairs of work done once an
    epoch, which is timed and multiplied by scale.
    """
    began = time.perf_counter()
    # Not timed: the first steps are slow, and at the 4th whole batch a CUDA graph is recorded.
    for _ in range(8 if torch.cuda.is_initialized() else 5):
        step()
    count, taken = 0, 0.0
    # Twice as many steps each time, until they take 3 % of the time, or are an epoch.
    while count < per_epoch and taken < 0.03 * seconds:
        count = min(per_epoch, max(4, 2 * count))
        start = now()
        for _ in range(count):
            step()
        taken = now() - start
    step_seconds = taken / count
    other_seconds = 0.0  # an epoch: validation and saving
    for function, scale in others:
        function()
        start = now()
        function()
        other_seconds += (now() - start) * scale
    left = seconds - (time.perf_counter() - began)
    epoch_seconds = step_seconds * per_epoch + other_seconds
    full_epochs = max(0, math.floor(left / epoch_seconds))
    rest = left - full_epochs * epoch_seconds - other_seconds  # a last epoch, not whole, is validated and saved, too
    return max(1, full_epochs * per_epoch + max(0, math.floor(rest / step_seconds)))


def now() -> float:
    """The time, after the device has finished all its work."""
    if torch.cuda.is_initialized() or torch.mps.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
