"""One fixed mask out of the distribution: chosen, given its own batch-norm statistics, kept in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import floor

import numpy as np
import torch
from torch import Tensor

from utils.network import SparseNetwork

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
    kept_fraction: float,
    vital_groups: Iterable[np.ndarray],
) -> np.ndarray:
    """The units of highest value within the budget, never one of value 0 (ties: the lowest index).

    Of each vital group the best unit comes first (where all its values are 0, the one with the highest score), so that
    the layer guard has nothing to add afterwards.

    Args:
        values_U: (U,) in [0, 1].
        scores_U: (U,) in [0, 1].
        groups: units that have a budget of their own: all of them, or one slice per layer.
        kept_fraction: budget of a group as a fraction of its units.
        vital_groups: see `ChannelGraph.vital_groups`.
    Returns: (U,) bool.
    """
    priority_U = values_U.astype(np.float64)
    for vital in vital_groups:
        source_U = values_U if values_U[vital].any() else scores_U
        priority_U[vital[source_U[vital].argmax()]] = np.inf
    mask_U = np.zeros(len(values_U), dtype=bool)
    for group in groups:
        priority = priority_U[group]
        budget = floor(kept_fraction * len(priority) + 1e-6)  # a whole number but for rounding is that number
        chosen = np.argsort(-priority, kind="stable")[:budget]
        mask_U[group] = np.isin(np.arange(len(priority)), chosen) & (priority > 0)
    return mask_U


def estimate_statistics(
    network: SparseNetwork, mask_U: np.ndarray, batches: Iterable[tuple[Tensor, Tensor]], config
) -> Subnet:
    """A subnet whose batch-norm statistics are plain averages over the given training batches.

    The statistics of the network itself, which mix all the masks of training, are left as they were.

    Args:
        mask_U: (U,) bool.
        batches: shuffled images, in numbers that fill batch statistics.
        config: `args.TrainConfig`, for the precision.
    """
    norms = network.batch_norms()
    momenta = {name: norm.momentum for name, norm in norms.items()}
    saved = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}
    was_training = network.model.training
    plan = network.plan(mask_U)
    network.model.train()
    try:
        with torch.no_grad():
            for number, (images, _) in enumerate(batches):
                for norm in norms.values():
                    norm.momentum = 1 / (number + 1)  # a running average of all batches so far
                with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    network(images, plan)
        statistics = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}
    finally:
        network.model.train(was_training)
        for name, norm in norms.items():
            norm.momentum = momenta[name]
            norm.running_mean.copy_(saved[name][0])
            norm.running_var.copy_(saved[name][1])
    return Subnet(plan.mask_U, statistics)


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
