"""Methods without a search: one network from the first step to the last, in one schedule."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import nn

from args import Config
from models import initialise
from trainers.methods.base import Method, check_budget
from trainers.methods.uniform import uniform_mask
from utils.channels.budget import Budget
from utils.channels.network import SparseNetwork
from utils.channels.shrink import shrink_to
from utils.seeds import RANDOM_MASK_STREAM, stream_seed


class Dense(Method):
    """The plain network; or all of the channels of a subnet that it starts from."""

    first_phase: ClassVar[str] = "dense"

    def start(self, network: SparseNetwork, budget: Budget) -> np.ndarray | None:
        return network.stored_units.copy() if network.num_units else None


class Thin(Method):
    """Every layer keeps its first channels, equally many in a residual stream: an ordinary narrower network.

    With `--widths-of RUN` the network is the subnet of that run, its very units, with weights drawn anew. Every layer
    has as many channels as there, and as many FLOPs. Where layers are added, the number of channels that each of them
    keeps does not say how many the next layer reads, because a channel is read if any of them keeps it. So it matters
    which ones they keep, and they keep those that they keep in the run.

    Source of training a found network from new weights: Liu, Sun, Zhou, Huang, Darrell, "Rethinking the Value of
        Network Pruning", ICLR 2019.
    """

    first_phase: ClassVar[str] = "train"

    def start(self, network: SparseNetwork, budget: Budget) -> np.ndarray:
        mask_U = network.plan(self.first_mask(network, budget)).mask_U  # with what the layer guard adds
        shrink_to(network, mask_U, keep_fallback=False)
        draw_weights(network.model, self.config)
        return mask_U

    def first_mask(self, network: SparseNetwork, budget: Budget) -> np.ndarray:
        if self.config.widths_of is not None:
            return network.stored_units.copy()  # nothing else is in the network that the method is given
        return uniform_mask(network, np.zeros(network.num_units), self.config.sparsity.keep_ratio, self.config)


class RandomMask(Thin):
    """Units chosen uniformly at random within the budget, before the first step."""

    def first_mask(self, network: SparseNetwork, budget: Budget) -> np.ndarray:
        check_budget(budget, self.config)
        random = np.random.default_rng(stream_seed(self.config.run.seed, RANDOM_MASK_STREAM))
        values_U = 1 - random.random(network.num_units)  # never 0, which is never kept
        return budget.best_units(values_U, values_U, self.config.sparsity.keep_ratio)


def draw_weights(model: nn.Module, config: Config) -> None:
    """Draws all weights again, by the rules and in the order of a network that is built with the shapes they have now.

    On the CPU, like the first ones, so they are the same on every device.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    layers = [layer for layer in layers if layer.weight.numel()]  # others read or write nothing
    parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    in_place = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = torch.empty(parameter.shape)
    torch.manual_seed(config.run.seed)
    for layer in layers:
        layer.reset_parameters()
    for layer in layers:
        initialise(layer, config.model.init, config.model.mode, config.model.nonlinearity)
    for parameter, data in zip(parameters, in_place, strict=True):
        parameter.data = data.copy_(parameter.data)
