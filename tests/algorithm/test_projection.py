"""The projections onto box and budget: properties that define them, and slow references that bisect."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.channels.small import SMALL, graph_of
from tests.toy import NETWORKS
from utils.algorithm import projection
from utils.algorithm.projection import project_onto_budget, project_onto_cost
from utils.channels.cost import COUNTS, ExpectedCost

# Some values are common on purpose: ties, the corners of the box, differences of exactly 1 (coinciding breaks).
VALUES = st.one_of(
    st.sampled_from([-1.5, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.25, 1.5, 2.0]),
    st.floats(-3.0, 4.0, allow_nan=False, width=32),
)


REPEATABLE = settings(deadline=None, derandomize=True, database=None)
ROUNDING = 1e-14  # of float64 sums; it shows where the budget itself is next to nothing


@st.composite
def problems(draw) -> tuple[Tensor, float]:
    """Scores in float64 and a budget they may or may not meet."""
    scores = draw(st.lists(VALUES, min_size=1, max_size=12))
    fraction = draw(st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.0, 1.0)))
    return torch.tensor(scores, dtype=torch.float64), fraction * len(scores)


def bisected(scores_U: Tensor, budget: float) -> tuple[np.ndarray, float]:
    """Slow reference: bisection for v, in numpy, to the last bit."""
    z = scores_U.double().numpy()
    if z.clip(0, 1).sum() <= budget:
        return z.clip(0, 1), 0.0
    low, high = 0.0, max(float(z.max()), 0.0)
    for _ in range(80):
        middle = (low + high) / 2
        if (z - middle).clip(0, 1).sum() > budget:
            low = middle
        else:
            high = middle
    return (z - high).clip(0, 1), high


def sorted_reference(scores_U: Tensor, budget: float) -> np.ndarray:
    """Slow reference: tries every segment between two breaks and solves the linear equation in it."""
    z = scores_U.double().numpy()
    if z.clip(0, 1).sum() <= budget:
        return z.clip(0, 1)
    breaks = sorted({0.0, *(b for b in np.concatenate([z, z - 1]) if b > 0)})
    for left, right in pairwise(breaks):
        at_left, at_right = (z - left).clip(0, 1).sum(), (z - right).clip(0, 1).sum()
        if at_right <= budget:
            v = left + (at_left - budget) / (at_left - at_right) * (right - left)
            return (z - v).clip(0, 1)
    raise AssertionError("the budget was never met")


@settings(REPEATABLE, max_examples=100)
@given(problems())
@example((torch.tensor([0.5, 1.5, 0.5, 1.5], dtype=torch.float64), 2.0))
@example((torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), 1.0))
@example((torch.tensor([0.3], dtype=torch.float64), 0.0))
@example((torch.tensor([-1.0, -2.0], dtype=torch.float64), 0.0))
def test_feasible_optimal_and_equal_to_slow_references(problem):
    scores_U, budget = problem
    projected, v = project_onto_budget(scores_U, budget)
    # feasible
    assert projected.min() >= 0
    assert projected.max() <= 1
    assert projected.sum() <= budget * (1 + 1e-6) + ROUNDING
    # KKT: the form, the sign of the multiplier, complementary slackness
    assert v >= 0
    torch.testing.assert_close(projected, (scores_U - v).clamp(0, 1), rtol=0, atol=1e-12)
    assert abs(v * (budget - projected.sum())) <= 1e-9
    # slow references
    np.testing.assert_allclose(projected.numpy(), bisected(scores_U, budget)[0], rtol=0, atol=1e-10)
    np.testing.assert_allclose(projected.numpy(), sorted_reference(scores_U, budget), rtol=0, atol=1e-10)


@settings(REPEATABLE, max_examples=50)
@given(problems())
def test_v_is_the_smallest_feasible(problem):
    scores_U, budget = problem
    _, v = project_onto_budget(scores_U, budget)
    if v > 1e-6:
        assert (scores_U - (v - 1e-6)).clamp(0, 1).sum() > budget
    else:
        assert scores_U.clamp(0, 1).sum() <= budget + 1e-5


@settings(REPEATABLE, max_examples=100)
@given(problems())
def test_idempotent(problem):
    scores_U, budget = problem
    once, _ = project_onto_budget(scores_U, budget)
    twice, v = project_onto_budget(once, budget)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-12)
    assert v <= 1e-12


@settings(REPEATABLE, max_examples=100)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12), st.floats(0.0, 1.0))
def test_identity_inside(scores, slack):
    scores_U = torch.tensor(scores, dtype=torch.float64)
    total = float(scores_U.sum())
    projected, v = project_onto_budget(scores_U, min(total + slack, len(scores)))
    assert torch.equal(projected, scores_U)
    assert v == 0


@settings(REPEATABLE, max_examples=100)
@given(problems())
def test_order_is_preserved_and_ties_stay_ties(problem):
    scores_U, budget = problem
    projected, _ = project_onto_budget(scores_U, budget)
    order = scores_U.argsort(stable=True)
    assert (projected[order].diff() >= 0).all()
    for value in scores_U.unique():
        assert projected[scores_U == value].unique().numel() == 1


@settings(REPEATABLE, max_examples=20)
@given(problems(), st.randoms(use_true_random=False))
def test_no_feasible_point_is_nearer(problem, random):
    scores_U, budget = problem
    projected, _ = project_onto_budget(scores_U, budget)
    distance = (projected - scores_U).square().sum()
    for _ in range(20):
        other = torch.tensor([random.random() for _ in scores_U], dtype=torch.float64)
        other *= min(1.0, budget / float(other.sum() + 1e-300))
        assert (other - scores_U).square().sum() >= distance - 1e-9


@pytest.mark.parametrize("keep_ratio", [0.03, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["uniform", "after a step", "equal", "saturated"])
def test_budget_holds_for_26000_scores_in_float32(keep_ratio, kind):
    generator = torch.Generator().manual_seed(0)
    num_units = 26_000
    budget = keep_ratio * num_units
    scores_U = torch.rand(num_units, generator=generator)
    if kind == "after a step":
        scores_U, _ = project_onto_budget(scores_U, budget)
        scores_U = scores_U + 0.012 * torch.randint(-1, 2, (num_units,), generator=generator)
    elif kind == "equal":
        scores_U = torch.full((num_units,), 0.95)
    elif kind == "saturated":
        scores_U = (scores_U > 0.5).float()
    projected, v = project_onto_budget(scores_U, budget)
    assert projected.dtype == v.dtype == torch.float32
    total = projected.double().sum().item()
    assert total <= budget * (1 + 1e-6)
    if scores_U.double().clamp(0, 1).sum() > budget:
        assert total >= budget * (1 - 1e-6)  # nor is any of it wasted


def test_budget_zero_leaves_nothing():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores_U = torch.rand(40, generator=generator) * 1.2
        assert project_onto_budget(scores_U, 0.0)[0].sum() <= ROUNDING


def test_the_whole_budget_is_the_box_alone():
    scores_U = torch.tensor([-0.2, 0.4, 1.3])
    projected, v = project_onto_budget(scores_U, 3)
    assert projected.tolist() == [0.0, scores_U[1].item(), 1.0]
    assert v == 0


def test_ties_share_the_budget():
    projected, v = project_onto_budget(torch.full((4,), 0.7, dtype=torch.float64), 2.0)
    torch.testing.assert_close(projected, torch.full((4,), 0.5, dtype=torch.float64))
    assert v.item() == pytest.approx(0.2)


def test_the_input_is_left_alone():
    scores_U = torch.tensor([0.9, 0.8, 0.7])
    before = scores_U.clone()
    project_onto_budget(scores_U, 1.0)
    assert torch.equal(scores_U, before)


@pytest.mark.parametrize("budget", [-0.001, 3.001, float("nan")])
def test_out_of_range_is_refused(budget):
    with pytest.raises(ValueError, match=r"budget must lie in \[0, 3\]"):
        project_onto_budget(torch.rand(3), budget)


# --- weights --------------------------------------------------------------------------------------------------------


def bisected_with_weights(z: np.ndarray, w: np.ndarray, budget: float) -> np.ndarray:
    """Slow reference: bisection for v to the last bit."""
    if w @ z.clip(0, 1) <= budget:
        return z.clip(0, 1)
    low, high = 0.0, float((z / np.where(w > 0, w, 1)).max())
    for _ in range(200):
        middle = (low + high) / 2
        if w @ (z - middle * w).clip(0, 1) > budget:
            low = middle
        else:
            high = middle
    return (z - high * w).clip(0, 1)


@settings(REPEATABLE, max_examples=100)
@given(problems(), st.data())
def test_weights(problem, data):
    scores_U, budget = problem
    weight = st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0.01, 10.0))
    w = np.array(data.draw(st.lists(weight, min_size=len(scores_U), max_size=len(scores_U))))
    budget = min(budget * w.sum() / len(w), float(torch.from_numpy(w).sum()))  # sums that differ in their rounding
    projected, v = project_onto_budget(scores_U, budget, torch.from_numpy(w))
    np.testing.assert_allclose(projected.numpy(), bisected_with_weights(scores_U.numpy(), w, budget), atol=1e-9)
    assert w @ projected.numpy() <= budget * (1 + 1e-6) + ROUNDING * max(1.0, w.max())
    assert v >= 0


@settings(REPEATABLE, max_examples=50)
@given(problems())
def test_equal_weights_are_no_weights(problem):
    scores_U, budget = problem
    plain, v = project_onto_budget(scores_U, budget)
    weighted, v_weighted = project_onto_budget(scores_U, 4 * budget, torch.full_like(scores_U, 4.0))
    torch.testing.assert_close(weighted, plain, rtol=0, atol=1e-12)
    assert 4 * v_weighted == pytest.approx(float(v), abs=1e-12)


# --- the whole budget ------------------------------------------------------------------------------------------------


def spent_by_bisection(z: np.ndarray, w: np.ndarray, budget: float) -> np.ndarray:
    """Slow reference: bisection for v of either sign over the scores above 0."""
    alive = z > 0
    low, high = -1e4, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        if w @ np.where(alive, (z - middle * w).clip(0, 1), 0) > budget:
            low = middle
        else:
            high = middle
    return np.where(alive, (z - high * w).clip(0, 1), 0)


@settings(REPEATABLE, max_examples=60)
@given(problems(), st.data())
@example((torch.tensor([0.5, 0.2, -0.1, 0.0], dtype=torch.float64), 1.5), None)
def test_a_budget_that_is_spent(problem, data):
    scores_U, budget = problem
    weights = [1.0] * len(scores_U)
    if data is not None:
        weights = data.draw(st.lists(st.floats(0.1, 10.0), min_size=len(scores_U), max_size=len(scores_U)))
    w, z = np.array(weights), scores_U.numpy()
    budget = min(budget * w.sum() / len(w), float(torch.from_numpy(w).sum()))
    given_weights = None if data is None else torch.from_numpy(w)
    projected, v = project_onto_budget(scores_U, budget, given_weights, spend=True)
    reachable = min(budget, w[z > 0].sum())
    assert w @ projected.numpy() == pytest.approx(reachable, rel=1e-9, abs=1e-12)
    assert (projected[scores_U <= 0] == 0).all()  # what has left never comes back
    np.testing.assert_allclose(projected.numpy(), spent_by_bisection(z, w, reachable), rtol=0, atol=1e-6)
    if z.clip(0, 1) @ w > budget:  # then it is the bound that binds, and nothing differs
        bound, v_bound = project_onto_budget(scores_U, budget, given_weights)
        torch.testing.assert_close(projected, bound, rtol=0, atol=1e-9)
        assert v == pytest.approx(float(v_bound), abs=1e-9)


@settings(REPEATABLE, max_examples=40)
@given(st.data())
def test_a_cost_that_is_spent(data):
    scores_U, cost, budget = data.draw(cost_problems(spread=data.draw(st.sampled_from([0.0, 2.0]))))
    projected, _ = project_onto_cost(scores_U, cost, budget, spend=True)
    most = cost((scores_U > 0).double().numpy())
    assert cost(projected.numpy()) == pytest.approx(min(budget, most), rel=2e-6)
    assert (projected[scores_U <= 0] == 0).all()
    assert projected.min() >= 0
    assert projected.max() <= 1


# --- what a network costs -------------------------------------------------------------------------------------------


@cache
def costs() -> list[ExpectedCost]:
    nets = {**NETWORKS, **SMALL}.values()
    return [ExpectedCost(graph_of(net, masks), unit) for net in nets for masks in ("free", "tied") for unit in COUNTS]


@st.composite
def cost_problems(draw, spread: float) -> tuple[Tensor, ExpectedCost, float]:
    """A network, its budget, and scores about so far from the box; many of them equal, 0 or 1."""
    cost = draw(st.sampled_from(costs()))
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    scores = 0.5 + (1 + spread) * (random.random(cost.num_units) - 0.5)
    kind = random.integers(0, 4, cost.num_units)
    scores = np.where(kind == 0, scores[0], np.where(kind == 1, random.integers(0, 2, cost.num_units), scores))
    fraction = draw(st.one_of(st.sampled_from([0.02, 0.5, 1.0]), st.floats(0.01, 1.0)))
    return torch.from_numpy(scores), cost, cost.fixed + fraction * (cost.dense - cost.fixed)


def check_feasible(scores_U: Tensor, cost: ExpectedCost, budget: float) -> tuple[Tensor, Tensor]:
    """Projects; what holds whatever the scores."""
    boxed_U = scores_U.clamp(0, 1)
    projected, v = project_onto_cost(scores_U, cost, budget)
    assert projected.dtype == scores_U.dtype
    assert projected.min() >= 0
    assert (projected <= boxed_U).all()  # so a score of 0 stays exactly that, which shrinking builds on
    if cost(boxed_U.numpy()) <= budget:
        assert torch.equal(projected, boxed_U)
        assert v == 0
    else:
        assert abs(cost(projected.numpy()) - budget) <= 1e-6 * budget
        assert v >= 0
    return projected, v


def residual(scores_U: Tensor, projected: Tensor, v: Tensor, cost: ExpectedCost) -> float:
    """How far clip(z - v g, 0, 1) is from the result, with the slopes there: 0 at a stationary point."""
    slope_U = torch.from_numpy(cost.with_gradient(projected.numpy())[1])
    stationary = (scores_U - v * slope_U / (slope_U.mean() + 1e-300)).clamp(0, 1)
    return float((projected - stationary).abs().max())


@settings(REPEATABLE, max_examples=150)
@given(cost_problems(spread=0.0), st.integers(0, 10_000))
def test_scores_one_step_away_become_a_stationary_point_of_the_distance(problem, seed):
    scores_U, cost, budget = problem
    before_U, _ = check_feasible(scores_U, cost, budget)
    steps = torch.from_numpy(np.random.default_rng(seed).choice([-0.03, 0.0, 0.02, 0.03], cost.num_units))
    after_U, v = check_feasible(before_U + steps, cost, budget)
    assert residual(before_U + steps, after_U, v, cost) <= 1e-4
    again_U, _ = project_onto_cost(after_U, cost, budget)
    torch.testing.assert_close(again_U, after_U, rtol=0, atol=1e-5)


@settings(REPEATABLE, max_examples=150)
@given(cost_problems(spread=2.0))
def test_scores_from_anywhere_meet_the_budget(problem):
    scores_U, cost, budget = problem
    with pytest.MonkeyPatch.context() as patch:
        gave_up = []
        between = projection._between
        patch.setattr(projection, "_between", lambda *points: gave_up.append(1) or between(*points))
        projected, v = check_feasible(scores_U, cost, budget)
    assert gave_up or residual(scores_U, projected, v, cost) <= 1e-2


@pytest.mark.parametrize("value", [1.0, 1.5])
def test_half_steps_where_whole_ones_go_back_and_forth(value, monkeypatch):
    cost = ExpectedCost(graph_of(NETWORKS["mixed"]), "params")
    scores_U, budget = torch.full((cost.num_units,), value), cost.fixed + 0.2 * (cost.dense - cost.fixed)
    monkeypatch.setattr(projection, "_between", None)  # not needed
    projected, v = check_feasible(scores_U.double(), cost, budget)
    assert residual(scores_U, projected, v, cost) <= 1e-3


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_the_budget_holds_even_when_the_rounds_run_out(rounds, monkeypatch):
    monkeypatch.setattr(projection, "MAX_ROUNDS", rounds)
    generator = torch.Generator().manual_seed(rounds)
    for cost in costs():
        scores_U = torch.rand(cost.num_units, generator=generator, dtype=torch.float64) * 2
        check_feasible(scores_U, cost, cost.fixed + 0.1 * (cost.dense - cost.fixed))


@settings(REPEATABLE, max_examples=100)
@given(problems())
def test_a_cost_that_is_linear_is_a_budget_of_units(problem):
    scores_U, budget = problem
    cost = linear_cost(len(scores_U))
    projected, v = project_onto_cost(scores_U, cost, cost.fixed + budget / len(scores_U) * (cost.dense - cost.fixed))
    exact, exact_v = project_onto_budget(scores_U, budget)
    torch.testing.assert_close(projected, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(v, exact_v, rtol=0, atol=1e-12)


@cache
def linear_cost(num_units: int) -> ExpectedCost:
    """One maskable layer: what it costs grows with its units alone."""

    class OneLayer(torch.nn.Sequential):
        LAYERS = ("0",)

        def __init__(self) -> None:
            layers = torch.nn.Conv2d(3, num_units, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
            super().__init__(*layers, torch.nn.Linear(num_units, 10))

    return ExpectedCost(graph_of(OneLayer), "params")


def test_a_budget_below_what_is_always_there_is_refused():
    cost = linear_cost(4)
    assert cost.fixed == 10  # the shift of the classifier
    assert (project_onto_cost(torch.rand(4), cost, 10.0)[0] == 0).all()
    with pytest.raises(ValueError, match=r"budget must be at least 10\.0 .*got 9\.5"):
        project_onto_cost(torch.rand(4), cost, 9.5)
