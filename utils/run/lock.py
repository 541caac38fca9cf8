"""The lock of a run folder, so that only one process at a time writes into it."""

from __future__ import annotations

import fcntl
import io
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import UserError

BEAT = 30.0  # seconds between two signs of life
SILENCE = 600.0  # seconds without one, after which the process of another host counts as ended


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Hold a run folder for this process, so that no second process writes into it.

    The kernel holds the lock and drops it when the process ends, however it ends: a lock file left by a dead
    process is simply taken over, and a process id used again by a stranger cannot block a run. The file says
    who holds it. It stays, empty, when the lock is given back: deleting it would let two waiting processes
    lock two different files of one name.

    Not every file system shares such locks between hosts. So the holder also touches the file every 30 seconds, and a
    process of another host is obeyed until it has been silent for ten minutes.

    Raises: UserError with the process id if another process holds the folder.
    """
    path = Path(folder) / "run.lock"
    host = socket.gethostname()
    try:
        file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115, closed below
    except OSError as error:
        raise UserError(
            f"cannot write into the run folder {folder}: {error.strerror}; make it writable, or train into another one "
            "with --log-dir"
        ) from error
    with file:
        try:
            # lockf, not flock: forked data loader workers, which may outlive a killed run, must not share it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = _holder(file) or "another process"
            raise UserError(f"{folder} is in use by {holder}; wait for it or stop it first") from None
        except OSError as error:
            raise UserError(
                f"cannot lock {path}: {error.strerror}; choose a place on another file system with --log-dir"
            ) from error
        holder = _holder(file)
        if holder and " on " in holder and not holder.endswith(f" on {host}"):
            silent = _seconds_silent(file, Path(folder))
            if silent < SILENCE:
                raise UserError(
                    f"{folder} is in use by {holder}, whose last sign of life is {silent:.0f} seconds old; if it has "
                    f"ended, delete {path} and start again, or start again when it has been silent for "
                    f"{SILENCE / 60:.0f} minutes"
                )
        with suppress(OSError):  # a full disk does not say who holds the folder, but it is held
            _write_holder(file, f"process {os.getpid()} on {host}")
        try:
            with _heartbeat(path):
                yield
        finally:
            with suppress(OSError):
                _write_holder(file, "")


def _holder(file: io.TextIOBase) -> str:
    file.seek(0)
    return "".join(c for c in file.read(200).strip() if c.isprintable())


def _write_holder(file: io.TextIOBase, holder: str) -> None:
    file.truncate(0)
    file.write(holder)
    file.flush()


def _seconds_silent(file: io.TextIOBase, folder: Path) -> float:
    """Since the lock file was last touched, by the clock of the file system: that of this host may be another."""
    touched = os.fstat(file.fileno()).st_mtime
    with tempfile.TemporaryFile(dir=folder) as now:
        return os.fstat(now.fileno()).st_mtime - touched


@contextmanager
def _heartbeat(path: Path) -> Iterator[None]:
    """Touches a file now and then, from a thread of its own."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
