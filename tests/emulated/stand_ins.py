"""What stands in for classes of torch that belong to a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.emulated.log import Log


@dataclass
class Event:
    """A point in the work of the device: behind the copies that the host had asked for when it was recorded."""

    log: Log
    queued: int = 0

    def record(self, stream: Stream | None = None) -> None:
        self.queued = self.log.num_queued

    def query(self) -> bool:
        return self.log.num_pending(self.queued) == 0

    def synchronize(self) -> None:
        self.log.wait(self.queued)


@dataclass
class Stream:
    """The only one."""

    log: Log

    def record_event(self, event: Event | None = None) -> Event:
        event = Event(self.log) if event is None else event
        event.record()
        return event

    def synchronize(self) -> None:
        self.log.wait()


class Generator(torch._C.Generator):
    """Draws what a generator of the CPU draws, but only for the device that it is made for."""

    def __new__(cls, device: str | torch.device = "cpu") -> Generator:
        new = super().__new__(cls, "cpu")
        new.made_for = torch.device(device)
        return new

    def __init__(self, device: str | torch.device = "cpu") -> None:
        """All is done; that of torch would ask for the device."""

    device = property(lambda self: self.made_for)
