"""One fixed mask out of the distribution: chosen, given its own batch-norm statistics, kept in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import floor

import numpy as np
import torch
from torch import Tensor

from utils.channels.cost import ExpectedCost
from utils.channels.network import SparseNetwork

Statistics = dict[str, tuple[Tensor, Tensor]]  # running mean and variance by name of the batch-norm


@dataclass(frozen=True)
class Subnet:
    """A fixed mask with the batch-norm statistics that belong to it.

    Attributes:
        mask_U: (U,) bool on the host.
        statistics: running mean and variance of every batch-norm, of the channels stored at that time.
    """

    mask_U: np.ndarray
    statistics: Statistics

    def state_dict(self) -> dict:
        return {
            "mask": torch.from_numpy(self.mask_U),
            "statistics": {name: list(pair) for name, pair in self.statistics.items()},
        }

    @classmethod
    def from_state_dict(cls, state: dict, device: torch.device) -> Subnet:
        statistics = {name: (m.to(device), v.to(device)) for name, (m, v) in state["statistics"].items()}
        return cls(state["mask"].numpy(), statistics)


def best_within_budget(
    values_U: np.ndarray,
    scores_U: np.ndarray,
    groups: Iterable[slice],
    keep_ratio: float,
    vital_groups: Iterable[np.ndarray],
) -> np.ndarray:
    """The units of highest value within a budget of units, never one of value 0 (ties: the lowest index).

    Args:
        values_U: (U,) in [0, 1].
        scores_U: (U,) in [0, 1].
        groups: units that have a budget of their own: all of them, or one slice per layer.
        keep_ratio: budget of a group as a fraction of its units.
        vital_groups: see `ChannelGraph.vital_groups`.
    Returns: (U,) bool.
    """
    priority_U = _priorities(values_U, scores_U, vital_groups)
    mask_U = np.zeros(len(values_U), dtype=bool)
    for group in groups:
        priority = priority_U[group]
        budget = floor(keep_ratio * len(priority) + 1e-6)  # a whole number but for rounding is that number
        chosen = np.argsort(-priority, kind="stable")[:budget]
        mask_U[group] = np.isin(np.arange(len(priority)), chosen) & (priority > 0)
    return mask_U


def best_within_cost(
    values_U: np.ndarray, scores_U: np.ndarray, cost: ExpectedCost, budget: float, vital_groups: Iterable[np.ndarray]
) -> np.ndarray:
    """The units of highest value whose network stays within a budget, never one of value 0 (ties: the lowest index).

    Units come in the order of their values until one does not fit; then those behind it that still do.

    Args:
        values_U: (U,) in [0, 1].
        scores_U: (U,) in [0, 1].
        cost: of the network.
        budget: in the unit of the cost. The best units of the vital groups are kept whatever they cost.
        vital_groups: see `ChannelGraph.vital_groups`.
    Returns: (U,) bool.
    """
    priority_U = _priorities(values_U, scores_U, vital_groups)
    order = np.argsort(-priority_U, kind="stable")[: np.count_nonzero(priority_U)]
    budget += 1e-12 * cost.dense  # a whole number but for rounding is that number

    def first(count: int) -> np.ndarray:
        return np.isin(np.arange(len(priority_U)), order[:count])

    low, high = np.count_nonzero(np.isinf(priority_U)), len(order)
    while low < high:  # more units never cost less
        middle = (low + high + 1) // 2
        if cost(first(middle)) <= budget:
            low = middle
        else:
            high = middle - 1
    mask_U, rest = first(low), order[low:]
    while True:
        spent, extra_U = cost.with_gradient(mask_U)
        fitting = np.flatnonzero(extra_U[rest] <= budget - spent)
        if len(fitting) == 0:
            return mask_U
        mask_U[rest[fitting[0]]] = True
        rest = rest[fitting[0] + 1 :]


def _priorities(values_U: np.ndarray, scores_U: np.ndarray, vital_groups: Iterable[np.ndarray]) -> np.ndarray:
    """The values, but infinite for the best unit of each vital group: the layer guard has nothing to add afterwards.

    Where all values of a group are 0, its best unit is the one with the highest score.
    """
    priority_U = values_U.astype(np.float64)
    for vital in vital_groups:
        source_U = values_U if values_U[vital].any() else scores_U
        priority_U[vital[source_U[vital].argmax()]] = np.inf
    return priority_U


def estimate_statistics(network: SparseNetwork, mask_U: np.ndarray, batches: Iterable[tuple[Tensor, Tensor]]) -> Subnet:
    """A subnet whose batch-norm statistics are averages over training batches, in which every image counts alike.

    The statistics of the network itself, which mix all the masks of training, are left as they were.

    Args:
        mask_U: (U,) bool.
        batches: shuffled images, in numbers that fill batch statistics. A last batch of one image has no variance where
            a map has one pixel, so it joins the batch before.
    Raises: ValueError without any images.
    """
    norms = network.batch_norms()
    momenta = {name: norm.momentum for name, norm in norms.items()}
    saved = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}
    was_training = network.model.training
    plan = network.plan(mask_U)
    network.model.train()
    try:
        with torch.no_grad():
            num_images = 0
            for images in _without_single_rest(images for images, _ in batches):
                num_images += len(images)
                for norm in norms.values():
                    norm.momentum = len(images) / num_images  # a running average of all images so far
                network(images, plan)
        if num_images == 0:
            raise ValueError("statistics need images, and there is no batch")
        statistics = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}
    finally:
        network.model.train(was_training)
        for name, norm in norms.items():
            norm.momentum = momenta[name]
            norm.running_mean.copy_(saved[name][0])
            norm.running_var.copy_(saved[name][1])
    return Subnet(plan.mask_U, statistics)


def _without_single_rest(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same images, but a last batch of one image joins the batch before it."""
    waiting: list[Tensor] = []
    for images in batches:
        if len(waiting) == 2:
            yield waiting.pop(0)
        waiting.append(images)
    if len(waiting) == 2 and len(waiting[1]) == 1:
        waiting = [torch.cat(waiting)]
    yield from waiting


def use_statistics(network: SparseNetwork, subnet: Subnet) -> None:
    """Copies the batch-norm statistics of a subnet into the network."""
    for name, norm in network.batch_norms().items():
        norm.running_mean.copy_(subnet.statistics[name][0])
        norm.running_var.copy_(subnet.statistics[name][1])


@contextmanager
def installed(network: SparseNetwork, subnet: Subnet) -> Iterator[None]:
    """Lends a subnet's statistics to the network; its own tensors come back untouched."""
    norms = network.batch_norms()
    own = {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}
    for name, norm in norms.items():
        norm.running_mean, norm.running_var = subnet.statistics[name]
    try:
        yield
    finally:
        for name, norm in norms.items():
            norm.running_mean, norm.running_var = own[name]
