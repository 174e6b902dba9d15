"""Save and load checkpoints: whole or not at all, and without running code from the file. Needs torch alone.

    import torch
    import checkpoints                                          # in this repo: from utils import checkpoints

    model = torch.nn.Linear(2, 2)
    checkpoints.save({"state_dict": model.state_dict(), "epoch": 3}, "best.pt")
    content = checkpoints.load("best.pt", keys={"state_dict": dict, "epoch": int})

A checkpoint is a dict of tensors and plain Python values. Loading one from a stranger may fail with a ValueError, and
nothing else: it runs no code, takes little more memory than twice the file's length, and decides nothing but what it
holds. So `load` takes tensors of some types only (DTYPES), contiguous, and weights that are finite numbers.
"""

import contextlib
import errno
import io
import json
import math
import os
import pickletools
import re
import struct
import time
import zipfile
import zlib
from pathlib import Path

import torch

# What every checkpoint of train.py holds. With model and model_args the model can be built again.
KEYS = {
    "model": str,
    "model_args": dict,
    "state_dict": dict,
    "classes": list,
    "image_size": int,
    "channels": int,
    "mean": tuple,
    "std": tuple,
    "epoch": int,
    "metrics": dict,
    "args": dict,
}
# last.pt has these too: how far the run has come, and every state that an exact resume needs.
RESUME_KEYS = KEYS | {
    "step": int,
    "history": list,
    "seconds": float,
    "totals": torch.Tensor,
    "optimizer": dict,
    "scaler": dict,
    "ema": dict,
    "rng": list,
    "images": int,  # their checksum, which best.pt of a run has too
}
COLUMNS = "epoch step lr train_loss train_acc val_loss val_acc seconds images_per_second".split()  # of a history's row
PLAIN = {"model_args", "classes", "mean", "std", "metrics", "args", "history", "scaler"}  # hold no tensors
DTYPES = torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool
SCALARS = ("step", "mu_product")  # in an optimizer's state of a parameter; all else in it has the parameter's shape
NEVER_NEGATIVE = ("exp_avg_sq", "square_avg", "acc_delta", "sum")  # in that state: means or sums of squares
MOST_VALUES = 1_000_000  # a history has nine values an epoch
DEEPEST = 8  # levels of nesting
MOST_TEXT = 10_000_000  # characters beyond the file's length: a pickle stores a repeated column name once
DEEPEST_PICKLE = 100  # objects within objects, as Python pickles them
# What a checkpoint's pickle may call: tensors, their memory, state dicts, the Counter of torch's MultiStepLR.
HARMLESS = re.compile(
    r"torch\._utils _rebuild_(tensor_v2|parameter)|torch (\w+Storage|Size)|collections (OrderedDict|Counter)"
)

# Words in errors that mean: another process of the group has died or hangs.
LOST_PROCESS = r"\b(processgroup|work)?(gloo|nccl)|closed by peer|connection (reset|refused)|timed out"
# Words in errors for which no file is to blame.
NOT_ITS_FAULT = re.compile(
    f"out of memory|can't allocate memory|CUDA error|CUDNN_STATUS|CUBLAS_STATUS|{LOST_PROCESS}", re.IGNORECASE
)


def save(content: dict, path: str | Path):
    """Write a checkpoint so that `path` always holds a whole one, the old or the new. Raises OSError."""
    buffer = io.BytesIO()  # torch's own writer would hide the reason when the disk is full
    torch.save(content, buffer)
    with buffer.getbuffer() as view:  # released if writing fails: else Python would complain of it at the end
        write(view, path)


def check_not_in_the_way(path: str | Path):
    """Raise OSError if something that is no file lies where write() would write."""
    for name in (path, f"{path}.tmp"):  # a device must not be replaced, and writing into a pipe would wait for ever
        if os.path.exists(name) and not os.path.isfile(name):
            raise OSError(f"{name} is in the way: remove it")
    if os.path.islink(f"{path}.tmp"):  # open() would overwrite the link's target
        raise OSError(f"{path}.tmp is a link: remove it")


def write(content: bytes, path: str | Path):
    """Write a file so that `path` always holds a whole one, the old or the new. Raises OSError."""
    check_not_in_the_way(path)
    temporary = f"{path}.tmp"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)  # of a run that was killed; a hard link's other name keeps its content
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if os.name == "posix":  # the new name too must survive a power failure
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some file systems can't do it
                raise
        finally:
            os.close(folder)


def replace(temporary, path):
    """os.replace. Windows denies it while another program reads the file: a little later it may work."""
    for seconds in (0.1, 0.5, 2.0):
        with contextlib.suppress(PermissionError):
            return os.replace(temporary, path)
        time.sleep(seconds)
    os.replace(temporary, path)


def write_json(content: dict, path: str | Path):
    """Write a dict as JSON, as write() does."""
    write((json.dumps(content, indent=2) + "\n").encode(), path)


def load(path: str | Path, *, keys: dict = KEYS) -> dict:
    """Read a checkpoint onto the CPU. Raises ValueError for whatever isn't one.

    With keys={} it may be any dict of tensors, such as a bare state dict; then FILE.safetensors is read too.
    """
    if not os.path.isfile(path):  # reading a pipe or a device would wait for ever
        name = "last.pt" if keys == RESUME_KEYS else "best.pt"
        raise ValueError(f"{path} doesn't exist or is no file: expected a checkpoint such as runs/.../{name}")
    size = os.path.getsize(path)
    try:
        if Path(path).suffix == ".safetensors" and not keys:
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            _check_directory(path, size)
            with zipfile.ZipFile(path) as file:
                if any(entry.filename != entry.orig_filename for entry in file.infolist()):
                    raise ValueError("it holds an entry of two names")
                if sum(entry.file_size for entry in file.infolist()) > size:
                    raise ValueError("it would unpack to more than its own size")
                if damaged := file.testzip():
                    raise ValueError(f"the checksum of {damaged} in it is wrong")
                if len({name.lower() for name in file.namelist()}) < len(file.namelist()):
                    raise ValueError("it holds two entries of one name")
                for entry in file.namelist():
                    if entry.lower().endswith(".pkl"):
                        _inspect(file.read(entry))
            # With mmap, torch rejects a tensor that claims more bytes than the file holds.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except ImportError:
        raise ValueError(f"{path} can't be read without safetensors: pip install safetensors") from None
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} can't be read as a checkpoint ({type(error).__name__}: {reason})") from None
    validate(path, content, keys, size)
    return _copied(content)  # out of the mapped file, which may be replaced now


def _check_directory(path, size):
    """Raise ValueError unless an archive ends as torch's do. In others torch may see other entries than zipfile."""
    # 56 bytes end the directory (its length, its start), 20 say where they are, 22 are the end of older archives.
    with open(path, "rb") as file:
        file.seek(max(0, size - 98))
        end = file.read(98)
    if len(end) == 98:
        first, length, start, second, at, third = struct.unpack("<4s36xQQ4s4xQ4x4s18x", end)
        if (first, second, third) == (b"PK\6\6", b"PK\6\7", b"PK\5\6") and at == start + length == size - 98:
            return
    raise ValueError("it doesn't end as the files of torch.save do: if not cut short, save it again with torch.save")


def _copied(content):
    """A deep copy in plain dicts, lists and tuples: the _metadata of a state dict could mislead torch."""
    if isinstance(content, torch.Tensor):
        return content.detach().clone()
    if isinstance(content, dict):
        return {key: _copied(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        values = [_copied(value) for value in content]
        return values if isinstance(content, list) else tuple(values)
    return content


def _inspect(pickled: bytes):
    """Raise ValueError for a pickle that torch would read, but that might take all memory, or crash the interpreter.

    Some functions that torch allows make objects of any size. And hashing a tuple, as a dict's key, visits everything
    nested in it, a shared object once per place: deep nesting overflows the stack, sharing takes exponential time.
    """
    stack = []  # (depth, size, is it a function?) of each object on the unpickler's stack, which is simulated here
    marks = []  # the length of the stack at each MARK
    memo = {}  # index -> (depth, size, is it a function?), as it was then: a list may have grown since
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL" and not HARMLESS.fullmatch(argument):
            raise ValueError(f"it holds a {argument.replace(' ', '.')}")
        before = opcode.stack_before
        if opcode.name == "MARK":
            marks.append(len(stack))
        elif opcode.name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif opcode.name.endswith("GET"):
            stack.append(memo[argument])
        else:
            start = len(stack) - len(before)  # the opcode takes its arguments from here on ...
            if pickletools.markobject in before:  # ... or from the last mark on, with what it needs below that
                start = marks.pop() - before.index(pickletools.markobject)
            taken = stack[start:]
            del stack[start:]
            if opcode.name in ("REDUCE", "NEWOBJ") and not taken[0][2]:  # torch's message would show all of it
                raise ValueError("it calls what is no function")
            if opcode.name == "BINPERSID" and taken[0][:2] != (1, 6):  # five plain values; torch may show others
                raise ValueError("it names no storage")
            depths = [1 + depth for depth, _, _ in taken]
            if opcode.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"):
                depths[0] -= 1  # the others go into the first one
            depth = max(depths, default=int(opcode.name.startswith("EMPTY_")))  # 0 for a plain value
            size = 1 + sum(size for _, size, _ in taken)
            if depth > DEEPEST_PICKLE or size > 10 * MOST_VALUES:
                raise ValueError("its objects lie too deep or too often within each other")
            stack += [(depth, size, opcode.name == "GLOBAL")] * len(opcode.stack_after)


def validate(path, content, keys: dict, size: int):
    """Raise ValueError for content that no run would write into a checkpoint file of `size` bytes.

    Whether it fits the model and the optimizer is checked later, by load_state_dict and optimizer_state.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a checkpoint of this train.py: it holds no names")
    wrong = [name for name in keys if not isinstance(dict.get(content, name), keys[name])]
    if wrong:
        if keys == RESUME_KEYS and not KEYS.keys() & set(wrong):
            remedy = "name that, or start a new run from these weights with --init"
            raise ValueError(f"{path} can't be resumed, only a run's last.pt can: {remedy}")
        raise ValueError(f"{path} is not a checkpoint of this train.py: it has no valid {', '.join(wrong)}")

    try:
        _walk(content, size)
        for name in PLAIN & keys.keys():
            _walk(content[name], size, tensors=False)
        if "state_dict" in keys:
            _validate_weights(content["state_dict"])
        else:  # timm's weights may lie beside other things, which nobody reads
            _validate_weights({name: value for name, value in content.items() if isinstance(value, torch.Tensor)})
        if KEYS.keys() <= keys.keys():
            _validate_description(content)
        if keys == RESUME_KEYS:
            _validate_progress(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _walk(content, size, tensors=True):
    """Raise ValueError unless a nested value has plain types, a bounded size, and tensors as they are saved."""
    seen, held, text, stack = 0, 0, 0, [(content, 0, "it")]
    while stack:
        value, depth, name = stack.pop()
        seen += 1
        if seen > MOST_VALUES or depth > DEEPEST:
            raise ValueError(f"{name} holds more values, or deeper ones, than any run leaves there")
        if isinstance(value, torch.Tensor) and tensors:
            plain = value.layout == torch.strided and value.dtype in DTYPES and value.device.type == "cpu"
            if not plain or value.is_neg():
                raise ValueError(f"{name} is no plain tensor")
            dense = value.is_contiguous() or value.is_contiguous(memory_format=torch.channels_last)
            held += value.nbytes  # shared memory counts for each tensor: most models allocate each
            if not dense:
                raise ValueError(f"{name} is not contiguous: save it after .contiguous()")
            if held > 2 * size:  # twice, because tied weights are in the file once
                raise ValueError(f"{name} is no tensor that the file could hold, or is tied to more than one other")
        elif isinstance(value, dict):
            if getattr(value, "__dict__", {}).keys() - {"_metadata"}:  # such as an `items` of its own
                raise ValueError(f"{name} is no plain dict")
            for key, inner in value.items():
                if not isinstance(key, (str, int)) or len(str(key)) > 1000:
                    raise ValueError(f"{name} has a key that is no name")
                text += len(str(key))
                stack.append((inner, depth + 1, str(key)))
        elif isinstance(value, (list, tuple)):
            if seen + len(stack) + len(value) > MOST_VALUES:
                raise ValueError(f"{name} holds more values than any run leaves there")
            stack.extend((inner, depth + 1, name) for inner in value)
        elif isinstance(value, str):
            text += len(value)
        elif isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise ValueError(f"{name} holds a number that is too large")
        elif not isinstance(value, (int, float, type(None))):
            raise ValueError(f"{name} holds a {type(value).__name__}")
        if text > size + MOST_TEXT:  # one string, in many places
            raise ValueError(f"{name} holds more text than the file could")


def _validate_weights(state):
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name!r} in it is no tensor")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} in it holds values that are not finite numbers")


def _validate_description(content):
    """What best.pt says of its images."""
    if not content["classes"] or not all(isinstance(name, str) for name in content["classes"]):
        raise ValueError("its classes are no names")
    if not 1 <= content["image_size"] <= 1024 or not 1 <= content["channels"] <= 64:
        raise ValueError(f"its images have {content['channels']} channels and {content['image_size']} pixels a side")
    for name, least in (("mean", -1e6), ("std", 1e-6)):
        numbers = content[name]
        possible = all(isinstance(x, float) and least < x < 1e6 for x in numbers)
        if len(numbers) != content["channels"] or not possible:
            raise ValueError(f"its {name} is {str(numbers)[:80]}")
    for name, value in content["model_args"].items():
        if content["args"].get(name) not in (None, value):
            raise ValueError(f"its args and its model_args contradict each other in {name}")
    if not all(isinstance(value, (int, float)) for value in content["metrics"].values()):
        raise ValueError("its metrics are no numbers")


def _validate_progress(content):
    """What last.pt says of how far the run has come."""
    step = content["step"]
    if not 1 <= step < 2**53 or not 0 <= content["seconds"] < math.inf:
        raise ValueError(f"its step is {step}")
    before = 0
    validated = content["args"].get("val_split") != 0
    for epoch, row in enumerate(content["history"], start=1):
        numbers = isinstance(row, dict) and {type(value) for value in row.values()} <= {int, float}
        possible = numbers and list(row) == COLUMNS and row["epoch"] == epoch and row["seconds"] > 0
        if possible:
            possible = all(math.isfinite(row[name]) for name in ("train_loss", "seconds", "images_per_second"))
            possible &= 0 <= row["train_acc"] <= 1
            if validated:
                possible &= math.isfinite(row["val_loss"]) and 0 <= row["val_acc"] <= 1
            else:
                possible &= math.isnan(row["val_acc"])
        if not possible:
            raise ValueError(f"a row of its history is {str(row)[:200]}")
        if not before < row["step"] <= step:
            raise ValueError(f"its history is ahead of its step {step}")
        before = row["step"]
    totals = content["totals"]
    if totals.shape != (3,) or not totals.isfinite().all() or not 0 <= totals[1] <= totals[2]:
        raise ValueError("its totals are no three numbers that fit each other")
    if (totals[2] == 0) != (step == before):
        raise ValueError(f"its totals of {totals[2]:g} images don't fit its step {step}, after {before} in its history")
    if content["scaler"]:
        _validate_scaler(content["scaler"])
    states = content["optimizer"].get("state")
    if not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
        raise ValueError("its optimizer's state is no dict for each parameter")
    if content["ema"]:
        trained, updates = content["ema"].get("trained"), content["ema"].get("updates")
        if not isinstance(trained, dict) or not isinstance(updates, int) or updates < 0:
            raise ValueError("its ema has no weights or no number of updates")
        _validate_weights(trained)
    rng = content["rng"]
    if not rng or not all(isinstance(s, dict) and isinstance(s.get("cpu"), torch.Tensor) and "cuda" in s for s in rng):
        raise ValueError("it holds no random-number states")


def _validate_scaler(scaler):
    """What the GradScaler of fp16 leaves."""
    numbers = [scaler.get(name) for name in ("scale", "growth_factor", "backoff_factor")]
    counts = [scaler.get(name) for name in ("growth_interval", "_growth_tracker")]
    fits = all(type(x) is float and 0 < x < 1e38 for x in numbers) and all(type(x) is int for x in counts)
    if not fits or not numbers[2] < 1 < numbers[1] or not 0 <= counts[1] <= counts[0] < 2**31:
        raise ValueError(f"its scaler is {str(scaler)[:200]}")


def optimizer_state(optimizer: torch.optim.Optimizer, saved: dict, *, may_be_empty: bool = False) -> dict:
    """Prepare a saved state_dict() for optimizer.load_state_dict. Both optimizers must have the same options.

    The values of the options (learning rate, decay ...) are taken from `optimizer`, not from `saved`. It must be one of
    optimizers.py. Every parameter must have the state that a step leaves, or none if it `may_be_empty`, as in fp16 when
    every step was skipped. Raises ValueError for state that doesn't fit: torch checks no shapes, and its fused steps
    would read past the end of a tensor smaller than its parameter, or mix up the elements if the memory format differs.
    """
    current = optimizer.state_dict()
    if isinstance(optimizer, torch.optim.LBFGS):  # it has one state for all parameters
        _check_lbfgs(optimizer, saved["state"])
        return {"state": saved["state"], "param_groups": current["param_groups"]}
    states = {}
    for group, numbered in zip(optimizer.param_groups, current["param_groups"], strict=True):
        wanted = {} if may_be_empty and not saved["state"] else _left_by_a_step(optimizer, group)
        for i, parameter in zip(numbered["params"], group["params"], strict=True):
            old = saved["state"].get(i, {})
            if {name: type(value) for name, value in old.items()} != wanted:
                raise ValueError("the optimizer's state is not that which its steps leave")
            if old:
                first = 0 if may_be_empty else 1  # the fewest steps that it may count
                states[i] = {name: _checked_state(name, value, parameter, first) for name, value in old.items()}
    return {"state": states, "param_groups": current["param_groups"]}


def _checked_state(name, value, parameter, first):
    """A tensor of an optimizer's state of a parameter, in the parameter's memory format. Raises ValueError."""
    wanted = () if name in SCALARS else parameter.shape
    if value.shape != wanted:
        raise ValueError(f"the optimizer's {name} is {tuple(value.shape)}, expected {tuple(wanted)}")
    if not value.is_floating_point() or value.isnan().any():
        raise ValueError(f"the optimizer's {name} has values that are not numbers")
    if (name in NEVER_NEGATIVE and (value < 0).any()) or (name == "step" and not first <= value < 2**53):
        raise ValueError(f"the optimizer's {name} has values that are too small")
    return value if name in SCALARS else torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)


def _left_by_a_step(optimizer, group) -> dict:
    """The names and types of the state that a step leaves for a parameter of a group."""
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.ones(2, 2)
    groups = [{**group, "params": [parameter]}]
    if "use_muon" in group and not group["use_muon"]:  # Muon wants a matrix of its own
        groups.append({"params": [torch.nn.Parameter(torch.zeros(2, 2))], "use_muon": True})
    trial = type(optimizer)(groups, lr=0.1)
    trial.step()
    return {name: type(value) for name, value in trial.state[parameter].items()}


def _check_lbfgs(optimizer, saved):
    """Raise ValueError unless every vector in L-BFGS's state has a number for each parameter."""
    total = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    most = optimizer.param_groups[0]["history_size"]
    shapes = dict.fromkeys(("d", "prev_flat_grad", "old_dirs", "old_stps"), (total,))
    shapes |= dict.fromkeys(("t", "ro", "H_diag", "prev_loss"), ())
    state = saved.get(0, {})
    evaluations, iterations = state.get("func_evals"), state.get("n_iter")
    counted = type(evaluations) is type(iterations) is int and evaluations >= 1 and iterations >= 0
    names = {"func_evals", "n_iter", "al"}
    if iterations:  # none where the gradient is 0
        names |= shapes.keys()
    if set(saved) != {0} or not counted or state.keys() | {"al"} != names:
        raise ValueError("the optimizer's state is not L-BFGS's")
    for name in shapes.keys() & state.keys():
        for value in state[name] if isinstance(state[name], list) else [state[name]]:
            if isinstance(value, (int, float)) and not shapes[name]:
                continue
            is_float32 = isinstance(value, torch.Tensor) and value.dtype == torch.float32
            if not is_float32 or value.shape != shapes[name]:
                raise ValueError(f"the optimizer's {name} doesn't fit the parameters")
            if value.isnan().any():
                raise ValueError(f"the optimizer's {name} has values that are not numbers")
    lengths = {len(state.get(name, [])) for name in ("old_dirs", "old_stps", "ro")}
    scratch = state.get("al", [None] * most)  # overwritten before it is read
    if len(lengths) > 1 or max(lengths) > most or not isinstance(scratch, list) or len(scratch) != most:
        raise ValueError("the optimizer's state contradicts itself")


@contextlib.contextmanager
def blaming(path: str | Path | None):
    """Turn errors in this context into a ValueError that blames the checkpoint at `path`, unless that is None.

    Errors of running out of memory, of the device or of losing another process pass through.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        if path is None or NOT_ITS_FAULT.search(str(error)):
            raise
        raise ValueError(f"{path} holds what no run leaves there: {type(error).__name__}: {str(error)[:200]}") from None


def fingerprint(*tensors: torch.Tensor) -> int:
    """A checksum of the tensors' bytes, by which a resume knows its images again."""
    checksum = 0
    for tensor in tensors:
        values = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)  # numpy knows no bf16
        checksum = zlib.crc32(values.numpy(), checksum)
    return checksum
