"""Every estimator by exact enumeration: mean, variance against VR-PGE's, and what the memories learn.

Random numbers only pick the toys; every expectation is a finite sum over all masks (antithetic pairs: over the cells
into which a unit's uniform number can fall), through the samplers where they are not independent draws.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise, product
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.algorithm.test_estimator import all_masks, probabilities, random_table, true_gradient
from tests.toy import one_thread  # noqa: F401
from utils.algorithm.estimator import disarm_gradient, vrpge_gradient
from utils.algorithm.estimators import (
    BASELINE_RATE,
    ESTIMATORS,
    GATE_RATE,
    REGRESSION_RATE,
    BaselineMemory,
    GateMemory,
    Gates,
    LinearMemory,
    Memory,
    gate_gradients,
    linear_cv_gradient,
    shrinkage_gradient,
    taylor_gradient,
    update_baseline,
    update_gates,
    update_linear,
)
from utils.algorithm.masks import sample_antithetic_pair

ALPHAS = (0.5, 0.75)
UNBIASED = [name for name, estimator in ESTIMATORS.items() if not estimator.biased]
ANTITHETIC = ("disarm", "linear_cv_disarm")
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


Draws = tuple[Tensor, Tensor]  # (N,) probabilities and (N, K, U) masks of all that can be drawn in a step


@cache
def antithetic_pairs(scores: tuple[float, ...]) -> Draws:
    """The sampler is fed the middle of every cell that the edges s and 1 - s leave of the unit interval."""
    cells = []
    for s in scores:
        edges = [0.0, *sorted((s, 1 - s)), 1.0]
        cells.append([((low + high) / 2, high - low) for low, high in pairwise(edges) if high > low])
    pairs, volumes = [], []
    for combination in product(*cells):
        middles, widths = (vector(*values) for values in zip(*combination, strict=True))
        with patch.object(torch, "rand", lambda shape, middles=middles, **_: middles.reshape(shape)):
            pairs.append(sample_antithetic_pair(vector(*scores), torch.Generator()))
        volumes.append(widths.prod())
    return torch.stack(volumes), torch.stack(pairs)


@cache
def independent_draws(scores: tuple[float, ...], num_masks: int) -> Draws:
    masks_NU = all_masks(len(scores))
    draws = torch.tensor(list(product(range(len(masks_NU)), repeat=num_masks)))
    return probabilities(vector(*scores), masks_NU)[draws].prod(1), masks_NU[draws]


def draws(name: str, scores_U: Tensor, num_masks: int = 2) -> Draws:
    scores = tuple(scores_U.tolist())
    return antithetic_pairs(scores) if name in ANTITHETIC else independent_draws(scores, num_masks)


def look_up(table_N: Tensor, masks_KU: Tensor) -> Tensor:
    """The losses of masks; the table is in the order of `all_masks`."""
    powers = 2 ** torch.arange(masks_KU.shape[1] - 1, -1, -1)
    return table_N[(masks_KU * powers).sum(1)]


def losses_of(name: str, table_N: Tensor, masks_KU: Tensor) -> Tensor:
    """As the estimator wants them; a table with two rows holds one for each part of the batch."""
    if name != "subbatch":
        return look_up(table_N, masks_KU)
    tables = table_N.expand(len(masks_KU) - 1, -1)
    return torch.stack([look_up(table, masks_KU[[0, 1 + p]]) for p, table in enumerate(tables)])


def moments(name, scores_U, table_N, memory=None, alpha=0.5, num_masks=2, batch_noise=(0.0,)):
    """Exact mean and variance of the estimate; `batch_noise` are shifts of all losses of a batch, equally likely."""

    def estimate(masks_KU: Tensor, shift: float) -> Tensor:
        losses = losses_of(name, table_N, masks_KU) + shift
        return ESTIMATORS[name].gradient(scores_U, masks_KU, losses, alpha, memory)

    probability_N, masks_NKU = draws(name, scores_U, num_masks)
    estimates = [torch.vmap(lambda masks_KU, c=c: estimate(masks_KU, c))(masks_NKU) for c in batch_noise]
    mean_U = sum(probability_N @ g_NU for g_NU in estimates) / len(estimates)
    return mean_U, sum(probability_N @ (g_NU - mean_U) ** 2 for g_NU in estimates) / len(estimates)


def variance(*args, **options) -> Tensor:
    return moments(*args, **options)[1]


def linear_memory(effects_U: Tensor, scale: float = 1.0) -> LinearMemory:
    return LinearMemory(effects_U, covariance=scalar(0.3 * scale), power=scalar(0.3))


def baseline_memory(loss: float, surprise: float, mask_variance: float) -> BaselineMemory:
    return BaselineMemory(torch.tensor(1000), scalar(loss), scalar(surprise), scalar(mask_variance))


def gate_memory(effects_U: Tensor, scale: float = 1.0) -> GateMemory:
    """Half of the effects, and as much again, come from the curvature."""
    seen_U = torch.full_like(effects_U, 60.0)
    return GateMemory(seen_U, 1.5 * effects_U, effects_U, covariance=scalar(0.3 * scale), power=scalar(0.3))


def arbitrary_memory(name: str, num_units: int) -> Memory | None:
    if name == "shrinkage":
        return baseline_memory(loss=-0.7, surprise=1.1, mask_variance=1.3)  # mix = 0.45 / 1.75 for two masks
    if ESTIMATORS[name].reads_gates:
        return gate_memory(vector(1.7, -0.4, 0.9, -2.2)[:num_units], scale=0.6)
    if name.startswith("linear_cv"):
        return linear_memory(vector(1.7, -0.4, 0.9, -2.2)[:num_units], scale=0.6)
    return None


def linear_table(effects_U: Tensor) -> Tensor:
    return all_masks(len(effects_U)).double() @ effects_U


def interaction_table(scores_U: Tensor, *units: int) -> Tensor:
    """prod over units of (m - s): an interaction without any effect of fewer units."""
    return (all_masks(len(scores_U)).double() - scores_U)[:, list(units)].prod(1)


def pairwise_table(scores_U: Tensor, seed: int) -> Tensor:
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return sum(weights[i, j] * interaction_table(scores_U, i, j) for i in range(4) for j in range(i))


def v(scores_U: Tensor) -> Tensor:
    return scores_U * (1 - scores_U)


def q(scores_U: Tensor) -> Tensor:
    return torch.minimum(scores_U, 1 - scores_U)


SCORES = vector(0.2, 0.5, 0.65, 0.9)
EFFECTS = vector(1.5, -0.6, 0.8, 0.3)


# --- the mean -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    ("name", "num_units", "num_masks"),
    [
        *[(name, 4, 2) for name in UNBIASED if name != "subbatch"],
        *[(name, 3, 3) for name in ("vrpge", "shrinkage", "linear_cv", "subbatch")],
        ("reinforce", 4, 1),
    ],
)
def test_the_mean_is_the_preconditioned_gradient_whatever_is_remembered(name, num_units, num_masks, alpha):
    scores_U, table_N = random_table(num_units, seed=num_units)
    if name == "subbatch":
        table_N = torch.stack([table_N, table_N.roll(3)])  # every part has its own losses
    mean, _ = moments(name, scores_U, table_N, arbitrary_memory(name, num_units), alpha, num_masks)
    expected = v(scores_U) ** alpha * true_gradient(scores_U, table_N.reshape(-1, 2**num_units).mean(0))
    torch.testing.assert_close(mean, expected, rtol=1e-11, atol=1e-12)


def test_the_antithetic_sampler_keeps_the_scores_and_differs_as_often_as_can_be():
    scores_U = vector(0.0, 0.2, 0.5, 0.65, 1.0)
    probability_N, masks_N2U = antithetic_pairs(tuple(scores_U.tolist()))
    assert probability_N.sum().item() == pytest.approx(1, abs=1e-14)
    for mask in (0, 1):
        kept_U = probability_N @ masks_N2U[:, mask].double()
        torch.testing.assert_close(kept_U, scores_U, rtol=0, atol=1e-14)
    differ_U = probability_N @ (masks_N2U[:, 0] != masks_N2U[:, 1]).double()
    torch.testing.assert_close(differ_U, 2 * q(scores_U), rtol=0, atol=1e-14)


@pytest.mark.parametrize("uniform", [0.0, 1 - torch.finfo(torch.float32).eps / 2])
def test_no_uniform_number_draws_a_zero_or_drops_a_one(uniform):
    with patch.object(torch, "rand", lambda shape, **_: torch.full(shape, uniform)):
        masks_2U = sample_antithetic_pair(torch.tensor([0.0, 1.0]), torch.Generator())
    assert masks_2U.tolist() == [[False, True]] * 2


def test_units_of_an_antithetic_pair_are_independent_and_only_the_generator_is_used():
    state = torch.get_rng_state()
    scores_U = torch.full((20_000,), 0.3)
    masks_2U = sample_antithetic_pair(scores_U, torch.Generator().manual_seed(1))
    assert torch.equal(masks_2U, sample_antithetic_pair(scores_U, torch.Generator().manual_seed(1)))
    assert torch.equal(state, torch.get_rng_state())
    own, other = masks_2U.double()
    neighbours = torch.corrcoef(torch.stack([own[:-1], own[1:], other[1:]]))[0, 1:]
    assert (neighbours.abs() < 5 / 20_000**0.5).all()
    with pytest.raises(ValueError, match="must be 2, got 3"):
        sample_antithetic_pair(scores_U, torch.Generator(), 3)


# --- single draws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_runs_on_its_fewest_masks_and_saturated_scores_get_exactly_zero(name, dtype):
    estimator = ESTIMATORS[name]
    scores_U = torch.tensor([0.0, 1.0, 0.4, 0.6, torch.finfo(dtype).tiny, 0.0, 1.0], dtype=dtype)
    masks_KU = estimator.sample(scores_U, torch.Generator().manual_seed(0), estimator.fewest)
    assert masks_KU.shape == (estimator.fewest, 7)
    assert masks_KU.dtype == torch.bool
    masks_KU[:, 2:] = torch.tensor([True, False, True, True, False])
    masks_KU[1:, 2:] ^= True  # they contradict two of the saturated scores, as masks drawn before a projection may
    losses = torch.tensor([2.0, 1.0], dtype=dtype)[: len(masks_KU)]
    memory = arbitrary_memory(name, 4)
    if isinstance(memory, LinearMemory):
        memory = LinearMemory(*(value.to(dtype) for value in (torch.ones(7), memory.covariance, memory.power)))
    elif isinstance(memory, GateMemory):
        memory = GateMemory(
            *(torch.ones(() if value.dim() == 0 else 7, dtype=dtype) for value in vars(memory).values())
        )
    elif memory is not None:
        floats = (memory.loss, memory.surprise, memory.mask_variance)
        memory = BaselineMemory(memory.num_steps, *(value.to(dtype) for value in floats))
    gradient = estimator.gradient(scores_U, masks_KU, losses[None] if name == "subbatch" else losses, 0.5, memory)
    assert gradient.dtype == dtype
    assert gradient[[0, 1, 5, 6]].tolist() == [0.0] * 4
    assert torch.isfinite(gradient).all()
    assert (gradient[2:5] != 0).all()


def random_draw(num_masks: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores_U = 0.1 + 0.8 * torch.rand(12, generator=generator, dtype=torch.float64)
    masks_KU = torch.rand((num_masks, 12), generator=generator, dtype=torch.float64) < scores_U
    return scores_U, masks_KU, torch.randn(num_masks, generator=generator, dtype=torch.float64)


def test_disarm_is_its_formula():
    scores_U, masks_2U, losses_2 = random_draw(2)
    difference = (losses_2[0] - losses_2[1]) / 2 * (masks_2U[0].double() - masks_2U[1].double())
    expected = v(scores_U) ** 0.75 * difference / q(scores_U)
    torch.testing.assert_close(disarm_gradient(scores_U, masks_2U, losses_2, 0.75), expected, **EXACT)


@pytest.mark.parametrize("num_masks", [2, 3])
def test_shrinkage_is_its_formula(num_masks):
    scores_U, masks_KU, losses_K = random_draw(num_masks)
    memory = baseline_memory(loss=0.4, surprise=1.1, mask_variance=1.3)
    batch_variance = 1.1 - 1.3 / num_masks
    mix = batch_variance / (batch_variance + 1.3 / (num_masks - 1))
    expected = torch.zeros(12, dtype=torch.float64)
    for k in range(num_masks):
        others = torch.stack([losses_K[j] for j in range(num_masks) if j != k]).mean()
        z = (masks_KU[k].double() - scores_U) / v(scores_U) ** 0.25
        expected += (losses_K[k] - mix * others - (1 - mix) * 0.4) * z / num_masks
    torch.testing.assert_close(shrinkage_gradient(scores_U, masks_KU, losses_K, 0.75, memory), expected, **EXACT)


@pytest.mark.parametrize(("base", "coupling"), [(vrpge_gradient, v), (disarm_gradient, q)])
def test_linear_cv_is_its_formula(base, coupling):
    scores_U, masks_2U, losses_2 = random_draw(2)
    effects_U = torch.linspace(-1, 2, 12, dtype=torch.float64)
    difference_U = masks_2U[0].double() - masks_2U[1].double()
    left_over = losses_2[0] - losses_2[1] - 0.6 * effects_U @ difference_U
    expected = v(scores_U) ** 0.75 * (0.6 * effects_U + left_over / 2 * difference_U / coupling(scores_U))
    gradient = linear_cv_gradient(scores_U, masks_2U, losses_2, 0.75, linear_memory(effects_U, 0.6), base)
    torch.testing.assert_close(gradient, expected, **EXACT)


@pytest.mark.parametrize("name", UNBIASED)
def test_where_the_masks_agree_there_is_no_rounding_noise(name):
    """Adam would make whole steps of it. What is left there is what the formula leaves."""
    generator = torch.Generator().manual_seed(3)
    scores_U = torch.tensor([0.3, 0.5, 0.9, 1 - 1e-6, 0.5])
    masks_KU = torch.tensor([[True, False, True, True, False], [True, False, True, True, True]])
    effects_U = torch.tensor([0.3, -1.1, 0.7, 2.0, 0.1])
    memory = LinearMemory(effects_U, torch.tensor(1.0), torch.tensor(1.0)) if name.startswith("linear_cv") else None
    if name == "linear_cv_gates":
        memory = GateMemory(torch.ones(5), effects_U, torch.zeros(5), torch.tensor(1.0), torch.tensor(1.0))
    if name == "shrinkage":
        memory = BaselineMemory.start(scores_U)
    for _ in range(20):
        losses = 2.3 + 0.1 * torch.rand(2, generator=generator)
        arguments = (scores_U, masks_KU, losses[None] if name == "subbatch" else losses, 0.5, memory)
        gradient = ESTIMATORS[name].gradient(*arguments)
        if name == "reinforce":
            assert (gradient != 0).all()
        else:
            left = (scores_U * (1 - scores_U)) ** 0.5 * effects_U if name.startswith("linear_cv") else 0 * scores_U
            assert torch.equal(gradient[:4], left[:4])
            assert gradient[4] != left[4]


@pytest.mark.parametrize(
    ("name", "plain"),
    [("shrinkage", "vrpge"), ("linear_cv", "vrpge"), ("linear_cv_gates", "vrpge"), ("linear_cv_disarm", "disarm")],
)
def test_an_empty_memory_changes_not_a_bit(name, plain):
    scores_U, masks_KU, losses_K = random_draw(2)
    learning, without = ESTIMATORS[name], ESTIMATORS[plain]
    expected = without.gradient(scores_U, masks_KU, losses_K, 0.5, None)
    assert torch.equal(learning.gradient(scores_U, masks_KU, losses_K, 0.5, learning.start(scores_U)), expected)


# --- the variance, against VR-PGE's ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "coupling"), [("vrpge", v), ("disarm", q)])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_variance_of_a_linear_loss_is_the_closed_form(name, coupling, alpha):
    """Var g_i = w_i^2 (1 / (2 c_i) - 1) + sum_{j != i} w_j^2 c_j / c_i, before preconditioning."""
    c = coupling(SCORES)
    own = EFFECTS**2 * (1 / (2 * c) - 1)
    others = ((EFFECTS**2 * c).sum() - EFFECTS**2 * c) / c
    ours = variance(name, SCORES, linear_table(EFFECTS), alpha=alpha)
    torch.testing.assert_close(ours, v(SCORES) ** (2 * alpha) * (own + others), **EXACT)


def test_disarm_halves_its_own_term_at_a_half_where_it_is_exact():
    half, table_N = vector(0.5), linear_table(vector(1.5))
    mean, spread = moments("disarm", half, table_N)
    plain_mean, plain_spread = moments("vrpge", half, table_N)
    assert spread.item() == 0
    torch.testing.assert_close(mean**2 + spread, (plain_mean**2 + plain_spread) / 2, **EXACT)


@pytest.mark.parametrize(
    ("own", "others", "factor"),
    [(0.3, 0.3, 1.0), (0.02, 0.5, 2 * 0.98), (0.5, 0.02, 0.5 / 0.98), (0.9, 0.7, 0.9 / 0.7)],
)
def test_what_disarm_does_to_the_noise_of_other_units_depends_on_who_is_decided(own, others, factor):
    """Nothing among equal scores; nearly twice as much, or half as much, where the own score differs."""
    scores_U, table_N = vector(own, others, others, others), linear_table(vector(0.0, 1.0, -0.5, 2.0))
    ratio = variance("disarm", scores_U, table_N)[0] / variance("vrpge", scores_U, table_N)[0]
    assert ratio.item() == pytest.approx(factor, rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_disarm_cancels_pairwise_effects_all_of_them_at_a_half(seed):
    half = torch.full((4,), 0.5, dtype=torch.float64)
    plain = variance("vrpge", half, pairwise_table(half, seed))
    assert (plain > 0.05).all()
    torch.testing.assert_close(variance("disarm", half, pairwise_table(half, seed)), 0 * plain, rtol=0, atol=1e-13)
    table_N = pairwise_table(SCORES, seed)
    assert (variance("disarm", SCORES, table_N) < variance("vrpge", SCORES, table_N)).all()


def test_disarm_is_not_better_for_every_loss_without_linear_effects():
    """Three undecided units that only act together, seen from a decided one: nearly twice the noise."""
    scores_U = vector(0.02, 0.5, 0.5, 0.5)
    table_N = interaction_table(scores_U, 1, 2, 3)
    assert true_gradient(scores_U, table_N).abs().max() < 1e-15
    plain, antithetic = (variance(name, scores_U, table_N) for name in ("vrpge", "disarm"))
    assert (antithetic[0] / plain[0]).item() == pytest.approx(2 * 0.98, rel=1e-10)


@pytest.mark.parametrize(("name", "coupling"), [("linear_cv", v), ("linear_cv_disarm", q)])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_linear_cv_leaves_the_noise_of_what_it_does_not_know(name, coupling, scale):
    known = vector(1.4, 0.2, 0.8, -0.3)
    error, c = EFFECTS - scale * known, coupling(SCORES)
    noise = error**2 * (1 / (2 * c) - 1) + ((error**2 * c).sum() - error**2 * c) / c
    ours = variance(name, SCORES, linear_table(EFFECTS), linear_memory(known, scale))
    torch.testing.assert_close(ours, v(SCORES) * noise, **EXACT)
    nothing_left = variance(name, SCORES, linear_table(EFFECTS), linear_memory(EFFECTS))
    torch.testing.assert_close(nothing_left, 0 * noise, rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", range(3))
def test_a_mixed_loss_orders_the_estimators(seed):
    """Mostly linear, some pairwise effects: both control variates win by far, with antithetic pairs once more."""
    table_N = linear_table(EFFECTS) + 0.5 * pairwise_table(SCORES, seed)
    memory = linear_memory(true_gradient(SCORES, table_N))
    plain, disarm = (variance(name, SCORES, table_N).sum() for name in ("vrpge", "disarm"))
    cv, both = (variance(name, SCORES, table_N, memory).sum() for name in ("linear_cv", "linear_cv_disarm"))
    assert both < 0.8 * cv
    assert cv < 0.2 * disarm  # alone it leaves the noise of linear effects
    assert disarm < plain


def test_exact_effects_are_no_promise_where_interactions_rule():
    """Where the masks differ on the decided unit, the slope of the other is 1 - a (0.97 - 1/2) = 0, not its mean 1."""
    scores_U = vector(0.97, 0.5)
    table_N = linear_table(vector(0.0, 1.0)) + 1 / 0.47 * interaction_table(scores_U, 0, 1)
    memory = linear_memory(true_gradient(scores_U, table_N))
    torch.testing.assert_close(memory.effects_U, vector(0.0, 1.0), **EXACT)
    assert variance("linear_cv", scores_U, table_N, memory)[0] > 1.8 * variance("vrpge", scores_U, table_N)[0]


def baseline_of(scores_U: Tensor, table_N: Tensor, noise: float) -> BaselineMemory:
    """What a memory converges to: exact moments of the loss for batches that shift it by +noise or -noise."""
    probability_N = probabilities(scores_U, all_masks(len(scores_U)))
    mean = probability_N @ table_N
    mask_variance = (probability_N @ (table_N - mean) ** 2).item()
    return baseline_memory(mean.item(), noise**2 + mask_variance / 2, mask_variance)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0, 3.0])
def test_shrinkage_scales_the_noise_of_others_by_half_of_one_plus_mix(ratio):
    effects_U = vector(0.0, 1.0, -0.5, 2.0)  # the first unit makes no noise of its own
    table_N = linear_table(effects_U)
    sigma = (effects_U**2 * v(SCORES)).sum().sqrt().item()
    memory = baseline_of(SCORES, table_N, ratio * sigma)
    mix = ratio**2 / (ratio**2 + 1)
    assert memory.mix(2).item() == pytest.approx(mix, abs=1e-12)
    noise = (-ratio * sigma, ratio * sigma)
    shrunk, plain = (
        variance(name, SCORES, table_N, m, batch_noise=noise) for name, m in (("shrinkage", memory), ("vrpge", None))
    )
    assert (shrunk[0] / plain[0]).item() == pytest.approx((1 + mix) / 2, rel=1e-10)
    # no other mix is better
    for other in (0.0, 0.5 * mix, 0.5 + 0.5 * mix):
        batch_variance = other * sigma**2 / (1 - other)
        wrong = baseline_memory(memory.loss.item(), batch_variance + sigma**2 / 2, sigma**2)
        assert variance("shrinkage", SCORES, table_N, wrong, batch_noise=noise)[0] >= shrunk[0] * (1 - 1e-12)


@pytest.mark.parametrize(("ratio", "worse"), [(0.9, False), (1.1, True)])
def test_the_running_mean_alone_loses_as_soon_as_batches_differ_more_than_masks(ratio, worse):
    effects_U = vector(0.0, 1.0, -0.5, 2.0)
    table_N = linear_table(effects_U)
    sigma = (effects_U**2 * v(SCORES)).sum().sqrt().item()
    mean_only = baseline_memory((SCORES @ effects_U).item(), 0.0, sigma**2)
    assert mean_only.mix(2) == 0
    noise = (-ratio * sigma, ratio * sigma)
    alone = variance("shrinkage", SCORES, table_N, mean_only, batch_noise=noise)[0]
    plain = variance("vrpge", SCORES, table_N, batch_noise=noise)[0]
    assert (alone / plain).item() == pytest.approx((1 + ratio**2) / 2, rel=1e-10)
    assert (alone > plain) == worse


@pytest.mark.parametrize("seed", range(4))
def test_shrinkage_is_never_worse_on_random_tables(seed):
    scores_U, table_N = random_table(3, seed)
    for noise in (0.3, 3.0):
        memory = baseline_of(scores_U, table_N, noise)
        shrunk = variance("shrinkage", scores_U, table_N, memory, batch_noise=(-noise, noise))
        assert (shrunk <= variance("vrpge", scores_U, table_N)).all()  # which batch noise does not touch


@pytest.mark.parametrize(("num_parts", "num_units"), [(1, 3), (2, 3), (3, 2)])
def test_parts_divide_the_noise_of_others_by_the_rule(num_parts, num_units):
    scores_U, effects_U = SCORES[:num_units], vector(0.0, 1.0, -0.5)[:num_units]
    table_N = linear_table(effects_U)
    ours = variance("subbatch", scores_U, table_N, num_masks=1 + num_parts)[0]
    ratio = ours / variance("vrpge", scores_U, table_N)[0]
    assert ratio.item() == pytest.approx((1 + 3 / num_parts) / 4, rel=1e-10)


@pytest.mark.parametrize("seed", range(2))
def test_reinforce_pays_for_a_constant_and_the_others_do_not(seed):
    scores_U, table_N = random_table(3, seed)
    for name in ("vrpge", "disarm", "linear_cv"):
        memory = arbitrary_memory(name, 3)
        without, shifted = (variance(name, scores_U, table_N + c, memory) for c in (0.0, 50.0))
        torch.testing.assert_close(shifted, without, rtol=1e-8, atol=1e-9)
    assert (variance("reinforce", scores_U, table_N + 50) > 100 * variance("vrpge", scores_U, table_N)).all()


# --- the memories ---------------------------------------------------------------------------------------------------


def test_a_baseline_memory_starts_as_a_plain_mean_and_trusts_it_late():
    memory = BaselineMemory.start(SCORES)
    losses = [vector(2.0, 4.0), vector(1.0, 2.0), vector(3.0, 3.0)]
    for losses_2 in losses:
        memory = update_baseline(memory, losses_2)
    assert memory.loss.item() == pytest.approx((3.0 + 1.5 + 3.0) / 3)
    assert memory.mask_variance.item() == pytest.approx((2.0 + 0.5 + 0.0) / 3)
    assert memory.surprise.item() == pytest.approx((1.5**2 + 0.75**2) / 2)  # 1.5 against 3, 3 against 2.25
    for _ in range(round(1 / BASELINE_RATE) - 4):
        assert memory.mix(2) == 1
        memory = update_baseline(memory, vector(1.0, 2.0))
    assert update_baseline(update_baseline(memory, vector(1.0, 2.0)), vector(1.0, 2.0)).mix(2) < 1


def test_the_true_moments_are_where_a_baseline_memory_stays_on_average():
    """So it learns the variance over masks and the error of its own mean, with nothing left out or counted twice."""
    scores_U, table_N = random_table(3, seed=2)
    memory = baseline_of(scores_U, table_N, noise=1.7)
    mean = torch.zeros(3, dtype=torch.float64)
    for probability, masks_2U in zip(*draws("vrpge", scores_U), strict=True):
        for shift in (-1.7, 1.7):
            after = update_baseline(memory, look_up(table_N, masks_2U) + shift)
            mean += probability / 2 * torch.stack([after.loss, after.surprise, after.mask_variance])
    torch.testing.assert_close(mean, torch.stack([memory.loss, memory.surprise, memory.mask_variance]), **EXACT)
    moved = update_baseline(baseline_memory(0.0, 0.0, 0.0), vector(2.0, 4.0))
    torch.testing.assert_close(
        torch.stack([moved.loss, moved.surprise, moved.mask_variance]), BASELINE_RATE * vector(3, 9, 2)
    )


@pytest.mark.parametrize("num_masks", [2, 3])
def test_no_update_takes_effects_further_from_a_linear_truth(num_masks):
    """Two masks: the squared error falls by exactly rate (2 - rate) (error of the forecast)^2 / |m - m'|^2."""
    generator = torch.Generator().manual_seed(num_masks)
    scores_U = torch.cat([vector(0.01, 0.99), 0.1 + 0.8 * torch.rand(10, generator=generator, dtype=torch.float64)])
    truth_U = torch.randn(12, generator=generator, dtype=torch.float64)
    memory = LinearMemory.start(scores_U)
    for _ in range(200):
        masks_KU = torch.rand((num_masks, 12), generator=generator, dtype=torch.float64) < scores_U
        after = update_linear(memory, masks_KU, 5 + masks_KU.double() @ truth_U)
        before_U, after_U = memory.effects_U - truth_U, after.effects_U - truth_U
        assert after_U.norm() <= before_U.norm()
        if num_masks == 2:
            difference_U = masks_KU[0].double() - masks_KU[1].double()
            fall = REGRESSION_RATE * (2 - REGRESSION_RATE) * (before_U @ difference_U) ** 2
            fall = fall / (difference_U**2).sum().clamp(min=1)
            torch.testing.assert_close(before_U @ before_U - after_U @ after_U, fall, rtol=1e-9, atol=1e-11)
        memory = after
    assert (memory.effects_U - truth_U)[2:].norm() < 0.2 * truth_U[2:].norm()


def test_masks_that_agree_everywhere_teach_nothing():
    memory = update_linear(linear_memory(EFFECTS), torch.ones((2, 4), dtype=torch.bool), vector(1.0, 1.0))
    assert torch.equal(memory.effects_U, EFFECTS)
    assert memory.scale == 1


@pytest.mark.parametrize(("factor", "scale"), [(1.0, 1.0), (2.0, 0.5), (-1.0, 0.0), (0.5, 1.0)])
@pytest.mark.parametrize("name", ["linear_cv", "linear_cv_disarm"])
def test_the_scale_is_the_regression_of_losses_on_forecasts_within_its_bounds(name, factor, scale):
    """Expected increments by enumeration; interactions do not bias it."""
    table_N = linear_table(EFFECTS) + pairwise_table(SCORES, 0)
    memory = LinearMemory(factor * true_gradient(SCORES, table_N), scalar(0.0), scalar(0.0))
    covariance, power = scalar(0.0), scalar(0.0)
    for probability, masks_2U in zip(*draws(name, SCORES), strict=True):
        after = update_linear(memory, masks_2U, look_up(table_N, masks_2U))
        covariance, power = covariance + probability * after.covariance, power + probability * after.power
    fitted = LinearMemory(memory.effects_U, covariance, power)
    assert (covariance / power).item() == pytest.approx(1 / factor, rel=1e-9)
    assert fitted.scale.item() == pytest.approx(scale, abs=1e-9)


def gates_of(values: Tensor, observed: list[bool], num_images: int = 8) -> Gates:
    return Gates(values, torch.tensor(observed), num_images)


def test_gates_teach_the_units_that_were_observed():
    memory, nothing = gate_memory(EFFECTS), torch.zeros(2, 4, dtype=torch.bool)
    seen = [True, False, True, False]
    after = update_gates(memory, nothing, vector(1.0, 1.0), gates_of(vector(1.0, float("nan"), -3.0, 7.0), seen))
    values, seen_U = vector(1.0, 0.0, -3.0, 0.0), torch.tensor(seen)
    slope = torch.where(seen_U, memory.slope_U + GATE_RATE * (values - memory.slope_U), memory.slope_U)
    square = 8 * (values - memory.slope_U) ** 2 + memory.slope_U**2
    curvature = torch.where(seen_U, memory.curvature_U + GATE_RATE * (square - memory.curvature_U), memory.curvature_U)
    torch.testing.assert_close(after.slope_U, slope, **EXACT)
    torch.testing.assert_close(after.curvature_U, curvature, **EXACT)
    assert after.num_seen_U.tolist() == [61.0, 60.0, 61.0, 60.0]


def test_the_scale_of_gates_judges_the_effects_of_earlier_steps():
    masks_2U = torch.tensor([[True, False, True, False], [True, True, False, False]])
    gates = gates_of(vector(9.0, 9.0, 9.0, 9.0), [True] * 4)
    ours = update_gates(gate_memory(EFFECTS), masks_2U, vector(1.0, 2.0), gates)
    other = update_linear(linear_memory(EFFECTS), masks_2U, vector(1.0, 2.0))
    torch.testing.assert_close(ours.covariance, other.covariance, **EXACT)
    torch.testing.assert_close(ours.power, other.power, **EXACT)


def test_means_over_batches_become_the_moments_of_examples():
    """Gates of examples are normal with these means and deviations; a batch shows the mean of 16."""
    generator = torch.Generator().manual_seed(2)
    mean_U, deviation_U = vector(0.5, -1.0, 0.0), vector(0.2, 1.0, 0.7)
    memory, single = GateMemory.start(mean_U), []
    for _ in range(3000):
        examples = mean_U + deviation_U * torch.randn(16, 3, generator=generator, dtype=torch.float64)
        gates = gates_of(examples.mean(0), [True] * 3, 16)
        memory = update_gates(memory, torch.ones(1, 3, dtype=torch.bool), vector(1.0), gates)
        single.append((memory.slope_U, memory.curvature_U))
    slope, curvature = (torch.stack(values[1000:]).mean(0) for values in zip(*single, strict=True))
    torch.testing.assert_close(slope, mean_U, rtol=0, atol=0.02)
    torch.testing.assert_close(curvature, deviation_U**2 + mean_U**2, rtol=0.05, atol=0.01)


def test_the_expansion_forecasts_what_dropping_costs():
    """One gate on the logit of a model that the labels follow, where the Fisher information is the curvature."""
    inputs = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    logits = 0.4 * inputs
    right = logits.sigmoid()

    def loss(gate: float) -> Tensor:
        return -(right * F.logsigmoid(gate * logits) + (1 - right) * F.logsigmoid(-gate * logits)).mean()

    slopes = {label: (right if label else 1 - right, logits * (logits.sigmoid() - label)) for label in (0, 1)}
    slope = sum((weight * values).mean() for weight, values in slopes.values())
    curvature = sum((weight * values**2).mean() for weight, values in slopes.values())
    memory = GateMemory(vector(9.0), slope[None], curvature[None], scalar(0.0), scalar(0.0))
    gradient = taylor_gradient(vector(0.5), torch.ones(1, 1, dtype=torch.bool), vector(1.0), 0.5, memory)
    assert (2 * gradient).item() == pytest.approx((loss(1.0) - loss(0.0)).item(), rel=0.06)
    assert abs(slope) < 1e-12  # all of it is curvature


def learnt(name: str, table_N: Tensor, noise: float, num_steps: int) -> BaselineMemory | LinearMemory:
    """The memory after steps with masks from the sampler, losses from the table and noise shared by a batch."""
    estimator, generator = ESTIMATORS[name], torch.Generator().manual_seed(5)
    memory = estimator.start(SCORES)
    for _ in range(num_steps):
        masks_2U = estimator.sample(SCORES, generator, 2)
        shift = noise * torch.randn((), generator=generator, dtype=torch.float64)
        memory = estimator.update(memory, masks_2U, look_up(table_N, masks_2U) + shift, None)
    return memory


def test_what_is_learnt_beats_vrpge():
    """Learnt from samples, judged by enumeration."""
    table_N = linear_table(EFFECTS) + 0.3 * pairwise_table(SCORES, 1) + 2.3
    plain = variance("vrpge", SCORES, table_N).sum()
    for name, bound in (("linear_cv", 0.15), ("linear_cv_disarm", 0.15)):
        memory = learnt(name, table_N, noise=3.0, num_steps=400)
        assert variance(name, SCORES, table_N, memory).sum() < bound * plain
    memory = learnt("shrinkage", table_N, noise=0.2, num_steps=400)
    assert variance("shrinkage", SCORES, table_N, memory, batch_noise=(-0.2, 0.2)).sum() < 0.7 * plain


@pytest.mark.parametrize("name", ["shrinkage", "linear_cv"])
def test_memories_are_plain_tensors_that_nothing_changes_in_place(name, tmp_path):
    estimator = ESTIMATORS[name]
    scores_U, masks_KU, losses_K = random_draw(2)
    memory = estimator.update(estimator.start(scores_U), masks_KU, losses_K)
    torch.save(vars(memory), tmp_path / "memory.pt")
    losses_K.requires_grad_()
    estimator.gradient(scores_U, masks_KU, losses_K.detach(), 0.5, memory)
    after = estimator.update(memory, masks_KU.flip(1), losses_K)
    assert not any(value.requires_grad for value in vars(after).values())
    restored = type(memory)(**torch.load(tmp_path / "memory.pt", weights_only=True))
    assert all(torch.equal(value, getattr(restored, key)) for key, value in vars(memory).items())
    again = estimator.update(restored, masks_KU.flip(1), losses_K)
    assert all(torch.equal(value, getattr(again, key)) for key, value in vars(after).items())
    assert any(not torch.equal(value, getattr(after, key)) for key, value in vars(memory).items())


# --- gates ----------------------------------------------------------------------------------------------------------


class GatedNet(nn.Module):
    """Two convolutions with their batch-norms, every channel multiplied by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(3)])
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor, gates: list[Tensor]) -> Tensor:
        for conv, norm, gate in zip(self.convs, self.norms, gates, strict=True):
            x = F.relu(norm(conv(x)) * gate.view(-1, 1, 1))
        return x.mean((2, 3))


def test_batch_norm_gradients_hold_the_gate_gradients():
    torch.manual_seed(0)
    net = GatedNet().double()
    gates = [torch.ones(width, dtype=torch.float64, requires_grad=True) for width in (4, 3)]
    images, labels = torch.randn(5, 2, 8, 8, dtype=torch.float64), torch.tensor(np.arange(5) % 3)
    F.cross_entropy(net(images, gates), labels).backward()
    for norm, gate in zip(net.norms, gates, strict=True):
        assert (gate.grad.abs() > 1e-6).any()
        torch.testing.assert_close(gate_gradients(norm), gate.grad, rtol=1e-9, atol=1e-12)
        assert not gate_gradients(norm).requires_grad
