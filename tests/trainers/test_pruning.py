"""Pruning little by little while the budget falls, and the criterion that judges units by the gradients of gates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from args import Config, config_from_dict
from data import DataSplits
from tests.tiny import STEPS, TINY, Run, kept_mask, make_images, run
from tests.toy import NETWORKS, batch, config, plain_net, sparse_network
from trainers.build import new_run
from trainers.default import StepSettings
from trainers.methods import make_method
from trainers.methods.pruning import TaylorCut
from trainers.recipe import Recipe
from trainers.session import load_data
from trainers.state import RunState
from utils.algorithm.schedules import falling_keep_ratio
from utils.channels.budget import Budget
from utils.channels.network import SparseNetwork
from utils.channels.norms import norms_behind
from utils.errors import UserError

CPU = torch.device("cpu")
METHODS = ["l1", "slimming", "taylor_cut"]
FALLING = {"epochs": 4, "budget_schedule": "cubic", "budget_end": 0.6, "keep_ratio": 0.4, "finetune_epochs": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def data(images) -> DataSplits:
    return load_data(config_of(images), CPU)


@pytest.fixture(scope="module")
def dense(images, tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("dense"), images, method="dense", epochs=1, finetune="off")


@pytest.fixture(scope="module", params=["l1", "taylor_cut"])
def gradual(images, dense, request, tmp_path_factory) -> Run:
    """A trained dense network that is pruned while the budget falls."""
    root, start = tmp_path_factory.mktemp(request.param), ("--pretrained", str(dense.folder))
    return run(root, images, *start, method=request.param, **FALLING)


def config_of(images: Path, **options: object) -> Config:
    return config_from_dict({**TINY, "data": str(images), **options}, "test")


# ---- little by little ----


def test_after_every_epoch_the_units_beyond_the_budget_of_the_moment_have_left_for_good(gradual):
    """The last two of four epochs have the final budget. All that is cut later is a part of what was left before."""
    assert gradual.code == 0
    steps, before_U = FALLING["epochs"] * STEPS, np.ones(1, dtype=bool)
    for epoch in range(1, 5):
        stored_U = gradual.load(f"epoch_{epoch}.pt")["stored_units"].numpy()
        budget = falling_keep_ratio((epoch * STEPS - 1) / steps, 0.4, 0.0, FALLING["budget_end"])
        assert float(gradual.rows[epoch - 1]["budget"]) == pytest.approx(budget, rel=1e-12)
        rounded_up = 0.5 * 9 if gradual.summary["method"] == "l1" else 0  # of each of nine layers a half of a unit
        assert budget * len(stored_U) - 1 - rounded_up <= stored_U.sum() <= budget * len(stored_U) + rounded_up
        assert not (stored_U & ~before_U).any()
        assert stored_U.all() == (budget == 1)
        before_U = stored_U
    assert np.array_equal(kept_mask(gradual.load("best.pt")), before_U)
    assert gradual.rows[-1]["budget"] == ""


def test_the_epochs_get_cheaper_and_nothing_that_exceeds_the_budget_is_a_result(gradual):
    ratios = gradual.column("forward_flops_ratio")
    assert ratios[0] == 1
    assert ratios[0] > ratios[1] > ratios[2] > ratios[3]
    assert ratios[3] == pytest.approx(gradual.summary["flops_ratio"], rel=1e-12)
    assert gradual.record.saves("best.pt")[0].state["epoch"] == 3  # of four


@pytest.mark.parametrize("unit", ["params", "flops"])
@pytest.mark.parametrize("method", METHODS)
def test_other_budgets_fall_too(images, data, method, unit):
    options = {"method": method, "budget": unit, "budget_schedule": "cubic", "keep_ratio": 0.3, "arch": "resnet20_he"}
    settings = config_of(images, **options)
    new = new_run(settings, data, CPU)
    recipe, costs = Recipe(settings, data, new, reporter=None, stop=None), [1.0]
    pictures, labels = next(data.train.train_batches(18, 0, 0))
    for ratio in (0.8, 0.5, 0.3):
        recipe.step(pictures, labels, StepSettings(0.05, keep_ratio=ratio))
        recipe.method.end_of_epoch(new, ratio)
        cost = new.network.expected_cost(unit)
        costs.append(cost(new.network.stored_units) / cost.dense)
        assert 0.85 * ratio < costs[-1] <= ratio
        assert np.array_equal(new.plan.mask_U, new.network.stored_units)
    assert np.array_equal(make_method(settings).candidates(new)[0], new.network.stored_units)


@pytest.mark.parametrize("method", METHODS)
def test_with_a_constant_budget_all_units_stay_until_the_end(images, data, method):
    settings = config_of(images, method=method)
    new = new_run(settings, data, CPU)
    make_method(settings).end_of_epoch(new, 0.4)
    assert new.network.stored_units.all()


@pytest.mark.parametrize("method", METHODS)
def test_pruning_starts_with_all_weights_of_a_trained_network(images, data, dense, method):
    new = new_run(config_of(images, method=method, pretrained=str(dense.folder)), data, CPU)
    theirs = dense.load("best.pt")["model"]
    ours = {name: value for name, value in new.network.model.state_dict().items() if not name.endswith("scores")}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items() if not name.endswith("tracked"))


# ---- the first-order effect ----


def toy_run() -> RunState:
    """Not in training mode, so that gates can be turned without another change."""
    network = sparse_network(plain_net("released"), NETWORKS["released"].LAYERS)
    network.model.eval()
    weights = torch.optim.SGD(network.weight_parameters(), lr=0.0)
    return RunState(network, Budget(network), weights, "search", network.dense_plan)


def slope_of_gates(network: SparseNetwork, pictures: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """dL/dgate of every unit by central differences: a gate turns scale and shift of the batch-norm behind it."""
    slopes, eps = [], 1e-5
    for name in network.layers:
        norm = norms_behind(network)[name].module
        own = norm.weight.detach().clone(), norm.bias.detach().clone()
        for channel in range(len(own[0])):
            losses = []
            for gate in (1 + eps, 1 - eps):
                for tensor, value in zip((norm.weight, norm.bias), own, strict=True):
                    tensor.data.copy_(value)
                    tensor.data[channel] *= gate
                with torch.no_grad():
                    losses.append(float(F.cross_entropy(network(pictures, network.dense_plan), labels)))
            slopes.append((losses[0] - losses[1]) / (2 * eps))
        norm.weight.data.copy_(own[0])
        norm.bias.data.copy_(own[1])
    return torch.tensor(slopes, dtype=torch.float64)


def test_importance_is_the_squared_effect_of_removing_a_unit_averaged_over_the_batches_of_the_epoch():
    """Whatever the gradients are clipped to. The next epoch forgets it."""
    new, batches = toy_run(), [batch(seed=seed) for seed in range(3)]
    method = TaylorCut(config(method="taylor_cut", clip_norm=1e-3))
    squares = [slope_of_gates(new.network, *given) ** 2 for given in batches]
    assert (squares[0] > 1e-12).double().mean() > 0.5
    for new.step, given in enumerate(batches):
        method.step(new, *given, StepSettings(0.0))
    torch.testing.assert_close(new.importance, sum(squares) / 3, rtol=1e-4, atol=1e-12)
    new.step = 0
    method.step(new, *batches[0], StepSettings(0.0))
    torch.testing.assert_close(new.importance, squares[0], rtol=1e-4, atol=1e-12)


def test_the_most_important_units_of_the_whole_network_are_kept_and_none_that_have_left(images, data):
    settings = config_of(images, method="taylor_cut", budget_schedule="cubic", keep_ratio=0.3)
    new, method = new_run(settings, data, CPU), make_method(settings)
    count = new.network.num_units
    new.importance = torch.from_numpy(np.random.default_rng(0).permutation(count) + 1.0)
    mask_U = method.mask(new, 0.3)
    assert mask_U.sum() == int(0.3 * count)
    best = [group[new.importance.numpy()[group].argmax()] for group in new.network.vital_groups]
    others = np.setdiff1d(np.flatnonzero(mask_U), best)
    assert new.importance[others].min() > new.importance[~mask_U].max()
    method.end_of_epoch(new, 0.6)
    left = ~new.network.stored_units
    assert left.sum() == count - int(0.6 * count)
    new.importance[torch.from_numpy(left)] = 1e3
    assert not (method.mask(new, 0.3) & left).any()


def test_units_without_a_batch_norm_of_their_own_are_refused(images, data):
    with pytest.raises(UserError, match=r"method taylor_cut cannot judge \d+ of \d+ units of wrn16_8") as caught:
        new_run(config_of(images, method="taylor_cut", arch="wrn16_8", width_mult=0.03), data, CPU)
    assert str(caught.value).endswith("pass another --method or --arch")
