"""Networks by name, in plain PyTorch, and which of their layers become maskable.

Every network names the layer that makes its logits in an attribute `head_name`. The others are registered in the order
of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from torch import nn

from models.mobilenet import BLOCKS, STEM_WIDTH, MobileNetV1
from models.own import allow, build_own, check_found
from models.pretrained import SubnetOfRun, find_choice, find_subnet, load_pretrained, take_over
from models.resnet_cifar import ResNetCifar
from models.resnet_imagenet import BasicBlock, Bottleneck, ResNet
from models.vgg import HIDDEN_WIDTH, POOL, VGG, VGGImageNet, vgg_plan
from models.wrn import WideResNet
from utils.choices import is_own
from utils.errors import UserError

__all__ = [
    "MODELS",
    "SubnetOfRun",
    "allow",
    "build_model",
    "check_found",
    "find_choice",
    "find_subnet",
    "initialise",
    "load_pretrained",
    "maskable_convs",
    "take_over",
]

# Images of at least this many pixels a side get the form that a network has for ImageNet, smaller ones the form for
# CIFAR, which halves them less often. 128: 32 times smaller, as at the end of the ImageNet forms, a map is still 4x4.
LARGE_IMAGE = 128

# (width_mult, num_classes, in_channels, large_images) -> network; those made for small images ignore the last.
Builder = Callable[[float, int, int, bool], nn.Module]


def _scaled(width: int, width_mult: float, least: int = 1) -> int:
    return max(least, round(width * width_mult))


def _resnet_cifar(
    width_mult: float, num_classes: int, in_channels: int, _: bool, *, depth: int, widths: tuple[int, ...]
) -> nn.Module:
    blocks_per_stage = (depth - 2) // 6
    return ResNetCifar(blocks_per_stage, tuple(_scaled(w, width_mult) for w in widths), num_classes, in_channels)


def _wide_resnet(
    width_mult: float, num_classes: int, in_channels: int, _: bool, *, depth: int, widen: int
) -> nn.Module:
    widths = (16, 16 * widen, 32 * widen, 64 * widen)
    blocks_per_stage = (depth - 4) // 6
    return WideResNet(blocks_per_stage, tuple(_scaled(w, width_mult) for w in widths), num_classes, in_channels)


def _vgg(
    width_mult: float, num_classes: int, in_channels: int, large_images: bool, *, convs: tuple[int, ...]
) -> nn.Module:
    plan = tuple(item if item == POOL else _scaled(item, width_mult) for item in vgg_plan(convs))
    if large_images:
        return VGGImageNet(plan, _scaled(HIDDEN_WIDTH, width_mult), num_classes, in_channels)
    return VGG(plan, num_classes, in_channels)


def _resnet(
    width_mult: float,
    num_classes: int,
    in_channels: int,
    large_images: bool,
    *,
    block: type[BasicBlock | Bottleneck],
    blocks: tuple[int, ...],
) -> nn.Module:
    widths = tuple(_scaled(w, width_mult) for w in (64, 128, 256, 512))
    return ResNet(block, blocks, widths, num_classes, in_channels, large_images)


def _mobilenet(width_mult: float, num_classes: int, in_channels: int, large_images: bool) -> nn.Module:
    stem, *widths = (_scaled(w, width_mult, least=2) for w in (STEM_WIDTH, *(width for width, _ in BLOCKS)))
    return MobileNetV1(stem, tuple(widths), num_classes, in_channels, large_images)


RELEASED_WIDTHS, HE_WIDTHS = (32, 64, 128), (16, 32, 64)
MODELS: dict[str, Builder] = {
    "resnet20": partial(_resnet_cifar, depth=20, widths=RELEASED_WIDTHS),
    "resnet32": partial(_resnet_cifar, depth=32, widths=RELEASED_WIDTHS),
    "resnet44": partial(_resnet_cifar, depth=44, widths=RELEASED_WIDTHS),
    "resnet56": partial(_resnet_cifar, depth=56, widths=RELEASED_WIDTHS),
    "resnet110": partial(_resnet_cifar, depth=110, widths=RELEASED_WIDTHS),
    "resnet8_he": partial(_resnet_cifar, depth=8, widths=HE_WIDTHS),
    "resnet20_he": partial(_resnet_cifar, depth=20, widths=HE_WIDTHS),
    "resnet32_he": partial(_resnet_cifar, depth=32, widths=HE_WIDTHS),
    "resnet44_he": partial(_resnet_cifar, depth=44, widths=HE_WIDTHS),
    "resnet56_he": partial(_resnet_cifar, depth=56, widths=HE_WIDTHS),
    "resnet110_he": partial(_resnet_cifar, depth=110, widths=HE_WIDTHS),
    "vgg11": partial(_vgg, convs=(1, 1, 2, 2, 2)),
    "vgg13": partial(_vgg, convs=(2, 2, 2, 2, 2)),
    "vgg16": partial(_vgg, convs=(2, 2, 3, 3, 3)),
    "vgg19": partial(_vgg, convs=(2, 2, 4, 4, 4)),
    "wrn28_10": partial(_wide_resnet, depth=28, widen=10),
    "wrn16_8": partial(_wide_resnet, depth=16, widen=8),
    "mobilenet_v1": _mobilenet,
    "resnet18": partial(_resnet, block=BasicBlock, blocks=(2, 2, 2, 2)),
    "resnet34": partial(_resnet, block=BasicBlock, blocks=(3, 4, 6, 3)),
    "resnet50": partial(_resnet, block=Bottleneck, blocks=(3, 4, 6, 3)),
    "resnet101": partial(_resnet, block=Bottleneck, blocks=(3, 4, 23, 3)),
}


def maskable_convs(model: nn.Module, *, first_layer_dense: bool, last_layer_dense: bool) -> list[str]:
    """Names of the convolutions that get scores: all but the head, less the first and the last if asked.

    Depthwise convolutions have no scores of their own: they follow the channels that they filter.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1 and name != model.head_name
    ]
    order = getattr(model, "conv_order", names)  # layers of others may be registered in any order
    names = sorted(names, key=lambda name: order.index(name) if name in order else len(order))
    return names[1 if first_layer_dense else 0 : len(names) - (1 if last_layer_dense else 0)]


def initialise(model: nn.Module, init: str, mode: str, nonlinearity: str) -> None:
    """Draws the weights of all convolutions from torch's global generator; all else starts as torch has it."""
    functions = {
        "kaiming_normal": partial(nn.init.kaiming_normal_, mode=mode, nonlinearity=nonlinearity),
        "kaiming_uniform": partial(nn.init.kaiming_uniform_, mode=mode, nonlinearity=nonlinearity),
        "xavier_normal": nn.init.xavier_normal_,
        "xavier_uniform": nn.init.xavier_uniform_,
        "orthogonal": nn.init.orthogonal_,
    }
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            functions[init](module.weight)


def build_model(arch: str, num_classes: int, in_channels: int, image_size: int, width_mult: float = 1.0) -> nn.Module:
    """A plain network by name, with torch's own first weights; or the one that a user's function makes.

    Args:
        arch: a name of `MODELS`, or package.module:function, see `models.own.build_own`.
        image_size: pixels a side, see `LARGE_IMAGE`.
        width_mult: factor on all channel counts.
    Raises: UserError for a name that is not in `MODELS`, or as `build_own` does.
    """
    if is_own(arch):
        return build_own(arch, num_classes, in_channels, image_size, width_mult)
    if arch not in MODELS:
        close = get_close_matches(arch, MODELS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"unknown arch {arch!r}; {hint}the networks are {', '.join(MODELS)}")
    return MODELS[arch](width_mult, num_classes, in_channels, image_size >= LARGE_IMAGE)
