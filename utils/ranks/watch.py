"""Watches over the ranks of a run, so that one that no longer answers does not hold the others.

A rank that dies closes its connections, which the others notice at once. One that is stopped, or whose machine is gone,
closes nothing: the others would wait in an exchange until its patience is over. So every rank counts in the store of
torchrun, from a thread of its own, and reads what the others count.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from utils.ranks.launch import STOP_SECONDS

BEAT = 5.0  # seconds between two signs of life
MOST_MISSED = 12  # signs of life of this rank during which another one may show none
STORE_TIMEOUT = timedelta(seconds=60)
LOST = 4  # exit code, that of `RankError`


@contextmanager
def watched(rank: int, num_ranks: int) -> Iterator[None]:
    """Inside, a thread watches the other ranks and the launcher. All ranks have to come here, and leave together.

    A rank that shows no sign of life for a minute ends the process with exit code 4 and one sentence. If it is on this
    machine it is killed, because torchrun would wait for it. If the launcher has ended, the process gets SIGTERM: the
    ranks save and stop. One that has not ended ten minutes later is ended.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # A connection of its own, because one that waits for an answer has the others wait.
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)
    watch = Watch(store, rank, num_ranks)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.over.set()
        thread.join()


class Watch:
    """What the thread does.

    Silence is counted in this rank's own signs of life, not in seconds: ranks that are all stopped and go on, such as
    on a laptop that sleeps, have not lost each other.

    Attributes:
        over: set it to end the watch.
    """

    def __init__(self, store: dist.Store, rank: int, num_ranks: int) -> None:
        self.store, self.rank = store, rank
        self.others = [number for number in range(num_ranks) if number != rank]
        self.over = threading.Event()
        self._launcher = os.getppid()
        self._counted = dict.fromkeys(self.others, 0)
        self._missed = dict.fromkeys(self.others, 0)
        store.set(_key("process", rank), f"{_machine()} {os.getpid()}")

    def run(self) -> None:
        while not self.over.wait(BEAT):
            try:
                silent = self.look()
            except Exception:  # of the store, and torch has several classes for them
                return self._stop()
            if os.getppid() != self._launcher:
                return self._stop()
            if silent is not None:
                self._end(silent)

    def look(self) -> int | None:
        """Shows a sign of life and looks for those of the others. Returns a rank that has shown none for too long."""
        self.store.add(_key("alive", self.rank), 1)
        for number in self.others:
            counted = self.store.add(_key("alive", number), 0)
            self._missed[number] = self._missed[number] + 1 if counted == self._counted[number] else 0
            self._counted[number] = counted
        return next((number for number in self.others if self._missed[number] > MOST_MISSED), None)

    def _stop(self) -> None:
        """Has this process save and end, as all ranks do."""
        self._say("warning: torchrun has ended, here or on the machine of rank 0, so this run is stopped")
        os.kill(os.getpid(), signal.SIGTERM)
        if not self.over.wait(STOP_SECONDS):
            os._exit(128 + signal.SIGTERM)

    def _end(self, silent: int) -> None:
        with suppress(Exception):
            machine, process = self.store.get(_key("process", silent)).decode().split()
            if machine == _machine():
                os.kill(int(process), signal.SIGKILL)
        self._say(
            f"error: rank {silent} has shown no sign of life for {MOST_MISSED * BEAT:.0f} seconds; go on from the last "
            "checkpoint with --resume"
        )
        os._exit(LOST)

    def _say(self, what: str) -> None:
        with suppress(OSError):
            print(f"rank {self.rank}: {what}", file=sys.stderr, flush=True)


def _machine() -> str:
    """The number that torchrun gives to the machine; host names need not differ."""
    return os.environ.get("GROUP_RANK", "0")


def _key(what: str, rank: int) -> str:
    return f"watch/{what}/{rank}"
