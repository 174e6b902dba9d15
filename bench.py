"""Measure how fast training is here, against a DataLoader baseline and against one cached batch.

    python bench.py --out bench.json             # mlp, cnn --arch plain and vit
    python bench.py --until 0.975                # the articles' MLP to that accuracy, in both loops

For each model, in one interleaved run on the same data and with the same augmentation:
(a) the DataLoader baseline: a Dataset with transforms of single images, a DataLoader with 0 and 2 workers, float32,
    a plain optimizer, loss.item() in every step;
(b) the step and the data path of train.py, without the schedule, EMA and logging of its loop;
(c) the step of train.py on one cached batch: what is left without data loading.
The variants take turns, several times over; speeds are medians over the turns, speed-ups those of paired turns.
"""

import itertools
import math
import os
import signal
import statistics
import sys
import time

if __name__ == "__main__":
    sys.path.insert(0, __file__.removesuffix("bench.py"))  # python -P leaves this folder out
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports below without a traceback

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import optimizers
import train
from utils import arguments, budget, build, checkpoints, devices, errors, evaluation, graphs, run_folder

MODELS = {
    "mlp": "--model mlp --hidden 256,128,64 --no-batch-norm --batch-size 64",
    "cnn --arch plain": "--model cnn --arch plain --opt sgd --batch-size 64",
    "vit": "--model vit --batch-size 64",
}
ARTICLE = "--model mlp --hidden 256,128,64 --no-batch-norm --opt sgd --lr 0.01 --momentum 0 --weight-decay 1e-6"
ARTICLE += " --decay-all --batch-size 64 --epochs 60 --sched none --warmup-epochs 0 --smoothing 0 --crop-pad 0"


class Images(Dataset):
    """Images one by one, as tutorials load them."""

    def __init__(self, run):
        self.images, self.labels = run.train_set.images.cpu(), run.train_set.labels.tolist()
        size, steps = self.images.shape[-1], [transforms.ToPILImage()]
        if run.args.crop_pad:
            steps.append(transforms.RandomCrop(size, padding=run.args.crop_pad, padding_mode="reflect"))
        if run.args.flip:
            steps.append(transforms.RandomHorizontalFlip())
        steps += [transforms.ToTensor(), transforms.Normalize(run.dataset.mean, run.dataset.std)]
        self.transform = transforms.Compose(steps)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


def leave_signals(worker):
    """Ctrl-C reaches all processes, and the first one ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def baseline(run, workers):
    """(a): a generator that yields the model first, then takes a step each time and yields the number of its images."""
    args = run.args
    model = build.trial(run).model.to(memory_format=torch.contiguous_format).train()
    groups = optimizers.parameter_groups(model, weight_decay=args.weight_decay, decay_all=args.decay_all)
    if args.opt == "sgd":
        optimizer = torch.optim.SGD(groups, args.lr, args.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, args.lr)
    options = {"num_workers": workers, "persistent_workers": workers > 0, "worker_init_fn": leave_signals}
    loader = DataLoader(Images(run), args.batch_size, shuffle=True, **options)
    yield model
    while True:
        for images, labels in loader:
            images, labels = images.to(run.device), labels.to(run.device)
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels, label_smoothing=args.smoothing)
            loss.backward()
            if args.clip_grad:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            optimizer.step()
            loss.item()
            yield len(labels)


def ours(run, cached):
    """(b), or (c) if `cached`: yields as baseline() does."""
    run = build.trial(run)
    run.model.train()
    take_step = graphs.recorded(train.train_step, run, run_folder.print_line)
    yield run.model

    batches = build.training_batches(run, 0)
    if cached:
        batches = itertools.repeat(next(batches))
    for batch in batches:
        take_step(run, *batch)
        yield len(batch[1])


def speed(steps, seconds):
    """Images per second of a generator of steps, run for about that long, and for a step at least."""
    start, images = budget.now(), 0
    while images == 0 or time.perf_counter() - start < seconds:
        images += next(steps)
    return images / (budget.now() - start)


def gemm_peak(device, precision):
    """Floating-point operations per second of a product of large matrices, the best of several."""
    n, best = 8192 if device.type == "cuda" else 2048, 0.0
    a = torch.randn(n, n, device=device, dtype=devices.PRECISIONS[precision])
    b = torch.randn(n, n, device=device, dtype=devices.PRECISIONS[precision])
    for _ in range(10):
        start = budget.now()
        a @ b
        best = max(best, 2 * n**3 / (budget.now() - start))
    return best


def peak_memory(device):
    """The most that was held so far, in MB: on the GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(flags, turns, seconds):
    """One model: images per second of each variant, speed-ups, and what the arithmetic costs."""
    run = train.prepare(arguments.parse(flags)[0])
    variants = {
        "DataLoader, 0 workers": baseline(run, 0),
        "DataLoader, 2 workers": baseline(run, 2),
        "train.py": ours(run, False),
        "train.py, cached batch": ours(run, True),
    }
    speeds = {name: [] for name in variants}
    for steps in variants.values():
        for _ in range(6):  # the model, three steps that warm up, the recording of a CUDA graph, a replay
            next(steps)
    for _ in range(turns):
        for name, steps in variants.items():
            speeds[name].append(speed(steps, seconds))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for steps in variants.values():
        steps.close()
    flops = build.flops_per_image(run)

    def speed_up(other):
        """Of paired turns: the machine may be faster at one time than at another."""
        return statistics.median(a / b for a, b in zip(speeds["train.py"], speeds[other], strict=True))

    best = max([name for name in medians if name.startswith("DataLoader")], key=medians.get)
    return {
        "flags": flags,
        "data": run.dataset.name,
        "images_per_second": medians,
        "turns": speeds,
        "b_over_a": speed_up(best),
        "b_over_c": speed_up("train.py, cached batch"),
        "precision": run.precision,
        "peak_memory_mb": peak_memory(run.device),
        "flops_an_image": flops,
        "flops_per_second": flops * medians["train.py"],
        "matrix_flops_per_second": gemm_peak(run.device, run.precision),
    }


def until(accuracy, data_flags):
    """Training seconds to a validation accuracy, of the articles' MLP in their setting."""
    results = {}
    for name, workers in {"DataLoader, 0 workers": 0, "DataLoader, 2 workers": 2, "train.py": None}.items():
        run = train.prepare(arguments.parse([*ARTICLE.split(), *data_flags])[0])
        steps = ours(run, False) if workers is None else baseline(run, workers)
        precision = run.precision if workers is None else "fp32"
        model, seconds, epoch, acc = next(steps), 0.0, 0, 0.0
        while acc < accuracy and epoch < 60:
            start = budget.now()
            for _ in range(run.steps_per_epoch):
                next(steps)
            seconds += budget.now() - start
            _, acc = evaluation.evaluate(model, run.val_set, run.dataset, run.device, precision)
            model.train()
            epoch += 1
        steps.close()
        results[name] = {"data": run.dataset.name, "epochs": epoch, "seconds": seconds, "val_acc": acc}
        after = f"val acc {acc:.4f} after {epoch} epochs, {seconds:.1f} s of training"
        run_folder.print_line(f"{name:22}  {run.dataset.name}: {after}")
    return results


def print_speeds(name, one):
    """Print what measure() has returned for a model."""
    show = run_folder.print_line
    show(f"{name} on {one['data']}, {one['precision']}")
    for variant, value in one["images_per_second"].items():
        show(f"  {variant:22} {value:10,.0f} images/s")
    show(f"  speed-up over the DataLoader baseline {one['b_over_a']:.1f}, {one['b_over_c']:.2f} of one cached batch")
    share = one["flops_per_second"] / one["matrix_flops_per_second"]
    arithmetic = f"{one['flops_per_second'] / 1e9:,.1f} GFLOP/s, {share:.0%} of GEMM peak"
    show(f"  {arithmetic}; peak memory so far {one['peak_memory_mb']:,.0f} MB")


def make_parser():
    parser = arguments.Parser("bench.py", description="Measure how fast training is here.")
    flag = parser.add_argument
    flag("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(all)")
    flag("--data", metavar="NAME", help="in place of each model's own")
    flag("--data-dir", default="data", metavar="DIR", help="where datasets and caches lie (%(default)s)")
    flag("--device", default="auto", help="cuda, mps or cpu; auto takes the first that is available")
    flag("--turns", type=int, default=7, metavar="N", help="of each variant (%(default)s)")
    flag("--seconds", type=float, default=2.0, metavar="S", help="of a turn (%(default)s)")
    flag("--until", type=float, metavar="ACC", help="time the MLP to this validation accuracy instead")
    flag("--out", metavar="FILE", help="write the numbers as JSON")
    return parser


def command(argv):
    args = make_parser().parse_args(argv)
    if args.turns < 1 or not 0 < args.seconds < math.inf:
        raise ValueError(f"--turns {args.turns} must be >= 1 and --seconds {args.seconds} a finite number above 0")
    if args.until is not None:
        if not 0 < args.until < 1:
            raise ValueError(f"--until {args.until} must be above 0 and below 1: it is an accuracy")
        for name in ("models", "turns", "seconds"):
            if getattr(args, name) != make_parser().get_default(name):
                raise ValueError(f"--{name} has no effect with --until: leave it out")
    if args.out and not args.out.endswith(".json"):
        raise ValueError(f"--out {args.out} must end in .json")
    if args.out:  # now, rather than after minutes of measuring
        try:
            checkpoints.check_not_in_the_way(args.out)
            open(f"{args.out}.tmp", "xb").close()
            os.unlink(f"{args.out}.tmp")
        except OSError as error:
            raise ValueError(f"--out {args.out} can't be written ({error}): name another file") from None
    own = ["--data-dir", args.data_dir, "--device", args.device]
    if args.data:
        own += ["--data", args.data]
    device = devices.choose_device(args.device)
    result = {
        "device": devices.device_name(device),
        "torch": torch.__version__,
        "commit": run_folder.commit(),
        "command": arguments.typed(),
    }
    if args.until:
        result["until"] = until(args.until, own)
    else:
        for name in args.models:
            result[name] = measure([*MODELS[name].split(), *own], args.turns, args.seconds)
            print_speeds(name, result[name])
    if args.out:
        checkpoints.write_json(result, args.out)
        run_folder.print_line(f"wrote {args.out}")


def main(argv=None):
    return errors.exit_status("bench.py", lambda: command(argv), as_flags=arguments.as_flags)


if __name__ == "__main__":
    sys.exit(main())
