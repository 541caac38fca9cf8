"""Methods that train scores: VR-PGE, and its schedule with coins in place of the losses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from args import Config
from trainers.default import StepSettings, num_full_passes, train_step, twin_of
from trainers.methods.base import Method, StepCost, best_units, cost_of
from trainers.methods.share import measure_share, no_share
from trainers.retirement import retire
from utils.channels.network import SparseNetwork
from utils.seeds import CANDIDATE_STREAM, stream_seed

if TYPE_CHECKING:
    from trainers.state import RunState


@dataclass(frozen=True)
class ScoreMethod(Method):
    """Keeps the units of the highest scores, or some that are drawn from them."""

    has_scores = True

    def mask(self, network: SparseNetwork, config: Config, fraction: float) -> np.ndarray:
        return top_scored_mask(network, config, fraction)

    def candidates(self, network: SparseNetwork, config: Config) -> list[np.ndarray]:
        """From the scores and a stream of their own, so choosing again gives the same subnet."""
        ratio = config.sparsity.keep_ratio
        random = np.random.default_rng(stream_seed(config.run.seed, CANDIDATE_STREAM))
        drawn = [drawn_mask(network, config, ratio, random) for _ in range(config.finetune.num_subnets)]
        return [top_scored_mask(network, config, ratio), *drawn]


def top_scored_mask(network: SparseNetwork, config: Config, fraction: float) -> np.ndarray:
    scores_U = network.scores.detach().cpu().numpy()
    return best_units(network, scores_U, scores_U, config.sparsity, fraction)


def drawn_mask(network: SparseNetwork, config: Config, fraction: float, random: np.random.Generator) -> np.ndarray:
    """A mask drawn from the scores; where it exceeds the budget, its least likely units are left out."""
    scores_U = network.scores.detach().cpu().numpy()
    values_U = np.where(random.random(len(scores_U)) < scores_U, scores_U, 0)
    return best_units(network, values_U, scores_U, config.sparsity, fraction)


@dataclass(frozen=True)
class PolicyGradient(ScoreMethod):
    """VR-PGE.

    Attributes:
        tosses: "coin", the control: the losses of a step are dealt out to its masks at random, so for two masks L - L'
            becomes +-|L - L'|. What comes out is what the schedule alone gives.
    """

    draws_masks = True
    tosses: bool = False

    def step(
        self, run: RunState, images: Tensor, labels: Tensor, settings: StepSettings, config: Config
    ) -> tuple[dict[str, Tensor], StepCost]:
        cost = self.cost_of_step(run, settings, config)
        watched: dict[str, Tensor] = {}
        if config.sparsity.gauge_every:  # every step adds to the same sums
            watched = no_share(run.network.device)
        if settings.gauge:
            watched, spent = measure_share(run.search, images, labels, config)
            cost = replace(cost, forward=[*cost.forward, *spent])
        return {**train_step(run.search, images, labels, settings, config), **watched}, cost

    def cost_of_step(self, run: RunState, settings: StepSettings, config: Config) -> StepCost:
        """What the forward passes of the coming step cost per image of this rank's part of the batch."""
        sparsity, plans = config.sparsity, run.search.draw.plans
        costs = [
            cost_of(run.network, plan)
            for k, plan in enumerate(plans[: num_full_passes(sparsity, settings.update_scores)])
            if k < sparsity.weight_samples or twin_of(plans, k) is None  # a repeated mask runs once
        ]
        if settings.update_scores and sparsity.subbatch:  # each of the other masks sees its part of the batch
            parts = [cost_of(run.network, plan) for plan in plans[1:]]
            costs.append(tuple(sum(values) // len(parts) for values in zip(*parts, strict=True)))
        return StepCost(costs, sparsity.weight_samples)

    def end_of_epoch(self, run: RunState, config: Config) -> None:
        if config.sparsity.retires:
            retire(run.search)
