"""The ordinary network of a subnet computes what compact and masked execution do, and costs what they are said to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import MobileNetV2

from models import MODELS, build_model, maskable_convs
from tests.channels.passes import CASES, EXACT, MASKS
from tests.channels.small import SMALL
from tests.toy import (
    IMAGE_SHAPE,
    NETWORKS,
    batch,
    flat_mask,
    one_thread,  # noqa: F401
    plain_net,
    randomise,
    sparse_network,
)
from utils.channels.network import SparseNetwork
from utils.channels.plain import PlainNetwork, plain_network
from utils.channels.shrink import shrink_to
from utils.channels.source import identifier
from utils.channels.subnet import Subnet

# One of each family; the others have more of the same layers.
QUICK = ("resnet20_he", "vgg16", "wrn16_8", "mobilenet_v1", "resnet18", "resnet50")


def subnet_of(network: SparseNetwork, mask_U: np.ndarray) -> Subnet:
    """With statistics of its own: not those that the network has."""
    statistics = {
        name: (norm.running_mean + 0.25, 1.5 * norm.running_var) for name, norm in network.batch_norms().items()
    }
    return Subnet(network.plan(mask_U).mask_U, statistics)


def logits_of(network: SparseNetwork, subnet: Subnet, images: Tensor) -> Tensor:
    network.model.eval()
    norms = network.batch_norms()
    for name, (mean, variance) in subnet.statistics.items():
        norms[name].running_mean.copy_(mean)
        norms[name].running_var.copy_(variance)
    with torch.no_grad():
        return network(images, network.plan(subnet.mask_U))


def cost_of(plain: PlainNetwork, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Multiply-adds of one image as torch counts them, and the number of parameters."""
    module = plain.module()
    dtype = next(iter(module.parameters())).dtype
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, *image_shape, dtype=dtype))
    return counter.get_total_flops() // 2, sum(p.numel() for p in module.parameters())


def check(
    net: nn.Module, layers: Sequence[str], mask_U: np.ndarray | float, image_shape=IMAGE_SHAPE, **options
) -> PlainNetwork:
    """Compares the plain network, folded and not, with both executions; returns the one that is not folded.

    Args:
        mask_U: a mask, or the share of units that a random one keeps.
    """
    images, _ = batch(image_shape=image_shape)
    network = sparse_network(net, layers, image_shape=image_shape, **options)
    if isinstance(mask_U, float):
        mask_U = np.random.default_rng(0).random(network.num_units) < mask_U
    subnet = subnet_of(network, mask_U)
    plains = [plain_network(network, subnet, fold_batch_norm=fold) for fold in (False, True)]
    expected = [logits_of(network, subnet, images)]
    network.execution = "masked"
    expected.append(logits_of(network, subnet, images))
    with torch.no_grad():
        for plain in plains:
            for logits in expected:
                torch.testing.assert_close(plain.module()(images), logits, **EXACT)
    return plains[0]


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_it_is_both_executions(kind, case):
    layers = NETWORKS[kind].LAYERS
    plain = check(plain_net(kind), list(layers), flat_mask(layers, MASKS[kind][case], seed=5))
    classes = [type(module) for module in plain.module().children()]
    assert all(getattr(nn, kind.__name__) is kind for kind in classes)


@pytest.mark.parametrize("residual_masks", ["free", "tied"])
@pytest.mark.parametrize("kind", SMALL)
def test_it_is_both_executions_under_many_masks(kind, residual_masks):
    """Layers that run twice, sums of concatenations, an image that is concatenated, empty layers of every kind."""
    net = randomise(SMALL[kind](), seed=1).double()
    random = np.random.default_rng(0)
    units = sparse_network(net, SMALL[kind].LAYERS, residual_masks=residual_masks).num_units
    for share in (0.2, 0.5, 0.5, 0.8, 1.0):
        check(net, SMALL[kind].LAYERS, random.random(units) < share, residual_masks=residual_masks)


@pytest.mark.parametrize(
    "arch", [arch if arch in QUICK else pytest.param(arch, marks=pytest.mark.slow) for arch in MODELS]
)
def test_every_network_by_name_and_its_cost(arch):
    """Every layer keeps a channel, so nothing is left out, and the counts of the run are those of torch."""
    torch.manual_seed(0)
    model = randomise(build_model(arch, 10, 3, 32, 0.05), seed=0).double()
    layers = maskable_convs(model, first_layer_dense=False, last_layer_dense=False)
    network = sparse_network(model, layers, image_shape=(3, 32, 32))
    mask_U = np.random.default_rng(0).random(network.num_units) < 0.5
    for group in network.unit_groups():
        mask_U[group.start] = True
    subnet = subnet_of(network, mask_U)
    plain = plain_network(network, subnet)
    images, _ = batch(2, image_shape=(3, 32, 32))
    with torch.no_grad():
        torch.testing.assert_close(plain.module()(images), logits_of(network, subnet, images), **EXACT)
    plan = network.plan(subnet.mask_U)
    assert cost_of(plain, (3, 32, 32)) == (network.subnet_macs(plan), network.subnet_parameters(plan))
    assert {name: len(kept) for name, kept in plain.kept.items()} == network.graph.layer_widths(plan.counts)


def test_large_images_and_columns_behind_a_flatten():
    model = randomise(build_model("vgg11", 10, 3, 128, 0.02), seed=0).double()
    layers = maskable_convs(model, first_layer_dense=False, last_layer_dense=False)
    check(model, layers, 0.5, (3, 128, 128))


def test_a_network_of_torchvision():
    model = randomise(MobileNetV2(num_classes=5, width_mult=0.1, dropout=0.0), seed=0).double()
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    check(model, layers, 0.7, (3, 32, 32))


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_that_has_shrunk(kind):
    layers = NETWORKS[kind].LAYERS
    full, shrunk = (sparse_network(plain_net(kind), layers) for _ in range(2))
    mask_U = flat_mask(layers, {}, seed=5)
    more_U = mask_U | flat_mask(layers, {}, seed=6)
    assert shrink_to(shrunk, more_U, keep_fallback=False)
    images, _ = batch()
    plains = [plain_network(network, subnet_of(network, mask_U)) for network in (full, shrunk)]
    assert plains[0].source == plains[1].source
    with torch.no_grad():
        assert torch.equal(plains[0].module()(images), plains[1].module()(images))


def test_a_branch_that_leads_nowhere_is_left_out():
    layers = NETWORKS["released"].LAYERS
    network = sparse_network(plain_net("released"), layers)
    subnet = subnet_of(network, flat_mask(layers, {"layer1.0.conv1": [0, 1], "layer1.0.conv2": []}, seed=5))
    plain = plain_network(network, subnet)
    plan = network.plan(subnet.mask_U)
    macs, parameters = cost_of(plain, IMAGE_SHAPE)
    names = ("layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2", "layer1.0.bn2")
    unread_macs = sum(network.graph.layer_macs(plan.counts).get(name, 0) for name in names)
    unread_parameters = sum(network.graph.layer_parameters(plan.counts)[name] for name in names)
    assert unread_macs > 0
    assert macs == network.subnet_macs(plan) - unread_macs
    assert parameters == network.subnet_parameters(plan) - unread_parameters
    assert not any(name.startswith("layer1") for name in plain.tensors)
    assert plain.kept["layer1.0.conv1"] == [0, 1]
    assert plain.kept["layer1.0.conv2"] == []


class InPlace(nn.Module):
    """An activation that changes what is read again behind it; names that torch or the text has already."""

    LAYERS = ("zero.grad", "x", "images")

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.ModuleDict({"grad": nn.Conv2d(3, 4, 3, padding=1)})
        self.x = nn.Conv2d(4, 4, 1)
        self.act = nn.LeakyReLU(0.3, inplace=True)
        self.images = nn.Conv2d(4, 4, 1, bias=False)
        self.pool = nn.AvgPool2d(2, padding=1, count_include_pad=False)
        self.linear = nn.Linear(4, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.zero["grad"](image)
        y = F.elu(x, 0.7, True)  # x is y from here on
        y = self.x(y)
        z = nn.functional.leaky_relu(x + y, negative_slope=0.2, inplace=True)
        w = self.act(z)  # z is w from here on
        x = self.images(w) + z
        return self.linear(self.pool(x).mean((2, 3)).relu_())


def test_what_works_in_place_and_odd_names():
    net = randomise(InPlace(), seed=2).double()
    for seed in range(4):
        plain = check(net, InPlace.LAYERS, np.random.default_rng(seed).random(12) < 0.6)
    assert "inplace" not in plain.source
    assert "self.zero_grad_ = nn.Conv2d(3, " in plain.source
    assert "self.x_ = nn.Conv2d(" in plain.source
    assert "nn.LeakyReLU(negative_slope=0.3)" in plain.source
    assert "nn.AvgPool2d(2, padding=1, count_include_pad=False)" in plain.source
    assert "F.elu(self.zero_grad_(images), alpha=0.7)" in plain.source


class SharedConv(nn.Module):
    """A convolution that runs twice with a batch-norm of its own each time, and a sum that no call encloses."""

    LAYERS = ("stem", "conv")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn1(self.conv(x))
        x = self.bn2(self.conv(x))
        return self.linear((x + y).mean((2, 3)))


def test_a_layer_that_runs_twice_and_a_sum_that_no_call_encloses():
    net = randomise(SharedConv(), seed=3).double()
    for share in (0.5, 1.0):
        plain = check(net, SharedConv.LAYERS, share)
        assert plain.source.count("self.conv = ") == 1


def test_the_text_is_what_one_would_write():
    layers = NETWORKS["released"].LAYERS
    kept = {
        "conv1": [0, 2, 4],
        "layer1.0.conv1": [5],
        "layer1.0.conv2": [2, 3],
        "layer2.0.conv1": [1, 2],
        "layer2.0.conv2": [0, 7, 9],
        "layer2.0.shortcut.0": [0, 7, 9],
    }
    network = sparse_network(plain_net("released"), layers)
    plain = plain_network(network, subnet_of(network, flat_mask(layers, kept)))
    assert (
        plain.source
        == """\
class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.layer1_0_conv1 = nn.Conv2d(3, 1, 3, padding=1, bias=False)
        self.layer1_0_bn1 = nn.BatchNorm2d(1)
        self.layer1_0_conv2 = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.layer1_0_bn2 = nn.BatchNorm2d(2)
        self.layer2_0_conv1 = nn.Conv2d(4, 2, 3, stride=2, padding=1, bias=False)
        self.layer2_0_bn1 = nn.BatchNorm2d(2)
        self.layer2_0_conv2 = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.layer2_0_bn2 = nn.BatchNorm2d(3)
        self.layer2_0_shortcut_0 = nn.Conv2d(4, 3, 1, stride=2, bias=False)
        self.layer2_0_shortcut_1 = nn.BatchNorm2d(3)
        self.linear = nn.Conv2d(3, 10, 1, bias=False)
        self.register_buffer("add_places", torch.empty(2, dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        relu = F.relu(self.bn(self.conv1(images)))
        x = self.layer1_0_conv2(F.relu(self.layer1_0_bn1(self.layer1_0_conv1(relu))))
        x = F.pad(relu, (0, 0, 0, 0, 0, 1)).index_add(1, self.add_places, self.layer1_0_bn2(x))
        relu_2 = F.relu(x)
        x = self.layer2_0_conv2(F.relu(self.layer2_0_bn1(self.layer2_0_conv1(relu_2))))
        layer2_0_bn2 = self.layer2_0_bn2(x)
        x = F.relu(layer2_0_bn2 + self.layer2_0_shortcut_1(self.layer2_0_shortcut_0(relu_2)))
        return self.linear(x.mean((2, 3), keepdim=True)).flatten(1)
"""
    )
    assert plain.tensors["add_places"].tolist() == [1, 3]


def test_batch_norms_that_fold_and_those_that_cannot():
    layers = NETWORKS["preactivation"].LAYERS
    network = sparse_network(plain_net("preactivation"), layers)
    subnet = subnet_of(network, flat_mask(layers, {}, seed=5))
    plain = plain_network(network, subnet, fold_batch_norm=True)
    left = {name.removesuffix(".running_mean") for name in plain.tensors if name.endswith("running_mean")}
    assert left == {"block1_bn1", "block2_bn1", "block3_bn1", "bn"}  # the stream that they read is read elsewhere too


def test_names_that_are_no_identifiers():
    assert identifier("trunk.block1-0.f", set()) == "trunk_block1_0_f"
    assert identifier("0", {"layer_0"}) == "layer_0_2"


def test_the_network_has_tensors_of_its_own():
    layers = NETWORKS["plain"].LAYERS
    network = sparse_network(plain_net("plain"), layers)
    plain = plain_network(network, subnet_of(network, np.ones(network.num_units, dtype=bool)))
    module = plain.module()
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    for parameter in module.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.model.state_dict().items())
    assert not module.training
    assert all(p.requires_grad for p in module.parameters())


def test_the_released_execution_has_no_small_network():
    layers = NETWORKS["released"].LAYERS
    network = sparse_network(plain_net("released"), layers, "released")
    with pytest.raises(ValueError, match="no channel can leave"):
        plain_network(network, subnet_of(network, flat_mask(layers, {}, seed=5)))
