"""Run the comparisons of COMPARISONS.md and write their figures to results/<set>.json.

    python results/compare.py optimizers-mnist --data-dir data
    python results/compare.py --table optimizers-mnist             # as it shows them

Each row is a command of train.py that you can run alone.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

ARTICLE = (
    "--hidden 256,128,64 --no-batch-norm --batch-size 64 --warmup-epochs 0 --smoothing 0 --crop-pad 0 --sched none"
)
MNIST = f"--model mlp --data mnist {ARTICLE} --epochs 5"
PLAIN = "--model cnn --arch plain --data {jpeg} --batch-size 64 --smoothing 0 --crop-pad 0 --no-flip --limit 10000"
PLAIN = f"{PLAIN} --sched none --epochs 5"
# Each optimizer at a rate that is usual for it (momentum is 0.9 for sgd), and all at a common one.
RATES = dict(sgd=0.02, adam=1e-3, adamw=1e-3, nadam=1e-3, radam=1e-3, rmsprop=3e-4, adagrad=0.01, adadelta=1.0)
RATES |= dict(rprop=1e-4, lbfgs=0.1, muon=2e-3)
OWN = {name: f"--opt {name} --lr {rate}" for name, rate in RATES.items()}
COMMON = {f"{name} at 0.001": f"--opt {name} --lr 0.001" for name in RATES}
FAST = {name: flags for name, flags in COMMON.items() if "lbfgs" not in name}  # it takes ten times as long
ARTICLES = {
    "sgd 0.01, no momentum": "--opt sgd --lr 0.01 --momentum 0", "adam 0.01": "--opt adam --lr 0.01",
    "adam 3e-4": "--opt adam --lr 3e-4", "adamw 1e-4, decay 1e-4": "--opt adamw --lr 1e-4 --weight-decay 1e-4",
    "adam 0.001, decay 0.05": "--opt adam --lr 0.001 --weight-decay 0.05",
}  # fmt: skip
SCHEDULES = {
    "none": "", "step": "--sched step --step-size 2 --gamma 0.3", "multistep": "--sched multistep --milestones 3,5",
    "exp": "--sched exp --gamma 0.6", "cosine": "--sched cosine", "restarts": "--sched restarts --t-0 2 --t-mult 2",
    "plateau": "--sched plateau --patience-epochs 0", "linear": "--sched linear", "onecycle": "--sched onecycle",
    "warm-up 1, cosine": "--sched cosine --warmup-epochs 1",
}  # fmt: skip
TRICKS = {
    "recipe": "", "without label smoothing": "--smoothing 0", "without shifts": "--crop-pad 0",
    "without flips": "--no-flip",
    "--augment strong": "--augment strong", "--reprob 0.25": "--reprob 0.25", "--mixup 0.2": "--mixup 0.2",
    "--cutmix 1": "--cutmix 1", "--ema 0.99": "--ema 0.99", "--tta": "--tta", "--layer-decay 0.7": "--layer-decay 0.7",
    "--lr-scale head=3": "--lr-scale head=3", "--loss ce+0.5*cosine": "--loss ce+0.5*cosine",
    "--loss mse": "--loss mse",     "--clip-grad 1": "--clip-grad 1", "--decay-all": "--decay-all",
}  # fmt: skip
FEW = ("recipe", "without label smoothing", "without shifts", "without flips", "--augment strong", "--reprob 0.25")
FEW = {name: TRICKS[name] for name in (*FEW, "--mixup 0.2", "--cutmix 1", "--ema 0.99", "--tta")}
NO_FLIPS = {name: flags for name, flags in TRICKS.items() if name != "without flips"}
SETS = {
    "optimizers-mnist": (MNIST, OWN | COMMON | ARTICLES),
    "optimizers-cifar10": (PLAIN, OWN | FAST | ARTICLES),
    "schedules-mnist": (f"{MNIST} --opt sgd --lr 0.1", SCHEDULES),
    "schedules-cifar10": (f"{PLAIN} --opt sgd --lr 0.02", SCHEDULES),
    "tricks-mnist": ("--model mlp --data mnist --epochs 3 --runs 3", NO_FLIPS),
    "tricks-cifar10": ("--model cnn --data {jpeg} --limit 4000 --epochs 3 --runs 3", FEW),
}


def run(name, data_dir, only):
    import train

    common, rows = SETS[name]
    common = common.replace("{jpeg}", str(Path(data_dir, "cifar10-images")))
    path, found = HERE / f"{name}.json", {}
    for row, flags in rows.items():
        if only and row not in only:
            continue
        out = Path("runs", "compare", name, row.replace(" ", "_"))
        shutil.rmtree(out, ignore_errors=True)
        argv = [*common.split(), *flags.split(), "--data-dir", data_dir, "--patience", "0"]
        status = train.main([*argv, "--out", str(out)])
        result = json.loads((out / "result.json").read_text())
        keys = ("test_acc", "test_acc_std", "n", "best_val_acc", "stopped", "train_seconds", "device", "torch", "amp")
        found[row] = dict(command=" ".join(["python train.py", *argv]), status=status)
        found[row] |= {key: result[key] for key in (*keys, "commit") if key in result}
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(old | found, indent=1) + "\n")


def table(name):
    """The rows of a set as lines of a table."""
    for row, result in json.loads((HERE / f"{name}.json").read_text()).items():
        acc = "-" if result["test_acc"] is None else f"{100 * result['test_acc']:.2f}"
        spread = f" ± {100 * result['test_acc_std']:.2f}" if "n" in result else ""
        yield f"| {row} | {acc}{spread} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--data-dir", default="data", help="holds MNIST and cifar10-images (%(default)s)")
    parser.add_argument("--only", action="append", metavar="ROW", help="this row alone; repeatable: --only=--tta")
    parser.add_argument("--table", action="store_true", help="print the figures that are there")
    args = parser.parse_args()
    if args.table:
        return print("\n".join(table(args.set)))
    run(args.set, args.data_dir, args.only)


if __name__ == "__main__":
    main()
