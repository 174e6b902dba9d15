"""Train an image classifier, keep its best epoch, and test that one once.

    python train.py --model mlp                                     # MNIST
    python train.py --model vit --opt adamw --sched cosine          # CIFAR-10
    python train.py --model cnn --data path/to/images --epochs 20   # yours: train/<class>/*, test/<class>/*
    python train.py --resume runs/vit-cifar10-adamw-cosine/last.pt
    python train.py --eval runs/vit-cifar10-adamw-cosine/best.pt

The rooms of this file: arguments, set-up, one pass, the run, main. Every file that it imports can be copied alone.
"""

import argparse
import contextlib
import functools
import math
import platform
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoints
import cnn_cifar10
import data as datasets
import devices
import early_stopping
import finetune
import mlp_mnist
import optimizers
import outputs
import plot
import schedulers
import vit

MODELS = {"mlp": (mlp_mnist, mlp_mnist.MLP), "cnn": (cnn_cifar10, cnn_cifar10.CNN), "vit": (vit, vit.ViT)}
EVAL_BATCH = 500
DRAW_EVERY = 30  # seconds: drawing takes less than one
NOT_FINITE = "lower --lr, or add --warmup-epochs or --clip-grad 1"

# ---------------------------------------------------------------------------------------------- arguments


def make_parser(model):
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=f"{__doc__.splitlines()[0]} The defaults in brackets are those of --model {model}.",
        usage=argparse.SUPPRESS,  # an error is one line
        allow_abbrev=False,
    )
    flag = parser.add_argument_group("run").add_argument
    flag("--model", default="mlp", choices=MODELS, help="each has flags of its own: --model NAME --help (mlp)")
    flag("--epochs", type=float, metavar="N", help="length of the run, fractions allowed (%(default)s)")
    flag("--batch-size", type=int, metavar="N", help="images per optimizer step (%(default)s)")
    flag("--accum", type=int, default=1, metavar="N", help="pass a batch in N pieces, to save memory (%(default)s)")
    flag("--seed", type=int, default=0, metavar="N", help="of weights, split, order and augmentation (%(default)s)")
    flag("--device", default="auto", help="cuda, mps or cpu; auto takes the first that is there")
    flag("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"], help="precision: auto is bf16 where native")
    flag("--out", metavar="DIR", help="output folder (runs/<model>-<data>-<opt>-<sched>)")
    flag("--log-interval", type=int, default=0, metavar="N", help="report every N steps too (0: every epoch)")
    flag("--resume", metavar="FILE", help="go on with the run that wrote this last.pt")
    flag("--eval", metavar="FILE", help="print the test accuracy of this checkpoint and nothing else")
    flag("--init", metavar="FILE", help="start from the weights of a checkpoint, or from those of a vit_* of timm")
    flag("--freeze", action="append", default=[], metavar="PREFIX", help="don't train these weights; repeatable")
    flag("--tensorboard", action="store_true", help="write TensorBoard events too")

    flag = parser.add_argument_group("data").add_argument
    flag("--data", metavar="NAME", help=f"{', '.join(datasets.NAMES)}, or a folder of images (%(default)s)")
    flag("--data-dir", default="data", metavar="DIR", help="where datasets and caches lie (%(default)s)")
    flag("--img-size", type=int, metavar="N", help="scale a folder's images to N x N (as the first, at most 64)")
    flag("--val-split", type=float, default=0.1, metavar="X", help="held out: fraction or count (%(default)s)")
    flag("--limit", type=int, metavar="N", help="train on N images only")
    flag("--crop-pad", type=int, default=0, metavar="N", help="shift images by up to N pixels (%(default)s)")
    flag("--flip", action=argparse.BooleanOptionalAction, default=False, help="mirror half of them (%(default)s)")

    flag = parser.add_argument_group("loss and stopping").add_argument
    flag("--smoothing", type=float, default=0.0, metavar="X", help="label smoothing (%(default)s)")
    flag("--monitor", default="val_acc", choices=["val_acc", "val_loss"], help="what picks the best epoch (val_acc)")
    flag("--patience", type=int, default=20, metavar="N", help="stop after N epochs without a best; 0: never (20)")
    flag("--min-delta", type=float, default=0.0, metavar="X", help="by how much a best must be better (%(default)s)")

    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", choices=optimizers.OPTIMIZERS, help="(%(default)s)")
    group.add_argument("--clip-grad", type=float, metavar="X", help="largest norm of the gradient (%(default)s)")
    optimizers.add_args(group)
    group = parser.add_argument_group("schedule")
    group.add_argument("--sched", choices=schedulers.SCHEDULES, help="(%(default)s)")
    schedulers.add_args(group)
    MODELS[model][0].add_args(parser.add_argument_group(f"--model {model}"))
    return parser


def parse_args(argv=None):
    """The arguments of a run: what the user gave, else the model's RECIPE, else the optimizer's and common defaults.

    Returns them, and as a dict those that the user gave. Raises ValueError for what can be seen to be wrong in them.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", default="mlp")
    first.add_argument("--resume")
    first.add_argument("--init")
    chosen = first.parse_known_args(argv)[0]
    resumed = checkpoints.load(chosen.resume, keys=checkpoints.RESUME_KEYS)["args"] if chosen.resume else {}
    model = resumed.get("model", chosen.model if chosen.model in MODELS else "mlp")

    parser, recipe = make_parser(model), MODELS[model][0].RECIPE
    defaults = vars(parser.parse_args([]))
    parser.set_defaults(**recipe)  # so that --help shows them
    if chosen.init and not resumed:
        keywords = read_init(chosen.init, model)["model_args"]
        recipe = recipe | {name: value for name, value in keywords.items() if name in defaults}
    unset = []  # an action that appends starts with a copy of it
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in given.items() if value is not unset}

    if resumed:
        refuse_another_run(resumed, given)
        args = argparse.Namespace(**defaults | resumed | given)
    else:
        opt = given.get("opt", recipe["opt"])
        if opt != recipe["opt"]:  # the recipe's rate, decay, momentum ... were chosen for its own optimizer
            recipe = {k: v for k, v in recipe.items() if k not in optimizers.options_of(recipe["opt"])}
        args = argparse.Namespace(**defaults | optimizers.DEFAULTS[opt] | recipe | given)
        if "warmup_epochs" not in given:
            args.warmup_epochs = min(args.warmup_epochs, args.epochs / 5)
    if not args.eval:
        check(args, given)
    return args, given


def refuse_another_run(resumed, given):
    """A resumed run may be prolonged and moved. Anything else would make its figures those of no run at all."""
    moved = {"resume", "epochs", "patience", "device", "out", "data_dir", "log_interval", "tensorboard"}
    for name in given.keys() - moved:
        before = resumed.get(name)
        if given[name] != before:
            raise ValueError(
                f"{flag_name(name)} {given[name]} would make it another run: the one in --resume has {before}"
            )


def flag_name(name):
    return "--" + name.replace("_", "-")


def check(args, given):
    """Refuse values out of range, and flags that would do nothing."""
    whole, finite = "a whole number of at least", "a finite number of at least 0"
    for name, rule, holds in (
        ("epochs", "a finite number above 0", lambda x: 0 < x < math.inf),
        ("batch_size", f"{whole} 1", lambda x: x >= 1),
        ("accum", f"{whole} 1 and at most --batch-size", lambda x: 1 <= x <= args.batch_size),
        ("seed", f"{whole} 0", lambda x: x >= 0),
        ("log_interval", f"{whole} 0", lambda x: x >= 0),
        ("img_size", f"{whole} 1", lambda x: x is None or x >= 1),
        ("val_split", "0, a fraction below 1 or a count", lambda x: 0 <= x < 1 or (x < math.inf and x == int(x))),
        ("limit", f"{whole} 1", lambda x: x is None or x >= 1),
        ("crop_pad", f"{whole} 0", lambda x: x >= 0),
        ("smoothing", "at least 0 and less than 1", lambda x: 0 <= x < 1),
        ("patience", f"{whole} 0", lambda x: x >= 0),
        ("min_delta", finite, lambda x: 0 <= x < math.inf),
        ("lr", "a finite number above 0", lambda x: 0 < x < math.inf),
        ("weight_decay", finite, lambda x: 0 <= x < math.inf),
        ("momentum", "at least 0 and less than 1", lambda x: 0 <= x < 1),
        ("opt_betas", "two numbers of at least 0 and less than 1", lambda x: all(0 <= b < 1 for b in x)),
        ("clip_grad", "above 0", lambda x: x is None or x > 0),
    ):
        if not holds(getattr(args, name)):
            raise ValueError(f"{flag_name(name)} {getattr(args, name)} must be {rule}")
    for choice, known, options_of in (
        ("opt", optimizers.OPTIMIZERS, optimizers.options_of),
        ("sched", schedulers.SCHEDULES, schedulers.options_of),
    ):
        chosen = getattr(args, choice)
        for name in sorted(set().union(*map(options_of, known)) - options_of(chosen)):
            if name in given:
                raise ValueError(f"{flag_name(name)} has no effect with --{choice} {chosen}: leave it out")
    if args.nesterov and args.momentum == 0:
        raise ValueError("--nesterov needs a --momentum above 0")
    if args.opt == "lbfgs" and args.amp == "fp16":
        raise ValueError("--opt lbfgs can't scale its gradients, as --amp fp16 must: use --amp off")
    if args.val_split == 0:
        for name in ("patience", "monitor", "min_delta"):
            if name in given:
                raise ValueError(f"{flag_name(name)} has no effect with --val-split 0: there is nothing to monitor")
        if args.sched == "plateau":
            raise ValueError("--sched plateau needs a validation set: --val-split must be above 0")
    if args.sched == "plateau" and 0 < args.patience <= args.patience_epochs:
        raise ValueError(
            f"--patience {args.patience} must be larger than --patience-epochs {args.patience_epochs}: "
            "else the run stops before the rate can drop"
        )
    make_schedule(args)  # raises too


def make_schedule(args):
    options = {name: getattr(args, name) for name in schedulers.schedule.__kwdefaults__ if name != "mode"}
    mode = "min" if args.monitor == "val_loss" else "max"
    return schedulers.schedule(args.sched, lr=args.lr, epochs=args.epochs, mode=mode, **options)


# ---------------------------------------------------------------------------------------------- set-up


def load_data(args, given):
    """The dataset, and what of its training part is trained on and what is held out."""
    data = datasets.load(args.data, args.data_dir, img_size=args.img_size, fallback="data" not in given)
    train_part, val_part = datasets.split(data.train, args.val_split, args.seed)
    if args.limit:
        train_part = datasets.limit(train_part, args.limit, args.seed)
    if args.crop_pad >= data.train[0].shape[-1]:
        raise ValueError(f"--crop-pad {args.crop_pad} must be less than the image's {data.train[0].shape[-1]} pixels")
    return data, train_part, val_part


def build(args, data):
    """A fresh model on the CPU. Its weights depend on --seed alone."""
    torch.manual_seed(args.seed)
    _, channels, image_size, _ = data.train[0].shape
    sizes = dict(image_size=image_size, channels=channels, num_classes=len(data.classes))
    return MODELS[args.model][0].build(args, **sizes)


def read_init(path, model):
    """What --init starts from, with keys model_args, state_dict and classes: a checkpoint, or a vit_* of timm."""
    content = checkpoints.load(path, keys=())
    if content.keys() >= checkpoints.KEYS:
        if content["model"] != model:
            raise ValueError(f"--init {path} holds a {content['model']}, not a {model}: use --model {content['model']}")
        return content
    if model != "vit":
        raise ValueError(f"--init {path} is not a checkpoint of train.py; weights of timm need --model vit")
    try:
        keywords, state = vit.from_timm(content)
    except ValueError as error:
        raise ValueError(f"--init {path} is not a checkpoint of train.py, and {error}") from None
    return dict(model_args=keywords, state_dict=state, classes=None)


def initialise(model, args, data):
    """Give a model the weights of --init, as far as they fit; returns a line that says how far."""
    start = read_init(args.init, args.model)
    state, resized = start["state_dict"], ""
    if start["classes"] and list(start["classes"]) != list(data.classes):
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    if args.model == "vit" and (adapted := model.resize_positions(state)) is not state:
        old, new = (tuple(s["pos_embedding"].shape) for s in (state, adapted))
        state, resized = adapted, f"; positions resized from {old} to {new}"
    try:
        return f"start from {args.init}: {finetune.load_matching(model, state)}{resized}"
    except ValueError as error:
        raise ValueError(f"--init {args.init}: {error}") from None


def rebuild(checkpoint):
    """The trained model of a checkpoint, on the CPU."""
    if checkpoint["model"] not in MODELS:
        raise ValueError(f"the checkpoint's model {checkpoint['model']!r} is not known; known are {', '.join(MODELS)}")
    model = MODELS[checkpoint["model"]][1](**checkpoint["model_args"])
    model.load_state_dict(checkpoint["state_dict"])
    return model


def make_optimizer(args, model):
    groups = optimizers.parameter_groups(model, weight_decay=args.weight_decay, decay_all=args.decay_all)
    options = {name: getattr(args, name) for name in optimizers.options_of(args.opt) if name not in optimizers.DECAY}
    optimizer = optimizers.OPTIMIZERS[args.opt](groups, **options)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


# ---------------------------------------------------------------------------------------------- one pass


def backward(model, images, labels, args, precision, scaler, optimizer):
    """Leave the gradient of a batch's mean loss in the parameters, clipped.

    Returns the loss, the number of right answers and the gradient's norm (0 without --clip-grad) as one device tensor:
    reading a number would make the host wait for the device in every step.
    """
    optimizer.zero_grad(set_to_none=True)
    result = torch.zeros(3, device=images.device)
    for x, y in zip(images.chunk(args.accum), labels.chunk(args.accum), strict=True):
        with devices.autocast(x.device, precision):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=args.smoothing) * (len(x) / len(images))
        scaler.scale(loss).backward()
        result[0] += loss.detach()
        result[1] += (logits.argmax(1) == y).sum()
    if args.clip_grad:
        scaler.unscale_(optimizer)
        result[2] = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
    return result


def step_with_closure(optimizer, gradient, seed):
    """One step of an optimizer that evaluates the loss several times (L-BFGS). Returns the first evaluation."""
    results = []

    def closure():
        torch.manual_seed(seed)  # the same dropout each time: the line search compares losses
        results.append(gradient())
        return results[-1][0]

    optimizer.step(closure)
    return results[0]


def evaluate(model, part, data, device, precision):
    """The mean cross-entropy and the accuracy of a model over all images of a part."""
    model.eval()
    total = torch.zeros(2, device=device)
    with torch.inference_mode():
        for images, labels in datasets.batches(part, EVAL_BATCH, data.mean, data.std, device):
            with devices.autocast(device, precision):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            total += torch.stack((loss, (logits.argmax(1) == labels).sum()))
    loss, right = total.tolist()
    return loss / len(part[1]), right / len(part[1])


# ---------------------------------------------------------------------------------------------- the run


def train(args, data, model, device, precision, out, say, train_part, val_part, optimizer, resumed, signals):
    """Train until the last step, an early stop, a signal, or a value that isn't finite.

    Writes best.pt, last.pt and metrics.csv after each epoch. `signals` is the list of caught_signals.
    Returns (a row per epoch, why it stopped, the exit status).
    """
    factor = make_schedule(args)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    sizes = [end - start for start, end in datasets.bounds(len(train_part[1]), args.batch_size)]
    steps_per_epoch = len(sizes)
    total_steps = max(1, round(args.epochs * steps_per_epoch))
    step, history, seconds = 0, [], 0.0  # seconds of training in this epoch
    seen = torch.zeros(steps_per_epoch, 3, device=device)  # what backward returned, by step of this epoch
    if resumed:
        step, history, seconds = resumed["step"], resumed["history"], resumed["seconds"]
        seen.copy_(resumed["seen"])
        scaler.load_state_dict(resumed["scaler"])
        devices.restore_rng(resumed["rng"], device)

    def rate(step):
        return factor(step / steps_per_epoch, [row[args.monitor] for row in history])

    def save(name, **more):
        shape = data.train[0].shape
        content = dict(model=args.model, model_args=model.model_args, state_dict=model.state_dict())
        content |= dict(classes=data.classes, image_size=shape[-1], channels=shape[1], mean=data.mean, std=data.std)
        content |= dict(epoch=len(history), metrics=history[-1] if history else {}, args=vars(args))
        checkpoints.save(content | more, out / name)

    def save_last():
        states = dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), rng=devices.rng_state(device))
        save("last.pt", step=step, history=history, seconds=seconds, seen=seen, **states)

    write_events = outputs.make_events(out, say) if args.tensorboard else lambda row: None
    began, first_step, drawn = time.perf_counter(), step, time.perf_counter()

    while step < total_steps:
        # Train to the end of the epoch.
        epoch, done = divmod(step, steps_per_epoch)
        end = min(steps_per_epoch, done + total_steps - step)
        start = time.perf_counter()
        finetune.train_mode(model)
        order = dict(key=(args.seed, epoch), first=done, crop_pad=args.crop_pad, flip=args.flip)
        loader = datasets.batches(train_part, args.batch_size, data.mean, data.std, device, **order)
        for images, labels in datasets.progress(loader, total=end - done, desc=f"epoch {epoch + 1}", unit=" steps"):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate(step)
            gradient = functools.partial(backward, model, images, labels, args, precision, scaler, optimizer)
            if args.opt == "lbfgs":
                seen[done] = step_with_closure(optimizer, gradient, seed=step)
            else:
                seen[done] = gradient()
                scaler.step(optimizer)
                scaler.update()
            step, done = step + 1, done + 1
            if args.log_interval and step % args.log_interval == 0:
                loss = seen[:done, 0].mean().item()
                say(f"  step {step:,} of {total_steps:,}  train loss {loss:.4f}")
                if not math.isfinite(loss):
                    break
            if signals or done == end:
                break
        rows = seen[:done].tolist()  # waits for the device, so that the clock is right
        seconds += time.perf_counter() - start
        for at, (loss, _, norm) in enumerate(rows, step - done):
            if not math.isfinite(loss + norm):
                what = f"the training loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
                say(f"{what} at step {at + 1:,}, learning rate {args.lr * rate(at):.3g}: {NOT_FINITE}")
                return history, "non-finite loss", 1
        if done < end:
            save_last()
            return history, "interrupted", 128 + signals[0]

        # Validate, keep the best, save, report.
        count, row = sum(sizes[:done]), dict(epoch=epoch + 1, step=step, lr=args.lr * rate(step - 1))
        row["train_loss"] = sum(loss * size for (loss, _, _), size in zip(rows, sizes, strict=False)) / count
        row["train_acc"] = sum(right for _, right, _ in rows) / count
        row["val_loss"], row["val_acc"] = math.nan, math.nan
        if args.val_split:
            row["val_loss"], row["val_acc"] = evaluate(model, val_part, data, device, precision)
            if not math.isfinite(row["val_loss"]):
                at = f"at step {step:,}, learning rate {row['lr']:.3g}"
                say(f"the validation loss is {row['val_loss']} {at}: {NOT_FINITE}")
                return history, "non-finite loss", 1
        row["seconds"], row["images_per_second"], seconds = seconds, count / seconds, 0.0
        history.append(row)
        best = find_best(args, history)
        if best is row:
            save("best.pt")
        save_last()
        outputs.write_metrics(history, out / "metrics.csv")
        write_events(row)
        if time.perf_counter() - drawn > DRAW_EVERY:
            draw_curves(history, best, out)
            drawn = time.perf_counter()
        left = (time.perf_counter() - began) / (step - first_step) * (total_steps - step)
        say(outputs.epoch_line(row, math.ceil(args.epochs), best is row, left))
        if args.patience and early_stopping.waited(history, best, args.warmup_epochs) >= args.patience:
            say(early_stopping.explain(history, best, args.monitor))
            if args.sched in ("cosine", "linear", "onecycle"):
                say(f"The low rates at the end of --sched {args.sched} were not reached: --patience 0 lets it end.")
            return history, "early stop", 0
        if signals:
            return history, "interrupted", 128 + signals[0]
    return history, "finished", 0


def find_best(args, history):
    """The row of the best epoch; without validation, the last."""
    if args.val_split == 0:
        return history[-1] if history else None
    return early_stopping.best_row(history, args.monitor, args.min_delta)


def draw_curves(history, best, out):
    """Draw curves.png. False without matplotlib."""
    with contextlib.suppress(ImportError):
        plot.draw({out.name: history}, out / "curves.png", best={out.name: best["epoch"]} if best else {})
        return True
    return False


def finish(args, data, model, device, precision, out, say, history, stopped):
    """Read the test set, once, with the best weights, if the run has ended; write result.json and curves.png."""
    best, test_loss, test_acc = find_best(args, history), None, None
    if stopped in ("finished", "early stop"):
        model.load_state_dict(checkpoints.load(out / "best.pt")["state_dict"])
        test_loss, test_acc = evaluate(model, data.test, data, device, precision)
        why = (
            f"best {args.monitor}, {best[args.monitor]:.4f}" if args.val_split else "the last one, as none was held out"
        )
        say(f"{stopped}: the result is epoch {best['epoch']} ({why})")
        say(f"test acc {test_acc:.4f}  loss {test_loss:.4f}  ({data.name}, {len(data.test[1]):,} images, read once)")
    elif stopped == "interrupted":
        say(f"interrupted: python train.py --resume {out / 'last.pt'} goes on from here")
    seconds = sum(row["seconds"] for row in history)
    images = sum(row["seconds"] * row["images_per_second"] for row in history)
    result = dict(model=args.model, data=data.name, test_acc=test_acc, test_loss=test_loss)
    for name, key in (("best_epoch", "epoch"), ("best_val_acc", "val_acc"), ("best_val_loss", "val_loss")):
        result[name] = best[key] if best and not math.isnan(best[key]) else None
    result |= dict(epochs_run=len(history), stopped=stopped, train_seconds=seconds)
    result |= dict(images_per_second=images / seconds if seconds else None)
    result |= dict(
        params=sum(p.numel() for p in model.parameters()), seed=args.seed, device=devices.device_name(device)
    )
    result |= dict(amp=precision, torch=torch.__version__, args=vars(args))
    result |= dict(command=outputs.command(), commit=outputs.commit())
    outputs.write_result(result, out / "result.json")
    if history and not draw_curves(history, best, out):
        say("no curves.png: pip install matplotlib")


# ---------------------------------------------------------------------------------------------- main


def load_for(checkpoint, name, data_dir):
    """A dataset, normalised as the checkpoint's model knows it. Raises ValueError if it isn't of the same kind."""
    size, channels = checkpoint["image_size"], checkpoint["channels"]
    data = datasets.load(name, data_dir, img_size=size)
    if data.classes != checkpoint["classes"]:
        raise ValueError(f"the checkpoint knows the classes {checkpoint['classes']}, --data {name} has {data.classes}")
    if data.test[0].shape[1:] != (channels, size, size):
        found, known = ("x".join(map(str, s)) for s in (data.test[0].shape[1:], (channels, size, size)))
        raise ValueError(f"the checkpoint knows images of {known}, those of --data {name} are {found}")
    data.mean, data.std = checkpoint["mean"], checkpoint["std"]
    return data


def print_test(args, given):
    """--eval: the test accuracy of a saved checkpoint."""
    for name in given.keys() - {"eval", "model", "data", "data_dir", "device", "amp"}:
        raise ValueError(f"{flag_name(name)} has no effect with --eval: leave it out")
    checkpoint = checkpoints.load(args.eval)
    if given.get("model", checkpoint["model"]) != checkpoint["model"]:
        raise ValueError(f"{args.eval} holds a {checkpoint['model']}, not --model {args.model}")
    data = load_for(checkpoint, given.get("data", checkpoint["args"]["data"]), args.data_dir)
    device = devices.choose_device(args.device)
    model = rebuild(checkpoint).to(device)
    loss, acc = evaluate(model, data.test, data, device, devices.choose_precision(args.amp, device))
    print(f"test acc {acc:.4f}  loss {loss:.4f}  ({data.name}, {len(data.test[1]):,} images)")


def set_up(args, given):
    """All that may be refused, in the order of its cost; then the run's folder. Nothing is written before that."""
    device = devices.choose_device(args.device)
    amp = "off" if args.opt == "lbfgs" and args.amp == "auto" else args.amp  # its line search needs the digits
    precision = devices.choose_precision(amp, device)
    resumed = checkpoints.load(args.resume, keys=checkpoints.RESUME_KEYS) if args.resume else None
    data, train_part, val_part = load_data(args, given)
    args.data = "shapes" if data.name == "shapes" else args.data
    model = build(args, data)
    started = initialise(model, args, data) if args.init and not resumed else None
    finetune.freeze(model, args.freeze)
    if resumed:
        model.load_state_dict(resumed["state_dict"])
    model.to(device, memory_format=torch.channels_last)  # convolutions are faster so; matrices don't mind
    optimizer = make_optimizer(args, model)
    if resumed:
        optimizer.load_state_dict(resumed["optimizer"])
    parts = [datasets.place(part, device) for part in (train_part, val_part)]

    default = Path("runs") / f"{args.model}-{data.name}-{args.opt}-{args.sched}"
    out = args.out or (Path(args.resume).parent if resumed else None)
    out = outputs.claim(out, default, going_on=resumed and Path(args.resume).resolve().parent == Path(out).resolve())
    say = outputs.make_say(out / "log.txt")
    say(f"$ {outputs.command()}")
    say(f"torch {torch.__version__}, python {platform.python_version()}, {devices.device_name(device)}, {precision}")
    if data.note:
        say(data.note)
    counts = [f"{len(labels):,}" for _, labels in (train_part, val_part, data.test)]
    shape = "x".join(map(str, data.train[0].shape[1:]))
    say(
        f"{data.name}: {counts[0]} images to train on, {counts[1]} to validate, {counts[2]} to test; "
        f"{len(data.classes)} classes, {shape}"
    )
    say(
        f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters; {args.opt}, lr {args.lr:g}, "
        f"weight decay {args.weight_decay:g}, {args.sched}, {args.epochs:g} epochs, batches of {args.batch_size}"
    )
    if started:
        say(started)
    say(f"writing to {out}" + (f", going on after step {resumed['step']:,}" if resumed else ""))
    return (args, data, model, device, precision, out, say), (*parts, optimizer, resumed)


@contextlib.contextmanager
def caught_signals():
    """A list that gets the number of the first SIGINT or SIGTERM. After it the old rule holds: a second one kills."""
    numbers, old = [], {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def handler(number, frame):
        numbers.append(number)
        for n in old:
            signal.signal(n, signal.SIG_DFL)

    for n in old:
        signal.signal(n, handler)
    try:
        yield numbers
    finally:
        for n in old:
            signal.signal(n, old[n])


def fail(status, error, program="train.py"):
    """One line on standard error; returns the exit status."""
    print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def main(argv=None):
    try:
        args, given = parse_args(argv)
        if args.eval:
            print_test(args, given)
            return 0
        common, more = set_up(args, given)
    except (ValueError, OSError) as error:
        return fail(2, error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    try:
        with caught_signals() as signals:
            history, stopped, status = train(*common, *more, signals)
        finish(*common, history, stopped)
    except torch.OutOfMemoryError:
        return fail(
            1, f"out of memory at --batch-size {args.batch_size}: lower it, or raise --accum (now {args.accum})"
        )
    except OSError as error:
        return fail(1, error)
    return status


if __name__ == "__main__":
    sys.exit(main())
