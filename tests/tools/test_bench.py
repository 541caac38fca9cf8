"""The bench: its three networks compute what it says they do. How fast they are is never asserted."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from args import parse_args
from tests.tools.benches import CPU, SHAPES, SMALL, bench_of
from tests.toy import one_thread  # noqa: F401  (a fixture)
from tools import bench, bench_measures, bench_scores
from trainers.build import new_run
from trainers.default import StepSettings, draw_masks, train_step
from utils.channels import network as network_module
from utils.channels.network import SparseNetwork
from utils.conv_type import PlainConv
from utils.run import checkpoint


@pytest.fixture
def passes(monkeypatch) -> list[tuple[SparseNetwork, bool]]:
    """Every forward pass of any network: which one, and whether it kept a graph."""
    seen, forward = [], SparseNetwork.__call__

    def watched(self, *arguments, **by_name):
        seen.append((self, torch.is_grad_enabled()))
        return forward(self, *arguments, **by_name)

    monkeypatch.setattr(SparseNetwork, "__call__", watched)
    return seen


# ---- the networks ----


@pytest.mark.parametrize("scores", ["uniform", "late"])
def test_thin_is_the_network_that_method_thin_builds_from_the_flops_of_a_typical_draw(scores):
    trial = bench_of("--keep-ratio", "0.4", "--scores", scores, "--execution", "masked", "--constrain-by-layer")
    thin = trial.build("thin")
    run, costs = thin.run, thin.costs
    generator = torch.Generator().manual_seed(0)
    masked = trial.masked_run().network
    drawn = torch.rand(9, masked.num_units, generator=generator) < masked.scores
    flops = sorted(masked.subnet_macs(masked.plan(mask_U.numpy())) / masked.dense_macs for mask_U in drawn)[4]
    assert trial.typical_flops() == pytest.approx(flops, rel=1e-12)

    words = ("--method", "thin", "--budget", "flops", "--keep-ratio", repr(flops))
    trained = new_run(parse_args([*SMALL, *words]).config, SHAPES, CPU)
    assert checkpoint.differences(run.network.model.state_dict(), trained.network.model.state_dict()) == []
    assert np.array_equal(run.plan.mask_U, trained.plan.mask_U)
    assert 0.9 * flops < costs[0][0] / run.network.dense_macs <= flops


@pytest.mark.parametrize(
    ("words", "forwards", "backwards"),
    [("", 2, 1), ("--K 3 --score-every 3", 3 + 1 + 1, 3), ("--estimator taylor", 1, 1), ("--method gumbel", 1, 1)],
)
def test_thin_runs_as_many_forwards_as_compact_and_one_backward_a_step(words, forwards, backwards, passes):
    trial = bench_of(*words.split())
    compact, thin_network = trial.build("compact"), trial.build("thin")
    thin, costs = thin_network.run, compact.costs
    before = copy.deepcopy(thin.network.model.state_dict())
    compact.step()
    if "gumbel" not in words:  # which runs the model itself
        assert [owner for owner, _ in passes] == [compact.run.network] * forwards
    assert len(costs) == forwards
    passes.clear()
    thin_network.step()
    assert [owner for owner, _ in passes] == [thin.network] * forwards
    assert sum(graph for _, graph in passes) == backwards
    weights = [(name, w) for name, w in thin.network.model.named_parameters() if w.dim() > 1 and w.requires_grad]
    assert all(not torch.equal(before[name], weight) for name, weight in weights)


def test_dense_is_the_plain_network_and_runs_once_a_step(passes):
    trial = bench_of("--score-every", "2")
    dense = trial.build("dense")
    run, step, costs = dense.run, dense.step, dense.costs
    assert run.network.num_units == 0
    convs = [module for module in run.network.model.modules() if isinstance(module, nn.Conv2d)]
    assert {type(conv) for conv in convs} == {nn.Conv2d, PlainConv}
    assert costs == [(run.network.dense_macs, run.network.dense_macs)]
    before = copy.deepcopy(run.network.model.state_dict())
    trial.build("compact").step()
    passes.clear()
    step()
    assert passes == [(run.network, True)] * 2
    weights = [(name, weight) for name, weight in run.network.model.named_parameters() if weight.dim() > 1]
    assert all(not torch.equal(before[name], weight) for name, weight in weights)


@pytest.mark.parametrize("words", [("--score-every", "2"), ("--budget", "flops", "--score-gradient", "tangent")])
def test_compact_is_the_training_step_from_the_same_scores_every_time(words):
    trial = bench_of(*words, "--keep-ratio", "0.5", "--score-lr", "0.05")
    compact = trial.build("compact")
    run, step = compact.run, compact.step
    twin = new_run(trial.config, SHAPES, CPU).search
    start_U, masks = twin.network.scores.detach().clone(), []
    assert torch.equal(run.network.scores, start_U)
    twin.masks = draw_masks(twin, trial.config)
    for _ in range(2):
        step()
        for i in range(trial.period):
            masks.append(twin.masks.own_KU)
            twin.network.scores.data.copy_(start_U)
            now = StepSettings(trial.config.train.weight_lr, 0.05, 0.5, update_scores=i == 0)
            train_step(twin, trial.images, trial.labels, now, trial.config)
    assert checkpoint.differences(run.network.model.state_dict(), twin.network.model.state_dict()) == []
    assert torch.equal(run.search.masks.own_KU, twin.masks.own_KU)
    assert len(torch.cat(masks).unique(dim=0)) == 4 * trial.period


@pytest.mark.parametrize("multiple", [1, 8])
def test_the_flops_of_all_passes_are_those_that_pytorch_counts(multiple, monkeypatch):
    monkeypatch.setattr(network_module, "preferred_multiple", lambda _: multiple)
    trial = bench_of("--keep-ratio", "0.3")
    counted, forward = {}, SparseNetwork.__call__

    def counting(self, *arguments, **by_name):
        with FlopCounterMode(display=False) as counter:
            logits = forward(self, *arguments, **by_name)
        counted.setdefault(self, []).append(counter.get_total_flops() / 2 / len(trial.labels))
        return logits

    monkeypatch.setattr(SparseNetwork, "__call__", counting)
    for name in bench.NETWORKS:
        network = trial.build(name)
        run, costs = network.run, network.costs
        network.step()
        executed = [padded for _, padded in costs] if multiple > 1 else [exact for exact, _ in costs]
        assert counted.pop(run.network)[: len(costs)] == executed
        assert name == "dense" or multiple == 1 or all(exact < padded for exact, padded in costs)


# ---- scores ----


@pytest.mark.parametrize("keep_ratio", [0.125, 0.25, 0.5, 0.9])
def test_late_scores(keep_ratio):
    sizes = [64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    scores_U = bench_scores.late_scores(sizes, keep_ratio)
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
    assert torch.equal(scores_U, bench_scores.late_scores(sizes, keep_ratio))


def test_late_scores_reach_every_layer_of_a_tiny_network():
    scores_U = bench_scores.late_scores([1, 1, 2, 40, 40], 0.1)
    assert all((part > 0).any() for part in scores_U.split([1, 1, 2, 40, 40]))
    assert scores_U.sum().item() == pytest.approx(8.4)


@pytest.mark.parametrize("scores", ["uniform", "late"])
@pytest.mark.parametrize(
    "words", [(), ("--budget", "flops"), ("--budget-schedule", "cubic"), ("--constrain-by-layer",)]
)
def test_made_scores_keep_the_final_budget(scores, words):
    run = bench_of("--keep-ratio", "0.4", "--scores", scores, *words).masked_run()
    if "flops" in words:
        kept = run.budget.cost(run.network.scores.numpy()) / run.budget.cost.dense
    else:
        kept = max(float(run.network.scores[group].mean()) for group in run.budget.groups)
    assert kept == pytest.approx(bench_scores.spent(run.budget))
    assert 0.3 < kept <= 0.4 + 1e-6
    assert scores == "late" or kept == pytest.approx(0.4, rel=1e-5)


def test_late_units_leave_the_network_before_the_first_step():
    trial = bench_of("--scores", "late")
    run = trial.masked_run()
    whole = new_run(trial.config, SHAPES, CPU)
    num_weights = [sum(w.numel() for w in r.network.weight_parameters()) for r in (run, whole)]
    assert num_weights[0] < num_weights[1]
    assert (run.network.scores[torch.from_numpy(~run.network.stored_units)] == 0).all()
    compact = trial.build("compact")
    compact.step()
    assert len(compact.costs) == 2


@pytest.fixture
def stored_run(tmp_path) -> tuple[Path, torch.Tensor]:
    """A run folder whose scores tell units apart and hold more than the final budget."""
    words = "--arch resnet20_he --width-mult 0.125 --keep-ratio 0.25 --budget-schedule cubic --residual-masks tied"
    config = parse_args(words.split()).config
    run = new_run(config, SHAPES, CPU)
    scores_U = torch.rand(run.network.num_units, generator=torch.Generator().manual_seed(0))
    run.network.scores.data.copy_(scores_U)
    (tmp_path / "checkpoints").mkdir()
    checkpoint.save(tmp_path / "checkpoints" / "last.pt", run.state_dict(config, SHAPES))
    return tmp_path, scores_U


def test_scores_of_a_run_bring_its_configuration(stored_run):
    folder, scores_U = stored_run
    settings, config = bench.read_command_line(["--scores", str(folder), "--batch-size", "6", "--device", "cpu"])
    assert (config.model.arch, config.model.width_mult, config.sparsity.keep_ratio) == ("resnet20_he", 0.125, 0.25)
    assert (config.sparsity.residual_masks, config.train.batch_size) == ("tied", 6)
    trial = bench.Bench(config, SHAPES, settings.scores, CPU)
    compact = trial.build("compact")
    run = compact.run
    assert torch.equal(run.network.scores.detach(), scores_U)
    compact.step()  # the projection must not take back what the falling budget still allows
    assert run.network.scores.double().mean().item() == pytest.approx(scores_U.double().mean().item(), abs=0.02)


@pytest.mark.parametrize("name", ["compact", "thin"])
def test_multiple_is_what_kept_channels_are_padded_to(name):
    run = bench_of("--multiple", "3", "--keep-ratio", "0.4").build(name).run
    network = run.network
    plan = network.plan(np.arange(network.num_units) % 3 == 0) if name == "compact" else run.plan
    maskable = [space for space in range(len(plan.widths)) if not network.graph.spaces[space].full]
    assert all(plan.widths[i] % 3 == 0 or plan.widths[i] == network.graph.spaces[i].width for i in maskable)
    assert any(plan.widths[i] > plan.counts[i] for i in maskable)


# ---- figures ----


def test_steps_are_timed_in_turn_after_warm_up():
    ran = []
    steps = {name: (lambda name=name: ran.append(name)) for name in ("a", "b", "c")}
    times = bench_measures.interleaved_times(steps, 4, CPU, warm_up=2)
    assert ran == ["a", "b", "c"] * (2 + 4)
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_the_last_line_is_json_with_every_figure_and_the_table_shows_it(capsys, monkeypatch):
    seconds = {"dense": [0.8, 0.4, 0.7, 1.1, 0.2], "compact": [0.3] * 5, "thin": [0.2] * 5}

    def made_up(steps, repeats, device, warm_up):
        assert (list(steps), repeats, warm_up) == (["dense", "compact", "thin"], 5, 3)
        for step in steps.values():
            step()
        return {
            name: [bench_measures.StepTime(total, total / 4, total / 2) for total in values]
            for name, values in seconds.items()
        }

    monkeypatch.setattr(bench, "interleaved_times", made_up)
    words = "--repeats 5 --warm-up 3 --multiple 4 --no-memory --score-every 2 --keep-ratio 0.3"
    words += " --input-size 16 --num-classes 3"
    assert bench.main([*SMALL, *words.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    rows = figures["networks"]
    assert [rows["dense"]["ms"], *rows["dense"]["ms_quartiles"]] == pytest.approx([350, 200, 400])
    assert (rows["dense"]["mean_ms"], rows["dense"]["host_ms"]) == pytest.approx((320, 350 / 4))
    assert rows["compact"]["images_per_second"] == pytest.approx(4 * 2 / 0.3)
    assert figures["dense/compact"] == pytest.approx(350 / 150)
    assert figures["compact/thin"] == pytest.approx(1.5)
    assert figures["dense/thin"] == pytest.approx(3.5)
    r = rows["compact"]["flops_ratio"]
    assert figures["ideal dense/compact, 3/(4r)"] == pytest.approx(3 / (4 * r))
    assert 0.05 < r < rows["compact"]["padded_flops_ratio"] <= 1 == rows["dense"]["flops_ratio"]
    assert rows["thin"]["flops_ratio"] == pytest.approx(r, rel=0.5)
    assert (figures["config"]["keep_ratio"], figures["input_size"], figures["num_classes"]) == (0.3, 16, 3)
    assert torch.__version__ in lines[0]
    assert rows["dense"]["device_ms"] == pytest.approx(350 / 2)
    table = {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}
    assert f"| 150.0 (150.0-150.0) | 150.0 | 37.5 |   75.0 |       27 | {r:.4f} |" in table["compact, shapes drawn"]
    assert "of 5 interleaved steps after 3 that do not count" in " ".join(lines)
    assert (figures["warm_up"], figures["multiple"]) == (3, 4)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of a process is read from /proc")
def test_peak_memory_is_that_of_a_process_of_its_own(capsys):
    held = torch.ones(300_000_000 // 4)  # what this process holds must not count
    peak = bench_measures.peak_of_process([*SMALL, "--no-memory"], "compact")
    assert 0 < peak["peak_mb"] - peak["baseline_mb"] < held.nbytes / 2**20


def test_a_config_file_is_read_as_main_reads_it(tmp_path):
    (tmp_path / "own.yaml").write_text("arch: vgg16\nkeep_ratio: 0.2\nK: 3\n")
    words = ["--config", str(tmp_path / "own.yaml"), "--keep-ratio", "0.3", "--repeats", "3"]
    settings, config = bench.read_command_line(words)
    assert config == parse_args([word for word in words if word not in ("--repeats", "3")]).config
    assert (config.model.arch, config.sparsity.keep_ratio, config.sparsity.K, settings.repeats) == ("vgg16", 0.3, 3, 3)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--arch vgg17", "did you mean 'vgg1"),
        ("--keep-ratio 50", "fraction, not a percentage"),
        ("--repeats 0", "--repeats: must be a whole number from 1 to 10000, got '0'"),
        ("--input-size 4", "--input-size: must be a whole number from 8 to 512"),
        ("--arch vgg16 --input-size 16 --width-mult 0.0625", "use larger images"),
        ("--scores middle", "middle does not exist"),
        ("--colour red", "--colour"),
        ("--method thin", "method thin has no scores"),
        ("--batch-size auto", "batch_size is auto, which depends on the number of training images, and the bench"),
        ("--resume somewhere", "pass --scores RUN"),
        ("--keep-ratio 0.99 --scores late --width-mult 0.0625", "do not go with --scores late"),
        ("--scores RUN --arch vgg16", "do not fit layer"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(words, part, stored_run, capsys):
    words = words.replace("RUN", str(stored_run[0])).split()
    assert bench.main([*words, "--device", "cpu", "--no-memory"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert part in error
