"""Soft gates in place of drawn masks: the dense network with every unit multiplied by a number in [0, 1].

Legend: U units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from utils.channels.graph import ChannelGraph, Segment
from utils.channels.network import SparseNetwork
from utils.conv_type import SubnetBatchNorm, SubnetConv

SMALLEST = 1e-6  # a score nearer to 0 or 1 has the gate of this one: its logit would be infinite


def concrete_gates(scores_U: Tensor, noise_U: Tensor, temperature: float) -> Tensor:
    """Relaxed Bernoulli masks, differentiable in the scores.

        gate = sigmoid((logit(s) + noise) / temperature)

    With logistic noise a gate is above 1/2 with probability s, whatever the temperature; as that falls to 0 the gate
    becomes a mask. A score in reach of 0 or 1 passes the gradient at `SMALLEST` on, so that it can come back.

    Args:
        scores_U: (U,) in [0, 1].
        noise_U: (U,).
        temperature: above 0.
    Source: Maddison, Mnih, Teh, "The Concrete Distribution", ICLR 2017; for channels Zhou, Zhang, Xu, Zhang,
        "Effective Sparsification of Neural Networks with Global Sparsity Constraint", CVPR 2021 (ProbMask).
    """
    inside_U = scores_U + (scores_U.clamp(SMALLEST, 1 - SMALLEST) - scores_U).detach()
    return torch.sigmoid((torch.logit(inside_U) + noise_U) / temperature)


def logistic_noise(num_units: int, generator: torch.Generator) -> Tensor:
    """(num_units,) on the device of the generator."""
    uniform_U = torch.rand(num_units, generator=generator, device=generator.device)
    return torch.logit(uniform_U, eps=SMALLEST)


def gates_of_spaces(graph: ChannelGraph, gates_U: Tensor) -> list[Tensor | None]:
    """For each space the gates of its channels; None if all always exist.

    A channel with several writers exists as far as any of them is open: 1 - prod (1 - gate), which on masks is the rule
    of `ChannelGraph.live_channels`.
    """

    def of_segment(segment: Segment) -> Tensor:
        if not segment.writers:
            return gates_U.new_ones(segment.width)
        parts = torch.stack([gates_U[first : first + segment.width] for first in sorted(segment.writers)])
        return parts[0] if len(parts) == 1 else 1 - (1 - parts).prod(dim=0)

    return [None if s.full else torch.cat([of_segment(segment) for segment in s.segments]) for s in graph.spaces]


@contextmanager
def gated(network: SparseNetwork, gates_U: Tensor) -> Iterator[None]:
    """Inside, the dense network (`network.model`) multiplies every unit by its gate; on masks, the masked reference.

    Gates act behind batch-norm, which would undo them. A layer is gated itself only where something else reads it.
    Running statistics stay as they are: subnets get their own.

    Args:
        gates_U: (U,) in [0, 1].
    """
    graph = network.graph
    gates = gates_of_spaces(graph, gates_U)
    not_only_normed = {i for op in graph.ops if op.kind != "norm" for i in op.inputs}
    for i, op in enumerate(graph.ops):
        if isinstance(op.module, SubnetConv) and i in not_only_normed:
            op.module.mask = gates[op.space]
        elif isinstance(op.module, SubnetBatchNorm):
            op.module.live = gates[op.space]
            op.module.update_statistics = False
    try:
        yield
    finally:
        for op in graph.ops:
            if isinstance(op.module, SubnetConv):
                op.module.mask = None
            elif isinstance(op.module, SubnetBatchNorm):
                op.module.live = None
                op.module.update_statistics = True
