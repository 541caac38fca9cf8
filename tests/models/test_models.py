"""The registry: what each name builds, which layers become maskable, and that it computes what it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models

from args import ARCHS
from models import LARGE_IMAGE, MODELS, build_model
from tests.models.nets import build, maskable
from tests.toy import config, one_thread, search_of  # noqa: F401
from trainers.default import StepSettings, train_step
from utils.channels.graph import ChannelGraph
from utils.channels.network import SparseNetwork
from utils.conv_type import VRPGE, SubnetBatchNorm, SubnetConv, subnet_convs
from utils.errors import UserError

LARGE_FORMS = ("vgg", "mobilenet", "resnet18", "resnet34", "resnet50", "resnet101")  # how their names start
HAVE_LARGE_FORM = [arch for arch in MODELS if arch.startswith(LARGE_FORMS)]
BY_FORM = [(arch, 32) for arch in MODELS] + [(arch, LARGE_IMAGE) for arch in HAVE_LARGE_FORM]
# More of the same blocks as in a shallower network of the registry.
DEEPER = (
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "resnet34",
    "resnet101",
    "vgg13",
    "vgg16",
    "vgg19",
    "wrn28_10",
)
IN_TORCHVISION = {f"vgg{depth}": f"vgg{depth}_bn" for depth in (11, 13, 16, 19)} | {
    arch: arch for arch in ("resnet18", "resnet34", "resnet50", "resnet101")
}


def shapes_only(arch: str, num_classes: int, image_size: int) -> nn.Module:
    """The dense network at full width, without memory for its weights."""
    with torch.device("meta"):
        return build_model(arch, num_classes, 3, image_size)


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


def test_the_options_name_exactly_what_the_registry_has():
    assert list(ARCHS) == list(MODELS)


@pytest.mark.parametrize(("arch", "image_size"), BY_FORM)
def test_every_name_builds_and_runs_for_any_classes_and_channels(arch, image_size):
    model = build_model(arch, 17, 1, image_size, 0.0625)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 17)
    assert (
        model.get_submodule(model.head_name) is [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)][-1]
    )


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
            op for op in ChannelGraph(model, (3, 64, 64)).ops if op.kind == "conv" and op.node.target != model.head_name
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
    num_parameters = sum(parameter.numel() for parameter in shapes_only(f"resnet{depth}_he", 10, 32).parameters())
    theirs = num_parameters - (16 * 32 + 32 * 64) - 2 * (32 + 64) + 10
    assert round(theirs / 1e6, len(str(millions)) - 2) == millions


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_the_released_family_is_the_he_family_at_twice_the_width(depth):
    twice = build_model(f"resnet{depth}_he", 10, 3, 32, width_mult=2)
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


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=[pytest.mark.slow] * (arch in DEEPER)) for arch in IN_TORCHVISION]
)
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
    optimizer = torch.optim.SGD(network.weight_parameters(), lr=9.0, momentum=0.9, weight_decay=5e-2)
    search = search_of(network, config(), masks_KU=torch.from_numpy(np.stack(masks)), weight_optimizer=optimizer)
    network.model.train()
    train_step(search, images, labels, StepSettings(weight_lr=0.1, score_lr=0.05, keep_ratio=0.5), config())
    return {**network.model.state_dict(), "next masks": search.masks.own_KU}


@pytest.mark.parametrize(
    ("arch", "image_size"),
    [
        pytest.param(*form, marks=[pytest.mark.slow] * (form[0] in DEEPER))
        for form in BY_FORM
        if not form[0].endswith("_he")
    ],
)
def test_a_training_step_computes_the_same_compact_and_masked(arch, image_size):
    """The `_he` family is left out: the released one is the same at other widths, see above."""
    states = []
    for execution in ("compact", "masked"):
        model = maskable(arch, 0.1, image_size=image_size).double()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not name.endswith("scores"):  # shifts that would leak from dropped channels
                nn.init.uniform_(parameter, 0.2, 1.0)
        pixels = 32 if image_size == 32 else 64  # what the large forms need at least
        multiple = 4 if execution == "compact" else None
        network = SparseNetwork(model, (3, pixels, pixels), execution=execution, multiple=multiple, self_check=False)
        random = np.random.default_rng(2)
        states.append(one_step(network, [random.random(network.num_units) < 0.5 for _ in range(2)]))
    torch.testing.assert_close(*states, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("arch", "num_layers", "widths"),
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
def test_depths_and_widths(arch, num_layers, widths):
    """Every conv but the classifier is maskable: stem and projection shortcuts included."""
    layers = subnet_convs(maskable(arch))
    assert len(layers) == num_layers
    assert sorted({conv.out_channels for conv in layers.values()}) == list(widths)
    assert next(iter(layers.values())).in_channels == 3
    per_width = [sum(c.out_channels == width for c in layers.values()) for width in widths]
    blocks = (num_layers - 3) // 6
    assert per_width == ([2, 2, 3, 6] if arch == "vgg16" else [1 + 2 * blocks, 1 + 2 * blocks, 1 + 2 * blocks])


@pytest.mark.parametrize("arch", ["resnet20_he", "vgg16"])
def test_width_mult_scales_every_channel(arch):
    whole, half = (maskable(arch, factor) for factor in (1.0, 0.5))
    for name, conv in subnet_convs(half).items():
        assert 2 * conv.out_channels == subnet_convs(whole)[name].out_channels
    assert min(c.out_channels for c in subnet_convs(maskable(arch, 0.01)).values()) == 1


@pytest.mark.parametrize("arch", ["resnet20", "vgg16"])
def test_first_and_last_layer_dense(arch):
    names = list(subnet_convs(maskable(arch, 0.125)))
    assert names[0] == ("conv1" if arch == "resnet20" else "features.0")
    last = {"resnet20": "layer3.2.conv2", "vgg16": names[-1]}[arch]
    assert names[-1] == last
    assert list(subnet_convs(maskable(arch, 0.125, first_dense=True))) == names[1:]
    assert list(subnet_convs(maskable(arch, 0.125, last_dense=True))) == names[:-1]
    both = maskable(arch, 0.125, first_dense=True, last_dense=True)
    assert list(subnet_convs(both)) == names[1:-1]
    assert not isinstance(both.get_submodule(names[0]), SubnetConv)
    assert SparseNetwork(both, (3, 32, 32), self_check=False).num_units == sum(
        c.out_channels for c in subnet_convs(both).values()
    )


@pytest.mark.parametrize("arch", ["resnet20", "vgg11", "wrn16_8", "mobilenet_v1", "resnet18", "resnet50"])
def test_the_order_of_modules_is_the_order_of_the_pass(arch):
    """`first_layer_dense` and `last_layer_dense` count on it."""
    for image_size in (32, LARGE_IMAGE):
        model = maskable(arch, 0.0625, image_size=image_size)
        passed = [op.node.target for op in ChannelGraph(model, (3, 64, 64)).ops if isinstance(op.module, VRPGE)]
        layers = list(subnet_convs(model))
        assert (passed[0], passed[-1]) == (layers[0], layers[-1])
        main_path, registered = (
            [name for name in names if "shortcut" not in name and "downsample" not in name]
            for names in (passed, layers)
        )
        assert main_path == registered


@pytest.mark.parametrize("width_mult", [0.01, 0.25, 1])
def test_depthwise_convs_have_no_units(width_mult):
    """The stem and the 13 convs that mix channels have, even where a layer is as narrow as it can be."""
    model = maskable("mobilenet_v1", width_mult)
    assert list(subnet_convs(model)) == ["conv1", *(f"blocks.{i}.pointwise" for i in range(13))]
    network = SparseNetwork(model, (3, 32, 32), self_check=False)
    depthwise = [op for op in network.graph.ops if op.kind == "depthwise"]
    assert len(depthwise) == 13
    for op in depthwise:
        assert op.space == network.graph.ops[op.inputs[0]].space


def test_a_layer_with_as_many_outputs_as_classes_is_no_classifier():
    """Nothing is guessed from shapes: a width of 10 stays maskable."""
    model = maskable("resnet20", 10 / 32)
    assert {conv.out_channels for conv in subnet_convs(model).values()} >= {10}
    assert "conv1" in subnet_convs(model)
    assert "linear" not in subnet_convs(model)


@pytest.mark.parametrize("arch", ["resnet20", "vgg16"])
def test_a_network_without_scores_is_plain_and_runs_as_it_is(arch):
    model = build(arch, 0.125)
    assert not any(isinstance(m, SubnetConv | VRPGE | SubnetBatchNorm) for m in model.modules())
    assert not any("scores" in name for name in model.state_dict())
    network = SparseNetwork(model, (3, 32, 32), self_check=False)
    assert network.num_units == 0
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network(images, network.dense_plan), model(images))


@pytest.mark.parametrize(
    ("arch", "message"),
    [("resnet3", "did you mean 'resnet34'"), ("ResNet32", "unknown arch 'ResNet32'"), ("lenet", "the networks are")],
)
def test_an_unknown_name_is_refused_with_the_nearest(arch, message):
    with pytest.raises(UserError, match=message) as caught:
        build(arch)
    for name in MODELS:
        assert name in str(caught.value)
