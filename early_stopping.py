"""Which epoch is the best so far, and is it time to stop? Both follow from the list of epochs, so there is no state.

    from early_stopping import best_row, waited

    history = []
    for epoch, accuracy in enumerate([0.5, 0.7, 0.6, 0.65], start=1):
        history.append({"epoch": epoch, "val_acc": accuracy})
        best = best_row(history, "val_acc")
        if best is history[-1]:
            print(f"epoch {epoch} is the best so far: save the model")
        if waited(history, best) >= 2:
            print(f"no improvement for 2 epochs: stop after epoch {epoch}")
            break

Needs the standard library alone.
"""

import math


def best_row(history: list[dict], monitor: str, min_delta: float = 0.0) -> dict | None:
    """The last row better than the best before it by more than min_delta; None while every value is NaN.

    A row has "epoch", from 1 on, and the monitored value. Lower is better if the name `monitor` ends in loss, else
    higher.
    """
    sign = -1 if monitor.endswith("loss") else 1
    best = None
    for row in history:
        if not math.isnan(row[monitor]) and (best is None or sign * (row[monitor] - best[monitor]) > min_delta):
            best = row
    return best


def waited(history: list[dict], best: dict | None, warmup_epochs: float = 0) -> int:
    """The number of evaluations since the best one. Those of the warm-up don't count."""
    since = max(best["epoch"] if best else 0, warmup_epochs)
    return sum(row["epoch"] > since for row in history)
