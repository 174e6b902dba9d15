"""The models by name, and how to get one back from a file."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch

import cnn_cifar10
import data
import mlp_mnist
import vit
from utils import checkpoints, devices, distributed
from utils.finetune import few

# A model is a keyword-only nn.Module in a file with RECIPE, add_args(parser) and build(args, *, image_size, channels,
# num_classes). To add one, name its file and its class here. Its class needs
#   model_args                 all keywords that built it, those three among them; one named as a flag is that flag.
#                              Checkpoints hold them, and the class builds it again under torch.device("meta")
#   head                       the last layer, left out when another model's weights with other classes are loaded
# and, for constants that hold infinities, such as a mask, register_buffer(..., persistent=False); it may have
#   whiten(images)             set the first layer from normalised training images, before training
#   fixed                      names of the parameters that whiten freezes
#   layer_of(name)             the layer of a parameter, counted from the input, for layer-wise learning rates
#   no_weight_decay()          names of parameters to spare besides biases and norms
#   resize_positions(state)    adapt a state dict that was trained at another image size
MODELS = {"mlp": mlp_mnist, "cnn": cnn_cifar10, "vit": vit}
CLASSES = {"mlp": mlp_mnist.MLP, "cnn": cnn_cifar10.CNN, "vit": vit.ViT}


def check_model_args(args, model: torch.nn.Module, sizes: dict):
    """Raise ValueError, before any training, for a model that rebuild() couldn't build from its checkpoints."""
    held = getattr(model, "model_args", {})
    wanted = sizes | {name: value for name, value in vars(args).items() if name in held and value is not None}
    for name, value in wanted.items():
        if held.get(name) != value:
            said = f"--model {args.model} has {name} {held.get(name)} in its model_args, the run has {value}"
            raise ValueError(f"{said}: pass it on in build()")
    content = {"model": args.model, "model_args": held, "state_dict": model.state_dict()}
    content |= {name: sizes[name] for name in ("image_size", "channels")} | {"classes": range(sizes["num_classes"])}
    again = rebuild(content, f"a checkpoint of --model {args.model}")
    if getattr(again, "model_args", None) != held:
        raise ValueError(f"--model {args.model} has not all its keywords in its model_args: set them in its __init__")


def rebuild(checkpoint: dict, path: str | Path = "the checkpoint") -> torch.nn.Module:
    """The trained model of a checkpoint, on the CPU. Raises ValueError if it can't be built."""
    name = checkpoint["model"]
    if name not in CLASSES:
        raise ValueError(f"{path} holds an unknown model {name!r}: choose from {', '.join(CLASSES)}")
    sizes = checkpoint["model_args"]  # all keywords of the model
    described = (checkpoint["image_size"], checkpoint["channels"], len(checkpoint["classes"]))
    if (sizes.get("image_size"), sizes.get("channels"), sizes.get("num_classes")) != described:
        raise ValueError(f"{path} contradicts itself: a model of {str(sizes)[:200]} for images and classes {described}")
    try:
        with torch.device("meta"):  # takes no memory, however large the sizes that the file claims
            model = CLASSES[name](**sizes)
        expected = model.state_dict()
        for key, tensor in checkpoint["state_dict"].items():
            if key in expected and tensor.dtype != expected[key].dtype:
                raise ValueError(f"{key} is {tensor.dtype}")
        # In a copy of the dict: torch leaves a mark in it by which a later load_state_dict wouldn't copy the tensors.
        model.load_state_dict(dict(checkpoint["state_dict"]), assign=True)
        if any(buffer.is_meta for buffer in model.buffers()):  # those that aren't persistent: the file lacks them
            with torch.random.fork_rng(devices=[]):
                filled = CLASSES[name](**sizes)
            filled.load_state_dict(model.state_dict())
            model = filled
    except (ArithmeticError, AttributeError, LookupError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} holds weights that don't fit its model {name}: {str(error)[:200]}") from None
    return model


def read_init(path: str, model: str) -> dict:
    """What --init starts from, with keys model_args, state_dict and classes: a checkpoint, or a vit_* of timm."""
    content = checkpoints.load(path, keys={})
    if content.keys() >= checkpoints.KEYS.keys():
        checkpoints.validate(path, content, checkpoints.KEYS, os.path.getsize(path))
        if content["model"] != model:
            raise ValueError(f"--init {path} holds a {content['model']}, not a {model}: use --model {content['model']}")
        rebuild(content, path)  # rejects sizes that aren't those of its weights: no larger model is built
        return content
    if model != "vit":
        raise ValueError(f"--init {path} is not a checkpoint of train.py; weights of timm need --model vit")
    try:
        model_args, state = vit.from_timm(content)
    except ValueError as error:
        raise ValueError(f"--init {path} is not a checkpoint of train.py, and {error}") from None
    return {"model_args": model_args, "state_dict": state, "classes": None}


def fingerprint(content: dict) -> int:
    """A checksum of the weights in a checkpoint, or in a bare state dict."""
    weights = content.get("state_dict", content)
    return checkpoints.fingerprint(*(value for value in weights.values() if isinstance(value, torch.Tensor)))


def check_same_kind(checkpoint: dict, whose: str | Path, classes: list, images: torch.Tensor):
    """Raise ValueError unless a checkpoint's model was trained on these classes and on images of this shape.

    `whose` checkpoint it is begins the message.
    """
    size, channels = checkpoint["image_size"], checkpoint["channels"]
    if checkpoint["classes"] != list(classes):
        known = f"{whose} knows other classes, {few(checkpoint['classes'])}"
        raise ValueError(f"{known}, than these, {few(classes)}: give data with its classes")
    if images.shape[1:] != (channels, size, size):
        found = "x".join(str(n) for n in images.shape[1:])
        raise ValueError(f"{whose} knows images of {channels}x{size}x{size}, these are {found}: give such images")


def load_teacher(path: str, dataset: data.Dataset, device: torch.device, precision: str) -> Callable:
    """A function from images, normalised for the student, to a trained model's logits, for distillation.

    Raises ValueError if that model knows other classes or sizes.
    """
    checkpoint = checkpoints.load(path)
    check_same_kind(checkpoint, f"--teacher {path}", dataset.classes, dataset.train.images)
    model = rebuild(checkpoint, path).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (dataset.mean, dataset.std))
    its_mean, its_std = (torch.tensor(checkpoint[k], device=device)[:, None, None] for k in ("mean", "std"))
    scale = std / its_std
    shift = (mean - its_mean) / its_std

    def teacher(images):
        with torch.no_grad(), devices.autocast(device, precision):
            logits = model(images * scale + shift)
        return logits.float()

    teacher.fingerprint = fingerprint(checkpoint)  # tells a resumed run if it's the same
    return teacher


def dataset_for(checkpoint, name, data_dir, path):
    """Load a dataset with a checkpoint's mean and std. Raises ValueError if its classes or sizes differ."""
    size = checkpoint["image_size"] if Path(name).is_dir() else None
    dataset = distributed.on_local_main(lambda: data.load(name, data_dir, img_size=size))
    check_same_kind(checkpoint, path, dataset.classes, dataset.test.images)
    return dataclasses.replace(dataset, mean=checkpoint["mean"], std=checkpoint["std"])
