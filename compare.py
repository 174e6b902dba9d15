"""Which is better here? Train several variants with several seeds, and rank them by validation.

    python compare.py --model mlp --epochs 5 --vary opt=sgd,adam,adamw --vary lr=0.1,0.001 --runs 3 --out runs/opts
    python compare.py --case "adam: --opt adam --lr 3e-4" --case "adamw: --opt adamw --lr 1e-4" --out runs/adam
    python compare.py @lessons/warm-up.args

--vary makes a grid, --case names a variant; every other flag is one of train.py and holds for all. Each variant and
seed is an ordinary run in a folder under --out. The same command again goes on where it was: what is finished isn't
run again, what was interrupted is resumed. A run that fails is reported, and the others go on.

It ends with a table, compare.json, compare.md and compare.png. The test set stays closed for all but the winner, unless
--test all opens it for every variant: the best of many test accuracies is too good a number.
"""

import contextlib
import io
import itertools
import json
import math
import os
import re
import signal
import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, __file__.removesuffix("compare.py"))  # python -P leaves this folder out
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports below without a traceback

import plot
import train
from utils import arguments, checkpoints, errors, evaluation, models, repeat, run_folder
from utils.finetune import few

MOST_RUNS = 10_000
LONGEST_NAME = 200  # bytes, of a variant, which names a folder
TEST_NOTE = {
    "winner": "The test set was read for the winner by validation alone.",
    "all": "The test set was read for every variant: the best of these test accuracies is too good a number.",
    "none": "The test set was not read.",
}


def make_parser():
    parser = arguments.Parser(
        "compare.py",
        description="Train several variants with several seeds, and rank them by validation.",
        epilog="Every other flag is one of train.py, and holds for all variants.",
    )
    flag = parser.add_argument
    grid = 'a grid; on,off for a switch; where values have commas: "hidden=64;32,32"'
    flag("--vary", action="append", default=[], metavar="FLAG=A,B", help=grid)
    flag("--case", action="append", default=[], metavar='"NAME: FLAGS"', help="a variant by name; repeatable")
    flag("--runs", type=int, default=1, metavar="N", help="seeds of each variant (%(default)s)")
    flag("--seed", type=int, default=0, metavar="N", help="the first of them (%(default)s)")
    flag("--test", choices=TEST_NOTE, default="winner", help="for whom the test set is opened (%(default)s)")
    flag("--out", required=True, metavar="DIR", help="folder of the runs, the table and the plot")
    return parser


def variants_of(own):
    """The variants as name -> flags. Raises ValueError for what can't be understood."""
    variants = []  # (name, flags)
    actions = itertools.chain(*(arguments.make_parser(model)._actions for model in models.MODELS))
    switches = {flag for action in actions if action.nargs == 0 for flag in action.option_strings}
    varied = [values_of(text) for text in own.vary]  # a list of (name, value) for each flag
    grid = math.prod(map(len, varied)) if varied else 0
    count = own.runs * (grid + len(own.case))
    if count > MOST_RUNS:
        raise ValueError(f"--runs {own.runs} of these variants make {count:,} runs, more than {MOST_RUNS:,}: vary less")
    if len({values[0][0].replace("-", "_") for values in varied}) < len(varied):
        raise ValueError("two --vary of one flag: put all of its values into one")
    if varied:
        for chosen in itertools.product(*varied):
            words, flags = [], []
            for name, value in chosen:
                words.append(f"{name.replace('-', ' ')} {value}")
                flags += flags_of(name, value, switches)
            variants.append((", ".join(words), flags))
    for text in own.case:
        name, colon, flags = text.partition(":")
        if not colon or not name.strip():
            raise ValueError(f'--case {text} must be a name and its flags, as in --case "adam: --opt adam"')
        if not name.isprintable():
            raise ValueError(f"--case {name} must be a printable name")
        if folder_name(name).lower().startswith("compare."):
            raise ValueError(f"{name} is the name of a file of a comparison: choose another one")
        variants.append((name.strip(), arguments.split_flags(flags)))
    for name, _ in variants:
        if len(name.encode()) > LONGEST_NAME:
            rule = f"too long for the name of a variant, of at most {LONGEST_NAME} bytes"
            raise ValueError(f"{name} is {rule}: choose a shorter one, with --case")
    if len(variants) < 2:
        raise ValueError("there is nothing to compare: give --vary FLAG=A,B, or two or more --case")
    if len({folder_name(name).lower() for name, _ in variants}) < len(variants):
        raise ValueError("two variants would share a folder: their names must differ in more than case and punctuation")
    return dict(variants)


def values_of(text):
    """Split a --vary: lr=0.1,0.01 -> [(lr, 0.1), (lr, 0.01)]."""
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise ValueError(f'--vary {text} must be a flag and its values, as in --vary "lr=0.1,0.01"')
    return [(name, value.strip()) for value in values.split(";" if ";" in values else ",")]


def flags_of(name, value, switches):
    """lr, 0.1 -> --lr 0.1; for a switch, a flag without a value: flip, on -> --flip; flip, off -> --no-flip."""
    flag = arguments.flag_name(name)
    if flag in switches and value in ("on", "off"):
        return [flag if value == "on" else f"--no-{flag[2:]}"]
    return [flag, value]


def folder_name(name):
    return re.sub(r"(?:[^\w.+-]|_)+", "-", name).strip("-.") or "case"


def run_one(name, args):
    """One run, silent but for what goes wrong. Returns (result or None, exit status)."""
    result = None

    def work():
        nonlocal result
        found, status = repeat.run_seed(args, train.run_once)
        if not status:
            numbers = [found[key] for key in ("best_val_acc", "best_epoch", "train_seconds")]
            if not all(isinstance(number, (int, float)) for number in numbers):
                raise ValueError(f"{args.out} holds no result of a run: remove it")
            found["train_acc"] = plot.read(args.out)[-1]["train_acc"]
        result = found
        return status

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        status = errors.exit_status(f"compare.py: {name}", work, as_flags=arguments.as_flags)
    return result, status


def run_all(runs, check_not_moved):
    """Run all `runs`. Returns name -> results of those that didn't fail; a signal raises Interrupted."""
    results = {name: [] for name, _ in runs}
    spent = []  # seconds of those that weren't finished before
    own_set = None  # where no --data is given: the set that the first run has found, or fallen back to
    for done, (name, args) in enumerate(runs, start=1):
        check_not_moved()
        if own_set and "data" not in args.given:  # as if given: no later run may fall back
            args = arguments.changed(args, data=own_set, given=args.given | {"data"})
        start = time.perf_counter()
        finished_before = arguments.ended(Path(args.out))
        result, status = run_one(name, args)
        if status > 128:
            run_folder.print_line("interrupted: the same command goes on from here")
            raise errors.Interrupted(status - 128)
        seconds = time.perf_counter() - start
        if status:
            said = f"failed ({result['stopped']})" if result else "failed"
        else:
            # With --out, --data-dir and --device of now, for test() and draw(): folders may have moved since it ran.
            results[name].append(result | {"args": vars(args)})
            if not own_set and result["args"]["data"] != args.data:
                note = f"note: {args.data} wasn't available, the others train on {result['args']['data']}, too"
                run_folder.print_line(f"{note}: {args.out}/log.txt says why")
            own_set = own_set or result["args"]["data"]
            said = f"val acc {result['best_val_acc']:.4f}"
        took = "finished before" if finished_before and result else f"{seconds:.1f} s"
        line = f"{done}/{len(runs)}  {name}, seed {args.seed}: {said}, {took}"
        if not finished_before:
            spent.append(seconds)
        if spent:
            line += f", {run_folder.clock(statistics.fmean(spent) * (len(runs) - done))} left"
        run_folder.print_line(line)
    return results


def test(result):
    """The test accuracy of a finished run, from its best.pt."""
    args = result["args"]
    path = Path(args["out"], "best.pt")
    checkpoint = checkpoints.load(path)
    held = [checkpoint["metrics"].get(name) for name in ("epoch", "val_acc", "val_loss")]
    if held != [result[name] for name in ("best_epoch", "best_val_acc", "best_val_loss")]:
        raise ValueError(f"{path} is not the best epoch of its run: put its own back, or name another --out")
    data, amp = checkpoint["args"]["data"], checkpoint["args"]["amp"]
    _, _, acc = evaluation.test(checkpoint, path, data=data, amp=amp, data_dir=args["data_dir"], device=args["device"])
    return acc


def mean_and_std(values):
    """As (mean, standard deviation), the latter None for less than two."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def ranked(results, variants, count):
    """A row for each variant, of `count` runs each, the best by mean validation accuracy first."""
    rows = []
    for name, runs in results.items():
        row = {"name": name, "flags": variants[name], "n": len(runs), "failed": count - len(runs)}
        if runs:
            row["val_acc"], row["val_acc_std"] = mean_and_std([run["best_val_acc"] for run in runs])
            row["best_epoch"] = statistics.fmean(run["best_epoch"] for run in runs)
            row["seconds"] = statistics.fmean(run["train_seconds"] for run in runs)
            row["train_acc"] = statistics.fmean(run["train_acc"] for run in runs)
        rows.append(row)
    return sorted(rows, key=lambda row: -row.get("val_acc", -1.0))


def meaning(flags):
    """The arguments of a run that a finished one must share to count in its place."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            args = arguments.plain(arguments.parse(flags, "compare.py")[0])
    except (SystemExit, ValueError, OSError):  # they were right once
        return flags
    return {name: args[name] for name in args.keys() - arguments.NO_MATTER}


def reject_another(out, variants, flags, seeds):
    """Raise ValueError if a folder holds another comparison, or other files, that would be overwritten."""
    files = [out / name for name in ("compare.json", "compare.md", "compare.png")]  # in the order of writing
    there = [path for path in files if os.path.lexists(path)]
    if not there:
        return
    try:
        if not all(path.is_file() for path in there):  # reading a pipe would wait for ever
            raise ValueError
        content = json.loads(files[0].read_text())
        if not all(type(seed) is int for seed in content["seeds"]):
            raise ValueError
        before = {row["name"]: content["flags"] + row["flags"] for row in content["variants"] if row["n"]}
        lost = [name for name in before if name not in variants]
        kept = [name for name in before if name in variants]
        changed = [name for name in kept if meaning(flags + variants[name]) != meaning(before[name])]
        lost_seeds = set(content["seeds"]) - set(seeds) if before else set()
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        of = ", ".join(path.name for path in there)
        raise ValueError(f"{of} in --out {out} are no comparison's, and would be overwritten: name another") from None
    if lost:
        held = f"--out {out} holds a comparison with {few(map(str, lost))}"
        raise ValueError(f"{held}, which this one lacks: name another folder")
    if changed:
        raise ValueError(f"--out {out} holds a comparison with other flags for {few(changed)}: name another folder")
    if lost_seeds:
        held = f"--out {out} holds a comparison with seed {few(map(str, sorted(lost_seeds)))}"
        raise ValueError(f"{held}, which this one lacks: name another folder")


def percent(mean, std):
    return f"{100 * mean:.2f}" if std is None else f"{100 * mean:.2f} ± {100 * std:.2f}"


def table(rows):
    """The rows as Markdown."""
    lines = [
        "| variant | validation accuracy, % | n | training accuracy, % | best epoch | seconds | test accuracy, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name, failed = row["name"].replace("|", "\\|"), f", {row['failed']} failed" if row["failed"] else ""
        if not row["n"]:
            lines.append(f"| {name} | - | 0{failed} | - | - | - | - |")
            continue
        val = percent(row["val_acc"], row["val_acc_std"])
        tested = percent(row["test_acc"], row["test_acc_std"]) if "test_acc" in row else "-"
        best_epoch = f"{row['best_epoch']:.3g}" if row["best_epoch"] < 999 else f"{row['best_epoch']:.0f}"
        cells = [f"{100 * row['train_acc']:.2f}", best_epoch, f"{row['seconds']:.1f}", tested]
        lines.append(f"| {name} | {val} | {row['n']}{failed} | {' | '.join(cells)} |")
    return lines


def draw(rows, results, path):
    """Draw the curves of the best variants, as many as there are colours. Returns a line that says so, or why not."""
    names = [row["name"] for row in rows if row["n"]]
    if not names:
        return "no compare.png: no variant has a result"
    curves = {}
    try:
        for name in names[: len(plot.COLOURS)]:
            curves[name] = [row for result in results[name] for row in plot.read(result["args"]["out"])]
        best = {name: results[name][0]["best_epoch"] for name in curves if len(results[name]) == 1}
        plot.draw(curves, path, best)
    except ImportError:
        return "no compare.png: pip install matplotlib"
    except Exception as error:  # as of a run's curves: a plot is no reason to fail
        return f"no compare.png ({errors.one_line(error)[:200]})"
    if len(curves) < len(names):
        return f"compare.png shows the best {len(curves)} of {len(names)}."
    return "compare.png shows their curves."


def command(argv):
    own, rest = make_parser().parse_known_args(argv)
    if own.runs < 1:
        raise ValueError(f"--runs {own.runs} must be >= 1")
    variants, out = variants_of(own), Path(own.out)
    if os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"--out {out} is no folder: name another one")
    seeds = range(own.seed, own.seed + own.runs)
    runs = []  # (name, arguments)
    for name, flags in variants.items():  # all of them, before anything is run
        args, _ = arguments.parse([*rest, *flags], "compare.py")
        ours = {"seed", "runs", "out", "no_test", "eval", "resume"}
        arguments.reject_idle(args, ours, f"in variant {name}")
        arguments.check_out(own.out, args.data_dir, args.data)  # parse() sees no --out, check() below one within it
        if args.val_split == 0:
            raise ValueError(f"{name}: there is nothing to rank by with --val-split 0: hold some images out")
        for seed in seeds:
            folder = out / folder_name(name) / f"seed-{seed}"
            runs.append((name, arguments.changed(args, seed=seed, no_test=True, out=str(folder))))
            arguments.check(runs[-1][1])  # again, with the seed and the folder
    names = {args.data for _, args in runs}
    if len(names) > 1 and not all("data" in args.given for _, args in runs):
        raise ValueError(f"the variants train on different data, {' and '.join(sorted(names))}: give --data")

    with run_folder.locked(out) as folder:
        reject_another(out, variants, rest, seeds)
        results = run_all(runs, folder.check_not_moved)
        if not any(results.values()) and (out / "compare.json").exists():
            raise errors.Failed("no variant has a result: the table from before stays")
        rows = ranked(results, variants, own.runs)
        tested = test_some(rows, results, own.test)
        folder.check_not_moved()
        report(own, rest, out, rows, results)
    return 0 if tested and not any(row["failed"] for row in rows) else 1


def test_some(rows, results, which):
    """Add test accuracies to the rows of all variants, or of the winner, the first. Returns False if one failed."""
    worked = True
    for row in {"winner": rows[:1], "all": rows, "none": []}[which]:
        if row["n"]:
            try:
                row["test_acc"], row["test_acc_std"] = mean_and_std([test(result) for result in results[row["name"]]])
            except (ValueError, OSError, RuntimeError) as error:  # a best.pt or a set that isn't there any more, memory
                errors.complain("compare.py", error)
                worked = False
    return worked


def report(own, rest, out, rows, results):
    """Write and print what came out."""
    all_results = [result for runs in results.values() for result in runs]
    found = {name: run_folder.in_all(all_results, name) for name in ("data", "device", "amp", "torch", "commit")}
    content = {
        "command": arguments.typed(),
        "flags": rest,
        **found,
        "test": own.test,
        "seeds": list(range(own.seed, own.seed + own.runs)),
        "variants": rows,
    }
    checkpoints.write_json(content, out / "compare.json")
    tested = any("test_acc" in row for row in rows)
    lines = [*table(rows), "", TEST_NOTE[own.test if tested else "none"]]
    if tested and own.test == "winner" and len(rows) > 1 and rows[0]["val_acc"] == rows[1].get("val_acc"):
        lines.append(f"{rows[0]['name']} and {rows[1]['name']} validate alike: the one named first was tested.")
    if all_results:
        lines.append(f"Trained on {found['data']}; {found['device']}; {found['amp']}.")
    lines.append(draw(rows, results, out / "compare.png"))
    text = "\n".join([f"`{arguments.typed()}`", "", *lines]) + "\n"
    checkpoints.write(text.encode("utf-8", "backslashreplace"), out / "compare.md")
    run_folder.print_line("\n".join(["", *lines]))
    run_folder.print_line(f"wrote compare.json and compare.md to {out}")


def main(argv=None):
    return errors.exit_status("compare.py", lambda: command(argv), as_flags=arguments.as_flags)


if __name__ == "__main__":
    sys.exit(main())
