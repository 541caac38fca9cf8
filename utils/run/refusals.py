"""What the operating system has refused to write: told once, remembered until it succeeds, and no reason to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from utils.run.progress import announce


class Refusals:
    """What could not be written so far. A run that ends with any of it does not look like a whole one.

    Attributes:
        reasons: of what is not on the disk as it should be, by name.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    @contextmanager
    def tolerated(self, what: str) -> Iterator[None]:
        """Around the writing of one thing. A full disk, for example, is told the first time, and work goes on.

        Once the same thing has been written, the refusal counts no longer.
        """
        try:
            yield
        except OSError as error:
            if what not in self.reasons:
                announce(f"warning: {what} could not be written ({error}); training goes on without it")
            self.reasons[what] = str(error)
        else:
            self.reasons.pop(what, None)
