"""One forward and backward pass of a toy network under a mask: by an execution, and by the reference of `toy.py`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.toy import (
    NETWORKS,
    REFERENCES,
    Reference,
    batch,
    by_layer,
)
from utils.channels.network import SparseNetwork

# What is kept where; layers that are not named keep a random choice, never nothing.
NOTHING: tuple[int, ...] = ()
MASKS = {
    "released": {
        "random": {},
        "stem of one": {"conv1": [4]},
        "one channel each": {name: [width // 2] for name, width in NETWORKS["released"].LAYERS.items()},
        "all": {name: range(width) for name, width in NETWORKS["released"].LAYERS.items()},
        "empty branch": {"layer1.0.conv1": NOTHING, "layer1.0.conv2": NOTHING},
        "first conv of the branch empty": {"layer1.0.conv1": NOTHING, "layer1.0.conv2": [1, 2, 5]},
        "second conv of the branch empty": {"layer1.0.conv2": NOTHING},
        "first conv beside a projection empty": {
            "layer2.0.conv1": NOTHING,
            "layer2.0.conv2": [0, 3, 4],
            "layer2.0.shortcut.0": [3, 7],
        },
        "projection empty": {"layer2.0.shortcut.0": NOTHING, "layer2.0.conv2": [2, 3, 9]},
        "branch beside a projection empty": {"layer2.0.conv2": NOTHING, "layer2.0.shortcut.0": [0, 11]},
        "branch inside the projection": {"layer2.0.conv2": [1, 4], "layer2.0.shortcut.0": [1, 2, 4]},
        "projection inside the branch": {"layer2.0.conv2": [1, 2, 4], "layer2.0.shortcut.0": [1, 4]},
        "disjoint": {"conv1": [0, 1], "layer1.0.conv2": [4, 5]},
        "the stream in full by two halves": {"conv1": [0, 1, 2], "layer1.0.conv2": [3, 4, 5]},
    },
    "plain": {
        "random": {},
        "one channel each": {"conv1": [3], "conv2": [0], "conv3": [5]},
        "all": {name: range(width) for name, width in NETWORKS["plain"].LAYERS.items()},
        "last channels": {"conv1": [4], "conv2": [2, 3], "conv3": [1, 5]},
    },
    "preactivation": {
        "random": {},
        "one channel each": {name: [width // 2] for name, width in NETWORKS["preactivation"].LAYERS.items()},
        "all": {name: range(width) for name, width in NETWORKS["preactivation"].LAYERS.items()},
        "a stream that grows": {"stem": [1], "block1.conv2": [3], "block2.conv2": [0]},
        "a stream that does not": {"stem": [1, 3], "block1.conv2": NOTHING, "block2.conv2": [3]},
        "empty branches": {
            "block1.conv1": NOTHING,
            "block1.conv2": NOTHING,
            "block2.conv1": NOTHING,
            "block3.conv1": NOTHING,
            "block3.conv2": NOTHING,
        },
        "inner convs empty": {
            "stem": [0],
            "block1.conv1": NOTHING,
            "block1.conv2": [2],
            "block2.conv1": NOTHING,
            "block3.conv1": NOTHING,
            "block3.conv2": [1, 5],
            "block3.shortcut": [0, 5],
        },
        "projection empty": {"block3.shortcut": NOTHING, "block3.conv2": [0, 4]},
    },
    "mixed": {
        "random": {},
        "one channel each": {name: [width // 2] for name, width in NETWORKS["mixed"].LAYERS.items()},
        "all": {name: range(width) for name, width in NETWORKS["mixed"].LAYERS.items()},
        "the filtered branch empty": {"expand": NOTHING, "project": NOTHING},
        "a filter of nothing": {"expand": NOTHING, "project": [0, 2], "stem": [1, 2]},
        "nothing grown": {"grow": NOTHING},
        "nothing merged": {"merge": NOTHING},
        "only the stream concatenated": {"grow": NOTHING, "merge": NOTHING},
    },
}
CASES = [(kind, case) for kind, cases in MASKS.items() for case in cases]
PADDING = (1, 4, 5, 16)  # multiples to which channel counts are padded: none, some, across the width, always in full
EXACT = {"rtol": 1e-9, "atol": 1e-11}


@dataclass
class Outcome:
    """Everything a pass and a backward leave behind."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]
    statistics: dict[str, tuple[Tensor, Tensor]]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Zeros where backward left none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def statistics_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    return {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}


def run_network(network: SparseNetwork, mask_U: np.ndarray, training: bool, data=None) -> Outcome:
    images, labels = batch() if data is None else data
    network.model.train(training)
    logits = network(images, network.plan(mask_U))
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return Outcome(loss.detach(), logits.detach(), gradients_of(network.model), statistics_of(network.model))


def run_reference(
    kind: str, net: nn.Module, mask_U: np.ndarray, training: bool, reference: type[Reference] = Reference
) -> Outcome:
    images, labels = batch()
    net.train(training)
    run = reference(net, by_layer(NETWORKS[kind].LAYERS, mask_U, images.dtype), {})
    logits = REFERENCES[kind](run, images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return Outcome(loss.detach(), logits.detach(), gradients_of(net), {**statistics_of(net), **run.statistics})


def assert_same(one: Outcome, other: Outcome, rtol: float, atol: float) -> None:
    close = {"rtol": rtol, "atol": atol}
    torch.testing.assert_close(one.loss, other.loss, **close)
    torch.testing.assert_close(one.logits, other.logits, **close)
    assert one.gradients.keys() == other.gradients.keys()
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(gradient, other.gradients[name], **close, msg=lambda m, n=name: f"{n}: {m}")
    assert one.statistics.keys() == other.statistics.keys()
    for name, pair in one.statistics.items():
        for mine, its in zip(pair, other.statistics[name], strict=True):
            torch.testing.assert_close(mine, its, **close, msg=lambda m, n=name: f"{n}: {m}")
