"""Tests: documents."""

import importlib.util
import json

from conftest import HERE

RESULTS = HERE / "results"


def results_table():
    """The rows of README's table of figures, made from the files that runs wrote."""
    names = {"cifar10-images": "CIFAR-10 as JPEG", "mnist": "MNIST", "shapes": "`shapes`"}
    for path in sorted(RESULTS.glob("runs/*.json")):
        result = json.loads(path.read_text())
        command, acc = result["command"].removeprefix("python "), f"{100 * result['test_acc']:.2f} %"
        if "n" in result:
            acc += f" ± {100 * result['test_acc_std']:.2f}, n = {result['n']}"
        if result["args"]["tta"]:
            acc += ", mean of views"
        file, seconds = f"[{path.stem}](results/runs/{path.name})", result["train_seconds"]
        took = f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"
        yield f"| `{command}` | {names[result['data']]} | {acc} | {took} | {file} |"


def test_figures_of_the_readme_are_those_of_the_result_files():
    text, rows = (HERE / "README.md").read_text(), list(results_table())
    assert rows and all(row in text for row in rows), "README.md should have these rows:\n" + "\n".join(rows)
    assert text.count("](results/runs/") == len(rows)


def speed_table():
    """The rows of README's table of speeds, made from what bench.py wrote, and the times to an accuracy."""
    for path in sorted(RESULTS.glob("bench-cpu-*.json")):
        for name, one in json.loads(path.read_text()).items():
            if isinstance(one, dict):
                *textbook, ours, _ = one["images_per_second"].values()
                rate, share = one["flops_per_second"] / 1e9, one["flops_per_second"] / one["matrix_flops_per_second"]
                row = f"| `{name}` | {max(textbook):,.0f} | {ours:,.0f} | {one['b_over_a']:.1f} | {one['b_over_c']:.2f}"
                row += f" | {rate:,.0f} GFLOP/s, {share:.0%} | {one['peak_memory_mb']:,.0f} MB |"
                yield row
    for name, one in json.loads((RESULTS / "until-cpu.json").read_text())["until"].items():
        yield f"| {name} | {one['epochs']} | {one['seconds']:.1f} s |"


def test_speeds_of_the_readme_are_those_of_bench():
    text, rows = (HERE / "README.md").read_text(), list(speed_table())
    assert len(rows) == 6 and all(row in text for row in rows), "README.md should have these rows:\n" + "\n".join(rows)


def test_figures_of_the_comparisons_are_those_of_the_result_files():
    spec = importlib.util.spec_from_file_location("compare", RESULTS / "compare.py")
    spec.loader.exec_module(compare := importlib.util.module_from_spec(spec))
    text = (RESULTS / "COMPARISONS.md").read_text()
    for name in compare.SETS:
        rows = list(compare.table(name))
        assert rows and "\n".join(rows) in text, f"COMPARISONS.md should have for {name}:\n" + "\n".join(rows)
