"""Use a trained model: classify images, report on a dataset, plot attention, export.

    python predict.py runs/mlp-mnist-adamw-cosine/best.pt photo.jpg folder --top 3
    python predict.py runs/mlp-mnist-adamw-cosine/best.pt folder --json > predictions.jsonl
    python predict.py runs/cnn-cifar10-muon-onecycle/best.pt --report cifar10
    python predict.py runs/vit-cifar10-adamw-cosine/best.pt photo.jpg --attention attention.png
    python predict.py runs/vit-cifar10-adamw-cosine/best.pt --export vit.pt2

An image is turned upright, scaled so that its short side fits, cropped to its centre square and normalised as in
training; a model of grey images sees it in grey. Names and probabilities go to standard output, all else to standard
error. Exit status 2 if a file is no image; the others are read all the same.
"""

import contextlib
import io
import json
import math
import os
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, __file__.removesuffix("predict.py"))  # python -P leaves this folder out
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports below without a traceback

import torch
import torch.nn.functional as F

import augment
import data
import vit
from utils import arguments, checkpoints, devices, errors, evaluation, models, report

LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # of red, green and blue in grey (ITU-R BT.601)
MOST_TOKENS = 2048  # in a map of attention: it has a number for each pair of them, in each head of each layer
MOST_HEADS = 64  # each has a panel
# The modes in which a flag has an effect.
READ_BY = {
    "top": {"images"},
    "json": {"images", "report"},
    "invert": {"images", "attention"},
    "out": {"report"},
    "data_dir": {"report"},
}


def make_parser():
    text = "Use a trained model: classify images, report on a dataset, plot attention, export."
    parser = arguments.Parser("predict.py", description=text)
    flag = parser.add_argument
    flag("checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    flag("images", nargs="*", metavar="IMAGE", help="image files, and folders of them; their centre is seen")
    flag("--top", type=int, metavar="K", help="name the K most probable classes (3)")
    flag("--json", action="store_true", help="print JSON, a line per image, or the report as one line")
    flag("--invert", action="store_true", help="swap light and dark, as for pen on paper with a model of MNIST")
    flag("--report", metavar="DATA", help="test on a dataset: classes, confusions, mistakes, calibration")
    flag("--attention", metavar="FILE", help="plot what a ViT attends to in one image")
    flag("--export", metavar="FILE", help="write a program that needs none of these files: FILE.pt2, or FILE.onnx")
    flag("--out", metavar="DIR", help="where --report puts its plots (report-<data> beside the checkpoint)")
    flag("--data-dir", metavar="DIR", help="where --report finds datasets (data)")
    flag("--device", default="auto", help="cuda, mps or cpu; auto takes the first that is available")
    return parser


def check(args):
    """Reject what can't be done, and flags that would do nothing. Returns what is to be done."""
    modes = [name for name in ("report", "attention", "export") if getattr(args, name)]
    if len(modes) > 1:
        raise ValueError(f"--{modes[0]} and --{modes[1]} are two things: run them one after the other")
    mode = modes[0] if modes else "images"
    for name, readers in READ_BY.items():
        value = getattr(args, name)
        if value is not None and value is not False and mode not in readers:  # --top 0 was given, too
            what = f"with --{mode}" if modes else "without --report"
            raise ValueError(f"{arguments.flag_name(name)} has no effect {what}: leave it out")
    if args.report and args.report not in data.NAMES and not Path(args.report).is_dir():
        raise ValueError(f"--report {args.report} is no folder and no known set: choose {', '.join(data.NAMES)}")
    if mode in ("report", "export") and args.images:
        raise ValueError(f"--{mode} takes no images: leave {args.images[0]} out")
    if mode == "attention" and len(args.images) != 1:
        raise ValueError(f"--attention {args.attention} needs one image, {len(args.images)} are given")
    if mode == "attention" and not args.attention.lower().endswith(".png"):
        raise ValueError(f"--attention {args.attention} must end in .png")
    if mode == "export" and Path(args.export).suffix not in (".pt2", ".onnx"):
        raise ValueError(f"--export {args.export} must end in .pt2 (torch.export) or .onnx")
    if mode == "images" and not args.images:
        raise ValueError("nothing to do: name image files or folders, --report DATA or --export FILE")
    target = args.attention or args.export
    if target and not Path(target).parent.is_dir():
        raise ValueError(f"--{mode} {target} must be in a folder that exists")
    if target and os.path.exists(target):
        if not os.path.isfile(target):
            raise ValueError(f"--{mode} {target} is no file: name another one")
        for path in (args.checkpoint, *args.images):
            if os.path.exists(path) and os.path.samefile(target, path):
                raise ValueError(f"--{mode} {target} is {path} itself: name another file")
    return mode


def log(line):
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, full, or None
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


# ---------------------------------------------------------------------------------------------- images


def find(paths):
    """The image files that are named, or lie in named folders at any depth, except hidden ones."""
    files, others = [], []
    for path in map(Path, paths):
        if path.is_dir():
            found = [Path(inside) for inside in data.images_below(path, others)]
            if not found:
                raise ValueError(f"there are no images in {path}: expected *.jpg, *.png, ... at any depth")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path} doesn't exist, or is neither a file nor a folder")
    if others:
        log(f"note: {data.left_out(others)}")
    return files


def read(path, checkpoint, invert):
    """An image file as uint8 (channels, size, size), and whether it was cropped. Raises ValueError if it isn't one."""
    try:
        image = data.decode(path, checkpoint["image_size"])
        with data.open_image(path) as original:
            cropped = original.width != original.height
    except Exception as error:
        raise ValueError(f"{path} can't be read as an image ({error})") from None
    if checkpoint["channels"] == 1:
        image = (image * LUMA).sum(0, keepdim=True).round().to(torch.uint8)
    return 255 - image if invert else image, cropped


def is_dark_on_light(image, checkpoint):
    """Is the border of a grey image light, while the model has learned light digits on dark?"""
    border = torch.cat((image[0, 0], image[0, -1], image[0, :, 0], image[0, :, -1]))
    measured = checkpoint["channels"] == 1 and not checkpoint["args"].get("mean")
    return measured and checkpoint["mean"][0] < 1 / 3 and border.median().item() > 127


def logits_of(model, images, checkpoint, device):
    """float32 (n, classes) on the CPU for uint8 images, in the precision of the run, if this device has it."""
    precision = devices.choose_precision(checkpoint["args"].get("amp", "auto"), device)
    size = evaluation.batch_size(images.shape[1:])
    split = images, torch.zeros(len(images), dtype=torch.int64)  # labels aren't read
    batches = augment.batches(split, size, checkpoint["mean"], checkpoint["std"], device)
    with torch.inference_mode(), devices.autocast(device, precision):
        logits = torch.cat([model(x).float().cpu() for x, _ in batches])
    if not logits.isfinite().all():
        raise ValueError("the model's outputs are not finite numbers: nothing can be said by it")
    return logits


def predict(args, checkpoint, model, device):
    """Print the most probable classes of each image, as text or JSON. Returns the exit status."""
    files, classes = find(args.images), checkpoint["classes"]
    status = cropped = dark = 0
    top = min(3, len(classes)) if args.top is None else args.top
    if not 1 <= top <= len(classes):
        raise ValueError(f"--top {top} must be >= 1 and <= {len(classes)}, the number of classes")

    shape = checkpoint["channels"], checkpoint["image_size"], checkpoint["image_size"]
    size = evaluation.batch_size(shape)  # the batches of --eval, so that bf16 rounds the same
    chunks = [files[start : start + size] for start in range(0, len(files), size)]
    if sys.stdout is None or not sys.stdout.isatty():  # there the lines themselves show how far it is
        chunks = data.progress_bar(chunks, desc="predicting", unit=f" x {size} images")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for chunk in chunks:
            paths, images = [], []
            for path, reading in [(path, pool.submit(read, path, checkpoint, args.invert)) for path in chunk]:
                try:
                    image, was_cropped = reading.result()
                except ValueError as error:
                    errors.complain("predict.py", error)
                    status = 2
                    continue
                paths.append(path)
                images.append(image)
                cropped += was_cropped
                dark += is_dark_on_light(image, checkpoint)
            if images:
                logits = logits_of(model, torch.stack(images), checkpoint, device)
                print_predictions(paths, logits.softmax(1), classes, top, args.json)
    if cropped:
        log(f"note: {cropped:,} of {len(files):,} images aren't square, only their centre was seen")
    if dark and not args.invert:
        log(f"hint: {dark:,} of {len(files):,} images look dark on light, the model knows light on dark: try --invert")
    return status


def print_predictions(paths, probabilities, classes, top, as_json):
    values, indices = probabilities.sort(descending=True, stable=True)  # of equals the first, as argmax
    for path, p, labels in zip(paths, values.tolist(), indices.tolist(), strict=True):
        best = [(classes[label], p[i]) for i, label in enumerate(labels[:top])]
        if as_json:
            named = [{"class": name, "probability": round(probability, 6)} for name, probability in best]
            errors.show(json.dumps({"file": str(path), **named[0], "top": named}))
        else:
            named = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in best)
            errors.show(f"{path}: {named}".replace("\n", "\\n"))


# ---------------------------------------------------------------------------------------------- report


def held_out(checkpoint, dataset):
    """The images of the run's dataset that it held out; None if that can't be told."""
    run = checkpoint["args"]
    if not run.get("val_split") or checkpoint.get("images") != checkpoints.fingerprint(*dataset.train):
        return None  # of other images a split may hold out some that were trained on
    with contextlib.suppress(ValueError):  # too few
        return data.split(dataset.train, run["val_split"], run["seed"])[1]


def check_folder(out, images):
    """Reject a folder for the plots of a report that would harm other files, or the images that it reads."""
    if os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"--out {out} is no folder: name another one")
    arguments.reject_among_images("--out", out, images)
    for name in ("confusion.png", "mistakes.png", "reliability.png"):
        checkpoints.check_not_in_the_way(out / name)
        report.check_replaceable(out / name)


def print_report(args, checkpoint, model, device):
    """--report: results on the test images as text or JSON, and three plots."""
    data_dir = args.data_dir or "data"
    arguments.reject_among_images("--data-dir", data_dir, args.report)
    dataset = models.dataset_for(checkpoint, args.report, data_dir, args.checkpoint)
    out = Path(args.out or Path(args.checkpoint).parent / f"report-{dataset.name}")
    check_folder(out, args.report)
    if dataset.note:
        log(f"note: {errors.one_line(dataset.note)}")
    images, labels = dataset.test
    classes = dataset.classes
    logits = logits_of(model, images, checkpoint, device)
    matrix = report.confusion(labels, logits.argmax(1), len(classes))
    precision, recall = report.precision_and_recall(matrix)
    calibrations = {"as trained": report.calibration(logits, labels)}
    results = {
        "data": dataset.name,
        "images": len(labels),
        "test_acc": matrix.diag().sum().item() / len(labels),
        "test_loss": F.cross_entropy(logits, labels).item(),
        "precision": report.by_class(classes, precision),
        "recall": report.by_class(classes, recall),
        "confusion": matrix.tolist(),
        "calibration_error": calibrations["as trained"][0],
    }
    if not math.isfinite(results["test_loss"]):
        raise ValueError(f"{args.checkpoint} gives a loss of {results['test_loss']}: its outputs are too large")
    shown = [errors.one_line(name) for name in classes]
    text = f"expected calibration error {results['calibration_error']:.4f}"
    val = held_out(checkpoint, dataset)
    if val:
        temperature = report.fit_temperature(logits_of(model, val.images, checkpoint, device), val.labels)
        calmer = report.calibration(logits / temperature, labels)
        calibrations[f"temperature {temperature:.2f}"] = calmer
        results |= {"temperature": temperature, "calibration_error_with_temperature": calmer[0]}
        text += f"; {calmer[0]:.4f} with the logits divided by {temperature:.3f}, "
        text += f"a temperature fitted on {len(val.labels):,} validation images"
    elif checkpoint["args"].get("val_split"):
        log("note: no temperature, which needs the images that the run held out")
    if args.json:
        errors.show(json.dumps(results))
    else:
        notes = []
        if checkpoint["args"].get("tta"):
            notes.append("without TTA")
        if checkpoint["args"].get("loss", "ce") != "ce":
            notes.append("the loss is cross-entropy")
        test_line = evaluation.test_line(dataset, results["test_loss"], results["test_acc"], False, *notes)
        errors.show(f"{test_line}\n")
        errors.show(f"{report.as_text(matrix, shown)}\n\n{text}")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with errors.drawing():
            report.draw_confusion(matrix, shown, out / "confusion.png")
            report.draw_mistakes(images, logits, labels, shown, out / "mistakes.png")
            report.draw_reliability(calibrations, out / "reliability.png")
        log(f"wrote confusion.png, mistakes.png and reliability.png to {out}")
    except ImportError:
        log("no plots: pip install matplotlib")


# ---------------------------------------------------------------------------------------------- attention, export


def draw_attention(args, checkpoint, model, device):
    """--attention: the image, the roll-out over all layers, and the heads of the last layer, over the image."""
    if not isinstance(model, vit.ViT):
        raise ValueError(f"--attention needs a vit, {args.checkpoint} holds a {checkpoint['model']}")
    tokens = model.pos_embedding.shape[1]
    if tokens > MOST_TOKENS:
        raise ValueError(f"--attention {args.attention}: {tokens:,} tokens are too many, at most {MOST_TOKENS:,}")
    report.check_replaceable(args.attention)
    trained_on = checkpoint["args"].get("data")
    if isinstance(trained_on, str) and os.path.isdir(trained_on):
        arguments.reject_among_images("--attention", args.attention, trained_on)
    heads = model.blocks[0].attention.heads
    if heads > MOST_HEADS:
        raise ValueError(f"--attention {args.attention}: {heads:,} heads are too many to plot, at most {MOST_HEADS}")
    image, _ = read(args.images[0], checkpoint, args.invert)
    one = image[None], torch.zeros(1)  # labels aren't read
    x, _ = next(augment.batches(one, 1, checkpoint["mean"], checkpoint["std"], device))
    maps = model.attention_maps(x).cpu()
    shown = {"roll-out": report.rollout(maps)[0]}
    for i, head in enumerate(maps[-1, 0], start=1):
        shown[f"head {i}"] = head
    # The output is the class token's or the mean of all tokens: so is what it attends to.
    attended = {name: m[0, 1:] if model.cls_token is not None else m.mean(0) for name, m in shown.items()}
    probability, label = logits_of(model, image[None], checkpoint, device)[0].softmax(0).max(0)
    title = f"{errors.one_line(checkpoint['classes'][label])}, {100 * probability:.1f} %"
    with errors.drawing():
        report.draw_attention(image, attended, model.patch_size, title, args.attention)
    log(f"wrote {args.attention}")


def export(args, checkpoint, model, device):
    """--export: the model as a program for any batch size, compared with the model before it says done."""
    path, shape = Path(args.export), (checkpoint["channels"], checkpoint["image_size"], checkpoint["image_size"])
    model = model.cpu().requires_grad_(False)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")  # so that a failure leaves FILE as it was
    try:
        worst = compare(model, write_program(model, temporary, shape), shape)
        if not worst < 1e-4:
            raise errors.Failed(f"the exported program differs from the model by {worst:.2g}: not kept")
        os.replace(temporary, path)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"--export {path} can't be written or read again ({str(error)[:200]})") from None
    finally:
        temporary.unlink(missing_ok=True)
    sizes = ", ".join(map(str, shape))
    errors.show(f"wrote {path}; it differs from the model by {worst:.1g} on random images")
    errors.show(f"takes images, float32 (batch, {sizes}), (pixel / 255 - mean) / std")
    errors.show(f"of mean {tuple(checkpoint['mean'])}, std {tuple(checkpoint['std'])}")
    errors.show(f"gives logits, (batch, {len(checkpoint['classes'])})")
    if path.suffix == ".pt2":
        errors.show(f"to load it: torch.export.load({str(path)!r}).module()")


def write_program(model, path, shape):
    """Write the program, and return a function that runs what was written."""
    example, sizes = torch.randn(2, *shape), {"images": {0: torch.export.Dim("batch")}}
    if path.suffix == ".pt2":
        buffer = io.BytesIO()  # torch's own writer ends the process when the disk is full
        torch.export.save(torch.export.export(model, (example,), dynamic_shapes=sizes), buffer)
        path.write_bytes(buffer.getvalue())
        return torch.export.load(path).module()
    import onnx.reference
    import onnxscript  # noqa: F401  torch.onnx.export needs it

    names = {"input_names": ["images"], "output_names": ["logits"]}
    torch.onnx.export(model, (example,), path, dynamic_shapes=sizes, external_data=False, verbose=False, **names)
    session = onnx.reference.ReferenceEvaluator(str(path))
    return lambda images: torch.tensor(session.run(None, {"images": images.numpy()})[0])


def compare(model, program, shape):
    """The largest difference between the outputs of a model and a program, relative to the largest output."""
    differences = []
    with torch.inference_mode():
        for count in (1, 5):
            images = torch.randn(count, *shape)
            expected = model(images)
            differences.append((program(images) - expected).abs().max() / expected.abs().max().clamp(min=1))
    return torch.stack(differences).max().item()  # NaN if one is


ACTIONS = {"images": predict, "report": print_report, "attention": draw_attention, "export": export}


def command(argv):
    args = make_parser().parse_intermixed_args(argv)
    mode = check(args)
    device = devices.choose_device(args.device)
    if mode != "export":  # it runs on the CPU in float32, as its outputs are compared
        devices.speed_up(device)
    checkpoint = checkpoints.load(args.checkpoint)
    with checkpoints.blaming(args.checkpoint), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # of large or half transparent images, which it reads
        model = models.rebuild(checkpoint, args.checkpoint).to(device).eval()
        try:
            return ACTIONS[mode](args, checkpoint, model, device)
        except ImportError as error:
            missing = "onnx onnxscript" if mode == "export" else error.name
            raise errors.Failed(f"--{mode} needs {error.name}: pip install {missing}") from None


def main(argv=None):
    return errors.exit_status("predict.py", lambda: command(argv), as_flags=arguments.as_flags)


if __name__ == "__main__":
    sys.exit(main())
