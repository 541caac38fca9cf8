"""The program, its tools and its images on a GPU, from the outside."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch

import trainers.recipe
from args import METHODS
from data import BatchedSet
from main import main
from tests.data.samples import in_memory, make_photos, streamed
from tests.gpu.card import CPU, GPU, ON_GPU, shapes
from tools import bench, gauge, step_times
from tools.bench_networks import NETWORKS, Bench
from trainers.replay import WARM_UP

pytestmark = ON_GPU
SHORT = ("--device", "cuda", "--epochs", "2", "--finetune-epochs", "1")
SMALL = ("--arch", "resnet8_he", "--width-mult", "0.5", "--batch-size", "8", "--device", "cuda")


def folder_of(name: str = "run") -> Path:
    (folder,) = Path("runs/tiny", name).glob("prune_rate=*")
    return folder


def summary_of(name: str = "run") -> dict:
    return json.loads((folder_of(name) / "summary.json").read_text())


# ---- the program ----


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_is_stopped_goes_on_and_evaluates_to_the_same_number(program, monkeypatch, capsys, precision):
    step, count = trainers.recipe.Recipe.step, iter(range(1000))

    def interrupted_step(self, images, labels, settings):
        assert images.device == labels.device == GPU
        if next(count) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, images, labels, settings)

    monkeypatch.setattr(trainers.recipe.Recipe, "step", interrupted_step)
    assert program("--device", "cuda", "--precision", precision) == 128 + signal.SIGTERM
    assert program("--resume") == 0
    summary = summary_of()
    assert torch.cuda.get_device_name(0) in summary["device"]
    assert summary["device"].startswith("cuda:0")
    environment = json.loads((folder_of() / "env.json").read_text())
    assert environment["gpu"] == torch.cuda.get_device_name(0)
    assert summary["epochs"] == 5
    assert math.isfinite(summary["test_loss"])

    capsys.readouterr()
    assert program("--evaluate", "--resume", str(folder_of())) == 0
    evaluated = re.search(r"test top-1 ([\d.]+) %", capsys.readouterr().out)
    assert float(evaluated[1]) == pytest.approx(summary["test_top1"], abs=0.005)
    assert program("--evaluate", "--resume", str(folder_of()), "--device", "cpu") == 0
    on_cpu = re.search(r"test top-1 ([\d.]+) %", capsys.readouterr().out)
    assert float(on_cpu[1]) == pytest.approx(summary["test_top1"], abs=15.005)  # three of the 20 images may turn


def test_training_learns_the_tiny_images(program):
    assert program("--device", "cuda", "--epochs", "20", "--budget-schedule", "constant") == 0
    assert summary_of()["test_top1"] >= 50  # chance is 25


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_to_the_end(program, method):
    assert program(*SHORT, "--method", method) == 0
    summary = summary_of()
    assert math.isfinite(summary["test_loss"])
    assert summary["device"].startswith("cuda:0")


@pytest.mark.parametrize(
    "options",
    [
        ("--estimator", "taylor"),
        ("--estimator", "linear_cv_gates"),
        ("--execution", "masked"),
        ("--budget", "flops", "--score-gradient", "tangent"),
        ("--residual-masks", "tied", "--K", "3"),
        ("--mixup", "0.5"),
        ("--ema", "0.9"),
    ],
    ids=" ".join,
)
def test_other_recipes_train_to_the_end(program, options):
    assert program(*SHORT, *options) == 0
    assert math.isfinite(summary_of()["test_loss"])


def test_the_doctor_names_the_card(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["--doctor", "--device", "cuda"])  # what else is missing here is told by the exit code
    said = " ".join(capsys.readouterr().out.split())
    name = torch.cuda.get_device_name(0)
    assert f"GPUs cuda:0: {name}, " in said
    assert f"trains on cuda:0: {name} (--device cuda)" in said


# ---- tools ----


@pytest.mark.parametrize("words", ["--precision bf16 --scores late", "--scores uniform"])
def test_the_bench_measures_on_the_gpu(capsys, words):
    assert bench.main([*SMALL, "--repeats", "2", "--no-memory", "--beside", "none", *words.split()]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["device"] == "cuda:0"
    for name in NETWORKS:
        row = figures["networks"][name]
        assert 0 < row["device_ms"] <= 1.1 * row["ms"] + 0.1
        assert row["ms"] >= row["host_ms"] > 0
        assert row["peak_mb"] is None


def test_the_bench_times_the_fair_opponents_on_the_gpu_and_measures_memory_there(capsys):
    words = "--repeats 2 --shapes fixed --cuda-graphs on --beside graphs shapes"
    assert bench.main([*SMALL, *words.split()]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["left_out"] == {}
    rows = figures["networks"]
    assert rows["compact"]["execution"] == "compact, shapes fixed, CUDA graphs"
    others = ["dense, CUDA graph", "thin, CUDA graph", "compact, shapes drawn", "compact, shapes fixed"]
    assert list(rows) == [*NETWORKS, *others]
    for row in rows.values():
        assert row["ms"] > 0
        assert row["peak_mb"] > row["baseline_mb"] > 0  # the process holds the batch before the network


@pytest.mark.parametrize("name", ["dense", "thin"])
def test_recorded_steps_of_the_bench_are_near_those_that_run_kernel_by_kernel(name):
    settings, config = bench.read_command_line([*SMALL, "--weight-lr", "0.01"])
    trial = Bench(config, shapes(), settings.scores, GPU)
    trial.num_passes = [2]
    recorded, plain = trial.build(f"{name}, CUDA graph"), trial.build(name)
    recorded.step()
    recorded.step()
    for _ in range(WARM_UP + 2):
        plain.step()
    expected = plain.run.network.model.state_dict()
    for key, value in recorded.run.network.model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-2, atol=1e-2, msg=key)


def test_the_bench_compiles_the_dense_network_on_the_gpu(capsys):
    assert bench.main([*SMALL, "--repeats", "2", "--no-memory", "--beside", "compiled"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    told = {**figures["networks"], **figures["left_out"]}  # it may lack a compiler, and says so
    assert {"dense, compiled", "dense, compiled with CUDA graphs"} <= told.keys()


def test_the_parts_of_a_step_are_measured_on_the_gpu():
    settings, config = bench.read_command_line(SMALL)
    times = step_times.measure_bench(Bench(config, shapes(), settings.scores, GPU), repeats=2)
    for name in NETWORKS:
        parts = times.milliseconds[name]
        assert min(parts["first pass"] + parts["backward"] + parts["weight update"]) > 0
    assert min(times.milliseconds["compact"]["second pass"] + times.milliseconds["compact"]["structure step"]) > 0
    assert torch.cuda.get_device_name(0) in times.machine


def test_estimators_are_gauged_on_the_gpu_as_on_the_cpu(program):
    assert program(*SHORT, "--save-every", "1") == 0
    found = []
    for device in ("cpu", "cuda"):
        words = ("--checkpoint", "epoch_1.pt", "--batches", "4", "--masks", "4", "--warm-up", "2", "--device", device)
        assert gauge.main([str(folder_of()), *words, "--out", device]) == 0
        (entry,) = json.loads((Path(device) / "gauge.json").read_text())["checkpoints"]
        assert math.isfinite(entry["estimators"]["vrpge"]["variance"]["value"])
        found.append(entry)
    assert list(found[0]["estimators"]) == list(found[1]["estimators"])
    assert found[0]["cost"] == pytest.approx(found[1]["cost"], rel=0.3)  # of other masks: generators differ


# ---- images ----


def assert_near(actual: BatchedSet, expected: BatchedSet) -> None:
    """Batches of training and of evaluation, from a set on the GPU and from the same one on the CPU."""
    for batches in (lambda images: images.train_batches(5, seed=1, epoch=2), lambda images: images.batches(5)):
        pairs = list(zip(batches(actual), batches(expected), strict=True))
        assert len(pairs) >= 1
        for (images, labels), (expected_images, expected_labels) in pairs:
            assert images.device == labels.device == GPU
            assert expected_images.device == CPU
            torch.testing.assert_close(images.cpu(), expected_images, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(labels.cpu(), expected_labels, rtol=1e-6, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_in_memory_are_the_same_on_the_gpu(channels_last):
    images = in_memory(crop_padding=2, flip=True, channels_last=channels_last)
    assert images.to(GPU).images.device == GPU
    assert_near(images.to(GPU), images)
    assert_near(images.to(GPU).subset([3, 1, 4, 5, 9, 2]), images.subset([3, 1, 4, 5, 9, 2]))


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_images_reach_the_gpu(tmp_path, workers):
    make_photos(tmp_path, per_class=11)
    folder = tmp_path / "train" / "cat"
    assert_near(streamed(folder, workers).to(GPU), streamed(folder))
