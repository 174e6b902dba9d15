"""Tests: command line."""

import argparse
import math
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import (
    EFFECTS,
    TINY,
    TINY_MLP,
    call,
    end_as_torch_does,
    rejected,
    same,
    write_folder,
    write_idx,
    write_mnist,
)
from PIL import Image

import data as datasets
import mlp_mnist
import predict
from utils import arguments, checkpoints, models

WRONG = [
    "--model resnet", "--opt adamax", "--sched cosinus", "--loss l2", "--loss ce+", "--data nowhere", "--epochs 0",
    "--epochs nan", "--epochs -1", "--lr -0.1", "--lr 0", "--lr inf", "--batch-size 0", "--batch-size 1.5",
    "--accum 0", "--accum 65",
    "--seed -1", "--device tpu", "--device cuda:99", "--amp fp8", "--val-split -0.1", "--val-split 0.5.5",
    "--val-split 126.5", "--val-split 140", "--val-split=-inf", "--limit 0", "--limit 1000", "--crop-pad -1",
    "--crop-pad 32",
    "--smoothing 1", "--monitor test_acc", "--patience -1", "--min-delta nan", "--weight-decay -1",
    "--momentum 0.9", "--opt sgd --momentum 1", "--opt sgd --momentum 0 --nesterov", "--opt-betas 0.9",
    "--opt-betas 0.9,1", "--clip-grad inf", "--warmup-epochs 1", "--warmup-epochs -1", "--min-lr 1", "--gamma 0.1",
    "--sched step --gamma 0", "--sched step --step-size 0", "--sched multistep --milestones 5,3",
    "--sched multistep --milestones a", "--t-max 0", "--t-max -1", "--sched restarts --t-0 -1",
    "--sched restarts --t-mult 0", "--sched plateau --patience-epochs -1",
    "--sched plateau --patience 6 --patience-epochs 5", "--sched plateau --epochs 12 --patience 0 --patience-epochs 10",
    "--loss 1e-300*ce", "--loss 1e20*ce", "--mixup 0.001", "--cutmix 1e9", "--opt adagrad --lr-scale head=1e300",
    "--sched plateau --patience 0 --patience-epochs 1" + 400 * "0", "--hidden 0",
    "--hidden a", "--dropout 1", "--log-interval -1", "--img-size 0", "--resume nowhere.pt", "--eval nowhere.pt",
    "--epoch 3", "--model vit --patch-size 5", "--model vit --heads 5", "--model vit --pool max",
    "--model cnn --arch deep", "--model cnn --widths 1,1,1,1,1,1", "--opt lbfgs --amp fp16",
    "--opt lbfgs --weight-decay 0.1", "--val-split 0 --sched plateau", "--out taken", "--out file", "--out file/below",
    "--init nowhere.pt", "--freeze lay", "--model vit --norm-eps 0", "--layer-decay 0", "--layer-decay 1.5",
    "--lr-scale haed=2", "--lr-scale head=0", "--lr-scale head", "--opt lbfgs --layer-decay 0.5", "--augment weak",
    "--opt lbfgs --lr-scale head=2", "--reprob 2", "--mixup -1", "--cutmix nan", "--ema 1", "--mixup-off-epoch 1",
    "--distill 1", "--temperature 2", "--teacher nowhere.pt", "--minutes 1", "--minutes 0", "--runs 0",
    "--device cpu --cuda-graph", "--opt lbfgs --cuda-graph", "--device tpu:0", "--opt lbfgs --clip-grad 1",
]  # fmt: skip


def test_flags_are_split_as_by_a_shell():
    text = """--data imgs#2 --case "#1: --lr 1"  --out 'a # b' # a comment, isn't it?"""
    assert arguments.split_flags(text) == ["--data", "imgs#2", "--case", "#1: --lr 1", "--out", "a # b"]
    assert arguments.split_flags(r"""--case "a \" b # c" --out it\'s # don't""") == [
        "--case",
        'a " b # c',
        "--out",
        "it's",
    ]
    assert arguments.split_flags("# all of it") == arguments.split_flags("\t#") == []


def test_wrong_input_is_one_line_and_status_2(tiny, capsys):
    Path("taken").mkdir()
    Path("taken/log.txt").write_text("a run")
    Path("file").write_text("not a folder")
    before = sorted(tiny.rglob("*"))
    for wrong in WRONG:
        status = rejected(*TINY, *wrong.split())
        said = capsys.readouterr().err
        assert status == 2, wrong
        assert len(said.splitlines()) == 1 and "error: " in said, (wrong, said)
        flag = [w for w in wrong.split() if w.startswith("--")][-1].split("=")[0].removeprefix("--")
        named = re.search(rf"(?<![\w-])(--)?{flag}(?![\w-])", said.replace("_", "-"))
        value = wrong.split()[-1]
        assert named or (len(value) > 4 and value in said), (wrong, said)
        assert sorted(tiny.rglob("*")) == before, f"{wrong} left something behind"
    assert Path("taken/log.txt").read_text() == "a run"


def test_files_of_flags_are_read_whichever_way_python_mixes_words_and_flags(tiny, monkeypatch):
    Path("flags.args").write_text("--top 2 # a comment")
    wanted = {"checkpoint": "best.pt", "images": ["a.png"], "top": 2}
    for way in ("that of this Python", "that of 3.12.8 and later, which calls no method of the parser"):
        parser = predict.make_parser()
        found = vars(parser.parse_intermixed_args(["best.pt", "a.png", "@flags.args"]))
        assert wanted.items() <= found.items(), way
        with pytest.raises(SystemExit):
            parser.parse_intermixed_args(["best.pt", ""])
        mixed = argparse.ArgumentParser.parse_known_args
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_intermixed_args", mixed)


def test_unknown_names_list_the_known_ones(tiny, capsys):
    for flag, known in (("--model", "mlp"), ("--opt", "adagrad"), ("--sched", "onecycle"), ("--data", "fashion-mnist")):
        assert rejected(flag, "unknown") == 2
        assert known in capsys.readouterr().err


def test_eval_refuses_what_does_not_fit(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    write_folder(tiny / "pets", (32, 32))
    for flags, words in (
        (["--model", "vit"], ["mlp", "vit"]),
        (["--data", tiny / "pets"], ["cat", "disk"]),
        (["--lr", 0.1], ["--lr"]),
    ):
        assert call("--eval", "run/best.pt", *flags) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
    Path("text.pt").write_text("no checkpoint")
    torch.save({"weights": torch.zeros(3)}, "other.pt")
    for file in ("text.pt", "other.pt", tiny):
        assert call("--eval", file) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


class Harm:
    """A pickle of this leaves a file behind when it's loaded carelessly."""

    def __reduce__(self):
        return os.mkdir, ("harmed",)


def damaged_checkpoints(good):
    """name -> a function that writes a bad checkpoint to a path, given the content of a good one."""

    def changed(**more):
        return lambda path: torch.save(good | more, path)

    def repacked(compression=zipfile.ZIP_STORED, alter=lambda name, raw: raw):
        def write(path):
            torch.save(good, path)
            with zipfile.ZipFile(path) as file:
                entries = [(name, file.read(name)) for name in file.namelist()]
            with zipfile.ZipFile(path, "w", compression) as file:
                for name, raw in entries:
                    file.writestr(name, alter(name, raw))
            end_as_torch_does(path)

        return write

    def flipped(path):
        torch.save(good, path)
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)

    first = next(iter(good["state_dict"]))
    big = torch.zeros(1).as_strided((10**6, 10**6), (0, 0))  # claims 4 TB, holds 4 bytes
    bad_weights = good["state_dict"] | {first: good["state_dict"][first] * math.nan}
    return {
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("no checkpoint"),
        "picture": lambda path: Image.new("RGB", (8, 8)).save(path, "png"),
        "truncated": lambda path: (torch.save(good, path), path.write_bytes(path.read_bytes()[:-2000])),
        "half": lambda path: (torch.save(good, path), path.write_bytes(path.read_bytes()[:1000])),
        "one bit flipped": flipped,
        "only weights": lambda path: torch.save(good["state_dict"], path),
        "a list": lambda path: torch.save([good], path),
        "a whole model": lambda path: torch.save(mlp_mnist.MLP(hidden=(4,)), path),
        "code": lambda path: torch.save(good | dict(metrics=Harm()), path),
        "code in a plain pickle": lambda path: path.write_bytes(pickle.dumps(good | dict(metrics=Harm()))),
        "missing keys": lambda path: torch.save({k: v for k, v in good.items() if k != "classes"}, path),
        "wrong types": changed(model_args="hidden=16"),
        "another model's name": changed(model="resnet"),
        "another version": changed(model_args=good["model_args"] | dict(width=3)),
        "other sizes": changed(model_args=good["model_args"] | dict(hidden=(17,))),
        "huge sizes": changed(model_args=good["model_args"] | dict(hidden=(10**7, 10**7))),
        "a huge tensor": changed(state_dict=good["state_dict"] | {first: big}),
        "weights of text": changed(state_dict=good["state_dict"] | {first: "text"}),
        "NaN weights": changed(state_dict=bad_weights),
        "compressed": repacked(
            zipfile.ZIP_DEFLATED, lambda name, raw: raw + bytes(10**7) if "data.pkl" in name else raw
        ),
        "storage cut short": repacked(alter=lambda name, raw: raw[:4] if "/data/" in name else raw),
    }


def test_bad_checkpoints_are_refused(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    good = checkpoints.load("run/last.pt")
    capsys.readouterr()
    for name, write in damaged_checkpoints(good).items():
        write(path := tiny / "bad.pt")
        for flag in ("--eval", "--resume"):
            assert rejected(flag, path) == 2, (name, flag)
            said = capsys.readouterr().err
            assert len(said.splitlines()) == 1 and len(said) < 500, (name, said)
            assert sorted(f.name for f in tiny.iterdir()) == ["bad.pt", "run"], name


def test_resume_refuses_what_does_not_fit(tiny, capsys):
    assert call(*TINY_MLP, "--out", "run") == 0
    good = checkpoints.load("run/last.pt")
    for change in (
        dict(history=[dict(epoch=1)]), dict(history=[3]), dict(optimizer={}), dict(totals=torch.zeros(9, 3)),
        dict(rng=[3]), dict(args=good["args"] | dict(colour="red")), dict(args={}),
    ):  # fmt: skip
        torch.save(good | change, "run/last.pt")
        capsys.readouterr()
        assert call("--resume", "run/last.pt") == 2, change
        said = capsys.readouterr().err
        assert ("--resume" in said or "run/last.pt" in said) and len(said.splitlines()) == 1, said


def spoiled_mnist(root):
    """name -> a function that damages the files of write_mnist, and a word of the message."""
    raw = root / "MNIST" / "raw"
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"

    def cut(path, start=0, end=None):
        return lambda: path.write_bytes(path.read_bytes()[start:end])

    return {
        "wrong magic number": lambda: images.write_bytes(b"\x01\x02\x03\x04" + images.read_bytes()[4:]),
        "short": cut(images, end=-100),
        "empty": cut(images, end=0),
        "only a header": cut(images, end=16),
        "labels short": cut(labels, end=-1),
        "a label out of range": lambda: labels.write_bytes(labels.read_bytes()[:-1] + b"\x0b"),
        "fewer labels than images": lambda: write_idx(labels, torch.zeros(20, dtype=torch.uint8)),
    }


@pytest.mark.parametrize("case", spoiled_mnist(Path()).keys())
def test_bad_mnist_files_are_refused(case, tiny, capsys):
    write_mnist(tiny / "data")
    spoiled_mnist(tiny / "data")[case]()
    assert call("--model", "mlp", "--hidden", 8) == 2  # files that are there but damaged are no reason for a fallback
    said = capsys.readouterr().err
    assert "mnist" in said and "damaged" in said and len(said.splitlines()) == 1, said
    assert not Path("runs").exists()


def test_images_of_many_modes_and_odd_names(tmp_path):
    root = tmp_path / "my images"
    for part in ("train", "test"):
        for name in ("Käse und Brot", "猫"):
            (root / part / name).mkdir(parents=True)
            Image.new("RGB", (12, 12)).save(root / part / name / "plain.png")
    folder = root / "train" / "猫"
    Image.new("L", (12, 40), 200).save(folder / "grey und schmal.png")
    Image.new("LA", (40, 12), (200, 10)).save(folder / "grey alpha.png")
    Image.new("RGBA", (12, 12), (200, 0, 0, 0)).save(folder / "alpha.png")
    Image.new("P", (12, 12), 3).save(folder / "palette.gif")
    Image.new("1", (12, 12), 1).save(folder / "bits.png")
    Image.new("CMYK", (12, 12), (0, 255, 255, 0)).save(folder / "cmyk.jpg")
    Image.fromarray(torch.full((12, 12), 51_400).to(torch.uint16).numpy()).save(folder / "16 bit.png")
    frames = [Image.new("RGB", (12, 12), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    (folder / ".hidden.png").write_bytes(b"not looked at")
    (folder / "notes.txt").write_text("not looked at")
    data = datasets.load(str(root), tmp_path)
    first = {Path(p).name: image[:, 6, 6].tolist() for p, image in zip(
        sorted(str(f) for f in folder.iterdir() if f.suffix != ".txt" and f.name[0] != "."),
        data.train[0][data.train[1] == 1], strict=True)}  # fmt: skip
    assert data.classes == ["Käse und Brot", "猫"] and len(first) == 9
    assert first["grey und schmal.png"] == first["grey alpha.png"] == first["16 bit.png"] == [200] * 3
    assert first["alpha.png"] == [200, 0, 0] and first["bits.png"] == [255] * 3
    assert first["animated.gif"] == pytest.approx([255, 0, 0], abs=2)
    assert first["cmyk.jpg"][0] > 200 and max(first["cmyk.jpg"][1:]) < 60


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda root: (root / "train" / "dog" / "loop.png").symlink_to("loop.png"), ["loop.png"]),
        (lambda root: (root / "train" / "dog" / "gone.png").symlink_to("nowhere.png"), ["gone.png"]),
        (lambda root: (root / "train" / "dog" / "deep.png").mkdir(), ["deep.png"]),
        (lambda root: (root / "train" / "dog" / "cut.png").write_bytes(
            (root / "train" / "dog" / "1.png").read_bytes()[:300]), ["1 of 19", "cut.png"]),
    ],
)  # fmt: skip
def test_odd_files_in_a_folder_are_named(spoil, words, tiny, capsys):
    spoil(write_folder(tiny / "pets"))
    assert call("--model", "cnn", "--widths", "8", "--data", tiny / "pets") == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and all(word in said for word in words), said


def test_a_folder_that_changes_while_it_is_decoded(tiny, monkeypatch, capsys):
    root, decode = write_folder(tiny / "pets"), datasets.decode

    def changing(path, size):
        Path(path).touch()
        os.utime(path, (1, 1))
        return decode(path, size)

    monkeypatch.setattr(datasets, "decode", changing)
    assert call("--model", "cnn", "--widths", "8", "--data", root) == 2
    assert "changed while" in capsys.readouterr().err and not Path("data/cache").exists()


@pytest.mark.slow
def test_no_dead_flag(tiny, monkeypatch, capsys):
    """Every flag of every model is in the table above, and changes there what it says."""
    flags = {dest for name in models.MODELS for dest in vars(arguments.make_parser(name).parse_args([]))}
    assert flags == set(EFFECTS)
    write_folder(tiny / "pets", (16, 16), train_count=70)
    base = "--model mlp --hidden 16 --data shapes --epochs 1 --batch-size 64"
    small_vit = "--model vit --patch-size 16 --dim 16 --depth 1 --heads 2 --mlp-dim 16"
    ran, saved, save, compiled = {}, [], checkpoints.save, []
    monkeypatch.setattr(checkpoints, "save", lambda content, path: (saved.append(path), save(content, path)))
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: (compiled.append(model), model)[1])

    def observe(line):
        if line not in ran:
            saved.clear()
            compiled.clear()
            for made in ("runs", "data", "elsewhere"):
                shutil.rmtree(made, ignore_errors=True)
            words = line.split()
            if "--model cnn" in line or "--model vit" in line:
                words = [w for i, w in enumerate(words) if w != "--hidden" and words[i - 1] != "--hidden"]
            status = call(*words)
            (out,) = Path("runs").glob("*") if Path("runs").exists() else ("",)
            seen = dict(
                status=status, log=len(capsys.readouterr().out.splitlines()), folder=sorted(map(str, Path().rglob("*")))
            )
            if out and (out / "last.pt").exists():
                last, best = (checkpoints.load(out / name) for name in ("last.pt", "best.pt"))
                seen |= dict(weights=dict(last["state_dict"]), best=best["epoch"], val_loss=last["metrics"]["val_loss"])
            seen |= dict(saves=len(saved), compiled=len(compiled))
            ran[line] = seen
        return ran[line]

    observe(base)
    (best,) = Path("runs").glob("*/best.pt")
    shutil.copy(best, "teacher.pt")
    for dest, (both, second, what) in EFFECTS.items():
        both = f"{base} {both}".replace("{vit}", small_vit)
        a, b = observe(both).get(what), observe(f"{both} {second}").get(what)
        assert a is not None and not same(a, b), dest
