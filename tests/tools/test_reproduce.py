"""Tables of results: what runs when, what is refused, what the report says. A small script stands in for main.py."""

import csv
import json
import math
import os
import sys
from pathlib import Path

import pytest
import yaml

from args import parse_args
from tools import reproduce
from tools.table_report import T_95, Results, interval
from tools.tables import Row, Run, Table, config_hash, options_of, read_table

PROJECT = Path(__file__).parents[2]

# Writes a run folder as main.py does. `orders.json` says by name of the run what else is to happen; `events.txt` gets a
# line for every start, end and signal.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
import yaml

arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--resume" in arguments:
    folder = Path(arguments["--resume"])
else:
    config = Path(arguments["--config"])
    options = yaml.safe_load(config.read_text())
    first = Path(options["log_dir"]) / config.stem / arguments["--name"] / "prune_rate=x"
    number, folder = 0, first
    while folder.exists():
        number += 1
        folder = first / str(number)
    (folder / "checkpoints").mkdir(parents=True)
    known = json.loads(os.environ.get("TEST_DEFAULTS", "{}"))  # main.py writes the defaults of all options
    (folder / "config.yaml").write_text(yaml.safe_dump({**known, **options, "seed": int(arguments["--seed"])}))
options = yaml.safe_load((folder / "config.yaml").read_text())
name = next(part for part in folder.parts if "-seed" in part)
order = json.loads(Path("orders.json").read_text()).get(name, "")


def note(what):
    with open("events.txt", "a") as file:
        file.write(f"{what} {name} {os.environ['OMP_NUM_THREADS']} {os.environ['OMP_WAIT_POLICY']}\\n")


def save(number, frame):
    note("saved")
    (folder / "checkpoints" / "last.pt").write_text("")
    sys.exit(128 + number)


signal.signal(signal.SIGTERM, save)
note("resume" if "--resume" in arguments else "start")
if order == "fail":
    print("error: no luck today", file=sys.stderr)
    sys.exit(3)
if order in ("meet", "ctrl-c together"):  # goes on only if another run is under way at the same time
    deadline = time.monotonic() + 60
    while Path("events.txt").read_text().count("start") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
if order.startswith("ctrl-c"):
    os.kill(os.getppid(), signal.SIGINT)
if order == "wait" or order.startswith("ctrl-c"):
    time.sleep(60)
cpu = os.environ.get("TEST_CPU", "Abacus")
kept, seed, dense = options.get("keep_ratio", 1.0), options["seed"], options.get("method") == "dense"
summary = {
    "heldout_top1": 50.0 + seed,
    "test_top1": 90.0 + seed if dense else 80.0 + 10 * kept + 2 * seed,
    "flops_ratio": 1.0 if dense else kept**2 + seed / 1024,
    "params_kept": kept,
    "train_flops_ratio": kept,
    "train_seconds": 100.0 * kept if cpu == "Abacus" else 80.0 * kept + 20,
    "epochs": options["epochs"],
}
(folder / "env.json").write_text(json.dumps({
    "cpu": cpu, "cpu_capability": "AVX2", "num_threads": 2, "torch": "2.14.1", "gpu": os.environ.get("TEST_GPU"),
    "git_commit": "0123456789abcdef", "git_dirty": False,
}))
note("end")
(folder / "summary.json").write_text(json.dumps(summary))
"""
TABLE = """
title: A table
note: Three rows.
base: {arch: resnet20_he, epochs: 4, finetune: false}
seeds: [0, 1]
dense: dense
rows:
  dense: {method: dense}
  half: {keep_ratio: 0.5}
  same cost: {keep_ratio: {flops_of: half}, epochs: 8}
compare: [[half, same cost]]
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Runs the command in an empty folder with the stand-in for main.py; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def command(*options: str, table: str = TABLE, orders: dict | None = None) -> int:
        Path("table.yaml").write_text(table)
        Path("orders.json").write_text(json.dumps(orders or {}))
        Path("events.txt").write_text("")
        return reproduce.main(["table.yaml", *options], program=[sys.executable, "stand_in.py"])

    return command


def events(*kinds: str) -> list[str]:
    """What the stand-ins did, in order; without the kind if only one is asked for."""
    words = [line.split() for line in Path("events.txt").read_text().splitlines()]
    return [name if len(kinds) == 1 else f"{kind} {name}" for kind, name, *_ in words if kind in kinds]


def report() -> list[dict[str, str]]:
    with open("results/table.csv", newline="") as file:
        return list(csv.DictReader(file))


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
        ("{flops_of: half}", "{flop: half}", "row 'same cost': keep_ratio must be a number or {flops_of: ROW}"),
        ("{flops_of: half},", "{flops_of: half}, prune_rate: 1,", "two names of one option"),
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


# ---- the report ----


def student(t: float, degrees: int) -> float:
    """P(|T| < t) of a t distribution by the trapezoidal rule in the angle, where the density is a power of cos."""
    points = 20_000
    top = math.atan(t / math.sqrt(degrees))
    heights = [math.cos(top * k / points) ** (degrees - 1) for k in range(points + 1)]
    area = top / points * (sum(heights) - (heights[0] + heights[-1]) / 2)
    return 2 * area * math.gamma((degrees + 1) / 2) / (math.gamma(degrees / 2) * math.sqrt(math.pi))


def test_the_table_of_t_quantiles_is_right():
    assert len(T_95) == 30
    for degrees, t in enumerate(T_95, start=1):
        assert student(t, degrees) == pytest.approx(0.95, abs=1e-7)


def test_an_interval_of_many_differences_is_a_little_too_wide():
    low, high = interval([-1.0, 1.0] * 50)  # standard deviation sqrt(100/99), mean 0; the quantile for 99 is 1.984
    right = 1.98422 / math.sqrt(99)
    assert right < high == -low < 1.05 * right


def test_the_interval_of_a_known_case():
    """Differences 1, 2, 3: mean 2, standard deviation 1, half width 4.30265 / sqrt(3)."""
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)


def test_the_report_tells_means_differences_and_where_they_come_from(make):
    assert make() == 0
    dense, half, same = report()
    assert (float(half["test_top1"]), float(half["test_top1_sd"])) == pytest.approx((86, math.sqrt(2)))
    assert float(half["test_top1_minus_dense"]) == pytest.approx(-4.5)  # 85 - 90 and 87 - 91
    assert float(half["flops_ratio"]) == 0.25 + 0.5 / 1024
    assert float(half["params_kept"]) == 0.5
    # twice as many epochs as the dense row at (0.25 + seed/1024) of dense training each
    assert float(same["train_flops_to_dense"]) == pytest.approx(2 * (0.25 + 0.5 / 1024))
    assert float(dense["test_top1_minus_dense"]) == 0
    assert len(half["config_hash"].split()) == 1
    assert len(same["config_hash"].split()) == 2  # its keep_ratio differs from seed to seed

    text = Path("results/table.md").read_text()
    assert text.startswith("# A table\n\nThree rows.\n\n| row | test top-1 % | sd |")
    hash = half["config_hash"]
    assert f"| half | 86.00 | 1.41 | -4.50 | 25.0 % | 50.0 % | 50.0 % | not run yet | 0 1 | {hash} |" in text
    for fact in ("Abacus (AVX2), 2 threads", "torch 2.14.1", "commit 0123456789ab", "tools.reproduce table.yaml`"):
        assert fact in text
    # 85 - 82.5 and 87 - (82.5 + 10/1024 + 2): 2.5 and 2.490, with one degree of freedom
    sentence = (
        "- half - same cost: +2.5 points (95 % interval +2.4 to +2.6, 2 seeds), inference FLOPs 25.0 % against 6.3 %."
    )
    assert sentence in text


def by_hand(**numbers: dict[int, dict]) -> Results:
    """Results of runs that are made up: numbers by row and seed. The dense row is "dense"."""

    def made(row: str, seed: int, facts: dict) -> Run:
        usual = {"test_top1": 50.0, "flops_ratio": 0.5, "params_kept": 0.5, "train_flops_ratio": 1.0}
        facts = {**usual, "train_seconds": 1.0, "epochs": 1, **facts}
        return Run(row, seed, f"hash of {row}", False, "2026-01-01", 0, facts, {})

    rows = {row: Row(row, {}, None, row) for row in numbers}
    table = Table(Path("x.yaml"), "x", "", (0, 1, 2, 3), rows, dict.fromkeys(rows, "dense"), (), "test")
    runs = {row: {seed: made(row, seed, facts) for seed, facts in by_seed.items()} for row, by_seed in numbers.items()}
    return Results(table, runs, {row: [] for row in rows})


def test_means_are_over_all_seeds_and_differences_over_common_ones():
    top1 = {"dense": {0: 90.0, 1: 80.0, 3: 10.0}, "half": {0: 60.0, 1: 70.0, 2: 20.0}, "none": {2: 1.0}}
    results = by_hand(**{row: {seed: {"test_top1": value} for seed, value in of.items()} for row, of in top1.items()})
    line = results.line("half")
    assert line["_top1"] == 50
    assert line["_top1_sd"] == pytest.approx(math.sqrt((10**2 + 20**2 + 30**2) / 2))  # n - 1
    assert line["_top1_minus_dense"] == -20  # the mean of -30 and -10
    assert line["seeds"] == "0 1 2"
    # -20 -+ 12.7062 * sqrt(200) / sqrt(2)
    assert "half - dense: -20.0 points (95 % interval -147.1 to +107.1, 2 seeds)" in results.compared("half", "dense")
    assert results.compared("none", "dense") == "none - dense: not run yet."  # no seed in common
    assert results.line("none")["_top1_minus_dense"] is None


def test_costs_are_means_over_seeds_and_compared_over_common_ones():
    halves = {0: {"flops_ratio": 0.1, "params_kept": 0.4}, 1: {"flops_ratio": 0.3, "params_kept": 0.8}}
    results = by_hand(dense={0: {"flops_ratio": 1.0}}, half=halves)
    line = results.line("half")
    assert (line["flops_ratio"], line["params_kept"]) == pytest.approx((0.2, 0.6))
    assert "inference FLOPs 10.0 % against 100.0 %" in results.compared("half", "dense")


def test_training_flops_are_told_against_as_many_dense_epochs_as_the_dense_row_has():
    """A run says which part of dense training for its own epochs it computed."""
    dense = {0: {"epochs": 12, "train_flops_ratio": 1.25}, 1: {"epochs": 12, "train_flops_ratio": 1.25}}
    half = {0: {"epochs": 6, "train_flops_ratio": 0.5}, 1: {"epochs": 24, "train_flops_ratio": 0.25}}
    results = by_hand(dense=dense, half=half)
    assert results.line("half")["train_flops_to_dense"] == pytest.approx((6 / 12 * 0.5 + 24 / 12 * 0.25) / 2)
    assert results.line("dense")["train_flops_to_dense"] == 1.25
    assert by_hand(dense={}, half=half).line("half")["train_flops_to_dense"] is None


def test_every_figure_stands_under_its_heading(make):
    """Numbers of one row that all differ, in CSV and in Markdown."""
    assert make("--seeds", "0") == 0
    assert make("--time") == 0
    row, text = report()[2], Path("results/table.md").read_text()
    expected = {
        "row": "same cost", "test_top1": "82.5", "test_top1_sd": "", "test_top1_minus_dense": "-7.5",
        "flops_ratio": "0.0625", "params_kept": "0.25", "train_flops_to_dense": "0.5", "train_seconds_to_dense": "0.25",
        "seeds": "0",
    }  # fmt: skip
    assert {**expected, "config_hash": row["config_hash"]} == row
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert dict(zip(table[0], table[4], strict=True)) == {
        "row": "same cost", "test top-1 %": "82.50", "sd": "-", "minus dense": "-7.50", "inference FLOPs": "6.2 %",
        "params kept": "25.0 %", "training FLOPs to dense": "50.0 %", "training seconds to dense": "25.0 %",
        "seeds": "0", "config": row["config_hash"],
    }  # fmt: skip


def test_one_seed_has_no_interval_and_missing_rows_say_so(make):
    assert make("--only-report") == 0
    assert all(set(row.values()) == {row["row"], "not run yet"} for row in report())
    assert "- half - same cost: not run yet." in Path("results/table.md").read_text()
    assert make("--seeds", "0") == 0
    text = Path("results/table.md").read_text()
    assert "(1 seed, no interval)" in text
    assert "| half | 85.00 | - | -5.00 |" in text
    assert report()[1]["test_top1_sd"] == ""


def test_a_reading_by_hand_survives(make):
    Path("results").mkdir()
    Path("results/table.reading.md").write_text("What a person has to say.\n")
    for _ in range(2):
        assert make("--only-report") == 0
        text = Path("results/table.md").read_text()
        assert text.endswith("\nWhat a person has to say.\n")
    assert text.count("What a person has to say.") == 1


# ---- the real thing ----


def test_a_real_run_is_found_by_its_own_config(tmp_path, monkeypatch, tiny_images):
    monkeypatch.chdir(tmp_path)
    options = {"set": "ImageFolder", "data": str(tiny_images), "arch": "resnet20_he", "width_mult": 0.25, "workers": 0}
    options |= {"epochs": 1, "batch_size": 40, "finetune": False, "num_subnets": 1, "bn_batches": 1, "holdout": 0.2}
    table = {"title": "One", "base": options, "seeds": [3], "dense": "half", "rows": {"half": {"keep_ratio": 0.5}}}
    Path("one.yaml").write_text(yaml.safe_dump(table))
    assert reproduce.main(["one.yaml"]) == 0
    with open("results/one.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert row["seeds"] == "3"
    assert 0 < float(row["flops_ratio"]) < 1
    assert reproduce.main(["one.yaml"], program=["false"]) == 0  # nothing is left to run


@pytest.mark.parametrize("path", sorted((PROJECT / "configs/tables").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_tables_of_the_project_are_valid(path):
    table = read_table(path)
    assert table.judge == "heldout" or len(table.seeds) >= 3
    for row in table.rows.values():
        matched = table.rows.get(row.flops_of)
        if matched is not None:  # a fair comparison: as many epochs, or as many seconds
            difference = total_epochs(row.options) - total_epochs(matched.options)
            assert difference > 0 if row.name.endswith(" longer") else difference == 0


def total_epochs(options: dict) -> int:
    return options["epochs"] + (options["finetune_epochs"] if options.get("finetune", True) else 0)
