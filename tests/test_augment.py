"""Tests: augment."""

import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import same
from PIL import Image

import data as datasets


def digits(count=64, size=28):
    """A bright square in the middle of each."""
    images = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    images[:, :, 9:-9, 9:-9] = 200
    return images


def test_distort_moves_every_image_alone_and_keeps_it():
    images = digits(200)
    out = datasets.distort(images, 2, None, datasets.seeded(0))
    assert out.shape == images.shape and out.dtype == torch.float32 and 0 <= out.min() and out.max() < 200.01
    assert len({image.numpy().tobytes() for image in out}) == 200
    area = (out > 100).float().sum((1, 2, 3)) / (images[0] > 100).sum()
    assert 0.5 < area.min() and area.max() < 2 and 0.9 < area.mean() < 1.1
    middle = (out.sum(2) * torch.arange(28)).sum((1, 2)) / out.sum((1, 2, 3))  # the centre's column
    assert middle.mean().item() == pytest.approx(13.5, abs=0.3) and 0.8 < middle.std() < 2
    assert torch.equal(out, datasets.distort(images, 2, None, datasets.seeded(0)))


def test_distort_mirrors_and_recolours():
    left = torch.full((400, 3, 32, 32), 100, dtype=torch.uint8)
    left[..., :16] = 150
    left[:, 0] //= 2
    mirrored = torch.arange(400) % 3 == 0
    out = datasets.distort(left, 0, mirrored, datasets.seeded(0))
    assert torch.equal(out[..., :8].mean((1, 2, 3)) < out[..., -8:].mean((1, 2, 3)), mirrored)
    assert not (datasets.distort(left, 0, None, datasets.seeded(0))[..., :8].mean() < 90)
    brightness = out.mean((1, 2, 3)) / left.float().mean()
    assert 0.65 < brightness.min() < 0.8 and 1.2 < brightness.max() < 1.35
    colour = (out[:, 1] - out[:, 0]).mean((1, 2))  # 62.5 as it is
    assert colour.min() < 40 and colour.max() > 90


def test_erasing_takes_a_rectangle_from_that_share():
    images = torch.full((1000, 2, 20, 24), 7.0)
    out = datasets.erase_some(images, 0.25, datasets.seeded(0))
    changed = out != images
    assert torch.equal(changed[:, 0], changed[:, 1])
    some = changed[:, 0][changed.flatten(1).any(1)]
    assert 200 < len(some) < 300
    for mask in some:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns) and mask.sum() <= 0.4 * mask.numel()
        for side in (rows, columns):
            assert side.diff().sum() <= 2  # one piece
    noise = out[changed]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert torch.equal(datasets.erase_some(images, 1e-9, datasets.seeded(0)), images)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0), (0.01, 0), (0, 1.0), (0.8, 1.0)])
def test_mixed_labels_sum_to_one_and_weigh_what_the_images_do(mixup, cutmix):
    labels = torch.arange(100) % 10
    images = labels[:, None, None, None].float().expand(100, 3, 16, 16)  # an image's pixels are its label
    x, y = datasets.mix(images, labels, 10, mixup, cutmix, datasets.seeded(1))
    assert x.shape == images.shape and y.shape == (100, 10) and y.dtype == torch.float32
    assert torch.allclose(y.sum(1), torch.ones(100)) and (y >= 0).all() and ((y > 0).sum(1) <= 2).all()
    assert torch.allclose((y * torch.arange(10)).sum(1), x.mean((1, 2, 3)), atol=1e-4)
    cut = all(len(image.unique()) <= 2 and set(image.unique().tolist()) <= set(range(10)) for image in x)
    assert cut or not (cutmix and not mixup)
    own = y[torch.arange(100), labels]
    assert len(own.unique()) > 10 and 0.3 < own.mean() < 0.7


def test_a_batch_takes_mixup_or_cutmix_at_random():
    images, labels = torch.randn(8, 1, 16, 16), torch.arange(8)
    kinds = set()
    for seed in range(12):
        x, _ = datasets.mix(images, labels, 8, 1.0, 1.0, datasets.seeded(seed))
        kinds.add(bool(torch.isin(x, images).all()))  # only cutmix keeps every pixel
    assert kinds == {True, False}


def test_augmented_batches_depend_on_the_key_alone():
    data = datasets.shapes(60, 20)
    options = dict(crop_pad=2, flip=True, augment="strong", erase=0.5, mixup=0.8, cutmix=1.0, num_classes=10)

    def epoch(key, **more):
        torch.rand(1)
        return list(datasets.batches(data.train, 16, data.mean, data.std, "cpu", key=key, **more))

    first = epoch((0, 0), **options)
    assert same(first, epoch((0, 0), **options)) and same(first[2:], epoch((0, 0), first=2, **options))
    plain = epoch((0, 0))
    assert plain[0][1].dtype == torch.int64 and first[0][1].shape == (16, 10)
    hot = [F.one_hot(y, 10).bool() for _, y in plain]
    own = torch.cat([y[h] for (_, y), h in zip(first, hot, strict=True)])
    assert (own > 0).float().mean() > 0.9  # the order is that of the plain ones, whatever the augmentation
    for name, value in options.items():
        if name not in ("num_classes", "flip"):
            changed = epoch((0, 0), **{name: value}, num_classes=10)
            assert not torch.equal(changed[0][0], plain[0][0]), name
            assert changed[0][1].ndim == (2 if name in ("mixup", "cutmix") else 1)


def test_picture_of_augmentation(tmp_path, monkeypatch, capsys):
    small = datasets.shapes(80, 20)
    monkeypatch.setattr(datasets, "shapes", lambda: small)
    monkeypatch.setattr(
        sys, "argv", ["data.py", *f"--show {tmp_path}/a.png --augment strong --cutmix 1 --flip".split()]
    )
    datasets.main()
    picture = Image.open(tmp_path / "a.png")
    assert picture.height == 5 * 116  # as they are, three of them, all
    cells = [picture.crop((110, 116 * row, 206, 116 * row + 96)).tobytes() for row in range(5)]
    assert len(set(cells)) >= 3 and str(tmp_path / "a.png") in capsys.readouterr().out
    for wrong in ("--data nowhere", f"--show {tmp_path}/none/a.png", "--augment weak"):
        monkeypatch.setattr(sys, "argv", ["data.py", "--show", f"{tmp_path}/b.png", *wrong.split()])
        with pytest.raises(SystemExit) as stop:
            datasets.main()
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
