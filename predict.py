"""Use a trained model: name what is in images, report on a dataset, look at attention, export.

    python predict.py runs/mlp-mnist-adamw-cosine/best.pt photo.jpg folder --top 3
    python predict.py runs/mlp-mnist-adamw-cosine/best.pt folder --json > predictions.jsonl
    python predict.py runs/cnn-cifar10-sgd-onecycle/best.pt --report cifar10
    python predict.py runs/vit-cifar10-adamw-cosine/best.pt photo.jpg --attention attention.png
    python predict.py runs/vit-cifar10-adamw-cosine/best.pt --export vit.pt2

An image is turned upright, scaled so that its short side fits, cropped to its centre square and normalised as in
training; a model of grey images sees it in grey. Names and probabilities go to standard output, all else to standard
error. Exit status 2 if a file is no image; the others are read all the same.
"""

import argparse
import functools
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import data as datasets
import train
import vit
from utils import arguments, checkpoints, devices, report
from utils.ranges import flag_name

LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # of red, green and blue in grey (ITU-R BT.601)


def make_parser():
    parser = argparse.ArgumentParser(
        prog="predict.py", description=__doc__.splitlines()[0], allow_abbrev=False, usage=argparse.SUPPRESS
    )
    flag = parser.add_argument
    flag("checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    flag("images", nargs="*", metavar="IMAGE", help="image files, and folders of them, of which the centre is seen")
    flag("--top", type=int, metavar="K", help="name the K most probable classes (3)")
    flag("--json", action="store_true", help="print JSON, a line per image, or the report as one line")
    flag("--invert", action="store_true", help="swap light and dark, as for pen on paper with a model of MNIST")
    flag("--report", metavar="DATA", help="test on a dataset: classes, confusions, mistakes, calibration")
    flag("--attention", metavar="FILE", help="draw what a ViT looks at in one image")
    flag("--export", metavar="FILE", help="write a program that needs none of these files: FILE.pt2, or FILE.onnx")
    flag("--out", metavar="DIR", help="where --report puts its pictures (report-<data> beside the checkpoint)")
    flag("--data-dir", metavar="DIR", help="where --report finds datasets (data)")
    flag("--device", default="auto", help="cuda, mps or cpu; auto takes the first that is there")
    return parser


def check(args):
    """Refuse what can't be done, and flags that would do nothing."""
    modes = [name for name in ("report", "attention", "export") if getattr(args, name)]
    if len(modes) > 1:
        raise ValueError(f"--{modes[0]} and --{modes[1]} are two things: run them one after the other")
    mode = modes[0] if modes else "images"
    readers = dict(top={"images"}, json={"images", "report"}, invert={"images", "attention"})
    readers |= dict(out={"report"}, data_dir={"report"})
    for name, modes in readers.items():
        value = getattr(args, name)
        if value is not None and value is not False and mode not in modes:
            what = f"with --{mode}" if mode != "images" else "without --report"
            raise ValueError(f"{flag_name(name)} has no effect {what}: leave it out")
    if mode in ("report", "export") and args.images:
        raise ValueError(f"--{mode} takes no images: leave {args.images[0]} out")
    if mode == "attention" and len(args.images) != 1:
        raise ValueError(f"--attention {args.attention} needs one image, {len(args.images)} are given")
    if mode == "images" and not args.images:
        raise ValueError("nothing to do: name image files or folders, --report DATA or --export FILE")
    return mode


def say(line):
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- images


def find(paths):
    """The image files that are named, or lie in named folders at any depth."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in datasets.IMAGE_SUFFIXES and p.is_file()]
            if not inside:
                raise ValueError(f"{path} holds no images: expected *.jpg, *.png, ... at any depth")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise ValueError(f"{path} doesn't exist: expected an image file or a folder")
    return files


def read(path, checkpoint, invert):
    """An image file as uint8 (channels, size, size), and whether it was cropped. Raises ValueError if it isn't one."""
    try:
        image = datasets.decode(path, checkpoint["image_size"])
        with Image.open(path) as original:
            cropped = original.width != original.height
    except Exception as error:
        raise ValueError(f"{path} can't be read as an image ({error})") from None
    if checkpoint["channels"] == 1:
        image = (image * LUMA).sum(0, keepdim=True).round().to(torch.uint8)
    return 255 - image if invert else image, cropped


def looks_dark_on_light(image, checkpoint):
    """Is the border of a grey image light, while the model has learnt light figures on dark?"""
    border = torch.cat((image[0, 0], image[0, -1], image[0, :, 0], image[0, :, -1]))
    return checkpoint["channels"] == 1 and checkpoint["mean"][0] < 1 / 3 and border.median() > 127


def logits_of(model, images, checkpoint, device):
    """float32 (n, classes) on the CPU for uint8 images, in the precision of the run, if this device has it."""
    precision = devices.choose_precision(checkpoint["args"].get("amp", "auto"), device)
    part = images, torch.zeros(len(images), dtype=torch.int64)
    logits = []
    with torch.inference_mode(), devices.autocast(device, precision):
        for x, _ in datasets.batches(part, train.EVAL_BATCH, checkpoint["mean"], checkpoint["std"], device):
            logits.append(model(x).float().cpu())
    return torch.cat(logits)


def predict(args, checkpoint, model, device):
    """Print the most probable classes of each image, as text or JSON. Returns the exit status."""
    files, classes, unreadable, cropped, dark = find(args.images), checkpoint["classes"], 0, 0, 0
    top = min(3, len(classes)) if args.top is None else args.top
    if not 1 <= top <= len(classes):
        raise ValueError(f"--top {top} must be at least 1 and at most {len(classes)}, the number of classes")

    def attempt(path):
        try:
            return path, *read(path, checkpoint, args.invert)
        except ValueError as error:
            return error, None, None

    size = train.EVAL_BATCH  # the batches of --eval, so that bf16 rounds the same
    chunks = [files[start : start + size] for start in range(0, len(files), size)]
    if not sys.stdout.isatty():  # there the lines themselves show how far it is
        chunks = datasets.progress(chunks, desc="predicting", unit=f" x {size} images")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for chunk in chunks:
            done = list(pool.map(attempt, chunk))
            for error in [path for path, image, _ in done if image is None]:
                unreadable = train.fail(2, error, "predict.py")
            done = [entry for entry in done if entry[1] is not None]
            if not done:
                continue
            images = torch.stack([image for _, image, _ in done])
            cropped += sum(was_cropped for *_, was_cropped in done)
            dark += sum(bool(looks_dark_on_light(image, checkpoint)) for image in images)
            probabilities = logits_of(model, images, checkpoint, device).softmax(1)
            values, indices = probabilities.sort(descending=True, stable=True)  # of equals the first, as argmax
            for (path, *_), p, labels in zip(done, values.tolist(), indices.tolist(), strict=True):
                best = [(classes[label], p[i]) for i, label in enumerate(labels[:top])]
                if args.json:
                    named = [{"class": name, "probability": round(p, 6)} for name, p in best]
                    print(json.dumps(dict(file=str(path)) | named[0] | dict(top=named)))
                else:
                    print(f"{path}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in best))
    if cropped:
        say(f"note: {cropped:,} of {len(files):,} images aren't square, only their centre was seen")
    if dark and not args.invert:
        say(f"hint: {dark:,} of {len(files):,} images look dark on light, the model knows light on dark: try --invert")
    return unreadable


# ---------------------------------------------------------------------------------------------- report


def print_report(args, checkpoint, model, device):
    """--report: figures of the test images as text or JSON, and three pictures.

    The temperature is fitted on the part of the training images that --val-split of the run held out.
    """
    data = train.load_for(checkpoint, args.report, args.data_dir or "data")
    (images, labels), classes, run = data.test, data.classes, checkpoint["args"]
    logits = logits_of(model, images, checkpoint, device)
    matrix = report.confusion(labels, logits.argmax(1), len(classes))
    figures = dict(data=data.name, images=len(labels), test_acc=matrix.diag().sum().item() / len(labels))
    figures["test_loss"] = F.cross_entropy(logits, labels).item()
    shares = [[None if x != x else x for x in part.tolist()] for part in report.precision_and_recall(matrix)]
    figures |= dict(precision=dict(zip(classes, shares[0], strict=True)))
    figures |= dict(recall=dict(zip(classes, shares[1], strict=True)), confusion=matrix.tolist())
    calibrations = {"as trained": report.calibration(logits, labels)}
    figures["calibration_error"] = calibrations["as trained"][0]
    text = f"expected calibration error {figures['calibration_error']:.4f}"
    if run["val_split"]:
        val_images, val_labels = datasets.split(data.train, run["val_split"], run["seed"])[1]
        temperature = report.fit_temperature(logits_of(model, val_images, checkpoint, device), val_labels)
        calibrations[f"temperature {temperature:.2f}"] = report.calibration(logits / temperature, labels)
        figures |= dict(temperature=temperature)
        figures["calibration_error_with_temperature"] = calibrations[f"temperature {temperature:.2f}"][0]
        text += f"; {figures['calibration_error_with_temperature']:.4f} with the logits divided by {temperature:.3f}, "
        text += f"a temperature fitted on {len(val_labels):,} validation images"
    if args.json:
        print(json.dumps(figures))
    else:
        acc, loss = figures["test_acc"], figures["test_loss"]
        print(f"test acc {acc:.4f}  loss {loss:.4f}  ({data.name}, {len(labels):,} images)\n")
        print(f"{report.as_text(matrix, classes)}\n\n{text}", flush=True)
    out = Path(args.out or Path(args.checkpoint).parent / f"report-{data.name}")
    out.mkdir(parents=True, exist_ok=True)
    try:
        report.draw_confusion(matrix, classes, out / "confusion.png")
        report.draw_mistakes(images, logits, labels, classes, out / "mistakes.png")
        report.draw_reliability(calibrations, out / "reliability.png")
        say(f"wrote confusion.png, mistakes.png and reliability.png to {out}")
    except ImportError:
        say("no pictures: pip install matplotlib")
    return 0


# ---------------------------------------------------------------------------------------------- attention, export


def draw_attention(args, checkpoint, model, device):
    """--attention: the image, the roll-out over all layers, and the heads of the last layer, over the image."""
    if not isinstance(model, vit.ViT):
        raise ValueError(f"--attention needs a vit, {args.checkpoint} holds a {checkpoint['model']}")
    image = read(args.images[0], checkpoint, args.invert)[0]
    logits = logits_of(model, image[None], checkpoint, device)[0]
    x, _ = next(datasets.batches((image[None], torch.zeros(1)), 1, checkpoint["mean"], checkpoint["std"], device))
    maps = model.attention_maps(x).cpu()
    layers = {"roll-out": vit.rollout(maps)[0]} | {f"head {i + 1}": head for i, head in enumerate(maps[-1, 0])}
    token = model.cls_token is not None
    # The output is the class token's or the mean of all tokens: so is what it looks at.
    looks = {name: (m[0, 1:] if token else m.mean(0)) for name, m in layers.items()}

    columns = min(5, 1 + len(looks))
    rows = -(-(1 + len(looks)) // columns)
    figure = report.new_figure(2 * columns, 2.25 * rows + 0.6)
    probability, label = logits.softmax(0).max(0)
    figure.suptitle(f"{checkpoint['classes'][label]}, {100 * probability:.1f} %", fontsize=12)
    figure.supxlabel(
        "brighter: more attention, each picture on its own scale; heads are those of the last layer", size=9
    )
    (height, width), (p, q) = model.image_size, model.patch_size
    for axis in (axes := figure.subplots(rows, columns, squeeze=False)).flat:
        axis.axis("off")
    for axis, (name, look) in zip(axes.flat, [("image", None), *looks.items()], strict=False):
        axis.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
        if look is not None:
            grid = look.view(height // p, width // q).numpy()
            axis.imshow(grid, cmap="viridis", alpha=0.65, interpolation="bilinear", extent=(0, width, height, 0))
        axis.set_title(name, fontsize=10)
    figure.savefig(args.attention, dpi=150)
    say(f"wrote {args.attention}")
    return 0


def export(args, checkpoint, model, device):
    """--export: the model as a program for any batch size, compared with the model before it says done."""
    path, shape = Path(args.export), (checkpoint["channels"], checkpoint["image_size"], checkpoint["image_size"])
    if not path.parent.is_dir():
        raise ValueError(f"--export {path}: the folder {path.parent} doesn't exist")
    model, example = model.cpu(), torch.randn(2, *shape)
    sizes = {"images": {0: torch.export.Dim("batch")}}
    if path.suffix == ".pt2":
        torch.export.save(torch.export.export(model, (example,), dynamic_shapes=sizes), path)
        program = torch.export.load(path).module()
    elif path.suffix == ".onnx":
        import onnx.reference
        import onnxscript  # noqa: F401  torch.onnx.export needs it

        names = dict(input_names=["images"], output_names=["logits"])
        torch.onnx.export(model, (example,), path, dynamic_shapes=sizes, external_data=False, verbose=False, **names)
        session = onnx.reference.ReferenceEvaluator(str(path))

        def program(images):
            return torch.tensor(session.run(None, {"images": images.numpy()})[0])
    else:
        raise ValueError(f"--export {path} must end in .pt2 (torch.export) or .onnx")
    worst = 0.0
    with torch.inference_mode():
        for count in (1, 5):
            images = torch.randn(count, *shape)
            expected = model(images)
            worst = max(worst, ((program(images) - expected).abs().max() / expected.abs().max().clamp(min=1)).item())
    if not worst < 1e-4:
        path.unlink()
        return train.fail(1, f"the exported program differs from the model by {worst:.2g}: not kept", "predict.py")
    print(f"wrote {path}: images, float32 (batch, {', '.join(map(str, shape))}), each pixel / 255 less")
    print(f"mean {tuple(checkpoint['mean'])} over std {tuple(checkpoint['std'])},")
    print(f"-> logits (batch, {len(checkpoint['classes'])}); it differs from the model by {worst:.1g} on random images")
    return 0


# ---------------------------------------------------------------------------------------------- main


def main(argv=None):
    args, fail = make_parser().parse_intermixed_args(argv), functools.partial(train.fail, program="predict.py")
    try:
        mode = check(args)
        device = devices.choose_device(args.device)
        checkpoint = checkpoints.load(args.checkpoint)
        model = arguments.rebuild(checkpoint).to(device).eval()
        act = dict(images=predict, report=print_report, attention=draw_attention, export=export)[mode]
        return act(args, checkpoint, model, device)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        return fail(2, error)
    except ImportError as error:
        return fail(1, f"--{mode} needs {error.name}: pip install {error.name}")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
