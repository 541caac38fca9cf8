"""Networks of CIFAR repositories and of torchvision: compact, masked and plain are the same, in float64."""

from __future__ import annotations

import pytest
from torchvision import models

from tests.channels.conversion import check, check_the_rest
from tests.toy import one_thread  # noqa: F401
from tests.zoo import IMAGE_SHAPE, ZOO

# How many channels masks can drop, of how many, and their share of the FLOPs in per cent.
COVERED = {
    "vgg": (40, 40, 100.0),
    "lenet": (14, 14, 99.8),
    "resnet": (72, 72, 100.0),
    "resnet option a": (48, 56, 90.3),
    "resnext": (48, 60, 73.9),
    "preact senet": (78, 102, 100.0),
    "se resnet": (72, 72, 100.0),
    "densenet": (48, 48, 100.0),
    "dla": (104, 104, 100.0),
    "mobilenet v2": (60, 60, 100.0),
    "efficientnet": (68, 100, 100.0),
    "regnet": (56, 104, 56.9),
    "shufflenet v2": (12, 40, 41.6),
    "convnext": (56, 104, 64.9),
    "googlenet": (26, 30, 100.0),
    "squeezenet": (24, 34, 100.0),
    "pnasnet": (48, 56, 88.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_networks_of_cifar_repositories(name):
    network = check(ZOO[name](), IMAGE_SHAPE)
    coverage = network.coverage
    assert (coverage.units, coverage.all_units) == COVERED[name][:2]
    assert 100 * coverage.macs / coverage.all_macs == pytest.approx(COVERED[name][2], abs=0.05)
    check_the_rest(network, IMAGE_SHAPE)


# Networks of torchvision, with the size of the images.
TORCHVISION = {
    "efficientnet_b0": (64, 12428, 21388, 100.0),
    "mobilenet_v3_small": (64, 4192, 6488, 99.8),
    "resnext50_32x4d": (64, 19008, 26560, 94.5),
    "regnet_y_400mf": (64, 6040, 14536, 86.5),
    "shufflenet_v2_x0_5": (64, 1912, 2944, 97.4),
    "squeezenet1_1": (64, 2944, 2954, 100.0),
    "googlenet": (64, 7280, 7536, 100.0),
    "inception_v3": (299, 17216, 18112, 100.0),
    "densenet121": (64, 10240, 10240, 100.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_networks_of_torchvision(name):
    size, units, all_units, share = TORCHVISION[name]
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = models.get_model(name, num_classes=10, **options)
    network = check(model, (3, size, size), size=3 if size < 200 else 2, shares=(0.5,))
    coverage = network.coverage
    assert (coverage.units, coverage.all_units) == (units, all_units)
    assert 100 * coverage.macs / coverage.all_macs == pytest.approx(share, abs=0.05)
    check_the_rest(network, (3, size, size))


@pytest.mark.slow
def test_convnext_has_no_convolution_that_can_be_masked():
    with pytest.raises(ValueError, match="no layer of the network is left to mask"):
        check(models.convnext_tiny(num_classes=10), (3, 64, 64))
