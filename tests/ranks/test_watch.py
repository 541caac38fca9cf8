"""What is left when a rank is stopped, cannot go on, or has lost its launcher."""

from __future__ import annotations

import os
import time
from pathlib import Path
from threading import Thread

import pytest
import torch.distributed as dist

import utils.ranks.watch
from main import main
from tests.conftest import TINY
from tests.ranks.test_ranks import torchrun
from utils.ranks.watch import MOST_MISSED, Watch
from utils.run.checkpoint import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def checkpoint(folder: Path, name: str) -> Path:
    [last] = folder.glob(f"runs/tiny/{name}/**/last.pt")
    return last


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that work on a folder."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return [line for line in lines if str(folder) in line]


def watches(count: int) -> list[Watch]:
    store = dist.HashStore()
    return [Watch(store, number, count) for number in range(count)]


def test_a_rank_that_shows_no_sign_of_life_is_found_by_all_others():
    first, second, third = watches(3)
    for _ in range(3 * MOST_MISSED):
        assert [watch.look() for watch in (first, second, third)] == [None] * 3
    for _ in range(MOST_MISSED):
        assert [third.look(), first.look()] == [None, None]
    assert third.look() == 1
    assert [first.look(), first.look()] == [None, 1]  # it had looked before the last sign of life


def test_a_rank_that_comes_back_in_time_is_not_lost():
    first, second = watches(2)
    for _ in range(3):
        for _ in range(MOST_MISSED):
            assert first.look() is None
        second.look()
    assert first.look() is None


def test_ranks_that_were_all_stopped_for_hours_have_not_lost_each_other(monkeypatch):
    first, second = watches(2)
    for hours in range(5):
        monkeypatch.setattr(time, "monotonic", lambda now=3600.0 * hours: now)
        monkeypatch.setattr(time, "time", lambda now=3600.0 * hours: now)
        assert [first.look(), second.look()] == [None, None]


def test_a_launcher_that_has_ended_is_noticed_by_its_children(monkeypatch):
    """Only those on the machine of rank 0 lose the store with it."""
    monkeypatch.setattr(utils.ranks.watch, "BEAT", 0.01)
    [watch] = watches(1)
    ended = []
    monkeypatch.setattr(watch, "_stop", lambda: ended.append(True))
    monkeypatch.setattr(os, "getppid", lambda: -1)
    thread = Thread(target=watch.run)
    thread.start()
    thread.join(2)
    watch.over.set()
    assert ended == [True]


def test_a_stopped_rank_ends_the_others_and_is_ended(folder, tiny_images):
    begin = time.monotonic()
    result = torchrun("-m", "tests.ranks.program", "stopped", str(folder), str(tiny_images))
    assert time.monotonic() - begin < 30  # torchrun alone gives a stopped rank as long
    assert result.returncode == 1
    said = [line for line in result.stderr.splitlines() if line.startswith("rank ")]
    assert said == [
        "rank 0: error: rank 1 has shown no sign of life for 1 seconds; go on from the last checkpoint with --resume"
    ]
    assert "exitcode: 4" in " ".join(result.stderr.split()).replace("exitcode :", "exitcode:")
    assert processes_of(folder) == []
    assert load(checkpoint(folder, "stopped"))["steps"] == 2


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_save_and_end(folder, tiny_images):
    result = torchrun("-m", "tests.ranks.program", "orphaned", str(folder), str(tiny_images))
    assert result.returncode == -9
    for number in range(2):
        assert (
            f"rank {number}: warning: torchrun has ended, here or on the machine of rank 0, so this run is"
            in result.stderr
        )
        assert (folder / f"orphaned of rank {number}").read_text() == "143"
    assert processes_of(folder) == []
    last = checkpoint(folder, "orphaned")
    assert load(last)["steps"] > 2
    assert main(["--resume", str(last)]) == 0


@pytest.mark.slow
def test_a_rank_that_cannot_read_an_image_has_the_run_saved(folder, tiny_images):
    result = torchrun("-m", "tests.ranks.program", "unreadable", str(folder), str(tiny_images))
    assert result.returncode == 1
    said = sorted(line for line in result.stderr.splitlines() if line.startswith("rank "))
    assert said == [
        "rank 0: error: another rank could not read its next images, for the reason that it says",
        "rank 1: error: cannot read cat.jpg",
    ]
    assert "stopped after step 2 of epoch 1, saved; go on with: torchrun" in result.stdout
    assert load(checkpoint(folder, "unreadable"))["steps"] == 2
