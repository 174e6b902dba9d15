"""Measure how fast training is here, against the loop of the textbooks and against a loop without a data path.

    python bench.py                              # mlp, cnn --arch plain and vit; writes results/bench-<device>.json
    python bench.py --until 0.975                # the articles' MLP to that accuracy, in both loops

For each model, in one interleaved run on the same data and with the same augmentation:
(a) the textbook loop: a Dataset with transforms of single images, a DataLoader with 0 and with 2 workers, float32, a
    plain optimizer, loss.item() in every step;
(b) the step and the data path of train.py, as it is;
(c) the step of train.py on one batch that lies on the device already: what is left without a data path.
Every variant gets the same time in turn, several times over; the rates are medians over its turns, the ratios those of
turns beside each other.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import optimizers
import train
from utils import arguments, devices, run_folder

MODELS = {
    "mlp": "--model mlp --hidden 256,128,64 --no-batch-norm --batch-size 64",
    "cnn --arch plain": "--model cnn --arch plain --opt sgd --batch-size 64",
    "vit": "--model vit --batch-size 64",
}
ARTICLE = "--model mlp --hidden 256,128,64 --no-batch-norm --opt sgd --lr 0.01 --momentum 0 --weight-decay 1e-6"
ARTICLE += " --decay-all --batch-size 64 --epochs 60 --sched none --warmup-epochs 0 --smoothing 0 --crop-pad 0"


class Images(Dataset):
    """Images one by one, as the textbooks load them."""

    def __init__(self, part, data, args):
        self.images, self.labels = part[0].cpu(), part[1].tolist()
        size, steps = part[0].shape[-1], [transforms.ToPILImage()]
        if args.crop_pad:
            steps.append(transforms.RandomCrop(size, padding=args.crop_pad, padding_mode="reflect"))
        if args.flip:
            steps.append(transforms.RandomHorizontalFlip())
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(data.mean, data.std)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


def set_up(flags):
    """Arguments, data, device and precision of train.py's run with these flags."""
    args, given, _ = arguments.parse(flags)
    s = SimpleNamespace(args=args, device=devices.choose_device(args.device))
    s.precision = devices.choose_precision(args.amp, s.device)
    s.data, part, s.val_part = train.load_data(args, given)
    s.train_part = devices.place(part, s.device)
    return s


def textbook(s, workers):
    """(a): a generator that takes a step each time and yields the number of its images."""
    model = train.build(s.args, s.data, s.train_part, s.device).to(memory_format=torch.contiguous_format).train()
    groups = optimizers.parameter_groups(model, weight_decay=s.args.weight_decay, decay_all=s.args.decay_all)
    lr, sgd = s.args.lr, s.args.opt == "sgd"
    optimizer = torch.optim.SGD(groups, lr, s.args.momentum) if sgd else torch.optim.AdamW(groups, lr)
    loader = DataLoader(Images(s.train_part, s.data, s.args), s.args.batch_size, shuffle=True, num_workers=workers)
    s.model = model
    for _ in itertools.count():
        for images, labels in loader:
            images, labels = images.to(s.device), labels.to(s.device)
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels, label_smoothing=s.args.smoothing)
            loss.backward()
            if s.args.clip_grad:
                torch.nn.utils.clip_grad_norm_(model.parameters(), s.args.clip_grad)
            optimizer.step()
            loss.item()
            yield len(labels)


def ours(s, fixed):
    """(b), and with `fixed` (c)."""
    model = train.build(s.args, s.data, s.train_part, s.device)
    scaler = torch.amp.GradScaler(enabled=s.precision == "fp16")
    optimizer, loss = train.make_optimizer(s.args, model), train.make_loss(s.args, s.data, s.device, s.precision)
    s.model = model.train()

    def loader():
        for epoch in itertools.count():
            yield from train.training_batches(s.args, s.data, s.train_part, s.device, epoch, 0, 1)

    batches = itertools.repeat(next(loader())) if fixed else loader()
    for step, (images, labels) in enumerate(batches):
        batch = (model, images, labels, len(labels))
        gradient = functools.partial(train.backward, *batch, loss, s.args, s.precision, scaler, optimizer)
        optimizers.take_step(gradient, optimizer, scaler, step)
        yield len(labels)


def clock(device):
    """Seconds, when the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rate(steps, seconds, device):
    """Images per second of a generator of steps, run for about that long."""
    start, images = clock(device), 0
    while time.perf_counter() - start < seconds:
        images += next(steps)
    return images / (clock(device) - start)


def matrix_rate(device, precision):
    """Floating-point operations per second of a product of large matrices, the best of several."""
    n, best = 8192 if device.type == "cuda" else 2048, 0.0
    a, b = (torch.randn(n, n, device=device, dtype=devices.PRECISIONS[precision]) for _ in range(2))
    for _ in range(10):
        start = clock(device)
        a @ b
        best = max(best, 2 * n**3 / (clock(device) - start))
    return best


def peak_memory(device):
    """The most that was held so far, in MB: on the GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def measure(flags, turns, seconds):
    """The figures of one model as a dict."""
    s = set_up(flags)
    variants = {"textbook, 0 workers": textbook(s, 0), "textbook, 2 workers": textbook(s, 2)}
    variants |= {"train.py": ours(s, False), "train.py, one batch": ours(s, True)}
    rates = {name: [] for name in variants}
    for steps in variants.values():
        for _ in range(3):
            next(steps)
    for _ in range(turns):
        for name, steps in variants.items():
            rates[name].append(rate(steps, seconds, s.device))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for steps in variants.values():
        steps.close()
    with FlopCounterMode(display=False) as counter:
        s.model(torch.randn(1, *s.train_part[0].shape[1:], device=s.device))
    flops = 3 * counter.get_total_flops()  # the backward pass takes about twice the forward's

    def ratio(other):
        """Of turns beside each other: the machine may be faster at one time than at another."""
        return statistics.median(a / b for a, b in zip(rates["train.py"], rates[other], strict=True))

    best, peak = max(list(medians)[:2], key=medians.get), matrix_rate(s.device, s.precision)
    result = dict(flags=flags, data=s.data.name, images_per_second=medians, turns=rates)
    result |= dict(b_over_a=ratio(best), b_over_c=ratio("train.py, one batch"))
    result |= dict(precision=s.precision, peak_memory_mb=peak_memory(s.device), flops_an_image=flops)
    return result | dict(flops_per_second=flops * medians["train.py"], matrix_flops_per_second=peak)


def until(accuracy, data_flags):
    """Training seconds to a validation accuracy, of the articles' MLP in their setting."""
    results = {}
    for name, workers in {"textbook, 0 workers": 0, "textbook, 2 workers": 2, "train.py": None}.items():
        s = set_up([*ARTICLE.split(), *data_flags])
        steps = ours(s, False) if workers is None else textbook(s, workers)
        s.precision = s.precision if workers is None else "fp32"
        seconds, epoch, acc, per_epoch = 0.0, 0, 0.0, math.ceil(len(s.train_part[1]) / s.args.batch_size)
        while acc < accuracy and epoch < 60:
            start = clock(s.device)
            for _ in range(per_epoch):
                next(steps)
            seconds += clock(s.device) - start
            acc = train.evaluate(s.model, s.val_part, s.data, s.device, s.precision)[1]
            s.model.train()
            epoch += 1
        steps.close()
        results[name] = dict(epochs=epoch, seconds=seconds, val_acc=acc)
        print(f"{name:20}  val acc {acc:.4f} after {epoch} epochs, {seconds:.1f} s of training", flush=True)
    return results


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False, usage=argparse.SUPPRESS)
    flag = parser.add_argument
    flag("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(all)")
    flag("--data", metavar="NAME", help="in place of each model's own")
    flag("--data-dir", default="data", metavar="DIR", help="where datasets and caches lie (%(default)s)")
    flag("--device", default="auto", help="cuda, mps or cpu; auto takes the first that is there")
    flag("--turns", type=int, default=7, metavar="N", help="of each variant (%(default)s)")
    flag("--seconds", type=float, default=2.0, metavar="S", help="of a turn (%(default)s)")
    flag("--until", type=float, metavar="ACC", help="time the MLP to this validation accuracy instead")
    flag("--out", metavar="FILE", help="the figures as JSON (results/bench-<device>.json)")
    args = parser.parse_args(argv)
    own = ["--data-dir", args.data_dir, "--device", args.device, *(["--data", args.data] if args.data else [])]
    if args.turns < 1 or not 0 < args.seconds < math.inf:
        parser.error(f"--turns {args.turns} and --seconds {args.seconds} must be above 0")
    try:
        device = devices.choose_device(args.device)
        result = dict(device=devices.device_name(device), torch=torch.__version__, commit=run_folder.commit())
        result |= dict(command=run_folder.command())
        if args.until:
            result["until"] = until(args.until, own)
        for name in [] if args.until else args.models:
            result[name] = one = measure([*MODELS[name].split(), *own], args.turns, args.seconds)
            print(f"{name} on {one['data']}, {one['precision']}")
            for variant, value in one["images_per_second"].items():
                print(f"  {variant:20} {value:10,.0f} images/s")
            print(
                f"  train.py is {one['b_over_a']:.1f} times the textbook's better one, and has {one['b_over_c']:.2f} of"
            )
            print("  the rate without a data path")
            share = one["flops_per_second"] / one["matrix_flops_per_second"]
            print(f"  {one['flops_per_second'] / 1e9:,.1f} GFLOP/s, {share:.0%} of a large matrix product's", end="; ")
            print(f"peak memory so far {one['peak_memory_mb']:,.0f} MB", flush=True)
        kind = "until" if args.until else "bench"
        path = Path(args.out or Path(__file__).parent / "results" / f"{kind}-{device.type}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    except (ValueError, OSError) as error:
        return train.fail(2, error, "bench.py")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
