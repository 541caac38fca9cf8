"""What is committed of runs: every table is what its record says, the README and the recipes what the tables say."""

import json
import re
import shutil
from pathlib import Path
from statistics import fmean

import pytest

from args import config_to_dict, parse_args
from tools import reproduce, table_record
from tools.table_record import Record, config_hash, options_of
from tools.tables import read_table

PROJECT = Path(__file__).resolve().parents[2]
RECORDS = sorted((PROJECT / "results").rglob("*.runs.json"))


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.name.split(".")[0])
def test_a_committed_table_is_what_its_record_says(record, tmp_path, monkeypatch):
    name = record.name.removesuffix(".runs.json")
    folder = record.parent.relative_to(PROJECT / "results")
    monkeypatch.chdir(tmp_path)
    results = Path("results", folder)
    results.mkdir(parents=True)
    for path in record.parent.glob(f"{name}.reading.md"):
        shutil.copy(path, results)
    shutil.copy(record, results)
    shutil.copytree(PROJECT / "configs/tables", "configs/tables")
    monkeypatch.setattr(table_record, "TABLES_FOLDER", tmp_path / "configs/tables")
    assert reproduce.main([f"configs/tables/{folder / name}.yaml", "--only-report"]) == 0
    for path in (record, record.with_name(f"{name}.md"), record.with_name(f"{name}.csv")):
        assert (results / path.name).read_text() == path.read_text(), f"{path.name}: write it again, --only-report"


def tables(text: str, above: str = "") -> list[tuple[str, list[dict[str, str]]]]:
    """The Markdown tables below a line that matches `above`: (its first group or "", rows by heading)."""
    found = []
    for match in re.finditer(rf"^{above}\n\n?((?:\|.*\n)+)", text, re.MULTILINE):
        *name, table = match.groups()
        heading, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
        found.append(("".join(name), [dict(zip(heading, row, strict=True)) for row in rows]))
    return found


@pytest.mark.parametrize(("page", "num_tables", "num_lists"), [("README.md", 1, 0), ("docs/results.md", 4, 2)])
def test_a_page_says_what_the_tables_say(page, num_tables, num_lists):
    text = (PROJECT / page).read_text()
    above = r"<!-- of results/(\w+)\.md -->"
    told = tables(text, above)
    lists = re.findall(rf"^{above}\n\n((?:- .*\n)+)", text, re.MULTILINE)
    assert (len(told), len(lists)) == (num_tables, num_lists)
    assert len(told) + len(lists) == text.count("<!-- of results/")
    for name, lines in lists:
        assert set(lines.splitlines()) <= set((PROJECT / f"results/{name}.md").read_text().splitlines()), name
    for name, rows in told:
        [(_, whole)] = tables((PROJECT / f"results/{name}.md").read_text())
        by_name = {row["row"]: row for row in whole}
        for row in rows:
            assert row == {heading: by_name[row["row"]][heading] for heading in row}, name


def test_the_step_times_on_a_gpu_are_those_of_their_record():
    _, *steps = map(json.loads, (PROJECT / "results/gpu/steps.jsonl").read_text().splitlines())
    [(_, rows)] = tables((PROJECT / "docs/speed.md").read_text(), "<!-- of results/gpu/steps.jsonl -->")
    told = 0
    for row in rows:
        network = [step for step in steps if step["network"] == row["network"]]
        masks, scores = row["residual masks"].replace("-", "free"), row["scores"]
        for name in list(row)[4:]:
            found = [step for step in network if step["step"] == name]
            if not name.startswith("dense"):  # which masks do not concern
                found = [s for s in found if (s["residual_masks"], s["scores"]) == (masks, scores)]
                found = [s for s in found if str(s["keep_ratio"]) == row["keep"]]
                told += len(found)
            assert row[name] == (f"{found[0]['ms']:.1f}" if found else "not run yet"), (row, name)
            assert len(found) <= 1
    masked = [step for step in steps if not step["step"].startswith("dense") and step["step"] != "fixed shapes"]
    assert told == len(masked) > 0


def test_the_step_times_on_a_cpu_are_those_of_their_record():
    measured = list(map(json.loads, (PROJECT / "results/cpu/bench.jsonl").read_text().splitlines()))
    [(_, rows)] = tables((PROJECT / "docs/speed.md").read_text(), "<!-- of results/cpu/bench.jsonl -->")
    assert len(rows) == len(measured)
    for row, found in zip(rows, measured, strict=True):
        config, networks = found["config"], found["networks"]
        assert row["network"] == config["arch"] + (" x 0.25" if config["width_mult"] == 0.25 else "")
        assert row["residual masks"] in ("-", config["residual_masks"])
        assert (row["keep"], row["precision"]) == (str(config["keep_ratio"]), config["precision"])
        assert row["scores"] == found["scores"]
        names = {"dense": "dense", "thin": "thin", "compact": "compact", "fixed shapes": "compact, shapes fixed"}
        for heading, name in names.items():
            times = networks.get(name)
            low, high = times["ms_quartiles"] if times else (0, 0)
            assert row[heading] == (f"{times['ms']:,.0f} ({low:,.0f}-{high:,.0f})" if times else "-"), row
        for ratio in ("dense/compact", "dense/thin", "compact/thin"):
            assert row[ratio] == f"{found[ratio]:.2f}"


def test_the_reading_tells_what_the_runs_with_an_unscaled_rate_came_to():
    """No row of the table has them any more; its record does."""
    runs = json.loads((PROJECT / "results/cifar.runs.json").read_text())["runs"]
    rows = ("vgg16 vrpge released 0.5", "vgg16 vrpge released 0.25", "resnet20 vrpge released 0.5")
    means = [f"{fmean(run['test_top1'] for run in runs if run['row'] == row):.1f}" for row in rows]
    text = " ".join((PROJECT / "results/cifar.reading.md").read_text().split())
    assert f"came to {means[0]} and {means[1]} % on VGG-16 and to {means[2]} % on ResNet-20" in text


@pytest.mark.parametrize(
    ("recipe", "table", "row", "left_open"),
    [
        ("best_vgg16_quarter", "archive/search", "8 + 4, end 1", ()),
        ("best_resnet8", "archive/search_resnet", "3 + 3, linear_cv_gates, tangent", ()),
        ("best_resnet20", "archive/search_resnet20", "6 + 6", ()),
        ("early_vgg16_quarter", "long", "early taylor", ("holdout", "precision", "search_epochs", "score_lr")),
        (
            "shrink_pretrained",
            "pretrained",
            "vrpge taylor, 10",
            ("arch", "width_mult", "train_images", "holdout", "precision", "pretrained"),
        ),
    ],
)
def test_a_recipe_is_the_row_that_it_comes_from(recipe, table, row, left_open):
    """But for its images, and for options that it leaves to its user or to a rule."""
    options = read_table(PROJECT / f"configs/tables/{table}.yaml").rows[row].options

    def with_options_of_the_row(keys: tuple[str, ...]) -> dict[str, object]:
        words = [text for key in keys if key in options for text in (f"--{key.replace('_', '-')}", str(options[key]))]
        return config_to_dict(parse_args(["--config", str(PROJECT / f"configs/{recipe}.yaml"), *words]).config)

    assert options_of(with_options_of_the_row(("data", *left_open)), recipe) == options_of(options, row)
    alone = with_options_of_the_row(("data",))
    assert all(alone[key] != options[key] for key in left_open)


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.name.split(".")[0])
def test_a_committed_record_has_every_run_once_and_its_options_are_all_read(record):
    stored = json.loads(record.read_text())
    known = Record(record)
    assert known.unreadable == {}
    assert len(known.runs) == len(stored["runs"])
    assert {run.hash for run in known.runs} == set(stored["configs"])
    for name, options in stored["configs"].items():
        assert name == config_hash(options, stored["defaults"])
