"""Every estimator of the score gradient: its mean and its variance by enumeration, its formula and its zeros."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from tests.algorithm.enumeration import (
    EXACT,
    all_draws,
    interaction_table,
    linear_table,
    moments,
    random_draw,
    random_table,
    true_gradient,
    variance_of,
    vector,
    with_memory,
)
from tests.toy import one_thread  # noqa: F401
from utils.algorithm.estimators.base import Estimator, Gates
from utils.algorithm.estimators.linear_cv_gates import LinearControlVariate
from utils.algorithm.estimators.reinforce import Reinforce
from utils.algorithm.estimators.taylor import Taylor
from utils.algorithm.estimators.vrpge import VRPGEEstimator, vrpge_gradient

CLASSES = [VRPGEEstimator, Reinforce, LinearControlVariate, Taylor]
ALPHAS = (0.5, 0.75)
SCORES = vector(0.2, 0.5, 0.65, 0.9)
EFFECTS = vector(1.5, -0.6, 0.8, 0.3)


def variance(estimator: Estimator, scores_U: Tensor, table_N: Tensor, num_masks: int | None = None) -> Tensor:
    return moments(estimator, scores_U, table_N, num_masks)[1]


# --- the mean -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    ("cls", "num_units", "num_masks"),
    [
        (VRPGEEstimator, 4, 2),
        (VRPGEEstimator, 3, 3),
        (Reinforce, 4, 1),
        (Reinforce, 3, 3),
        (LinearControlVariate, 4, 2),
        (LinearControlVariate, 3, 3),
    ],
)
def test_the_mean_is_the_preconditioned_gradient_whatever_is_remembered(cls, num_units, num_masks, alpha, scale):
    scores_U, table_N = random_table(num_units, seed=num_units)
    estimator = with_memory(cls, scores_U, vector(1.7, -0.4, 0.9, -2.2)[:num_units], alpha, scale)
    mean_U, _ = moments(estimator, scores_U, table_N, num_masks)
    expected_U = variance_of(scores_U) ** alpha * true_gradient(scores_U, table_N)
    torch.testing.assert_close(mean_U, expected_U, **EXACT)


@pytest.mark.parametrize("cls", CLASSES)
def test_biased_says_whether_the_mean_may_be_another_one(cls):
    scores_U, table_N = random_table(3, seed=1)
    mean_U, _ = moments(with_memory(cls, scores_U, EFFECTS[:3]), scores_U, table_N)
    error_U = mean_U - variance_of(scores_U).sqrt() * true_gradient(scores_U, table_N)
    assert cls.biased == bool(error_U.abs().max() > 1e-9)


def test_the_mean_holds_after_every_observation_and_would_not_if_a_step_knew_its_own():
    scores_U, table_N = random_table(2, seed=3)
    exact_U = variance_of(scores_U).sqrt() * true_gradient(scores_U, table_N)
    too_early_U = torch.zeros(2, dtype=torch.float64)
    for probability, masks_2U, losses_2 in zip(*all_draws(scores_U, table_N, 2), strict=True):
        # the gates of a step depend on its first mask, as those of a network do
        gates = Gates(losses_2[0] * vector(0.5, -0.2), masks_2U[0], num_images=4)
        estimator = with_memory(LinearControlVariate, scores_U, vector(0.3, 0.4))
        estimator.observe(masks_2U, losses_2, gates)
        torch.testing.assert_close(moments(estimator, scores_U, table_N)[0], exact_U, **EXACT)
        too_early_U += probability * estimator.gradient(scores_U, masks_2U, losses_2)
    assert ((too_early_U - exact_U).abs() > 1e-5).all()


# --- formulas and exact zeros ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("num_masks", [2, 3, 4])
def test_vrpge_is_the_mean_of_the_released_two_mask_form_over_all_pairs(num_masks, alpha):
    scores_U, masks_KU, losses_K = random_draw(num_masks)
    z_KU = (masks_KU.double() - scores_U) / variance_of(scores_U) ** (1 - alpha)
    pairs = list(combinations(range(num_masks), 2))
    expected_U = sum((losses_K[i] - losses_K[j]) / 2 * (z_KU[i] - z_KU[j]) for i, j in pairs) / len(pairs)
    torch.testing.assert_close(vrpge_gradient(scores_U, masks_KU, losses_K, alpha), expected_U, **EXACT)


@pytest.mark.parametrize("num_masks", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [0.1, 2.3025851, 1e-3])
def test_equal_losses_give_exactly_zero(num_masks, dtype, loss):
    scores_U, masks_KU, _ = random_draw(num_masks)
    gradient_U = vrpge_gradient(scores_U.to(dtype), masks_KU, torch.full((num_masks,), loss, dtype=dtype))
    assert gradient_U.count_nonzero() == 0


@pytest.mark.parametrize("cls", [VRPGEEstimator, Reinforce, LinearControlVariate])
def test_where_the_masks_agree_there_is_no_rounding_noise(cls):
    """Adam would make whole steps of it. What is left there is what the formula leaves."""
    generator = torch.Generator().manual_seed(3)
    scores_U = torch.tensor([0.3, 0.5, 0.9, 1 - 1e-6, 0.5])
    masks_KU = torch.tensor([[True, False, True, True, False], [True, False, True, True, True]])
    effects_U = torch.tensor([0.3, -1.1, 0.7, 2.0, 0.1])
    estimator = with_memory(cls, scores_U, effects_U)
    for _ in range(20):
        losses_K = 2.3 + 0.1 * torch.rand(2, generator=generator)
        gradient_U = estimator.gradient(scores_U, masks_KU, losses_K)
        if cls is Reinforce:
            assert (gradient_U != 0).all()
            continue
        left_U = variance_of(scores_U).sqrt() * effects_U if cls is LinearControlVariate else torch.zeros(5)
        torch.testing.assert_close(gradient_U[:4], left_U[:4], rtol=1e-6, atol=0)
        assert gradient_U[4] != left_U[4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("cls", CLASSES)
def test_saturated_scores_get_exactly_zero_and_others_a_finite_estimate(cls, alpha, dtype):
    """With the fewest masks that the estimator says it can do with."""
    scores_U = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.4, 0.6, torch.finfo(dtype).tiny, 1 - 1e-7], dtype=dtype)
    # the masks contradict the scores, as masks that were drawn before a projection may
    masks_KU = torch.tensor([[True, False, False, True, True, False, True, False]] * cls.fewest_masks)
    masks_KU[1:] ^= True
    losses_K = torch.tensor([2.0, 1.0], dtype=torch.float64)[: cls.fewest_masks]
    gradient_U = with_memory(cls, scores_U, torch.ones(8), alpha).gradient(scores_U, masks_KU, losses_K)
    assert gradient_U.dtype == dtype
    assert gradient_U[:4].tolist() == [0.0] * 4
    assert torch.isfinite(gradient_U).all()
    assert (gradient_U[4:] != 0).all()


def test_an_empty_memory_changes_not_a_bit():
    scores_U, masks_KU, losses_K = random_draw(2)
    estimates = [cls(scores_U).gradient(scores_U, masks_KU, losses_K) for cls in (LinearControlVariate, VRPGEEstimator)]
    assert torch.equal(*estimates)


# --- the variance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("known", "scale"), [(None, 0.0), ((1.4, 0.2, 0.8, -0.3), 1.0), ((1.4, 0.2, 0.8, -0.3), 0.6)])
def test_variance_of_a_linear_loss_is_the_closed_form_for_what_is_not_known_of_it(known, scale, alpha):
    """Var g_i = e_i^2 (1 / (2 v_i) - 1) + sum_{j != i} e_j^2 v_j / v_i, before preconditioning."""
    estimator, error_U, v_U = VRPGEEstimator(SCORES, alpha), EFFECTS, variance_of(SCORES)
    if known is not None:
        error_U = EFFECTS - scale * vector(*known)
        estimator = with_memory(LinearControlVariate, SCORES, vector(*known), alpha, scale)
    own_U = error_U**2 * (1 / (2 * v_U) - 1)
    others_U = ((error_U**2 * v_U).sum() - error_U**2 * v_U) / v_U
    ours_U = variance(estimator, SCORES, linear_table(EFFECTS))
    torch.testing.assert_close(ours_U, v_U ** (2 * alpha) * (own_U + others_U), **EXACT)


def test_exact_effects_leave_no_noise_of_a_linear_loss_but_may_hurt_where_interactions_rule():
    """Where the masks differ on the decided unit, the slope of the other is 1 - a (0.97 - 1/2) = 0, not its mean 1."""
    exact = with_memory(LinearControlVariate, SCORES, EFFECTS)
    assert variance(exact, SCORES, linear_table(EFFECTS)).max() < 1e-13
    scores_U = vector(0.97, 0.5)
    table_N = linear_table(vector(0.0, 1.0)) + 1 / 0.47 * interaction_table(scores_U, 0, 1)
    exact = with_memory(LinearControlVariate, scores_U, true_gradient(scores_U, table_N))
    torch.testing.assert_close(exact.effects_U, vector(0.0, 1.0), **EXACT)
    assert variance(exact, scores_U, table_N)[0] > 1.8 * variance(VRPGEEstimator(scores_U), scores_U, table_N)[0]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("seed", range(3))
def test_the_one_sided_form_of_the_paper_has_the_same_mean_and_never_less_variance(seed, alpha):
    class OneSided(Estimator):
        def gradient(self, scores_U: Tensor, masks_KU: Tensor, losses_K: Tensor) -> Tensor:
            return (
                (losses_K[0] - losses_K[1]) * (masks_KU[0].double() - scores_U) / variance_of(scores_U) ** (1 - alpha)
            )

    scores_U, table_N = random_table(3, seed)
    ours, paper = (moments(cls(scores_U, alpha), scores_U, table_N) for cls in (VRPGEEstimator, OneSided))
    torch.testing.assert_close(ours[0], paper[0], **EXACT)
    assert (ours[1] <= paper[1] * (1 + 1e-12)).all()
    assert (ours[1] < 0.99 * paper[1]).any()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("side", [0, 1])
def test_variance_is_bounded_at_the_edges_where_that_of_plain_reinforce_is_not(alpha, side):
    _, table_N = random_table(3, seed=4)
    spread, plain = (table_N.max() - table_N.min()) ** 2, []
    for edge in (1e-2, 1e-4, 1e-6):
        scores_U = vector(abs(side - edge), 0.4, 0.6)
        # E (z - z')^2 = 2 (s (1 - s))^(2 alpha - 1) <= 2, and |L - L'| / 2 <= spread / 2
        assert (variance(VRPGEEstimator(scores_U, alpha), scores_U, table_N) <= spread / 2).all()
        plain.append(variance(Reinforce(scores_U, alpha=0.0), scores_U, table_N)[0])
    assert all(after / before > 50 for before, after in pairwise(plain))  # each step is a factor of 100 in s


@pytest.mark.parametrize("num_masks", [1, 2, 3])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_constant_is_pure_noise_to_reinforce_and_nothing_to_the_others(num_masks, alpha):
    scores_U, table_N = SCORES[:3], torch.full((8,), 50.0, dtype=torch.float64)
    expected_U = 50.0**2 * variance_of(scores_U) ** (2 * alpha - 1) / num_masks
    ours_U = variance(Reinforce(scores_U, alpha), scores_U, table_N, num_masks)
    torch.testing.assert_close(ours_U, expected_U, **EXACT)
    _, table_N = random_table(3, seed=5)
    for cls in (VRPGEEstimator, LinearControlVariate):
        estimator = with_memory(cls, scores_U, EFFECTS[:3], alpha)
        without_U, shifted_U = (variance(estimator, scores_U, table_N + shift) for shift in (0.0, 50.0))
        torch.testing.assert_close(shifted_U, without_U, rtol=1e-9, atol=1e-10)
