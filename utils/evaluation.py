"""Mean loss and accuracy of a model on a split."""

import math

import torch

import augment
import losses
from utils import arguments, checkpoints, devices, distributed, errors, models


def batch_size(shape: tuple[int, int, int]) -> int:
    """How many images of this shape, (channels, height, width), to evaluate at once: 500 of CIFAR-10."""
    return max(1, min(500, 500 * 3 * 32 * 32 // math.prod(shape)))


@torch.inference_mode()
def evaluate(model, split, dataset, device, precision, *, loss="ce", tta=False, flip=False):
    """Mean loss and accuracy over all images of a split, the same in any number of processes.

    With tta, logits are means over translated copies of each image; with flip, over flipped ones, too.
    """
    model.eval()
    loss_of = losses.parse(loss)
    totals = devices.zero_totals(device)
    size = batch_size(split.images.shape[1:])
    options = {"first": distributed.rank(), "every": distributed.world_size()}
    for images, labels in augment.batches(split, size, dataset.mean, dataset.std, device, **options):
        with devices.autocast(device, precision):
            logits = augment.tta(model, images, flip=flip) if tta else model(images)
        logits = logits.float()
        totals[0] += loss_of(logits, labels).to(totals.dtype) * len(labels)
        totals[1] += (logits.argmax(1) == labels).sum()
        totals[2] += len(labels)
    loss_sum, correct, images = distributed.all_reduce(totals).tolist()
    return loss_sum / images, correct / images


def check_finite(model: torch.nn.Module, step: int, lr: float):
    """Raise Diverged for weights or statistics that nothing can go on from. The losses may be finite all the same."""
    finite = torch.stack([tensor.isfinite().all() for tensor in model.state_dict().values()]).all().item()
    if distributed.all_max(int(not finite)):  # statistics may differ between the processes
        raise errors.Diverged("a weight is not finite", step, lr)


def test(checkpoint, path, *, data, data_dir, device, amp):
    """Test a checkpoint, with the loss and TTA of its run. Returns the dataset, mean loss and accuracy."""
    dataset = models.dataset_for(checkpoint, data, data_dir, path)
    device = distributed.local_device(devices.choose_device(device))
    devices.speed_up(device)
    precision = devices.choose_precision(amp, device)
    model = models.rebuild(checkpoint, path).to(device)
    options = {name: args_of(checkpoint)[name] for name in ("loss", "tta", "flip")}
    loss, acc = evaluate(model, dataset.test, dataset, device, precision, **options)
    if not math.isfinite(loss):
        raise ValueError(f"{path} gives a loss of {loss} on {dataset.name}: its outputs are not finite numbers")
    return dataset, loss, acc


def args_of(checkpoint: dict) -> dict:
    """The arguments of a checkpoint's run, with defaults for what a checkpoint from elsewhere may lack."""
    return {"data": "shapes", "amp": "auto", "loss": "ce", "tta": False, "flip": False} | checkpoint["args"]


def test_line(dataset, loss, acc, tta, *notes):
    with_tta = ["with TTA"] if tta else []
    notes = [dataset.name, f"{len(dataset.test.labels):,} images", *with_tta, *notes]
    return f"test acc {acc:.4f}  loss {loss:.4f}  ({', '.join(notes)})"


def test_checkpoint(args):
    """--eval: print the test accuracy of a saved checkpoint."""
    arguments.reject_idle(args, args.given - {"eval", "model", "data", "data_dir", "device", "amp"}, "with --eval")
    checkpoint = checkpoints.load(args.eval)
    if "model" in args.given and args.model != checkpoint["model"]:
        raise ValueError(f"{args.eval} holds a {checkpoint['model']}, not --model {args.model}")
    chosen = args_of(checkpoint) | {name: getattr(args, name) for name in args.given & {"data", "amp"}}
    where = {"data": chosen["data"], "data_dir": args.data_dir, "device": args.device, "amp": chosen["amp"]}
    dataset, loss, acc = test(checkpoint, args.eval, **where)
    if dataset.note:
        errors.show(dataset.note.strip())
    errors.show(test_line(dataset, loss, acc, chosen["tta"]))
