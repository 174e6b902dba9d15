"""Optimizers by name, and the parameter groups they work on.

    groups = parameter_groups(model, weight_decay=0.05)
    optimizer = OPTIMIZERS["adamw"](groups, lr=1e-3, opt_betas=(0.9, 0.95))

Copied alone, this file needs torch and nothing else. To add an optimizer, write a function here whose keywords are
flags of train.py, name it in OPTIMIZERS and give its defaults in DEFAULTS.
"""

import argparse
import difflib
import fnmatch
import inspect
import math

import torch


def sgd(groups, *, lr, momentum, nesterov):
    return torch.optim.SGD(groups, lr, momentum, nesterov=nesterov, fused=True)


def adam(groups, *, lr, opt_betas):
    """The weight decay is coupled: added to the gradient, so it's scaled by the second moment like the gradient."""
    return torch.optim.Adam(groups, lr, opt_betas, fused=True)


def adamw(groups, *, lr, opt_betas):
    """The weight decay is decoupled: weights shrink by lr * weight_decay, whatever the gradient (arXiv:1711.05101)."""
    return torch.optim.AdamW(groups, lr, opt_betas, fused=True)


def nadam(groups, *, lr, opt_betas):
    return torch.optim.NAdam(groups, lr, opt_betas)


def radam(groups, *, lr, opt_betas):
    return torch.optim.RAdam(groups, lr, opt_betas)


def rmsprop(groups, *, lr, momentum):
    return torch.optim.RMSprop(groups, lr, momentum=momentum)


def adagrad(groups, *, lr):
    return torch.optim.Adagrad(groups, lr)


def adadelta(groups, *, lr):
    return torch.optim.Adadelta(groups, lr)


def rprop(groups, *, lr):
    """Made for whole-set gradients. lr is the size of the first step only: no schedule has an effect after it."""
    return torch.optim.Rprop(groups, lr)


def muon(groups, *, lr, momentum, opt_betas):
    """Muon for hidden matrices and filters, as parameter_groups(hidden=True) marks them; AdamW for the rest."""
    return Muon(groups, lr=lr, betas=opt_betas, momentum=momentum)


def lbfgs(groups, *, lr):
    """Quasi-Newton with a line search; needs step(closure), and knows one group of parameters and no weight decay."""
    parameters = [p for group in groups for p in group["params"]]
    return torch.optim.LBFGS(parameters, lr, max_iter=5, history_size=10, line_search_fn="strong_wolfe")


class Muon(torch.optim.AdamW):
    """Momentum with its directions made equally long (https://kellerjordan.github.io/posts/muon/), decoupled decay.

    It works on the groups marked "hidden"; the others get AdamW. A filter is a matrix with a row per output. The factor
    0.2 * sqrt(longer side) makes the numbers of an update as large as AdamW's, so that both take the same rate
    (arXiv:2502.16982).
    """

    def __init__(self, groups, *, lr, betas, momentum):
        super().__init__(groups, lr, betas, fused=True)
        if not any(group.get("hidden") for group in self.param_groups):
            raise ValueError("--opt muon finds no matrix of a hidden layer to work on: use --opt adamw")
        self._step_supports_amp_scaling = False  # a fused AdamW says True, but for Muon a GradScaler must unscale
        for group in self.param_groups:
            group.setdefault("hidden", False)
            group["momentum"] = momentum

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}
            for p in group["params"] if group["hidden"] else ():
                if p.grad is not None:
                    alike.setdefault((len(p), p[0].numel()), []).append(p)
            for (rows, columns), params in alike.items():
                for p in params:
                    if "momentum_buffer" not in self.state[p]:  # AdamW looks for a "step" in what it loads
                        self.state[p].update(step=torch.tensor(0.0), momentum_buffer=torch.zeros_like(p))
                momenta, grads = [self.state[p]["momentum_buffer"] for p in params], [p.grad for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's
                updates = orthogonal(torch.stack([x.reshape(rows, columns) for x in ahead]))
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                steps = [update.reshape(p.shape).to(p.dtype) for update, p in zip(updates, params, strict=True)]
                torch._foreach_add_(params, steps, alpha=-0.2 * max(rows, columns) ** 0.5 * group["lr"])
                for p in params:
                    p.grad = None  # AdamW passes over it
        super().step()


def orthogonal(matrices, steps=5):
    """(k, rows, columns) -> the same with singular values of about 1: five steps of Newton and Schulz, in bf16."""
    slow = matrices.device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()  # slow in bf16
    x = matrices.to(torch.float32 if slow else torch.bfloat16)
    x = x.mT if x.shape[1] > x.shape[2] else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


OPTIMIZERS = {f.__name__: f for f in (sgd, adam, adamw, nadam, radam, rmsprop, adagrad, adadelta, rprop, muon, lbfgs)}
# What a flag is worth when neither the user nor a model's RECIPE says it.
DEFAULTS = {
    "sgd": dict(lr=0.1, weight_decay=5e-4, momentum=0.9),
    "adam": dict(lr=1e-3),
    "adamw": dict(lr=1e-3, weight_decay=0.05),
    "nadam": dict(lr=1e-3),
    "radam": dict(lr=1e-3),
    "rmsprop": dict(lr=1e-3),
    "adagrad": dict(lr=0.01),
    "adadelta": dict(lr=1.0),
    "rprop": dict(lr=1e-3),
    "muon": dict(lr=2e-3, weight_decay=0.05, momentum=0.95),
    "lbfgs": dict(lr=1.0),
}
NO_DECAY = ("rprop", "lbfgs")  # have no weight decay in torch
SCALARS = ("step", "mu_product")  # in the state of a parameter; all else in it has the parameter's shape
DECAY = {"weight_decay", "decay_all", "layer_decay", "lr_scale"}  # flags for parameter_groups, not for the optimizer


def options_of(opt):
    """The flags that an optimizer reads, as a set of names."""
    reads = set(inspect.signature(OPTIMIZERS[opt]).parameters) - {"groups"}
    if opt != "lbfgs":
        reads |= {"layer_decay", "lr_scale"}
    return reads | (set() if opt in NO_DECAY else {"weight_decay", "decay_all"})


def add_args(parser):
    flag = parser.add_argument
    flag("--lr", type=float, metavar="X", help="learning rate at the schedule's peak (depends on --opt and the model)")
    flag("--weight-decay", "--wd", type=float, default=0.0, metavar="X", help="(depends on --opt and the model)")
    flag("--decay-all", action="store_true", help="decay biases, norms, tokens and positions too, not matrices alone")
    flag("--layer-decay", type=float, default=1.0, metavar="X", help="rate of a layer / of the next one (%(default)s)")
    flag(
        "--lr-scale",
        type=scale,
        action="append",
        default=[],
        metavar="PREFIX=X",
        help="rate of PREFIX, times X (%(default)s)",
    )
    flag("--momentum", type=float, default=0.0, metavar="X", help="sgd, rmsprop, muon (sgd 0.9, muon 0.95)")
    flag("--nesterov", action=argparse.BooleanOptionalAction, default=False, help="sgd: Nesterov momentum")
    flag("--opt-betas", type=pair, default=(0.9, 0.999), metavar="B,B", help="the adam family, muon (%(default)s)")


def pair(text):
    """argparse type: '0.9,0.95' -> (0.9, 0.95)."""
    first, second = (float(part) for part in text.split(","))
    return first, second


def scale(text):
    """argparse type: 'head=0.1' -> ("head", 0.1)."""
    prefix, _, factor = text.rpartition("=")
    return prefix, float(factor)


def layers(model):
    """By parameter name the layer, counted from the input.

    A model with a method layer_of(name) says so itself. Else every matrix or filter begins a layer, in the order in
    which the model registers them, and the biases and norms that follow belong to it.
    """
    if hasattr(model, "layer_of"):
        return {name: model.layer_of(name) for name, _ in model.named_parameters()}
    found, layer = {}, -1
    for name, parameter in model.named_parameters():
        layer += parameter.ndim >= 2
        found[name] = max(0, layer)
    return found


def lies_in(name, prefix):
    """blocks.1.norm.bias lies in blocks.1 and in blocks, and not in blocks.1.n. It is one of *.norm.bias, too."""
    return fnmatch.fnmatchcase(f"{name}.", f"{prefix}.*")


def parameter_groups(model, *, weight_decay, decay_all=False, lr=None, layer_decay=1.0, lr_scale=(), hidden=False):
    """Groups for an optimizer. Every parameter of the model is in one of them, save those that are frozen.

    Matrices and filters decay, and the rest only with decay_all: biases and norms are told by their number of
    dimensions, and a model names what else to spare in `no_weight_decay`.

    The rate of a layer is lr * layer_decay ** (number of layers above it), see layers(), times the factor of each
    (prefix, factor) of lr_scale whose prefix its name begins with, where * stands for anything. It's in "lr", and in
    "initial_lr" for schedules; without lr, the groups have neither. With `hidden`, matrices and filters of all layers
    but the first and the last are in groups marked hidden=True, as Muon wants them. Raises ValueError for values out
    of range, and for a prefix that no parameter has.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"--layer-decay {layer_decay} must be above 0 and at most 1")
    layer_of = layers(model)
    for prefix, factor in lr_scale:
        if not 0 < factor < math.inf:
            raise ValueError(f"--lr-scale {prefix}={factor} must be a finite number above 0")
        if not any(lies_in(name, prefix) for name in layer_of):
            known = {".".join(name.split(".")[:k]): None for name in layer_of for k in range(1, name.count(".") + 2)}
            near = difflib.get_close_matches(prefix, known) or [name for name in known if "." not in name]
            raise ValueError(f"--lr-scale {prefix}: no parameter is named so; there are {', '.join(near)}")
    if lr is None and (layer_decay != 1 or lr_scale):
        raise ValueError("layer_decay and lr_scale need lr: the rate that they are parts of")

    spared, top = getattr(model, "no_weight_decay", ()), max(layer_of.values())
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = decay_all or (parameter.ndim >= 2 and name not in spared)
        rate = layer_decay ** (top - layer_of[name])
        rate *= math.prod(factor for prefix, factor in lr_scale if lies_in(name, prefix))
        inner = hidden and parameter.ndim >= 2 and name not in spared and 0 < layer_of[name] < top
        groups.setdefault((decays, rate, inner), []).append(parameter)
    grouped = [id(parameter) for params in groups.values() for parameter in params]
    trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained), "a parameter is not in exactly one group"
    rates = [{} if lr is None else dict(lr=lr * rate, initial_lr=lr * rate) for _, rate, _ in groups]
    decay = [dict(weight_decay=weight_decay * decays) for decays, _, _ in groups]
    marks = [dict(hidden=True) if inner else {} for _, _, inner in groups]
    return [dict(params=p) | d | r | m for p, d, r, m in zip(groups.values(), decay, rates, marks, strict=True)]


def describe_groups(model, groups):
    """A line for each rate, the highest first: the layers that have it, how many of their numbers decay or are Muon's.

    `groups` are those of parameter_groups with lr, or an optimizer's param_groups.
    """
    by_id, names = {id(p): name for name, p in model.named_parameters()}, {}
    muon = {by_id[id(p)] for group in groups if group.get("hidden") for p in group["params"]}
    for group in groups:
        names.setdefault(group.get("initial_lr", group["lr"]), {}).update(
            {by_id[id(p)]: group.get("weight_decay", 0) for p in group["params"]}
        )
    sizes, lines = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}, []
    for lr, some in sorted(names.items(), reverse=True):
        whole = {}  # the shortest prefixes of which all parameters have this rate
        for name in filter(some.__contains__, sizes):
            parts = name.split(".")
            prefixes = (".".join(parts[:k]) for k in range(1, len(parts) + 1))
            whole[next(p for p in prefixes if all(n in some for n in sizes if lies_in(n, p)))] = None
        whole = list(whole)
        whole[3:-2] = ["..."] if len(whole) > 6 else whole[3:-2]
        count, decaying = (sum(sizes[n] for n, decay in some.items() if decay or all) for all in (True, False))
        by_muon = f", {sum(sizes[n] for n in muon & some.keys()):,} by Muon" if muon else ""
        lines.append(f"lr {lr:.3g}: {', '.join(whole)} ({count:,} parameters, {decaying:,} with weight decay{by_muon})")
    return lines


def load_state(optimizer, saved):
    """Put back what state_dict() of an optimizer with the same options gave.

    Raises ValueError for what doesn't fit the parameters. torch looks at the shapes of no tensor, and its fused steps
    would read beyond one that is smaller than its parameter.
    """
    groups = optimizer.state_dict()["param_groups"]
    parameters = [(p, group.get("hidden")) for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(optimizer, torch.optim.LBFGS):  # that has one state for all
        kinds = {}
        for i, (parameter, hidden) in enumerate(parameters):
            state = saved["state"].get(i, {})
            kinds.setdefault(hidden, set()).add(frozenset((name, type(value)) for name, value in state.items()))
            for name, value in state.items():
                wanted = () if name in SCALARS else parameter.shape
                if isinstance(value, torch.Tensor) and value.shape != wanted:
                    raise ValueError(f"the optimizer's {name} is {tuple(value.shape)}, expected {tuple(wanted)}")
        if any(len(kind) > 1 for kind in kinds.values()):
            raise ValueError("the optimizer's state is not of the same kind for all parameters")
    optimizer.load_state_dict(dict(state=saved["state"], param_groups=groups))


def step_with_closure(optimizer, gradient, seed):
    """One step of an optimizer that evaluates the loss several times (L-BFGS). Returns the first evaluation."""
    results = []

    def closure():
        torch.manual_seed(seed)  # the same dropout each time: the line search compares losses
        results.append(gradient())
        return results[-1][0]

    optimizer.step(closure)
    return results[0]


def take_step(gradient, optimizer, scaler, seed):
    """One optimizer step with a function that computes the gradient. Returns what that returns."""
    if isinstance(optimizer, torch.optim.LBFGS):
        return step_with_closure(optimizer, gradient, seed)
    result = gradient()
    scaler.step(optimizer)
    scaler.update()
    return result
