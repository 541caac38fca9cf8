"""What the host did with the emulated device: where it waited, what it copied, and which copies are under way."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Copy:
    """A copy between the host and the device.

    Attributes:
        to_device: its direction.
        pinned: whether the memory of the host is page-locked.
        blocking: whether the host waits until it is done.
        place: the function that asks for it, see `place`.
    """

    to_device: bool
    pinned: bool
    blocking: bool
    num_bytes: int
    place: str


@dataclass
class Log:
    """What the host did with the device since `clear`.

    Attributes:
        waits: how often each function made the host wait for the device, see `place`.
        copies: in their order.
        num_queued: how many copies the host has ever asked for without waiting for them.
        pending: what completes those that are still under way, the oldest first.
    """

    waits: Counter[str] = field(default_factory=Counter)
    copies: list[Copy] = field(default_factory=list)
    num_queued: int = 0
    pending: list[Callable[[], None]] = field(default_factory=list)

    def clear(self) -> None:
        """Forgets waits and copies. What is under way stays so."""
        self.waits.clear()
        self.copies.clear()

    def queue(self, complete: Callable[[], None]) -> None:
        self.pending.append(complete)
        self.num_queued += 1

    def num_pending(self, queued: int) -> int:
        """How many of the first `queued` copies are still under way."""
        return max(0, len(self.pending) - (self.num_queued - queued))

    def wait(self, queued: int | None = None) -> None:
        """The host waits until the first `queued` copies are complete; by default for everything."""
        self.waits[place()] += 1
        count = self.num_pending(self.num_queued if queued is None else queued)
        arrived, self.pending = self.pending[:count], self.pending[count:]
        for complete in arrived:
            complete()


def place() -> str:
    """The innermost function of the project that runs, as "trainers/state.py plans"; "elsewhere" if there is none."""
    frame = sys._getframe(1)
    while frame is not None and _path_in_project(frame.f_code.co_filename) is None:
        frame = frame.f_back
    return "elsewhere" if frame is None else f"{_path_in_project(frame.f_code.co_filename)} {frame.f_code.co_name}"


@cache
def _path_in_project(file: str) -> str | None:
    """None for a file of others, or of the emulation itself."""
    path = Path(file)
    emulates = path.parent == Path(__file__).parent and not path.name.startswith("test_")
    return path.relative_to(PROJECT).as_posix() if path.is_relative_to(PROJECT) and not emulates else None
