"""Runs on the emulated device have the numbers of runs on the CPU, bit by bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.emulated.device import CUDA, HOST, emulated_cuda
from tests.emulated.trial import IMAGE_SIZE, Outcome, Trial, on_host, steps_of, take_steps
from tests.gpu.card import NOW, images_on, shapes
from tests.toy import without_clocks
from trainers.build import fix_subnet, restore_run
from trainers.default import draw_masks, evaluate
from trainers.methods import make_method
from trainers.methods.base import Method
from trainers.recipe import Recipe
from utils.channels.shrink import drop_dead_units
from utils.channels.subnet import estimate_statistics, installed
from utils.run import checkpoint
from utils.run.checkpoint import differences


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param("cifar10_resnet20", marks=pytest.mark.slow),  # free residual streams
        pytest.param("best_vgg16_quarter", marks=pytest.mark.slow),  # VGG with a budget of FLOPs
        "early_vgg16_quarter",  # one mask, the estimator "taylor", the tangent
        "best_resnet20",  # gates beside two masks
        "imagenet_mobilenet_v1",  # depthwise layers
    ],
)
def test_steps_of_a_recipe_have_the_numbers_of_the_cpu(recipe):
    assert_equal(*(steps_of(device, recipe) for device in (HOST, CUDA)))


def test_steps_with_tied_streams_have_the_numbers_of_the_cpu():
    assert_equal(*(take_steps(device, {"residual_masks": "tied"}) for device in (HOST, CUDA)))


def assert_equal(expected: Outcome, actual: Outcome) -> None:
    """Metrics, weights, statistics, scores, optimizers, the estimator, the masks and the generator; all have moved."""
    assert differences(expected.metrics, actual.metrics) == []
    assert differences(expected.state, actual.state) == []
    assert expected.metrics[0]["loss"] != expected.metrics[-1]["loss"]
    assert 0 < expected.state["search"]["masks"].float().mean() < 1


def life_of_a_run(device: torch.device, folder: Path) -> dict[str, Any]:
    """What a run knows at the stations of its life, on the host.

    Units leave its network, it is saved, a new run goes on from the file, a subnet is measured and trained.
    """
    trial, known = Trial(device, {}), {}
    for keep_ratio in (0.8, 0.7):
        trial.step(keep_ratio)
    network, search = trial.run.network, trial.run.search
    network.scores.data[::3] = 0
    search.masks = draw_masks(search, trial.config)
    known["units that left"] = drop_dead_units(network, search.score_optimizer, search.weight_optimizer)
    trial.step(0.6)
    known["before"] = trial.state()

    checkpoint.save(folder / "last.pt", trial.run.state_dict(trial.config, shapes(IMAGE_SIZE)))
    resumed = Trial(device, {})
    restore_run(resumed.run, checkpoint.load(folder / "last.pt"), resumed.config)
    known["resumed"] = resumed.state()
    for each in (trial, resumed):
        each.step(0.5)
    known["after"], known["after resuming"] = trial.state(), resumed.state()

    others = [images_on(device, IMAGE_SIZE, seed) for seed in (2, 3)]
    subnet = estimate_statistics(network, make_method(trial.config).mask(trial.run, 0.5), others)
    with installed(network, subnet):
        known["evaluation"] = evaluate(network, network.plan(subnet.mask_U), others)
    fix_subnet(trial.run, trial.config, subnet)
    known["fine-tuning"] = on_host(Method(trial.config).step(trial.run, *trial.batch, NOW).metrics)
    known["fine-tuned"] = trial.state()
    return known


def test_the_life_of_a_run_is_that_of_one_on_the_cpu(tmp_path):
    expected = life_of_a_run(HOST, tmp_path)
    with emulated_cuda():
        actual = life_of_a_run(CUDA, tmp_path)
    assert actual["units that left"] > 0
    assert differences(actual["before"], actual["resumed"]) == []
    assert differences(actual["after"], actual["after resuming"]) == []
    assert differences(expected, actual) == []


def interrupt_in_step(number: int, patch: pytest.MonkeyPatch) -> None:
    """Has a signal ask to stop in a step, counted from 0."""
    step, count = Recipe.step, iter(range(1000))

    def interrupted_step(*arguments: Any) -> Any:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    patch.setattr(Recipe, "step", interrupted_step)


def test_the_program_stopped_and_resumed_has_the_results_of_the_cpu(program, monkeypatch, capsys):
    """Search, held-out and test images, choice of the subnet, fine-tuning: as in a run that has never stopped."""
    options = ("--arch", "resnet8_he", "--epochs", "1", "--finetune-epochs", "1")
    assert program(*options, "--device", "cpu", name="cpu") == 0
    with emulated_cuda():
        interrupt_in_step(2, monkeypatch)
        assert program(*options, "--device", "cuda", name="cuda") == 128 + signal.SIGTERM
        assert program(*options, "--resume", name="cuda") == 0

    folders = [next(Path("runs/tiny", name).glob("prune_rate=*")) for name in ("cpu", "cuda")]
    for file in ("last.pt", "best.pt"):
        states = [without_clocks(checkpoint.load(folder / "checkpoints" / file)) for folder in folders]
        assert differences(*states) == []
        assert states[0]["epoch"] == 2 or file == "best.pt"
    assert json.loads((folders[1] / "summary.json").read_text())["device"].startswith("cuda:0")

    evaluation = (*options, "--evaluate", "--resume", str(folders[1]))
    capsys.readouterr()
    assert program(*evaluation, "--device", "cpu", name="cuda") == 0
    expected = capsys.readouterr().out.splitlines()[-1]
    with emulated_cuda():
        assert program(*evaluation, "--device", "cuda", name="cuda") == 0
    assert capsys.readouterr().out.splitlines()[-1] == expected
    assert "best.pt: test top-1" in expected
