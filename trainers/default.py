"""One iteration of VR-PGE, and evaluation of a fixed subnet.

Several ranks (see `utils/ranks/exchange.py`) take a part of each batch; here B is what this rank has of it.

Legend: B batch, U maskable units of the network, K masks drawn in one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.algorithm.estimators import ESTIMATORS, Estimator, Gates, Memory
from utils.algorithm.masks import sample_masks
from utils.algorithm.projection import project_onto_budget, project_onto_cost
from utils.channels.network import SparseNetwork
from utils.channels.norms import GateReader
from utils.channels.plan import Plan
from utils.ranks.exchange import (
    average_gradients_,
    averaged,
    broadcast_scores_,
    merged_statistics,
    num_ranks,
    rank,
    summed,
)
from utils.run.metrics import MetricSums, count_correct

Batches = Iterable[tuple[Tensor, Tensor]]
TIGHT = 0.999  # of a budget: as good as spent


@dataclass(frozen=True)
class Draw:
    """The masks of one step and the channels they leave, drawn at the end of the step before."""

    masks_KU: Tensor  # (K, U) bool on the device, as drawn: what the estimator sees
    plans: list[Plan]  # what the passes run: the layer guard applied
    of_all_ranks: Tensor | None = None  # (ranks x K, U) where every rank draws its own, in the order of ranks

    @property
    def drawn(self) -> Tensor:
        """The masks of all ranks, the same on each of them."""
        return self.masks_KU if self.of_all_ranks is None else self.of_all_ranks


@dataclass(frozen=True)
class StepSettings:
    """What changes from step to step.

    Attributes:
        weight_lr, score_lr: learning rates of this step.
        kept_fraction: the budget as a fraction of what it counts (`--budget`): units, parameters or multiply-adds.
        update_scores: whether this step has a structure step (`--score-every`).
        gauge: whether this step measures its share of signal (`--gauge-every`).
        progress: finished fraction of the steps of the phase.
    """

    weight_lr: float
    score_lr: float = 0.0
    kept_fraction: float = 1.0
    update_scores: bool = True
    gauge: bool = False
    progress: float = 0.0


@dataclass
class SearchState:
    """Everything that one iteration reads and changes.

    Attributes:
        generator: of the masks, on the device of the scores.
        draw: the masks of the next step; None for methods that draw none.
        coin: of the control that tosses which mask gets which loss, on the same device; None: each gets its own.
        gauge: of the masks that `--gauge-every` measures with, which train nothing; None without.
        memory: what an estimator that learns knows from earlier steps; None for the others.
        gate_reader: of an estimator that learns from gates; None for the others.
    """

    network: SparseNetwork
    weight_optimizer: torch.optim.Optimizer
    score_optimizer: torch.optim.Optimizer
    generator: torch.Generator
    draw: Draw | None
    coin: torch.Generator | None = None
    gauge: torch.Generator | None = None
    memory: Memory | None = None
    gate_reader: GateReader | None = None


@dataclass(frozen=True)
class PendingDraw:
    """Masks that are drawn, their copy to the host under way. It is the only one in a step."""

    masks_KU: Tensor
    on_host: Tensor
    arrived: torch.cuda.Event | None
    of_all_ranks: Tensor | None

    def finish(self, network: SparseNetwork) -> Draw:
        """Waits for the copy, then finds the channels that each mask leaves."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return Draw(self.masks_KU, [network.plan(mask_U) for mask_U in self.on_host.numpy()], self.of_all_ranks)


def start_draw(
    network: SparseNetwork,
    generator: torch.Generator,
    num_masks: int,
    num_drawing: int = 1,
    sample: Callable[[Tensor, torch.Generator, int], Tensor] = sample_masks,
) -> PendingDraw:
    """Draws from the current scores and sends the masks to the host, without waiting for the device.

    Args:
        generator: the same on all ranks.
        num_drawing: how many ranks draw masks of their own, see `num_drawing_ranks`. Each draws those of all and takes
            its part: the generators stay the same, so a checkpoint holds one for all.
        sample: how the estimator draws, see `Estimator`.
    """
    drawn = [sample(network.scores, generator, num_masks) for _ in range(num_drawing)]
    return _send(drawn[rank() if num_drawing > 1 else 0], torch.cat(drawn) if num_drawing > 1 else None)


def _send(masks_KU: Tensor, of_all_ranks: Tensor | None) -> PendingDraw:
    on_host = masks_KU.to("cpu", non_blocking=True)
    arrived = torch.cuda.current_stream(masks_KU.device).record_event() if masks_KU.is_cuda else None
    return PendingDraw(masks_KU, on_host, arrived, of_all_ranks)


def draw_masks(network: SparseNetwork, generator: torch.Generator, num_masks: int, *options: Any) -> Draw:
    """Draws from the current scores; arguments as those of `start_draw`."""
    return start_draw(network, generator, num_masks, *options).finish(network)


def stored_draw(network: SparseNetwork, masks: Tensor, num_masks: int) -> Draw:
    """The draw that a checkpoint holds: (num_masks, U) bool, or as many for every rank."""
    of_all_ranks = masks if len(masks) > num_masks else None
    first = rank() * num_masks if len(masks) > num_masks else 0
    return _send(masks[first : first + num_masks], of_all_ranks).finish(network)


def redraw_plans(network: SparseNetwork, draw: Draw) -> Draw:
    """The same masks again, after the parameters that they point into have changed."""
    return replace(draw, plans=[network.plan(plan.mask_U) for plan in draw.plans])


def calculateGrad(
    scores_U: torch.nn.Parameter,
    masks_KU: Tensor,
    losses: Tensor,
    alpha: float,
    estimator: Estimator | None = None,
    memory: Memory | None = None,
) -> None:
    """Writes the variance-reduced policy gradient into `scores_U.grad`; no backward pass.

    Args:
        losses: (K,) of the batch under each mask; or (K - 1, 2) of parts of it under the first and one other mask.
        estimator: another one than VR-PGE.
        memory: of earlier steps, for an estimator that has one.
    """
    estimator = estimator or ESTIMATORS["vrpge" if losses.dim() == 1 else "subbatch"]
    scores_U.grad = estimator.gradient(scores_U.detach(), masks_KU, losses.detach(), alpha, memory)


def project_scores_(network: SparseNetwork, kept_fraction: float, by_layer: bool, budget: str = "channels") -> Tensor:
    """Puts the scores back into the box and the budget, over all layers or each on its own. Returns v (the largest)."""
    if budget != "channels":
        cost = network.expected_cost(budget)
        projected, v = project_onto_cost(network.scores.data, cost, kept_fraction * cost.dense)
        network.scores.data.copy_(projected)
        return v
    groups = network.unit_groups() if by_layer else [slice(None)]
    thresholds = []
    for part in (network.scores.data[group] for group in groups):
        projected, v = project_onto_budget(part, kept_fraction * part.numel())
        part.copy_(projected)
        thresholds.append(v)
    return torch.stack(thresholds).max()


def remove_normal_(network: SparseNetwork, kept_fraction: float, by_layer: bool, budget: str = "channels") -> None:
    """Takes from `scores.grad` the part along which a descent would exceed the budget, where that is spent.

    The projection would undo this part. Where keeping any unit helps, it is most of the gradient, and Adam, which
    scales every coordinate by its own size, would see little else. What is left adds up to nothing over the scores
    between 0 and 1, so a score may move that the estimate is 0 for.

    Args:
        kept_fraction: the budget that the scores were last projected onto, or a lower one.
    Source: projected gradients; ours here.
    """
    gradient, scores = network.scores.grad, network.scores.data
    free = (scores > 0) & (scores < 1)
    if budget != "channels":
        cost = network.expected_cost(budget)
        spent, normal = cost.with_gradient(scores.double().cpu().numpy())
        normals = [torch.from_numpy(normal).to(gradient) * free * (spent >= TIGHT * kept_fraction * cost.dense)]
    else:
        groups = network.unit_groups() if by_layer else [slice(None)]
        normals = [torch.zeros_like(gradient) for _ in groups]
        for normal, group in zip(normals, groups, strict=True):
            is_spent = scores[group].sum() >= TIGHT * kept_fraction * scores[group].numel()
            normal[group] = (free[group] & is_spent).to(gradient.dtype)
    for normal in normals:
        square = normal @ normal
        outwards = (gradient @ normal / square.masked_fill(square <= 0, 1.0)).clamp(max=0)
        gradient.sub_(normal * outwards)


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
    """One iteration: sparse forward passes, score step and projection, one sparse backward and weight step.

    Args:
        images: (B, C, H, W) on the device.
        labels: (B,) int64.
        settings: learning rates and budget of this step.
        config: `args.Config`; read are `sparsity` and `train`.
    Returns: sums over the batch (of all ranks) on the device: loss, top1, top5, loss_difference, v.
    """
    network, draw, sparsity, size = state.network, state.draw, config.sparsity, len(labels)
    weights, scores = network.weight_parameters(), network.scores
    set_learning_rate(state.weight_optimizer, settings.weight_lr)
    set_learning_rate(state.score_optimizer, settings.score_lr)

    # sparse forward passes on the same batch
    num_passes = num_full_passes(sparsity, settings.update_scores)
    with merged_statistics(network, draw.plans[: sparsity.weight_samples], size):
        losses, logits = sparse_passes(network, draw.plans[:num_passes], images, labels, config)
    weight_loss = torch.stack(losses[: sparsity.weight_samples]).mean()

    # structure step: policy gradient, optimizer, projection; then the next draw
    scores.grad = None
    if settings.update_scores and sparsity.subbatch:
        pairs = part_losses(network, draw.plans[1:], images, labels, logits, config)
        pairs = score_gradient_(scores, draw.masks_KU, pairs, size, sparsity, state.coin)
        difference = (pairs[:, 0] - pairs[:, 1]).abs().mean()
    elif settings.update_scores:
        losses_K = torch.stack([loss.detach() for loss in losses])
        losses_K = score_gradient_(scores, draw.masks_KU, losses_K, size, sparsity, state.coin, state.memory)
        difference = (losses_K[0] - losses_K[min(1, len(losses_K) - 1)]).abs()
    else:
        difference = torch.zeros_like(weight_loss)
    if scores.grad is not None and sparsity.score_gradient == "tangent":
        remove_normal_(network, settings.kept_fraction, sparsity.constrain_by_layer, sparsity.budget)
    if config.train.clip_jointly:  # one norm over both couples the steps, so backward has to come first
        gates = chain_rule(state, weight_loss, config, size)
        torch.nn.utils.clip_grad_norm_([*weights, scores], config.train.clip_norm)
    else:
        torch.nn.utils.clip_grad_norm_([scores], config.train.clip_norm)
    state.score_optimizer.step()  # does nothing where there is no gradient
    v = project_scores_(network, settings.kept_fraction, sparsity.constrain_by_layer, sparsity.budget)
    broadcast_scores_(network)
    next_draw = start_draw(network, state.generator, *how_to_draw(sparsity))

    # weight step: chain rule through the kept channels; a GPU works on it while the host plans the next passes
    if not config.train.clip_jointly:
        gates = chain_rule(state, weight_loss, config, size)
        torch.nn.utils.clip_grad_norm_(weights, config.train.clip_norm)
    state.weight_optimizer.step()
    if state.memory is not None and settings.update_scores:  # the estimate of this step must not depend on it
        state.memory = estimator_of(sparsity).update(state.memory, draw.masks_KU, losses_K, gates)
    state.draw = next_draw.finish(network)

    sums = {**batch_sums(losses[0].detach(), logits, labels), "loss_difference": difference * size, "v": v * size}
    return dict(zip(sums, summed(*sums.values()), strict=True))


def chain_rule(state: SearchState, loss: Tensor, config: Any, num_images: int) -> Gates | None:
    """Gradients of all weights, and what an estimator may want to know of them before they are clipped."""
    backward(state.network, loss, state.network.weight_parameters(), num_images)
    reader = state.gate_reader
    return None if reader is None else reader.read(state.draw.plans[0], config.train.batch_size)


def num_drawing_ranks(sparsity: Any) -> int:
    """How many ranks draw masks of their own; 1 if all have the same."""
    return num_ranks() if sparsity.rank_masks == "independent" else 1


def score_gradient_(
    scores_U: torch.nn.Parameter,
    masks_KU: Tensor,
    losses: Tensor,
    num_images: int,
    sparsity: Any,
    coin: torch.Generator | None = None,
    memory: Memory | None = None,
) -> Tensor:
    """Writes the estimate of a step into `scores_U.grad`, the same on all ranks. Returns the losses that it is made of.

    Where all ranks have the same masks, it is made of the losses of the whole batch. Where each has its own, it is the
    mean of the ranks' estimates, so its variance falls with their number.

    Args:
        losses: as those of `calculateGrad`, of this rank's images.
        num_images: what the losses are means of.
        coin: deals the losses out to the masks at random, see `tossed`.
        memory: of an estimator that has one; the same on all ranks, as such an estimator needs shared masks.
    """
    shared = sparsity.rank_masks == "shared"
    losses = averaged(losses, num_images) if shared else losses
    losses = losses if coin is None else tossed(losses, coin)
    other = () if sparsity.estimator in ("vrpge", "subbatch") else (ESTIMATORS[sparsity.estimator], memory)
    calculateGrad(scores_U, masks_KU, losses, sparsity.alpha, *other)
    if not shared:
        scores_U.grad = averaged(scores_U.grad, num_images)
    return losses


def tossed(losses: Tensor, coin: torch.Generator) -> Tensor:
    """The losses of each row in random order: of two, their difference gets the sign of a fair coin.

    Args:
        losses: (K,) or (parts, 2).
        coin: on their device.
    """
    order = torch.rand(losses.shape, generator=coin, device=losses.device).argsort(dim=-1)
    return losses.gather(-1, order)


def estimator_of(sparsity: Any) -> Estimator:
    return ESTIMATORS["subbatch" if sparsity.subbatch else sparsity.estimator]


def first_memory(scores_U: Tensor, sparsity: Any) -> Memory | None:
    """What the estimator knows before the first step; None if it never learns."""
    start = estimator_of(sparsity).start
    return None if start is None else start(scores_U.detach())


def how_to_draw(sparsity: Any) -> tuple[int, int, Callable[[Tensor, torch.Generator, int], Tensor]]:
    """The arguments of `start_draw` behind the generator."""
    return num_masks(sparsity), num_drawing_ranks(sparsity), estimator_of(sparsity).sample


def num_masks(sparsity: Any) -> int:
    """How many masks a step draws."""
    return 1 + sparsity.subbatch if sparsity.subbatch else sparsity.K


def num_full_passes(sparsity: Any, update_scores: bool) -> int:
    """How many of them run on the whole batch."""
    return sparsity.K if update_scores and not sparsity.subbatch else sparsity.weight_samples


def twin_of(plans: list[Plan], k: int) -> int | None:
    """The first plan before the k-th that keeps the same units, if there is one."""
    return next((j for j in range(k) if np.array_equal(plans[j].mask_U, plans[k].mask_U)), None)


def sparse_passes(
    network: SparseNetwork, plans: list[Plan], images: Tensor, labels: Tensor, config: Any
) -> tuple[list[Tensor], Tensor]:
    """Mean losses of the batch under each plan, and the logits under the first.

    Only the passes that feed the weights keep a graph and move batch-norm statistics.
    """
    losses: list[Tensor] = []
    for k, plan in enumerate(plans):
        feeds_weights = k < config.sparsity.weight_samples
        if not feeds_weights and (twin := twin_of(plans, k)) is not None:
            losses.append(losses[twin].detach())  # the same subnet on the same batch has the same loss
            continue
        with torch.set_grad_enabled(feeds_weights):
            loss, logits = forward_loss(network, plan, images, labels, config.train, feeds_weights)
        if k == 0:
            first_logits = logits.detach()
        losses.append(loss)
    return losses, first_logits


def part_losses(
    network: SparseNetwork, plans: list[Plan], images: Tensor, labels: Tensor, logits: Tensor, config: Any
) -> Tensor:
    """Losses of each part of the batch under the first mask and under one of its own: (parts, 2), no graph.

    All extra masks together cost one forward pass. Batch-norm normalises a part by its own statistics under the extra
    mask, so parts should not be small.
    """
    smoothing = config.train.label_smoothing
    pairs = []
    parts = (t.tensor_split(len(plans)) for t in (images, labels, logits))
    for plan, part, answers, own in zip(plans, *parts, strict=True):
        with torch.no_grad():
            first = F.cross_entropy(own, answers, label_smoothing=smoothing)
            loss, _ = forward_loss(network, plan, part, answers, config.train, update_statistics=False)
        pairs.append(torch.stack([first, loss]))
    return torch.stack(pairs)


def weight_step(
    network: SparseNetwork,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    images: Tensor,
    labels: Tensor,
    settings: StepSettings,
    config: Any,
    penalise: Callable[[SparseNetwork], None] | None = None,
) -> dict[str, Tensor]:
    """One ordinary training step of a fixed subnet (fine-tuning) or of a dense network (its full plan).

    Args:
        penalise: adds the gradients of a penalty, before they are clipped.
    """
    weights = network.weight_parameters()
    set_learning_rate(optimizer, settings.weight_lr)
    with merged_statistics(network, [plan], len(labels)):
        loss, logits = forward_loss(network, plan, images, labels, config.train, update_statistics=True)
    backward(network, loss, weights, len(labels))
    if penalise is not None:
        penalise(network)
    torch.nn.utils.clip_grad_norm_(weights, config.train.clip_norm)
    optimizer.step()
    sums = batch_sums(loss.detach(), logits.detach(), labels)
    return dict(zip(sums, summed(*sums.values()), strict=True))


def evaluate(network: SparseNetwork, plan: Plan, batches: Batches, config: Any) -> dict[str, float]:
    """Loss, top-1 and top-5 (per cent) of one fixed subnet in eval mode. Changes no tensor and no generator.

    Args:
        batches: this rank's; there may be none. The numbers are of all ranks' images, each counted once.
    """
    sums = MetricSums()
    sums.add(dict.fromkeys(("loss", "top1", "top5"), torch.zeros((), device=network.device)), 0)
    with eval_mode(network), torch.inference_mode():
        for images, labels in batches:
            loss, logits = forward_loss(network, plan, images, labels, config, update_statistics=False)
            sums.add(batch_sums(loss, logits, labels), len(labels))
    sums.add_other_ranks()
    return {name: value * (1 if name == "loss" else 100) for name, value in sums.means().items()}


@contextmanager
def eval_mode(network: SparseNetwork) -> Iterator[None]:
    was_training = network.model.training
    network.model.eval()
    try:
        yield
    finally:
        network.model.train(was_training)


def batch_sums(loss: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    top1, top5 = (count_correct(logits, labels, k) for k in (1, 5))
    return {"loss": loss * len(labels), "top1": top1, "top5": top5}


def backward(network: SparseNetwork, loss: Tensor, weights: list[torch.nn.Parameter], num_images: int) -> None:
    """Fresh gradients of all weights: those of dropped units are zero, so momentum and decay still move them.

    They are means over the whole batch: over the ranks, each with the weight of its number of images.
    """
    network.clear_gradients()
    loss.backward()
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    average_gradients_(weights, num_images)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
