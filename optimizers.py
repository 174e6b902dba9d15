"""Optimizers by name, and the parameter groups they work on.

    groups = parameter_groups(model, weight_decay=0.05)
    optimizer = OPTIMIZERS["adamw"](groups, lr=1e-3, betas=(0.9, 0.95))

Copied alone, this file needs torch and nothing else. To add an optimizer, write a function here whose keywords are
flags of train.py, name it in OPTIMIZERS and give its defaults in DEFAULTS.
"""

import inspect

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
    """Made for whole-set gradients. lr is the first step size only, a schedule has no effect after it."""
    return torch.optim.Rprop(groups, lr)


def lbfgs(groups, *, lr):
    """Quasi-Newton with a line search; needs step(closure), and knows one group of parameters and no weight decay."""
    parameters = [p for group in groups for p in group["params"]]
    return torch.optim.LBFGS(parameters, lr, max_iter=5, history_size=10, line_search_fn="strong_wolfe")


OPTIMIZERS = {f.__name__: f for f in (sgd, adam, adamw, nadam, radam, rmsprop, adagrad, adadelta, rprop, lbfgs)}
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
    "lbfgs": dict(lr=1.0),
}
NO_DECAY = ("rprop", "lbfgs")  # have no weight decay in torch
DECAY = {"weight_decay", "decay_all"}  # flags for parameter_groups, not for the optimizer itself


def options_of(opt):
    """The flags that an optimizer reads, as a set of names."""
    reads = set(inspect.signature(OPTIMIZERS[opt]).parameters) - {"groups"}
    return reads | (set() if opt in NO_DECAY else DECAY)


def add_args(parser):
    flag = parser.add_argument
    flag("--lr", type=float, metavar="X", help="learning rate at the schedule's peak (depends on --opt and the model)")
    flag("--weight-decay", "--wd", type=float, default=0.0, metavar="X", help="(depends on --opt and the model)")
    flag("--decay-all", action="store_true", help="decay biases, norms, tokens and positions too, not matrices alone")
    flag("--momentum", type=float, default=0.0, metavar="X", help="sgd, rmsprop (0.9 for sgd)")
    flag("--nesterov", action="store_true", help="sgd: Nesterov momentum")
    flag("--opt-betas", type=pair, default=(0.9, 0.999), metavar="B,B", help="the adam family (%(default)s)")


def pair(text):
    """argparse type: '0.9,0.95' -> (0.9, 0.95)."""
    first, second = (float(part) for part in text.split(","))
    return first, second


def parameter_groups(model, *, weight_decay, decay_all=False):
    """Two groups for an optimizer: what decays, matrices and filters alone unless decay_all, and what doesn't.

    Biases and norms are left out by their number of dimensions; a model names what else to spare in `no_weight_decay`.
    Frozen parameters are in neither.
    """
    spared = getattr(model, "no_weight_decay", ())
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = decay_all or (parameter.ndim >= 2 and name not in spared)
        groups.setdefault(decays, []).append(parameter)
    return [dict(params=params, weight_decay=weight_decay * decays) for decays, params in groups.items()]
