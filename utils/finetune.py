"""Start from weights that were trained elsewhere, and train a part of a model only.

    print(load_matching(model, torch.load("other.pt", weights_only=True)))
    freeze(model, ["blocks"])                    # train everything but a ViT's blocks
    train_mode(model)                            # in place of model.train()

Copied alone, this file needs torch and nothing else.
"""

import difflib

import torch


def initialise(model, start, classes):
    """Give a model the weights of `start`, a dict with state_dict and classes, as far as they fit.

    A head for other classes is left as it is, and positions are resized by the model's resize_positions, if it has one.
    Returns one line that says how far it went. Raises ValueError if nothing fits.
    """
    state, resized = start["state_dict"], ""
    if start["classes"] and list(start["classes"]) != list(classes):
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    if hasattr(model, "resize_positions") and (adapted := model.resize_positions(state)) is not state:
        old, new = (tuple(s["pos_embedding"].shape) for s in (state, adapted))
        state, resized = adapted, f"; positions resized from {old} to {new}"
    return f"{load_matching(model, state)}{resized}"


def load_matching(model, state):
    """Copy those weights of a state dict whose name and shape are the model's; the others of the model stay.

    Returns one line that says what was loaded and what wasn't. Raises ValueError if nothing fits.
    """
    own = model.state_dict()
    fitting = {name: tensor for name, tensor in state.items() if name in own and tensor.shape == own[name].shape}
    if not fitting:
        raise ValueError(f"none of its {len(state)} tensors fits the model: they are {few(state)}")
    model.load_state_dict(fitting, strict=False)
    shapes = [f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}" for n in own if n in state and n not in fitting]
    text = f"{len(fitting)} of the model's {len(own)} tensors loaded"
    for what, names in (
        ("skipped for their shape", shapes),
        ("started afresh", own.keys() - state),
        ("not used", state.keys() - own),
    ):
        text += f"; {what}: {few(sorted(names))}" if names else ""
    return text


def few(names):
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def freeze(model, prefixes):
    """Stop training the parameters whose names start with a prefix, whole parts of a name: blocks.1 isn't blocks.10.

    Raises ValueError for a prefix that names nothing, and if nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        named = [name for name in names if f"{name}.".startswith(f"{prefix}.")]
        for name in named:
            model.get_parameter(name).requires_grad_(False)
        if not named:
            known = {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 2)}
            near = difflib.get_close_matches(prefix, sorted(known), 4, 0.3) or sorted({n.split(".")[0] for n in names})
            raise ValueError(f"--freeze {prefix} is the start of no parameter's name; near are {', '.join(near)}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--freeze {' --freeze '.join(prefixes)} leaves nothing to train")


def train_mode(model):
    """model.train(), but frozen batch norms stay as they are: their running statistics are weights, too."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.affine:
            module.train(module.weight.requires_grad)
