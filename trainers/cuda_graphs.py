"""CUDA graphs: the long halves of a search step, which the GPU then runs without being asked kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from args import Config
from trainers.replay import Replay
from trainers.state import Search
from utils.errors import UserError
from utils.ranks.exchange import num_ranks
from utils.run.progress import announce


class CudaRecorder:
    """Records into CUDA graphs that share their memory, so they must be replayed in the order of their recording."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, work: Callable[[], Any]) -> Any:
        """Runs work on the stream of the recordings, in turn with everything else."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        return result

    def record(self, *works: Callable[[], None]) -> list[Callable[[], None]]:
        """See `trainers.replay.Recorder`."""
        torch.cuda.synchronize(self._stream.device)
        pool, replays = torch.cuda.graph_pool_handle(), []
        for work in works:
            graph = torch.cuda.CUDAGraph()
            # other threads, such as those that read images, go on with what they do on the device
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
            replays.append(graph.replay)
        return replays


def make_replay(search: Search, config: Config) -> Replay | None:
    """What replays the steps of a search; None where they run as they are.

    Raises: UserError for a device that has no CUDA graphs.
    """
    if not config.replays_steps:
        return None
    device = search.network.device
    if device.type != "cuda":
        raise UserError(f"--cuda-graphs on needs a CUDA device, and this run is on {device.type}; leave it out")
    reason = "several processes exchange their gradients" if num_ranks() > 1 else None
    if search.estimator.needs_gates:
        reason = f"estimator {config.sparsity.estimator} reads gradients within a step"
    if reason is not None:
        announce(f"warning: the steps are not replayed, because {reason}; training goes on without CUDA graphs")
        return None
    return Replay(CudaRecorder(device))
