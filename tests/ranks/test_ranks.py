"""Two processes on the CPU against one that does the work of both, part by part; and how ranks stop and fail."""

from __future__ import annotations

import copy
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from args import METHODS
from tests.conftest import TINY
from tests.ranks import program as ranks
from tests.toy import batch, config, one_thread  # noqa: F401
from trainers.default import StepSettings, weight_step
from trainers.methods.released import Released
from utils.algorithm.masks import sample_masks
from utils.channels.shrink import drop_dead_units
from utils.run.checkpoint import differences, load

PROJECT = Path(__file__).parents[2]
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def start(*command: str, timeout: float = 290) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    return subprocess.run(
        [sys.executable, *command], cwd=PROJECT, capture_output=True, text=True, timeout=timeout, env=environment
    )


def torchrun(*command: str) -> subprocess.CompletedProcess:
    return start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks.RANKS), *command)


# ---- steps against a reference ----


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    """What each rank came to in `ranks.steps`."""
    folder = tmp_path_factory.mktemp("steps")
    result = torchrun("-m", "tests.ranks.program", "steps", str(folder))
    assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"rank{number}.pt", weights_only=True) for number in range(ranks.RANKS)]


class Reference:
    """One network that does the steps of all ranks, one part of the batch after the other. Slow and plain."""

    def __init__(self, name: str) -> None:
        self.run, _, self.config = ranks.run_of(name)
        self.released = ranks.CASES[name].method is Released
        self.search, self.network = self.run.search, self.run.network
        self.shared = self.config.sparsity.rank_masks == "shared"
        self.generator = torch.Generator().manual_seed(4)
        self.executed = 0
        self.draw()

    def draw(self) -> None:
        """The masks of each rank: drawn once for all, or one after the other."""
        arguments = (self.network.scores, self.generator, self.config.sparsity.K)
        first = sample_masks(*arguments)
        self.masks = [first, first if self.shared else sample_masks(*arguments)]

    def buffers(self) -> dict[str, Tensor]:
        return {n: b for n, b in self.network.model.named_buffers() if "running" in n}

    def step(self, images: Tensor, labels: Tensor, settings: StepSettings) -> dict[str, float]:
        before = {name: buffer.clone() for name, buffer in self.buffers().items()}
        parts = []
        for number in range(ranks.RANKS):
            for name, buffer in self.buffers().items():
                buffer.copy_(before[name])
            own = ranks.part(number)
            parts.append(self.one_part(images[own], labels[own], self.masks[number], settings.update_scores))
        sizes = [len(labels[ranks.part(number)]) for number in range(ranks.RANKS)]
        shares = [size / sum(sizes) for size in sizes]

        for name, buffer in self.buffers().items():
            kept = [(moved["buffers"][name] != before[name]) * size for moved, size in zip(parts, sizes, strict=True)]
            shift = sum(k * (moved["buffers"][name] - before[name]) for k, moved in zip(kept, parts, strict=True))
            buffer.copy_(before[name] + shift / sum(kept).clamp(min=1))
        for number, weight in enumerate(self.network.weight_parameters()):
            weight.grad = sum(share * each["gradients"][number] for share, each in zip(shares, parts, strict=True))
        losses_K = sum(share * each["losses"] for share, each in zip(shares, parts, strict=True))
        seen = [losses_K, losses_K] if self.shared else [each["losses"] for each in parts]
        reader, gates = self.search.gate_reader, None
        if reader is not None:
            gates = reader.read(self.network.plan(self.masks[0][0].numpy()), sum(sizes))
        if settings.update_scores:
            self.estimate(seen, shares, settings)
        self.update(settings)
        if settings.update_scores:
            self.search.estimator.observe(self.masks[0], losses_K, gates)
        self.draw()
        metrics = {
            "loss": sum(size * float(each["loss"]) for size, each in zip(sizes, parts, strict=True)),
            "top1": sum(each["top1"] for each in parts),
            "v": sum(sizes) * self.v,
        }
        differences = [float((each[0] - each[min(1, len(each) - 1)]).abs()) for each in seen]
        metrics["loss_difference"] = sum(size * one for size, one in zip(sizes, differences, strict=True))
        return metrics

    def one_part(self, images: Tensor, labels: Tensor, masks: Tensor, update_scores: bool) -> dict[str, Any]:
        """Of the released method, every mask moves statistics and feeds the gradient; of others, the first one."""
        network = self.network
        plans = [network.plan(mask) for mask in masks.numpy()][: len(masks) if update_scores else 1]
        num_backward = len(plans) if self.released else 1
        network.clear_gradients()
        logits = [network(images, plan, update_statistics=k < num_backward) for k, plan in enumerate(plans)]
        losses = [F.cross_entropy(out, labels) for out in logits]
        (sum(losses[:num_backward]) / num_backward).backward()
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in network.weight_parameters()]
        macs = [network.executed_macs(plan) for plan in plans]
        self.executed += len(labels) * (sum(macs) + 2 * sum(macs[:num_backward]))
        return {
            "losses": torch.stack(losses).detach(),
            "gradients": gradients,
            "buffers": {name: buffer.clone() for name, buffer in self.buffers().items()},
            "loss": losses[0].detach(),
            "top1": int((logits[0].argmax(1) == labels).sum()),
        }

    def estimate(self, seen: list[Tensor], shares: list[float], settings: StepSettings) -> None:
        scores, estimator = self.network.scores, self.search.estimator
        if self.shared:
            scores.grad = estimator.gradient(scores.detach(), self.masks[0], seen[0])
        else:
            estimates = [
                estimator.gradient(scores.detach(), m, losses) for m, losses in zip(self.masks, seen, strict=True)
            ]
            scores.grad = sum(share * estimate for share, estimate in zip(shares, estimates, strict=True))
        if self.config.sparsity.score_gradient == "tangent":
            self.search.budget.remove_normal_(settings.keep_ratio)

    def update(self, settings: StepSettings) -> None:
        """Scores stay where no structure step is due; the projection runs in every step."""
        weights, scores = self.network.weight_parameters(), [self.network.scores]
        moved = scores if settings.update_scores else []
        for group in [[*weights, *moved]] if self.released else [weights, moved]:
            torch.nn.utils.clip_grad_norm_(group, self.config.train.clip_norm)
        self.run.weight_optimizer.param_groups[0]["lr"] = settings.weight_lr
        self.run.weight_optimizer.step()
        if moved:
            self.search.score_optimizer.param_groups[0]["lr"] = settings.score_lr
            self.search.score_optimizer.step()
        self.v = float(self.search.budget.project_(settings.keep_ratio))


@pytest.mark.parametrize("name", ranks.CASES)
def test_two_ranks_take_the_steps_of_one_process_that_does_both_parts(results, name):
    reference, result, num_cut = Reference(name), results[0]["cases"][name], None
    for step in range(ranks.STEPS):
        images, labels = batch(ranks.BATCH_SIZE, seed=step)
        metrics = reference.step(images, labels, ranks.settings_of(step, reference.config))
        for key, value in metrics.items():
            assert float(result["metrics"][step][key]) == pytest.approx(value, rel=1e-9, abs=1e-12), (step, key)
        if step == ranks.SHRINK_AFTER and reference.network.execution == "compact":
            search = reference.search
            num_cut = drop_dead_units(reference.network, search.score_optimizer, search.weight_optimizer)
    assert num_cut != 0, "units should leave in this test"
    for key, value in reference.network.model.state_dict().items():
        torch.testing.assert_close(result["model"][key], value, **CLOSE, msg=key)
    memory = reference.search.estimator.state_dict()
    assert set(result["memory"]) == set(memory)
    for key, value in memory.items():
        assert (value != 0).any(), key
        torch.testing.assert_close(result["memory"][key], value, **CLOSE, msg=key)
    drawn = reference.masks[0] if reference.shared else torch.cat(reference.masks)
    assert torch.equal(result["masks"], drawn)
    assert torch.equal(result["generator"], reference.generator.get_state())
    if not reference.shared:
        assert not torch.equal(*reference.masks)
    if reference.config.fixes_shapes:  # the reference draws its shapes
        assert any(float(metrics["unfit_steps"]) == 0 for metrics in result["metrics"])
    assert result["executed"] <= reference.executed  # a repeated mask runs once
    assert result["executed"] == reference.executed or reference.network.execution == "compact"


def test_all_that_ranks_have_alike_is_bit_equal(results):
    assert differences(results[0], results[1]) == []


def test_a_dense_network_takes_the_same_steps(results):
    """Without masks and with plain batch-norms; the merged statistics are the means of the two parts'."""
    run = ranks.dense_run()
    model = run.network.model
    for step in range(ranks.STEPS):
        parts = []
        images, labels = batch(ranks.BATCH_SIZE, seed=step)
        for number in range(ranks.RANKS):
            own, copied = ranks.part(number), copy.deepcopy(model)
            F.cross_entropy(copied(images[own]), labels[own]).backward()
            parts.append((len(labels[own]) / ranks.BATCH_SIZE, copied))
        for name, weight in model.named_parameters():
            weight.grad = sum(share * part.get_parameter(name).grad for share, part in parts)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(sum(share * part.get_buffer(name) for share, part in parts))
        run.weight_optimizer.param_groups[0]["lr"] = 0.05
        run.weight_optimizer.step()
    for key, value in model.state_dict().items():
        if "num_batches" not in key:
            torch.testing.assert_close(results[0]["dense"][key], value, **CLOSE, msg=key)


def test_evaluation_counts_every_image_once(results):
    for several, alone in zip(results[0]["evaluations"], ranks.evaluate_sets(), strict=True):
        assert (several["top1"], several["top5"]) == (alone["top1"], alone["top5"])
        assert several["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_a_rank_that_trains_another_network_is_named(results):
    assert "rank 1 differs from rank 0 after 3 steps in scores (1 of 2 tensors)" in results[0]["difference"]


def test_a_signal_of_one_rank_is_that_of_all(results):
    for result in results:
        assert result["signals"] == [15, 0]


def test_a_step_of_one_process_is_not_changed_by_any_of_this():
    """Weighting by numbers of images and dividing again would change last bits."""
    run, images_and_labels = ranks.dense_run(), batch(ranks.BATCH_SIZE)
    weight_step(run, *images_and_labels, StepSettings(0.0), config())
    copied = ranks.dense_run().network.model
    F.cross_entropy(copied(images_and_labels[0]), images_and_labels[1]).backward()
    for mine, plain in zip(run.network.weight_parameters(), copied.parameters(), strict=True):
        assert torch.equal(mine.grad, plain.grad)


# ---- whole programs ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    (folder / "tiny.yaml").write_text(f"{TINY}rank_masks: independent\n")
    return folder


@pytest.fixture(scope="module")
def codes(folder, tiny_images) -> list[dict[str, list[int]]]:
    """Exit codes of each rank in `ranks.programs`."""
    result = torchrun("-m", "tests.ranks.program", "programs", str(folder), str(tiny_images))
    assert result.returncode == 0, result.stderr
    assert "batch size 16: 2 ranks x 8, each with masks of its own" in result.stdout
    assert result.stdout.count("trained resnet8_he on ImageFolder: 5 epochs") == 3  # only rank 0 speaks
    return [torch.load(folder / f"rank{number}.pt", weights_only=True) for number in range(ranks.RANKS)]


def run_folder(folder: Path, name: str) -> Path:
    return folder / "runs/tiny" / name / "prune_rate=0.5"


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_resuming_ends_bit_equal(folder, codes):
    for number in range(ranks.RANKS):
        assert (codes[number]["whole"], codes[number]["parts"]) == ([0], [143, 130, 0])
    for file in ("checkpoints/last.pt", "checkpoints/best.pt"):
        whole, parts = (load(run_folder(folder, name) / file) for name in ("whole", "parts"))
        for state in (whole, parts):
            for key in ("config", "clocks", "history"):  # the last holds seconds
                state.pop(key, None)
            (state.get("best") or {}).pop("config", None)
        assert differences(whole, parts) == []
    assert [path.name for path in run_folder(folder, "parts").parent.iterdir()] == ["prune_rate=0.5"]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(folder, codes):
    assert codes[0]["mixed"] == [143, 143, 0]
    with open(run_folder(folder, "mixed") / "results.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "5"]
    summary = json.loads((run_folder(folder, "mixed") / "summary.json").read_text())
    assert summary["ranks"] == 2
    assert json.loads((run_folder(folder, "mixed") / "env.json").read_text())["ranks"] == 2
    commands = (run_folder(folder, "mixed") / "command.txt").read_text().splitlines()
    assert [line.startswith("torchrun --standalone --nproc_per_node 2 ") for line in commands] == [True, False, True]


@pytest.mark.slow
def test_every_method_keeps_the_ranks_alike(codes):
    """Ranks that differ at the end of an epoch end with exit code 4."""
    assert set(codes[0]["methods"]) == set(codes[1]["methods"]) == {0}
    assert len(codes[0]["methods"]) == len(METHODS)


@pytest.mark.slow
def test_a_rank_that_fails_ends_all_and_says_why(folder, tiny_images):
    """Started as `--multigpu` starts ranks."""
    become = (
        "import sys; from pathlib import Path; from utils.ranks import launch;"
        "launch.PROGRAM = Path('tests/ranks/program.py').resolve(); launch.become_torchrun(2, sys.argv[1:])"
    )
    result = start("-c", become, "fail", str(folder), str(tiny_images))
    assert result.returncode == 1
    assert result.stderr.count("ValueError: a mistake of rank 1 alone") == 1
    own = [line for line in result.stderr.splitlines() if line.startswith("rank ")]
    assert all(line.startswith("rank 0: error: rank 0 has lost the others") for line in own)  # if it had the time
