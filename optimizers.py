"""Optimizers by name, and the parameter groups they work on. Needs torch alone.

    import torch
    from optimizers import OPTIMIZERS, parameter_groups

    model = torch.nn.Linear(2, 2)
    groups = parameter_groups(model, weight_decay=0.05)
    optimizer = OPTIMIZERS["adamw"](groups, lr=1e-3, opt_betas=(0.9, 0.95))

To add an optimizer, write a function here whose keywords are flags of train.py, name it in OPTIMIZERS and give its
defaults in DEFAULTS.
"""

import argparse
import difflib
import fnmatch
import functools
import inspect
import math
from collections.abc import Sequence
from itertools import accumulate

import torch


def sgd(groups: list[dict], *, lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0):
    """The weight decay is coupled: added to the gradient."""
    options = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    optimizer = torch.optim.SGD(groups, lr, fused=True, **options)
    if momentum:
        # torch leaves its own uninitialised if a GradScaler skips the first step; zeros give the same step. They are on
        # the parameters' device: move the model before.
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def adam(groups: list[dict], *, lr: float, opt_betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0):
    """The weight decay is coupled: added to the gradient, so it's scaled by the second moment like the gradient."""
    return torch.optim.Adam(groups, lr, opt_betas, weight_decay=weight_decay, fused=True)


def adamw(groups: list[dict], *, lr: float, opt_betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0):
    """The weight decay is decoupled: weights shrink by lr * weight_decay, whatever the gradient (arXiv:1711.05101).

    In the paper the schedule's multiplier takes the place of lr there.
    """
    return torch.optim.AdamW(groups, lr, opt_betas, weight_decay=weight_decay, fused=True)


def nadam(groups: list[dict], *, lr: float, opt_betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0):
    return torch.optim.NAdam(groups, lr, opt_betas, weight_decay=weight_decay)


def radam(groups: list[dict], *, lr: float, opt_betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0):
    return torch.optim.RAdam(groups, lr, opt_betas, weight_decay=weight_decay)


def rmsprop(groups: list[dict], *, lr: float, momentum: float = 0.0, weight_decay: float = 0.0):
    return torch.optim.RMSprop(groups, lr, momentum=momentum, weight_decay=weight_decay)


def adagrad(groups: list[dict], *, lr: float, weight_decay: float = 0.0):
    return torch.optim.Adagrad(groups, lr, weight_decay=weight_decay)


def adadelta(groups: list[dict], *, lr: float, weight_decay: float = 0.0):
    return torch.optim.Adadelta(groups, lr, weight_decay=weight_decay)


def rprop(groups: list[dict], *, lr: float):
    """Made for whole-set gradients. lr is the size of the first step only: no schedule has an effect after it."""
    return torch.optim.Rprop(groups, lr)


def muon(groups, *, lr, momentum=0.95, opt_betas=(0.9, 0.999), weight_decay=0.0):
    """Muon for hidden matrices and filters, as parameter_groups(use_muon=True) marks them; AdamW for the rest."""
    return Muon(groups, lr=lr, momentum=momentum, betas=opt_betas, weight_decay=weight_decay)


def lbfgs(groups: list[dict], *, lr: float):
    """Quasi-Newton with a line search; needs step(closure). It knows one group: options of several are left out."""
    parameters = [p for group in groups for p in group["params"]]
    return torch.optim.LBFGS(parameters, lr, max_iter=5, history_size=10, line_search_fn="strong_wolfe")


class Muon(torch.optim.Optimizer):
    """Muon, orthogonalised momentum (https://kellerjordan.github.io/posts/muon/), with decoupled weight decay.

    It works on the groups with use_muon=True; an inner AdamW handles the others. A filter is a matrix with a
    row per output. The multiplier 0.2 * sqrt(longer side) makes the numbers of an update as large as AdamW's, so that
    both take the same learning rate (arXiv:2502.16982). On a GPU all matrices are padded to the size of the largest,
    which suits nets whose matrices are small or alike. Raises ValueError if no group has use_muon.
    """

    def __init__(self, groups, *, lr, momentum=0.95, betas=(0.9, 0.999), weight_decay=0.0):
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay, "use_muon": False}
        super().__init__(groups, defaults)
        if not any(group["use_muon"] for group in self.param_groups):
            raise ValueError("opt muon needs a matrix of a hidden layer, in a group with use_muon=True: try adamw")
        self.connect_adamw()

    def connect_adamw(self):
        """Build the inner AdamW for the other groups. It shares their dicts and the state: state_dict() covers it."""
        others = [group for group in self.param_groups if not group["use_muon"]]
        self.adamw = None
        if others:
            self.adamw = torch.optim.AdamW(others, fused=True)  # adds its options, such as eps, to these dicts
            self.adamw.state = self.state

    def __setstate__(self, state):  # after load_state_dict, a copy or unpickling the groups are other dicts
        super().__setstate__(state)
        self.connect_adamw()

    def add_param_group(self, group):
        super().add_param_group(group)
        if hasattr(self, "adamw"):  # not while the constructor adds the first ones
            self.connect_adamw()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["use_muon"]:
                self.update(group)
        if self.adamw:
            self.adamw.step()
        return loss

    def update(self, group):
        """A step of Muon, some matrices at a time.

        A GPU waits for launches rather than for arithmetic: there all matrices are one batch, padded with zeros, which
        stay zeros. A CPU takes those of one shape together.
        """
        batches = {}
        for p in group["params"]:
            if p.grad is not None:
                momentum = self.state[p].get("momentum_buffer")
                if momentum is None:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                elif momentum.stride() != p.stride():  # the parameter's memory format has changed
                    self.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(momentum)
                batch_key = "all" if p.is_cuda else (len(p), p[0].numel())
                batches.setdefault(batch_key, []).append(p)
        for params in batches.values():
            grads = [p.grad for p in params]
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(momenta, grads, 1 - group["momentum"])  # Nesterov's
            matrices = [as_wide_matrix(x) for x in ahead]
            rows = max(len(matrix) for matrix in matrices)
            columns = max(matrix.shape[1] for matrix in matrices)
            batch = matrices[0].new_zeros(len(matrices), rows, columns)
            torch._foreach_copy_(corners(batch, matrices), matrices)
            multipliers = update_multipliers(tuple(matrix.shape[1] for matrix in matrices), batch.device)
            updates = orthogonal(batch) * (multipliers * group["lr"])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_([as_wide_matrix(p) for p in params], corners(updates, matrices))


def as_wide_matrix(x: torch.Tensor) -> torch.Tensor:
    """A view of a matrix, or of a filter as one with a row per output, transposed if it's higher than wide.

    The columns stay in memory order, so nothing is copied: orthogonal() doesn't depend on their order.
    """
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    x = x.view(len(x), -1)
    return x.mT if len(x) > x.shape[1] else x


def corners(batch: torch.Tensor, matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """Where each of the matrices lies in a batch padded with zeros."""
    return [padded[: len(x), : x.shape[1]] for padded, x in zip(batch, matrices, strict=True)]


@functools.cache  # else each step would copy them to the GPU
def update_multipliers(longer_sides: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([0.2 * n**0.5 for n in longer_sides], device=device)[:, None, None]


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """(k, rows, columns), wide -> the same with singular values of about 1, by Newton-Schulz iterations in bf16."""
    bf16_is_slow = matrices.device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    x = matrices.to(torch.float32 if bf16_is_slow else torch.bfloat16)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    # Five times x <- 3.4445 x - 4.7750 S x + 2.0315 S S x, where S = x x^T: Keller Jordan's coefficients.
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


OPTIMIZERS = {f.__name__: f for f in (sgd, adam, adamw, nadam, radam, rmsprop, adagrad, adadelta, rprop, muon, lbfgs)}
# The defaults of each, where neither the user nor a model's RECIPE gives another value.
DEFAULTS = {
    "sgd": {"lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9},
    "adam": {"lr": 1e-3},
    "adamw": {"lr": 1e-3, "weight_decay": 0.05},
    "nadam": {"lr": 1e-3},
    "radam": {"lr": 1e-3},
    "rmsprop": {"lr": 1e-3},
    "adagrad": {"lr": 0.01},
    "adadelta": {"lr": 1.0},
    "rprop": {"lr": 1e-3},
    "muon": {"lr": 2e-3, "weight_decay": 0.05, "momentum": 0.95},
    "lbfgs": {"lr": 1.0},
}
# The flags that parameter_groups reads: their values lie in the groups.
GROUP_OPTIONS = {"weight_decay", "decay_all", "layer_decay", "lr_scale"}


def options_of(opt: str) -> set[str]:
    """The flags that an optimizer reads."""
    reads = set(inspect.signature(OPTIMIZERS[opt]).parameters) - {"groups"}
    if "weight_decay" in reads:
        reads.add("decay_all")
    if opt != "lbfgs":
        reads |= {"layer_decay", "lr_scale"}
    return reads


def add_args(parser):
    flag = parser.add_argument
    flag("--lr", type=float, metavar="X", help="highest learning rate (%(default)s for the model's own --opt)")
    flag("--weight-decay", type=float, default=0.0, metavar="X", help="(%(default)s for the model's own --opt)")
    everything = "decay biases, norms, tokens and positions too, not matrices alone (%(default)s)"
    flag("--decay-all", action=argparse.BooleanOptionalAction, default=False, help=everything)
    by_layer = "a layer's learning rate is X times that of the one above (%(default)s)"
    flag("--layer-decay", type=float, default=1.0, metavar="X", help=by_layer)
    scaling = "multiply the learning rate of layers, named as in the log's first lines, as head=0.1; repeatable"
    flag("--lr-scale", type=scale, action="append", default=[], metavar="PREFIX=X", help=scaling)
    flag("--momentum", type=float, default=0.0, metavar="X", help="sgd, rmsprop, muon (sgd 0.9, muon 0.95)")
    nesterov = "sgd: Nesterov momentum (%(default)s)"
    flag("--nesterov", action=argparse.BooleanOptionalAction, default=False, help=nesterov)
    betas = "of the adam family, muon: %(default)s"
    flag("--opt-betas", type=pair, default=(0.9, 0.999), metavar="B,B", help=betas)


def pair(text: str) -> tuple[float, float]:
    """argparse type: '0.9,0.95' -> (0.9, 0.95)."""
    try:
        first, second = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be two numbers, as in 0.9,0.95") from None
    return first, second


def scale(text: str) -> tuple[str, float]:
    """argparse type: 'head=0.1' -> ("head", 0.1)."""
    prefix, _, multiplier = text.rpartition("=")
    try:
        return prefix, float(multiplier if prefix else "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be a layer's name and a number, as in head=0.1") from None


def layers(model: torch.nn.Module) -> dict[str, int]:
    """By parameter name the layer, counted from the input.

    A model with a method layer_of(name) decides itself. Else every matrix or filter begins a layer, in the order in
    which the model registers them, and the biases and norms that follow belong to it.
    """
    if hasattr(model, "layer_of"):
        return {name: model.layer_of(name) for name, _ in model.named_parameters()}
    found, layer = {}, -1
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            layer += 1
        found[name] = max(0, layer)
    return found


def has_prefix(name: str, prefix: str) -> bool:
    """Does a name begin with whole parts? blocks.1.norm.bias: with blocks.1 and *.norm.bias, not with blocks.1.n."""
    return fnmatch.fnmatchcase(f"{name}.", f"{prefix}.*")


def parameter_groups(
    model: torch.nn.Module,
    *,
    weight_decay: float,
    decay_all: bool = False,
    lr: float | None = None,
    layer_decay: float = 1.0,
    lr_scale: Sequence[tuple[str, float]] = (),
    use_muon: bool = False,
) -> list[dict]:
    """Groups for an optimizer. Every parameter of the model is in one of them, except those that are frozen.

    Matrices and filters decay, and the rest only with decay_all: biases and norms are recognised by their number of
    dimensions, and a model names what else to spare in `no_weight_decay`.

    The learning rate of a layer is lr * layer_decay ** (number of layers above it), see layers(), times the multiplier
    of each (prefix, multiplier) of lr_scale whose prefix its name begins with, where * stands for anything. It's in
    "lr", and in "initial_lr" for schedules; without lr, the groups have neither. With use_muon, matrices and filters
    of all layers but the first and the last are in groups with use_muon=True. Give it the bare model: the wrappers of
    torch.compile and DistributedDataParallel hide layer_of and no_weight_decay. Raises ValueError for values out of
    range, and for a prefix that no parameter has which is trained.
    """
    layer_of = layers(model)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    check_options(trainable, lr, weight_decay, layer_decay, lr_scale)
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # a method, as in timm
    top = max(layer_of.values(), default=0)
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # Matrices that the model spares, such as positions, are treated as biases are.
        is_matrix = parameter.ndim >= 2 and name not in spared
        decays = decay_all or is_matrix
        by_muon = use_muon and is_matrix and 0 < layer_of[name] < top
        multiplier = layer_decay ** (top - layer_of[name])
        multiplier *= math.prod(own for prefix, own in lr_scale if has_prefix(name, prefix))
        key = (decays, multiplier, by_muon)
        if key not in groups:
            group = {"params": [], "weight_decay": weight_decay if decays else 0.0}
            if lr is not None:
                if lr and not 1e-38 < lr * multiplier < 1e38:  # single precision
                    rule = "must be above 1e-38 and below 1e38: see layer_decay and lr_scale"
                    raise ValueError(f"the learning rate {lr * multiplier:g} of {name} {rule}")
                group["lr"] = group["initial_lr"] = lr * multiplier
            if by_muon:
                group["use_muon"] = True
            groups[key] = group
        groups[key]["params"].append(parameter)
    return list(groups.values())


def check_options(names, lr, weight_decay, layer_decay, lr_scale):
    """Raise ValueError for options of parameter_groups that are out of range."""
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} {value} must be a finite number >= 0")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay {layer_decay} must be above 0 and at most 1")
    if lr is None and (layer_decay != 1 or lr_scale):
        raise ValueError("layer_decay and lr_scale need lr, the learning rate that they multiply")
    for prefix, multiplier in lr_scale:
        if not 0 < multiplier < math.inf:
            raise ValueError(f"lr_scale {prefix}={multiplier} must be a finite number above 0")
        if not any(has_prefix(name, prefix) for name in names):
            known = dict.fromkeys(prefix for name in names for prefix in accumulate(name.split("."), "{}.{}".format))
            near = difflib.get_close_matches(prefix, known) or [name for name in known if "." not in name]
            raise ValueError(f"lr_scale {prefix}: no trained parameter has that prefix; there are {', '.join(near)}")
