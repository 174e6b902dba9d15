"""Where a run computes, and with what precision. Needs torch alone."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name: str) -> torch.device:
    """The device for 'auto' (cuda, then mps, then cpu) or a name. Raises ValueError if it isn't available."""
    available = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()]
    available.append("cpu")
    if name == "auto":
        name = available[0]
    kind, colon, index = name.partition(":")
    numbered = index.isascii() and index.isdecimal()
    if kind not in available or (colon and not (numbered and int(index) < getattr(torch, kind).device_count())):
        raise ValueError(f"device {name} is not available (available: {', '.join(available)})")
    return torch.device(kind, int(index)) if colon else torch.device(kind)


def choose_precision(amp: str, device: torch.device) -> str:
    """The name of the type in which matrices are multiplied, for 'auto', 'off', 'bf16' or 'fp16'.

    'auto' is bf16 where the device computes with it natively: on CUDA from capability 8.0 (fp16 on older ones), on CPUs
    with avx512_bf16 or amx_bf16, which Linux alone tells. Elsewhere it's fp32.
    """
    if amp == "auto" and device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if amp == "auto" and device.type == "cpu" and Path("/proc/cpuinfo").exists():
        flags = set(Path("/proc/cpuinfo").read_text().split())
        return "bf16" if flags & {"avx512_bf16", "amx_bf16"} else "fp32"
    return "fp32" if amp in ("auto", "off") else amp


def autocast(device: torch.device, precision: str):
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def speed_up(device: torch.device):
    """On CUDA, allow TF32 in products of float32 matrices, as convolutions do, and turn cuDNN's attention off.

    cudnn.benchmark is left off: its search gains 5 % of a step at most.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        # cuDNN's attention can give NaN gradients with 64 tokens: https://github.com/pytorch/pytorch/issues/196678
        torch.backends.cuda.enable_cudnn_sdp(False)


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """The scaler that fp16 needs; for the other precisions one that does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def zero_totals(device: torch.device) -> torch.Tensor:
    """Three zeros to add up in, in double precision where the device has it."""
    return torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


class SharedMachineHint:
    """A context for the training loop that hints once, in one line, that others may use this machine's processors too.

    On an idle machine a thread that trains nearly always has a processor. On a shared one OpenMP's threads wait for
    each other in loops, which take the processors from those that they wait for.
    """

    def __init__(self, device: torch.device, log: Callable):
        self.log = log
        waits_quietly = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" or torch.get_num_threads() == 1
        self.silent = device.type != "cpu" or waits_quietly

    def __enter__(self):
        self.start = time.perf_counter(), time.thread_time()

    def __exit__(self, *error):
        self.tell(time.perf_counter() - self.start[0], time.thread_time() - self.start[1])

    def tell(self, seconds: float, on_processor: float):
        if self.silent or seconds < 5 or on_processor > 0.75 * seconds:
            return
        self.silent = True
        share = f"training had a processor for {on_processor / seconds:.0%} of the time"
        remedy = "OMP_WAIT_POLICY=passive or OMP_NUM_THREADS=1 may be several times faster"
        self.log(f"{share}: if others use this machine, too, {remedy}")


def rng_state(device: torch.device) -> dict:
    """The random-number states that training reads on a CPU and on CUDA, as tensors. MPS's isn't among them."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_rng(state: dict, device: torch.device):
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def is_out_of_memory(error: BaseException) -> bool:
    """Does an exception say so? On the CPU torch has no class for it, and CUDA's own calls have another one."""
    text = str(error).lower()
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(words in text for words in ("can't allocate memory", "out of memory", "alloc_failed"))
