"""Spellings that are followed exactly: every channel stays maskable, and all executions are the plain network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.channels.conversion import check, check_the_rest
from tests.channels.test_refusals import Net, pooled
from tests.toy import IMAGE_SHAPE, one_thread  # noqa: F401
from utils.channels.network import SparseNetwork
from utils.conv_type import sparsify


def body(net: Net, x: Tensor) -> Tensor:
    return net.conv2(F.relu(net.conv1(x)))


def gate_of_convs(net: Net, x: Tensor) -> Tensor:
    gate = net.outer(F.silu(net.inner(x.mean((2, 3), keepdim=True))))
    return x * torch.sigmoid(gate)


def gate_of_linears(net: Net, x: Tensor) -> Tensor:
    b, c, _, _ = x.size()
    y = net.second(F.relu(net.first(F.adaptive_avg_pool2d(x, 1).view(b, c))))
    return x * y.sigmoid().view(b, c, 1, 1).expand_as(x)


def gate_in_place(net: Net, x: Tensor) -> Tensor:
    y = F.hardsigmoid(net.norm(net.outer(F.relu(net.inner(F.adaptive_avg_pool2d(x, 1))))), inplace=True)
    x *= y
    return x


def gate_for_every_pixel(net: Net, x: Tensor) -> Tensor:
    return (F.relu6(net.outer(net.inner(x)) + 3) / 6) * x


def swish_by_hand(x: Tensor) -> Tensor:
    return x * F.relu6(x + 3) / 6


def gate(**modules: nn.Module) -> dict[str, nn.Module]:
    return {"inner": nn.Conv2d(4, 2, 1), "outer": nn.Conv2d(2, 4, 1), **modules}


FOLLOWED = {
    "view with size(0)": Net(lambda n, x: n.linear((y := body(n, x)).view(y.size(0), -1)), features=256),
    "view with shape[0]": Net(lambda n, x: n.linear((y := body(n, x)).view(y.shape[0], 4 * 64)), features=256),
    "view with -1 in front": Net(lambda n, x: n.linear(body(n, x).view(-1, 256)), features=256),
    "reshape to pixels and back": Net(
        lambda n, x: pooled(n, (y := body(n, x)).reshape(y.size()[0], 4, 64).reshape(-1, 4, 8, 8))
    ),
    "flatten by keywords": Net(lambda n, x: n.linear(torch.flatten(body(n, x), start_dim=1)), features=256),
    "flatten of pixels, then a mean": Net(lambda n, x: n.linear(body(n, x).flatten(2).mean(-1))),
    "squeeze": Net(lambda n, x: n.linear(F.adaptive_avg_pool2d(body(n, x), 1).squeeze())),
    "squeeze twice": Net(lambda n, x: n.linear(F.adaptive_avg_pool2d(body(n, x), 1).squeeze(3).squeeze(-1))),
    "the only pixel": Net(lambda n, x: n.linear(F.avg_pool2d(body(n, x), 8)[:, :, 0, 0])),
    "means one by one": Net(lambda n, x: n.linear(torch.mean(body(n, x), dim=3).sum(2))),
    "largest pixel": Net(lambda n, x: n.linear(body(n, x).amax(dim=(-2, -1)))),
    "pooling to larger maps": Net(lambda n, x: n.linear(nn.AdaptiveAvgPool2d((10, 9))(body(n, x)).flatten(1)), 360),
    "a larger map of the size of another": Net(
        lambda n, x: pooled(n, F.interpolate(F.max_pool2d(body(n, x), 2), size=x.shape[2:]) + n.conv1(x))
    ),
    "addition by keywords": Net(lambda n, x: pooled(n, torch.add(input=(y := n.conv1(x)), other=n.conv2(y)))),
    "sum of a list": Net(lambda n, x: pooled(n, sum([y := n.conv1(x), n.conv2(y)]))),
    "sum with itself, times numbers": Net(lambda n, x: pooled(n, -(2 * (y := body(n, x)) + y / 3))),
    "swish by hand": Net(lambda n, x: pooled(n, n.conv2(swish_by_hand(n.conv1(x))))),
    "swish with a factor": Net(lambda n, x: pooled(n, (y := body(n, x)) * torch.sigmoid(1.7 * y))),
    "a scale for all": Net(lambda n, x: pooled(n, body(n, x) * n.norm.scale), norm=None),
    "numbers in the forward": Net(
        lambda n, x: (
            pooled(n, body(n, x - torch.tensor([1.0, 2.0, 3.0]).float().view(1, 3, 1, 1).to(x.device)))
            * torch.tensor(0.5).float()
        )
    ),
    "gate of convolutions": Net(lambda n, x: pooled(n, n.conv2(gate_of_convs(n, n.conv1(x)))), **gate()),
    "gate of a sum": Net(lambda n, x: pooled(n, gate_of_convs(n, (y := n.conv1(x)) + F.relu(n.conv2(y)))), **gate()),
    "gate of linear layers": Net(
        lambda n, x: pooled(n, n.conv2(gate_of_linears(n, n.conv1(x)))), first=nn.Linear(4, 2), second=nn.Linear(2, 4)
    ),
    "gate in place, with a norm": Net(
        lambda n, x: pooled(n, n.conv2(gate_in_place(n, n.conv1(x)))), **gate(norm=nn.BatchNorm2d(4))
    ),
    "gate of every pixel": Net(lambda n, x: pooled(n, gate_for_every_pixel(n, body(n, x))), **gate()),
    "a slope that is learnt": Net(lambda n, x: pooled(n, n.act(body(n, x))), act=nn.PReLU()),
    "pixels left out": Net(lambda n, x: pooled(n, body(n, x)[:, :, ::2, 1:])),
}
FOLLOWED["a scale for all"].norm = nn.Module()
FOLLOWED["a scale for all"].norm.scale = nn.Parameter(torch.tensor([1.5]))


@pytest.mark.parametrize("case", FOLLOWED)
def test_followed_exactly(case):
    network = check(FOLLOWED[case], shares=(0.4,))
    assert network.coverage.barriers == []
    assert set(network.layers) == {"conv1", "conv2", "side"} | ({"inner"} & set(dict(FOLLOWED[case].named_children())))
    if "inner" in network.layers:
        check_the_rest(network, IMAGE_SHAPE)


def test_a_gate_has_no_channels_of_its_own_and_costs_what_its_map_has():
    class Alone(Net):
        def forward(self, x: Tensor) -> Tensor:
            return pooled(self, self.conv2(gate_of_convs(self, self.conv1(x))))

    network = check(Alone(None, **gate()), shares=())
    assert network.coverage.gates == ["outer"]
    assert network.num_units == 4 + 2 + 4
    mask_U = network.stored_units.copy()
    mask_U[[0, 1, 8]] = False  # two channels of conv1, and one of the two of `inner` (in the order of the modules)
    plan = network.plan(mask_U)
    assert network.graph.layer_widths(plan.counts)["outer"] == 2
    assert network.graph.layer_macs(plan.counts)["outer"] == 2 * 1
    assert [len(group) for group in network.vital_groups] == [4, 4]  # its gate is no way past a map


def test_a_gate_of_another_map_is_no_way_past_the_map():
    class Elsewhere(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(x)
            return pooled(self, self.conv2(torch.sigmoid(self.outer(F.relu(self.inner(x)))) * y))

    network = check(Elsewhere(None, inner=nn.Conv2d(3, 2, 1), outer=nn.Conv2d(2, 4, 1)), shares=(0.5,))
    assert [set(group) for group in network.vital_groups] == [{0, 1, 2, 3}, {4, 5, 6, 7}]


def test_a_gate_that_is_read_elsewhere_is_an_operation_that_is_not_known():
    def run(net: Net, x: Tensor) -> Tensor:
        y = net.conv1(x)
        z = torch.sigmoid(net.conv2(y))
        return pooled(net, net.more(y * z)) + pooled(net, z)

    network = check(Net(run, more=nn.Conv2d(4, 4, 1)), shares=(0.5,))
    assert network.coverage.gates == []
    assert list(network.layers) == ["more", "side"]


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *rest: Tensor, scale: float = 2.0, **more: Tensor
    ) -> Tensor:
        x = self.conv(x) if mask is None else self.conv(x) * mask
        return self.linear(x.mean((2, 3)) * scale)


def test_other_arguments_of_the_forward_keep_their_defaults():
    assert check(Optional(), shares=(0.5,)).num_units == 4


class Needy(Optional):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask)


def test_a_forward_that_needs_more_than_images_is_refused():
    with pytest.raises(
        ValueError, match="Needy must take one batch of images; give its other arguments defaults: mask"
    ):
        SparseNetwork(sparsify(Needy()), IMAGE_SHAPE)


# --- noise ---------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop, self.linear = nn.Conv2d(3, 4, 3), nn.Dropout2d(0.5), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.drop(self.conv(x)), 0.3, self.training)
        return self.linear(x.mean((2, 3)))


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_noise_is_off_and_said_so(execution, capsys):
    model = sparsify(Noisy())
    network = SparseNetwork(model, IMAGE_SHAPE, execution=execution)
    printed = capsys.readouterr().out
    assert "noise that would enter the differences of losses is off: drop (Dropout2d), dropout in Noisy at " in printed
    assert "test_idioms.py:" in printed
    assert model.drop.p == 0
    images = torch.randn(4, *IMAGE_SHAPE)
    first, second = (network.model.train() and network(images, network.dense_plan) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(network(images, network.dense_plan), network.model.eval()(images))


def test_nothing_is_printed_where_there_is_nothing_to_tell(capsys):
    SparseNetwork(sparsify(Optional()), IMAGE_SHAPE)
    assert capsys.readouterr().out == ""
