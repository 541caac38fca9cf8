"""Training steps of a tiny network on one of the two devices: all that the run then knows, and how the host waited."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from args import config_from_dict, parse_args
from tests.emulated.device import CUDA, emulated_cuda
from tests.emulated.log import PROJECT, Copy, Log
from tests.emulated.nested import mapped
from tests.gpu.card import BATCH, NOW, images_on, shapes
from trainers.build import new_run
from trainers.default import StepResult
from trainers.methods import make_method

# Budgets of the steps. They fall, so that every projection has something to take away, and not so far that a layer of a
# narrow network is empty, because the guard against that waits as well.
KEEP_RATIOS = (0.8, 0.78)
IMAGE_SIZE = 32  # the smallest that all networks can read
SMALL = {"arch": "resnet8_he", "width_mult": 0.5}
# Steps are told their rates and budgets, and a run of given length does not ask how many images there are.
SHORT = {
    **{"batch_size": BATCH, "finetune_batch_size": BATCH, "epochs": 10, "finetune_epochs": 1},
    **{"score_lr": 0.05, "weight_lr": 0.05, "keep_ratio": 0.9, "budget_schedule": "constant", "budget_end": 1.0},
    "precision": "fp32",
}
SHALLOW = {
    **{"vgg16": "vgg11", "wrn28_10": "wrn16_8", "resnet50": "resnet18"},
    **dict.fromkeys(("resnet20_he", "resnet20", "resnet32"), "resnet8_he"),
}

RECIPES = sorted(file.stem for file in (PROJECT / "configs").glob("*.yaml"))


def tiny_recipe(name: str) -> dict[str, Any]:
    """What a file of `configs` says about steps: of the shallowest network of the family, narrow, and in fp32."""
    config = parse_args(["--config", str(PROJECT / "configs" / f"{name}.yaml")]).config
    arch = SHALLOW.get(config.model.arch, config.model.arch)
    width = SMALL["width_mult"] if arch == SMALL["arch"] else 0.125
    options = {**vars(config.model), **vars(config.sparsity), **vars(config.train)}
    return {**options, "arch": arch, "width_mult": width, **SHORT}


class Trial:
    """A run that takes steps on one batch."""

    def __init__(self, device: torch.device, options: Mapping[str, Any]) -> None:
        self.config = config_from_dict({**SMALL, **SHORT, **options, "device": device.type}, "test")
        self.run = new_run(self.config, shapes(IMAGE_SIZE), device)
        self.batch = images_on(device, IMAGE_SIZE)

    def step(self, keep_ratio: float) -> StepResult:
        return make_method(self.config).step(self.run, *self.batch, replace(NOW, keep_ratio=keep_ratio))

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint, but for the options, on the host."""
        return on_host({**self.run.state_dict(self.config, shapes(IMAGE_SIZE)), "config": None})


def on_host(value: Any) -> Any:
    """The same nested values with copies of their tensors on the host."""
    return mapped(lambda leaf: leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf, value)


@dataclass(frozen=True)
class Outcome:
    """Of some steps.

    Attributes:
        metrics: of each step.
        state: of the run after them.
        waits, copies: of the last step; see `Log`.
    """

    metrics: list[dict[str, Tensor]]
    state: dict[str, Any]
    waits: Counter[str]
    copies: list[Copy]


def take_steps(device: torch.device, options: Mapping[str, Any]) -> Outcome:
    """Steps of a new run of a narrow ResNet-8, or of what the options say."""
    with emulated_cuda() if device == CUDA else nullcontext(Log()) as log:
        trial, metrics = Trial(device, options), []
        for keep_ratio in KEEP_RATIOS:
            log.clear()
            metrics.append(trial.step(keep_ratio).metrics)  # to read them here would wait
        waits, copies = log.waits.copy(), list(log.copies)
        return Outcome(on_host(metrics), trial.state(), waits, copies)


def steps_of(device: torch.device, recipe: str) -> Outcome:
    """Steps of a shipped recipe, taken once for all tests. Two recipes may mean the same steps."""
    return _steps_of(device, tuple(sorted(tiny_recipe(recipe).items())))


@cache
def _steps_of(device: torch.device, options: tuple[tuple[str, Any], ...]) -> Outcome:
    return take_steps(device, dict(options))
