"""A search that ends when its scores are decided, the budget from its top to its end, and processor seconds."""

from __future__ import annotations

import math
import os
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import trainers.recipe
from models import build_model, maskable_convs
from tests.tiny import BATCH, STEPS, Judge, Run, make_images, run, scores_of
from utils.algorithm.decision import Decision
from utils.channels.network import SparseNetwork
from utils.conv_type import sparsify

EPOCHS, SEARCH = 5, 3  # in all, and at most of them of search
SETTINGS = {
    **{"search_until": "decided", "epochs": EPOCHS, "search_epochs": SEARCH, "budget_schedule": "cubic"},
    **{
        "budget_end": 1.0,
        "budget_top": 0.8,
        "score_lr": 0.1,
        "retire": "off",
        "finetune_batch_size": 1000,
    },  # the last is read by nothing
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def decided_after(monkeypatch):
    """Makes the decision at the end of a given epoch; all else that was judged stays."""

    def install(epoch: int) -> None:
        judged = []
        judge = trainers.recipe.decision

        def scripted(*arguments: object) -> Decision:
            found = judge(*arguments)
            judged.append(found)
            return found._replace(budget_ratio=1.0, entropy_ratio=0.0, agreement=1.0 if len(judged) == epoch else 0.5)

        monkeypatch.setattr(trainers.recipe, "decision", scripted)

    return install


def cosine(step: int, steps: int) -> float:
    return (1 + math.cos(math.pi * step / steps)) / 2


def check_rates(done: Run, searched: int) -> None:
    """One curve of the weights over everything; scores and budget as if the search had all of its epochs."""
    weights, scores = done.record.steps("weights"), done.record.steps("scores")
    assert (len(weights), len(scores)) == (EPOCHS * STEPS, searched * STEPS)
    rates = [step.group["lr"] for step in weights]
    assert rates == pytest.approx([0.05 * cosine(i, EPOCHS * STEPS) for i in range(EPOCHS * STEPS)])
    rates = [step.group["lr"] for step in scores]
    assert rates == pytest.approx([0.1 * cosine(i, SEARCH * STEPS) for i in range(searched * STEPS)])
    ends = [(number * STEPS - 1) / (SEARCH * STEPS) for number in range(1, searched + 1)]
    assert done.column_of("budget", searched) == pytest.approx([0.5 + 0.3 * (1 - place) ** 3 for place in ends])
    assert {len(each.images) for each in done.record.passes("graph")} == {BATCH}


def column_of(done: Run, name: str, count: int) -> list[float]:
    return [float(row[name]) for row in done.rows[:count]]


Run.column_of = column_of
plan = trainers.recipe.Progress.plan


def test_it_ends_with_the_first_epoch_that_decides(images, tmp_path, decided_after, capsys):
    decided_after(2)
    done = run(tmp_path, images, **SETTINGS)
    assert done.code == 0
    check_rates(done, 2)
    assert [row["phase"] for row in done.rows] == ["search"] * 2 + ["finetune"] * 3
    assert (done.summary["search_epochs"], done.summary["epochs"]) == (2, EPOCHS)
    said = capsys.readouterr().out
    assert "the scores are decided after 2 of at most 3 epochs of search: the entropy of the scores is 0.0 %" in said
    assert "and 100.0 % of the top-scored units are those of the epoch before" in said
    assert said.count("of the top-scored units") == 1
    assert done.load("last.pt")["decided"] is True


def test_it_ends_with_its_last_epoch_whatever_the_scores(images, tmp_path, decided_after, capsys):
    decided_after(99)
    done = run(tmp_path, images, **SETTINGS)
    check_rates(done, 3)
    assert done.summary["search_epochs"] == 3
    assert "the search ends after its 3 epochs, before its scores are decided (" in capsys.readouterr().out
    assert done.load("last.pt")["decided"] is False


def test_a_search_that_lasts_for_all_epochs_asks_but_does_not_end(images, tmp_path, decided_after):
    decided_after(1)
    done = run(tmp_path, images, epochs=2, finetune_epochs=1)
    assert [row["phase"] for row in done.rows] == ["search", "search", "finetune"]
    assert done.column_of("top_agreement", 2) == [1.0, 0.5]


SLOW = pytest.mark.slow
WHERE = [pytest.param(2, marks=SLOW), 2 * STEPS - 1, pytest.param(2 * STEPS + 1, marks=SLOW)]


@pytest.mark.parametrize("step", WHERE)
def test_a_resumed_run_ends_bit_equal(images, tmp_path, decided_after, step):
    """Stopped in the search, in the last step before the decision, and after it."""
    decided_after(2)
    whole = run(tmp_path, images, name="whole", **SETTINGS)
    decided_after(2)
    stopped = run(tmp_path, images, name="stopped", interrupt_at=step, **SETTINGS)
    assert stopped.code == 130
    decided_after(1 if step == 2 * STEPS - 1 else 2)  # epochs are counted anew
    resumed = run(tmp_path, images, "--resume", name="stopped", **SETTINGS)
    assert resumed.code == 0
    for name, value in whole.load("last.pt")["model"].items():
        assert torch.equal(value, resumed.load("last.pt")["model"][name]), name
    assert [row["phase"] for row in resumed.rows] == [row["phase"] for row in whole.rows]


def test_a_decision_is_not_asked_for_again(images, tmp_path, decided_after, monkeypatch):
    """The signal comes while the epoch that decides is evaluated, so the run stops before its subnet is chosen."""
    decided_after(2)
    finish_epoch = trainers.recipe.Recipe.finish_epoch

    def finish_and_stop(self) -> None:
        finish_epoch(self)
        if self.run.decided:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(trainers.recipe.Recipe, "finish_epoch", finish_and_stop)
        stopped = run(tmp_path, images, **SETTINGS)
    assert (stopped.code, stopped.load("last.pt")["phase"]) == (130, "search")
    resumed = run(tmp_path, images, "--resume", **SETTINGS)
    assert [row["phase"] for row in resumed.rows] == ["search"] * 2 + ["finetune"] * 3


def test_the_bar_is_told_when_the_search_has_ended_early(images, tmp_path, decided_after, monkeypatch):
    told = []
    monkeypatch.setattr(
        trainers.recipe.Progress, "plan", lambda self, stages: told.append(stages) or plan(self, stages)
    )
    decided_after(2)
    run(tmp_path, images, **SETTINGS)
    assert [[(stage.name, stage.epochs) for stage in stages] for stages in told] == [
        [("search", 3), ("finetune", 2)],
        [("search", 2), ("finetune", 3)],
    ]


def test_a_finished_run_becomes_longer_by_its_epochs(images, tmp_path, capsys):
    before = list(run(tmp_path, images, **SETTINGS).rows)
    assert run(tmp_path, images, "--resume", **SETTINGS).code == 2
    assert f"--epochs N with N above {EPOCHS} trains it longer" in capsys.readouterr().err
    longer = run(tmp_path, images, "--resume", "--epochs", str(EPOCHS + 1), **SETTINGS)
    assert [row["phase"] for row in longer.rows] == ["search"] * SEARCH + ["finetune"] * (EPOCHS + 1 - SEARCH)
    assert longer.rows[:EPOCHS] == before


def test_methods_without_scores_count_epochs_alike(images, tmp_path):
    for method, phases in (
        ("l1", ["search"] * 3 + ["finetune"] * 2),
        ("thin", ["train"] * 5),
        ("dense", ["dense"] * 5),
    ):
        settings = {key: value for key, value in SETTINGS.items() if key != "retire"}  # pruning takes units out
        done = run(tmp_path, images, name=method, method=method, **settings)
        assert [row["phase"] for row in done.rows] == phases
        rates = [step.group["lr"] for step in done.record.steps("weights")]
        assert rates == pytest.approx([0.05 * cosine(i, EPOCHS * STEPS) for i in range(EPOCHS * STEPS)])


def test_what_is_told_of_the_scores_is_what_they_are(images, tmp_path):
    """The columns against the scores of scores.npz, which are rounded to half precision."""
    done = run(tmp_path, images, score_lr=0.3, epochs=4, search_until="decided", search_epochs=3, keep_ratio=0.5)
    scores = done.scores["scores"].astype(float)[1:]
    bits = [-(s * np.log2(s, where=s > 0, out=np.zeros_like(s))) for s in (scores, 1 - scores)]
    assert done.column_of("entropy_left", 3) == pytest.approx((bits[0] + bits[1]).mean(axis=1), abs=2e-3)
    count = scores.shape[1] // 2
    top = [set(np.argsort(-row, kind="stable")[:count]) for row in scores]
    same = [len(now & before) / count for before, now in pairwise(top)]
    # rounding, and the layer guard, may exchange a unit
    assert done.column_of("top_agreement", 3) == pytest.approx([0, *same], abs=2.1 / count)


# ---- the budget ----


@pytest.mark.parametrize("budget", ["channels", "flops"])
def test_scores_start_at_the_top_of_the_budget(images, tmp_path, budget):
    done = run(tmp_path, images, **{**SETTINGS, "budget": budget, "epochs": 2, "search_epochs": 1})
    first_U = done.record.steps("scores")[0].before[0]
    assert first_U.unique().numel() == 1
    value = float(first_U[0])
    if budget == "channels":
        assert value == pytest.approx(0.8)
    else:  # most layers read what others write, so their cost is between s and s^2
        assert 0.8 < value < 0.8**0.5


@pytest.mark.parametrize("budget", ["channels", pytest.param("flops", marks=SLOW)])
def test_a_budget_that_is_spent_is_spent_in_every_step_and_by_every_candidate(images, tmp_path, budget, monkeypatch):
    """Scores that fall in every step: without it, less and less would be left."""

    def falling(scores_U, *_: object) -> None:
        scores_U.grad = torch.linspace(0.5, 1, len(scores_U))

    monkeypatch.setattr("trainers.default.calculateGrad", falling)
    settings = {"budget": budget, "score_lr": 0.1, "optimizer": "sgd", "momentum": 0, "epochs": 3, "finetune": False}
    shares = {}
    for spend in (False, True):
        judge = Judge(lambda part, number: (50.0, 1.0))
        with monkeypatch.context() as patch:
            judge.install(patch)
            done = run(tmp_path, images, name=f"spend{spend}", spend_budget=spend, **settings)
        shares[spend] = [share_of(done, scores_of(done.load("last.pt")), budget)]
        shares[spend] += [share_of(done, mask_U, budget) for mask_U in judge.masks[-3:]]  # the drawn candidates
    assert shares[False][0] < 0.4
    assert shares[True][0] == pytest.approx(0.5, abs=1e-5)
    assert min(shares[False][1:]) < 0.45
    assert min(shares[True]) > (0.495 if budget == "channels" else 0.48)  # whole channels of a tiny network
    assert max(shares[True]) <= 0.5 + 1e-5


def share_of(done: Run, values_U: np.ndarray | torch.Tensor, budget: str) -> float:
    """What scores or a mask keep on average, as a fraction of what the budget counts."""
    values_U = np.asarray(values_U, dtype=float)
    if budget == "channels":
        return float(values_U.mean())
    model = build_model(done.summary["arch"], 6, 3, 8, done.summary["width_mult"])
    names = maskable_convs(model, first_layer_dense=False, last_layer_dense=False)
    cost = SparseNetwork(sparsify(model, names), (3, 8, 8), self_check=False).expected_cost(budget)
    return cost(values_U) / cost.dense


# ---- processor seconds ----


def test_processor_seconds_are_those_of_training_steps_of_all_threads(images, tmp_path):
    """Also of a run that was stopped within an epoch; the clocks of these runs go on with steps and evaluations."""
    assert run(tmp_path, images, interrupt_at=STEPS + 1, batch_seconds=0.5).code == 130
    done = run(tmp_path, images, "--resume", batch_seconds=0.5)
    assert done.summary["train_seconds"] > 0
    assert done.summary["train_cpu_seconds"] == pytest.approx(2 * done.summary["train_seconds"])
