"""Train an image classifier, keep its best epoch, and test that one once.

    python train.py --model mlp                                     # MNIST
    python train.py --model vit --opt adamw --sched cosine          # CIFAR-10
    python train.py --model cnn --data path/to/images --epochs 20   # yours: train/<class>/*, test/<class>/*
    python train.py --resume runs/vit-cifar10-adamw-cosine/last.pt
    python train.py --eval runs/vit-cifar10-adamw-cosine/best.pt
    torchrun --nproc_per_node 2 train.py --model vit                # several processes

The rooms of this file: set-up, one pass, the run, main. Its flags are in arguments.py.
"""

import argparse
import copy
import functools
import itertools
import math
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import data as datasets
import early_stopping
import losses
import optimizers
import plot
from utils import arguments, budget, checkpoints, devices, distributed, ema, finetune, ranges, run_folder
from utils.ranges import flag_name

EVAL_BATCH = 500
DRAW_EVERY = 30  # seconds: drawing takes half of one
NOT_FINITE = "lower --lr, or add --warmup-epochs or --clip-grad 1"

# ---------------------------------------------------------------------------------------------- set-up


def load_data(args, given):
    """The dataset, and what of its training part is trained on and what is held out."""
    fallback = "data" not in given and not args.resume
    # A checkpoint may name a folder to read from, and none to write into.
    read_only = bool(args.resume) and "data_dir" not in given and args.data_dir != arguments.DATA_DIR
    if "img_size" in given and not Path(args.data).is_dir():
        raise ValueError(
            f"--img-size {args.img_size} has no effect with --data {args.data}: it's for folders of images"
        )
    where = dict(data_dir=args.data_dir, img_size=args.img_size, fallback=fallback, read_only=read_only)
    data = distributed.once_a_machine(lambda: datasets.load(args.data, **where))
    train_part, val_part = datasets.split(data.train, args.val_split, args.seed)
    if args.limit:
        train_part = datasets.limit(train_part, args.limit, args.seed)
    if args.crop_pad >= data.train[0].shape[-1]:
        raise ValueError(f"--crop-pad {args.crop_pad} must be less than the image's {data.train[0].shape[-1]} pixels")
    return data, train_part, val_part


def build(args, data, part, device):
    """A fresh model on the device. Its weights depend on --seed, and on the training part if it can `whiten`."""
    torch.manual_seed(args.seed)
    _, channels, image_size, _ = data.train[0].shape
    sizes = dict(image_size=image_size, channels=channels, num_classes=len(data.classes))
    try:
        model = arguments.MODELS[args.model][0].build(args, **sizes)
    except (TypeError, RuntimeError, MemoryError) as error:  # torch's words for sizes that no memory can hold
        raise ValueError(f"--model {args.model} can't be built in these sizes: {str(error)[:100]}") from None
    if hasattr(model, "whiten"):
        some = datasets.limit(part, min(512, len(part[1])), args.seed)
        model.whiten(next(datasets.batches(some, 512, data.mean, data.std, "cpu"))[0])
    # Convolutions are faster with the channels last, matrices don't mind. L-BFGS can't flatten such gradients.
    return model.to(device, memory_format=torch.preserve_format if args.opt == "lbfgs" else torch.channels_last)


def load_for(checkpoint, name, data_dir):
    """A dataset, normalised as the checkpoint's model knows it. Raises ValueError if it isn't of the same kind."""
    size, channels = checkpoint["image_size"], checkpoint["channels"]
    data = distributed.once_a_machine(lambda: datasets.load(name, data_dir, img_size=size))
    if data.classes != checkpoint["classes"]:
        raise ValueError(f"the checkpoint knows the classes {checkpoint['classes']}, --data {name} has {data.classes}")
    if data.test[0].shape[1:] != (channels, size, size):
        found, known = ("x".join(map(str, s)) for s in (data.test[0].shape[1:], (channels, size, size)))
        raise ValueError(f"the checkpoint knows images of {known}, those of --data {name} are {found}")
    data.mean, data.std = checkpoint["mean"], checkpoint["std"]
    return data


def make_optimizer(args, model):
    rates = {} if args.opt == "lbfgs" else dict(lr=args.lr, layer_decay=args.layer_decay, lr_scale=args.lr_scale)
    decay = dict(weight_decay=args.weight_decay, decay_all=args.decay_all)
    groups = optimizers.parameter_groups(model, **decay, **rates, hidden=args.opt == "muon")
    own = optimizers.options_of(args.opt) - optimizers.DECAY
    optimizer = optimizers.OPTIMIZERS[args.opt](groups, **{name: getattr(args, name) for name in own})
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def make_loss(args, data, device, precision):
    """The training loss, a function of (images, scores, labels): --loss, and with --teacher the teacher's part."""
    loss = losses.parse(args.loss, args.smoothing)
    if not args.teacher:
        return lambda images, scores, labels: loss(scores, labels)
    checkpoint = checkpoints.load(args.teacher)
    shape = (checkpoint["channels"], checkpoint["image_size"], checkpoint["image_size"])
    if (checkpoint["classes"], shape) != (data.classes, data.train[0].shape[1:]):
        raise ValueError(f"--teacher {args.teacher} knows other classes or sizes: {checkpoint['classes']}, {shape}")
    teacher = arguments.rebuild(checkpoint).to(device).eval().requires_grad_(False)
    means, stds = (torch.tensor([getattr(data, k), checkpoint[k]], device=device) for k in ("mean", "std"))
    scale, shift = (stds[0] / stds[1])[:, None, None], ((means[0] - means[1]) / stds[1])[:, None, None]

    def with_teacher(images, scores, labels):
        with torch.no_grad(), devices.autocast(device, precision):
            wanted = teacher(images * scale + shift)  # normalised as it knows them
        return loss(scores, labels) + args.distill * losses.distillation(scores, wanted.float(), args.temperature)

    return with_teacher


def smallest_batch(model):
    """Batch norm can't train on one image, in any process."""
    norms = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
    return 2 * distributed.count() if norms else 1


def restore(resumed, model, average, optimizer, scaler, state, device):
    """Put everything back as last.pt holds it. Raises ValueError if it doesn't fit."""
    try:
        if (resumed["model"], resumed["model_args"]) != (resumed["args"]["model"], model.model_args):
            raise ValueError(f"it holds a {resumed['model']} of {resumed['model_args']}")
        if resumed["seen"].shape != state["seen"].shape:
            raise ValueError(f"an epoch had {len(resumed['seen'])} steps and would have {len(state['seen'])} now")
        for row in resumed["history"]:
            if row.keys() != set(run_folder.COLUMNS) or not set(map(type, row.values())) <= {int, float}:
                raise ValueError(f"a row of its history is {row}")
        if not 0 <= max([row["step"] for row in resumed["history"]], default=0) <= resumed["step"]:
            raise ValueError(f"its history is ahead of its step {resumed['step']}")
        if average:
            average.load_state_dict(dict(model=resumed["state_dict"], updates=resumed["ema"]["updates"]))
        model.load_state_dict(resumed["ema"]["trained"] if average else resumed["state_dict"])
        optimizers.load_state(optimizer, resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])
        if distributed.rank() == 0:  # it has been added up over the processes
            state["seen"].copy_(resumed["seen"])
        if distributed.rank() < len(resumed["rng"]):
            devices.restore_rng(resumed["rng"][distributed.rank()], device)
        state |= {name: resumed[name] for name in ("step", "history", "seconds")}
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--resume can't go on with this file and these images: {str(error)[:200]}") from None


# ---------------------------------------------------------------------------------------------- one pass


def training_batches(args, data, part, device, epoch, first, least):
    """This process's share of each batch of an epoch, augmented, from step `first` on."""
    mixing = not args.mixup_off_epoch or epoch < args.mixup_off_epoch
    options = dict(augment=args.augment, crop_pad=args.crop_pad, flip=args.flip, erase=args.reprob)
    options |= dict(mixup=args.mixup * mixing, cutmix=args.cutmix * mixing, num_classes=len(data.classes))
    options |= dict(key=(args.seed, epoch), first=first, least=least, share=(distributed.rank(), distributed.count()))
    return datasets.batches(part, args.batch_size, data.mean, data.std, device, **options)


def backward(net, images, labels, size, loss, args, precision, scaler, optimizer):
    """Leave the gradient of a batch's mean loss in the parameters, clipped.

    `images` and `labels` are this process's share of the batch, `size` is the whole one's. Returns what adds up over
    the processes to the loss, the number of right answers and the gradient's norm (0 without --clip-grad), as one
    device tensor: reading a number would make the host wait for the device in every step.
    """
    optimizer.zero_grad(set_to_none=True)
    result, weight = torch.zeros(3, device=images.device), 1 / size
    if len(images) == 0:  # fewer images than processes: join the exchange of gradients with one that counts for nothing
        images, labels, weight = images.new_zeros(1, *images.shape[1:]), labels.new_zeros(1, *labels.shape[1:]), 0.0
    count = max(1, min(args.accum, len(images) // 2))  # no piece of one image: batch norm can't train on that
    pieces = list(zip(images.tensor_split(count), labels.tensor_split(count), strict=True))
    for i, (x, y) in enumerate(pieces):
        with distributed.exchange(net, i + 1 == len(pieces)):
            with devices.autocast(x.device, precision):
                scores = net(x).float()
            mean = loss(x, scores, y) * (len(x) * weight)
            scaler.scale(mean * distributed.count()).backward()  # gradients are averaged over the processes, not added
        result[0] += mean.detach()
        result[1] += (scores.argmax(1) == (y.argmax(1) if y.ndim == 2 else y)).sum() * bool(weight)
    if args.clip_grad:
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip_grad)
        if not scaler.is_enabled():  # else it's now and then infinite by design, and the step is left out
            result[2] = norm / distributed.count()
    return result


def evaluate(model, part, data, device, precision, *, loss="ce", tta=False, flip=False):
    """The mean loss and the accuracy over all images of a part, the same for any number of processes."""
    model.eval()
    first, every, loss = distributed.rank(), distributed.count(), losses.parse(loss)
    sums = torch.zeros(len(datasets.bounds(len(part[1]), EVAL_BATCH)), 2, device=device)  # by batch
    with torch.inference_mode():
        batches = datasets.batches(part, EVAL_BATCH, data.mean, data.std, device, first=first, every=every)
        for own, (images, labels) in zip(sums[first::every], batches, strict=True):
            with devices.autocast(device, precision):
                scores = (datasets.tta(model, images, flip=flip) if tta else model(images)).float()
            own[0] = loss(scores, labels) * len(labels)
            own[1] = (scores.argmax(1) == labels).sum()
    total, right = distributed.add_up(sums).cpu().double().sum(0).tolist()  # not every device has doubles
    return total / len(part[1]), right / len(part[1])


def scoring(args):
    """The keywords of `evaluate` that belong to a run."""
    return dict(loss=args.loss, tta=args.tta, flip=args.flip)


# ---------------------------------------------------------------------------------------------- the run


def epochs_within(args, data, model, device, precision, parts, loss):
    """How many epochs, in whole steps, fit into --minutes, validation and saving included: measured on copies."""
    rng, model, some = devices.rng_state(device), copy.deepcopy(model), [t[: 4 * EVAL_BATCH] for t in parts[1]]
    scaler, optimizer = torch.amp.GradScaler(device.type, enabled=precision == "fp16"), make_optimizer(args, model)
    least = smallest_batch(model)
    sizes = [end - start for start, end in datasets.bounds(len(parts[0][1]), args.batch_size, least)]

    epochs = (training_batches(args, data, parts[0], device, epoch, 0, least) for epoch in itertools.count())
    batches = zip(itertools.chain.from_iterable(epochs), itertools.cycle(sizes), strict=False)

    def step():
        (images, labels), size = next(batches)
        batch = (model.train(), images, labels, size)
        optimizers.take_step(
            functools.partial(backward, *batch, loss, args, precision, scaler, optimizer), optimizer, scaler, 0
        )

    def save():  # a file about as large as last.pt and best.pt
        with tempfile.TemporaryDirectory() as folder:
            content = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), best=model.state_dict())
            checkpoints.save(content, Path(folder) / "trial.pt")

    others = [(save, 1.0)]
    if args.val_split:
        validate = functools.partial(evaluate, model, some, data, device, precision, **scoring(args))
        others.append((validate, len(parts[1][1]) / len(some[1])))
    steps = budget.steps_within(60 * args.minutes, step, len(sizes), others)
    devices.restore_rng(rng, device)
    return steps / len(sizes)


def train(args, data, model, device, precision, out, say, parts, loss, average, optimizer, scaler, state, signals):
    """Train until the last step, an early stop, a signal, or a value that isn't finite.

    Writes best.pt, last.pt and metrics.csv after each epoch. `signals` is the list of caught_signals.
    Returns (a row per epoch, why it stopped, the exit status).
    """
    (train_part, val_part), factor, least = parts, arguments.make_schedule(args), smallest_batch(model)
    sizes = [end - start for start, end in datasets.bounds(len(train_part[1]), args.batch_size, least)]
    steps_per_epoch = len(sizes)
    total_steps = max(1, round(args.epochs * steps_per_epoch))
    # `seconds` of training in this epoch; what backward returned in it, by step.
    step, history, seconds, seen = (state[name] for name in ("step", "history", "seconds", "seen"))
    net = distributed.connect(model, device)  # the same model, which exchanges gradients with the other processes
    judged = average.model if average else model  # what is validated, tested and kept
    chance = losses.parse(args.loss)(torch.zeros(1, len(data.classes)), torch.zeros(1, dtype=torch.int64)).item()

    def rate(step):
        return factor(step / steps_per_epoch, [row[args.monitor] for row in history])

    def save(name, **more):
        shape = data.train[0].shape
        content = dict(model=args.model, model_args=model.model_args, state_dict=judged.state_dict())
        content |= dict(classes=data.classes, image_size=shape[-1], channels=shape[1], mean=data.mean, std=data.std)
        content |= dict(epoch=len(history), metrics=history[-1] if history else {}, args=vars(args))
        if distributed.rank() == 0:
            say.check()
            checkpoints.save(content | more, out / name)

    def save_last():
        states = dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        states |= dict(ema=dict(trained=model.state_dict(), updates=average.updates) if average else {})
        states |= dict(seen=distributed.add_up(seen.clone()), rng=distributed.gather(devices.rng_state(device)))
        save("last.pt", step=step, history=history, seconds=seconds, **states)

    if history and distributed.rank() == 0:  # a run that was killed after last.pt hasn't written these
        run_folder.write_metrics(history, out / "metrics.csv")
        if history[-1]["step"] == step and find_best(args, history) is history[-1]:
            save("best.pt")
    # A run that ended inside an epoch and is prolonged: so many steps of it have a row already.
    validated = step % steps_per_epoch if history and history[-1]["step"] == step else 0
    write_events = (
        run_folder.make_events(out, say) if args.tensorboard and distributed.rank() == 0 else lambda row: None
    )
    began, first_step, drawn = time.perf_counter(), step, time.perf_counter()

    while step < total_steps:
        best = find_best(args, history)
        if args.patience and early_stopping.waited(history, best, args.warmup_epochs) >= args.patience:
            say(early_stopping.explain(history, best, args.monitor, chance))
            if args.sched in ("cosine", "linear", "onecycle"):
                say(f"The low rates at the end of --sched {args.sched} were not reached: --patience 0 lets it end.")
            return history, "early stop", 0

        # Train to the end of the epoch.
        epoch, done = divmod(step, steps_per_epoch)
        end = min(steps_per_epoch, done + total_steps - step)
        start = time.perf_counter()
        finetune.train_mode(net)
        loader = training_batches(args, data, train_part, device, epoch, done, least)
        if distributed.rank() == 0:
            loader = datasets.progress(loader, total=end - done, desc=f"epoch {epoch + 1}", unit=" steps")
        for images, labels in loader:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate(step)
            batch = (net, images, labels, sizes[done])
            gradient = functools.partial(backward, *batch, loss, args, precision, scaler, optimizer)
            seen[done] = optimizers.take_step(gradient, optimizer, scaler, seed=step)
            if average:
                average.update(model)
            step, done = step + 1, done + 1

            stop = distributed.any_of(signals[0] if signals else 0)
            log, keep = (n and step % n == 0 for n in (args.log_interval, args.save_every))
            if not (stop or log or keep or done == end):
                continue
            rows = distributed.add_up(seen[:done].clone()).tolist()  # waits for the device, so that the clock is right
            seconds += time.perf_counter() - start
            if problem := early_stopping.not_finite(rows):
                at = step - done + problem[0]
                say(f"{problem[1]} at step {at + 1:,}, learning rate {args.lr * rate(at):.3g}: {NOT_FINITE}")
                return history, "non-finite loss", 1
            if log:
                say(f"  step {step:,} of {total_steps:,}  train loss {sum(row[0] for row in rows) / done:.4f}")
            if (keep or stop) and done < end:
                save_last()
            if stop or done == end:
                break
            start = time.perf_counter()
        if done < end:
            return history, "interrupted", 128 + stop

        # Validate, keep the best, save, report.
        distributed.spread(judged)  # batch norms have seen different images in each process
        rows, own_sizes = rows[validated:], sizes[validated:done]
        count, row = sum(own_sizes), dict(epoch=len(history) + 1, step=step, lr=args.lr * rate(step - 1))
        row["train_loss"] = sum(value * size for (value, _, _), size in zip(rows, own_sizes, strict=True)) / count
        row["train_acc"] = sum(right for _, right, _ in rows) / count
        row["val_loss"], row["val_acc"] = math.nan, math.nan
        if args.val_split:
            row["val_loss"], row["val_acc"] = evaluate(judged, val_part, data, device, precision, **scoring(args))
            if not math.isfinite(row["val_loss"]):
                at = f"at step {step:,}, learning rate {row['lr']:.3g}"
                say(f"the validation loss is {row['val_loss']} {at}: {NOT_FINITE}")
                return history, "non-finite loss", 1
        row["seconds"], row["images_per_second"], seconds = seconds, count / seconds, 0.0
        history.append(row)
        validated, best = 0, find_best(args, history)
        save_last()
        if best is row:
            save("best.pt")
        if distributed.rank() == 0:
            run_folder.write_metrics(history, out / "metrics.csv")
            write_events(row)
            if time.perf_counter() - drawn > DRAW_EVERY:
                draw_curves(history, best, out)
                drawn = time.perf_counter()
        left = (time.perf_counter() - began) / (step - first_step) * (total_steps - step)
        say(run_folder.epoch_line(row, math.ceil(args.epochs), best is row, left))
        if early_stopping.waited(history, best, args.warmup_epochs) == (args.patience + 1) // 2 < args.patience:
            say(early_stopping.explain(history, best, args.monitor, chance))
        if stop:
            return history, "interrupted", 128 + stop
    return history, "time budget" if args.minutes else "finished", 0


def find_best(args, history):
    """The row of the best epoch; without validation, the last."""
    if args.val_split == 0:
        return history[-1] if history else None
    return early_stopping.best_row(history, args.monitor, args.min_delta)


def draw_curves(history, best, out):
    """Draw curves.png. False without matplotlib."""
    try:
        plot.draw({out.name: history}, out / "curves.png", best={out.name: best["epoch"]} if best else {})
    except ImportError:
        return False
    return True


def finish(args, data, model, device, precision, out, say, history, stopped):
    """Read the test set, once, with the best weights, if the run has ended; write result.json and curves.png."""
    say.check()
    best, test_loss, test_acc = find_best(args, history), None, None
    if stopped in ("finished", "early stop", "time budget"):
        if distributed.rank() == 0:
            model.load_state_dict(checkpoints.load(out / "best.pt")["state_dict"])
        distributed.spread(model)
        test_loss, test_acc = evaluate(model, data.test, data, device, precision, **scoring(args))
        why = f"best {args.monitor}, {best[args.monitor]:.4f}" if args.val_split else "the last, as none was held out"
        say(f"{stopped}: the result is epoch {best['epoch']} ({why})")
        read = f"{data.name}, {len(data.test[1]):,} images, read once{', mean of views' * args.tta}"
        say(f"test acc {test_acc:.4f}  loss {test_loss:.4f}  ({read})")
    elif stopped == "interrupted":
        say(f"interrupted: python train.py --resume {out / 'last.pt'} goes on from here")
    if distributed.rank() > 0:
        return None
    result = dict(model=args.model, data=data.name, test_acc=test_acc, test_loss=test_loss)
    result |= run_folder.summary(history, best) | dict(stopped=stopped)
    result |= dict(params=sum(p.numel() for p in model.parameters()), seed=args.seed)
    result |= dict(device=devices.device_name(device), amp=precision, torch=torch.__version__, args=vars(args))
    result |= dict(command=run_folder.command(), commit=run_folder.commit())
    say.check()
    run_folder.write_result(result, out / "result.json")
    if history and not draw_curves(history, best, out):
        say("no curves.png: pip install matplotlib")
    return result


# ---------------------------------------------------------------------------------------------- main


def print_test(args, given):
    """--eval: the test accuracy of a saved checkpoint."""
    known = {"eval", "model", "data", "data_dir", "device", "amp"}
    ranges.refuse_idle(given, given.keys() - known, "with --eval")
    checkpoint = checkpoints.load(args.eval)
    if given.get("model", checkpoint["model"]) != checkpoint["model"]:
        raise ValueError(f"{args.eval} holds a {checkpoint['model']}, not --model {args.model}")
    run = argparse.Namespace(**dict(data="shapes", loss="ce", tta=False, flip=False, amp="auto") | checkpoint["args"])
    data = load_for(checkpoint, given.get("data", run.data), args.data_dir)
    device = distributed.own_device(devices.choose_device(args.device))
    model = arguments.rebuild(checkpoint).to(device)
    precision = devices.choose_precision(given.get("amp", run.amp), device)
    loss, acc = evaluate(model, data.test, data, device, precision, **scoring(run))
    read = f"{data.name}, {len(data.test[1]):,} images{', mean of views' * run.tta}"
    print(f"test acc {acc:.4f}  loss {loss:.4f}  ({read})")


def set_up(args, given, resumed):
    """All that may be refused, in the order of its cost; then the run's folder. Nothing is written before that."""
    device = distributed.own_device(devices.choose_device(args.device))
    precision = devices.choose_precision(args.amp, device)
    data, train_part, val_part = load_data(args, given)
    args.data = "shapes" if args.data in datasets.DOWNLOADS and data.name == "shapes" else args.data
    model = build(args, data, train_part, device)
    if distributed.rank():
        torch.manual_seed(args.seed + distributed.rank())  # dropout of its own
    started = ""
    if args.init and not resumed:
        fits = finetune.initialise(model, arguments.read_init(args.init, args.model), data.classes)
        started = f"start from {args.init}: {fits}"
    finetune.freeze(model, args.freeze)
    optimizer, loss = make_optimizer(args, model), make_loss(args, data, device, precision)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    average = ema.Average(model, args.ema) if args.ema else None
    least, count = smallest_batch(model), len(train_part[1])
    if min(args.batch_size, count) < least:
        text = f"--batch-size {args.batch_size} of {count} images must be at least {least}"
        raise ValueError(f"{text}: batch norm can't train on one image in a process")
    steps = len(datasets.bounds(count, args.batch_size, least))
    state = dict(step=0, history=[], seconds=0.0, seen=torch.zeros(steps, 3, device=device))  # as last.pt holds them
    if resumed:
        restore(resumed, model, average, optimizer, scaler, state, device)
    parts = [devices.place(part, device) for part in (train_part, val_part)]
    if args.minutes and not resumed:
        args.epochs = epochs_within(args, data, model, device, precision, parts, loss)
        arguments.shorten_warmup(args, given)
        arguments.make_schedule(args)  # raises ValueError if the warm-up is too long
    if args.compile:
        try:
            model.compile()  # in place: the names of its weights stay
        except RuntimeError as error:  # not on this version of Python, or not on this system
            raise ValueError(f"--compile doesn't work here, use --no-compile: {error}") from None

    log = None

    def claim():
        nonlocal log
        before, out = (Path(args.resume).parent, given.get("out")) if resumed else (None, args.out)
        going_on = resumed and (out is None or Path(out).resolve() == before.resolve())
        going_on = going_on or (distributed.restarted() and out is not None)
        default = Path("runs") / f"{args.model}-{data.name}-{args.opt}-{args.sched}"
        best = find_best(args, state["history"])
        # Where the best epoch is the one that last.pt holds, training starts with writing it.
        kept = checkpoints.load(before / "best.pt") if best and best["step"] < state["step"] else None
        out, log = run_folder.claim(before if going_on and resumed else out, default, going_on)
        if kept and not going_on:
            checkpoints.save(kept, out / "best.pt")
        return out

    out = distributed.once(claim)
    say = run_folder.make_say(log)
    say(f"$ {run_folder.command()}")
    versions = f"torch {torch.__version__}, python {platform.python_version()}"
    say(f"{versions}, {devices.device_name(device)}, {precision}{', compiled' * args.compile}")
    counts = [f"{len(labels):,}" for _, labels in (train_part, val_part, data.test)]
    shape = "x".join(map(str, data.train[0].shape[1:]))
    kind, length = f"{len(data.classes)} classes, {shape}", f"{args.epochs:g} epochs, batches of {args.batch_size}"
    lines = [f"{data.name}: {counts[0]} images to train on, {counts[1]} to validate, {counts[2]} to test; {kind}"]
    lines.append(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters; {args.opt}, ")
    lines[-1] += f"{args.sched}, {length}"
    lines = [data.note, *lines, *optimizers.describe_groups(model, optimizer.param_groups), started]
    if resumed:
        changed = [
            f"{flag_name(k)} {v} -> {given[k]}"
            for k, v in resumed["args"].items()
            if given.get(k, v) != v and k != "resume"
        ]
        lines.append(f"going on after step {resumed['step']:,} of {args.resume}" + "".join(f", {c}" for c in changed))
    if distributed.count() > 1:
        lines.append(f"{distributed.count()} processes share every batch")
    for line in filter(None, [*lines, f"writing to {out}"]):
        say(line)
    return (args, data, model, device, precision, out, say), (parts, loss, average, optimizer, scaler, state)


def fail(status, error, program="train.py"):
    """One line on standard error; returns the exit status. What all processes know, the first one says."""
    if distributed.rank() == 0 or status == 1:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def run_once(args, given, resumed):
    """One run, from its set-up to its result. Returns (result or None, exit status)."""
    training = False
    try:
        with arguments.blame(args.resume):
            common, more = set_up(args, given, resumed)
        training = True
        with distributed.caught_signals() as signals:
            history, stopped, status = train(*common, *more, signals)
        return finish(*common, history, stopped), status
    except (ValueError, OSError) as error:
        return None, fail(1 if training else 2, error)
    except (RuntimeError, MemoryError) as error:
        if devices.is_out_of_memory(error):
            sizes = f"--batch-size {args.batch_size}: lower it, or raise --accum (now {args.accum})"
            return None, fail(1 if training else 2, f"out of memory with {sizes}, or make the model smaller")
        if args.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            return None, fail(1, f"--compile doesn't work here, use --no-compile: {str(error)[:300]}")
        if distributed.count() > 1:
            return None, fail(1, f"process {distributed.rank()} stops: {error}")
        raise


def run_seeds(args, given):
    """--runs: one run for each seed, in folders of one folder, and their mean and standard deviation."""
    try:
        data = load_data(args, given)[0]
        default = Path("runs") / f"{args.model}-{data.name}-{args.opt}-{args.sched}-x{args.runs}"
        folder, log = run_folder.claim(args.out, default)
    except (ValueError, OSError) as error:
        return fail(2, error)
    say, results, status = run_folder.make_say(log), [], 0
    for seed in range(args.seed, args.seed + args.runs):
        own = argparse.Namespace(**vars(args) | dict(seed=seed, runs=1, out=str(folder / f"seed-{seed}")))
        result, status = run_once(own, given, None)
        if status:
            break
        results.append(result)
    if status == 2 and not results:
        log.take_back()  # nothing has been run
    if len(results) > 1:
        text, summary = run_folder.over_seeds(results)
        say(text)
        summary |= dict(args=vars(args) | dict(data=own.data), command=run_folder.command(), commit=run_folder.commit())
        run_folder.write_result(summary, folder / "result.json")
    return status


def run(argv):
    try:
        with distributed.quiet():
            args, given, resumed = arguments.parse(argv)
        if args.eval:
            with arguments.blame(args.eval):
                print_test(args, given)
            return 0
        return run_seeds(args, given) if args.runs > 1 else run_once(args, given, resumed)[1]
    except SystemExit as stop:  # argparse has said why
        return stop.code
    except (ValueError, OSError) as error:
        return fail(2, error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def main(argv=None):
    distributed.join()
    return distributed.leave(run(argv))


if __name__ == "__main__":
    sys.exit(main())
