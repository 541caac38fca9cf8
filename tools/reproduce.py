"""Makes the runs of a table of results and writes the table: `python -m tools.reproduce configs/tables/NAME.yaml`.

Runs that are done are not made again. The same command therefore goes on where it was stopped, and after a change of
the table it makes what is new. `tools/tables.py` describes the file, `tools/table_report.py` what is written.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tools.command_line import ToolParser, exit_code_of
from tools.table_report import Record, Results, record_path, write_report
from tools.tables import Run, Table, config_hash, options_of, read_run, read_table, row_name
from utils.errors import UserError
from utils.run.progress import announce
from utils.run.signals import StopRequest

PROGRAM = (sys.executable, str(Path(__file__).resolve().parent.parent / "main.py"))
RUNS_FOLDER = Path("runs/tables")
POLL_SECONDS = 0.05
USELESS = {  # options that another one would ignore
    "only_report": ("jobs", "rows", "seeds", "again", "recorded", "time", "dry_run"),
    "again": ("recorded",),
    "time": ("jobs", "seeds"),  # one run of every row, one after the other
}


def read_command_line(argv: Sequence[str] | None) -> argparse.Namespace:
    """All options; `--help` prints and exits with code 0.

    Raises: UserError for every mistake.
    """
    parser = ToolParser(
        "tools.reproduce",
        "Makes the missing runs of a table NAME.yaml and writes NAME.md, NAME.csv and NAME.runs.json, a record of the "
        "runs: into results/ for a table in configs/tables/ of this repository, and next to any other table. The "
        "report includes recorded runs whose folders are elsewhere.",
    )
    parser.add_argument("table", metavar="TABLE.yaml", help="the table, such as configs/tables/small.yaml")
    parser.add_argument("--runs", type=Path, metavar="PATH", help="folder of its runs (default: runs/tables/NAME)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs side by side (default: 1)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="make only runs of these rows, and what they wait for")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="make only runs of these seeds")
    parser.add_argument("--again", action="store_true", help="also make runs that are done; the newest ones count")
    parser.add_argument("--recorded", action="store_true", help="make no run that NAME.runs.json holds")
    parser.add_argument("--time", action="store_true", help="measure seconds: one run of every row, alone, apart")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their states, and exit")
    parser.add_argument("--only-report", action="store_true", help="write the table from the runs that are there")
    arguments = parser.parse_args(argv)
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {arguments.jobs}")
    for switch, keys in USELESS.items():
        useless = [f"--{key.replace('_', '-')}" for key in keys if getattr(arguments, key) not in (None, False)]
        if getattr(arguments, switch) and useless:
            raise UserError(f"--{switch.replace('_', '-')} does not go with {', '.join(useless)}; leave one out")
    return arguments


def run(argv: Sequence[str] | None, program: Sequence[str]) -> int:
    arguments = read_command_line(argv)
    table = read_table(arguments.table)
    root = arguments.runs or RUNS_FOLDER / table.path.stem
    record = Record(record_path(table))
    for place, reason in TableRuns(table, root, record).left_out.items():
        announce(f"left out: {place} ({reason})")
    runs = TableRuns(table, root, record, alone=arguments.time, recorded=arguments.recorded)
    seeds = table.seeds[:1] if arguments.time else arguments.seeds
    cells = runs.with_sources(choose_cells(table, arguments.rows, seeds))
    if arguments.dry_run:
        print("\n".join(runs.describe(cell) for cell in cells))
        return 0
    failures: dict[Cell, str] = {}
    if not arguments.only_report:
        from utils.run.folder import lock  # torch takes seconds to import: not for a list or a mistake

        maker = Maker(runs, program, arguments.jobs or 1, arguments.again)
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {root}: {error.strerror}; choose another place with --runs") from error
        with lock(root), StopRequest() as stop:
            failures = maker.make(cells, stop)
        if stop.signal is not None:
            announce("stopped; the runs under way are saved, the same command goes on")
            return stop.exit_code
    try:
        path = write_report(collect(table, root, record), record)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}; the runs stay, see --only-report") from error
    for cell, reason in failures.items():
        print(f"failed: {cell}: {reason}", file=sys.stderr)
    print(f"written: {path} and {path.with_suffix('.csv')}")
    return 1 if failures else 0


# ---- which runs there are ----


class Cell(NamedTuple):
    """One run of a table."""

    row: str
    seed: int

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def folder_name(self) -> str:
        return f"{re.sub(r'[^A-Za-z0-9.=+-]+', '_', self.row)}-seed{self.seed}"


def choose_cells(table: Table, rows: Sequence[str] | None, seeds: Sequence[int] | None) -> list[Cell]:
    """The runs asked for, seed by seed, so that a table that is stopped early has every row."""
    rows = [row_name(row, table.rows, "--rows") for row in rows or table.rows]
    for seed in seeds or ():
        if seed not in table.seeds:
            raise UserError(f"--seeds: {seed} is none of the seeds of {table.path}; add it there, for the report")
    return [Cell(row, seed) for seed in seeds or table.seeds for row in rows]


class TableRuns:
    """What there is for a table; `refresh` looks again.

    Args:
        root: folder of the runs; those that ran alone lie in `timed` below it.
        alone: only runs that ran alone, for their seconds. Otherwise their results count beside all others.
        recorded: whether recorded runs are among them.
    Attributes:
        left_out: why runs are not used, by place.
    """

    def __init__(self, table: Table, root: Path, record: Record, alone: bool = False, recorded: bool = True) -> None:
        self.table, self.root, self.record = table, root, record
        self.alone, self.recorded = alone, recorded
        self.folder = root / "timed" if alone else root  # of new runs
        self.refresh()

    def refresh(self) -> None:
        self.left_out, runs = dict(self.record.unreadable), []
        for folder, alone in ((self.root, False), (self.root / "timed", True)):
            for config in sorted(folder.glob("[0-9a-f]" * 12 + "/**/config.yaml")):
                try:
                    runs.append(read_run(config.parent, alone, self.table, self.record.defaults))
                except UserError as error:
                    self.left_out[str(config)] = str(error)
        for run in self.record.runs if self.recorded else ():
            if missing := [name for name in self.table.numbers if run.facts.get(name) is None]:
                self.left_out[f"{self.record.path}, {run.row}, seed {run.seed}"] = f"it has no {', '.join(missing)}"
            else:
                runs.append(run)
        self._runs: dict[tuple[str, int], list[Run]] = {}
        for run in sorted(filter(None, runs), key=lambda run: run.age, reverse=True):
            if run.alone == self.alone or (run.alone and run.finished):
                self._runs.setdefault((run.hash, run.seed), []).append(run)

    def options(self, cell: Cell) -> dict[str, Any] | None:
        """The options of a cell but its seed; None while the row that it takes its FLOPs from has no result."""
        options, source = self.table.rows[cell.row].options, self.source(cell)
        if source is None:
            return options
        result = self.result(source)
        return None if result is None else {**options, "keep_ratio": result.facts["flops_ratio"]}

    def hash(self, cell: Cell) -> str | None:
        options = self.options(cell)
        if options is None:
            return None
        return config_hash(options_of(options, self.table.rows[cell.row].where), self.record.defaults)

    def newest(self, cell: Cell) -> Run | None:
        """The run of a cell that was started last, finished or not."""
        return next(iter(self._runs.get((self.hash(cell), cell.seed), ())), None)

    def results(self, cell: Cell) -> list[Run]:
        """The finished runs of a cell; the first was started last and is the one that counts."""
        return [run for run in self._runs.get((self.hash(cell), cell.seed), ()) if run.finished]

    def result(self, cell: Cell) -> Run | None:
        return next(iter(self.results(cell)), None)

    def is_done(self, cell: Cell) -> bool:
        """A cell whose newest run has no result yet is not, even if an older one has."""
        newest = self.newest(cell)
        return newest is not None and newest.finished

    def source(self, cell: Cell) -> Cell | None:
        """The cell whose FLOPs ratio is the keep_ratio of this one."""
        name = self.table.rows[cell.row].flops_of
        return None if name is None else Cell(name, cell.seed)

    def with_sources(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells, and before each the missing ones that it takes its FLOPs from."""
        wanted: dict[Cell, None] = {}
        for cell in cells:
            chain = [cell]
            while (source := self.source(chain[-1])) is not None and not self.is_done(source):
                chain.append(source)
            wanted |= dict.fromkeys(reversed(chain))
        return list(wanted)

    def describe(self, cell: Cell) -> str:
        """One line: the cell, its state, its hash and the folder of its newest run."""
        hash, newest = self.hash(cell), self.newest(cell)
        if hash is None:
            return f"{cell}:  waits for {self.table.rows[cell.row].flops_of}"
        if newest is None:
            return f"{cell}:  not run yet  {hash}"
        return f"{cell}:  {'done' if newest.finished else 'interrupted'}  {hash}  {newest.folder or 'recorded'}"


def collect(table: Table, root: Path, record: Record) -> Results:
    """The finished runs for the report."""
    runs, timed = TableRuns(table, root, record), TableRuns(table, root, record, alone=True)
    found = {row: {seed: run for seed in table.seeds if (run := runs.result(Cell(row, seed)))} for row in table.rows}
    return Results(table, found, {row: timed.results(Cell(row, table.seeds[0])) for row in table.rows})


# ---- making those that are missing ----


class Child(NamedTuple):
    """A run under way in a process of its own, which appends to a log from `log_start` on."""

    cell: Cell
    hash: str
    process: subprocess.Popen
    log: Path
    log_start: int


class Maker:
    """Makes the missing runs of some cells, `jobs` side by side.

    Args:
        program: the command that trains, without its options.
        again: also make those that are done; the newest run counts.
    """

    def __init__(self, runs: TableRuns, program: Sequence[str], jobs: int = 1, again: bool = False) -> None:
        self.runs, self.program, self.jobs, self.again = runs, program, jobs, again
        self.children: list[Child] = []
        self.failures: dict[Cell, str] = {}

    def make(self, cells: Sequence[Cell], stop: StopRequest) -> dict[Cell, str]:
        """Goes on until every cell is done or has failed, or a signal comes: then the runs under way save and end.

        Returns: why cells failed.
        """
        self.waiting = [cell for cell in cells if self.again or not self.runs.is_done(cell)]
        self.total = len(cells)
        try:
            while (self.waiting or self.children) and stop.signal is None:
                self._start_ready()
                self._collect_ended()
                time.sleep(POLL_SECONDS if self.children else 0)
        finally:
            if self.children:
                announce(f"stopping {len(self.children)} runs; each finishes its step and saves")
            # SIGTERM also for Ctrl-C: a process that was started in the background ignores SIGINT until it trains.
            for child in self.children:
                child.process.terminate()
            for child in self.children:
                child.process.wait()
        return self.failures

    def _start_ready(self) -> None:
        for cell in list(self.waiting):
            if len(self.children) == self.jobs:
                return
            source, hash = self.runs.source(cell), self.runs.hash(cell)
            if source in self.waiting or any(child.cell == source for child in self.children):
                continue
            if any((child.hash, child.cell.seed) == (hash, cell.seed) for child in self.children):
                continue  # another row with the same options: its run is this one's
            self.waiting.remove(cell)
            if hash is None:
                self._fail(cell, f"it takes its FLOPs from {source}, which has no result")
            elif self.again or not self.runs.is_done(cell):  # the run of another row may have been this one's
                self.children.append(self._start(cell, hash))

    def _start(self, cell: Cell, hash: str) -> Child:
        root, newest = self.runs.folder, self.runs.newest(cell)
        log = root / hash / f"{cell.folder_name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        if newest is not None and not newest.finished and not self.again:
            command = ["--resume", str(newest.folder)]
        else:
            config = root / f"{hash}.yaml"
            text = yaml.safe_dump({"log_dir": str(root), **self.runs.options(cell)}, sort_keys=False)
            partial = config.with_name(f"{config.name}.partial")  # a run of another seed may be reading the old one
            partial.write_text(f"# table {self.runs.table.path.name}, row {cell.row}\n{text}", encoding="utf-8")
            os.replace(partial, config)
            command = ["--config", str(config), "--seed", str(cell.seed), "--name", cell.folder_name]
        # Cores are shared out among the jobs; threads that spin while they wait make a busy machine slower still.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = {"OMP_NUM_THREADS": str(max(1, cores // self.jobs)), "OMP_WAIT_POLICY": "passive"}
        with open(log, "ab") as output:
            # A session of its own: Ctrl-C in a terminal reaches every process there, and a second signal would
            # keep the run from saving.
            process = subprocess.Popen(
                [*self.program, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**threads, **os.environ},  # whoever set the threads before is obeyed
            )
            return Child(cell, hash, process, log, output.tell())

    def _collect_ended(self) -> None:
        ended = [child for child in self.children if child.process.poll() is not None]
        if ended:
            self.runs.refresh()
        for child in ended:
            self.children.remove(child)
            result = self.runs.result(child.cell)
            if child.process.returncode or result is None:
                self._fail(child.cell, f"{last_error(child)} (all that it printed: {child.log})")
                continue
            done = self.total - len(self.waiting) - len(self.children) - len(self.failures)
            told = (
                f"{result.facts[self.runs.table.accuracy]:.2f} % top-1, {result.facts['flops_ratio']:.1%} of the FLOPs"
            )
            announce(f"[{done}/{self.total}] {child.cell}: {told}")

    def _fail(self, cell: Cell, reason: str) -> None:
        self.failures[cell] = reason
        announce(f"failed: {cell}: {reason}")


def last_error(child: Child) -> str:
    """What a failed run said last: its last error line, else its last line."""
    text = child.log.read_bytes()[child.log_start :].decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    status = child.process.returncode
    how = f"ended by signal {-status}" if status < 0 else f"exit code {status}"
    return f"{how}: {(errors or lines or ['it printed nothing'])[-1]}"


def main(argv: Sequence[str] | None = None, program: Sequence[str] = PROGRAM) -> int:
    """Returns the exit code: 0 done, 1 a run failed, 2 a user's mistake, 130 or 143 stopped by Ctrl-C or SIGTERM.

    Args:
        program: the command that trains, without its options.
    """
    return exit_code_of(lambda: run(argv, program))


if __name__ == "__main__":
    sys.exit(main())
