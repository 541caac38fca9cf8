"""How much of an estimated score gradient is signal, watched while training (`--gauge-every`).

Two estimates that share neither images nor masks have a product whose mean is |E g|^2, and each has a mean square
E |g|^2; the share of signal is their ratio. `python -m tools.gauge` measures it more closely, at one checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from args import Config
from trainers.default import (
    SearchState,
    draw_masks,
    forward_loss,
    how_to_draw,
    part_losses,
    score_gradient_,
)
from trainers.methods.base import cost_of
from utils.run.metrics import Cost

NAMES = ("gauge_count", "gauge_product", "gauge_product_squared", "gauge_square")


def no_share(device: torch.device) -> dict[str, Tensor]:
    """What a step adds that does not measure."""
    return dict.fromkeys(NAMES, torch.zeros((), dtype=torch.float64, device=device))


def measure_share(
    search: SearchState, images: Tensor, labels: Tensor, config: Config
) -> tuple[dict[str, Tensor], list[Cost]]:
    """Estimates the score gradient twice, on one half of the batch each. Trains nothing.

    Args:
        images, labels: of this rank, four or more.
    Returns: what the step adds to the sums that `share_of_signal` reads, and the cost of the passes per image.
    """
    halves = zip(images.tensor_split(2), labels.tensor_split(2), strict=True)
    (one, cost), (other, other_cost) = (_estimate(search, *half, config) for half in halves)
    product, square = one @ other, (one @ one + other @ other) / 2
    values = (torch.ones_like(product), product, product**2, square)
    pairs = zip(cost, other_cost, strict=True)
    mean_cost = [tuple((a + b) // 2 for a, b in zip(*pair, strict=True)) for pair in pairs]
    return dict(zip(NAMES, values, strict=True)), mean_cost


def share_of_signal(means: Mapping[str, float], num_images: int) -> dict[str, float]:
    """Share of signal of an epoch, and its standard error, for results.csv; empty if nothing was measured.

    One product is almost all noise, so the share of an epoch may be negative.

    Args:
        means: of what the steps added, per image.
        num_images: of the epoch.
    """
    if not means.get("gauge_square"):  # not measured, or no score is left to be decided
        return {}
    count = means["gauge_count"] * num_images
    product, squared, square = (means[name] / means["gauge_count"] for name in NAMES[1:])
    values = {"share_of_signal": product / square}
    if count > 1.5:
        values["share_of_signal_error"] = math.sqrt(max(squared - product**2, 0) / (count - 1)) / square
    return values


def _estimate(search: SearchState, images: Tensor, labels: Tensor, config: Config) -> tuple[Tensor, list[Cost]]:
    """One estimate (U,) in float64, made as that of a step but from masks of its own, and raw: see `score_gradient`."""
    network, sparsity = search.network, config.sparsity
    draw = draw_masks(network, search.gauge, *how_to_draw(sparsity))
    costs = [cost_of(network, plan) for plan in draw.plans]
    with torch.no_grad():
        passes = draw.plans[:1] if sparsity.subbatch else draw.plans
        results = [forward_loss(network, plan, images, labels, config.train, False) for plan in passes]
        losses = torch.stack([loss for loss, _ in results])
        if sparsity.subbatch:
            logits = results[0][1]
            losses = part_losses(network, draw.plans[1:], images, labels, logits, config)
            costs = [costs[0], tuple(sum(values) // sparsity.subbatch for values in zip(*costs[1:], strict=True))]
    scores = nn.Parameter(network.scores.detach().clone())
    coin = None if search.coin is None else search.gauge
    score_gradient_(scores, draw.masks_KU, losses, len(labels), sparsity, coin, search.memory)
    return scores.grad.double(), costs
