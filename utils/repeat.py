"""--runs N: the same run with several seeds."""

import json
from pathlib import Path

from utils import arguments, build, checkpoints, errors, run_folder


def repeat(args, run_once) -> int:
    """--runs: one run for each seed, in folders of one folder, and their mean and standard deviation."""
    dataset, _, _ = build.load_data(args)
    default = Path("runs") / f"{args.model}-{dataset.name}-{args.opt}-{args.sched}-x{args.runs}"
    unfinished = args.out and next(Path(args.out).glob("seed-*"), None) and not Path(args.out, "result.json").exists()
    results, status = [], 0
    with run_folder.open_folder(args.out, default, going_on=unfinished) as folder:
        try:
            for seed in range(args.seed, args.seed + args.runs):
                own = arguments.changed(args, seed=seed, runs=1, out=str(folder.path / f"seed-{seed}"))
                result, status = run_seed(own, run_once)
                if status:
                    break
                results.append(result)
        finally:
            if not results:
                folder.remove_if_unused()
        if len(results) > 1 and status < 128:  # else the same command goes on from here
            text, summary = run_folder.over_seeds(results)
            folder.log(text)
            same = {"args": arguments.plain(args) | {"data": results[0]["args"]["data"]}}
            origin = {"command": run_folder.command(), "commit": run_folder.commit()}
            folder.write_result(summary | same | origin)
    return status


def run_seed(args, run_once):
    """One run of --runs. A finished one of the same arguments isn't run again, an interrupted one goes on."""
    folder = Path(args.out)
    if not folder.exists():
        return run_once(args)
    checkpoint = None
    if (folder / "last.pt").exists():
        checkpoint = checkpoints.load(folder / "last.pt", keys=checkpoints.RESUME_KEYS)
        saved = checkpoint["args"]
        resumable = arguments.MAY_CHANGE - {"epochs"} | {"data"}
        if args.minutes:  # they were measured
            resumable |= {"epochs", "warmup_epochs"}
        odd = [k for k, v in arguments.plain(args).items() if k not in resumable and saved.get(k) != v]
        if odd:
            raise ValueError(
                f"--out {folder.parent} holds runs with another {arguments.flag_name(odd[0])}: name another"
            )
        args = arguments.changed(args, resume=str(folder / "last.pt"), out=None, data=saved["data"])
        if (folder / "result.json").exists():
            result = json.loads((folder / "result.json").read_text())
            if result["stopped"] != "interrupted":
                print(f"{folder} is finished")
                return result, errors.STATUS_OF.get(result["stopped"], 0)
    return run_once(args, checkpoint)
