"""The runs of a table: those below one folder, and those that are only recorded.

<root>/<hash>.yaml              the options of a run, without its seed
<root>/<hash>/<row>-seed<n>/... its run folder, made by main.py; <row>-seed<n>.log beside it is what it printed

A run belongs to the hash of its *own* config.yaml, read by today's options: an option added since counts with its
default, so that finished runs stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from args import Config, config_from_dict, parse_args
from tools.table_file import Table, config_hash, hashed_options
from utils.errors import UserError

HASH = re.compile(r"[0-9a-f]{12}")
HARDWARE = ("cpu", "cpu_capability", "gpu", "num_threads")  # of env.json: what decides how long a run takes


@dataclass(frozen=True)
class Cell:
    """One run of a table."""

    row: str
    seed: int

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def folder_name(self) -> str:
        return f"{re.sub(r'[^A-Za-z0-9.=+-]+', '_', self.row)}-seed{self.seed}"


@dataclass(frozen=True)
class Key:
    """What tells runs apart: `table_file.config_hash`, and the seed."""

    hash: str
    seed: int


@dataclass(frozen=True)
class Run:
    """A run that has something to go on from, or a result.

    Attributes:
        started: time of its latest start, in ns.
        options: what the hash stands for.
        summary: of a finished run; None before.
        environment: what the run wrote about machine, versions and images.
        date: the day, in UTC, on which it was finished.
        alone: nothing else ran at the same time, so its seconds count.
        folder: None: only recorded.
    """

    key: Key
    started: int
    options: dict[str, Any]
    summary: dict[str, Any] | None
    environment: dict[str, Any]
    date: str
    alone: bool
    folder: Path | None = None


def machine_of(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    """Equal for runs on one machine, the only ones whose seconds are a ratio. `facts`: of env.json, or a record's."""
    return tuple(facts.get(name) for name in HARDWARE)


class TableRuns:
    """What there is for a table below `root`; `refresh` looks again.

    Args:
        alone: whether the runs below `root` run one at a time.
        elsewhere: finished runs that count as well.
    """

    def __init__(self, table: Table, root: Path, alone: bool = False, elsewhere: Iterable[Run] = ()) -> None:
        self.table, self.root, self.alone, self.elsewhere = table, root, alone, list(elsewhere)
        self.refresh()

    def refresh(self) -> None:
        """Finds all runs.

        `unreadable` then holds the config files that today's options refuse: their runs are not used.
        """
        self.unreadable: dict[Path, str] = {}
        self._runs: dict[Key, list[Run]] = {}
        self._keys_elsewhere = {run.key for run in self.elsewhere}
        for run in self.elsewhere:
            self._runs.setdefault(run.key, []).append(run)
        folders = sorted(self.root.iterdir()) if self.root.is_dir() else []
        for file in (file for folder in folders if HASH.fullmatch(folder.name) for file in folder.rglob("config.yaml")):
            try:
                config = parse_args(["--config", str(file)]).config
            except UserError as error:
                self.unreadable[file] = str(error)
                continue
            run = _read_run(file.parent, config, self.alone, self.table.numbers)
            if run.summary or (run.folder / "checkpoints" / "last.pt").is_file():
                self._runs.setdefault(run.key, []).append(run)

    def finished(self) -> list[Run]:
        """All runs that have a result, whether the table still has them or not."""
        return [run for runs in self._runs.values() for run in runs if run.summary is not None]

    def options(self, cell: Cell) -> dict[str, Any] | None:
        """The options of a cell but its seed; None while the row that it takes its FLOPs from has no result."""
        row = self.table.rows[cell.row]
        if row.flops_of is None:
            return row.options
        source = self.result(Cell(row.flops_of, cell.seed))
        return None if source is None else row.options_with(source.summary["flops_ratio"])

    def key(self, cell: Cell) -> Key | None:
        options = self.options(cell)
        if options is None:
            return None
        return Key(config_hash(config_from_dict(options, self.table.rows[cell.row].where)), cell.seed)

    def newest(self, cell: Cell) -> Run | None:
        """The run of a cell that was started last, finished or not."""
        return max(self._runs.get(self.key(cell), []), key=_age, default=None)

    def results(self, cell: Cell) -> list[Run]:
        """The finished runs of a cell, that which was started last first."""
        finished = [run for run in self._runs.get(self.key(cell), []) if run.summary is not None]
        return sorted(finished, key=_age, reverse=True)

    def result(self, cell: Cell) -> Run | None:
        """The one that counts."""
        return next(iter(self.results(cell)), None)

    def is_done(self, cell: Cell) -> bool:
        """A run below `root` that was started again is not, until it has a result; one from elsewhere always is."""
        newest = self.newest(cell)
        return newest is not None and (newest.summary is not None or self.key(cell) in self._keys_elsewhere)

    def state(self, cell: Cell) -> str:
        """In words: done, interrupted, not run yet, waits for another row."""
        if self.key(cell) is None:
            return f"waits for {self.table.rows[cell.row].flops_of}"
        if self.newest(cell) is None:
            return "not run yet"
        return "done" if self.is_done(cell) else "interrupted"

    def with_sources(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells, and before each the missing ones that it takes its FLOPs from."""
        wanted: dict[Cell, None] = {}
        for cell in cells:
            chain = [cell]
            while (source := self.source(chain[-1])) is not None and not self.is_done(source):
                chain.append(source)
            wanted |= dict.fromkeys(reversed(chain))
        return list(wanted)

    def source(self, cell: Cell) -> Cell | None:
        name = self.table.rows[cell.row].flops_of
        return None if name is None else Cell(name, cell.seed)


def _age(run: Run) -> tuple[int, bool]:
    """Larger for newer runs; of a run that is here and recorded too, the one here counts."""
    return run.started, run.folder is not None


def _read_run(folder: Path, config: Config, alone: bool, numbers: Iterable[str]) -> Run:
    summary = read_json(folder / "summary.json") or {}
    done = all(isinstance(summary.get(name), int | float) for name in numbers)
    return Run(
        key=Key(config_hash(config), config.run.seed),
        started=(folder / "config.yaml").stat().st_mtime_ns,
        options=hashed_options(config),
        summary=summary if done else None,
        environment={**(read_json(folder / "env.json") or {}), "data_fingerprint": summary.get("data_fingerprint")},
        date=f"{datetime.fromtimestamp((folder / 'summary.json').stat().st_mtime, UTC):%Y-%m-%d}" if done else "",
        alone=alone,
        folder=folder,
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a file; None where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
