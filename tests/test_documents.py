"""Every number on a page is that of a file that a run wrote, and every command on a page is one that exists."""

import json
import re
import shutil
import types
from pathlib import Path

import pytest
import torch
from conftest import HERE, TINY, TINY_MLP, call, count, one_line, weights, write_folder

import bench
import compare
import diagnose
import losses
import mlp_mnist
import predict
from utils import arguments, checkpoints, devices, models

RESULTS = HERE / "results"
DATASETS = {"cifar10-images": "CIFAR-10 as JPEG", "mnist": "MNIST", "shapes": "`shapes`"}


def accuracy(result):
    text = f"{100 * result['test_acc']:.2f} %"
    if "n" in result:
        text += f" ± {100 * result['test_acc_std']:.2f}, n = {result['n']}"
    return text + (", with TTA" if result["args"]["tta"] else "")


def seconds(result):
    taken = result["train_seconds"]
    return f"{taken:.1f} s" if taken < 10 else f"{taken:,.0f} s"


def results_rows():
    for path in sorted(RESULTS.glob("runs/*.json")):
        result = json.loads(path.read_text())
        command = result["command"].removeprefix("python ")
        cells = [f"[{path.stem}](runs/{path.name})", DATASETS[result["data"]], accuracy(result), seconds(result)]
        yield f"| {' | '.join(cells)} | {result['train_pflops']:.2g} | `{command}` |"


def test_results_are_those_of_the_files():
    text, rows = (RESULTS / "README.md").read_text(), list(results_rows())
    assert rows and all(row in text for row in rows), "results/README.md should have:\n" + "\n".join(rows)
    assert text.count("](runs/") == len(rows)


def test_the_rows_of_the_front_page_are_those_of_the_files():
    row = r"^\| .+ \| (.+) \| (.+) \| \[(.+)\]\(results/(runs/.+\.json)\) \| (.+) \| .+ \|$"
    rows = re.findall(row, readme(), re.M)
    assert len(rows) == 5
    for machine, data, acc, path, took in rows:
        result = json.loads((RESULTS / path).read_text())
        on = "two CPU cores" if result["device"].endswith(", 2 threads") else result["device"].replace("NVIDIA", "an")
        assert (machine, data, acc, took) == (on, DATASETS[result["data"]], accuracy(result), seconds(result)), path
    sentence = r"`--model vit` reaches \[(.+)\]\(results/(runs/.+\.json)\) on this copy in (.+)\.\n"
    ((acc, path, took),) = re.findall(sentence, readme())
    result = json.loads((RESULTS / path).read_text())
    assert (acc, took, result["device"]) == (accuracy(result), seconds(result), "NVIDIA H200")
    assert DATASETS[result["data"]] == "CIFAR-10 as JPEG"


def readme():
    return (HERE / "README.md").read_text()


def test_the_commands_of_the_front_page_have_the_arguments_of_their_files():
    """All but the name of the folder, the number of seeds, the machine, and where the images are."""
    pairs = re.findall(r"\(results/(runs/.+?\.json)\).+`python train.py (.+?)`", readme())
    assert len(pairs) == 5
    card = "--model vit --opt adamw --sched cosine"  # "the command above"
    assert f"`python train.py {card}`" in readme()
    pairs += [("runs/gpu-vit-cifar10-jpeg.json", card), ("runs/mlp-mnist.json", "--model mlp")]
    for name, recipe in {
        "mlp-mnist-2-seconds": "mlp-2-seconds",
        "mlp-mnist-5-minutes": "mlp-5-minutes",
        "gpu-cnn-1-minute": "gpu-cnn-49-seconds",
    }.items():
        pairs.append((f"runs/{name}.json", f"@recipes/{recipe}.args"))
    for path, flags in pairs:
        args = json.loads((RESULTS / path).read_text())["args"]
        words = [f"@{HERE / word[1:]}" if word.startswith("@") else word for word in flags.split()]
        ours = arguments.plain(arguments.parse(words)[0])
        free = {"out", "runs", "data", "data_dir", "seed", "device", "cuda_graph"}
        ours = json.loads(json.dumps(ours))  # tuples become lists
        odd = [name for name in args if name in ours and name not in free and args[name] != ours[name]]
        assert not odd, (flags, odd)


def speed_rows():
    for path in sorted(RESULTS.glob("bench-*.json")):
        for name, one in json.loads(path.read_text()).items():
            if isinstance(one, dict):
                *baseline, ours, _ = one["images_per_second"].values()
                flops, share = one["flops_per_second"] / 1e9, one["flops_per_second"] / one["matrix_flops_per_second"]
                row = f"| `{name}` | {max(baseline):,.0f} | {ours:,.0f} | {one['b_over_a']:.1f} | {one['b_over_c']:.2f}"
                yield f"{row} | {flops:,.0f} GFLOP/s, {100 * share:.2g}% | {one['peak_memory_mb']:,.0f} MB |"
    for name, one in json.loads((RESULTS / "until-cpu.json").read_text())["until"].items():
        yield f"| {name} | {one['epochs']} | {one['seconds']:.1f} s |"


def test_speeds_are_those_of_bench():
    text, rows = (RESULTS / "README.md").read_text(), list(speed_rows())
    assert len(rows) == 9 and all(row in text for row in rows), "results/README.md should have:\n" + "\n".join(rows)


def test_steps_on_a_gpu_are_those_of_the_file():
    """By their numbers: the page describes the flags in words."""
    text = (RESULTS / "README.md").read_text()
    steps = json.loads((RESULTS / "steps-h200.json").read_text())
    count = 0
    for name, eager in steps.items():
        flags = name.removesuffix(" --no-cuda-graph")
        if flags != name:
            graph = steps[f"{flags} --cuda-graph"]
            cells = [f"{ms:.2f} ms" for ms in (graph["step_ms"], eager["step_ms"], graph["device_ms"])]
            row = f"| {' | '.join(cells)} | {graph['tflops_per_second']:.0f} TFLOP/s | {graph['epoch_s']:.2f} s |"
            assert row in text, row
            count += 1
    assert count == 7 and text.count(" TFLOP/s |") == 7


@pytest.mark.parametrize("path", sorted(HERE.glob("recipes/*.args")), ids=lambda path: path.stem)
def test_every_recipe_is_understood_and_says_what_it_is_for(path):
    assert path.read_text().startswith("# ")
    arguments.parse([f"@{path}"])


def commands(text):
    """The commands of a page, from code blocks and from code in sentences."""
    found = re.findall(r"`(python \w+\.py[^`\n]*)`", text)
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        found += [line for line in block.splitlines() if line.startswith("python ")]
    return found


@pytest.mark.parametrize("page", ["README.md", "LESSONS.md", "results/README.md"])
def test_every_command_of_a_page_is_understood(page, monkeypatch):
    monkeypatch.chdir(HERE)
    found = commands((HERE / page).read_text())
    assert found
    for line in found:
        _, script, *argv = arguments.split_flags(line)
        argv = [word.replace("path/to/folder", "tests") for word in argv if word != "..."]
        if {"--resume", "--init", "--help"} & set(argv):
            continue
        if script == "train.py":
            arguments.parse(argv)
        elif script == "diagnose.py":
            diagnose.parse_args(argv)
        elif script == "predict.py":
            predict.check(predict.make_parser().parse_intermixed_args(argv))
        elif script == "bench.py":
            bench.make_parser().parse_args(argv)
        elif script == "compare.py":
            own, rest = compare.make_parser().parse_known_args(argv)
            for flags in compare.variants_of(own).values():
                arguments.parse([*rest, *flags])
        else:
            assert (HERE / script).exists(), line


@pytest.mark.parametrize("path", sorted(HERE.glob("lessons/*.args")), ids=lambda path: path.stem)
def test_every_lesson_is_understood_and_says_what_it_asks(path):
    assert path.read_text().startswith("# ")
    own, rest = compare.make_parser().parse_known_args([f"@{path}"])
    assert own.out == f"runs/lessons/{path.stem}"
    for flags in compare.variants_of(own).values():
        arguments.parse([*rest, *flags])


def test_every_lesson_has_its_table_its_plot_and_its_command():
    text = (HERE / "LESSONS.md").read_text()
    names = {path.stem for path in HERE.glob("lessons/*.args")}
    assert names == {path.stem for path in RESULTS.glob("lessons/*.json")}
    for name in names:
        content = json.loads((RESULTS / "lessons" / f"{name}.json").read_text())
        assert "\n".join(compare.table(content["variants"])) in text, name
        assert f"`python compare.py @lessons/{name}.args`" in text and f"(results/lessons/{name}.png)" in text
        assert (RESULTS / "lessons" / f"{name}.png").exists()
        own, rest = compare.make_parser().parse_known_args([f"@{HERE / 'lessons' / name}.args"])
        assert {v["name"]: v["flags"] for v in content["variants"]} == compare.variants_of(own)
        assert content["seeds"] == list(range(own.runs)) and content["test"] == own.test, name
        # CIFAR-10 as JPEG was named on the command line, behind the lesson's own flags.
        assert content["flags"] in (rest, [*rest, "--data", "data/cifar10-images"]), name


# ---------------------------------------------------------------------------------------------- promises of README.md


CHOOSE_DEVICE = devices.choose_device  # the real one: in tests auto is the CPU
SMALL_VIT = "--model vit --dim 16 --depth 2 --heads 2 --mlp-dim 16".split()


def test_the_program_of_the_front_page_runs(tiny):
    assert call(*SMALL_VIT, *TINY, "--out", "run") == 0
    shutil.copy("run/best.pt", "best.pt")
    (code,) = re.findall(r"```python\n(.*?)```", readme(), re.S)
    names = {}
    exec(code, names)
    assert names["logits"].shape == (8, 10)


def test_the_fine_tuning_of_the_front_page_leaves_the_lowest_layers_as_they_are(tiny):
    (line,) = [line for line in commands(readme()) if "--init" in line]
    argv = arguments.split_flags(line)[2:]
    (pretrained,) = [word for word in argv if word.endswith("best.pt")]
    assert call(*SMALL_VIT, *TINY, "--out", Path(pretrained).parent) == 0
    write_folder(tiny / "path/to/images", (32, 32), train_count=20)
    assert call(*argv, "--epochs", 1, "--batch-size", 8, "--device", "cpu", "--out", "tuned") == 0
    before, after = weights(pretrained), weights("tuned/best.pt")
    same = {name for name in before if not name.startswith("head") and torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("patch_embedding", "blocks.0."))}


def test_the_defaults_and_the_log_of_the_front_page_are_those_of_the_code():
    defaults = arguments.plain(arguments.parse(["--model", "vit"])[0])
    assert defaults == arguments.plain(arguments.parse("--model vit --opt adamw --sched cosine".split())[0])
    args, _ = arguments.parse(["--model", "mlp"])
    model = mlp_mnist.build(args, image_size=28, channels=1, num_classes=10)
    line = f"mlp: {count(model):,} parameters; {args.opt}, {args.sched}, {args.epochs:g} epochs, "
    assert f"{line}batches of {args.batch_size}" in readme()


@pytest.mark.parametrize("cuda, mps, chosen", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_a_gpu_is_used_if_there_is_one(cuda, mps, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.mps, "is_available", lambda: mps)
    assert CHOOSE_DEVICE("auto").type == chosen


class Mine(mlp_mnist.MLP):
    pass


def add_model(monkeypatch, build):
    mine = types.SimpleNamespace(RECIPE=mlp_mnist.RECIPE, add_args=mlp_mnist.add_args, build=build)
    monkeypatch.setitem(models.MODELS, "mine", mine)
    monkeypatch.setitem(models.CLASSES, "mine", Mine)


def test_a_model_and_a_loss_are_added_by_their_names(tiny, monkeypatch):
    def build(args, **sizes):
        return Mine(hidden=args.hidden, dropout=args.dropout, batch_norm=args.batch_norm, **sizes)

    add_model(monkeypatch, build)
    monkeypatch.setitem(losses.LOSSES, "twice", lambda *rest: 2 * losses.mse(*rest))
    assert call(*TINY_MLP, "--model", "mine", "--loss", "ce+0.5*twice", "--out", "run") == 0
    assert call("--resume", "run/last.pt", "--epochs", 2) == 0
    assert call("--eval", "run/best.pt", "--device", "cpu") == 0
    assert isinstance(models.rebuild(checkpoints.load("run/best.pt")), Mine)


def test_a_model_whose_checkpoints_could_not_be_loaded_is_not_trained(tiny, monkeypatch, capsys):
    add_model(monkeypatch, lambda args, **sizes: Mine(hidden=args.hidden, **sizes))  # without --dropout
    assert call(*TINY_MLP, "--model", "mine", "--dropout", 0.1, "--out", "run") == 2
    one_line(capsys, "--model mine has dropout 0.0 in its model_args, the run has 0.1: pass it on in build()")

    def build(args, **sizes):
        model = mlp_mnist.build(args, **sizes)
        del model.model_args["channels"]
        return model

    add_model(monkeypatch, build)
    assert call(*TINY_MLP, "--model", "mine", "--out", "run") == 2
    one_line(capsys, "--model mine has channels None in its model_args, the run has 3: pass it on in build()")

    assert not Path("run").exists()


@pytest.mark.parametrize(
    "forgotten, message",
    [
        ("hidden", "a checkpoint of --model mine holds weights that don't fit its model mine: Error(s) in loading"),
        ("dropout", "--model mine has not all its keywords in its model_args: set them in its __init__"),
    ],
)
def test_a_model_that_forgets_a_keyword_is_not_trained(forgotten, message, tiny, monkeypatch, capsys):
    def build(args, **sizes):
        model = mlp_mnist.build(args, **sizes)
        del model.model_args[forgotten]
        return model

    add_model(monkeypatch, build)
    assert call(*TINY_MLP, "--model", "mine", "--out", "run") == 2
    one_line(capsys, message)
    assert not Path("run").exists()


def test_a_model_with_constants_that_no_checkpoint_holds_is_tested(tiny, monkeypatch, capsys):
    class Masked(Mine):
        def __init__(self, **sizes):
            super().__init__(**sizes)
            self.register_buffer("mask", torch.tensor(10 * [0.0]), persistent=False)

        def forward(self, images):
            return super().forward(images) + self.mask

    add_model(monkeypatch, lambda args, **sizes: Masked(hidden=args.hidden, dropout=0.2, batch_norm=True, **sizes))
    monkeypatch.setitem(models.CLASSES, "mine", Masked)
    assert call(*TINY_MLP, "--model", "mine", "--out", "run") == 0
    tested = capsys.readouterr().out.splitlines()[-1].removesuffix(", read once)")
    assert call("--eval", "run/best.pt", "--device", "cpu") == 0
    assert capsys.readouterr().out == f"{tested})\n"
