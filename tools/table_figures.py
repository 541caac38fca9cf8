"""The figures of a table: means, spreads, intervals, differences and costs over the runs of its rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import NamedTuple

from args import config_from_dict
from tools.table_record import Record, Run
from tools.table_runs import Cell, TableRuns
from tools.tables import Table
from utils.options import AUTO

# Two-sided 95 % quantiles of Student's t distribution for 1 to 30 degrees of freedom.
T_95 = (
    *(12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139),
    *(2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963),
    *(2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272),
)


def t_95(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t distribution.

    Beyond 30 degrees of freedom the quantile for 30 serves: an interval is up to 5 % too wide.
    """
    return T_95[min(freedom, len(T_95)) - 1]


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """The 95 % t interval of the mean of at least two independent numbers."""
    half = t_95(len(numbers) - 1) * stdev(numbers) / math.sqrt(len(numbers))
    return fmean(numbers) - half, fmean(numbers) + half


class PooledSpread(NamedTuple):
    """The standard deviation of the runs of a row, from several rows that have at least two runs each.

    Attributes:
        sd: in points.
        freedom: its degrees of freedom, the sum of n - 1 over the rows.
        num_rows: how many rows it is from.
        widest: the row with the largest part in the sum of squares.
        part: that part of the whole.
    """

    sd: float
    freedom: int
    num_rows: int
    widest: str
    part: float

    def half_width(self, num_seeds: int, num_rows: int = 1) -> float:
        """Half of the 95 % interval of the mean of so many seeds, or, for two rows, of the difference of two means.

        The runs of a difference count as independent, although those of one seed may be alike.
        """
        return t_95(self.freedom) * self.sd * math.sqrt(num_rows / num_seeds)


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

    @classmethod
    def of(cls, table: Table, root: Path | None, record: Record) -> Results:
        """All that is in a folder of runs and in a record."""
        runs, timed = (TableRuns(table, root, record, alone=alone) for alone in (False, True))
        found = {
            row: {seed: run for seed in table.seeds if (run := runs.result(Cell(row, seed)))} for row in table.rows
        }
        return cls(table, found, {row: timed.results(Cell(row, table.seeds[0])) for row in table.rows})

    def pooled(self) -> PooledSpread | None:
        """Over all rows but those that the table sets apart; None if no row has two runs, or all runs are equal."""
        rows = [row for row in self.table.rows if row not in self.table.not_pooled]
        top1 = {row: list(self.values(row, self.table.accuracy).values()) for row in rows}
        squares = {row: variance(values) * (len(values) - 1) for row, values in top1.items() if len(values) > 1}
        whole, freedom = sum(squares.values()), sum(len(top1[row]) - 1 for row in squares)
        if not whole:
            return None
        widest = max(squares, key=squares.__getitem__)
        return PooledSpread(math.sqrt(whole / freedom), freedom, len(squares), widest, squares[widest] / whole)

    def values(self, row: str, name: str) -> dict[int, float]:
        """One number of the summaries by seed, of those that have it."""
        return {seed: run.facts[name] for seed, run in self.runs[row].items() if name in run.facts}

    def differences(self, row: str, other: str) -> dict[int, float]:
        """Top-1 of `row` minus that of `other`, in points, for every seed that both have."""
        ours, theirs = (self.values(name, self.table.accuracy) for name in (row, other))
        return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}

    def half_interval(self, row: str) -> float | None:
        """Half of the 95 % interval of a row's mean: by the pooled spread, or by its own if the table sets it apart."""
        values, pooled = list(self.values(row, self.table.accuracy).values()), self.pooled()
        if row in self.table.not_pooled:
            return (interval(values)[1] - interval(values)[0]) / 2 if len(values) > 1 else None
        return pooled.half_width(len(values)) if pooled and values else None

    def timed_pair(self, row: str) -> tuple[Run, Run] | None:
        """The newest run of a row and of its dense row that ran alone on one machine."""
        pairs = itertools.product(self.timed[row], self.timed[self.table.dense[row]])
        return next(((ours, dense) for ours, dense in pairs if ours.machine == dense.machine), None)

    def processor_ratio(self, row: str) -> float | None:
        """Processor seconds of a row to those of the row that the table compares them with, over common seeds."""
        other = self.table.seconds_of.get(row)
        if other is None:
            return None
        ours, theirs = (self.values(name, "train_cpu_seconds") for name in (row, other))
        both = [seed for seed in ours if seed in theirs]
        both = [seed for seed in both if self.runs[row][seed].machine == self.runs[other][seed].machine]
        return sum(ours[seed] for seed in both) / sum(theirs[seed] for seed in both) if both else None

    def dense_epochs(self, row: str) -> float | None:
        """Epochs of the dense row: of its runs, or, before there are any, by its options; None if a rule decides."""
        dense = self.table.rows[self.table.dense[row]]
        if epochs := self.values(dense.name, "epochs"):
            return fmean(epochs.values())
        config = config_from_dict(dense.options, dense.where)
        return None if AUTO in (config.train.epochs, config.finetune.finetune_epochs) else config.total_epochs

    def train_flops_to_dense(self, row: str, name: str = "train_flops_ratio") -> float | None:
        """The mean over the seeds, against dense training for as many epochs as the dense row has.

        Args:
            name: of the FLOPs in the summary; "train_flops_executed" counts padding too.
        """
        epochs, own_epochs, ratios = self.dense_epochs(row), self.values(row, "epochs"), self.values(row, name)
        if epochs is None or not ratios:
            return None
        # The ratio in a summary is to dense training for as many epochs as that run had.
        return fmean(ratio * own_epochs[seed] / epochs for seed, ratio in ratios.items())
