"""Convolutional networks for CIFAR-10: a small residual one, and the plain one of the articles.

    python cnn_cifar10.py --arch plain           # what it costs on this machine
    python train.py --model cnn                  # train it

Copied alone, this file needs torch and nothing else:

    model = CNN(image_size=32, channels=3, num_classes=10)
    logits = model(images)                       # (batch, 3, 32, 32) -> (batch, 10)
"""

import argparse
import sys
import time
from collections import OrderedDict

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


WIDTHS = {"residual": (64, 256, 256), "plain": (32, 32, 64)}  # by arch


class Residual(nn.Sequential):
    """x + f(x)"""

    def forward(self, x):
        return x + super().forward(x)


def conv_norm_act(inputs, outputs, pool=1):
    """A 3x3 convolution, max-pooling, batch norm, GELU. The pooling comes early: it leaves the norm a quarter."""
    layers = OrderedDict(conv=nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
    nn.init.dirac_(layers["conv"].weight.detach()[:inputs])  # so many channels start as they came in
    if pool > 1:
        layers["pool"] = nn.MaxPool2d(pool)
    layers |= dict(norm=nn.BatchNorm2d(outputs), act=nn.GELU())
    return layers


class CNN(nn.Module):
    """A convolutional image classifier.

    forward: (batch, channels, image_size, image_size) -> (batch, num_classes), unnormalised scores.

    arch="residual" (widths 64, 256, 256; 1,972,802 parameters for CIFAR-10): a 2x2 convolution to 24 channels, see
    whiten; for each width one 3x3 convolution that halves the image and a residual one, both starting as the identity
    as far as they can; the mean over the image; a linear head that starts at zero, so that the first loss is
    ln(num_classes). All but the residuals, the mean and the head are those of airbench94 (arXiv:2404.00498).

    arch="plain" (widths 32, 32, 64; 145,578 parameters): the net of the articles, 5x5 convolutions with padding 2, each
    followed by 2x2 max-pooling, then 1024-64-10. There is no activation between the layers, as written there: nothing
    but the pooling makes it more than a linear model.

    Raises ValueError for an unknown arch and for sizes that make no network.
    """

    def __init__(self, *, image_size=32, channels=3, num_classes=10, arch="residual", widths=None):
        super().__init__()
        if arch not in WIDTHS:
            raise ValueError(f"--arch {arch} is not known; known are {', '.join(WIDTHS)}")
        widths = widths or WIDTHS[arch]
        self.model_args = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if min(widths) < 1:
            raise ValueError(f"--widths {widths} must be at least 1 each, as in 64,256,256")
        smallest = (image_size - (arch != "plain")) // 2 ** len(widths)
        if smallest < 1:
            raise ValueError(
                f"--widths {widths} halves the image {len(widths)} times: too often for {image_size} pixels"
            )

        if arch == "plain":
            body = []
            for before, after in zip((channels, *widths), widths, strict=False):
                body += [nn.Conv2d(before, after, 5, padding=2), nn.MaxPool2d(2)]
            body += [nn.Flatten(), nn.Linear(widths[-1] * smallest**2, 64)]
        else:
            body = [nn.Conv2d(channels, 8 * channels, 2), nn.GELU()]
            for before, after in zip((8 * channels, *widths), widths, strict=False):
                body += [nn.Sequential(conv_norm_act(before, after, pool=2)), Residual(conv_norm_act(after, after))]
            body += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.body = nn.Sequential(*body)
        self.head = nn.Linear(64 if arch == "plain" else widths[-1], num_classes)
        self.fixed = () if arch == "plain" else ("body.0.weight",)  # what whiten freezes
        if arch != "plain":
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, images):
        return self.head(self.body(images))

    @torch.no_grad()
    def whiten(self, images):
        """Set the filters of the first layer by some images, as forward takes them, and freeze them (not for "plain").

        They become the principal directions of all 2x2 patches, scaled so that each of their outputs has variance 1,
        and their negatives: the layers above get inputs without the correlation of neighbouring pixels.
        """
        if not self.fixed:
            return
        filters = self.body[0].weight
        patches = F.unfold(images[: max(1, 2**19 // images[0, 0].numel())], 2).transpose(1, 2).flatten(0, 1).double()
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        directions = (directions / (variances + 5e-4).sqrt()).T.view(-1, *filters.shape[1:])
        filters.copy_(torch.cat([directions, -directions]))
        filters.requires_grad_(False)


def integers(text):
    """argparse type: '64,256,256' -> (64, 256, 256)."""
    return tuple(int(part) for part in text.split(","))


def add_args(parser):
    default = CNN.__init__.__kwdefaults__
    flag = parser.add_argument
    flag("--arch", default=default["arch"], choices=WIDTHS, help="(%(default)s)")
    flag("--widths", type=integers, metavar="N,N", help="channels of each stage (64,256,256; plain: 32,32,64)")


def build(args, *, image_size, channels, num_classes):
    own = dict(arch=args.arch, widths=args.widths)
    return CNN(image_size=image_size, channels=channels, num_classes=num_classes, **own)


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
        model = build(args, image_size=32, channels=3, num_classes=10)
    except ValueError as error:
        parser.error(str(error))
    describe(model, "cnn")


if __name__ == "__main__":
    main()
