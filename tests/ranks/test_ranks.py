"""Two processes on the CPU against one that does the work of both, part by part; and how ranks start, stop and fail."""

from __future__ import annotations

import copy
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from utils.algorithm.estimator import subbatch_gradient, vrpge_gradient

import trainers.devices
import trainers.session
from args import Config, config_from_dict
from main import main
from tests.conftest import TINY
from tests.ranks import program as ranks
from tests.toy import batch, config, one_thread  # noqa: F401
from trainers.default import StepSettings, project_scores_, weight_step
from trainers.devices import check_ranks, find_device
from utils.algorithm.estimators import ESTIMATORS
from utils.algorithm.masks import sample_masks
from utils.channels.network import SparseNetwork
from utils.channels.shrink import stays_zero, store_only
from utils.errors import UserError
from utils.run.checkpoint import differences, load
from utils.run.metrics import CostLedger

PROJECT = Path(__file__).parents[2]
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def start(*command: str, timeout: float = 200) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
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
        self.state, self.config = ranks.search_state(name), ranks.case_config(name)
        self.network: SparseNetwork = self.state.network
        self.shared = self.config.sparsity.rank_masks == "shared"
        self.generator = torch.Generator().manual_seed(4)
        torch.rand(self.network.num_units, generator=self.generator, dtype=torch.float64)  # the scores of the case
        self.costs = CostLedger()
        self.draw()

    def draw(self) -> None:
        """The masks of each rank: drawn once for all, or one after the other."""
        sparsity = self.config.sparsity
        count = 1 + sparsity.subbatch if sparsity.subbatch else sparsity.K
        first = sample_masks(self.network.scores, self.generator, count)
        others = [first if self.shared else sample_masks(self.network.scores, self.generator, count)]
        self.masks = [first, *others]

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
        weights = [size / sum(sizes) for size in sizes]

        for name, buffer in self.buffers().items():
            kept = [(moved["buffers"][name] != before[name]) * size for moved, size in zip(parts, sizes, strict=True)]
            shift = sum(k * (moved["buffers"][name] - before[name]) for k, moved in zip(kept, parts, strict=True))
            buffer.copy_(before[name] + shift / sum(kept).clamp(min=1))
        for number, weight in enumerate(self.network.weight_parameters()):
            weight.grad = sum(w * each["gradients"][number] for w, each in zip(weights, parts, strict=True))
        losses = sum(w * each["losses"] for w, each in zip(weights, parts, strict=True))
        scores, differences = self.network.scores, [0.0, 0.0]
        scores.grad = None
        if settings.update_scores:
            seen = [losses, losses] if self.shared else [each["losses"] for each in parts]
            estimates = [self.estimate(s, m) for s, m in zip(seen, self.masks, strict=True)]
            scores.grad = sum(w * estimate for w, estimate in zip(weights, estimates, strict=True))
            differences = [self.difference(s) for s in seen]
            if self.state.memory is not None:
                gates = self.state.gate_reader.read(self.network.plan(self.masks[0][0].numpy()), len(labels))
                update = ESTIMATORS[self.config.sparsity.estimator].update
                self.state.memory = update(self.state.memory, self.masks[0], losses, gates)
        self.update(settings)
        self.draw()
        return {
            "loss": sum(size * float(each["loss"]) for size, each in zip(sizes, parts, strict=True)),
            "top1": sum(each["top1"] for each in parts),
            "loss_difference": sum(size * d for size, d in zip(sizes, differences, strict=True)),
        }

    def one_part(self, images: Tensor, labels: Tensor, masks: Tensor, update_scores: bool) -> dict[str, Any]:
        network, sparsity = self.network, self.config.sparsity
        plans = [network.plan(mask) for mask in masks.numpy()]
        network.clear_gradients()
        num_full = sparsity.K if update_scores and not sparsity.subbatch else sparsity.weight_samples
        losses, logits = [], []
        for k, plan in enumerate(plans[:num_full]):
            logits.append(network(images, plan, update_statistics=k < sparsity.weight_samples))
            losses.append(F.cross_entropy(logits[k], labels))
        (sum(losses[: sparsity.weight_samples]) / sparsity.weight_samples).backward()
        macs = [network.executed_macs(plan) for plan in plans[:num_full]]
        self.costs.executed += len(labels) * (sum(macs) + 2 * sum(macs[: sparsity.weight_samples]))
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in network.weight_parameters()]
        buffers = {name: buffer.clone() for name, buffer in self.buffers().items()}
        seen = torch.stack(losses).detach()
        if sparsity.subbatch:
            pairs = []
            pieces = [t.tensor_split(sparsity.subbatch) for t in (images, labels, logits[0])]
            for plan, x, y, own in zip(plans[1:], *pieces, strict=True):
                pairs.append(torch.stack([F.cross_entropy(own, y), F.cross_entropy(network(x, plan, False), y)]))
            seen = torch.stack(pairs).detach()
        top1 = int((logits[0].argmax(1) == labels).sum())
        return {"losses": seen, "gradients": gradients, "buffers": buffers, "loss": losses[0].detach(), "top1": top1}

    def estimate(self, losses: Tensor, masks: Tensor) -> Tensor:
        if self.state.memory is not None:
            estimator = ESTIMATORS[self.config.sparsity.estimator]
            arguments = (losses, self.config.sparsity.alpha, self.state.memory)
            return estimator.gradient(self.network.scores.detach(), masks, *arguments)
        gradient = subbatch_gradient if self.config.sparsity.subbatch else vrpge_gradient
        return gradient(self.network.scores.detach(), masks, losses, self.config.sparsity.alpha)

    def difference(self, losses: Tensor) -> float:
        if self.config.sparsity.subbatch:
            return float((losses[:, 0] - losses[:, 1]).abs().mean())
        return float((losses[0] - losses[1]).abs())

    def update(self, settings: StepSettings) -> None:
        state, network, norm = self.state, self.network, self.config.train.clip_norm
        weights = network.weight_parameters()
        groups = [[*weights, network.scores]] if self.config.train.clip_jointly else [weights, [network.scores]]
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group, norm)
        for optimizer, rate in (
            (state.weight_optimizer, settings.weight_lr),
            (state.score_optimizer, settings.score_lr),
        ):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        project_scores_(network, settings.kept_fraction, by_layer=False)


@pytest.mark.parametrize("name", ranks.CASES)
def test_two_ranks_take_the_steps_of_one_process_that_does_both_parts(results, name):
    reference = Reference(name)
    num_cut = None
    for step in range(ranks.STEPS):
        images, labels = batch(ranks.BATCH_SIZE, seed=step)
        metrics = reference.step(images, labels, ranks.settings_of(step, reference.config))
        for key, value in metrics.items():
            assert float(results[0]["cases"][name]["metrics"][step][key]) == pytest.approx(value, rel=1e-9), (step, key)
        if step == ranks.RETIRE_AFTER and reference.network.execution == "compact":
            gone = stays_zero(reference.network.scores, reference.state.score_optimizer).numpy()
            num_cut = store_only(reference.network, ~gone, reference.state.weight_optimizer)
    assert num_cut != 0, "units should retire in this test"
    result = results[0]["cases"][name]
    for key, value in reference.network.model.state_dict().items():
        torch.testing.assert_close(result["model"][key], value, **CLOSE, msg=key)
    memory = {} if reference.state.memory is None else vars(reference.state.memory)
    assert set(result["memory"]) == set(memory)
    for key, value in memory.items():
        assert (value != 0).any(), key
        torch.testing.assert_close(result["memory"][key], value, **CLOSE, msg=key)
    drawn = reference.masks[0] if reference.shared else torch.cat(reference.masks)
    assert torch.equal(result["masks"], drawn)
    if not reference.shared:
        assert not torch.equal(*reference.masks)
    assert result["executed"] <= reference.costs.executed  # a repeated mask runs once
    assert result["executed"] == reference.costs.executed or "masked" not in name


def test_all_that_ranks_have_alike_is_bit_equal(results):
    assert differences(results[0], results[1]) == []


def test_a_dense_network_takes_the_same_steps(results):
    """Without masks and with plain batch-norms; the merged statistics are the means of the two parts'."""
    network = ranks.dense_network()
    optimizer = torch.optim.SGD(network.weight_parameters(), lr=9.0, momentum=0.9)
    for step in range(ranks.STEPS):
        parts = []
        images, labels = batch(ranks.BATCH_SIZE, seed=step)
        for number in range(ranks.RANKS):
            own, copied = ranks.part(number), copy.deepcopy(network)
            F.cross_entropy(copied.model(images[own]), labels[own]).backward()
            parts.append((len(labels[own]) / ranks.BATCH_SIZE, copied.model))
        for name, weight in network.model.named_parameters():
            weight.grad = sum(share * model.get_parameter(name).grad for share, model in parts)
        for name, buffer in network.model.named_buffers():
            if "running" in name:
                buffer.copy_(sum(share * model.get_buffer(name) for share, model in parts))
        optimizer.param_groups[0]["lr"] = 0.05
        optimizer.step()
    for key, value in network.model.state_dict().items():
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
        assert result["signals"] == [15, None]


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
    assert result.stdout.count("trained resnet20_he on ImageFolder: 5 epochs") == 3  # only rank 0 speaks
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
            state.pop("config")
            state.pop("clocks", None)
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


def test_a_rank_that_fails_ends_all_and_says_why_once(folder, tiny_images):
    begin = time.monotonic()
    result = torchrun("-m", "tests.ranks.program", "fail", str(folder), str(tiny_images))
    assert result.returncode == 1
    assert time.monotonic() - begin < 60
    assert result.stderr.count("ValueError: a mistake of rank 1 alone") == 1
    assert "lost the others" not in result.stderr


def test_a_mistake_of_the_user_stays_one_sentence_and_exit_code_2():
    launch = "import sys; from utils.ranks.launch import launch; sys.exit(launch(2, sys.argv[1:]))"
    result = start("-c", launch, "--device", "cpu", "--batch-size", "3")
    assert result.returncode == 2
    assert result.stderr == (
        "error: batch_size 3 is the total of 2 processes and leaves less than the 2 images for each that batch-norm "
        "needs; pass at least 4\n"
    )


# ---- starting ----


@pytest.fixture
def two_gpus(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def second_of_two(monkeypatch) -> Iterator[None]:
    place = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for key, value in place.items():
        monkeypatch.setenv(key, value)


def devices(**options: object) -> Config:
    return config_from_dict(options, "test")


@pytest.mark.usefixtures("two_gpus")
def test_several_gpus_start_a_process_for_each(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(trainers.session, "launch", lambda *arguments: started.append(arguments) or 0)
    options = ["--multigpu", "0,1", "--log-dir", str(tmp_path)]
    assert main(options) == 0
    assert started == [(2, options)]


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_not_there_is_refused_before_anything_starts(capsys):
    assert main(["--multigpu", "1,2"]) == 2
    assert "device cuda:2 does not exist, this machine has 2" in capsys.readouterr().err


@pytest.mark.usefixtures("two_gpus", "second_of_two")
@pytest.mark.parametrize(
    ("options", "device"),
    [({}, "cuda:1"), ({"device": "cuda"}, "cuda:1"), ({"device": "cpu"}, "cpu"), ({"multigpu": "1,0"}, "cuda:0")],
)
def test_every_rank_gets_its_own_gpu(options, device):
    assert find_device(devices(**options)) == torch.device(device)


@pytest.mark.usefixtures("two_gpus", "second_of_two")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:0"}, "--device cuda:0 is one GPU, but torchrun has started 2 processes on this machine"),
        ({"multigpu": "0"}, "--multigpu 0 names 1 GPUs, but torchrun has started 2 processes on this machine"),
    ],
)
def test_ranks_do_not_share_a_gpu(options, message):
    with pytest.raises(UserError, match=message):
        find_device(devices(**options))


def test_variables_of_a_cluster_alone_start_no_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert find_device(devices(device="cpu")) == torch.device("cpu")
    assert trainers.session.num_ranks() == 1


@pytest.mark.parametrize("key", ["rank_masks", "sync_bn"])
def test_what_only_several_processes_read_is_refused_for_one(key):
    with pytest.raises(UserError, match="there is a single process; start several"):
        check_ranks(Config(), ranks.CPU, [key])
    check_ranks(Config(), ranks.CPU, ["seed"])
    check_ranks(devices(multigpu="0,1"), ranks.CPU, [key])  # asked for two, fell back to the CPU


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5}, "batch_size 5 is the total of 3 processes and leaves less than the 2 images"),
        ({"finetune_batch_size": 5}, "finetune_batch_size 5 is the total"),
        ({"batch_size": 12, "subbatch": 3}, "subbatch 3 leaves parts of less than two images of the 4 that each of 3"),
        ({"batch_size": 11, "gauge_every": 5}, "gauge_every 5 halves the 3 images that each of 3 processes has"),
        ({"sync_bn": True, "batch_size": 255, "finetune_batch_size": 255}, "sync_bn needs GPUs"),
        ({"sync_bn": True}, "sync_bn needs parts of equal size, but batch_size 256 is shared by 3 processes"),
    ],
)
def test_what_does_not_go_with_the_number_of_ranks_is_refused(monkeypatch, options, message):
    monkeypatch.setattr(trainers.devices, "num_ranks", lambda: 3)
    with pytest.raises(UserError, match=message):
        check_ranks(devices(**options), ranks.CPU, [])


def test_a_step_of_one_process_is_not_changed_by_any_of_this():
    """Weighting by numbers of images and dividing again would change last bits."""
    network = ranks.dense_network()
    images, labels = batch(ranks.BATCH_SIZE)
    optimizer = torch.optim.SGD(network.weight_parameters(), lr=0.0)
    weight_step(network, optimizer, network.dense_plan, images, labels, StepSettings(0.0), config())
    copied = ranks.dense_network()
    F.cross_entropy(copied.model(images), labels).backward()
    for mine, plain in zip(network.weight_parameters(), copied.weight_parameters(), strict=True):
        assert torch.equal(mine.grad, plain.grad)
