"""What all tests on a GPU share: when they run, and small runs and batches on a device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from args import Config, config_from_dict
from trainers.build import new_run
from trainers.default import StepResult, StepSettings
from trainers.methods import make_method
from trainers.state import RunState

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Drivers and cards have warnings of their own, such as that the check for waits is a prototype. They are shown.
    pytest.mark.filterwarnings("default"),
]
BATCH = 16
NOW = StepSettings(weight_lr=0.01, score_lr=0.01, keep_ratio=0.5, progress=0.5)


def shapes(image_size: int = 32) -> SimpleNamespace:
    """What a network takes from a `DataSplits`."""
    return SimpleNamespace(
        image_size=image_size, num_classes=10, channels=3, fingerprint="none", contents="none", facts=dict
    )


def run_on(device: torch.device, image_size: int = 32, **options: object) -> tuple[RunState, Config]:
    """A run before its first step; by default of a narrow ResNet-8."""
    given = {"arch": "resnet8_he", "batch_size": BATCH, "device": device.type, **options}
    config = config_from_dict(given, "test")
    return new_run(config, shapes(image_size), device), config


def images_on(device: torch.device, image_size: int = 32, seed: int = 1) -> tuple[Tensor, Tensor]:
    """The same random batch on every device."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn((BATCH, 3, image_size, image_size), generator=generator)
    labels = torch.randint(10, (BATCH,), generator=generator)
    return images.to(device, memory_format=torch.channels_last), labels.to(device)


def take_step(run: RunState, config: Config, batch: tuple[Tensor, Tensor]) -> StepResult:
    """One step of the first phase of the method."""
    return make_method(config).step(run, *batch, NOW)


def mean_loss(result: StepResult) -> float:
    return float(result.metrics["loss"]) / BATCH
