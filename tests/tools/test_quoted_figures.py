"""Differences that the prose tells are those of the runs on record.

A comment right behind a figure says which rows it is the difference of:

    is 1.9<!-- cifar: vgg16 vrpge best 0.25 - vgg16 thin 0.25 --> points above thin (+0.6 to +3.3, 5 seeds)

The number in front is checked against the mean over all seeds that both rows have, and so are an interval ("+0.6 to
+3.3") and a number of seeds ("5 seeds", "four seeds") that follow in the same sentence. A figure without a sign is
positive unless "below" follows it, and an interval goes with the sign of its figure. "cifar by heldout: ..." takes the
held-out images; "small: ... and cifar: ..." puts the seeds of two tables together. An interval without such a comment
is an error. All is computed here from the records, apart from the code that writes the tables.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PAGES = [
    PROJECT / "README.md",
    *sorted((PROJECT / "docs").glob("*.md")),
    *sorted(PROJECT.glob("results/**/*.reading.md")),
    PROJECT / "results/archive/README.md",
]

COMMENT = re.compile(r"(?P<figure>[+-]?\d+\.\d+)<!-- (?P<rows>\w+(?: by \w+)?: [^>]*?) -->")
INTERVAL = re.compile(r"([+-]\d+\.\d+)\s+to\s+([+-]\d+\.\d+)")
SEEDS = re.compile(r"\b(\d+|one|two|three|four|five|six|seven|eight) seeds\b")
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
# Student's t, 95 % inside, by degrees of freedom: any printed table has them
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Quote:
    """A difference as a page tells it; what the page does not say is None."""

    figure: str
    rows: str
    is_below: bool
    interval: tuple[str, str] | None
    num_seeds: int | None


def quotes(text: str) -> list[Quote]:
    found = []
    matches = list(COMMENT.finditer(text))
    for match, following in zip(matches, [*matches, None][1:], strict=True):
        rest = text[match.end() : following.start() if following else None]
        sentence = re.split(r"\.\s|\n\s*\n|\n- ", rest)[0]
        seeds, interval = SEEDS.search(sentence), INTERVAL.search(sentence)
        found.append(
            Quote(
                figure=match["figure"],
                rows=" ".join(match["rows"].split()),
                is_below=re.match(r"\s+(points\s+)?\W*below\b", sentence) is not None,
                interval=interval and interval.groups(),
                num_seeds=seeds and (int(seeds[1]) if seeds[1].isdigit() else 1 + WORDS.index(seeds[1])),
            )
        )
    return found


def differences(rows: str, results: Path = PROJECT / "results") -> list[float]:
    """Top-1 of the first row minus that of the second, for each seed that both have."""
    found = []
    for part in rows.split(" and "):
        table, pair = part.split(": ", 1)
        name, _, judge = table.partition(" by ")
        [page] = results.rglob(f"{name}.csv")  # here or in the archive
        with open(page, newline="") as file:
            lines = list(csv.DictReader(file))
        hashes = {line["row"]: line["config_hash"].split() for line in lines}
        judge = judge or ("test" if "test_top1" in lines[0] else "heldout")
        runs = sorted(
            json.loads(page.with_name(f"{name}.runs.json").read_text())["runs"], key=lambda run: run["started"]
        )
        one, other = (
            {run["seed"]: run[f"{judge}_top1"] for run in runs if run["row"] == row and run["config"] in hashes[row]}
            for row in pair.split(" - ")
        )
        found += [one[seed] - other[seed] for seed in one if seed in other]
    return found


def told(numbers: list[float]) -> tuple[str, tuple[str, str] | None]:
    """The mean and its interval as they are told, with signs."""
    mean = fmean(numbers)
    if len(numbers) == 1:
        return f"{mean:+.1f}", None
    half = T[len(numbers) - 1] * stdev(numbers) / sqrt(len(numbers))
    return f"{mean:+.1f}", (f"{mean - half:+.1f}", f"{mean + half:+.1f}")


def mistakes(quote: Quote, numbers: list[float]) -> list[str]:
    """What a quotation has wrong."""
    figure, interval = told(numbers)
    said = quote.figure if quote.figure[0] in "+-" else ("-" if quote.is_below else "+") + quote.figure
    wrong = []
    if float(said) != float(figure):
        wrong.append(f"{said} is {figure}")
    if quote.interval and (interval is None or [*map(float, quote.interval)] != [*map(float, interval)]):
        wrong.append(f"{' to '.join(quote.interval)} is {interval and ' to '.join(interval)}")
    if quote.num_seeds is not None and quote.num_seeds != len(numbers):
        wrong.append(f"{quote.num_seeds} seeds are {len(numbers)}")
    return wrong


def without_tables(text: str) -> str:
    """The text less what `test_results.py` holds to the tables: the lists of differences."""
    return re.sub(r"^- .* - .*: [+-]\d+\.\d points \(.*\n", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_differences_in_prose_are_those_on_record(page):
    text = without_tables(page.read_text())
    wrong = {f"{quote.rows}": mistakes(quote, differences(quote.rows)) for quote in quotes(text)}
    assert {rows: said for rows, said in wrong.items() if said} == {}
    assert len(INTERVAL.findall(text)) == sum(quote.interval is not None for quote in quotes(text)), (
        "an interval without a comment that names its rows"
    )
    assert text.count("<!--") - text.count("<!-- of results/") == len(quotes(text)), "a comment behind no figure"


def test_some_figures_are_quoted():
    assert sum(len(quotes(page.read_text())) for page in PAGES) > 10


RIGHT = "is 1.9<!-- cifar: a - b --> points above b (95 % interval\n+0.6 to +3.3, 5 seeds). It is 7.5 (+1.0 to +2.0)."


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (RIGHT, []),
        (RIGHT.replace("1.9", "+1.9"), []),
        (RIGHT.replace("1.9", "2.0"), ["+2.0 is +1.9"]),
        (RIGHT.replace("1.9", "-1.9"), ["-1.9 is +1.9"]),
        (RIGHT.replace("above", "**below**"), ["-1.9 is +1.9"]),
        (RIGHT.replace("+3.3", "+3.4"), ["+0.6 to +3.4 is +0.6 to +3.3"]),
        (RIGHT.replace("5 seeds", "four seeds"), ["4 seeds are 5"]),
    ],
)
def test_a_wrong_figure_is_found(text, wrong):
    """Differences with mean 1.94 and interval 0.60 to 3.28."""
    numbers = [0.5, 1.5, 1.6, 2.9, 3.2]
    [quote] = quotes(text)
    assert quote.rows == "cifar: a - b"
    assert mistakes(quote, numbers) == wrong


def test_differences_are_over_the_seeds_that_both_rows_have_and_by_their_present_options(tmp_path):
    def run(row: str, seed: int, top1: float, started: int = 1, config: str = "x") -> dict:
        numbers = {"test_top1": top1, "heldout_top1": 50 + seed}
        return {"row": row, "seed": seed, "started": started, "config": config, **numbers}

    old = [run("a", 0, 1.0, 0), run("a", 0, 2.0, 3, "given up")]
    runs = [*old, run("a", 0, 70.0), run("a", 1, 72.0), run("a", 2, 90.0), run("b", 0, 69.0), run("b", 1, 73.5)]
    (tmp_path / "t.runs.json").write_text(json.dumps({"runs": runs}))
    (tmp_path / "t.csv").write_text("row,test_top1,config_hash\na,1,x\nb,1,x y\n")
    assert differences("t: a - b", tmp_path) == [1.0, -1.5]
    assert differences("t by heldout: a - b and t: b - a", tmp_path) == [0, 0, -1.0, 1.5]
