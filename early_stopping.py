"""Which epoch is the best so far, and is it time to stop? Both follow from the list of epochs, so there is no state.

    history.append(dict(epoch=epoch, val_acc=..., val_loss=..., train_loss=..., lr=...))
    best = best_row(history, "val_acc")
    if best is history[-1]:
        save(model)
    if waited(history, best) >= patience:
        print(explain(history, best, "val_acc")); break

Copied alone, this file needs the standard library and nothing else.
"""

import math


def better(value, than, monitor, min_delta=0.0):
    """Is `value` an improvement of `monitor`, by more than min_delta? A tie isn't one, and NaN never is."""
    gain = than - value if monitor.endswith("loss") else value - than
    return gain > min_delta


def best_row(history, monitor, min_delta=0.0):
    """The best row of the history, the earlier of equals, or None while every value is NaN."""
    best = None
    for row in history:
        if not math.isnan(row[monitor]) and (best is None or better(row[monitor], best[monitor], monitor, min_delta)):
            best = row
    return best


def waited(history, best, warmup_epochs=0):
    """The number of evaluations since the best one. Those of the warm-up don't count."""
    since = max(best["epoch"] if best else 0, warmup_epochs)
    return sum(row["epoch"] > since for row in history)


def explain(history, best, monitor, min_delta=0.0):
    """Say in one line what happened between the best epoch and the last, and what to try."""
    last = history[-1]
    text = (
        f"no better {monitor} than {best[monitor]:.4f} of epoch {best['epoch']} in {len(history)} epochs; since then "
    )
    changes = [f"{k} {best[k]:.4f} -> {last[k]:.4f}" for k in ("train_loss", "val_loss")]
    text += ", ".join([*changes, f"lr {best['lr']:.2g} -> {last['lr']:.2g}"])
    if last["train_loss"] < best["train_loss"] and last["val_loss"] > best["val_loss"]:
        advice = "it overfits: try more augmentation, --dropout, --weight-decay or a smaller model"
    elif last["train_loss"] < best["train_loss"]:
        advice = "the loss still falls, too slowly for --min-delta and --patience: try a higher --lr that decays, "
        advice += "--warmup-epochs, or more --patience"
    else:
        advice = "the loss stands still: try a lower --lr, or another --sched"
    return f"{text}. {advice[0].upper()}{advice[1:]}."
