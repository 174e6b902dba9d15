"""Check a setup in about ten seconds before a long run, or find a learning rate for it.

    python diagnose.py --model vit --opt adamw --sched cosine
    python diagnose.py --model cnn --find-lr lr.png

It takes the flags of train.py that shape the training, and writes nothing but the plot of --find-lr, besides datasets
and caches in --data-dir. Each check prints one line: ok or FAIL, a number, and what to do. Exit status: 0, 1 if a check
fails, 2 for wrong arguments. The test images are compared with the others; their labels are not read.
"""

import dataclasses
import itertools
import math
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, __file__.removesuffix("diagnose.py"))  # python -P leaves this folder out
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports below without a traceback

import torch
import torch.nn.functional as F

import augment
import data
import train
from utils import arguments, build, errors, evaluation, finetune, report

FEW = 5  # steps of --find-lr: from smooth[FEW - 1] on the smoothed loss is that of enough batches
LRS = [1e-7 * 10 ** (i / 12) for i in range(97)]  # of --find-lr, from 1e-7 to 10


def parse_args(argv=None):
    """train.py's arguments, and the plot's path, or None without --find-lr."""
    parser = arguments.Parser(
        "diagnose.py",
        description="Check a setup before a long run, or find a learning rate for it.",
        epilog="Every other flag is one of train.py: python train.py --model NAME --help.",
    )
    text = "raise the learning rate until the loss diverges, suggest one, and plot it all into FILE (%(const)s)"
    parser.add_argument("--find-lr", nargs="?", const="find-lr.png", metavar="FILE", help=text)
    own, rest = parser.parse_known_args(argv)
    args, _ = arguments.parse(rest, "diagnose.py")
    arguments.reject_idle(args, {"resume", "eval"}, "with diagnose.py")
    if own.find_lr is not None:
        if args.opt in ("rprop", "lbfgs"):
            raise ValueError(f"--find-lr can't be used with --opt {args.opt}, which finds the size of its steps itself")
        path = Path(own.find_lr)
        if path.suffix.lower() != ".png" or not path.parent.is_dir() or (path.exists() and not path.is_file()):
            raise ValueError(f"--find-lr {own.find_lr} must be a .png file in a folder that exists")
        report.check_replaceable(path)
        arguments.reject_among_images("--find-lr", own.find_lr, args.data)
    # Flags that don't shape a step, such as --tta, are no mistake: they are those of the run to come. But the batches
    # here are small already, and batch norm needs more than a few images in a micro-batch. Nor is --minutes measured.
    return arguments.changed(args, accum=1, minutes=None), own.find_lr


def plain_batches(run, size):
    """An epoch of normalised training images and their labels in random order, without augmentation."""
    mean, std, key = run.dataset.mean, run.dataset.std, (run.args.seed, 0)
    return augment.batches(run.train_set, size, mean, std, run.device, key=key)


def descend(run, multipliers, batches):
    """Train as train.py does, a step for each multiplier of the initial learning rate; yield each step's totals."""
    finetune.train_mode(run.model)
    for multiplier, batch in zip(multipliers, batches, strict=False):
        for group in run.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        yield train.train_step(run, *batch).tolist()


def lr_curve(run):
    """The multiplier at up to 1,000 steps from the run's first to its last, their epochs, and the peak's index."""
    last = run.total_steps - 1
    steps = sorted({i * last // 999 for i in range(1000)})
    epochs = [step / run.steps_per_epoch for step in steps]
    values = [run.schedule(epoch) for epoch in epochs]
    return values, epochs, values.index(max(values))


# --------------------------------------------------------- the checks: each returns (passed, what was found, remedy)
# `earlier` holds what overfit_a_batch leaves for the two checks after it.


def normalisation(run, earlier):
    """With the right constants, training images have mean 0 and standard deviation 1."""
    dataset = run.dataset
    means, stds = data.pixel_stats(dataset.train.images)
    passed = True
    for mean, std, used_mean, used_std in zip(means, stds, dataset.mean, dataset.std, strict=True):
        passed &= abs(mean - used_mean) < 0.05 * std and abs(std - used_std) < 0.05 * std
    found = f"mean {dataset.mean} and std {dataset.std} are used, {means} and {stds} measured"
    given = run.args.mean or run.args.std
    remedy = "leave --mean and --std out, or give the measured ones" if given else "use them (CONSTANTS in data.py)"
    return passed, found, remedy


def hashes(images):
    """A number for each image, equal for equal pixels."""
    return [hash(image.tobytes()) for image in images.cpu().numpy()]


def overlap(run, earlier):
    """Held-out images are not trained on, pixel for pixel. Real sets hold a few twins: one in a thousand is allowed."""
    training = hashes(run.train_set.images)
    validation = hashes(run.val_set.images)
    test = hashes(run.dataset.test.images)
    known = set(training)
    in_val = sum(number in known for number in validation)
    known.update(validation)
    in_test = sum(number in known for number in test)
    found = f"{in_val} of {len(validation):,} validation images are training images too, "
    found += f"{in_test} of {len(test):,} test images are training or validation images"
    passed = in_val <= len(validation) / 1000 and in_test <= len(test) / 1000
    return passed, found, "remove the copies from one side"


def labels(run, earlier):
    """A linear fit to coarse pixels beats one to shuffled labels; each image is predicted by a fit to all others."""
    size = evaluation.batch_size(run.train_set.images.shape[1:])
    count = math.ceil(min(5000, len(run.train_set.labels)) / size)
    coarse, answers = [], []
    for images, batch_answers in itertools.islice(plain_batches(run, size), count):
        coarse.append(F.adaptive_avg_pool2d(images.cpu(), min(16, images.shape[-1])))  # MPS can't pool 28 pixels to 16
        answers.append(batch_answers.cpu())
    answers = torch.cat(answers)
    n, classes = len(answers), len(run.dataset.classes)
    x = F.pad(torch.cat(coarse).flatten(1), (0, 1), value=1.0)
    shuffled = answers[torch.randperm(n, generator=augment.seeded("shuffle"))]
    wanted = torch.stack([answers, shuffled], dim=1)
    y = F.one_hot(wanted, classes).float().flatten(1)
    gram = x.T @ x
    gram += 0.1 * gram.diagonal().mean() * torch.eye(len(gram))  # ridge regression
    solved = torch.linalg.solve(gram, x.T).T
    # Leave-one-out predictions in closed form, without fitting n times.
    leverage = (x * solved).sum(1, keepdim=True)  # by how much a prediction follows its own label
    left_out = (solved @ (x.T @ y) - leverage * y) / (1 - leverage)
    real, chance = (left_out.view(n, 2, classes).argmax(2) == wanted).float().mean(0).tolist()
    found = f"a linear fit finds {real:.1%} of {n:,} images left out of it, {chance:.1%} with shuffled labels"
    if n < 50 * classes:
        return True, f"{found} (fewer than 50 images a class are too few to tell)", ""
    noise = math.sqrt(max(chance, 1 / classes) / n)
    return real > chance + 5 * noise, found, "see whether the labels belong to these images: they look shuffled"


def loss_at_initialisation(run, earlier):
    """A fresh model knows nothing, and its loss should show it."""
    some = data.Split(run.train_set.images[:500], run.train_set.labels[:500])
    loss, _ = evaluation.evaluate(run.model, some, run.dataset, run.device, run.precision)
    guess = math.log(len(run.dataset.classes))
    found = f"{loss:.4f} before training, ln({len(run.dataset.classes)}) is {guess:.4f}"
    lowest = 0.0 if run.args.init else 0.8 * guess  # weights from elsewhere may know these classes
    return lowest < loss < 1.2 * guess, found, "start the last layer smaller, such as at zero"


def overfit_a_batch(run, earlier):
    """A few images can be learned by an optimizer that needs no tuning. The next two checks need this one."""
    trial = build.trial(run, opt="adamw", clip_grad=None)
    trainable = [p for p in trial.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trainable, "initial_lr": 2e-3}])  # descend() sets the learning rate
    trial = dataclasses.replace(trial, optimizer=optimizer)
    reached = set()  # names of parameters that had a gradient
    images, answers = next(plain_batches(run, 16))
    batches = itertools.repeat((images, answers, len(answers)))
    for _, correct, count in descend(trial, [1.0] * 40, batches):
        for name, parameter in trial.model.named_parameters():
            if parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any():
                reached.add(name)
        accuracy = correct / count
    earlier.update(trained=trial.model, reached=reached)
    found = f"{accuracy:.0%} of {len(answers)} images learned in 40 steps"
    return accuracy > 0.7, found, "see what keeps the images from the logits, or lower --dropout (mlp, vit)"


def gradients(run, earlier):
    """Every parameter that isn't frozen on purpose gets a finite gradient that isn't 0, and the optimizer has it."""
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    parameters = dict(run.model.named_parameters())
    frozen = {name for prefix in run.args.freeze for name in finetune.below(prefix, parameters)}
    frozen.update(getattr(run.model, "fixed", ()))
    wanted = {name: p for name, p in parameters.items() if name not in frozen}
    still = [name for name, p in wanted.items() if name not in earlier["reached"] or id(p) not in held]
    found = f"{len(wanted) - len(still)} of {len(wanted)} weight tensors learn"
    if frozen:
        found += f" ({len(frozen)} frozen)"
    if still:
        found += f", not {finetune.few(still)}"
    return not still, found, "look for requires_grad, detach(), and what the optimizer is given"


def batch_independence(run, earlier):
    """A prediction doesn't depend on the other images of the batch."""
    images, _ = next(plain_batches(run, 16))
    model = earlier["trained"].eval()
    with torch.inference_mode():
        together = model(images)
        apart = torch.cat([model(image) for image in images.split(1)])
    difference = ((together - apart).abs().max() / together.abs().max().clamp(min=1e-9)).item()
    return difference < 0.01, f"logits differ by {difference:.1g} of the largest", "look for statistics over the batch"


def schedule(run, earlier):
    """The learning rate comes up to --lr, and ends at its lowest after that."""
    lr = run.args.lr
    values, epochs, peak = lr_curve(run)
    found = f"learning rate {lr * values[0]:.2g} at first, {lr * values[peak]:.2g}, the highest, at epoch "
    found += f"{epochs[peak]:.3g}, {lr * values[-1]:.2g} at last"
    ends_low = run.args.sched == "restarts" or values[-1] <= 1.01 * min(values[peak:]) + 1e-6
    return values[peak] > 0.5 and ends_low, found, "make --warmup-epochs and --t-max fit --epochs"


def learning_rate(run, earlier):
    """The loss doesn't double in 8 steps through the schedule up to its peak and 8 steps at its peak."""
    args = run.args
    values, _, peak = lr_curve(run)
    short = [values[peak * i // 8] for i in range(8)] + [values[peak]] * 8
    trial = build.trial(run, batch_size=max(min(64, args.batch_size), run.least_per_batch(1)))
    losses = [loss_sum / count for loss_sum, _, count in descend(trial, short, build.training_batches(trial, 0))]
    found = f"training loss {losses[0]:.4f} at first, {max(losses):.4f} at most in 16 steps up to --lr {args.lr:g}"
    calm = all(loss < 2 * losses[0] for loss in losses)  # NaN isn't
    return calm, found, "lower --lr (--find-lr suggests one), or add --warmup-epochs"


CHECKS = (
    normalisation, overlap, labels, loss_at_initialisation, overfit_a_batch, gradients, batch_independence, schedule,
    learning_rate,
)  # fmt: skip


def check(run):
    """Print a line for each check. Returns the exit status."""
    earlier, failed = {}, 0
    for function in CHECKS:
        passed, found, remedy = function(run, earlier)
        name = function.__name__.replace("_", " ")
        if passed:
            errors.show(f"ok    {name:22}  {found}")
        else:
            failed += 1
            errors.show(f"FAIL  {name:22}  {found}: {remedy}")
    outcome = f"{failed} of {len(CHECKS)} checks failed" if failed else f"all {len(CHECKS)} checks passed"
    errors.show(f"{outcome}, on {run.dataset.name}")
    return int(failed > 0)


# ---------------------------------------------------------------------------------------------- the learning rate


def find_lr(run):
    """The learning-rate range test (arXiv:1506.01186): each step at a higher one, until the smoothed loss has doubled,
    after five steps at least.

    The model is left as it is. Returns the learning rates, the smoothed losses and the suggestion: the geometric mean
    of the learning rate at which the loss falls fastest and a tenth of the one at which it is lowest. Raises ValueError
    if the loss isn't finite in the first steps, or is 0.
    """
    trial = build.trial(run)
    steps = descend(trial, [lr / run.args.lr for lr in LRS], build.training_batches(trial, 0))
    smooth, mean = [], 0.0
    steps = data.progress_bar(steps, total=len(LRS), desc="find-lr", unit=" steps")
    for step, (loss_sum, _, images) in enumerate(steps, start=1):
        mean += 0.2 * (loss_sum / images - mean)
        value = mean / (1 - 0.8**step)  # as the mean began at 0
        if not math.isfinite(value):
            break
        smooth.append(value)
        if step > FEW and value >= 2 * min(smooth[FEW - 1 :]):
            break
    if len(smooth) < FEW:
        raise ValueError("--find-lr: the loss isn't finite in the first steps, see --weight-decay and --loss")
    if min(smooth) == 0:
        raise ValueError("--find-lr: the loss is 0, there is nothing left to learn: leave --init out")
    lowest = smooth.index(min(smooth[FEW - 1 :]), FEW - 1)
    # Over four steps: one loss alone is noisy.
    fastest = max(range(FEW - 1, lowest + 1), key=lambda i: smooth[i - 4] - smooth[i])
    return LRS[: len(smooth)], smooth, math.sqrt(LRS[fastest] * LRS[lowest] / 10)


def suggest(run, path):
    """Print the range test's suggestion and plot it."""
    errors.show(f"up to {len(LRS)} steps, each at a higher learning rate ...")
    lrs, smooth, suggestion = find_lr(run)
    least = min(smooth[FEW - 1 :])
    lowest = lrs[smooth.index(least, FEW - 1)]
    fall = max(0.0, 1 - least / smooth[0])
    errors.show(f"try --lr {suggestion:.1g} (the loss fell by {fall:.0%} and was lowest at {lowest:.2g})")
    if fall < 0.05:
        errors.show("That is little to judge by: compare short runs with learning rates around it.")
    try:
        figure = report.new_figure(6, 3.6)
    except ImportError:
        errors.show("no plot: pip install matplotlib")
        return
    axis = figure.subplots()
    axis.semilogx(lrs, smooth, color="#0072B2")
    axis.xaxis.set_major_formatter(lambda lr, _: f"{lr:g}")  # the default is TeX, which report.save turns off
    axis.axvline(suggestion, color="#D55E00", linestyle="--", label=f"suggestion {suggestion:.1g}")
    axis.set(xlabel="learning rate", ylabel="training loss, smoothed", ylim=(0, 1.5 * max(smooth[:FEW])))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    with errors.drawing():
        report.save(figure, path)
    errors.show(f"wrote {path}")


def command(argv):
    args, path = parse_args(argv)
    run = train.prepare(args)
    if run.dataset.note:
        errors.show(run.dataset.note.strip())
    return suggest(run, path) if path else check(run)


def main(argv=None):
    return errors.exit_status("diagnose.py", lambda: command(argv), as_flags=arguments.as_flags)


if __name__ == "__main__":
    sys.exit(main())
