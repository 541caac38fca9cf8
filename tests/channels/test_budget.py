"""The budget: projections, tangents and choices that keep it, for channels, parameters and multiply-adds."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest
import torch

from tests.channels.small import SMALL
from tests.toy import (
    NETWORKS,
    batch,
    config,
    one_thread,  # noqa: F401
    plain_net,
    randomise,
    search_of,
    sparse_network,
)
from trainers.build import start_within_budget
from trainers.default import StepSettings, train_step
from utils.algorithm.masks import keep_one_unit
from utils.algorithm.projection import project_onto_budget
from utils.channels.budget import TIGHT, Budget
from utils.channels.network import SparseNetwork
from utils.errors import UserError

COSTS = ("params", "flops")
KINDS = [("channels", False), ("channels", True), ("params", False), ("flops", False)]  # what is counted, by layer


def network_of(kind: str = "preactivation", **options: object) -> SparseNetwork:
    """With scores spread over (0, 1), two of them 0 and two of them 1."""
    network = sparse_network(plain_net(kind), NETWORKS[kind].LAYERS, **options)
    generator = torch.Generator().manual_seed(3)
    network.scores.copy_(torch.rand(network.num_units, generator=generator, dtype=torch.float64))
    network.scores[:4] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    return network


def spent(budget: Budget) -> list[float]:
    """What the scores have spent: a fraction for each part that has a bound of its own."""
    scores_U = budget.network.scores.clamp(0, 1)
    if budget.cost is not None:
        return [budget.cost(scores_U.numpy()) / budget.cost.dense]
    return [float(scores_U[group].mean()) for group in budget.groups]


@pytest.mark.parametrize("keep_ratio", [0.2, 0.6, 1.0])
@pytest.mark.parametrize(("unit", "by_layer"), KINDS)
def test_the_projection_meets_every_bound_and_no_other(unit, by_layer, keep_ratio):
    network = network_of()
    budget = Budget(network, unit, by_layer)
    network.scores.add_(0.3)
    before_U = network.scores.clone()
    inside = [fraction <= keep_ratio for fraction in spent(budget)]
    v = budget.project_(keep_ratio)
    assert len(inside) == (len(network.layers) if by_layer else 1)
    for fraction, had_room in zip(spent(budget), inside, strict=True):
        assert fraction == pytest.approx(keep_ratio, rel=1e-6) or (had_room and fraction <= keep_ratio)
    assert (v == 0) == all(inside)
    if unit == "channels":
        parts = [project_onto_budget(before_U[g], keep_ratio * len(before_U[g])) for g in budget.groups]
        assert torch.equal(network.scores, torch.cat([scores for scores, _ in parts]))
        assert v == max(threshold for _, threshold in parts)
    first = next(iter(network.layers.values()))  # the scores of the layers are views still
    assert torch.equal(first.scores, network.scores[: len(first.scores)])


def test_a_budget_by_layer_counts_channels_only():
    with pytest.raises(ValueError, match="'flops'"):
        Budget(network_of(), "flops", by_layer=True)


# --- the tangent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outwards", [True, False])
@pytest.mark.parametrize(("unit", "by_layer"), KINDS)
def test_a_gradient_loses_what_would_overspend_and_nothing_else(unit, by_layer, outwards):
    """The nearest gradient whose descent keeps the budget to first order; where it keeps it anyway, not a bit moves."""
    network = network_of()
    budget = Budget(network, unit, by_layer)
    network.scores.add_(0.3)
    budget.project_(0.4)
    generator = torch.Generator().manual_seed(5)
    gradient_U = torch.randn(network.num_units, generator=generator, dtype=torch.float64)
    gradient_U = gradient_U - 2 if outwards else gradient_U.abs()
    network.scores.grad = gradient_U.clone()
    budget.remove_normal_(0.4)
    free_U = (network.scores > 0) & (network.scores < 1)
    assert torch.equal(network.scores.grad[~free_U], gradient_U[~free_U])
    if not outwards:
        assert torch.equal(network.scores.grad, gradient_U)
        return
    slope_U = torch.ones_like(gradient_U)
    if budget.cost is not None:
        slope_U = torch.from_numpy(budget.cost.with_gradient(network.scores.numpy())[1])
    for group in budget.groups:
        normal_U = (slope_U * free_U)[group]
        tangent_U = gradient_U[group] - normal_U * (gradient_U[group] @ normal_U) / (normal_U @ normal_U)
        torch.testing.assert_close(network.scores.grad[group], tangent_U, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("unit", "by_layer"), KINDS)
def test_a_budget_that_is_not_spent_leaves_the_gradient_alone(unit, by_layer):
    network = network_of()
    budget = Budget(network, unit, by_layer)
    network.scores.copy_(torch.rand(network.num_units, generator=torch.Generator().manual_seed(1)) * 0.2 + 0.1)
    for room, touched in ((1.001, True), (1.002, False)):  # of the part that has spent most
        keep_ratio = max(spent(budget)) * room
        assert (1 / room >= TIGHT) == touched
        network.scores.grad = torch.full_like(network.scores, -1.0)
        budget.remove_normal_(keep_ratio)
        kept = [bool((network.scores.grad[group] == -1).all()) for group in budget.groups]
        assert kept.count(False) == touched


# --- choices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_ratio", [0.3, 0.75])
@pytest.mark.parametrize(("unit", "by_layer"), KINDS)
def test_the_best_units_use_the_budget_and_leave_nothing_to_the_guard(unit, by_layer, keep_ratio):
    network = network_of()
    budget = Budget(network, unit, by_layer)
    values_U = np.random.default_rng(0).permutation(network.num_units) + 1.0
    mask_U = budget.best_units(values_U, values_U, keep_ratio)
    assert np.array_equal(network.plan(mask_U).mask_U, mask_U)
    if unit == "channels":
        for group in budget.groups:
            assert mask_U[group].sum() == int(keep_ratio * len(mask_U[group]) + 1e-6)
            kept, dropped = values_U[group][mask_U[group]], values_U[group][~mask_U[group]]
            assert sum(kept.min() < dropped) <= len(network.vital_groups)  # of which each takes its best first
        return
    cost_of = network.subnet_macs if unit == "flops" else network.subnet_parameters
    most, plan = keep_ratio * cost_of(network.dense_plan), network.plan(mask_U)
    assert cost_of(plan) <= most
    for i in np.flatnonzero(~mask_U):
        assert cost_of(network.plan(mask_U | (np.arange(len(mask_U)) == i))) > most


def test_in_released_execution_no_layer_is_vital():
    values_U = np.linspace(1, 0.01, 54)
    kept = {}
    for execution in ("compact", "released"):
        network = sparse_network(plain_net("released"), NETWORKS["released"].LAYERS, execution)
        kept[execution] = Budget(network).best_units(values_U, values_U, 0.1)
    assert np.flatnonzero(kept["released"]).tolist() == [0, 1, 2, 3, 4]
    assert np.flatnonzero(kept["compact"]).tolist() == [
        0,
        1,
        2,
        18,
        30,
    ]  # the stem, and one unit of each convolution of the block


@pytest.mark.parametrize("unit", COSTS)
@pytest.mark.parametrize("kind", SMALL)
def test_no_subnet_is_below_the_smallest_keep_ratio_and_one_has_it(kind, unit):
    network = sparse_network(randomise(SMALL[kind](), 0).double(), SMALL[kind].LAYERS)
    budget = Budget(network, unit)
    drawn = [np.array(mask) for mask in product([False, True], repeat=network.num_units)]
    masks = [keep_one_unit(mask_U, network.scores, network.vital_groups) for mask_U in drawn]
    ratios = [budget.cost(mask_U) / budget.cost.dense for mask_U in masks]
    assert budget.smallest_keep_ratio() == min(ratios)
    assert 0 < min(ratios) < 1
    assert Budget(network).smallest_keep_ratio() == min(mask_U.mean() for mask_U in masks)


@pytest.mark.parametrize("unit", ["channels", *COSTS])
def test_the_largest_score_for_all_units_spends_the_budget(unit):
    budget = Budget(network_of(), unit)
    budget.network.scores.fill_(budget.largest_score(0.3))
    assert spent(budget) == [pytest.approx(0.3, rel=1e-9)]


# --- in a search ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score_gradient", ["plain", "tangent"])
@pytest.mark.parametrize(("unit", "by_layer"), KINDS)
def test_a_search_starts_at_its_budget_and_stays_in_it(unit, by_layer, score_gradient):
    given = {"budget": unit, "constrain_by_layer": by_layer, "keep_ratio": 0.3, "score_gradient": score_gradient}
    options = config(**given)
    network = network_of()
    network.scores.fill_(0.3)
    search = search_of(network, options)
    start_within_budget(network, search.budget, options)
    assert spent(search.budget) == [pytest.approx(0.3, rel=1e-9)] * len(search.budget.groups)
    network.model.train()
    for step in range(5):
        train_step(search, *batch(seed=step), StepSettings(0.01, score_lr=0.1, keep_ratio=0.3), options)
        assert max(spent(search.budget)) <= 0.3 * (1 + 1e-6)
    assert len(network.scores.unique()) > 10


@pytest.mark.parametrize("unit", COSTS)
def test_first_scores_that_overspend_are_refused_with_those_that_fit(unit):
    budget = Budget(network_of(), unit)

    def start(constant: float, **options: object) -> None:
        budget.network.scores.fill_(constant)
        given = config(budget=unit, keep_ratio=0.3, score_init_constant=constant, **options)
        start_within_budget(budget.network, budget, given)

    with pytest.raises(
        UserError, match=r"score_init_constant 0\.9 would overspend the first budget, 0\.3 of the"
    ) as error:
        start(0.9)
    fitting = float(re.search(r"pass --score-init-constant (\S+) or less", str(error.value))[1])
    start(fitting)
    assert 0.3 * 0.99 < spent(budget)[0] <= 0.3
    start(0.9, budget_schedule="cubic")  # which starts with everything
    assert spent(budget)[0] > 0.3


@pytest.mark.parametrize("unit", COSTS)
def test_a_budget_that_no_subnet_meets_is_refused_with_the_smallest_that_one_does(unit):
    budget = Budget(network_of(), unit)
    budget.network.scores.fill_(1.0)
    with pytest.raises(UserError, match=rf"keep_ratio 0\.0001 of the {unit} is less than") as error:
        start_within_budget(budget.network, budget, config(budget=unit, keep_ratio=0.0001))
    fitting = float(re.search(r"pass --keep-ratio (\S+) or more", str(error.value))[1])
    start_within_budget(budget.network, budget, config(budget=unit, keep_ratio=fitting))
    assert fitting == pytest.approx(budget.smallest_keep_ratio(), rel=2e-3)
