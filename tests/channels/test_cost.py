"""What networks cost: the closed form against the graph's own counts, averaged over every mask there is."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.channels.small import SMALL, graph_of
from tests.toy import NETWORKS, one_thread  # noqa: F401
from utils.algorithm.masks import keep_one_unit
from utils.channels.cost import COUNTS, ExpectedCost, constant_score
from utils.channels.graph import ChannelGraph
from utils.channels.subnet import best_within_cost

UNITS = list(COUNTS)
RESIDUAL_MASKS = ["free", "tied"]


def count(graph: ChannelGraph, unit: str, mask_U: np.ndarray) -> int:
    """The reference: what the graph counts for one mask."""
    counts = [int(channels.sum()) for channels in graph.live_channels(mask_U)]
    return sum(COUNTS[unit](graph, counts).values())


@cache
def every_mask(net: str, residual_masks: str) -> tuple[ChannelGraph, np.ndarray, dict[str, np.ndarray]]:
    """All masks of a small network with their costs."""
    graph = graph_of(SMALL[net], residual_masks)
    masks_NU = np.array(list(product([False, True], repeat=graph.num_units)))
    return graph, masks_NU, {unit: np.array([count(graph, unit, mask_U) for mask_U in masks_NU]) for unit in UNITS}


def some_scores(num_units: int) -> list[np.ndarray]:
    """Random scores; with corners of the box among them; and low ones."""
    random = np.random.default_rng(0)
    inside = random.random(num_units)
    corners = np.where(random.random(num_units) < 0.5, inside, random.integers(0, 2, num_units))
    return [inside, corners, 0.01 * inside]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("residual_masks", RESIDUAL_MASKS)
@pytest.mark.parametrize("net", SMALL)
def test_the_closed_form_is_the_mean_over_all_masks(net, residual_masks, unit):
    graph, masks_NU, costs = every_mask(net, residual_masks)
    cost = ExpectedCost(graph, unit)

    def mean(scores_U: np.ndarray) -> float:
        return np.where(masks_NU, scores_U, 1 - scores_U).prod(1) @ costs[unit]

    for scores_U in some_scores(graph.num_units):
        value, gradient_U = cost.with_gradient(scores_U)
        assert value == pytest.approx(mean(scores_U), rel=1e-10)
        assert cost(scores_U) == value
        exact_U = np.empty(graph.num_units)  # the mean is linear in each score, so a difference is a derivative
        for i in range(graph.num_units):
            with_i, without_i = scores_U.copy(), scores_U.copy()
            with_i[i], without_i[i] = 1, 0
            exact_U[i] = mean(with_i) - mean(without_i)
        np.testing.assert_allclose(gradient_U, exact_U, rtol=1e-10, atol=1e-10 * cost.dense)
        assert gradient_U.min() >= 0


def test_units_that_layers_share_are_counted_once():
    """A layer that reads and writes one unit costs s, not s^2."""

    class Direct(nn.Module):
        LAYERS = ("stem", "direct")

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.direct = nn.Conv2d(3, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
            self.linear = nn.Linear(1, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.linear((x + self.direct(x)).mean((2, 3)))

    tied, free = (ExpectedCost(graph_of(Direct, residual_masks), "flops") for residual_masks in ("tied", "free"))
    pixels = 8 * 8
    assert tied(np.array([0.3])) == pytest.approx(0.3 * (3 * pixels + pixels + 5))
    assert free(np.array([0.3, 0.2])) == pytest.approx((0.3 * 3 + 0.3 * 0.2) * pixels + (1 - 0.7 * 0.8) * 5)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("residual_masks", RESIDUAL_MASKS)
@pytest.mark.parametrize("net", NETWORKS)
def test_at_a_mask_it_is_what_that_mask_costs_and_the_gradient_what_each_unit_adds(net, residual_masks, unit):
    graph = graph_of(NETWORKS[net], residual_masks)
    cost, random = ExpectedCost(graph, unit), np.random.default_rng(0)
    assert cost.fixed == count(graph, unit, np.zeros(graph.num_units, dtype=bool))
    assert cost.dense == count(graph, unit, np.ones(graph.num_units, dtype=bool))
    for kept in (0.2, 0.5, 0.9):
        mask_U = random.random(graph.num_units) < kept
        value, gradient_U = cost.with_gradient(mask_U)
        assert value == count(graph, unit, mask_U)
        for i in range(graph.num_units):
            with_i, without_i = mask_U.copy(), mask_U.copy()
            with_i[i], without_i[i] = True, False
            assert gradient_U[i] == count(graph, unit, with_i) - count(graph, unit, without_i)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_the_constant_that_meets_the_budget(fraction, unit):
    cost = ExpectedCost(graph_of(NETWORKS["preactivation"]), unit)
    everything, some = np.ones(cost.num_units, dtype=bool), np.arange(cost.num_units) % 3 > 0
    constant = constant_score(cost, fraction * cost.dense, everything)
    assert cost(np.full(cost.num_units, constant)) == pytest.approx(fraction * cost.dense, rel=1e-12)
    assert fraction < constant < 1  # costs of more than one factor leave room for more than the fraction of units
    assert constant_score(cost, cost.dense, everything) == 1
    assert constant_score(cost, cost.fixed, everything) <= 1e-12
    of_some = constant_score(cost, fraction * cost(some), some)
    assert cost(of_some * some) == pytest.approx(fraction * cost(some), rel=1e-12)
    assert constant_score(cost, cost(some), some) == 1


# --- choosing a mask ------------------------------------------------------------------------------------------------


def greedy(values_U: np.ndarray, graph: ChannelGraph, unit: str, budget: float, first: list[int]) -> np.ndarray:
    """The slow reference: asks the graph about every unit in turn."""
    mask_U = np.zeros(len(values_U), dtype=bool)
    mask_U[first] = True
    for i in np.argsort(-values_U, kind="stable"):
        trial_U = mask_U.copy()
        trial_U[i] = True
        if values_U[i] > 0 and count(graph, unit, trial_U) <= budget:
            mask_U = trial_U
    return mask_U


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("net", NETWORKS)
def test_units_come_by_value_while_they_fit(net, unit):
    graph, random = graph_of(NETWORKS[net]), np.random.default_rng(1)
    cost = ExpectedCost(graph, unit)
    for fraction in (0.05, 0.2, 0.5, 0.8, 1.0):
        scores_U = random.random(graph.num_units).round(1)  # with ties and zeros
        budget = cost.fixed + fraction * (cost.dense - cost.fixed)
        mask_U = best_within_cost(scores_U, scores_U, cost, budget, [])
        np.testing.assert_array_equal(mask_U, greedy(scores_U, graph, unit, budget, []))
        assert count(graph, unit, mask_U) <= budget
    assert np.array_equal(mask_U, scores_U > 0)  # the whole budget takes all but the zeros


@pytest.mark.parametrize("unit", UNITS)
def test_the_layer_guard_has_nothing_to_add(unit):
    graph = graph_of(NETWORKS["preactivation"])
    cost, random = ExpectedCost(graph, unit), np.random.default_rng(2)
    for fraction in (0.05, 0.3):
        scores_U = random.random(graph.num_units) * (random.random(graph.num_units) < 0.5)
        scores_U[graph.vital_groups[0]] = 0
        mask_U = best_within_cost(scores_U, scores_U, cost, fraction * cost.dense, graph.vital_groups)
        assert keep_one_unit(mask_U, torch.from_numpy(scores_U), graph.vital_groups) is mask_U
        best = [int(group[scores_U[group].argmax()]) for group in graph.vital_groups]
        np.testing.assert_array_equal(mask_U, greedy(scores_U, graph, unit, fraction * cost.dense, best))
    nothing_U = best_within_cost(scores_U, scores_U, cost, 0.0, graph.vital_groups)
    assert nothing_U.nonzero()[0].tolist() == sorted(best)  # whatever they cost


@pytest.mark.parametrize("unit", UNITS)
def test_a_budget_that_a_mask_meets_exactly(unit):
    graph = graph_of(NETWORKS["plain"])
    cost, values_U = ExpectedCost(graph, unit), np.linspace(1, 0.1, graph.num_units)
    for kept in range(1, graph.num_units):
        mask_U = np.arange(graph.num_units) < kept
        fraction = count(graph, unit, mask_U) / cost.dense
        assert best_within_cost(values_U, values_U, cost, fraction * cost.dense, [])[:kept].all()
