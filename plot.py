"""Draw loss, accuracy and learning rate of one run, or of several in one picture.

    python plot.py runs/vit-cifar10-adamw-cosine
    python plot.py runs/cnn-* --out compare.png

Copied alone, this file needs matplotlib and nothing else: draw({"name": rows}, "curves.png"), where each row is a dict
with epoch, lr, train_loss, train_acc, val_loss and val_acc.
"""

import argparse
import csv
from pathlib import Path

# Okabe and Ito's colours: colour-blind readers can tell them apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def read(run):
    """The rows of a run's metrics.csv as dicts of floats."""
    path = Path(run) / "metrics.csv"
    try:
        with open(path, newline="") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a run's metrics ({error})") from error
    if not rows:
        raise ValueError(f"{path} has no epoch yet")
    return rows


def draw(runs, path):
    """Draw runs, a dict of name -> rows, into a PNG file at `path`.

    Training is dashed, validation is drawn through, its best epoch is marked. Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6))
    for i, (name, rows) in enumerate(runs.items()):
        colour = COLOURS[i % len(COLOURS)]
        best = max(rows, key=lambda row: row["val_acc"])
        epoch = [row["epoch"] for row in rows]
        for axis, quantity in zip(axes, ("loss", "acc"), strict=False):
            for part, style in (("train", "--"), ("val", "-")):
                values = [row[f"{part}_{quantity}"] for row in rows]
                label = f"{name} {part}" if len(runs) > 1 else {"train": "training", "val": "validation"}[part]
                axis.plot(epoch, values, style, color=colour, linewidth=1.5, label=label)
            axis.plot(best["epoch"], best[f"val_{quantity}"], "o", color=colour, markersize=5)
        axes[2].plot(epoch, [row["lr"] for row in rows], color=colour, linewidth=1.5)
    for axis, name in zip(axes, ("loss", "accuracy", "learning rate"), strict=True):
        axis.set(xlabel="epoch", ylabel=name)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", default="compare.png", metavar="FILE", help="the picture (%(default)s)")
    args = parser.parse_args()
    try:
        draw({Path(run).name: read(run) for run in args.runs}, args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError:
        parser.exit(1, "no picture: pip install matplotlib\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
