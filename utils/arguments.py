"""What a run is: the flags of train.py, their defaults, and which values are rejected.

    args, checkpoint = parse(["--model", "vit", "--opt", "sgd"])

Each flag is declared once, beside the code that reads it: a model's in its file, a schedule's in schedulers.py, and so
on; those of the run itself are here.
"""

import argparse
import difflib
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path

import augment
import data
import losses
import optimizers
import schedulers
from utils import checkpoints, distributed, errors
from utils.models import MODELS, read_init, rebuild

DATA_DIR = "data"
LONGEST_FILE = 100_000  # bytes of flags
MOST_WORDS = 10_000  # in all @files; a nested @file counts as 101, which ends files that name each other
# A resumed run may be prolonged and moved. Changing anything else would make the run irreproducible.
MAY_CHANGE = {
    "resume", "epochs", "patience", "device", "compile", "cuda_graph", "out", "data_dir", "log_interval", "save_every",
    "tensorboard",
}  # fmt: skip
# In these a finished run may differ from one that it stands for, in --runs and comparisons.
NO_MATTER = MAY_CHANGE - {"epochs", "patience"}


class Parser(argparse.ArgumentParser):
    """Strict, with errors in one line, and with @FILE: several flags a line, # begins a comment."""

    def __init__(self, program, **options):
        options |= {"usage": argparse.SUPPRESS, "allow_abbrev": False, "fromfile_prefix_chars": "@"}
        super().__init__(prog=program, **options)
        self.count = 0  # of words in @files
        self.hint = ""  # for unknown flags, if train.py's are known

    def convert_arg_line_to_args(self, line):
        words = self.checked(split_flags(line))
        self.count += len(words) + 100 * sum(word.startswith("@") for word in words)
        if self.count > MOST_WORDS:
            self.error(f"@files that name @files without end, or more than {MOST_WORDS:,} words: shorten them")
        return words

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(self.checked(args), namespace)

    def parse_known_intermixed_args(self, args=None, namespace=None):  # since Python 3.12.8 it doesn't call the above
        return super().parse_known_intermixed_args(self.checked(args), namespace)

    def checked(self, words):
        """The words, those of the command line for None. Rejects what argparse would misunderstand or wait for."""
        words = sys.argv[1:] if words is None else list(words)
        for i, word in enumerate(words):
            before = words[i - 1] if i and words[i - 1].startswith("-") else "a word"
            flag, equals, value = word.partition("=")
            if not word or (word.startswith("--") and equals and not value):  # "" or --flag=
                self.error(f'{flag or before} "" is empty: give a value, or leave it out')
            if word.startswith("--") and value == "--":  # it would make an empty list of it
                self.error(f"argument {flag}: -- is no value")
            path = word[1:]
            if word.startswith("@") and not (os.path.isfile(path) and os.path.getsize(path) <= LONGEST_FILE):
                self.error(f"{word} must be a file of flags, of at most {LONGEST_FILE:,} bytes")
        return words

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            message += self.remedy(message.removeprefix("unrecognized arguments: ").partition(" ")[0])
        super().error(errors.one_line(message))

    def remedy(self, word):
        """What may have been meant by an unknown word."""
        flag = word.partition("=")[0]
        others = [name for name in MODELS if flag in make_parser(name)._option_string_actions]
        if self.hint and others:
            return f": {flag} is a flag of --model {' and '.join(others)}"
        near = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.8)
        if word.endswith(".args") and not word.startswith("-"):
            near = [f"@{word}"]
        if near:
            return f": did you mean {near[0]}?"
        return f": {self.hint}" if self.hint else ""


# Matches a quoted or escaped part (group 1, kept), or a # after a blank and all that follows (dropped).
COMMENT = re.compile(r"""("(?:\\.|[^"\\])*"|'[^']*'|\\.)|(?<!\S)#.*""", re.DOTALL)


def split_flags(text: str) -> list[str]:
    """Flags as a shell splits them, # begins a comment. Raises ValueError for a quotation mark without its pair."""
    return shlex.split(COMMENT.sub(r"\1", text))


def typed() -> str:
    """What the user typed, as far as Python knows it."""
    return shlex.join(["python", *sys.argv])


def began(folder: Path, any_command=False) -> bool:
    """Was the run in a folder begun by this very command, or by any? The first line of its log tells."""
    log = folder / "log.txt"
    if not log.is_file():
        return False
    with open(log, encoding="utf-8", errors="replace") as file:
        wanted = "$ python " if any_command else f"$ {typed()}\n"
        return file.readline(len(wanted) + 1).startswith(wanted)


def ended(folder: Path) -> bool:
    """Does a folder hold the whole result of a run that wasn't interrupted?"""
    result = folder / "result.json"
    try:
        return result.is_file() and json.loads(result.read_text())["stopped"] != "interrupted"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def flag_name(name: str) -> str:
    """batch_size -> --batch-size"""
    return "--" + name.replace("_", "-")


def as_flags(message: str) -> str:
    """'batch_size 0 must be ...' -> '--batch-size 0 must be ...', for messages of files that know no command line."""
    name, space, rest = message.partition(" ")
    known = {action.dest for model in MODELS for action in make_parser(model)._actions}
    return f"{flag_name(name)}{space}{rest}" if name in known and rest else message


def make_parser(model, program="train.py"):
    parser = Parser(program, description=f"Train an image classifier. In brackets the defaults of --model {model}.")
    own_help = "" if program == "train.py" else f"{program} --help and "
    parser.hint = f"see {own_help}train.py --model {model} --help; quote names with spaces"
    flag = parser.add_argument_group("run").add_argument
    flag("--model", default="mlp", choices=MODELS, help="each has flags of its own: --model NAME --help (mlp)")
    flag("--epochs", type=float, metavar="N", help="length of the run, fractions allowed (%(default)s)")
    flag("--minutes", type=float, metavar="M", help="length of the run by the clock, in place of --epochs")
    flag("--batch-size", type=int, metavar="N", help="images per optimizer step (%(default)s)")
    flag("--accum", type=int, default=1, metavar="N", help="micro-batches per batch, to save memory (%(default)s)")
    flag("--seed", type=int, default=0, metavar="N", help="of weights, split, order and augmentation (%(default)s)")
    flag("--runs", type=int, default=1, metavar="N", help="repeat with the next seeds, report mean and deviation (1)")
    flag("--device", default="auto", help="cuda, mps or cpu; auto takes the first that is available")
    precision = "precision: auto is bf16 where native, fp16 on older GPUs, else off"
    flag("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"], help=precision)
    compiling = "torch.compile training's forward and backward: slower to start, often faster then (%(default)s)"
    flag("--compile", action=argparse.BooleanOptionalAction, default=False, help=compiling)
    recording = "record a step as one CUDA graph and replay it (on, where that is possible)"
    flag("--cuda-graph", action=argparse.BooleanOptionalAction, help=recording)
    flag("--out", metavar="DIR", help="output folder (runs/<model>-<data>-<opt>-<sched>)")
    flag("--log-interval", type=int, default=0, metavar="N", help="log the epoch's mean so far every N steps too (0)")
    flag("--save-every", type=int, default=0, metavar="N", help="write last.pt every N steps too (0: every epoch)")
    flag("--tensorboard", action="store_true", help="write TensorBoard events too")
    flag("--resume", metavar="FILE", help="go on with the run that wrote this last.pt")
    flag("--no-test", action="store_true", help="leave the test set closed")
    flag("--eval", metavar="FILE", help="print the test accuracy of this checkpoint and nothing else")
    flag("--init", metavar="FILE", help="start from the weights of a checkpoint, or from those of a vit_* of timm")
    frozen = "don't train these layers, such as blocks.0; repeatable"
    flag("--freeze", action="append", default=[], metavar="PREFIX", help=frozen)

    group = parser.add_argument_group("data")
    data.add_args(group)
    flag = group.add_argument
    flag("--val-split", type=float, default=0.1, metavar="X", help="held out: fraction or count (%(default)s)")
    flag("--limit", type=int, metavar="N", help="train on N images only")
    augment.add_args(group)
    flag("--mixup-off-epoch", type=int, default=0, metavar="N", help="stop mixing after N epochs; 0: never (0)")
    averaged = "validate and test with test-time augmentation: translated, flipped copies (%(default)s)"
    flag("--tta", action=argparse.BooleanOptionalAction, default=False, help=averaged)

    group = parser.add_argument_group("loss and stopping")
    losses.add_args(group)
    flag = group.add_argument
    flag("--monitor", default="val_acc", choices=["val_acc", "val_loss"], help="what picks the best epoch (val_acc)")
    flag("--patience", type=int, default=20, metavar="N", help="stop after N epochs without a best; 0: never (20)")
    flag("--min-delta", type=float, default=0.0, metavar="X", help="by how much a best must be better (%(default)s)")

    group = parser.add_argument_group("optimizer")
    flag = group.add_argument
    flag("--opt", choices=optimizers.OPTIMIZERS, help="(%(default)s)")
    flag("--clip-grad", type=float, metavar="X", help="largest norm of the gradient; 0: off (off; vit 1)")
    flag("--ema", type=float, default=0.0, metavar="D", help="validate averaged weights, decay as in 0.999; 0: off (0)")
    optimizers.add_args(group)
    group = parser.add_argument_group("schedule")
    group.add_argument("--sched", choices=schedulers.SCHEDULES, help="(%(default)s)")
    schedulers.add_args(group)
    watched = "plateau: what has to improve (as --monitor)"
    group.add_argument("--sched-monitor", choices=["val_acc", "val_loss"], help=watched)
    MODELS[model].add_args(parser.add_argument_group(f"--model {model}"))
    return parser


def parse(argv=None, program="train.py"):
    """The arguments of a run: what the user gave, else the model's RECIPE, else the optimizer's and common defaults.

    Returns them, with the set of those that the user gave as `given`, and the checkpoint to go on from, or None. Raises
    ValueError for what can be seen to be wrong in them.
    """
    first = Parser(program, add_help=False)  # these decide which flags there are, and their defaults
    for name in ("--model", "--resume", "--out", "--init"):
        first.add_argument(name)
    chosen = first.parse_known_args(argv)[0]
    if distributed.restarted() and chosen.out:  # by torchrun, after a failure
        out = Path(chosen.out)
        if distributed.on_main(lambda: began(out) and (out / "last.pt").exists() and not ended(out)):
            chosen.resume = str(out / "last.pt")
    checkpoint = None
    if chosen.resume:
        checkpoint = distributed.on_main(lambda: checkpoints.load(chosen.resume, keys=checkpoints.RESUME_KEYS))
    with checkpoints.blaming(chosen.resume):
        if checkpoint:
            model = rebuild(checkpoint, chosen.resume)  # rejects sizes that aren't those of its weights
            missing = model.model_args.keys() - checkpoint["model_args"].keys()
            if missing:  # args would decide these, whatever the weights are
                lacks = f"{chosen.resume} lacks {', '.join(sorted(missing))} in its model_args"
                raise ValueError(f"{lacks}: start a new run from its weights with --init")
        args = _parse(argv, program, chosen, checkpoint["args"] if checkpoint else None)
    return args, checkpoint


def _parse(argv, program, chosen, resumed):
    """The arguments, from the few parsed first (`chosen`) and those of the run to go on with (`resumed`, or None)."""
    model = chosen.model if resumed is None else resumed.get("model")
    if model not in MODELS:  # none given; or an unknown one, which the parser or check_resumed() rejects below
        model = "mlp"
    parser, recipe = make_parser(model, program), MODELS[model].RECIPE
    defaults = vars(parser.parse_args([]))
    parser.set_defaults(**recipe)  # so that --help shows them
    # Marks what wasn't given, by identity. A list, because action="append" copies this default and appends to the copy.
    unset = []
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in given.items() if value is not unset}

    if resumed is not None:
        if resumed.get("opt") == "lbfgs" and given.get("amp") == "auto":
            given["amp"] = "off"  # as in _with_defaults
        check_resumed(resumed, defaults, {action.dest: action for action in parser._actions})
        reject_another_run(resumed, given)
        # A checkpoint must not decide what is run, or where it writes.
        never_resumed = {"out": None, "runs": 1, "eval": None}
        args = argparse.Namespace(**resumed | never_resumed | given | {"resume": chosen.resume})
        if "epochs" in given:
            args.minutes = None
    else:
        args = _with_defaults(chosen, model, defaults, recipe, given)
    args.given = frozenset(given)
    if not args.eval:
        check(args)
    return args


def _with_defaults(chosen, model, defaults, recipe, given):
    """The arguments of a new run."""
    if chosen.init:
        model_args = read_init(chosen.init, model)["model_args"]
        recipe = recipe | {name: value for name, value in model_args.items() if name in defaults}
    opt = given.get("opt", recipe["opt"])
    if opt != recipe["opt"]:  # the recipe's lr, decay, momentum ... were chosen for its own optimizer
        tuned_for_opt = optimizers.options_of(recipe["opt"])
        recipe = {name: value for name, value in recipe.items() if name not in tuned_for_opt}
    args = argparse.Namespace(**defaults | optimizers.DEFAULTS[opt] | recipe | given)
    if opt == "rprop":  # it finds the size of its steps itself: a learning rate that changes does nothing
        args.sched = given.get("sched", "none")
        args.warmup_epochs = given.get("warmup_epochs", 0.0)
    if opt == "lbfgs":
        args.clip_grad = given.get("clip_grad")  # its line search needs the loss's own gradient
        args.amp = "off" if args.amp == "auto" else args.amp  # and all its digits
    args.warmup_epochs = warmup_within(args, given, args.epochs)
    return args


def warmup_within(args, given, epochs):
    """The epochs of warm-up: as given, or the recipe's, but at most a fifth of the run."""
    return args.warmup_epochs if "warmup_epochs" in given else min(args.warmup_epochs, epochs / 5)


def changed(args, **values):
    """A copy of arguments with other values."""
    return argparse.Namespace(**vars(args) | values)


def plain(args) -> dict:
    """Arguments as a checkpoint and result.json hold them."""
    return {name: value for name, value in vars(args).items() if name != "given"}


def check_resumed(resumed, defaults, actions):
    """Raise ValueError for a checkpoint's arguments that no run has."""
    if resumed.keys() != defaults.keys():
        odd = ", ".join(sorted(resumed.keys() ^ defaults.keys()))
        remedy = "start a new run from its weights with --init"
        raise ValueError(f"--resume holds a run of another version of train.py, which differs in {odd}: {remedy}")
    for name, default in defaults.items():
        value = resumed[name]
        if value is None and default is not None:
            raise ValueError(f"--resume holds no {flag_name(name)}")
        kind, choices = actions[name].type, actions[name].choices
        wanted = type(default) if default is not None else kind
        as_float = wanted is float and type(value) is int
        if value is not None and isinstance(wanted, type) and type(value) is not wanted and not as_float:
            raise ValueError(f"--resume holds {flag_name(name)} {value!r}, which is no {wanted.__name__}")
        if value is not None and choices and value not in choices:
            raise ValueError(f"--resume holds {flag_name(name)} {value!r}, which is none of {', '.join(choices)}")


def reject_another_run(resumed, given):
    """Raise ValueError for flags that would make the resumed run another run."""
    for name in given.keys() - MAY_CHANGE:
        if given[name] != resumed[name]:
            was = f"the one in --resume has {resumed[name]}: leave it out, or start a new run with --init"
            raise ValueError(f"{flag_name(name)} {given[name]} would make it another run, {was}")


# ---------------------------------------------------------------------------------------------- what is rejected


# Each range is a pair: the rule as the message states it, and the test.
def at_least(least):
    return f">= {least} and below 2^53", lambda x: least <= x < 2**53


FROM_0 = "a finite number >= 0", lambda x: 0 <= x < math.inf
ALPHA = "0, or from 0.01 to 1,000", lambda x: x == 0 or 0.01 <= x <= 1000  # see augment.mix
BELOW_1 = ">= 0 and < 1", lambda x: 0 <= x < 1
FLOAT32 = "above 1e-38 and below 1e38", lambda x: 1e-38 < x < 1e38  # what single precision can hold
RANGES = {
    "epochs": ("above 0 and at most 1e9", lambda x: 0 < x <= 1e9),
    "minutes": ("above 0 and at most 1e6", lambda x: 0 < x <= 1e6),
    "batch_size": ("from 1 to 1,000,000", lambda x: 1 <= x <= 1_000_000),
    "seed": (">= 0 and < 2^63", lambda x: 0 <= x < 2**63),
    "runs": at_least(1),
    "log_interval": at_least(0),
    "save_every": at_least(0),
    "img_size": ("from 1 to 1024", lambda x: 1 <= x <= 1024),
    "mean": ("between -1e6 and 1e6", lambda x: all(abs(value) < 1e6 for value in x)),
    "std": ("above 1e-6 and below 1e6", lambda x: all(1e-6 < value < 1e6 for value in x)),
    "val_split": ("0, a fraction below 1 or a count", lambda x: 0 <= x < math.inf and (x < 1 or x == int(x))),
    "limit": at_least(1),
    "crop_pad": at_least(0),
    "reprob": (">= 0 and <= 1", lambda x: 0 <= x <= 1),
    "mixup": ALPHA,
    "cutmix": ALPHA,
    "mixup_off_epoch": at_least(0),
    "distill": FLOAT32,
    "temperature": ("from 0.01 to 100", lambda x: 0.01 <= x <= 100),
    "ema": BELOW_1,
    "patience": at_least(0),
    "min_delta": FROM_0,
    "lr": FLOAT32,
    "weight_decay": ("from 0 to 1000", lambda x: 0 <= x <= 1000),
    "layer_decay": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "momentum": BELOW_1,
    "opt_betas": ("two numbers >= 0 and < 1", lambda x: all(0 <= b < 1 for b in x)),
    "clip_grad": FROM_0,
}


def check_ranges(args):
    """Raise ValueError for the first value out of its range. None, for a flag that was left out, is always allowed."""
    for name, (rule, holds) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not holds(value):
            raise ValueError(f"{flag_name(name)} {value} must be {rule}")
    if not 1 <= args.accum <= args.batch_size:
        raise ValueError(f"--accum {args.accum} must be >= 1 and <= --batch-size {args.batch_size}")


def reject_idle(args, names, where):
    """Raise ValueError if one of the names is among the flags that the user gave."""
    for name in sorted(args.given & set(names)):
        raise ValueError(f"{flag_name(name)} has no effect {where}: leave it out")


def check(args):
    """Reject values out of range, flags that would do nothing, and what doesn't go together."""
    check_ranges(args)
    for choice, known, options_of in (
        ("opt", optimizers.OPTIMIZERS, optimizers.options_of),
        ("sched", schedulers.SCHEDULES, schedulers.options_of),
    ):
        chosen = getattr(args, choice)
        others = set().union(*(options_of(name) for name in known)) - options_of(chosen)
        reject_idle(args, others, f"with --{choice} {chosen}")
    if not args.teacher:
        reject_idle(args, {"distill", "temperature"}, "without --teacher")
    if args.weight_decay == 0:
        reject_idle(args, {"decay_all"}, "without --weight-decay")
    if not args.mixup and not args.cutmix:
        reject_idle(args, {"mixup_off_epoch"}, "without --mixup or --cutmix")
    if args.val_split == 0:
        reject_idle(args, {"patience", "monitor", "min_delta"}, "with --val-split 0: nothing is monitored")
    if args.data in data.NAMES:
        reject_idle(args, {"img_size"}, f"with --data {args.data}: it's for folders of images")
    check_out(args.out, args.data_dir, args.data)
    if args.runs > 1 and args.no_test and args.val_split == 0:
        raise ValueError(f"--runs {args.runs} has no accuracies to average with --no-test and --val-split 0: drop one")
    if args.resume and not distributed.restarted():  # else parse() added --resume to the first command
        reject_idle(args, {"minutes", "runs"}, "with --resume")
    if {"epochs", "minutes"} <= args.given:
        raise ValueError(f"--minutes {args.minutes} and --epochs {args.epochs} are two lengths: leave one out")
    if args.minutes and args.compile and not args.resume:
        raise ValueError(f"--minutes {args.minutes} can't foresee how long --compile takes: give --epochs")
    processes = distributed.world_size()
    if processes > 1:
        reject_idle(args, {"runs", "minutes"}, f"in {processes} processes")
    losses.parse(args.loss, args.smoothing)
    if args.nesterov and args.momentum == 0:
        raise ValueError("--nesterov needs a --momentum above 0")
    if args.opt == "lbfgs":
        reject_idle(args, {"clip_grad"}, "with --opt lbfgs, which searches along a line by the loss")
        if args.amp == "fp16":
            raise ValueError("--opt lbfgs can't scale its gradients, as --amp fp16 must: use --amp off")
        if processes > 1:
            raise ValueError(f"--opt lbfgs can't search along a line in {processes} processes: start one")
    if args.sched != "plateau":
        reject_idle(args, {"sched_monitor"}, f"with --sched {args.sched}")
    elif args.val_split == 0:
        raise ValueError("--sched plateau needs a validation set: --val-split must be above 0")
    elif args.sched_monitor in (None, args.monitor) and 0 < args.patience <= args.patience_epochs + 1:
        rule = f"--patience {args.patience} must be at least 2 more than --patience-epochs {args.patience_epochs}"
        raise ValueError(f"{rule}: else the run stops before the lower learning rate is used")
    if not args.minutes or args.resume:
        check_lengths(args)


def check_out(out, data_dir, images):
    """Reject folders to write into that would harm the run or its images."""
    # A run locks the one, a download the other: it would wait for itself.
    if out and os.path.realpath(out) == os.path.realpath(data_dir):
        raise ValueError(f"--out {out} is --data-dir, too: name another folder")
    reject_among_images("--out", out or "runs", images)
    reject_among_images("--data-dir", data_dir, images)


def reject_among_images(flag, path, images):
    """Raise ValueError if a path lies in train or test of a folder of images: a plot would count as one of them."""
    real = Path(os.path.realpath(path))
    for part in (Path(images, "train"), Path(images, "test")):
        linked = [entry for entry in part.iterdir() if entry.is_symlink()] if part.is_dir() else []
        if any(real.is_relative_to(os.path.realpath(place)) for place in (part, *linked)):
            raise ValueError(f"{flag} {path} is among the images of {images}: name another place")


def check_lengths(args):
    """Reject lengths that can't take effect within the run."""
    schedule = make_schedule(args)  # raises too
    length = args.epochs - args.warmup_epochs
    beyond = {
        "step_size": args.step_size >= length,
        "milestones": args.milestones is not None and max(args.milestones) >= length,
        "t_max": args.sched == "cosine" and (args.t_max or 0) > length and schedule(args.epochs) > 0.999,
        "mixup_off_epoch": args.mixup_off_epoch >= args.epochs,
        "patience_epochs": args.patience_epochs >= length - 1,
        "patience": args.patience >= args.epochs,
    }
    for name, idle in beyond.items():
        if idle and name in args.given and not args.resume:
            value = getattr(args, name)
            text = ",".join(f"{x:g}" for x in value) if name == "milestones" else f"{value:g}"
            after = f", {args.warmup_epochs:g} of them warm-up" if args.warmup_epochs else ""
            raise ValueError(f"{flag_name(name)} {text} can't take effect in {args.epochs:g} epochs{after}: lower it")


def make_schedule(args):
    """schedulers.schedule with the arguments of a run."""
    options = {name: getattr(args, name) for name in schedulers.schedule.__kwdefaults__ if name != "mode"}
    mode = "min" if (args.sched_monitor or args.monitor) == "val_loss" else "max"
    return schedulers.schedule(args.sched, lr=args.lr, epochs=args.epochs, mode=mode, **options)
