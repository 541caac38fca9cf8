"""Passes of the gauge: the masks of a step, drawn many times over, and their losses while the network stands still.

Legend: N batches, E estimates on each batch, K masks of one estimate, P parts of a batch, U units.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from args import Config
from data import DataSplits
from trainers.default import backward, forward_loss, part_losses
from utils.algorithm.estimators import ESTIMATORS, Gates, Memory
from utils.algorithm.masks import sample_antithetic_pair
from utils.channels.network import SparseNetwork
from utils.channels.norms import GateReader
from utils.channels.plan import Plan

KINDS = ("independent", "antithetic", "parts")
WARMING_UP, MEASURING = 0, 1  # purposes of random numbers


class Batch(Protocol):
    """One batch, of a network whose weights stand still."""

    def run(self, masks_KU: Tensor, in_parts: bool) -> tuple[Tensor, float]:
        """Mean losses under the masks, and the cost of the passes.

        Args:
            in_parts: the first mask runs on the whole batch, the others on a part each.
        Returns: (K,), or in parts (K - 1, 2); multiply-adds per image, as a multiple of a dense forward pass.
        """

    def gates(self, mask_U: Tensor) -> Gates:
        """What a backward pass under the mask shows."""


@dataclass(frozen=True)
class Draws:
    """Masks and their losses on every batch: all that an estimate is made of.

    Attributes:
        masks_NEKU: bool.
        losses: (N, E, K), or in parts (N, E, P, 2).
        cost: of one estimate, in dense forward passes, the mean.
    """

    masks_NEKU: Tensor
    losses: Tensor
    cost: float


# ---- batches of a run ----


@dataclass(frozen=True)
class NetworkBatch:
    """A `Batch`: images under masks of a network that stands still."""

    network: SparseNetwork
    images: Tensor
    labels: Tensor
    config: Config

    def run(self, masks_KU: Tensor, in_parts: bool) -> tuple[Tensor, float]:
        network, config = self.network, self.config
        plans = [network.plan(mask_U) for mask_U in masks_KU.cpu().numpy()]
        costs = [network.executed_macs(plan) / network.dense_macs for plan in plans]
        with torch.no_grad():
            whole = [self._loss(plan) for plan in (plans[:1] if in_parts else plans)]
            if not in_parts:
                return torch.stack([loss for loss, _ in whole]), sum(costs)
            losses = part_losses(network, plans[1:], self.images, self.labels, whole[0][1], config)
        return losses, costs[0] + sum(costs[1:]) / len(plans[1:])

    def gates(self, mask_U: Tensor) -> Gates:
        plan = self.network.plan(mask_U.cpu().numpy())
        backward(self.network, self._loss(plan)[0], self.network.weight_parameters(), len(self.labels))
        gates = GateReader(self.network).read(plan, len(self.labels))
        self.network.clear_gradients()
        return gates

    def _loss(self, plan: Plan) -> tuple[Tensor, Tensor]:
        return forward_loss(self.network, plan, self.images, self.labels, self.config.train, update_statistics=False)


def independent_batches(
    network: SparseNetwork, data: DataSplits, config: Config, seed: int, count: int
) -> Iterator[NetworkBatch]:
    """The first batch of each of several epochs that the run never reaches.

    Those of a single epoch share no image, so they depend on each other; where the signal is small that would show.
    """
    for epoch in range(config.total_epochs + 1, config.total_epochs + 1 + 2 * count, 2):
        images, labels = next(data.train.train_batches(config.train.batch_size, seed, epoch))
        yield NetworkBatch(network, images, labels, config)


def warm_up_batches(
    network: SparseNetwork, data: DataSplits, config: Config, seed: int, count: int
) -> Iterator[NetworkBatch]:
    """One batch after the other, as in training, of epochs that `independent_batches` leaves out."""
    epochs = itertools.count(config.total_epochs, step=2)
    batches = (data.train.train_batches(config.train.batch_size, seed, epoch) for epoch in epochs)
    for images, labels in itertools.islice(itertools.chain.from_iterable(batches), count):
        yield NetworkBatch(network, images, labels, config)


# ---- kinds of masks ----


def kind_of(name: str) -> str:
    """Estimators of one kind can share masks and losses."""
    if name == "subbatch":
        return "parts"
    return "antithetic" if ESTIMATORS[name].sample is sample_antithetic_pair else "independent"


def sample_kind(kind: str, scores_U: Tensor, generator: torch.Generator, num_parts: int) -> Tensor:
    """(K, U) bool: the masks of one estimate at the price of two forward passes."""
    estimator = next(estimator for name, estimator in ESTIMATORS.items() if kind_of(name) == kind)
    return estimator.sample(scores_U, generator, 1 + num_parts if kind == "parts" else 2)


# ---- drawing and running ----


def generators(scores_U: Tensor, seed: int, purpose: int) -> dict[str, torch.Generator]:
    """One for each kind, so that the figures of one estimator do not depend on which others are asked for."""
    sequences = np.random.SeedSequence(seed, spawn_key=(purpose,)).spawn(len(KINDS))
    seeds = (int(sequence.generate_state(1, np.uint64)[0]) for sequence in sequences)
    return {
        kind: torch.Generator(scores_U.device).manual_seed(number) for kind, number in zip(KINDS, seeds, strict=True)
    }


def collect(
    batches: Iterable[Batch], scores_U: Tensor, kinds: Sequence[str], num_estimates: int, num_parts: int, seed: int
) -> dict[str, Draws]:
    """Draws masks of every kind for every batch and runs them."""
    sources = generators(scores_U, seed, MEASURING)
    masks: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    losses: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    costs: dict[str, list[float]] = {kind: [] for kind in kinds}
    for batch in batches:
        for kind in kinds:
            drawn = [sample_kind(kind, scores_U, sources[kind], num_parts) for _ in range(num_estimates)]
            results, spent = zip(*(batch.run(masks_KU, kind == "parts") for masks_KU in drawn), strict=True)
            masks[kind].append(torch.stack(drawn))
            losses[kind].append(torch.stack(results).to(scores_U.dtype))
            costs[kind] += spent
    return {
        kind: Draws(torch.stack(masks[kind]), torch.stack(losses[kind]), sum(costs[kind]) / len(costs[kind]))
        for kind in kinds
    }


def warm_memories(batches: Iterable[Batch], scores_U: Tensor, names: Iterable[str], seed: int) -> dict[str, Memory]:
    """What the estimators with memory know after a step on each batch, with scores and weights held fixed."""
    learning = [name for name in names if ESTIMATORS[name].start is not None]
    memories = {name: ESTIMATORS[name].start(scores_U) for name in learning}
    sources = generators(scores_U, seed, WARMING_UP)
    for batch in batches if learning else ():
        for kind in dict.fromkeys(map(kind_of, learning)):
            masks_KU = sample_kind(kind, scores_U, sources[kind], num_parts=0)
            losses_K = batch.run(masks_KU, in_parts=False)[0].to(scores_U.dtype)
            users = [name for name in learning if kind_of(name) == kind]
            gates = batch.gates(masks_KU[0]) if any(ESTIMATORS[name].reads_gates for name in users) else None
            for name in users:
                memories[name] = ESTIMATORS[name].update(memories[name], masks_KU, losses_K, gates)
    return memories
