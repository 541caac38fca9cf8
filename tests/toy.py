"""Networks small enough to check by hand, and references that know nothing of `ChannelGraph` or `Plan`.

The references multiply by explicit masks, layer by layer, in the order of the sentence in the docstring. They share
no code with the two executions, so an error in the graph analysis (which both executions read) shows here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from args import Config, SparsityConfig, TrainConfig
from models.resnet_cifar import ResNetCifar
from trainers.build import make_estimator
from trainers.default import draw_masks, stored_masks
from trainers.state import Search
from utils.channels.budget import Budget
from utils.channels.network import SparseNetwork
from utils.channels.norms import GateReader
from utils.conv_type import sparsify

IMAGE_SHAPE = (3, 8, 8)
NUM_CLASSES = 10

Masks = Mapping[str, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread only waits for the first. Import it to use it in a test file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class ReleasedNet(ResNetCifar):
    """The network of `released_step.npz`: stem 3->6, block 6->6, block 6->12 with stride 2 and projection."""

    LAYERS: ClassVar = {
        "conv1": 6,
        "layer1.0.conv1": 6,
        "layer1.0.conv2": 6,
        "layer2.0.conv1": 12,
        "layer2.0.conv2": 12,
        "layer2.0.shortcut.0": 12,
    }
    VITAL = (
        ("conv1",),
        ("layer2.0.conv1", "layer2.0.shortcut.0"),
        ("layer2.0.conv2", "layer2.0.shortcut.0"),
    )

    def __init__(self) -> None:
        super().__init__(1, (6, 12, 1), NUM_CLASSES, 3)
        self.layer3 = nn.Sequential()
        self.linear = nn.Conv2d(12, NUM_CLASSES, 1, bias=False)


class PlainNet(nn.Module):
    """No bypass anywhere: conv with shift, a 1x1 conv, a conv that no batch-norm follows, two linear layers."""

    LAYERS: ClassVar = {"conv1": 5, "conv2": 4, "conv3": 6}
    VITAL = (("conv1",), ("conv2",), ("conv3",))

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1, bias=True)
        self.bn1 = nn.BatchNorm2d(5)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(5, 4, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv3 = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=True)
        self.hidden = nn.Linear(6 * 2 * 2, 7)
        self.linear = nn.Linear(7, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.conv3(x)).flatten(1)
        return self.linear(F.relu(self.hidden(x)))


class PreActivationBlock(nn.Module):
    """A block of a wide residual network: batch-norm reads the stream, the shortcut reads what it made."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x), inplace=True)
        bypass = x if self.shortcut is None else self.shortcut(out)
        return bypass + self.conv2(F.relu(self.bn2(self.conv1(out)), inplace=True))


class PreActivationNet(nn.Module):
    """Stem, two identity blocks, a projection block, a last batch-norm on the stream, linear classifier."""

    LAYERS: ClassVar = {
        "stem": 5,
        "block1.conv1": 4,
        "block1.conv2": 5,
        "block2.conv1": 4,
        "block2.conv2": 5,
        "block3.conv1": 6,
        "block3.conv2": 6,
        "block3.shortcut": 6,
    }
    VITAL = (("stem",), ("block3.conv1", "block3.shortcut"), ("block3.conv2", "block3.shortcut"))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.block1 = IdentityBlock(5, 4)
        self.block2 = IdentityBlock(5, 4)
        self.block3 = PreActivationBlock(5, 6, 2)
        self.bn = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.stem(x))))
        return self.linear(F.relu(self.bn(x)).mean((2, 3)))


class IdentityBlock(PreActivationBlock):
    """The block without projection, with an inner width of its own."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__(channels, channels, 1)
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)


class MixedNet(nn.Module):
    """Depthwise convs (one with a shift, one on a concatenated map), an addition, a nested concatenation."""

    LAYERS: ClassVar = {"stem": 5, "expand": 6, "project": 5, "grow": 3, "merge": 4}
    VITAL = (("stem",),)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(5)
        self.expand = nn.Conv2d(5, 6, 1, bias=True)
        self.bn1 = nn.BatchNorm2d(6)
        self.filter = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=True)
        self.bn2 = nn.BatchNorm2d(6)
        self.project = nn.Conv2d(6, 5, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(5)
        self.grow = nn.Conv2d(5, 3, 3, padding=1, bias=True)
        self.bn4 = nn.BatchNorm2d(8)
        self.merge = nn.Conv2d(8, 4, 1, bias=False)
        self.thin = nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=12, bias=False)
        self.linear = nn.Linear(12 * 4 * 4, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)), inplace=True)
        inner = F.relu6(self.bn1(self.expand(x)))
        inner = F.relu6(self.bn2(self.filter(inner)))
        x = x + self.bn3(self.project(inner))
        x = torch.cat([x, self.grow(x)], 1)
        x = F.relu(self.bn4(x), inplace=True)
        x = torch.cat([self.merge(x), x], dim=1)
        return self.linear(torch.flatten(self.thin(x), 1))


NETWORKS = {"released": ReleasedNet, "plain": PlainNet, "preactivation": PreActivationNet, "mixed": MixedNet}


@dataclass
class Reference:
    """A plain network run by hand under masks. Batch-norm is written out; statistics go to `statistics`.

    Attributes:
        net: plain modules (`nn.Conv2d`, `nn.BatchNorm2d`), never touched by `sparsify`.
        masks: float 0/1 vector per maskable layer.
        statistics: after a pass in training mode, running mean and variance of each batch-norm by name.
    """

    net: nn.Module
    masks: Masks
    statistics: dict[str, tuple[Tensor, Tensor]]

    def conv(self, name: str, x: Tensor) -> Tensor:
        """Convolution with its dropped channels set to zero (its shift included)."""
        return self.net.get_submodule(name)(x) * self.masks[name].view(-1, 1, 1)

    def norm(self, name: str, x: Tensor, live: Tensor) -> Tensor:
        """Batch-norm after which channels that are not live are zero; they keep their running statistics."""
        norm = self.net.get_submodule(name)
        mean, var = norm.running_mean, norm.running_var
        if self.net.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            unbiased = x.detach().var((0, 2, 3), unbiased=True)
            moved = [
                norm.running_mean + norm.momentum * (mean.detach() - norm.running_mean),
                norm.running_var + norm.momentum * (unbiased - norm.running_var),
            ]
            kept = live.bool()
            self.statistics[name] = (
                torch.where(kept, moved[0], norm.running_mean),
                torch.where(kept, moved[1], norm.running_var),
            )
        normed = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + norm.eps).sqrt()
        return (normed * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)) * live.view(-1, 1, 1)


def released_reference(run: Reference, images: Tensor) -> Tensor:
    """`ReleasedNet`: a channel of conv1, conv2 or the shortcut that is dropped is zero behind its batch-norm."""
    m = run.masks
    x = run.norm("bn", run.conv("conv1", images), m["conv1"]).relu()

    inner = run.norm("layer1.0.bn1", run.conv("layer1.0.conv1", x), m["layer1.0.conv1"]).relu()
    x = (x + run.norm("layer1.0.bn2", run.conv("layer1.0.conv2", inner), m["layer1.0.conv2"])).relu()

    inner = run.norm("layer2.0.bn1", run.conv("layer2.0.conv1", x), m["layer2.0.conv1"]).relu()
    branch = run.norm("layer2.0.bn2", run.conv("layer2.0.conv2", inner), m["layer2.0.conv2"])
    bypass = run.norm("layer2.0.shortcut.1", run.conv("layer2.0.shortcut.0", x), m["layer2.0.shortcut.0"])
    x = (branch + bypass).relu()
    return run.net.linear(x.mean((2, 3), keepdim=True)).flatten(1)


def plain_reference(run: Reference, images: Tensor) -> Tensor:
    """`PlainNet`: three convs in a row, each with its mask."""
    m, net = run.masks, run.net
    x = F.max_pool2d(run.norm("bn1", run.conv("conv1", images), m["conv1"]).relu(), 2)
    x = run.norm("bn2", run.conv("conv2", x), m["conv2"]).relu()
    x = run.conv("conv3", x).relu()
    return net.linear(net.hidden(x.reshape(len(x), -1)).relu())


def preactivation_reference(run: Reference, images: Tensor) -> Tensor:
    """`PreActivationNet`: a stream channel is live once the stem or the conv2 of an earlier block kept it."""
    m = run.masks
    x = run.conv("stem", images)
    live = m["stem"]

    for block in ("block1", "block2"):
        inner = run.conv(f"{block}.conv1", run.norm(f"{block}.bn1", x, live).relu())
        inner = run.norm(f"{block}.bn2", inner, m[f"{block}.conv1"]).relu()
        x = x + run.conv(f"{block}.conv2", inner)
        live = torch.maximum(live, m[f"{block}.conv2"])

    out = run.norm("block3.bn1", x, live).relu()
    inner = run.norm("block3.bn2", run.conv("block3.conv1", out), m["block3.conv1"]).relu()
    x = run.conv("block3.conv2", inner) + run.conv("block3.shortcut", out)
    live = torch.maximum(m["block3.conv2"], m["block3.shortcut"])
    return run.net.linear(run.norm("bn", x, live).relu().mean((2, 3)))


def mixed_reference(run: Reference, images: Tensor) -> Tensor:
    """`MixedNet`: a depthwise conv leaves a channel that does not exist at zero, its shift notwithstanding."""
    m, net = run.masks, run.net
    x = run.norm("bn", run.conv("stem", images), m["stem"]).relu()
    inner = run.norm("bn1", run.conv("expand", x), m["expand"]).clamp(0, 6)
    inner = net.filter(inner) * m["expand"].view(-1, 1, 1)
    inner = run.norm("bn2", inner, m["expand"]).clamp(0, 6)

    x = x + run.norm("bn3", run.conv("project", inner), m["project"])
    stream = torch.maximum(m["stem"], m["project"])
    x = torch.cat([x, run.conv("grow", x)], 1)
    x = run.norm("bn4", x, torch.cat([stream, m["grow"]])).relu()
    x = torch.cat([run.conv("merge", x), x], 1)
    return net.linear(net.thin(x).reshape(len(x), -1))


REFERENCES = {
    "released": released_reference,
    "plain": plain_reference,
    "preactivation": preactivation_reference,
    "mixed": mixed_reference,
}


def randomise(net: nn.Module, seed: int) -> nn.Module:
    """Random weights, and batch-norms with shifts, scales and statistics that are nowhere 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            fan_in = max(1, parameter[0].numel())
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan_in) ** 0.5)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                width = module.num_features
                if module.affine:
                    module.weight.copy_(0.5 + torch.rand(width, generator=generator))
                    module.bias.copy_(torch.randn(width, generator=generator) * 0.5)
                if module.track_running_stats:
                    module.running_mean.copy_(torch.randn(width, generator=generator) * 0.3)
                    module.running_var.copy_(0.5 + torch.rand(width, generator=generator))
    return net


def plain_net(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """One of `NETWORKS` with random tensors; plain modules."""
    return randomise(NETWORKS[kind](), seed).to(dtype)


def sparse_network(
    net: nn.Module,
    layers: Sequence[str],
    execution: str = "compact",
    score_init: float = 0.5,
    image_shape: tuple[int, int, int] = IMAGE_SHAPE,
    device: str = "cpu",
    **options: Any,
) -> SparseNetwork:
    """A `SparseNetwork` over a copy of `net`, its scores in the dtype of its weights; unpadded unless asked."""
    if type(net) not in NETWORKS.values():  # of these a class has one forward pass
        return build_network(net, layers, execution, score_init, image_shape, device, options)
    arguments = (tuple(layers), execution, score_init, image_shape, device, tuple(sorted(options.items())))
    key = (type(net), repr(net), net.training, next(net.parameters()).dtype, arguments)  # repr: every module's options
    if key not in BUILT:
        BUILT[key] = build_network(net, layers, execution, score_init, image_shape, device, options)
    network = copy.deepcopy(BUILT[key])
    own = network.model.state_dict(keep_vars=True)
    for name, tensor in net.state_dict().items():
        own[name].data = tensor.to(device, copy=True)  # with its layout in memory
    return network


BUILT: dict[tuple, SparseNetwork] = {}  # a copy takes a seventh of the time that tracing does


def build_network(
    net: nn.Module,
    layers: Sequence[str],
    execution: str,
    score_init: float,
    image_shape: tuple[int, int, int],
    device: str,
    options: Mapping[str, Any],
) -> SparseNetwork:
    dtype = next(net.parameters()).dtype
    model = sparsify(copy.deepcopy(net), list(layers), score_init).to(device, dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # `test_graph.py` has its own test of a graph in another dtype
    try:
        return SparseNetwork(model, image_shape, execution=execution, **{"multiple": 1, "self_check": False, **options})
    finally:
        torch.set_default_dtype(default)


def flat_mask(layers: Mapping[str, int], kept: Mapping[str, Sequence[int]], seed: int = 0) -> np.ndarray:
    """A mask with the given channels kept in the layers named, and random ones (never none) in the others."""
    random = np.random.default_rng(seed)
    parts = []
    for name, width in layers.items():
        part = np.zeros(width, dtype=bool)
        if name in kept:
            part[list(kept[name])] = True
        else:
            part[random.permutation(width)[: random.integers(1, width + 1)]] = True
        parts.append(part)
    return np.concatenate(parts)


def by_layer(layers: Mapping[str, int], mask_U: np.ndarray, dtype: torch.dtype) -> dict[str, Tensor]:
    """The float mask of each layer, cut out of the flat one."""
    parts = torch.from_numpy(mask_U).to(dtype).split(list(layers.values()))
    return dict(zip(layers, parts, strict=True))


def batch(
    size: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64, image_shape: tuple[int, int, int] = IMAGE_SHAPE
) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(1000 + seed)
    images = torch.randn((size, *image_shape), generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(NUM_CLASSES, (size,), generator=generator)


def config(**options: Any) -> Config:
    """Options by name, those of a group in `args.Config`; by default nothing is clipped."""
    groups = {"sparsity": SparsityConfig, "train": TrainConfig}
    given = {"clip_norm": 1e9, **options}
    values = {
        name: group(**{key: given.pop(key) for key in list(given) if key in group.__dataclass_fields__})
        for name, group in groups.items()
    }
    assert not given, f"unknown options: {given}"
    return Config(**values)


def search_of(
    network: SparseNetwork,
    options: Config,
    *,
    masks_KU: Tensor | None = None,
    seed: int = 0,
    weight_optimizer: torch.optim.Optimizer | None = None,
    score_optimizer: torch.optim.Optimizer | None = None,
) -> Search:
    """A search before its first step, with given masks or with masks drawn from the scores; SGD and Adam by default."""
    budget = Budget(network, options.sparsity.budget, options.sparsity.constrain_by_layer)
    search = Search(
        network,
        budget,
        weight_optimizer or torch.optim.SGD(network.weight_parameters(), lr=1.0, momentum=0.9),
        score_optimizer or torch.optim.Adam([network.scores], lr=1.0),
        torch.Generator("cpu" if budget.on_host else network.device).manual_seed(seed),
        estimator=make_estimator(network, options),
    )
    search.masks = draw_masks(search, options) if masks_KU is None else stored_masks(masks_KU, options, network.device)
    if search.estimator.needs_gates:
        search.gate_reader = GateReader(network)
    return search


CLOCKS = ("images_per_second", "step_ms", "evaluation_seconds", "epoch_seconds", "data_seconds")


def without_clocks(state: Mapping[str, Any]) -> dict[str, Any]:
    """What two checkpoints of equal runs have in common: no times, and no options, of which some may differ."""
    kept = {key: value for key, value in state.items() if key not in ("clocks", "config")}
    if kept.get("best"):
        kept["best"] = without_clocks(kept["best"])
    if "history" in kept:
        kept["history"] = [{k: v for k, v in row.items() if k not in CLOCKS} for row in kept["history"]]
    return kept
