"""First weights: of the spread that their name promises, the same for a seed, and none that scores change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models.nets import build, maskable
from tests.toy import config, one_thread, search_of  # noqa: F401
from utils.conv_type import SubnetBatchNorm, subnet_convs


def convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def test_scores_change_no_weight_and_start_where_asked():
    plain, model = build("resnet20", 0.125), maskable("resnet20", 0.125, score_init=0.3)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    other = build("resnet20", 0.125, seed=1)
    assert not torch.equal(other.conv1.weight, plain.conv1.weight)
    for conv in subnet_convs(model).values():
        assert torch.equal(conv.scores, torch.full((conv.out_channels,), 0.3))
        assert not conv.scores.requires_grad


@pytest.mark.parametrize(
    ("arch", "total"),
    [
        ("resnet20", 43.02944564819336),
        ("resnet32", 39.628204345703125),
        ("resnet20_he", 29.126972198486328),
        ("resnet32_he", 26.909988403320312),
        ("resnet56_he", 28.66941261291504),
        ("vgg16", 36.0106086730957),
        ("wrn28_10", 40.78984069824219),
    ],
)
def test_a_seed_gives_the_weights_that_it_always_gave(arch, total):
    """Of the last layer: it is the last to be drawn, or drawn with all convs' first weights before it."""
    linear = build(arch, 0.1, seed=7).linear
    assert linear.weight.abs().sum().item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("init", ["kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform"])
def test_initial_weights_have_the_spread_that_their_name_promises(init):
    """Of the widest conv: 512 x 512 x 9 numbers at full width, 256 x 256 x 9 here."""
    model = build("vgg16", 0.5, init=init, mode="fan_out", nonlinearity="relu")
    weight = list(convs(model).values())[-1].weight
    fan = 256 * 9
    variance = 2 / fan if init.startswith("kaiming") else 2 / (fan + fan)
    assert weight.var().item() == pytest.approx(variance, rel=0.02)
    assert abs(weight.mean().item()) < 1e-3
    if init.endswith("uniform"):
        assert weight.abs().max().item() <= (3 * variance) ** 0.5


@pytest.mark.parametrize(
    ("mode", "nonlinearity", "variance"),
    [
        ("fan_in", "relu", 2 / (3 * 9)),
        ("fan_out", "relu", 2 / (64 * 9)),
        ("fan_in", "linear", 1 / (3 * 9)),
        ("fan_in", "leaky_relu", 2 / (3 * 9)),
    ],
)
def test_mode_and_gain_of_the_kaiming_start(mode, nonlinearity, variance):
    """The first conv has 3 channels in and 64 out. leaky_relu has slope 0 here, so it is relu."""
    weight = next(iter(convs(build("vgg16", mode=mode, nonlinearity=nonlinearity)).values())).weight
    assert weight.var().item() == pytest.approx(variance, rel=0.1)


def test_an_orthogonal_start_is_orthogonal():
    weight = build("resnet20", 0.125, init="orthogonal").layer3[0].conv2.weight.flatten(1)
    torch.testing.assert_close(weight @ weight.T, torch.eye(16), rtol=0, atol=1e-5)


def test_batch_norms_start_at_one_and_zero():
    norms = [m for m in maskable("resnet20", 0.125).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 21
    for norm in norms:
        assert isinstance(norm, SubnetBatchNorm)
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
