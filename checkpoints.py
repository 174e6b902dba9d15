"""Save and load checkpoints: whole or not at all, and never running code from the file.

    save(dict(state_dict=model.state_dict(), epoch=3), "best.pt")
    content = load("best.pt")

A checkpoint is a dict of tensors and plain Python values. Copied alone, this file needs torch and nothing else.
"""

import contextlib
import os
from pathlib import Path

import torch

# What every checkpoint of train.py holds. With model and model_args the model can be built again.
KEYS = {"model", "model_args", "state_dict", "classes", "image_size", "channels", "mean", "std"}
KEYS |= {"epoch", "metrics", "args"}
RESUME_KEYS = KEYS | {"step", "history", "seconds", "seen", "optimizer", "scaler", "rng"}  # last.pt has these too


def save(content, path):
    """Write a checkpoint so that `path` always holds a whole one, the old or the new. Raises OSError."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def load(path, *, keys=KEYS):
    """Read a checkpoint onto the CPU; no code in the file is run. Raises ValueError for whatever isn't one.

    With keys=() it may be any dict, such as a bare state dict; then FILE.safetensors is read too.
    """
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"{path} can't be read without safetensors: pip install safetensors") from None
    except FileNotFoundError:
        raise ValueError(f"{path} doesn't exist: expected a checkpoint such as runs/.../best.pt") from None
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} can't be read as a checkpoint ({type(error).__name__}: {reason})") from None
    missing = sorted(set(keys).difference(content if isinstance(content, dict) else ()))
    if missing or not isinstance(content, dict):
        raise ValueError(f"{path} is not a checkpoint of train.py: it lacks {', '.join(missing) or 'names'}")
    return content
