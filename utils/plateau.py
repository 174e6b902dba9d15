"""Why has the monitored value stopped improving? One line for the log, from the rows of the epochs alone."""

import math
from itertools import pairwise
from statistics import fmean, linear_regression, median


def explain(history: list[dict], best: dict, monitor: str, chance: float) -> str:
    """Say in one line why `monitor` hasn't improved since the best row, and what to try.

    `chance` is the loss where all logits are 0: of cross-entropy ln(classes).
    """
    last = history[-1]
    changes = [f"{k.replace('_', ' ')} {best[k]:.4f} -> {last[k]:.4f}" for k in ("train_loss", "val_loss")]
    return (
        f"no better {monitor} than {best[monitor]:.4f} of epoch {best['epoch']} in {len(history)} epochs; since then "
        f"{', '.join(changes)}, lr {best['lr']:.2g} -> {last['lr']:.2g}. {ADVICE[verdict(history, best, chance)]}."
    )


ADVICE = {
    "not learning": "It learns nothing, the loss is that of a guess: check the setup with diagnose.py, and try the "
    "--lr that its --find-lr suggests",
    "too high": "The learning rate is too high, the loss jumps, rises or is worse than a guess's: try a lower --lr, "
    "--warmup-epochs, --clip-grad 1 or a --sched that lowers it",
    "risen": "The learning rate has come up again since: give it the time to come down, with more --patience",
    "too small": "The learning rate may be too small, the loss still falls, but slower than --min-delta and --patience "
    "ask for: try a higher --lr that decays, --warmup-epochs, or more --patience",
    "decayed": "The learning rate is too small, under a hundredth of its peak: if the loss should be lower, try "
    "more --epochs, or a higher --min-lr or --gamma where the --sched has one",
    "overfitting": "It overfits, the validation loss doesn't follow the training loss down: try more "
    "augmentation, --weight-decay, --dropout (mlp, vit) or a smaller model",
    "converged": "It has converged, both losses stand still: try a --sched that lowers the learning rate if it "
    "is still high, else a larger model",
}


def verdict(history, best, chance):
    """The key of ADVICE that fits the rows since the best one (at least the last 5; 8 to see jumps)."""
    last, at = history[-1], history.index(best)
    lrs = [row["lr"] for row in history]
    trains = [row["train_loss"] for row in history]
    vals = [row["val_loss"] for row in history]
    since = min(at, max(0, len(history) - 5))
    early = min(at, max(0, len(history) - 8))
    train_trend, val_trend = trend(trains, since), trend(vals, since)
    jumps = any(swing(losses) > max(0.1 * median(losses), 0.02 * chance) for losses in (trains[early:], vals[early:]))
    # No validation loss is below that of a guess, and the training loss has hardly fallen.
    guesses = min(vals) > 0.98 * chance and min(trains) > 0.9 * min(chance, trains[0])
    if 2 * best["lr"] < min(last["lr"], max(lrs[: at + 1])):  # best at a low point, such as the end of a cycle
        return "risen"
    rises = train_trend > 0 or last["train_loss"] > best["train_loss"] + 0.1 * chance
    if rises or jumps or (guesses and max(vals) > 1.02 * chance):
        return "too high"
    if val_trend < 0:
        return "too small"
    stays_at_chance = 0.98 * chance < min(trains) and max(trains) < 1.02 * chance
    if guesses and (train_trend == 0 or stays_at_chance):
        return "not learning"
    if val_trend > 0 or (train_trend < 0 and last["val_loss"] >= best["val_loss"]):
        return "overfitting"
    if train_trend < 0:
        return "too small"
    return "decayed" if last["lr"] < max(lrs) / 100 else "converged"


def trend(values, since):
    """-1, 0 or 1: from the place `since` on, the values fall, stand still or rise.

    The line fitted through them must climb by more than 3 times their scatter about it, and by more than 2% of the
    range of all values: less is noise, or too little to matter.
    """
    recent = values[since:]
    if len(recent) < 2:
        return 0
    slope, start = linear_regression(range(len(recent)), recent)
    scatter = math.sqrt(fmean((value - start - slope * i) ** 2 for i, value in enumerate(recent)))
    climb = slope * (len(recent) - 1)
    if abs(climb) <= max(3 * scatter, 0.02 * (max(values) - min(values))):
        return 0
    return 1 if climb > 0 else -1


def swing(values):
    """How far a value lies above both of its neighbours, or below both (0 if neither): the mean over the inner ones."""
    steps = [b - a for a, b in pairwise(values)]
    return sum(min(abs(a), abs(b)) for a, b in pairwise(steps) if a * b < 0) / max(1, len(steps) - 1)
