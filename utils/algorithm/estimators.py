"""Estimators that learn from earlier steps, and every estimator by name under one signature.

A step's estimate reads memory of *earlier* steps only: given the past it is an estimate with constants, so its mean is
exact whatever has been learnt (but for `taylor`, which is nothing else than what has been learnt). `gradient` comes
first, `update` (which returns a new memory) after it.

Legend: U units, K masks drawn in one step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.algorithm.estimator import (
    disarm_gradient,
    reinforce_gradient,
    subbatch_gradient,
    variance_power,
    vrpge_gradient,
)
from utils.algorithm.masks import sample_antithetic_pair, sample_masks

BASELINE_RATE = 0.02  # 50 steps: short enough to follow the loss down, long enough for two variances
FIT_RATE = 0.01  # of the scale beta, one number
GATE_RATE = 0.02  # of gate gradients and their squares, whose noise is that of one batch
# of the regression on loss differences. It is stable below 2; the noise that it learns along is rate / (2 - rate) of
# what no linear function explains, 11 per cent here; it forgets in the order of U / rate steps
REGRESSION_RATE = 0.2


@dataclass(frozen=True)
class BaselineMemory:
    """What `shrinkage_gradient` remembers: `vars(memory)` are plain tensors for a checkpoint.

    Attributes:
        num_steps: () int64, updates so far.
        loss: () running mean mu of the losses.
        surprise: () running mean of (mean loss of the step - mu)^2, mu from the steps before it.
        mask_variance: () running variance of the loss between the masks of one step.
    """

    num_steps: Tensor
    loss: Tensor
    surprise: Tensor
    mask_variance: Tensor

    @classmethod
    def start(cls, scores_U: Tensor) -> BaselineMemory:
        num_steps = torch.zeros((), dtype=torch.int64, device=scores_U.device)
        return cls(num_steps, *(scores_U.new_zeros(()) for _ in range(3)))

    def mix(self, num_masks: int) -> Tensor:
        """() weight of the other masks' losses in the baseline, in [0, 1]; 1 is VR-PGE, as long as little is known.

        mix = b / (b + v / (K - 1)),    b: mean square error of mu as a forecast of the batch, v: variance over masks
        """
        batch_variance = (self.surprise - self.mask_variance / num_masks).clamp(min=0)
        total = batch_variance + self.mask_variance / (num_masks - 1)
        unknown = (self.num_steps * BASELINE_RATE < 1) | (total <= 0)
        return torch.where(unknown, 1.0, batch_variance / total.masked_fill(unknown, 1.0))


def shrinkage_gradient(
    scores_U: Tensor, masks_KU: Tensor, losses_K: Tensor, alpha: float, memory: BaselineMemory
) -> Tensor:
    """Score gradient with a baseline between the other masks' losses and the running mean of losses.

        g = 1 / K * sum_k (L_k - mix * mean_{j != k} L_j - (1 - mix) * mu) * z_k
          = mix * vrpge + (1 - mix) * reinforce with L - mu

    The other masks' losses know this batch but are noisy; mu is the reverse. At the best mix, which `memory` estimates,
    the noise that other units make is (1 + mix) / 2 of VR-PGE's for K = 2: between a half and all of it.

    Args:
        scores_U: (U,) in [0, 1].
        masks_KU: (K, U) bool, drawn independently from `scores_U` (not antithetic), K >= 2.
        losses_K: (K,) the mean loss of the batch under each mask.
        alpha: exponent of the preconditioner, in [0.5, 1).
        memory: of earlier steps.
    Returns: (U,), dtype of the scores; exactly 0 where a score is exactly 0 or 1. Where the masks agree it is 0 only if
        mix = 1: what mu forecasts badly moves every score a little, which Adam does not see as little.
    Cost: K forward passes.
    Source: ours. Parts: leave-one-out baseline, Kool, van Hoof, Welling, "Buy 4 REINFORCE Samples, Get a Baseline for
        Free!", ICLR 2019 workshop; running mean, Williams 1992.
    """
    mix = memory.mix(len(losses_K))
    surprises_K = losses_K.to(scores_U.dtype) - memory.loss
    among = vrpge_gradient(scores_U, masks_KU, losses_K, alpha)
    return mix * among + (1 - mix) * reinforce_gradient(scores_U, masks_KU, surprises_K, alpha)


def update_baseline(memory: BaselineMemory, losses_K: Tensor) -> BaselineMemory:
    """The memory after a step with these losses, for its next estimate.

    E (mean loss - mu)^2 is what mu misses of the batch plus 1 / K of the variance over masks, which `mix` takes off.
    That mu lags behind a falling loss is part of what it misses, as it should be.

    Args:
        losses_K: (K,) mean loss of the step's batch under each of its independent masks, K >= 2.
    Source: ours.
    """
    losses_K = losses_K.detach().to(memory.loss.dtype)
    mean = losses_K.mean()
    steps = memory.num_steps.to(mean.dtype)
    # plain means at first, so nothing recalls the zeros of the start; the first step has no mu to be surprised with
    rate = (1 / (steps + 1)).clamp(min=BASELINE_RATE)
    late_rate = (1 / steps.clamp(min=1)).clamp(min=BASELINE_RATE)
    return BaselineMemory(
        num_steps=memory.num_steps + 1,
        loss=torch.lerp(memory.loss, mean, rate),
        surprise=torch.lerp(memory.surprise, (mean - memory.loss) ** 2, late_rate),
        mask_variance=torch.lerp(memory.mask_variance, losses_K.var(), rate),
    )


@dataclass(frozen=True)
class LinearMemory:
    """What `linear_cv_gradient` remembers: `vars(memory)` are plain tensors for a checkpoint.

    Attributes:
        effects_U: (U,) learnt change of the expected loss from dropping to keeping a unit, dL/ds.
        covariance, power: () running products of the losses of a step, as they differ between its masks, with what
            `effects_U` of earlier steps forecast for them, and of the forecasts with themselves.
    """

    effects_U: Tensor
    covariance: Tensor
    power: Tensor

    @classmethod
    def start(cls, scores_U: Tensor) -> LinearMemory:
        return cls(torch.zeros_like(scores_U), scores_U.new_zeros(()), scores_U.new_zeros(()))

    @property
    def scale(self) -> Tensor:
        """() beta in [0, 1], the fitted trust in the effects; 0 is the estimator without them."""
        return _trust(self.covariance, self.power)


def _trust(covariance: Tensor, power: Tensor) -> Tensor:
    nothing = power <= 0
    return (covariance / power.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0).clamp(0, 1)


def linear_cv_gradient(
    scores_U: Tensor,
    masks_KU: Tensor,
    losses_K: Tensor,
    alpha: float,
    memory: LinearMemory | GateMemory,
    base: Callable[[Tensor, Tensor, Tensor, float], Tensor] = vrpge_gradient,
) -> Tensor:
    """Score gradient of what a linear forecast of the losses leaves over, plus that of the forecast, which is exact.

        g = (s (1 - s))^alpha * w + base(losses L_k - sum_j w_j m_kj),    w = beta * effects

    For two masks the last term is 1/2 [(L - L') - sum_j w_j (m_j - m'_j)] (m_i - m'_i) / c_i, preconditioned, where
    2 c_i is the probability that the masks differ. For a loss that is linear in the mask with effects e, the noise that
    other units make falls from sum_j e_j^2 c_j / c_i to sum_j (e_j - w_j)^2 c_j / c_i.

    Args:
        scores_U: (U,) in [0, 1].
        masks_KU: (K, U) bool as `base` wants them: independent, or an antithetic pair for `disarm_gradient`.
        losses_K: (K,) the mean loss of the batch under each mask.
        alpha: exponent of the preconditioner, in [0.5, 1).
        memory: of earlier steps; the effects may be wrong, that costs variance only.
        base: unbiased for the masks given, linear in the losses, blind to a constant in them.
    Returns: (U,), dtype of the scores; exactly 0 where a score is exactly 0 or 1, the first term alone where the masks
        agree.
    Cost: K forward passes.
    Source: ours, after Titsias, Shi, "Double Control Variates for Gradient Estimation in Discrete Latent Variable
        Models", AISTATS 2022 (arXiv 2111.05300), and Gu, Levine, Sutskever, Mnih, "MuProp", ICLR 2016, without their
        backward passes.
    """
    effects_U = memory.scale * memory.effects_U
    preconditioner_U, saturated_U = variance_power(scores_U, alpha)
    left_over_K = losses_K.to(scores_U.dtype) - _forecast(masks_KU, effects_U)
    exact_U = (preconditioner_U * effects_U).masked_fill(saturated_U, 0.0)
    return exact_U + base(scores_U, masks_KU, left_over_K, alpha)


def update_linear(memory: LinearMemory, masks_KU: Tensor, losses_K: Tensor) -> LinearMemory:
    """The memory after a step, for its next estimate.

    Effects follow the loss differences by normalised least mean squares,

        effects += rate * e (m - m') / |m - m'|^2,    e = (L - L') - sum_j effects_j (m_j - m'_j)

    which never takes them further from the truth of a linear loss, whatever the scores and the number of units. At
    s = 1/2 it is about an exponential mean of past estimates with rate REGRESSION_RATE / U. Such a mean with a rate of
    its own diverges from 2 / (U + 1) on at s = 1/2, from 2 / (U - 1 + 1 / (2 s (1 - s))) on where all share another s.

    Args:
        masks_KU: (K, U) bool, the masks of the step, in whichever coupling.
        losses_K: (K,) the mean loss of the batch under each.
    Source: ours; least mean squares is textbook.
    """
    losses_K, forecast_K = _centred(masks_KU, losses_K, memory.effects_U)
    masks_KU = masks_KU.to(forecast_K.dtype)
    differences_KU = masks_KU - masks_KU.mean(dim=0)
    size = (differences_KU**2).sum()
    step_U = (losses_K - forecast_K) @ differences_KU / size.masked_fill(size <= 0, 1.0)
    return LinearMemory(memory.effects_U + REGRESSION_RATE * step_U, *_fitted(memory, losses_K, forecast_K))


def _centred(masks_KU: Tensor, losses_K: Tensor, effects_U: Tensor) -> tuple[Tensor, Tensor]:
    """(K,) losses and what the effects forecast for them, both minus their means: as they differ between the masks."""
    losses_K = losses_K.detach().to(effects_U.dtype)
    forecast_K = _forecast(masks_KU, effects_U)
    return losses_K - losses_K.mean(), forecast_K - forecast_K.mean()


def _fitted(memory: LinearMemory | GateMemory, losses_K: Tensor, forecast_K: Tensor) -> tuple[Tensor, Tensor]:
    """`covariance` and `power` after a step."""
    covariance = torch.lerp(memory.covariance, (losses_K * forecast_K).sum(), FIT_RATE)
    return covariance, torch.lerp(memory.power, (forecast_K**2).sum(), FIT_RATE)


def _forecast(masks_KU: Tensor, effects_U: Tensor) -> Tensor:
    """(K,) sum_j effects_j m_kj up to a constant: units on which the masks agree leave no rounding noise."""
    return ((masks_KU.to(effects_U.dtype) - masks_KU[0].to(effects_U.dtype)) * effects_U).sum(dim=1)


class Gates(NamedTuple):
    """Gradients of gates at 1 that multiply units, from the backward pass of a step.

    Attributes:
        gradients_U: (U,), anything where not observed.
        observed_U: (U,) bool: kept by the mask of that pass, and with a batch-norm of its own.
        num_images: of the batch, over whose losses the gradients are a mean.
    """

    gradients_U: Tensor
    observed_U: Tensor
    num_images: int


def gate_gradients(norm: nn.BatchNorm2d) -> Tensor:
    """Gradient of the loss by a gate at 1 that multiplies each channel behind its batch-norm.

        dL/dgate = gamma * dL/dgamma + beta * dL/dbeta    since gate * (gamma x + beta) = (gate gamma) x + gate beta

    Args:
        norm: after backward and before clipping or a weight step. It must read one convolution's channels only.
    Returns: (C,); 0 for channels that were dropped in that pass, which observes nothing.
    Source: the gate behind batch-norm of Molchanov, Mallya, Tyree, Frosio, Kautz, "Importance Estimation for Neural
        Network Pruning", CVPR 2019; from gradients that are there anyway: ours.
    """
    return (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).detach()


@dataclass(frozen=True)
class GateMemory:
    """What `taylor_gradient` remembers: `vars(memory)` are plain tensors for a checkpoint.

    Attributes:
        num_seen_U: (U,) steps in which the unit was observed.
        slope_U: (U,) running mean of the gate's gradient.
        curvature_U: (U,) running mean of its square over *examples*, which stands for its second derivative.
        covariance, power: as in `LinearMemory`.
    """

    num_seen_U: Tensor
    slope_U: Tensor
    curvature_U: Tensor
    covariance: Tensor
    power: Tensor

    @classmethod
    def start(cls, scores_U: Tensor) -> GateMemory:
        return cls(*(torch.zeros_like(scores_U) for _ in range(3)), scores_U.new_zeros(()), scores_U.new_zeros(()))

    @property
    def effects_U(self) -> Tensor:
        """(U,) change of the loss when a kept unit is dropped, to second order, with the sign of keeping it.

        L(1) - L(0) = dL/dgate - 1/2 d2L/dgate2 + ...,    d2L/dgate2 = E (dl/dgate)^2 for a loss that is a -log p
        """
        return self.slope_U - self.curvature_U / 2

    @property
    def scale(self) -> Tensor:
        """() as that of `LinearMemory`."""
        return _trust(self.covariance, self.power)


def taylor_gradient(scores_U: Tensor, masks_KU: Tensor, losses_K: Tensor, alpha: float, memory: GateMemory) -> Tensor:
    """Score gradient from what earlier backward passes say of dropping each unit: no second forward pass.

        g = (s (1 - s))^alpha * (slope - curvature / 2)

    Biased: it is the gradient of the second-order expansion around the kept unit, with the Fisher information for the
    curvature. Its noise is that of a running mean, next to which that of every unbiased estimate here is enormous.

    Args:
        scores_U: (U,) in [0, 1].
        masks_KU, losses_K: not read.
        alpha: exponent of the preconditioner, in [0.5, 1).
        memory: of earlier steps.
    Returns: (U,), dtype of the scores; exactly 0 where a score is exactly 0 or 1, or a unit was never observed.
    Cost: one forward pass, and the backward pass of the weights.
    Source: ours. Parts: the expansion, Theis, Korshunova, Tejani, Huszar, "Faster gaze prediction with dense networks
        and Fisher pruning", arXiv 1801.05787, and Molchanov et al. (see `gate_gradients`).
    """
    preconditioner_U, saturated_U = variance_power(scores_U, alpha)
    return (preconditioner_U * memory.effects_U).masked_fill(saturated_U, 0.0)


def update_gates(memory: GateMemory, masks_KU: Tensor, losses_K: Tensor, gates: Gates) -> GateMemory:
    """The memory after a step, for its next estimate.

    A batch shows the mean of its examples' gradients only, but this varies from batch to batch by 1 / B of what they
    vary: E (dl/dgate)^2 = B * variance + slope^2. What other masks and moving weights make it vary is taken for
    examples too and multiplied by B, so the curvature comes out too large.

    Args:
        masks_KU: (K, U) bool, the masks of the step.
        losses_K: (K,) the mean loss of the batch under each.
        gates: what the backward pass of the first one showed.
    Source: ours.
    """
    gradients_U = torch.where(gates.observed_U, gates.gradients_U.detach().to(memory.slope_U.dtype), memory.slope_U)
    num_seen_U = memory.num_seen_U + gates.observed_U
    # plain means at first, so nothing recalls the zeros of the start; the first time has no mean to differ from
    rate_U = (1 / num_seen_U.clamp(min=1)).clamp(min=GATE_RATE) * gates.observed_U
    late_rate_U = (1 / (num_seen_U - 1).clamp(min=1)).clamp(min=GATE_RATE) * (gates.observed_U & (num_seen_U > 1))
    slope_U = torch.lerp(memory.slope_U, gradients_U, rate_U)
    squares_U = gates.num_images * (gradients_U - memory.slope_U) ** 2 + memory.slope_U**2
    losses_K, forecast_K = _centred(masks_KU, losses_K, memory.effects_U)
    return GateMemory(
        num_seen_U,
        slope_U,
        torch.lerp(memory.curvature_U, squares_U, late_rate_U),
        *_fitted(memory, losses_K, forecast_K),
    )


Memory = BaselineMemory | LinearMemory | GateMemory


@dataclass(frozen=True)
class Estimator:
    """One way to the score gradient.

    Attributes:
        sample: (scores_U, generator, num_masks) -> (num_masks, U) bool.
        gradient: (scores_U, masks_KU, losses, alpha, memory) -> (U,); losses are (K,), or (K - 1, 2) for "subbatch".
        fewest, most: how many masks it can use in a step.
        start: (scores_U) -> memory before the first step; None without memory, then `memory` is None everywhere.
        update: (memory, masks_KU, losses, gates) -> memory for the next step.
        reads_gates: whether `update` needs the gates of the first mask; the others get None.
        biased: whether its mean is not the gradient of the expected loss.
    """

    sample: Callable[[Tensor, torch.Generator, int], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor, float, Memory | None], Tensor]
    fewest: int = 2
    most: int | None = None
    start: Callable[[Tensor], Memory] | None = None
    update: Callable[[Memory, Tensor, Tensor, Gates | None], Memory] | None = None
    reads_gates: bool = False
    biased: bool = False


def _without_memory(gradient: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    def same_signature(scores_U: Tensor, masks_KU: Tensor, losses: Tensor, alpha: float, memory: None) -> Tensor:
        assert memory is None, "an estimator without memory was given one"
        return gradient(scores_U, masks_KU, losses, alpha)

    return same_signature


def _update_from_losses(
    memory: LinearMemory, masks_KU: Tensor, losses_K: Tensor, gates: Gates | None = None
) -> LinearMemory:
    return update_linear(memory, masks_KU, losses_K)


ESTIMATORS = {
    "vrpge": Estimator(sample_masks, _without_memory(vrpge_gradient)),
    "reinforce": Estimator(sample_masks, _without_memory(reinforce_gradient), fewest=1),
    "disarm": Estimator(sample_antithetic_pair, _without_memory(disarm_gradient), most=2),
    "shrinkage": Estimator(
        sample_masks,
        shrinkage_gradient,
        start=BaselineMemory.start,
        update=lambda memory, masks_KU, losses_K, gates=None: update_baseline(memory, losses_K),
    ),
    "linear_cv": Estimator(sample_masks, linear_cv_gradient, start=LinearMemory.start, update=_update_from_losses),
    "linear_cv_gates": Estimator(
        sample_masks, linear_cv_gradient, start=GateMemory.start, update=update_gates, reads_gates=True
    ),
    "linear_cv_disarm": Estimator(
        sample_antithetic_pair,
        partial(linear_cv_gradient, base=disarm_gradient),
        most=2,
        start=LinearMemory.start,
        update=_update_from_losses,
    ),
    "subbatch": Estimator(sample_masks, _without_memory(subbatch_gradient)),
    "taylor": Estimator(
        sample_masks,
        taylor_gradient,
        fewest=1,
        most=1,
        start=GateMemory.start,
        update=update_gates,
        reads_gates=True,
        biased=True,
    ),
}
