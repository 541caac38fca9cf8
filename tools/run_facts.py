"""What is known of one run from the files in its folder, which `tools/run_files.py` reads.

Legend: E epochs of which scores are kept, U maskable units of the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from args import config_from_dict
from tools.table_record import HARDWARE
from tools.tables import SAME_NETWORK

Z_95 = 1.959964  # two-sided 95 % quantile of the normal distribution
SAME_TRAINING = (*SAME_NETWORK, "train_images", "holdout")  # what decides the cost of an epoch of dense training
COUNTED = {"channels": "channels", "params": "parameters", "flops": "FLOPs"}  # how a budget is called in a sentence


class Layer(NamedTuple):
    """A layer whose channels are chosen: its name, its full width, and how many channels the subnet keeps."""

    name: str
    width: int
    kept: int


class Stretch(NamedTuple):
    """Finished epochs of one phase, from the end of epoch `first` to the end of epoch `last`."""

    phase: str
    first: int
    last: int


@dataclass(frozen=True)
class Scores:
    """The content of scores.npz.

    Attributes:
        epochs: (E,) how many epochs were finished; 0 is before the first step.
        scores: (E, U) float32.
        layers: the units of each layer, by its name; tied layers have the same ones.
        chosen: (U,) bool, the chosen subnet; None as long as there is none.
    """

    epochs: np.ndarray
    scores: np.ndarray
    layers: Mapping[str, slice]
    chosen: np.ndarray | None

    @property
    def moments(self) -> dict[str, int]:
        """The rows of `scores` at the start, halfway and at the end of the search; each row once."""
        halfway = int(np.abs(self.epochs - (self.epochs[0] + self.epochs[-1]) / 2).argmin())
        rows = {"start": 0, "middle": halfway, "end": len(self.epochs) - 1}
        return {name: row for name, row in rows.items() if row not in [*rows.values()][: [*rows].index(name)]}

    def shares(self) -> np.ndarray:
        """(layers, E): the fraction of each layer that a subnet drawn at that time keeps on average."""
        return np.stack([self.scores[:, units].mean(axis=1) for units in self.layers.values()])

    def chosen_shares(self) -> np.ndarray | None:
        """(layers,): the fraction of each layer that the chosen subnet keeps."""
        if self.chosen is None:
            return None
        return np.array([self.chosen[units].mean() for units in self.layers.values()])


@dataclass(frozen=True)
class RunFacts:
    """One run. What its folder does not hold is None, and `missing` says so.

    Attributes:
        name: what the report calls it.
        options: every option by its key.
        history: the rows of results.csv; numbers are floats, and an empty cell is None.
        summary: the result; empty as long as the run is not finished.
        environment: versions and machine.
        layers: of the chosen subnet, in the order of the network.
        missing: sentences about what the folder lacks.
    """

    folder: Path
    name: str
    options: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    layers: Sequence[Layer] | None
    scores: Scores | None
    missing: Sequence[str]

    # ---- how far it is ----

    @property
    def finished(self) -> bool:
        """Whether the summary is that of all epochs; a run that goes on has more epochs than its summary."""
        return bool(self.summary) and self.summary.get("epochs") == self.epochs

    @property
    def epochs(self) -> int:
        """Finished epochs."""
        return int(self.history[-1]["epoch"]) if self.history else 0

    @property
    def planned_epochs(self) -> int:
        return config_from_dict(self.options, str(self.folder)).total_epochs

    @property
    def is_dense(self) -> bool:
        """Whether the whole network was trained. `--method dense` trains a part of it if it starts from a subnet."""
        return self.options["method"] == "dense" and self.flops_ratio in (None, 1.0)

    @property
    def stretches(self) -> list[Stretch]:
        """The phases in their order."""
        found: list[Stretch] = []
        for row in self.history:
            if found and found[-1].phase == row["phase"]:
                found[-1] = found[-1]._replace(last=int(row["epoch"]))
            else:
                found.append(Stretch(row["phase"], int(row["epoch"]) - 1, int(row["epoch"])))
        return found

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Epochs and values of a column of results.csv, where it has any."""
        rows = [row for row in self.history if row.get(name) is not None]
        return [int(row["epoch"]) for row in rows], [row[name] for row in rows]

    # ---- the result: of a run that is not finished the last one that was tested ----

    @cached_property
    def _tested(self) -> Mapping[str, Any]:
        return next((row for row in reversed(self.history) if row.get("test_top1") is not None), {})

    @property
    def result_epoch(self) -> int | None:
        """The epoch that the result is from."""
        epoch = self.summary.get("best_epoch") if self.finished else self._tested.get("epoch")
        return None if epoch is None else int(epoch)

    @property
    def result_phase(self) -> str | None:
        return next((row["phase"] for row in self.history if row["epoch"] == self.result_epoch), None)

    @property
    def accuracy(self) -> float | None:
        """Top-1 on test images, in per cent."""
        return self.summary.get("test_top1") if self.finished else self._tested.get("test_top1")

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the accuracy, in per cent; None where the number of test images is not known."""
        count = self.summary.get("test_images")
        if self.accuracy is None or not count:
            return None
        low, high = binomial_interval(self.accuracy / 100, count)
        return 100 * low, 100 * high

    @property
    def flops_ratio(self) -> float | None:
        """Inference FLOPs, as a fraction of those of the dense network."""
        return self.summary.get("flops_ratio") if self.finished else self._tested.get("subnet_flops_ratio")

    @property
    def train_flops_ratio(self) -> float | None:
        """Training FLOPs, as a fraction of those of dense training for as many epochs."""
        if self.finished:
            return self.summary.get("train_flops_ratio")
        return self.history[-1].get("train_flops_ratio") if self.history else None

    @property
    def dense_epochs(self) -> float | None:
        """Training FLOPs, as the number of epochs of dense training that cost as much."""
        return None if self.train_flops_ratio is None else self.train_flops_ratio * self.epochs

    @property
    def kept(self) -> float | None:
        """The kept fraction of the channels."""
        return 1.0 if self.is_dense else self.summary.get("units_kept") if self.finished else None

    @property
    def seconds(self) -> float | None:
        """Training steps, evaluation and choosing; of a run that is not finished what results.csv knows of them."""
        return self.summary.get("seconds") if self.finished else sum(self.parts.values()) or None

    @property
    def train_seconds(self) -> float:
        """Training steps, with waiting for images."""
        return self.summary["train_seconds"] if self.finished else sum(self.column("epoch_seconds")[1])

    @property
    def parts(self) -> dict[str, float]:
        """Where the seconds went, by name; coarser where results.csv does not tell more."""
        training = self.train_seconds
        other = self.summary["seconds"] - training if self.finished else 0.0
        waiting, evaluation = (self.column(name)[1] for name in ("data_seconds", "evaluation_seconds"))
        if len(waiting) == len(self.history) > 0:
            told = {"waiting for images": sum(waiting), "training steps": training - sum(waiting)}
        else:
            told = {"training steps and waiting for images": training}
        if len(evaluation) < len(self.history) or not self.history:
            return told | ({"evaluation and choosing": other} if self.finished else {})
        if not self.finished:
            return told | {"evaluation": sum(evaluation)}
        if all(stretch.phase != "search" for stretch in self.stretches):  # there is nothing to choose
            return told | {"evaluation": other}
        return told | {"evaluation": sum(evaluation), "choosing the subnet": max(0.0, other - sum(evaluation))}

    # ---- against other runs ----

    @property
    def machine(self) -> tuple[Any, ...]:
        """Equal for runs whose seconds can be compared."""
        return tuple(self.environment.get(name) for name in HARDWARE)

    @property
    def task(self) -> tuple[Any, ...]:
        """Equal for runs whose FLOPs can be compared, because they are of the same network and images."""
        return tuple(self.options[key] for key in SAME_TRAINING)

    def costs(self, dense: RunFacts | None) -> dict[str, float]:
        """What the run costs, by name, as fractions of the cost of the dense network.

        Args:
            dense: a dense run whose seconds can be compared, see `dense_twin`; None: there is none.
        """
        found = {"inference FLOPs": self.flops_ratio, "parameters": self.summary.get("params_kept")}
        found["training FLOPs"] = self.train_flops_ratio
        if dense is not None:
            found["time of training steps"] = self.train_seconds / dense.train_seconds
            found["time of the whole run"] = self.seconds / dense.seconds
        return {name: ratio for name, ratio in found.items() if ratio is not None}


def binomial_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a probability of which `share` was seen in `count` independent trials.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927.
    """
    centre, square = share + Z_95**2 / (2 * count), Z_95**2 / count
    half = Z_95 * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))
