"""What a process shares with the outside: the other processes that train the same model, and signals.

    torchrun --nproc_per_node 2 train.py --model vit ...

starts the same program several times; `join` makes them a group, in which each has a `rank`. Started in any other way a
process is a group of its own, and everything here costs nothing. Copied alone, this file needs torch and nothing else.
"""

import contextlib
import gc
import os
import signal
import sys
import time
import uuid

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def join():
    """Form the group with the other processes that torchrun started. Only the first of them prints from here on."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        store, own_rank, size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(_agree(store, own_rank, size), store)
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=size)
        # torchrun counts failures by machine: one that only saw the group break has a lower count.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(any_of(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))))
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")


def _agree(store, own_rank, size):
    """A word that the processes of this start share, and those of no earlier one.

    torchrun keeps its store when it starts the processes anew: under the old keys they'd find the addresses of the
    dead, and couldn't connect or would wait for them. The first process answers all until each has had an answer.
    """
    word = uuid.uuid4().hex
    if own_rank > 0:
        store.set(f"hello {own_rank}", word)
        word = store.get(f"answer to {word}").decode()
        store.add(word, 1)
        return word
    while store.add(word, 0) < size - 1:
        for key in (f"hello {other}" for other in range(1, size)):
            if store.check([key]):
                store.set(f"answer to {store.get(key).decode()}", word)
        time.sleep(0.01)
    return word


def leave(status):
    """Leave the group and return the exit status."""
    if dist.is_initialized():
        if status and rank() > 0:
            time.sleep(1)  # torchrun stops the others when one fails: let the first say why
        gc.collect()  # a group that a cycle of references keeps would end with the interpreter, and could abort it
        dist.destroy_process_group()
    return status


def restarted():
    """Has torchrun started this process anew, after one of the group had failed?"""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def count():
    return dist.get_world_size() if dist.is_initialized() else 1


def own_device(device):
    """The CUDA device of this process, if `device` doesn't name one. Raises ValueError if there are too few."""
    if device.type == "cuda" and device.index is None and dist.is_initialized():
        wanted, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if wanted > there:
            text = f"--nproc_per_node {wanted} must be at most {there}, the number of GPUs here"
            raise ValueError(f"{text}; --device cpu has no such limit")
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def once(function):
    """Call a function in the first process alone. All get what it returns, or its ValueError or OSError."""
    if count() == 1:
        return function()
    outcome = [_outcome(function) if rank() == 0 else None]
    dist.broadcast_object_list(outcome)
    return _unpack(outcome[0])


def once_a_machine(function):
    """Call a function in the first process of every machine, then in the others, which find the files that it left."""
    if count() == 1:
        return function()
    first = int(os.environ.get("LOCAL_RANK", rank())) == 0
    outcome = _outcome(function) if first else (None, None)
    for _, error in gather((None, outcome[1])):
        _unpack((None, error))
    return _unpack(outcome) if first else function()


def _outcome(function):
    try:
        return function(), None
    except (ValueError, OSError) as error:
        return None, error


def _unpack(outcome):
    result, error = outcome
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def quiet():
    """All processes see the same mistakes of a user: within this context only the first one says so."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere if rank() else sys.stderr):
        yield


def add_up(tensor):
    """Replace a tensor by its sum over the processes, and return it."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_of(number):
    """The largest of the processes' numbers: what one of them knows, all know."""
    if count() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def gather(value):
    """A list of every process's value."""
    values = [value]
    if count() > 1:
        values = [None] * count()
        dist.all_gather_object(values, value)
    return values


def spread(model):
    """Give every process the first one's weights."""
    if count() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def connect(model, device):
    """The same model, but its gradients become the mean over the processes during backward."""
    if count() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def exchange(model, now):
    """A context for forward and backward, in which a connected model exchanges its gradients now, or doesn't yet."""
    return contextlib.nullcontext() if now or count() == 1 else model.no_sync()


@contextlib.contextmanager
def caught_signals():
    """A list that gets the number of the first SIGINT or SIGTERM. After it the old rule holds: a second one kills.

    Under torchrun it doesn't: that passes a Ctrl-C on to processes that have had it from the terminal already.
    """
    numbers, old = [], {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def handler(number, frame):
        numbers.append(number)
        if not dist.is_initialized():
            for n in old:
                signal.signal(n, signal.SIG_DFL)

    for n in old:
        signal.signal(n, handler)
    try:
        yield numbers
    finally:
        for n in old:
            signal.signal(n, old[n])
