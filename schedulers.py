"""Learning-rate schedules as plain functions of time, and a linear warm-up before any of them.

    python schedulers.py --sched cosine --epochs 20 --warmup-epochs 2     # epoch,lr as CSV
    python schedulers.py --sched all --epochs 90 --plot schedules.png     # all of them in one picture

In a loop of your own (this file needs nothing but the standard library):

    factor = schedule("cosine", lr=0.1, epochs=20, warmup_epochs=2)
    for step in range(20 * steps_per_epoch):
        for group in optimizer.param_groups:                    # group["initial_lr"] = group["lr"], once, before
            group["lr"] = group["initial_lr"] * factor(step / steps_per_epoch)
        ...

At every epoch boundary a schedule has the value of the torch.optim.lr_scheduler class named in its docstring, stepped
once per epoch; between boundaries the smooth ones are smooth. There is no state to save: a schedule depends on the time
alone, and plateau on the list of values that it has been shown.

To add a schedule, write a function whose first argument is `t`, the epochs since the warm-up ended, and whose keywords
are options of `schedule` (or `length`, `floor`, `values`, see there). It returns the factor of the starting rate. Then
name it in SCHEDULES.
"""

import argparse
import bisect
import inspect
import math
import sys

WARMUP_START = 0.01  # a warm-up starts at this part of its end, like LinearLR(start_factor=0.01): the rate is never 0


def none(t):
    """ConstantLR(factor=1)."""
    return 1.0


def step(t, *, gamma, step_size):
    """StepLR(step_size, gamma)."""
    return gamma ** (t // step_size)


def multistep(t, *, gamma, milestones):
    """MultiStepLR(milestones, gamma)."""
    return gamma ** bisect.bisect_right(milestones, t)


def exp(t, *, gamma):
    """ExponentialLR(gamma)."""
    return gamma**t


def cosine(t, *, t_max, floor):
    """CosineAnnealingLR(T_max=t_max, eta_min=min_lr). It doesn't restart: beyond t_max the rate climbs back."""
    return floor + (1 - floor) * (1 + math.cos(math.pi * t / t_max)) / 2


def restarts(t, *, t_0, t_mult, floor):
    """CosineAnnealingWarmRestarts(T_0=t_0, T_mult=t_mult, eta_min=min_lr), SGDR, arXiv:1608.03983."""
    if t_mult == 1:
        t %= t_0
    while t >= t_0:
        t, t_0 = t - t_0, t_0 * t_mult
    return cosine(t, t_max=t_0, floor=floor)


def linear(t, *, length, floor):
    """LinearLR(start_factor=1, end_factor=min_lr / lr, total_iters=length)."""
    return 1 + (floor - 1) * min(1, t / length)


def onecycle(t, *, length):
    """OneCycleLR(max_lr=lr, total_steps=length + 1), momentum left alone, arXiv:1708.07120.

    Stepped per epoch, torch's class counts values, not the intervals between them: `length` epochs have length + 1
    boundaries. Up along a cosine from lr / 25 in the first 30 %, then down to lr / 250,000.
    """
    peak = 0.3 * (length + 1) - 1
    if t < peak:
        return 1 + (1 / 25 - 1) * (1 + math.cos(math.pi * t / peak)) / 2
    return cosine(t - peak, t_max=length - peak, floor=1 / 25e4)


def plateau(t, *, values, mode, gamma, patience_epochs, floor):
    """ReduceLROnPlateau(mode, factor=gamma, patience=patience_epochs, min_lr=min_lr, eps=0), shown `values` in turn."""
    factor, best, waited = 1.0, -math.inf if mode == "max" else math.inf, 0
    for value in values:
        if value > best * (1 + 1e-4) if mode == "max" else value < best * (1 - 1e-4):
            best, waited = value, 0
        else:
            waited += 1
        if waited > patience_epochs:
            factor, waited = max(factor * gamma, floor), 0
    return factor


SCHEDULES = {f.__name__: f for f in (none, step, multistep, exp, cosine, restarts, plateau, linear, onecycle)}


def options_of(sched):
    """The options of `schedule` that this schedule reads, as a set of names."""
    reads = set(inspect.signature(SCHEDULES[sched]).parameters)
    return reads | ({"min_lr"} if "floor" in reads else set())


def schedule(
    sched="cosine",
    *,
    lr,
    epochs,
    warmup_epochs=0.0,
    min_lr=0.0,
    gamma=None,
    step_size=10.0,
    milestones=None,
    t_max=None,
    t_0=None,
    t_mult=1,
    patience_epochs=10,
    mode="max",
):
    """Build a schedule: a function `factor(epoch, values=())` that gives the factor of each group's own starting rate.

    `epoch` is a float, the epochs trained so far; `values` are the monitored values so far, one per epoch (read by
    plateau alone). All lengths are in epochs, fractions allowed, and count from the end of the warm-up, as in torch's
    SequentialLR([LinearLR(0.01), ...]). `min_lr` is a rate for the group that starts at `lr`; the others keep their
    ratio to it. Left out, gamma is 0.1 (0.9 for exp), milestones are 1/2 and 3/4 of the length, t_max is the length
    and t_0 half of it. Raises ValueError for a value out of range.
    """
    if sched not in SCHEDULES:
        raise ValueError(f"--sched {sched} is not known; known are {', '.join(SCHEDULES)}")
    length = epochs - warmup_epochs
    if gamma is None:
        gamma = 0.9 if sched == "exp" else 0.1
    if milestones is None:
        milestones = (length / 2, length * 3 / 4)
    t_max, t_0 = length if t_max is None else t_max, length / 2 if t_0 is None else t_0
    for name, value, rule, holds in (
        ("lr", lr, "a finite number above 0", 0 < lr < math.inf),
        ("epochs", epochs, "a finite number above 0", 0 < epochs < math.inf),
        ("warmup_epochs", warmup_epochs, f"at least 0 and less than --epochs {epochs:g}", 0 <= warmup_epochs < epochs),
        ("min_lr", min_lr, f"between 0 and --lr {lr:g}", 0 <= min_lr <= lr),
        ("gamma", gamma, "above 0 and at most 1", 0 < gamma <= 1),
        ("step_size", step_size, "a finite number above 0", 0 < step_size < math.inf),
        ("milestones", milestones, "increasing numbers above 0", _increasing(milestones)),
        ("t_max", t_max, "a finite number above 0", 0 < t_max < math.inf),
        ("t_0", t_0, "a finite number above 0", 0 < t_0 < math.inf),
        ("t_mult", t_mult, "a whole number of at least 1", t_mult >= 1),
        ("patience_epochs", patience_epochs, "a whole number of at least 0", patience_epochs >= 0),
    ):
        if not holds:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be {rule}")
    function = SCHEDULES[sched]
    known = dict(gamma=gamma, step_size=step_size, milestones=milestones, t_max=t_max, t_0=t_0, t_mult=t_mult)
    known |= dict(patience_epochs=patience_epochs, mode=mode, length=length, floor=min_lr / lr)
    keywords = {k: known[k] for k in options_of(sched) & set(known)}

    def factor(epoch, values=()):
        if "values" in options_of(sched):
            keywords["values"] = values[math.ceil(warmup_epochs) :]
        if epoch < warmup_epochs:
            return (WARMUP_START + (1 - WARMUP_START) * epoch / warmup_epochs) * function(0.0, **keywords)
        return function(round(epoch - warmup_epochs, 9), **keywords)  # 4 - 0.1 - 3.9 isn't 0, and a step would be late

    return factor


def _increasing(numbers):
    return all(a < b for a, b in zip((0, *numbers), (*numbers, math.inf), strict=True))


def numbers(text):
    """argparse type: '30,80' -> (30.0, 80.0)."""
    return tuple(float(part) for part in text.split(","))


def add_args(parser):
    """Add the schedules' flags; their defaults are those of `schedule`."""
    default = schedule.__kwdefaults__

    def flag(name, type, help):
        parser.add_argument(f"--{name}", type=type, default=default[name.replace("-", "_")], help=help, metavar="N")

    flag("warmup-epochs", float, "linear warm-up before the schedule, in epochs, fractions allowed (%(default)s)")
    flag("min-lr", float, "cosine, restarts, linear, plateau: the lowest rate (%(default)s)")
    flag("gamma", float, "step, multistep, exp, plateau: factor of each reduction (0.1; exp 0.9)")
    flag("step-size", float, "step: epochs between reductions (%(default)s)")
    flag("milestones", numbers, "multistep: epochs of the reductions, as in 30,80 (1/2 and 3/4 of the run)")
    flag("t-max", float, "cosine: epochs from the highest to the lowest rate (the run)")
    flag("t-0", float, "restarts: epochs of the first cycle (half of the run)")
    flag("t-mult", int, "restarts: each cycle is this many times as long as the one before (%(default)s)")
    flag("patience-epochs", int, "plateau: epochs without improvement before a reduction (%(default)s)")


def main():
    parser = argparse.ArgumentParser(
        description="Print or draw a learning-rate schedule.", allow_abbrev=False, usage=argparse.SUPPRESS
    )
    parser.add_argument("--sched", default="cosine", choices=[*SCHEDULES, "all"], help="(%(default)s)")
    parser.add_argument("--lr", type=float, default=0.1, help="the starting rate (%(default)s)")
    parser.add_argument("--epochs", type=float, default=20, help="length of the run (%(default)s)")
    parser.add_argument("--plot", metavar="FILE", help="draw it into FILE instead (plateau: nothing ever improves)")
    add_args(parser)
    args = parser.parse_args()
    options = {k: v for k, v in vars(args).items() if k not in ("sched", "plot")}
    names = list(SCHEDULES) if args.sched == "all" else [args.sched]
    if args.sched == "all" and not args.plot:
        parser.error("--sched all needs --plot FILE: one CSV holds one schedule")
    try:
        factors = {name: schedule(name, **options) for name in names}
    except ValueError as error:
        parser.error(str(error))
    if args.plot:
        try:
            return plot(factors, args.lr, args.epochs, args.plot)
        except (ValueError, OSError) as error:
            parser.error(f"--plot {args.plot} can't be written ({error})")
    print("epoch,lr")
    for epoch in range(int(args.epochs) + 1):
        print(f"{epoch},{args.lr * factors[args.sched](epoch, [0.0] * epoch):.10g}")


def plot(factors, lr, epochs, path):
    try:
        import matplotlib
    except ImportError:
        return print("no picture: pip install matplotlib", file=sys.stderr)
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(factors))
    rows = math.ceil(len(factors) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns + 1, 2.2 * rows + 0.6), squeeze=False)
    for axis in axes.flat[len(factors) :]:
        axis.remove()
    epoch = [epochs * i / 1000 for i in range(1000)]  # not the last moment, at which restarts would start again
    for (name, factor), axis in zip(factors.items(), axes.flat, strict=False):
        axis.plot(epoch, [lr * factor(t, [0.0] * int(t)) for t in epoch], color="#0072B2")
        axis.set(title=name, xlim=(0, epochs), ylim=(0, lr * 1.05), xlabel="epoch", ylabel="learning rate")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
