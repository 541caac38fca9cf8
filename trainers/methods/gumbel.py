"""Scores trained by backward through soft gates, as ProbMask does: what VR-PGE saves is the price of this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from args import Config
from trainers.default import StepSettings, backward, batch_sums, project_scores_, set_learning_rate
from trainers.methods.base import StepCost
from trainers.methods.gates import concrete_gates, gated, logistic_noise
from trainers.methods.policy_gradient import ScoreMethod
from utils.ranks.exchange import averaged, broadcast_scores_, summed

if TYPE_CHECKING:
    from trainers.state import RunState

FIRST_TEMPERATURE, LAST_TEMPERATURE = 1.0, 0.03  # released code of ProbMask, main.py, where it falls once an epoch


@dataclass(frozen=True)
class Gumbel(ScoreMethod):
    """One dense forward and one dense backward under soft gates, which train weights and scores alike.

    Soft gates, not rounded ones: their loss has an exact gradient, and they close as the temperature falls. Scores have
    the optimizer, the projection and the choice of the subnet of VR-PGE.

    Source: Zhou, Zhang, Xu, Zhang, "Effective Sparsification of Neural Networks with Global Sparsity Constraint",
        CVPR 2021, and its released code (utils/conv_type.py): there on single weights, with several draws a step.
    """

    def step(
        self, run: RunState, images: Tensor, labels: Tensor, settings: StepSettings, config: Config
    ) -> tuple[dict[str, Tensor], StepCost]:
        """Metrics: loss, top1, top5, v."""
        search, network, scores = run.search, run.network, run.network.scores
        weights, size, clip_norm = network.weight_parameters(), len(labels), config.train.clip_norm
        set_learning_rate(search.weight_optimizer, settings.weight_lr)
        set_learning_rate(search.score_optimizer, settings.score_lr)
        leaf_U = scores.detach().clone().requires_grad_()
        gates_U = concrete_gates(leaf_U, logistic_noise(len(leaf_U), search.generator), temperature(settings.progress))
        bf16 = config.train.precision == "bf16"
        with gated(network, gates_U), torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            logits = network.model(images)
        logits = logits.float() if bf16 else logits
        loss = F.cross_entropy(logits, labels, label_smoothing=config.train.label_smoothing)
        backward(network, loss, weights, size)
        scores.grad = averaged(leaf_U.grad, size)
        for group in [[*weights, scores]] if config.train.clip_jointly else [weights, [scores]]:
            torch.nn.utils.clip_grad_norm_(group, clip_norm)
        search.score_optimizer.step()
        sparsity = config.sparsity
        v = project_scores_(network, settings.kept_fraction, sparsity.constrain_by_layer, sparsity.budget)
        broadcast_scores_(network)
        search.weight_optimizer.step()
        sums = {**batch_sums(loss.detach(), logits.detach(), labels), "v": v * size}
        cost = StepCost([(network.dense_macs, network.dense_macs)])
        return dict(zip(sums, summed(*sums.values()), strict=True)), cost


def temperature(progress: float) -> float:
    """Falls linearly over the search, to what it is in its last step but a little.

    Args:
        progress: finished fraction of the steps, in [0, 1].
    """
    return FIRST_TEMPERATURE + (LAST_TEMPERATURE - FIRST_TEMPERATURE) * progress
