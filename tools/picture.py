"""Draws a table of results: accuracy against the cost of training, `python -m tools.picture configs/tables/NAME.yaml`.

The record of the table is all that it reads, so it needs no run folder and no image.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.command_line import ToolParser, exit_code_of, import_with_matplotlib
from tools.table_figures import Results
from tools.table_record import Record, record_path
from tools.tables import read_table, row_name
from utils.errors import UserError

ENDINGS = (".svg", ".png")


def read_command_line(argv: Sequence[str] | None) -> argparse.Namespace:
    """All options; `--help` prints and exits with code 0.

    Raises: UserError for every mistake.
    """
    parser = ToolParser(
        "tools.picture",
        "Draws the accuracy of every row of a table against its training FLOPs and, where they are recorded, against "
        "its processor seconds, each with a 95 % interval. It reads the record that tools.reproduce writes.",
    )
    parser.add_argument("table", metavar="TABLE.yaml", help="the table, such as configs/tables/cifar.yaml")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="draw only these rows (default: all that have a run)")
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="an .svg or .png file (default: NAME.svg by the record)"
    )
    arguments = parser.parse_args(argv)
    if arguments.out is not None and arguments.out.suffix not in ENDINGS:
        raise UserError(f"--out must end with {' or '.join(ENDINGS)}, got {arguments.out}")
    return arguments


def run(argv: Sequence[str] | None) -> None:
    arguments = read_command_line(argv)
    table = read_table(arguments.table)
    chosen = [row_name(row, table.rows, "--rows") for row in arguments.rows or table.rows]
    path = record_path(table)
    results = Results.of(table, None, Record(path))
    rows = [row for row in chosen if results.runs[row]]
    if not rows:
        raise UserError(
            f"{path} has no run of these rows; make them with `python -m tools.reproduce {arguments.table}`"
        )
    for row in dict.fromkeys(table.dense[row] for row in rows):
        if results.dense_epochs(row) is None:
            raise UserError(
                f"the training FLOPs are compared with those of {row!r}, of which {path} has no run and {table.path} "
                "leaves the epochs auto; make one, or give its epochs"
            )
    drawing = import_with_matplotlib("tools.picture_figure", "a picture")
    out = arguments.out or path.with_name(f"{table.path.stem}.svg")
    try:
        drawing.save(drawing.draw(results, rows), out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another place with --out") from error
    if left_out := [row for row in chosen if row not in rows]:
        print(f"not run yet, so not drawn: {', '.join(left_out)}")
    print(f"written: {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 a user's mistake."""
    return exit_code_of(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
