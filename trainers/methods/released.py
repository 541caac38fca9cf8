"""The training step of the released code, number by number.

It differs from `train_step` in four points. The masks multiply convolution weights only, so the shifts of batch-norms
leak through dropped channels (execution "released" of `SparseNetwork`). All masks feed the weight gradient, each with a
backward pass. One norm over weights and scores clips both. Batch-norm statistics move in every pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.default import (
    StepResult,
    StepSettings,
    backward_,
    batch_sums,
    calculateGrad,
    draw_masks,
    set_learning_rate,
)
from trainers.methods.vrpge import PolicyGradient
from trainers.state import RunState
from utils.ranks.exchange import averaged, broadcast_scores_, merged_statistics


class Released(PolicyGradient):
    """VR-PGE as the released code computes it, with an exact projection.

    Source: released code of Zhou et al., NeurIPS 2021 (`VRPGE-Sparse-Training`).
    """

    def step(self, run: RunState, images: Tensor, labels: Tensor, now: StepSettings) -> StepResult:
        search, network, size, train = run.search, run.network, len(labels), self.config.train
        plans = search.masks.plans(network)
        with merged_statistics(network, plans, size):
            logits = [network(images, plan) for plan in plans]
        losses_K = torch.stack([F.cross_entropy(out, labels, label_smoothing=train.label_smoothing) for out in logits])

        seen_K = averaged(losses_K.detach(), size)
        calculateGrad(network.scores, search.masks.own_KU, seen_K, search.estimator)
        backward_(network, losses_K.mean(), size)
        torch.nn.utils.clip_grad_norm_([*network.weight_parameters(), network.scores], train.clip_norm)
        set_learning_rate(search.score_optimizer, now.score_lr)
        search.score_optimizer.step()
        v = search.budget.project_(now.keep_ratio)
        broadcast_scores_(network.scores)
        search.masks = draw_masks(search, self.config)
        set_learning_rate(search.weight_optimizer, now.weight_lr)
        search.weight_optimizer.step()

        difference = (seen_K[0] - seen_K[1]).abs()
        metrics = batch_sums(losses_K[0], logits[0], labels) | {"loss_difference": difference * size, "v": v * size}
        return StepResult.of(network, plans, metrics, num_backward=len(plans))
