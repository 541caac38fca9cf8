"""Sums of concatenated maps of which a part is never masked: such a part is whole, whatever is added to it."""

from __future__ import annotations

import copy
from itertools import product
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.toy import NUM_CLASSES, Reference, batch, by_layer, one_thread, randomise, sparse_network  # noqa: F401
from utils.channels.network import SparseNetwork

PIXELS = 8 * 8
EXACT = {"rtol": 1e-9, "atol": 1e-11}


class JoinedNet(nn.Module):
    """(left | always) + (right | upper), in both orders of the addition; then the same with a map that is all there."""

    LAYERS: ClassVar = {"left": 2, "right": 2, "upper": 3, "mix": 2, "narrow": 1, "last": 2}

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 2, 1, bias=True)
        self.right = nn.Conv2d(3, 2, 1, bias=False)
        self.upper = nn.Conv2d(3, 3, 1, bias=True)
        self.always = nn.Conv2d(3, 3, 1, bias=False)
        self.bn = nn.BatchNorm2d(5)
        self.mix = nn.Conv2d(5, 2, 3, padding=1, bias=False)
        self.narrow = nn.Conv2d(5, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(3)
        self.whole = nn.Conv2d(3, 3, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(3)
        self.last = nn.Conv2d(3, 2, 1, bias=False)
        self.linear = nn.Linear(2, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        one = torch.cat([self.left(x), self.always(x)], 1)
        other = torch.cat([self.right(x), self.upper(x)], 1)
        both = F.relu(self.bn(one + other)) + F.relu(other + one)
        joined = F.relu(self.bn2(torch.cat([self.mix(both), self.narrow(both)], 1)))
        out = F.relu(self.bn3(joined + self.whole(x)))
        return self.linear(self.last(out).mean((2, 3)))


def by_hand(run: Reference, x: Tensor) -> Tensor:
    m, net = run.masks, run.net
    one = torch.cat([run.conv("left", x), net.always(x)], 1)
    other = torch.cat([run.conv("right", x), run.conv("upper", x)], 1)
    live = torch.cat([torch.maximum(m["left"], m["right"]), torch.ones(3, dtype=torch.float64)])
    both = run.norm("bn", one + other, live).relu() + (one + other).relu()
    joined = torch.cat([run.conv("mix", both), run.conv("narrow", both)], 1)
    joined = run.norm("bn2", joined, torch.cat([m["mix"], m["narrow"]])).relu()
    out = run.norm("bn3", joined + net.whole(x), torch.ones(3, dtype=torch.float64)).relu()
    return net.linear(run.conv("last", out).mean((2, 3)))


def kept(mask_U: np.ndarray) -> dict[str, np.ndarray]:
    edges = np.cumsum(list(JoinedNet.LAYERS.values()))[:-1]
    return dict(zip(JoinedNet.LAYERS, np.split(mask_U, edges), strict=True))


def counted(unit: str, mask_U: np.ndarray) -> int:
    """Parameters, or multiply-adds, of what is left; counted layer by layer."""
    m = kept(mask_U)
    joined, narrow = int((m["left"] | m["right"]).sum()) + 3, int(m["narrow"].sum())
    left, right, upper, mix, last = (int(m[name].sum()) for name in ("left", "right", "upper", "mix", "last"))
    pairs = 3 * (left + right + upper + 3) + joined * (9 * mix + narrow) + 3 * 3 + 3 * last
    if unit == "flops":
        return pairs * PIXELS + last * NUM_CLASSES
    norms = 2 * (joined + mix + narrow + 3)
    return pairs + norms + left + upper + last * NUM_CLASSES + NUM_CLASSES  # shifts of left and upper


def toy_network(execution: str = "compact", multiple: int = 1) -> tuple[nn.Module, SparseNetwork]:
    net = randomise(JoinedNet(), seed=2).double()
    return net, sparse_network(net, list(JoinedNet.LAYERS), execution, multiple=multiple)


MASKS = {
    "all": {},
    "left alone": {"right": ()},
    "neither left nor right": {"left": (), "right": ()},
    "left and right apart": {"left": (0,), "right": (1,)},
    "upper empty": {"upper": ()},
    "one of upper": {"upper": (1,)},
    "only what is never masked": {"left": (), "right": (), "upper": ()},
    "mix empty": {"mix": ()},
    "narrow empty": {"narrow": ()},
    "nothing is added to the whole map": {"mix": (), "narrow": ()},
    "one channel each": {"left": (1,), "right": (1,), "upper": (2,), "mix": (0,), "last": (1,)},
}


def mask_of(case: str) -> np.ndarray:
    """All units of the layers that are not named."""
    parts = [np.isin(np.arange(width), MASKS[case].get(name, range(width))) for name, width in JoinedNet.LAYERS.items()]
    return np.concatenate(parts)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("execution", "multiple"), [("masked", 1), ("compact", 1), ("compact", 2), ("compact", 4)])
@pytest.mark.parametrize("case", MASKS)
def test_outputs_gradients_and_statistics_are_those_written_by_hand(case, execution, multiple, training):
    mask_U, (images, labels) = mask_of(case), batch()
    net, network = toy_network(execution, multiple)
    plain = copy.deepcopy(net).train(training)
    run = Reference(plain, by_layer(JoinedNet.LAYERS, mask_U, torch.float64), {})
    expected = by_hand(run, images)
    F.cross_entropy(expected, labels).backward()

    network.model.train(training)
    plan = network.plan(mask_U)
    assert np.array_equal(plan.mask_U, mask_U)  # the guard has nothing to add
    logits = network(images, plan)
    network.clear_gradients()
    F.cross_entropy(logits, labels).backward()
    torch.testing.assert_close(logits, expected, **EXACT)
    for name, parameter in plain.named_parameters():
        mine = network.model.get_parameter(name).grad
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(torch.zeros_like(wanted) if mine is None else mine, wanted, **EXACT, msg=name)
    assert set(run.statistics) == ({"bn", "bn2", "bn3"} if training else set())
    for name, (mean, var) in run.statistics.items():
        norm = network.model.get_submodule(name)
        torch.testing.assert_close((norm.running_mean, norm.running_var), (mean, var), **EXACT)


def every_mask(num_units: int) -> np.ndarray:
    return np.array(list(product([False, True], repeat=num_units)))


@pytest.mark.parametrize("unit", ["params", "flops"])
def test_the_expected_cost_is_the_mean_over_all_masks_counted_by_hand(unit):
    _, network = toy_network()
    masks_NU, cost = every_mask(network.num_units), network.expected_cost(unit)
    costs = np.array([counted(unit, mask_U) for mask_U in masks_NU])
    assert cost.dense == costs[-1]
    assert cost.fixed == costs[0]
    for seed in range(3):
        scores_U = np.random.default_rng(seed).random(network.num_units)
        value, gradient_U = cost.with_gradient(scores_U)
        weight_N = np.where(masks_NU, scores_U, 1 - scores_U).prod(1)
        assert value == pytest.approx(weight_N @ costs, rel=1e-12)
        for i in range(network.num_units):  # the mean is linear in each score
            with_i = weight_N[masks_NU[:, i]] @ costs[masks_NU[:, i]] / scores_U[i]
            without_i = weight_N[~masks_NU[:, i]] @ costs[~masks_NU[:, i]] / (1 - scores_U[i])
            assert gradient_U[i] == pytest.approx(with_i - without_i, rel=1e-9, abs=1e-9)


def test_what_a_plan_costs_is_counted_by_hand():
    _, network = toy_network()
    for mask_U in every_mask(network.num_units)[::37]:
        plan = network.plan(mask_U)
        assert network.subnet_macs(plan) == counted("flops", plan.mask_U)
        assert network.subnet_parameters(plan) == counted("params", plan.mask_U)


def test_maps_that_were_concatenated_at_different_places_are_refused():
    class Shifted(JoinedNet):
        def forward(self, x: Tensor) -> Tensor:
            both = torch.cat([self.left(x), self.upper(x)], 1) + torch.cat([self.upper(x), self.left(x)], 1)
            return self.linear(self.mix(both).mean((2, 3)))

    with pytest.raises(ValueError, match="were concatenated from different numbers of channels"):
        sparse_network(Shifted().double(), ["left", "upper", "mix"], strict=True)


class RepeatedNet(nn.Module):
    """A masked conv with a shift that may read nothing; its map stands in a concatenation twice."""

    LAYERS: ClassVar = {"first": 2, "second": 2}

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 2, 1, bias=False)
        self.second = nn.Conv2d(2, 2, 1, bias=True)
        self.always = nn.Conv2d(3, 2, 1, bias=False)
        self.wide = nn.Conv2d(4, 2, 1, bias=False)
        self.linear = nn.Linear(2, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        second = self.second(F.relu(self.first(x)))
        joined = torch.cat([second, torch.tanh(second)], 1)
        return self.linear((self.wide(joined) + self.always(x)).mean((2, 3)))


@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_a_map_that_is_there_twice_and_a_shift_that_reads_nothing(execution):
    net = randomise(RepeatedNet(), seed=3).double()
    network, (images, _) = sparse_network(net, list(RepeatedNet.LAYERS), execution), batch()
    costs = []
    for mask_U in every_mask(4):
        run = Reference(net, by_layer(RepeatedNet.LAYERS, mask_U, torch.float64), {})
        second = run.conv("second", run.conv("first", images).relu())
        joined = torch.cat([second, second.tanh()], 1)
        expected = net.linear((net.wide(joined) + net.always(images)).mean((2, 3)))
        torch.testing.assert_close(network(images, network.plan(mask_U)), expected, **EXACT)
        first, second = int(mask_U[:2].sum()), int(mask_U[2:].sum())
        costs.append(PIXELS * (3 * first + first * second + 2 * second * 2 + 3 * 2) + 2 * NUM_CLASSES)
    cost, scores_U = network.expected_cost("flops"), np.array([0.2, 0.5, 0.7, 0.9])
    weight_N = np.where(every_mask(4), scores_U, 1 - scores_U).prod(1)
    assert cost(scores_U) == pytest.approx(weight_N @ np.array(costs), rel=1e-12)
