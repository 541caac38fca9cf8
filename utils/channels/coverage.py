"""How much of a network can be masked, and what is left as it was."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from utils.channels.graph import Barrier, ChannelGraph, Op
from utils.channels.trace import NOISE_FUNCTIONS, NOISE_MODULES
from utils.conv_type import VRPGE, subnet_convs


@dataclass(frozen=True)
class Coverage:
    """What masks can do to a network. As text, it is what the conversion prints.

    Attributes:
        units: those that masks can drop.
        all_units: output channels of all layers that were made maskable.
        macs: multiply-adds of one image that vanish if all units are dropped.
        all_macs: multiply-adds of the whole network.
        barriers: operations through which channels cannot be followed, with the layers that stay dense around them.
        gates: layers that follow the channels of the map that they gate.
        unused: layers that never run.
        silenced: where noise was switched off.
    """

    units: int
    all_units: int
    macs: int
    all_macs: int
    barriers: list[Barrier]
    gates: list[str]
    unused: list[str]
    silenced: list[str]

    @classmethod
    def of(cls, graph: ChannelGraph, all_units: int, quiet: list[str]) -> Coverage:
        """Args: all_units and quiet as the attributes all_units and silenced."""

        def macs(kept: bool) -> int:
            live = graph.live_channels(np.full(graph.num_units, kept))
            return sum(graph.layer_macs([int(channels.sum()) for channels in live]).values())

        told = (graph.barriers, graph.gates, graph.unused, quiet)
        return cls(sum(graph.widths.values()), all_units, macs(True) - macs(False), macs(True), *told)

    @property
    def partial(self) -> bool:
        """Whether there is anything to tell: layers that were to be masked and are not, or noise switched off."""
        return bool(self.barriers or self.unused or self.silenced)

    def __str__(self) -> str:
        share = 100 * self.macs / max(1, self.all_macs)
        lines = [
            f"{self.units:,} of {self.all_units:,} channels can be masked, and {share:.1f} % of the FLOPs with them."
        ]
        for reason in dict.fromkeys(barrier.reason for barrier in self.barriers):
            alike = [barrier for barrier in self.barriers if barrier.reason == reason]
            layers = list(dict.fromkeys(name for barrier in alike for name in barrier.layers))
            stays = "stays" if len(layers) == 1 else "stay"
            where = _list([barrier.where for barrier in alike])
            lines.append(f"  {_list(layers)} {stays} dense because of {where}: {reason}")
        if self.gates:
            lines.append(f"  have no channels of their own, but those of the map that they gate: {_list(self.gates)}")
        if self.unused:
            lines.append(f"  never run when the network is evaluated, so they are not trained: {_list(self.unused)}")
        if self.silenced:
            lines.append(f"  noise that would enter the differences of losses is off: {_list(self.silenced)}")
        return "\n".join(lines)


def _list(names: list[str]) -> str:
    """The first three of them."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def keep_maskable(model: nn.Module, wanted: dict[str, int]) -> dict[str, VRPGE]:
    """The maskable layers that have units; all others become ordinary convolutions again."""
    for name, layer in subnet_convs(model).items():
        if name not in wanted:
            layer.unmask()
    return subnet_convs(model)


def bystanders(model: nn.Module, graph: ChannelGraph) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules with buffers that both executions leave to themselves: those of dense ops, and those that never run.

    The second are auxiliary heads: nobody uses their results, so a pass leaves their statistics as they are.
    """
    followed = {op.module for op in graph.ops if op.kind == "norm"}
    running = {module for op in graph.ops if op.node.op == "call_module" for module in op.module.modules()}
    having = [module for module in model.modules() if module not in followed and list(module.buffers(recurse=False))]
    return [module for module in having if module in running], [module for module in having if module not in running]


def silenced(model: nn.Module, graph: ChannelGraph) -> list[str]:
    """Switches dropout and stochastic depth off; returns where there was some.

    Calls of a function cannot be changed: see `without_noise` in `utils/channels/written.py`.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, NOISE_MODULES) and module.p > 0:
            module.p = 0.0
            found.append(f"{name} ({type(module).__name__})")
    return found + [graph.where(op) for op in graph.ops if is_noise(op)]


def is_noise(op: Op) -> bool:
    """Whether an operation is a call of a dropout function that would drop something."""
    p = op.node.args[1] if len(op.node.args) > 1 else op.node.kwargs.get("p", 0.5)
    return op.node.target in NOISE_FUNCTIONS and p != 0
