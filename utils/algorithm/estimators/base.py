"""What every estimator of the score gradient has in common.

An estimator turns the losses of a batch under K drawn masks into a gradient for the scores, without a backward pass.
The mean of the estimate is (s (1 - s))^alpha dE[L]/ds, so that one optimizer fits all estimators; they differ in their
noise, and `Taylor` is biased. Every estimator gives exactly 0 where a score is exactly 0 or 1.

Legend: U units, K masks drawn in one step.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor


class Gates(NamedTuple):
    """Gradients of gates of value 1 that multiply units, as the backward pass of a step shows them.

    Attributes:
        gradients_U: (U,) dL/dgate; undefined where not observed.
        observed_U: (U,) bool: units that the mask of that pass kept and that have a batch-norm of their own.
        num_images: size of the batch over which the loss is a mean.
    """

    gradients_U: Tensor
    observed_U: Tensor
    num_images: int


class Estimator:
    """One way to the score gradient. It owns what it remembers of earlier steps.

    `gradient` comes first in a step and `observe` after it. Given the past, the estimate of a step therefore uses
    constants only, and its mean is exact whatever has been remembered.

    Args:
        scores_U: (U,) the scores that it will estimate gradients for: their number, dtype and device.
        alpha: exponent of the preconditioner, in [0.5, 1).

    Attributes:
        fewest_masks, most_masks: how many masks a step may draw.
        needs_gates: whether `observe` needs the gates of the first mask.
        biased: whether the mean of the estimate differs from the gradient of the expected loss.
    """

    fewest_masks: ClassVar[int] = 2
    most_masks: ClassVar[int | None] = None
    needs_gates: ClassVar[bool] = False
    biased: ClassVar[bool] = False

    def __init__(self, scores_U: Tensor, alpha: float = 0.5) -> None:
        self.alpha = alpha

    def gradient(self, scores_U: Tensor, masks_KU: Tensor, losses_K: Tensor) -> Tensor:
        """The estimate of one step: (U,), in the dtype of the scores.

        Args:
            scores_U: (U,) in [0, 1].
            masks_KU: (K, U) bool, drawn independently from the scores.
            losses_K: (K,) mean loss of the same batch under each mask.
        """
        raise NotImplementedError

    def observe(self, masks_KU: Tensor, losses_K: Tensor, gates: Gates | None) -> None:
        """Learns from a finished step, for the estimates of later steps."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the estimator remembers, as plain tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state_dict().items():
            setattr(self, name, state[name].to(value.device))


def variance_power(scores_U: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """(s (1 - s))^exponent, with 1 in its place where s is exactly 0 or 1, and a mask (U,) bool of those places."""
    variance_U = scores_U * (1 - scores_U)
    saturated_U = variance_U <= 0
    return variance_U.masked_fill(saturated_U, 1.0) ** exponent, saturated_U


def preconditioned(scores_U: Tensor, gradient_U: Tensor, alpha: float) -> Tensor:
    """(s (1 - s))^alpha times a gradient; exactly 0 where a score is exactly 0 or 1."""
    preconditioner_U, saturated_U = variance_power(scores_U, alpha)
    return (preconditioner_U * gradient_U).masked_fill(saturated_U, 0.0)
