"""Operations that a strict graph refuses by name, and others that it must follow exactly or refuse: never wrongly."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.toy import (
    IMAGE_SHAPE,
    batch,
    flat_mask,
    one_thread,  # noqa: F401
    randomise,
    sparse_network,
)
from utils.channels.graph import ChannelGraph
from utils.conv_type import is_maskable, sparsify


class Chain(nn.Module):
    """conv, something, conv, pooling, linear; the something is what a test is about."""

    def __init__(self, middle: nn.Module, channels: int = 4, features: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.middle = middle
        self.conv2 = nn.Conv2d(channels, features, 3, padding=1)
        self.linear = nn.Linear(features, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv2(self.middle(self.conv1(x))).mean((2, 3)))


class Function(nn.Module):
    """A function as a module that the tracer looks into."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Scaled(nn.Module):
    """A parameter of its own, as in a layer scale."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


REFUSED_MODULES = {
    "pixel shuffle": (nn.PixelShuffle(2), 1, "module middle (PixelShuffle)"),
    "sigmoid": (nn.Sigmoid(), 4, "module conv2 (Conv2d)"),
    "per-channel slope": (nn.PReLU(4), 4, "module middle (PReLU)"),
    "group norm": (nn.GroupNorm(2, 4), 4, "module middle (GroupNorm)"),
    "instance norm": (nn.InstanceNorm2d(4), 4, "module middle (InstanceNorm2d)"),
    "transposed conv": (nn.ConvTranspose2d(4, 4, 1), 4, "module middle (ConvTranspose2d)"),
    "grouped conv": (nn.Conv2d(4, 4, 3, padding=1, groups=2), 4, "module middle (Conv2d)"),
    "channel mean": (Function(lambda x: x.mean(1, keepdim=True)), 1, "mean in middle"),
    "channel mean in a tuple": (Function(lambda x: x.mean((1,), keepdim=True)), 1, "mean in middle"),
    "channel mean among others": (Function(lambda x: x.mean((1, 2, 3), keepdim=True)), 1, "mean in middle"),
    "channel mean from the end": (Function(lambda x: x.mean(-3, keepdim=True)), 1, "mean in middle"),
    "mean over the images": (Function(lambda x: x - x.mean(0, keepdim=True)), 4, "mean in middle"),
    "concatenation": (Function(lambda x: torch.cat([x, x], 1)), 8, "cat in middle"),
    "a constant added": (Function(lambda x: x + 1), 4, "module conv2 (Conv2d)"),
    "quotient": (Function(lambda x: F.relu(x) / (x.abs() + 1)), 4, "truediv in middle"),
    "permutation": (Function(lambda x: x.permute(0, 2, 1, 3)), 8, "permute in middle"),
    "slice": (Function(lambda x: x[:, :2]), 2, "getitem in middle"),
    "view across channels": (Function(lambda x: x.view(x.size(0), 2, 8, 16)), 2, "view in middle"),
    "view of pairs of images": (Function(lambda x: x.view(-1, 8, 8, 8)[:, :4].repeat(2, 1, 1, 1)), 4, "view in middle"),
    "length": (Function(lambda x: x.view(len(x), 4, 8, 8)), 4, "module middle (Function)"),
    "exponential": (Function(torch.exp), 4, "module conv2 (Conv2d)"),
    "a scale per channel": (Scaled(torch.ones(4, 1, 1)), 4, "mul in middle"),
}


@pytest.mark.parametrize("case", REFUSED_MODULES)
def test_what_it_cannot_follow_is_refused_by_name_or_left_dense(case):
    middle, channels, named = REFUSED_MODULES[case]
    model = sparsify(Chain(middle, channels), ["conv1", "conv2"], 0.5)
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        ChannelGraph(model, IMAGE_SHAPE, strict=True)
    assert "\n" not in str(caught.value)
    graph = ChannelGraph(model, IMAGE_SHAPE)
    assert list(graph.first_unit) == ["conv2"]
    assert graph.barriers[0].layers == ("conv1",)
    assert named in graph.barriers[0].where


def test_a_masked_output_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="leave its last layer unmasked"):
        ChannelGraph(sparsify(model, ["0"], 0.5), IMAGE_SHAPE, strict=True)


def test_nothing_to_mask_is_refused():
    with pytest.raises(ValueError, match="no layer is left to mask"):
        sparsify(Chain(nn.ReLU()), [], 0.5)


# --- followed exactly, or refused: never followed wrongly ----------------------------------------------------------


class OwnNorm(nn.BatchNorm2d):
    """A batch-norm that somebody derived."""


class OwnConv(nn.Conv2d):
    """A convolution with a forward of its own (standardised weights)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Net(nn.Module):
    """Two maskable convs `conv1`, `conv2` (3 -> 4 -> 4, same size) and a head; `forward` is given.

    Beside it there is a layer that can always be masked.
    """

    def __init__(self, run, features: int = 4, **modules: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        for name, module in modules.items():
            setattr(self, name, module)
        self.linear = nn.Linear(features, 10)
        self.side, self.side_linear = nn.Conv2d(3, 2, 1), nn.Linear(2, 10)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x) + self.side_linear(self.side(x).mean((2, 3)))


def pooled(net: Net, x: Tensor) -> Tensor:
    return net.linear(x.mean((2, 3)))


def aliased(net: Net, x: Tensor) -> Tensor:
    a = net.conv1(x)
    total = a.add_(net.conv2(a))
    return pooled(net, total + F.relu(a))


def relu_in_place_then_added(net: Net, x: Tensor) -> Tensor:
    a = net.conv1(x)
    b = net.conv2(F.relu(a, inplace=True))
    return pooled(net, a + b)


def relu_in_place_of_a_sum(net: Net, x: Tensor) -> Tensor:
    a = net.conv1(x)
    b = F.relu(a + net.conv2(a), inplace=True)
    return pooled(net, a + b)


def sum_of_flat_maps(net: Net, x: Tensor) -> Tensor:
    a = net.conv1(x)
    return net.linear(a.flatten(1) + net.conv2(a).flatten(1))


def linear_on_a_map(net: Net, x: Tensor) -> Tensor:
    return net.last(net.linear(net.conv1(x)).mean((2, 3)))


def sum_with_one_channel(net: Net, x: Tensor) -> Tensor:
    a = net.conv1(x)
    return pooled(net, a + net.narrow(a))


def sum_with_pooled(net: Net, x: Tensor) -> Tensor:
    a = net.conv1(x)
    return pooled(net, F.adaptive_avg_pool2d(net.conv2(a), 1) + a)


EDGES = {
    "addition with a factor": Net(lambda n, x: pooled(n, torch.add(n.conv1(x), n.conv2(n.conv1(x)), alpha=2))),
    "addition in place to a tensor that is read again": Net(aliased),
    "relu in place of a tensor that is read again": Net(relu_in_place_then_added),
    "relu in place of a sum, an operand of which is read again": Net(relu_in_place_of_a_sum),
    "circular padding": Net(
        lambda n, x: pooled(n, n.ring(n.conv1(x))),
        ring=nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    ),
    "padding by name": Net(
        lambda n, x: pooled(n, n.same(n.conv1(x))), same=nn.Conv2d(4, 4, 3, padding="same", dilation=2)
    ),
    "a derived batch-norm": Net(lambda n, x: pooled(n, n.conv2(n.norm(n.conv1(x)))), norm=OwnNorm(4)),
    "a derived convolution": Net(lambda n, x: pooled(n, n.own(n.conv1(x))), own=OwnConv(4, 4, 3, padding=1)),
    "batch-norm without scale and shift": Net(
        lambda n, x: pooled(n, n.conv2(n.norm(n.conv1(x)))), norm=nn.BatchNorm2d(4, affine=False)
    ),
    "batch-norm without running statistics": Net(
        lambda n, x: pooled(n, n.conv2(n.norm(n.conv1(x)))), norm=nn.BatchNorm2d(4, track_running_stats=False)
    ),
    "batch-norm with a cumulative average": Net(
        lambda n, x: pooled(n, n.conv2(n.norm(n.conv1(x)))), norm=nn.BatchNorm2d(4, momentum=None)
    ),
    "sum of flattened maps": Net(sum_of_flat_maps, features=4 * 64),
    "sum of a flattened map and a full one": Net(
        lambda n, x: n.linear(n.conv1(x).flatten(1) + n.open(x).flatten(1)),
        features=4 * 64,
        open=nn.Conv2d(3, 4, 1),
    ),
    "linear layer on a map": Net(linear_on_a_map, features=8, last=nn.Linear(4, 10)),
    "flatten of the pixels alone": Net(
        lambda n, x: n.last(n.linear(n.pixels(n.conv1(x))).flatten(1)),
        features=64,
        pixels=nn.Flatten(2),
        last=nn.Linear(40, 10),
    ),
    "flatten up to a dimension": Net(
        lambda n, x: n.last(n.linear(n.conv1(x).flatten(1, 2)).flatten(1)), features=8, last=nn.Linear(320, 10)
    ),
    "mean over the last dimension, which is the channels": Net(
        lambda n, x: n.last(n.conv1(x).mean((2, 3)).mean((-1,), keepdim=True)), last=nn.Linear(1, 10)
    ),
    "sum with a map of one channel": Net(sum_with_one_channel, narrow=nn.Conv2d(4, 1, 1)),
    "sum with a pooled map": Net(sum_with_pooled),
    "sum with the image": Net(
        lambda n, x: pooled(n, n.conv2(n.conv1(x + n.back(n.conv1(x))))), back=nn.Conv2d(4, 3, 1)
    ),
    "a layer used twice": Net(lambda n, x: pooled(n, n.conv2(n.conv2(n.conv1(x))))),
    "functional pooling": Net(
        lambda n, x: pooled(n, F.adaptive_max_pool2d(F.avg_pool2d(F.max_pool2d(n.conv1(x), 2), 2), 1))
    ),
    "pooling modules": Net(
        lambda n, x: n.linear(n.flat(n.average(n.most(n.conv1(x))))),
        most=nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
        average=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
    ),
    "hidden linear layers": Net(
        lambda n, x: n.last(F.relu(n.linear(torch.flatten(n.conv1(x), 1)))), features=256, last=nn.Linear(10, 10)
    ),
    "smooth activations": Net(lambda n, x: pooled(n, F.silu(n.conv2(F.gelu(n.conv1(x)).tanh())))),
}


REFUSED = {
    "addition with a factor": "it adds with a factor",
    "addition in place to a tensor that is read again": "it changes a tensor in place that is read elsewhere too",
    "circular padding": "its padding_mode is 'circular', only 'zeros' is known",
    "a derived batch-norm": "it is a batch-norm of its own kind",
    "a derived convolution": "it is a convolution of its own kind",
    "batch-norm without scale and shift": "it needs scale and shift, running statistics and a momentum",
    "batch-norm without running statistics": "it needs scale and shift, running statistics and a momentum",
    "batch-norm with a cumulative average": "it needs scale and shift, running statistics and a momentum",
    "sum of flattened maps": "it adds shapes (256,) and (256,), only maps of one shape are known",
    "sum of a flattened map and a full one": "it adds shapes (256,) and (256,), only maps of one shape are known",
    "linear layer on a map": "it reads a map; flatten it first",
    "flatten of the pixels alone": "it reads a map; flatten it first",
    "flatten up to a dimension": "it moves channels to another dimension, or takes them apart",
    "mean over the last dimension, which is the channels": "over the pixels of a map, dim=(2, 3), is known",
    "sum with a map of one channel": "it adds shapes (4, 8, 8) and (1, 8, 8), only maps of one shape are known",
    "sum with a pooled map": "it adds shapes (4, 1, 1) and (4, 8, 8), only maps of one shape are known",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused(case):
    with pytest.raises(ValueError, match=re.escape(REFUSED[case])):
        sparse_network(EDGES[case], maskable_in(EDGES[case]), strict=True)


def maskable_in(net: nn.Module) -> list[str]:
    return [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and is_maskable(m)]


@pytest.mark.parametrize("case", EDGES)
def test_followed_exactly_or_left_dense(case):
    """Full mask: both executions are the plain network. Half mask: they agree."""
    net = randomise(EDGES[case], seed=1).double()
    maskable = maskable_in(net)
    images, _ = batch(4)
    masked, compact = (sparse_network(net, maskable, execution) for execution in ("masked", "compact"))
    net.eval()
    widths = {name: conv.out_channels for name, conv in masked.layers.items()}
    for network in (masked, compact):
        network.model.eval()
        torch.testing.assert_close(network(images, network.dense_plan), net(images), rtol=1e-10, atol=1e-12)
    some_layer_empty = [flat_mask(widths, {name: ()}, seed=9) for name in widths]
    for mask_U in (*some_layer_empty, *(flat_mask(widths, {}, seed) for seed in range(3))):
        logits = [network(images, network.plan(mask_U)) for network in (masked, compact)]
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-10, atol=1e-12)
    for network in (masked, compact):
        network.model.train()
    logits = [network(images, network.plan(mask_U)) for network in (masked, compact)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-10, atol=1e-12)
