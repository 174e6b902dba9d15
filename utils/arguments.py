"""What a run is: the flags of train.py, their defaults, and what is refused.

    args, given, checkpoint = parse(["--model", "vit", "--opt", "sgd"])

Each flag is declared once, beside the code that reads it: a model's in its file, a schedule's in schedulers.py, and so
on; those of the run itself are here. To add a model, name its file and class in MODELS.
"""

import argparse
import contextlib
from pathlib import Path

import torch

import cnn_cifar10
import data as datasets
import losses
import mlp_mnist
import optimizers
import schedulers
import vit
from utils import checkpoints, devices, distributed, ranges
from utils.ranges import flag_name

MODELS = {"mlp": (mlp_mnist, mlp_mnist.MLP), "cnn": (cnn_cifar10, cnn_cifar10.CNN), "vit": (vit, vit.ViT)}
# A resumed run may be prolonged and moved. Anything else would make its figures those of no run at all.
DATA_DIR = "data"
MAY_CHANGE = {"resume", "epochs", "patience", "device", "compile", "out", "data_dir"}
MAY_CHANGE |= {"log_interval", "save_every", "tensorboard"}


def make_parser(model, program="train.py"):
    parser = argparse.ArgumentParser(
        prog=program,
        description=f"Train an image classifier. The defaults in brackets are those of --model {model}.",
        usage=argparse.SUPPRESS,  # an error is one line
        allow_abbrev=False,
    )
    flag = parser.add_argument_group("run").add_argument
    flag("--model", default="mlp", choices=MODELS, help="each has flags of its own: --model NAME --help (mlp)")
    flag("--epochs", type=float, metavar="N", help="length of the run, fractions allowed (%(default)s)")
    flag("--minutes", type=float, metavar="M", help="length of the run by the clock, in place of --epochs")
    flag("--batch-size", type=int, metavar="N", help="images per optimizer step (%(default)s)")
    flag("--accum", type=int, default=1, metavar="N", help="pass a batch in N pieces, to save memory (%(default)s)")
    flag("--seed", type=int, default=0, metavar="N", help="of weights, split, order and augmentation (%(default)s)")
    flag("--runs", type=int, default=1, metavar="N", help="repeat with the next seeds, report mean and deviation (1)")
    flag("--device", default="auto", help="cuda, mps or cpu; auto takes the first that is there")
    flag("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"], help="precision: auto is bf16 where native")
    compiling = "torch.compile the model: slower to start, often faster then (%(default)s)"
    flag("--compile", action=argparse.BooleanOptionalAction, default=False, help=compiling)
    flag("--out", metavar="DIR", help="output folder (runs/<model>-<data>-<opt>-<sched>)")
    flag("--log-interval", type=int, default=0, metavar="N", help="report every N steps too (0: every epoch)")
    flag("--save-every", type=int, default=0, metavar="N", help="write last.pt every N steps too (0: every epoch)")
    flag("--tensorboard", action="store_true", help="write TensorBoard events too")
    flag("--resume", metavar="FILE", help="go on with the run that wrote this last.pt")
    flag("--eval", metavar="FILE", help="print the test accuracy of this checkpoint and nothing else")
    flag("--init", metavar="FILE", help="start from the weights of a checkpoint, or from those of a vit_* of timm")
    flag("--freeze", action="append", default=[], metavar="PREFIX", help="don't train these weights; repeatable")

    group = parser.add_argument_group("data")
    datasets.add_args(group)
    flag = group.add_argument
    flag("--mixup-off-epoch", type=int, default=0, metavar="N", help="stop mixing after N epochs; 0: never (0)")
    flag("--val-split", type=float, default=0.1, metavar="X", help="held out: fraction or count (%(default)s)")
    flag("--limit", type=int, metavar="N", help="train on N images only")
    flag("--tta", action="store_true", help="validate and test with the mean over shifted (and mirrored) views")

    group = parser.add_argument_group("loss and stopping")
    losses.add_args(group)
    flag = group.add_argument
    flag("--monitor", default="val_acc", choices=["val_acc", "val_loss"], help="what picks the best epoch (val_acc)")
    flag("--patience", type=int, default=20, metavar="N", help="stop after N epochs without a best; 0: never (20)")
    flag("--min-delta", type=float, default=0.0, metavar="X", help="by how much a best must be better (%(default)s)")

    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", choices=optimizers.OPTIMIZERS, help="(%(default)s)")
    group.add_argument("--clip-grad", type=float, metavar="X", help="largest norm of the gradient (%(default)s)")
    group.add_argument(
        "--ema", type=float, default=0.0, metavar="D", help="judge averaged weights, as of 0.999; 0: off"
    )
    optimizers.add_args(group)
    group = parser.add_argument_group("schedule")
    group.add_argument("--sched", choices=schedulers.SCHEDULES, help="(%(default)s)")
    schedulers.add_args(group)
    MODELS[model][0].add_args(parser.add_argument_group(f"--model {model}"))
    return parser


def parse(argv=None, program="train.py"):
    """The arguments of a run: what the user gave, else the model's RECIPE, else the optimizer's and common defaults.

    Returns them, as a dict those that the user gave, and the checkpoint to go on from or None. Raises ValueError for
    what can be seen to be wrong in them.
    """
    first = argparse.ArgumentParser(prog=program, usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    for name in ("--model", "--resume", "--out", "--init"):
        first.add_argument(name)
    chosen = first.parse_known_args(argv)[0]
    if distributed.restarted() and chosen.out and not chosen.resume:
        last = Path(chosen.out) / "last.pt"  # torchrun has started the run anew after a failure
        chosen.resume = str(last) if distributed.once(last.exists) else None
    checkpoint = None
    if chosen.resume:
        checkpoint = distributed.once(lambda: checkpoints.load(chosen.resume, keys=checkpoints.RESUME_KEYS))
    with blame(chosen.resume):
        return *_parse(argv, program, chosen, checkpoint), checkpoint


def _parse(argv, program, chosen, checkpoint):
    """What parse() gives, save the checkpoint, which it has loaded."""
    resumed = checkpoint["args"] if checkpoint else {}
    model = resumed.get("model", chosen.model)
    model = model if model in MODELS else "mlp"  # the parser refuses what isn't

    parser, recipe = make_parser(model, program), MODELS[model][0].RECIPE
    defaults = vars(parser.parse_args([]))
    parser.set_defaults(**recipe)  # so that --help shows them
    unset = []  # an action that appends starts with a copy of it
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in given.items() if value is not unset}

    if checkpoint:
        refuse_another_run(resumed, given, defaults)
        # What is started and where it writes is never a checkpoint's to say.
        ours = dict(out=None, runs=1, eval=None, resume=chosen.resume)
        args = argparse.Namespace(**resumed | ours | given | dict(resume=chosen.resume))
        args.minutes = None if "epochs" in given else args.minutes
    else:
        if chosen.init:
            keywords = read_init(chosen.init, model)["model_args"]
            recipe = recipe | {name: value for name, value in keywords.items() if name in defaults}
        opt = given.get("opt", recipe["opt"])
        if opt != recipe["opt"]:  # the recipe's rate, decay, momentum ... were chosen for its own optimizer
            recipe = {k: v for k, v in recipe.items() if k not in optimizers.options_of(recipe["opt"])}
        args = argparse.Namespace(**defaults | optimizers.DEFAULTS[opt] | recipe | given)
        if opt == "rprop":  # it finds the size of its steps itself: a rate that changes does nothing
            args.sched, args.warmup_epochs = given.get("sched", "none"), given.get("warmup_epochs", 0.0)
        if opt == "lbfgs" and args.amp == "auto":  # its line search needs the digits
            args.amp = "off"
        shorten_warmup(args, given)
    if not args.eval:
        check(args, given)
    return args, given


@contextlib.contextmanager
def blame(path):
    """What goes wrong in this context is the fault of a checkpoint's content, if one is named: raises ValueError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        if path is None or devices.is_out_of_memory(error):
            raise
        raise ValueError(f"{path} holds what no run leaves there: {type(error).__name__}: {error}") from None


def shorten_warmup(args, given):
    """A recipe's warm-up takes at most a fifth of the run."""
    if "warmup_epochs" not in given:
        args.warmup_epochs = min(args.warmup_epochs, args.epochs / 5)


def refuse_another_run(resumed, given, defaults):
    if resumed.keys() != defaults.keys():
        odd = ", ".join(sorted(resumed.keys() ^ defaults.keys()))
        raise ValueError(f"--resume holds a run of another version of train.py: they differ in {odd}")
    for name, default in defaults.items():
        kinds = (type(default), type(resumed[name]))
        if default is not None and len({*kinds}) > 1 and kinds != (float, int):
            raise ValueError(
                f"--resume holds {flag_name(name)} {resumed[name]!r}, which is no {type(default).__name__}"
            )
    for name in given.keys() - MAY_CHANGE:
        if given[name] != resumed[name]:
            was = f"the one in --resume has {resumed[name]}"
            raise ValueError(f"{flag_name(name)} {given[name]} would make it another run: {was}")


def check(args, given):
    """Refuse values out of range, flags that would do nothing, and what doesn't go together."""
    ranges.check(args)
    for choice, known, options_of in (
        ("opt", optimizers.OPTIMIZERS, optimizers.options_of),
        ("sched", schedulers.SCHEDULES, schedulers.options_of),
    ):
        chosen = getattr(args, choice)
        others = set().union(*map(options_of, known)) - options_of(chosen)
        ranges.refuse_idle(given, others, f"with --{choice} {chosen}")
    if not args.teacher:
        ranges.refuse_idle(given, {"distill", "temperature"}, "without --teacher")
    if not args.mixup and not args.cutmix:
        ranges.refuse_idle(given, {"mixup_off_epoch"}, "without --mixup or --cutmix")
    if args.val_split == 0:
        ranges.refuse_idle(given, {"patience", "monitor", "min_delta"}, "with --val-split 0: nothing is monitored")
    if args.resume and not distributed.restarted():
        ranges.refuse_idle(given, {"minutes", "runs"}, "with --resume")
    if "epochs" in given and "minutes" in given:
        raise ValueError(f"--minutes {args.minutes} and --epochs {args.epochs} are two lengths: leave one out")
    if args.minutes and args.compile and not args.resume:
        raise ValueError(f"--minutes {args.minutes} can't foresee how long --compile takes: give --epochs")
    if distributed.count() > 1:
        ranges.refuse_idle(given, {"runs", "minutes"}, f"in {distributed.count()} processes")
    losses.parse(args.loss)
    if args.nesterov and args.momentum == 0:
        raise ValueError("--nesterov needs a --momentum above 0")
    if args.opt == "lbfgs" and args.amp == "fp16":
        raise ValueError("--opt lbfgs can't scale its gradients, as --amp fp16 must: use --amp off")
    if args.opt == "lbfgs" and distributed.count() > 1:
        raise ValueError(f"--opt lbfgs can't search along a line in {distributed.count()} processes: start one")
    if args.sched == "plateau" and args.val_split == 0:
        raise ValueError("--sched plateau needs a validation set: --val-split must be above 0")
    if args.sched == "plateau" and 0 < args.patience <= args.patience_epochs:
        raise ValueError(
            f"--patience {args.patience} must be larger than --patience-epochs {args.patience_epochs}: "
            "else the run stops before the rate can drop"
        )
    if not args.minutes or args.resume:
        make_schedule(args)  # raises too


def make_schedule(args):
    options = {name: getattr(args, name) for name in schedulers.schedule.__kwdefaults__ if name != "mode"}
    mode = "min" if args.monitor == "val_loss" else "max"
    return schedulers.schedule(args.sched, lr=args.lr, epochs=args.epochs, mode=mode, **options)


def read_init(path, model):
    """What --init starts from, with keys model_args, state_dict and classes: a checkpoint, or a vit_* of timm."""
    content = checkpoints.load(path, keys={})
    if content.keys() >= checkpoints.KEYS.keys():
        content = checkpoints.load(path)  # all of it is looked at
        if content["model"] != model:
            raise ValueError(f"--init {path} holds a {content['model']}, not a {model}: use --model {content['model']}")
        return content
    if model != "vit":
        raise ValueError(f"--init {path} is not a checkpoint of train.py; weights of timm need --model vit")
    try:
        keywords, state = vit.from_timm(content)
    except ValueError as error:
        raise ValueError(f"--init {path} is not a checkpoint of train.py, and {error}") from None
    return dict(model_args=keywords, state_dict=state, classes=None)


def rebuild(checkpoint):
    """The trained model of a checkpoint, on the CPU. Raises ValueError if it can't be."""
    if checkpoint["model"] not in MODELS:
        raise ValueError(f"the checkpoint's model {checkpoint['model']!r} is not known; known are {', '.join(MODELS)}")
    try:
        with torch.device("meta"):  # takes no memory, however large the sizes that the file claims
            model = MODELS[checkpoint["model"]][1](**checkpoint["model_args"])
        model.load_state_dict(checkpoint["state_dict"], assign=True)
    except (TypeError, RuntimeError, ValueError) as error:
        why = str(error)[:200]
        raise ValueError(f"the checkpoint's weights don't fit its model {checkpoint['model']}: {why}") from None
    return model
