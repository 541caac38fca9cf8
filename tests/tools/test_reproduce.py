"""Tables of results: what runs when, what is refused, what the report says. A small script stands in for main.py."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from args import parse_args
from tests.tools.stand_in import PROJECT, TABLE, events, report
from tools import reproduce, table_record
from tools.table_record import config_hash, options_of
from tools.tables import read_table

# ---- what runs when ----


def test_every_row_and_seed_runs_once_and_a_row_waits_for_the_flops_of_another(make):
    assert make() == 0
    names = [f"{row}-seed{seed}" for seed in (0, 1) for row in ("dense", "half", "same_cost")]
    assert events("start") == names
    for seed in (0, 1):
        config = next(Path("runs/tables/table").glob(f"*/same_cost-seed{seed}/*/config.yaml"))
        assert parse_args(["--config", str(config)]).config.sparsity.keep_ratio == 0.25 + seed / 1024
    assert make() == 0
    assert events("start", "resume") == []


@pytest.mark.parametrize("jobs", [2, 3])
def test_jobs_run_side_by_side_and_never_more(make, jobs):
    orders = {f"{row}-seed{seed}": "meet" for row in ("dense", "half") for seed in (0, 1)}
    assert make("--jobs", str(jobs), orders=orders) == 0
    under_way = [0]
    for event in events("start", "end"):
        under_way.append(under_way[-1] + (1 if event.startswith("start") else -1))
    assert max(under_way) <= jobs
    assert len(events("start")) == 6
    threads = {tuple(line.split()[2:]) for line in Path("events.txt").read_text().splitlines()}
    assert threads == {(str(max(1, len(os.sched_getaffinity(0)) // jobs)), "passive")}


def test_a_change_of_the_table_makes_only_what_is_new(make):
    assert make() == 0
    assert make(table=TABLE.replace("[0, 1]", "[0, 1, 2]")) == 0
    assert events("start") == ["dense-seed2", "half-seed2", "same_cost-seed2"]
    assert make(table=TABLE.replace("epochs: 8", "epochs: 9")) == 0
    assert events("start") == ["same_cost-seed0", "same_cost-seed1"]
    # a new name, an option that changes no number and an order of keys are no news
    renamed = TABLE.replace("half", "0.5").replace("{arch: resnet20_he,", "{print_freq: 7, arch: resnet20_he,")
    assert make(table=renamed) == 0
    assert events("start") == []


def stored_configs(row: str) -> list[Path]:
    return sorted(Path("runs/tables/table").glob(f"*/{row}-seed*/*/config.yaml"))


def test_a_stored_config_may_say_a_default_but_not_another_value(make):
    assert make() == 0
    for config in stored_configs("half"):
        config.write_text(config.read_text() + "momentum: 0.9\n")  # the default
    assert make() == 0
    assert events("start") == []
    for config in stored_configs("half"):
        config.write_text(config.read_text().replace("momentum: 0.9", "momentum: 0.8"))
    assert make("--rows", "half") == 0
    assert events("start") == ["half-seed0", "half-seed1"]


# ---- the hash, when the options of the program change ----

MOMENTUM = '"momentum": 0.9, '


def test_a_hash_stands_for_the_options_that_differ_from_the_first_defaults():
    options, defaults = options_of({"keep_ratio": 0.3}, "here"), options_of({}, "here")
    first = config_hash(options, defaults)
    assert first == config_hash({"keep_ratio": 0.3}, {"keep_ratio": 0.5})
    assert first == config_hash({**options, "new": 1}, {**defaults, "new": 1})  # the program gained an option
    assert first != config_hash({**options, "new": 2}, {**defaults, "new": 1})
    for key in set(options) - {"keep_ratio"}:  # it lost one, or the default of one changed
        assert first == config_hash({name: value for name, value in options.items() if name != key}, defaults)
        assert first != config_hash({**options, key: "another"}, defaults)
    assert config_hash(defaults, defaults) != first
    no_numbers = {
        "seed": 5,
        "name": "x",
        "log_dir": "y",
        "print_freq": 7,
        "save_every": 3,
        "test_every": 0,
        "workers": 1,
    }
    assert options_of(no_numbers, "here") == options_of({}, "here")


def test_an_option_that_is_added_later_keeps_hashes_and_runs(make):
    """As if the runs had been recorded by a program without momentum."""
    assert make() == 0
    before, record = report(), Path("results/table.runs.json")
    text = record.read_text()
    assert text.count(MOMENTUM) == 1 + 4  # the defaults; dense, half, and same cost by seed
    record.write_text(text.replace(MOMENTUM, ""))
    for place in ("runs", "far away"):  # with the run folders, then from the record alone
        assert make() == 0 if place == "runs" else make("--only-report") == 0
        assert events("start") == []
        assert report() == before
        assert record.read_text() == text  # it keeps the default with which it first sees the option
        if place == "runs":
            Path("runs").rename("far away")


def test_a_changed_default_gives_new_hashes_and_runs_and_old_runs_keep_theirs(make, monkeypatch):
    """As if momentum had been 0.8 by default when the runs were made, and is 0.9 today."""
    assert make() == 0
    before, record = report(), Path("results/table.runs.json")
    record.write_text(record.read_text().replace(MOMENTUM, '"momentum": 0.8, '))
    stored = json.loads(record.read_text())
    assert make("--only-report") == 0  # the configs in the folders do not name momentum: they are older
    assert [row["seeds"] for row in report()] == ["not run yet"] * 3
    assert json.loads(record.read_text()) == stored
    assert make(table=TABLE.replace("arch:", "momentum: 0.8, arch:")) == 0  # the rows as they were
    assert events("start") == []
    assert report() == before
    Path("runs").rename("far away")
    monkeypatch.setenv("TEST_DEFAULTS", '{"momentum": 0.9}')
    assert make("--recorded") == 0
    assert len(events("start")) == 6
    after = report()
    assert [{**row, "config_hash": ""} for row in after] == [{**row, "config_hash": ""} for row in before]
    hashes = [set(row["config_hash"].split()) for row in (*before, *after)]
    assert len(set.union(*hashes)) == 2 * 4
    assert len(json.loads(record.read_text())["runs"]) == 2 * 6


def test_the_runs_of_an_older_record_are_all_kept_under_the_hashes_of_today(make):
    """A record without defaults, whose hashes were made by another rule."""
    assert make() == 0
    record = Path("results/table.runs.json")
    text = record.read_text()
    stored = json.loads(text)
    old = {name: name[::-1] for name in stored["configs"]}
    stored["configs"] = {old[name]: options for name, options in stored["configs"].items()}
    stored["runs"] = [{**run, "config": old[run["config"]]} for run in stored["runs"]]
    del stored["defaults"]
    record.write_text(json.dumps(stored))
    Path("runs").rename("far away")
    assert make("--only-report") == 0
    assert record.read_text() == text


def test_rows_and_seeds_limit_what_is_made_but_not_what_it_waits_for(make, capsys):
    assert make("--rows", "same cost", "--seeds", "1") == 0
    assert events("start") == ["half-seed1", "same_cost-seed1"]
    assert make("--rows", "same cost", "--seeds", "1", "--again") == 0
    assert events("start") == ["same_cost-seed1"]
    assert [row["seeds"] for row in report()] == ["not run yet", "1", "1"]
    assert make("--rows", "haf") == 2
    assert "did you mean 'half'?" in capsys.readouterr().err
    assert make("--seeds", "7") == 2
    assert "7 is none of the seeds of table.yaml" in capsys.readouterr().err


def test_rows_of_the_same_options_share_their_runs(make):
    table = TABLE.replace("rows:\n", "rows:\n  twin: {keep_ratio: 0.5}\n")
    assert make("--jobs", "2", table=table) == 0
    assert sorted(events("start")) == [f"{row}-seed{seed}" for row in ("dense", "same_cost", "twin") for seed in (0, 1)]
    twin, _, half, _ = report()
    assert {**twin, "row": "half"} == half


def test_again_counts_the_newest_run(make):
    assert make("--rows", "half", "--seeds", "0") == 0
    old = next(Path("runs/tables/table").glob("*/half-seed0/*/summary.json"))
    old.write_text(old.read_text().replace("85.0", "12.0"))
    assert make("--only-report") == 0
    assert report()[1]["test_top1"] == "12.0"
    assert make("--rows", "half", "--seeds", "0", "--again") == 0
    assert report()[1]["test_top1"] == "85.0"


def test_ctrl_c_lets_the_runs_save_and_the_next_call_resumes_them(make):
    orders = {"dense-seed0": "wait", "half-seed0": "ctrl-c together"}
    assert make("--jobs", "2", orders=orders) == 130
    assert sorted(events("saved")) == ["dense-seed0", "half-seed0"]
    assert not Path("results").exists()
    assert make() == 0
    assert events("resume") == ["dense-seed0", "half-seed0"]
    assert "same_cost-seed0" in events("start")
    assert len(list(Path("runs/tables/table").glob("*/*-seed*/*/summary.json"))) == 6


def test_a_failed_run_is_told_with_its_last_error_and_the_others_go_on(make, capsys):
    assert make(orders={"half-seed0": "fail"}) == 1
    said = capsys.readouterr()
    assert "failed: half, seed 0: exit code 3: no luck today" in said.err
    assert "failed: same cost, seed 0: it takes its FLOPs from half, seed 0, which has no result" in said.err
    assert [row["seeds"] for row in report()] == ["0 1", "1", "1"]
    assert make() == 0
    assert events("start") == ["half-seed0", "same_cost-seed0"]


def test_a_run_without_a_checkpoint_starts_anew(make):
    assert make(orders={"dense-seed0": "ctrl-c"}) == 130
    next(Path("runs").rglob("last.pt")).unlink()
    assert make("--rows", "dense", "--seeds", "0") == 0
    assert events("start", "resume") == ["start dense-seed0"]


def test_dry_run_lists_and_writes_nothing(make, capsys):
    assert make("--dry-run") == 0
    assert not Path("runs").exists()
    options = options_of({"arch": "resnet20_he", "epochs": 4, "finetune": False}, "here")
    first = config_hash(options, options_of({}, "here"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"half, seed 0:  not run yet  {first}"  # keep_ratio 0.5 is the default
    assert lines[2] == "same cost, seed 0:  waits for half"
    make("--seeds", "0", orders={"half-seed0": "ctrl-c"})
    capsys.readouterr()
    assert make("--dry-run") == 0
    states = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()]
    assert states == ["done", "interrupted", "waits for half", "not run yet", "not run yet", "waits for half"]


def test_times_come_from_runs_of_their_own_one_after_the_other(make):
    assert make("--jobs", "2") == 0
    assert {row["train_seconds_to_dense"] for row in report()} == {"not run yet"}
    orders = {"half-seed0": "wait"}
    for summary in Path("runs/tables/table").rglob("summary.json"):  # of the runs side by side: not these seconds
        summary.write_text(summary.read_text().replace('"train_seconds": ', '"train_seconds": 9'))
    assert make("--time") == 0
    order = [f"{kind} {name}-seed0" for name in ("dense", "half", "same_cost") for kind in ("start", "end")]
    assert events("start", "end") == order
    assert [float(row["train_seconds_to_dense"]) for row in report()] == [1.0, 0.5, 0.25]
    assert make("--time", orders=orders) == 0
    assert events("start") == []


def test_a_run_that_ran_alone_gives_numbers_as_well_as_seconds(make):
    assert make("--time") == 0
    assert [row["seeds"] for row in report()] == ["0", "0", "0"]
    assert make("--jobs", "2") == 0
    assert sorted(events("start")) == ["dense-seed1", "half-seed1", "same_cost-seed1"]


def test_a_run_that_was_stopped_alone_goes_on_alone(make):
    assert make("--time", orders={"dense-seed0": "ctrl-c"}) == 130
    assert make("--rows", "dense", "--seeds", "0") == 0
    assert events("start", "resume") == ["start dense-seed0"]
    assert make("--time", "--rows", "dense") == 0
    assert events("start", "resume") == ["resume dense-seed0"]


def test_a_table_to_choose_from_does_not_tell_of_test_images(make, capsys):
    assert make(table=f"{TABLE}judge: heldout\n") == 0
    assert [float(row["heldout_top1"]) for row in report()] == [50.5] * 3
    assert "| row | held-out top-1 % | sd |" in Path("results/table.md").read_text()
    assert all("test" not in path.read_text() for path in Path("results").iterdir())
    assert "85.00" not in capsys.readouterr().out


# ---- where the results go ----


def test_results_of_a_users_table_lie_next_to_it_and_those_of_the_project_in_results(make, tmp_path, monkeypatch):
    assert make("--seeds", "0") == 0
    assert sorted(path.name for path in Path("results").iterdir()) == ["table.csv", "table.md", "table.runs.json"]
    monkeypatch.setattr(table_record, "TABLES_FOLDER", tmp_path / "configs/tables")
    folder = tmp_path / "mine"
    folder.mkdir()
    Path("table.yaml").rename(folder / "own.yaml")
    shutil.rmtree("results")
    for _ in range(2):  # the second time there is a record
        assert reproduce.main(["mine/own.yaml", "--seeds", "0"], program=[sys.executable, "stand_in.py"]) == 0
    assert {path.name for path in folder.iterdir()} == {"own.yaml", "own.csv", "own.md", "own.runs.json"}
    assert not Path("results").exists()
    assert Path("runs/tables/own").is_dir()


@pytest.mark.parametrize("ending", ["md", "csv"])
def test_a_file_that_is_no_report_is_not_written_over(make, tmp_path, monkeypatch, capsys, ending):
    monkeypatch.setattr(table_record, "TABLES_FOLDER", tmp_path / "configs/tables")
    Path(f"table.{ending}").write_text("what I found out")
    assert make() == 2
    assert f"table.{ending} is there already" in capsys.readouterr().err
    assert Path(f"table.{ending}").read_text() == "what I found out"
    assert events("start") == []


def test_the_rule_is_told(capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "into results/ for a table in configs/tables/ of this repository, and next to any other table" in said


# ---- the real thing ----


def test_a_real_run_is_found_by_its_own_config(tmp_path, monkeypatch, tiny_images):
    monkeypatch.chdir(tmp_path)
    options = {"set": "ImageFolder", "data": str(tiny_images), "arch": "resnet8_he", "width_mult": 0.25, "workers": 0}
    options |= {"epochs": 1, "batch_size": 40, "finetune": False, "num_subnets": 1, "bn_batches": 1, "holdout": 0.2}
    options["score_lr"] = "auto"  # the run has a number in its place
    table = {"title": "One", "base": options, "seeds": [3], "dense": "half", "rows": {"half": {"keep_ratio": 0.5}}}
    Path("one.yaml").write_text(yaml.safe_dump(table))
    assert reproduce.main(["one.yaml"]) == 0
    assert not Path("results").exists()
    with open("one.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert row["seeds"] == "3"
    assert 0 < float(row["flops_ratio"]) < 1
    assert reproduce.main(["one.yaml"], program=["false"]) == 0  # nothing is left to run


@pytest.mark.parametrize("path", sorted((PROJECT / "configs/tables").rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_tables_of_the_project_are_valid(path):
    table = read_table(path)
    assert table.judge == "heldout" or len(table.seeds) >= 3
    for row in table.rows.values():
        for matched in map(
            table.rows.get, row.flops_of.values()
        ):  # a fair comparison: as many epochs, or as many seconds
            difference = total_epochs(row.options) - total_epochs(matched.options)
            assert difference > 0 if row.name.endswith(" longer") else difference == 0


def total_epochs(options: dict) -> int:
    return options["epochs"] + (options["finetune_epochs"] if options.get("finetune", True) else 0)
