"""The registry: what each name builds, what becomes maskable, and with which first weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from args import ARCHS, ModelConfig
from models import MODELS, build_model, maskable_convs
from tests.toy import one_thread  # noqa: F401
from utils.conv_type import VRPGE, SubnetBatchNorm, SubnetConv, subnet_convs
from utils.errors import UserError
from utils.network import SparseNetwork

SMALL = ModelConfig(arch="resnet20", width_mult=0.125)


def build(config: ModelConfig, seed: int = 0, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(config, 0.5, num_classes, in_channels)


def convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def test_the_options_name_exactly_what_the_registry_has():
    assert sorted(ARCHS) == sorted(MODELS)


@pytest.mark.parametrize("arch", sorted(MODELS))
@pytest.mark.parametrize(("num_classes", "in_channels"), [(10, 3), (100, 1)])
def test_every_name_builds_and_runs(arch, num_classes, in_channels):
    model = build(ModelConfig(arch=arch, width_mult=0.0625), 0, num_classes, in_channels)
    assert model(torch.randn(2, in_channels, 32, 32)).shape == (2, num_classes)
    network = SparseNetwork(model, (in_channels, 32, 32))
    logits = network(torch.randn(2, in_channels, 32, 32), network.dense_plan)
    assert logits.shape == (2, num_classes)


@pytest.mark.parametrize(
    ("arch", "maskable", "widths"),
    [
        ("resnet20", 1 + 18 + 2, (32, 64, 128)),
        ("resnet32", 1 + 30 + 2, (32, 64, 128)),
        ("resnet20_he", 1 + 18 + 2, (16, 32, 64)),
        ("resnet32_he", 1 + 30 + 2, (16, 32, 64)),
        ("resnet56_he", 1 + 54 + 2, (16, 32, 64)),
        ("vgg16", 13, (64, 128, 256, 512)),
    ],
)
def test_depths_and_widths(arch, maskable, widths):
    """Every conv but the classifier is maskable: stem and projection shortcuts included."""
    layers = subnet_convs(build(ModelConfig(arch=arch)))
    assert len(layers) == maskable
    assert sorted({conv.out_channels for conv in layers.values()}) == list(widths)
    assert next(iter(layers.values())).in_channels == 3
    per_width = [sum(c.out_channels == width for c in layers.values()) for width in widths]
    blocks = (maskable - 3) // 6
    assert per_width == ([2, 2, 3, 6] if arch == "vgg16" else [1 + 2 * blocks, 1 + 2 * blocks, 1 + 2 * blocks])


@pytest.mark.parametrize("arch", ["resnet20_he", "vgg16"])
def test_width_mult_scales_every_channel(arch):
    whole, half = (build(ModelConfig(arch=arch, width_mult=factor)) for factor in (1.0, 0.5))
    for name, conv in subnet_convs(half).items():
        assert 2 * conv.out_channels == subnet_convs(whole)[name].out_channels
    assert min(c.out_channels for c in subnet_convs(build(ModelConfig(arch=arch, width_mult=0.01))).values()) == 1


@pytest.mark.parametrize("arch", ["resnet20", "vgg16"])
def test_first_and_last_layer_dense(arch):
    config = ModelConfig(arch=arch, width_mult=0.125)
    names = list(subnet_convs(build(config)))
    assert names[0] == ("conv1" if arch == "resnet20" else "features.0")
    last = {"resnet20": "layer3.2.conv2", "vgg16": names[-1]}[arch]
    assert names[-1] == last
    assert list(subnet_convs(build(replace(config, first_layer_dense=True)))) == names[1:]
    assert list(subnet_convs(build(replace(config, last_layer_dense=True)))) == names[:-1]
    both = build(replace(config, first_layer_dense=True, last_layer_dense=True))
    assert list(subnet_convs(both)) == names[1:-1]
    assert type(both.get_submodule(names[0])) is nn.Conv2d
    assert SparseNetwork(both, (3, 32, 32)).num_units == sum(c.out_channels for c in subnet_convs(both).values())


def test_the_order_of_modules_is_the_order_of_the_pass():
    """`first_layer_dense` and `last_layer_dense` count on it."""
    for arch in ("resnet20", "vgg16"):
        model = build(ModelConfig(arch=arch, width_mult=0.0625))
        seen: list[str] = []
        for name, conv in convs(model).items():
            conv.register_forward_hook(lambda *_, seen=seen, name=name: seen.append(name))
        model(torch.randn(2, 3, 32, 32))
        maskable = maskable_convs(model, first_layer_dense=False, last_layer_dense=False)
        assert seen[0] == maskable[0]
        assert [name for name in seen if "shortcut" not in name and name != "linear"] == [
            name for name in maskable if "shortcut" not in name
        ]


def test_a_layer_with_as_many_outputs_as_classes_is_no_classifier():
    """Nothing is guessed from shapes: a width of 10 stays maskable."""
    model = build(replace(SMALL, width_mult=10 / 32), num_classes=10)
    assert {conv.out_channels for conv in subnet_convs(model).values()} >= {10}
    assert "conv1" in subnet_convs(model)
    assert "linear" not in subnet_convs(model)


@pytest.mark.parametrize("arch", ["resnet20", "vgg16"])
def test_dense_conv_knows_no_masks(arch):
    model = build(ModelConfig(arch=arch, width_mult=0.125, conv_type="DenseConv"))
    assert not any(isinstance(m, SubnetConv | VRPGE | SubnetBatchNorm) for m in model.modules())
    assert not any(hasattr(m, "mask") or hasattr(m, "live") for m in model.modules())
    assert not any("scores" in name for name in model.state_dict())
    network = SparseNetwork(model, (3, 32, 32))
    assert network.num_units == 0
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network(images, network.dense_plan), model(images))


@pytest.mark.parametrize("arch", ["resnet20", "vgg16"])
def test_dense_and_masked_start_from_the_same_weights(arch):
    config = ModelConfig(arch=arch, width_mult=0.125)
    masked, dense = build(config), build(replace(config, conv_type="DenseConv"))
    states = [
        {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("scores")}
        for model in (masked, dense)
    ]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    again, other = build(config), build(config, seed=1)
    first = next(iter(subnet_convs(masked)))
    assert torch.equal(again.get_submodule(first).weight, masked.get_submodule(first).weight)
    assert not torch.equal(other.get_submodule(first).weight, masked.get_submodule(first).weight)


def test_scores_start_where_asked():
    torch.manual_seed(0)
    model = build_model(SMALL, 0.3, 10, 3)
    for conv in subnet_convs(model).values():
        assert conv.scores.shape == (conv.out_channels,)
        assert torch.equal(conv.scores, torch.full_like(conv.scores, 0.3))
        assert not conv.scores.requires_grad


@pytest.mark.parametrize("init", ["kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform"])
def test_initial_weights_have_the_spread_that_their_name_promises(init):
    """Of the widest conv: 512 x 512 x 9 numbers at full width, 256 x 256 x 9 here."""
    config = ModelConfig(arch="vgg16", width_mult=0.5, init=init, mode="fan_out", nonlinearity="relu")
    weight = list(subnet_convs(build(config)).values())[-1].weight
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
    config = ModelConfig(arch="vgg16", mode=mode, nonlinearity=nonlinearity)
    weight = next(iter(subnet_convs(build(config)).values())).weight
    assert weight.var().item() == pytest.approx(variance, rel=0.1)


def test_an_orthogonal_start_is_orthogonal():
    weight = build(replace(SMALL, init="orthogonal")).layer3[0].conv2.weight.flatten(1)
    torch.testing.assert_close(weight @ weight.T, torch.eye(16), rtol=0, atol=1e-5)


def test_batch_norms_start_at_one_and_zero():
    norms = [m for m in build(SMALL).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 21
    for norm in norms:
        assert isinstance(norm, SubnetBatchNorm)
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()


@pytest.mark.parametrize(
    ("arch", "message"),
    [("resnet3", "did you mean 'resnet32'"), ("ResNet32", "unknown arch 'ResNet32'"), ("lenet", "the networks are")],
)
def test_an_unknown_name_is_refused_with_the_nearest(arch, message):
    with pytest.raises(UserError, match=message) as caught:
        build(ModelConfig(arch=arch))
    for name in MODELS:
        assert name in str(caught.value)
