"""Which runs of a table there are, here and in its record, which are missing, and the options that make one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tools.table_record import BEST, Record, Run, config_hash, named_by_hash, numbers_of, options_of, read_run, run_name
from tools.tables import RUN_OF, Table, row_name
from utils.errors import UserError


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
        root: folder of the runs; those that ran alone lie in `timed` below it. None: only the record counts.
        alone: only runs that ran alone, for their seconds. Otherwise their results count beside all others.
        recorded: whether recorded runs are among them.
    Attributes:
        left_out: why runs are not used, by place.
    """

    def __init__(self, table: Table, root: Path | None, record: Record, *, alone: bool = False, recorded: bool = True):
        self.table, self.record = table, record
        self.alone, self.recorded = alone, recorded
        self.places = {} if root is None else {False: root, True: root / "timed"}  # by whether runs there ran alone
        self.refresh()

    def refresh(self) -> None:
        self.left_out, runs = dict(self.record.unreadable), []
        for alone, folder in self.places.items():
            for config in sorted(folder.glob("[0-9a-f]" * 12 + "/**/config.yaml")):
                try:
                    runs.append(read_run(config.parent, alone, self.table, self.record.defaults))
                except UserError as error:
                    self.left_out[str(config)] = str(error)
        for run in self.record.runs if self.recorded else ():
            if missing := [name for name in numbers_of(self.table) if run.facts.get(name) is None]:
                self.left_out[f"{self.record.path}, {run.row}, seed {run.seed}"] = f"it has no {', '.join(missing)}"
            else:
                runs.append(run)
        self._runs: dict[tuple[str, int], list[Run]] = {}
        for run in sorted(filter(None, runs), key=lambda run: run.age, reverse=True):
            if run.alone == self.alone or (run.alone and run.finished):
                self._runs.setdefault((run.hash, run.seed), []).append(run)

    # ---- what a cell is ----

    def options(self, cell: Cell) -> dict[str, Any] | None:
        """The options of a cell but its seed, as they are recorded: the run of another row is named by its hash.

        Returns: None while a row that it takes its FLOPs from has no result.
        """
        row = self.table.rows[cell.row]
        options = named_by_hash(row.options, cell.seed)
        for key, name in row.flops_of.items():
            result = self.result(Cell(name, cell.seed))
            if result is None:
                return None
            options[key] = result.facts["flops_ratio"]
        for key, name in row.run_of.items():
            hash = self.hash(Cell(name, cell.seed))
            if hash is None:
                return None
            options[key] = run_name(hash)
        return options

    def hash(self, cell: Cell) -> str | None:
        options = self.options(cell)
        if options is None:
            return None
        return config_hash(options_of(options, self.table.rows[cell.row].where), self.record.defaults)

    def sources(self, cell: Cell) -> list[Cell]:
        """The cells whose runs this one needs before it can start."""
        row = self.table.rows[cell.row]
        return [Cell(name, cell.seed) for name in dict.fromkeys([*row.flops_of.values(), *row.run_of.values()])]

    def obstacle(self, cell: Cell) -> str | None:
        """Why a cell cannot start, if what it needs of other rows is not here."""
        row = self.table.rows[cell.row]
        for source in self.sources(cell):
            if self.result(source) is None:
                takes = "takes its FLOPs from" if source.row in row.flops_of.values() else "starts from the run of"
                return f"it {takes} {source}, which has no result"
        for name in row.run_of.values():
            source = Cell(name, cell.seed)
            if self.best(source) is None:
                return (
                    f"it starts from {BEST} of {source}, and no folder here has that file; make that run again, with "
                    f"--again if its folder is here and without --recorded if it is only recorded"
                )
        return None

    # ---- what there is of it ----

    def newest(self, cell: Cell) -> Run | None:
        """The run of a cell that was started last, finished or not."""
        return next(iter(self._runs.get((self.hash(cell), cell.seed), ())), None)

    def results(self, cell: Cell) -> list[Run]:
        """The finished runs of a cell; the first was started last and is the one that counts."""
        return [run for run in self._runs.get((self.hash(cell), cell.seed), ()) if run.finished]

    def result(self, cell: Cell) -> Run | None:
        return next(iter(self.results(cell)), None)

    def best(self, cell: Cell) -> Path | None:
        """The trained network of a cell: best.pt of the newest finished run that has it here."""
        places = (run.folder / BEST for run in self.results(cell) if run.folder is not None)
        return next((place for place in places if place.is_file()), None)

    def is_done(self, cell: Cell) -> bool:
        """A cell whose newest run has no result yet is not, even if an older one has."""
        newest = self.newest(cell)
        return newest is not None and newest.finished

    def with_sources(self, cells: Iterable[Cell], again: bool = False) -> list[Cell]:
        """The cells, and before each that is to be made the missing ones that it needs."""
        wanted: dict[Cell, None] = {}
        for cell in cells:
            needed = self.sources(cell) if again or not self.is_done(cell) else []
            missing = [source for source in needed if not self.is_done(source)]
            wanted |= dict.fromkeys([*self.with_sources(missing), cell])
        return list(wanted)

    def describe(self, cell: Cell) -> str:
        """One line: the cell, its state, its hash and the folder of its newest run."""
        hash, newest = self.hash(cell), self.newest(cell)
        if newest is not None:
            return f"{cell}:  {'done' if newest.finished else 'interrupted'}  {hash}  {newest.folder or 'recorded'}"
        waits = [source.row for source in self.sources(cell) if self.result(source) is None]
        state = f"waits for {', '.join(waits)}" if waits else "not run yet"
        return "  ".join([f"{cell}:", state, *([hash] if hash else [])])

    # ---- making it ----

    @property
    def folder(self) -> Path:
        """Where new runs go."""
        return self.places[self.alone]

    def arguments(self, cell: Cell, again: bool = False) -> list[str]:
        """The options of main.py that make a cell, or go on with it unless `again`.

        Writes the config file that they name. It is that of every seed, so what differs between the runs of one hash
        is not in it: the seed, and the file of the run that this one starts from.
        """
        hash, newest, row = self.hash(cell), self.newest(cell), self.table.rows[cell.row]
        if newest is not None and not newest.finished and not again:
            return ["--resume", str(newest.folder)]
        config = self.folder / f"{hash}.yaml"
        options = {key: row.options[key] if key in RUN_OF else value for key, value in self.options(cell).items()}
        shared = {key: value for key, value in options.items() if key not in row.run_of}
        text = yaml.safe_dump({"log_dir": str(self.folder), **shared}, sort_keys=False)
        partial = config.with_name(f"{config.name}.partial")  # a run of another seed may be reading the old one
        partial.write_text(f"# table {self.table.path.name}, row {cell.row}\n{text}", encoding="utf-8")
        os.replace(partial, config)
        starts = {key: self.best(Cell(name, cell.seed)) for key, name in row.run_of.items()}
        given = [text for key, file in starts.items() for text in (f"--{key.replace('_', '-')}", str(file))]
        return ["--config", str(config), "--seed", str(cell.seed), "--name", cell.folder_name, *given]
