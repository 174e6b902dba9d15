"""The folder of a run, locked, with its log, checkpoints, metrics.csv and result.json; and the text of all these."""

import contextlib
import csv
import io
import itertools
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import plot
from utils import arguments, build, checkpoints, devices, distributed, errors

RUN_FILES = ("best.pt", "last.pt", "metrics.csv", "result.json", "curves.png")
# What result.json of --runs has from its runs: what is alike in all, and what each has of its own.
OF_ALL = ("model", "data", "params", "device", "amp", "torch")
OF_EACH = ("seed", "test_acc", "test_loss", "best_epoch", "best_val_acc", "epochs_run", "stopped", "train_seconds")
DRAW_EVERY = 30  # seconds; drawing takes half a second


class RunFolder(contextlib.AbstractContextManager):
    """Where a run is written. On ranks other than 0 nothing is written, and `log` prints nothing.

    It holds the folder's lock until it is closed. If the folder was moved away or replaced, every method that
    writes, except log, raises Failed: another run's files may lie under that name.
    """

    def __init__(self, path, file=None, held=None, made=()):
        self.path = Path(path)
        self.file = file  # log.txt; None on ranks other than 0
        self.held = held  # the open folder, which is locked; None where the system has no such locks
        self.made = made  # the folders that were created for it
        self.drawn_at = time.perf_counter()
        self.events = None  # of TensorBoard

    def check_not_moved(self):
        """Raise Failed if the folder was moved away or replaced."""
        if was_moved(self.path, self.held):
            raise errors.Failed(f"the folder {self.path} was moved away or replaced: nothing more is written")

    def log(self, line: str):
        """Print a line, and append it to log.txt."""
        if self.file:
            self.file.write(line + "\n")
        print_line(line)

    def save(self, name: str, content: dict):
        if self.file:
            self.check_not_moved()
            checkpoints.save(content, self.path / name)

    def write_metrics(self, history: list):
        if self.file:
            self.check_not_moved()
            text = io.StringIO()
            writer = csv.DictWriter(text, checkpoints.COLUMNS)
            writer.writeheader()
            writer.writerows(history)
            checkpoints.write(text.getvalue().encode(), self.path / "metrics.csv")

    def write_result(self, result: dict):
        if self.file:
            self.check_not_moved()
            checkpoints.write_json(result, self.path / "result.json")

    def write_epoch(self, run, history: list, best: dict | None, seconds: float):
        """Write metrics.csv, TensorBoard events and, now and then, curves.png; log the epoch's line.

        `seconds` is how long the epoch has taken in all.
        """
        row = history[-1]
        self.write_metrics(history)
        if self.events:
            self.write_events([row])
        if time.perf_counter() - self.drawn_at > DRAW_EVERY:
            self.draw(history, best)
            self.drawn_at = time.perf_counter()
        # A row may be of less than an epoch: at the end of --epochs 1.5, and once more if that run is prolonged.
        steps = row["step"] - (history[-2]["step"] if len(history) > 1 else 0)
        steps_left = run.total_steps - row["step"]
        epochs = len(history) + math.ceil(steps_left / run.steps_per_epoch)
        self.log(epoch_line(row, epochs, best is row, steps_left * seconds / steps))

    def write_events(self, rows: list):
        for row in rows:
            for name, value in row.items():
                if name not in ("epoch", "step") and not math.isnan(value):
                    self.events.add_scalar(name, value, row["step"])
        self.events.flush()

    def draw(self, history: list, best: dict | None):
        """Draw curves.png. If that fails, log one line and go on."""
        if not self.file or not history:
            return
        self.check_not_moved()
        try:
            marked = {self.path.name: best["epoch"]} if best else {}
            plot.draw({self.path.name: history}, self.path / "curves.png", best=marked)
        except ImportError:
            self.log("no curves.png: pip install matplotlib")
        except Exception as error:
            self.log(f"no curves.png ({errors.one_line(error)[:200]})")

    def open_events(self, history: list):
        """Write TensorBoard events: those of the history, again or for the first time, and from now on."""
        if not self.file:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.log("no TensorBoard events: pip install tensorboard")
            return
        self.events = SummaryWriter(self.path, purge_step=0)
        self.write_events(history)
        self.log(f"to follow it: tensorboard --logdir {self.path}")

    def remove_if_unused(self):
        """Remove what open_folder made, if it's still there and nothing has been written into it since."""
        if self.file and not self.file.tell() and not was_moved(self.path, self.held):
            self.file.close()  # Windows removes no open file
            self.file = None
            (self.path / "log.txt").unlink()
            remove_empty(self.made)

    def discard(self, *names):
        """Remove the named files, which this process has written into a new folder, and the folder."""
        with contextlib.suppress(OSError):
            if self.file and not was_moved(self.path, self.held):
                for name in names:
                    (self.path / name).unlink(missing_ok=True)
                self.remove_if_unused()
        self.close()

    def close(self):
        if self.file:
            with contextlib.suppress(OSError):  # a full disk: what log() could not write is tried once more
                self.file.close()
        if self.held is not None:
            os.close(self.held)
        self.file = self.held = self.events = None

    def __exit__(self, kind, error, place):
        if self.file and isinstance(error, errors.Failed):  # it's printed on standard error
            with contextlib.suppress(OSError):  # a full disk
                self.file.write(f"failed: {errors.one_line(error)}\n")
        self.close()


def remove_empty(folders):
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if it's empty


def print_line(line):
    """Print a line, and go on if the terminal or pipe has gone away."""
    try:
        errors.show(line)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")


def open_folder(out, default, going_on=False) -> RunFolder:
    """Create the folder `out`, or default, default-2, default-3 ..., and lock it.

    A folder that holds a run is taken only if going_on, and never while that run is alive. Raises ValueError for that,
    and if the folder can't be written.
    """
    folder = None
    # A folder of images may have a name that isn't UTF-8.
    default = str(default).encode("utf-8", "backslashreplace").decode()

    def claim():
        nonlocal folder
        folder = first_free(out, default, going_on)
        return str(folder.path)

    path = distributed.on_main(claim)
    return folder or RunFolder(path)


def first_free(out, default, going_on):
    candidates = [Path(out or default)]
    if not out:
        candidates += [Path(f"{default}-{n}") for n in range(2, 10000)]
    for path in candidates:
        if not out and holds_run(path):  # not even locked: that run may be resumed at this moment
            continue
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        held = claimed = None
        try:
            held = create(path)
            if not lock(held):
                made = []  # another process has made it, or will write there
                if out:
                    raise ValueError(f"--out {path} is being written by a run that is alive: name another folder")
            elif going_on or not holds_run(path):  # asked under the lock
                log = path / "log.txt"
                if os.path.islink(log) or (log.exists() and not log.is_file()):
                    raise ValueError(f"--out {path} has a log.txt that is no file: name another folder")
                file = open(log, "a", buffering=1, encoding="utf-8", errors="backslashreplace")
                claimed = RunFolder(path, file, held, made)
                return claimed
        except OSError as error:
            raise ValueError(
                f"--out {path} can't be written ({error.strerror or error}): name another folder"
            ) from None
        finally:
            if not claimed:
                remove_empty(made)
                if held is not None:
                    os.close(held)
    remedy = "name another folder"
    if (candidates[0] / "last.pt").exists():
        remedy += ", or --resume its last.pt"
    raise ValueError(f"--out {candidates[0]} holds a run already: {remedy}")


def holds_run(path: Path) -> bool:
    """Does a folder hold anything of a run?

    A log alone, of a run killed before it saved anything, doesn't count if this same command began it; in seed-N, of
    --runs or a comparison, whichever command began it.
    """
    log = path / "log.txt"
    is_seed = path.name.startswith("seed-")
    if log.is_file() and log.stat().st_size > 0 and not arguments.began(path, any_command=is_seed):
        return True
    return any((path / name).exists() for name in RUN_FILES) or any(path.glob("seed-*"))


def locked(path: Path) -> RunFolder:
    """Create and lock a folder of runs, without a log. Raises ValueError if another process has it."""
    held = create(path)
    if not lock(held):
        os.close(held)
        raise ValueError(f"--out {path} is being written by a command that is alive: name another folder")
    return RunFolder(path, held=held)


def create(path: Path) -> int | None:
    """Create a folder. Returns it opened, which follows it if it is moved; None on Windows, which opens no folders."""
    try:
        str(path).encode()
    except UnicodeError as error:  # torch couldn't read a checkpoint from there
        raise ValueError(f"--out {path} can't be written ({error}): name another folder") from None
    path.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDONLY) if os.name == "posix" else None


def was_moved(path: Path, folder: int | None) -> bool:
    """Is the path no longer that of an open folder?"""
    try:
        return folder is not None and not os.path.samestat(os.fstat(folder), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return True


def lock(folder: int | None) -> bool:
    """Lock an open folder for this process; False if another one has it."""
    if folder is None:
        return True
    import fcntl  # Windows lacks it

    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


# ---------------------------------------------------------------------------------------------- lines and tables


def describe(run) -> list[str]:
    """The lines with which a run's log begins: what trains on what, where, with which options."""
    args, dataset = run.args, run.dataset
    how = f"{run.precision}, compiled" if args.compile else run.precision
    parameters = sum(p.numel() for p in run.model.parameters())
    shape = "x".join(str(n) for n in dataset.train.images.shape[1:])
    counts = f"{len(run.train_set.labels):,} images to train on, {len(run.val_set.labels):,} to validate"
    lines = [
        f"$ {arguments.typed()}",
        f"torch {torch.__version__}, python {platform.python_version()}, {devices.device_name(run.device)}, {how}",
        f"{dataset.name}: {counts}, {len(dataset.test.labels):,} to test; {len(dataset.classes)} classes, {shape}",
        f"{args.model}: {parameters:,} parameters; {args.opt}, {args.sched}, {args.epochs:g} epochs, batches of "
        f"{args.batch_size:,}",
        *describe_groups(run.model, run.optimizer),
    ]
    if dataset.note:
        lines.insert(1, dataset.note.strip())
    if distributed.world_size() > 1:
        lines.append(f"{distributed.world_size()} processes share every batch")
    return lines


def describe_groups(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """A line for each initial learning rate, the highest first: its layers, and how many parameters decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_lr = {}
    for group in optimizer.param_groups:
        by_lr.setdefault(group["initial_lr"], []).append(group)
    lines = []
    for lr, groups in sorted(by_lr.items(), reverse=True):
        shown = prefixes({names[id(p)] for group in groups for p in group["params"]}, names.values())
        line = f"lr {lr:.3g}: {', '.join(shown)} ({size_of(groups):,} parameters"
        decaying = [group for group in groups if group.get("weight_decay")]
        if decaying:
            line += f", {size_of(decaying):,} with weight decay {decaying[0]['weight_decay']:g}"
        by_muon = [group for group in groups if group.get("use_muon")]
        if by_muon:
            line += f", {size_of(by_muon):,} by Muon"
        lines.append(f"{line})")
    return lines


def size_of(groups: list[dict]) -> int:
    return sum(p.numel() for group in groups for p in group["params"])


def beginnings(name):
    """body.0.bias -> body, body.0, body.0.bias"""
    return itertools.accumulate(name.split("."), "{}.{}".format)


def prefixes(chosen, known):
    """The shortest prefixes that name all the chosen parameters and no other; of many, the first and last few."""
    shared = {prefix for name in set(known) - set(chosen) for prefix in beginnings(name)}
    found = {}  # a dict keeps the order, and holds each once
    for name in known:
        if name in chosen:
            found[next(prefix for prefix in beginnings(name) if prefix not in shared)] = None
    found = list(found)
    return [*found[:3], "...", *found[-2:]] if len(found) > 6 else found


def epoch_line(row: dict, epochs: int, is_best: bool, seconds_left: float) -> str:
    """An epoch in one line for the eye; metrics.csv has the same numbers for programs."""
    text = f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  lr {row['lr']:<8.3g}"
    for split in ("train", "val"):
        if not math.isnan(row[f"{split}_loss"]):
            text += f"  {split} loss {row[f'{split}_loss']:.4f} acc {row[f'{split}_acc']:.4f}"
    mark = "*" if is_best else " "
    text += f" {mark} {row['seconds']:6.1f} s {row['images_per_second']:7,.0f} images/s"
    return f"{text}  {clock(seconds_left)} left"


def clock(seconds: float) -> str:
    """3725 -> '1:02:05'"""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def result_of(run, progress, best: dict | None, stopped: str, test_loss, test_acc) -> dict:
    """What result.json holds. Accuracies are fractions."""
    history = progress.history
    seconds = sum(row["seconds"] for row in history)
    images = sum(row["seconds"] * row["images_per_second"] for row in history)
    evaluations = 1.0  # of each image, per step: a line search needs several
    if run.args.opt == "lbfgs" and history:
        evaluations = next(iter(run.optimizer.state.values()))["func_evals"] / progress.step
    of_best = {}
    for key in ("epoch", "val_acc", "val_loss"):
        of_best[f"best_{key}"] = best[key] if best and not math.isnan(best[key]) else None
    return {
        "model": run.args.model,
        "data": run.dataset.name,
        "test_acc": test_acc,
        "test_loss": test_loss,
        **of_best,
        "epochs_run": len(history),
        "train_seconds": seconds,
        "images_per_second": images / seconds if seconds else None,
        "stopped": stopped,
        "params": sum(p.numel() for p in run.model.parameters()),
        "train_pflops": build.flops_per_image(run) * images * evaluations / 1e15,
        "seed": run.args.seed,
        "device": devices.device_name(run.device),
        "amp": run.precision,
        "torch": torch.__version__,
        "args": arguments.plain(run.args),
        "command": arguments.typed(),
        "commit": commit(),
    }


def in_all(results: list[dict], key: str):
    """What the results have under a key: one value or, as text, several; None without results."""
    different = sorted({str(result[key]) for result in results})
    if len(different) > 1:
        return ", ".join(different)
    return results[0][key] if results else None


def over_seeds(results: list[dict]) -> tuple[str, dict]:
    """The results of runs that differ in the seed, as a line for the eye and a dict for result.json."""
    split = "val" if results[0]["test_acc"] is None else "test"  # --no-test
    accs = [result["test_acc" if split == "test" else "best_val_acc"] for result in results]
    mean, std = statistics.fmean(accs), statistics.stdev(accs)
    seconds = statistics.fmean(result["train_seconds"] for result in results)
    each = ", ".join(f"{acc:.4f}" for acc in accs)
    text = f"{split} acc {mean:.4f} +- {std:.4f} (mean and standard deviation, n = {len(accs)}: {each}), "
    text += f"{seconds:.1f} s each"
    return text, {
        **{key: in_all(results, key) for key in OF_ALL},
        f"{split}_acc": mean,
        f"{split}_acc_std": std,
        "n": len(accs),
        "train_seconds": seconds,
        "train_pflops": statistics.fmean(result["train_pflops"] for result in results),
        "runs": [{key: result[key] for key in OF_EACH} for result in results],
    }


def commit() -> str | None:
    """The git commit of this code, with a + if files differ from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    env = dict(os.environ)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # a hook's own repository
        env.pop(name, None)
    try:
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
