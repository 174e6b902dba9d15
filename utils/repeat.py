"""--runs N: the same run with several seeds."""

import json
import os
import shlex
from pathlib import Path

from utils import arguments, build, checkpoints, errors, models, run_folder


def repeat(args, run_once) -> int:
    """--runs: one run for each seed, in folders of one folder, and mean and standard deviation of those that end well.

    Returns the exit status: 1 if a run diverged, 128 + n if signal n ended one.
    """
    name = build.load_data(args)[0].name  # not always args.data: it may have fallen back
    default = Path("runs") / f"{args.model}-{name}-{args.opt}-{args.sched}-x{args.runs}"
    unfinished = bool(args.out) and any(Path(args.out).glob("seed-*")) and not Path(args.out, "result.json").exists()
    results, failed = [], []
    with run_folder.open_folder(args.out, default, going_on=unfinished) as folder:
        try:
            for seed in range(args.seed, args.seed + args.runs):
                folder.check_not_moved()
                own = arguments.changed(args, seed=seed, runs=1, out=str(folder.path / f"seed-{seed}"))
                # On the first one's set. As if given, so that a seed without it fails, and doesn't fall back.
                if results:
                    own = arguments.changed(own, data=results[0]["args"]["data"], given=args.given | {"data"})
                result, status = run_seed(own, run_once)
                if status > 128:
                    out = shlex.quote(str(folder.path))
                    run_folder.print_line(f"interrupted: with --out {out} the same command goes on from here")
                    return status
                if status:
                    failed.append(seed)
                else:
                    results.append(result)
        finally:
            if not results and not failed:
                folder.remove_if_unused()
        if failed:
            folder.log(f"failed: the runs with seed {', '.join(map(str, failed))}; {len(results)} are left")
        if len(results) > 1:
            text, summary = run_folder.over_seeds(results)
            folder.log(text)
            summary["args"] = arguments.plain(args) | {"data": results[0]["args"]["data"]}
            summary["failed_seeds"] = failed
            summary |= {"command": arguments.typed(), "commit": run_folder.in_all(results, "commit")}
            folder.write_result(summary)
    return 1 if failed else 0


def run_seed(args, run_once):
    """One run of --runs. A finished one of the same arguments isn't run again, an interrupted one goes on."""
    folder = Path(args.out)
    checkpoint = result = None
    if (folder / "last.pt").exists():
        checkpoint = checkpoints.load(folder / "last.pt", keys=checkpoints.RESUME_KEYS)
    if (folder / "result.json").is_file():  # without a last.pt, too: of a run that diverged in its first epoch
        result = read_result(folder / "result.json")
    if checkpoint or result:
        saved = checkpoint["args"] if checkpoint else result["args"]
        check_same_run(args, saved, checkpoint or {})
    if result and result["stopped"] != "interrupted":
        dataset, _, _ = build.load_data(arguments.changed(args, data=result["args"]["data"]))
        if checkpoint and checkpoint["images"] != checkpoints.fingerprint(*dataset.train):
            raise ValueError(f"--out {folder.parent} holds runs on other images or labels: name another")
        run_folder.print_line(f"{folder} is finished")
        return result, errors.status_of(result["stopped"])
    if checkpoint:
        # The set may have been a fallback, and the lengths measured, for --minutes.
        before = {name: saved[name] for name in ("data", "epochs", "warmup_epochs")}
        args = arguments.changed(args, resume=str(folder / "last.pt"), **before)
    return run_once(args, checkpoint)


def check_same_run(args, saved, checkpoint):
    """Raise ValueError unless a seed's folder holds, with arguments `saved`, the run that is asked for."""
    held = f"--out {Path(args.out).parent} holds runs"
    wanted = arguments.plain(args)
    # Another model has other flags, too: of it the loop below names --model.
    if saved.get("model") == args.model and saved.keys() != wanted.keys():
        raise ValueError(f"{held} of another version of train.py: name another")
    may_differ = set(arguments.NO_MATTER)
    if args.minutes:  # they were measured
        may_differ |= {"epochs", "warmup_epochs"}
    if "data" not in args.given and saved["data"] == "shapes":  # it had fallen back
        may_differ.add("data")
    for name, value in wanted.items():
        if name not in may_differ and json.dumps(value) != json.dumps(saved.get(name)):  # in JSON tuples are lists
            raise ValueError(f"{held} with another {arguments.flag_name(name)}: name another")
    for name in ("init", "teacher"):
        path, known = wanted[name], checkpoint.get(name)  # a checksum; None in a file of an older version
        if path and known and os.path.exists(path):
            with checkpoints.blaming(path):
                now = models.fingerprint(checkpoints.load(path, keys={}))
            if now != known:
                raise ValueError(f"{held} from before {arguments.flag_name(name)} {path} changed: name another")


def read_result(path: Path) -> dict:
    """What a finished or interrupted seed has left. Raises ValueError for anything else."""
    try:
        result = json.loads(path.read_text())
        for name in (*run_folder.OF_ALL, *run_folder.OF_EACH, "train_pflops", "commit"):
            result[name]  # raises KeyError if it's missing
        result["args"]["data"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no result of a run ({type(error).__name__}: {error}): remove it") from None
    return result
