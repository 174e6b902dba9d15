"""What a run saves in best.pt and last.pt, how it goes on from there, and how its folder and its log begin."""

import os
from pathlib import Path

import augment
from utils import arguments, checkpoints, devices, distributed, models, run_folder


def best_content(run, progress) -> dict:
    """What best.pt holds: enough to build the model again and to predict with it."""
    _, channels, image_size, _ = run.dataset.train.images.shape
    return {
        "model": run.args.model,
        "model_args": run.model.model_args,
        "state_dict": run.eval_model.state_dict(),
        "classes": run.dataset.classes,
        "image_size": image_size,
        "channels": channels,
        "mean": run.dataset.mean,
        "std": run.dataset.std,
        "epoch": len(progress.history),
        "metrics": progress.history[-1] if progress.history else {},
        "images": run.fingerprint,
        "args": arguments.plain(run.args),
    }


def last_content(run, progress) -> dict:
    """What last.pt holds: best.pt's content for the latest step, and all that a bitwise identical resume needs.

    Call it in all processes: it gathers from them.
    """
    # With --ema, state_dict has the averaged weights, and this the trained ones.
    ema = {"trained": run.model.state_dict(), "updates": run.ema.updates} if run.ema else {}
    return {
        **best_content(run, progress),
        "step": progress.step,
        "history": progress.history,
        "seconds": progress.seconds,
        "totals": distributed.all_reduce(progress.totals),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "ema": ema,
        "rng": distributed.all_gather(devices.rng_state(run.device)),
        "teacher": run.teacher.fingerprint if run.teacher else 0,
        "init": progress.init,
    }


def load_best(folder, best: dict) -> dict:
    """The content of a folder's best.pt. Raises ValueError if it isn't that of the history's row `best`.

    Call it in process 0: the seconds of the others differ.
    """
    path = folder / "best.pt"
    content = checkpoints.load(path)
    if str(content["metrics"]) != str(best):  # as text: NaN isn't equal to itself
        raise ValueError(f"{path} was replaced: it isn't the best epoch of this run")
    return content


def restore(run, progress, checkpoint: dict):
    """Put everything back as last.pt holds it. Raises ValueError if it doesn't fit."""
    dataset = run.dataset
    processes = len(checkpoint["rng"])  # of the saved run
    try:
        # Is it this model, are these its images?
        if (checkpoint["model"], checkpoint["model_args"]) != (run.args.model, run.model.model_args):
            raise ValueError(f"it holds a {checkpoint['model']} of {checkpoint['model_args']}")
        models.check_same_kind(checkpoint, "it", dataset.classes, dataset.train.images)
        if (checkpoint["mean"], checkpoint["std"]) != (dataset.mean, dataset.std):
            raise ValueError(f"its images had mean {checkpoint['mean']} and std {checkpoint['std']}")
        if checkpoint["images"] != run.fingerprint:
            raise ValueError("the training images or labels are not those that it was trained on")
        if run.teacher and checkpoint.get("teacher") != run.teacher.fingerprint:
            raise ValueError(f"--teacher {run.args.teacher} is not the model that it was taught by")
        # Do its steps mean the same here?
        least = run.least_per_batch(processes)
        if len(augment.bounds(len(run.train_set.labels), run.args.batch_size, least)) != run.steps_per_epoch:
            raise ValueError(f"with {processes} processes its epochs had other batches: start as many")
        validated = checkpoint["history"][-1]["step"] if checkpoint["history"] else 0
        step, total = checkpoint["step"], run.total_steps
        # At the last step training is over: what came after the history's last row would never be validated.
        if step > total or step == total > validated:
            raise ValueError(f"--epochs {run.args.epochs:g} end by step {total}, and it stopped at step {step}")
        # Load its states.
        if run.ema:
            run.ema.load_state_dict({"model": checkpoint["state_dict"], "updates": checkpoint["ema"]["updates"]})
        run.model.load_state_dict(checkpoint["ema"]["trained"] if run.ema else checkpoint["state_dict"])
        fp16 = bool(checkpoint["scaler"])  # then all steps so far may have been skipped, and there is no state yet
        saved = checkpoints.optimizer_state(run.optimizer, checkpoint["optimizer"], may_be_empty=fp16)
        run.optimizer.load_state_dict(saved)
        for state in run.optimizer.state.values():
            if "mu_product" in state:  # NAdam reads this number in every step: on a GPU each read would wait
                state["mu_product"] = state["mu_product"].cpu()
        if fp16:  # else there is nothing to load: a run in bf16 may go on in fp16, on a device without bf16
            run.scaler.load_state_dict(checkpoint["scaler"])
        if distributed.rank() < processes:  # else there is none for this one: its dropout starts afresh
            devices.restore_rng(checkpoint["rng"][distributed.rank()], run.device)
    except ValueError as error:
        raise ValueError(f"--resume can't go on with this file and these images: {str(error)[:200]}") from None
    if distributed.rank() == 0:  # the saved totals are sums over all processes
        progress.totals.copy_(checkpoint["totals"])
    progress.init = checkpoint.get("init")
    progress.step = checkpoint["step"]
    progress.history = checkpoint["history"]
    progress.seconds = checkpoint["seconds"]


def folder_of_run(run, progress, best: dict | None) -> run_folder.RunFolder:
    """Open the run's folder. A resumed run goes on in the folder of its last.pt, or moves to --out.

    `best` is the history's row of the best epoch so far. Raises ValueError if its best.pt is missing, and if files of
    another run would be overwritten.
    """
    args, history = run.args, progress.history
    default = Path("runs") / f"{args.model}-{run.dataset.name}-{args.opt}-{args.sched}"
    if not args.resume:
        return run_folder.open_folder(args.out, default)
    old_folder = Path(args.resume).parent
    moved = args.out is not None and os.path.realpath(args.out) != os.path.realpath(old_folder)
    # last.pt has the weights of progress.step: those of an earlier best epoch are in best.pt alone.
    needs_best_pt = best is not None and best["step"] < progress.step

    def load_old_best():
        """Load best.pt if the run needs it, or would overwrite it here; None if neither."""
        last, path = old_folder / "last.pt", old_folder / "best.pt"
        if not moved and not (last.exists() and last.samefile(args.resume)):
            raise ValueError(f"--resume {args.resume} is not the last.pt of its folder: name a folder for it, --out")
        if not needs_best_pt and (moved or not path.exists()):
            return None
        remedy = "put its own back" if needs_best_pt else "remove it, or name another folder, --out"
        try:
            content = checkpoints.load(path)
        except ValueError as error:
            raise ValueError(f"{error}: {remedy}") from None
        # Compared as text, since NaN isn't equal to itself: with --val-split 0 nothing is validated.
        rows = map(str, [best] if needs_best_pt else history)
        if str(content["metrics"]) not in rows or content["model_args"] != run.model.model_args:
            raise ValueError(f"{path} is not the best epoch of --resume {args.resume}: {remedy}")
        return content

    old_best = distributed.on_main(load_old_best)
    folder = run_folder.open_folder(args.out if moved else old_folder, default, going_on=not moved)
    try:
        if history:  # the run may have been killed after it saved last.pt, before it wrote these
            folder.write_metrics(history)
            if best and not needs_best_pt:
                folder.save("best.pt", best_content(run, progress))
            elif old_best and moved:  # it's needed, and not in the new folder
                folder.save("best.pt", old_best)
        if moved:  # so that a restart finds all that it needs in the new folder
            folder.save("last.pt", last_content(run, progress))
    except BaseException:
        if moved:
            folder.discard("metrics.csv", "best.pt", "last.pt")
        raise
    return folder


def log_beginning(run, folder, history: list, checkpoint: dict | None):
    """Log what the run is, where a resumed one goes on and which flags have changed, and the folder."""
    args = run.args
    for line in run_folder.describe(run):
        folder.log(line)
    if checkpoint:
        line = f"going on after step {checkpoint['step']:,} of {args.resume}"
        for name, old in checkpoint["args"].items():
            new = getattr(args, name)
            if name in args.given and name != "resume" and new != old:
                shown = f"{new:.10g}" if isinstance(new, float) else new
                line += f", {arguments.flag_name(name)} {str(old)[:100]} -> {shown}"
        folder.log(line)
    if run.steps_per_epoch == 1 and not checkpoint and "batch_size" not in args.given:
        folder.log(f"note: an epoch is one step of all images: lower --batch-size, now {args.batch_size}")
    folder.log(f"writing to {folder.path}")
    if args.tensorboard:
        folder.open_events(history)
