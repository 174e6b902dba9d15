"""Train an image classifier, keep its best epoch, and test it once.

    python train.py --model mlp                                     # MNIST
    python train.py --model vit --opt adamw --sched cosine          # CIFAR-10
    python train.py --model cnn --data path/to/images --epochs 20   # yours: train/<class>/*, test/<class>/*
    python train.py @recipes/mlp-1-minute.args                      # flags from a file
    python train.py --resume runs/vit-cifar10-adamw-cosine/last.pt
    python train.py --eval runs/vit-cifar10-adamw-cosine/best.pt
    torchrun --nproc_per_node 2 train.py --model vit                # several processes

Read it from top to bottom: the nouns (Run, Progress), setting up, one step, the run, the command line. run_once, near
the end, calls all of it in turn. Flags are declared in utils/arguments.py, and in the files that they control:
optimizers.py, schedulers.py, losses.py, augment.py, the models. A value is the user's, else last.pt's in a resumed run,
else the model's (that of --init; RECIPE, with another --opt not its lr, decay ...), else the optimizer's (DEFAULTS),
else the flag's default.
"""

import argparse
import itertools
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

if __name__ == "__main__":
    sys.path.insert(0, __file__.removesuffix("train.py"))  # python -P doesn't add this folder
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports below without a traceback

import torch

import augment
import data
import early_stopping
import losses
from utils import arguments, budget, build, checkpoints, devices, distributed, errors, evaluation, finetune, graphs

# isort: split
from utils import models, plateau, repeat, run_folder, saving
from utils.ema import Ema


@dataclass
class Run:
    """What a run is made of, built by prepare(). No field is reassigned later; weights and states change in place."""

    args: argparse.Namespace
    dataset: data.Dataset  # name, classes, mean, std; .train, before it is split; .test, which finish() alone evaluates
    train_set: data.Split  # images, uint8 (n, channels, size, size), and labels, int64 (n,)
    val_set: data.Split  # chooses the best epoch
    device: torch.device
    precision: str  # "fp32", "bf16" or "fp16"
    model: torch.nn.Module
    train_model: torch.nn.Module  # the same; compiled with --compile, wrapped in DDP if there are several processes
    ema: Ema | None  # ema.model has the moving averages of the weights
    loss: Callable  # (logits, labels) -> mean loss
    teacher: Callable | None  # images -> logits, without gradients
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing except in fp16
    schedule: Callable | None  # (epochs so far, monitored values) -> lr multiplier; None only within prepare()

    @property
    def eval_model(self) -> torch.nn.Module:
        """The model that is validated, tested and saved in best.pt: ema.model with --ema."""
        return self.ema.model if self.ema else self.model

    @cached_property
    def has_batch_norm(self) -> bool:
        return any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in self.model.modules())

    def least_per_batch(self, processes: int) -> int:  # a resumed run asks for those of the saved one
        """The fewest images in a batch: two for each process with batch norm, which needs their variance; else one."""
        return 2 * processes if self.has_batch_norm else 1

    @cached_property
    def batch_sizes(self) -> list[int]:
        """The sizes of an epoch's batches. A last batch that would be too small is added to the one before."""
        least = self.least_per_batch(distributed.world_size())
        bounds = augment.bounds(len(self.train_set.labels), self.args.batch_size, least)
        return [stop - start for start, stop in bounds]

    @property
    def steps_per_epoch(self) -> int:
        return len(self.batch_sizes)

    @property
    def total_steps(self) -> int:
        return max(1, round(self.args.epochs * self.steps_per_epoch))

    @cached_property
    def fingerprint(self) -> int:
        """A checksum of all training and validation images and labels. A resumed run must have the same."""
        return checkpoints.fingerprint(*self.dataset.train)


@dataclass
class Progress:
    """How far a run has come. last.pt holds it, along with the weights, the state of the optimizer and the like."""

    totals: torch.Tensor  # this process's since the last row of history: sum of losses, correct predictions, images
    step: int = 0
    history: list = field(default_factory=list)  # a dict per epoch: the rows of metrics.csv
    seconds: float = 0.0  # of training since the last row of history
    init: int | None = None  # a checksum of --init's weights, by which --runs knows that file again


# ---------------------------------------------------------------------------------------------- setting up


def prepare(args: argparse.Namespace) -> Run:
    """Load the data, build the model and all that it is trained with; reject what can't work; measure --minutes."""
    device = distributed.local_device(devices.choose_device(args.device))
    devices.speed_up(device)
    precision = distributed.agreed(devices.choose_precision(args.amp, device), "amp")
    dataset, train_set, val_set = build.load_data(args)
    if args.data in data.DOWNLOADS and dataset.name == "shapes":
        args = arguments.changed(args, data="shapes")  # load_data fell back: the set can't be downloaded
    model = build.make_model(args, dataset, train_set, device)
    if distributed.rank() > 0:
        torch.manual_seed(args.seed + distributed.rank())  # each process draws its own dropout

    if args.init and not args.resume:
        with checkpoints.blaming(args.init):
            content = models.read_init(args.init, args.model)
            loaded = finetune.initialise(model, content, dataset.classes)
            dataset.note += f"\nstart from {args.init}: {loaded}"  # logged with the run's first lines
    finetune.freeze(model, args.freeze)
    teacher = models.load_teacher(args.teacher, dataset, device, precision) if args.teacher else None
    optimizer = build.make_optimizer(args, model)
    ema = Ema(model, args.ema) if args.ema else None
    train_model = build.compiled(model) if args.compile else model
    must_time = args.minutes and not args.resume  # a resumed run has its --epochs
    run = Run(
        args=args,
        dataset=dataset,
        train_set=build.on_device(train_set, device),
        val_set=build.on_device(val_set, device),
        device=device,
        precision=precision,
        model=model,
        train_model=distributed.wrap_ddp(train_model, device),
        ema=ema,
        loss=losses.parse(args.loss, args.smoothing),
        teacher=teacher,
        optimizer=optimizer,
        scaler=devices.grad_scaler(device, precision),
        schedule=None if must_time else arguments.make_schedule(args),
    )
    graphs.check(run)  # rejects --cuda-graph where it can't work
    count, least = len(run.train_set.labels), run.least_per_batch(distributed.world_size())
    if min(args.batch_size, count) < least:
        rule = f"--batch-size {args.batch_size} of {count} images must be >= {least}"
        raise ValueError(f"{rule}: batch norm can't train on one image in a process")
    if must_time:  # --minutes: time steps and a validation on a copy; the run then gets as many epochs as fit
        trial = build.trial(run)
        take_step = graphs.recorded(train_step, trial, log=lambda line: None)  # train() records again, and logs it
        return budget.within_minutes(run, trial, take_step, score)
    return run


# ---------------------------------------------------------------------------------------------- one step


def backward(run: Run, images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Forward and backward pass of a batch, in --accum micro-batches. Leaves the gradient, scaled in fp16, in .grad.

    `images` is this process's share of a batch of `batch_size` images. Returns the share's [sum of losses, correct
    predictions, images] as a tensor on the device: an .item() here would make every step wait for the device.
    """
    run.optimizer.zero_grad(set_to_none=True)
    totals = devices.zero_totals(run.device)
    local_size = len(images)
    if local_size == 0:  # fewer images than processes: DDP needs a backward pass all the same, of a blank one, weight 0
        images = images.new_zeros(1, *images.shape[1:])
        labels = labels.new_zeros(1, *labels.shape[1:])
    count = max(1, min(run.args.accum, local_size // run.least_per_batch(1)))
    micro_batches = zip(images.tensor_split(count), labels.tensor_split(count), strict=True)
    for i, (x, y) in enumerate(micro_batches, start=1):
        with distributed.sync_gradients(run.train_model, i == count):  # not before the last one
            with devices.autocast(run.device, run.precision):
                logits = run.train_model(x)
            logits = logits.float()
            loss = run.loss(logits, y)
            if run.teacher:
                loss = loss + run.args.distill * losses.distillation(logits, run.teacher(x), run.args.temperature)
            # The mean over a micro-batch, weighted by its share of the batch: the sum is the mean over the batch.
            weight = len(x) / batch_size if local_size else 0.0
            # DDP averages the gradients over the processes. Times their number, that is their sum.
            run.scaler.scale(loss * (weight * distributed.world_size())).backward()
        if local_size:
            targets = y.argmax(1) if y.ndim == 2 else y  # mixup's labels are distributions
            totals[0].add_(loss.detach(), alpha=len(x))
            totals[1].add_((logits.argmax(1) == targets).sum())
            totals[2].add_(len(x))
    return totals


def train_step(run: Run, images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Take one optimizer step. Returns what backward() returns."""
    if run.args.opt == "lbfgs":
        return lbfgs_step(run, images, labels, batch_size)
    totals = backward(run, images, labels, batch_size)
    if run.args.clip_grad:
        run.scaler.unscale_(run.optimizer)
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.args.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return totals


def lbfgs_step(run: Run, images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Take a step of L-BFGS, which evaluates the loss several times. Returns the totals before the step.

    It is for one process, without fp16 and clipping: the line search compares losses.
    """
    evaluations = []
    seed = torch.randint(2**62, ()).item()  # the same dropout each time

    def closure():
        torch.manual_seed(seed)
        evaluations.append(backward(run, images, labels, batch_size))
        return evaluations[-1][0] / batch_size

    run.optimizer.step(closure)
    return evaluations[0]


def score(run: Run, split: data.Split) -> tuple[float, float]:
    """Mean loss and accuracy of run.eval_model on a split. The loss is without smoothing and teacher."""
    options = {"loss": run.args.loss, "tta": run.args.tta, "flip": run.args.flip}
    return evaluation.evaluate(run.eval_model, split, run.dataset, run.device, run.precision, **options)


# ---------------------------------------------------------------------------------------------- the run


def train(run: Run, progress: Progress, folder: run_folder.RunFolder, signals: list[int]) -> str:
    """Train to the last step, an early stop or a signal. Returns why it stopped; raises Diverged.

    `signals` is a list that gets the number of a signal when one arrives.
    """
    args, history = run.args, progress.history
    take_step = graphs.recorded(train_step, run, folder.log)  # train_step, replayed as a CUDA graph where possible
    shared_machine_hint = devices.SharedMachineHint(run.device, folder.log)
    while progress.step < run.total_steps:
        best = find_best(args, history)  # before training: a resumed run may have to stop at once
        if args.patience and early_stopping.waited(history, best, args.warmup_epochs) >= args.patience:
            folder.log(explain(run, history, best))
            if args.sched in ("cosine", "linear", "onecycle") and args.t_max is None:  # which ends where the run would
                folder.log(f"The low end of --sched {args.sched} was not reached: --patience 0 trains to the end.")
            return "early stop"
        end_step = min((progress.step // run.steps_per_epoch + 1) * run.steps_per_epoch, run.total_steps)
        with shared_machine_hint:  # logs once if other programs slow this one down
            train_until(end_step, run, progress, folder, signals, take_step)
        if progress.step == end_step:  # no signal came before
            finish_epoch(run, progress, folder)
        if distributed.all_max(len(signals)):
            return "interrupted"
    return "time budget" if args.minutes else "finished"  # prepare() turned --minutes into --epochs


def train_until(end_step, run, progress, folder, signals, take_step):
    """Take steps until progress.step is end_step, or until a signal."""
    args, left = run.args, end_step - progress.step
    finetune.train_mode(run.train_model)
    batches = itertools.islice(build.training_batches(run, progress.step), left)
    if distributed.rank() == 0:
        batches = data.progress_bar(batches, total=left, desc=f"epoch {len(progress.history) + 1}", unit=" steps")
    start = time.perf_counter()
    for images, labels, batch_size in batches:
        multiplier = lr_multiplier(run, progress.step, progress.history)
        for group in run.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        progress.totals += take_step(run, images, labels, batch_size)
        if run.ema:
            run.ema.update(run.model)
        progress.step += 1

        stop = distributed.all_max(len(signals)) > 0  # all processes must stop at the same step
        log = args.log_interval > 0 and progress.step % args.log_interval == 0
        save = args.save_every > 0 and progress.step % args.save_every == 0
        at_end = progress.step == end_step
        if not (stop or log or save or at_end):
            continue
        # What follows waits for the device: not in each step. At the end it completes the seconds for finish_epoch().
        loss_sum, _, seen = distributed.all_reduce(progress.totals).tolist()
        progress.seconds += time.perf_counter() - start
        if not math.isfinite(loss_sum):
            raise errors.Diverged(f"the training loss is {loss_sum}", progress.step, args.lr * multiplier)
        if run.scaler.get_scale() < 1e-30:  # in fp16 each step that is skipped halves it: about a hundred were
            raise errors.Diverged("no gradient is finite", progress.step, args.lr * multiplier)
        if log:
            folder.log(f"  step {progress.step:,} of {run.total_steps:,}  train loss {loss_sum / seen:.4f}")
        if (save or stop) and not at_end:  # there finish_epoch() saves
            evaluation.check_finite(run.eval_model, progress.step, args.lr * multiplier)
            folder.save("last.pt", saving.last_content(run, progress))
        if stop:
            break
        start = time.perf_counter()  # the seconds of logging and saving don't count


def finish_epoch(run: Run, progress: Progress, folder: run_folder.RunFolder):
    """Validate, add a row to the history, keep the best weights, save, report."""
    args, history = run.args, progress.history
    start = time.perf_counter()
    distributed.broadcast(run.eval_model)  # the statistics of batch norms differ between the processes: take rank 0's
    loss_sum, correct, seen = distributed.all_reduce(progress.totals).tolist()
    lr = args.lr * lr_multiplier(run, progress.step - 1, history)  # of the last step, which hadn't seen the row below
    val_loss = val_acc = math.nan
    if args.val_split:
        val_loss, val_acc = score(run, run.val_set)
        if not math.isfinite(val_loss):
            raise errors.Diverged(f"the validation loss is {val_loss}", progress.step, lr)
    evaluation.check_finite(run.eval_model, progress.step, lr)
    row = {
        "epoch": len(history) + 1,
        "step": progress.step,
        "lr": lr,
        "train_loss": loss_sum / seen,
        "train_acc": correct / seen,
        "val_loss": val_loss,
        "val_acc": val_acc,
        "seconds": progress.seconds,
        "images_per_second": seen / progress.seconds,
    }
    history.append(row)
    progress.seconds = 0.0
    progress.totals.zero_()

    best = find_best(args, history)
    last = saving.last_content(run, progress)  # gathers from all processes
    folder.save("last.pt", last)  # before best.pt: if the run is killed between them, a resume writes that
    if best is row:
        folder.save("best.pt", saving.best_content(run, progress))
    seconds = row["seconds"] + time.perf_counter() - start  # with validation and saving
    folder.write_epoch(run, history, best, seconds)
    half = (args.patience + 1) // 2  # a first hint comes half-way to the early stop; not if that comes now
    if half < args.patience and early_stopping.waited(history, best, args.warmup_epochs) == half:
        folder.log(explain(run, history, best))


def lr_multiplier(run: Run, step: int, history: list[dict]) -> float:
    """The multiplier of every group's initial learning rate in a step."""
    watched = run.args.sched_monitor or run.args.monitor
    return run.schedule(step / run.steps_per_epoch, [row[watched] for row in history])


def find_best(args, history: list[dict]) -> dict | None:
    """The best epoch's row of the history; without validation, the latest. None before the first."""
    if args.val_split == 0:
        return history[-1] if history else None
    return early_stopping.best_row(history, args.monitor, args.min_delta)


def explain(run: Run, history: list[dict], best: dict) -> str:
    """Why the monitored value has stopped improving, in one line."""
    guess = torch.zeros(1, len(run.dataset.classes))  # logits
    chance = losses.parse(run.args.loss)(guess, torch.tensor([0])).item()
    return plateau.explain(history, best, run.args.monitor, chance)


def finish(run: Run, progress: Progress, folder: run_folder.RunFolder, stopped: str) -> dict:
    """Test the best weights, once, unless the run was interrupted or diverged. Write result.json and curves.png."""
    args, history = run.args, progress.history
    best = find_best(args, history)
    test_loss = test_acc = None
    if stopped in ("finished", "early stop", "time budget"):
        chosen_as = "the last, as no images were held out"
        if args.val_split:
            chosen_as = f"best {args.monitor}, {best[args.monitor]:.4f}"
        folder.log(f"{stopped}: the result is epoch {best['epoch']} ({chosen_as})")
        if not args.no_test:
            folder.check_not_moved()
            content = distributed.on_main(lambda: saving.load_best(folder.path, best))
            run.eval_model.load_state_dict(content["state_dict"])
            test_loss, test_acc = score(run, run.dataset.test)
            if math.isfinite(test_loss):
                notes = [] if args.resume else ["read once"]  # else it may have been read before
                folder.log(evaluation.test_line(run.dataset, test_loss, test_acc, args.tta, *notes))
            else:
                folder.log(f"the test loss is {test_loss}: try --eval {folder.path / 'best.pt'} --amp off")
                stopped, test_loss, test_acc = "non-finite loss", None, None
    elif stopped == "interrupted":
        last = shlex.quote(str(folder.path / "last.pt"))
        folder.log(f"interrupted: continue with python train.py --resume {last}")
    result = run_folder.result_of(run, progress, best, stopped, test_loss, test_acc)
    folder.write_result(result)
    folder.draw(history, best)
    return result


# ---------------------------------------------------------------------------------------------- the command line


def run_once(args: argparse.Namespace, checkpoint: dict | None = None) -> tuple[dict, int]:
    """One run, from its arguments to its result. Returns (what result.json holds, exit status)."""
    with checkpoints.blaming(args.resume):  # an error names that file; the run hasn't begun: exit status 2
        run = prepare(args)
        args = run.args  # prepare() may have chosen other data or --epochs
        progress = Progress(devices.zero_totals(run.device))
        if checkpoint:
            saving.restore(run, progress, checkpoint)
        elif args.init:
            progress.init = models.fingerprint(checkpoints.load(args.init, keys={}))
        folder = saving.folder_of_run(run, progress, find_best(args, progress.history))
    with folder, errors.while_training(args), errors.caught_signals() as signals:  # an error in here: exit status 1
        saving.log_beginning(run, folder, progress.history, checkpoint)
        try:
            stopped = train(run, progress, folder, signals)
        except errors.Diverged as error:
            folder.log(str(error))
            stopped = "non-finite loss"
        result = finish(run, progress, folder, stopped)
    signal_number = distributed.all_max(signals[0] if signals else 0)  # one may have come during the final test
    if signal_number:
        return result, 128 + signal_number
    return result, errors.status_of(result["stopped"])


def command(argv: list[str] | None = None) -> int:
    """What the command line asks for. Returns the exit status."""
    with errors.signal_handler(signal.SIG_DFL):  # end at once: Python calls no handler while C++ waits for others
        distributed.init()
    with distributed.main_complains():
        args, checkpoint = arguments.parse(argv)
    if args.eval:
        with checkpoints.blaming(args.eval):
            evaluation.test_checkpoint(args)
        return 0
    if args.runs > 1:
        return repeat.repeat(args, run_once)
    _, status = run_once(args, checkpoint)
    return status


def main(argv: list[str] | None = None) -> int:
    status = errors.exit_status("train.py", lambda: command(argv), as_flags=arguments.as_flags)
    distributed.cleanup(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
