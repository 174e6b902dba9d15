"""Learning-rate schedules as plain functions of time, and a linear warm-up before any of them.

    python schedulers.py --sched cosine --epochs 20 --warmup-epochs 2        # epoch,lr as CSV
    python schedulers.py --sched step,cosine --epochs 90 --plot lr.png       # some, or all, in one plot

In a loop of your own (this file needs the standard library alone):

    from schedulers import schedule

    groups = [{"lr": 0.1}]                                      # in real life, optimizer.param_groups
    for group in groups:
        group.setdefault("initial_lr", group["lr"])             # which optimizer.state_dict() keeps for a resume
    multiplier = schedule("cosine", lr=0.1, epochs=20, warmup_epochs=2)
    steps_per_epoch = 100
    for step in range(20 * steps_per_epoch):
        for group in groups:
            group["lr"] = group["initial_lr"] * multiplier(step / steps_per_epoch)

plateau needs what it watches, one value for each epoch so far: `multiplier(epoch, val_losses)`, with mode="min".

At every epoch boundary a schedule has the value of the torch.optim.lr_scheduler class named in its docstring, stepped
once per epoch; between boundaries the smooth ones are smooth. There is no state to save: a schedule depends on the time
alone, and plateau on the list of values that it has been shown.

To add a schedule, write a function of `t`, the epochs since the warm-up ended, that returns the multiplier of the
initial learning rate. Its keywords are options of `schedule`, or: `length`, the epochs after the warm-up; `floor`,
min_lr / lr; `values`, what was monitored so far. Then name it in SCHEDULES.
"""

import argparse
import bisect
import inspect
import io
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

WARMUP_START = 0.01  # a warm-up starts at this share of its end, like LinearLR(start_factor=0.01): the lr is never 0


def none(t: float) -> float:
    """ConstantLR(factor=1)."""
    return 1.0


def step(t: float, *, gamma: float, step_size: float) -> float:
    """StepLR(step_size, gamma)."""
    return gamma ** math.floor(round(t / step_size, 9))  # 0.6 // 0.2 is 2: the reduction would come a step late


def multistep(t: float, *, gamma: float, milestones: Sequence[float]) -> float:
    """MultiStepLR(milestones, gamma)."""
    return gamma ** bisect.bisect_right([round(m, 9) for m in milestones], t)  # rounded, as t is in schedule()


def exp(t: float, *, gamma: float) -> float:
    """ExponentialLR(gamma)."""
    return gamma**t


def cosine(t: float, *, t_max: float, floor: float) -> float:
    """CosineAnnealingLR(T_max=t_max, eta_min=min_lr). It doesn't restart: after t_max the lr climbs back as it fell."""
    return floor + (1 - floor) * (1 + math.cos(math.pi * t / t_max)) / 2


def restarts(t: float, *, t_0: float, t_mult: int, floor: float) -> float:
    """CosineAnnealingWarmRestarts(T_0=t_0, T_mult=t_mult, eta_min=min_lr), SGDR, arXiv:1608.03983."""
    if t_mult == 1:  # in one go: the loop would take t / t_0 turns
        t = max(0.0, t - t_0 * math.floor(round(t / t_0, 9)))  # 0.6 % 0.2 is 0.2: the restart would come a step late
    while round(t / t_0, 9) >= 1:
        t, t_0 = max(0.0, t - t_0), t_0 * t_mult
    return cosine(t, t_max=t_0, floor=floor)


def linear(t: float, *, length: float, floor: float) -> float:
    """LinearLR(start_factor=1, end_factor=min_lr / lr, total_iters=length)."""
    return 1 + (floor - 1) * min(1, t / length)


def onecycle(t: float, *, length: float) -> float:
    """OneCycleLR(max_lr=lr, total_steps=length + 1), momentum left alone, arXiv:1708.07120.

    Stepped per epoch, torch's class counts values, not the intervals between them: `length` epochs have length + 1
    boundaries. Up along a cosine from lr / 25 until epoch 0.3 * (length + 1) - 1, then down to lr / 250,000. In less
    than 2.34 epochs there is no way up, and it starts somewhat below lr.
    """
    peak = 0.3 * (length + 1) - 1
    if t < peak:
        return 1 + (1 / 25 - 1) * (1 + math.cos(math.pi * t / peak)) / 2
    return cosine(min(t, length) - peak, t_max=length - peak, floor=1 / 25e4)


def plateau(t: float, *, values: Sequence[float], mode: str, gamma: float, patience_epochs: int, floor: float) -> float:
    """ReduceLROnPlateau(mode, factor=gamma, patience=patience_epochs, min_lr=min_lr, eps=0), shown `values` in turn."""
    multiplier, best, waited = 1.0, -math.inf if mode == "max" else math.inf, 0
    for value in values:
        waited += 1
        # 1e-4 is torch's default threshold. NaN is never better.
        better = value > best * (1 + 1e-4) if mode == "max" else value < best * (1 - 1e-4)
        if better:
            best, waited = value, 0
        if waited > patience_epochs:
            multiplier, waited = max(multiplier * gamma, floor), 0
    return multiplier


SCHEDULES = {f.__name__: f for f in (none, step, multistep, exp, cosine, restarts, plateau, linear, onecycle)}


def options_of(sched: str) -> set[str]:
    """The options of `schedule` that this schedule reads."""
    reads = set(inspect.signature(SCHEDULES[sched]).parameters)
    if "floor" in reads:
        reads.add("min_lr")
    return reads


def check(options: dict):
    """Raise ValueError for an option of `schedule` that is out of range."""
    epochs, lr = options["epochs"], options["lr"]
    length = "a finite number >= 1e-9", lambda x: 1e-9 <= x < math.inf
    above_0 = "a finite number above 0", lambda x: 0 < x < math.inf
    rules = {
        "lr": above_0,
        "epochs": above_0,
        "warmup_epochs": (f">= 0 and less than epochs, {epochs:g}", lambda x: 0 <= x < epochs),
        "min_lr": (f"between 0 and lr, {lr:g}", lambda x: 0 <= x <= lr),
        "gamma": ("above 0 and at most 1", lambda x: 0 < x <= 1),
        "step_size": length,
        "milestones": ("increasing numbers above 0", lambda x: all(a < b for a, b in pairwise((0, *x, math.inf)))),
        "t_max": length,
        "t_0": length,
        "t_mult": ("from 1 to 1,000,000", lambda x: 1 <= x <= 1_000_000),
        "patience_epochs": (">= 0 and below 2^53", lambda x: 0 <= x < 2**53),
        "mode": ("max or min", lambda x: x in ("max", "min")),
    }
    for name, (rule, holds) in rules.items():
        if not holds(options[name]):
            raise ValueError(f"{name} {options[name]} must be {rule}")


def schedule(
    sched: str = "cosine",
    *,
    lr: float,
    epochs: float,
    warmup_epochs: float = 0.0,
    min_lr: float = 0.0,
    gamma: float | None = None,
    step_size: float = 10.0,
    milestones: Sequence[float] | None = None,
    t_max: float | None = None,
    t_0: float | None = None,
    t_mult: int = 1,
    patience_epochs: int = 10,
    mode: str = "max",
) -> Callable[..., float]:
    """Build a schedule: a function `multiplier(epoch, values=())` of each group's initial learning rate.

    `epoch` is a float, the epochs trained so far; `values` are the monitored values so far, one per epoch (read by
    plateau alone). All lengths are in epochs, fractions allowed, and count from the end of the warm-up, as in torch's
    SequentialLR([LinearLR(0.01), ...]). `min_lr` is the lowest learning rate of the group that starts at `lr`; the
    others keep their ratio to it. Left out, gamma is 0.1 (0.9 for exp), milestones are 1/2 and 3/4 of the length, t_max
    is the length and t_0 half of it. `mode` says whether more is better, as of an accuracy ("max", the default here,
    not in torch), or less, as of a loss ("min"). Raises ValueError for a value out of range.
    """
    options = dict(locals())  # all the arguments, by name
    if sched not in SCHEDULES:
        raise ValueError(f"sched {sched} is unknown: choose from {', '.join(SCHEDULES)}")
    length = epochs - warmup_epochs
    left_out = {
        "gamma": 0.9 if sched == "exp" else 0.1,
        "milestones": (length / 2, length * 3 / 4),
        "t_max": length,
        "t_0": length / 2,
    }
    options |= {name: value for name, value in left_out.items() if options[name] is None}
    check(options)
    options |= {"length": length, "floor": min_lr / lr}
    function = SCHEDULES[sched]
    reads = inspect.signature(function).parameters
    keywords = {name: value for name, value in options.items() if name in reads}

    def multiplier(epoch, values=()):
        seen = {"values": values[math.ceil(warmup_epochs) :]} if "values" in reads else {}  # without the warm-up's
        if epoch < warmup_epochs:
            warm = WARMUP_START + (1 - WARMUP_START) * epoch / warmup_epochs
            return warm * function(0.0, **keywords, **seen)
        t = round(epoch - warmup_epochs, 9)  # 4 - 0.1 - 3.9 isn't 0: what begins there would come a step late
        return function(t, **keywords, **seen)

    return multiplier


def numbers(text: str) -> tuple[float, ...]:
    """argparse type: '30,80' -> (30.0, 80.0)."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be numbers, as in 30,80") from None


def add_args(parser):
    """Add the schedules' flags; their defaults are those of `schedule`."""
    default = schedule.__kwdefaults__

    def flag(name, type, help):
        parser.add_argument(f"--{name}", type=type, default=default[name.replace("-", "_")], help=help, metavar="N")

    flag("warmup-epochs", float, "linear warm-up before the schedule, in epochs, fractions allowed (%(default)s)")
    flag("min-lr", float, "cosine, restarts, linear, plateau: the lowest learning rate (%(default)s)")
    flag("gamma", float, "step, multistep, exp, plateau: multiplier of each reduction (0.1; exp 0.9)")
    flag("step-size", float, "step: epochs between reductions (%(default)s)")
    flag("milestones", numbers, "multistep: epochs after the warm-up, as in 30,80 (1/2 and 3/4 of the rest)")
    flag("t-max", float, "cosine: epochs from the highest to the lowest lr (all after the warm-up)")
    flag("t-0", float, "restarts: epochs of the first cycle (half of those after the warm-up)")
    flag("t-mult", int, "restarts: each cycle is this many times as long as the one before (%(default)s)")
    flag("patience-epochs", int, "plateau: epochs without improvement before a reduction (%(default)s)")


def names(text: str) -> list[str]:
    """argparse type: 'step,cosine' -> ["step", "cosine"], 'all' -> all of them."""
    chosen = list(SCHEDULES) if text == "all" else text.split(",")
    if not set(chosen) <= SCHEDULES.keys():
        raise argparse.ArgumentTypeError(f"{text} is unknown: choose from {', '.join(SCHEDULES)}, or all")
    return chosen


def one_line(text) -> str:
    """A text as one printable line of bounded length."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(text).split()))[:1000]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        super().error(one_line(message))


def main():
    parser = Parser(description="Print or plot learning-rate schedules.", allow_abbrev=False, usage=argparse.SUPPRESS)
    several = "one or more with commas, or all (cosine)"
    parser.add_argument("--sched", type=names, default=["cosine"], metavar="NAME", help=several)
    parser.add_argument("--lr", type=float, default=0.1, help="the initial learning rate (%(default)s)")
    parser.add_argument("--epochs", type=float, default=20, help="length of the run (%(default)s)")
    parser.add_argument("--plot", metavar="FILE", help="plot into FILE instead (plateau: nothing ever improves)")
    add_args(parser)
    args = parser.parse_args()
    options = {name: value for name, value in vars(args).items() if name not in ("sched", "plot")}
    if len(args.sched) > 1 and not args.plot:
        parser.error(f"--sched {','.join(args.sched)} needs --plot FILE: one CSV holds one schedule")
    if args.plot is not None and os.path.splitext(args.plot)[1].lower() not in (".png", ".pdf", ".svg"):
        parser.error(f"--plot {args.plot} must end in .png, .pdf or .svg")
    if args.plot is not None and os.path.exists(args.plot) and not os.path.isfile(args.plot):
        parser.error(f"--plot {args.plot} is no file: name another one")
    if not args.epochs <= 10_000:
        parser.error(f"--epochs {args.epochs:g} must be at most 10,000 to print or plot them")
    read = {"warmup_epochs", *(option for name in args.sched for option in options_of(name))}
    for name, default in schedule.__kwdefaults__.items():
        if name in options and name not in read and options[name] != default:
            parser.error(f"--{name.replace('_', '-')} has no effect with --sched {','.join(args.sched)}: leave it out")
    try:
        multipliers = {name: schedule(name, **options) for name in args.sched}
    except (ArithmeticError, ValueError) as error:
        name, _, rest = str(error).partition(" ")
        parser.error(f"--{name.replace('_', '-')} {rest}" if name in options else str(error))
    if args.plot:
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where it can't write a cache of fonts
        try:
            plot(multipliers, args.lr, args.epochs, args.plot)
        except (ValueError, OSError, RuntimeError) as error:  # such as matplotlib's, set to LaTeX where there is none
            parser.error(f"--plot {args.plot} can't be written ({error})")
        except ImportError:
            parser.exit(1, "schedulers.py: error: there is no matplotlib: pip install matplotlib\n")
    try:
        if args.plot:
            print(f"wrote {one_line(args.plot)}")
        else:
            print("epoch,lr")
            for epoch in range(int(args.epochs) + 1):
                print(f"{epoch},{args.lr * multipliers[args.sched[0]](epoch, [0.0] * epoch):.10g}")
        print(end="", flush=True)  # sys.stdout may be closed, and None
    except OSError as error:  # ... | head, or > a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try once more at the end
        if not (isinstance(error, BrokenPipeError) or args.plot):
            parser.error(f"standard output can't be written ({error})")


def plot(multipliers, lr, epochs, path):
    from matplotlib.figure import Figure

    columns = min(3, len(multipliers))
    rows = math.ceil(len(multipliers) / columns)
    figure = Figure(figsize=(3.2 * columns + 1, 2.2 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(multipliers) :]:
        axis.remove()
    points = [epochs * i / 2000 for i in range(2000)]  # not the last moment, at which restarts would start again
    for (name, multiplier), axis in zip(multipliers.items(), axes.flat, strict=False):
        values = [lr * multiplier(t, [0.0] * int(t)) for t in points]
        jumps = name in ("step", "multistep", "plateau", "none")
        axis.plot(points, values, color="#0072B2", drawstyle="steps-post" if jumps else "default")
        axis.set(title=name, xlim=(0, epochs), ylim=(0, lr * 1.05), xlabel="epoch", ylabel="learning rate")
        axis.spines[["top", "right"]].set_visible(False)
    drawn = io.BytesIO()  # a figure that can't be drawn replaces no file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of learning rates near the largest number
        figure.savefig(drawn, dpi=120, format=os.path.splitext(path)[1][1:].lower())
    with open(path, "wb") as file:
        file.write(drawn.getvalue())


if __name__ == "__main__":
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may not be in the terminal's alphabet
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
