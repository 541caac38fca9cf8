"""The batch-norm behind each maskable layer, and what its gradients tell of the layer's units.

Legend: U units.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from utils.algorithm.estimators.base import Gates
from utils.algorithm.estimators.taylor import gate_gradients
from utils.algorithm.transfer import sent_to
from utils.channels.network import SparseNetwork
from utils.channels.plan import Plan
from utils.errors import UserError


@dataclass(frozen=True)
class NormBehind:
    """The first batch-norm that reads the channels of a layer.

    Attributes:
        space: of the graph, the one that `module` normalises.
        first_channel: where the layer's channels begin there.
        alone: whether no other layer writes into these channels, and `module` runs once.
    """

    module: nn.BatchNorm2d
    space: int
    first_channel: int
    alone: bool


def norms_behind(network: SparseNetwork) -> dict[str, NormBehind]:
    """By name of the maskable layer; one whose channels no batch-norm reads is left out."""
    norms, graph = {}, network.graph
    runs = Counter(op.module for op in graph.ops if op.kind == "norm")
    for name, layer in network.layers.items():
        first_unit, reached = graph.first_unit[name], []
        for op in graph.ops:
            carried = first_unit in graph.spaces[op.space].writers and any(reached[i] for i in op.inputs)
            carried = carried and op.kind not in ("conv", "linear")
            reached.append(op.module is layer or carried)
            if carried and op.kind == "norm":
                segments = graph.spaces[op.space].segments
                place = [first_unit in segment.writers for segment in segments].index(True)
                first_channel = sum(segment.width for segment in segments[:place])
                alone = segments[place].writers == {first_unit} and runs[op.module] == 1
                norms[name] = NormBehind(op.module, op.space, first_channel, alone)
                break
    return norms


def stored_places(network: SparseNetwork, name: str, norm: NormBehind) -> tuple[np.ndarray, np.ndarray]:
    """Where the channels of a maskable layer are that its batch-norm still has: their units, and their rows in it."""
    width, first_unit = network.layers[name].out_channels, network.graph.first_unit[name]
    stored_C = network.stored[norm.space]
    channels = np.flatnonzero(stored_C[norm.first_channel : norm.first_channel + width])
    before = int(stored_C[: norm.first_channel].sum())
    return first_unit + channels, before + np.arange(len(channels))


class GateReader:
    """Reads the gradients of gates that multiply units behind their batch-norms (see `gate_gradients`).

    Units that share their channels with another layer, or have no batch-norm behind them, are never observed.
    """

    def __init__(self, network: SparseNetwork) -> None:
        self.network = network
        self.norms = {name: norm for name, norm in norms_behind(network).items() if norm.alone}
        self._places()

    def _places(self) -> None:
        """Where the stored units of each layer are: among all units, and in the tensors of its norm."""
        network, self._made_for = self.network, self.network.stored
        self.places: list[tuple[nn.BatchNorm2d, Tensor, Tensor]] = []
        self.readable_U = np.zeros(network.num_units, dtype=bool)
        seen = set()
        for name, norm in self.norms.items():
            if (norm.module, network.graph.first_unit[name]) in seen:  # two tied layers that add before it
                continue
            seen.add((norm.module, network.graph.first_unit[name]))
            units, channels = stored_places(network, name, norm)
            on_device = [torch.from_numpy(places).to(network.device) for places in (units, channels)]
            self.places.append((norm.module, *on_device))
            self.readable_U[units] = True

    def check_sees_all(self, judge: str, arch: str) -> None:
        """Raises UserError if the gate of some unit is never observed, for a judge that has nothing else to go by.

        Args:
            judge: what judges the units, such as "estimator taylor": the option and its value.
            arch: name of the network.
        """
        unseen = int((~self.readable_U & self.network.stored_units).sum())
        if unseen:
            raise UserError(
                f"{judge} cannot judge {unseen} of {self.network.num_units} units of {arch}: no batch-norm of their "
                f"own is behind them; pass another --{judge.split()[0]} or --arch"
            )

    def read(self, plan: Plan, num_images: int) -> Gates:
        """After the backward pass of `plan`, before gradients are clipped; `num_images` are those of all ranks."""
        if self._made_for is not self.network.stored:
            self._places()
        gradients_U = torch.zeros_like(self.network.scores.detach())
        for norm, units, channels in self.places:
            gradients_U[units] += gate_gradients(norm)[channels].to(gradients_U.dtype)  # tied layers share units
        observed_U = sent_to(torch.from_numpy(plan.mask_U & self.readable_U), self.network.device)
        return Gates(gradients_U, observed_U, num_images)
