"""VR-PGE, and the control that tosses coins in place of looking at the losses.

Legend: U maskable units of the network.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from trainers.default import StepResult, StepSettings, train_step
from trainers.methods.base import Method
from trainers.state import RunState
from utils.algorithm.estimators.base import Estimator
from utils.algorithm.estimators.vrpge import Tossed
from utils.channels.shrink import drop_dead_units
from utils.seeds import CANDIDATE_STREAM, COIN_STREAM, stream_generator, stream_seed


class ScoreMethod(Method):
    """Keeps the units with the highest scores, or units that are drawn from the scores."""

    has_scores: ClassVar[bool] = True

    def mask(self, run: RunState, keep_ratio: float) -> np.ndarray:
        scores_U = scores_of(run)
        return run.budget.best_units(scores_U, scores_U, keep_ratio)

    def candidates(self, run: RunState) -> list[np.ndarray]:
        """The top-scored mask, then `num_subnets` that are drawn from a random stream of their own.

        The stream starts anew every time, so choosing again gives the same subnet.
        """
        keep_ratio = self.config.sparsity.keep_ratio
        random = np.random.default_rng(stream_seed(self.config.run.seed, CANDIDATE_STREAM))
        fill = run.budget.spend
        drawn = [drawn_mask(run, keep_ratio, random, fill) for _ in range(self.config.finetune.num_subnets)]
        return [self.mask(run, keep_ratio), *drawn]


def scores_of(run: RunState) -> np.ndarray:
    return run.network.scores.detach().cpu().numpy()


def drawn_mask(run: RunState, keep_ratio: float, random: np.random.Generator, fill: bool = False) -> np.ndarray:
    """A mask (U,) drawn from the scores. Where it exceeds the budget, its least likely units are left out.

    Args:
        fill: where it falls short of the budget, the likeliest of the other units are added.
    """
    scores_U = scores_of(run).astype(np.float64)  # in which the values below keep scores apart that float32 can tell
    others_U = scores_U / 2 if fill else np.zeros_like(scores_U)  # come after all that were drawn
    values_U = np.where(random.random(len(scores_U)) < scores_U, (1 + scores_U) / 2, others_U)
    return run.budget.best_units(values_U, scores_U, keep_ratio)


class PolicyGradient(ScoreMethod):
    """VR-PGE."""

    draws_masks: ClassVar[bool] = True

    def step(self, run: RunState, images: Tensor, labels: Tensor, now: StepSettings) -> StepResult:
        return train_step(run.search, images, labels, now, self.config)

    def end_of_epoch(self, run: RunState, keep_ratio: float) -> None:
        if self.config.shrinks:
            drop_dead_units(run.network, run.search.score_optimizer, run.search.weight_optimizer)
        if self.config.fixes_shapes:
            run.network.fix_shapes()


class Coin(PolicyGradient):
    """The control: VR-PGE whose losses are dealt out to the masks at random. It shows what the schedule alone gives."""

    def wrapped(self, estimator: Estimator, device: torch.device) -> Estimator:
        return Tossed(estimator, stream_generator(self.config.run.seed, COIN_STREAM, device))
