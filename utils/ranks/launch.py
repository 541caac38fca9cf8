"""Ranks: the processes that train one network together. How they are started, know their place, and fail.

torchrun starts the program once for each rank, with the place of each in its environment; `--multigpu 0,1` does the
same from here. Nothing here imports torch before it has to: a mistake in the call should be told at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "main.py"
STORE_SECONDS = 10
# What torchrun grants ranks after a signal: those in the middle of an evaluation finish it before they save. Its own
# default is 30 seconds; releases before this variable came keep to that.
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
    """Whatever is printed inside on another rank than the first is dropped."""
    if rank_here() == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def first_to_fail() -> bool:
    """Whether this rank is the one to say why the run fails: others fail for the same reason, or because of it.

    Asks torchrun, which outlives its ranks. If it does not answer, everybody speaks.
    """
    if num_started() == 1:
        return True
    from datetime import timedelta

    from torch.distributed import TCPStore

    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=STORE_SECONDS),
            wait_for_workers=False,
        )
        return store.add(f"failures of start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except RuntimeError:
        return True


def launch(num_ranks: int, options: Sequence[str]) -> int:
    """Starts the program with these options once for each rank on this machine, and waits for all.

    When one fails, the others are ended. SIGINT and SIGTERM are passed on: the ranks finish their step, save and end.

    Returns: the exit code: that of the rank that failed first, 128 + the signal that came or that killed it, else 0.
    """
    import logging
    import uuid

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_SECONDS))
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # the launcher's own words about a rank that fails; the rank has said why
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(str(PROGRAM), *options)
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        why = "; memory may be full" if -failure.exitcode == signal.SIGKILL else ""
        print(f"error: rank {rank} was ended by signal {-failure.exitcode}{why}", file=sys.stderr)
        return 128 - failure.exitcode
    return 0
