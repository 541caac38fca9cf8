"""Reported arithmetic = executed arithmetic = what one counts by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import build_model, maskable_convs
from tests.toy import (
    NETWORKS,
    batch,
    flat_mask,
    one_thread,  # noqa: F401
    plain_net,
    sparse_network,
)
from utils.channels.network import SparseNetwork
from utils.channels.plan import Plan
from utils.conv_type import sparsify
from utils.run.metrics import CostLedger


def network_of(
    arch: str, width_mult: float = 1.0, image_shape: tuple[int, int, int] = (3, 32, 32), **options: Any
) -> SparseNetwork:
    model = build_model(arch, 10, image_shape[0], image_shape[1], width_mult)
    sparsify(model, maskable_convs(model, first_layer_dense=False, last_layer_dense=False))
    return SparseNetwork(model, image_shape, **{"self_check": False, **options})


def counted_macs(network: SparseNetwork, plan: Plan, image_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of one image, as torch counts them in what really runs."""
    dtype = next(network.model.parameters()).dtype
    images = torch.randn((2, *image_shape), dtype=dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images, plan, update_statistics=False)
    flops = counter.get_total_flops()
    assert flops % 4 == 0  # two images, two operations per multiply-add
    return flops // 4


def gathered_parameters(network: SparseNetwork, plan: Plan) -> int:
    """Slices every parameter of a toy network by the masks of what it reads and writes, and counts what is left."""
    parts = network.split(torch.from_numpy(plan.mask_U))
    keep = {name: part.numpy() for name, part in zip(network.layers, parts, strict=True)}
    total = 0
    for name, (reads, writes) in network_wiring(network).items():
        module = network.model.get_submodule(name)
        written = joined(keep, writes)
        if isinstance(module, nn.BatchNorm2d):
            total += 2 * (module.num_features if written is None else int(written.sum()))
            continue
        read = joined(keep, reads)
        weight = module.weight if written is None else module.weight[torch.from_numpy(written)]
        if read is not None:
            columns = np.repeat(read, weight.shape[1] // len(read))
            weight = weight[:, torch.from_numpy(columns)]
        total += weight.numel()
        if module.bias is not None:
            total += module.bias.numel() if written is None else int(written.sum())
    return total


def joined(keep: dict[str, np.ndarray], writers: tuple[str | tuple[str, ...], ...]) -> np.ndarray | None:
    """Live channels of what some layers write; a tuple in the tuple is one part of a concatenation."""
    if writers and isinstance(writers[0], tuple):
        return np.concatenate([joined(keep, part) for part in writers])
    return np.logical_or.reduce([keep[name] for name in writers]) if writers else None


def network_wiring(network: SparseNetwork) -> dict[str, tuple[tuple, tuple]]:
    """Who writes what each layer reads and what it hands on: written down by hand for each toy network."""
    if "merge" in network.layers:
        stream, wide = ("stem", "project"), (("stem", "project"), ("grow",))
        return {
            "stem": ((), ("stem",)),
            "bn": ((), ("stem",)),
            "expand": (("stem",), ("expand",)),
            "bn1": ((), ("expand",)),
            "filter": ((), ("expand",)),
            "bn2": ((), ("expand",)),
            "project": (("expand",), ("project",)),
            "bn3": ((), ("project",)),
            "grow": (stream, ("grow",)),
            "bn4": ((), wide),
            "merge": (wide, ("merge",)),
            "thin": ((), (("merge",), *wide)),
            "linear": ((("merge",), *wide), ()),
        }
    if "stem" in network.layers:
        stream1, stream2 = ("stem", "block1.conv2"), ("stem", "block1.conv2", "block2.conv2")
        out = ("block3.conv2", "block3.shortcut")
        return {
            "stem": ((), ("stem",)),
            "block1.bn1": ((), ("stem",)),
            "block1.conv1": (("stem",), ("block1.conv1",)),
            "block1.bn2": ((), ("block1.conv1",)),
            "block1.conv2": (("block1.conv1",), ("block1.conv2",)),
            "block2.bn1": ((), stream1),
            "block2.conv1": (stream1, ("block2.conv1",)),
            "block2.bn2": ((), ("block2.conv1",)),
            "block2.conv2": (("block2.conv1",), ("block2.conv2",)),
            "block3.bn1": ((), stream2),
            "block3.conv1": (stream2, ("block3.conv1",)),
            "block3.bn2": ((), ("block3.conv1",)),
            "block3.conv2": (("block3.conv1",), ("block3.conv2",)),
            "block3.shortcut": (stream2, ("block3.shortcut",)),
            "bn": ((), out),
            "linear": (out, ()),
        }
    if "layer1.0.conv1" in network.layers:
        stream = ("conv1", "layer1.0.conv2")
        return {
            "conv1": ((), ("conv1",)),
            "bn": ((), ("conv1",)),
            "layer1.0.conv1": (("conv1",), ("layer1.0.conv1",)),
            "layer1.0.bn1": ((), ("layer1.0.conv1",)),
            "layer1.0.conv2": (("layer1.0.conv1",), ("layer1.0.conv2",)),
            "layer1.0.bn2": ((), ("layer1.0.conv2",)),
            "layer2.0.conv1": (stream, ("layer2.0.conv1",)),
            "layer2.0.bn1": ((), ("layer2.0.conv1",)),
            "layer2.0.conv2": (("layer2.0.conv1",), ("layer2.0.conv2",)),
            "layer2.0.bn2": ((), ("layer2.0.conv2",)),
            "layer2.0.shortcut.0": (stream, ("layer2.0.shortcut.0",)),
            "layer2.0.shortcut.1": ((), ("layer2.0.shortcut.0",)),
            "linear": (("layer2.0.conv2", "layer2.0.shortcut.0"), ()),
        }
    return {
        "conv1": ((), ("conv1",)),
        "bn1": ((), ("conv1",)),
        "conv2": (("conv1",), ("conv2",)),
        "bn2": ((), ("conv2",)),
        "conv3": (("conv2",), ("conv3",)),
        "hidden": (("conv3",), ()),
        "linear": ((), ()),
    }


TOY_MASKS = [
    {},
    {"layer1.0.conv1": (), "layer2.0.conv1": (), "block1.conv1": (), "block3.conv2": ()},
    {"layer1.0.conv2": (), "layer2.0.shortcut.0": (), "block2.conv2": (), "block3.shortcut": ()},
    {"conv1": [2], "conv2": [1], "conv3": [0], "stem": [3], "grow": (), "expand": ()},
]


@pytest.mark.parametrize("case", range(len(TOY_MASKS)))
@pytest.mark.parametrize("kind", NETWORKS)
def test_toy_networks(kind, case):
    layers = NETWORKS[kind].LAYERS
    network = sparse_network(plain_net(kind), layers)
    mask_U = flat_mask(layers, TOY_MASKS[case], seed=case)
    network.multiple = 4
    plan = network.plan(mask_U)
    assert network.executed_macs(plan) == network.subnet_macs(plan) <= network.padded_macs(plan)
    assert network.padded_macs(plan) == counted_macs(network, plan, (3, 8, 8))
    network.multiple = 1  # no padding
    plan = network.plan(mask_U)
    assert network.padded_macs(plan) == counted_macs(network, plan, (3, 8, 8))
    assert network.subnet_macs(plan) == network.padded_macs(plan)
    assert network.subnet_parameters(plan) == gathered_parameters(network, plan)
    assert network.dense_parameters == sum(p.numel() for p in network.weight_parameters())


@pytest.mark.parametrize(
    ("arch", "width_mult", "size", "case"),
    [
        *(("vgg16", 0.125, 32, case) for case in ("random", "all")),
        *(("resnet20", 0.125, 16, case) for case in ("mostly empty", "one each")),
        *(pytest.param("vgg16", 0.125, 32, case, marks=pytest.mark.slow) for case in ("mostly empty", "one each")),
        *(pytest.param("resnet20", 0.125, 16, case, marks=pytest.mark.slow) for case in ("random", "all")),
    ],
)
def test_networks_of_the_registry(arch, width_mult, size, case):
    """Zero channels too: where the guard permits (a branch, one of a pair), else it leaves one."""
    image_shape = (3, size, size)
    network = network_of(arch, width_mult, image_shape)
    random = np.random.default_rng(3)
    mask_U = {
        "random": random.random(network.num_units) < 0.5,
        "mostly empty": random.random(network.num_units) < 0.06,
        "one each": flat_mask({n: c.out_channels for n, c in network.layers.items()}, {n: [1] for n in network.layers}),
        "all": np.ones(network.num_units, dtype=bool),
    }[case]
    plan = network.plan(mask_U)
    if case == "mostly empty":
        assert not all(part.any() for part in network.split(torch.from_numpy(mask_U)))
    assert network.padded_macs(plan) == counted_macs(network, plan, image_shape)
    network.multiple = 1  # no padding
    plan = network.plan(mask_U)
    assert network.subnet_macs(plan) == counted_macs(network, plan, image_shape)
    masked = network_of(arch, width_mult, image_shape, execution="masked")
    assert masked.executed_macs(plan) == masked.dense_macs == counted_macs(masked, plan, image_shape)
    assert masked.subnet_macs(plan) == network.subnet_macs(plan)


def test_a_two_layer_net_by_hand():
    """conv 3x3, 2 -> 4 channels on 6x6, shift, batch-norm; pooled to 3x3; linear 36 -> 5 with shift."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    )
    network = SparseNetwork(sparsify(net, ["0"], 0.5), (2, 6, 6))
    assert network.dense_macs == 2 * 4 * 9 * 36 + 36 * 5
    assert network.dense_parameters == (2 * 4 * 9 + 4) + 2 * 4 + (36 * 5 + 5)
    plan = network.plan(np.array([False, True, False, True]))
    assert network.graph.layer_macs(plan.counts) == {"0": 2 * 2 * 9 * 36, "4": 18 * 5}
    assert network.graph.layer_parameters(plan.counts) == {"0": 2 * 2 * 9 + 2, "1": 2 * 2, "4": 18 * 5 + 5}


def test_a_layer_that_runs_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
            self.linear = nn.Linear(3, 10, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.conv(self.conv(x)).mean((2, 3)))

    network = SparseNetwork(sparsify(Twice(), ["conv"], 0.5), (3, 8, 8))
    assert network.dense_macs == 2 * (3 * 3 * 9 * 64) + 30
    assert network.dense_parameters == 3 * 3 * 9 + 30


def test_resnet20_he_against_the_published_size():
    """He et al. give 0.27 million parameters and 41 million multiply-adds, with shortcuts that cost nothing.

    Ours project instead: 16 x 32 and 32 x 64 weights with a batch-norm each, read once per output pixel.
    """
    network = network_of("resnet20_he")
    stem = 3 * 16 * 9
    stage1 = 6 * 16 * 16 * 9
    stage2 = 16 * 32 * 9 + 5 * 32 * 32 * 9
    stage3 = 32 * 64 * 9 + 5 * 64 * 64 * 9
    shortcut2, shortcut3 = 16 * 32, 32 * 64
    classifier = 64 * 10
    macs = (stem + stage1) * 32 * 32 + (stage2 + shortcut2) * 16 * 16 + (stage3 + shortcut3) * 8 * 8 + classifier
    norms = 2 * (7 * 16 + 7 * 32 + 7 * 64)  # of 7 + 7 + 7 convs: one stem, six a stage, a shortcut in two of them
    weights = stem + stage1 + stage2 + stage3 + shortcut2 + shortcut3 + classifier
    assert network.dense_macs == macs
    assert network.dense_parameters == weights + norms
    assert 0.265e6 < network.dense_parameters < 0.28e6
    assert 40e6 < network.dense_macs < 42e6


def test_vgg16_against_the_published_size():
    """Li et al. (2017) give 3.13e8 multiply-adds for their CIFAR VGG-16, its 512 -> 512 hidden layer included."""
    network = network_of("vgg16")
    widths, sides = (64, 64, 128, 128, *[256] * 3, *[512] * 6), (32, 32, 16, 16, *[8] * 3, *[4] * 3, *[2] * 3)
    channels = (3, *widths)
    convs = [channels[i] * channels[i + 1] * 9 for i in range(13)]
    assert network.dense_macs == sum(c * s * s for c, s in zip(convs, sides, strict=True)) + 512 * 10
    assert network.dense_parameters == sum(convs) + 2 * sum(widths) + 512 * 10 + 10
    assert abs(network.dense_macs - 3.13e8) < 0.01e8


def test_half_the_channels_of_a_chain_cost_a_quarter():
    network = network_of("vgg16", 0.125)
    half = np.concatenate([np.arange(c.out_channels) % 2 == 0 for c in network.layers.values()])
    macs = network.graph.layer_macs(network.plan(half).counts)
    dense = network.graph.layer_macs(network.dense_plan.counts)
    first, *inner, linear = dense
    assert 2 * macs[first] == dense[first]
    assert all(4 * macs[name] == dense[name] for name in inner)
    assert 2 * macs[linear] == dense[linear]


def test_the_ledger_by_hand():
    ledger = CostLedger()
    ledger.add_step(images=10, forward=[(30, 32), (50, 56)], num_backward=1, dense_macs=100)
    assert ledger.executed == 10 * (30 + 50 + 2 * 30)
    assert ledger.padded == 10 * (32 + 56 + 2 * 32)
    assert ledger.dense == 10 * 3 * 100
    assert ledger.mean_forward_ratio == pytest.approx(0.4)
    ledger.add_forward(images=7, cost=(20, 24))
    assert (ledger.executed, ledger.padded) == (1400 + 140, 1520 + 168)
    ledger.add_step(images=10, forward=[(30, 32), (50, 56)], num_backward=2, dense_macs=100)
    assert ledger.train_flops_ratio == pytest.approx((1400 + 140 + 10 * 3 * 80) / 6000)
    assert ledger.padded_train_flops_ratio == pytest.approx((1520 + 168 + 10 * 3 * 88) / 6000)
    assert CostLedger(**ledger.state_dict()) == ledger


def test_the_counter_itself_sees_every_layer():
    """So that the comparison above cannot pass by counting nothing."""
    network = sparse_network(plain_net("plain"), NETWORKS["plain"].LAYERS)
    images, _ = batch(2)
    with FlopCounterMode(display=False) as counter:
        network(images, network.dense_plan)
    by_operator = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    convs = 2 * 2 * (3 * 5 * 9 * 64 + 5 * 4 * 16 + 4 * 6 * 9 * 4)
    linears = 2 * 2 * (24 * 7 + 7 * 10)
    assert sum(count for op, count in by_operator.items() if "conv" in op) == convs
    assert sum(count for op, count in by_operator.items() if "mm" in op) == linears
