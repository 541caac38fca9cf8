"""What channels cannot be followed through runs as written; the layers around it stay dense, the others do not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet_cifar import ResNetCifar
from tests.channels.conversion import check, check_the_rest, converted
from tests.toy import IMAGE_SHAPE, one_thread  # noqa: F401
from utils.channels.network import SparseNetwork
from utils.channels.plain import plain_network
from utils.channels.subnet import Subnet
from utils.conv_type import PlainConv, sparsify


class Grouped(nn.Module):
    """One barrier in the middle: `first` writes what it reads; `last` reads what it writes."""

    def __init__(self, middle: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 1)
        self.middle = middle
        self.last, self.linear = nn.Conv2d(width, 5, 1), nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.last(self.middle(self.first(F.relu(self.stem(x))))).mean((2, 3)))


class Branching(nn.Module):
    """Python that depends on values, with layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return -x
        return self.norm(self.conv(x))


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        left, right = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w).chunk(2, 1)
        return torch.cat((right, left * 2, left), 1)


MIDDLES = {
    "a grouped convolution": (nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False), 6, "it is a grouped convolution"),
    "a shuffle": (Shuffle(), 9, "it moves channels to another dimension"),
    "a norm with groups": (nn.GroupNorm(2, 6), 6, "it is not a known layer or operation"),
    "a submodule that cannot be traced": (Branching(), 6, "torch.fx cannot trace its forward: symbolically traced var"),
}


@pytest.mark.parametrize("case", MIDDLES)
def test_the_layers_around_it_are_dense_and_the_others_are_not(case):
    middle, width, reason = MIDDLES[case]
    network = check(Grouped(middle, width), shares=(0.4,))
    assert list(network.layers) == ["stem", "last"]
    assert network.num_units == 4 + 5
    [barrier] = network.coverage.barriers
    assert barrier.layers[0] == "first"
    assert "middle" in barrier.where
    assert barrier.reason.startswith(reason)
    assert {type(network.model.get_submodule(name)) for name in barrier.layers} == {PlainConv}
    check_the_rest(network, IMAGE_SHAPE, export=not isinstance(middle, Branching))
    with pytest.raises(ValueError, match="channels cannot be followed through ") as refused:
        converted(Grouped(middle, width), IMAGE_SHAPE, strict=True)
    assert "middle" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_can_be_masked_is_counted_and_printed(capsys):
    grouped = Grouped(copy.deepcopy(MIDDLES["a grouped convolution"][0]))
    network = SparseNetwork(sparsify(grouped), IMAGE_SHAPE)
    coverage, pixels = network.coverage, 64
    assert (coverage.units, coverage.all_units) == (9, 15)
    fixed = 6 * 3 * 9 * pixels  # the grouped convolution, which always runs
    maskable = (3 * 4 * 9 + 4 * 6 + 6 * 5) * pixels + 5 * 10
    assert (coverage.macs, coverage.all_macs) == (maskable, maskable + fixed)
    assert network.dense_macs == coverage.all_macs
    assert network.dense_parameters == sum(p.numel() for n, p in grouped.named_parameters() if "scores" not in n)
    printed = capsys.readouterr().out
    assert printed == str(coverage) + "\n"
    assert f"9 of 15 channels can be masked, and {100 * maskable / (maskable + fixed):.1f} % of the FLOPs" in printed
    assert "first stays dense because of module middle (Conv2d) at channels/test_barriers.py:" in printed


def test_a_stream_stays_whole_if_one_of_its_writers_does():
    """A barrier on a sum takes the units of the first layer that writes it; the others can still be masked."""

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch, self.linear = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.branch(F.relu(x))
            return self.linear(F.instance_norm(x).mean((2, 3)))

    for residual_masks in ("free", "tied"):
        network = check(Stream(), shares=(0.5, 0.0), residual_masks=residual_masks)
        assert list(network.layers) == ["branch"]


def test_a_network_of_which_nothing_is_left_is_refused():
    class Nothing(nn.Sequential):
        pass

    model = Nothing(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(256, 10))
    with pytest.raises(ValueError, match=r"^no layer of the network is left to mask.* module 1 \(GroupNorm\)"):
        SparseNetwork(sparsify(model), IMAGE_SHAPE)


def test_a_forward_that_cannot_be_traced_is_refused_with_its_line():
    class Root(Branching):
        pass

    with pytest.raises(ValueError, match=r"Root \(channels/test_barriers.py:\d+\): torch.fx cannot trace") as refused:
        SparseNetwork(sparsify(Root()), (6, 8, 8))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_a_pass_of_which_only_the_loss_is_used_moves_no_statistics_behind_a_barrier(execution):
    network = converted(Grouped(Branching()), IMAGE_SHAPE, execution=execution)
    network.model.train()
    norm, images = network.model.middle.norm, torch.randn(4, *IMAGE_SHAPE, dtype=torch.float64)
    before = norm.running_mean.clone()
    network(images, network.dense_plan, update_statistics=False).sum().backward()
    assert torch.equal(norm.running_mean, before)
    network(images, network.dense_plan)
    assert not torch.equal(norm.running_mean, before)


def test_statistics_of_norms_behind_a_barrier_belong_to_a_subnet_too():
    network = converted(Grouped(nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(6), nn.Unflatten(2, (8, 8)))), IMAGE_SHAPE)
    assert list(network.batch_norms()) == ["middle.1"]
    check_the_rest(network, IMAGE_SHAPE)


def test_a_layer_of_somebodys_own_cannot_be_taken_home_and_is_named():
    network = converted(Grouped(Branching()), IMAGE_SHAPE)
    subnet = Subnet(np.ones(9, dtype=bool), {"middle.norm": (torch.zeros(6), torch.ones(6))})
    with pytest.raises(ValueError, match=r"module middle \(Branching\).*: only layers of torch.nn"):
        plain_network(network, subnet)


def test_layers_that_never_run_have_no_units(capsys):
    class Ghost(Grouped):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.aux = nn.Conv2d(6, 100, 1)

    network = SparseNetwork(sparsify(Ghost()), IMAGE_SHAPE)
    assert network.num_units == 4 + 6 + 5
    assert network.coverage.unused == ["aux"]
    assert "never run" in capsys.readouterr().out
    assert network.expected_cost("flops").dense == network.dense_macs


def test_networks_without_barriers_are_covered_whole():
    model = ResNetCifar(1, (4, 5, 6), 10, 3)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n != "linear"]
    coverage = SparseNetwork(sparsify(model, names), (3, 16, 16), strict=True).coverage
    assert (coverage.units, coverage.partial) == (coverage.all_units, False)
    assert coverage.macs == coverage.all_macs
