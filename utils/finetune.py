"""Start from weights that were trained elsewhere, and train a part of a model only.

    import torch
    from finetune import freeze, load_matching, train_mode   # in this repo: from utils.finetune import ...

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    print(load_matching(model, {"0.weight": torch.zeros(2, 2)}))
    freeze(model, ["0"])                         # train everything but the first layer
    train_mode(model)                            # in place of model.train()

Needs torch alone.
"""

import difflib
from itertools import accumulate

import torch


def initialise(model: torch.nn.Module, start: dict, classes: list) -> str:
    """Give a model the weights of `start`, a dict with state_dict and classes, as far as they fit.

    A head, by that name, for other classes is left as it is. Positions are resized by the model's resize_positions, if
    it has one. Returns one line that says how far it went. Raises ValueError if nothing fits.
    """
    state = start["state_dict"]
    if start["classes"] and list(start["classes"]) != list(classes):
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    resized = model.resize_positions(state) if hasattr(model, "resize_positions") else state
    said = load_matching(model, resized)
    if resized is not state:
        old, new = tuple(state["pos_embedding"].shape), tuple(resized["pos_embedding"].shape)
        said += f"; positions resized from {old} to {new}"
    return said


def load_matching(model: torch.nn.Module, state: dict) -> str:
    """Copy those weights of a state dict whose name and shape are the model's; the others of the model stay.

    Returns one line that says what was loaded and what wasn't. Raises ValueError if nothing fits.
    """
    own = model.state_dict()
    fitting = {name: tensor for name, tensor in state.items() if name in own and tensor.shape == own[name].shape}
    if not fitting:
        raise ValueError(f"none of its {len(state)} tensors fits the model: they are {few(state)}")
    model.load_state_dict(fitting, strict=False)
    misfits = (own.keys() & state) - fitting.keys()
    shapes = [f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}" for name in misfits]
    rest = {"skipped for their shape": shapes, "started afresh": own.keys() - state, "not used": state.keys() - own}
    text = f"{len(fitting)} of the model's {len(own)} tensors loaded"
    for what, names in rest.items():
        if names:
            text += f"; {what}: {few(sorted(names))}"
    return text


def few(names) -> str:
    names = list(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def below(prefix: str, names) -> list:
    """Those names that start with a prefix, as whole parts of a name: blocks.1 isn't blocks.10."""
    return [name for name in names if f"{name}.".startswith(f"{prefix}.")]


def freeze(model: torch.nn.Module, prefixes: list[str]):
    """Stop training the parameters below any of the prefixes.

    Raises ValueError for a prefix that names nothing, and if nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]  # a tied weight has several
    for prefix in prefixes:
        named = below(prefix, names)
        for name in named:
            model.get_parameter(name).requires_grad_(False)
        if not named:
            known = {start for name in names for start in accumulate(name.split("."), "{}.{}".format)}  # a, a.b, a.b.c
            near = difflib.get_close_matches(prefix, sorted(known), 4, 0.3) or sorted({n.split(".")[0] for n in names})
            raise ValueError(f"freeze {prefix}: no parameter has that prefix; near are {', '.join(near)}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze {', '.join(prefixes)} leaves nothing to train")


def train_mode(model: torch.nn.Module):
    """model.train(), but frozen batch norms are in eval mode: their running statistics are weights, too."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.affine:
            module.train(module.weight.requires_grad)
