"""Narrow networks of the registry in float64, with batch-norms that are not trivial."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models import build_model, maskable_convs
from utils.channels.network import SparseNetwork
from utils.conv_type import sparsify

IMAGE_SHAPE = (3, 32, 32)
NETWORKS = [("vgg16", 0.0625), ("resnet20_he", 0.25), ("wrn28_10", 0.03)]


def network_of(arch: str, width_mult: float, **options: Any) -> SparseNetwork:
    torch.manual_seed(3)
    model = build_model(arch, 10, 3, 32, width_mult).double()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.2, 1.0)
    sparsify(model, maskable_convs(model, first_layer_dense=False, last_layer_dense=False)).double()
    return SparseNetwork(model.to(memory_format=torch.channels_last), IMAGE_SHAPE, **{"self_check": False, **options})


def images_and_labels(size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn((size, *IMAGE_SHAPE), generator=generator, dtype=torch.float64)
    return images, torch.randint(10, (size,), generator=generator)
