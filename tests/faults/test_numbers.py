"""Numbers that are not finite never reach a checkpoint, wherever they come from."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import trainers.recipe
from tests.faults.machine import folder_of, train
from trainers.divergence import Diverged
from trainers.state import RunState
from utils.run.checkpoint import load


def tensors_of(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for entry in entries for tensor in tensors_of(entry)]


def momentum(run: RunState) -> torch.Tensor:
    return next(iter(run.weight_optimizer.state.values()))["momentum_buffer"]


POISONS: dict[str, tuple[Callable[[RunState], torch.Tensor], str]] = {
    "weights": (lambda run: next(run.network.model.parameters()), "conv1.weight"),
    "statistics": (lambda run: next(iter(run.network.batch_norms().values())).running_var, "bn.running_var"),
    "scores": (lambda run: run.network.scores, r"[\w.]+.scores"),
    "momentum": (momentum, "momentum_buffer 0 of FusedSGD"),
    "score optimizer": (
        lambda run: next(iter(run.search.score_optimizer.state.values()))["exp_avg"],
        "exp_avg 0 of Adam",
    ),
    "average": (lambda run: run.average["conv1.weight"], "average of conv1.weight"),
    "result": (lambda run: next(iter(run.best.subnet.statistics.values()))[1], "bn.var of the result"),
}


def test_everything_that_is_saved_is_looked_at(images, tmp_path, monkeypatch, capsys):
    """One run; before each of its saves something else is broken for a moment, and the save is refused every time."""
    save, seen = trainers.recipe.Recipe.save, set()

    def poisoned_save(self, *args, **more):
        for what, (find, name) in POISONS.items():
            try:
                tensor = find(self.run).data
            except (AttributeError, TypeError, KeyError, StopIteration):  # this phase has none
                continue
            kept = tensor.clone()
            tensor[(-1,) * tensor.dim()] = math.inf if what == "momentum" else math.nan
            with pytest.raises(Diverged, match=f"{name} is no longer finite .*weight_lr 0"):
                save(self, *args, **more)
            tensor.copy_(kept)
            seen.add(what)
        return save(self, *args, **more)

    monkeypatch.setattr(trainers.recipe.Recipe, "save", poisoned_save)
    assert train(tmp_path, images, ema=0.5) == 0
    assert seen == set(POISONS)


ENDS = {  # what a single step of the epoch leaves: options, and what the message says
    "weights": (("--weight-lr", "1e18"), "is no longer finite after the end of epoch 1"),
    "scores": (("--score-lr", "1e308"), "scores is no longer finite after step 1 of epoch 1"),
}


@pytest.mark.parametrize("case", ENDS)
def test_an_update_that_overflows_in_the_only_step_of_an_epoch_is_not_saved(images, tmp_path, capsys, case):
    """The loss of that step was finite: only the update is not."""
    options, message = ENDS[case]
    code = train(tmp_path, images, *options, batch_size=72, epochs=3, method="vrpge")
    said = capsys.readouterr()
    assert code == 3, said.out
    assert message in said.out
    assert ("weight_lr 1e+18" in said.out) or ("score_lr 1e+308" in said.out)
    assert said.err == ""
    for file in folder_of(tmp_path).glob("checkpoints/*.pt"):
        assert all(tensor.isfinite().all() for tensor in tensors_of(load(file)) if tensor.is_floating_point()), file


def test_a_held_out_loss_that_is_not_finite_ends_a_run_and_its_checkpoint_stays(images, tmp_path, monkeypatch, capsys):
    evaluate = trainers.recipe.evaluate

    def overflowing(network, plan, batches):
        metrics = evaluate(network, plan, batches)
        return {**metrics, "loss": math.inf} if calls[0] else metrics

    calls = [False]
    finish = trainers.recipe.Recipe.finish_epoch

    def second_epoch(self):
        calls[0] = self.run.epoch == 1
        finish(self)

    monkeypatch.setattr(trainers.recipe, "evaluate", overflowing)
    monkeypatch.setattr(trainers.recipe.Recipe, "finish_epoch", second_epoch)
    assert train(tmp_path, images) == 3
    said = capsys.readouterr().out
    assert "error: the held-out loss is inf after step 8 of epoch 2. This step had weight_lr 0.001" in said
    assert "The last checkpoint is from before" in said
    assert load(folder_of(tmp_path) / "checkpoints/last.pt")["epoch"] == 1


def test_a_candidate_whose_loss_is_not_finite_is_not_chosen(images, tmp_path, monkeypatch):
    merit = trainers.recipe.Recipe.merit
    assert merit({"top1": 100.0, "loss": math.nan}) < merit({"top1": 0.0, "loss": 9.0})
    assert merit({"top1": 50.0, "loss": 1.0}) > merit({"top1": 50.0, "loss": 2.0})
