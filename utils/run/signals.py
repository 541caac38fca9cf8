"""Stopping at the next convenient moment instead of in the middle of a step."""

import signal
from types import FrameType


class StopRequest:
    """Context in which Ctrl-C (SIGINT), SIGTERM and SIGHUP ask the program to stop instead of killing it.

    SIGHUP comes when a terminal or a connection is closed. nohup has it ignored, and so it stays.

        with StopRequest() as stop:
            for batch in batches:
                train_step(batch)
                if stop.signal is not None:
                    save and sys.exit(stop.exit_code)

    A second signal of any of these kinds ends the process at once. Only the main thread may enter the context.

    Args:
        second_ends: off for a process that torchrun started: it gets the same signal from the cluster and from
            torchrun, which ends those that take too long.
    Attributes:
        signal: number of the signal that came, None as long as none did.
    """

    def __init__(self, second_ends: bool = True) -> None:
        self.signal: int | None = None
        self._second_ends = second_ends
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for handled in self._previous if self._second_ends else ():
            signal.signal(handled, signal.SIG_DFL)

    @property
    def exit_code(self) -> int:
        """Exit status by which shells and schedulers know the signal: 130, 143 or 129; 0 if none came."""
        return 0 if self.signal is None else 128 + self.signal
