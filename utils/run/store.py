"""The checkpoints of one run. Whatever is killed or refused between two of them, they belong together.

    last.pt      all that a run knows between two steps, and its best result so far; the one file that counts
    previous.pt  the last.pt before this one, for the case that last.pt is damaged
    best.pt      a copy of the result in last.pt, for everybody who wants the network and not the run
    epoch_N.pt   as last.pt, with --save-every

A save is done when last.pt has been replaced. best.pt follows. If the program is killed before that, or the disk is
full, best.pt holds an older result, and is written anew by the next save or when the run goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.run import checkpoint
from utils.run.checkpoint import BEST, LAST, PREVIOUS
from utils.run.progress import announce
from utils.run.refusals import Refusals


class Store:
    """Writes the checkpoints of a run; refusals are remembered.

    Args:
        folder: of the run.
        last_is_whole: whether last.pt may become previous.pt, so whether the run goes on from it.
    """

    def __init__(self, folder: Path, refusals: Refusals, last_is_whole: bool = False) -> None:
        self.folder, self.refusals = folder / "checkpoints", refusals
        self._last_is_whole = last_is_whole
        self._kept: Mapping[str, Any] | None = None  # what best.pt holds, as far as this process knows

    def save(self, state: Mapping[str, Any], numbered: str | None = None) -> bool:
        """Writes last.pt, and best.pt if the result is another one than before.

        Args:
            state: of the run. Its "best" is the content of best.pt, or None.
            numbered: name of a further file with the same state.
        Returns: whether last.pt was written.
        """
        previous = self.folder / PREVIOUS if self._last_is_whole else None
        written = self._write(LAST, state, previous)
        if written:
            self._last_is_whole = True
            self.copy_result(state["best"])
        if numbered:
            self._write(numbered, state)
        return written

    def warn_if_short(self, state_bytes: int) -> None:
        """Says so if the disk has no room for three checkpoints: the last one, the one before, and one being written.

        Args:
            state_bytes: about the size of one.
        """
        with suppress(OSError):
            free, needed = shutil.disk_usage(self.folder).free, 3 * state_bytes
            if free < needed:
                announce(
                    f"warning: {free:,} bytes are free where {self.folder} is, and three checkpoints take about "
                    f"{needed:,}, so saving may fail; make room, or train into another place with --log-dir"
                )

    def copy_result(self, result: Mapping[str, Any] | None) -> None:
        """Makes best.pt the result of last.pt, unless it is already."""
        if result is None or result is self._kept:
            return
        is_first = self._kept is None  # of this process, which may find what another one has written
        if (is_first and holds(self.folder / BEST, result)) or self._write(BEST, result):
            self._kept = result

    def _write(self, name: str, state: Mapping[str, Any], previous: Path | None = None) -> bool:
        with self.refusals.tolerated(name):
            checkpoint.save(self.folder / name, state, previous)
        return name not in self.refusals.reasons


def holds(path: Path, content: Mapping[str, Any]) -> bool:
    """Whether a file is a whole checkpoint with just this content."""
    try:
        found = checkpoint.load(path)
    except UserError:
        return False
    found.pop("format_version")
    return not checkpoint.differences(found, {key: value for key, value in content.items() if key != "format_version"})
