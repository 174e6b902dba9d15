"""Image datasets as whole uint8 tensors: load them, split them, and cut them into augmented batches.

    data = load("cifar10", "data")               # or mnist, fashion-mnist, cifar100, shapes, or a folder of images
    train, val = split(data.train, 0.1, seed=0)
    for images, labels in batches(train, 128, data.mean, data.std, device, key=(seed, epoch), crop_pad=4, flip=True):
        ...

    python data.py --data shapes --augment strong --mixup 0.8 --show augmented.png      # what each does to 8 images

These sets fit into memory, so there are no worker processes: the images lie on the training device as bytes, and a
batch is augmented and normalised there by a few tensor operations, with random numbers of its own for every image.
Copied alone, this file needs torch and torchvision.
"""

import argparse
import contextlib
import functools
import hashlib
import math
import os
import random
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

# The class in torchvision.datasets and the size of its download. torchvision knows addresses and checksums.
DOWNLOADS = {
    "cifar10": ("CIFAR10", "170 MB"),
    "cifar100": ("CIFAR100", "169 MB"),
    "mnist": ("MNIST", "12 MB"),
    "fashion-mnist": ("FashionMNIST", "31 MB"),
}
NAMES = (*DOWNLOADS, "shapes")
# Mean and standard deviation of the pixels of the training set, in 0..1, by channel. Those of other sets are measured.
CONSTANTS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "mnist": ((0.1307,), (0.3081,)),
}
SILENCE = 20  # seconds without a byte after which a download is given up
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
AT_ONCE = 1024  # images: small batches are augmented several at once, each of them alone would take longer
CACHE_VERSION = 1  # raise it when decode() or the cache file changes


class Unavailable(OSError):
    """A known dataset is neither on disk nor downloadable."""


@dataclass
class Data:
    name: str
    classes: list  # of names
    mean: tuple  # by channel, of pixels in 0..1
    std: tuple
    train: tuple  # (images, labels): uint8 (n, channels, size, size) and int64 (n,)
    test: tuple
    note: str = ""  # what the user should know, such as another set in place of the wanted one


def load(name, data_dir="data", *, img_size=None, fallback=False, read_only=False):
    """Load a dataset by name, or a folder that holds train/<class>/* and test/<class>/* images, as a Data.

    What isn't in `data_dir` is downloaded into it. `img_size` is for folders: images are scaled and centre-cropped to
    that many pixels (default: the short side of the first image, at most 64). With `fallback`, a set that can't be had
    is replaced by "shapes", and the note says why. With `read_only`, nothing is written into data_dir. Raises
    Unavailable, ValueError for unusable data, OSError.
    """
    if name == "shapes":
        data = shapes()
    elif name in DOWNLOADS:
        try:
            data = _from_torchvision(name, Path(data_dir), read_only)
        except Unavailable as error:
            if not fallback:
                raise
            data = shapes()
            data.note = f"{error}\nGoing on with the embedded set 'shapes': the figures below are not those of {name}."
    elif Path(name).is_dir():
        data = _from_folder(Path(name), Path(data_dir), img_size, read_only)
    else:
        raise ValueError(f"--data {name} is neither a folder here nor a known set; known are {', '.join(NAMES)}")
    for images, labels in (data.train, data.test):
        if len(images) == 0 or len(images) != len(labels):
            raise ValueError(f"{data.name} is damaged: {len(images)} images and {len(labels)} labels")
        if labels.min() < 0 or labels.max() >= len(data.classes):
            raise ValueError(f"{data.name} is damaged: it has a label out of 0..{len(data.classes) - 1}")
    return data


def pixel_stats(images):
    """Mean and standard deviation by channel, in 0..1, exactly: from the counts of the 256 values."""
    value = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
    share = counts.double() / images[:, 0].numel()
    mean = share @ value
    std = (share * (value - mean[:, None]) ** 2).sum(1).sqrt()
    return tuple(round(m, 4) for m in mean.tolist()), tuple(round(max(s, 1 / 255), 4) for s in std.tolist())


# ---------------------------------------------------------------------------------------------- sets from torchvision


def _from_torchvision(name, root, read_only):
    from torchvision import datasets  # imported here: it costs a second that shapes and folders needn't pay

    cls = getattr(datasets, DOWNLOADS[name][0])
    try:
        try:
            train, test = cls(root, train=True), cls(root, train=False)
        except RuntimeError as error:  # not there, or a wrong checksum
            if "not found" not in str(error):
                raise
            if read_only:
                raise Unavailable(
                    f"{name} is not in {root}: name that folder with --data-dir to load it there"
                ) from None
            _download(name, cls, root)
            train, test = cls(root, train=True), cls(root, train=False)
    except Unavailable as error:
        if (root / getattr(cls, "base_folder", cls.__name__)).exists():
            raise ValueError(f"{name} in {root} is damaged or not complete: {error}") from error
        raise
    except Exception as error:  # whatever a damaged file makes torchvision's readers say
        raise ValueError(f"{name} in {root} is damaged ({error!r}): remove it to load it again") from error

    def tensors(part):
        images = torch.as_tensor(part.data)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        return images, torch.as_tensor(part.targets)

    (images, labels), test = tensors(train), tensors(test)
    mean, std = CONSTANTS.get(name) or pixel_stats(images)
    return Data(name, [c.split(" - ")[0] for c in train.classes], mean, std, (images, labels), test)


def _download(name, cls, root):
    """Let torchvision download and unpack a set, or raise Unavailable with all that is needed to do it by hand."""
    from torchvision.datasets import utils

    if hasattr(cls, "url"):
        address, folder, files = cls.url, root, [cls.filename]
    else:
        address, folder = " or ".join(cls.mirrors), root / cls.__name__ / "raw"
        files = [file for file, _ in cls.resources]
    new_folders = [f for f in (folder, *folder.parents) if not f.exists()]
    print(f"Downloading {name} ({DOWNLOADS[name][1]}) from {address} into {root}", file=sys.stderr)
    timeout, bar = socket.getdefaulttimeout(), utils.tqdm
    socket.setdefaulttimeout(SILENCE)
    utils.tqdm = functools.partial(bar, disable=not sys.stderr.isatty())
    try:
        cls(root, train=True, download=True)
    except Exception as error:
        for new in new_folders:
            with contextlib.suppress(OSError):
                new.rmdir()  # only if it's empty
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unavailable(
            f"{name} is not in {root} and can't be downloaded from {address} ({reason}). "
            f"To do it by hand, put {', '.join(files)} from there into {folder}."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
        utils.tqdm = bar


# ---------------------------------------------------------------------------------------------- a folder of images


def _from_folder(folder, data_dir, img_size, read_only):
    """Decode a folder once and keep the pixels in data_dir/cache; see load. The folder itself is only read."""
    classes = sorted(entry.name for entry in _entries(folder / "train") if entry.is_dir())
    files = {part: [] for part in ("train", "test")}  # of (path, label)
    for part, found in files.items():
        for entry in filter(os.DirEntry.is_dir, _entries(folder / part)):
            if entry.name not in classes:
                raise ValueError(f"{entry.path} is a class that {folder / 'train'} lacks, which names all classes")
            inside = [e.path for e in _entries(entry.path) if Path(e.name).suffix.lower() in IMAGE_SUFFIXES]
            if part == "train" and not inside:
                raise ValueError(f"{entry.path} holds no images: add some, or remove the class")
            found += [(path, classes.index(entry.name)) for path in inside]
        if not found:
            raise ValueError(f"{folder / part} holds no images: expected {folder / part}/<class>/*.jpg, png, ...")
    paths = [path for part in files.values() for path, _ in part]
    labels = torch.tensor([label for part in files.values() for _, label in part])
    img_size = img_size or min(64, min(_image_size(paths[0])))

    state = _fingerprint(folder, paths, img_size)
    key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]
    cache = data_dir / "cache" / f"{folder.resolve().name}-{img_size}-{key}.pt"
    images, note = None, ""
    if cache.exists():
        try:
            stored = torch.load(cache, mmap=True, weights_only=True)
            images = stored["images"] if stored["state"] == state else None
            note = "" if images is not None else f"{folder} has changed since it was decoded: decoding it again"
        except Exception as error:
            note = f"the cache {cache} is damaged ({type(error).__name__}): decoding {folder} again"
    if images is None:
        images = _decode_all(paths, img_size)
        if _fingerprint(folder, paths, img_size) != state:
            raise ValueError(f"{folder} changed while it was being decoded: run again when it is at rest")
        try:
            if not read_only:
                cache.parent.mkdir(parents=True, exist_ok=True)
                torch.save(dict(state=state, images=images), f"{cache}.tmp")
                os.replace(f"{cache}.tmp", cache)
        except OSError as error:
            note = f"no cache, the next run decodes {folder} again ({error})"
    n = len(files["train"])
    mean, std = pixel_stats(images[:n])
    train, test = (images[:n], labels[:n]), (images[n:], labels[n:])
    return Data(folder.resolve().name, classes, mean, std, train, test, note)


def _entries(folder):
    """The visible entries of a folder by name, or ValueError in place of OSError."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        rule = "--data takes a folder that holds train/<class>/* and test/<class>/* images"
        raise ValueError(f"{folder} can't be read ({error.strerror}): {rule}") from error


def _fingerprint(folder, paths, img_size):
    """A hash of what tells one state of a folder from another: the names, sizes and times of its files."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {img_size}".encode())
    for path in paths:
        info = os.stat(path)
        digest.update(os.fsencode(os.path.relpath(path, folder)) + f" {info.st_size} {info.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _image_size(path):
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:
        raise ValueError(f"{path} can't be read as an image ({error}): repair or remove it") from error


def decode(path, size):
    """Read an image file as a uint8 tensor (3, size, size): turned upright, short side scaled to size, centre kept.

    Of an animation it's the first frame. Grey images have three equal channels. Transparency is dropped.
    """
    import numpy
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 or 32 bits of grey, of which convert() would keep the lowest 8
            image = Image.fromarray((numpy.asarray(image).astype("uint32") >> 8).clip(0, 255).astype("uint8"))
        image = image.convert("RGB")
        if image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


def _decode_all(paths, size):
    """decode() of many files by several threads, as one tensor with 1 channel if all are grey, else 3."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    unreadable = {}

    def some(start):
        for i in range(start, min(start + 100, len(paths))):
            try:
                images[i] = decode(paths[i], size)
            except Exception as error:
                unreadable[paths[i]] = error

    starts = range(0, len(paths), 100)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(progress(pool.map(some, starts), total=len(starts), desc="decoding", unit="00 images"))
    if unreadable:
        some = [f"{path} ({error})" for path, error in sorted(unreadable.items())[:3]] + ["..."] * (len(unreadable) > 3)
        raise ValueError(f"{len(unreadable)} of {len(paths)} images can't be read, repair them: {', '.join(some)}")
    return images[:, :1].clone() if all(torch.equal(images[:, 0], images[:, c]) for c in (1, 2)) else images


def progress(iterable, **kwargs):
    """The same iterable behind a tqdm bar, if standard error is a terminal and tqdm is installed."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            return tqdm(iterable, leave=False, **kwargs)
    return iterable


# ---------------------------------------------------------------------------------------------- the embedded set

# Each figure as a test on the coordinates u, v of points around its centre, turned with it, and on its radius r.
FIGURES = {
    "disk": lambda u, v, r: u * u + v * v <= (7 * r // 8) ** 2,
    "ring": lambda u, v, r: (u * u + v * v <= r * r) & (u * u + v * v >= (5 * r // 8) ** 2),
    "square": lambda u, v, r: (u.abs() <= 3 * r // 4) & (v.abs() <= 3 * r // 4),
    "frame": lambda u, v, r: (torch.maximum(u.abs(), v.abs()) - 11 * r // 16).abs() <= 3 * r // 16,
    "triangle": lambda u, v, r: (v <= 5 * r // 8) & (2 * u.abs() <= v + r),
    "bar": lambda u, v, r: (u.abs() <= r) & (v.abs() <= r // 4),
    "cross": lambda u, v, r: torch.maximum(u.abs(), v.abs()).le(r) & torch.minimum(u.abs(), v.abs()).le(r // 4),
    "corner": lambda u, v, r: (torch.maximum(u, v) - 5 * r // 8).abs().le(r // 4) & torch.minimum(u, v).ge(-7 * r // 8),
    "tee": lambda u, v, r: (u.abs().le(r) & (v - 5 * r // 8).abs().le(r // 4)) | (v.abs().le(r) & u.abs().le(r // 4)),
    "moon": lambda u, v, r: (u * u + v * v <= r * r) & ((u - r // 2) ** 2 + v * v >= (3 * r // 4) ** 2),
}


def shapes(train=5000, test=1000):
    """The embedded set: 32x32 colour images of ten classes of small shapes, the same on every machine."""
    images, labels = draw_shapes(train, seed=1)
    mean, std = pixel_stats(images)
    return Data("shapes", list(FIGURES), mean, std, (images, labels), draw_shapes(test, seed=2))


def draw_shapes(count, seed, size=32):
    """Draw `count` images: uint8 (count, 3, size, size) and int64 labels (count,), as many of each class.

    A figure of random place, size, angle and colour, brighter than its background, on a few blocks and under noise.
    Whole numbers only, so that no machine rounds differently. Drawn at twice the size and averaged.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(count) % len(FIGURES))[torch.randperm(count, generator=generator)]
    turn = [math.radians(degree) for degree in range(-30, 31)]
    cos, sin = (torch.tensor([round(1024 * f(a)) for a in turn], dtype=torch.int32) for f in (math.cos, math.sin))
    y, x = torch.meshgrid(*[torch.arange(2 * size, dtype=torch.int32)] * 2, indexing="ij")
    parts = []
    for label in labels.split(500):  # a few images at a time, for the sake of memory
        n = len(label)

        def draw(low, high, *shape, n=n):
            return torch.randint(low, high + 1, (n, *shape), generator=generator, dtype=torch.int32)

        def place(low, high):
            return draw(low, high, 1, 1)

        ground = draw(0, 155, 3, 1, 1)
        image = ground.expand(-1, -1, 2 * size, 2 * size)
        for _ in range(3):
            block = ((x - place(0, 2 * size)).abs() < place(1, 8)) & ((y - place(0, 2 * size)).abs() < place(1, 8))
            image = torch.where(block[:, None], ground + draw(-60, 60, 3, 1, 1), image)
        dx, dy, r = x - place(size - 10, size + 10), y - place(size - 10, size + 10), 16 * place(14, 24)
        angle = draw(0, len(turn) - 1).long()
        c, s = cos[angle][:, None, None], sin[angle][:, None, None]
        u, v = (dx * c + dy * s) // 64, (dy * c - dx * s) // 64  # in 1/16 of a drawn pixel
        inside = torch.stack([list(FIGURES.values())[k](*uvr) for k, *uvr in zip(label, u, v, r, strict=True)])
        image = torch.where(inside[:, None], ground + draw(50, 99, 3, 1, 1), image)
        image = image.reshape(-1, 3, size, 2, size, 2).sum((3, 5), dtype=torch.int32) // 4
        parts.append((image + draw(-16, 16, 3, size, size)).clamp(0, 255).to(torch.uint8))
    return torch.cat(parts), labels


# ---------------------------------------------------------------------------------------------- splits and batches


def seeded(*key, device="cpu"):
    """A random generator that depends on the key alone, such as (seed, epoch)."""
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(63))


def pick(labels, count, seed):
    """A random boolean mask with `count` of the labels' places, each class in its proportion to within one."""
    n, labels = len(labels), labels.cpu()
    shuffled = torch.randperm(n, generator=seeded(seed, "pick"))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    i = torch.arange(n)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[by_class] = (i + 1) * count // n > i * count // n  # every n/count-th place
    return mask


def split(part, held_out, seed):
    """Split (images, labels) into (training part, held-out part), stratified; the same for the same seed.

    `held_out` is a fraction below 1 or a count; 0 gives an empty second part. Raises ValueError if nothing would be
    left to train on.
    """
    images, labels = part
    valid = 0 <= held_out < math.inf
    count = valid and (round(held_out * len(labels)) if held_out < 1 else int(held_out))
    if not valid or count >= len(labels) or (held_out and not count):
        rule = "0, a fraction below 1 or a count that leaves images on both sides"
        raise ValueError(f"--val-split {held_out:g} must be {rule} ({len(labels)} are there)")
    mask = pick(labels, count, seed)
    return (images[~mask], labels[~mask]), (images[mask], labels[mask])


def limit(part, count, seed):
    """`count` of the images of a part, each class in its proportion. Raises ValueError if there are fewer."""
    if count > len(part[1]):
        raise ValueError(f"--limit {count} is more than the {len(part[1])} training images")
    mask = pick(part[1], count, seed)
    return tuple(tensor[mask] for tensor in part)


def batches(
    part, batch_size, mean, std, device, *, key=None, first=0, every=1, least=1, share=(0, 1), crop_pad=0, flip=False,
    augment="none", erase=0.0, mixup=0.0, cutmix=0.0, num_classes=None,
):  # fmt: skip
    """Yield (images, labels) on the device: float32 (b, channels, size, size), normalised, and int64 (b,).

    With key=(seed, epoch), the order is random and images are augmented, both depending on the key alone: each image is
    shifted by up to crop_pad pixels either way (the border is mirrored) and, with flip, mirrored in every second epoch,
    a random half in the first (arXiv:2404.00498). augment="strong" adds distort(), `erase` is the share of images for
    erase_some(). With mixup or cutmix above 0 (the alpha of their Beta distribution) and num_classes, the labels are
    those of mix(), float32 (b, num_classes).

    Without a key the images come as they are. The last batch is smaller when batch_size doesn't divide, see `bounds`.
    `first` batches are left out, and of the others every so-many-th is taken. With share=(i, n), it's the i-th of n
    parts of every batch, augmented as in the whole; a part can be empty.
    """
    n, edges = len(part[1]), bounds(len(part[1]), batch_size, least)
    order = (torch.arange(n) if key is None else torch.randperm(n, generator=seeded(*key))).to(part[0].device)
    if flip and key is not None:
        mirrored = ((torch.rand(n, generator=seeded(key[0], "flip")) < 0.5) ^ bool(key[1] % 2)).to(order.device)
    mean, std = (255 * torch.tensor(x, device=device)[:, None, None] for x in (mean, std))
    together = 1 if key is None else max(1, AT_ONCE // batch_size)
    for step in range(first, len(edges), every):
        if step == first or step % together == 0:
            group = edges[step - step % together :][:together]
            chosen = order[group[0][0] : group[-1][1]]
            x, y = (tensor.index_select(0, chosen).to(device, non_blocking=True) for tensor in part)
            if key is not None:
                generator = seeded(*key, step // together, device=device)
                sides = mirrored[chosen].to(device) if flip else None
                x = (distort if augment == "strong" else crop_and_flip)(x, crop_pad, sides, generator)
            x = x.float().sub_(mean).mul_(1 / std)
            if erase and key is not None:
                x = erase_some(x, erase, generator)
        batch = slice(*(edge - group[0][0] for edge in edges[step]))
        images, labels = x[batch], y[batch]
        if (mixup or cutmix) and key is not None:
            images, labels = mix(images, labels, num_classes, mixup, cutmix, seeded(*key, step, "mix"))
        own = slice(*(len(labels) * i // share[1] for i in (share[0], share[0] + 1)))
        yield images[own], labels[own]


def bounds(n, batch_size, least=1):
    """The (start, end) of each batch of n images. Fewer left over than `least` join the batch before."""
    starts = list(range(0, n, batch_size))
    if len(starts) > 1 and n - starts[-1] < least:
        starts.pop()
    return list(zip(starts, [*starts[1:], n], strict=False))


def crop_and_flip(images, pad, mirrored, generator):
    """Shift every image by up to `pad` pixels, mirrored at the border, and mirror some whole: one gather.

    (b, channels, size, size) -> the same shape and dtype. `mirrored` is a boolean (b,), or None for none.
    """
    b, channels, height, width = images.shape
    if pad >= min(height, width):
        raise ValueError(f"--crop-pad {pad} must be smaller than the image, {height}x{width} pixels")

    def places(size):
        shift = torch.randint(-pad, pad + 1, (b, 1), generator=generator, device=images.device)
        place = (torch.arange(size, device=images.device) + shift).abs()
        return size - 1 - (size - 1 - place).abs()

    rows, columns = places(height), places(width)
    if mirrored is not None:
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    index = (rows[:, :, None] * width + columns[:, None, :]).view(b, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view(images.shape)


def distort(images, shift, mirrored, generator):
    """Turn, shear, scale and shift every image by random amounts, and mirror some: one interpolation for all.

    uint8 (b, channels, size, size) -> float32, 0..255. `shift` is in pixels either way, `mirrored` as above. Images of
    one channel, such as digits, are bent besides; coloured ones get another brightness, contrast and saturation.
    """
    b, channels, size, _ = images.shape

    def amount(limit):
        return limit * (2 * torch.rand(b, generator=generator, device=images.device) - 1)

    angle, shear, zoom = amount(math.radians(12)), amount(math.tan(math.radians(10))), 1.15 ** amount(1)
    sign = torch.ones_like(zoom) if mirrored is None else 1 - 2 * mirrored.float()
    cos, sin, x, y = angle.cos() / zoom, angle.sin() / zoom, amount(2 * shift / size), amount(2 * shift / size)
    matrix = torch.stack([cos * sign, cos * shear - sin, x, sin * sign, sin * shear + cos, y], 1).view(b, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)  # in it the image is 2 wide
    if channels == 1:
        coarse = 1.2 * 2 / size * torch.randn(b, 2, 4, 4, generator=generator, device=images.device)  # 1.2 pixels
        spread = F.interpolate(torch.eye(4, device=images.device)[None, None], (size, 4), mode="bicubic")[0, 0]
        grid = grid + (spread @ coarse @ spread.T).permute(0, 2, 3, 1)
    border = "reflection" if channels == 3 else "border"  # mirrored strokes would make other digits
    images = F.grid_sample(images.float(), grid, padding_mode=border, align_corners=False)
    if channels == 3:
        brightness, contrast, saturation = (1 + amount(0.3)[:, None, None, None] for _ in range(3))
        grey = images.mean(1, keepdim=True)
        middle = grey.mean((2, 3), keepdim=True)
        images = brightness * middle + contrast * (grey - middle + saturation * (images - grey))
    return images.clamp(0, 255)


def rectangles(area, ratio, height, width, generator):
    """Masks (b, 1, height, width), true in a rectangle of this part of the area and ratio of sides, (b,) each."""

    def stretch(part, size):
        length = (part.clamp(max=1) * size).round()[:, None]
        start = (torch.rand(length.shape, generator=generator, device=part.device) * (size - length + 1)).floor()
        place = torch.arange(size, device=part.device) - start
        return (place >= 0) & (place < length)

    rows, columns = stretch((area * ratio).sqrt(), height), stretch((area / ratio).sqrt(), width)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def erase_some(images, share, generator):
    """Random erasing (arXiv:1708.04896): in that share of images, noise in a rectangle of 2 to 33 % of the area."""
    drawn = torch.rand(3, len(images), generator=generator, device=images.device)
    mask = rectangles(0.02 + 0.31 * drawn[0], 9 ** drawn[1] / 3, *images.shape[2:], generator)
    mask &= (drawn[2] < share)[:, None, None, None]
    return torch.where(mask, torch.randn(images.shape, generator=generator, device=images.device), images)


def mix(images, labels, num_classes, mixup, cutmix, generator):
    """Mix every image with the one before it in the batch, and their labels alike: float32 (b, num_classes).

    By mixup (arXiv:1710.09412) it's the weighted mean of both, by cutmix (arXiv:1905.04899) a rectangle of the other
    one in its place. Each weight is drawn from Beta(alpha, alpha); cutmix's become the areas in whole pixels. An alpha
    of 0 turns one off; of both, a batch takes one at random. `generator` is on the CPU: no device is waited for.
    """
    cut = cutmix and (not mixup or torch.rand((), generator=generator) < 0.5)
    alpha = torch.full((2, len(images)), cutmix if cut else mixup, dtype=torch.float64)
    gammas = torch._standard_gamma(alpha, generator)  # of which Beta is a ratio; torch's Beta takes no generator
    own = (gammas[0] / gammas.sum(0)).float()[:, None, None, None]
    if cut:
        own = (~rectangles(1 - own.flatten(), torch.ones(len(own)), *images.shape[2:], generator)).float()
    own, hot = own.to(images.device, non_blocking=True), F.one_hot(labels, num_classes).float()
    return torch.lerp(images.roll(1, 0), images, own), torch.lerp(hot.roll(1, 0), hot, own.mean((1, 2, 3))[:, None])


def views(images, *, flip, shift=1):
    """Views of a batch, a list: as it is, shifted along the diagonal by +-shift pixels, and with flip all mirrored."""
    (height, width), padded = images.shape[2:], F.pad(images, (shift,) * 4, mode="reflect")
    moved = [padded[..., k : k + height, k : k + width] for k in dict.fromkeys((shift, 0, 2 * shift))]
    return moved + ([view.flip(3) for view in moved] if flip else [])


def tta(model, images, *, flip, shift=1):
    """Test-time augmentation: the mean of a model's scores over the views of a batch."""
    return torch.stack([model(view) for view in views(images, flip=flip, shift=shift)]).mean(0)


# ---------------------------------------------------------------------------------------------- flags and a picture


def add_args(parser):
    flag = parser.add_argument
    flag("--data", metavar="NAME", help=f"{', '.join(NAMES)}, or a folder of images (%(default)s)")
    flag("--data-dir", default="data", metavar="DIR", help="where datasets and caches lie (%(default)s)")
    flag("--img-size", type=int, metavar="N", help="scale a folder's images to N x N (as the first, at most 64)")
    flag("--crop-pad", type=int, default=0, metavar="N", help="shift images by up to N pixels (%(default)s)")
    flag("--flip", action=argparse.BooleanOptionalAction, default=False, help="mirror every other epoch (%(default)s)")
    flag("--augment", choices=["none", "strong"], default="none", help="strong: turn, bend, recolour (%(default)s)")
    flag("--reprob", type=float, default=0.0, metavar="P", help="erase a rectangle of that share of them (%(default)s)")
    flag("--mixup", type=float, default=0.0, metavar="ALPHA", help="mix pairs of images; 0: don't (%(default)s)")
    flag("--cutmix", type=float, default=0.0, metavar="ALPHA", help="paste parts of images; 0: don't (%(default)s)")


def show(data, path, **options):
    """Draw 8 training images, what each of the options of batches() does to them, and what all do, into a file."""
    from PIL import Image, ImageDraw

    some = tuple(tensor[pick(data.train[1], 8, seed=0)] for tensor in data.train)
    rows = [{}, *({k: v} for k, v in options.items()), *([options] if len(options) > 1 else [])]
    mean, std = (torch.tensor(x)[:, None, None] for x in (data.mean, data.std))
    picture = Image.new("RGB", (110 + 8 * 102, len(rows) * 116), "white")
    draw = ImageDraw.Draw(picture)
    for row, chosen in enumerate(rows):
        x, y = next(batches(some, 8, data.mean, data.std, "cpu", key=(0, 0), num_classes=len(data.classes), **chosen))
        name = "\n".join(f"{k} {v}" for k, v in chosen.items()) or "as they are"
        draw.text((4, 116 * row + 4), name, "black")
        for column, (image, label) in enumerate(zip(x * std + mean, y, strict=True)):
            left, top = 110 + 102 * column, 116 * row
            pixels = (255 * image).round().clamp(0, 255).byte().expand(3, -1, -1).permute(1, 2, 0)
            picture.paste(Image.fromarray(pixels.numpy()).resize((96, 96), Image.Resampling.NEAREST), (left, top))
            shares = [f"{data.classes[c][:6]} {x:.2f}" for c, x in enumerate(label) if x] if label.ndim else []
            draw.text((left, top + 97), " ".join(shares) or data.classes[label], "black")
    picture.save(path)


def main():
    parser = argparse.ArgumentParser(description="Draw augmentation.", allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument("--show", required=True, metavar="FILE", help="the picture")
    add_args(parser)
    args = parser.parse_args()
    on = {k: v for k, v in vars(args).items() if k in ("crop_pad", "flip", "augment", "mixup", "cutmix")}
    on = {k: v for k, v in (on | dict(erase=args.reprob)).items() if v not in (0, "none")}
    try:
        show(load(args.data or "shapes", args.data_dir, img_size=args.img_size), args.show, **on)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(" ".join(str(error).split()))
    print(f"wrote {args.show}")


if __name__ == "__main__":
    main()
