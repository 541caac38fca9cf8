"""A run that is killed at any moment, or whose files are damaged, goes on and ends as if nothing had happened."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch

import trainers.recipe
from main import main
from tests.faults.machine import (
    SHORT,
    STEPS,
    folder_of,
    in_process,
    killed_at,
    summary_of,
    train,
    unlike,
    words,
)
from tests.tiny import run
from utils.run.checkpoint import differences, load


def renamed_in(images: Path, root: Path) -> list[str]:
    """The files that an untouched run renames into place, in their order."""
    names, replace = [], os.replace

    def watching(source: object, target: object) -> None:
        names.append(Path(target).name)
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", watching)
        assert train(root, images) == 0
    return names


@pytest.fixture(scope="module")
def renamed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return renamed_in(images, tmp_path_factory.mktemp("renamed"))


def test_the_order_of_files_is_that_which_the_tests_below_cut(renamed):
    assert [name for name in renamed if name.endswith((".pt", ".json")) and name != "env.json"] == [
        *("last.pt", "best.pt"),  # the end of the search's only epoch
        *("last.pt", "best.pt"),  # the choice of the subnet
        *("last.pt", "best.pt"),  # the end of the fine-tuning's only epoch
        "last.pt",  # done
        "summary.json",
    ]


def cut_before(renamed: list[str], name: str, number: int) -> int:
    """Where in the order a file stands for the `number`-th time."""
    return [place for place, other in enumerate(renamed) if other == name][number]


CUTS = {  # the file that is not written any more, and for the how manieth time it would have been
    "between last.pt and best.pt of an epoch": ("best.pt", 0),
    "before last.pt of the choice": ("last.pt", 1),
    "between last.pt and best.pt of the choice": ("best.pt", 1),
    "between the last save and summary.json": ("summary.json", 0),
}


@pytest.mark.parametrize("cut", [pytest.param(c, marks=[pytest.mark.slow] * c.endswith("an epoch")) for c in CUTS])
def test_a_kill_between_two_files_leaves_a_run_that_ends_like_any_other(images, untouched, renamed, tmp_path, cut):
    """Whatever is counted, such as the cost of choosing the subnet, is counted once."""
    assert killed_at(cut_before(renamed, *CUTS[cut]), tmp_path, images) == -signal.SIGKILL
    assert not (folder_of(tmp_path) / "summary.json").exists()
    assert train(tmp_path, images, "--resume") == 0
    assert unlike(untouched, folder_of(tmp_path)) == []


@pytest.mark.slow
def test_a_kill_between_any_two_files(images, untouched, renamed, tmp_path):
    for number in range(len(renamed)):
        root = tmp_path / str(number)
        assert killed_at(number, root, images) == -signal.SIGKILL
        had_begun = list((root / "runs").rglob("checkpoints"))
        assert train(root, images, *["--resume"] * bool(had_begun)) == 0
        assert unlike(untouched, folder_of(root)) == [], f"killed before {renamed[number]}, file {number}"


def test_a_kill_within_an_epoch_costs_the_steps_since_the_last_save(images, untouched, tmp_path, monkeypatch):
    """In both phases; the second kill comes before the first step of the second start has been saved."""
    step = trainers.recipe.Recipe.step
    for kill_at, options in ((2, ()), (STEPS + 5, ("--resume",))):
        taken = []

        def killing(self, *batch):
            if self.run.steps == kill_at:  # noqa: B023
                os.kill(os.getpid(), signal.SIGKILL)
            taken.append(self.run.steps)  # noqa: B023
            return step(self, *batch)

        monkeypatch.setattr(trainers.recipe.Recipe, "step", killing)
        arguments = words(tmp_path, images, *options, save_steps=1)
        assert in_process(lambda: main(arguments)) == -signal.SIGKILL  # noqa: B023
        state = load(folder_of(tmp_path) / "checkpoints/last.pt")
        assert (state["steps"], state["phase"]) == (kill_at, "search" if kill_at < STEPS else "finetune")
        previous = load(folder_of(tmp_path) / "checkpoints/previous.pt")
        assert previous["steps"] in (kill_at - 1, kill_at)
    monkeypatch.setattr(trainers.recipe.Recipe, "step", step)
    assert train(tmp_path, images, "--resume", save_steps=1) == 0
    assert unlike(untouched, folder_of(tmp_path)) == []


def test_saves_within_an_epoch_change_nothing_clocks_included(images, tmp_path):
    """Both phases, by seconds; the clock of the test goes on by one second in a step."""
    plain = run(tmp_path, images, name="plain", **{**SHORT, "save_interval": 0})
    often = run(tmp_path, images, name="often", **{**SHORT, "save_interval": 1e-9})
    states = [save.state for save in often.record.saves("last.pt")]
    inside = [state for state in states if state["step"] > 0]
    assert [(state["phase"], state["step"], state["clocks"][0]) for state in inside] == [
        *(("search", step, step) for step in range(1, STEPS)),
        *(("finetune", step, step) for step in range(1, 2 * STEPS)),
    ]
    assert [save.state["step"] for save in plain.record.saves("last.pt")] == [0] * 4
    names = differences(plain.load("last.pt"), often.load("last.pt"))
    assert {name.rpartition(".")[2] for name in names} == {"name", "save_interval"}
    assert {**plain.summary, "run": ""} == {**often.summary, "run": ""}


def test_a_run_that_was_killed_before_its_first_save_starts_afresh(images, untouched, renamed, tmp_path, capsys):
    assert killed_at(cut_before(renamed, "last.pt", 0), tmp_path, images) == -signal.SIGKILL
    folder = folder_of(tmp_path)
    assert not list(folder.glob("checkpoints/*.pt"))
    assert main(["--evaluate", "--resume", str(folder)]) == 2
    assert "it has no checkpoint at all" in capsys.readouterr().err
    assert main(["--resume", str(folder)]) == 0
    assert "this run ended before it had written a checkpoint, so it starts afresh" in capsys.readouterr().out
    assert unlike(untouched, folder_of(tmp_path)) == []
    (folder / "config.yaml").unlink()
    for file in folder.glob("checkpoints/*.pt"):
        file.unlink()
    assert main(["--resume", str(folder)]) == 2
    assert "holds nothing to go on from; start the run again without --resume" in capsys.readouterr().err


def test_a_run_that_was_killed_as_soon_as_its_folder_counts_as_one_starts_afresh(images, untouched, tmp_path):
    def work() -> int:
        mkdir = os.mkdir

        def killing(path: Path, *rest: object) -> None:
            mkdir(path, *rest)
            if Path(path).name == "checkpoints":
                os.kill(os.getpid(), signal.SIGKILL)

        os.mkdir = killing
        return train(tmp_path, images)

    assert in_process(work) == -signal.SIGKILL
    assert main(["--resume", str(folder_of(tmp_path))]) == 0
    assert unlike(untouched, folder_of(tmp_path)) == []


# ---- a finished run ----


@pytest.fixture
def finished(untouched: Path, tmp_path: Path) -> Path:
    """A copy of the untouched run."""
    return Path(shutil.copytree(untouched, tmp_path / "copy"))


def test_what_a_finished_run_lacks_is_written_again(untouched, finished, capsys):
    for missing in ("summary.json", "checkpoints/best.pt"):
        (finished / missing).unlink()
        assert main(["--resume", str(finished)]) == 0
        assert "not all of its result was written; writing it now" in capsys.readouterr().out
        assert unlike(untouched, finished) == []
    assert main(["--resume", str(finished)]) == 2
    assert "is finished" in capsys.readouterr().err


def advised(message: str) -> list[str]:
    """The options of the command that a message quotes."""
    (command,) = re.findall(r"`python main\.py ([^`]+)`", message)
    return shlex.split(command)


def damage(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def test_a_damaged_result_is_written_again_by_the_command_that_is_advised(untouched, finished, capsys):
    best = finished / "checkpoints/best.pt"
    damage(best)
    assert main(["--evaluate", "--resume", str(best)]) == 2
    command = advised(capsys.readouterr().err)
    assert main(["--evaluate", "--resume", str(finished)]) == 0  # the same result is in last.pt
    said = capsys.readouterr()
    assert f"test top-1 {summary_of(untouched)['test_top1']:.2f} %" in said.out
    assert "taking" in said.out
    assert main(command) == 0
    assert unlike(untouched, finished) == []


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(images, untouched, tmp_path, capsys):
    """A resume of the folder takes it by itself; one of the file names it; advice never goes round in circles."""
    root = tmp_path / "runs"
    assert killed_at(10**6, root, images, save_steps=3) == 0  # to its end
    folder = folder_of(root)
    last, previous = (folder / "checkpoints" / name for name in ("last.pt", "previous.pt"))
    assert load(previous)["phase"] == "finetune"
    (folder / "summary.json").unlink()
    damage(last)
    assert main(["--resume", str(last)]) == 2
    assert advised(capsys.readouterr().err) == ["--resume", str(previous)]
    assert main(["--resume", str(folder)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"warning: .*last\.pt is damaged .*taking .*previous\.pt instead", said)
    assert unlike(untouched, folder) == []
    assert load(previous)["phase"] == "finetune"  # the damaged file did not take its place
    for file in (last, previous):
        damage(file)
    assert main(["--resume", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "no other checkpoint in its folder can be resumed, so make the run again" in said
    assert "best.pt" not in said


def test_a_checkpoint_from_before_results_were_kept_in_it_is_resumed(untouched, finished, capsys):
    last = finished / "checkpoints/last.pt"
    state = load(last)
    old = {**state, "best": {key: state["best"][key] for key in ("subnet", "epoch", "heldout", "test")}}
    torch.save(old, last)
    (finished / "summary.json").unlink()
    assert main(["--resume", str(finished)]) == 0
    torch.save({**old, "best": {**old["best"], "epoch": 7}}, last)
    assert main(["--resume", str(finished)]) == 2
    assert "is of epoch 7, and that of best.pt beside it is not the same" in capsys.readouterr().err
