"""How many steps of training fit into a given time?

    steps = steps_within(60.0, step, 100, others=[(lambda: validate(some), 10.0)])

Copied alone, this file needs torch and nothing else.
"""

import math
import time

import torch


def steps_within(seconds, step, per_epoch, others):
    """The number of steps that fit into this time, the measuring itself included, as a whole number of at least 1.

    `step` takes a step, on copies that may be thrown away; an epoch has `per_epoch` of them. `others` are done once an
    epoch, as (function, factor): a function that does a part of it, and how many times longer the whole takes.
    """
    began = time.perf_counter()
    for _ in range(3):  # compilation and the device's own warm-up apart
        step()
    count, taken = 0, 0.0
    while count < per_epoch and taken < 0.03 * seconds:
        count = min(per_epoch, max(4, 2 * count))
        taken = _seconds(lambda count=count: [step() for _ in range(count)])
    an_epoch = taken / count * per_epoch
    for function, factor in others:
        function()
        an_epoch += _seconds(function) * factor
    left = seconds - (time.perf_counter() - began)
    return max(1, math.floor(left / an_epoch * per_epoch))


def _seconds(function):
    start = time.perf_counter()
    function()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start
