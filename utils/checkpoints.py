"""Save and load checkpoints: whole or not at all, and never running code from the file.

    save(dict(state_dict=model.state_dict(), epoch=3), "best.pt")
    content = load("best.pt")

A checkpoint is a dict of tensors and plain Python values. Copied alone, this file needs torch and nothing else.
"""

import contextlib
import copy
import io
import json
import os
import zipfile
from pathlib import Path

import torch

# What every checkpoint of train.py holds. With model and model_args the model can be built again.
KEYS = dict(model=str, model_args=dict, state_dict=dict, classes=list, image_size=int, channels=int)
KEYS |= dict(mean=tuple, std=tuple, epoch=int, metrics=dict, args=dict)
PLAIN = ("model_args", "classes", "mean", "std", "metrics", "args")  # hold names, numbers and lists of them
# last.pt has these too.
RESUME_KEYS = KEYS | dict(
    step=int, history=list, seconds=float, seen=torch.Tensor, optimizer=dict, scaler=dict, ema=dict, rng=list
)


def save(content, path):
    """Write a checkpoint so that `path` always holds a whole one, the old or the new. Raises OSError."""
    buffer = io.BytesIO()  # torch's own writer would hide the reason when the disk is full
    torch.save(content, buffer)
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if os.name == "posix":  # the new name too must survive a power failure
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def load(path, *, keys=KEYS):
    """Read a checkpoint onto the CPU; no code in the file is run. Raises ValueError for whatever isn't one.

    Its weights have to be finite, and no more memory is taken than the file is long. With keys={} it may be any dict,
    such as a bare state dict; then FILE.safetensors is read too.
    """
    try:
        if Path(path).suffix == ".safetensors" and not keys:
            from safetensors.torch import load_file

            return load_file(path)
        with zipfile.ZipFile(path) as file:
            if sum(entry.file_size for entry in file.infolist()) > os.path.getsize(path):
                raise ValueError("it would unpack to more than its own size")
            if damaged := file.testzip():
                raise ValueError(f"the checksum of {damaged} in it is wrong")
        # A tensor that is larger than what the file holds of it can't grow in mapped memory: torch refuses it.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except ImportError:
        raise ValueError(f"{path} can't be read without safetensors: pip install safetensors") from None
    except FileNotFoundError:
        raise ValueError(f"{path} doesn't exist: expected a checkpoint such as runs/.../best.pt") from None
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} can't be read as a checkpoint ({type(error).__name__}: {reason})") from None
    content = copy.deepcopy(content)  # out of the mapped file, which may be replaced now
    wrong = [name for name, type in keys.items() if not isinstance(content, dict) or type is not _type(content, name)]
    if wrong or not isinstance(content, dict):
        wanted = f"it has no valid {', '.join(wrong)}" if wrong else "it holds no names"
        if keys == RESUME_KEYS and not KEYS.keys() & set(wrong):
            wanted = "only a run's last.pt can be resumed"
        raise ValueError(f"{path} is not a checkpoint of this train.py: {wanted}")
    try:
        json.dumps([content[name] for name in PLAIN if name in keys])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    state = content.get("state_dict")
    for name, tensor in state.items() if isinstance(state, dict) else ():
        if not isinstance(tensor, torch.Tensor) or tensor.nbytes > os.path.getsize(path):
            raise ValueError(f"{path} is damaged: {name} in it is no tensor that the file could hold")
        if not tensor.isfinite().all():
            raise ValueError(f"{path} is damaged: {name} in it holds values that are not finite numbers")
    return content


def _type(content, name):
    value = content.get(name)
    return dict if isinstance(value, dict) else type(value)
