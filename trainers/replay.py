"""A step that is recorded once and replayed: when it is recorded, when anew, and what happens if that fails.

A recorder, such as `trainers/cuda_graphs.py`, notes what some work asks of the device, and gives back what does it
again on the same memory. This file knows no device; it keeps the memory from which a recorded step reads its inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.run.progress import announce

WARM_UP = 3  # ordinary steps before one is recorded: torch and its libraries then have all that they make once


class Halves(Protocol):
    """A step in two halves. What the host does between them is recorded by nobody.

    Attributes:
        group: steps of another group are never replayed again once one of this group has come.
        kind: steps of one group and kind ask the same of the device, whatever their inputs hold.
        inputs: what the first half reads.
        learning_rate: what the second half reads; of a step that is recorded, a tensor.
    """

    group: object
    kind: Hashable
    inputs: Sequence[Tensor]
    learning_rate: float | Tensor

    def reading(self, inputs: Sequence[Tensor], learning_rate: Tensor) -> Halves:
        """The same step with other inputs."""

    def first(self) -> Any: ...

    def second(self) -> Any: ...


class Recorder(Protocol):
    """What can do recorded work again."""

    def warm_up(self, work: Callable[[], Any]) -> Any:
        """Runs work as it will be recorded, and returns its result."""

    def record(self, *works: Callable[[], None]) -> list[Callable[[], None]]:
        """Notes what each work asks of the device, which is not done yet; returns what does it, to be called in order.

        Raises: RuntimeError for work that cannot be recorded. Nothing has been done then.
        """


class Replay:
    """Decides how each step runs: as it is, recorded now, or replayed.

    Attributes:
        failed: whether a step could not be recorded. None is replayed from then on.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.failed = recorder, False
        self._group: object = None
        self._forget()

    def of(self, halves: Halves) -> Halves | _Recorded | _WarmUp:
        """What to call `first` and `second` of."""
        if self.failed:
            return halves
        if halves.group is not self._group:
            self._group = halves.group
            self._forget()
        if halves.kind not in self._recorded:
            self._seen[halves.kind] += 1
            if self._seen[halves.kind] <= WARM_UP:
                return _WarmUp(halves, self.recorder)
            try:
                self._recorded[halves.kind] = _Recorded(halves, self.recorder)
            except RuntimeError as error:
                self.failed = True
                self._forget()
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                announce(f"warning: the steps cannot be replayed ({reason}); training goes on without CUDA graphs")
                return halves
        recorded = self._recorded[halves.kind]
        recorded.load(halves)
        return recorded

    def _forget(self) -> None:
        self._recorded: dict[Hashable, _Recorded] = {}
        self._seen: Counter[Hashable] = Counter()


class _WarmUp:
    """A step that runs as it will be recorded."""

    def __init__(self, halves: Halves, recorder: Recorder) -> None:
        self._halves, self._recorder = halves, recorder

    def first(self) -> Any:
        return self._recorder.warm_up(self._halves.first)

    def second(self) -> Any:
        return self._recorder.warm_up(self._halves.second)


class _Recorded:
    """A recorded step with the memory of its inputs and results, which the next replay overwrites."""

    def __init__(self, halves: Halves, recorder: Recorder) -> None:
        self._inputs = [one.clone() for one in halves.inputs]
        self._learning_rate = torch.full((), 0.0, dtype=torch.float32, device=self._inputs[0].device)
        self._halves = halves.reading(self._inputs, self._learning_rate)
        self._results: list[Any] = []
        # Both are recorded before either is replayed: a failure leaves a step that has not begun.
        self._replays = recorder.record(
            lambda: self._results.append(self._halves.first()), lambda: self._results.append(self._halves.second())
        )

    def load(self, halves: Halves) -> None:
        """Puts the inputs of a step into the memory that it reads."""
        for own, given in zip(self._inputs, halves.inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._learning_rate.fill_(halves.learning_rate)

    def first(self) -> Any:
        self._replays[0]()
        return self._results[0]

    def second(self) -> Any:
        self._replays[1]()
        return self._results[1]
