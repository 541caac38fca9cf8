"""Results that were once wrong in silence: what a layer computes, the place of the scores, calibration, layer guard."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet_cifar import BasicBlock
from tests.toy import batch, one_thread, randomise  # noqa: F401
from utils.channels.network import SparseNetwork
from utils.channels.subnet import estimate_statistics
from utils.conv_type import PlainConv, conv2d, sparsify

SHAPE = (3, 8, 8)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
    )


# ---- a layer that runs several times, on channels of its own each time ----


class Shared(nn.Module):
    """One layer behind two convolutions. `forward` takes the masks as factors, so it is the truth as well."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.shared = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), shared
        self.linear = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.masked(x)

    def masked(self, x: Tensor, of_a: Tensor | None = None, of_b: Tensor | None = None) -> Tensor:
        def times(y: Tensor, mask: Tensor | None) -> Tensor:
            return y if mask is None else y * mask

        x = times(self.shared(times(self.a(x), of_a)), of_a)
        x = times(self.shared(times(self.b(x), of_b)), of_b)
        return self.linear(x.mean((2, 3)))


SHARED = {"norm": lambda: nn.BatchNorm2d(8), "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8)}


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_a_layer_behind_two_convolutions_has_the_mask_of_each(kind, execution):
    net = randomise(Shared(SHARED[kind]()), seed=1).double()
    network = SparseNetwork(sparsify(copy.deepcopy(net)), SHAPE, execution=execution)
    mask_U = np.random.default_rng(0).random(16) < 0.5
    of_a, of_b = (torch.from_numpy(mask_U[first : first + 8]).view(-1, 1, 1) for first in (0, 8))
    images, _ = batch(4)
    for each in (net, network.model):
        each.eval()
    torch.testing.assert_close(network(images, network.plan(mask_U)), net.masked(images, of_a, of_b))


# ---- the number of channels ----


def test_images_of_another_number_of_channels_make_no_groups():
    conv = PlainConv(1, 6, 5)
    with pytest.raises(RuntimeError, match="to have 1 channels, but got 3"):
        conv2d(conv, torch.zeros(2, 3, 8, 8), conv.weight, conv.bias)
    grey = nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    with pytest.raises(ValueError, match="channel"):
        SparseNetwork(sparsify(grey), SHAPE)
    for execution in ("compact", "masked"):
        network = SparseNetwork(sparsify(small()), SHAPE, execution=execution)
        with pytest.raises((ValueError, RuntimeError), match="channels"):
            network(torch.zeros(2, 6, 8, 8), network.dense_plan)


# ---- one place for scores ----


CHANGES: dict[str, Callable[[SparseNetwork], SparseNetwork | None]] = {
    "double": lambda network: network.model.double() and None,
    "bfloat16": lambda network: network.model.to(torch.bfloat16) and None,
    "deepcopy": copy.deepcopy,
    "pickle": lambda network: pickle.loads(pickle.dumps(network)),
    "load": lambda network: network.model.load_state_dict(copy.deepcopy(network.model.state_dict())) and None,
    "load and assign": lambda network: (
        network.model.load_state_dict(copy.deepcopy(network.model.state_dict()), assign=True) and None
    ),
    "all parameters learn": lambda network: network.model.requires_grad_() and None,
    "a second network": lambda network: SparseNetwork(network.model, SHAPE, execution="masked") and None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_done_to_the_model_its_scores_have_one_place(change):
    network = SparseNetwork(sparsify(small()), SHAPE)
    held = network.scores
    with torch.no_grad():
        held.copy_(torch.arange(12) / 16)
    network = CHANGES[change](network) or network
    assert network.scores.tolist() == [i / 16 for i in range(12)]
    if change not in ("deepcopy", "pickle"):  # an optimizer that holds the parameter goes on with it
        assert network.scores is held
    with torch.no_grad():
        network.scores[9:] = 0.125
        network.layers["0"].scores.fill_(0.25)
    assert network.scores.tolist() == [0.25] * 8 + [0.5] + [0.125] * 3
    stored = network.model.state_dict()
    assert stored["0.scores"].tolist() == [0.25] * 8
    assert stored["3.scores"].tolist() == [0.5] + [0.125] * 3
    assert not any(parameter is network.scores for parameter in network.weight_parameters())
    assert len(network.weight_parameters()) == 10


def test_a_state_dict_has_the_scores_of_each_layer_and_refuses_others_by_name():
    network = SparseNetwork(sparsify(small()), SHAPE)
    stored = network.model.state_dict()
    assert [name for name in stored if "scores" in name] == ["0.scores", "3.scores"]
    with torch.no_grad():
        stored = {name: value.clone() + 0.25 * name.endswith("scores") for name, value in stored.items()}
    before_any_network = sparsify(small())
    before_any_network.load_state_dict(stored)
    assert SparseNetwork(before_any_network, SHAPE).scores.tolist() == [0.75] * 12
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "3.scores"'):
        network.model.load_state_dict({name: value for name, value in stored.items() if name != "3.scores"})
    with pytest.raises(RuntimeError, match=r"size mismatch for 3.scores"):
        network.model.load_state_dict({**stored, "3.scores": torch.zeros(5)})
    assert network.layers["3"].scores.tolist() == [0.5] * 4
    with pytest.raises((KeyError, AttributeError)):
        network.layers["3"].scores = nn.Parameter(torch.zeros(4))


@pytest.mark.parametrize("change", ["deepcopy", "pickle"])
def test_a_copied_network_trains_on_its_own(change):
    network = SparseNetwork(sparsify(small()).double(), SHAPE)
    other = CHANGES[change](network)
    images, labels = batch(4)
    mask_U = np.random.default_rng(0).random(12) < 0.5
    for each in (network, other):
        F.cross_entropy(each(images, each.plan(mask_U)), labels).backward()
    for mine, theirs in zip(network.weight_parameters(), other.weight_parameters(), strict=True):
        assert mine is not theirs
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)


# ---- calibration ----


@pytest.mark.parametrize("sizes", [(8, 8, 1), (8, 3), (1, 1, 1), (5,)])
def test_every_image_counts_alike_in_the_statistics_of_a_subnet(sizes):
    network = SparseNetwork(sparsify(small().double()), SHAPE)
    images = torch.randn(sum(sizes), *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images[-1] += 10
    parts = [(part, torch.zeros(len(part))) for part in images.split(sizes)]
    subnet = estimate_statistics(network, np.ones(12, dtype=bool), parts)
    expected_C = network.model[0](images).mean((0, 2, 3))
    torch.testing.assert_close(subnet.statistics["1"][0], expected_C)


def test_a_rest_of_one_image_has_a_variance_even_behind_maps_of_one_pixel():
    model = nn.Sequential(nn.Conv2d(3, 8, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))
    network, images = SparseNetwork(sparsify(model), SHAPE), torch.randn(17, *SHAPE)
    parts = [(part, torch.zeros(len(part))) for part in images.split(8)]
    mean_C, var_C = estimate_statistics(network, np.ones(8, dtype=bool), parts).statistics["1"]
    found_NC = network.model[0](images).detach().flatten(1)
    torch.testing.assert_close(mean_C, found_NC.mean(0), rtol=1e-5, atol=1e-6)
    expected_C = (8 * found_NC[:8].var(0) + 9 * found_NC[8:].var(0)) / 17
    torch.testing.assert_close(var_C, expected_C, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="there is no batch"):
        estimate_statistics(network, np.ones(8, dtype=bool), [])


# ---- the layer guard ----


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_whatever_is_drawn_the_logits_depend_on_the_image(execution):
    """Also where the first convolution of a block and its shortcut are empty, and the last convolution is not."""
    net = randomise(BasicBlock(3, 4, 2), seed=1)
    model = sparsify(nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)).double().eval())
    network = SparseNetwork(model, SHAPE, execution=execution)
    images, _ = batch(4)
    firsts = {name: network.graph.first_unit[name] for name in network.layers}
    for kept in product((False, True), repeat=len(firsts)):
        mask_U = np.zeros(network.num_units, dtype=bool)
        for first, keep in zip(firsts.values(), kept, strict=True):
            mask_U[first : first + 4] = keep
        assert network(images, network.plan(mask_U)).std(0).min() > 1e-6
