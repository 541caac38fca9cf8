"""Networks by name. A network is plain PyTorch; this file decides which of its layers become maskable."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import nn

from models.resnet_cifar import ResNetCifar
from models.vgg import POOL, VGG, VGG16
from models.wrn import WideResNet
from utils.conv_type import sparsify
from utils.errors import UserError

Builder = Callable[[float, int, int], nn.Module]  # (width_mult, num_classes, in_channels) -> network


def _scaled(width: int, width_mult: float) -> int:
    return max(1, round(width * width_mult))


def _resnet(width_mult: float, num_classes: int, in_channels: int, *, depth: int, widths: tuple[int, ...]) -> nn.Module:
    blocks_per_stage = (depth - 2) // 6
    return ResNetCifar(blocks_per_stage, tuple(_scaled(w, width_mult) for w in widths), num_classes, in_channels)


def _vgg(width_mult: float, num_classes: int, in_channels: int, *, plan: tuple[int | str, ...]) -> nn.Module:
    scaled = tuple(item if item == POOL else _scaled(item, width_mult) for item in plan)
    return VGG(scaled, num_classes, in_channels)


def _wide_resnet(width_mult: float, num_classes: int, in_channels: int, *, depth: int, widen: int) -> nn.Module:
    widths = (16, 16 * widen, 32 * widen, 64 * widen)
    blocks_per_stage = (depth - 4) // 6
    return WideResNet(blocks_per_stage, tuple(_scaled(w, width_mult) for w in widths), num_classes, in_channels)


RELEASED_WIDTHS, HE_WIDTHS = (32, 64, 128), (16, 32, 64)
MODELS: dict[str, Builder] = {
    "resnet20": partial(_resnet, depth=20, widths=RELEASED_WIDTHS),
    "resnet32": partial(_resnet, depth=32, widths=RELEASED_WIDTHS),
    "resnet20_he": partial(_resnet, depth=20, widths=HE_WIDTHS),
    "resnet32_he": partial(_resnet, depth=32, widths=HE_WIDTHS),
    "resnet56_he": partial(_resnet, depth=56, widths=HE_WIDTHS),
    "vgg16": partial(_vgg, plan=VGG16),
    "wrn28_10": partial(_wide_resnet, depth=28, widen=10),
}


def maskable_convs(model: nn.Module, *, first_layer_dense: bool, last_layer_dense: bool) -> list[str]:
    """Names of the convolutions that get scores: all but the classifier, less the first and the last if asked.

    Modules of the networks in this package are registered in the order of the forward pass.
    """
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and name != model.classifier
    ]
    return names[1 if first_layer_dense else 0 : len(names) - (1 if last_layer_dense else 0)]


def initialise(model: nn.Module, init: str, mode: str, nonlinearity: str) -> None:
    """Draws the weights of all convolutions from torch's global generator; batch-norms start at 1 and 0."""
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


def build_model(config: Any, score_init: float, num_classes: int, in_channels: int) -> nn.Module:
    """A freshly initialised network as the configuration asks: masked (`VRPGE`) or plain (`DenseConv`).

    Args:
        config: the model part of the configuration (`args.ModelConfig`).
        score_init: start value of every score, in (0, 1].
    Raises: UserError for a name that is not in `MODELS`.
    """
    if config.arch not in MODELS:
        close = get_close_matches(config.arch, MODELS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"unknown arch {config.arch!r}; {hint}the networks are {', '.join(MODELS)}")
    model = MODELS[config.arch](config.width_mult, num_classes, in_channels)
    initialise(model, config.init, config.mode, config.nonlinearity)
    if config.conv_type == "VRPGE":
        names = maskable_convs(
            model, first_layer_dense=config.first_layer_dense, last_layer_dense=config.last_layer_dense
        )
        sparsify(model, names, score_init)
    return model
