"""Networks of the registry with their first weights, plain or maskable."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models import build_model, initialise, maskable_convs
from utils.conv_type import sparsify


def build(
    arch: str, width_mult: float = 1.0, *, seed: int = 0, image_size: int = 32, init: str = "kaiming_normal",
    mode: str = "fan_in", nonlinearity: str = "leaky_relu",
) -> nn.Module:  # fmt: skip
    """A plain network with its first weights."""
    torch.manual_seed(seed)
    model = build_model(arch, 10, 3, image_size, width_mult)
    initialise(model, init, mode, nonlinearity)
    return model


def maskable(
    arch: str, width_mult: float = 1.0, *, first_dense: bool = False, last_dense: bool = False, score_init: float = 0.5,
    **options: Any,
) -> nn.Module:  # fmt: skip
    """The same with scores on all layers that may have them."""
    model = build(arch, width_mult, **options)
    return sparsify(
        model, maskable_convs(model, first_layer_dense=first_dense, last_layer_dense=last_dense), score_init
    )
