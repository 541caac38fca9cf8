"""Time and peak memory of the steps of the bench."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tools.bench_networks import Bench
from trainers.replay import WARM_UP
from utils.errors import UserError

WARM_UP_STEPS = 5  # unless --warm-up says otherwise: each draw brings new shapes
PEAK_STEPS = WARM_UP + 2  # with the recording of a step, where it is recorded


class StepTime(NamedTuple):
    """Seconds of a step.

    Attributes:
        total: until everything is done.
        host: until the host is free to start the next one.
        device: from the first to the last of its work on a GPU, waiting for the host included; None on a CPU.
    """

    total: float
    host: float
    device: float | None = None


def interleaved_times(
    steps: Mapping[str, Callable[[], None]], repeats: int, device: torch.device, warm_up: int = WARM_UP_STEPS
) -> dict[str, list[StepTime]]:
    """Times of every step, all of them once a round, after `warm_up` rounds that are not counted."""
    times: dict[str, list[StepTime]] = {name: [] for name in steps}
    for repeat in range(warm_up + repeats):
        for name, step in steps.items():
            taken = time_of(step, device)
            if repeat >= warm_up:
                times[name].append(taken)
    return times


def time_of(step: Callable[[], None], device: torch.device) -> StepTime:
    """The time of one step that starts when the device has nothing left to do."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        total = time.perf_counter() - start
        return StepTime(total, total)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    begin.record()
    step()
    end.record()
    host = time.perf_counter() - start
    torch.cuda.synchronize(device)
    return StepTime(time.perf_counter() - start, host, begin.elapsed_time(end) / 1000)


def measure_peak(bench: Bench, name: str, argv: Sequence[str]) -> dict[str, float | None]:
    """Peak memory of the steps of one network, and what was in use before it was built, in MB.

    On a GPU: of the tensors, in this process, where nothing else must run meanwhile. On a CPU: of a process of its own
    with the command line `argv`, torch itself included.
    """
    return peak_on_gpu(bench, name) if bench.device.type == "cuda" else peak_of_process(argv, name)


def peak_on_gpu(bench: Bench, name: str) -> dict[str, float]:
    """What `measure_peak` returns, of this process. Raises RuntimeError for a network that cannot run."""
    gc.collect()  # a traced graph is a cycle, so an earlier network would stay in memory
    torch.cuda.synchronize(bench.device)
    before = torch.cuda.memory_allocated(bench.device)
    network = bench.build(name)
    torch.cuda.reset_peak_memory_stats(bench.device)
    for _ in range(PEAK_STEPS):
        network.step()
    torch.cuda.synchronize(bench.device)
    return {"peak_mb": torch.cuda.max_memory_allocated(bench.device) / 2**20, "baseline_mb": before / 2**20}


def peak_of_process(argv: Sequence[str], name: str) -> dict[str, float | None]:
    """What `measure_peak` returns, of a process of its own."""
    command = [sys.executable, "-m", "tools.bench", *argv, "--peak", name]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise UserError(f"peak memory of {name} cannot be measured ({reason}); leave it out with --no-memory")
    return json.loads(result.stdout.splitlines()[-1])


def peak_of_this_process(bench: Bench, name: str) -> dict[str, float | None]:
    """What `peak_of_process` reads from the process that it starts."""
    before = process_peak_mb()
    network = bench.build(name)
    for _ in range(PEAK_STEPS):
        network.step()
    return {"peak_mb": process_peak_mb(), "baseline_mb": before}


def process_peak_mb() -> float | None:
    """Peak of this process so far, in MB; None where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")  # in getrusage a process has its parent's peak
    except OSError:
        return None
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
