"""What is written of a table: NAME.md and NAME.csv for readers, and NAME.runs.json, the record of its runs."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from args import OPTIONS
from tools.tables import NO_NUMBERS, OTHER_NUMBERS, Run, Table, config_hash, options_of
from utils.errors import UserError

TABLES_FOLDER = Path(__file__).resolve().parent.parent / "configs/tables"  # tables that lie elsewhere are a user's own
RESULTS_FOLDER = Path("results")
MISSING = "not run yet"
IMAGES = {"test": "test", "heldout": "held-out"}  # how the report calls the judge
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
ENTRY = ("row", "seed", "config", "alone", "date", "started")  # how a recorded run begins, its facts follow
ABOUT = "Runs of a table, one on each line; written by tools.reproduce, not by hand."
# Two-sided 95 % quantiles of Student's t distribution for 1 to 30 degrees of freedom.
T_95 = (
    *(12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139),
    *(2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963),
    *(2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272),
)

Line = dict[str, str | float | None]  # of the table, by column; None: has not been run, "": does not exist


# ---- figures ----


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The 95 % t interval of the mean of at least two independent differences.

    Beyond 31 of them the quantile for 30 degrees of freedom serves: the interval is up to 5 % too wide.
    """
    t = T_95[min(len(differences) - 1, len(T_95)) - 1]
    half = t * stdev(differences) / math.sqrt(len(differences))
    return fmean(differences) - half, fmean(differences) + half


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
        return {seed: run.facts[name] for seed, run in self.runs[row].items()}

    def differences(self, row: str, other: str) -> dict[int, float]:
        """Top-1 of `row` minus that of `other`, in points, for every seed that both have."""
        ours, theirs = (self.values(name, self.table.accuracy) for name in (row, other))
        return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}

    def timed_pair(self, row: str) -> tuple[Run, Run] | None:
        """The newest run of a row and of its dense row that ran alone on one machine."""
        pairs = itertools.product(self.timed[row], self.timed[self.table.dense[row]])
        return next(((ours, dense) for ours, dense in pairs if ours.machine == dense.machine), None)

    def line(self, name: str) -> Line:
        """One line of the table."""
        runs, dense = self.runs[name], self.table.dense[name]
        line: Line = dict.fromkeys(COLUMNS) | {"row": name}
        if (pair := self.timed_pair(name)) is not None:
            seconds, dense_seconds = (run.facts["train_seconds"] for run in pair)
            line["train_seconds_to_dense"] = seconds / dense_seconds
        if not runs:
            return line
        top1 = list(self.values(name, self.table.accuracy).values())
        line["_top1"] = fmean(top1)
        line["_top1_sd"] = stdev(top1) if len(top1) > 1 else ""  # one run has no spread
        for key in ("flops_ratio", "params_kept"):
            line[key] = fmean(self.values(name, key).values())
        if differences := self.differences(name, dense):
            line["_top1_minus_dense"] = fmean(differences.values())
        if self.runs[dense]:
            # The ratio in a summary is to dense training for as many epochs as that run had.
            epochs = fmean(self.values(dense, "epochs").values())
            line["train_flops_to_dense"] = fmean(
                run.facts["train_flops_ratio"] * run.facts["epochs"] / epochs for run in runs.values()
            )
        line["seeds"] = " ".join(map(str, runs))
        line["config_hash"] = " ".join(dict.fromkeys(run.hash for run in runs.values()))
        return line

    def compared(self, row: str, other: str) -> str:
        """One sentence: mean difference, its 95 % interval, number of seeds, FLOPs of both."""
        differences = self.differences(row, other)
        if not differences:
            return f"{row} - {other}: {MISSING}."
        numbers = list(differences.values())
        spread = "1 seed, no interval"
        if len(numbers) > 1:
            low, high = map(_points, interval(numbers))
            spread = f"95 % interval {low} to {high}, {len(numbers)} seeds"
        flops = [fmean(self.values(name, "flops_ratio")[seed] for seed in differences) for name in (row, other)]
        return (
            f"{row} - {other}: {_points(fmean(numbers))} points ({spread}), "
            f"inference FLOPs {100 * flops[0]:.1f} % against {100 * flops[1]:.1f} %."
        )


def _points(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # + 0.0: never -0.0


# ---- the files for readers ----


def write_report(results: Results, record: Record) -> Path:
    """Writes NAME.md, NAME.csv and the record; NAME.reading.md, if somebody wrote one, is the end of the first.

    Returns: the path of NAME.md.
    """
    table, folder = results.table, record.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    lines = [results.line(row) for row in table.rows]
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
    """The report; its last part, the reading, states the differences of `compare` and nothing else."""
    table, images = results.table, IMAGES[results.table.judge]
    headings = [f"{images} {heading}" if key == "_top1" else heading for key, (heading, _) in COLUMNS.items()]
    cells = [headings, ["-"] * len(headings)]
    cells += [[_shown(line[key], form) for key, (_, form) in COLUMNS.items()] for line in lines]
    text = [f"# {table.title}", "", *([table.note, ""] if table.note else [])]
    text += [f"| {' | '.join(row)} |" for row in cells]
    text += ["", LEGEND.format(seed=table.seeds[0]), "", *_origin(results)]
    if table.compare:
        text += ["", "## Reading", "", f"Differences of {images} top-1, seed by seed:", ""]
        text += [f"- {results.compared(*pair)}" for pair in table.compare]
    return "\n".join(text) + "\n"


def _shown(value: str | float | None, form: str) -> str:
    if value is None:
        return MISSING
    return "-" if value == "" else form.format(value).replace("%", " %")


def _origin(results: Results) -> list[str]:
    """Where, when and with what the runs were made, as they wrote it themselves."""
    table = results.table
    runs = [run for by_seed in results.runs.values() for run in by_seed.values()]
    timed = [pair[0] for row in table.rows if (pair := results.timed_pair(row)) is not None]
    command = f"python -m tools.reproduce {table.path.name if table.path.is_absolute() else table.path.as_posix()}"
    lines = [f"- command: `{command}`; the seconds: `{command} --time`"]
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


# ---- the record ----


def record_path(table: Table) -> Path:
    """Where the record of a table is, with its report beside it: of a table of this repository in results/, else next
    to the table.

    Raises: UserError if a file of a user's own has the name of the report: one that has no record beside it.
    """
    own = table.path.resolve().parent == TABLES_FOLDER.resolve()
    path = (RESULTS_FOLDER if own else table.path.parent) / f"{table.path.stem}.runs.json"
    for other in (path.with_name(f"{table.path.stem}{ending}") for ending in (".md", ".csv")):
        if not own and other.exists() and not path.exists():
            raise UserError(
                f"{other} is there already, and no {path.name} beside it says that it is a report; the report of "
                f"{table.path} would replace it, so rename one of the two"
            )
    return path


class Record:
    """Every run that a report was made from, with its options and without its files.

    With it a table can be checked run by run, single rows can be made again on another machine, and rows can be added,
    while the run folders, which are large, stay where they were made.

    Attributes:
        defaults: of every option that can change a number, the first one that this record saw.
        runs: those whose options can be read today.
        unreadable: what is wrong with the options of the others, which stay in the file as they are.
    """

    def __init__(self, path: Path) -> None:
        """Raises: UserError for a file that is no record; it need not be there."""
        self.path, self.runs, self.unreadable = path, [], {}
        self._configs, self._entries = {}, []  # of runs that cannot be read
        try:
            stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"configs": {}, "runs": []}
            firsts, options = stored.get("defaults", {}), {}
            self.defaults = {key: firsts.get(key, OPTIONS[key].default) for key in OPTIONS if key not in NO_NUMBERS}
            for name, config in stored["configs"].items():
                try:
                    options[name] = options_of(config, f"{path}, config {name}", self.defaults)
                except UserError as error:
                    self.unreadable[f"{path}, config {name}"] = str(error)
                    self._configs[name] = config
            for entry in stored["runs"]:
                if entry["config"] in self._configs:
                    self._entries.append(entry)
                else:
                    self.runs.append(self._run(entry, options[entry["config"]]))
        except (OSError, AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{path} is no record of runs; restore it, or remove it and make the runs again") from None

    def _run(self, entry: dict[str, Any], options: dict[str, Any]) -> Run:
        facts = dict(entry)
        row, seed, _, alone, date, started = (facts.pop(name) for name in ENTRY)
        for name in ("test_top1", "heldout_top1", *OTHER_NUMBERS):
            if not isinstance(facts.get(name, 0), int | float):
                raise TypeError(name)
        return Run(row, seed, config_hash(options, self.defaults), alone, date, started, facts, options)

    def write(self, told: Iterable[Run]) -> None:
        """Adds the runs of a report. A run that was made again replaces what was recorded of it.

        All other runs stay, whether the table still has them or not, since this may be the only copy of them.
        """
        made = [run for run in told if run.folder is not None]
        newest_last = sorted([*self.runs, *made], key=lambda run: run.age)
        # Every machine has seconds of its own.
        runs = {(run.hash, run.seed, run.alone, run.alone and run.machine): run for run in newest_last}
        configs = self._configs | {run.hash: run.options for run in runs.values()}
        entries = [*self._entries, *map(_entry, runs.values())]
        entries.sort(key=lambda entry: (entry["row"], entry["seed"], entry["config"]))
        config_lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(configs[name])}" for name in sorted(configs))
        run_lines = ",\n".join(map(json.dumps, entries))
        text = f'{{"about": {json.dumps(ABOUT)},\n"defaults": {json.dumps(self.defaults)},\n'
        text += f'"configs": {{\n{config_lines}\n}},\n"runs": [\n{run_lines}\n]}}\n'
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path)


def _entry(run: Run) -> dict[str, Any]:
    start = (run.row, run.seed, run.hash, run.alone, run.date, run.started)
    return dict(zip(ENTRY, start, strict=True)) | run.facts
