"""Files, folders and streams that can no longer be written: training goes on, tells it once, and does not return 0."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import trainers.recipe
from main import main
from tests.faults.machine import folder_of, train, unlike
from utils.run import store
from utils.run.checkpoint import load


@contextmanager
def before_step(number: int, do: Callable[[], object]) -> Iterator[None]:
    """Does something before the step of this number, counted over the whole run from 0."""
    step = trainers.recipe.Recipe.step

    def watched(self, *batch):
        if self.run.steps == number:
            do()
        return step(self, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers.recipe.Recipe, "step", watched)
        yield


@contextmanager
def refusing(*names: str) -> Iterator[None]:
    """Inside, the disk has no room for files of these names."""
    replace = os.replace

    def full(source: object, target: object) -> None:
        if Path(target).name in names:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", full)
        yield


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Inside, the system refuses to write more than so many bytes of a file, half way, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


MISSING = {
    "result": ["best.pt"],
    "run": ["last.pt"],
    "tables": ["results.csv", "scores.npz"],
    "summary": ["summary.json"],
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c == "summary")) for c in MISSING])
def test_a_run_without_some_file_ends_with_1_and_no_summary_and_is_made_whole(
    images, untouched, tmp_path, capsys, case
):
    """A summary that names another accuracy than best.pt has is impossible, because it is the last file of a run."""
    names = MISSING[case]
    with refusing(*names):
        assert train(tmp_path, images) == 1
    said = capsys.readouterr().out
    assert [said.count(f"warning: {name} could not be written") for name in names] == [1] * len(names)
    assert "error: the training is done, with test 12.50 %, but not all could be written" in said
    assert "No space left on device" in said
    assert "same number again" not in said
    folder = folder_of(tmp_path)
    assert not (folder / "summary.json").exists()
    if names == ["last.pt"]:  # nothing to go on from
        assert sorted(file.name for file in folder.glob("checkpoints/*")) == ["best.pt"]
        return
    assert main(["--resume", str(folder)]) == 0
    assert unlike(untouched, folder) == []


def test_a_save_that_failed_and_was_repeated_is_forgotten(images, untouched, tmp_path, capsys):
    def free() -> None:
        block.__exit__(None, None, None)

    block = refusing("best.pt")
    block.__enter__()
    with before_step(5, free):
        assert train(tmp_path, images) == 0
    assert "warning: best.pt could not be written" in capsys.readouterr().out
    assert unlike(untouched, folder_of(tmp_path)) == []


def test_a_signal_on_a_full_disk_does_not_say_that_it_saved(images, untouched, tmp_path, capsys):
    """Real writes of a checkpoint fail half way; smaller files still fit."""
    with before_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)), largest_file(20_000):
        assert train(tmp_path, images) == 1
    said = capsys.readouterr().out
    assert "error: stopped after step 3 of epoch 1, which could not be saved, and there is no checkpoint" in said
    assert "saved; go on with" not in said
    assert not list(folder_of(tmp_path).glob("checkpoints/*"))
    with before_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert train(tmp_path, images, "--resume") == 143
    with before_step(8, lambda: os.kill(os.getpid(), signal.SIGTERM)), largest_file(20_000):
        assert train(tmp_path, images, "--resume") == 1
    assert "which could not be saved; go on from the last checkpoint with: python main.py" in capsys.readouterr().out
    assert load(folder_of(tmp_path) / "checkpoints/last.pt")["steps"] == 7
    assert train(tmp_path, images, "--resume") == 0
    assert unlike(untouched, folder_of(tmp_path)) == []


def test_a_deleted_run_folder_ends_no_training(images, tmp_path, capsys):
    with before_step(2, lambda: shutil.rmtree(folder_of(tmp_path))):
        assert train(tmp_path, images) == 1
    said = capsys.readouterr()
    assert "finetune epoch 2/2" in said.out
    for name in ("last.pt", "results.csv", "scores.npz", "the event file of TensorBoard"):
        assert said.out.count(f"warning: {name} could not be written") <= 1, name
    assert "warning: last.pt could not be written" in said.out
    assert "Traceback" not in said.err


def test_tensorboard_that_cannot_write_ends_no_training(images, untouched, tmp_path, capsys):
    """Its thread fails, not ours. Nothing else is missing, so the run has its summary."""
    import tensorboard.compat.tensorflow_stub.io.gfile as gfile

    def full(_self, _content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gfile.GFile, "write", full)
        assert train(tmp_path, images) == 1
    said = capsys.readouterr()
    assert said.out.count("the event file of TensorBoard could not be written") == 1
    assert "Traceback" not in said.err
    assert unlike(untouched, folder_of(tmp_path)) == []


def test_a_standard_output_that_cannot_be_written_ends_no_training(images, untouched, tmp_path, monkeypatch, capsys):
    with open("/dev/full", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert train(tmp_path, images) == 1
        monkeypatch.undo()
    said = capsys.readouterr().err
    assert said == "warning: the standard output cannot be written (No space left on device); going on\n"
    assert unlike(untouched, folder_of(tmp_path)) == []


def test_a_closed_pipe_is_told_once_and_ends_nothing(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit):
            main(["--list"])
        monkeypatch.undo()
    assert capsys.readouterr().err == "warning: the standard output cannot be written (Broken pipe); going on\n"


def test_too_little_room_is_said_at_the_start(images, tmp_path, monkeypatch, capsys):
    free = namedtuple("Usage", "free")(1000)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _folder: free)
    monkeypatch.setattr(trainers.recipe.Recipe, "execute", lambda _self: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train(tmp_path, images) == 130
    assert "warning: 1,000 bytes are free where" in capsys.readouterr().out


def test_a_run_folder_that_cannot_be_written_at_the_start_is_one_sentence(untouched, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(untouched, tmp_path / "copy"))
    (folder / "run.lock").unlink(missing_ok=True)
    (folder / "run.lock").mkdir()
    assert main(["--resume", str(folder)]) == 2
    assert f"cannot write into the run folder {folder}" in capsys.readouterr().err
