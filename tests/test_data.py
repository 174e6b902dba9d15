"""Tests: data."""

import gzip
import hashlib
import json
import math
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import call, same, write_folder, write_mnist
from PIL import Image

import data as datasets


def test_shapes_are_the_same_on_every_machine():
    data = datasets.shapes()
    assert data.train[0].shape == (5000, 3, 32, 32) and data.test[0].shape == (1000, 3, 32, 32)
    assert torch.bincount(data.train[1]).tolist() == [500] * 10
    assert hashlib.sha256(data.train[0].numpy().tobytes()).hexdigest()[:12] == "f1bf678381ae"
    assert not same(data.train[0][:1000], data.test[0])


def test_pixel_stats():
    images = torch.randint(0, 256, (50, 3, 9, 7), dtype=torch.uint8)
    mean, std = datasets.pixel_stats(images)
    scaled = images.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=6e-5)
    assert std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), abs=6e-5)


@pytest.mark.parametrize("held_out, size", [(0.1, 100), (250, 250), (0, 0), (0.0333, 33), (999, 999)])
def test_split_is_stratified_and_disjoint(held_out, size):
    labels = torch.arange(1000) % 10
    ids = torch.arange(1000)
    (train_ids, train_labels), (val_ids, val_labels) = datasets.split((ids, labels), held_out, seed=1)
    assert len(val_ids) == size
    assert sorted([*train_ids.tolist(), *val_ids.tolist()]) == ids.tolist()
    assert torch.equal(labels[train_ids], train_labels) and torch.equal(labels[val_ids], val_labels)
    counts = torch.bincount(val_labels, minlength=10)
    assert counts.max() - counts.min() <= 1
    again = datasets.split((ids, labels), held_out, seed=1)[1][0]
    assert torch.equal(again, val_ids)
    if 0 < size < 900:
        assert not torch.equal(datasets.split((ids, labels), held_out, seed=2)[1][0], val_ids)


@pytest.mark.parametrize("held_out", [1000, 1e9, 1e-9, math.nan, -1])
def test_split_refuses(held_out):
    with pytest.raises(ValueError, match="--val-split"):
        datasets.split((torch.arange(1000), torch.zeros(1000, dtype=torch.int64)), held_out, seed=0)


def test_crops_stay_inside_and_flips_are_exact():
    # Every pixel says where it is, so that a crop tells its own offset.
    place = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(500, 2, 8, 8)
    assert torch.equal(datasets.crop_and_flip(place, 0, None, datasets.seeded(0)), place)
    mirrored = torch.arange(500) % 3 == 0
    flipped = datasets.crop_and_flip(place, 0, mirrored, datasets.seeded(0))
    assert torch.equal(flipped[mirrored], place[mirrored].flip(3)) and torch.equal(flipped[~mirrored], place[~mirrored])
    padded = F.pad(place.float(), (3, 3, 3, 3), mode="reflect").byte()
    windows = {padded[0, 0, y : y + 8, x : x + 8].numpy().tobytes() for y in range(7) for x in range(7)}
    crops = datasets.crop_and_flip(place, 3, None, datasets.seeded(0))
    assert torch.equal(crops[:, 0], crops[:, 1])
    assert {crop.numpy().tobytes() for crop in crops[:, 0]} == windows  # nothing else, and each of the 49


@pytest.mark.parametrize("augment", ["none", "strong"])
def test_two_epochs_show_both_sides_of_every_image(augment):
    part = torch.zeros(300, 1, 8, 8, dtype=torch.uint8), torch.arange(300)
    part[0][..., :3] = 200

    def mirrored(epoch):
        key = dict(key=(7, epoch), flip=True, augment=augment)
        images, labels = next(datasets.batches(part, 300, (0.5,), (0.5,), "cpu", **key))
        return (images[..., 4:].mean((1, 2, 3)) > images[..., :4].mean((1, 2, 3)))[labels.argsort()]

    first = mirrored(0)
    assert 100 < first.sum() < 200
    assert torch.equal(mirrored(1), ~first) and torch.equal(mirrored(2), first)


def test_order_depends_on_seed_and_epoch_alone():
    part = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 1, 8, 8), torch.arange(50)

    def epoch(key, **more):
        torch.rand(1)  # other random numbers don't matter
        return list(datasets.batches(part, 16, (0.5,), (0.5,), "cpu", key=key, crop_pad=2, flip=True, **more))

    first = epoch((0, 0))
    assert same(first, epoch((0, 0))) and same(first[2:], epoch((0, 0), first=2))
    assert sorted(torch.cat([labels for _, labels in first]).tolist()) == list(range(50))
    for other in ((0, 1), (1, 0)):
        assert not torch.equal(first[0][1], epoch(other)[0][1])
    plain = list(datasets.batches(part, 16, (0.5,), (0.5,), "cpu"))
    assert torch.cat([labels for _, labels in plain]).tolist() == list(range(50))
    assert torch.allclose(plain[0][0][3, 0, 0, 0], torch.tensor((3 / 255 - 0.5) / 0.5))


def test_no_batch_of_one():
    assert datasets.bounds(9, 4, least=2) == [(0, 4), (4, 9)]
    assert datasets.bounds(10, 4, least=2) == [(0, 4), (4, 8), (8, 10)]
    assert datasets.bounds(9, 4) == [(0, 4), (4, 8), (8, 9)]
    assert datasets.bounds(1, 4) == [(0, 1)] and datasets.bounds(0, 4) == []


def test_limit_is_stratified():
    labels = torch.arange(300) % 3
    ids, some = datasets.limit((torch.arange(300), labels), 31, seed=0)
    assert len(set(ids.tolist())) == 31 and torch.bincount(some).tolist() in ([11, 10, 10], [10, 11, 10], [10, 10, 11])
    with pytest.raises(ValueError, match="--limit 301"):
        datasets.limit((torch.arange(300), labels), 301, seed=0)


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_files(name, folder, tmp_path):
    arrays = write_mnist(tmp_path, folder)
    data = datasets.load(name, tmp_path)
    assert torch.equal(data.train[0][:, 0], arrays["train"][0]) and torch.equal(data.test[0][:, 0], arrays["t10k"][0])
    assert data.train[1].tolist() == arrays["train"][1].tolist() and data.train[1].dtype == torch.int64
    assert len(data.classes) == 10 and (name != "mnist" or (data.classes[3], data.mean) == ("3", (0.1307,)))


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

    data = datasets.load(name, tmp_path)
    first = cls.train_list[0][0]
    assert torch.equal(data.train[0][:10], pixels[first].view(10, 3, 32, 32))
    assert len(data.train[1]) == 10 * len(cls.train_list) and len(data.test[1]) == 10 and data.classes == names
    assert data.mean == datasets.CONSTANTS.get(name, (datasets.pixel_stats(data.train[0])[0],))[0]


class NoNetwork:
    """Stands for urllib.request.urlopen: records the time limit in force, then fails as a silent host does."""

    def __call__(self, *args, **kwargs):

        self.timeout = socket.getdefaulttimeout()
        raise TimeoutError("timed out")


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", failing := NoNetwork())
    return failing


@pytest.mark.parametrize("name, file", [("cifar10", "cifar-10-python.tar.gz"), ("mnist", "t10k-labels-idx1-ubyte.gz")])
def test_download_fails_with_all_that_is_needed_by_hand(name, file, no_network, tmp_path):
    with pytest.raises(datasets.Unavailable) as error:
        datasets.load(name, tmp_path / "new")
    assert no_network.timeout == datasets.SILENCE
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
    assert len(datasets.load("mnist", tmp_path).train[1]) == 30


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
    decode = datasets.decode
    monkeypatch.setattr(datasets, "decode", lambda path, size: (decoded.append(path), decode(path, size))[1])
    data = datasets.load(str(root), cache)
    assert data.name == "pets" and data.classes == ["cat", "dog"] and data.note == ""
    assert data.train[0].shape == (12, 3, 20, 20) and data.test[1].tolist() == [0] * 3 + [1] * 3
    assert len(decoded) == 18
    again = datasets.load(str(root), cache)
    assert len(decoded) == 18 and torch.equal(again.train[0], data.train[0]) and again.mean == data.mean

    Image.new("RGB", (20, 24), (255, 0, 0)).save(root / "train" / "dog" / "0.png")
    changed = datasets.load(str(root), cache)
    assert len(decoded) == 36 and "changed" in changed.note
    assert changed.train[0][6, :, 0, 0].tolist() == [255, 0, 0]

    (file,) = (cache / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert "damaged" in datasets.load(str(root), cache).note and len(decoded) == 54
    assert datasets.load(str(root), cache, img_size=8).train[0].shape == (12, 3, 8, 8)


def test_grey_folder_has_one_channel(tmp_path):
    data = datasets.load(str(write_folder(tmp_path / "digits", (28, 28), "L")), tmp_path)
    assert data.train[0].shape == (12, 1, 28, 28) and len(data.mean) == 1


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda root: shutil.rmtree(root / "train"), ["train", "can't be read"]),
        (lambda root: shutil.rmtree(root / "test"), ["test", "can't be read"]),
        (lambda root: [f.unlink() for f in (root / "train" / "cat").iterdir()], ["cat", "holds no images"]),
        (lambda root: (root / "test" / "cow").mkdir(), ["cow", "class"]),
        (lambda root: (root / "train" / "dog" / "2.png").write_bytes(b"no image"), ["1 of 18", "2.png"]),
    ],
)
def test_bad_folders_are_refused(spoil, words, tiny, capsys):
    spoil(write_folder(tiny / "pets"))
    assert call("--model", "cnn", "--widths", "8", "--data", tiny / "pets") == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and all(word in said for word in words), said
    assert not Path("runs").exists()
