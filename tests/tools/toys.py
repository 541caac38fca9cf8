"""Losses given by a table over all masks of a few units: every expectation is a finite sum."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

Estimate = Callable[[Tensor, Tensor], Tensor]  # from masks (2, U) and losses (2,) to (U,)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def all_masks(num_units: int) -> Tensor:
    """(2^U, U) bool, every mask once."""
    return torch.tensor(list(product([False, True], repeat=num_units)))


def look_up(table_N: Tensor, masks_KU: Tensor) -> Tensor:
    """The losses of masks; the table is in the order of `all_masks`."""
    return table_N[(masks_KU * 2 ** torch.arange(masks_KU.shape[1] - 1, -1, -1)).sum(1)]


def probabilities(scores_U: Tensor) -> Tensor:
    """(2^U,) of all masks."""
    return torch.where(all_masks(len(scores_U)), scores_U, 1 - scores_U).prod(1)


def true_gradient(scores_U: Tensor, table_N: Tensor) -> Tensor:
    """E[L | m_i = 1] - E[L | m_i = 0], which is the derivative because E[L] is linear in each score."""
    rows = [[scores_U.index_fill(0, torch.tensor(i), kept) for kept in (1.0, 0.0)] for i in range(len(scores_U))]
    return torch.stack([probabilities(kept) @ table_N - probabilities(dropped) @ table_N for kept, dropped in rows])


def enumerated(estimate: Estimate, scores_U: Tensor, table_N: Tensor) -> tuple[Tensor, Tensor]:
    """(D,) probabilities and (D, U) estimates of all pairs of masks."""
    masks_NU, probability_N = all_masks(len(scores_U)), probabilities(scores_U)
    pairs = list(product(range(len(masks_NU)), repeat=2))
    estimates_DU = torch.stack([estimate(masks_NU[list(pair)], table_N[list(pair)]) for pair in pairs])
    return torch.stack([probability_N[i] * probability_N[j] for i, j in pairs]), estimates_DU


def variance(estimate: Estimate, scores_U: Tensor, table_N: Tensor, batch_noise: float = 0.0) -> Tensor:
    """(U,), exact. Batches, equally likely, shift all losses by plus or minus `batch_noise`."""
    draws = [enumerated(estimate, scores_U, table_N + shift) for shift in (-batch_noise, batch_noise)]
    mean_U = sum(weight_D @ g_DU for weight_D, g_DU in draws) / 2
    return sum(weight_D @ (g_DU - mean_U) ** 2 for weight_D, g_DU in draws) / 2


def random_table(num_units: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2**num_units, generator=generator, dtype=torch.float64) * 2 + 1


def linear_table(effects_U: Tensor) -> Tensor:
    return all_masks(len(effects_U)).double() @ effects_U


def interaction_table(scores_U: Tensor, *units: int) -> Tensor:
    """prod over units of (m - s): an interaction without any effect of fewer units."""
    return (all_masks(len(scores_U)).double() - scores_U)[:, list(units)].prod(1)


def pairwise_table(scores_U: Tensor) -> Tensor:
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return sum(weights[i, j] * interaction_table(scores_U, i, j) for i in range(4) for j in range(i))
