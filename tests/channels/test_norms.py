"""What batch-norms tell of the units in front of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.channels.registry import images_and_labels, network_of
from tests.toy import NETWORKS, batch, one_thread, plain_net, sparse_network  # noqa: F401
from trainers.default import backward_
from utils.channels.network import SparseNetwork
from utils.channels.norms import GateReader, norms_behind
from utils.channels.shrink import shrink_to

STEP = 1e-5


def loss_of(network: SparseNetwork, mask_U: np.ndarray, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(network(images, network.plan(mask_U), update_statistics=False), labels)


def slope(network: SparseNetwork, layers: list[str], channel: int, loss) -> float:
    """Of the loss along a gate at 1 behind the norms of these layers: it scales gamma and beta."""
    norms = norms_behind(network)
    losses = []
    with torch.no_grad():
        for factor in (1 + STEP, (1 - STEP) / (1 + STEP), 1 / (1 - STEP)):
            for norm in {norms[name].module: norms[name] for name in layers}.values():
                stored = slice(None) if network.stored is None else network.stored[norm.space][: norm.first_channel]
                at = channel + (norm.first_channel if network.stored is None else int(stored.sum()))
                norm.module.weight[at] *= factor
                norm.module.bias[at] *= factor
            losses.append(float(loss()))
    return (losses[0] - losses[1]) / (2 * STEP)


@pytest.mark.parametrize("execution", ["compact", "masked"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_gates_are_slopes_of_the_loss(kind, execution):
    network = sparse_network(plain_net(kind), NETWORKS[kind].LAYERS, execution)
    network.model.train()
    reader, norms = GateReader(network), norms_behind(network)
    mask_U = np.random.default_rng(1).random(network.num_units) < 0.6
    images, labels = batch()
    backward_(network, loss_of(network, mask_U, images, labels), len(labels))
    plan = network.plan(mask_U)
    gradients_U, observed_U, num_images = reader.read(plan, len(labels))
    assert num_images == len(labels)
    num_observed = 0
    for name, layer in network.layers.items():
        first = network.graph.first_unit[name]
        for channel in range(layer.out_channels):
            kept = plan.mask_U[first + channel]
            alone = name in norms and norms[name].alone
            assert bool(observed_U[first + channel]) == bool(kept and alone)
            if observed_U[first + channel]:
                expected = slope(network, [name], channel, lambda: loss_of(network, mask_U, images, labels))
                assert float(gradients_U[first + channel]) == pytest.approx(expected, rel=1e-5, abs=1e-8)
                num_observed += 1
    assert num_observed > 2


def test_a_norm_that_two_tied_layers_share_is_read_once():
    network = network_of("wrn16_8", 0.03, residual_masks="tied")
    places = [(norm, int(units[0])) for norm, units, _ in GateReader(network).places]
    assert len(places) == len(set(places)) < len(network.layers)


def test_a_norm_of_a_stream_that_is_always_whole_belongs_to_no_layer():
    layers = [name for name in NETWORKS["preactivation"].LAYERS if name != "stem"]
    names = set(norms_behind(sparse_network(plain_net("preactivation"), layers)))
    assert names == {"block1.conv1", "block2.conv1", "block3.conv1", "block3.conv2", "block3.shortcut"}


@pytest.mark.parametrize("residual_masks", [pytest.param("free", marks=pytest.mark.slow), "tied"])
def test_gates_of_a_network_that_has_shrunk(residual_masks):
    network = network_of("resnet20_he", 0.25, residual_masks=residual_masks)
    network.model.train()
    images, labels = images_and_labels()
    reader = GateReader(network)
    assert reader.readable_U.all()
    random = np.random.default_rng(2)
    shrink_to(network, random.random(network.num_units) < 0.7)
    mask_U = network.stored_units & (random.random(network.num_units) < 0.7)
    backward_(network, loss_of(network, mask_U, images, labels), len(labels))
    plan = network.plan(mask_U)
    gradients_U, observed_U, num_images = reader.read(plan, len(labels))
    assert num_images == len(labels)
    assert np.array_equal(observed_U.numpy(), plan.mask_U)
    layers_of = {}
    for name, layer in network.layers.items():
        layers_of.setdefault(network.graph.first_unit[name], []).append((name, layer.out_channels))
    for first, layers in layers_of.items():
        stored_C = network.stored_units[first : first + layers[0][1]]
        for channel in np.flatnonzero(plan.mask_U[first : first + len(stored_C)])[:2]:
            names = [name for name, _ in layers]
            place = int(stored_C[:channel].sum())
            expected = slope(network, names, place, lambda: loss_of(network, mask_U, images, labels))
            assert float(gradients_U[first + channel]) == pytest.approx(expected, rel=1e-4, abs=1e-7)
