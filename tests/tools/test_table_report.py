"""What a table says of its runs: means, intervals, differences, costs."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tools.stand_in import TABLE, report
from tools.table_figures import T_95, Results, interval
from tools.table_record import Run
from tools.table_report import compared, line_of, markdown
from tools.tables import Row, Table

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
    assert "| half | 86.00 | 1.41 | -4.50 | 25.0 % | 50.0 % | 50.0 % | 75.0 % | 0 1 |" in text
    for fact in ("Abacus (AVX2), 2 threads", "torch 2.14.1", "commit 0123456789ab", "tools.reproduce table.yaml`"):
        assert fact in text
    # 85 - 82.5 and 87 - (82.5 + 10/1024 + 2): 2.5 and 2.490, with one degree of freedom. The sum of squares of the rows
    # is 0.5, 2 and 2.02, with three: a pooled sd of 1.23, and 3.182 * 1.23 * sqrt(2 / 2) = 3.9.
    sentence = (
        "- half - same cost: +2.5 points (95 % interval +2.4 to +2.6, 2 seeds; by the pooled sd -1.4 to +6.4), "
        "inference FLOPs 25.0 % against 6.3 %."
    )
    assert "Pooled sd: that of the 3 rows with at least two seeds together, 1.23 points, degrees of freedom: 3;" in text
    assert "45 % of its square comes from same cost." in text
    assert "The table makes 1 comparison." in text
    assert sentence in text


def by_hand(*, table: dict | None = None, **numbers: dict[int, dict]) -> Results:
    """Results of runs that are made up: numbers by row and seed, compared with "dense"; `table` adds to the table."""

    def made(row: str, seed: int, facts: dict) -> Run:
        usual = {"test_top1": 50.0, "flops_ratio": 0.5, "params_kept": 0.5, "train_flops_ratio": 1.0}
        facts = {**usual, "train_seconds": 1.0, "epochs": 1, **facts}
        return Run(row, seed, f"hash of {row}", False, "2026-01-01", 0, facts, {})

    rows = {row: Row(row, {}, row) for row in numbers}
    made_up = Table(Path("x.yaml"), "x", "", (0, 1, 2, 3), rows, dict.fromkeys(rows, "dense"), **(table or {}))
    runs = {row: {seed: made(row, seed, facts) for seed, facts in by_seed.items()} for row, by_seed in numbers.items()}
    return Results(made_up, runs, {row: [] for row in rows})


def test_means_are_over_all_seeds_and_differences_over_common_ones():
    top1 = {"dense": {0: 90.0, 1: 80.0, 3: 10.0}, "half": {0: 60.0, 1: 70.0, 2: 20.0}, "none": {2: 1.0}}
    results = by_hand(**{row: {seed: {"test_top1": value} for seed, value in of.items()} for row, of in top1.items()})
    line = line_of(results, "half")
    assert line["_top1"] == 50
    assert line["_top1_sd"] == pytest.approx(math.sqrt((10**2 + 20**2 + 30**2) / 2))  # n - 1
    assert line["_top1_minus_dense"] == -20  # the mean of -30 and -10
    assert line["minus_dense_seeds"] == "0 1"
    text = markdown(results, [line_of(results, row) for row in top1])
    assert "| half | 50.00 | 26.46 | -20.00 (seeds 0 1) | 50.0 % |" in text
    assert "| dense | 60.00 | 43.59 | +0.00 | 50.0 % |" in text
    assert "| none | 1.00 | - | not run yet | 50.0 % |" in text
    assert line["seeds"] == "0 1 2"
    # -20 -+ 12.7062 * sqrt(200) / sqrt(2)
    assert "half - dense: -20.0 points (95 % interval -147.1 to +107.1, 2 seeds;" in compared(results, "half", "dense")
    assert compared(results, "none", "dense") == "none - dense: not run yet."  # no seed in common
    assert line_of(results, "none")["_top1_minus_dense"] is None


def test_costs_are_means_over_seeds_and_compared_over_common_ones():
    halves = {0: {"flops_ratio": 0.1, "params_kept": 0.4}, 1: {"flops_ratio": 0.3, "params_kept": 0.8}}
    results = by_hand(dense={0: {"flops_ratio": 1.0}}, half=halves)
    line = line_of(results, "half")
    assert (line["flops_ratio"], line["params_kept"]) == pytest.approx((0.2, 0.6))
    assert "inference FLOPs 10.0 % against 100.0 %" in compared(results, "half", "dense")


def test_training_flops_are_told_against_as_many_dense_epochs_as_the_dense_row_has():
    """A run says which part of dense training for its own epochs it computed."""
    dense = {0: {"epochs": 12, "train_flops_ratio": 1.25}, 1: {"epochs": 12, "train_flops_ratio": 1.25}}
    half = {0: {"epochs": 6, "train_flops_ratio": 0.5}, 1: {"epochs": 24, "train_flops_ratio": 0.25}}
    results = by_hand(dense=dense, half=half)
    assert line_of(results, "half")["train_flops_to_dense"] == pytest.approx((6 / 12 * 0.5 + 24 / 12 * 0.25) / 2)
    assert line_of(results, "dense")["train_flops_to_dense"] == 1.25


@pytest.mark.parametrize(
    ("options", "epochs"),
    [({"epochs": 12, "finetune_epochs": 3}, 15), ({"epochs": 12, "finetune": False}, 12), ({"epochs": "auto"}, None)],
)
def test_without_a_dense_run_its_epochs_are_those_of_its_row(options, epochs):
    results = by_hand(dense={}, half={0: {"epochs": 6, "train_flops_ratio": 0.5}})
    results.table.rows["dense"].options.update(options, method="dense")
    assert line_of(results, "half")["train_flops_to_dense"] == (epochs and pytest.approx(6 / epochs * 0.5))


def test_every_figure_stands_under_its_heading(make):
    """Numbers of one row that all differ, in CSV and in Markdown."""
    assert make("--seeds", "0") == 0
    assert make("--time") == 0
    row, text = report()[2], Path("results/table.md").read_text()
    expected = {
        "row": "same cost", "test_top1": "82.5", "test_top1_sd": "", "test_top1_minus_dense": "-7.5",
        "minus_dense_seeds": "0", "flops_ratio": "0.0625", "params_kept": "0.25", "train_flops_to_dense": "0.5",
        "train_executed_to_dense": "0.75",
        "train_seconds_to_dense": "0.25", "train_cpu_seconds": "not run yet", "train_cpu_seconds_ratio": "not run yet",
        "seeds": "0",
    }  # fmt: skip
    assert {**expected, "config_hash": row["config_hash"]} == row
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert dict(zip(table[0], table[4], strict=True)) == {
        "row": "same cost", "test top-1 %": "82.50", "sd": "-", "minus dense": "-7.50", "inference FLOPs": "6.2 %",
        "params kept": "25.0 %", "training FLOPs to dense": "50.0 %",
        "with padding": "75.0 %", "training seconds to dense": "25.0 %",
        "seeds": "0",
    }  # fmt: skip


def test_one_seed_has_no_interval_and_missing_rows_say_so(make):
    assert make("--only-report") == 0
    assert all(set(row.values()) == {row["row"], "not run yet"} for row in report())
    assert "- half - same cost: not run yet." in Path("results/table.md").read_text()
    assert make("--seeds", "0") == 0
    text = Path("results/table.md").read_text()
    assert "+2.5 points (no interval of its own, 1 seed), inference" in text
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


# ---- the spread of all rows ----


def test_the_pooled_spread_is_over_all_rows_with_two_seeds_by_their_degrees_of_freedom():
    top1 = {"dense": [90.0, 92.0], "half": [80.0, 83.0, 86.0], "once": [10.0]}
    results = by_hand(**{row: {seed: {"test_top1": v} for seed, v in enumerate(of)} for row, of in top1.items()})
    pooled = results.pooled()
    assert pooled.sd == pytest.approx(math.sqrt((2 + 18) / 3))  # sums of squares 2 and 18, 1 and 2 degrees
    assert (pooled.freedom, pooled.num_rows, pooled.widest, pooled.part) == (3, 2, "half", 0.9)
    half = 3.182446 * pooled.sd
    assert pooled.half_width(3) == pytest.approx(half * math.sqrt(1 / 3))
    assert pooled.half_width(3, num_rows=2) == pytest.approx(half * math.sqrt(2 / 3))
    # -9.5 by seeds 0 and 1; a single seed has this interval alone
    assert "(95 % interval -15.9 to -3.1, 2 seeds; by the pooled sd -17.7 to -1.3)" in compared(
        results, "half", "dense"
    )
    assert "(no interval of its own, 1 seed; by the pooled sd -91.6 to -68.4)" in compared(results, "once", "dense")
    apart = replace(results, table=replace(results.table, not_pooled=("half",)))
    assert (apart.pooled().sd, apart.pooled().freedom) == (pytest.approx(math.sqrt(2)), 1)
    assert "(95 % interval -15.9 to -3.1, 2 seeds), inference" in compared(apart, "half", "dense")
    assert "together without half, 1.41 points, degrees of freedom: 1;" in markdown(apart, [])
    assert by_hand(dense={0: {}}, half={0: {}, 1: {}}).pooled() is None  # both seeds came to the same


# ---- what the table was made for ----


def test_the_primary_pair_is_told_first_and_once():
    runs = {row: {0: {}, 1: {}} for row in ("dense", "half", "quarter")}
    pairs = (("half", "dense"), ("quarter", "half"))
    results = by_hand(table={"compare": pairs, "primary": pairs[1]}, **runs)
    text = markdown(results, [line_of(results, row) for row in runs])
    assert "The table makes 2 comparisons, and their number widens no interval." in text
    first = "The primary comparison, chosen before the first run:\n\n- quarter - half: "
    assert text.index("## Reading") < text.index(first) < text.index("The others:\n\n- half - dense: ")
    assert text.count("quarter - half") == 1
    alone = markdown(by_hand(table={"primary": pairs[1]}, **runs), [])
    assert "The table makes 1 comparison." in alone
    assert "The others" not in alone
    assert "primary" not in markdown(by_hand(table={"compare": pairs}, **runs), [])


# ---- processor seconds ----


def test_processor_seconds_are_a_mean_and_a_ratio_over_common_seeds_of_one_machine():
    def ran(seconds: float, cpu: str = "Abacus") -> dict:
        return {"train_cpu_seconds": seconds, "cpu": cpu}

    thin = {0: ran(100.0), 1: ran(300.0), 2: ran(1.0, "Slide rule")}
    half = {0: ran(90.0), 1: ran(250.0), 2: ran(500.0), 3: ran(7.0)}
    runs = {"dense": {0: {}, 1: ran(1000.0)}, "thin": thin, "half": half}
    results = by_hand(table={"seconds_of": dict.fromkeys(runs, "thin")}, **runs)
    line = line_of(results, "half")
    assert line["train_cpu_seconds"] == pytest.approx((90 + 250 + 500 + 7) / 4)
    assert line["train_cpu_seconds_ratio"] == pytest.approx((90 + 250) / (100 + 300))
    assert line_of(results, "dense")["train_cpu_seconds"] == 1000  # of the seed that has them
    text = markdown(results, [line_of(results, row) for row in runs])
    assert "| training FLOPs to dense | processor seconds | processor seconds to thin | seeds |" in text
    assert "| 212 | 85.0 % | 0 1 2 3 |" in text
    assert "training seconds to dense" not in text  # nothing was timed
    assert "Processor seconds to thin: over the seeds that both rows ran on machines of one kind." in text


def test_runs_of_older_versions_have_no_processor_seconds_and_stay_readable(make, monkeypatch):
    table = TABLE.replace("dense: dense\nrows", "dense: dense\nseconds_of: half\nrows")
    assert make("--seeds", "0", table=table) == 0
    assert "processor seconds" not in Path("results/table.md").read_text().lower()
    monkeypatch.setenv("TEST_CPU_SECONDS", "100")
    assert make(table=table) == 0
    told = [(row["train_cpu_seconds"], row["train_cpu_seconds_ratio"]) for row in report()]
    for _ in range(2):  # those of seed 1: 100 times what is kept, and 1
        ratios = [float(ratio) for _, ratio in told]
        assert [float(seconds) for seconds, _ in told] == pytest.approx([101, 51, 100 * (0.25 + 1 / 1024) + 1])
        assert ratios == pytest.approx([101 / 51, 1, (100 * (0.25 + 1 / 1024) + 1) / 51])
        if Path("runs").exists():
            Path("runs").rename("far away")
        assert make("--only-report", table=table) == 0
        assert [(row["train_cpu_seconds"], row["train_cpu_seconds_ratio"]) for row in report()] == told
