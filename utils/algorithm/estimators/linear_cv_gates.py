"""VR-PGE with a linear control variate, whose coefficients come from the gates of backward passes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from utils.algorithm.estimators.base import Gates, preconditioned
from utils.algorithm.estimators.taylor import Taylor
from utils.algorithm.estimators.vrpge import vrpge_gradient

FIT_RATE = 0.01  # of the scale of the forecast, one number


class LinearControlVariate(Taylor):
    """Forecasts the losses by a linear function of the mask, and leaves only the rest to VR-PGE.

        g = (s (1 - s))^alpha * w + vrpge(losses L_k - sum_j w_j m_kj),    w = scale * effects

    The gradient of the forecast is exact, and the effects that it uses are those of `Taylor`. Wrong effects cost
    variance but no bias. For a loss that is linear in the mask with effects e, the noise that other units make falls
    from sum_j e_j^2 c_j / c_i to sum_j (e_j - w_j)^2 c_j / c_i, where 2 c_i is the probability that two masks differ on
    unit i. It costs K forward passes, and the backward pass of the weights.

    Source: ours, after Titsias, Shi, "Double Control Variates for Gradient Estimation in Discrete Latent Variable
        Models", AISTATS 2022 (arXiv 2111.05300), and Gu, Levine, Sutskever, Mnih, "MuProp", ICLR 2016, without their
        additional backward passes.

    Attributes:
        covariance, power: () running products of the losses of a step, as they differ between its masks, with what the
            effects of earlier steps forecast for them, and of the forecasts with themselves.
    """

    fewest_masks: ClassVar[int] = 2
    most_masks: ClassVar[int | None] = None
    biased: ClassVar[bool] = False

    def __init__(self, scores_U: Tensor, alpha: float = 0.5) -> None:
        super().__init__(scores_U, alpha)
        self.covariance, self.power = scores_U.new_zeros(()), scores_U.new_zeros(())

    @property
    def scale(self) -> Tensor:
        """() in [0, 1], the fitted trust in the effects; 0 is VR-PGE alone."""
        nothing = self.power <= 0
        return (self.covariance / self.power.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0).clamp(0, 1)

    def gradient(self, scores_U: Tensor, masks_KU: Tensor, losses_K: Tensor) -> Tensor:
        """The estimate; where the masks agree, the exact gradient of the forecast alone."""
        effects_U = self.scale * self.effects_U
        left_over_K = losses_K.to(scores_U.dtype) - forecast(masks_KU, effects_U)
        exact_U = preconditioned(scores_U, effects_U, self.alpha)
        return exact_U + vrpge_gradient(scores_U, masks_KU, left_over_K, self.alpha)

    def observe(self, masks_KU: Tensor, losses_K: Tensor, gates: Gates) -> None:
        """Learns the trust from how well the effects of earlier steps forecast these losses, then the effects."""
        losses_K = losses_K.detach().to(self.slope_U.dtype)
        losses_K = losses_K - losses_K.mean()
        forecast_K = forecast(masks_KU, self.effects_U)
        forecast_K = forecast_K - forecast_K.mean()
        self.covariance = torch.lerp(self.covariance, (losses_K * forecast_K).sum(), FIT_RATE)
        self.power = torch.lerp(self.power, (forecast_K**2).sum(), FIT_RATE)
        super().observe(masks_KU, losses_K, gates)


def forecast(masks_KU: Tensor, effects_U: Tensor) -> Tensor:
    """(K,) sum_j effects_j m_kj up to a constant. Units on which the masks agree leave no rounding noise."""
    return ((masks_KU.to(effects_U.dtype) - masks_KU[0].to(effects_U.dtype)) * effects_U).sum(dim=1)
