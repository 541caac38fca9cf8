"""What a table came to: results/NAME.md and NAME.csv from its finished runs, and NAME.runs.json, their record."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from tools.table_file import Row, Table
from tools.table_record import write_record
from tools.table_runs import Cell, Run, TableRuns, machine_of

MISSING = "not run yet"
IMAGES = {"test": "test", "heldout": "held-out"}  # what a table calls its judge
COLUMNS = {  # column of the CSV file, with the judge in front where it begins with _ -> heading and format in Markdown
    "row": ("row", "{}"),
    "_top1": ("top-1 %", "{:.2f}"),
    "_top1_sd": ("sd", "{:.2f}"),
    "_top1_minus_dense": ("minus dense", "{:+.2f}"),
    "flops_ratio": ("inference FLOPs", "{:.1%}"),
    "params_kept": ("params kept", "{:.1%}"),
    "train_flops_to_dense": ("training FLOPs to dense", "{:.1%}"),
    "train_seconds_to_dense": ("training seconds to dense", "{:.1%}"),
    "seeds": ("seeds", "{}"),
    "config_hash": ("config", "{}"),
}
LEGEND = """\
Means over the seeds; sd: standard deviation (n - 1); minus dense: mean of the differences seed by seed, in points.
Inference FLOPs and params kept: of the network that is left, against the whole one. Training FLOPs: everything that was
computed, against dense training for as many epochs as the dense row has. Training seconds: of training steps, measured
in runs of seed {seed} that ran alone, each against a dense one on the same machine. config: hash of all options but the
seed."""


# ---- statistics ----


def t_quantile(inside: float, degrees: int) -> float:
    """The t for which a Student variable lies between -t and t with probability `inside`.

    Args:
        inside: in (0, 1).
        degrees: of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while _probability_inside(high, degrees) < inside:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability_inside(middle, degrees) < inside else (low, middle)
    return high


def _probability_inside(t: float, degrees: int) -> float:
    """P(|T| < t), a finite sum for whole degrees of freedom. Source: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def interval(differences: Sequence[float], inside: float = 0.95) -> tuple[float, float]:
    """The t interval of the mean of independent differences; needs two of them at least."""
    half = t_quantile(inside, len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))
    return fmean(differences) - half, fmean(differences) + half


# ---- results ----


@dataclass(frozen=True)
class Results:
    """The finished runs of a table.

    Attributes:
        runs: of every row by seed.
        timed: of every row those of the first seed that ran alone, the newest first; they may be among `runs`.
    """

    table: Table
    runs: Mapping[str, Mapping[int, Run]]
    timed: Mapping[str, Sequence[Run]]

    def values(self, row: str, name: str) -> dict[int, float]:
        """One number of the summaries by seed."""
        return {seed: run.summary[name] for seed, run in self.runs[row].items()}

    def timed_pair(self, row: str) -> tuple[Run, Run] | None:
        """The newest run of a row and of its dense row that ran alone on one machine."""
        pairs = itertools.product(self.timed[row], self.timed[self.table.dense[row]])
        return next(((ours, dense) for ours, dense in pairs if _machine(ours) == _machine(dense)), None)

    def differences(self, row: str, other: str) -> dict[int, float]:
        """Top-1 of `row` minus that of `other`, in points, for every seed that both have."""
        ours, theirs = (self.values(name, self.table.accuracy) for name in (row, other))
        return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def collect(table: Table, runs: TableRuns, timed: TableRuns) -> Results:
    def of(row: Row) -> dict[int, Run]:
        found = {seed: runs.result(Cell(row.name, seed)) for seed in table.seeds}
        return {seed: run for seed, run in found.items() if run is not None}

    return Results(
        table=table,
        runs={name: of(row) for name, row in table.rows.items()},
        timed={name: timed.results(Cell(name, table.seeds[0])) for name in table.rows},
    )


def row_values(results: Results, name: str) -> dict[str, str | float | None]:
    """One line of the table by column; None: has not been run, "": does not exist."""
    runs, dense = results.runs[name], results.table.dense[name]
    values: dict[str, str | float | None] = dict.fromkeys(COLUMNS)
    values["row"] = name
    if (pair := results.timed_pair(name)) is not None:
        seconds, dense_seconds = (run.summary["train_seconds"] for run in pair)
        values["train_seconds_to_dense"] = seconds / dense_seconds
    if not runs:
        return values
    top1 = list(results.values(name, results.table.accuracy).values())
    values["_top1"] = fmean(top1)
    values["_top1_sd"] = stdev(top1) if len(top1) > 1 else ""  # one run has no spread
    for key in ("flops_ratio", "params_kept"):
        values[key] = fmean(results.values(name, key).values())
    if results.runs[dense]:
        values["_top1_minus_dense"] = _mean_or_none(results.differences(name, dense).values())
        # The ratio in a summary is to dense training for as many epochs as that run had.
        epochs = fmean(results.values(dense, "epochs").values())
        values["train_flops_to_dense"] = fmean(
            run.summary["train_flops_ratio"] * run.summary["epochs"] / epochs for run in runs.values()
        )
    values["seeds"] = _listed(runs)
    values["config_hash"] = _listed(run.key.hash for run in runs.values())
    return values


def _mean_or_none(numbers: Iterable[float]) -> float | None:
    numbers = list(numbers)
    return fmean(numbers) if numbers else None


def _listed(values: Iterable[object]) -> str:
    return " ".join(dict.fromkeys(map(str, values)))


# ---- the files ----


def record_path(table: Table, folder: Path) -> Path:
    """Where `write_report` leaves the runs that it told of."""
    return folder / f"{table.name}.runs.json"


def write_report(results: Results, folder: Path) -> Path:
    """Writes NAME.md, NAME.csv and NAME.runs.json; NAME.reading.md, if somebody wrote one, is the end of the first.

    Returns: the path of NAME.md.
    """
    name = results.table.name
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row_values(results, row) for row in results.table.rows]
    (folder / f"{name}.csv").write_text(_csv(rows, results.table.judge), encoding="utf-8")
    write_record(record_path(results.table, folder), results.table.recorded, _told_runs(results))
    text = markdown(results, rows)
    by_hand = folder / f"{name}.reading.md"
    if by_hand.exists():
        text += "\n" + by_hand.read_text(encoding="utf-8")
    path = folder / f"{name}.md"
    path.write_text(text, encoding="utf-8")
    return path


def _told_runs(results: Results) -> list[tuple[str, Run]]:
    """Every run of the report with its row; one that gives both numbers and seconds stands once."""
    told = []
    for name, by_seed in results.runs.items():
        told += [(name, run) for run in by_seed.values()]
        told += [(name, run) for run in results.timed[name] if run not in by_seed.values()]
    return told


def _csv(rows: Sequence[Mapping[str, str | float | None]], judge: str) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(judge + name if name.startswith("_") else name for name in COLUMNS)
    writer.writerows([MISSING if value is None else value for value in row.values()] for row in rows)
    return text.getvalue()


def markdown(results: Results, rows: Sequence[Mapping[str, str | float | None]]) -> str:
    """The report; its last part, the reading, tells the differences of `compare` and nothing else."""
    table = results.table
    lines = [f"# {table.title}", ""]
    if table.note:
        lines += [table.note, ""]
    lines += _table_lines(rows, table.judge)
    lines += ["", LEGEND.format(seed=table.seeds[0]), "", *_facts(results)]
    if table.compare:
        lines += ["", "## Reading", "", f"Differences of {IMAGES[table.judge]} top-1, seed by seed:", ""]
        lines += [f"- {compared(results, *pair)}" for pair in table.compare]
    return "\n".join(lines) + "\n"


def _table_lines(rows: Sequence[Mapping[str, str | float | None]], judge: str) -> list[str]:
    headings = [f"{IMAGES[judge]} {heading}" if key == "_top1" else heading for key, (heading, _) in COLUMNS.items()]
    lines = [headings, ["-"] * len(headings)]
    lines += [[_shown(row[key], form) for key, (_, form) in COLUMNS.items()] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _shown(value: str | float | None, form: str) -> str:
    if value is None:
        return MISSING
    return "-" if value == "" else form.format(value).replace("%", " %")


def _facts(results: Results) -> list[str]:
    """Where, when and with what the runs were made; a run's own environment says it."""
    runs = [run for by_seed in results.runs.values() for run in by_seed.values()]
    command = f"python -m tools.reproduce {_without_machine(results.table.path)}"
    lines = [f"- command: `{command}`; the seconds: `{command} --time`"]
    if runs:
        lines += [
            f"- hardware: {_distinct(runs, _hardware)}",
            f"- torch {_distinct(runs, lambda run: run.environment.get('torch'))}, "
            f"newest run {max(run.date for run in runs)}, commit {_distinct(runs, _commit)}",
        ]
    images = {run.environment.get("data_fingerprint") for run in runs}
    if len(images) > 1:
        lines.append(f"- the runs were not all made on the same images: {len(images)} different sets")
    timed = [pair[0] for row in results.table.rows if (pair := results.timed_pair(row)) is not None]
    if timed:
        lines.append(
            f"- the seconds: {_distinct(timed, _hardware)}, newest run {max(run.date for run in timed)}, "
            f"commit {_distinct(timed, _commit)}"
        )
    return lines


def _without_machine(path: Path) -> str:
    """The path as seen from here; of a file elsewhere only the name."""
    absolute = path.resolve()
    return absolute.relative_to(Path.cwd()).as_posix() if absolute.is_relative_to(Path.cwd()) else path.name


def _distinct(runs: Iterable[Run], fact: Callable[[Run], object]) -> str:
    return "; ".join(dict.fromkeys(str(fact(run) or "unknown") for run in runs))


def _machine(run: Run) -> tuple[object, ...]:
    return machine_of(run.environment)


def _hardware(run: Run) -> str:
    facts = run.environment
    processor = facts.get("gpu") or f"{facts.get('cpu') or 'unknown'} ({facts.get('cpu_capability')})"
    threads = facts.get("num_threads")
    return f"{processor}, {threads} thread{'' if threads == 1 else 's'}"


def _commit(run: Run) -> str | None:
    commit = run.environment.get("git_commit")
    return commit and f"{commit[:12]}{' with changes' if run.environment.get('git_dirty') else ''}"


def compared(results: Results, row: str, other: str) -> str:
    """One sentence: mean difference, its 95 % interval, number of seeds, FLOPs of both."""
    differences = results.differences(row, other)
    if not differences:
        return f"{row} - {other}: {MISSING}."
    numbers = list(differences.values())
    if len(numbers) == 1:
        spread = "1 seed, no interval"
    else:
        low, high = interval(numbers)
        spread = f"95 % interval {_points(low)} to {_points(high)}, {len(numbers)} seeds"
    flops = [fmean(results.values(name, "flops_ratio")[seed] for seed in differences) for name in (row, other)]
    return (
        f"{row} - {other}: {_points(fmean(numbers))} points ({spread}), "
        f"inference FLOPs {100 * flops[0]:.1f} % against {100 * flops[1]:.1f} %."
    )


def _points(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # + 0.0: never -0.0
