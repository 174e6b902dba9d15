"""Check a set-up in about ten seconds before a long run, or find a learning rate for it.

    python diagnose.py --model vit --opt adamw --sched cosine
    python diagnose.py --model cnn --find-lr lr.png

It takes the flags of train.py that shape the training, and writes nothing but the picture of --find-lr. Each check
prints one line: ok or FAIL, a figure, and what to do. Exit status: 0, 1 if a check fails, 2 for wrong arguments. The
test images are compared with the others; their labels are not read.
"""

import argparse
import copy
import functools
import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import data as datasets
import optimizers
import train
from utils import arguments, devices, finetune, ranges
from utils.ranges import flag_name

LOWEST, HIGHEST, PER_DECADE = 1e-7, 10.0, 12  # the rates of --find-lr


def parse_args(argv=None):
    """train.py's arguments, what of them was given, and the picture's path, or None without --find-lr."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Every other flag is one of train.py: python train.py --model NAME --help.",
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    text = "raise the rate until the loss diverges, suggest one, and draw it all into FILE (%(const)s)"
    parser.add_argument("--find-lr", nargs="?", const="find-lr.png", metavar="FILE", help=text)
    own, rest = parser.parse_known_args(argv)
    args, given, _ = arguments.parse(rest, "diagnose.py")
    for name in given.keys() & {"resume", "eval"}:
        raise ValueError(f"{flag_name(name)} has no effect with diagnose.py: leave it out")
    if own.find_lr:
        if args.opt in ("rprop", "lbfgs"):
            raise ValueError(f"--find-lr can't be used with --opt {args.opt}, which finds the size of its steps itself")
        if Path(own.find_lr).suffix != ".png" or not Path(own.find_lr).parent.is_dir():
            raise ValueError(f"--find-lr {own.find_lr} must be a .png file in a folder that exists")
    names = {"out", "log_interval", "save_every", "tensorboard", "runs", "minutes", "compile", "ema", "tta", "patience"}
    ranges.refuse_idle(given, names | {"min_delta", "monitor"}, "with diagnose.py")
    args.accum = 1  # the batches here are small already: batch norm needs more than a few images in a piece
    return args, given, own.find_lr


def set_up(args, given):
    """What the checks look at: arguments, data, a fresh model, device and precision."""
    device = devices.choose_device(args.device)
    s = SimpleNamespace(args=args, device=device, precision=devices.choose_precision(args.amp, device))
    s.data, s.train_part, s.val_part = train.load_data(args, given)
    s.model = train.build(args, s.data, s.train_part, device)
    s.loss = train.make_loss(args, s.data, device, s.precision)
    if args.init:
        finetune.initialise(s.model, arguments.read_init(args.init, args.model), s.data.classes)
    learning = {name for name, p in s.model.named_parameters() if p.requires_grad}
    finetune.freeze(s.model, args.freeze)
    s.frozen = {name for name in learning if not s.model.get_parameter(name).requires_grad}  # on purpose
    s.frozen |= set(getattr(s.model, "fixed", ()))
    s.optimizer = train.make_optimizer(args, s.model)
    return s


def batches(s, size):
    """Normalised training images and their labels in random order, as they are, without end."""
    for epoch in itertools.count():
        key = (s.args.seed, epoch)
        yield from datasets.batches(s.train_part, size, s.data.mean, s.data.std, s.device, key=key)


def augmented(s, size):
    """The batches that training gets, but of this size."""
    args = argparse.Namespace(**vars(s.args) | dict(batch_size=size))
    for epoch in itertools.count():
        yield from train.training_batches(args, s.data, s.train_part, s.device, epoch, 0, 2)


def descend(s, model, optimizer, factors, loader):
    """Train the model as train.py does, a step for each factor of the starting rate.

    Yields what train.backward returns, before each step is taken: loss, right answers, norm.
    """
    scaler = torch.amp.GradScaler(s.device.type, enabled=s.precision == "fp16")
    starts = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step, (factor, (images, labels)) in enumerate(zip(factors, loader, strict=False)):
        for group, start in zip(optimizer.param_groups, starts, strict=True):
            group["lr"] = start * factor
        gradient = functools.partial(
            train.backward, model, images, labels, len(labels), s.loss, s.args, s.precision, scaler, optimizer
        )
        yield optimizers.take_step(gradient, optimizer, scaler, seed=step).tolist()


def factors(s):
    """The schedule as factors of --lr, at up to 1,000 steps from the run's first to its last, and their epochs."""
    per_epoch = len(datasets.bounds(len(s.train_part[1]), s.args.batch_size))
    steps = max(1, round(s.args.epochs * per_epoch))
    epochs = [step / per_epoch for step in sorted({i * (steps - 1) // 999 for i in range(1000)})]
    return [*map(arguments.make_schedule(s.args), epochs)], epochs


# ------------------------------------------------------------------ the checks: each returns (passed, figure, remedy)


def normalisation(s):
    """With the right constants, training images have mean 0 and standard deviation 1."""
    means, stds = datasets.pixel_stats(s.data.train[0])
    passed = all(
        abs(mean - m) < 0.05 * std and abs(std - d) < 0.05 * std
        for mean, std, m, d in zip(means, stds, s.data.mean, s.data.std, strict=True)
    )
    figure = f"by mean {s.data.mean} and std {s.data.std}, measured {means} and {stds}"
    return passed, figure, "use the measured ones (CONSTANTS in data.py)"


def hashes(images):
    """A 64-bit number for each uint8 image (n, channels, size, size) -> int64 (n,), equal for equal pixels."""
    weights = torch.randint(-(2**62), 2**62, (images.shape[1:].numel(),), generator=datasets.seeded("hash"))
    return torch.cat([(part.flatten(1).long() * weights).sum(1) for part in images.cpu().split(2000)])


def overlap(s):
    """Held-out images are not trained on, pixel for pixel. Real sets hold a few twins: one in a thousand is let by."""
    training, validation, test = (hashes(part[0]) for part in (s.train_part, s.val_part, s.data.test))
    in_val = torch.isin(validation, training).sum().item()
    in_test = torch.isin(test, torch.cat([training, validation])).sum().item()
    figure = f"{in_val} of {len(validation):,} validation images are training images too, "
    figure += f"{in_test} of {len(test):,} test images are training or validation images"
    passed = in_val <= len(validation) / 1000 and in_test <= len(test) / 1000
    return passed, figure, "remove the copies from one side"


def labels(s):
    """A linear fit of coarse pixels, each image predicted by a fit to all the others, beats one to shuffled labels."""
    images, answers = next(batches(s, 5000))
    n, classes = len(answers), len(s.data.classes)
    x = F.pad(F.adaptive_avg_pool2d(images, min(16, images.shape[-1])).flatten(1), (0, 1), value=1.0)
    shuffled = answers[torch.randperm(n, generator=datasets.seeded("shuffle")).to(s.device)]
    wanted = torch.stack([answers, shuffled], dim=1)
    y = F.one_hot(wanted, classes).float().flatten(1)
    gram = x.T @ x
    gram += 0.1 * gram.diagonal().mean() * torch.eye(len(gram), device=s.device)  # ridge regression
    solved = torch.linalg.solve(gram, x.T).T
    leverage = (x * solved).sum(1, keepdim=True)  # by how much a prediction follows its own label
    left_out = (solved @ (x.T @ y) - leverage * y) / (1 - leverage)
    real, chance = (left_out.view(n, 2, classes).argmax(2) == wanted).float().mean(0).tolist()
    figure = f"a linear fit finds {real:.1%} of {n:,} images left out of it, {chance:.1%} with shuffled labels"
    if n < 50 * classes:
        return True, f"{figure} (less than 50 images a class are too few to tell)", ""
    noise = math.sqrt(max(chance, 1 / classes) / n)
    return real > chance + 5 * noise, figure, "see whether the labels belong to these images: they look shuffled"


def first_loss(s):
    """A fresh model knows nothing, and its loss should say so."""
    loss, _ = train.evaluate(s.model, [t[:500] for t in s.train_part], s.data, s.device, s.precision)
    guess = math.log(len(s.data.classes))
    figure = f"{loss:.4f} before training, ln({len(s.data.classes)}) is {guess:.4f}"
    return 0.8 * guess < loss < 1.2 * guess, figure, "start the last layer smaller, such as at zero"


def memory(s):
    """A few images can be learned by heart by an optimizer that needs no tuning. The next two checks need this one."""
    batch = next(batches(s, 16))
    s.trained, s.reached = copy.deepcopy(s.model), set()
    optimizer = torch.optim.AdamW(s.trained.parameters(), 2e-3)
    for _, right, _ in descend(s, s.trained, optimizer, [1.0] * 40, itertools.repeat(batch)):
        for name, parameter in s.trained.named_parameters():
            if parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any():
                s.reached.add(name)
        learned = right / len(batch[1])
    return (
        learned > 0.7,
        f"{learned:.0%} of {len(batch[1])} images learned by heart in 40 steps",
        "see what keeps the images from the scores, or lower --dropout",
    )


def gradients(s):
    """Every parameter that isn't frozen on purpose gets a finite gradient that isn't 0, and the optimizer has it."""
    held = {id(p) for group in s.optimizer.param_groups for p in group["params"]}
    wanted = {name: p for name, p in s.model.named_parameters() if name not in s.frozen}
    still = [name for name, p in wanted.items() if name not in s.reached or id(p) not in held]
    figure = f"{len(wanted) - len(still)} of {len(wanted)} parameters learn"
    figure += f" ({len(s.frozen)} are frozen)" if s.frozen else ""
    figure += f", not {', '.join(still[:3])}{', ...' * (len(still) > 3)}" if still else ""
    return not still, figure, "look for requires_grad, detach(), and what the optimizer is given"


def alone(s):
    """A prediction doesn't depend on the images beside it."""
    images, _ = next(batches(s, 16))
    with torch.inference_mode():
        together = s.trained.eval()(images)
        apart = torch.cat([s.trained(image) for image in images.split(1)])
    difference = ((together - apart).abs().max() / together.abs().max().clamp(min=1e-9)).item()
    return difference < 0.01, f"scores differ by {difference:.1g} of the largest", "look for statistics over the batch"


def schedule(s):
    """The rate comes up to --lr, and ends at its lowest after that."""
    values, epochs = factors(s)
    peak = values.index(max(values))
    first, highest, last = (s.args.lr * values[i] for i in (0, peak, -1))
    figure = f"rate {first:.2g} at first, {highest:.2g} from epoch {epochs[peak]:.3g} on, {last:.2g} at last"
    ends_low = s.args.sched == "restarts" or values[-1] <= 1.01 * min(values[peak:]) + 1e-6
    return highest > s.args.lr / 2 and ends_low, figure, "make --warmup-epochs and --t-max fit --epochs"


def rate(s):
    """The loss doesn't double in 8 steps through the schedule up to its peak and 8 steps at its peak."""
    values, _ = factors(s)
    peak = values.index(max(values))
    short = [values[peak * i // 8] for i in range(8)] + [values[peak]] * 8
    model = copy.deepcopy(s.model)
    loader = augmented(s, min(64, s.args.batch_size))
    seen = [loss for loss, *_ in descend(s, model, train.make_optimizer(s.args, model), short, loader)]
    figure = f"training loss {seen[0]:.4f} at first, {max(seen):.4f} at most in 16 steps up to --lr {s.args.lr:g}"
    calm = all(loss < 2 * seen[0] for loss in seen)  # NaN isn't
    return calm, figure, "lower --lr (--find-lr suggests one), or add --warmup-epochs"


CHECKS = (normalisation, overlap, labels, first_loss, memory, gradients, alone, schedule, rate)


def check(s):
    """Print a line for each check. Returns the exit status."""
    failed = 0
    for function in CHECKS:
        passed, figure, remedy = function(s)
        failed += not passed
        line = f"{'ok' if passed else 'FAIL':4}  {function.__name__.replace('_', ' '):13}  {figure}"
        print(line if passed else f"{line}: {remedy}", flush=True)
    print(f"{failed} of {len(CHECKS)} checks failed" if failed else f"all {len(CHECKS)} checks passed")
    return int(failed > 0)


# ------------------------------------------------------------------------------------------------------- the rate


def find_lr(s):
    """The learning-rate range test (arXiv:1506.01186): each step at a higher rate, until the smoothed loss has doubled.

    The model is left as it is. Returns the rates, the smoothed losses and the suggestion: the geometric mean of the
    rate at which the loss falls fastest and a tenth of the one at which it is lowest.
    """
    count = round(math.log10(HIGHEST / LOWEST) * PER_DECADE) + 1
    rates = [LOWEST * 10 ** (i / PER_DECADE) for i in range(count)]
    model = copy.deepcopy(s.model)
    loader = augmented(s, s.args.batch_size)
    steps = descend(s, model, train.make_optimizer(s.args, model), [rate / s.args.lr for rate in rates], loader)
    smooth, mean = [], 0.0
    for step, (loss, *_) in enumerate(datasets.progress(steps, total=count, desc="find-lr", unit=" steps"), 1):
        mean += 0.2 * (loss - mean)
        smooth.append(mean / (1 - 0.8**step))
        if not smooth[-1] < 2 * min(smooth):  # NaN too
            break
    lowest = smooth.index(min(smooth))
    fastest = max(range(4, max(5, lowest + 1)), key=lambda i: smooth[i - 4] - smooth[i])
    return rates[: len(smooth)], smooth, math.sqrt(rates[fastest] * rates[lowest] / 10)


def suggest(s, path):
    """Print the range test's suggestion and draw it. Returns the exit status."""
    rates, smooth, suggestion = find_lr(s)
    lowest, fall = rates[smooth.index(min(smooth))], 1 - min(smooth) / smooth[0]
    print(f"try --lr {suggestion:.1g} (the loss fell by {fall:.0%} and was lowest at {lowest:.2g})")
    if fall < 0.05:
        print("That is little to judge by: compare short runs at rates around it.")
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return 0
    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.6), layout="tight")
    axis.semilogx(rates, smooth, color="#0072B2")
    axis.axvline(suggestion, color="#D55E00", linestyle="--", label=f"suggestion {suggestion:.1g}")
    axis.set(xlabel="learning rate", ylabel="training loss, smoothed", ylim=(0, 1.5 * smooth[0]))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")
    return 0


def main(argv=None):
    try:
        args, given, path = parse_args(argv)
        s = set_up(args, given)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        return train.fail(2, error, "diagnose.py")
    if s.data.note:
        print(s.data.note)
    try:
        return suggest(s, path) if path else check(s)
    except KeyboardInterrupt:
        return 130
    except torch.OutOfMemoryError:
        return train.fail(1, f"out of memory at --batch-size {args.batch_size}: lower it", "diagnose.py")
    except OSError as error:
        return train.fail(1, error, "diagnose.py")


if __name__ == "__main__":
    sys.exit(main())
