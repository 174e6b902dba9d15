"""Batches of images that lie in memory, augmented and normalised on the training device; test-time augmentation.

    import torch
    from augment import batches

    images = torch.randint(0, 256, (5000, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (5000,))
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    for x, y in batches((images, labels), 100, mean, std, "cpu", key=(0, 0), crop_pad=4, flip=True):
        pass  # x is float32 (100, 3, 32, 32), y is int64 (100,)

    python augment.py --show augmented.png --crop-pad 4 --flip --mixup 0.8      # what each option does to 8 images

Many images are augmented at once by a few tensor operations, each with random numbers of its own: no worker processes.
Needs torch, and Pillow and numpy for --show.
"""

import argparse
import io
import math
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports below without a traceback

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

FORMATS = "JPEG PNG BMP GIF WEBP AVIF TIFF PPM".split()  # Pillow's: others may start programs, such as Ghostscript
MARK = "augment.py of small PyTorch training scripts"  # in a plot, which may be replaced by another
CHUNK = 1024  # images of small batches that are augmented together: fewer, larger operations
GPU_CHUNK = 2**25  # the same on a GPU, in pixel values: more, as it waits for launches


def seeded(*key, device="cpu") -> Generator:
    """Make a generator from a key such as (seed, epoch): hashed, so that similar keys give unrelated numbers."""
    return Generator(device).manual_seed(random.Random(repr(key)).getrandbits(63))


def to_device(tensor: Tensor, device) -> Tensor:
    """Copy a tensor to a device, asynchronously to CUDA alone: a copy to the host would be read too early, and MPS may
    read a source that has been freed (https://github.com/pytorch/pytorch/issues/189690).
    """
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def bounds(n: int, batch_size: int, least: int = 1) -> list[tuple[int, int]]:
    """Return (start, stop) of each batch of n images. A last batch of fewer than `least` is added to the one before."""
    edges = [(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]
    if len(edges) > 1 and n - edges[-1][0] < least:
        edges.pop()
        edges[-1] = (edges[-1][0], n)
    return edges


def batches(
    split: tuple[Tensor, Tensor], batch_size: int, mean: Sequence[float], std: Sequence[float], device, *,
    key: tuple[int, int] | None = None, first: int = 0, every: int = 1, least: int = 1,
    rank: int = 0, world_size: int = 1, crop_pad: int = 0, flip: bool = False, augment: str = "none",
    erase: float = 0.0, mixup: float = 0.0, cutmix: float = 0.0, num_classes: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yield (images, labels) on the device: float32 (b, channels, height, width), normalised, and int64 (b,).

    `split` has images, uint8 (n, channels, height, width), and labels, int64 (n,). `mean` and `std` are by channel, of
    pixels in 0..1. Without a key the images come in order, not augmented. With key=(seed, epoch) they are shuffled,
    which depends on the key alone, and augmented, which depends on batch_size and device, too: by `crop_and_flip`
    (augment="strong": `distort`, which shifts by up to crop_pad), by `erase_some` in the share `erase` of them and by
    `mix`, whose alphas are `mixup` and `cutmix`, and which makes the labels float32 (b, num_classes). The last batch
    may have another size, see `bounds`. Raises ValueError for another `augment`, mixing without num_classes, images of
    another type, too small or, if "strong", not square.

    The first `first` batches are skipped, then every `every`-th is taken. Process `rank` of `world_size` gets a slice
    of each, empty if there are too few images: least=world_size prevents that unless batch_size or n is smaller.
    """
    if augment not in ("none", "strong"):
        raise ValueError(f"augment {augment} must be none or strong")
    if (mixup or cutmix) and num_classes is None:
        raise ValueError("mixup and cutmix need num_classes, the length of the labels that they make")
    all_images, all_labels = split
    if all_images.dtype != torch.uint8:
        raise ValueError(f"images of {all_images.dtype} must be torch.uint8, from 0 to 255")
    n = len(all_labels)
    edges = bounds(n, batch_size, least)
    order = torch.arange(n)
    per_chunk = 1  # batches that are augmented together
    if key is not None:
        size = GPU_CHUNK // all_images[0].numel() if torch.device(device).type == "cuda" else CHUNK
        per_chunk = max(1, size // batch_size)
        order = torch.randperm(n, generator=seeded(*key))
        flips = alternating_flip(n, *key).to(device) if flip else None
    order = order.to(all_images.device)  # the host, if the set is too large for the device
    mean = 255 * torch.tensor(mean, device=device)[:, None, None]
    std = 255 * torch.tensor(std, device=device)[:, None, None]
    chunk = None  # the number of the chunk at hand; its random numbers depend on it and the key
    for step in range(first, len(edges), every):
        if step // per_chunk != chunk:
            chunk = step // per_chunk
            inside = edges[chunk * per_chunk : (chunk + 1) * per_chunk]
            offset = inside[0][0]
            chosen = order[offset : inside[-1][1]]
            chunk_images = to_device(all_images.index_select(0, chosen), device)
            chunk_labels = to_device(all_labels.index_select(0, chosen.to(all_labels.device)), device)
            if key is not None:
                generator = seeded(*key, chunk, device=device)
                flipped = None if flips is None else flips[to_device(chosen, device)]
                geometry = distort if augment == "strong" else crop_and_flip
                chunk_images = geometry(chunk_images, crop_pad, flipped, generator)
            chunk_images = chunk_images.float().sub_(mean).mul_(1 / std)
            if key is not None and erase:
                chunk_images = erase_some(chunk_images, erase, generator)
        batch = slice(edges[step][0] - offset, edges[step][1] - offset)
        images, labels = chunk_images[batch], chunk_labels[batch]
        if key is not None and (mixup or cutmix):
            images, labels = mix(images, labels, num_classes, mixup, cutmix, seeded(*key, step, "mix"))
        own = slice(len(labels) * rank // world_size, len(labels) * (rank + 1) // world_size)
        yield images[own], labels[own]


def alternating_flip(n: int, seed: int, epoch: int) -> Tensor:
    """Choose which of n images are flipped, bool (n,): a random half, in every second epoch the others.

    So two epochs show both sides of every image (airbench, arXiv:2404.00498).
    """
    flipped = torch.rand(n, generator=seeded(seed, "flip")) < 0.5
    return ~flipped if epoch % 2 else flipped


def crop_and_flip(images: Tensor, crop_pad: int, flipped: Tensor | None, generator: Generator) -> Tensor:
    """Crop at random from the images with crop_pad pixels of reflect padding, and flip some: one gather.

    (b, channels, height, width) -> the same shape and dtype. `flipped` is bool (b,), or None for none.
    """
    b, channels, height, width = images.shape
    if crop_pad >= min(height, width):
        raise ValueError(f"crop_pad {crop_pad} must be smaller than the image, {height}x{width} pixels")

    def sources(size):
        """Where each row (or column) of the crops comes from: int64 (b, size)."""
        shift = torch.randint(-crop_pad, crop_pad + 1, (b, 1), generator=generator, device=images.device)
        place = (torch.arange(size, device=images.device) + shift).abs()  # reflected at the near border
        return size - 1 - (size - 1 - place).abs()  # and at the far one

    rows = sources(height)
    columns = sources(width)
    if flipped is not None:
        columns = torch.where(flipped[:, None], columns.flip(1), columns)
    index = (rows[:, :, None] * width + columns[:, None, :]).view(b, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view(images.shape)


def distort(images: Tensor, max_shift: int, flipped: Tensor | None, generator: Generator) -> Tensor:
    """Rotate, shear, scale and translate every image by random amounts, and flip some: one interpolation for all.

    uint8 (b, channels, size, size) -> float32, 0..255. `max_shift` is in pixels, `flipped` as in crop_and_flip. Images
    of one channel, such as digits, also get elastic jitter; those of three get random brightness, contrast and
    saturation.
    """
    b, channels, height, size = images.shape
    if height != size:
        raise ValueError(f"augment strong needs square images, these have {height}x{size} pixels")

    def uniform(limit):
        return limit * (2 * torch.rand(b, generator=generator, device=images.device) - 1)

    angle = uniform(math.radians(12))
    shear = uniform(math.tan(math.radians(10)))
    zoom = 1.15 ** uniform(1)
    sign = torch.ones_like(zoom) if flipped is None else 1 - 2 * flipped.float()
    cos = angle.cos() / zoom
    sin = angle.sin() / zoom
    x = uniform(2 * max_shift / size)  # affine_grid takes the image to be 2 wide
    y = uniform(2 * max_shift / size)
    matrix = torch.stack([cos * sign, cos * shear - sin, x, sin * sign, sin * shear + cos, y], 1).view(b, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    if channels == 1:  # elastic: displace 4x4 points at random (sd 1.2 pixels), and interpolate between them
        coarse = 1.2 * 2 / size * torch.randn(b, 2, 4, 4, generator=generator, device=images.device)
        # Interpolating the identity gives the matrix of bicubic interpolation, (size, 4).
        spread = F.interpolate(torch.eye(4, device=images.device)[None, None], (size, 4), mode="bicubic")[0, 0]
        grid = grid + (spread @ coarse @ spread.T).permute(0, 2, 3, 1)
    padding = "reflection" if channels == 3 else "border"  # reflected strokes would make other digits
    if padding == "border" and images.device.type == "mps":  # torch before 2.13 lacks it there; this is the same
        grid, padding = grid.clamp(1 / size - 1, 1 - 1 / size), "zeros"
    images = F.grid_sample(images.float(), grid, padding_mode=padding, align_corners=False)
    if channels == 3:
        brightness = 1 + uniform(0.3)[:, None, None, None]
        contrast = 1 + uniform(0.3)[:, None, None, None]
        saturation = 1 + uniform(0.3)[:, None, None, None]
        grey = images.mean(1, keepdim=True)
        middle = grey.mean((2, 3), keepdim=True)
        images = brightness * middle + contrast * (grey - middle + saturation * (images - grey))
    return images.clamp(0, 255)


def rectangles(images: Tensor, area: Tensor, ratio: Tensor, generator: Generator) -> Tensor:
    """Draw a rectangle at random in each image: bool masks (b, 1, height, width) on its device, true inside.

    `area` (a share of the image's) and `ratio` (of the sides) are float (b,) on the generator's device, which may be
    the CPU: four numbers an image are copied then, not a mask.
    """
    height, width = images.shape[2:]
    device = images.device

    def interval(length, size):
        length = (length.clamp(max=1) * size).round()
        start = (torch.rand(len(length), generator=generator, device=length.device) * (size - length + 1)).floor()
        return [start, start + length]

    edges = interval((area * ratio).sqrt(), height) + interval((area / ratio).sqrt(), width)
    top, bottom, left, right = to_device(torch.stack(edges), device)[:, :, None, None, None]
    row = torch.arange(height, device=device)[:, None]
    column = torch.arange(width, device=device)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


def erase_some(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Fill a rectangle with noise in that share of images, float32 (b, channels, height, width), normalised.

    Its area is 2 to 33 %, its sides 1:3 to 3:1. In the paper (arXiv:1708.04896) it's up to 40 %.
    """
    area, ratio, chance = torch.rand(3, len(images), generator=generator, device=images.device)
    mask = rectangles(images, 0.02 + 0.31 * area, 9**ratio / 3, generator)
    mask &= (chance < share)[:, None, None, None]
    return torch.where(mask, torch.randn(images.shape, generator=generator, device=images.device), images)


def mix(images: Tensor, labels: Tensor, num_classes: int, mixup: float, cutmix: float, generator: Generator):
    """Mix every image with the one before it in the batch, and their labels alike: float32 (b, num_classes).

    mixup (arXiv:1710.09412) takes the weighted mean of both, cutmix (arXiv:1905.04899) pastes a rectangle of the other
    one, here always within the image. Each image draws its own weight from Beta(alpha, alpha), in the papers a batch
    does; cutmix's becomes the area that is left, in whole pixels. An alpha of 0 turns one off; if both are on, a batch
    takes one at random. Alphas below 0.01 are too small for the draw's precision. `generator` is on the CPU: no device
    is waited for.
    """
    cut = cutmix and (not mixup or torch.rand((), generator=generator) < 0.5)
    alpha = torch.full((2, len(images)), cutmix if cut else mixup, dtype=torch.float64)
    gammas = torch._standard_gamma(alpha, generator)  # Beta(a, a) is g0 / (g0 + g1); torch's Beta takes no generator
    weight = (gammas[0] / gammas.sum(0)).float()
    if cut:
        other = rectangles(images, 1 - weight, torch.ones(len(weight)), generator)
        weight = (~other).float()
    else:
        weight = to_device(weight, images.device)[:, None, None, None]
    one_hot = F.one_hot(labels, num_classes).float()
    mixed_labels = torch.lerp(one_hot.roll(1, 0), one_hot, weight.mean((1, 2, 3))[:, None])
    return torch.lerp(images.roll(1, 0), images, weight), mixed_labels


def tta_views(images: Tensor, *, flip: bool, shift: int = 1) -> list[Tensor]:
    """Return the batch as it is, and translated by `shift` pixels either way along the diagonal; with flip, flipped.

    Uses reflect padding, so shift must be smaller than the image.
    """
    height, width = images.shape[2:]
    if shift >= min(height, width):
        raise ValueError(f"shift {shift} must be smaller than the image, {height}x{width} pixels")
    padded = F.pad(images, (shift, shift, shift, shift), mode="reflect")
    places = [shift, 0, 2 * shift] if shift else [0]  # the first is the batch as it is
    views = [padded[..., place : place + height, place : place + width] for place in places]
    if flip:
        views += [view.flip(3) for view in views]
    return views


def tta(model: torch.nn.Module, images: Tensor, *, flip: bool) -> Tensor:
    """Return the mean of a model's logits over `tta_views` (test-time augmentation)."""
    return torch.stack([model(view) for view in tta_views(images, flip=flip)]).mean(0)


def add_args(parser) -> None:
    flag = parser.add_argument
    flag("--crop-pad", type=int, default=0, metavar="N", help="random crops, N pixels of reflect padding (%(default)s)")
    flipped = "alternating horizontal flip (%(default)s)"
    flag("--flip", action=argparse.BooleanOptionalAction, default=False, help=flipped)
    flag("--augment", choices=["none", "strong"], default="none", help="strong: affine, elastic, colours (%(default)s)")
    flag("--reprob", type=float, default=0.0, metavar="P", help="random erasing in that share of images (%(default)s)")
    flag("--mixup", type=float, default=0.0, metavar="ALPHA", help="mix pairs of images; 0: off (%(default)s)")
    flag("--cutmix", type=float, default=0.0, metavar="ALPHA", help="paste rectangles of images; 0: off (%(default)s)")


# ---------------------------------------------------------------------------------------------- the plot


def read_images(paths: list[str]) -> Tensor:
    """Read image files, or draw 8 polygons if there are none: uint8 (n, 3, 32, 32)."""
    import numpy
    from PIL import Image, ImageDraw, ImageOps

    images = []
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    for path in paths:
        if not os.path.isfile(path):  # reading a pipe would wait for ever
            raise ValueError(f"{path} is no file")
        try:
            image = ImageOps.exif_transpose(Image.open(path, formats=known))
            if image.mode == "F" or image.mode.startswith("I"):  # convert() would cut them to 8 bits
                raise ValueError("its pixels have more than 8 bits")
            images.append(ImageOps.fit(image.convert("RGB"), (32, 32)))
        except Exception as error:  # Pillow has many
            raise ValueError(f"{path} can't be read as an image ({error})") from error
    if not paths:
        for i in range(8):
            image = Image.new("RGB", (32, 32), f"hsl({45 * i}, 50%, 30%)")
            circle = (12.8, 16, 9.6)  # x, y, radius: left of the middle, so that a flip is seen
            ImageDraw.Draw(image).regular_polygon(circle, 3 + i, fill=f"hsl({45 * i + 150}, 80%, 60%)")
            images.append(image)
    return torch.stack([torch.from_numpy(numpy.array(image)).permute(2, 0, 1) for image in images])


def show(images: Tensor, path: str, **options) -> None:
    """Plot images, what each of the options of `batches` does to them, and what all do together, into a PNG file."""
    from PIL import Image, ImageDraw, PngImagePlugin

    n = len(images)
    rows = [{}] + [{name: value} for name, value in options.items()]
    if len(options) > 1:
        rows.append(options)
    plot = Image.new("RGB", (110 + 96 * n, 100 * len(rows)), "white")
    for row, chosen in enumerate(rows):
        split = images, torch.arange(n)
        x, _ = next(batches(split, n, (0.5,) * 3, (0.25,) * 3, "cpu", key=(0, 0), num_classes=n, **chosen))
        pixels = (255 * (0.25 * x + 0.5)).round().clamp(0, 255).byte()
        strip = torch.cat(list(pixels), 2).permute(1, 2, 0)
        strip = Image.fromarray(strip.numpy()).resize((96 * n, 96), Image.Resampling.NEAREST)
        plot.paste(strip, (110, 100 * row))
        label = "\n".join(f"{name} {value}" for name, value in chosen.items())
        ImageDraw.Draw(plot).text((4, 100 * row + 4), label or "as they are", "black")
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", MARK)
    drawn = io.BytesIO()  # a plot that can't be drawn replaces no file
    plot.save(drawn, format="PNG", pnginfo=mark)
    with open(path, "wb") as file:
        file.write(drawn.getvalue())


def one_line(text) -> str:
    """A text as one printable line of bounded length."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(text).split()))[:1000]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        super().error(one_line(message))


def main():
    parser = Parser(description="Plot augmentation.", allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files (polygons, if there are none)")
    parser.add_argument("--show", required=True, metavar="FILE", help="where to write the plot")
    add_args(parser)
    args = parser.parse_args()
    if not args.show.lower().endswith(".png"):
        parser.error(f"--show {args.show} must end in .png")
    if os.path.exists(args.show) and not os.path.isfile(args.show):
        parser.error(f"--show {args.show} is no file: name another one")
    options = {"augment": args.augment} if args.augment != "none" else {}
    for name, most in {"crop_pad": 1000, "flip": 1, "reprob": 1, "mixup": 1000, "cutmix": 1000}.items():
        value = getattr(args, name)
        if not 0 <= value <= most:
            parser.error(f"--{name.replace('_', '-')} {value} must be from 0 to {most:,}")
        if name in ("mixup", "cutmix") and 0 < value < 0.01:
            parser.error(f"--{name} {value} must be 0, or from 0.01 to 1,000")
        if value:
            options["erase" if name == "reprob" else name] = value
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # of large or half transparent images, which it reads
            if os.path.exists(args.show):
                with open(args.show, "rb") as file:
                    if MARK.encode() not in file.read(200):
                        raise ValueError(f"--show {args.show} is no plot of augment.py: name another file")
            show(read_images(args.images), args.show, **options)
    except ImportError as error:
        parser.exit(1, f"augment.py: error: there is no {error.name}: pip install pillow numpy\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        print(f"wrote {one_line(args.show)}", flush=True)
    except OSError:  # a full disk, or nobody reads it: the plot is there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may not be in the terminal's alphabet
    main()
