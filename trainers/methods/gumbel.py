"""Scores trained by backward through soft gates, as ProbMask does: what VR-PGE saves is the price of this.

Legend: U maskable units of the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.default import StepResult, StepSettings, backward_, batch_sums, clipped_step_
from trainers.methods.vrpge import ScoreMethod
from trainers.state import RunState
from utils.algorithm.transfer import sent_to
from utils.channels.graph import ChannelGraph
from utils.channels.masked import maskable_ops, masks_set
from utils.channels.network import SparseNetwork
from utils.channels.spaces import Segment
from utils.ranks.exchange import averaged, broadcast_scores_

FIRST_TEMPERATURE, LAST_TEMPERATURE = 1.0, 0.03  # released code of ProbMask, main.py, where it falls once an epoch
SMALLEST = 1e-6  # a score nearer to 0 or 1 has the gate of this one, because its logit would be infinite


class Gumbel(ScoreMethod):
    """One dense forward and one dense backward pass under soft gates, which train weights and scores alike.

    The gates are soft, not rounded, so their loss has an exact gradient; they close as the temperature falls. Scores
    have the optimizer, the projection and the choice of the subnet of VR-PGE.

    Source: Zhou, Zhang, Xu, Zhang, "Effective Sparsification of Neural Networks with Global Sparsity Constraint",
        CVPR 2021, and its released code (utils/conv_type.py), there on single weights and with several draws a step.
    """

    def step(self, run: RunState, images: Tensor, labels: Tensor, now: StepSettings) -> StepResult:
        """Metrics: loss, top1, top5, v."""
        search, network, train, size = run.search, run.network, self.config.train, len(labels)
        leaf_U = network.scores.detach().clone().requires_grad_()
        noise_U = sent_to(logistic_noise(len(leaf_U), search.generator), leaf_U.device)
        gates_U = concrete_gates(leaf_U, noise_U, temperature(now.progress))
        with gated(network, gates_U), network.autocast():
            logits = network.model(images)
        logits = logits.float() if network.precision == "bf16" else logits
        loss = F.cross_entropy(logits, labels, label_smoothing=train.label_smoothing)
        backward_(network, loss, size)
        network.scores.grad = averaged(leaf_U.grad, size)
        clipped_step_(search.score_optimizer, [network.scores], now.score_lr, train.clip_norm)
        v = search.budget.project_(now.keep_ratio)
        broadcast_scores_(network.scores)
        clipped_step_(search.weight_optimizer, network.weight_parameters(), now.weight_lr, train.clip_norm)
        metrics = batch_sums(loss, logits, labels) | {"v": v * size}
        return StepResult.of(network, [network.dense_plan], metrics)


def temperature(progress: float) -> float:
    """Falls linearly over the search.

    Args:
        progress: finished fraction of the steps, in [0, 1].
    """
    return FIRST_TEMPERATURE + (LAST_TEMPERATURE - FIRST_TEMPERATURE) * progress


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
    read_elsewhere = {graph.ops[i].node for op in graph.ops if op.kind != "norm" for i in op.inputs}
    masks = [
        (op, gates[op.space] if op.kind == "norm" or op.node in read_elsewhere else None)
        for op in maskable_ops(graph.ops)
    ]
    with masks_set(masks, update_statistics=False):
        yield
