"""Plot loss, accuracy and learning rate of one run, or of several in one figure.

    python plot.py runs/vit-cifar10-adamw-cosine
    python plot.py runs/cnn-* --out compare.png

Several runs are named by the arguments in which they differ. Those that differ in the seed alone make one curve, their
mean, in a band of one standard deviation either way.

Copied alone, this file needs matplotlib: draw({"name": rows}, "curves.png"), where each row is a dict with epoch, lr,
train_loss, train_acc, val_loss and val_acc.
"""

import argparse
import contextlib
import csv
import io
import json
import logging
import math
import os
import signal
import statistics
import sys
import warnings
from pathlib import Path

# Okabe and Ito's colours: colour-blind readers can tell them apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
COLUMNS = ("epoch", "lr", "train_loss", "train_acc", "val_loss", "val_acc")
STYLES = {"train": ("--", "training"), "val": ("-", "validation")}
# Arguments left out of the names of curves: they don't change the results, or only by chance (seed).
NOT_IN_NAMES = {
    "out", "data_dir", "device", "log_interval", "save_every", "resume", "eval", "tensorboard", "seed", "runs",
    "no_test", "compile", "cuda_graph",
}  # fmt: skip
TELLING = ("model", "data", "opt", "sched")  # named by their value alone: "adamw", not "opt adamw"


def read(run: str | Path) -> list[dict]:
    """The rows of a run's metrics.csv as dicts of floats."""
    path = Path(run) / "metrics.csv"
    if not path.is_file():
        raise ValueError(f"{path} doesn't exist or is no file: name the folder of a run")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [{name: float(row[name]) for name in COLUMNS} for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} can't be read as a run's metrics ({type(error).__name__}: {error})") from error
    if not rows:
        raise ValueError(f"{path} has no epoch yet")
    if not all(1 <= row["epoch"] <= 1e9 for row in rows):
        raise ValueError(f"{path} can't be read as a run's metrics: it has epochs that aren't from 1 to 1e9")
    return rows


def read_result(run: str | Path) -> dict:
    """A run's result.json; nothing is known about a run that still goes on."""
    path = Path(run) / "result.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        if path.is_file():  # reading a pipe would wait for ever
            result = json.loads(path.read_text())
            folder = os.path.realpath(result["args"]["data"])  # two folders may have the same name
            args = result["args"] | {"data": result["data"], "folder": folder}
            if args.get("minutes"):  # the number of epochs was measured, and differs by seed
                args |= {"epochs": None, "warmup_epochs": None}
            return result | {"args": args}
    return {"args": {}}


def short_names(arguments):
    """A short name for each of several dicts of arguments: those arguments that tell them apart."""

    def named(args, keys):
        parts = []
        for key in keys:
            value, words = args.get(key), key.replace("_", " ")
            if isinstance(value, bool):
                parts.append(words if value else f"no {words}")
            elif value is not None:
                text = f"{value:.10g}" if isinstance(value, float) else str(value)
                parts.append(text if key in TELLING else f"{words} {text}")
        return ", ".join(parts)

    keys = dict.fromkeys([*TELLING, "lr", *(key for args in arguments for key in args)])  # an ordered set
    chosen, names = [], [""] * len(arguments)
    for key in keys:
        longer = [named(args, [*chosen, key]) for args in arguments]
        if key not in NOT_IN_NAMES and len(set(longer)) > len(set(names)):
            chosen.append(key)
            names = longer
    return names


def with_metrics(folders):
    """The folders of single runs: one of --runs stands for its seeds. A note names those without a metrics.csv.

    Raises ValueError for what doesn't exist, and if none is left.
    """
    runs = []
    for folder in map(Path, folders):
        if not os.path.lexists(folder):
            raise ValueError(f"{folder} doesn't exist: name the folders of runs")
        seeds = sorted(path for path in folder.glob("seed-*") if path.is_dir())
        runs += seeds or [folder]
    found = [run for run in runs if (run / "metrics.csv").is_file()]
    if not found:
        rule = "name the folders of runs, in a comparison's folder runs/opts/*"
        raise ValueError(f"{runs[0]}/metrics.csv doesn't exist: {rule}")
    for run in runs:
        if run not in found:
            note(f"{run} is left out, it has no metrics.csv")
    return found


def note(text):
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, full, or None
        sys.stderr.write(one_line(f"note: {text}") + "\n")


def collect(folders):
    """Read several runs: (name -> rows, name -> best epoch). Runs that differ in the seed become one curve."""
    folders = list(dict.fromkeys(str(Path(folder)) for folder in folders))
    results = [read_result(folder) for folder in folders]
    groups = {}
    for name, folder, result in zip(short_names([r["args"] for r in results]), folders, results, strict=True):
        groups.setdefault(name, []).append((folder, result))
    runs, best = {}, {}
    for name, group in groups.items():
        whole = [run for run in group if run[1].get("stopped") not in ("non-finite loss", "interrupted")] or group
        seeds = {str(result.get("seed")) for _, result in whole}
        if 1 < len(whole) == len(seeds):  # several, no seed twice: one curve, without those cut off, as --runs averages
            for folder, _ in [run for run in group if run not in whole]:
                note(f"{folder} is left out of the mean: it diverged or was interrupted")
            name = f"{name or whole[0][0]} (mean \N{PLUS-MINUS SIGN} sd of {len(whole)} seeds)"
            runs[name] = [row for folder, _ in whole for row in read(folder)]
            continue
        for folder, result in group:
            name = folder if len(group) > 1 else name or folder
            if name in runs:  # a folder may be called as another run is named
                name = f"{name} ({folder})"
            runs[name], best[name] = read(folder), result.get("best_epoch")
    return runs, best


def mean_and_spread(rows, key):
    """Lists of epochs, means and standard deviations over one or more runs, for the epochs that all of them have."""
    values = {}
    for row in rows:
        values.setdefault(row["epoch"], []).append(row[key])
    count = max(map(len, values.values()))
    values = {epoch: at for epoch, at in sorted(values.items()) if len(at) == count}
    means = [statistics.fmean(at) for at in values.values()]
    spreads = [statistics.stdev(at) if count > 1 and all(map(math.isfinite, at)) else 0.0 for at in values.values()]
    return list(values), means, spreads


def line_widths(curves):
    """A line width for each curve: of equal curves those drawn first are wider, so that all are seen."""
    return [1.6 + 2 * curves[i + 1 :].count(curve) for i, curve in enumerate(curves)]


def draw_metric(axis, runs, quantity, best):
    """Plot training and validation of a quantity on an axis. Returns which of them there are."""
    drawn = set()
    for split, (style, _) in STYLES.items():
        curves = [mean_and_spread(rows, f"{split}_{quantity}") for rows in runs.values()]
        widths = line_widths([repr(curve) for curve in curves])
        for name, colour, width, (epochs, means, spreads) in zip(runs, COLOURS, widths, curves, strict=False):
            if all(math.isnan(mean) for mean in means):
                continue
            drawn.add(split)
            marker = "." if len(epochs) == 1 else None
            axis.plot(epochs, means, style, color=colour, linewidth=width, marker=marker)
            if any(spreads):
                low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
                high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
                axis.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
            if split == "val" and best[name] in epochs:
                axis.plot(best[name], means[epochs.index(best[name])], "o", color=colour, markersize=6)
    return drawn


def draw_lr(axis, runs):
    """Plot the learning rates, relative to their highest if they would hide each other. Returns the label."""
    peaks = {name: max(row["lr"] for row in rows) for name, rows in runs.items()}
    relative = max(peaks.values()) > 5 * min(peaks.values()) > 0
    curves = []
    for name, rows in runs.items():
        epochs, lrs, _ = mean_and_spread(rows, "lr")
        curves.append((epochs, [100 * lr / peaks[name] for lr in lrs] if relative else lrs))
    for colour, width, (epochs, lrs) in zip(COLOURS, line_widths(curves), curves, strict=False):
        is_stepped = 2 * len(set(lrs)) <= len(lrs)  # it falls between epochs, not along them
        style = "steps-pre" if is_stepped else "default"
        marker = "." if len(epochs) == 1 else None
        axis.plot(epochs, lrs, drawstyle=style, color=colour, linewidth=width, marker=marker)
    axis.set_ylim(bottom=0)
    axis.ticklabel_format(axis="y", scilimits=(-2, 4))
    return "learning rate (% of its highest)" if relative else "learning rate"


def best_epoch(rows):
    """The epoch with the highest validation accuracy, or None."""
    epochs, means, _ = mean_and_spread(rows, "val_acc")
    accuracies = {epoch: mean for epoch, mean in zip(epochs, means, strict=True) if not math.isnan(mean)}
    return max(accuracies, key=accuracies.get, default=None)


def draw(runs: dict[str, list[dict]], path: str | Path, best: dict | None = None):
    """Draw runs, a dict of name -> rows, into the file `path`: .png, .pdf or .svg.

    Rows of the same epoch, from runs with several seeds, become their mean in a band of one standard deviation. A dot
    marks the best epoch of a run: best[name], else the one with the highest validation accuracy. Raises ImportError
    without matplotlib, ValueError for more runs than there are colours.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    if len(runs) > len(COLOURS):
        raise ValueError(f"{len(runs)} curves are too many to tell apart in one figure: at most {len(COLOURS)}")
    labels = []
    for name, rows in runs.items():
        label = name.encode("utf-8", "backslashreplace").decode()  # matplotlib can't draw what is no UTF-8
        shortest = mean_and_spread(rows, "lr")[0][-1]
        if shortest < max(row["epoch"] for row in rows):
            label += f" (to epoch {shortest:g}, its shortest run)"
        labels.append(label)
    columns = min(len(runs), max(1, 130 // (max(map(len, labels)) + 8)))  # of the names above the plots
    figure = Figure(figsize=(10, 3.5 + 0.22 * math.ceil(len(runs) / columns)), layout="constrained")
    axes = figure.subplots(1, 3)
    best = {name: (best or {}).get(name) or best_epoch(rows) for name, rows in runs.items()}
    drawn = draw_metric(axes[0], runs, "loss", best)
    draw_metric(axes[1], runs, "acc", best)
    axes[1].yaxis.set_major_formatter(lambda acc, _: f"{100 * acc:g}")
    lr_label = draw_lr(axes[2], runs)
    for axis, label in zip(axes, ("loss (mean per image)", "accuracy (%)", lr_label), strict=True):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    losses = [abs(row[key]) for rows in runs.values() for row in rows for key in ("train_loss", "val_loss")]
    losses = [loss for loss in losses if math.isfinite(loss)]
    if losses and max(losses) > 20 * statistics.median(losses) > 0:
        axes[0].set_yscale("log")  # one spike would flatten all the rest

    pairs = zip(labels, COLOURS, strict=False)
    names = [Line2D([], [], color=colour, linewidth=5, label=label) for label, colour in pairs]
    legend = figure.legend(handles=names, loc="outside upper center", ncols=columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a folder's name is a $
    key = [Line2D([], [], color="#555555", linestyle=STYLES[p][0], label=STYLES[p][1]) for p in STYLES if p in drawn]
    if "val" in drawn:
        key.append(Line2D([], [], color="#555555", marker="o", linestyle="", label="best epoch"))
    figure.legend(handles=key, loc="outside lower center", ncols=len(key), frameon=False)
    plot = io.BytesIO()  # a figure that can't be drawn replaces no file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font lacks a letter of a name: an empty box says so, too
        figure.savefig(plot, dpi=150, format=Path(path).suffix[1:].lower() or "png")
    Path(path).write_bytes(plot.getvalue())


def one_line(text) -> str:
    """A text as one printable line of bounded length."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(text).split()))[:1000]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        super().error(one_line(message))


def main():
    parser = Parser(
        description="Plot loss, accuracy and learning rate of runs.", allow_abbrev=False, usage=argparse.SUPPRESS
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--out", default="curves.png", metavar="FILE", help="the plot: .png, .pdf or .svg (%(default)s)"
    )
    args = parser.parse_args()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where it can't write a cache of fonts
    if Path(args.out).suffix.lower() not in (".png", ".pdf", ".svg"):
        parser.error(f"--out {args.out} must end in .png, .pdf or .svg")
    if os.path.exists(args.out) and not os.path.isfile(args.out):
        parser.error(f"--out {args.out} is no file: name another one")
    try:
        runs, best = collect(with_metrics(args.runs))
        draw(runs, args.out, best)
    except ImportError:
        parser.exit(1, "plot.py: error: there is no matplotlib: pip install matplotlib\n")
    except Exception as error:  # such as matplotlib's, set to LaTeX
        parser.error(str(error))
    try:
        print(f"wrote {one_line(args.out)}", flush=True)
    except OSError:  # a full disk, or nobody reads it: the plot is there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may not be in the terminal's alphabet
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
