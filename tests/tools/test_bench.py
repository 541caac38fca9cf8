"""The bench: its three networks compute what it says they do. How fast they are is never asserted."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.toy import one_thread  # noqa: F401  (a fixture)
from tools import bench
from tools.thin import ThinNetwork, add_to_first_channels
from trainers.default import StepSettings, train_step
from trainers.state import new_run
from utils.channels.network import SparseNetwork
from utils.conv_type import PlainConv
from utils.run import checkpoint

PROJECT = Path(__file__).parents[2]
CPU = torch.device("cpu")
KEYS = {
    *("arch", "keep_ratio", "batch_size", "precision", "device", "stream", "scores"),
    *("dense_ms", "thin_ms", "compact_ms", "dense_over_compact", "compact_over_thin", "dense_over_thin", "ideal"),
    *("flops_ratio", "padded_flops_ratio", "dense_peak_mb", "thin_peak_mb", "compact_peak_mb"),
}


def make_case(**changes) -> bench.Case:
    values = {key: option.default for key, option in bench.OPTIONS.items()}
    values |= {"device": "cpu", "width_mult": 0.0625, "batch_size": 8}
    return bench.make_case(**values | changes)


def double_network(arch: str, stream: str = "free") -> SparseNetwork:
    """A tiny network in float64, with batch-norms whose scale, shift and statistics are not those of the start."""
    case = make_case(arch=arch, stream=stream)
    network = new_run(case.config, case.shapes, CPU).network
    network.model.double()
    generator = torch.Generator().manual_seed(3)
    for norm in network.batch_norms().values():
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return network


def random_mask(network: SparseNetwork, seed: int, first_channels: bool, empty: str | None) -> np.ndarray:
    """Random units of every layer; `first_channels`: a random number of its first ones."""
    random = np.random.default_rng(seed)
    mask_U = np.zeros(network.num_units, dtype=bool)
    for name, part in zip(network.layers, network.split(torch.arange(network.num_units)), strict=True):
        count = 0 if name == empty else random.integers(1, len(part) + 1)
        kept = part.numpy() if first_channels else random.permutation(part.numpy())
        mask_U[kept[:count]] = True
    return mask_U


def copy_live(network: SparseNetwork, plan, thin: ThinNetwork) -> None:
    """Every tensor of the thin network from the live channels of the full one's."""
    graph = network.graph
    for position, op in enumerate(graph.ops):
        if str(position) not in thin.layers:
            continue
        reads, writes = (np.flatnonzero(plan.live[space]) for space in (graph.ops[op.inputs[0]].space, op.space))
        layer = thin.layers[str(position)]
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            full = getattr(op.module, name).detach()
            if tensor.dim() == 0:
                continue
            full = full[writes]
            tensor.data.copy_(full[:, reads] if tensor.dim() > 1 else full)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("arch", "stream", "empty"),
    [
        ("vgg16", "free", None),
        ("resnet20", "free", None),
        ("resnet20", "free", "layer1.1.conv1"),
        ("resnet20", "free", "layer2.1.conv2"),
        ("resnet20", "tied", None),
        ("wrn28_10", "free", "layer1.2.conv2"),
    ],
)
def test_thin_computes_the_sampled_network(arch, stream, empty, training):
    network = double_network(arch, stream)
    # a thin network has no channel lists, so in a residual stream it can only stand for first channels
    plan = network.plan(random_mask(network, 5, first_channels=arch != "vgg16" and stream == "free", empty=empty))
    assert (0 in plan.counts) == (empty is not None)
    thin = ThinNetwork(network.graph, plan.counts).double()
    copy_live(network, plan, thin)
    thin.train(training)
    network.model.train(training)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(thin(images), network(images, plan), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("x", "y", "width"), [(5, 5, 5), (5, 3, 5), (3, 5, 5), (3, 5, 7), (4, 4, 6)])
def test_addition_of_different_widths_pads_with_zero_channels(x, y, width):
    x, y = (torch.randn(2, n, 3, 3, dtype=torch.float64, requires_grad=True) for n in (x, y))
    expected = sum(F.pad(part, (0, 0, 0, 0, 0, width - part.shape[1])) for part in (x, y))
    total = add_to_first_channels(x, y, width)
    assert torch.equal(total, expected)
    assert torch.autograd.gradcheck(lambda a, b: add_to_first_channels(a, b, width), (x, y))


def test_thin_rounds_its_widths_up_but_not_beyond_the_full_network():
    network = double_network("vgg16")
    graph = network.graph
    counts = [min(3, space.width) for space in graph.spaces]
    for rounding in (1, 8, 16, 32):
        widths = bench.rounded_widths(network, counts, rounding)
        expected = [min({1: 3, 8: 8, 16: 16, 32: 32}[rounding], space.width) for space in graph.spaces]
        assert widths == expected


@pytest.mark.parametrize(("score_every", "subbatch", "forwards"), [(1, 0, 2), (3, 0, 4), (1, 4, 2), (3, 4, 4)])
def test_thin_runs_as_many_forwards_as_compact_and_one_backward_a_step(score_every, subbatch, forwards, monkeypatch):
    case = make_case(arch="resnet20", score_every=score_every, subbatch=subbatch)
    trial = bench.Bench(case, CPU)
    network = trial.search().network
    thin, step = trial.thin(network, trial.typical_counts(network), 1)
    calls = []
    thin.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    before = copy.deepcopy(thin.state_dict())
    step()
    assert len(calls) == forwards
    assert sum(calls) == score_every
    assert all(not torch.equal(before[name], value) for name, value in thin.named_parameters() if value.dim() > 1)

    search, executed = trial.search(), []
    images, run = [], SparseNetwork.__call__
    monkeypatch.setattr(SparseNetwork, "__call__", lambda self, x, *rest, **by_name: (
        images.append(len(x)) or run(self, x, *rest, **by_name)
    ))  # fmt: skip
    trial.compact(search, executed)()
    assert sum(images) == forwards * case.config.train.batch_size
    assert len(executed) == forwards - (subbatch > 0)


def test_dense_is_the_plain_network():
    network, step = bench.Bench(make_case(arch="resnet20"), CPU).dense()
    assert network.num_units == 0
    convs = [module for module in network.model.modules() if isinstance(module, nn.Conv2d)]
    assert {type(conv) for conv in convs} == {nn.Conv2d, PlainConv}
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs)
    before = copy.deepcopy(network.model.state_dict())
    step()
    assert all(
        not torch.equal(before[name], value) for name, value in network.model.named_parameters() if value.dim() > 1
    )


def test_compact_is_the_training_step():
    case = make_case(arch="resnet20", keep_ratio=0.5)
    trial = bench.Bench(case, CPU)
    search, twin = trial.search(), trial.search()
    executed = []
    step = trial.compact(search, executed)
    for _ in range(2):
        step()
        settings = StepSettings(case.config.train.weight_lr, score_lr=0.0, kept_fraction=0.5)
        train_step(twin, trial.images, trial.labels, settings, case.config)
    same = checkpoint.differences(search.network.model.state_dict(), twin.network.model.state_dict())
    assert same == []
    assert (search.network.scores == 0.5).all()
    masks = [plan.mask_U.tobytes() for plan in executed]
    assert len(set(masks)) == len(masks) == 4


@pytest.mark.parametrize("keep_ratio", [0.125, 0.25, 0.5, 0.9])
def test_late_scores(keep_ratio):
    sizes = [64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    scores_U = bench.late_scores(sizes, keep_ratio)
    budget = keep_ratio * sum(sizes)
    working_set = min(round(1.15 * budget), sum(sizes))
    live = scores_U[scores_U > 0]
    assert len(scores_U) == sum(sizes)
    assert len(live) == working_set
    assert scores_U.double().sum().item() == pytest.approx(budget, abs=1e-3)
    assert (live > 0.95).double().mean().item() == pytest.approx(0.8, abs=1e-3)
    assert (live <= 1).all()
    for part, size in zip(scores_U.split(sizes), sizes, strict=True):
        assert int((part > 0).sum()) == pytest.approx(size * working_set / sum(sizes), abs=1)
    assert torch.equal(scores_U, bench.late_scores(sizes, keep_ratio))


def test_late_scores_reach_every_layer_of_a_tiny_network():
    scores_U = bench.late_scores([1, 1, 2, 40, 40], 0.1)
    assert all((part > 0).any() for part in scores_U.split([1, 1, 2, 40, 40]))
    assert int((scores_U > 0).sum()) == round(1.15 * 8.4)


def test_late_units_leave_the_network_and_the_scores_stay():
    trial = bench.Bench(make_case(arch="resnet20", scores="late"), CPU)
    search = trial.search()
    scores_U = search.network.scores.detach().clone()
    before = sum(weight.numel() for weight in search.network.weight_parameters())
    step = trial.compact(search, [])
    step()
    assert sum(weight.numel() for weight in search.network.weight_parameters()) < before
    torch.testing.assert_close(search.network.scores.detach(), scores_U, rtol=0, atol=1e-6)
    assert torch.equal(search.network.scores == 0, scores_U == 0)


@pytest.fixture
def run_checkpoint(tmp_path) -> tuple[Path, torch.Tensor]:
    """A checkpoint file of a run with scores that tell units apart."""
    case = make_case(arch="resnet20_he", keep_ratio=0.75, width_mult=0.125)
    run = new_run(case.config, case.shapes, CPU)
    scores_U = torch.rand(run.network.num_units, generator=torch.Generator().manual_seed(0)) * 0.5
    run.network.scores.data.copy_(scores_U)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    checkpoint.save(folder / "last.pt", run.state_dict(case.config, "fingerprint"))
    return folder / "last.pt", scores_U


def test_scores_of_a_checkpoint_bring_their_network(run_checkpoint):
    file, scores_U = run_checkpoint
    arguments = bench.read_command_line(["--scores", str(file), "--device", "cpu", "--batch-size", "4", "8"])
    cases = bench.cases_of(arguments)
    assert [case.config.train.batch_size for case in cases] == [4, 8]
    config = cases[0].config
    assert (config.model.arch, config.model.width_mult, config.sparsity.keep_ratio) == ("resnet20_he", 0.125, 0.75)
    assert torch.equal(bench.Bench(cases[0], CPU).search().network.scores.detach(), scores_U)
    again = bench.cases_of(bench.read_command_line(bench.as_arguments(cases[1])))
    assert again == [cases[1]]


def test_every_combination_is_a_case_and_comes_back_from_its_own_command_line():
    words = "--arch vgg16 resnet20 --keep-ratio 0.5 0.25 0.5 --scores uniform late --precision bf16 --score-every 1 2"
    cases = bench.cases_of(bench.read_command_line(words.split()))
    assert len(cases) == 16
    for case in cases:
        assert bench.cases_of(bench.read_command_line(bench.as_arguments(case))) == [case]


def run_bench(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.bench", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment)


def test_the_last_line_is_json_with_every_figure():
    words = "--arch vgg16 --repeats 1 --width-mult 0.0625 --batch-size 8 --no-memory --device cpu --scores uniform late"
    result = run_bench(*words.split())
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    rows = json.loads(lines[-1])
    assert [row["scores"] for row in rows] == ["uniform", "late"]
    assert torch.__version__ in lines[0]
    for row in rows:
        assert set(row) >= KEYS
        assert row["dense_over_compact"] == pytest.approx(row["dense_ms"] / row["compact_ms"])
        assert row["compact_over_thin"] == pytest.approx(row["compact_ms"] / row["thin_ms"])
        assert row["dense_over_thin"] == pytest.approx(row["dense_ms"] / row["thin_ms"])
        assert row["ideal"] == pytest.approx(3 / (4 * row["flops_ratio"]))
        assert 0.15 < row["flops_ratio"] < 0.4
        assert row["flops_ratio"] <= row["padded_flops_ratio"] <= 1
        assert row["dense_peak_mb"] is row["thin_peak_mb"] is row["compact_peak_mb"] is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of a process is read from /proc")
def test_peak_memory_is_that_of_the_measured_process_alone():
    held = torch.ones(300_000_000 // 4)  # what the parent holds must not count
    case = make_case(arch="resnet20_he", width_mult=0.25)
    result = run_bench(*bench.as_arguments(case), "--peak", "compact")
    assert result.returncode == 0, result.stderr
    peak = json.loads(result.stdout.splitlines()[-1])
    assert peak["baseline_mb"] < peak["peak_mb"] < peak["baseline_mb"] + held.nbytes / 2**20


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--arch vgg17", "did you mean 'vgg1"),
        ("--keep-ratio 0.5 50", "fraction, not a percentage"),
        ("--batch-size one", "batch_size must be a whole number"),
        ("--precision fp16", "precision must be one of fp32, bf16"),
        ("--repeats 0", "repeats must be in [1, 10000]"),
        ("--stream loose", "stream must be one of free, tied"),
        ("--score-every 0", "score_every must be at least 1"),
        ("--input-size 4", "input_size must be in [8, 512]"),
        ("--arch vgg16 --input-size 16 --width-mult 0.0625", "use larger images"),
        ("--scores middle", "middle does not exist"),
        ("--colour red", "--help lists every option"),
        ("--keep-ratio 0.99 --scores late --width-mult 0.0625", "does not go with --scores late"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(words, part, capsys):
    assert bench.main([*words.split(), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert part in error


def test_options_that_a_checkpoint_decides_are_refused_beside_it(run_checkpoint, capsys):
    assert bench.main(["--scores", str(run_checkpoint[0]), "--arch", "vgg16"]) == 2
    assert "--arch" in capsys.readouterr().err
