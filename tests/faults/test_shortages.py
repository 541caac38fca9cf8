"""No memory, or processes for images that die: one sentence, and the run goes on from what was saved."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from main import main
from tests.faults.machine import STEPS, folder_of, train, unlike, words
from tests.faults.test_disks import before_step
from tests.kill_campaign import STREAMED, make_streamed
from utils.run.checkpoint import load

PROJECT = Path(__file__).resolve().parents[2]
WORKERS = {**STREAMED, "workers": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that are decoded anew in every epoch."""
    return make_streamed(tmp_path_factory.mktemp("files"))


def kill_a_worker_and_wait() -> None:
    """The step goes on for longer than it takes the news to arrive."""
    [worker] = [child for child in multiprocessing.active_children() if child.name.startswith("Process")]
    os.kill(worker.pid, signal.SIGKILL)
    end = time.monotonic() + 5
    while time.monotonic() < end:
        time.sleep(0.01)


def test_a_worker_that_is_killed_during_a_step_is_one_sentence(files, tmp_path, capfd):
    with before_step(2, kill_a_worker_and_wait):
        assert train(tmp_path, files, save_steps=1, **WORKERS) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: a process that decodes images has died (DataLoader worker (pid")
    assert said.endswith("go on with --resume and fewer --workers (now 1), 0 for none\n")
    assert said.count("\n") == 1
    last = load(folder_of(tmp_path) / "checkpoints/last.pt")
    assert (last["steps"], last["phase"]) == (2, "search")
    assert train(tmp_path / "whole", files, save_steps=1, **WORKERS) == 0
    assert main(["--resume", str(folder_of(tmp_path)), "--workers", "0"]) == 0
    assert [name for name in unlike(folder_of(tmp_path / "whole"), folder_of(tmp_path)) if "workers" not in name] == []


def raises(error: Exception) -> Callable[[], None]:
    def do() -> None:
        raise error

    return do


SHORTAGES: dict[str, tuple[Callable[[], object], str]] = {
    "tensors": (lambda: torch.empty(2**50), "DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    "arrays": (lambda: np.ones(2**50), "Unable to allocate 8.00 PiB for an array"),
    "a GPU": (raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")), "2.00 GiB. Tr"),
    "processes": (raises(OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))), "Resource temporarily unavailable"),
}


@pytest.mark.parametrize("case", SHORTAGES)
def test_too_little_memory_is_one_sentence_and_the_checkpoint_stands(images, tmp_path, capsys, case):
    do, reason = SHORTAGES[case]
    with before_step(5, do):
        assert train(tmp_path, images) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is not enough memory: ")
    assert reason in said
    advice = (
        "Train anew with a smaller --batch-size (now 18) or --finetune-batch-size (now 9), or with --precision bf16; "
        "or free memory, and go on with --resume\n"
    )
    assert said.endswith(advice)
    assert said.count("\n") == 1
    assert load(folder_of(tmp_path) / "checkpoints/last.pt")["steps"] == STEPS


@pytest.mark.parametrize("error", [RuntimeError("a fault of the program"), OSError(errno.EIO, "a fault of a disk")])
def test_any_other_error_keeps_its_traceback(images, tmp_path, error):
    with before_step(5, raises(error)), pytest.raises(type(error)) as raised:
        train(tmp_path, images)
    assert raised.value is error


@pytest.mark.slow
def test_a_full_dev_shm_is_one_sentence(files, tmp_path):
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    small = 'mount -t tmpfs -o size=64k tmpfs /dev/shm; exec "$@"'
    if subprocess.run([*inside, small, "sh", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody but root mount a file system")
    command = [sys.executable, str(PROJECT / "main.py"), *words(tmp_path, files, **WORKERS)]
    ended = subprocess.run([*inside, small, "sh", *command], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "error: a process that decodes images has died (" in ended.stderr
    assert "go on with --resume and fewer --workers (now 1), 0 for none" in ended.stderr
    assert "Traceback" not in ended.stderr
