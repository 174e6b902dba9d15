"""Tests: predict."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    HERE,
    TINY_MLP,
    VIT,
    call,
    give_head_weights,
    images_for,
    missing,
    python,
    rows,
    same,
    scripted,
    write_folder,
)
from PIL import Image

import cnn_cifar10
import data as datasets
import losses
import mlp_mnist
import plot
import predict
import vit
from utils import checkpoints, devices, evaluation, models, report, run_folder

DRAW = plot.draw  # which the fixture tiny replaces


def curve_rows(accuracies, lr=0.1):
    return [dict(r, train_acc=r["val_acc"], val_loss=1.0) for r in rows(accuracies, lr=lr)]


def fake_run(folder, accuracies, best_epoch=None, **args):
    folder.mkdir(parents=True)
    names = {k: 0 for k in checkpoints.COLUMNS}
    with run_folder.open_folder(folder, folder) as opened:
        opened.write_metrics([names | row for row in curve_rows(accuracies)])
    args = dict(model="mlp", data="a/long/path", opt="adamw", lr=0.1, out=str(folder), seed=0, flip=False) | args
    result = dict(data="pets", seed=args["seed"], best_epoch=best_epoch or len(accuracies), args=args)
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_runs_are_named_by_what_differs(tmp_path):
    def named(*arguments):
        folders = [fake_run(tmp_path / f"{len(list(tmp_path.iterdir()))}", [0.5, 0.6], **a) for a in arguments]
        return [name.removeprefix(f"{tmp_path}/") for name in plot.collect(folders)[0]]

    assert named(dict(opt="sgd"), dict(opt="adamw")) == ["sgd", "adamw"]
    assert named(dict(opt="sgd", lr=1.0), dict(opt="sgd", lr=0.1), dict(seed=1)) == ["sgd, lr 1", "sgd, lr 0.1",
                                                                                      "adamw, lr 0.1"]  # fmt: skip
    assert named(dict(flip=True), dict(seed=3)) == ["flip", "no flip"]
    assert named(dict(hidden=[8]), dict(hidden=[8, 8])) == ["hidden [8]", "hidden [8, 8]"]
    assert named(dict(opt="sgd"), dict(seed=1), dict(seed=2)) == [
        "sgd",
        "adamw (mean \N{PLUS-MINUS SIGN} sd of 2 seeds)",
    ]
    assert named(dict(data="1/images", seed=1), dict(data="2/images", seed=2)) == [
        f"folder {Path(name).resolve()}" for name in ("1/images", "2/images")
    ]
    assert named(dict(data="images", seed=1), dict(data="./images/", seed=2))[0].endswith("sd of 2 seeds)")
    before = len(list(tmp_path.iterdir()))
    assert named({}, {}) == [f"{before}", f"{before + 1}"]  # the same run twice isn't two seeds
    for idle in (dict(no_test=True), dict(compile=True), dict(minutes=1.0, epochs=1.23)):  # they change no result
        other = {name: value + 0.1 if name == "epochs" else value for name, value in idle.items() if name == "minutes"}
        other |= {"epochs": 1.24} if "epochs" in idle else {}
        assert named(dict(seed=1, **idle), dict(seed=2, **other))[0].endswith("sd of 2 seeds)"), idle
    (tmp_path / "0" / "seed-notes.txt").touch()  # no seed of --runs
    (tmp_path / "0" / "result.json").unlink()  # as while it goes on
    assert next(iter(plot.collect([tmp_path / "0", tmp_path / "1"])[0])) == str(tmp_path / "0")


def test_seeds_become_mean_and_band_as_far_as_all_of_them_go():
    epochs, means, spreads = plot.mean_and_spread(curve_rows([0.2, 0.5, 0.9]) + curve_rows([0.4, 0.5]), "val_acc")
    assert epochs == [1, 2] and means == pytest.approx([0.3, 0.5]) and spreads == pytest.approx([0.02**0.5, 0])


def test_plot_command_line(tmp_path):
    for name, more in (("a", {}), ("b", dict(seed=1)), ("c", dict(opt="sgd"))):
        fake_run(tmp_path / name, [0.5, 0.7, 0.6], **more)
    done = python(HERE / "plot.py", "a", "b", "c", "--out", "three.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "three.png").size == (1500, 558)
    done = python(HERE / "plot.py", "a", "three.png", cwd=tmp_path)  # as in runs/opts/*
    assert done.returncode == 0 and done.stderr == "note: three.png is left out, it has no metrics.csv\n"
    for i in range(9):
        fake_run(tmp_path / f"r{i}", [0.5], lr=float(i + 1))
    missing = "nowhere doesn't exist: name the folders of runs"
    for wrong, word in ((["a", "nowhere"], missing), (["a", *(f"r{i}" for i in range(9))], "10 curves")):
        done = python(HERE / "plot.py", *wrong, cwd=tmp_path)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and word in done.stderr, done.stderr


@pytest.mark.parametrize("accuracies", [[0.5], [math.nan, math.nan], [0.5, math.nan, 0.7]])
def test_curves_of_short_runs_and_without_validation(accuracies, tmp_path):
    plot.draw({"a run": curve_rows(accuracies)}, tmp_path / "a.png", best={"a run": 1})
    assert Image.open(tmp_path / "a.png").size == (1500, 558)


def test_curves_are_drawn_on_the_way(tiny, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "draw", lambda runs, path, best: drawn.append((len(runs["run"]), best["run"])))
    monkeypatch.setattr(run_folder, "DRAW_EVERY", 0)
    scripted(monkeypatch, [0.1, 0.3, 0.2])
    assert call(*TINY_MLP, "--epochs", 3, "--out", "run") == 0
    assert drawn == [(1, 1), (2, 2), (3, 2), (3, 2)]


def test_a_run_without_matplotlib_and_tensorboard(tiny, monkeypatch, capsys):
    monkeypatch.setattr(plot, "draw", DRAW)
    missing(monkeypatch, "matplotlib", "tensorboard", "torch.utils.tensorboard")
    assert call(*TINY_MLP, "--tensorboard", "--out", "run") == 0
    said = capsys.readouterr().out
    assert "pip install matplotlib" in said and "pip install tensorboard" in said
    assert not Path("run/curves.png").exists() and Path("run/result.json").exists()


def test_tensorboard_gets_what_the_table_has(tiny, monkeypatch):
    written = {}

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert purge_step == 0
            self.flush = lambda: None

        def add_scalar(self, name, value, step):
            written[name, step] = value

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("fake", (), dict(SummaryWriter=SummaryWriter)))
    assert call(*TINY_MLP, "--epochs", 2, "--val-split", 0, "--tensorboard", "--out", "run") == 0
    history = checkpoints.load("run/last.pt", keys=checkpoints.RESUME_KEYS)["history"]
    names = {"lr", "train_loss", "train_acc", "seconds", "images_per_second"}  # nothing was validated
    assert written == {(name, row["step"]): row[name] for row in history for name in names}
    before = dict(written)
    written.clear()  # as if the run had been killed before it wrote them
    assert call("--resume", "run/last.pt", "--epochs", 3) == 0
    assert before.items() < written.items() and len(written) == len(before) * 3 / 2


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without their plots, which take a second."""
    for name in ("draw_confusion", "draw_mistakes", "draw_reliability"):
        monkeypatch.setattr(report, name, lambda *args: None)


@pytest.fixture
def trained(tiny):
    """Tiny checkpoints by name, of models with random heads, made without training."""

    def make(name, model, data, **more):
        content = dict(model=name.split("-")[0], model_args=model.model_args, classes=data.classes, epoch=1, metrics={})
        content |= dict(image_size=data.test[0].shape[-1], channels=data.test[0].shape[1], mean=data.mean, std=data.std)
        content["images"] = checkpoints.fingerprint(*data.train)
        content |= dict(
            state_dict=give_head_weights(model).state_dict(), args=dict(val_split=0.1, seed=0, data=data.name)
        )
        checkpoints.save(content | more, f"{name}.pt")

    torch.manual_seed(0)
    shapes = datasets.shapes()
    splits = []
    for images, y in (shapes.train, shapes.test):
        splits.append(datasets.Split(images.float().mean(1, keepdim=True).byte()[:, :, :28, :28], y))
    grey = datasets.Dataset("grey", [str(i) for i in range(10)], (0.13,), (0.31,), *splits)
    make("mlp", mlp_mnist.MLP(hidden=(32,), dropout=0.2, batch_norm=True), grey)
    make("cnn", cnn_cifar10.CNN(widths=(4, 8)), shapes)
    small = dict(image_size=32, patch_size=8, num_classes=10, dim=16, depth=2, heads=2, mlp_dim=16)
    make("vit-mean", vit.ViT(**small, pool="mean"), shapes)
    make("vit-cls", vit.ViT(**small, pool="cls"), shapes)
    return grey, shapes


def save_images(images, folder):
    folder.mkdir()
    for i, image in enumerate(images):
        image = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(image.numpy()).save(folder / f"{i:03}.png")


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_predictions_of_saved_images_are_those_of_the_tensors(name, trained, tiny, capsys):
    data = trained[name == "cnn"]
    save_images(data.test[0], tiny / "images")
    assert predict.main([f"{name}.pt", "images", "--json", "--top", "10"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    checkpoint = checkpoints.load(f"{name}.pt")
    device = torch.device("cpu")
    model = models.rebuild(checkpoint).eval()
    expected = predict.logits_of(model, data.test[0], checkpoint, device).softmax(1)
    assert [line["file"] for line in lines] == [f"images/{i:03}.png" for i in range(40)]
    assert [line["class"] for line in lines] == [data.classes[i] for i in expected.argmax(1)]
    assert [line["probability"] for line in lines] == pytest.approx(expected.amax(1).tolist(), abs=1e-6)
    assert all(sum(c["probability"] for c in line["top"]) == pytest.approx(1, abs=1e-4) for line in lines)
    right = sum(line["class"] == data.classes[y] for line, y in zip(lines, data.test[1], strict=True)) / 40
    assert right == evaluation.evaluate(model, data.test, data, device, devices.choose_precision("auto", device))[1]


def test_predict_as_text_crops_inverts_and_hints(trained, tiny, capsys):
    digit = trained[0].test[0][0, 0]
    Image.fromarray(digit.numpy()).save("dark.png")
    wide = torch.full((28, 40), 255, dtype=torch.uint8)
    wide[:, 6:34] = 255 - digit
    Image.fromarray(wide.numpy()).save("photo.png")
    light = Image.fromarray(torch.stack([wide] * 3, 2).numpy()).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 270 degrees
    light.save("turned.png", exif=exif)
    Image.new("L", (28, 28), 255).save("white.png")
    assert predict.main(["mlp.pt", "dark.png", "--top", "2"]) == 0
    expected = capsys.readouterr().out.removeprefix("dark.png: ")
    assert expected.count(" %") == 2 and expected.count(",") == 1
    assert predict.main(["mlp.pt", "photo.png", "turned.png", "--top", "2", "--invert"]) == 0
    said = capsys.readouterr()
    assert said.out == f"photo.png: {expected}turned.png: {expected}"
    assert "2 of 2 images aren't square" in said.err and "hint" not in said.err
    assert predict.main(["mlp.pt", "white.png", "dark.png"]) == 0
    assert "1 of 2 images look dark on light" in capsys.readouterr().err
    assert predict.main(["cnn.pt", "white.png"]) == 0  # of colour models light backgrounds are no surprise
    assert "hint" not in capsys.readouterr().err
    content = checkpoints.load("mlp.pt")
    checkpoints.save(content | {"mean": (0.0,), "args": content["args"] | {"mean": (0.0,)}}, "given.pt")
    assert predict.main(["given.pt", "white.png"]) == 0  # --mean 0 tells nothing of the images
    assert "hint" not in capsys.readouterr().err


def test_predict_names_what_is_no_image_and_reads_the_rest(trained, tiny, capsys):
    save_images(trained[1].test[0][:2], tiny / "images")
    Path("images/000a.png").write_bytes(b"no image")
    Path("images/notes.txt").write_text("not looked at")
    assert predict.main(["cnn.pt", "images"]) == 2
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert len(said.err.splitlines()) == 2 and "000a.png can't be read as an image" in said.err
    assert "note: files and links left out: 1 ('.txt')" in said.err


def test_what_pillow_warns_of_is_predicted_in_silence(trained, tiny, monkeypatch, recwarn):
    Image.new("RGB", (40, 40)).save("image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert predict.main(["cnn.pt", "image.png"]) == 0
    assert not list(recwarn)


def test_all_that_top_asks_for_is_printed(trained, tiny, capsys):
    content = checkpoints.load("cnn.pt")
    classes = [f"class {i} " + 200 * "x" for i in range(10)]
    checkpoints.save(content | {"classes": classes}, "long.pt")
    Image.new("RGB", (32, 32)).save("my  image\n.png")
    assert predict.main(["long.pt", "my  image\n.png", "--top", "10"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("my  image\\n.png: ") and len(said.splitlines()) == 1
    assert all(name in said for name in classes)


@pytest.mark.parametrize("argv", [["image.png"], ["--report", "shapes"], ["--eval"]])
def test_outputs_that_are_not_finite_are_no_result(argv, trained, tiny, capsys):
    Image.new("RGB", (32, 32), "red").save("image.png")
    content = checkpoints.load("cnn.pt")
    content["state_dict"]["head.weight"].fill_(1e38)
    checkpoints.save(content, "huge.pt")
    status = call("--eval", "huge.pt") if argv == ["--eval"] else predict.main(["huge.pt", *argv])
    assert status == 2
    said = capsys.readouterr()
    assert "not finite" in said.err and len(said.err.splitlines()) == 1 and said.out == ""


def test_no_temperature_is_fitted_on_other_images_than_the_run_held_out(trained, undrawn, tiny, capsys):
    """Of the same classes and size: some of them may be images that it was trained on."""
    content = checkpoints.load("cnn.pt")
    checkpoints.save(content | {"images": content["images"] + 1, "args": content["args"] | {"data": "x"}}, "other.pt")
    assert predict.main(["other.pt", "--report", "shapes"]) == 0
    said = capsys.readouterr()
    assert "temperature" not in said.out and "note: no temperature" in said.err


def test_an_export_replaces_neither_checkpoint_nor_pipe(trained, tiny, capsys):
    Path("cnn.pt").rename("cnn.pt2")
    before = Path("cnn.pt2").read_bytes()
    assert predict.main(["cnn.pt2", "--export", "cnn.pt2"]) == 2
    os.mkfifo("pipe.pt2")
    assert predict.main(["cnn.pt2", "--export", "pipe.pt2"]) == 2
    assert Path("cnn.pt2").read_bytes() == before and not Path("pipe.pt2").is_file()
    assert len(capsys.readouterr().err.splitlines()) == 2


PREDICT_WRONG = [
    "nowhere.pt image.png", "text.pt image.png", "cnn.pt", "cnn.pt nowhere.png", "cnn.pt empty", "cnn.pt text.pt",
    "cnn.pt image.png --top 0", "cnn.pt image.png --top 11", "cnn.pt image.png --device tpu",
    "cnn.pt image.png --out x", "cnn.pt image.png --data-dir x",
    "cnn.pt --report nowhere", "cnn.pt --report pets", "cnn.pt image.png --report shapes", "mlp.pt --report shapes",
    "cnn.pt --report shapes --top 0", "cnn.pt --report shapes --export x.pt2", "cnn.pt image.png --attention a.png",
    "vit-cls.pt --attention a.png", "vit-cls.pt image.png image.png --attention a.png", "cnn.pt --export model.txt",
    "vit-cls.pt image.png --attention a.nothing", "cnn.pt --export nowhere/model.pt2", "cnn.pt --export x.pt2 --invert",
    "vit-cls.pt image.png --attention nowhere/a.png",
]  # fmt: skip


def test_predict_refuses_in_one_line(trained, tiny, capsys):
    Image.new("RGB", (32, 32)).save("image.png")
    Path("text.pt").write_text("no checkpoint")
    Path("empty").mkdir()
    write_folder(tiny / "pets", (32, 32))
    before = {path for path in tiny.rglob("*") if "data" not in path.parts[-3:]}
    for wrong in PREDICT_WRONG:
        assert predict.main(wrong.split()) == 2, wrong
        said = capsys.readouterr()
        assert len(said.err.splitlines()) == 1 and "predict.py: error: " in said.err and said.out == "", (wrong, said)
        after = {path for path in tiny.rglob("*") if "data" not in path.parts[-3:]}
        assert after == before, f"{wrong} left something behind"


def test_confusion_and_shares_are_those_of_a_count_by_hand():
    labels, predicted = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 0, 1, 1, 0, 1])
    matrix = report.confusion(labels, predicted, 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    precision, recall = report.precision_and_recall(matrix)
    assert precision.tolist() == pytest.approx([2 / 3, 1 / 3, math.nan, math.nan], nan_ok=True)
    assert recall.tolist() == pytest.approx([2 / 3, 1 / 2, math.nan, 0], nan_ok=True)
    text = report.as_text(matrix, ["ant", "bee", "cow", "dog"]).splitlines()
    assert text[1].split() == ["ant", "0.6667", "0.6667", "3"] and text[3].split() == ["cow", "-", "-", "0"]
    assert text[-4].split() == ["ant", "2", "1", ".", "."]
    many = report.as_text(torch.eye(30, dtype=torch.int64) + (torch.arange(900) == 32).view(30, 30), ["x"] * 29 + ["y"])
    assert many.endswith("most frequent errors\n     1  x misclassified as x")  # and no errors that weren't made


def test_calibration_error_is_that_of_a_case_by_hand():
    def logits(*probabilities):
        p = torch.tensor(probabilities)
        return torch.stack((p, 1 - p), 1).log()

    # In (0.9, 1]: confidences 0.95, 0.95, one right. In (0.5, 0.6]: 0.55, right. In (0.7, 0.8]: 0.75 of class 1, right.
    values, labels = logits(0.95, 0.95, 0.55, 0.25), torch.tensor([0, 1, 0, 1])
    error, bins = report.calibration(values, labels, bins=10)
    assert error == pytest.approx((2 * 0.45 + 0.45 + 0.25) / 4, abs=1e-6)
    assert [n for n, _, _ in bins] == [0, 0, 0, 0, 0, 1, 0, 1, 0, 2]
    assert bins[9][1:] == pytest.approx((0.95, 0.5))
    assert report.calibration(torch.tensor([[100.0, 0.0]]), torch.tensor([0]))[0] == 0


def test_temperature_is_found():
    generator = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial(true.softmax(1), 1, generator=generator).flatten()
    assert report.fit_temperature(true, labels) == pytest.approx(1, abs=0.1)
    t = report.fit_temperature(true * 3, labels)
    assert t == pytest.approx(3 * report.fit_temperature(true, labels), rel=1e-6)
    losses = [F.cross_entropy(true * 3 / x, labels) for x in (0.97 * t, t, 1.03 * t)]
    assert losses[1] < losses[0] and losses[1] < losses[2]
    assert report.fit_temperature(torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == pytest.approx(0.01)  # all right


def test_report(trained, tiny, capsys):
    assert predict.main(["cnn.pt", "--report", "shapes"]) == 0
    said = capsys.readouterr()
    assert call("--eval", "cnn.pt") == 0
    assert said.out.splitlines()[0] == capsys.readouterr().out.strip()
    assert "temperature fitted on 14 validation images" in said.out and "report-shapes" in said.err
    sizes = {f.name: Image.open(f).size for f in Path("report-shapes").iterdir()}
    assert sizes == {"confusion.png": (1185, 1065), "mistakes.png": (1350, 1800), "reliability.png": (900, 900)}
    Path("report-shapes/reliability.png").unlink()  # as if it had broken off
    assert predict.main(["cnn.pt", "--report", "shapes"]) == 0 and Path("report-shapes/reliability.png").exists()


def test_report_says_that_it_takes_no_tta(trained, undrawn, tiny, capsys):
    content = checkpoints.load("cnn.pt")
    checkpoints.save(content | {"args": content["args"] | {"tta": True}}, "tta.pt")
    assert predict.main(["tta.pt", "--report", "shapes"]) == 0
    assert "without TTA" in capsys.readouterr().out.splitlines()[0]


def test_report_of_a_pupil_and_of_a_folder_by_another_name(trained, undrawn, tiny, monkeypatch, capsys):
    flags = "--model cnn --widths 4 --data shapes --epochs 1 --device cpu".split()
    assert call(*flags, "--teacher", "cnn.pt", "--out", "pupil") == 0
    capsys.readouterr()
    assert predict.main(["pupil/best.pt", "--report", "shapes", "--json"]) == 0
    assert "temperature" in json.loads(capsys.readouterr().out)
    write_folder(tiny / "pets", (8, 8), train_count=20)
    monkeypatch.chdir("pets")
    assert call("--model", "cnn", "--widths", 4, "--data", ".", "--img-size", 8, "--epochs", 1, "--out", "../run") == 0
    Image.new("RGB", (8, 8)).save("train/cat/0.png")
    capsys.readouterr()
    assert predict.main(["../run/best.pt", "--report", ".", "--json"]) == 0
    assert "temperature" not in json.loads(capsys.readouterr().out)  # these images may have been trained on


@pytest.mark.parametrize("out", ["mine", "report-shapes"])
def test_report_replaces_no_file_of_the_user(out, trained, tiny, capsys):
    Path(out).mkdir()
    Path(out, "mistakes.png").write_text("of the user")
    for _ in range(2):
        assert predict.main(["cnn.pt", "--report", "shapes", "--out", out]) == 2
        assert f"{out}/mistakes.png is no plot, and would be replaced" in capsys.readouterr().err
    assert Path(out, "mistakes.png").read_text() == "of the user" and len(list(Path(out).iterdir())) == 1


def test_report_is_not_written_among_its_images(undrawn, tiny, capsys):
    write_folder(tiny / "pets", (8, 8))
    assert call("--model", "cnn", "--widths", 4, "--data", "pets", "--img-size", 8, "--epochs", 1, "--out", "run") == 0
    for out in ("pets/test/cat", "pets/test/report"):
        assert predict.main(["run/best.pt", "--report", "pets", "--out", out]) == 2
        assert f"--out {out} is among the images" in capsys.readouterr().err
    assert predict.main(["run/best.pt", "--report", "pets", "--data-dir", "pets/test/cat"]) == 2
    assert "--data-dir pets/test/cat is among the images" in capsys.readouterr().err
    assert len(list(Path("pets/test").rglob("*"))) == 8


def test_report_of_a_perfect_model_has_no_mistakes_to_draw(tmp_path):
    images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    report.draw_mistakes(images, F.one_hot(labels).float(), labels, ["a", "b"], tmp_path / "none.png")
    assert Image.open(tmp_path / "none.png").width == 1350


def test_predict_without_matplotlib_and_onnx(trained, tiny, monkeypatch, capsys):
    missing(monkeypatch, "matplotlib", "onnx", "onnxscript")
    Image.new("RGB", (32, 32)).save("image.png")
    assert predict.main(["cnn.pt", "--report", "shapes", "--json", "--out", "there"]) == 0
    said = capsys.readouterr()
    assert "pip install matplotlib" in said.err and Path("there").is_dir()
    figures = json.loads(said.out)
    assert sum(map(sum, figures["confusion"])) == 40 and set(figures["precision"]) == set(trained[1].classes)
    assert figures["test_acc"] == sum(figures["confusion"][i][i] for i in range(10)) / 40
    for words in ("vit-cls.pt image.png --attention a.png", "cnn.pt --export a.onnx"):
        assert predict.main(words.split()) == 1
        said = capsys.readouterr().err
        assert "pip install" in said and len(said.splitlines()) == 1, said


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_attention_maps_and_rollout(pool):
    torch.manual_seed(0)
    model = give_head_weights(vit.ViT(**VIT | dict(depth=3), pool=pool)).eval()
    images = images_for(model, 2)
    before = model(images)
    maps = model.attention_maps(images)
    tokens = 64 + (pool == "cls")
    assert maps.shape == (3, 2, 2, tokens, tokens)
    assert torch.allclose(maps.sum(-1), torch.ones(3, 2, 2, tokens), atol=1e-5)
    assert torch.equal(model(images), before)
    # The first layer's, from the definition.
    x = model.blocks[0].norm_1(model.embed(images))
    q, k, _ = model.blocks[0].attention.to_qkv(x).reshape(2, tokens, 3, 2, 16).permute(2, 0, 3, 1, 4)
    assert torch.allclose(maps[0], (q @ k.transpose(2, 3) / 4).softmax(-1), atol=1e-6)

    flow = report.rollout(maps)
    assert flow.shape == (2, tokens, tokens)
    assert torch.allclose(flow.sum(-1), torch.ones(2, tokens), atol=1e-5)
    eye = torch.eye(tokens)
    first, second, third = ((layer.mean(1) + eye) / 2 for layer in maps)
    assert torch.allclose(flow, third @ second @ first, atol=1e-6)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_attention_picture(pool, trained, tiny, capsys):
    save_images(trained[1].test[0][:1], tiny / "images")
    assert predict.main([f"vit-{pool}.pt", "images/000.png", "--attention", "a.png"]) == 0
    assert Image.open("a.png").size == (1200, 427) and "wrote a.png" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cnn", "vit-cls"])
def test_exported_program_equals_the_model(name, trained, tiny, capsys):
    assert predict.main([f"{name}.pt", "--export", "model.pt2"]) == 0
    assert "differs from the model by" in capsys.readouterr().out
    model, program = models.rebuild(checkpoints.load(f"{name}.pt")).eval(), torch.export.load("model.pt2").module()
    for count in (1, 3, 8):
        images = images_for(model, count)
        assert torch.allclose(program(images), model(images), atol=1e-5)


def test_a_wrong_export_is_not_kept(trained, tiny, monkeypatch, capsys):
    class Other:
        def module(self):
            return lambda images: torch.zeros(len(images), 10)

    monkeypatch.setattr(torch.export, "export", lambda *args, **more: None)
    monkeypatch.setattr(torch.export, "save", lambda program, file: file.write(b"a program"))
    monkeypatch.setattr(torch.export, "load", lambda path: Other())
    assert predict.main(["cnn.pt", "--export", "model.pt2"]) == 1
    assert "differs from the model" in capsys.readouterr().err and not Path("model.pt2").exists()


def test_an_export_that_gives_nan_differs():
    assert math.isnan(predict.compare(torch.nn.Flatten(), lambda images: images.flatten(1) * math.nan, (1, 2, 2)))


def test_a_spike_makes_the_loss_axis_logarithmic(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    scales = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (scales.append(self.axes[0].get_yscale()), save(self, *a, **k))
    )
    calm = curve_rows([0.1, 0.2, 0.3, 0.4])
    plot.draw({"calm": calm}, tmp_path / "a.png")
    plot.draw({"spike": [*calm[:2], calm[2] | dict(train_loss=5137.0), calm[3]]}, tmp_path / "b.png")
    assert scales == ["linear", "log"]


def test_equal_curves_do_not_hide_each_other():
    a, b = ([1, 2], [0.5, 0.6]), ([1, 2], [0.5, 0.7])
    assert plot.line_widths([a, b]) == [1.6, 1.6]
    widths = plot.line_widths([a, b, a, a])
    assert widths[0] > widths[2] > widths[3] == widths[1]  # drawn in this order, the last on top


def test_a_failed_export_leaves_the_file_that_was_there(trained, tiny, monkeypatch, capsys):
    Path("model.pt2").write_bytes(b"yesterday's")

    def fails(*args, **options):
        raise RuntimeError("no space left")

    monkeypatch.setattr(torch.export, "save", fails)
    assert predict.main(["cnn.pt", "--export", "model.pt2"]) == 2
    assert "no space left" in capsys.readouterr().err
    assert Path("model.pt2").read_bytes() == b"yesterday's" and not list(Path().glob("*.tmp*"))


def test_the_image_is_not_overwritten_by_its_plot(trained, tiny, capsys):
    Image.new("RGB", (32, 32)).save("image.png")
    before = Path("image.png").read_bytes()
    assert predict.main(["vit-cls.pt", "image.png", "--attention", "image.png"]) == 2
    assert "is image.png itself" in capsys.readouterr().err and Path("image.png").read_bytes() == before


def test_hidden_folders_are_left_out(trained, tiny, capsys):
    for folder in ("photos", "photos/.thumbnails", "photos/more"):
        Path(folder).mkdir()
        Image.new("RGB", (32, 32)).save(f"{folder}/a.png")
    assert predict.main(["cnn.pt", "photos"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "photos/a.png",
        "photos/more/a.png",
    ]


def test_report_without_images_to_fit_a_temperature_on(trained, undrawn, tiny, capsys):
    content = checkpoints.load("cnn.pt")
    checkpoints.save(content | {"images": checkpoints.fingerprint(*datasets.shapes().train) + 1}, "changed.pt")
    checkpoints.save(content | {"args": content["args"] | {"val_split": 5000.0}}, "large.pt")
    for name in ("changed.pt", "large.pt"):
        assert predict.main([name, "--report", "shapes", "--json"]) == 0
        assert "temperature" not in json.loads(capsys.readouterr().out)


def test_names_of_classes_that_would_be_formulas_or_no_text(tmp_path, recwarn):
    matrix = torch.tensor([[3, 1], [0, 2]])
    report.draw_confusion(matrix, ["$5_$10", "\u732b"], tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").exists() and not [w for w in recwarn if "Glyph" in str(w.message)]


def test_seeds_without_validation_are_drawn(tmp_path):
    for seed in (0, 1, 2):
        fake_run(tmp_path / f"seed-{seed}", [math.nan, math.nan], seed=seed)
    runs, best = plot.collect([tmp_path / f"seed-{seed}" for seed in (0, 1, 2)])
    DRAW(runs, tmp_path / "a.png", best)
    assert (tmp_path / "a.png").exists()


def test_large_images_are_evaluated_in_smaller_batches():
    assert evaluation.batch_size((3, 32, 32)) == evaluation.batch_size((1, 28, 28)) == 500
    assert evaluation.batch_size((3, 64, 64)) == 125 and evaluation.batch_size((3, 2000, 2000)) == 1


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_an_evaluation_is_the_mean_over_all_images_and_changes_nothing(loss):
    torch.manual_seed(0)
    options = {"image_size": 8, "channels": 1, "hidden": (8,), "dropout": 0.5, "batch_norm": True}
    model = give_head_weights(mlp_mnist.MLP(**options)).train()
    images = torch.randint(0, 256, (40_000, 1, 8, 8), dtype=torch.uint8)
    count = evaluation.batch_size((1, 8, 8)) + 203  # a whole batch, and a smaller one
    split = datasets.Split(images[:count], torch.arange(count) % 10)
    data = datasets.Dataset("x", list("0123456789"), (0.4,), (0.2,), split, split)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = evaluation.evaluate(model, split, data, torch.device("cpu"), "fp32", loss=loss)
    assert same(before, dict(model.state_dict()))
    with torch.no_grad():
        logits = model.eval()((split.images / 255 - 0.4) / 0.2)
    right = (logits.argmax(1) == split.labels).double().mean().item()
    assert found == pytest.approx((losses.parse(loss)(logits, split.labels).item(), right), rel=1e-5)
