"""What is written of a table: NAME.md and NAME.csv for readers, and NAME.runs.json, the record of its runs."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

from tools.table_figures import Results, interval
from tools.table_record import Record, Run

MISSING = "not run yet"
IMAGES = {"test": "test", "heldout": "held-out"}  # how the report calls the judge
COLUMNS = {  # column of the CSV file, with the judge in front where it begins with _ -> heading and format in Markdown
    "row": ("row", "{}"),
    "_top1": ("top-1 %", "{:.2f}"),
    "_top1_sd": ("sd", "{:.2f}"),
    "_top1_minus_dense": ("minus dense", "{:+.2f}"),
    "minus_dense_seeds": None,
    "flops_ratio": ("inference FLOPs", "{:.1%}"),
    "params_kept": ("params kept", "{:.1%}"),
    "train_flops_to_dense": ("training FLOPs to dense", "{:.1%}"),
    "train_executed_to_dense": ("with padding", "{:.1%}"),
    "train_seconds_to_dense": ("training seconds to dense", "{:.1%}"),
    "train_cpu_seconds": ("processor seconds", "{:.0f}"),
    "train_cpu_seconds_ratio": ("processor seconds to {partner}", "{:.1%}"),
    "seeds": ("seeds", "{}"),
    "config_hash": None,
}
# Left out where no row has them.
OPTIONAL = ("train_executed_to_dense", "train_seconds_to_dense", "train_cpu_seconds", "train_cpu_seconds_ratio")
LEGEND = """\
Means over the seeds; sd: standard deviation (n - 1); minus dense: mean of the differences seed by seed, in points, over
all seeds of the row, or over those in brackets. Inference FLOPs and params kept: of the network that is left, against
the whole one. Training FLOPs: everything that was computed, against dense training for as many epochs as the dense row
has."""
OPTIONAL_LEGEND = {
    "train_executed_to_dense": "With padding: the same with the zero channels that are computed so that sizes suit the "
    "processor.",
    "train_seconds_to_dense": "Training seconds: of training steps, measured in runs of seed {seed} that ran alone, "
    "each against a dense one on the same machine.",
    "train_cpu_seconds": "Processor seconds: of training steps, all threads of the main process together.",
    "train_cpu_seconds_ratio": "Processor seconds to {partner}: over the seeds that both rows ran on machines of one "
    "kind.",
}

Line = dict[str, str | float | None]  # of the table, by column; None: has not been run, "": does not exist


def line_of(results: Results, name: str) -> Line:
    """One line of the table."""
    table, runs = results.table, results.runs[name]
    line: Line = dict.fromkeys(COLUMNS) | {"row": name}
    if (pair := results.timed_pair(name)) is not None:
        seconds, dense_seconds = (run.facts["train_seconds"] for run in pair)
        line["train_seconds_to_dense"] = seconds / dense_seconds
    if not runs:
        return line
    top1 = list(results.values(name, table.accuracy).values())
    line["_top1"] = fmean(top1)
    line["_top1_sd"] = stdev(top1) if len(top1) > 1 else ""  # one run has no spread
    for key in ("flops_ratio", "params_kept"):
        line[key] = fmean(results.values(name, key).values())
    if differences := results.differences(name, table.dense[name]):
        line["_top1_minus_dense"] = fmean(differences.values())
        line["minus_dense_seeds"] = _seeds(differences)
    line["train_flops_to_dense"] = results.train_flops_to_dense(name)
    line["train_executed_to_dense"] = results.train_flops_to_dense(name, "train_flops_executed")
    if seconds := results.values(name, "train_cpu_seconds"):
        line["train_cpu_seconds"] = fmean(seconds.values())
    line["train_cpu_seconds_ratio"] = results.processor_ratio(name)
    line["seeds"] = _seeds(runs)
    line["config_hash"] = " ".join(dict.fromkeys(run.hash for run in runs.values()))
    return line


def compared(results: Results, row: str, other: str) -> str:
    """One sentence: mean difference, 95 % intervals by its own spread and the pooled one, seeds, FLOPs of both."""
    differences = results.differences(row, other)
    if not differences:
        return f"{row} - {other}: {MISSING}."
    numbers, pooled = list(differences.values()), results.pooled()
    mean, apart = fmean(numbers), {row, other} & set(results.table.not_pooled)
    own = f"95 % interval {_range(*interval(numbers))}" if len(numbers) > 1 else "no interval of its own"
    half = pooled.half_width(len(numbers), num_rows=2) if pooled and not apart else None
    by_pooled = f"; by the pooled sd {_range(mean - half, mean + half)}" if half else ""
    count = f"{len(numbers)} seed{'' if len(numbers) == 1 else 's'}"
    flops = [fmean(results.values(name, "flops_ratio")[seed] for seed in differences) for name in (row, other)]
    return (
        f"{row} - {other}: {_points(mean)} points ({own}, {count}{by_pooled}), "
        f"inference FLOPs {100 * flops[0]:.1f} % against {100 * flops[1]:.1f} %."
    )


def _seeds(seeds: Iterable[int]) -> str:
    return " ".join(map(str, seeds))


def _range(low: float, high: float) -> str:
    return f"{_points(low)} to {_points(high)}"


def _points(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # + 0.0: never -0.0


# ---- the files for readers ----


def write_report(results: Results, record: Record) -> Path:
    """Writes NAME.md, NAME.csv and the record; NAME.reading.md, if somebody wrote one, is the end of the first.

    Returns: the path of NAME.md.
    """
    table, folder = results.table, record.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line_of(results, row) for row in table.rows]
    with open(folder / f"{table.path.stem}.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.judge + name if name.startswith("_") else name for name in COLUMNS)
        writer.writerows([MISSING if value is None else value for value in line.values()] for line in lines)
    record.write(
        replace(run, row=row) for row in table.rows for run in (*results.runs[row].values(), *results.timed[row])
    )
    text = markdown(results, lines)
    by_hand = folder / f"{table.path.stem}.reading.md"
    if by_hand.exists():
        text += "\n" + by_hand.read_text(encoding="utf-8")
    path = folder / f"{table.path.stem}.md"
    path.write_text(text, encoding="utf-8")
    return path


def markdown(results: Results, lines: Sequence[Line]) -> str:
    """The report; its last part, the reading, states the differences of `primary` and `compare` and nothing else."""
    table, images = results.table, IMAGES[results.table.judge]
    there = [key for key in COLUMNS if key not in OPTIONAL or any(line[key] is not None for line in lines)]
    words = {"seed": table.seeds[0], "partner": " or ".join(dict.fromkeys(table.seconds_of.values()))}
    columns = {key: COLUMNS[key] for key in there if COLUMNS[key] is not None}
    headings = [f"{images} {heading}" if key == "_top1" else heading for key, (heading, _) in columns.items()]
    cells = [[heading.format(**words) for heading in headings], ["-"] * len(headings)]
    cells += [[_cell(line, key, form) for key, (_, form) in columns.items()] for line in lines]
    text = [f"# {table.title}", "", *([table.note, ""] if table.note else [])]
    text += [f"| {' | '.join(row)} |" for row in cells]
    legend = [LEGEND, *(OPTIONAL_LEGEND[key].format(**words) for key in OPTIONAL if key in there), *_pooled(results)]
    text += ["", " ".join(legend).replace("\n", " "), "", *_origin(results)]
    return "\n".join([*text, *_reading(results)]) + "\n"


def _cell(line: Line, key: str, form: str) -> str:
    if key == "_top1_minus_dense" and line["minus_dense_seeds"] not in (None, line["seeds"]):
        return f"{_shown(line[key], form)} (seeds {line['minus_dense_seeds']})"
    return _shown(line[key], form)


def _shown(value: str | float | None, form: str) -> str:
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value or "-"
    return form.format(value).replace("%", " %")


def _reading(results: Results) -> list[str]:
    """The differences, that of the primary pair first."""
    table = results.table
    pairs = [pair for pair in table.compare if pair != table.primary]
    count = len(pairs) + (table.primary is not None)
    if not count:
        return []
    made = "1 comparison" if count == 1 else f"{count} comparisons, and their number widens no interval"
    text = ["", "## Reading", "", f"Differences of {IMAGES[table.judge]} top-1, seed by seed. The table makes {made}."]
    if results.pooled() is not None:
        text[-1] += (
            " The first interval is by the spread of these differences alone. The one by the pooled sd takes that for "
            "the spread of both rows, and takes their runs to be independent."
        )
    if table.primary is not None:
        text += ["", "The primary comparison, chosen before the first run:", ""]
        text += [f"- {compared(results, *table.primary)}"]
        text += ["", "The others:"] if pairs else []
    return text + ([""] if pairs else []) + [f"- {compared(results, *pair)}" for pair in pairs]


def _pooled(results: Results) -> list[str]:
    """One sentence on the spread of all rows, if there is any."""
    pooled = results.pooled()
    if pooled is None:
        return []
    apart = f" without {', '.join(results.table.not_pooled)}" if results.table.not_pooled else ""
    return [
        f"Pooled sd: that of the {pooled.num_rows} rows with at least two seeds together{apart}, {pooled.sd:.2f} "
        f"points, degrees of freedom: {pooled.freedom}; {100 * pooled.part:.0f} % of its square comes from "
        f"{pooled.widest}."
    ]


def _origin(results: Results) -> list[str]:
    """Where, when and with what the runs were made, as they wrote it themselves."""
    table = results.table
    runs = [run for by_seed in results.runs.values() for run in by_seed.values()]
    timed = [pair[0] for row in table.rows if (pair := results.timed_pair(row)) is not None]
    command = f"python -m tools.reproduce {table.path.name if table.path.is_absolute() else table.path.as_posix()}"
    lines = [f"- command: `{command}`" + (f"; the seconds: `{command} --time`" if timed else "")]
    if runs:
        torch = _distinct(runs, lambda run: run.facts.get("torch"))
        lines += [f"- hardware: {_distinct(runs, _hardware)}", f"- torch {torch}, {_newest(runs)}"]
    images = {run.facts.get("data_fingerprint") for run in runs}
    if len(images) > 1:
        lines.append(f"- the runs were not all made on the same images: {len(images)} different sets")
    if timed:
        lines.append(f"- the seconds: {_distinct(timed, _hardware)}, {_newest(timed)}")
    return lines


def _distinct(runs: Iterable[Run], fact: Callable[[Run], object]) -> str:
    return "; ".join(dict.fromkeys(str(fact(run) or "unknown") for run in runs))


def _newest(runs: Sequence[Run]) -> str:
    return f"newest run {max(run.date for run in runs)}, commit {_distinct(runs, _commit)}"


def _hardware(run: Run) -> str:
    facts, threads = run.facts, run.facts.get("num_threads")
    processor = facts.get("gpu") or f"{facts.get('cpu') or 'unknown'} ({facts.get('cpu_capability')})"
    return f"{processor}, {threads} thread{'' if threads == 1 else 's'}"


def _commit(run: Run) -> str | None:
    commit = run.facts.get("git_commit")
    return commit and f"{commit[:12]}{' with changes' if run.facts.get('git_dirty') else ''}"
