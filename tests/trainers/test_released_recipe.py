"""A whole run of `configs/released.yaml` against the released recipe written out by hand, in float64.

The options come from the file itself; only the network, the images and the lengths are scaled down. The reference knows
nothing of this project but its random streams and its image sets: plain layers, the optimizers and the projection as
formulas, and the numbers of the released recipe as constants. Where this project departs from the released code (the
learning rates fall with every step, the choice of the subnet re-estimates the batch-norm statistics), so does the
reference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from data import BatchedSet, build_data
from main import main
from tests.toy import one_thread  # noqa: F401
from utils.run.checkpoint import load

PROJECT = Path(__file__).parents[2]
EXACT = {"rtol": 1e-8, "atol": 1e-10}

# the released recipe
KEEP, K, CLIP_NORM = 0.5, 2, 3.0
WEIGHT_LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
SCORE_LR, BETAS, EPS = 12e-3, (0.9, 0.999), 1e-8
FINETUNE_LR, NUM_SUBNETS = 1e-3, 10

# what is scaled down
WIDTHS, SEED = (4, 8, 16), 9
EPOCHS, BATCH, FINETUNE_EPOCHS, FINETUNE_BATCH, BN_BATCHES = 4, 16, 2, 20, 3
MASK_STREAM, CANDIDATE_STREAM = 1, 2


@pytest.fixture(scope="module", autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- the run ----


@dataclass
class Run:
    """What a run of the program was seen to do, and what it left."""

    batches: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rates: list[tuple[str, float]] = field(default_factory=list)  # of every optimizer step, in order
    states: list[dict[str, Any]] = field(default_factory=list)  # the checkpoint of each epoch
    chosen: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_images) -> Run:
    """The program on its configuration, its batches turned into float64."""
    seen, folder, depth = Run(), tmp_path_factory.mktemp("released"), []
    train_batches, batches = BatchedSet.train_batches, BatchedSet.batches

    def recorded(self: BatchedSet, *arguments: Any, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in train_batches(self, *arguments, **options):
            seen.batches.append((images.double(), labels))
            yield seen.batches[-1]

    def doubled(self: BatchedSet, *arguments: Any, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        return ((images.double(), labels) for images, labels in batches(self, *arguments, **options))

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not depth:  # a step may be built on that of another class
            kind = "scores" if isinstance(optimizer, torch.optim.Adam) else "weights"
            seen.rates.append((kind, optimizer.param_groups[0]["lr"]))
        depth.append(optimizer)

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(lambda *_: depth.pop())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchedSet, "train_batches", recorded)
        patch.setattr(BatchedSet, "batches", doubled)
        scaled_down = {
            "arch": "resnet8_he", "width-mult": 0.25, "set": "ImageFolder", "data": tiny_images, "workers": 0,
            "epochs": EPOCHS, "batch-size": BATCH, "finetune-epochs": FINETUNE_EPOCHS,
            "finetune-batch-size": FINETUNE_BATCH, "bn-batches": BN_BATCHES,
            "seed": SEED, "device": "cpu", "log-dir": folder, "save-every": 1,
        }  # fmt: skip
        options = [str(word) for key, value in scaled_down.items() for word in (f"--{key}", value)]
        assert main(["--config", str(PROJECT / "configs/released.yaml"), *options]) == 0
    for hook in hooks:
        hook.remove()
    checkpoints = next(folder.rglob("checkpoints"))
    seen.states = [load(checkpoints / f"epoch_{epoch}.pt") for epoch in range(1, EPOCHS + FINETUNE_EPOCHS + 1)]
    seen.chosen = load(checkpoints / "last.pt")["subnet"]
    seen.summary = json.loads((checkpoints.parent / "summary.json").read_text())
    return seen


# ---- the reference ----


class Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )


class TinyResNet(nn.Module):
    """A stem and three blocks of plain layers, run under masks that multiply the weights of convolutions alone."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = nn.Sequential(Block(WIDTHS[0], WIDTHS[0], 1))
        self.layer2 = nn.Sequential(Block(WIDTHS[0], WIDTHS[1], 2))
        self.layer3 = nn.Sequential(Block(WIDTHS[1], WIDTHS[2], 2))
        self.linear = nn.Conv2d(WIDTHS[2], num_classes, 1, bias=False)

    def masked(self) -> dict[str, nn.Conv2d]:
        """Every convolution but the classifier."""
        return {n: m for n, m in self.named_modules() if isinstance(m, nn.Conv2d) and m is not self.linear}

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        widths = [conv.out_channels for conv in self.masked().values()]
        of = dict(zip(self.masked().values(), mask.double().split(widths), strict=True))

        def conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
            weight = layer.weight * of[layer].view(-1, 1, 1, 1)
            return F.conv2d(x, weight, None, layer.stride, layer.padding)

        x = self.bn(conv(self.conv1, x)).relu()  # the shift of a dropped channel leaks
        for stage in (self.layer1, self.layer2, self.layer3):
            block = stage[0]
            y = block.bn1(conv(block.conv1, x)).relu()
            y = block.bn2(conv(block.conv2, y))
            if len(block.shortcut):
                x = block.shortcut[1](conv(block.shortcut[0], x))
            x = (x + y).relu()
        return self.linear(x.mean((2, 3), keepdim=True)).flatten(1)


def project(scores: Tensor, budget: float) -> Tensor:
    """clip(s - v, 0, 1) with the least v that meets the budget, by bisection."""
    low, high = 0.0, float(scores.max())
    if scores.clamp(0, 1).sum() <= budget:
        return scores.clamp(0, 1)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (scores - middle).clamp(0, 1).sum() > budget else (low, middle)
    return (scores - high).clamp(0, 1)


def clip_(gradients: list[Tensor]) -> float:
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
    for gradient in gradients:
        gradient *= min(1.0, CLIP_NORM / (norm + 1e-6))  # torch's own guard against dividing by 0
    return norm


class Sgd:
    def __init__(self, weights: list[Tensor]) -> None:
        self.weights, self.momenta = weights, [torch.zeros_like(w) for w in weights]

    def step(self, gradients: list[Tensor], rate: float) -> None:
        for weight, momentum, gradient in zip(self.weights, self.momenta, gradients, strict=True):
            momentum.copy_(MOMENTUM * momentum + gradient + WEIGHT_DECAY * weight.data)
            weight.data -= rate * momentum


def stream(number: int) -> int:
    sequence = np.random.SeedSequence(entropy=SEED, spawn_key=(number,))
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


class Recipe:
    """The released recipe; slow and plain."""

    def __init__(self, images: Path) -> None:
        settings = {"holdout": 0, "image_size": 0, "workers": 0, "device": torch.device("cpu")}
        self.data = build_data("ImageFolder", str(images), **settings)
        torch.manual_seed(SEED)
        self.net = TinyResNet(self.data.num_classes)
        for module in self.net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        self.num_units = sum(conv.out_channels for conv in self.net.masked().values())
        self.scores = torch.full((self.num_units,), KEEP)
        self.first_moment, self.second_moment, self.score_steps = 0.0, 0.0, 0
        self.masks = torch.Generator().manual_seed(stream(MASK_STREAM))
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.rates: list[tuple[str, float]] = []
        self.states: list[dict[str, Tensor]] = []
        self.norms: list[float] = []
        self.over_budget: list[bool] = []
        self.search()
        self.choose()
        self.finetune()

    def epoch(self, size: int, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.data.train.train_batches(size, SEED, number):
            self.batches.append((images.double(), labels))
            yield self.batches[-1]
        self.states.append({name: t.clone() for name, t in {**self.net.state_dict(), **self.named_scores()}.items()})

    def named_scores(self) -> dict[str, Tensor]:
        convs = self.net.masked()
        parts = self.scores.split([conv.out_channels for conv in convs.values()])
        return {f"{name}.scores": part for name, part in zip(convs, parts, strict=True)}

    def search(self) -> None:
        weights = list(self.net.parameters())
        optimizer = Sgd(weights)
        steps = EPOCHS * (len(self.data.train) // BATCH)
        count = 0
        for epoch in range(EPOCHS):
            for images, labels in self.epoch(BATCH, epoch):
                factor = (1 + math.cos(math.pi * count / steps)) / 2
                count += 1
                masks = torch.rand((K, self.num_units), generator=self.masks) < self.scores
                losses = [F.cross_entropy(self.net.run(images, mask), labels) for mask in masks]
                total = [torch.autograd.grad(loss, weights) for loss in losses]
                gradients = [(one + other) / 2 for one, other in zip(*total, strict=True)]
                z = (masks.double() - self.scores) / (self.scores * (1 - self.scores)).sqrt()
                score_gradient = (losses[0] - losses[1]).detach() / 2 * (z[0] - z[1])
                self.norms.append(clip_([*gradients, score_gradient]))
                self.adam(score_gradient, SCORE_LR * factor)
                self.over_budget.append(bool(self.scores.clamp(0, 1).sum() > KEEP * self.num_units))
                self.scores = project(self.scores, KEEP * self.num_units)
                optimizer.step(gradients, WEIGHT_LR * factor)
                self.rates += [("scores", SCORE_LR * factor), ("weights", WEIGHT_LR * factor)]

    def adam(self, gradient: Tensor, rate: float) -> None:
        self.score_steps += 1
        self.first_moment = BETAS[0] * self.first_moment + (1 - BETAS[0]) * gradient
        self.second_moment = BETAS[1] * self.second_moment + (1 - BETAS[1]) * gradient**2
        mean = self.first_moment / (1 - BETAS[0] ** self.score_steps)
        deviation = (self.second_moment / (1 - BETAS[1] ** self.score_steps)).sqrt()
        self.scores = self.scores - rate * mean / (deviation + EPS)

    def choose(self) -> None:
        """The candidate with the best accuracy on all training images; of equal ones that with the lowest loss."""
        random, count = np.random.default_rng(stream(CANDIDATE_STREAM)), math.floor(KEEP * self.num_units)
        values = [self.scores.numpy()]
        for _ in range(NUM_SUBNETS):
            values.append(np.where(random.random(self.num_units) < self.scores.numpy(), self.scores.numpy(), 0))
        masks = []
        for value in values:
            mask = np.zeros(self.num_units, dtype=bool)
            mask[np.argsort(-value, kind="stable")[:count]] = True
            masks.append(torch.from_numpy(mask & (value > 0)))
        self.candidates = [(mask, self.statistics(mask)) for mask in masks]
        self.merits = []
        for mask, statistics in self.candidates:
            self.merits.append(self.evaluate(mask, statistics, self.data.train))
        self.chosen = max(range(len(masks)), key=lambda i: self.merits[i])

    def statistics(self, mask: Tensor) -> dict[str, Tensor]:
        """Means of the batch statistics of some training images, under one mask."""
        before = {name: t.clone() for name, t in self.net.state_dict().items()}
        chosen = np.random.default_rng(0).permutation(len(self.data.train))[: BN_BATCHES * BATCH]
        seen: dict[str, list[Tensor]] = {}
        for images, _ in self.data.train.subset(chosen).batches(BATCH):
            for module in self.net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 1.0  # the statistics of this batch alone
            with torch.no_grad():
                self.net.run(images.double(), mask)
            for name, buffer in self.net.named_buffers():
                if "running" in name:
                    seen.setdefault(name, []).append(buffer.clone())
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
        self.net.load_state_dict(before)
        assert {len(parts) for parts in seen.values()} == {BN_BATCHES}
        return {name: torch.stack(parts).mean(0) for name, parts in seen.items()}

    def evaluate(self, mask: Tensor, statistics: dict[str, Tensor], part: BatchedSet) -> tuple[float, float]:
        """Accuracy in per cent and minus the loss."""
        before = {name: t.clone() for name, t in self.net.state_dict().items()}
        self.net.load_state_dict(statistics, strict=False)
        self.net.eval()
        batches = list(part.batches(len(part)))
        with torch.no_grad():
            logits = torch.cat([self.net.run(images.double(), mask) for images, _ in batches])
        labels = torch.cat([labels for _, labels in batches])
        self.net.train()
        self.net.load_state_dict(before)
        top1 = 100 * float((logits.argmax(1) == labels).double().mean())
        return top1, -float(F.cross_entropy(logits, labels))

    def finetune(self) -> None:
        weights, (mask, statistics) = list(self.net.parameters()), self.candidates[self.chosen]
        optimizer = Sgd(weights)
        self.net.load_state_dict(statistics, strict=False)
        for epoch in range(EPOCHS, EPOCHS + FINETUNE_EPOCHS):
            for images, labels in self.epoch(FINETUNE_BATCH, epoch):
                gradients = list(torch.autograd.grad(F.cross_entropy(self.net.run(images, mask), labels), weights))
                self.norms.append(clip_(gradients))
                optimizer.step(gradients, FINETUNE_LR)
                self.rates.append(("weights", FINETUNE_LR))
        self.test = self.evaluate(mask, {}, self.data.test)


@pytest.fixture(scope="module")
def reference(tiny_images, in_float64) -> Recipe:
    return Recipe(tiny_images)


# ---- the comparison ----


def test_both_are_handed_the_same_batches_in_the_same_order(run, reference):
    assert len(run.batches) == EPOCHS * (80 // BATCH) + FINETUNE_EPOCHS * (80 // FINETUNE_BATCH)
    for (images, labels), (expected, answers) in zip(run.batches, reference.batches, strict=True):
        assert torch.equal(labels, answers)
        assert torch.equal(images, expected)


def test_the_learning_rates_of_every_step(run, reference):
    assert [kind for kind, _ in run.rates] == [kind for kind, _ in reference.rates]
    assert [rate for _, rate in run.rates] == pytest.approx([rate for _, rate in reference.rates], rel=1e-12)
    assert [rate for kind, rate in run.rates if kind == "weights"][:2] != [WEIGHT_LR, WEIGHT_LR]  # per step


@pytest.mark.parametrize("epoch", range(1, EPOCHS + FINETUNE_EPOCHS + 1))
def test_every_weight_statistic_and_score_after_each_epoch(run, reference, epoch):
    ours, theirs = run.states[epoch - 1]["model"], reference.states[epoch - 1]
    compared = [name for name in theirs if "num_batches" not in name]
    assert set(compared) == {name for name in ours if "num_batches" not in name}
    for name in compared:
        assert ours[name].dtype == torch.float64
        torch.testing.assert_close(ours[name], theirs[name], **EXACT, msg=lambda m, n=name: f"{n}: {m}")


def test_the_same_subnet_is_chosen_by_the_training_images(run, reference):
    choice = run.summary["choice"]
    assert choice["chosen_candidate"] == reference.chosen
    assert torch.equal(run.chosen["mask"], reference.candidates[reference.chosen][0])
    accuracies = [accuracy for accuracy, _ in reference.merits]
    assert choice["top_scored_top1"] == pytest.approx(accuracies[0])
    assert choice["drawn_top1_mean"] == pytest.approx(np.mean(accuracies[1:]))


def test_the_test_accuracy_is_that_of_the_last_weights(run, reference):
    assert run.summary["test_top1"] == pytest.approx(reference.test[0])


def test_the_run_is_one_in_which_all_of_this_shows(reference):
    """Only some steps are clipped and only some need the projection; scores and candidates differ."""
    assert min(reference.norms) < CLIP_NORM < max(reference.norms)
    assert set(reference.over_budget) == {True, False}
    assert float(reference.scores.std()) > 0.01
    assert len({tuple(mask.tolist()) for mask, _ in reference.candidates}) > NUM_SUBNETS // 2
    assert len({accuracy for accuracy, _ in reference.merits}) > 1
