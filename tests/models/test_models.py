"""The registry: what each name builds, what becomes maskable, and with which first weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models

from args import ARCHS, ModelConfig
from models import LARGE_IMAGE, MODELS, build_model, maskable_convs
from tests.toy import config as run_config
from tests.toy import one_thread  # noqa: F401
from trainers.default import Draw, SearchState, StepSettings, train_step
from utils.channels.graph import ChannelGraph
from utils.channels.network import SparseNetwork
from utils.conv_type import VRPGE, SubnetBatchNorm, SubnetConv, subnet_convs
from utils.errors import UserError

SMALL = ModelConfig(arch="resnet20", width_mult=0.125)
LARGE_FORMS = ("vgg", "mobilenet", "resnet18", "resnet34", "resnet50", "resnet101")  # how their names start
HAVE_LARGE_FORM = [arch for arch in MODELS if arch.startswith(LARGE_FORMS)]
BY_FORM = [(arch, 32) for arch in MODELS] + [(arch, LARGE_IMAGE) for arch in HAVE_LARGE_FORM]
IN_TORCHVISION = {f"vgg{depth}": f"vgg{depth}_bn" for depth in (11, 13, 16, 19)} | {
    arch: arch for arch in ("resnet18", "resnet34", "resnet50", "resnet101")
}


def build(
    config: ModelConfig, seed: int = 0, num_classes: int = 10, in_channels: int = 3, image_size: int = 32
) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(config, 0.5, num_classes, in_channels, image_size)


def shapes_only(arch: str, num_classes: int, image_size: int) -> nn.Module:
    """The dense network at full width, without memory for its weights."""
    with torch.device("meta"):
        return build_model(ModelConfig(arch=arch, conv_type="DenseConv"), 0.5, num_classes, 3, image_size)


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def size_of(arch: str, num_classes: int, image_size: int) -> tuple[int, int]:
    """Parameters and multiply-adds of the dense network."""
    model = shapes_only(arch, num_classes, image_size)
    graph = ChannelGraph(model, (3, image_size, image_size))
    widths = [space.width for space in graph.spaces]
    num_parameters = sum(graph.layer_parameters(widths).values())
    assert num_parameters == sum(parameter.numel() for parameter in model.parameters())
    return num_parameters, sum(graph.layer_macs(widths).values())


def convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def test_the_options_name_exactly_what_the_registry_has():
    assert list(ARCHS) == list(MODELS)


@pytest.mark.parametrize(("arch", "image_size"), BY_FORM)
def test_every_name_builds_and_runs_for_any_classes_and_channels(arch, image_size):
    model = build(ModelConfig(arch=arch, width_mult=0.0625), 0, 17, 1, image_size)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 17)
    assert model.get_submodule(model.head) is [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)][-1]


@pytest.mark.parametrize("arch", MODELS)
def test_the_form_follows_the_image_size(arch):
    def form(image_size: int) -> str:
        return str(shapes_only(arch, 10, image_size))

    assert (form(LARGE_IMAGE - 1) != form(LARGE_IMAGE)) == (arch in HAVE_LARGE_FORM)


@pytest.mark.parametrize(
    ("arch", "small", "large"),
    [
        ("resnet18", 8, 32),
        ("resnet50", 8, 32),
        ("mobilenet_v1", 8, 32),
        ("vgg11", 16, 16),
        ("resnet20", 4, 4),
        ("wrn16_8", 4, 4),
    ],
)
def test_how_many_times_smaller_than_the_image_the_last_map_is(arch, small, large):
    for image_size, factor in ((32, small), (LARGE_IMAGE, large)):
        model = shapes_only(arch, 10, image_size)
        convs = [
            op for op in ChannelGraph(model, (3, 64, 64)).ops if op.kind == "conv" and op.node.target != model.head
        ]
        assert convs[-1].shape[1:] == (64 // factor, 64 // factor)


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)  # fmt: skip
def test_the_he_family_against_the_paper(depth, millions):
    """He et al. (2016), table 6.

    Their shortcuts cost nothing, ours project: 16 x 32 and 32 x 64 weights and two batch-norms. Their classifier has a
    shift, ours has none.
    """
    num_parameters, _ = size_of(f"resnet{depth}_he", 10, 32)
    theirs = num_parameters - (16 * 32 + 32 * 64) - 2 * (32 + 64) + 10
    assert round(theirs / 1e6, len(str(millions)) - 2) == millions


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_the_released_family_is_the_he_family_at_twice_the_width(depth):
    twice = build_model(ModelConfig(arch=f"resnet{depth}_he", width_mult=2, conv_type="DenseConv"), 0.5, 10, 3, 32)
    assert shapes_of(twice) == shapes_of(shapes_only(f"resnet{depth}", 10, 32))


@pytest.mark.parametrize(
    ("arch", "num_classes", "image_size", "millions", "mult_adds"),
    [
        ("wrn28_10", 10, 32, 36.5, None),  # Zagoruyko and Komodakis (2016)
        ("wrn16_8", 10, 32, 11.0, None),
        ("mobilenet_v1", 1000, 224, 4.2, 569),  # Howard et al. (2017)
        ("resnet18", 10, 32, 11.17, 560),  # MMClassification's model zoo: ResNet on CIFAR-10
        ("resnet34", 10, 32, 21.28, 1160),
        ("resnet50", 10, 32, 23.52, 1310),
        ("resnet101", 10, 32, 42.51, 2520),
    ],
)
def test_sizes_against_published_ones(arch, num_classes, image_size, millions, mult_adds):
    """In millions. MMClassification counts batch-norms too, so its multiply-adds are up to 1 % more."""
    num_parameters, macs = size_of(arch, num_classes, image_size)
    assert round(num_parameters / 1e6, len(str(millions).partition(".")[2])) == millions
    assert mult_adds is None or macs / 1e6 == pytest.approx(mult_adds, rel=0.01)


@pytest.mark.parametrize("arch", IN_TORCHVISION)
def test_sizes_for_imagenet_against_torchvision(arch):
    """What torchvision documents with its weights."""
    documented = torchvision_models.get_model_weights(IN_TORCHVISION[arch]).DEFAULT.meta
    num_parameters, macs = size_of(arch, 1000, 224)
    assert num_parameters == documented["num_params"]
    assert round(macs / 1e9, 3) == documented["_ops"]


def randomise(model: nn.Module) -> None:
    """Weights of a sensible size, and batch-norms that are not trivial."""
    for tensor in model.state_dict().values():
        if tensor.dim() > 1:
            bound = (6 / tensor[0].numel()) ** 0.5
            tensor.uniform_(-bound, bound)
        elif tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)


def narrow_hidden_layers(vgg: nn.Module) -> None:
    """From 4096 to 16: their order shows in the outputs all the same, and 1 GB is saved."""
    for index, shape in ((0, (512 * 7 * 7, 16)), (3, (16, 16)), (6, (16, 7))):
        vgg.classifier[index] = nn.Linear(*shape, device="meta")


@pytest.mark.parametrize("arch", IN_TORCHVISION)
def test_the_large_form_is_torchvisions_network(arch):
    """The same state dict both ways, and the same outputs."""
    ours = shapes_only(arch, 7, LARGE_IMAGE)
    with torch.device("meta"):
        fresh, theirs = (torchvision_models.get_model(IN_TORCHVISION[arch], num_classes=7) for _ in range(2))
    assert list(shapes_of(ours).items()) == list(shapes_of(theirs).items())
    if arch.startswith("vgg"):
        for model in (ours, theirs, fresh):
            narrow_hidden_layers(model)
    theirs = theirs.double().to_empty(device="cpu")
    torch.manual_seed(0)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.eval()(images)
        torch.testing.assert_close(ours.eval()(images), expected, rtol=1e-9, atol=1e-9)
    assert expected.std() > 0.01
    fresh.load_state_dict(ours.state_dict(), assign=True)


def one_step(network: SparseNetwork, masks: list[np.ndarray]) -> dict[str, Tensor]:
    """State after one training step on given masks."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn((4, *network.graph.ops[0].shape), generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (4,), generator=generator)
    state = SearchState(
        network,
        torch.optim.SGD(network.weight_parameters(), lr=0.1, momentum=0.9, weight_decay=5e-2),
        torch.optim.Adam([network.scores], lr=0.05),
        torch.Generator().manual_seed(0),
        Draw(torch.from_numpy(np.stack(masks)), [network.plan(mask) for mask in masks]),
    )
    network.model.train()
    train_step(state, images, labels, StepSettings(weight_lr=0.1, score_lr=0.05, kept_fraction=0.5), run_config())
    return {**network.model.state_dict(), "next draw": state.draw.masks_KU}


@pytest.mark.parametrize(("arch", "image_size"), [form for form in BY_FORM if not form[0].endswith("_he")])
def test_a_training_step_computes_the_same_compact_and_masked(arch, image_size):
    """The `_he` family is left out: the released one is the same at other widths, see above."""
    states = []
    for execution in ("compact", "masked"):
        model = build(ModelConfig(arch=arch, width_mult=0.1), image_size=image_size).double()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not name.endswith("scores"):  # shifts that would leak from dropped channels
                nn.init.uniform_(parameter, 0.2, 1.0)
        pixels = 32 if image_size == 32 else 64  # what the large forms need at least
        network = SparseNetwork(model, (3, pixels, pixels), execution, multiple=4 if execution == "compact" else None)
        random = np.random.default_rng(2)
        states.append(one_step(network, [random.random(network.num_units) < 0.5 for _ in range(2)]))
    torch.testing.assert_close(*states, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("arch", "maskable", "widths"),
    [
        ("resnet20", 1 + 18 + 2, (32, 64, 128)),
        ("resnet32", 1 + 30 + 2, (32, 64, 128)),
        ("resnet8_he", 1 + 6 + 2, (16, 32, 64)),
        ("resnet20_he", 1 + 18 + 2, (16, 32, 64)),
        ("resnet32_he", 1 + 30 + 2, (16, 32, 64)),
        ("resnet56_he", 1 + 54 + 2, (16, 32, 64)),
        ("resnet110", 1 + 108 + 2, (32, 64, 128)),
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
    assert not isinstance(both.get_submodule(names[0]), SubnetConv)
    assert SparseNetwork(both, (3, 32, 32)).num_units == sum(c.out_channels for c in subnet_convs(both).values())


@pytest.mark.parametrize("arch", ["resnet20", "vgg11", "wrn16_8", "mobilenet_v1", "resnet18", "resnet50"])
def test_the_order_of_modules_is_the_order_of_the_pass(arch):
    """`first_layer_dense` and `last_layer_dense` count on it."""
    for image_size in (32, LARGE_IMAGE):
        model = build(ModelConfig(arch=arch, width_mult=0.0625), image_size=image_size)
        passed = [op.node.target for op in ChannelGraph(model, (3, 64, 64)).ops if isinstance(op.module, VRPGE)]
        maskable = maskable_convs(model, first_layer_dense=False, last_layer_dense=False)
        assert (passed[0], passed[-1]) == (maskable[0], maskable[-1])
        main_path, registered = (
            [name for name in names if "shortcut" not in name and "downsample" not in name]
            for names in (passed, maskable)
        )
        assert main_path == registered


@pytest.mark.parametrize("width_mult", [0.01, 0.25, 1])
def test_depthwise_convs_have_no_units(width_mult):
    """The stem and the 13 convs that mix channels have, even where a layer is as narrow as it can be."""
    model = build(ModelConfig(arch="mobilenet_v1", width_mult=width_mult))
    assert list(subnet_convs(model)) == ["conv1", *(f"blocks.{i}.pointwise" for i in range(13))]
    network = SparseNetwork(model, (3, 32, 32))
    depthwise = [op for op in network.graph.ops if op.kind == "depthwise"]
    assert len(depthwise) == 13
    for op in depthwise:
        assert op.space == network.graph.ops[op.inputs[0]].space


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
    model = build_model(SMALL, 0.3, 10, 3, 32)
    for conv in subnet_convs(model).values():
        assert conv.scores.shape == (conv.out_channels,)
        assert torch.equal(conv.scores, torch.full_like(conv.scores, 0.3))
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
    linear = build(ModelConfig(arch=arch, width_mult=0.1), seed=7).linear
    assert linear.weight.abs().sum().item() == pytest.approx(total, rel=1e-5)


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
    [("resnet3", "did you mean 'resnet34'"), ("ResNet32", "unknown arch 'ResNet32'"), ("lenet", "the networks are")],
)
def test_an_unknown_name_is_refused_with_the_nearest(arch, message):
    with pytest.raises(UserError, match=message) as caught:
        build(ModelConfig(arch=arch))
    for name in MODELS:
        assert name in str(caught.value)
