"""What a method decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from args import Config, SparsityConfig
from trainers.default import StepSettings, weight_step
from utils.channels.network import SparseNetwork
from utils.channels.plan import Plan
from utils.channels.subnet import best_within_budget, best_within_cost
from utils.errors import UserError
from utils.run.metrics import Cost

if TYPE_CHECKING:
    from trainers.state import RunState


@dataclass(frozen=True)
class StepCost:
    """What a step runs on each image.

    Attributes:
        forward: of every forward pass.
        num_backward: how many of them, the first ones, also run backward.
    """

    forward: list[Cost]
    num_backward: int = 1


class Method:
    """Trains the weights of whatever is fixed, by ordinary steps; methods override what they do otherwise.

    Attributes:
        first_phase: "search" if it ends with the choice of a subnet, which is then fine-tuned; else the only phase,
            for all epochs.
        has_scores: whether scores are trained, and candidates drawn from them.
        draws_masks: whether they are trained by masks drawn from them.
        tosses: whether coins decide which mask gets which loss.
    """

    first_phase: str = "search"
    has_scores: bool = False
    draws_masks: bool = False
    tosses: bool = False

    def start(self, network: SparseNetwork, config: Config) -> np.ndarray | None:
        """Prepares a fresh network. Returns the mask (U,) that is trained from the first step, if there is one.

        Raises: UserError for a budget or a network that does not suit the method.
        """

    def step(
        self, run: RunState, images: Tensor, labels: Tensor, settings: StepSettings, config: Config
    ) -> tuple[dict[str, Tensor], StepCost]:
        """One step of the first phase. Returns sums over the batch, and what was run."""
        network, plan = run.network, run.fixed_plan
        penalise = self.penalty(config)
        metrics = weight_step(network, run.weight_optimizer, plan, images, labels, settings, config, penalise)
        return metrics, StepCost([cost_of(network, plan)])

    def penalty(self, config: Config) -> Callable[[SparseNetwork], None] | None:
        """Adds to the gradients of the weights, if anything does."""
        return None

    def end_of_epoch(self, run: RunState, config: Config) -> None:
        """What happens to the network between two epochs of a search, before it is evaluated."""

    def mask(self, network: SparseNetwork, config: Config, fraction: float) -> np.ndarray:
        """The units that a search would keep now: (U,) bool."""
        raise NotImplementedError

    def candidates(self, network: SparseNetwork, config: Config) -> list[np.ndarray]:
        """The masks of which held-out images choose one when a search ends; the likeliest first."""
        return [self.mask(network, config, config.sparsity.keep_ratio)]


def cost_of(network: SparseNetwork, plan: Plan) -> Cost:
    """Of one forward pass and one image."""
    return network.executed_macs(plan), network.padded_macs(plan)


def check_budget(network: SparseNetwork, config: Config) -> None:
    """Raises UserError for a budget of params or flops that no subnet meets."""
    sparsity = config.sparsity
    if sparsity.budget == "channels":
        return
    cost = network.expected_cost(sparsity.budget)
    smallest = cost(network.plan(np.zeros(network.num_units, dtype=bool)).mask_U)  # what the layer guard leaves
    if sparsity.keep_ratio * cost.dense < smallest:
        raise UserError(
            f"keep_ratio {sparsity.keep_ratio:g} of the {sparsity.budget} is less than the smallest subnet of "
            f"{config.model.arch} has; pass --keep-ratio {1.001 * smallest / cost.dense:.4g} or more"
        )


def best_units(
    network: SparseNetwork, values_U: np.ndarray, scores_U: np.ndarray, sparsity: SparsityConfig, fraction: float
) -> np.ndarray:
    """The units of highest value within a fraction of what `budget` counts: (U,) bool."""
    vital = network.graph.vital_groups if network.semantics == "unit" else []
    if sparsity.budget != "channels":
        cost = network.expected_cost(sparsity.budget)
        return best_within_cost(values_U, scores_U, cost, fraction * cost.dense, vital)
    groups = network.unit_groups() if sparsity.constrain_by_layer else [slice(0, network.num_units)]
    return best_within_budget(values_U, scores_U, groups, fraction, vital)
