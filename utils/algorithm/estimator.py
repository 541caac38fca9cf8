"""Score gradients without a backward pass: the variance-reduced policy gradient (VR-PGE) and others without memory.

All have the same mean, (s (1 - s))^alpha times the gradient of the expected loss, so one optimizer fits them all. All
give exactly 0 where a score is exactly 0 or 1. `utils/algorithm/estimators.py` has those that learn from earlier steps,
and all of them by name.

Legend: U units, K masks drawn in one step, P parts of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def vrpge_gradient(scores_U: Tensor, masks_KU: Tensor, losses_K: Tensor, alpha: float = 0.5) -> Tensor:
    """Score gradient from K masks and the losses of the same batch under them.

        g = 1 / (K - 1) * sum_k (L_k - mean(L)) * z_k,    z_k = (m_k - s) / (s (1 - s))^(1 - alpha)

    For K = 2 this is (L - L') / 2 * (z - z'). Its mean is (s (1 - s))^alpha times the gradient of the expected loss
    when the masks are independent; alpha in [1/2, 1) bounds its variance as s goes to 0 or 1.

    Args:
        scores_U: (U,) in [0, 1].
        masks_KU: (K, U) bool, drawn independently from `scores_U`, K >= 2.
        losses_K: (K,) the mean loss of the batch under each mask.
        alpha: exponent of the preconditioner, in [0.5, 1).
    Returns: (U,), dtype of the scores; exactly 0 where a score is exactly 0 or 1, where the masks agree, and everywhere
        if losses are equal.
    Cost: K forward passes.
    Source: released code with alpha = 1/2 (`1/(K-1)` form). The paper's one-sided form (L - L') z has the same mean
        and never less variance.
    """
    losses_K = losses_K.to(scores_U.dtype)
    losses_K = losses_K - losses_K[0]  # changes nothing, but equal losses are exactly equal to their mean then
    centred_K = losses_K - losses_K.mean()
    masks_KU = masks_KU.to(scores_U.dtype)
    # The centred losses sum to zero, so s may be replaced by the mean mask: then a unit on which all masks agree gets
    # exactly 0 and not rounding noise, which Adam would blow up to a step.
    weighted_U = centred_K @ (masks_KU - masks_KU.mean(dim=0))
    scale_U, saturated_U = variance_power(scores_U, 1 - alpha)
    return (weighted_U / (scale_U * (len(losses_K) - 1))).masked_fill(saturated_U, 0.0)


def variance_power(scores_U: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """(s (1 - s))^exponent, with 1 in place of it where s is exactly 0 or 1; and where that is: (U,) bool."""
    variance_U = scores_U * (1 - scores_U)
    saturated_U = variance_U <= 0
    return variance_U.masked_fill(saturated_U, 1.0) ** exponent, saturated_U


def reinforce_gradient(scores_U: Tensor, masks_KU: Tensor, losses_K: Tensor, alpha: float = 0.5) -> Tensor:
    """Score gradient from every mask on its own.

        g = 1 / K * sum_k L_k * z_k,    z_k = (m_k - s) / (s (1 - s))^(1 - alpha)

    Unbiased whatever is drawn beside a mask. A constant in the loss is pure noise here: the yardstick, not a choice.

    Args:
        scores_U: (U,) in [0, 1].
        masks_KU: (K, U) bool, each drawn from `scores_U`, K >= 1.
        losses_K: (K,) mean losses, of the same batch or not.
        alpha: exponent of the preconditioner, in [0.5, 1).
    Returns: (U,), dtype of the scores; not 0 where the masks agree.
    Cost: K forward passes; one is enough.
    Source: Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", 1992;
        preconditioned as VR-PGE.
    """
    weighted_U = losses_K.to(scores_U.dtype) @ (masks_KU.to(scores_U.dtype) - scores_U)
    scale_U, saturated_U = variance_power(scores_U, 1 - alpha)
    return (weighted_U / (scale_U * len(losses_K))).masked_fill(saturated_U, 0.0)


def disarm_gradient(scores_U: Tensor, masks_2U: Tensor, losses_2: Tensor, alpha: float = 0.5) -> Tensor:
    """Score gradient from an antithetic pair of masks: they differ as often as two masks with these scores can.

        g = (s (1 - s))^alpha * (L - L') / 2 * (m - m') / min(s, 1 - s)

    That is VR-PGE times max(s, 1 - s). Next to independent masks, the noise that a unit makes for itself falls by this
    factor. The noise from the linear effect of unit j on unit i changes by max(s_i, 1 - s_i) / max(s_j, 1 - s_j): not
    at all among equal scores, up to twice as much for decided units among undecided ones. Effects of an even number of
    units cancel at s = 1/2.

    Args:
        scores_U: (U,) in [0, 1].
        masks_2U: (2, U) bool from `sample_antithetic_pair`. Units must be independent of each other; the two masks must
            not be.
        losses_2: (2,) mean loss of the same batch under each.
        alpha: exponent of the preconditioner, in [0.5, 1).
    Returns: (U,), dtype of the scores; exactly 0 where the masks agree, and everywhere if the losses are equal.
    Cost: two forward passes.
    Source: Dong, Mnih, Tucker, "DisARM: An Antithetic Gradient Estimator for Binary Latent Variables", NeurIPS 2020,
        whose sigma(|logit|) is max(s, 1 - s); the preconditioner is ours.
    """
    return vrpge_gradient(scores_U, masks_2U, losses_2, alpha) * torch.maximum(scores_U, 1 - scores_U)


def subbatch_gradient(scores_U: Tensor, masks_KU: Tensor, losses_P2: Tensor, alpha: float = 0.5) -> Tensor:
    """Score gradient from one mask on the whole batch and further masks on a part of it each.

        g = mean over parts p of vrpge(m_0, m_p; L_p(m_0), L_p(m_p))

    Each term has the mean of `vrpge_gradient` with K = 2 (the masks are independent), so has their average. The noise
    that the other units make falls to (1 + 3 / P) / 4 of that of K = 2, the noise of the examples grows.

    Args:
        masks_KU: (1 + P, U) bool; the first is the one that the whole batch ran under.
        losses_P2: (P, 2) mean loss of part p under mask 0 and under mask 1 + p.
    Cost: two forward passes, whatever P.
    Source: ours.
    """
    terms = [vrpge_gradient(scores_U, masks_KU[[0, 1 + part]], losses, alpha) for part, losses in enumerate(losses_P2)]
    return torch.stack(terms).mean(dim=0)
