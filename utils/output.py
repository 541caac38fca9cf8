"""Standard output and error that may break, such as a pipe that nobody reads any more, without ending the program."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


class Breakable:
    """Writes to a stream as long as that is possible. What cannot be written is lost.

    Attributes:
        error: the first refusal, None as long as there was none.
    """

    def __init__(self, stream: TextIO, complain_to: TextIO | None = None) -> None:
        self.error: OSError | None = None
        self._stream, self._complain_to = stream, complain_to

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, do: Any, *words: str) -> None:
        try:
            do(*words)
        except OSError as error:
            is_new, self.error = self.error is None, error
            if is_new and self._complain_to is not None:
                reason = error.strerror or error
                self._complain_to.write(f"warning: the standard output cannot be written ({reason}); going on\n")


@contextmanager
def breakable_output() -> Iterator[Breakable]:
    """Makes standard output and error breakable inside; yields the former."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        err = Breakable(sys.stderr or nowhere)  # a stream that was closed when Python started is None
        out = Breakable(sys.stdout or nowhere, complain_to=err)
        try:
            with redirect_stdout(out), redirect_stderr(err):
                yield out
        finally:
            for stream in (out, err):
                stream.flush()
                if stream.error is not None:  # else Python fails to flush the rest, with an exit code of its own
                    with suppress(OSError, ValueError):
                        os.dup2(nowhere.fileno(), stream.fileno())
