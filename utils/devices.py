"""Where a run computes, and with what precision.

Copied alone, this file needs torch and nothing else.
"""

import platform
from pathlib import Path

import torch

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name):
    """The torch.device for 'auto' (cuda, then mps, then cpu) or a name. Raises ValueError if it isn't there."""
    there = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()] + ["cpu"]
    name = there[0] if name == "auto" else name
    kind, _, index = name.partition(":")
    if kind not in there or (index and not (index.isdecimal() and int(index) < getattr(torch, kind).device_count())):
        raise ValueError(f"--device {name} is not there: this machine has {', '.join(there)}")
    return torch.device(name)


def choose_precision(amp, device):
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


def autocast(device, precision):
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def place(part, device):
    """A tuple of tensors on the device, or as they are if the first would fill more than half of its free memory."""
    if device.type == "cuda" and part[0].nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return part
    return tuple(tensor.to(device) for tensor in part)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def rng_state(device):
    """Every random-number state that training reads, as tensors."""
    return dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state(device) if device.type == "cuda" else None)


def restore_rng(state, device):
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def is_out_of_memory(error):
    """Does an exception say so? On the CPU torch has no class for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
