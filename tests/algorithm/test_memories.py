"""What estimators remember: gates, the trust in them, the coin; and that a checkpoint brings it all back."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.algorithm.enumeration import (
    EXACT,
    all_draws,
    interaction_table,
    linear_table,
    random_draw,
    true_gradient,
    vector,
    with_memory,
)
from tests.toy import one_thread  # noqa: F401
from utils.algorithm.estimators.base import Estimator, Gates
from utils.algorithm.estimators.linear_cv_gates import FIT_RATE, LinearControlVariate
from utils.algorithm.estimators.reinforce import Reinforce
from utils.algorithm.estimators.taylor import RATE, Taylor, gate_gradients
from utils.algorithm.estimators.vrpge import Tossed, VRPGEEstimator, vrpge_gradient


def some_gates(seed: int, num_units: int = 12) -> Gates:
    generator = torch.Generator().manual_seed(100 + seed)
    values_U = torch.randn(num_units, generator=generator, dtype=torch.float64)
    return Gates(values_U, torch.rand(num_units, generator=generator) < 0.7, num_images=8)


def test_gates_are_learned_as_plain_means_first_and_exponentially_later():
    """Every unit by the formula of its own observations; what is not observed may hold anything."""
    generator = torch.Generator().manual_seed(1)
    plain, num_images = round(1 / RATE), 8
    estimator, seen = Taylor(vector(0.5, 0.5, 0.5)), [[], [], []]
    for step in range(2 * plain):
        values_U = torch.randn(3, generator=generator, dtype=torch.float64) + 1
        observed_U = torch.tensor([True, step % 2 == 0, False])
        gates = Gates(values_U.where(observed_U, torch.nan), observed_U, num_images)
        estimator.observe(torch.ones(1, 3, dtype=torch.bool), vector(1.0), gates)
        for unit in range(2):
            if observed_U[unit]:
                seen[unit].append(values_U[unit])
    for unit, values in enumerate(seen):
        slope, curvature = vector(0.0, 0.0)
        for count, value in enumerate(values, start=1):
            square = num_images * (value - slope) ** 2 + slope**2
            if count > 1:
                curvature = curvature + max(1 / (count - 1), RATE) * (square - curvature)
            slope = slope + max(1 / count, RATE) * (value - slope)
            if count == plain:
                torch.testing.assert_close(slope, torch.stack(values[:plain]).mean(), **EXACT)
        learned = estimator.num_seen_U[unit], estimator.slope_U[unit], estimator.curvature_U[unit]
        torch.testing.assert_close(torch.stack(learned), torch.stack([vector(len(values))[0], slope, curvature]))
    expected_U = (estimator.slope_U - estimator.curvature_U / 2) / 2  # sqrt(s (1 - s)) = 1/2
    for masks, loss in ((True, 1.0), (False, -3.0)):  # which it does not read
        gradient_U = estimator.gradient(vector(0.5, 0.5, 0.5), torch.full((1, 3), masks), vector(loss))
        torch.testing.assert_close(gradient_U, expected_U, **EXACT)
    assert gradient_U[2] == 0  # never observed
    assert (gradient_U[:2] != 0).all()


def test_the_curvature_stays_at_the_mean_square_of_examples():
    """Three examples drawn from four: the mean over all batches, once the slope is the mean of the examples."""
    examples, seen = vector(0.7, -1.0, 0.2, 2.5), []
    for batch in product(examples, repeat=3):
        estimator = with_memory(Taylor, vector(0.5), vector(0.0))
        estimator.slope_U, estimator.curvature_U = examples.mean()[None], examples.square().mean()[None]
        gates = Gates(torch.stack(batch).mean()[None], torch.tensor([True]), num_images=3)
        estimator.observe(torch.ones(1, 1, dtype=torch.bool), vector(1.0), gates)
        seen.append(torch.cat([estimator.slope_U, estimator.curvature_U]))
    stays = torch.stack([examples.mean(), examples.square().mean()])
    torch.testing.assert_close(torch.stack(seen).mean(0), stays, **EXACT)
    assert torch.stack(seen).std(0).min() > 1e-3


def test_the_expansion_forecasts_what_dropping_costs():
    """One gate on the logit of a model that the labels follow, where the Fisher information is the curvature."""
    logits = 0.4 * torch.linspace(-2, 2, 4001, dtype=torch.float64)
    right = logits.sigmoid()

    def loss(gate: float) -> Tensor:
        return -(right * F.logsigmoid(gate * logits) + (1 - right) * F.logsigmoid(-gate * logits)).mean()

    estimator = Taylor(vector(0.5))
    slopes = [(probability, logits * (right - label)) for label, probability in ((1, right), (0, 1 - right))]
    estimator.slope_U = sum((probability * slope).mean() for probability, slope in slopes)[None]
    estimator.curvature_U = sum((probability * slope**2).mean() for probability, slope in slopes)[None]
    gradient_U = estimator.gradient(vector(0.5), torch.ones(1, 1, dtype=torch.bool), vector(1.0))
    assert (2 * gradient_U).item() == pytest.approx((loss(1.0) - loss(0.0)).item(), rel=0.06)
    assert estimator.slope_U.abs().item() < 1e-12  # all of it is curvature


@pytest.mark.parametrize("num_masks", [2, 3])
@pytest.mark.parametrize(("factor", "scale"), [(1.0, 1.0), (2.0, 0.5), (-1.0, 0.0), (0.5, 1.0)])
def test_the_trust_is_the_regression_of_losses_on_earlier_forecasts_within_its_bounds(factor, scale, num_masks):
    """Expected increments by enumeration. Neither interactions nor the gates of the same step bias them."""
    scores_U = vector(0.2, 0.5, 0.65)
    table_N = linear_table(vector(1.5, -0.6, 0.8)) + 0.7 * interaction_table(scores_U, 0, 1) + 2.3
    effects_U = factor * true_gradient(scores_U, table_N)
    fitted = with_memory(LinearControlVariate, scores_U, effects_U)
    fitted.covariance, fitted.power = vector(0.0, 0.0)
    for probability, masks_KU, losses_K in zip(*all_draws(scores_U, table_N, num_masks), strict=True):
        one = with_memory(LinearControlVariate, scores_U, effects_U)
        one.observe(masks_KU, losses_K, Gates(vector(9.0, 9.0, 9.0), masks_KU[0], num_images=8))
        forecast_K = masks_KU.double() @ effects_U
        deviation_K = forecast_K - forecast_K.mean()
        expected = 0.3 * (1 - FIT_RATE) + FIT_RATE * torch.stack([losses_K @ deviation_K, forecast_K @ deviation_K])
        torch.testing.assert_close(torch.stack([one.covariance, one.power]), expected, **EXACT)
        fitted.covariance = fitted.covariance + probability * (one.covariance - 0.3 * (1 - FIT_RATE))
        fitted.power = fitted.power + probability * (one.power - 0.3 * (1 - FIT_RATE))
    assert (fitted.covariance / fitted.power).item() == pytest.approx(1 / factor, rel=1e-9)
    assert fitted.scale.item() == pytest.approx(scale, abs=1e-9)


def tossed(scores_U: Tensor, seed: int = 0) -> Tossed:
    return Tossed(VRPGEEstimator(scores_U), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", [VRPGEEstimator, Reinforce, LinearControlVariate, Taylor, tossed])
def test_a_memory_comes_back_from_its_state_and_goes_on_bit_by_bit(make, tmp_path):
    scores_U, masks_KU, losses_K = random_draw(2)
    estimator = make(scores_U)
    for step in range(3):
        estimator.observe(masks_KU.roll(step, 1), losses_K, some_gates(step))
        estimator.gradient(scores_U, masks_KU, losses_K)
    state = estimator.state_dict()
    torch.save(state, tmp_path / "memory.pt")
    untouched = {name: value.clone() for name, value in state.items()}
    with_graph_K = losses_K.clone().requires_grad_()

    def go_on(other: Estimator) -> Tensor:
        before = [other.gradient(scores_U, masks_KU, losses_K) for _ in range(20)]
        other.observe(masks_KU.flip(1), with_graph_K, some_gates(9))
        assert not any(value.requires_grad for value in other.state_dict().values())
        return torch.stack([*before, other.gradient(scores_U, masks_KU, losses_K)])

    following = go_on(estimator)
    assert all(torch.equal(state[name], value) for name, value in untouched.items())  # nothing works in place
    restored = make(scores_U)
    restored.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    assert torch.equal(go_on(restored), following)
    assert not state or not torch.equal(go_on(make(scores_U)), following)


@pytest.mark.parametrize("num_masks", [2, 3])
def test_a_coin_deals_out_the_losses_in_every_order_alike(num_masks):
    """So the mean over all orders, which is exactly 0, is the mean of the estimate, whatever the losses."""
    scores_U, masks_KU, losses_K = random_draw(num_masks)
    orders = [list(order) for order in permutations(range(num_masks))]
    by_order = torch.stack([vrpge_gradient(scores_U, masks_KU, losses_K[order]) for order in orders])
    torch.testing.assert_close(by_order.mean(0), torch.zeros_like(scores_U), **EXACT)
    assert by_order.abs().min(0).values.count_nonzero() > 2

    state, estimator, counts = torch.get_rng_state(), tossed(scores_U, seed=5), torch.zeros(len(orders))
    num_tosses = 1200
    for _ in range(num_tosses):
        gradient_U = estimator.gradient(scores_U, masks_KU, losses_K)
        counts[[torch.equal(gradient_U, one) for one in by_order].index(True)] += 1
    share = 1 / len(orders)
    assert ((counts / num_tosses - share).abs() < 5 * (share * (1 - share) / num_tosses) ** 0.5).all()
    assert torch.equal(torch.get_rng_state(), state)  # its own generator is the only randomness


def test_batch_norm_gradients_hold_the_gate_gradients():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 4, 3).double(), nn.BatchNorm2d(4).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    gate_C = torch.ones(4, dtype=torch.float64, requires_grad=True)
    maps = norm(conv(torch.randn(5, 2, 8, 8, dtype=torch.float64))) * gate_C.view(-1, 1, 1)
    F.cross_entropy(F.silu(maps).mean((2, 3)), torch.arange(5) % 4).backward()
    assert gate_C.grad.abs().min() > 1e-6
    torch.testing.assert_close(gate_gradients(norm), gate_C.grad, rtol=1e-9, atol=1e-12)
    assert not gate_gradients(norm).requires_grad
