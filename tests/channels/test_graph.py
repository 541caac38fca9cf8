"""What the graph says of networks whose channels one can follow with a finger, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from models.resnet_cifar import ResNetCifar
from models.vgg import VGG
from tests.toy import (
    IMAGE_SHAPE,
    NETWORKS,
    one_thread,  # noqa: F401
    plain_net,
    sparse_network,
)
from utils.channels.graph import ChannelGraph
from utils.conv_type import sparsify, subnet_convs


def graph_of(kind: str) -> ChannelGraph:
    return sparse_network(plain_net(kind), NETWORKS[kind].LAYERS).graph


def writers_by_layer(graph: ChannelGraph) -> dict[str, set[str]]:
    """For each layer, the names of the maskable layers that write into its *result* (empty: full)."""
    name_of = {first: name for name, first in graph.first_unit.items()}
    return {
        str(op.node.target): {name_of[first] for first in graph.spaces[op.space].writers}
        for op in graph.ops
        if op.kind in ("conv", "norm", "linear")
    }


@pytest.mark.parametrize("kind", NETWORKS)
def test_units_are_laid_out_layer_by_layer(kind):
    graph, layers = graph_of(kind), NETWORKS[kind].LAYERS
    first, expected = 0, {}
    for name, width in layers.items():
        expected[name] = first
        first += width
    assert graph.first_unit == expected
    assert graph.num_units == first


def test_spaces_of_a_plain_network():
    assert writers_by_layer(graph_of("plain")) == {
        "conv1": {"conv1"},
        "bn1": {"conv1"},
        "conv2": {"conv2"},
        "bn2": {"conv2"},
        "conv3": {"conv3"},
        "hidden": set(),
        "linear": set(),
    }


def test_spaces_of_a_residual_network():
    graph = graph_of("released")
    assert writers_by_layer(graph) == {
        "conv1": {"conv1"},
        "bn": {"conv1"},
        "layer1.0.conv1": {"layer1.0.conv1"},
        "layer1.0.bn1": {"layer1.0.conv1"},
        "layer1.0.conv2": {"layer1.0.conv2"},
        "layer1.0.bn2": {"layer1.0.conv2"},
        "layer2.0.conv1": {"layer2.0.conv1"},
        "layer2.0.bn1": {"layer2.0.conv1"},
        "layer2.0.conv2": {"layer2.0.conv2"},
        "layer2.0.bn2": {"layer2.0.conv2"},
        "layer2.0.shortcut.0": {"layer2.0.shortcut.0"},
        "layer2.0.shortcut.1": {"layer2.0.shortcut.0"},
        "linear": set(),
    }
    name_of = {first: name for name, first in graph.first_unit.items()}
    streams = [{name_of[first] for first in graph.spaces[op.space].writers} for op in graph.ops if op.kind == "add"]
    assert streams == [{"conv1", "layer1.0.conv2"}, {"layer2.0.conv2", "layer2.0.shortcut.0"}]


def test_a_batch_norm_on_a_stream_sees_all_writers_so_far():
    writers = writers_by_layer(graph_of("preactivation"))
    assert writers["block1.bn1"] == {"stem"}
    assert writers["block2.bn1"] == {"stem", "block1.conv2"}
    assert writers["block3.bn1"] == {"stem", "block1.conv2", "block2.conv2"}
    assert writers["block3.shortcut"] == {"block3.shortcut"}
    assert writers["bn"] == {"block3.conv2", "block3.shortcut"}
    assert writers["block1.bn2"] == {"block1.conv1"}


def named_groups(graph: ChannelGraph, layers: dict[str, int]) -> set[tuple[str, ...]]:
    """The vital groups as tuples of layer names; every group must consist of whole layers."""
    owner = np.concatenate([[name] * width for name, width in layers.items()])
    groups = set()
    for group in graph.vital_groups:
        names = tuple(dict.fromkeys(owner[group]))
        assert len(group) == sum(layers[name] for name in names)
        groups.add(names)
    return groups


@pytest.mark.parametrize("kind", NETWORKS)
def test_vital_groups(kind):
    network = NETWORKS[kind]
    assert named_groups(graph_of(kind), network.LAYERS) == set(network.VITAL)


def test_every_convolution_of_a_vgg_is_vital():
    model = VGG((4, 5, "pool", 6, 7, "pool"), 10, 3)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    graph = ChannelGraph(sparsify(model, names, 0.5), (3, 32, 32))
    assert [len(group) for group in graph.vital_groups] == [4, 5, 6, 7]
    assert np.array_equal(np.concatenate(graph.vital_groups), np.arange(22))


def test_vital_groups_of_a_deeper_residual_network():
    model = ResNetCifar(2, (4, 5, 6), 10, 3)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n != "linear"]
    graph = ChannelGraph(sparsify(model, names, 0.5), (3, 16, 16))
    layers = {name: conv.out_channels for name, conv in subnet_convs(model).items()}
    assert named_groups(graph, layers) == {
        ("conv1",),
        ("layer2.0.conv1", "layer2.0.shortcut.0"),
        ("layer2.0.conv2", "layer2.0.shortcut.0"),
        ("layer3.0.conv1", "layer3.0.shortcut.0"),
        ("layer3.0.conv2", "layer3.0.shortcut.0"),
    }


def test_a_dense_layer_makes_its_bypass_safe():
    """With only the branch maskable, nothing is vital: the dense shortcut always passes."""
    branch = [name for name in NETWORKS["released"].LAYERS if "layer2.0.conv" in name]
    graph = sparse_network(plain_net("released"), branch).graph
    assert graph.vital_groups == []
    assert writers_by_layer(graph)["bn"] == set()


def test_the_guard_reaches_the_pass():
    network = sparse_network(plain_net("released"), NETWORKS["released"].LAYERS)
    network.scores.copy_(torch.linspace(0.1, 0.9, 54))
    plan = network.plan(np.zeros(54, dtype=bool))
    # the stem's last unit; of the pair (30..41 conv2, 42..53 shortcut) the shortcut's last
    assert np.flatnonzero(plan.mask_U).tolist() == [5, 53]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_of_a_network_does_not_matter(dtype):
    model = sparsify(plain_net("plain", dtype=dtype), ["conv1", "conv2"], 0.5)
    assert ChannelGraph(model, IMAGE_SHAPE).num_units == 9
