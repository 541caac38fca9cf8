"""Rows that start from the run of another row, and the commands that `reproduce --commands` prints."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from args import OPTIONS, parse_args
from tests.tools.stand_in import TABLE, events, report
from tools.table_record import BEST, Record, record_path
from tools.table_runs import Cell, TableRuns
from tools.tables import RUN_OF, read_table

PRUNED = "{keep_ratio: 0.25, pretrained: {run_of: dense}}"
STARTED = TABLE.replace("  half: {keep_ratio: 0.5}\n", f"  half: {PRUNED}\n")
ROOT = Path("runs/tables/table")


def hashes(root: Path = ROOT, recorded: bool = False) -> dict[str, str]:
    """The hash of the first seed of every row."""
    table = read_table("table.yaml")
    runs = TableRuns(table, root, Record(record_path(table)), recorded=recorded)
    return {row: runs.hash(Cell(row, table.seeds[0])) for row in table.rows}


def configs(row: str) -> list[dict]:
    return [yaml.safe_load(path.read_text()) for path in sorted(ROOT.glob(f"*/{row}-seed*/*/config.yaml"))]


# ---- a row that starts from the run of another ----


@pytest.mark.parametrize("key", [key for key in RUN_OF if key in OPTIONS])
def test_a_row_starts_from_the_result_of_the_same_seed_of_another(make, key):
    table = STARTED.replace("pretrained", key)
    table = table if key == "pretrained" else table.replace("keep_ratio: 0.25,", "method: thin, keep_ratio: 0.25,")
    assert make("--jobs", "3", "--rows", "half", table=table) == 0
    order = events("start", "end")
    for seed, config in enumerate(configs("half")):
        assert order.index(f"end dense-seed{seed}") < order.index(f"start half-seed{seed}")
        source = next(ROOT.glob(f"*/dense-seed{seed}/*/{BEST}"))
        assert config[key] == str(source)
        assert config["seed"] == seed
    assert len({path.parts[3] for path in ROOT.glob("*/half-seed*/*/config.yaml")}) == 1  # one hash for both seeds
    assert make("--rows", "half", table=table) == 0
    assert events("start", "resume") == []


def test_its_hash_is_that_of_the_options_of_the_source_wherever_the_folder_lies(make, tmp_path):
    assert make("--runs", str(tmp_path / "runs here"), table=STARTED) == 0
    before = report()
    assert str(tmp_path) not in Path("results/table.runs.json").read_text()
    recorded = json.loads(Path("results/table.runs.json").read_text())["configs"]
    first = {row: found for row, found in hashes(tmp_path / "runs here").items() if found}
    assert recorded[first["half"]]["pretrained"] == f"run of {first['dense']}"
    Path("runs here").rename("moved")
    Path("results/table.runs.json").unlink()
    assert make("--runs", "moved", table=STARTED) == 0
    assert events("start", "resume") == []
    assert report() == before
    shutil.rmtree("moved")
    assert hashes(Path("moved"), recorded=True)["half"] == first["half"]
    assert make("--only-report", table=STARTED) == 0
    assert report() == before


def test_another_source_makes_another_run(make):
    assert make(table=STARTED) == 0
    assert make("--rows", "half", table=STARTED.replace("{method: dense}", "{method: dense, weight_lr: 0.2}")) == 0
    assert events("start") == [f"{row}-seed{seed}" for seed in (0, 1) for row in ("dense", "half")]
    assert make("--rows", "half", table=STARTED.replace("{method: dense}", "{method: dense, print_freq: 7}")) == 0
    assert events("start") == []  # an option that changes no number is no news


def test_a_folder_of_a_table_is_named_by_its_hash_also_where_a_row_gives_it_as_a_path(make):
    assert make("--rows", "dense", table=STARTED) == 0
    source = next(ROOT.glob(f"*/dense-seed1/*/{BEST}"))
    literal = STARTED.replace("{run_of: dense}", str(source))
    assert make("--rows", "half", table=literal) == 0
    assert [config["pretrained"] for config in configs("half")] == [str(source)] * 2
    assert make("--rows", "half", table=literal) == 0
    assert events("start") == []
    assert make("--rows", "half", table=STARTED) == 0  # seed 1 starts from the same file, seed 0 from another
    assert events("start") == ["half-seed0"]


def test_a_source_that_failed_or_is_only_recorded_is_told(make, capsys):
    assert make("--rows", "half", "--seeds", "0", table=STARTED, orders={"dense-seed0": "fail"}) == 1
    assert "half, seed 0: it starts from the run of dense, seed 0, which has no result" in capsys.readouterr().err
    assert make("--rows", "dense", table=STARTED) == 0
    Path("runs").rename("far away")
    assert make("--rows", "half", "--seeds", "0", "--recorded", table=STARTED) == 1
    said = capsys.readouterr().err
    assert "it starts from checkpoints/best.pt of dense, seed 0, and no folder here has that file" in said
    assert "without --recorded if it is only recorded" in said
    assert events("start") == []
    assert make("--rows", "half", "--seeds", "0", table=STARTED) == 0
    assert events("start") == ["dense-seed0", "half-seed0"]
    for file in ROOT.rglob("best.pt"):
        file.unlink()
    assert make("--rows", "half", "--seeds", "0", "--again", table=STARTED) == 1
    assert "with --again if its folder is here" in capsys.readouterr().err
    assert make("--rows", "half", "--seeds", "0", table=STARTED) == 0  # it is done and needs nothing


def test_a_row_can_need_two_others(make, capsys):
    table = STARTED.replace("{keep_ratio: {flops_of: half}, epochs: 8}", PRUNED.replace("0.25", "{flops_of: half}"))
    assert make("--dry-run", "--seeds", "0", table=table) == 0
    states = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()]
    assert states == ["not run yet", "waits for dense", "waits for half, dense"]
    assert make("--rows", "same cost", "--seeds", "1", table=table) == 0
    assert events("start") == ["dense-seed1", "half-seed1", "same_cost-seed1"]


# ---- --commands ----


def commands(make, capsys, *options: str, table: str = STARTED) -> tuple[list[str], list[str]]:
    """What is printed: commands, and comments without their #."""
    capsys.readouterr()
    assert make("--commands", *options, table=table) == 0
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line[0] != "#"], [line[2:] for line in lines if line[0] == "#"]


def run_all(lines: list[str]) -> None:
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    for line in lines:
        subprocess.run(["sh", "-c", line], check=True, env=environment)


def test_the_commands_make_the_table_in_as_many_calls_as_rows_wait_for_each_other(make, capsys):
    told, waiting = commands(make, capsys)
    assert events("start") == []
    assert not Path("results").exists()
    assert [shlex.split(line)[:2] for line in told] == [[sys.executable, "stand_in.py"]] * 2
    assert waiting[:2] == [
        "half, seed 0: it starts from the run of dense, seed 0, which has no result",
        "same cost, seed 0: it takes its FLOPs from half, seed 0, which has no result",
    ]
    assert len(waiting) == 4
    run_all(told)
    assert events("start") == ["dense-seed0", "dense-seed1"]
    told, waiting = commands(make, capsys)
    given = [shlex.split(line)[2:] for line in told]
    assert [words[words.index("--name") + 1] for words in given] == ["half-seed0", "half-seed1"]
    for seed, words in enumerate(given):
        config = parse_args(words).config
        assert (config.run.seed, config.sparsity.keep_ratio, config.run.log_dir) == (seed, 0.25, str(ROOT))
        assert config.model.pretrained == str(next(ROOT.glob(f"*/dense-seed{seed}/*/{BEST}")))
    assert len(waiting) == 2
    run_all(told)
    run_all(commands(make, capsys)[0])
    assert commands(make, capsys) == ([], [])
    assert make("--only-report", table=STARTED) == 0
    assert [row["seeds"] for row in report()] == ["0 1"] * 3
    alone = report()
    shutil.rmtree("runs")
    assert make(table=STARTED) == 0  # the same as by our own loop
    assert report() == alone


def test_commands_are_told_once_and_those_of_rows_and_seeds_that_are_asked_for(make, capsys):
    twin = STARTED.replace("rows:\n", "rows:\n  twin: {method: dense}\n")
    told, waiting = commands(make, capsys, "--rows", "half", "twin", "--seeds", "1", table=twin)
    assert len(told) == 1
    assert "--name dense-seed1" in told[0] or "--name twin-seed1" in told[0]
    assert waiting == ["half, seed 1: it starts from the run of dense, seed 1, which has no result"]


def test_a_stopped_run_goes_on_and_one_under_way_is_left_alone(make, capsys):
    assert make("--rows", "dense", table=STARTED, orders={"dense-seed0": "ctrl-c"}) == 130
    folder = next(ROOT.glob("*/dense-seed0/*/config.yaml")).parent
    told, _ = commands(make, capsys, "--rows", "dense", "--seeds", "0")
    assert [shlex.split(line)[2:] for line in told] == [["--resume", str(folder)]]
    (folder / "run.lock").write_text("process 7 on another-host")
    told, comments = commands(make, capsys, "--rows", "dense", "--seeds", "0")
    assert told == []
    assert comments[0].startswith(f"dense, seed 0: {folder} is in use by process 7 on another-host")
    assert make("--commands", "--jobs", "2") == 2
    assert "--commands does not go with --jobs" in capsys.readouterr().err
