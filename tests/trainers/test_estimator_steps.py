"""Training with each of the estimators: what a step gives them, and what is kept of what they learnt."""

from __future__ import annotations

import copy
from functools import cache
from itertools import islice

import pytest
import torch

from args import ESTIMATORS, Config, config_from_dict
from data import DataSplits
from tests.toy import one_thread  # noqa: F401
from tools.gauge import Batch
from trainers.build import make_estimator, new_run, restore_run
from trainers.default import StepSettings, draw_masks, train_step
from trainers.methods import make_method
from trainers.session import load_data
from trainers.state import RunState
from utils.channels.shrink import drop_dead_units
from utils.errors import UserError
from utils.run import checkpoint

CPU = torch.device("cpu")
OPTIONS = {"arch": "resnet20_he", "width_mult": 0.125, "batch_size": 16, "device": "cpu", "clip_norm": 1e9}
NOW = StepSettings(weight_lr=0.05, score_lr=0.02, keep_ratio=0.5)
LEARNING = ["linear_cv_gates", "taylor"]


@cache
def data() -> DataSplits:
    return load_data(config_from_dict(OPTIONS, "test"), CPU)


def training_run(**options) -> tuple[RunState, Config]:
    settings = config_from_dict({**OPTIONS, **options}, "test")
    return new_run(settings, data(), CPU), settings


def take_steps(run: RunState, settings: Config, first: int, count: int) -> None:
    for images, labels in islice(data().train.train_batches(16, 0, 0), first, first + count):
        make_method(settings).step(run, images, labels, NOW)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_step_makes_the_estimate_from_earlier_steps_and_then_learns(name):
    run, settings = training_run(estimator=name)
    search, estimator = run.search, run.search.estimator
    if name in LEARNING:
        effects_U = torch.linspace(-1, 1, run.network.num_units)
        estimator.num_seen_U, estimator.slope_U, estimator.curvature_U = effects_U * 0 + 9, effects_U, effects_U**2
    if name == "linear_cv_gates":
        estimator.covariance, estimator.power = torch.tensor(0.6), torch.tensor(1.0)
    before, masks_KU = copy.deepcopy(estimator), search.masks.own_KU
    scores_U = search.network.scores.detach().clone()
    images, labels = next(data().train.train_batches(16, 0, 1))
    still = Batch(copy.deepcopy(search.network), images, labels, settings)
    losses_K, _ = still.run(masks_KU)
    expected = before.gradient(scores_U, masks_KU, losses_K)
    train_step(search, images, labels, NOW, settings)
    torch.testing.assert_close(search.network.scores.grad, expected, rtol=1e-3, atol=1e-5)
    assert expected.abs().max() > 1e-3
    if name in LEARNING:
        before.observe(masks_KU, losses_K, still.gates(masks_KU[0]))
        for key, value in before.state_dict().items():
            torch.testing.assert_close(estimator.state_dict()[key], value, rtol=1e-3, atol=1e-5)
        for other in (before, make_estimator(run.network, settings)):  # what it knows afterwards, and nothing at all
            wrong = other.gradient(scores_U, masks_KU, losses_K)
            assert not torch.allclose(wrong, expected, rtol=1e-3, atol=1e-5)


def test_gates_are_read_before_gradients_are_clipped():
    slopes = []
    for clip_norm in (1e9, 1e-6):
        run, settings = training_run(estimator="taylor", clip_norm=clip_norm)
        take_steps(run, settings, first=0, count=1)
        slopes.append(run.search.estimator.slope_U)
    assert slopes[0].abs().max() > 1e-4
    assert torch.equal(*slopes)


@pytest.mark.parametrize("name", LEARNING)
def test_gates_go_on_when_units_leave(name):
    """The same with units that have left as with all of them: their gates would never be seen again."""
    runs = [training_run(estimator=name) for _ in range(2)]
    for (run, settings), shrinks in zip(runs, (False, True), strict=True):
        search = run.search
        run.network.scores.data[::4] = 0
        search.masks = draw_masks(search, settings)
        if shrinks:
            assert drop_dead_units(run.network, search.score_optimizer, search.weight_optimizer) > 0
        take_steps(run, settings, first=0, count=4)
    (whole, _), (cut, _) = runs
    assert not cut.network.stored_units.all()
    for key, value in whole.search.estimator.state_dict().items():
        torch.testing.assert_close(cut.search.estimator.state_dict()[key], value, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(whole.network.scores, cut.network.scores, rtol=1e-2, atol=1e-3)


def test_taylor_is_refused_where_it_cannot_see():
    with pytest.raises(UserError, match=r"taylor cannot judge \d+ of \d+ units of wrn16_8: no batch-norm of their own"):
        training_run(estimator="taylor", arch="wrn16_8")


@pytest.mark.parametrize("name", LEARNING)
def test_an_estimator_that_learns_resumes_bit_equal(name, tmp_path):
    whole, settings = training_run(estimator=name)
    take_steps(whole, settings, first=0, count=5)
    parts, _ = training_run(estimator=name)
    take_steps(parts, settings, first=0, count=3)
    checkpoint.save(tmp_path / "last.pt", parts.state_dict(settings, data()))
    stored = checkpoint.load(tmp_path / "last.pt")
    resumed, _ = training_run(estimator=name)
    restore_run(resumed, stored, settings)
    take_steps(resumed, settings, first=3, count=2)
    ends = [run.state_dict(settings, data()) for run in (whole, resumed)]
    assert checkpoint.differences(*ends) == []
    assert any(key.startswith("search.estimator.") for key in checkpoint.differences(stored, ends[1]))
    assert any(key.endswith("of the estimator") for key in whole.replicated())
