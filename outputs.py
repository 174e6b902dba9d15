"""The folder of a run: a new name for it, its log, its table of epochs and its result.

Copied alone, this file needs the standard library and nothing else.
"""

import csv
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

COLUMNS = "epoch step lr train_loss train_acc val_loss val_acc seconds images_per_second".split()


def claim(out, default, going_on=False):
    """Create the folder `out`, or default, default-2, default-3 ..., and its log.txt; return its path.

    A folder that holds a run already is never taken, unless going_on. Raises ValueError if it can't be written.
    """
    candidates = [Path(out)] if out else [Path(default), *(Path(f"{default}-{n}") for n in range(2, 10000))]
    for folder in candidates:
        if (folder / "log.txt").exists() and not going_on:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "log.txt").open("a").close()
        except OSError as error:
            raise ValueError(f"--out {folder} can't be written ({error.strerror}): name another folder") from None
        return folder
    raise ValueError(f"--out {candidates[0]} holds a run already: name another folder, or --resume its last.pt")


def make_say(path):
    """A function that prints a line and appends it to the file at `path`."""
    file = open(path, "a", buffering=1, encoding="utf-8")

    def say(line):
        print(line, flush=True)
        file.write(line + "\n")

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
