"""A multilayer perceptron for MNIST.

    python mlp_mnist.py --hidden 256,128,64      # parameters, multiply-adds, shapes
    python train.py --model mlp                  # train it

Or in a program of your own, with torch alone:

    import torch
    from mlp_mnist import MLP

    images = torch.randn(8, 1, 28, 28)
    model = MLP(image_size=28, channels=1, num_classes=10, hidden=(1024, 1024), dropout=0.2, batch_norm=True)
    logits = model(images)                       # (batch, 1, 28, 28) -> (batch, 10)
"""

import argparse
import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports below without a traceback

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

    forward: (batch, channels, image_size, image_size) -> (batch, num_classes), logits.

    `hidden` holds the widths of the hidden layers. hidden=(256, 128, 64), dropout=0.2 is the FeedForwardNet of the
    articles (242,762 parameters on MNIST), hidden=(128,) their SimpleNN, hidden=() their linear SimpleModel. train.py
    trains another net by default: the flags of add_args have dropout 0.2 and batch norm (arXiv:1502.03167), before each
    ReLU. With batch norm the head starts at zero, so that the loss begins at ln(num_classes). Without, it keeps torch's
    initialisation: at the articles' small learning rates a zero head costs most of the first epoch. Raises ValueError
    for sizes that make no network.
    """

    def __init__(
        self,
        *,
        image_size: int = 28,
        channels: int = 1,
        num_classes: int = 10,
        hidden: tuple[int, ...] = (1024, 1024),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ):
        super().__init__()
        self.model_args = {k: v for k, v in locals().items() if k not in ("self", "__class__")}  # all the keywords
        if not isinstance(hidden, (tuple, list)) or len(hidden) > 1000:  # more would take long to build
            raise ValueError(f"hidden {str(hidden)[:80]} must be a list of at most 1000 widths")
        if min(hidden, default=1) < 1:
            raise ValueError(f"hidden {hidden} must be widths >= 1, as in 256,128,64")
        if min(image_size, channels, num_classes) < 1:
            raise ValueError(f"image_size {image_size}, channels {channels}, num_classes {num_classes} must be >= 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout} must be >= 0 and < 1")
        layers, width = [nn.Flatten()], channels * image_size**2
        for next_width in hidden:
            layers.append(nn.Linear(width, next_width, bias=not batch_norm))  # batch norm adds its own
            if batch_norm:
                layers.append(nn.BatchNorm1d(next_width))
            layers += [nn.ReLU(), nn.Dropout(dropout)]
            width = next_width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, num_classes)
        if batch_norm and hidden:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(images))


def widths(text: str) -> tuple[int, ...]:
    """argparse type: '256,128,64' -> (256, 128, 64), 'none' -> ()."""
    if text == "none":
        return ()
    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be whole numbers, as in 256,128, or none") from None


def add_args(parser):
    flag = parser.add_argument
    flag("--hidden", type=widths, default=(1024, 1024), metavar="N,N", help="hidden widths, or none (1024,1024)")
    flag("--dropout", type=float, default=0.2, metavar="P", help="(%(default)s)")
    flag("--batch-norm", action=argparse.BooleanOptionalAction, default=True, help="(%(default)s)")


def build(args, *, image_size: int, channels: int, num_classes: int) -> MLP:
    """The model that the flags of add_args describe."""
    sizes = {"image_size": image_size, "channels": channels, "num_classes": num_classes}
    return MLP(hidden=args.hidden, dropout=args.dropout, batch_norm=args.batch_norm, **sizes)


def main():
    """Print what a model costs: parameters, multiply-adds, shapes."""
    from torch.utils.flop_counter import FlopCounterMode

    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False, usage=argparse.SUPPRESS)
    add_args(parser)
    args = parser.parse_args()
    try:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:  # meta takes no memory
            model = build(args, image_size=28, channels=1, num_classes=10).eval()
            images = torch.randn(1, 1, 28, 28)
            logits = model(images)
    except (ArithmeticError, TypeError, ValueError, RuntimeError) as error:  # sizes that make no network
        parser.error(str(error).split("\n")[0])
    print(f"{type(model).__name__}({', '.join(f'{name}={value!r}' for name, value in model.model_args.items())})")
    print(f"parameters     {sum(p.numel() for p in model.parameters()):,}")
    print(f"multiply-adds  {counter.get_total_flops() // 2:,} an image")
    print(f"shapes         {tuple(images.shape)} -> {tuple(logits.shape)}")
    print("train it       " + " ".join(["python train.py --model mlp", *sys.argv[1:]]))


if __name__ == "__main__":
    try:
        main()
        print(end="", flush=True)
    except OSError as error:  # ... | head, or > a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try once more at the end
        sys.exit(None if isinstance(error, BrokenPipeError) else f"mlp_mnist.py: error: {error}")
