"""Methods that train the dense network, prune it once and fine-tune what is left."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from trainers.methods.base import Method, check_budget
from trainers.methods.uniform import uniform_mask
from trainers.state import RunState
from utils.channels.budget import Budget
from utils.channels.network import SparseNetwork
from utils.channels.norms import NormBehind, norms_behind, stored_places
from utils.errors import UserError


class FilterNorm(Method):
    """Keeps the filters of largest norm in each layer, the same fraction everywhere.

    Source: Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017 (power 1).
    """

    power: ClassVar[int] = 1

    def start(self, network: SparseNetwork, budget: Budget) -> None:
        uniform_mask(network, np.zeros(network.num_units), self.config)  # a budget that is too small is refused now

    def mask(self, run: RunState, keep_ratio: float) -> np.ndarray:
        return uniform_mask(run.network, filter_norms(run.network, self.power).cpu().numpy(), self.config)


class SoftPruning(FilterNorm):
    """After every epoch the filters that would be pruned are set to zero, and go on being trained.

    Source: He, Kang, Dong, Fu, Yang, "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks",
        IJCAI 2018.
    """

    power: ClassVar[int] = 2

    def end_of_epoch(self, run: RunState) -> None:
        network, dropped_U = run.network, torch.from_numpy(~self.mask(run, self.config.sparsity.keep_ratio))
        parts = zip(network.layers.values(), network.split(dropped_U), stored_by_layer(network), strict=True)
        for layer, dropped, stored in parts:
            layer.weight.data[dropped.to(layer.weight.device)[stored]] = 0


def filter_norms(network: SparseNetwork, power: int) -> Tensor:
    """The norm of what each unit's filters hold, over all layers that share it: (U,) float64; 0 for units that left."""
    sums_U = torch.zeros(network.num_units, dtype=torch.float64, device=network.device)
    for layer, part, stored in zip(
        network.layers.values(), network.split(sums_U), stored_by_layer(network), strict=True
    ):
        part[stored] += layer.weight.detach().double().abs().pow(power).sum((1, 2, 3))
    return sums_U ** (1 / power)


def stored_by_layer(network: SparseNetwork) -> list[Tensor]:
    """Which units of each maskable layer still have parameters: (C,) bool, on the device."""
    return network.split(torch.from_numpy(network.stored_units).to(network.device))


class Slimming(Method):
    """An L1 penalty on the scales of batch-norm while training; one threshold on them for all layers.

    Where the batch-norm stands before the convolutions (pre-activation), a unit is judged by the first that reads it.

    Source: Liu, Li, Shen, Huang, Yan, Zhang, "Learning Efficient Convolutional Networks through Network Slimming",
        ICCV 2017.
    """

    def start(self, network: SparseNetwork, budget: Budget) -> None:
        check_budget(budget, self.config)
        judging_norms(network)

    def penalty(self) -> Callable[[SparseNetwork], None]:
        return partial(add_scale_penalty, penalty=self.config.sparsity.slimming_penalty)

    def mask(self, run: RunState, keep_ratio: float) -> np.ndarray:
        scales_U = batch_norm_scales(run.network).cpu().numpy()
        return run.budget.best_units(scales_U, scales_U, keep_ratio)


def add_scale_penalty(network: SparseNetwork, penalty: float) -> None:
    """Adds the gradient of penalty * sum |gamma| over all batch-norms."""
    for norm in network.batch_norms().values():
        norm.weight.grad.add_(norm.weight.detach().sign(), alpha=penalty)


def batch_norm_scales(network: SparseNetwork) -> Tensor:
    """|gamma| of the batch-norm that judges each unit, the mean over layers that share it: (U,) float64.

    0 for units that have left the network.
    """
    sums_U = torch.zeros(network.num_units, dtype=torch.float64, device=network.device)
    layers_U = torch.zeros_like(sums_U)
    for name, norm in judging_norms(network).items():
        units, channels = (torch.from_numpy(i).to(network.device) for i in stored_places(network, name, norm))
        sums_U[units] += norm.module.weight.detach().double().abs()[channels]
        layers_U[units] += 1
    stored_U = torch.from_numpy(network.stored_units).to(network.device)
    return torch.where(stored_U, sums_U / layers_U, 0.0)


def judging_norms(network: SparseNetwork) -> dict[str, NormBehind]:
    """For every maskable layer the first batch-norm behind it.

    Raises: UserError for a layer whose channels no batch-norm reads.
    """
    norms = norms_behind(network)
    for name in network.layers:
        if name not in norms:
            raise UserError(
                f"method slimming cannot judge the channels of layer {name}: no batch-norm reads them; pass another "
                "--method or --arch"
            )
    return norms
