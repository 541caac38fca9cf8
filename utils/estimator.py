"""The variance-reduced policy gradient estimator (VR-PGE): a gradient for the scores without a backward pass.

Legend: U units, K masks drawn in one step.
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
    Returns: (U,), dtype of the scores; exactly 0 where a score is exactly 0 or 1, and everywhere if losses are equal.
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
    variance_U = scores_U * (1 - scores_U)
    saturated_U = variance_U <= 0
    scale_U = variance_U.masked_fill(saturated_U, 1.0) ** (1 - alpha)
    return (weighted_U / (scale_U * (len(losses_K) - 1))).masked_fill(saturated_U, 0.0)


def subbatch_gradient(scores_U: Tensor, masks_KU: Tensor, losses_P2: Tensor, alpha: float = 0.5) -> Tensor:
    """Score gradient from one mask on the whole batch and further masks on a part of it each.

        g = mean over parts p of vrpge(m_0, m_p; L_p(m_0), L_p(m_p))

    Each term has the mean of `vrpge_gradient` with K = 2 (the masks are independent), so has their average; the noise
    of the other units falls with the number of parts, that of the examples grows.

    Args:
        masks_KU: (1 + P, U) bool; the first is the one that the whole batch ran under.
        losses_P2: (P, 2) mean loss of part p under mask 0 and under mask 1 + p.
    Source: ours.
    """
    terms = [vrpge_gradient(scores_U, masks_KU[[0, 1 + part]], losses, alpha) for part, losses in enumerate(losses_P2)]
    return torch.stack(terms).mean(dim=0)
