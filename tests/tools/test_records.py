"""The record of a table's runs, and mistakes in a table."""

import json
from pathlib import Path

import pytest

from tests.tools.stand_in import TABLE, events, report
from tools import reproduce
from tools.tables import read_table

# ---- the record ----


def test_the_report_is_the_same_from_the_record_alone(make):
    assert make() == 0
    assert make("--time") == 0
    before = {path.name: path.read_text() for path in Path("results").iterdir()}
    assert set(before) == {"table.md", "table.csv", "table.runs.json"}
    Path("runs").rename("far away")
    for _ in range(2):
        assert make("--only-report") == 0
        assert {path.name: path.read_text() for path in Path("results").iterdir()} == before
    record = json.loads(before["table.runs.json"])
    assert len(record["runs"]) == 6 + 3  # the three of --time beside those of the same seed
    assert sum(run["alone"] for run in record["runs"]) == 3
    assert all(len(line) < 500 for line in before["table.runs.json"].splitlines() if '"seed"' in line)


def test_runs_are_made_again_unless_the_record_is_trusted(make):
    assert make() == 0
    Path("runs").rename("far away")
    more = TABLE.replace("[0, 1]", "[0, 1, 2]")
    assert make("--recorded", table=more) == 0
    assert events("start") == ["dense-seed2", "half-seed2", "same_cost-seed2"]
    assert [row["seeds"] for row in report()] == ["0 1 2"] * 3
    assert make("--rows", "same cost", "--seeds", "1", table=more) == 0  # with what it waits for
    assert events("start") == ["half-seed1", "same_cost-seed1"]
    assert [row["seeds"] for row in report()] == ["0 1 2"] * 3


def test_the_record_keeps_what_the_table_does_not_tell(make):
    """A row that is gone, options that cannot be read, a source that came to other FLOPs: it may be the only copy."""
    assert make() == 0
    Path("runs").rename("far away")
    record = Path("results/table.runs.json")
    before = record.read_text()
    assert (
        make(
            "--only-report",
            table=TABLE.replace("  same cost: {keep_ratio: {flops_of: half}, epochs: 8}\n", "").replace(
                "compare: [[half, same cost]]", ""
            ),
        )
        == 0
    )
    assert len(report()) == 2
    assert record.read_text() == before
    record.write_text(before.replace('"epochs": 8', '"epochs": -8'))
    unreadable = record.read_text()
    assert make("--only-report") == 0
    assert record.read_text() == unreadable
    record.write_text(before)
    assert make("--rows", "half", "--seeds", "0") == 0
    assert [run["row"] for run in json.loads(record.read_text())["runs"]] == ["dense"] * 2 + ["half"] * 2 + [
        "same cost"
    ] * 2
    assert not list(Path("results").glob("*.partial"))


def test_seconds_are_a_ratio_on_one_machine_only(make, monkeypatch):
    def seconds() -> list[str]:
        return [row["train_seconds_to_dense"] for row in report()]

    assert make("--time", "--rows", "dense", "half") == 0
    Path("runs").rename("far away")
    monkeypatch.setenv("TEST_CPU", "Slide rule")
    assert make("--time", "--rows", "same cost", "--recorded") == 0
    assert seconds() == ["1.0", "0.5", "not run yet"]  # dense was never timed where the last row was
    assert "Slide rule" not in Path("results/table.md").read_text().partition("- the seconds: ")[2]
    assert make("--time", "--rows", "dense") == 0
    assert seconds() == ["1.0", "0.5", "0.4"]  # each by the dense run beside it: 40 of 100 seconds
    assert "the seconds: Slide rule (AVX2), 2 threads; Abacus (AVX2), 2 threads" in Path("results/table.md").read_text()
    assert make("--time", "--rows", "half") == 0
    assert seconds() == ["1.0", "0.6", "0.4"]  # the newest
    before = Path("results/table.csv").read_text()
    Path("runs").rename("far away too")
    assert make("--only-report") == 0
    assert Path("results/table.csv").read_text() == before
    assert sum(run["alone"] for run in json.loads(Path("results/table.runs.json").read_text())["runs"]) == 5


def test_of_runs_that_ran_alone_on_one_machine_the_newest_is_recorded(make):
    assert make("--time", "--rows", "dense", "half") == 0
    summary = next(Path("runs").rglob("half-seed0/*/summary.json"))
    summary.write_text(summary.read_text().replace('"train_seconds": 50.0', '"train_seconds": 70.0'))
    Path("results/table.runs.json").unlink()  # both runs are new to the record
    assert make("--time", "--rows", "half", "--again") == 0
    assert report()[1]["train_seconds_to_dense"] == "0.5"
    Path("runs").rename("far away")
    assert make("--only-report") == 0
    assert report()[1]["train_seconds_to_dense"] == "0.5"


def test_one_kind_of_gpu_in_two_hosts_is_two_machines(make, monkeypatch):
    monkeypatch.setenv("TEST_GPU", "Difference engine")
    assert make("--time", "--rows", "dense") == 0
    monkeypatch.setenv("TEST_CPU", "Slide rule")  # it feeds the GPU, so its seconds are others
    assert make("--time", "--rows", "half") == 0
    assert [row["train_seconds_to_dense"] for row in report()] == ["1.0", "not run yet", "not run yet"]


def test_a_record_can_be_judged_otherwise_or_says_that_it_cannot(make, capsys):
    assert make() == 0
    Path("runs").rename("far away")
    assert make("--only-report", table=f"{TABLE}judge: heldout\n") == 0
    assert [float(row["heldout_top1"]) for row in report()] == [50.5] * 3
    assert make("--only-report") == 0
    assert float(report()[1]["test_top1"]) == 86
    Path("far away").rename("runs")
    Path("results/table.runs.json").unlink()
    assert make("--only-report", table=f"{TABLE}judge: heldout\n") == 0
    Path("runs").rename("far away")
    capsys.readouterr()
    assert make("--only-report") == 0
    assert "left out: results/table.runs.json, dense, seed 0 (it has no test_top1)" in capsys.readouterr().out


def test_recorded_runs_are_listed(make, capsys):
    assert make("--seeds", "0") == 0
    Path("runs").rename("far away")
    capsys.readouterr()
    assert make("--dry-run", "--recorded") == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines] == ["done"] * 3 + ["not run yet"] * 2 + ["waits for half"]
    assert [line[-1] for line in lines[:3]] == ["recorded"] * 3


def test_a_run_that_is_here_counts_before_a_recorded_one(make):
    assert make() == 0
    record = Path("results/table.runs.json")
    record.write_text(record.read_text().replace("85.0", "12.0"))
    assert make("--only-report") == 0
    assert float(report()[1]["test_top1"]) == 86


def test_recorded_runs_that_cannot_be_used_are_told(make, capsys):
    assert make() == 0
    Path("runs").rename("far away")
    record = Path("results/table.runs.json")
    text = record.read_text()
    record.write_text(text.replace('"epochs": 8', '"epochs": -8'))
    assert make("--only-report") == 0
    assert "left out: results/table.runs.json, config" in capsys.readouterr().out
    assert [row["seeds"] for row in report()] == ["0 1", "0 1", "not run yet"]
    for broken in ("[]", text.replace('"seed"', '"sead"'), text.replace("90.0", '"high"'), text[:100]):
        record.write_text(broken)
        assert make("--only-report") == 2
        assert "table.runs.json is no record of runs; restore it" in capsys.readouterr().err
        assert record.read_text() == broken


# ---- mistakes ----


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{keep_ratio: 0.5}", "{kep_ratio: 0.5}", "unknown key 'kep_ratio' (table.yaml, row 'half')"),
        ("{keep_ratio: 0.5}", "{keep_ratio: 50}", "keep_ratio must be in (0, 1], got 50.0 (table.yaml, row 'half')"),
        ("{keep_ratio: 0.5}", "{keep_ratio: [0.5]}", "keep_ratio must be a single value (table.yaml, row 'half')"),
        ("{keep_ratio: 0.5}", "{batch_size: 6.5}", "batch_size must be a whole number"),
        ("{keep_ratio: 0.5}", "{warmup_length: 9}", "warmup_length 9 (table.yaml, row 'half')"),
        ("{keep_ratio: 0.5}", "{seed: 3}", "seed cannot be set in a table (table.yaml, row 'half')"),
        ("{keep_ratio: 0.5}", "{keep_ratio: 0.5, keep_ratio: 1}", "'keep_ratio' is given twice"),
        ("{keep_ratio: 0.5}", "{keep_ratio: {flops_of: same cost}}", "names 'same cost', which is no row above"),
        ("{keep_ratio: 0.5}", "{keep_ratio: {flops_of: half}}", "names 'half', which is no row above"),
        ("{keep_ratio: 0.5}", "{epochs: {flops_of: dense}}", "only a row's keep_ratio can be {flops_of: ROW}"),
        ("{flops_of: half}", "{flops_of: haf}", "row 'same cost': flops_of names 'haf'"),
        ("{flops_of: half}", "{flop: half}", "row 'same cost': keep_ratio must be a single value or {flops_of: ROW}"),
        ("{flops_of: half},", "{flops_of: half}, prune_rate: 1,", "two names of one option"),
        ("{keep_ratio: 0.5}", "{pretrained: {run_of: same cost}}", "run_of names 'same cost', which is no row above"),
        ("{keep_ratio: 0.5}", "{pretrained: {flops_of: dense}}", "pretrained must be a single value or {run_of: ROW}"),
        ("{keep_ratio: 0.5}", "{keep_ratio: {run_of: dense}}", "keep_ratio must be a single value or {flops_of: ROW}"),
        ("{keep_ratio: 0.5}", "{arch: {run_of: dense}}", "only its pretrained or widths_of {run_of: ROW}"),
        (
            "{keep_ratio: 0.5}",
            "{method: thin, pretrained: {run_of: dense}}",
            "pretrained {run_of: dense} (table.yaml, row 'half') cannot be used",
        ),
        ("epochs: 4", "pretrained: {run_of: dense}", "pretrained must be a single value (table.yaml, base)"),
        ("[[half, same cost]]", "[]\nnot_pooled: [haf]", "not_pooled names 'haf'"),
        ("[[half, same cost]]", "[]\nprimary: [half]", "a pair of table.yaml: primary must be two different rows"),
        (
            "[[half, same cost]]",
            "[]\nprimary: [half, haf]",
            "primary names 'haf', which is no row; did you mean 'half'",
        ),
        ("[[half, same cost]]", "[]\nseconds_of: [half, dense]", "seconds_of must name one row of the network of row"),
        ("  half:", "  dense:", "'dense' is given twice"),
        ("  half:", "  ha|lf:", "without |"),
        ("epochs: 4", "epoch: 4", "unknown key 'epoch' (table.yaml, base); did you mean 'epochs'?"),
        ("epochs: 4", "log_dir: x", "log_dir cannot be set in a table (table.yaml, base)"),
        ("[[half, same cost]]", "[[half, some cost]]", "compare names 'some cost'"),
        ("[[half, same cost]]", "[[half, half]]", "two different rows"),
        ("[[half, same cost]]", "[half]", "a pair of table.yaml: compare must be a list"),
        ("dense: dense", "dense: dnse", "dense names 'dnse'"),
        ("[0, 1]", "[0, 0]", "seeds must be distinct"),
        ("[0, 1]", "[]", "seeds is missing"),
        ("[0, 1]", "0", "seeds must be a list"),
        ("[0, 1]", "[0, x]", "seed must be a whole number"),
        ("title: A table", "titel: A table", "unknown key 'titel'; did you mean 'title'?"),
        ("title: A table", "", "title is missing"),
        ("note: Three rows.", "judge: luck", "judge must be test or heldout, got 'luck'"),
        ("note: Three rows.", "judge: [test]", "judge must be test or heldout"),
        (
            "rows:\n  dense: {method: dense}",
            "judge: heldout\nrows:\n  dense: {method: dense, holdout: 0}",
            "row 'dense': judge heldout needs held-out images",
        ),
        ("note: Three rows.", "note: [", "is not valid YAML"),
        ("note: Three rows.", "note: [a]", "table.yaml: note must be plain text"),
    ],
)
def test_mistakes_are_told_before_anything_runs(make, capsys, old, new, said):
    assert TABLE.count(old) == 1
    assert make(table=TABLE.replace(old, new)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--job", "2"], "--help lists every option"),
        (["--time", "--jobs", "2"], "--time does not go with --jobs"),
        (["--again", "--recorded"], "--again does not go with --recorded"),
        (["--only-report", "--again", "--rows", "half"], "--only-report does not go with --rows, --again"),
    ],
)
def test_options_that_go_wrong_together_are_refused(make, capsys, options, said):
    assert make(*options) == 2
    assert said in capsys.readouterr().err


def test_a_table_that_is_not_there_is_told(capsys):
    assert reproduce.main(["nowhere.yaml"]) == 2
    assert "cannot read nowhere.yaml: No such file or directory" in capsys.readouterr().err


def test_texts_become_values_by_the_type_of_their_option(tmp_path):
    """YAML alone would read 12e-3 as text, 012 as ten, off as false and 1_0 as ten."""
    table = TABLE.replace(
        "{keep_ratio: 0.5}", "{score_lr: 12e-3, batch_size: 012, retire: off, nesterov: off, name-of: x}"
    )
    path = tmp_path / "table.yaml"
    path.write_text(table.replace(", name-of: x", ", width-mult: 2, pretrained: null"))
    options = read_table(path).rows["half"].options
    base = {"arch": "resnet20_he", "epochs": 4, "finetune": False}
    given = {"score_lr": 0.012, "batch_size": 12, "shrink": False, "nesterov": False, "width_mult": 2.0}
    assert options == {**base, **given, "pretrained": None}


def test_with_several_dense_rows_each_row_has_the_one_of_its_network(make, capsys):
    more = "  other dense: {method: dense, arch: vgg16}\n  other half: {arch: vgg16, keep_ratio: 0.5}\n"
    table = TABLE.replace("dense: dense", "dense: [dense, other dense]").replace("compare", f"{more}compare")
    Path("table.yaml").write_text(table)
    dense = read_table("table.yaml").dense
    assert dense == {
        **dict.fromkeys(("dense", "half", "same cost"), "dense"),
        **dict.fromkeys(("other dense", "other half"), "other dense"),
    }
    assert make(table=table.replace("{arch: vgg16, keep", "{arch: vgg11, keep")) == 2
    assert "one row of the network of row 'other half' (set FashionMNIST-mini" in capsys.readouterr().err
