"""What networks cost: the closed form against the graph's own counts, averaged over every mask there is."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainers.methods.policy_gradient import drawn_mask, top_scored_mask

from args import parse_args
from data import DataSplits
from tests.toy import (
    IMAGE_SHAPE,
    NETWORKS,
    one_thread,  # noqa: F401
)
from trainers.recipe import Recipe
from trainers.session import load_data
from trainers.state import new_run
from utils.algorithm.masks import keep_one_unit
from utils.channels.cost import COUNTS, ExpectedCost, constant_score
from utils.channels.graph import ChannelGraph
from utils.channels.subnet import best_within_cost
from utils.conv_type import sparsify
from utils.errors import UserError

UNITS = list(COUNTS)
STREAMS = ["free", "tied"]


class Chain(nn.Module):
    """Convs in a row, one with a shift, one not maskable; a flatten that gives each channel four columns."""

    LAYERS = ("conv1", "conv3")

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1, bias=True)
        self.bn = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 2, 1, bias=False)
        self.conv3 = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)
        self.linear = nn.Linear(4 * 2 * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.max_pool2d(self.bn(self.conv1(x)), 2))
        return self.linear(self.conv3(x).flatten(1))


class Branches(nn.Module):
    """Additions, concatenations, depthwise convs; with tied masks `direct` reads the very units that it writes."""

    LAYERS = ("stem", "direct", "expand", "project", "grow")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2)
        self.direct = nn.Conv2d(2, 2, 3, padding=1, bias=True)
        self.bn2 = nn.BatchNorm2d(2)
        self.expand = nn.Conv2d(2, 3, 1, bias=False)
        self.filter = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=True)
        self.project = nn.Conv2d(3, 2, 1, bias=False)
        self.grow = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.wide = nn.Conv2d(7, 7, 3, stride=2, padding=1, groups=7, bias=False)
        self.bn3 = nn.BatchNorm2d(7)
        self.linear = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        image, x = x, self.bn1(self.stem(x))
        x = self.bn2(x + self.direct(x))
        x = x + self.project(F.relu6(self.filter(self.expand(x))))
        x = torch.cat([self.grow(x), x, image], 1)  # with channels that are always there
        return self.linear(self.bn3(self.wide(x)).mean((2, 3)))


class Twice(nn.Module):
    """A conv that runs twice, so that it reads in the end what it writes; a sum of concatenated maps."""

    LAYERS = ("stem", "again", "left", "right")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 1, bias=False)
        self.again = nn.Conv2d(2, 2, 3, padding=1, bias=True)
        self.left = nn.Conv2d(2, 2, 1, bias=False)
        self.right = nn.Conv2d(2, 2, 1, bias=False)
        self.linear = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.again(self.again(x))
        x = torch.cat([x, self.left(y)], 1) + torch.cat([y, self.right(y)], 1)
        return self.linear(F.relu(x).mean((2, 3), keepdim=True)).flatten(1)


SMALL = {"chain": Chain, "branches": Branches, "twice": Twice}


def graph_of(net: type[nn.Module], stream: str = "free") -> ChannelGraph:
    return ChannelGraph(sparsify(net(), list(net.LAYERS), 0.5), IMAGE_SHAPE, stream)


def count(graph: ChannelGraph, unit: str, mask_U: np.ndarray) -> int:
    """The reference: what the graph counts for one mask."""
    counts = [int(channels.sum()) for channels in graph.live_channels(mask_U)]
    return sum(COUNTS[unit](graph, counts).values())


@cache
def every_mask(net: str, stream: str) -> tuple[ChannelGraph, np.ndarray, dict[str, np.ndarray]]:
    """All masks of a small network with their costs."""
    graph = graph_of(SMALL[net], stream)
    masks_NU = np.array(list(product([False, True], repeat=graph.num_units)))
    return graph, masks_NU, {unit: np.array([count(graph, unit, mask_U) for mask_U in masks_NU]) for unit in UNITS}


def some_scores(num_units: int) -> list[np.ndarray]:
    """Random scores; with corners of the box among them; and low ones."""
    random = np.random.default_rng(0)
    inside = random.random(num_units)
    corners = np.where(random.random(num_units) < 0.5, inside, random.integers(0, 2, num_units))
    return [inside, corners, 0.01 * inside]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("net", SMALL)
def test_the_closed_form_is_the_mean_over_all_masks(net, stream, unit):
    graph, masks_NU, costs = every_mask(net, stream)
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

    tied, free = (ExpectedCost(graph_of(Direct, stream), "flops") for stream in ("tied", "free"))
    pixels = 8 * 8
    assert tied(np.array([0.3])) == pytest.approx(0.3 * (3 * pixels + pixels + 5))
    assert free(np.array([0.3, 0.2])) == pytest.approx((0.3 * 3 + 0.3 * 0.2) * pixels + (1 - 0.7 * 0.8) * 5)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("net", NETWORKS)
def test_at_a_mask_it_is_what_that_mask_costs_and_the_gradient_what_each_unit_adds(net, stream, unit):
    graph = graph_of(NETWORKS[net], stream)
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
    constant = constant_score(cost, fraction * cost.dense)
    assert cost(np.full(cost.num_units, constant)) == pytest.approx(fraction * cost.dense, rel=1e-12)
    assert fraction < constant < 1  # costs of more than one factor leave room for more than the fraction of units
    assert constant_score(cost, cost.dense) == 1
    assert constant_score(cost, cost.fixed) <= 1e-12


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


# --- in a run -------------------------------------------------------------------------------------------------------


def run_of(*options: str) -> Recipe:
    """A run before its first step: VGG-16 at a sixteenth of its widths, 264 units."""
    small = ("--arch", "vgg16", "--width-mult", "0.0625", "--batch-size", "16", "--no-finetune")
    config = parse_args([*small, *options]).config
    return Recipe(config, images(), new_run(config, images(), torch.device("cpu")), reporter=None, stop=None)


@cache
def images() -> DataSplits:
    return load_data(parse_args([]).config, torch.device("cpu"))


def spent(recipe: Recipe, unit: str) -> float:
    """The expected cost of the run's scores, as a fraction of dense."""
    cost = recipe.run.network.expected_cost(unit)
    return cost(recipe.run.network.scores.numpy()) / cost.dense


@pytest.mark.parametrize("unit", UNITS)
def test_a_run_starts_at_its_budget_and_stays_in_it(unit):
    recipe = run_of("--budget", unit, "--keep-ratio", "0.3", "--score-lr", "0.1")
    network = recipe.run.network
    assert len(network.scores.unique()) == 1
    assert spent(recipe, unit) == pytest.approx(0.3, rel=1e-6)
    for number, (part, labels) in enumerate(images().train.train_batches(16, 0, 0)):
        recipe.step(part, labels, recipe.settings(number, 100))
        assert spent(recipe, unit) <= 0.3 * (1 + 2e-6)  # of which 1e-6 are the scores' rounding to float32
        if number == 4:
            break
    assert len(network.scores.unique()) > 10
    assert not (network.scores.double().mean() <= 0.3)  # a budget of channels would
    random = np.random.default_rng(0)
    drawn = [drawn_mask(network, recipe.config, 0.3, random) for _ in range(3)]
    for mask_U in [top_scored_mask(network, recipe.config, 0.3), *drawn]:
        plan = network.plan(mask_U)
        assert np.array_equal(plan.mask_U, mask_U)  # no layer is empty
        cost = network.subnet_macs(plan) if unit == "flops" else network.subnet_parameters(plan)
        assert cost <= 0.3 * network.expected_cost(unit).dense


def test_a_budget_that_falls_counts_the_same_unit():
    recipe = run_of("--budget", "flops", "--keep-ratio", "0.2", "--budget-schedule", "cubic")
    assert spent(recipe, "flops") == 1
    part, labels = next(images().train.train_batches(16, 0, 0))
    recipe.step(part, labels, replace(recipe.settings(0, 100), kept_fraction=0.6))
    assert spent(recipe, "flops") == pytest.approx(0.6, rel=2e-6)


@pytest.mark.parametrize("unit", UNITS)
def test_first_scores_that_overspend_are_refused_with_those_that_fit(unit):
    options = ("--budget", unit, "--keep-ratio", "0.3", "--score-init-constant")
    with pytest.raises(UserError, match=r"score_init_constant 0\.9 would overspend .* keep_ratio 0\.3 of the") as error:
        run_of(*options, "0.9")
    fitting = re.search(r"pass --score-init-constant (\S+) or less", str(error.value))[1]
    assert float(fitting) > 0.3
    assert 0.3 * 0.99 < spent(run_of(*options, fitting), unit) <= 0.3
    assert spent(run_of(*options, "0.9", "--budget-schedule", "cubic"), unit) > 0.3


@pytest.mark.parametrize("unit", UNITS)
def test_a_budget_that_no_subnet_meets_is_refused_with_the_smallest_that_one_does(unit):
    with pytest.raises(UserError, match=rf"keep_ratio 0\.0001 of the {unit} is less than") as error:
        run_of("--budget", unit, "--keep-ratio", "0.0001")
    fitting = re.search(r"pass --keep-ratio (\S+) or more", str(error.value))[1]
    recipe = run_of("--budget", unit, "--keep-ratio", fitting)
    network = recipe.run.network
    assert top_scored_mask(network, recipe.config, float(fitting)).sum() == len(network.graph.vital_groups)


def test_a_budget_by_layer_counts_channels_only():
    assert parse_args(["--constrain-by-layer"]).config.sparsity.budget == "channels"
    with pytest.raises(UserError, match="depends on its neighbours") as error:
        parse_args(["--constrain-by-layer", "--budget", "flops"])
    assert "constrain_by_layer True (command line) needs budget channels, got budget flops (command" in str(error.value)
