"""Tests: data."""

import gzip
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from conftest import call, same, write_folder, write_mnist
from PIL import Image

import data


def test_shapes_are_the_same_on_every_machine():
    dataset = data.shapes()
    assert dataset.train[0].shape == (5000, 3, 32, 32) and dataset.test[0].shape == (1000, 3, 32, 32)
    assert torch.bincount(dataset.train[1]).tolist() == [500] * 10
    assert hashlib.sha256(dataset.train[0].numpy().tobytes()).hexdigest()[:12] == "f1bf678381ae"
    assert not same(dataset.train[0][:1000], dataset.test[0])


def test_pixel_stats():
    images = torch.randint(0, 256, (50, 3, 9, 7), dtype=torch.uint8)
    mean, std = data.pixel_stats(images)
    scaled = images.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=6e-5)
    assert std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), abs=6e-5)


@pytest.mark.parametrize("held_out, size", [(0.1, 100), (250, 250), (0, 0), (0.0333, 33), (999, 999)])
def test_split_is_stratified_and_disjoint(held_out, size):
    labels = torch.arange(1000) % 10
    ids = torch.arange(1000)
    (train_ids, train_labels), (val_ids, val_labels) = data.split((ids, labels), held_out, seed=1)
    assert len(val_ids) == size
    assert sorted([*train_ids.tolist(), *val_ids.tolist()]) == ids.tolist()
    assert torch.equal(labels[train_ids], train_labels) and torch.equal(labels[val_ids], val_labels)
    counts = torch.bincount(val_labels, minlength=10)
    assert counts.max() - counts.min() <= 1
    again = data.split((ids, labels), held_out, seed=1)[1][0]
    assert torch.equal(again, val_ids)
    if 0 < size < 900:
        assert not torch.equal(data.split((ids, labels), held_out, seed=2)[1][0], val_ids)


@pytest.mark.parametrize("held_out", [1000, 1e9, 1e-9, math.nan, -1])
def test_split_rejects(held_out):
    with pytest.raises(ValueError, match=r"^val_split .* must be 0, a fraction below 1 or a count"):
        data.split((torch.arange(1000), torch.zeros(1000, dtype=torch.int64)), held_out, seed=0)


def test_limit_is_stratified():
    labels = torch.arange(300) % 3
    ids, some = data.limit((torch.arange(300), labels), 31, seed=0)
    assert len(set(ids.tolist())) == 31 and torch.bincount(some).tolist() in ([11, 10, 10], [10, 11, 10], [10, 10, 11])
    with pytest.raises(ValueError, match=r"^limit 301 must be from 1 to 300, the number of training images"):
        data.limit((torch.arange(300), labels), 301, seed=0)


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_files(name, folder, tmp_path):
    arrays = write_mnist(tmp_path, folder)
    dataset = data.load(name, tmp_path)
    assert torch.equal(dataset.train[0][:, 0], arrays["train"][0])
    assert torch.equal(dataset.test[0][:, 0], arrays["t10k"][0])
    assert dataset.train[1].tolist() == arrays["train"][1].tolist() and dataset.train[1].dtype == torch.int64
    assert len(dataset.classes) == 10 and (name != "mnist" or (dataset.classes[3], dataset.mean) == ("3", (0.1307,)))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_files(name, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10, CIFAR100

    cls = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    folder, classes = tmp_path / cls.base_folder, int(name[5:])
    folder.mkdir()
    pixels, key = {}, "labels" if name == "cifar10" else "fine_labels"

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    for files in ("train_list", "test_list"):
        listed = []
        for file, _ in getattr(cls, files):
            pixels[file] = torch.randint(0, 256, (10, 3072), dtype=torch.uint8)
            listed.append([file, write(file, {"data": pixels[file].numpy(), key: list(range(10))})])
        monkeypatch.setattr(cls, files, listed)
    names = [f"class {i}" for i in range(classes)]
    monkeypatch.setattr(cls, "meta", cls.meta | dict(md5=write(cls.meta["filename"], {cls.meta["key"]: names})))

    dataset = data.load(name, tmp_path)
    first = cls.train_list[0][0]
    assert torch.equal(dataset.train[0][:10], pixels[first].view(10, 3, 32, 32))
    assert len(dataset.train[1]) == 10 * len(cls.train_list) and len(dataset.test[1]) == 10 and dataset.classes == names
    assert dataset.mean == data.CONSTANTS.get(name, (data.pixel_stats(dataset.train[0])[0],))[0]


@pytest.fixture
def tiny_shapes(monkeypatch):
    small = data.shapes(50, 20)
    monkeypatch.setattr(data, "shapes", lambda: small)


class NoNetwork:
    """Stands for urllib.request.urlopen: records its time limit, then fails as a silent host does."""

    def __call__(self, address, timeout):
        self.timeout = timeout
        raise TimeoutError("timed out")


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", failing := NoNetwork())
    return failing


@pytest.mark.parametrize("name, file", [("cifar10", "cifar-10-python.tar.gz"), ("mnist", "t10k-labels-idx1-ubyte.gz")])
def test_download_fails_with_all_that_is_needed_by_hand(name, file, no_network, tmp_path):
    with pytest.raises(data.Unavailable) as error:
        data.load(name, tmp_path / "new")
    assert no_network.timeout == data.SILENCE
    for word in (name, "http", "timed out", file, str(tmp_path / "new")):
        assert word in str(error.value)
    assert not (tmp_path / "new").exists()  # nothing half-made is left


def test_files_put_by_hand_are_taken(no_network, tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    write_mnist(tmp_path)
    raw, resources = tmp_path / "MNIST" / "raw", []
    for file in list(raw.iterdir()):
        packed = raw / f"{file.name}.gz"
        packed.write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
        resources.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))
    monkeypatch.setattr(MNIST, "resources", resources)
    assert len(data.load("mnist", tmp_path).train[1]) == 30


def test_a_file_that_one_mirror_lacks_comes_from_the_next(tmp_path, monkeypatch, capsys):
    from torchvision.datasets import MNIST

    write_mnist(tmp_path / "there")
    packed = {path.name + ".gz": gzip.compress(path.read_bytes()) for path in (tmp_path / "there/MNIST/raw").iterdir()}
    monkeypatch.setattr(MNIST, "resources", [(name, hashlib.md5(packed[name]).hexdigest()) for name in packed])
    monkeypatch.setattr(MNIST, "mirrors", ["http://one/", "http://two/"])
    asked, last = [], list(packed)[-1]

    def urlopen(address, timeout):
        asked.append(address)
        if address == f"http://one/{last}":
            raise OSError("404")
        return io.BytesIO(packed[address.split("/")[-1]])

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert len(data.load("mnist", tmp_path / "here").train.labels) == 30
    assert asked == [*(f"http://one/{name}" for name in packed), f"http://two/{last}"]
    said = f"Downloading mnist (12 MB) from http://one/ or http://two/ into {tmp_path / 'here'}\n"
    assert capsys.readouterr().err == said


def test_fallback_to_shapes_is_said_and_named(tiny, no_network, capsys):
    assert call("--model", "cnn", "--widths", "4,8", "--epochs", 1, "--batch-size", 64) == 0
    said = capsys.readouterr().out
    assert "cifar10 is not in data" in said and "cifar-10-python.tar.gz" in said and "shapes" in said
    result = json.loads(Path("runs/cnn-shapes-muon-onecycle/result.json").read_text())
    assert result["data"] == "shapes" and result["args"]["data"] == "shapes"
    assert call("--model", "cnn", "--data", "cifar10") == 2  # asked for by name, it's an error


def test_folder_is_decoded_once_and_again_when_it_changes(tmp_path, monkeypatch):
    root, cache = write_folder(tmp_path / "pets"), tmp_path / "data"
    decoded = []
    decode = data.decode
    monkeypatch.setattr(data, "decode", lambda path, size: (decoded.append(path), decode(path, size))[1])
    dataset = data.load(str(root), cache)
    assert dataset.name == "pets" and dataset.classes == ["cat", "dog"] and dataset.note == ""
    assert dataset.train[0].shape == (12, 3, 20, 20) and dataset.test[1].tolist() == [0] * 3 + [1] * 3
    assert len(decoded) == 18
    again = data.load(str(root), cache)
    assert len(decoded) == 18 and torch.equal(again.train[0], dataset.train[0]) and again.mean == dataset.mean

    Image.new("RGB", (20, 24), (255, 0, 0)).save(root / "train" / "dog" / "0.png")
    changed = data.load(str(root), cache)
    assert len(decoded) == 36 and changed.note == ""
    assert changed.train[0][6, :, 0, 0].tolist() == [255, 0, 0]
    files = list((cache / "cache").iterdir())
    assert len(files) == 2  # that of the former state is not deleted

    for file in files:
        file.write_bytes(file.read_bytes()[:1000])
    assert "damaged" in data.load(str(root), cache).note and len(decoded) == 54
    for content in (torch.zeros(17, 3, 20, 20, dtype=torch.uint8), torch.zeros(18, 3, 20, 20), {"images": 0}):
        for file in files:
            torch.save(content, file)
        again = data.load(str(root), cache)
        assert "damaged" in again.note and torch.equal(again.train[0], changed.train[0])
    assert data.load(str(root), cache).note == "" and len(decoded) == 108
    assert data.load(str(root), cache, img_size=8).train[0].shape == (12, 3, 8, 8)


def test_what_pillow_warns_of_is_read_in_silence(tmp_path, monkeypatch):
    """An image beyond its limit, and a palette with transparency, while warnings are errors."""
    root = write_folder(tmp_path / "pets", (40, 40))
    palette = Image.new("P", (40, 40))
    palette.putpalette([200, 0, 0] * 256)
    palette.save(root / "train" / "cat" / "0.png", transparency=bytes([0, 128]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = data.load(str(root), tmp_path / "data")
    assert dataset.train.images[0, :, 0, 0].tolist() == [200, 0, 0]


def test_files_that_change_places_are_decoded_again(tmp_path):
    """With the size and time of the other, as a copy with times leaves them."""
    root = write_folder(tmp_path / "pets")
    cat, dog = (root / "train" / name / "0.bmp" for name in ("cat", "dog"))
    for path, colour in ((cat, "red"), (dog, "blue")):
        Image.new("RGB", (20, 24), colour).save(path)
        os.utime(path, (1, 1))
    before = data.load(str(root), tmp_path).train[0]
    for old, new in ((cat, "kept.bmp"), (dog, cat), (root / "train" / "cat" / "kept.bmp", dog)):
        old.rename(old.with_name(new) if new == "kept.bmp" else new)
    after = data.load(str(root), tmp_path).train[0]
    assert before[0, :, 0, 0].tolist() == after[7, :, 0, 0].tolist() == [255, 0, 0]
    assert before[7, :, 0, 0].tolist() == after[0, :, 0, 0].tolist() == [0, 0, 255]


def test_two_processes_decode_a_folder_at_once(tmp_path, monkeypatch):
    """The second one begins and ends while the first one writes its cache."""
    root, save, once = write_folder(tmp_path / "pets"), torch.save, []

    def overtaken(content, path):
        save(content, path)
        if not once:
            once.append(path)
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: 1)
                once.append(data.load(str(root), tmp_path / "data"))

    monkeypatch.setattr(torch, "save", overtaken)
    first = data.load(str(root), tmp_path / "data")
    cache = tmp_path / "data" / "cache"
    assert first.note == once[1].note == "" and [file.suffix for file in cache.iterdir()] == [".pt"]
    monkeypatch.setattr(data, "decode", None)
    again = data.load(str(root), tmp_path / "data")
    assert same(first.train.images, once[1].train.images) and same(first.train.images, again.train.images)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), RuntimeError("write failed"), None])
def test_a_cache_that_cannot_be_written_costs_one_note(error, tmp_path, monkeypatch):
    root = write_folder(tmp_path / "pets")
    if error is None:
        (tmp_path / "data").write_text("a file, not a folder")
    else:

        def save(content, path):
            Path(path).write_bytes(b"a part of it")
            raise error

        monkeypatch.setattr(torch, "save", save)
    dataset = data.load(str(root), tmp_path / "data")
    assert dataset.train.images.shape == (12, 3, 20, 20)
    assert dataset.note.startswith("no cache, the next run decodes the images again") and "\n" not in dataset.note
    assert error is None or list((tmp_path / "data" / "cache").iterdir()) == []


def test_read_only_writes_nothing(no_network, tmp_path):
    dataset = data.load(str(write_folder(tmp_path / "pets")), tmp_path / "data", read_only=True)
    assert dataset.note == "" and len(dataset.train.labels) == 12
    with pytest.raises(data.Unavailable, match=r"mnist is not in .*data_dir"):
        data.load("mnist", tmp_path / "data", read_only=True)
    assert not (tmp_path / "data").exists() and not hasattr(no_network, "timeout")


def test_a_name_that_is_not_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^data nowhere is no folder and no known set: .*, shapes, or a folder"):
        data.load("nowhere")


def test_a_set_that_is_not_available_falls_back_to_shapes(tiny_shapes, no_network, tmp_path):
    dataset = data.load("mnist", tmp_path, fallback=True)
    assert dataset.name == "shapes" and "mnist is not in" in dataset.note and "not for mnist" in dataset.note


def test_splits_have_names():
    dataset = data.shapes(50, 20)
    train, val = data.split(dataset.train, 0.2, seed=0)
    few = data.limit(train, 10, seed=0)
    for split, n in ((dataset.train, 50), (dataset.test, 20), (train, 40), (val, 10), (few, 10)):
        assert isinstance(split, data.Split) and split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        assert split.images.shape == (n, 3, 32, 32) and split.labels.shape == (n,)


def test_it_works_without_standard_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(data.progress_bar(range(3))) == [0, 1, 2]
    assert len(data.load(str(write_folder(tmp_path / "pets")), tmp_path).train.labels) == 12


def test_grey_folder_has_one_channel(tmp_path):
    dataset = data.load(str(write_folder(tmp_path / "digits", (28, 28), "L")), tmp_path)
    assert dataset.train[0].shape == (12, 1, 28, 28) and len(dataset.mean) == 1


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda root: shutil.rmtree(root / "train"), ["has no folder train: expected"]),
        (lambda root: shutil.rmtree(root / "test"), ["has no folder test: expected"]),
        (lambda root: [f.unlink() for f in (root / "train" / "cat").iterdir()], ["cat", "holds no images"]),
        (lambda root: (root / "test" / "cow").mkdir(), ["cow", "class"]),
        (lambda root: (root / "train" / "dog" / "2.png").write_bytes(b"no image"), ["1 of 18", "2.png"]),
    ],
)
def test_bad_folders_are_rejected(spoil, words, tiny, capsys):
    spoil(write_folder(tiny / "pets"))
    assert call("--model", "cnn", "--widths", "8", "--data", tiny / "pets") == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and all(word in said for word in words), said
    assert not Path("runs").exists()


def test_an_archive_put_by_hand_is_taken(no_network, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder, listed = tmp_path / CIFAR10.base_folder, {"train_list": [], "test_list": []}
    folder.mkdir()
    contents = {file: (name, {"data": torch.zeros(10, 3072, dtype=torch.uint8).numpy(), "labels": list(range(10))})
                for name in listed for file, _ in getattr(CIFAR10, name)}  # fmt: skip
    contents[CIFAR10.meta["filename"]] = ("meta", {CIFAR10.meta["key"]: [f"class {i}" for i in range(10)]})
    for file, (name, content) in contents.items():
        (folder / file).write_bytes(pickle.dumps(content))
        digest = hashlib.md5((folder / file).read_bytes()).hexdigest()
        if name == "meta":
            monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": digest})
        else:
            listed[name].append([file, digest])
    for name, files in listed.items():
        monkeypatch.setattr(CIFAR10, name, files)
    packed = Path(shutil.make_archive(str(tmp_path / "packed"), "gztar", tmp_path, CIFAR10.base_folder))
    packed.rename(tmp_path / CIFAR10.filename)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((tmp_path / CIFAR10.filename).read_bytes()).hexdigest())
    shutil.rmtree(folder)
    assert len(data.load("cifar10", tmp_path).train.labels) == 50


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_a_failed_download_removes_no_folder_of_the_user(name, no_network, tmp_path, monkeypatch):
    (tmp_path / "experiment/data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "experiment")
    for root in (Path("data").resolve(), Path("new/data").resolve()):
        with pytest.raises(data.Unavailable):
            data.load(name, root)
    assert [path.name for path in (tmp_path / "experiment").iterdir()] == ["data"]


def test_a_broken_transfer_leaves_nothing(tmp_path, monkeypatch):
    class Broken(io.BytesIO):
        def read(self, size):
            raise OSError("connection reset")

    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **options: Broken())
    with pytest.raises(data.Unavailable, match="connection reset"):
        data.load("cifar10", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_transfer_that_is_cut_short_is_tried_elsewhere_and_leaves_nothing(tmp_path, monkeypatch):
    """A peer that closes early is the end of the file, for http.client."""
    from torchvision.datasets import CIFAR10

    asked = []

    def cut(address, **options):
        asked.append(address)
        return io.BytesIO(b"half of it")

    monkeypatch.setattr("urllib.request.urlopen", cut)
    with pytest.raises(data.Unavailable, match="10 bytes came, whose checksum is wrong"):
        data.load("cifar10", tmp_path)
    assert asked == [data.MIRRORS["cifar10"][0] + CIFAR10.filename, CIFAR10.url] and not list(tmp_path.iterdir())


def test_files_that_are_no_images_are_counted(tmp_path):
    root = write_folder(tmp_path / "pets", (8, 8))
    assert data.load(root, tmp_path).note == ""
    for name in ("train/cat/photo.HEIC", "train/notes.txt", "test/dog/\x1b[31m.x\ny", "test/dog/.hidden"):
        (root / name).touch()
    note = data.load(root, tmp_path).note.strip()
    assert note.count("\n") == 0 and "left out: 3 ('.HEIC', '.txt', '.x\\ny')" in note


def test_one_class_is_a_folder_too_many(tiny, capsys):
    pets = write_folder(tiny / "pets")
    for split in ("train", "test"):
        (pets / split).rename(pets / "images")
        (pets / split).mkdir()
        (pets / "images").rename(pets / split / "images")
    assert call("--model", "cnn", "--widths", "8", "--data", pets) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "holds one class, images" in said


def test_grey_of_more_than_8_bits(tmp_path):
    grey = torch.tensor([[0, 255], [300, 65535]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    Image.fromarray(grey.numpy().astype("uint16")).save(tmp_path / "16.png")
    Image.fromarray(torch.tensor([[-5, 70_000]]).numpy().astype("int32")).save(tmp_path / "32.tif")
    Image.fromarray((grey / 65535).float().numpy()).save(tmp_path / "float.tif")
    assert data.decode(tmp_path / "16.png", 8)[0, ::4, ::4].tolist() == [[0, 0], [1, 255]]
    assert data.decode(tmp_path / "32.tif", 1).shape == (3, 1, 1)  # cropped to its centre: neither wraps round
    with pytest.raises(ValueError, match="floating-point"):
        data.decode(tmp_path / "float.tif", 8)


def test_the_mean_is_of_the_training_images_alone(tmp_path):
    for part, colour in (("train", "black"), ("test", "white")):
        for name in "ab":
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), colour).save(tmp_path / "pets" / part / name / "0.png")
    assert data.load(str(tmp_path / "pets"), tmp_path).mean == (0.0,)


def test_the_centre_is_kept(tmp_path):
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste((0, 255, 0), (10, 0, 20, 10))
    for name, image in (("wide.png", wide), ("tall.png", wide.rotate(90, expand=True))):
        image.save(tmp_path / name)
        pixels = data.decode(tmp_path / name, 10)
        assert pixels[1].min() == 255 and pixels[0].max() == 0


def test_a_slow_address_is_left_for_the_next_and_the_last_is_waited_for(tmp_path, monkeypatch):
    clock, asked = [0.0], []

    class Slow(io.BytesIO):
        def read(self, size):
            clock[0] += data.SILENCE + 10
            return super().read(1000)

    def urlopen(address, **_):
        asked.append(address)
        return Slow(bytes(5000))

    monkeypatch.setattr(data, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(data.Unavailable, match="too slow; 5,000 bytes came"):
        data.load("cifar10", tmp_path)
    assert len(asked) == 2


def test_training_files_copied_over_the_test_files_are_noticed(tmp_path):
    write_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    for path in raw.glob("train-*"):
        shutil.copy(path, raw / path.name.replace("train", "t10k"))
    with pytest.raises(ValueError, match="training and test files hold the same images"):
        data.load("mnist", tmp_path)


def cached(folder, root):
    """The pixels that are cached for a folder, and the file that holds them."""
    before = set(root.glob("cache/*.pt"))
    images = data.load(str(folder), root, img_size=8).train.images.clone()
    (path,) = set(root.glob("cache/*.pt")) - before
    return images, path


def test_a_cache_with_other_pixels_is_made_anew(tmp_path):
    write_folder(tmp_path / "pets")
    write_folder(tmp_path / "birds", mode="L")
    pets, path = cached(tmp_path / "pets", tmp_path)
    _, other = cached(tmp_path / "birds", tmp_path)
    whole = path.read_bytes()
    place = whole.index(pets[0].numpy().tobytes()[:64])
    damaged = whole[: place + 10] + bytes([whole[place + 10] ^ 255]) + whole[place + 11 :]
    for content in (damaged, other.read_bytes()):
        path.write_bytes(content)
        loaded = data.load(str(tmp_path / "pets"), tmp_path, img_size=8)
        assert "is damaged" in loaded.note and torch.equal(loaded.train.images, pets)
    assert data.load(str(tmp_path / "pets"), tmp_path, img_size=8).note == ""


def test_images_of_too_many_pixels_and_of_other_formats_are_named(tmp_path):
    write_folder(tmp_path / "pets")
    path = tmp_path / "pets" / "train" / "cat" / "zz.png"
    Image.new("1", (20_000, 10_000)).save(path)
    with pytest.raises(ValueError, match=r"zz.png .*pixels"):
        data.load(str(tmp_path / "pets"), tmp_path, img_size=8)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")  # for which Pillow would start Ghostscript
    with pytest.raises(ValueError, match=r"zz.png .*cannot identify image file"):
        data.load(str(tmp_path / "pets"), tmp_path, img_size=8)
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"zz.png can't be read .*: repair or remove it"):
        data.load(str(tmp_path / "pets"), tmp_path, img_size=8)
