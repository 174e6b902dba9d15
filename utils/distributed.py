"""Several processes that train one model: torchrun --nproc_per_node 2 train.py --model vit

`init` makes the processes that torchrun started a group, in which each has a rank. Started in any other way a process
is a group of its own, and everything here costs nothing. Needs torch alone.
"""

import contextlib
import gc
import os
import sys
import threading
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

TIME_LIMIT = timedelta(minutes=10)  # how long a process waits for the others


def init():
    """Form the group with the other processes that torchrun started. Only rank 0 prints from here on.

    RANK and WORLD_SIZE in the environment tell that there is one. Raises ValueError if the rest of it doesn't fit.
    No handler of a signal is called while it waits for the others: train.py lets signals end the process at once.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(f"RANK and WORLD_SIZE are set, {name} isn't: start with torchrun, or unset them")
    size = number_in_environment("WORLD_SIZE", 1, 100_000)
    number_in_environment("RANK", 0, size - 1)
    number_in_environment("MASTER_PORT", 0, 65535)
    number_in_environment("LOCAL_WORLD_SIZE", 1, size)
    number_in_environment("LOCAL_RANK", 0, size - 1)
    restarts = number_in_environment("TORCHELASTIC_RESTART_COUNT", 0, 999_999_999)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, own_rank, _ = next(dist.rendezvous("env://", timeout=TIME_LIMIT))
        store = dist.PrefixStore(_shared_key(store, own_rank, size), store)
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=size, timeout=TIME_LIMIT)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the processes of WORLD_SIZE {size} don't find each other: {error}") from None
    # torchrun counts failures by machine: one that only saw the group break has a lower count.
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(all_max(restarts))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def number_in_environment(name: str, lowest: int, highest: int) -> int:
    """The value of a variable of torchrun's, `lowest` if it isn't set. Raises ValueError if it's out of range."""
    text = os.environ.get(name, str(lowest))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and lowest <= int(text) <= highest):
        raise ValueError(f"{name} {text} must be from {lowest} to {highest}: start with torchrun, else unset RANK")
    return int(text)


def _shared_key(store, own_rank, size):
    """A random key, chosen by rank 0, that all processes of this start share and no earlier start had.

    torchrun keeps its store across restarts: under the old keys, processes would find the addresses of dead ones, and
    fail to connect or hang. The others ask with a fresh request each; rank 0 answers until all have confirmed.
    """
    if own_rank > 0:
        request = uuid.uuid4().hex
        store.set(f"hello {own_rank}", request)
        key = store.get(f"answer to {request}").decode()  # waits for rank 0
        store.add(key, 1)  # confirm
        return key
    key = uuid.uuid4().hex
    began = time.monotonic()
    while store.add(key, 0) < size - 1:
        for other in range(1, size):
            if store.check([f"hello {other}"]):
                request = store.get(f"hello {other}").decode()
                store.set(f"answer to {request}", key)
        if time.monotonic() - began > TIME_LIMIT.total_seconds():
            raise RuntimeError(f"not all came within {TIME_LIMIT}")
        time.sleep(0.01)
    return key


def in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def cleanup(status: int):
    """Leave the group, before the process exits with `status`; with status 1 and NCCL, exit here."""
    if in_group():
        if status == 1 and "nccl" in dist.get_backend_config():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # NCCL would wait for collectives that a dead process never joins
        if status and rank() > 0:
            time.sleep(1)  # torchrun stops the others when one fails: let rank 0 print why
        gc.collect()  # else a reference cycle may keep the group until the interpreter exits, and abort it
        dist.destroy_process_group()


def restarted() -> bool:
    """Did torchrun restart this process after a failure in the group?"""
    return in_group() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def rank() -> int:
    return dist.get_rank() if in_group() else 0


def world_size() -> int:
    return dist.get_world_size() if in_group() else 1


def local_rank() -> int:
    """The rank among the processes of this machine."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def local_device(device: torch.device) -> torch.device:
    """The device of this process. Raises ValueError if there are too few GPUs, or if all would share one."""
    if device.type == "mps" and world_size() > 1:
        raise ValueError(f"device mps is for one process, not {world_size()}: use --device cpu")
    if device.type != "cuda":
        return device
    if world_size() > 1:
        wanted = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
        available = torch.cuda.device_count()
        if device.index is not None and wanted > 1:
            raise ValueError(f"device {device} would be shared by {wanted} processes: use --device cuda")
        if wanted > available:
            text = f"--nproc_per_node {wanted} must be at most {available}, the number of GPUs here"
            raise ValueError(f"{text}; --device cpu has no such limit")
        if device.index is None:
            device = torch.device("cuda", local_rank())
    if device.index is not None:
        torch.cuda.set_device(device)  # NCCL and synchronize() use the current device
    return device


def on_main(function):
    """Call a function on rank 0 alone. All get what it returns, or its error."""
    if world_size() == 1:
        return function()
    outcome = [_outcome(function) if rank() == 0 else None]
    dist.broadcast_object_list(outcome)
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def on_local_main(function):
    """Call a function in the first process of every machine, then in the others, which find the files that it left."""
    if world_size() == 1:
        return function()
    outcomes = [(None, None)]  # where the worker is started, it adds the real one; this thread answers the others
    worker = threading.Thread(target=lambda: outcomes.append(_outcome(function)), daemon=True)
    if local_rank() == 0:
        worker.start()
    while all_max(int(worker.is_alive())):  # many short waits, as decoding may take longer than TIME_LIMIT
        time.sleep(0.05)
    result, own_error = outcomes[-1]
    for error in all_gather(own_error):
        if error is not None:
            raise error
    return result if local_rank() == 0 else function()


def _outcome(function):
    """(result, None) or (None, error), for all processes: the others wait for it, whatever was raised."""
    try:
        return function(), None
    except (ValueError, OSError) as error:
        return None, error
    except Exception as error:
        return None, ValueError(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def main_complains():
    """Silence standard error on all ranks but 0: they would print the same usage error."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere if rank() else sys.stderr):
        yield


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the processes' tensors; the argument isn't changed."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def all_max(number: int) -> int:
    """The largest of the processes' numbers."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def all_gather(value) -> list:
    """Every process's value."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def agreed(value: str, what: str) -> str:
    """A value that all processes must have found alike. Raises ValueError if they haven't."""
    values = sorted(set(all_gather(value)))
    if len(values) > 1:
        raise ValueError(f"{what} is {' and '.join(values)} in different processes: give one that suits all")
    return value


def broadcast(model: torch.nn.Module):
    """Give every process rank 0's weights and statistics."""
    if world_size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def wrap_ddp(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model inside DistributedDataParallel: its gradients become the mean over the processes during backward."""
    if world_size() == 1:
        return model
    ids = [device] if device.type == "cuda" else None
    net = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    # Not in the constructor, which would then leave the buffers different. From here on broadcast() makes them alike
    # before each validation: in every step it would cost copies.
    net.broadcast_buffers = False
    return net


def sync_gradients(net: torch.nn.Module, now: bool):
    """A context for forward and backward: gradients are exchanged if `now`, else only accumulated locally."""
    return contextlib.nullcontext() if now or world_size() == 1 else net.no_sync()
