"""Making the runs of a table that are missing, some of them side by side."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tools.table_runs import Cell, Key, TableRuns
from utils.run.progress import announce
from utils.run.signals import StopRequest

POLL_SECONDS = 0.05


@dataclass
class Child:
    """A run under way in a process of its own."""

    cell: Cell
    key: Key
    process: subprocess.Popen
    log: Path
    log_start: int


class Scheduler:
    """Makes the missing runs of some cells, `jobs` side by side.

    Args:
        program: the command that trains, without its options.
        again: also make those that are done; the newest run counts.
    """

    def __init__(self, runs: TableRuns, program: Sequence[str], jobs: int = 1, again: bool = False) -> None:
        self.runs, self.program, self.jobs = runs, program, jobs
        self.again = again
        self.children: list[Child] = []
        self.failures: dict[Cell, str] = {}
        self.num_made = 0

    def execute(self, cells: Sequence[Cell], stop: StopRequest) -> None:
        """Returns when all cells are done or have failed (`failures` says why), or when a signal came: then the runs
        under way have been told to save, and have ended."""
        self.total, self.start = len(cells), time.monotonic()
        self.waiting = [cell for cell in cells if self.again or not self.runs.is_done(cell)]
        self.num_done = self.total - len(self.waiting)
        try:
            while (self.waiting or self.children) and stop.signal is None:
                self._start_ready()
                self._collect()
                time.sleep(POLL_SECONDS if self.children else 0)
        finally:
            self._stop_children()

    def _start_ready(self) -> None:
        for cell in list(self.waiting):
            if len(self.children) == self.jobs:
                return
            source = self.runs.source(cell)
            if source in self.waiting or any(child.cell == source for child in self.children):
                continue
            key = self.runs.key(cell)
            if any(child.key == key for child in self.children):
                continue  # another row with the same options: its run is this one's
            self.waiting.remove(cell)
            if key is None:
                self._fail(cell, f"it takes its FLOPs from {source}, which has no result")
            elif self.runs.is_done(cell) and not self.again:
                self.num_done += 1  # only now it is known what it is, or a row with the same options was run
            else:
                self.children.append(self._start(cell, key))

    def _start(self, cell: Cell, key: Key) -> Child:
        root, newest = self.runs.root, self.runs.newest(cell)
        if newest is not None and newest.summary is None and not self.again:
            command = ["--resume", str(newest.folder)]
        else:
            config = root / f"{key.hash}.yaml"
            options = {"log_dir": str(root), **self.runs.options(cell)}
            _write_config(config, options, f"table {self.runs.table.path.name}, row {cell.row}")
            command = ["--config", str(config), "--seed", str(cell.seed), "--name", cell.folder_name]
        log = root / key.hash / f"{cell.folder_name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            # A session of its own: Ctrl-C in a terminal reaches every process there, and a second signal would
            # keep the run from saving.
            process = subprocess.Popen(
                [*self.program, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=child_environment(os.environ, self.jobs),
            )
            return Child(cell, key, process, log, output.tell())

    def _collect(self) -> None:
        ended = [child for child in self.children if child.process.poll() is not None]
        if not ended:
            return
        self.runs.refresh()
        for child in ended:
            self.children.remove(child)
            result = self.runs.result(child.cell)
            if child.process.returncode or result is None:
                self._fail(child.cell, f"{last_error(child)} (all that it printed: {child.log})")
                continue
            self.num_done += 1
            self.num_made += 1
            announce(f"[{self.num_done}/{self.total}] {child.cell}: {self._told(result.summary)}{self._time_left()}")

    def _told(self, summary: Mapping[str, Any]) -> str:
        return (
            f"{summary[self.runs.table.accuracy]:.2f} % top-1 with {100 * summary['flops_ratio']:.1f} % of the FLOPs, "
            f"{duration(summary['train_seconds'])} of training steps"
        )

    def _fail(self, cell: Cell, reason: str) -> None:
        self.failures[cell] = reason
        announce(f"failed: {cell}: {reason}")

    def _time_left(self) -> str:
        left = len(self.waiting) + len(self.children)
        if not left:
            return ""
        seconds = (time.monotonic() - self.start) / self.num_made * left
        return f"; about {duration(seconds)} left"

    def _stop_children(self) -> None:
        if self.children:
            announce(f"stopping {len(self.children)} runs; each finishes its step and saves")
        # SIGTERM also for Ctrl-C: a process that was started in the background ignores SIGINT until it trains.
        for child in self.children:
            child.process.terminate()
        for child in self.children:
            child.process.wait()


def _write_config(path: Path, options: Mapping[str, Any], comment: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")  # a run of another seed may be reading the old one right now
    partial.write_text(f"# {comment}\n{yaml.safe_dump(dict(options), sort_keys=False)}", encoding="utf-8")
    os.replace(partial, path)


def child_environment(environment: Mapping[str, str], jobs: int) -> dict[str, str]:
    """Cores are shared out among the jobs; whoever set OMP_NUM_THREADS before is obeyed.

    OMP_WAIT_POLICY: threads that spin while they wait for a core make a busy machine slower still.
    """
    threads = max(1, num_cores() // jobs)
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", **environment}


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_error(child: Child) -> str:
    """What a failed run said last: its last error line, else its last line."""
    text = child.log.read_bytes()[child.log_start :].decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    status = child.process.returncode
    how = f"ended by signal {-status}" if status < 0 else f"exit code {status}"
    return f"{how}: {(errors or lines or ['it printed nothing'])[-1]}"


def duration(seconds: float) -> str:
    """45 s, 12 min or 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
