"""The score gradient from what backward passes of earlier steps say about dropping each unit."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from utils.algorithm.estimators.base import Estimator, Gates, preconditioned

RATE = 0.02  # of the running means of gate gradients and their squares, whose noise is that of one batch


class Taylor(Estimator):
    """Expands the loss to second order in a gate that multiplies each unit, around the kept unit.

        g = (s (1 - s))^alpha * (slope - curvature / 2)

    This estimate is biased: it uses the Fisher information in place of the curvature, and leaves higher orders out. Its
    noise is that of a running mean, next to which the noise of every unbiased estimate is enormous. It needs one
    forward pass and the backward pass of the weights, and is 0 where a unit was never observed.

    Source: ours. Parts: the expansion, Theis, Korshunova, Tejani, Huszar, "Faster gaze prediction with dense networks
        and Fisher pruning", arXiv 1801.05787, and Molchanov et al. (see `gate_gradients`).

    Attributes:
        num_seen_U: (U,) steps in which the unit was observed.
        slope_U: (U,) running mean of the gate's gradient.
        curvature_U: (U,) running mean of its square over *examples*, in place of its second derivative.
    """

    fewest_masks: ClassVar[int] = 1
    most_masks: ClassVar[int | None] = 1
    needs_gates: ClassVar[bool] = True
    biased: ClassVar[bool] = True

    def __init__(self, scores_U: Tensor, alpha: float = 0.5) -> None:
        super().__init__(scores_U, alpha)
        self.num_seen_U, self.slope_U, self.curvature_U = (torch.zeros_like(scores_U) for _ in range(3))

    @property
    def effects_U(self) -> Tensor:
        """(U,) change of the loss when a kept unit is dropped, to second order, with the sign of keeping it.

        L(1) - L(0) = dL/dgate - 1/2 d2L/dgate2 + ...,    d2L/dgate2 = E (dl/dgate)^2 for a loss that is a -log p
        """
        return self.slope_U - self.curvature_U / 2

    def gradient(self, scores_U: Tensor, masks_KU: Tensor, losses_K: Tensor) -> Tensor:
        return preconditioned(scores_U, self.effects_U, self.alpha)

    def observe(self, masks_KU: Tensor, losses_K: Tensor, gates: Gates) -> None:
        """Learns from the gates of a backward pass.

        A batch shows only the mean of the gradients of its examples. This mean varies from batch to batch by 1 / B of
        what the examples vary, hence E (dl/dgate)^2 = B * variance + slope^2. Variation that comes from other masks and
        from moving weights is mistaken for that of examples and multiplied by B, so the curvature comes out too large.
        """
        observed_U = gates.observed_U
        gradients_U = torch.where(observed_U, gates.gradients_U.detach().to(self.slope_U.dtype), self.slope_U)
        num_seen_U = self.num_seen_U + observed_U
        # Plain means at first, so that nothing recalls the zeros of the start. The first gradient has no mean to differ
        # from.
        rate_U = (1 / num_seen_U.clamp(min=1)).clamp(min=RATE) * observed_U
        late_rate_U = (1 / (num_seen_U - 1).clamp(min=1)).clamp(min=RATE) * (observed_U & (num_seen_U > 1))
        squares_U = gates.num_images * (gradients_U - self.slope_U) ** 2 + self.slope_U**2
        self.num_seen_U = num_seen_U
        self.slope_U = torch.lerp(self.slope_U, gradients_U, rate_U)
        self.curvature_U = torch.lerp(self.curvature_U, squares_U, late_rate_U)


def gate_gradients(norm: nn.BatchNorm2d) -> Tensor:
    """Gradient of the loss by a gate of value 1 that multiplies each channel behind its batch-norm.

        dL/dgate = gamma * dL/dgamma + beta * dL/dbeta    since gate * (gamma x + beta) = (gate gamma) x + gate beta

    Args:
        norm: after backward and before clipping or a weight step. It must read the channels of one convolution only.
    Returns: (C,); 0 for channels that were dropped in that pass, of which nothing is observed.
    Source: the gate behind batch-norm of Molchanov, Mallya, Tyree, Frosio, Kautz, "Importance Estimation for Neural
        Network Pruning", CVPR 2019; from gradients that are there anyway: ours.
    """
    return (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).detach()
