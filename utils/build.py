"""The parts of a run: its images, its model and its optimizer."""

import copy
import dataclasses

import torch
from torch.utils.flop_counter import FlopCounterMode

import augment
import data
import optimizers
from utils import arguments, checkpoints, devices, distributed, models
from utils.ema import Ema


def load_data(args) -> tuple[data.Dataset, data.Split, data.Split]:
    """Load the dataset and split its training set into train and validation."""
    options = {
        "data_dir": args.data_dir,
        "img_size": args.img_size,
        "fallback": "data" not in args.given and not args.resume,
        # A data_dir that a checkpoint names, and the user doesn't, is only read.
        "read_only": bool(args.resume) and "data_dir" not in args.given and args.data_dir != arguments.DATA_DIR,
    }
    dataset = distributed.on_local_main(lambda: data.load(args.data, **options))
    if distributed.world_size() > 1:  # one of several machines may have fallen back
        what = dataset.name, checkpoints.fingerprint(*dataset.train, *dataset.test)
        if any(other != what for other in distributed.all_gather(what)):
            raise ValueError(f"data {args.data} isn't the same in all processes: give every machine the same files")
    channels = dataset.train.images.shape[1]
    for name in ("mean", "std"):
        values = getattr(args, name)
        if values is None:
            continue
        if len(values) not in (1, channels):
            shown = ",".join(str(x) for x in values)
            raise ValueError(f"--{name} {shown} must be one value, or one for each of {channels} channels")
        dataset = dataclasses.replace(dataset, **{name: values * (channels // len(values))})
    train_set, val_set = data.split(dataset.train, args.val_split, args.seed)
    if args.limit:
        try:
            train_set = data.limit(train_set, args.limit, args.seed)
        except ValueError as error:  # the name helps: it may be the fallback
            fell_back = args.data in data.DOWNLOADS and dataset.name == "shapes"
            why = f", which stand for {args.data}: --data {args.data} says why" if fell_back else ""
            raise ValueError(f"{error} of {dataset.name}{why}") from None
    size = dataset.train.images.shape[-1]
    if args.crop_pad >= size:
        raise ValueError(f"--crop-pad {args.crop_pad} must be less than the image's {size} pixels")
    if args.tta and size < 2:
        raise ValueError(f"--tta translates images by a pixel, these have {size}: leave it out")
    return dataset, train_set, val_set


def training_batches(run, step):
    """Yield (images, labels, size of the whole batch) for each step from `step` on, without end.

    The images are this process's share of the batch, augmented, on the device.
    """
    args, dataset = run.args, run.dataset
    while True:
        epoch, first = divmod(step, run.steps_per_epoch)
        mixing = not args.mixup_off_epoch or epoch < args.mixup_off_epoch
        options = {
            "key": (args.seed, epoch),
            "first": first,
            "least": run.least_per_batch(distributed.world_size()),
            "rank": distributed.rank(),
            "world_size": distributed.world_size(),
            "num_classes": len(dataset.classes),
            "augment": args.augment,
            "crop_pad": args.crop_pad,
            "flip": args.flip,
            "erase": args.reprob,
            "mixup": args.mixup if mixing else 0.0,
            "cutmix": args.cutmix if mixing else 0.0,
        }
        batches = augment.batches(run.train_set, args.batch_size, dataset.mean, dataset.std, run.device, **options)
        for batch_size, (images, labels) in zip(run.batch_sizes[first:], batches, strict=True):
            yield images, labels, batch_size
            step += 1


def make_model(args, dataset: data.Dataset, train_set: data.Split, device: torch.device) -> torch.nn.Module:
    """A fresh model on the device. Its weights depend on --seed, and on the training images if it has `whiten`."""
    torch.manual_seed(args.seed)
    _, channels, image_size, _ = dataset.train.images.shape
    sizes = {"image_size": image_size, "channels": channels, "num_classes": len(dataset.classes)}
    try:
        model = models.MODELS[args.model].build(args, **sizes)
    except (ArithmeticError, AttributeError, TypeError, RuntimeError, MemoryError) as error:  # sizes too large
        raise ValueError(f"--model {args.model} can't be built in these sizes: {str(error)[:100]}") from None
    models.check_model_args(args, model, sizes)
    if hasattr(model, "whiten"):
        some = data.limit(train_set, min(512, len(train_set.labels)), args.seed)
        images, _ = next(augment.batches(some, 512, dataset.mean, dataset.std, "cpu"))
        model.whiten(images)
    # Convolutions are faster with the channels last, matrices don't mind. But L-BFGS can't flatten such gradients, and
    # those of batch norms are wrong on MPS (https://github.com/pytorch/pytorch/issues/175189).
    as_it_is = args.opt == "lbfgs" or device.type == "mps"
    return model.to(device, memory_format=torch.preserve_format if as_it_is else torch.channels_last)


def on_device(split: data.Split, device: torch.device) -> data.Split:
    """Move a split to the device, where batches are augmented, unless it takes over half of a GPU's free memory."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # left by a run before
        if split.images.nbytes > (torch.cuda.mem_get_info(device)[0] + cached) / 2:
            return split
    return data.Split(split.images.to(device), split.labels.to(device))


def make_optimizer(args, model: torch.nn.Module) -> torch.optim.Optimizer:
    options = {"weight_decay": args.weight_decay, "decay_all": args.decay_all, "use_muon": args.opt == "muon"}
    if args.opt != "lbfgs":  # which takes one group of parameters, with one learning rate
        options |= {"lr": args.lr, "layer_decay": args.layer_decay, "lr_scale": args.lr_scale}
    groups = optimizers.parameter_groups(model, **options)
    own = optimizers.options_of(args.opt) - optimizers.GROUP_OPTIONS
    optimizer = optimizers.OPTIMIZERS[args.opt](groups, **{name: getattr(args, name) for name in own})
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # what the schedule multiplies
    return optimizer


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    """The compiled model. It compiles at the first batch, and again for a last batch of another size."""
    try:
        return torch.compile(model, dynamic=False)
    except RuntimeError as error:  # not on this version of Python, or not on this system
        raise ValueError(f"--compile doesn't work here, use --no-compile: {error}") from None


def flops_per_image(run) -> float:
    """Floating-point operations of training on one image: forward, backward, the teacher's; not the optimizer's.

    On a GPU, fused attention computes a product once more in the backward pass: about 1 % more for a ViT.
    """
    model = copy.deepcopy(run.model).train()
    images = run.dataset.train.images[:2].to(run.device).float()
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
        if run.teacher:
            run.teacher(images)
    return counter.get_total_flops() / len(images)


def trial(run, **changes):
    """A throw-away copy of a run with its own model, optimizer, scaler and EMA, and with changed arguments."""
    args = arguments.changed(run.args, **changes)
    model = copy.deepcopy(run.model)
    optimizer, scaler = make_optimizer(args, model), devices.grad_scaler(run.device, run.precision)
    ema = Ema(model, args.ema) if args.ema else None
    return dataclasses.replace(
        run, args=args, model=model, train_model=model, ema=ema, optimizer=optimizer, scaler=scaler
    )
