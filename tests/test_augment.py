"""Tests: augment."""

import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import give_head_weights, same
from PIL import Image

import augment
import mlp_mnist


def test_crops_stay_inside_and_flips_are_exact():
    # Every pixel says where it is, so that a crop tells its own offset.
    place = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(500, 2, 8, 8)
    assert torch.equal(augment.crop_and_flip(place, 0, None, augment.seeded(0)), place)
    mirrored = torch.arange(500) % 3 == 0
    flipped = augment.crop_and_flip(place, 0, mirrored, augment.seeded(0))
    assert torch.equal(flipped[mirrored], place[mirrored].flip(3)) and torch.equal(flipped[~mirrored], place[~mirrored])
    padded = F.pad(place.float(), (3, 3, 3, 3), mode="reflect").byte()
    windows = {padded[0, 0, y : y + 8, x : x + 8].numpy().tobytes() for y in range(7) for x in range(7)}
    crops = augment.crop_and_flip(place, 3, None, augment.seeded(0))
    assert torch.equal(crops[:, 0], crops[:, 1])
    assert {crop.numpy().tobytes() for crop in crops[:, 0]} == windows  # nothing else, and each of the 49


@pytest.mark.parametrize("kind", ["none", "strong"])
def test_two_epochs_show_both_sides_of_every_image(kind):
    split = torch.zeros(300, 1, 8, 8, dtype=torch.uint8), torch.arange(300)
    split[0][..., :3] = 200

    def mirrored(epoch):
        key = dict(key=(7, epoch), flip=True, augment=kind)
        images, labels = next(augment.batches(split, 300, (0.5,), (0.5,), "cpu", **key))
        return (images[..., 4:].mean((1, 2, 3)) > images[..., :4].mean((1, 2, 3)))[labels.argsort()]

    first = mirrored(0)
    assert 100 < first.sum() < 200
    assert torch.equal(mirrored(1), ~first) and torch.equal(mirrored(2), first)


def test_order_depends_on_seed_and_epoch_alone():
    split = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 1, 8, 8), torch.arange(50)

    def epoch(key, **more):
        torch.rand(1)  # other random numbers don't matter
        return list(augment.batches(split, 16, (0.5,), (0.5,), "cpu", key=key, crop_pad=2, flip=True, **more))

    first = epoch((0, 0))
    assert same(first, epoch((0, 0))) and same(first[2:], epoch((0, 0), first=2))
    assert sorted(torch.cat([labels for _, labels in first]).tolist()) == list(range(50))
    for other in ((0, 1), (1, 0)):
        assert not torch.equal(first[0][1], epoch(other)[0][1])
    plain = list(augment.batches(split, 16, (0.5,), (0.5,), "cpu"))
    assert torch.cat([labels for _, labels in plain]).tolist() == list(range(50))
    assert torch.allclose(plain[0][0][3, 0, 0, 0], torch.tensor((3 / 255 - 0.5) / 0.5))


def test_no_batch_of_one():
    assert augment.bounds(9, 4, least=2) == [(0, 4), (4, 9)]
    assert augment.bounds(10, 4, least=2) == [(0, 4), (4, 8), (8, 10)]
    assert augment.bounds(9, 4) == [(0, 4), (4, 8), (8, 9)]
    assert augment.bounds(1, 4) == [(0, 1)] and augment.bounds(0, 4) == []


@pytest.mark.parametrize("key", [None, (0, 3)])
def test_first_and_every_choose_among_the_same_batches(key):
    split = torch.randint(0, 256, (2500, 1, 8, 8), dtype=torch.uint8), torch.arange(2500)
    options = dict(key=key, crop_pad=2, flip=True, mixup=0.5, num_classes=2500, least=2)
    whole = list(augment.batches(split, 100, (0.5,), (0.5,), "cpu", **options))
    assert len(whole) == 25
    for first, every in ((0, 1), (7, 1), (11, 3), (3, 25), (25, 1), (40, 2)):
        some = list(augment.batches(split, 100, (0.5,), (0.5,), "cpu", first=first, every=every, **options))
        assert same(some, whole[first::every])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_of_the_processes_make_up_the_batch(world_size):
    split = torch.randint(0, 256, (45, 1, 8, 8), dtype=torch.uint8), torch.arange(45)

    def shares(rank, least):
        options = dict(key=(0, 0), crop_pad=2, cutmix=1.0, num_classes=45, least=least)
        return list(augment.batches(split, 20, (0.5,), (0.5,), "cpu", rank=rank, world_size=world_size, **options))

    for least in (1, world_size):
        whole = list(augment.batches(split, 20, (0.5,), (0.5,), "cpu", key=(0, 0), crop_pad=2, cutmix=1.0,
                                     num_classes=45, least=least))  # fmt: skip
        parts = zip(*(shares(rank, least) for rank in range(world_size)), strict=True)
        for (images, labels), pairs in zip(whole, parts, strict=True):
            assert torch.equal(torch.cat([x for x, _ in pairs]), images)
            assert torch.equal(torch.cat([y for _, y in pairs]), labels)
            if least == world_size:
                assert min(len(y) for _, y in pairs) > 0


def digits(count=64, size=28):
    """A bright square in the middle of each."""
    images = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    images[:, :, 9:-9, 9:-9] = 200
    return images


def test_distort_moves_every_image_alone_and_keeps_it():
    images = digits(200)
    out = augment.distort(images, 2, None, augment.seeded(0))
    assert out.shape == images.shape and out.dtype == torch.float32 and 0 <= out.min() and out.max() < 200.01
    assert len({image.numpy().tobytes() for image in out}) == 200
    area = (out > 100).float().sum((1, 2, 3)) / (images[0] > 100).sum()
    assert 0.5 < area.min() and area.max() < 2 and 0.9 < area.mean() < 1.1
    middle = (out.sum(2) * torch.arange(28)).sum((1, 2)) / out.sum((1, 2, 3))  # the centre's column
    assert middle.mean().item() == pytest.approx(13.5, abs=0.3) and 0.8 < middle.std() < 2
    assert torch.equal(out, augment.distort(images, 2, None, augment.seeded(0)))


def test_distort_mirrors_and_recolours():
    left = torch.full((400, 3, 32, 32), 100, dtype=torch.uint8)
    left[..., :16] = 150
    left[:, 0] //= 2
    mirrored = torch.arange(400) % 3 == 0
    out = augment.distort(left, 0, mirrored, augment.seeded(0))
    assert torch.equal(out[..., :8].mean((1, 2, 3)) < out[..., -8:].mean((1, 2, 3)), mirrored)
    assert not (augment.distort(left, 0, None, augment.seeded(0))[..., :8].mean() < 90)
    brightness = out.mean((1, 2, 3)) / left.float().mean()
    assert 0.65 < brightness.min() < 0.8 and 1.2 < brightness.max() < 1.35
    colour = (out[:, 1] - out[:, 0]).mean((1, 2))  # 62.5 as it is
    assert colour.min() < 40 and colour.max() > 90


def test_erasing_takes_a_rectangle_from_that_share():
    images = torch.full((1000, 2, 20, 24), 7.0)
    out = augment.erase_some(images, 0.25, augment.seeded(0))
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
    assert torch.equal(augment.erase_some(images, 1e-9, augment.seeded(0)), images)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0), (0.01, 0), (0, 1.0), (0.8, 1.0)])
def test_mixed_labels_sum_to_one_and_weigh_what_the_images_do(mixup, cutmix):
    labels = torch.arange(100) % 10
    images = labels[:, None, None, None].float().expand(100, 3, 16, 16)  # an image's pixels are its label
    x, y = augment.mix(images, labels, 10, mixup, cutmix, augment.seeded(1))
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
        x, _ = augment.mix(images, labels, 8, 1.0, 1.0, augment.seeded(seed))
        kinds.add(bool(torch.isin(x, images).all()))  # only cutmix keeps every pixel
    assert kinds == {True, False}


def test_augmented_batches_depend_on_the_key_alone():
    images = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=augment.seeded(0))
    split = images, torch.arange(60) % 10
    options = dict(crop_pad=2, flip=True, augment="strong", erase=0.5, mixup=0.8, cutmix=1.0, num_classes=10)

    def epoch(key, **more):
        torch.rand(1)
        return list(augment.batches(split, 16, (0.5,) * 3, (0.25,) * 3, "cpu", key=key, **more))

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


def test_plot_of_augmentation(tmp_path, monkeypatch, capsys):
    def main(*argv):
        monkeypatch.setattr(sys, "argv", ["augment.py", *map(str, argv)])
        augment.main()

    main("--show", tmp_path / "a.png", *"--augment strong --cutmix 1 --flip --crop-pad 4".split())
    assert str(tmp_path / "a.png") in capsys.readouterr().out
    plot = Image.open(tmp_path / "a.png")
    assert plot.height == 6 * 100  # as they are, four of them, all
    cells = [plot.crop((110, 100 * row, plot.width, 100 * row + 96)).tobytes() for row in range(6)]
    assert len(set(cells)) == 6

    Image.new("RGB", (50, 30), "red").save(tmp_path / "red.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "white.png")
    main("--show", tmp_path / "b.png", tmp_path / "red.png", tmp_path / "white.png")
    plot = Image.open(tmp_path / "b.png")
    assert plot.size == (110 + 2 * 96, 100)
    assert {plot.getpixel((150, 40)), plot.getpixel((250, 40))} == {(255, 0, 0), (255, 255, 255)}

    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (14000, 13000)).save(tmp_path / "bomb.png")
    for wrong, words in {
        f"--show {tmp_path}/c.png {tmp_path}/nowhere.png": "nowhere.png",
        f"--show {tmp_path}/c.png {tmp_path}/text.png": "text.png",
        f"--show {tmp_path}/c.png {tmp_path}/bomb.png": "bomb.png",
        f"--show {tmp_path}/none/a.png": "none/a.png",
        f"--show {tmp_path}/a.unknown": "unknown",
        f"--show {tmp_path}/c.png --augment weak": "--augment",
        f"--show {tmp_path}/c.png --crop-pad 40": "crop_pad 40 must be smaller than the image, 32x32 pixels",
        f"--show {tmp_path}/c.png --crop-pad -1": "--crop-pad -1",
        f"--show {tmp_path}/c.png --mixup nan": "--mixup nan",
        f"--show {tmp_path}/c.png --reprob 2": "--reprob 2",
        f"--show {tmp_path}/red.png {tmp_path}/white.png {tmp_path}/../{tmp_path.name}/red.png": "name another file",
        "--flip": "--show",
    }.items():
        with pytest.raises(SystemExit) as stop:
            main(*wrong.split())
        said = capsys.readouterr().err
        assert stop.value.code == 2 and len(said.splitlines()) == 1 and words in said, said
    assert not (tmp_path / "c.png").exists() and Image.open(tmp_path / "red.png").size == (50, 30)


def test_too_much_padding_is_rejected():
    images = torch.zeros(2, 1, 5, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^crop_pad 5 must be smaller than the image, 5x8 pixels"):
        augment.crop_and_flip(images, 5, None, augment.seeded(0))
    with pytest.raises(ValueError, match=r"^shift 5 must be smaller than the image, 5x8 pixels"):
        augment.tta_views(images.float(), flip=True, shift=5)


def test_other_kinds_and_shapes_are_rejected():
    split = torch.zeros(2, 1, 5, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    for kind, words in (("Strong", "augment Strong must be"), ("strong", "square images, these have 5x8")):
        with pytest.raises(ValueError, match=words):
            next(augment.batches(split, 2, (0.5,), (0.5,), "cpu", key=(0, 0), augment=kind))


def test_what_batches_cannot_take_is_rejected_at_once():
    images, labels = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"float32 must be torch\.uint8"):
        next(augment.batches((images, labels), 2, (0.5,), (0.5,), "cpu"))
    with pytest.raises(ValueError, match="need num_classes"):
        next(augment.batches((images.byte(), labels), 2, (0.5,), (0.5,), "cpu", key=(0, 0), mixup=0.8))


def test_tta_is_the_mean_over_its_views():
    images = torch.arange(64.0).view(1, 1, 8, 8).expand(3, 2, 8, 8)
    as_it_is, up_left, down_right, *mirrored = augment.tta_views(images, flip=True, shift=2)
    assert torch.equal(as_it_is, images) and len(mirrored) == 3
    assert torch.equal(up_left[..., 2:, 2:], images[..., :-2, :-2])
    assert torch.equal(down_right[..., :-2, :-2], images[..., 2:, 2:])
    assert torch.equal(mirrored[1], up_left.flip(3))
    assert len(augment.tta_views(images, flip=False)) == 3 and len(augment.tta_views(images, flip=False, shift=0)) == 1
    torch.manual_seed(0)
    model = give_head_weights(mlp_mnist.MLP(hidden=(16,), dropout=0.2, batch_norm=True)).eval()
    images = torch.randn(5, 1, 28, 28)
    logits = [model(view) for view in augment.tta_views(images, flip=True)]
    assert len(logits) == 6 and torch.allclose(augment.tta(model, images, flip=True), sum(logits) / 6, atol=1e-6)
