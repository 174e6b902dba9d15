"""The folder of a run: a new name for it, its log, its table of epochs and its result.

Copied alone, this file needs the standard library and nothing else.
"""

import contextlib
import csv
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

COLUMNS = "epoch step lr train_loss train_acc val_loss val_acc seconds images_per_second".split()


RUN_FILES = ("best.pt", "last.pt", "metrics.csv", "result.json", "curves.png")


def claim(out, default, going_on=False):
    """Create the folder `out`, or default, default-2, default-3 ..., and lock it; return (folder, log).

    The log is open and keeps the folder's lock for as long as the process lives. A folder that holds anything of a run
    is never taken, unless going_on, and never while a run in it is alive. Raises ValueError for that and if the folder
    can't be written.
    """
    candidates = [Path(out)] if out else [Path(default), *(Path(f"{default}-{n}") for n in range(2, 10000))]
    for folder in candidates:
        if holds_run(folder) and not going_on and not out:
            continue
        try:
            made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            held = os.open(folder, os.O_RDONLY) if os.name == "posix" else None  # stays with it wherever it's moved
        except OSError as error:
            raise ValueError(f"--out {folder} can't be written ({error.strerror}): name another folder") from None
        log = Log(folder, held, made)
        if not (held is None or lock(held)):
            if out:
                raise ValueError(f"--out {folder} is being written by a run that is alive: name another folder")
        elif going_on or not holds_run(folder):
            try:
                log.file = open(folder / "log.txt", "a", buffering=1, encoding="utf-8")
            except OSError as error:
                raise ValueError(f"--out {folder} can't be written ({error.strerror}): name another folder") from None
            return folder, log
    raise ValueError(f"--out {candidates[0]} holds a run already: name another folder, or --resume its last.pt")


def holds_run(folder):
    """Is there anything of a run in a folder?"""
    log = folder / "log.txt"
    return (
        (log.exists() and log.stat().st_size > 0)
        or any((folder / name).exists() for name in RUN_FILES)
        or any(folder.glob("seed-*"))
    )


class Log:
    """The open log.txt of a run, and the hold on its folder."""

    def __init__(self, folder, held, made):
        self.file, self.folder, self.held, self.made = None, folder, held, made

    def write(self, text):
        self.file.write(text)

    def check(self):
        """Raise OSError if the folder's name now is another folder's, or none's: nothing is written there."""
        try:
            here = self.held is None or os.path.samestat(os.fstat(self.held), os.stat(self.folder))
        except FileNotFoundError:
            here = False
        if not here:
            raise OSError(f"the run's folder {self.folder} was moved away or replaced: the run stops")

    def __del__(self):
        if self.file:
            self.file.close()
        if self.held is not None:
            os.close(self.held)

    def take_back(self):
        """Remove what claim made, if nothing has been written into it since."""
        self.file.close()
        log = self.folder / "log.txt"
        if log.stat().st_size == 0:
            log.unlink()
        if self.made:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # only if it's empty


def lock(file):
    """Lock a file for this process; False if another one has it. Always True on Windows."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def make_say(log):
    """A function that prints a line and appends it to the file `log`, if there is one."""

    def say(line):
        print(line, flush=True)
        if log:
            log.write(line + "\n")

    say.check = log.check if log else lambda: None
    return say


def epoch_line(row, epochs, is_best, seconds_left):
    """An epoch in one line for the eye; metrics.csv has the same figures for programs."""
    text = f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  lr {row['lr']:<8.3g}"
    for part in ("train", "val"):
        if not math.isnan(row[f"{part}_loss"]):
            text += f"  {part} loss {row[f'{part}_loss']:.4f} acc {row[f'{part}_acc']:.4f}"
    text += f" {'*' if is_best else ' '} {row['seconds']:6.1f} s {row['images_per_second']:7,.0f} images/s"
    return f"{text}  {clock(seconds_left)} left"


def clock(seconds):
    """3725 -> '1:02:05'"""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def summary(history, best):
    """What result.json says of the epochs of a run and of its best one, a row of them or None."""
    seconds = sum(row["seconds"] for row in history)
    images = sum(row["seconds"] * row["images_per_second"] for row in history)
    result = {}
    for name, key in (("best_epoch", "epoch"), ("best_val_acc", "val_acc"), ("best_val_loss", "val_loss")):
        result[name] = best[key] if best and not math.isnan(best[key]) else None
    result |= dict(epochs_run=len(history), train_seconds=seconds)
    return result | dict(images_per_second=images / seconds if seconds else None)


def over_seeds(results):
    """The results of runs that differ in the seed, as (a line for the eye, a dict for result.json)."""
    accs = [result["test_acc"] for result in results]
    mean, std = statistics.fmean(accs), statistics.stdev(accs)
    seconds = statistics.fmean(result["train_seconds"] for result in results)
    each = ", ".join(f"{acc:.4f}" for acc in accs)
    text = (
        f"test acc {mean:.4f} +- {std:.4f} (mean and standard deviation, n = {len(accs)}: {each}), {seconds:.1f} s each"
    )
    same = {k: results[0][k] for k in ("model", "data", "params", "device", "amp", "torch")}
    own = ("seed", "test_acc", "test_loss", "best_epoch", "best_val_acc", "epochs_run", "stopped", "train_seconds")
    summary = same | dict(test_acc=mean, test_acc_std=std, n=len(accs), train_seconds=seconds)
    return text, summary | dict(runs=[{k: result[k] for k in own} for result in results])


def command():
    """What the user typed, as far as Python knows it."""
    return shlex.join(["python", *sys.argv])


def commit():
    """The git commit of this code, with a + if files differ from it; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def write_metrics(history, path):
    with open(f"{path}.tmp", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(history)
    os.replace(f"{path}.tmp", path)


def make_events(folder, say):
    """A function that writes an epoch's row into a folder as TensorBoard events; without tensorboard, nothing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("no TensorBoard events: pip install tensorboard")
        return lambda row: None
    say(f"to follow it: tensorboard --logdir {folder}")
    writer = SummaryWriter(folder)

    def write(row):
        for name, value in row.items():
            if name not in ("epoch", "step") and not math.isnan(value):
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return write


def write_result(result, path):
    Path(f"{path}.tmp").write_text(json.dumps(result, indent=2) + "\n")
    os.replace(f"{path}.tmp", path)
