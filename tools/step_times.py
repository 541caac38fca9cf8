"""Where the time of a training step goes: first pass, second pass, structure step, backward, weight update.

The networks and the batch are those of `tools.bench`, with the scores of a run. Training runs its own functions; this
file only notes when those of `trainers.default` that separate the parts of a step begin and end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import trainers.default
from tools.bench_measures import WARM_UP_STEPS, interleaved_times
from tools.bench_networks import NETWORKS, Bench
from tools.bench_options import read_command_line
from tools.command_line import aligned, headline
from tools.run_facts import RunFacts
from trainers.devices import find_device
from utils.run import checkpoint

PARTS = ("first pass", "second pass", "structure step", "backward", "weight update")
REPEATS = 15  # steps of each network that are timed
METHODS = ("vrpge", "coin")  # whose step is `train_step`
# Function of trainers.default -> the parts that begin when it is called and when it returns.
BOUNDARIES = {"losses_under": ("second pass", "structure step"), "backward_": ("backward", "weight update")}
NOTE = """\
Medians (quartiles) in ms of {repeats} steps on one random batch of {batch} images after {warm_up} that do not count.
The three networks take one step each in turn. Compact is the step of the search with the scores of the run; thin is an
ordinary network with the FLOPs of a typical draw, with as many forward passes. {machine}."""


@dataclass(frozen=True)
class StepTimes:
    """The measured parts of a step.

    Attributes:
        milliseconds: by network and part, one value for each timed step. "whole step" is their sum in each step.
    """

    milliseconds: Mapping[str, Mapping[str, Sequence[float]]]
    batch_size: int
    machine: str

    def quartiles(self, network: str, part: str) -> tuple[float, float, float]:
        """The lower quartile, the median and the upper quartile in ms."""
        low, median, high = np.percentile(self.milliseconds[network][part], (25, 50, 75)).tolist()
        return low, median, high

    @property
    def note(self) -> str:
        repeats = len(self.milliseconds[NETWORKS[0]]["whole step"])
        return NOTE.format(repeats=repeats, batch=self.batch_size, warm_up=WARM_UP_STEPS, machine=self.machine)

    def rows(self) -> list[dict[str, str]]:
        """One row for each network: the median and the quartiles of every part."""
        return [
            {"network": name} | {part: _told(self.quartiles(name, part)) for part in (*PARTS, "whole step")}
            for name in NETWORKS
        ]

    def text(self) -> str:
        return f"{aligned(self.rows())}\n\n{self.note}"


def _told(quartiles: tuple[float, float, float]) -> str:
    low, median, high = quartiles
    return f"{median:.1f} ({low:.1f}-{high:.1f})"


class PartClock:
    """Notes how long each part of a step takes, over all training steps inside `step`.

    Attributes:
        seconds: of the step under way, by part.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.now = device, now
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._part: str | None = None
        self._since = 0.0

    def enter(self, part: str | None) -> None:
        """Ends the part under way and begins another one; None: time that belongs to no part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = self.now()
        if self._part is not None:
            self.seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def around(self, function: Callable, before: str | None, after: str | None) -> Callable:
        """The function, with a part that begins when it is called and one that begins when it returns."""

        @wraps(function)
        def watched(*arguments: Any, **by_name: Any) -> Any:
            self.enter(before)
            try:
                return function(*arguments, **by_name)
            finally:
                self.enter(after)

        return watched

    @contextmanager
    def watching(self, bench: Bench) -> Iterator[None]:
        """Inside, training steps of the bench tell the clock their parts."""
        default = trainers.default
        watched = {name: self.around(getattr(default, name), *parts) for name, parts in BOUNDARIES.items()}
        step = self.around(bench.training_step, "first pass", None)
        with patch.multiple(default, **watched), patch.object(bench, "training_step", step):
            yield


def measure(run: RunFacts, repeats: int = REPEATS) -> StepTimes | str:
    """Times the step of a run's search against a dense and a thin one, on this machine.

    Returns: the times, or why there are none.
    Raises: UserError for a checkpoint that cannot be read.
    """
    file = run.folder / "checkpoints" / "best.pt"
    if run.options["method"] not in METHODS:
        return f"the step of method {run.options['method']} does not have these parts"
    if not file.is_file():
        return "checkpoints/best.pt is missing"
    images = checkpoint.load(file).get("images")
    if images is None:
        return "checkpoints/best.pt is from a version that did not store the shape of the images"
    return measure_bench(make_bench(file, images), repeats)


def make_bench(file: Path, images: Mapping[str, Any]) -> Bench:
    """The bench with the configuration and the scores of a best.pt, for images as it describes them."""
    settings, config = read_command_line(["--scores", str(file)])
    shapes = SimpleNamespace(
        image_size=images["image_size"], num_classes=len(images["class_names"]), channels=images["channels"]
    )
    return Bench(config, shapes, settings.scores, find_device(config))


def measure_bench(bench: Bench, repeats: int) -> StepTimes:
    """The parts of a step of each network, of steps in turn."""
    clock, taken = PartClock(bench.device), {name: [] for name in NETWORKS}

    def timed(name: str, step: Callable[[], None]) -> Callable[[], None]:
        def run_step() -> None:
            clock.seconds = dict.fromkeys(PARTS, 0.0)
            clock.enter("second pass" if name == "thin" else None)  # it runs its extra passes before the training step
            step()
            clock.enter(None)
            taken[name].append(clock.seconds)

        return run_step

    with clock.watching(bench):
        steps = {name: timed(name, bench.build(name).step) for name in NETWORKS}
        interleaved_times(steps, repeats, bench.device, WARM_UP_STEPS)
    milliseconds = {}
    for name, steps_taken in taken.items():
        counted = steps_taken[-repeats:]  # without the warm-up
        parts = {part: [1000 * seconds[part] / bench.period for seconds in counted] for part in PARTS}
        milliseconds[name] = parts | {"whole step": [sum(values) for values in zip(*parts.values(), strict=True)]}
    return StepTimes(milliseconds, len(bench.labels), headline(bench.device))
