"""Expectations over all masks of a few units. They are finite sums, so the tests compare them exactly."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from utils.algorithm.estimators.base import Estimator
from utils.algorithm.estimators.linear_cv_gates import LinearControlVariate
from utils.algorithm.estimators.taylor import Taylor

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def variance_of(scores_U: Tensor) -> Tensor:
    """Of one unit of each mask."""
    return scores_U * (1 - scores_U)


def all_masks(num_units: int) -> Tensor:
    """(2^U, U) bool, every mask once."""
    return torch.tensor(list(product([False, True], repeat=num_units)))


def probabilities(scores_U: Tensor, masks_NU: Tensor) -> Tensor:
    """(N,) the probability of each mask."""
    return torch.where(masks_NU, scores_U, 1 - scores_U).prod(1)


def all_draws(scores_U: Tensor, table_N: Tensor, num_masks: int) -> tuple[Tensor, Tensor, Tensor]:
    """All D draws of a step: probability (D,), masks (D, K, U) and losses (D, K). The table has a loss per mask."""
    masks_NU = all_masks(len(scores_U))
    draws = torch.tensor(list(product(range(len(masks_NU)), repeat=num_masks)))
    return probabilities(scores_U, masks_NU)[draws].prod(1), masks_NU[draws], table_N[draws]


def moments(
    estimator: Estimator, scores_U: Tensor, table_N: Tensor, num_masks: int | None = None
) -> tuple[Tensor, Tensor]:
    """Exact mean and variance of an estimate; by default of the fewest masks."""
    probability_D, masks_DKU, losses_DK = all_draws(scores_U, table_N, num_masks or estimator.fewest_masks)
    estimates_DU = torch.vmap(lambda masks_KU, losses_K: estimator.gradient(scores_U, masks_KU, losses_K))(
        masks_DKU, losses_DK
    )
    mean_U = probability_D @ estimates_DU
    return mean_U, probability_D @ (estimates_DU - mean_U) ** 2


def expected_loss(scores_U: Tensor, table_N: Tensor) -> Tensor:
    return probabilities(scores_U, all_masks(len(scores_U))) @ table_N


def true_gradient(scores_U: Tensor, table_N: Tensor) -> Tensor:
    """E[L | m_i = 1] - E[L | m_i = 0], which is the derivative because E[L] is linear in each score."""
    gradient_U = torch.empty_like(scores_U)
    for i in range(len(scores_U)):
        kept_U, dropped_U = scores_U.clone(), scores_U.clone()
        kept_U[i], dropped_U[i] = 1.0, 0.0
        gradient_U[i] = expected_loss(kept_U, table_N) - expected_loss(dropped_U, table_N)
    return gradient_U


def random_table(num_units: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scores in (0, 1), and a loss for every mask."""
    generator = torch.Generator().manual_seed(seed)
    scores_U = 0.05 + 0.9 * torch.rand(num_units, generator=generator, dtype=torch.float64)
    return scores_U, torch.randn(2**num_units, generator=generator, dtype=torch.float64) * 2 + 1


def linear_table(effects_U: Tensor) -> Tensor:
    return all_masks(len(effects_U)).double() @ effects_U


def interaction_table(scores_U: Tensor, *units: int) -> Tensor:
    """prod over units of (m - s): an interaction without any effect of fewer units."""
    return (all_masks(len(scores_U)).double() - scores_U)[:, list(units)].prod(1)


def with_memory(cls: type[Estimator], scores_U: Tensor, effects_U: Tensor, alpha: float = 0.5, scale: float = 1.0):
    """An estimator that believes in the given effects. Half of them, and as much again, come from the curvature."""
    estimator = cls(scores_U, alpha)
    if isinstance(estimator, Taylor):
        estimator.num_seen_U = torch.full_like(scores_U, 60.0)
        estimator.slope_U, estimator.curvature_U = 1.5 * effects_U.to(scores_U), effects_U.to(scores_U)
    if isinstance(estimator, LinearControlVariate):
        estimator.covariance, estimator.power = scores_U.new_tensor(0.3 * scale), scores_U.new_tensor(0.3)
    return estimator


def random_draw(num_masks: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores_U = 0.1 + 0.8 * torch.rand(12, generator=generator, dtype=torch.float64)
    masks_KU = torch.rand((num_masks, 12), generator=generator, dtype=torch.float64) < scores_U
    return scores_U, masks_KU, torch.randn(num_masks, generator=generator, dtype=torch.float64)
