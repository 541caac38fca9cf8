"""What a method decides.

Legend: U maskable units of the network.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from args import Config
from trainers.default import StepResult, StepSettings, weight_step
from trainers.state import RunState
from utils.algorithm.estimators.base import Estimator
from utils.channels.budget import Budget
from utils.channels.network import SparseNetwork
from utils.errors import UserError


class Method:
    """Trains the weights of whatever is fixed, by ordinary steps. Methods override what they do otherwise.

    Attributes:
        first_phase: "search" if it ends with the choice of a subnet, which is then fine-tuned; else the only phase,
            for all epochs.
        has_scores: whether scores are trained, and candidates are drawn from them.
        draws_masks: whether the scores are trained by masks drawn from them.
    """

    first_phase: ClassVar[str] = "search"
    has_scores: ClassVar[bool] = False
    draws_masks: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def start(self, network: SparseNetwork, budget: Budget) -> np.ndarray | None:
        """Prepares a fresh network. Returns the mask (U,) that is trained from the first step, if there is one.

        Raises: UserError for a budget or a network that does not suit the method.
        """

    def step(self, run: RunState, images: Tensor, labels: Tensor, now: StepSettings) -> StepResult:
        """One step of the first phase."""
        return weight_step(run, images, labels, now, self.config, partial(self.after_backward, run))

    def after_backward(self, run: RunState) -> None:
        """Reads or changes the gradients of an ordinary step, before they are clipped."""

    def wrapped(self, estimator: Estimator, device: torch.device) -> Estimator:
        """The estimator that the method uses in place of the given one."""
        return estimator

    def end_of_epoch(self, run: RunState, keep_ratio: float) -> None:
        """What happens to the network between two epochs of a search, before it is evaluated.

        Args:
            keep_ratio: the budget of the last step.
        """

    def mask(self, run: RunState, keep_ratio: float) -> np.ndarray:
        """The units that a search would keep now: (U,) bool."""
        raise NotImplementedError

    def candidates(self, run: RunState) -> list[np.ndarray]:
        """The masks of which held-out images choose one when a search ends; the likeliest first."""
        return [self.mask(run, self.config.sparsity.keep_ratio)]


def check_budget(budget: Budget, config: Config) -> None:
    """Raises UserError for a budget of params or flops that no subnet meets."""
    smallest = budget.smallest_keep_ratio()
    if config.sparsity.keep_ratio < smallest:
        raise UserError(
            f"keep_ratio {config.sparsity.keep_ratio:g} of the {budget.unit} is less than the smallest subnet of "
            f"{config.model.arch} has; pass --keep-ratio {1.001 * smallest:.4g} or more"
        )
