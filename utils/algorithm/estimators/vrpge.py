"""VR-PGE: the variance-reduced policy gradient of the paper, in the K-sample form of the released code."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.algorithm.estimators.base import Estimator, variance_power


class VRPGEEstimator(Estimator):
    """Compares the loss of every mask with the mean loss of the step.

        g = 1 / (K - 1) * sum_k (L_k - mean(L)) * z_k,    z_k = (m_k - s) / (s (1 - s))^(1 - alpha)

    For K = 2 this is (L - L') / 2 * (z - z'). Its mean is (s (1 - s))^alpha times the gradient of the expected loss,
    and alpha in [1/2, 1) bounds its variance as s goes to 0 or 1. The estimate is exactly 0 where a score is exactly 0
    or 1, where all masks agree, and everywhere if the losses are equal. It costs K forward passes.

    Source: released code with alpha = 1/2. The paper's one-sided form (L - L') z has the same mean and never less
        variance.
    """

    def gradient(self, scores_U: Tensor, masks_KU: Tensor, losses_K: Tensor) -> Tensor:
        return vrpge_gradient(scores_U, masks_KU, losses_K, self.alpha)


def vrpge_gradient(scores_U: Tensor, masks_KU: Tensor, losses_K: Tensor, alpha: float = 0.5) -> Tensor:
    """The estimate of `VRPGEEstimator` as a function.

    Args:
        scores_U: (U,) in [0, 1].
        masks_KU: (K, U) bool, drawn independently from `scores_U`, K >= 2.
        losses_K: (K,) the mean loss of the batch under each mask.
        alpha: exponent of the preconditioner, in [0.5, 1).
    Returns: (U,), dtype of the scores.
    """
    losses_K = losses_K.to(scores_U.dtype)
    losses_K = losses_K - losses_K[0]  # changes nothing, but equal losses are exactly equal to their mean then
    centred_K = losses_K - losses_K.mean()
    masks_KU = masks_KU.to(scores_U.dtype)
    # The centred losses sum to zero, so s may be replaced by the mean mask. Then a unit on which all masks agree gets
    # exactly 0 instead of rounding noise, which Adam would scale up to a full step.
    weighted_U = centred_K @ (masks_KU - masks_KU.mean(dim=0))
    scale_U, saturated_U = variance_power(scores_U, 1 - alpha)
    return (weighted_U / (scale_U * (len(losses_K) - 1))).masked_fill(saturated_U, 0.0)


class Tossed(Estimator):
    """Deals the losses of a step out to its masks at random, then asks another estimator.

    For two masks, the difference of their losses gets the sign of a fair coin. What comes out of a training is what the
    schedule of the budget gives alone, without any information about the units: the control of `--method coin`.

    Args:
        estimator: one that remembers nothing. The options refuse the others, which learn from gradients that no coin
            tosses.
        coin: random generator on the device of the losses.
    """

    def __init__(self, estimator: Estimator, coin: torch.Generator) -> None:
        self.estimator, self.coin = estimator, coin

    def gradient(self, scores_U: Tensor, masks_KU: Tensor, losses_K: Tensor) -> Tensor:
        order_K = torch.rand(losses_K.shape, generator=self.coin, device=losses_K.device).argsort(dim=-1)
        return self.estimator.gradient(scores_U, masks_KU, losses_K.gather(-1, order_K))

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.estimator.state_dict(), "coin": self.coin.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.estimator.load_state_dict(state)
        self.coin.set_state(state["coin"].cpu())
