"""REINFORCE: the score gradient without any baseline, as the yardstick of the other estimators."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from utils.algorithm.estimators.base import Estimator, variance_power


class Reinforce(Estimator):
    """Judges every mask by its loss alone.

        g = 1 / K * sum_k L_k * z_k,    z_k = (m_k - s) / (s (1 - s))^(1 - alpha)

    A constant in the loss is pure noise here. The estimate costs K forward passes, and one is enough. It is not 0 where
    the masks agree.

    Source: Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", 1992;
        preconditioned as VR-PGE.
    """

    fewest_masks: ClassVar[int] = 1

    def gradient(self, scores_U: Tensor, masks_KU: Tensor, losses_K: Tensor) -> Tensor:
        weighted_U = losses_K.to(scores_U.dtype) @ (masks_KU.to(scores_U.dtype) - scores_U)
        scale_U, saturated_U = variance_power(scores_U, 1 - self.alpha)
        return (weighted_U / (scale_U * len(losses_K))).masked_fill(saturated_U, 0.0)
