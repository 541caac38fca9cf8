"""Methods that train the dense network, prune it, at once or little by little, and fine-tune what is left.

Legend: U maskable units of the network.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from args import Config
from trainers.methods.base import Method, check_budget
from trainers.methods.uniform import uniform_mask
from trainers.state import RunState
from utils.channels.budget import Budget
from utils.channels.network import SparseNetwork
from utils.channels.norms import GateReader, NormBehind, norms_behind, stored_places
from utils.channels.shrink import shrink_to
from utils.errors import UserError


class Pruning(Method):
    """Cuts the network once, when the first phase ends.

    Where the budget falls, the units that exceed the budget of the moment also leave the network after every epoch, for
    good, so that the epochs get cheaper.

    Source: Zhu and Gupta, "To prune, or not to prune", 2017, for the falling budget, there on single weights.
    """

    def end_of_epoch(self, run: RunState, keep_ratio: float) -> None:
        if self.config.budget_falls:
            shrink_to(run.network, self.mask(run, keep_ratio), run.weight_optimizer, keep_fallback=False)
            run.plan = run.network.plan(run.network.stored_units)


class FilterNorm(Pruning):
    """Keeps the filters of largest norm in each layer, the same fraction everywhere.

    Source: Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017 (power 1).
    """

    power: ClassVar[int] = 1

    def start(self, network: SparseNetwork, budget: Budget) -> None:
        # a budget that is too small is refused now
        uniform_mask(network, np.zeros(network.num_units), self.config.sparsity.keep_ratio, self.config)

    def mask(self, run: RunState, keep_ratio: float) -> np.ndarray:
        norms_U = filter_norms(run.network, self.power).cpu().numpy()
        return uniform_mask(run.network, norms_U, keep_ratio, self.config)


class SoftPruning(FilterNorm):
    """After every epoch the filters that would be pruned are set to zero, and go on being trained.

    Source: He, Kang, Dong, Fu, Yang, "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks",
        IJCAI 2018.
    """

    power: ClassVar[int] = 2

    def end_of_epoch(self, run: RunState, keep_ratio: float) -> None:
        network, dropped_U = run.network, torch.from_numpy(~self.mask(run, keep_ratio))
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


class Slimming(Pruning):
    """An L1 penalty on the scales of batch-norm while training; one threshold on them for all layers.

    Where the batch-norm stands before the convolutions (pre-activation), a unit is judged by the first that reads it.

    Source: Liu, Li, Shen, Huang, Yan, Zhang, "Learning Efficient Convolutional Networks through Network Slimming",
        ICCV 2017.
    """

    def start(self, network: SparseNetwork, budget: Budget) -> None:
        check_budget(budget, self.config)
        judging_norms(network)

    def after_backward(self, run: RunState) -> None:
        add_scale_penalty(run.network, self.config.sparsity.slimming_penalty)

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


class TaylorCut(Pruning):
    """Keeps the units whose removal would change the loss most, to first order; one threshold for all layers.

    A gate of value 1 that multiplies a unit behind its batch-norm tells the first-order effect of removing the unit:
    the gradient of the gate. Its square, averaged over the batches of an epoch, is the importance of the unit. The
    gradients are those of the steps that are taken anyway, so the criterion costs no pass of its own, but it follows
    weights that move. The importance of a unit is not divided by its cost, whatever the budget counts.

    Source: Molchanov, Mallya, Tyree, Frosio, Kautz, "Importance Estimation for Neural Network Pruning", CVPR 2019;
        there a fixed number of units of a trained network leaves after every few batches.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.reader: GateReader | None = None

    def start(self, network: SparseNetwork, budget: Budget) -> None:
        check_budget(budget, self.config)
        GateReader(network).check_sees_all("method taylor_cut", self.config.model.arch)

    def after_backward(self, run: RunState) -> None:
        if self.reader is None:
            self.reader = GateReader(run.network)
        squares_U = self.reader.read(run.plan, self.config.train.batch_size).gradients_U.double() ** 2
        if run.step == 0:  # the weights have moved since the epoch before
            run.importance = torch.zeros_like(squares_U)
        run.importance = torch.lerp(run.importance, squares_U, 1 / (run.step + 1))

    def mask(self, run: RunState, keep_ratio: float) -> np.ndarray:
        importance_U = np.where(run.network.stored_units, run.importance.cpu().numpy(), 0.0)
        return run.budget.best_units(importance_U, importance_U, keep_ratio)
