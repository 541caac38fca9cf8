"""The operations of a training step: `python -m tools.bench --count-ops`.

On a GPU every operation starts a kernel or a few, and a step of a small network takes as long as it takes to start
them. The number does not depend on the batch, so it can be counted on a CPU with two images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tools.bench_networks import Bench
from tools.command_line import aligned
from tools.step_times import PartClock

STEPS = 5  # that are counted, after one that makes what is made once, such as momenta
BATCH_SIZE = 2
RESERVES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
PARTS = {  # of `tools.step_times`
    "forward": ("first pass", "second pass"),
    "backward": ("backward",),
    "rest": ("structure step", "weight update"),
}
COUNTED = ("dense", "compact, shapes drawn", "compact, shapes fixed", "thin")  # thin runs the passes of compact
NOTE = """\
Operations of a training step, which are the operators of aten that torch dispatches: medians of {steps} steps with new
masks. "views" start no kernel: either they write nothing and return parts of what they were given, or they only reserve
memory. "operations" are all others, and "of thin" is their ratio to those of thin. "forward" are those of all forward
passes, "backward" those of the backward pass, and "rest" those of the structure step, of clipping and of the optimizer.
Batches have {batch} images here, because the number of images changes nothing. Each operation starts one kernel
or a few."""


class OperationCounter(TorchDispatchMode):
    """Counts the operations that run inside, those of a backward pass and of the optimizer included.

    Attributes:
        started: operations that would start a kernel on a GPU, by name.
        views: the others, by name.
        counts: whether it does; it may rest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = True
        self.started: Counter[str] = Counter()
        self.views: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operation: OpOverload, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        if not self.counts or operation.namespace != "aten":  # the profiler has marks of its own
            return result
        name = operation._schema.name.removeprefix("aten::")
        kind = self.views if name in RESERVES or is_view(operation, (args, kwargs), result) else self.started
        kind[name] += 1
        return result


def is_view(operation: OpOverload, given: Any, result: Any) -> bool:
    """Whether an operation writes nothing, and all that it returns shares memory with what it was given."""
    if any(a.alias_info is not None and a.alias_info.is_write for a in operation._schema.arguments):
        return False
    returned = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    memory = {_memory(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
    return bool(returned) and all(_memory(tensor) in memory for tensor in returned)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class PartCounter(PartClock):
    """Notes how many operations each part of a step starts. What belongs to no part is the bench's own, and no step's.

    Attributes:
        counter: of the operations; it rests between the parts.
        seconds: by part, the operations of the step under way.
    """

    def __init__(self, device: torch.device) -> None:
        self.counter = OperationCounter()
        super().__init__(device, now=self.counter.started.total)

    def enter(self, part: str | None) -> None:
        super().enter(part)
        self.counter.counts = part is not None


@dataclass
class StepCount:
    """The operations of a training step: medians over the steps that were counted.

    Attributes:
        operations, views: how many.
        parts: `operations` by part of the step, see `PARTS`.
        names: how many of each kind there are in `operations`, the most frequent first.
    """

    operations: float
    views: float
    parts: dict[str, float]
    names: dict[str, float]


def count_steps(bench: Bench, name: str) -> StepCount:
    """Counts the operations of a training step of one network of the bench, per step of a period."""
    clock = PartCounter(bench.device)
    counter = clock.counter
    seen: list[tuple[Counter[str], Counter[str], dict[str, float]]] = []
    with clock.watching(bench):
        step = bench.build(name).step
        for number in range(1 + STEPS):
            counter.started.clear()
            counter.views.clear()
            clock.seconds = dict.fromkeys(clock.seconds, 0)
            clock.enter("second pass" if name == "thin" else None)  # its extra passes come before the training step
            with counter:
                step()
            clock.enter(None)
            if number:
                seen.append((counter.started.copy(), counter.views.copy(), clock.seconds))

    def median(values: Sequence[float]) -> float:
        return float(np.median(values)) / bench.period

    names = {key: median([started[key] for started, _, _ in seen]) for started, _, _ in seen for key in started}
    return StepCount(
        median([started.total() for started, _, _ in seen]),
        median([views.total() for _, views, _ in seen]),
        {part: median([sum(by_part[own] for own in owns) for _, _, by_part in seen]) for part, owns in PARTS.items()},
        dict(sorted(names.items(), key=lambda item: -item[1])),
    )


def count_networks(bench: Bench) -> dict[str, StepCount]:
    """The operations of a step of each network in `COUNTED`."""
    return {name: count_steps(bench, name) for name in COUNTED}


def note() -> str:
    """What the numbers of the table mean."""
    return NOTE.format(steps=STEPS, batch=BATCH_SIZE)


def table(counts: Mapping[str, Mapping[str, StepCount]]) -> str:
    """Counts by architecture and network as a Markdown table."""
    rows = []
    for arch, by_name in counts.items():
        for name in ("dense", "thin", *(name for name in by_name if name.startswith("compact"))):
            count = by_name[name]
            rows.append(
                {
                    "network": arch,
                    "step": name,
                    "operations": f"{count.operations:.0f}",
                    "of thin": f"{count.operations / by_name['thin'].operations:.2f}",
                    "views": f"{count.views:.0f}",
                    **{part: f"{number:.0f}" for part, number in count.parts.items()},
                }
            )
    return aligned(rows)
