"""compare.py: variants and seeds, what is run again, what is reported, for whom the test set is opened."""

import io
import json
import os
import signal
from pathlib import Path

import pytest
from conftest import TINY_MLP, halt, write_folder

import compare
import plot
import train
from utils import arguments, evaluation, run_folder

BASE = [*TINY_MLP, "--val-split", "0.3"]


def compared(*argv):
    return compare.main([str(a) for a in argv])


def content(out):
    return json.loads(Path(out, "compare.json").read_text())


def drawn(monkeypatch):
    """The names of the curves that are drawn."""
    names = []
    monkeypatch.setattr(
        plot, "draw", lambda runs, path, best=None: (names.extend(runs), Path(path).write_bytes(b"plot"))
    )
    return names


def test_a_grid_and_cases_are_ranked_by_validation(tiny, monkeypatch, capsys):
    names = drawn(monkeypatch)
    assert compared(*BASE, "--vary", "opt=sgd,adamw", "--vary", "lr=0.1,0.001", "--runs", 2, "--out", "c") == 0
    said = capsys.readouterr().out
    rows = content("c")["variants"]
    assert {row["name"] for row in rows} == {f"opt {opt}, lr {lr}" for opt in ("sgd", "adamw") for lr in (0.1, 0.001)}
    assert [row["val_acc"] for row in rows] == sorted((row["val_acc"] for row in rows), reverse=True)
    assert all(row["n"] == 2 and row["failed"] == 0 for row in rows)
    results = [json.loads(path.read_text()) for path in Path("c").glob("*/seed-*/result.json")]
    assert len(results) == 8 and all(result["test_acc"] is None for result in results)
    best = rows[0]
    flags = [["--opt", r["args"]["opt"], "--lr", str(r["args"]["lr"])] for r in results]
    own = [r["best_val_acc"] for r, chosen in zip(results, flags, strict=True) if chosen == best["flags"]]
    assert best["val_acc"] == pytest.approx(sum(own) / 2)
    assert "1/8" in said and "8/8" in said and best["name"] in Path("c/compare.md").read_text()
    assert set(names) >= {row["name"] for row in rows}


def test_the_test_set_is_opened_for_the_winner_alone(tiny, monkeypatch):
    drawn(monkeypatch)
    real, read = evaluation.evaluate, []

    def evaluate(model, split, *rest, **options):
        if len(split.labels) == 40:
            read.append(1)
        return real(model, split, *rest, **options)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    cases = ["--case", "high: --lr 0.01", "--case", "low: --lr 1e-6", "--runs", 2]
    assert compared(*BASE, *cases, "--out", "c") == 0
    rows = content("c")["variants"]
    assert len(read) == 2 and "test_acc" in rows[0] and "test_acc" not in rows[1]
    assert compared(*BASE, *cases, "--out", "c", "--test", "all") == 0  # nothing is run again
    assert len(read) == 6 and all("test_acc" in row for row in content("c")["variants"])
    assert "too good" in Path("c/compare.md").read_text()
    assert compared(*BASE, *cases, "--out", "c", "--test", "none") == 0
    assert len(read) == 6 and not any("test_acc" in row for row in content("c")["variants"])


def test_folders_of_variants_have_names_that_any_system_takes():
    assert compare.folder_name("loss ce+0.5*cosine") == "loss-ce+0.5-cosine" and compare.folder_name("*") == "case"


def test_an_interrupted_comparison_goes_on_where_it_was(tiny, monkeypatch, capsys):
    drawn(monkeypatch)
    cases = ["--case", "a: --lr 0.01", "--case", "b: --lr 0.001", "--epochs", 3]
    assert compared(*BASE, *cases, "--out", "straight") == 0
    with monkeypatch.context() as patch:
        halt(patch, 8)
        assert compared(*BASE, *cases, "--out", "c") == 130
    assert "goes on from here" in capsys.readouterr().out and not Path("c/compare.json").exists()
    assert compared(*BASE, *cases, "--out", "c") == 0
    a, b = content("c")["variants"], content("straight")["variants"]
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in (*a, *b)]
    assert timeless[:2] == timeless[2:]
    monkeypatch.setattr(train, "train", None)  # a third time, nothing is trained
    assert compared(*BASE, *cases, "--out", "c") == 0


def test_a_failed_run_is_reported_and_the_others_go_on(tiny, monkeypatch, capsys):
    drawn(monkeypatch)
    cases = ["--case", "good: --lr 0.01", "--case", "bad: --opt sgd --lr 1e30 --warmup-epochs 0"]
    assert compared(*BASE, *cases, "--epochs", 2, "--out", "c") == 1
    rows = content("c")["variants"]
    assert [row["name"] for row in rows] == ["good", "bad"] and rows[1]["failed"] == 1 and rows[1]["n"] == 0
    assert "failed (non-finite loss)" in capsys.readouterr().out
    assert "1 failed" in Path("c/compare.md").read_text()


@pytest.mark.parametrize(
    "wrong",
    [
        ["--vary", "lr=0.1"],
        ["--vary", "lr"],
        ["--case", "one: --lr 0.1"],
        ["--case", "--lr 0.1", "--case", "b: --lr 1"],
        ["--case", "a: --lr 0.1", "--case", "a: --lr 1"],
        ["--case", "Adam: --lr 0.1", "--case", "adam: --lr 1"],
        ["--case", "a: --lr 0.1", "--case", "b: --lr nan"],
        ["--case", "a: --lr 0.1", "--case", 'b: --lr "1'],
        ["--vary", "opt=sgd,adamax"],
        ["--vary", "lr=0.1,0.2", "--runs", "0"],
        ["--vary", "lr=0.1,0.2", "--val-split", "0"],
        ["--vary", "lr=0.1,0.2", "--colour", "red"],
    ],
    ids=str,
)
def test_wrong_comparisons_are_one_line_before_anything_runs(wrong, tiny, capsys):
    assert compared(*BASE, *wrong, "--out", "c") == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "compare.py: error: " in said and not Path("c").exists()


def test_a_lost_file_costs_its_run_and_not_the_table(tiny, capsys):
    flags = [*BASE, "--vary", "lr=0.1,0.001", "--runs", "2", "--out", "c"]
    assert compared(*flags) == 0
    names = [row["name"] for row in json.loads(Path("c/compare.json").read_text())["variants"]]
    winner, other = (Path("c", name.replace(" ", "-")) for name in names)
    (winner / "seed-0" / "best.pt").unlink()
    (other / "seed-1" / "metrics.csv").unlink()
    capsys.readouterr()
    assert compared(*flags) == 1
    said = capsys.readouterr().err
    assert "best.pt doesn't exist" in said and "metrics.csv doesn't exist" in said and len(said.splitlines()) == 2
    rows = json.loads(Path("c/compare.json").read_text())["variants"]
    assert [row["n"] for row in rows] == [2, 1] and "test_acc" not in rows[0]
    assert "The test set was not read." in Path("c/compare.md").read_text()


def test_two_comparisons_share_no_folder(tiny, capsys):
    with run_folder.locked(Path("c")):
        assert compared(*BASE, "--vary", "lr=0.1,0.001", "--out", "c") == 2
    assert "c is being written by a command that is alive" in capsys.readouterr().err
    assert not list(Path("c").iterdir())


def test_a_folder_with_other_runs_is_rejected(tiny, monkeypatch, capsys):
    drawn(monkeypatch)
    cases = ["--case", "a: --lr 0.01", "--case", "b: --lr 0.001"]
    assert compared(*BASE, *cases, "--out", "c") == 0
    before = {path: path.read_bytes() for path in Path("c").rglob("*") if path.is_file()}
    assert compared(*BASE, *cases, "--batch-size", 32, "--out", "c") == 2
    assert "holds a comparison with other flags for " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("c").rglob("*") if path.is_file()} == before
    assert compared("--case", "b: --lr 1e-3", *BASE, "--case", "a: --lr 0.01", "--log-interval", 1, "--out", "c") == 0
    for path in Path("c").glob("compare.*"):  # as if it had been interrupted
        path.unlink()
    assert compared(*BASE, *cases, "--batch-size", 32, "--out", "c") == 1
    assert "holds runs with another --batch-size" in capsys.readouterr().err
    assert Path("c/a/seed-0/best.pt").read_bytes() == before[Path("c/a/seed-0/best.pt")]


@pytest.mark.parametrize(
    "flags, said",
    [("--vary lr=1e37,1e36 --opt sgd", ""), ("--vary lr=0.1,0.01 --limit 9999", "training images of shapes")],
)
def test_where_all_fail_the_table_says_so(flags, said, tiny, capsys):
    assert compared(*BASE, *flags.split(), "--out", "c") == 1
    captured = capsys.readouterr()
    assert "no compare.png: no variant has a result" in captured.out
    assert said in captured.err and len(captured.err.splitlines()) == 2 * bool(said)
    assert all(row["n"] == 0 for row in content("c")["variants"])


def test_a_file_in_place_of_the_folder_is_one_line(tiny, capsys):
    Path("file").write_text("not a folder")
    assert compared(*BASE, "--vary", "lr=0.1,0.01", "--out", "file") == 2
    assert capsys.readouterr().err == "compare.py: error: --out file is no folder: name another one\n"


def test_switches_are_varied_on_and_off(tiny, monkeypatch):
    drawn(monkeypatch)
    assert compared(*BASE, "--vary", "tta=on,off", "--vary", "amp=off,bf16", "--out", "c") == 0
    flags = [row["flags"] for row in content("c")["variants"]]
    assert sorted(flags) == sorted([[t, "--amp", a] for t in ("--tta", "--no-tta") for a in ("off", "bf16")])
    assert compare.flags_of("decay-all", "off", {"--decay-all"}) == ["--no-decay-all"]


@pytest.mark.parametrize("case", ["--seed 3", "--runs 2", "--out elsewhere", "--eval a.pt", "--no-test"])
def test_what_compare_sets_itself_is_no_variant(case, tiny, capsys):
    assert compared(*BASE, "--case", f"a: {case}", "--case", "b: --lr 0.1", "--out", "c") == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and f"{case.split()[0]} has no effect in variant a" in said


def test_a_comparison_may_be_moved_and_says_on_what_it_trained(tiny, monkeypatch):
    drawn(monkeypatch)
    flags = [*BASE, "--vary", "lr=0.01,0.001", "--out"]
    assert compared(*flags, "a") == 0
    first = content("a")["variants"]
    Path("a").rename("b")
    assert compared(*flags, "b") == 0
    device = json.loads(Path("b/lr-0.01/seed-0/result.json").read_text())["device"]  # its name, not --device
    assert content("b")["variants"] == first and content("b")["device"] == device
    assert f"Trained on shapes; {device}; " in Path("b/compare.md").read_text()


def test_a_signal_while_the_old_comparison_is_read_ends_the_new_one(tiny, monkeypatch, capsys):
    drawn(monkeypatch)
    flags = [*BASE, "--vary", "lr=0.01,0.001", "--out", "c"]
    assert compared(*flags) == 0
    capsys.readouterr()
    real = compare.meaning

    def meaning(flags):
        monkeypatch.setattr(arguments, "parse", lambda *rest: os.kill(os.getpid(), signal.SIGTERM))
        return real(flags)

    monkeypatch.setattr(compare, "meaning", meaning)
    assert compared(*flags) == 128 + signal.SIGTERM and capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["best_val_acc", "best_epoch", "train_seconds"])
def test_a_result_without_its_numbers_counts_as_failed(name, tiny, monkeypatch, capsys):
    drawn(monkeypatch)
    flags = [*BASE, "--vary", "lr=0.01,0.001", "--out", "c"]
    assert compared(*flags) == 0
    path = Path("c/lr-0.01/seed-0/result.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: None}))
    capsys.readouterr()
    assert compared(*flags) == 1
    assert {row["name"]: row["failed"] for row in content("c")["variants"]} == {"lr 0.01": 1, "lr 0.001": 0}
    assert capsys.readouterr().err.count("\n") == 1


def test_a_comparison_with_fewer_seeds_replaces_none(tiny, monkeypatch, capsys):
    drawn(monkeypatch)
    flags = [*BASE, "--vary", "lr=0.01,0.001", "--out", "c"]
    assert compared(*flags, "--runs", 2) == 0
    before = Path("c/compare.json").read_bytes()
    capsys.readouterr()
    for fewer in ([], ["--seed", 1], ["--seed", 7, "--runs", 2]):
        assert compared(*flags, *fewer) == 2
        assert "holds a comparison with seed" in capsys.readouterr().err
        assert Path("c/compare.json").read_bytes() == before
    assert compared(*flags, "--runs", 3) == 0
    assert content("c")["seeds"] == [0, 1, 2] and content("c")["variants"][0]["n"] == 3


@pytest.mark.parametrize("seeds", [[0, "a", None], "01", 5, None])
def test_a_table_with_odd_seeds_is_no_comparison(seeds, tiny, monkeypatch, capsys):
    drawn(monkeypatch)
    flags = [*BASE, "--vary", "lr=0.01,0.001", "--out", "c"]
    assert compared(*flags) == 0
    Path("c/compare.json").write_text(json.dumps(content("c") | {"seeds": seeds}))
    capsys.readouterr()
    assert compared(*flags) == 2
    assert "are no comparison's" in capsys.readouterr().err


def test_models_with_data_of_their_own_are_not_compared(tiny, capsys):
    assert compared("--epochs", 1, "--vary", "model=mlp,vit", "--out", "c") == 2
    assert "different data, cifar10 and mnist: give --data" in capsys.readouterr().err and not Path("c").exists()


def test_a_comparison_is_not_written_among_its_images(tiny, capsys):
    write_folder(Path("images"))
    before = sorted(Path("images").rglob("*"))
    flags = [*BASE, "--data", "images", "--vary", "lr=0.01,0.001", "--out", "images/train/c"]
    assert compared(*flags) == 2
    assert "--out images/train/c is among the images" in capsys.readouterr().err
    assert sorted(Path("images").rglob("*")) == before


def test_variants_that_diverged_at_once_are_not_run_again(tiny, monkeypatch, capsys):
    drawn(monkeypatch)
    flags = [*BASE, "--opt", "sgd", "--vary", "lr=1e37,0.01", "--out", "c"]
    for _ in range(2):
        assert compared(*flags) == 1
        captured = capsys.readouterr()
        assert "lr 1e37, seed 0: failed (non-finite loss)" in captured.out and captured.err == ""


def test_the_best_epoch_of_another_run_is_not_tested(tiny, monkeypatch, capsys):
    drawn(monkeypatch)
    flags = [*BASE, "--vary", "lr=0.1,0.001", "--out", "c"]
    assert compared(*flags) == 0
    winner, other = (row["name"].replace(" ", "-") for row in content("c")["variants"])
    Path("c", winner, "seed-0", "best.pt").write_bytes(Path("c", other, "seed-0", "best.pt").read_bytes())
    capsys.readouterr()
    assert compared(*flags) == 1
    assert "best.pt is not the best epoch of its run" in capsys.readouterr().err
    assert "test_acc" not in content("c")["variants"][0]


def test_another_comparison_is_not_overwritten(tiny, monkeypatch, capsys):
    drawn(monkeypatch)
    assert compared(*BASE, "--vary", "lr=0.1,0.001", "--out", "c") == 0
    before = Path("c/compare.json").read_text()
    assert compared(*BASE, "--vary", "opt=sgd,adam", "--out", "c") == 2
    assert "holds a comparison with lr 0." in capsys.readouterr().err
    assert Path("c/compare.json").read_text() == before and len(list(Path("c").glob("*/seed-0"))) == 2
    assert compared(*BASE, "--vary", "lr=0.1,0.001,0.01", "--out", "c") == 0  # with more, nothing is lost
    assert len(content("c")["variants"]) == 3


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device")])
def test_a_closed_standard_output_costs_no_table(error, tiny, monkeypatch):
    drawn(monkeypatch)

    class Closed(io.StringIO):
        def write(self, text):
            raise error

    monkeypatch.setattr(run_folder.sys, "stdout", Closed())
    assert compared(*BASE, "--vary", "lr=0.1,0.001", "--out", "c") == 0
    assert len(content("c")["variants"]) == 2 and Path("c/compare.md").exists()


def test_a_name_that_is_no_utf_8_costs_no_table(tiny, monkeypatch):
    drawn(monkeypatch)
    monkeypatch.setattr(compare.arguments, "typed", lambda: "python compare.py @c\udcff")
    assert compared(*BASE, "--vary", "lr=0.1,0.001", "--out", "c") == 0
    assert r"compare.py @c\udcff" in Path("c/compare.md").read_text()


@pytest.mark.parametrize("flags", [["--out", ""], ["--out", "c", "--case", ""], ["--out="]])
def test_an_empty_folder_name_is_one_line(flags, tiny, capsys):
    with pytest.raises(SystemExit):
        compare.make_parser().parse_known_args([*BASE, "--vary", "lr=0.1,0.001", *flags])
    said = capsys.readouterr().err
    assert '"" is empty' in said and len(said.splitlines()) == 1


def test_pipes_beside_a_comparison_are_not_waited_for(tiny, monkeypatch):
    drawn(monkeypatch)
    flags = [*BASE, "--vary", "lr=0.1,0.001", "--out", "c"]
    assert compared(*flags) == 0
    path = Path("c/lr-0.1/seed-0/result.json")
    path.unlink()
    os.mkfifo(path)

    def too_long(*args):
        raise TimeoutError("a pipe was waited for")

    old = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(30)
    try:
        assert compared(*flags) == 1  # that run can't write its result
        assert [row["failed"] for row in content("c")["variants"]] == [0, 1]
        Path("c/compare.json").unlink()
        os.mkfifo("c/compare.json")
        assert compared(*flags) == 2
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("name", ["compare.json", "compare.md", "compare.png"])
def test_files_of_the_user_are_not_overwritten(name, tiny, capsys):
    Path("c").mkdir()
    Path("c", name).write_text('{"my": 1}')
    assert compared(*BASE, "--vary", "lr=0.1,0.001", "--out", "c") == 2
    assert f"{name} in --out c are no comparison's" in capsys.readouterr().err
    assert Path("c", name).read_text() == '{"my": 1}' and len(list(Path("c").iterdir())) == 1


@pytest.mark.parametrize("flags", [["--runs", 10**9], 9 * ["--vary", "lr=" + ",".join(map(str, range(1, 10)))]])
def test_a_comparison_of_too_many_runs_is_rejected_at_once(flags, tiny, capsys):
    assert compared(*BASE, "--vary", "lr=0.1,0.001", *flags, "--out", "c") == 2
    assert "runs, more than 10,000" in capsys.readouterr().err


def test_a_test_set_that_has_gone_costs_no_table(tiny, monkeypatch, capsys):
    drawn(monkeypatch)

    def gone(*args, **more):
        raise OSError("the set has gone")

    monkeypatch.setattr(compare.evaluation, "test", gone)
    assert compared(*BASE, "--vary", "lr=0.1,0.001", "--out", "c") == 1
    assert "the set has gone" in capsys.readouterr().err and len(content("c")["variants"]) == 2


def test_results_that_name_no_set_cost_no_table(tiny, monkeypatch):
    drawn(monkeypatch)
    flags = [*BASE, "--vary", "lr=0.1,0.001", "--out", "c"]
    assert compared(*flags) == 0
    for path, name in zip(sorted(Path("c").glob("*/seed-0/result.json")), (["pets"], True), strict=True):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": name}))
    assert compared(*flags) == 0
    assert content("c")["data"] == "True, ['pets']"


def test_a_comparison_whose_folder_is_replaced_writes_nothing_into_the_new_one(tiny, monkeypatch, capsys):
    real = compare.run_one

    def run_one(*args):
        done = real(*args)
        os.rename("c", "moved")
        Path("c").mkdir()
        Path("c/compare.json").write_text("of somebody else")
        return done

    monkeypatch.setattr(compare, "run_one", run_one)
    assert compared(*BASE, "--vary", "lr=0.1,0.01", "--out", "c") == 1
    assert "moved away or replaced" in capsys.readouterr().err
    assert [path.name for path in Path("c").iterdir()] == ["compare.json"]
    assert Path("c/compare.json").read_text() == "of somebody else"


def test_a_table_is_not_lost_to_a_set_that_has_gone(tiny, monkeypatch, capsys):
    flags = ["--model", "mlp", "--hidden", 8, "--epochs", 1, "--device", "cpu", "--batch-size", 8, "--crop-pad", 0]
    cases = ["--vary", "lr=0.1,0.01", "--out", "c"]
    write_folder(tiny / "pets", (16, 16), train_count=20)
    assert compared(*flags, "--data", "pets", "--data-dir", "one", *cases) == 0
    before = Path("c/compare.json").read_text()
    tested = content("c")["variants"][0]["test_acc"]
    os.rename("one", "two")
    assert compared(*flags, "--data", "pets", "--data-dir", "two", *cases) == 0  # tested where the set is now
    assert content("c")["variants"][0]["test_acc"] == tested and not Path("one").exists()
    before = Path("c/compare.json").read_text()
    os.rename("pets", "gone")
    assert compared(*flags, "--data", "pets", "--data-dir", "two", *cases) != 0
    assert Path("c/compare.json").read_text() == before


def test_what_failed_can_be_corrected_in_its_folder(tiny, monkeypatch, capsys):
    drawn(monkeypatch)
    cases = ["--vary", "lr=0.1,0.01", "--out", "c"]
    assert compared(*BASE, *cases, "--freeze", "nosuch") == 1
    assert compared(*BASE, *cases) == 0 and len(content("c")["variants"]) == 2


@pytest.mark.parametrize(
    "cases, said",
    [
        ("--vary lr=0.1,0.2 --vary lr=0.3,0.4", "two --vary of one flag"),
        ("--vary batch-size=8,9 --vary batch_size=10,11", "two --vary of one flag"),
        ("--case compare.json:--lr=1 --case b:--lr=2", "compare.json is the name of a file"),
    ],
)
def test_variants_that_would_be_mixed_up_are_rejected(cases, said, tiny, capsys):
    assert compared(*BASE, *cases.split(), "--out", "c") == 2
    assert said in capsys.readouterr().err and not Path("c").exists()


def test_variants_are_named_in_any_alphabet(tiny, monkeypatch):
    drawn(monkeypatch)
    assert compared(*BASE, "--case", "\u03b1: --lr 0.1", "--case", "\u03b2: --lr 0.2", "--out", "c") == 0
    assert {path.name for path in Path("c").iterdir() if path.is_dir()} == {"\u03b1", "\u03b2"}
    assert compared(*BASE, "--vary", "lr=1,2", "--out", "c\udcff") == 2 and len(list(tiny.iterdir())) == 1
