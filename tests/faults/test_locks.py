"""A run is locked before it is read, so nobody trains on over what another process has written meanwhile."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import trainers.session
import trainers.stored
from main import main
from tests.faults.machine import in_process
from utils.run.lock import lock


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "run.lock"}


def test_checkpoints_are_read_under_the_lock(untouched, tmp_path, monkeypatch, capsys):
    """What a second resume reads is what the first one has left, however slow it is."""
    folder = Path(shutil.copytree(untouched, tmp_path / "copy"))
    load, holders = trainers.stored.checkpoint.load, []

    def watched(path, *args):
        holders.append((folder / "run.lock").read_text())
        return load(path, *args)

    monkeypatch.setattr(trainers.stored.checkpoint, "load", watched)
    (folder / "summary.json").unlink()
    assert main(["--resume", str(folder), "--evaluate"]) == 0  # only reads, so it needs no lock
    assert holders == [""]
    holders.clear()
    assert main(["--resume", str(folder)]) == 0
    assert holders
    assert all(holder.startswith(f"process {os.getpid()} on") for holder in holders)


def test_a_run_that_is_going_on_is_neither_read_nor_changed(untouched, tmp_path, capfd):
    folder = Path(shutil.copytree(untouched, tmp_path / "copy"))
    (folder / "summary.json").unlink()
    before = contents(folder)
    with lock(folder):
        assert in_process(lambda: main(["--resume", str(folder)]), silent=False) == 2
    said = capfd.readouterr().err
    assert f"is in use by process {os.getpid()} on" in said
    assert contents(folder) == before


def test_what_another_process_saves_before_the_lock_is_free_is_what_is_read(untouched, tmp_path, monkeypatch, capsys):
    """A run without any checkpoint would start afresh; this one gets its last one while the second start waits."""
    folder = Path(shutil.copytree(untouched, tmp_path / "copy"))
    (folder / "checkpoints").rename(tmp_path / "later")
    (folder / "checkpoints").mkdir()
    find = trainers.session.find_run

    def slowly(config):
        found = find(config)
        (folder / "checkpoints").rmdir()
        (tmp_path / "later").rename(folder / "checkpoints")
        return found

    monkeypatch.setattr(trainers.session, "find_run", slowly)
    before = contents(folder)
    assert main(["--resume", str(folder)]) == 2
    assert "is finished" in capsys.readouterr().err
    assert before.items() <= contents(folder).items()
