"""Convolutional networks for CIFAR-10: a small residual one, and the plain one of the articles.

    python cnn_cifar10.py --arch plain           # parameters, multiply-adds, shapes
    python train.py --model cnn                  # train it

Or in a program of your own, with torch alone:

    import torch
    from cnn_cifar10 import CNN

    images = torch.randn(8, 3, 32, 32)
    model = CNN(image_size=32, channels=3, num_classes=10)
    model.whiten(images)                         # some normalised training images: sets and freezes the first layer
    logits = model(images)                       # (batch, 3, 32, 32) -> (batch, 10)
"""

import argparse
import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports below without a traceback

import torch
import torch.nn.functional as F
from torch import nn

# Training defaults. The keys are the destinations of train.py's flags; a flag given there wins.
RECIPE = dict(
    data="cifar10",
    epochs=10,
    batch_size=256,
    opt="muon",
    lr=0.02,
    momentum=0.95,
    weight_decay=0.05,
    sched="onecycle",
    smoothing=0.2,
    crop_pad=2,
    flip=True,
)
WIDTHS = {"residual": (64, 256, 256), "plain": (32, 32, 64), "relu": (32, 32, 64)}  # by arch


class ConvNormAct(nn.Sequential):
    """A 3x3 convolution, max-pooling, batch norm, GELU: (b, inputs, h, w) -> (b, outputs, h // pool, w // pool).

    With the pooling before them, norm and activation have fewer pixels to work on. The convolution is
    Dirac-initialised: as many channels as fit start as they came in. The modules run in the order of assignment.
    """

    def __init__(self, inputs: int, outputs: int, pool: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        fitting = self.conv.weight.detach()[:inputs]  # the filters beyond them stay random
        # As nn.init.dirac_, whose loop over the channels torch 2.9 takes on meta, too, whatever a checkpoint claims.
        fitting.zero_()[:, :, 1, 1].diagonal().fill_(1)
        if pool > 1:
            self.pool = nn.MaxPool2d(pool)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.GELU()


class Residual(ConvNormAct):
    """x + ConvNormAct(x)"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class CNN(nn.Module):
    """A convolutional image classifier.

    forward: (batch, channels, image_size, image_size) -> (batch, num_classes), logits.

    arch="residual" (widths 64, 256, 256; 1,972,802 parameters for CIFAR-10): a 2x2 convolution to 24 channels, see
    whiten; for each width a 3x3 convolution that halves the image and a residual one, both Dirac-initialised; the mean
    over the image; a linear head that starts at zero, so that the loss begins at ln(num_classes). It's airbench94
    (arXiv:2404.00498) but for the residuals, the mean, the head, and batch norms and biases, which are torch's own.

    arch="plain" (widths 32, 32, 64; 145,578 parameters): the net of the articles, 5x5 convolutions with padding 2, each
    followed by 2x2 max-pooling, then 1024-64-10. There is no activation between the layers, as written there: nothing
    but the pooling makes it more than a linear model. arch="relu" is the same net with a ReLU after each of them.

    Raises ValueError for an unknown arch and for sizes that make no network.
    """

    def __init__(
        self,
        *,
        image_size: int = 32,
        channels: int = 3,
        num_classes: int = 10,
        arch: str = "residual",
        widths: tuple[int, ...] | None = None,
    ):
        super().__init__()
        if arch not in WIDTHS:
            raise ValueError(f"arch {arch} is unknown: choose from {', '.join(WIDTHS)}")
        widths = WIDTHS[arch] if widths is None else widths
        self.model_args = {k: v for k, v in locals().items() if k not in ("self", "__class__")}  # all the keywords
        if min(widths, default=0) < 1:
            raise ValueError(f"widths {widths} must be one or more, each >= 1, as in 64,256,256")
        if min(channels, num_classes) < 1:
            raise ValueError(f"channels {channels} and num_classes {num_classes} must be >= 1")
        smallest = (image_size - (arch == "residual")) // 2 ** len(widths)
        if smallest < 1:
            raise ValueError(f"widths {widths} halves the image {len(widths)} times: too often for {image_size} pixels")

        if arch == "residual":
            body = [nn.Conv2d(channels, 8 * channels, 2), nn.GELU()]
            for before, after in zip((8 * channels, *widths), widths, strict=False):
                body += [ConvNormAct(before, after, pool=2), Residual(after, after)]
            body += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        else:
            body = []
            activation = [nn.ReLU()] if arch == "relu" else []
            for before, after in zip((channels, *widths), widths, strict=False):
                body += [nn.Conv2d(before, after, 5, padding=2), nn.MaxPool2d(2), *activation]
            body += [nn.Flatten(), nn.Linear(widths[-1] * smallest**2, 64), *activation]
        self.body = nn.Sequential(*body)
        self.head = nn.Linear(widths[-1] if arch == "residual" else 64, num_classes)
        self.fixed = ("body.0.weight",) if arch == "residual" else ()  # what whiten freezes
        if arch == "residual":
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))

    @torch.no_grad()
    def whiten(self, images: torch.Tensor):
        """Set the filters of the first layer from some images, as forward takes them, and freeze them.

        For "residual" only. They become the principal directions of the 2x2 patches, scaled so that each of their
        outputs has mean square 1, and their negatives: the layers above get inputs without the correlation of
        neighbouring pixels. Call it before the optimizer is made. A state dict holds the filters, not that they are
        frozen.
        """
        if not self.fixed:
            return
        filters = self.body[0].weight
        some = max(1, 2**19 // images[0, 0].numel())  # 512 of 32x32 pixels are enough
        images = images[:some].cpu().double()  # MPS has no double precision
        patches = F.unfold(images, 2).transpose(1, 2).flatten(0, 1)
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        directions = (directions / (variances + 5e-4).sqrt()).T.view(-1, *filters.shape[1:])
        filters.copy_(torch.cat([directions, -directions]))
        filters.requires_grad_(False)


def integers(text: str) -> tuple[int, ...]:
    """argparse type: '64,256,256' -> (64, 256, 256)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be whole numbers, as in 64,256,256") from None


def add_args(parser):
    default = CNN.__init__.__kwdefaults__
    flag = parser.add_argument
    flag("--arch", default=default["arch"], choices=WIDTHS, help="(%(default)s)")
    flag("--widths", type=integers, metavar="N,N", help="channels of each stage (64,256,256; plain: 32,32,64)")


def build(args, *, image_size: int, channels: int, num_classes: int) -> CNN:
    """The model that the flags of add_args describe."""
    return CNN(image_size=image_size, channels=channels, num_classes=num_classes, arch=args.arch, widths=args.widths)


def main():
    """Print what a model costs: parameters, multiply-adds, shapes."""
    from torch.utils.flop_counter import FlopCounterMode

    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False, usage=argparse.SUPPRESS)
    add_args(parser)
    args = parser.parse_args()
    try:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:  # meta takes no memory
            model = build(args, image_size=32, channels=3, num_classes=10).eval()
            images = torch.randn(1, 3, 32, 32)
            logits = model(images)
    except (ArithmeticError, TypeError, ValueError, RuntimeError) as error:  # sizes that make no network
        parser.error(str(error).split("\n")[0])
    print(f"{type(model).__name__}({', '.join(f'{name}={value!r}' for name, value in model.model_args.items())})")
    print(f"parameters     {sum(p.numel() for p in model.parameters()):,}")
    print(f"multiply-adds  {counter.get_total_flops() // 2:,} an image")
    print(f"shapes         {tuple(images.shape)} -> {tuple(logits.shape)}")
    print("train it       " + " ".join(["python train.py --model cnn", *sys.argv[1:]]))


if __name__ == "__main__":
    try:
        main()
        print(end="", flush=True)
    except OSError as error:  # ... | head, or > a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try once more at the end
        sys.exit(None if isinstance(error, BrokenPipeError) else f"cnn_cifar10.py: error: {error}")
