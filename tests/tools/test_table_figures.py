"""The figures of a table where rows have different seeds: each is computed here from what the stand-in writes."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from statistics import fmean

import pytest

from tests.tools.stand_in import TABLE, report

THREE_SEEDS = (
    TABLE.replace("seeds: [0, 1]", "seeds: [0, 1, 2]")
    .replace("same cost: {keep_ratio: {flops_of: half}, epochs: 8}", "quarter: {keep_ratio: 0.25, epochs: 6}")
    .replace("[[half, same cost]]", "[[half, dense], [quarter, half]]")
)
SEEDS = {"dense": (0, 1), "half": (0, 1, 2), "quarter": (0, 2)}
T = {1: 12.70620, 2: 4.30265, 4: 2.77645}


def top1(row: str, seed: int) -> float:
    """As the stand-in for main.py has it, as all below."""
    return 90.0 + seed if row == "dense" else 80 + 10 * kept(row) + 2 * seed


def kept(row: str) -> float:
    return {"dense": 1.0, "half": 0.5, "quarter": 0.25}[row]


def flops(row: str, seed: int) -> float:
    return 1.0 if row == "dense" else kept(row) ** 2 + seed / 64


def sd(numbers: list[float]) -> float:
    mean = fmean(numbers)
    return sqrt(sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))


# 1 + 2 + 1 degrees of freedom: sums of squares of 90 and 91, of 85, 87, 89, and of 82.5 and 86.5
POOLED = sqrt((0.5 + 8 + 8) / 4)


def differences(row: str, other: str) -> list[float]:
    """For the seeds of both. The seed is in the accuracy, so others would give another number."""
    return [top1(row, seed) - top1(other, seed) for seed in SEEDS[row] if seed in SEEDS[other]]


@pytest.fixture
def table(make) -> dict[str, dict[str, str]]:
    stand_in = Path("stand_in.py")
    stand_in.write_text(stand_in.read_text().replace("seed / 1024", "seed / 64"))  # so that it shows in per cent
    for row, seeds in SEEDS.items():
        assert make("--rows", row, "--seeds", *map(str, seeds), table=THREE_SEEDS) == 0
    return {row["row"]: row for row in report()}


def test_means_are_over_the_seeds_of_the_row_and_differences_over_those_of_both(table):
    for row, seeds in SEEDS.items():
        line, numbers = table[row], [top1(row, seed) for seed in seeds]
        assert float(line["test_top1"]) == pytest.approx(fmean(numbers), rel=1e-12)
        assert float(line["test_top1_sd"]) == pytest.approx(sd(numbers), rel=1e-12)
        assert float(line["test_top1_minus_dense"]) == pytest.approx(fmean(differences(row, "dense")), rel=1e-12)
        assert float(line["flops_ratio"]) == pytest.approx(fmean(flops(row, seed) for seed in seeds), rel=1e-12)
        assert float(line["params_kept"]) == kept(row)
        assert line["seeds"] == " ".join(map(str, seeds))
        of_means = fmean(numbers) - fmean(top1("dense", seed) for seed in SEEDS["dense"])
        assert row == "dense" or abs(of_means - fmean(differences(row, "dense"))) > 0.1  # one is not the other here
    # The ratio of a run is to dense training for its own epochs: 6 of quarter, 4 of the others.
    told = {row: float(line["train_flops_to_dense"]) for row, line in table.items()}
    assert told == pytest.approx({"dense": 1.0, "half": 0.5, "quarter": 0.25 * 6 / 4})


def test_a_compared_pair_tells_its_common_seeds_with_a_t_interval(table):
    report = Path("results/table.md").read_text()
    for row, other in (("half", "dense"), ("quarter", "half")):
        both = [seed for seed in SEEDS[row] if seed in SEEDS[other]]
        numbers = differences(row, other)
        half = T[len(both) - 1] * sd(numbers) / sqrt(len(both))
        mean, wide = fmean(numbers), T[4] * POOLED * sqrt(2 / len(both))
        ours, theirs = (100 * fmean(flops(name, seed) for seed in both) for name in (row, other))
        assert (
            f"- {row} - {other}: {mean:+.1f} points (95 % interval {mean - half:+.1f} to {mean + half:+.1f}, "
            f"{len(both)} seeds; by the pooled sd {mean - wide:+.1f} to {mean + wide:+.1f}), "
            f"inference FLOPs {ours:.1f} % against {theirs:.1f} %."
        ) in report


def test_runs_made_side_by_side_give_no_seconds_even_from_the_record(table, make):
    Path("runs").rename("far away")
    assert make("--only-report", table=THREE_SEEDS) == 0
    assert {row["train_seconds_to_dense"] for row in report()} == {"not run yet"}
    assert {row["test_top1"] for row in report()} == {row["test_top1"] for row in table.values()}
