"""Makes the runs of a table of results and writes the table: `python -m tools.reproduce configs/tables/NAME.yaml`.

Runs that are done are not made again, so the same command goes on where it was stopped, and after a change of the table
makes what is new. `tools/table_file.py` describes the file, `tools/table_runs.py` the runs, `tools/table_schedule.py`
how they are made, `tools/table_report.py` and `tools/table_record.py` what is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.command_line import ToolParser, exit_code_of
from tools.table_file import Table, read_table
from tools.table_record import read_record
from tools.table_report import collect, record_path, write_report
from tools.table_runs import Cell, Run, TableRuns
from tools.table_schedule import Scheduler
from utils.errors import UserError
from utils.options import nearest
from utils.run.progress import announce
from utils.run.signals import StopRequest

PROGRAM = (sys.executable, str(Path(__file__).resolve().parent.parent / "main.py"))
LIMITS = ("jobs", "rows", "seeds", "again", "recorded")  # options that say which runs are made, and how
RUNS_FOLDER, RESULTS_FOLDER = Path("runs/tables"), Path("results")


def read_command_line(argv: Sequence[str] | None) -> argparse.Namespace:
    """All options; `--help` prints and exits with code 0.

    Raises: UserError for every mistake.
    """
    parser = ToolParser(
        "tools.reproduce",
        "Makes the missing runs of a table and writes results/NAME.md, NAME.csv and NAME.runs.json, a record of the "
        "runs. A run that is missing here is told from the record.",
    )
    parser.add_argument("table", metavar="TABLE.yaml", help="the table, such as configs/tables/small.yaml")
    parser.add_argument("--runs", type=Path, metavar="PATH", help="folder of its runs (default: runs/tables/NAME)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs side by side (default: 1)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="make only runs of these rows, and what they wait for")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="make only runs of these seeds")
    parser.add_argument("--again", action="store_true", help="also make runs that are done; the newest ones count")
    parser.add_argument("--recorded", action="store_true", help="make no run that results/NAME.runs.json holds")
    parser.add_argument("--time", action="store_true", help="measure seconds: one run of every row, alone, apart")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their states, and exit")
    parser.add_argument("--only-report", action="store_true", help="write the table from the runs that are there")
    arguments = parser.parse_args(argv)
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {arguments.jobs}")
    _refuse_useless(arguments, "only_report", (*LIMITS, "time", "dry_run"), "makes no runs")
    _refuse_useless(arguments, "again", ("recorded",), "makes every run")
    _refuse_useless(arguments, "time", ("jobs", "seeds"), "makes one run at a time, of the first seed")
    return arguments


def _refuse_useless(arguments: argparse.Namespace, switch: str, keys: Sequence[str], what: str) -> None:
    useless = [f"--{key.replace('_', '-')}" for key in keys if getattr(arguments, key) not in (None, False)]
    if getattr(arguments, switch) and useless:
        raise UserError(f"--{switch.replace('_', '-')} {what}; leave out {', '.join(useless)}")


def choose_cells(table: Table, rows: Sequence[str] | None, seeds: Sequence[int] | None) -> list[Cell]:
    """The runs asked for, seed by seed, so that a table that is stopped early has every row."""
    for row in rows or ():
        if row not in table.rows:
            advice = nearest(row, table.rows, f"its rows are {', '.join(table.rows)}")
            raise UserError(f"--rows: {table.path} has no row {row!r}; {advice}")
    for seed in seeds or ():
        if seed not in table.seeds:
            raise UserError(f"--seeds: {seed} is none of the seeds of {table.path}; add it there, for the report")
    return [Cell(row, seed) for seed in seeds or table.seeds for row in rows or table.rows]


def run(argv: Sequence[str] | None, program: Sequence[str]) -> int:
    arguments = read_command_line(argv)
    table = read_table(arguments.table)
    root = arguments.runs or RUNS_FOLDER / table.name
    recorded, unreadable = read_record(record_path(table, RESULTS_FOLDER), table.numbers)
    untimed, timed = look(table, root, recorded if arguments.recorded else [])
    for place, reason in (unreadable | untimed.unreadable | timed.unreadable).items():
        announce(f"left out: {place} ({reason})")
    runs, seeds = (timed, table.seeds[:1]) if arguments.time else (untimed, arguments.seeds)
    cells = runs.with_sources(choose_cells(table, arguments.rows, seeds))
    if arguments.dry_run:
        print("\n".join(_line(runs, cell) for cell in cells))
        return 0
    failures: dict[Cell, str] = {}
    if not arguments.only_report:
        scheduler = Scheduler(runs, program, arguments.jobs or 1, arguments.again)
        if code := _make(scheduler, cells, root):
            return code
        failures = scheduler.failures
    try:
        path = write_report(collect(table, *look(table, root, recorded)), RESULTS_FOLDER)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}; the runs stay, see --only-report") from error
    for cell, reason in failures.items():
        print(f"failed: {cell}: {reason}", file=sys.stderr)
    print(f"written: {path} and {path.with_suffix('.csv')}")
    return 1 if failures else 0


def look(table: Table, root: Path, recorded: Sequence[Run]) -> tuple[TableRuns, TableRuns]:
    """The runs whose numbers count, and among them those whose seconds count: they ran alone.

    Args:
        recorded: runs that are not below `root`.
    """
    timed = TableRuns(table, root / "timed", alone=True, elsewhere=[run for run in recorded if run.alone])
    side_by_side = [run for run in recorded if not run.alone]
    return TableRuns(table, root, elsewhere=[*side_by_side, *timed.finished()]), timed


def _make(scheduler: Scheduler, cells: Sequence[Cell], root: Path) -> int:
    """Makes what is missing; returns the exit code of a signal, 0 if none came."""
    from utils.run.folder import lock  # torch takes seconds to import: not for a list or a mistake

    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {root}: {error.strerror}; choose another place with --runs") from error
    with lock(root), StopRequest() as stop:
        scheduler.execute(cells, stop)
        if stop.signal is not None:
            announce("stopped; the runs under way are saved, the same command goes on")
        return stop.exit_code


def _line(runs: TableRuns, cell: Cell) -> str:
    key, newest = runs.key(cell), runs.newest(cell)
    place = newest and str(newest.folder or "recorded")
    return "  ".join(filter(None, (f"{cell}:", runs.state(cell), key and key.hash, place)))


def main(argv: Sequence[str] | None = None, program: Sequence[str] = PROGRAM) -> int:
    """Returns the exit code: 0 done, 1 a run failed, 2 a user's mistake, 130 or 143 stopped by Ctrl-C or SIGTERM.

    Args:
        program: the command that trains, without its options.
    """
    return exit_code_of(lambda: run(argv, program))


if __name__ == "__main__":
    sys.exit(main())
