"""One iteration of VR-PGE, an ordinary training step, and the evaluation of a fixed subnet.

Several ranks (processes that train one network, see `utils/ranks`) take a part of each batch; here B is what this rank
has of it. A single process is one rank, and nothing is exchanged.

Legend: B batch, U maskable units of the network, K masks drawn in one step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from args import Config
from trainers.state import Masks, RunState, Search
from utils.algorithm.estimators.base import Estimator, Gates
from utils.algorithm.masks import sample_masks
from utils.algorithm.transfer import HostCopy, sent_to
from utils.channels.capacity import FixedShapes
from utils.channels.network import SparseNetwork
from utils.channels.plan import Plan, spread
from utils.ranks.exchange import (
    average_gradients_,
    averaged,
    broadcast_scores_,
    merged_statistics,
    num_ranks,
    rank,
    summed,
)
from utils.run.metrics import Cost, MetricSums, count_correct

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StepSettings:
    """What changes from step to step.

    Attributes:
        weight_lr, score_lr: learning rates of this step.
        keep_ratio: the budget, as a fraction of what it counts: channels, parameters or multiply-adds.
        update_scores: whether this step has a structure step (`--score-every`).
        progress: finished fraction of the steps of the phase.
    """

    weight_lr: float
    score_lr: float = 0.0
    keep_ratio: float = 1.0
    update_scores: bool = True
    progress: float = 0.0


@dataclass(frozen=True)
class StepResult:
    """What a step came to.

    Attributes:
        metrics: sums over the batch of all ranks, on the device: loss, top1, top5 and what a method adds.
        forward: the cost per image of every forward pass that ran on this rank.
        num_backward: how many of them, the first ones, also ran backward.
    """

    metrics: dict[str, Tensor]
    forward: list[Cost]
    num_backward: int = 1

    @classmethod
    def of(
        cls, network: SparseNetwork, ran: Sequence[Plan], metrics: dict[str, Tensor], num_backward: int = 1
    ) -> StepResult:
        """Sums the metrics over all ranks and counts the passes that ran."""
        totals = dict(zip(metrics, summed(*metrics.values()), strict=True))
        return cls(totals, [network.pass_cost(plan) for plan in ran], num_backward)


def train_step(search: Search, images: Tensor, labels: Tensor, now: StepSettings, config: Config) -> StepResult:
    """One iteration: sparse forward passes, structure step with projection, one sparse backward pass and weight step.

    Args:
        images: (B, C, H, W) on the device.
        labels: (B,) int64, or (B, classes) weights of the classes of mixed images.
        now: learning rates and budget of this step.
    Returns: metrics loss, top1, top5, loss_difference, v; each summed over the batch. With fixed shapes also
        unfit_steps: the number of images if the masks do not fit them.
    """
    network, masks, size = search.network, search.masks, len(labels)
    plans = masks.plans(network)  # of masks drawn one step ago: the only wait for the device
    ran, places = distinct(plans if now.update_scores else plans[:1])
    halves = SearchHalves(search, ran, images, labels, now.weight_lr, config)
    if search.replay is not None and plans[0].fixed:
        halves = search.replay.of(halves)

    # 1. One batch through the subnet of every mask. Only the first pass keeps a graph and moves batch-norm statistics.
    losses = halves.first()
    losses_K = torch.stack([losses[place] for place in places])

    # 2. Structure step, without a backward pass: loss differences, score gradient, optimizer, projection, next masks.
    if now.update_scores:
        losses_K = averaged(losses_K, size) if masks.shared else losses_K
        calculateGrad(network.scores, masks.own_KU, losses_K, search.estimator)
        if not masks.shared:  # every rank has an estimate of its own, and their mean has less noise
            network.scores.grad = averaged(network.scores.grad, size)
        if config.sparsity.score_gradient == "tangent":
            search.budget.remove_normal_(now.keep_ratio, masks.scores)
        clipped_step_(search.score_optimizer, [network.scores], now.score_lr, config.train.clip_norm)
    moved = HostCopy.of(network.scores.data) if search.budget.on_host else None
    if moved is None:
        v = search.budget.project_(now.keep_ratio)
        broadcast_scores_(network.scores)
        search.masks = draw_masks(search, config)

    # 3. Weight step: the chain rule through the channels that the first mask kept. A GPU works on it while the host
    # meets a budget of cost, draws masks from the scores that it then knows, and plans the passes of the next step.
    metrics, gates = halves.second()
    if moved is not None:
        v = project_on_host_(search, moved, now.keep_ratio, config)
    set_learning_rate(search.weight_optimizer, now.weight_lr)  # a step that was replayed has read a tensor
    if now.update_scores:
        search.estimator.observe(masks.own_KU, losses_K, gates)  # for later steps, never for this one

    difference = (losses_K[0] - losses_K[min(1, len(losses_K) - 1)]).abs()
    metrics = metrics | {"loss_difference": difference * size, "v": v * size}
    if network.shapes is not None:
        metrics["unfit_steps"] = difference.new_full((), 0.0 if plans[0].fixed else size)
    return StepResult.of(network, ran, metrics)


@dataclass
class SearchHalves:
    """What takes long in a search step: its forward passes, and backward with the weight step.

    See `trainers/replay.py`, which may record it.

    Attributes:
        plans: that run, each once; the first one also runs backward.
    """

    search: Search
    plans: list[Plan]
    images: Tensor
    labels: Tensor
    learning_rate: float | Tensor
    config: Config

    @property
    def group(self) -> FixedShapes | None:
        return self.search.network.shapes

    @property
    def kind(self) -> Hashable:
        return len(self.plans), self.images.shape, self.labels.shape

    @property
    def inputs(self) -> list[Tensor]:
        return [self.images, self.labels, torch.cat([one for plan in self.plans for one in plan.lists()])]

    def reading(self, inputs: Sequence[Tensor], learning_rate: Tensor) -> SearchHalves:
        images, labels, lists = inputs
        plans = spread(self.plans, lists)
        return replace(self, plans=plans, images=images, labels=labels, learning_rate=learning_rate)

    def first(self) -> Tensor:
        """The losses of all plans."""
        network, images, labels = self.search.network, self.images, self.labels
        with merged_statistics(network, self.plans[:1], len(labels)):
            self._logits = network(images, self.plans[0])
        self._loss = F.cross_entropy(self._logits, labels, label_smoothing=self.config.train.label_smoothing)
        return losses_under(network, self.plans, self._loss, (images, labels), self.config)

    def second(self) -> tuple[dict[str, Tensor], Gates | None]:
        """Loss, top1 and top5, each summed over the batch, and the gradients of gates if they are wanted."""
        network, train, reader = self.search.network, self.config.train, self.search.gate_reader
        backward_(network, self._loss, len(self.labels))
        gates = None if reader is None else reader.read(self.plans[0], train.batch_size)
        clipped_step_(self.search.weight_optimizer, network.weight_parameters(), self.learning_rate, train.clip_norm)
        return batch_sums(self._loss, self._logits, self.labels), gates


def distinct(plans: Sequence[Plan]) -> tuple[list[Plan], list[int]]:
    """The plans without repetitions, and where each of the given ones stands among them.

    The same subnet on the same batch has the same loss, so a plan that is repeated does not run again.
    """
    found: list[Plan] = []
    places = []
    for plan in plans:
        twin = next((i for i, other in enumerate(found) if np.array_equal(other.mask_U, plan.mask_U)), len(found))
        found += [plan] if twin == len(found) else []
        places.append(twin)
    return found, places


def project_on_host_(search: Search, moved: HostCopy, keep_ratio: float, config: Config) -> Tensor:
    """Puts the scores into a budget of cost and draws the masks of the next step. Returns v, see `Budget.project_`.

    Args:
        moved: the scores after the step of their optimizer.
    """
    scores = search.network.scores
    known_U, v = search.budget.projected(moved.read(), keep_ratio)
    broadcast_scores_(scores, known_U)
    scores.data.copy_(sent_to(known_U, scores.device))
    search.masks = draw_masks(search, config, known_U)
    return sent_to(v, scores.device)


def draw_masks(search: Search, config: Config, known_U: Tensor | None = None) -> Masks:
    """Draws the masks of the next step from the scores, on the side that projects these, and sends them to the other.

    That waits for nothing, unless the host has to draw from scores that it does not know.

    With `rank_masks` independent, every rank draws the masks of all ranks and takes its own. The generators stay the
    same, so a checkpoint holds one for all.

    Args:
        known_U: (U,) the scores, where the host knows them.
    """
    K, drawing, scores_U = config.sparsity.K, num_drawing_ranks(config), search.network.scores.data
    if search.budget.on_host:
        known_U = HostCopy.of(scores_U).read().clone() if known_U is None else known_U
    source_U = scores_U if known_U is None else known_U
    drawn = [sample_masks(source_U, search.generator, K) for _ in range(drawing)]
    masks = stored_masks(drawn[0] if drawing == 1 else torch.cat(drawn), config, scores_U.device)
    return replace(masks, scores=known_U)


def stored_masks(drawn: Tensor, config: Config, device: torch.device) -> Masks:
    """The masks of this rank, of those that all ranks have drawn: (ranks x K, U), or (K, U) where they share them.

    Args:
        drawn: on the device or on the host.
        device: of the network.
    """
    K, drawing = config.sparsity.K, num_drawing_ranks(config)
    own_KU = drawn if drawing == 1 else drawn[rank() * K : (rank() + 1) * K]
    on_host = HostCopy.of(own_KU)
    own_KU = own_KU if own_KU.device == device else sent_to(own_KU, device)
    return Masks(own_KU, own_KU if drawing == 1 else drawn, on_host)


def num_drawing_ranks(config: Config) -> int:
    """How many ranks draw masks of their own; 1 if all have the same."""
    return num_ranks() if config.independent_masks else 1


def calculateGrad(scores_U: nn.Parameter, masks_KU: Tensor, losses_K: Tensor, estimator: Estimator) -> None:
    """Writes the estimated score gradient into `scores_U.grad`; no backward pass.

    For VR-PGE and two masks, this is (L - L') / 2 * (z - z') with z = (m - s) / (s (1 - s))^(1 - alpha).

    Args:
        scores_U: (U,) in [0, 1].
        masks_KU: (K, U) bool, as drawn.
        losses_K: (K,) mean loss of the same batch under each mask.
        estimator: see `utils/algorithm/estimators`.
    """
    scores_U.grad = estimator.gradient(scores_U.detach(), masks_KU, losses_K.detach())


def losses_under(
    network: SparseNetwork, plans: Sequence[Plan], first: Tensor, batch: tuple[Tensor, Tensor], config: Config
) -> Tensor:
    """The losses of one batch under all plans, of which the first one has run already, with loss `first`."""
    images, labels = batch
    losses = [first.detach()]
    for plan in plans[1:]:
        with torch.no_grad():
            logits = network(images, plan, update_statistics=False)
            losses.append(F.cross_entropy(logits, labels, label_smoothing=config.train.label_smoothing))
    return torch.stack(losses)


def weight_step(
    run: RunState,
    images: Tensor,
    labels: Tensor,
    now: StepSettings,
    config: Config,
    after_backward: Callable[[], None] | None = None,
) -> StepResult:
    """One ordinary training step of a fixed subnet, or of the whole network: of the channels of `run.plan`.

    Args:
        images, labels, now: as those of `train_step`.
        after_backward: reads or changes the gradients, before they are clipped.
    Returns: metrics loss, top1, top5.
    """
    network, size = run.network, len(labels)
    with merged_statistics(network, [run.plan], size):
        logits = network(images, run.plan)
    loss = F.cross_entropy(logits, labels, label_smoothing=config.train.label_smoothing)
    backward_(network, loss, size)
    if after_backward is not None:
        after_backward()
    clipped_step_(run.weight_optimizer, network.weight_parameters(), now.weight_lr, config.train.clip_norm)
    return StepResult.of(network, [run.plan], batch_sums(loss, logits, labels))


def backward_(network: SparseNetwork, loss: Tensor, num_images: int) -> None:
    """Writes fresh gradients of all weights, means over the images of all ranks.

    Those of dropped units are zero, so that momentum and weight decay still move them.
    """
    weights = network.weight_parameters()
    network.clear_gradients()
    loss.backward()
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    average_gradients_(weights, num_images)


def clipped_step_(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], learning_rate: float | Tensor, max_norm: float
) -> None:
    """Scales the gradients of the parameters down to a joint norm, then takes a step of the optimizer."""
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    set_learning_rate(optimizer, learning_rate)
    optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float | Tensor) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def evaluate(network: SparseNetwork, plan: Plan, batches: Batches) -> dict[str, float]:
    """Loss, top-1 and top-5 (per cent) of one fixed subnet in eval mode. Changes no tensor and no generator.

    The loss is the plain cross-entropy, however smooth the labels are in training, so that runs can be compared.

    Args:
        batches: of this rank; there may be none. The numbers are those of all ranks' images, each counted once.
    """
    sums = MetricSums()
    sums.add(dict.fromkeys(("loss", "top1", "top5"), torch.zeros((), device=network.device)), 0)
    with eval_mode(network), torch.inference_mode():
        for images, labels in batches:
            logits = network(images, plan, update_statistics=False)
            loss = F.cross_entropy(logits, labels)
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
    """Loss, top1 and top5, each summed over a batch, without a graph. Of mixed labels the heaviest class counts."""
    top1, top5 = (count_correct(logits.detach(), labels, k) for k in (1, 5))
    return {"loss": loss.detach() * len(labels), "top1": top1, "top5": top5}
