"""Somebody else's networks: torchvision's, converted by `sparsify` and trained compact and masked."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from tests.toy import (
    batch,
    config,
    one_thread,  # noqa: F401
    randomise,
    search_of,
)
from trainers.default import StepSettings, train_step
from utils.channels.network import SparseNetwork
from utils.conv_type import sparsify, subnet_convs

IMAGE_SHAPE = (3, 32, 32)


def vgg16_bn() -> nn.Module:
    """With a classifier that reads 2 x 2 pixels and is narrow: 120 million parameters less, the rest as it is."""
    model = models.vgg16_bn(num_classes=10, dropout=0.0)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier[0] = nn.Linear(512 * 2 * 2, 64)
    model.classifier[3] = nn.Linear(64, 64)
    model.classifier[6] = nn.Linear(64, 10)
    return model


BUILDERS = {
    "resnet18": partial(models.resnet18, num_classes=10),
    "vgg16_bn": vgg16_bn,
    "mobilenet_v2": partial(models.mobilenet_v2, num_classes=10, dropout=0.0),
    "densenet121": partial(models.densenet121, num_classes=10),
}


def converted(plain: nn.Module, execution: str, residual_masks: str) -> SparseNetwork:
    model = sparsify(copy.deepcopy(plain)).double()
    options = {"residual_masks": residual_masks, "self_check": False}  # these tests check more, and take longer
    return SparseNetwork(model, IMAGE_SHAPE, execution=execution, **options)


def one_step(network: SparseNetwork, masks_KU: np.ndarray) -> dict[str, torch.Tensor]:
    """What one training step under given masks leaves: parameters, scores and running statistics."""
    search = search_of(network, config(), masks_KU=torch.from_numpy(masks_KU))
    images_and_labels = batch(4, image_shape=IMAGE_SHAPE)
    result = train_step(search, *images_and_labels, StepSettings(0.1, score_lr=0.01, keep_ratio=0.5), config())
    return {**network.model.state_dict(), **result.metrics}


@pytest.mark.parametrize(
    ("arch", "residual_masks"),
    [
        *(("resnet18", "free"), ("mobilenet_v2", "tied"), ("densenet121", "free")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("resnet18", "tied"), ("mobilenet_v2", "free"), ("vgg16_bn", "free"))
        ),
    ],
)
def test_a_step_of_torchvisions_networks(arch, residual_masks):
    torch.manual_seed(0)
    plain = randomise(BUILDERS[arch](), seed=1)
    compact, masked = (converted(plain, execution, residual_masks) for execution in ("compact", "masked"))
    num_convs = sum(isinstance(module, nn.Conv2d) and module.groups == 1 for module in plain.modules())
    assert len(compact.layers) == num_convs
    masks_KU = np.random.default_rng(0).random((2, compact.num_units)) < 0.4
    assert compact.subnet_macs(compact.plan(masks_KU[0])) < 0.4 * compact.dense_macs
    expected = one_step(masked, masks_KU)
    for name, value in one_step(compact, masks_KU).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_the_plain_network_is_the_one_that_keeps_everything():
    plain = randomise(BUILDERS["densenet121"](), seed=2).double().eval()
    network = converted(plain, "compact", "free")
    network.model.eval()
    images, _ = batch(2, image_shape=IMAGE_SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(network(images, network.dense_plan), plain(images), rtol=1e-9, atol=1e-11)


def test_a_network_that_cannot_be_followed_everywhere_is_refused_by_name_if_that_is_asked():
    with pytest.raises(
        ValueError, match=r"followed through module layer1.0.conv2 \(Conv2d\) at models/resnet.py:\d+: .*grouped"
    ):
        SparseNetwork(sparsify(models.resnext50_32x4d(num_classes=10)), IMAGE_SHAPE, strict=True)


def test_depthwise_convolutions_follow_and_have_no_scores():
    model = sparsify(models.mobilenet_v2(num_classes=10, dropout=0.0))
    assert all(conv.groups == 1 for conv in subnet_convs(model).values())
    with pytest.raises(ValueError, match="a depthwise one follows"):
        sparsify(models.mobilenet_v2(num_classes=10), ["features.1.conv.0.0"])
