"""A multilayer perceptron for MNIST.

    python mlp_mnist.py --hidden 256,128,64      # what it costs on this machine
    python train.py --model mlp                  # train it

Copied alone, this file needs torch and nothing else:

    model = MLP(image_size=28, channels=1, num_classes=10)
    logits = model(images)                       # (batch, 1, 28, 28) -> (batch, 10)
"""

import argparse
import sys
import time

import torch
from torch import nn

# Training defaults. The keys are the destinations of train.py's flags; a flag given there wins.
RECIPE = dict(
    data="mnist",
    epochs=15,
    batch_size=256,
    opt="adamw",
    lr=2e-3,
    weight_decay=0.05,
    sched="cosine",
    warmup_epochs=1.0,
    smoothing=0.1,
    crop_pad=2,
    flip=False,
)


class MLP(nn.Module):
    """Fully connected layers with ReLU between them, on the flattened image.

    forward: (batch, channels, image_size, image_size) -> (batch, num_classes), unnormalised scores.

    `hidden` holds the widths of the hidden layers. hidden=(256, 128, 64), dropout=0.2, batch_norm=False is the
    FeedForwardNet of the articles (242,762 parameters on MNIST), hidden=(128,), dropout=0, batch_norm=False their
    SimpleNN. The defaults are wider and put batch norm (arXiv:1502.03167) before each ReLU; with it the last layer
    starts at zero, so that the first loss is ln(num_classes). Without, it starts as torch starts it: at the articles'
    small rates a net with a zero layer on top would lose most of its first epoch. Raises ValueError for sizes that
    make no network.
    """

    def __init__(self, *, image_size=28, channels=1, num_classes=10, hidden=(1024, 1024), dropout=0.2, batch_norm=True):
        super().__init__()
        self.model_args = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if not hidden or min(hidden) < 1:
            raise ValueError(f"--hidden {hidden} must be widths of at least 1, as in 256,128,64")
        if not 0 <= dropout < 1:
            raise ValueError(f"--dropout {dropout} must be at least 0 and less than 1")
        layers, width = [nn.Flatten()], channels * image_size**2
        for next_width in hidden:
            layers.append(nn.Linear(width, next_width, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm1d(next_width))
            layers += [nn.ReLU(), nn.Dropout(dropout)]
            width = next_width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, num_classes)
        if batch_norm:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, images):
        return self.head(self.layers(images))


def integers(text):
    """argparse type: '256,128,64' -> (256, 128, 64)."""
    return tuple(int(part) for part in text.split(","))


def add_args(parser):
    default = MLP.__init__.__kwdefaults__
    flag = parser.add_argument
    flag("--hidden", type=integers, default=default["hidden"], metavar="N,N", help="hidden widths (1024,1024)")
    flag("--dropout", type=float, default=default["dropout"], metavar="P", help="(%(default)s)")
    flag("--batch-norm", action=argparse.BooleanOptionalAction, default=default["batch_norm"], help="(%(default)s)")


def build(args, *, image_size, channels, num_classes):
    own = dict(hidden=args.hidden, dropout=args.dropout, batch_norm=args.batch_norm)
    return MLP(image_size=image_size, channels=channels, num_classes=num_classes, **own)


def describe(model, name):
    """Print a model's size, what one image costs it, and its speed in float32 on this device."""
    from torch.utils.flop_counter import FlopCounterMode

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    sizes = model.model_args
    images = torch.randn(64, sizes["channels"], sizes["image_size"], sizes["image_size"], device=device)
    model.to(device)

    def clock():
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    with FlopCounterMode(display=False) as counter:
        logits = model(images)
    times = []
    for _ in range(9):
        start = clock()
        loss = model(images).square().mean()
        middle = clock()
        loss.backward()
        times.append((middle - start, clock() - middle))
    forward, backward = (sorted(t)[len(t) // 2] for t in zip(*times, strict=True))
    print(f"{type(model).__name__}({', '.join(f'{k}={v!r}' for k, v in sizes.items())})")
    print(f"parameters     {sum(p.numel() for p in model.parameters()):,}")
    print(f"multiply-adds  {counter.get_total_flops() // 2 // len(images):,} an image")
    print(f"shapes         {tuple(images.shape)} -> {tuple(logits.shape)}")
    print(f"speed          {len(images) / (forward + backward):,.0f} images/s on {device.type} in float32")
    print(f"               (batch of {len(images)}: forward {forward * 1e3:.1f} ms, backward {backward * 1e3:.1f} ms)")
    print(" ".join(["train it       python train.py --model", name, *sys.argv[1:]]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False, usage=argparse.SUPPRESS)
    add_args(parser)
    args = parser.parse_args()
    try:
        model = build(args, image_size=28, channels=1, num_classes=10)
    except ValueError as error:
        parser.error(str(error))
    describe(model, "mlp")


if __name__ == "__main__":
    main()
