"""Faults of a program on a GPU that nobody sees on a CPU, each planted in a step: the emulated device notices all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trainers.build
import trainers.default
import utils.channels.network
from args import Config
from tests.emulated.device import CUDA, HOST
from tests.emulated.trial import Outcome, take_steps
from trainers.state import Masks
from utils.algorithm.transfer import HostCopy
from utils.channels.network import SparseNetwork
from utils.channels.plan import Plan
from utils.run.checkpoint import differences

INTENDED = {"utils/algorithm/transfer.py read": 1}


@pytest.fixture
def on_cpu() -> Outcome:
    """The same steps on the CPU, without a fault."""
    return take_steps(HOST, {})


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, Any], Outcome]:
    """Puts something in place of a part of the project and takes steps on the device."""

    def planted(owner: Any, name: str, fault: Any, **options: Any) -> Outcome:
        monkeypatch.setattr(owner, name, fault)
        return take_steps(CUDA, options)

    return planted


def unwaited_plans(masks: Masks, network: SparseNetwork) -> list[Plan]:
    """`Masks.plans` without `HostCopy.read`."""
    return network.plans(masks.on_host.values.numpy().copy())


def test_without_a_fault_a_step_is_that_of_the_cpu(plant, on_cpu):
    outcome = plant(Masks, "plans", Masks.plans)
    assert differences(on_cpu.state, outcome.state) == []
    assert outcome.waits == INTENDED


def test_masks_read_before_they_have_arrived_give_other_numbers(plant, on_cpu):
    outcome = plant(Masks, "plans", unwaited_plans)
    assert "weight_optimizer.state.0.momentum_buffer" in differences(on_cpu.state, outcome.state)
    assert outcome.waits == {}


def test_an_event_recorded_before_the_copy_gives_other_numbers(plant, on_cpu):
    def early_event(values: Tensor) -> HostCopy:
        arrived = torch.cuda.current_stream().record_event()
        return HostCopy(values.to("cpu", non_blocking=True), arrived)

    outcome = plant(HostCopy, "of", early_event)
    assert differences(on_cpu.state, outcome.state) != []


def test_scores_read_before_they_have_arrived_give_other_numbers(plant):
    """With a budget of cost, which the host meets, scores are what it waits for."""
    outcome = plant(HostCopy, "read", lambda copy: copy.values.clone(), budget="flops")
    assert "scores" in " ".join(differences(take_steps(HOST, {"budget": "flops"}).state, outcome.state))


def test_a_number_read_in_a_step_is_a_wait(plant):
    batch_sums = trainers.default.batch_sums

    def reading(loss: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return batch_sums(loss, logits, labels) | {"seen": torch.full_like(loss, loss.item())}

    waits = plant(trainers.default, "batch_sums", reading).waits
    assert waits == {**INTENDED, "tests/emulated/test_faults.py reading": 1}


def test_masks_copied_with_blocking_are_a_wait(plant):
    stored_masks = trainers.default.stored_masks

    def blocking(drawn: Tensor, config: Config, device: torch.device) -> Masks:
        return replace(stored_masks(drawn, config, device), on_host=HostCopy(drawn.to("cpu")))

    assert plant(trainers.default, "stored_masks", blocking).waits == {"tests/emulated/test_faults.py blocking": 1}


def test_channel_lists_left_on_the_host_are_refused(plant):
    on_device = utils.channels.network.on_device
    with pytest.raises(RuntimeError, match=r"same device, .* index_select of .* on cuda:0, .* on cpu"):
        plant(utils.channels.network, "on_device", lambda plans, device: on_device(plans, HOST))


def test_a_generator_of_the_cpu_is_refused(plant):
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        plant(trainers.build, "stream_generator", lambda seed, stream, device: torch.Generator().manual_seed(seed))


def test_numpy_of_scores_on_the_device_is_refused(plant):
    def reading(mask_U: np.ndarray, scores_U: Tensor, groups: Any) -> np.ndarray:
        assert scores_U.detach().numpy().any()
        return mask_U

    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        plant(utils.channels.network, "keep_one_unit", reading)
