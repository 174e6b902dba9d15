"""What values the flags of train.py may have, and the one line that says so.

    check(args)                                  # raises ValueError: "--epochs 0 must be a finite number above 0"

Copied alone, this file needs nothing but the standard library.
"""

import math


def flag_name(name):
    """batch_size -> --batch-size"""
    return "--" + name.replace("_", "-")


def whole(least):
    return f"a whole number of at least {least}", lambda x: x >= least


ABOVE_0 = "a finite number above 0", lambda x: 0 < x < math.inf
FROM_0 = "a finite number of at least 0", lambda x: 0 <= x < math.inf
BELOW_1 = "at least 0 and less than 1", lambda x: 0 <= x < 1
RANGES = {
    "epochs": ABOVE_0,
    "minutes": ABOVE_0,
    "batch_size": whole(1),
    "seed": ("a whole number of at least 0 and below 2^63", lambda x: 0 <= x < 2**63),
    "runs": whole(1),
    "log_interval": whole(0),
    "save_every": whole(0),
    "img_size": ("a whole number from 1 to 1024", lambda x: 1 <= x <= 1024),
    "val_split": ("0, a fraction below 1 or a count", lambda x: 0 <= x < math.inf and (x < 1 or x == int(x))),
    "limit": whole(1),
    "crop_pad": whole(0),
    "reprob": ("between 0 and 1", lambda x: 0 <= x <= 1),
    "mixup": FROM_0,
    "cutmix": FROM_0,
    "mixup_off_epoch": whole(0),
    "smoothing": BELOW_1,
    "distill": ABOVE_0,
    "temperature": ABOVE_0,
    "ema": BELOW_1,
    "patience": whole(0),
    "min_delta": FROM_0,
    "lr": ABOVE_0,
    "weight_decay": FROM_0,
    "layer_decay": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "momentum": BELOW_1,
    "opt_betas": ("two numbers of at least 0 and less than 1", lambda x: all(0 <= b < 1 for b in x)),
    "clip_grad": ("above 0", lambda x: x > 0),
}


def check(args):
    """Raise ValueError for the first value out of its range. None, where a flag may be left out, is in every range."""
    for name, (rule, holds) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not holds(value):
            raise ValueError(f"{flag_name(name)} {value} must be {rule}")
    if not 1 <= args.accum <= args.batch_size:
        raise ValueError(f"--accum {args.accum} must be at least 1 and at most --batch-size {args.batch_size}")


def refuse_idle(given, names, because):
    """Raise ValueError if one of the names is among the flags that the user gave."""
    for name in sorted(names):
        if name in given:
            raise ValueError(f"{flag_name(name)} has no effect {because}: leave it out")
