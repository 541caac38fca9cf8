"""The competitors of VR-PGE: each through the program, and what is particular to it."""

import itertools
import json
import os
import re
import signal
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import trainers.recipe
from args import METHODS, Config, parse_args
from data import DataSplits, first_in_proportion
from main import main
from tests.toy import NETWORKS, batch, config, one_thread, plain_net, search_of, sparse_network, without_clocks  # noqa: F401
from trainers.build import new_run
from trainers.default import StepSettings
from trainers.methods import make_method
from trainers.methods.gumbel import Gumbel, concrete_gates, gated, gates_of_spaces, logistic_noise, temperature
from trainers.methods.pruning import batch_norm_scales, judging_norms
from trainers.methods.uniform import layers_by_stream
from trainers.recipe import Recipe
from trainers.session import load_data
from trainers.state import RunState
from utils.errors import UserError
from utils.run.checkpoint import differences, load

CPU = torch.device("cpu")
ONE_PHASE = {"dense": "dense", "thin": "train", "random": "train"}


SHORT = ("--epochs", "2", "--finetune-epochs", "1")


def folder_of(name: str = "run", method: str = "vrpge") -> Path:
    return Path("runs/tiny") / name / f"prune_rate={'1' if method == 'dense' else '0.5'}"


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@cache
def images() -> DataSplits:
    return load_data(parse_args([]).config, CPU)


def run_of(method: str, *options: str) -> tuple[RunState, Config]:
    """A run before its first step: VGG-16 at a sixteenth of its widths unless told otherwise."""
    small = {"--arch": "vgg16", "--width-mult": "0.0625", "--batch-size": "32"}
    given = [word for pair in small.items() if pair[0] not in options for word in pair]
    config = parse_args([*given, "--method", method, *options]).config
    return new_run(config, images(), CPU), config


def first_batch(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return next(images().train.train_batches(size, 0, 0))


# ---- through the program --------------------------------------------------------------------------------------------


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "stop_at"),
    [
        *((method, 5) for method in METHODS if method not in ("vrpge", "gumbel", "l1")),
        *((method, 9) for method in ("gumbel", "l1")),
        *(pytest.param(method, 5, marks=SLOW) for method in ("gumbel", "l1")),
        *(pytest.param(method, 9, marks=SLOW) for method in ("coin", "sfp", "taylor_cut")),
    ],
)
def test_a_run_finishes_in_its_budget_evaluates_alike_and_resumes_bit_equal(
    program, monkeypatch, capsys, method, stop_at
):
    """Four steps an epoch: step 5 is in the second epoch, step 9 in fine-tuning."""
    assert program(*SHORT, "--method", method, name="whole") == 0
    whole = folder_of("whole", method)
    summary = summary_of(whole)
    assert (summary["method"], summary["epochs"]) == (method, 3)
    if method == "dense":
        assert (summary["flops_ratio"], summary["units_kept"], summary["execution"]) == (1, None, "dense")
    else:
        assert 0.4 < summary["units_kept"] <= 0.5
        assert summary["flops_ratio"] < (0.65 if method == "taylor_cut" else 0.5)  # which keeps the widest maps
    phases = [line.split(",")[1] for line in (whole / "results.csv").read_text().splitlines()[1:]]
    assert phases == ([ONE_PHASE[method]] * 3 if method in ONE_PHASE else ["search", "search", "finetune"])
    capsys.readouterr()
    assert main(["--evaluate", "--resume", str(whole)]) == 0
    again = re.search(r"test top-1 ([\d.]+) %", capsys.readouterr().out)
    assert float(again[1]) == pytest.approx(summary["test_top1"], abs=0.005)

    step, count = trainers.recipe.Recipe.step, itertools.count()

    def interrupted_step(self, images, labels, settings):
        if next(count) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, images, labels, settings)

    with monkeypatch.context() as patch:
        patch.setattr(trainers.recipe.Recipe, "step", interrupted_step)
        assert program(*SHORT, "--method", method, name="parts") == 130
    assert main(["--resume", str(folder_of("parts", method))]) == 0
    for file in ("last.pt", "best.pt"):
        states = [load(folder_of(name, method) / "checkpoints" / file) for name in ("whole", "parts")]
        assert differences(*map(without_clocks, states)) == []


def test_the_ledger_of_dense_training_is_100_per_cent_and_that_of_thin_training_its_own(program):
    for method in ("dense", "thin"):
        assert program(*SHORT, "--method", method, "--holdout", "0", name=method) == 0
    dense, thin = (summary_of(folder_of(method, method)) for method in ("dense", "thin"))
    assert dense["train_flops_ratio"] == 1
    assert thin["train_flops_ratio"] == pytest.approx(thin["flops_ratio"], rel=1e-12)
    assert thin["flops_ratio"] < 0.3


def test_pruned_networks_become_small_in_fine_tuning(program):
    assert program(*SHORT, "--method", "l1") == 0
    state = load(folder_of() / "checkpoints/last.pt")
    assert int(state["stored_units"].sum()) == pytest.approx(0.5 * len(state["stored_units"]), abs=2)
    assert program(*SHORT, "--method", "l1", "--retire", "off", "--budget-schedule", "constant", name="whole") == 0
    assert load(folder_of("whole") / "checkpoints/last.pt")["stored_units"].all()


def test_methods_without_a_search_train_all_epochs_in_one_schedule():
    run, config = run_of("thin", "--epochs", "6", "--finetune-epochs", "2")
    recipe = Recipe(config, images(), run, reporter=None, stop=None)
    factors = []
    num_epochs = run.num_epochs(config)
    for run.epoch in range(num_epochs):
        factors.append(recipe.settings(0, 10).weight_lr / config.train.weight_lr)
    assert factors == pytest.approx([0.5 * (1 + np.cos(np.pi * epoch / 8)) for epoch in range(8)])


def test_one_learning_rate_curve_may_run_through_search_and_fine_tuning():
    """The weights' curve is that of one phase of all epochs, whatever the batch size of fine-tuning; the scores' ends
    with the search."""
    run, config = run_of("vrpge", "--epochs", "6", "--finetune-epochs", "2", "--finetune-policy", "continue")
    recipe = Recipe(config, images(), run, reporter=None, stop=None)
    weights, scores = [], []
    for run.epoch in range(6):
        weights.append(recipe.settings(5, 10).weight_lr / config.train.weight_lr)
        scores.append(recipe.settings(5, 10).score_lr / config.train.score_lr)
    run.phase = "finetune"
    for run.epoch in (6, 7):
        weights.append(recipe.settings(10, 20).weight_lr / config.train.weight_lr)
    assert weights == pytest.approx([0.5 * (1 + np.cos(np.pi * (epoch + 0.5) / 8)) for epoch in range(8)])
    assert scores == pytest.approx([0.5 * (1 + np.cos(np.pi * (epoch + 0.5) / 6)) for epoch in range(6)])


# ---- thin and random ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "width"), [("resnet20_he", 0.5), ("vgg16", 0.25), ("wrn16_8", 0.125), ("mobilenet_v1", 0.25)]
)
@pytest.mark.parametrize("residual_masks", ["free", pytest.param("tied", marks=SLOW)])
def test_thin_starts_like_a_network_that_is_built_thin(arch, width, residual_masks):
    """Bit by bit: the same shapes, the same fans, the same draws."""
    config = parse_args(["--arch", arch, "--width-mult", str(width), "--method", "thin"]).config
    thin = new_run(replace(config, sparsity=replace(config.sparsity, residual_masks=residual_masks)), images(), CPU)
    tensors = {name: t for name, t in thin.network.model.state_dict().items() if not name.endswith("scores")}
    built, _ = run_of("dense", "--arch", arch, "--width-mult", str(width / 2))
    expected = built.network.model.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("arch", ["resnet20_he", "vgg16"])
def test_random_weights_have_the_fans_of_the_channels_that_are_there(arch):
    run, _ = run_of("random", "--arch", arch, "--width-mult", "0.25", "--keep-ratio", "0.3")
    network, plan = run.network, run.plan
    for op in network.graph.ops:
        if op.kind == "conv":
            reads = plan.counts[network.graph.ops[op.inputs[0]].space]
            assert op.module.weight.shape[:2] == (plan.counts[op.space], reads)


def test_random_masks_are_uniform_within_the_budget_and_follow_the_seed():
    masks = [run_of("random", "--keep-ratio", "0.5", "--seed", str(seed))[0].subnet.mask_U for seed in (0, 0, 1, 2, 3)]
    assert np.array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[0], masks[2])
    assert all(mask_U.sum() == 132 for mask_U in masks)
    overlap = [(one & other).sum() for one, other in itertools.combinations(masks[1:], 2)]
    assert np.mean(overlap) == pytest.approx(66, abs=10)
    run, _ = run_of("random", "--keep-ratio", "0.05", "--constrain-by-layer")  # less than a unit of most layers
    assert all(run.subnet.mask_U[layer].any() for layer in run.network.unit_groups())


@pytest.mark.parametrize("unit", ["flops", "params"])
@pytest.mark.parametrize("ratio", [0.1, 0.27, pytest.param(0.8, marks=SLOW)])
@pytest.mark.parametrize(
    ("method", "least"), [("thin", 0.97), ("l1", 0.9), ("sfp", 0.9), ("slimming", 0.97), ("taylor_cut", 0.97)]
)
def test_budgets_of_cost_are_met_as_realised(method, least, unit, ratio):
    run, config = run_of(
        method, "--arch", "resnet20_he", "--width-mult", "1", "--budget", unit, "--keep-ratio", str(ratio)
    )
    network = run.network
    run.importance = torch.rand(network.num_units, generator=torch.Generator().manual_seed(0))  # for taylor_cut
    mask_U = run.subnet.mask_U if run.subnet else make_method(config).candidates(run)[0]
    cost = network.expected_cost(unit)
    assert least * ratio <= cost(mask_U) / cost.dense <= ratio * (1 + 1e-9)


def test_thin_layers_keep_their_first_channels_and_streams_stay_thin():
    run, _ = run_of("thin", "--arch", "resnet20_he", "--width-mult", "1", "--budget", "flops", "--keep-ratio", "0.3")
    network, mask_U = run.network, run.subnet.mask_U
    for layers in layers_by_stream(network):
        kept = [mask_U[layer] for layer in layers]
        assert kept[0].any()
        assert all(np.array_equal(kept[0], other) for other in kept)
        assert not (np.diff(kept[0].astype(int)) > 0).any()
    assert sorted(len(layers) for layers in layers_by_stream(network)) == [1] * 9 + [4, 4, 4]


def test_a_budget_below_one_channel_in_each_layer_is_refused_with_the_smallest_that_is_met():
    for method in ("thin", "l1"):
        with pytest.raises(UserError, match=r"keep_ratio 0\.0001 of the flops is less than vgg16 has") as error:
            run_of(method, "--budget", "flops", "--keep-ratio", "0.0001")
        fitting = re.search(r"pass --keep-ratio (\S+) or more", str(error.value))[1]
        run_of(method, "--budget", "flops", "--keep-ratio", fitting)


# ---- coin -----------------------------------------------------------------------------------------------------------


def test_a_step_with_coins_moves_the_scores_as_far_as_vrpge_one_way_or_the_other():
    def moved(method: str, coin_seed: int | None = None) -> torch.Tensor:
        sgd = ("--optimizer", "sgd", "--score-lr", "0.1", "--keep-ratio", "0.9", "--score-init-constant", "0.5")
        run, config = run_of(method, *sgd)
        assert ("coin" in run.search.estimator.state_dict()) == (method == "coin")
        if coin_seed is not None:
            run.search.estimator.coin.manual_seed(coin_seed)
        make_method(config).step(run, *first_batch(), StepSettings(0.1, 0.1, keep_ratio=0.9))
        return run.network.scores.detach() - 0.5

    straight = moved("vrpge")
    assert straight.abs().max() > 0
    signs = Counter()
    for seed in range(6):
        ours = moved("coin", seed)
        for sign in (1, -1):
            signs[sign] += int(torch.allclose(ours, sign * straight, atol=1e-6))
    assert signs[1] + signs[-1] == 6
    assert min(signs.values()) > 0


# ---- pruning by filters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual_masks", ["free", "tied"])
@pytest.mark.parametrize(("method", "power"), [("l1", 1), ("sfp", 2)])
def test_each_layer_keeps_exactly_its_filters_of_largest_norm(method, power, residual_masks):
    run, config = run_of(
        method, "--arch", "resnet20_he", "--width-mult", "0.5", "--keep-ratio", "0.25", "--stream", residual_masks
    )
    network = run.network
    norms: dict[int, np.ndarray] = {}  # by first unit
    for name, layer in network.layers.items():
        weight = layer.weight.detach().double().numpy().reshape(layer.out_channels, -1)
        first = network.graph.first_unit[name]
        norms[first] = norms.get(first, 0) + (np.abs(weight) ** power).sum(1)
    mask_U = make_method(config).candidates(run)[0]
    assert len(norms) == (21 if residual_masks == "free" else 12)
    for first, sums in norms.items():
        kept = set(np.flatnonzero(mask_U[first : first + len(sums)]))
        assert kept == set(np.argsort(sums)[-len(sums) // 4 :]), first


def test_soft_pruning_sets_the_weakest_filters_to_zero_and_trains_them_on():
    run, config = run_of("sfp", "--weight-lr", "0.1")
    method, network = make_method(config), run.network
    for norm in network.batch_norms().values():
        norm.bias.data.fill_(0.1)  # with a shift of 0 ReLU has no slope at the constant map of a filter of zeros
    mask_U = method.mask(run, 0.5)
    before = {name: layer.weight.detach().clone() for name, layer in network.layers.items()}
    method.end_of_epoch(run, 0.5)

    def parts() -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        kept = network.split(torch.from_numpy(mask_U))
        return [(name, layer.weight.detach(), k) for (name, layer), k in zip(network.layers.items(), kept, strict=True)]

    for name, weight, kept in parts():
        assert torch.equal(weight[kept], before[name][kept])
        assert not weight[~kept].any()
        assert (~kept).any()
    assert np.array_equal(method.mask(run, 0.5), mask_U)
    for _ in range(2):
        method.step(run, *first_batch(), StepSettings(0.1))
    assert all(weight[~kept].any() for _, weight, kept in parts())


# ---- slimming -------------------------------------------------------------------------------------------------------


def test_the_penalty_adds_its_slope_to_the_gradients_of_the_scales_and_to_nothing_else():
    def gradients(penalty: float) -> tuple[dict[str, torch.Tensor], RunState]:
        run, config = run_of("slimming", "--slimming-penalty", str(penalty), "--clip-norm", "1e9")
        for norm in run.network.batch_norms().values():
            norm.weight.data.copy_(torch.randn(len(norm.weight), generator=torch.Generator().manual_seed(0)))
            norm.weight.data[0] = 0
        make_method(config).step(run, *first_batch(), StepSettings(0.0))
        return {name: p.grad.clone() for name, p in run.network.model.named_parameters() if p.requires_grad}, run

    (plain, _), (penalised, run) = gradients(0.0), gradients(0.25)
    scales = {f"{name}.weight": norm.weight.detach() for name, norm in run.network.batch_norms().items()}
    assert len(scales) == 13
    for name, gradient in plain.items():
        slope = 0.25 * scales[name].sign() if name in scales else torch.zeros_like(gradient)
        assert torch.equal(penalised[name], gradient + slope), name


def test_slimming_keeps_the_units_of_the_largest_scales_of_the_whole_network():
    run, config = run_of("slimming", "--keep-ratio", "0.3")
    generator = torch.Generator().manual_seed(0)
    for norm in run.network.batch_norms().values():
        norm.weight.data.copy_(torch.randn(len(norm.weight), generator=generator))
    scales_U = torch.cat([norm.weight.detach().abs() for norm in run.network.batch_norms().values()]).numpy()
    assert np.array_equal(batch_norm_scales(run.network).numpy(), scales_U)
    mask_U = make_method(config).candidates(run)[0]
    assert mask_U.sum() == int(0.3 * run.network.num_units)
    best_of_layers = [layer.start + scales_U[layer].argmax() for layer in run.network.unit_groups()]
    threshold = scales_U[~mask_U].max()
    assert all(unit in best_of_layers for unit in np.flatnonzero(mask_U & (scales_U < threshold)))


def test_units_before_a_batch_norm_on_the_stream_are_judged_by_the_first_that_reads_them():
    network = sparse_network(plain_net("preactivation"), NETWORKS["preactivation"].LAYERS)
    names = {norm: name for name, norm in network.batch_norms().items()}
    assert {name: (names[norm.module], norm.first_channel) for name, norm in judging_norms(network).items()} == {
        "stem": ("block1.bn1", 0),
        "block1.conv1": ("block1.bn2", 0),
        "block1.conv2": ("block2.bn1", 0),
        "block2.conv1": ("block2.bn2", 0),
        "block2.conv2": ("block3.bn1", 0),
        "block3.conv1": ("block3.bn2", 0),
        "block3.conv2": ("bn", 0),
        "block3.shortcut": ("bn", 0),
    }
    network = sparse_network(plain_net("mixed"), [name for name in NETWORKS["mixed"].LAYERS if name != "merge"])
    norm, first = judging_norms(network)["grow"].module, judging_norms(network)["grow"].first_channel
    assert norm is network.model.bn4
    assert first == 5  # behind the stream in the concatenated map
    with pytest.raises(UserError, match="layer conv3: no batch-norm reads them"):
        judging_norms(sparse_network(plain_net("plain"), NETWORKS["plain"].LAYERS))


# ---- gumbel ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
def test_gates_of_0_and_1_are_the_masked_reference(kind):
    network = sparse_network(plain_net(kind), NETWORKS[kind].LAYERS, "masked")
    pictures, _ = batch()
    for seed in range(3):
        mask_U = torch.rand(network.num_units, generator=torch.Generator().manual_seed(seed)) < 0.6
        plan = network.plan(mask_U.numpy())
        expected = network(pictures, plan, update_statistics=False)
        with gated(network, torch.from_numpy(plan.mask_U).double()):
            torch.testing.assert_close(network.model(pictures), expected)
        live = zip(plan.live, gates_of_spaces(network.graph, torch.from_numpy(plan.mask_U).double()), strict=True)
        for channels, gates in live:
            assert gates is None or np.array_equal(gates.numpy(), channels)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_score_gradient_of_a_step_is_the_slope_of_its_loss(kind):
    """Central differences, float64, the noise of the step."""
    network = sparse_network(plain_net(kind), NETWORKS[kind].LAYERS)
    network.model.train()
    start_U = torch.rand(network.num_units, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.8 + 0.1
    network.scores.copy_(start_U)
    weights = torch.optim.SGD(network.weight_parameters(), lr=1.0)
    scores = torch.optim.SGD([network.scores], lr=1.0)
    search = search_of(network, config(), seed=3, weight_optimizer=weights, score_optimizer=scores)
    search.generator.manual_seed(3)  # as it was before the first masks, which this method does not draw
    run = RunState(network, search.budget, weights, "search", network.dense_plan, search)
    pictures, labels = batch()
    tau = temperature(0.7)
    noise_U = logistic_noise(network.num_units, torch.Generator().manual_seed(3))

    def loss(scores_U: torch.Tensor) -> float:
        with torch.no_grad(), gated(network, concrete_gates(scores_U, noise_U, tau)):
            return float(F.cross_entropy(network.model(pictures), labels))

    def slope(unit: int) -> float:
        step_U = torch.zeros_like(start_U)
        step_U[unit] = 1e-6
        return (loss(start_U + step_U) - loss(start_U - step_U)) / 2e-6

    slopes_U = torch.tensor([slope(unit) for unit in range(network.num_units)], dtype=torch.float64)
    assert slopes_U.abs().max() > 1e-3
    settings = StepSettings(0.0, 0.0, keep_ratio=1.0, progress=0.7)
    result = Gumbel(config()).step(run, pictures, labels, settings)
    torch.testing.assert_close(network.scores.grad, slopes_U, rtol=1e-5, atol=1e-7)
    assert float(result.metrics["loss"]) / len(labels) == pytest.approx(loss(start_U), rel=1e-12)
    assert (result.forward, result.num_backward) == ([(network.dense_macs, network.dense_macs)], 1)
    assert all(weight.grad.abs().max() > 0 for weight in network.weight_parameters())


def test_a_gate_is_open_with_the_probability_of_its_score_and_closes_with_the_temperature():
    generator = torch.Generator().manual_seed(0)
    for score in (0.0, 0.1, 0.5, 0.9, 1.0):
        scores_U, noise_U = torch.full((20_000,), score), logistic_noise(20_000, generator)
        for tau in (1.0, 0.03):
            share = float((concrete_gates(scores_U, noise_U, tau) > 0.5).double().mean())
            assert share == pytest.approx(score, abs=5 * (score * (1 - score) / 20_000) ** 0.5 + 1e-4)
        gates_U = concrete_gates(scores_U, noise_U, 0.03)
        assert float(((gates_U > 0.01) & (gates_U < 0.99)).double().mean()) < 0.1
    assert (temperature(0), temperature(1)) == (1.0, pytest.approx(0.03))
    at_the_edge = torch.tensor([0.0, 1.0], requires_grad=True)
    concrete_gates(at_the_edge, torch.zeros(2), 1.0).sum().backward()
    assert (at_the_edge.grad > 0).all()  # such scores can come back


# ---- train_images ---------------------------------------------------------------------------------------------------


def test_fewer_training_images_are_the_same_for_every_seed_and_hold_all_classes():
    def train_labels(count: int, *options: str) -> torch.Tensor:
        return load_data(parse_args(["--train-images", str(count), *options]).config, CPU).train.labels

    everything = images()
    some = load_data(parse_args(["--train-images", "1000", "--seed", "5"]).config, CPU)
    assert torch.bincount(some.train.labels).tolist() == [100] * 10
    assert len(some.holdout) == len(everything.holdout)
    assert some.holdout.identity() == everything.holdout.identity()
    assert some.fingerprint != everything.fingerprint
    assert torch.equal(some.train.labels, train_labels(1000))
    assert torch.equal(train_labels(0), everything.train.labels)
    with pytest.raises(UserError, match=r"train_images is 9001, but there are only 9000 training images"):
        train_labels(9001)


def test_smaller_counts_are_part_of_larger_ones_with_classes_in_proportion():
    random = np.random.default_rng(0)
    labels = random.choice(3, 500, p=[0.6, 0.3, 0.1])
    indices = np.sort(random.permutation(500)[:400])
    previous: set[int] = set()
    for count in range(1, 401, 7):
        chosen = first_in_proportion(labels, indices, count)
        assert len(chosen) == count
        assert set(chosen) <= set(indices)
        assert previous <= set(chosen)
        assert (np.diff(chosen) > 0).all()
        for label in range(3):
            share = (labels[indices] == label).mean()
            assert abs((labels[chosen] == label).sum() - count * share) <= 1.5
        previous = set(chosen)


def test_streamed_images_can_be_fewer_too(tiny_images, tmp_path):
    options = ["--set", "ImageFolder", "--data", str(tiny_images), "--image-size", "128", "--workers", "0"]
    config = parse_args([*options, "--train-images", "12", "--batch-size", "4", "--method", "dense"]).config
    train = load_data(config, CPU).train
    assert torch.bincount(train.labels).tolist() == [3] * 4
    pictures, labels = next(train.train_batches(4, 0, 0))
    assert pictures.shape == (4, 3, 128, 128)
    assert set(labels.tolist()) <= set(range(4))
