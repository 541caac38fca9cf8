"""Signals and errors at any moment: what is whole is saved, and the run goes on from there bit by bit."""

from __future__ import annotations

import os
import signal

import pytest

import trainers.recipe
import trainers.session
from main import main
from tests.faults.machine import folder_of, train, unlike
from utils.errors import UserError
from utils.run.checkpoint import load
from utils.run.signals import StopRequest


def test_a_signal_during_the_choice_of_the_subnet_ends_it_at_the_next_candidate(
    images, untouched, tmp_path, monkeypatch
):
    """The cost of the candidates that were already judged is not kept."""
    calls, calibrated = [], trainers.recipe.Recipe.calibrated

    def watched(self, mask_U):
        calls.append(len(calls))
        if len(calls) == 2:  # the first is that of the epoch's end
            os.kill(os.getpid(), signal.SIGTERM)
        return calibrated(self, mask_U)

    with monkeypatch.context() as patch:
        patch.setattr(trainers.recipe.Recipe, "calibrated", watched)
        assert train(tmp_path, images) == 143
    assert len(calls) == 2
    assert train(tmp_path, images, "--resume") == 0
    assert unlike(untouched, folder_of(tmp_path)) == []


@pytest.fixture
def as_in_a_terminal():
    """Whoever started these tests, such as nohup or a shell in the background, may have had signals ignored."""
    before = [
        (number, signal.signal(number, handler))
        for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler))
    ]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.usefixtures("as_in_a_terminal")
def test_a_closed_terminal_saves_and_ctrl_c_after_it_is_no_traceback(images, untouched, tmp_path, monkeypatch, capsys):
    step = trainers.recipe.Recipe.step

    def watched(self, *batch):
        if self.run.steps == 6:
            os.kill(os.getpid(), signal.SIGHUP)
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainers.recipe.Recipe, "step", watched)
        assert train(tmp_path, images) == 129
    assert load(folder_of(tmp_path) / "checkpoints/last.pt")["steps"] == 7
    with monkeypatch.context() as patch:
        patch.setattr(trainers.session, "load_data", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        capsys.readouterr()
        assert train(tmp_path, images, "--resume") == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"
    assert train(tmp_path, images, "--resume") == 0
    assert unlike(untouched, folder_of(tmp_path)) == []


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("at", ["a batch", "a step"])
def test_an_error_saves_what_is_whole(images, untouched, tmp_path, monkeypatch, capsys, at):
    """Between two steps the run is saved. In the middle of a step it is not, and the last checkpoint stays."""
    error, step, awaited = UserError("the image is gone"), trainers.recipe.Recipe.step, trainers.recipe.Recipe.awaited

    def failing_step(self, *batch):
        result = step(self, *batch)
        if self.run.steps == 6:
            raise error
        return result

    def failing_batches(self, batches):
        for batch in awaited(self, batches):
            if self.run.steps == 6:
                raise error
            yield batch

    with monkeypatch.context() as patch:
        if at == "a step":
            patch.setattr(trainers.recipe.Recipe, "step", failing_step)
        else:
            patch.setattr(trainers.recipe.Recipe, "awaited", failing_batches)
        assert train(tmp_path, images) == 2
    said = capsys.readouterr()
    assert "error: the image is gone" in said.err
    assert ("stopped after step 2 of epoch 2, saved; go on with" in said.out) == (at == "a batch")
    assert load(folder_of(tmp_path) / "checkpoints/last.pt")["steps"] == (6 if at == "a batch" else 4)
    assert main(["--resume", str(folder_of(tmp_path))]) == 0
    assert unlike(untouched, folder_of(tmp_path)) == []


EVALUATED = {
    "units that leave": {"epochs": 3, "score_lr": 0.3, "keep_ratio": 0.2, "budget_schedule": "cubic"},
    "a search that is decided": {
        "search_until": "decided",
        "search_epochs": 3,
        "epochs": 4,
        "budget_schedule": "cubic",
    },
    "filters that are cut": {"method": "l1", "epochs": 3, "budget_schedule": "cubic"},
    "filters that are cut by what steps learnt": {"method": "taylor_cut", "epochs": 3, "budget_schedule": "cubic"},
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * ("filters" in k)) for k in EVALUATED])
def test_an_error_in_the_evaluation_of_an_epoch_saves_what_was_trained(images, tmp_path, monkeypatch, kind):
    """In every epoch once. What the evaluation has cost counts once, and so does what the search has learnt from it."""
    settings = EVALUATED[kind]
    assert train(tmp_path / "whole", images, **settings) == 0
    evaluate, tried, root = trainers.recipe.Recipe.evaluate_heldout, [], tmp_path / "parts"

    def failing(self, subnet):
        metrics = evaluate(self, subnet)
        place = (self.run.phase, self.run.epoch, self.run.step)
        if place not in tried:
            tried.append(place)
            raise UserError("an image is gone")
        return metrics

    monkeypatch.setattr(trainers.recipe.Recipe, "evaluate_heldout", failing)
    code, starts = train(root, images, **settings), 1
    while code == 2:
        last = load(folder_of(root) / "checkpoints/last.pt")
        assert (last["phase"], last["epoch"], last["step"]) == tried[-1]
        code, starts = main(["--resume", str(folder_of(root))]), starts + 1
    assert code == 0
    assert starts == len(tried) + 1
    assert unlike(folder_of(tmp_path / "whole"), folder_of(root)) == []
