"""Ranks: the processes that train one network together, one on each GPU. torchrun starts them.

torchrun starts the program once for each rank and tells each its place by environment variables. `--multigpu 0,1` turns
the running process into such a torchrun. Nothing here imports torch, so that a mistake in the call is told at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NoReturn

PROGRAM = Path(__file__).resolve().parents[2] / "main.py"
# The time that torchrun grants ranks after a signal. Ranks in the middle of an evaluation finish it before they save.
# torchrun's own default is 30 seconds, which releases before this variable keep to.
STOP_SECONDS = 600


def num_started() -> int:
    """How many ranks torchrun has started on all machines; 1 without torchrun."""
    return _place("WORLD_SIZE", 1)


def rank_here() -> int:
    """Number of this process among them, from 0."""
    return _place("RANK", 0)


def local_rank() -> int:
    """Number of this process among those on its machine."""
    return _place("LOCAL_RANK", 0)


def num_local_ranks() -> int:
    """How many ranks there are on this machine."""
    return _place("LOCAL_WORLD_SIZE", 1)


def _place(variable: str, alone: int) -> int:
    # Clusters set such variables for programs that have nothing to do with torchrun.
    return int(os.environ[variable]) if "TORCHELASTIC_RUN_ID" in os.environ else alone


@contextmanager
def only_first_rank_speaks() -> Iterator[None]:
    """Whatever ranks other than the first print to the standard output inside is dropped."""
    if rank_here() == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def become_torchrun(num_ranks: int, options: Sequence[str]) -> NoReturn:
    """Replaces this process by a torchrun that starts the program with these options once for each rank.

    Signals then reach torchrun, which passes them on, and the exit code is that of torchrun: 1 if any rank failed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_SECONDS))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *torchrun, str(PROGRAM), *options])
