"""CUDA graphs of search steps against steps that run kernel by kernel."""

from __future__ import annotations

import pytest
import torch

from args import Config
from tests.gpu.card import BATCH, GPU, ON_GPU, images_on, run_on
from trainers.default import StepSettings, train_step
from trainers.methods import make_method
from trainers.replay import WARM_UP
from trainers.state import RunState

pytestmark = ON_GPU
ARCHS = ("resnet8_he", "vgg16", "wrn16_8", "mobilenet_v1")


def search_on_gpu(arch: str, precision: str, cuda_graphs: str) -> tuple[RunState, Config]:
    options = {"arch": arch, "width_mult": 0.25, "shapes": "fixed", "cuda_graphs": cuda_graphs, "precision": precision}
    return run_on(GPU, **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_replayed_steps_are_near_those_that_run_kernel_by_kernel(arch, precision):
    runs = [search_on_gpu(arch, precision, graphs) for graphs in ("on", "off")]
    for run, _ in runs:
        run.network.model.train()
    for step in range(WARM_UP + 4):
        now = StepSettings(weight_lr=0.01 * (1 + step % 3), score_lr=0.01, keep_ratio=0.5)
        graphs, eager = (train_step(run.search, *images_on(GPU, seed=step), now, config) for run, config in runs)
        for name, value in graphs.metrics.items():
            torch.testing.assert_close(value, eager.metrics[name], rtol=5e-2, atol=0.02 * BATCH, msg=name)
    replay = runs[0][0].search.replay
    assert not replay.failed
    assert len(replay._recorded) >= 1
    assert runs[1][0].search.replay is None


def test_a_recording_is_made_anew_after_units_have_left():
    run, config = search_on_gpu("resnet8_he", "fp32", "on")
    run.network.model.train()
    method = make_method(config)
    for epoch in range(2):
        for step in range(WARM_UP + 2):
            now = StepSettings(weight_lr=0.01, score_lr=0.3, keep_ratio=0.3)
            result = train_step(run.search, *images_on(GPU, seed=step), now, config)
            assert torch.isfinite(result.metrics["loss"])
        method.end_of_epoch(run, 0.3)
        assert not run.search.replay.failed, epoch
