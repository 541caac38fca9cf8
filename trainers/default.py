"""One iteration of VR-PGE, and evaluation of a fixed subnet.

Legend: B batch, U maskable units of the network, K masks drawn in one step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.estimator import vrpge_gradient
from utils.masks import sample_masks
from utils.metrics import MetricSums, count_correct
from utils.network import SparseNetwork
from utils.plan import Plan
from utils.projection import project_onto_budget

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Draw:
    """The masks of one step and the channels they leave, drawn at the end of the step before."""

    masks_KU: Tensor  # (K, U) bool on the device, as drawn: what the estimator sees
    plans: list[Plan]  # what the passes run: the layer guard applied


@dataclass(frozen=True)
class StepSettings:
    """What changes from step to step.

    Attributes:
        weight_lr, score_lr: learning rates of this step.
        kept_fraction: the budget as a fraction of the units.
    """

    weight_lr: float
    score_lr: float = 0.0
    kept_fraction: float = 1.0


@dataclass
class SearchState:
    """Everything that one iteration reads and changes."""

    network: SparseNetwork
    weight_optimizer: torch.optim.Optimizer
    score_optimizer: torch.optim.Optimizer
    generator: torch.Generator  # of the masks, on the device of the scores
    draw: Draw


def draw_masks(network: SparseNetwork, generator: torch.Generator, num_masks: int) -> Draw:
    """Draws from the current scores. The masks going to the host is the one wait for the device in a step."""
    masks_KU = sample_masks(network.scores, generator, num_masks)
    plans = [network.plan(mask_U) for mask_U in masks_KU.cpu().numpy()]
    return Draw(masks_KU, plans)


def calculateGrad(scores_U: torch.nn.Parameter, masks_KU: Tensor, losses_K: Tensor, alpha: float) -> None:
    """Writes the variance-reduced policy gradient into `scores_U.grad` (see `utils/estimator.py`); no backward."""
    scores_U.grad = vrpge_gradient(scores_U.detach(), masks_KU, losses_K.detach(), alpha)


def project_scores_(network: SparseNetwork, kept_fraction: float, by_layer: bool) -> Tensor:
    """Puts the scores back into the box and the budget, over all layers or each on its own. Returns v (the largest)."""
    parts = network.split(network.scores.data) if by_layer else (network.scores.data,)
    thresholds = []
    for part in parts:
        projected, v = project_onto_budget(part, kept_fraction * part.numel())
        part.copy_(projected)
        thresholds.append(v)
    return torch.stack(thresholds).max()


def forward_loss(
    network: SparseNetwork, plan: Plan, images: Tensor, labels: Tensor, config: Any, update_statistics: bool
) -> tuple[Tensor, Tensor]:
    """Mean loss (float32 or wider, whatever the precision of the layers) and logits under one plan."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        logits = network(images, plan, update_statistics)
    logits = logits.float() if config.precision == "bf16" else logits
    return F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing), logits


def train_step(
    state: SearchState, images: Tensor, labels: Tensor, settings: StepSettings, config: Any
) -> dict[str, Tensor]:
    """One iteration: K sparse forward passes, score step and projection, one sparse backward and weight step.

    Args:
        images: (B, C, H, W) on the device.
        labels: (B,) int64.
        settings: learning rates and budget of this step.
        config: `args.Config`; read are `sparsity` and `train`.
    Returns: sums over the batch on the device: loss, top1, top5, loss_difference, v.
    """
    network, draw, sparsity = state.network, state.draw, config.sparsity
    weights, scores = network.weight_parameters(), network.scores
    _set_learning_rate(state.weight_optimizer, settings.weight_lr)
    _set_learning_rate(state.score_optimizer, settings.score_lr)

    # K sparse forward passes on the same batch; only those of the weight step keep a graph and move batch-norm
    losses: list[Tensor] = []
    for k, plan in enumerate(draw.plans):
        feeds_weights = k < sparsity.weight_samples
        twin = next((j for j in range(k) if np.array_equal(draw.plans[j].mask_U, plan.mask_U)), None)
        if twin is not None and not feeds_weights:
            losses.append(losses[twin].detach())  # the same subnet on the same batch has the same loss
            continue
        with torch.set_grad_enabled(feeds_weights):
            loss, logits = forward_loss(network, plan, images, labels, config.train, feeds_weights)
        if k == 0:
            first_logits = logits.detach()
        losses.append(loss)
    losses_K = torch.stack([loss.detach() for loss in losses])
    weight_loss = torch.stack(losses[: sparsity.weight_samples]).mean()

    # structure step: policy gradient, optimizer, projection; then the next draw
    calculateGrad(scores, draw.masks_KU, losses_K, sparsity.alpha)
    if config.train.clip_jointly:  # one norm over both couples the steps, so backward has to come first
        _backward(weight_loss, weights)
        torch.nn.utils.clip_grad_norm_([*weights, scores], config.train.clip_norm)
    else:
        torch.nn.utils.clip_grad_norm_([scores], config.train.clip_norm)
    state.score_optimizer.step()
    v = project_scores_(network, settings.kept_fraction, sparsity.constrain_by_layer)
    state.draw = draw_masks(network, state.generator, sparsity.K)

    # weight step: chain rule through the kept channels, queued behind the draw so that the host's planning is hidden
    if not config.train.clip_jointly:
        _backward(weight_loss, weights)
        torch.nn.utils.clip_grad_norm_(weights, config.train.clip_norm)
    state.weight_optimizer.step()

    size = len(labels)
    difference = (losses_K[0] - losses_K[1]).abs()
    return {**_batch_sums(losses_K[0], first_logits, labels), "loss_difference": difference * size, "v": v * size}


def weight_step(
    network: SparseNetwork,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    images: Tensor,
    labels: Tensor,
    settings: StepSettings,
    config: Any,
) -> dict[str, Tensor]:
    """One ordinary training step of a fixed subnet (fine-tuning) or of a dense network (its full plan)."""
    weights = network.weight_parameters()
    _set_learning_rate(optimizer, settings.weight_lr)
    loss, logits = forward_loss(network, plan, images, labels, config.train, update_statistics=True)
    _backward(loss, weights)
    torch.nn.utils.clip_grad_norm_(weights, config.train.clip_norm)
    optimizer.step()
    return _batch_sums(loss.detach(), logits.detach(), labels)


def evaluate(network: SparseNetwork, plan: Plan, batches: Batches, config: Any) -> dict[str, float]:
    """Loss, top-1 and top-5 (per cent) of one fixed subnet in eval mode. Changes no tensor and no generator."""
    sums = MetricSums()
    with eval_mode(network), torch.inference_mode():
        for images, labels in batches:
            loss, logits = forward_loss(network, plan, images, labels, config, update_statistics=False)
            sums.add(_batch_sums(loss, logits, labels), len(labels))
    return {name: value * (1 if name == "loss" else 100) for name, value in sums.means().items()}


@contextmanager
def eval_mode(network: SparseNetwork) -> Iterator[None]:
    was_training = network.model.training
    network.model.eval()
    try:
        yield
    finally:
        network.model.train(was_training)


def _batch_sums(loss: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    top1, top5 = (count_correct(logits, labels, k) for k in (1, 5))
    return {"loss": loss * len(labels), "top1": top1, "top5": top5}


def _backward(loss: Tensor, weights: list[torch.nn.Parameter]) -> None:
    """Fresh gradients of all weights: those of dropped units are zero, so momentum and decay still move them."""
    for weight in weights:
        weight.grad = None
    loss.backward()
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)


def _set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
