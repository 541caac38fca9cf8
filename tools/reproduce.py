"""Makes the runs of a table of results and writes the table: `python -m tools.reproduce configs/tables/NAME.yaml`.

Runs that are done are not made again. The same command therefore goes on where it was stopped, and after a change of
the table it makes what is new. `--commands` prints the commands of the missing runs instead, one a line, for a
scheduler that runs them on other machines. `tools/tables.py` describes the file, `tools/table_report.py` what is
written.
"""

from __future__ import annotations

import argparse
import glob
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tools.command_line import ToolParser, exit_code_of
from tools.table_figures import Results
from tools.table_record import Record, record_path
from tools.table_report import write_report
from tools.table_runs import Cell, TableRuns, choose_cells
from tools.tables import read_table
from utils.errors import UserError
from utils.run.lock import lock
from utils.run.progress import announce
from utils.run.signals import StopRequest

PROGRAM = (sys.executable, str(Path(__file__).resolve().parent.parent / "main.py"))
RUNS_FOLDER = Path("runs/tables")
POLL_SECONDS = 0.05
USELESS = {  # options that another one would ignore
    "only_report": ("jobs", "rows", "seeds", "again", "recorded", "time", "dry_run", "commands"),
    "commands": ("jobs", "time", "dry_run"),
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
    parser.add_argument("table", metavar="TABLE.yaml", help="the table, such as configs/tables/cifar.yaml")
    parser.add_argument("--runs", type=Path, metavar="PATH", help="folder of its runs (default: runs/tables/NAME)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs side by side (default: 1)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="make only runs of these rows, and what they wait for")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="make only runs of these seeds")
    parser.add_argument("--again", action="store_true", help="also make runs that are done; the newest ones count")
    parser.add_argument("--recorded", action="store_true", help="make no run that NAME.runs.json holds")
    parser.add_argument("--time", action="store_true", help="measure seconds: one run of every row, alone, apart")
    parser.add_argument(
        "--commands",
        action="store_true",
        help="write the config of every missing run, print the command that makes it, and exit; what waits for another "
        "run is a comment, and a command once that run is done",
    )
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
    cells = runs.with_sources(choose_cells(table, arguments.rows, seeds), arguments.again)
    if arguments.dry_run:
        print("\n".join(runs.describe(cell) for cell in cells))
        return 0
    failures: dict[Cell, str] = {}
    if not arguments.only_report:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {root}: {error.strerror}; choose another place with --runs") from error
        with lock(root), StopRequest() as stop:
            if arguments.commands:
                print_commands(runs, cells, program, arguments.again)
                return 0
            failures = Maker(runs, program, arguments.jobs or 1, arguments.again).make(cells, stop)
        if stop.signal is not None:
            announce("stopped; the runs under way are saved, the same command goes on")
            return stop.exit_code
    try:
        path = write_report(Results.of(table, root, record), record)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}; the runs stay, see --only-report") from error
    for cell, reason in failures.items():
        print(f"failed: {cell}: {reason}", file=sys.stderr)
    print(f"written: {path} and {path.with_suffix('.csv')}")
    return 1 if failures else 0


# ---- telling how to make those that are missing ----


def print_commands(runs: TableRuns, cells: Sequence[Cell], program: Sequence[str], again: bool) -> None:
    """One shell command for each missing run that can start, and a comment for each that cannot."""
    told = set()
    for cell in cells:
        which = runs.hash(cell), cell.seed
        if which in told or (runs.is_done(cell) and not again):
            continue  # it is there, or another row with the same options has its command
        if (reason := runs.obstacle(cell) or under_way(runs, cell)) is not None:
            print(f"# {cell}: {reason}")
            continue
        told.add(which)
        print(shlex.join([*program, *runs.arguments(cell, again)]))


def under_way(runs: TableRuns, cell: Cell) -> str | None:
    """Who is making a cell at present, as the lock of its run says."""
    for path in runs.folder.glob(f"{runs.hash(cell)}/{glob.escape(cell.folder_name)}/**/run.lock"):
        try:
            with lock(path.parent):
                pass
        except UserError as error:
            return str(error)
    return None


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
            under_way = [*self.waiting, *(child.cell for child in self.children)]
            if any(source in under_way for source in self.runs.sources(cell)):
                continue
            hash = self.runs.hash(cell)
            if any((child.hash, child.cell.seed) == (hash, cell.seed) for child in self.children):
                continue  # another row with the same options: its run is this one's
            self.waiting.remove(cell)
            if not self.again and self.runs.is_done(cell):
                continue  # the run of another row was this one's
            if (reason := self.runs.obstacle(cell)) is not None:
                self._fail(cell, reason)
            else:
                self.children.append(self._start(cell, hash))

    def _start(self, cell: Cell, hash: str) -> Child:
        log = self.runs.folder / hash / f"{cell.folder_name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments = self.runs.arguments(cell, self.again)
        # Cores are shared out among the jobs; threads that spin while they wait make a busy machine slower still.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = {"OMP_NUM_THREADS": str(max(1, cores // self.jobs)), "OMP_WAIT_POLICY": "passive"}
        with open(log, "ab") as output:
            # A session of its own: Ctrl-C in a terminal reaches every process there, and a second signal would
            # keep the run from saving.
            process = subprocess.Popen(
                [*self.program, *arguments],
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
