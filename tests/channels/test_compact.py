"""Compact = masked = a reference written by hand: loss, gradients, running statistics, one optimizer step."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.toy import (
    IMAGE_SHAPE,
    NETWORKS,
    REFERENCES,
    Reference,
    batch,
    by_layer,
    config,
    flat_mask,
    one_thread,  # noqa: F401
    plain_net,
    sparse_network,
)
from trainers.default import Draw, SearchState, StepSettings, train_step, weight_step
from utils.channels.network import SparseNetwork

# What is kept where; layers that are not named keep a random choice, never nothing.
NOTHING: tuple[int, ...] = ()
MASKS = {
    "released": {
        "random": {},
        "stem of one": {"conv1": [4]},
        "one channel each": {name: [width // 2] for name, width in NETWORKS["released"].LAYERS.items()},
        "all": {name: range(width) for name, width in NETWORKS["released"].LAYERS.items()},
        "empty branch": {"layer1.0.conv1": NOTHING, "layer1.0.conv2": NOTHING},
        "first conv of the branch empty": {"layer1.0.conv1": NOTHING, "layer1.0.conv2": [1, 2, 5]},
        "second conv of the branch empty": {"layer1.0.conv2": NOTHING},
        "first conv beside a projection empty": {
            "layer2.0.conv1": NOTHING,
            "layer2.0.conv2": [0, 3, 4],
            "layer2.0.shortcut.0": [3, 7],
        },
        "projection empty": {"layer2.0.shortcut.0": NOTHING, "layer2.0.conv2": [2, 3, 9]},
        "branch beside a projection empty": {"layer2.0.conv2": NOTHING, "layer2.0.shortcut.0": [0, 11]},
        "branch inside the projection": {"layer2.0.conv2": [1, 4], "layer2.0.shortcut.0": [1, 2, 4]},
        "projection inside the branch": {"layer2.0.conv2": [1, 2, 4], "layer2.0.shortcut.0": [1, 4]},
        "disjoint": {"conv1": [0, 1], "layer1.0.conv2": [4, 5]},
        "the stream in full by two halves": {"conv1": [0, 1, 2], "layer1.0.conv2": [3, 4, 5]},
    },
    "plain": {
        "random": {},
        "one channel each": {"conv1": [3], "conv2": [0], "conv3": [5]},
        "all": {name: range(width) for name, width in NETWORKS["plain"].LAYERS.items()},
        "last channels": {"conv1": [4], "conv2": [2, 3], "conv3": [1, 5]},
    },
    "preactivation": {
        "random": {},
        "one channel each": {name: [width // 2] for name, width in NETWORKS["preactivation"].LAYERS.items()},
        "all": {name: range(width) for name, width in NETWORKS["preactivation"].LAYERS.items()},
        "a stream that grows": {"stem": [1], "block1.conv2": [3], "block2.conv2": [0]},
        "a stream that does not": {"stem": [1, 3], "block1.conv2": NOTHING, "block2.conv2": [3]},
        "empty branches": {
            "block1.conv1": NOTHING,
            "block1.conv2": NOTHING,
            "block2.conv1": NOTHING,
            "block3.conv1": NOTHING,
            "block3.conv2": NOTHING,
        },
        "inner convs empty": {
            "stem": [0],
            "block1.conv1": NOTHING,
            "block1.conv2": [2],
            "block2.conv1": NOTHING,
            "block3.conv1": NOTHING,
            "block3.conv2": [1, 5],
            "block3.shortcut": [0, 5],
        },
        "projection empty": {"block3.shortcut": NOTHING, "block3.conv2": [0, 4]},
    },
    "mixed": {
        "random": {},
        "one channel each": {name: [width // 2] for name, width in NETWORKS["mixed"].LAYERS.items()},
        "all": {name: range(width) for name, width in NETWORKS["mixed"].LAYERS.items()},
        "the filtered branch empty": {"expand": NOTHING, "project": NOTHING},
        "a filter of nothing": {"expand": NOTHING, "project": [0, 2], "stem": [1, 2]},
        "nothing grown": {"grow": NOTHING},
        "nothing merged": {"merge": NOTHING},
        "only the stream concatenated": {"grow": NOTHING, "merge": NOTHING},
    },
}
CASES = [(kind, case) for kind, cases in MASKS.items() for case in cases]
PADDING = (1, 4, 5, 16)  # multiples to which channel counts are padded: none, some, across the width, always in full
EXACT = {"rtol": 1e-9, "atol": 1e-11}
SETTINGS = StepSettings(weight_lr=0.1)


@dataclass
class Outcome:
    """Everything a pass and a backward leave behind."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]
    statistics: dict[str, tuple[Tensor, Tensor]]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Zeros where backward left none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def statistics_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    return {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}


def run_network(network: SparseNetwork, mask_U: np.ndarray, training: bool, data=None) -> Outcome:
    images, labels = batch() if data is None else data
    network.model.train(training)
    logits = network(images, network.plan(mask_U))
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return Outcome(loss.detach(), logits.detach(), gradients_of(network.model), statistics_of(network.model))


def run_reference(kind: str, net: nn.Module, mask_U: np.ndarray, training: bool) -> Outcome:
    images, labels = batch()
    net.train(training)
    run = Reference(net, by_layer(NETWORKS[kind].LAYERS, mask_U, images.dtype), {})
    logits = REFERENCES[kind](run, images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return Outcome(loss.detach(), logits.detach(), gradients_of(net), {**statistics_of(net), **run.statistics})


def assert_same(one: Outcome, other: Outcome, rtol: float, atol: float) -> None:
    close = {"rtol": rtol, "atol": atol}
    torch.testing.assert_close(one.loss, other.loss, **close)
    torch.testing.assert_close(one.logits, other.logits, **close)
    assert one.gradients.keys() == other.gradients.keys()
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(gradient, other.gradients[name], **close, msg=lambda m, n=name: f"{n}: {m}")
    assert one.statistics.keys() == other.statistics.keys()
    for name, pair in one.statistics.items():
        for mine, its in zip(pair, other.statistics[name], strict=True):
            torch.testing.assert_close(mine, its, **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_both_executions_are_the_hand_written_reference(kind, case):
    net, layers = plain_net(kind), NETWORKS[kind].LAYERS
    mask_U = flat_mask(layers, MASKS[kind][case], seed=5)
    masked, compact = (sparse_network(net, layers, execution) for execution in ("masked", "compact"))
    assert np.array_equal(masked.plan(mask_U).mask_U, mask_U)  # the guard has nothing to add here
    before = copy.deepcopy(compact.model.state_dict())
    for training in (False, True):
        expected = run_reference(kind, copy.deepcopy(net), mask_U, training)
        for network, multiple in ((masked, 1), *((compact, multiple) for multiple in PADDING)):
            network.multiple = multiple
            network.model.zero_grad()
            network.model.load_state_dict(before)
            assert_same(run_network(network, mask_U, training), expected, **EXACT)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(NETWORKS)), st.data())
def test_any_mask_that_the_guard_lets_through(kind, data):
    layers = NETWORKS[kind].LAYERS
    bits = data.draw(st.lists(st.booleans(), min_size=sum(layers.values()), max_size=sum(layers.values())))
    net = plain_net(kind)
    compact, masked = (sparse_network(net, layers, execution) for execution in ("compact", "masked"))
    mask_U = compact.plan(np.array(bits)).mask_U
    compact.multiple = data.draw(st.sampled_from(PADDING))
    expected = run_reference(kind, copy.deepcopy(net), mask_U, True)
    assert_same(run_network(masked, np.array(bits), True), expected, **EXACT)
    assert_same(run_network(compact, np.array(bits), True), expected, **EXACT)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_full_mask_is_the_plain_network_itself(kind):
    """torch's own modules, batch-norm and statistics included, as if nothing had been sparsified."""
    net, layers = plain_net(kind), NETWORKS[kind].LAYERS
    everything = np.ones(sum(layers.values()), dtype=bool)
    plain = copy.deepcopy(net).train()
    images, labels = batch()
    loss = F.cross_entropy(plain(images), labels)
    loss.backward()
    for execution in ("compact", "masked"):
        outcome = run_network(sparse_network(net, layers, execution), everything, True)
        torch.testing.assert_close(outcome.loss, loss.detach(), **EXACT)
        for name, gradient in gradients_of(plain).items():
            torch.testing.assert_close(outcome.gradients[name], gradient, **EXACT)
        for name, pair in statistics_of(plain).items():
            torch.testing.assert_close(outcome.statistics[name], pair, **EXACT)


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_channels_that_are_not_live_are_zero_behind_a_norm_on_a_stream(execution):
    """The shift of such a batch-norm must not leak, and its running statistics stay bit for bit."""
    layers = NETWORKS["preactivation"].LAYERS
    mask_U = flat_mask(layers, MASKS["preactivation"]["a stream that grows"])
    network = sparse_network(plain_net("preactivation"), layers, execution)
    before = copy.deepcopy(network.model.state_dict())
    outcome = run_network(network, mask_U, True)
    live = {"block1.bn1": [1], "block2.bn1": [1, 3], "block3.bn1": [0, 1, 3]}
    for name, channels in live.items():
        dropped = [c for c in range(5) if c not in channels]
        for moved, key in zip(outcome.statistics[name], ("running_mean", "running_var"), strict=True):
            assert torch.equal(moved[dropped], before[f"{name}.{key}"][dropped])
            assert (moved[channels] != before[f"{name}.{key}"][channels]).all()
        # neither scale nor shift of a channel that is not live takes part in anything
        for parameter in ("weight", "bias"):
            assert outcome.gradients[f"{name}.{parameter}"][dropped].count_nonzero() == 0
            assert outcome.gradients[f"{name}.{parameter}"][channels].count_nonzero() == len(channels)


@pytest.mark.parametrize("kind", NETWORKS)
def test_gradients_of_dropped_units_are_exact_zeros(kind):
    layers = NETWORKS[kind].LAYERS
    mask_U = flat_mask(layers, {}, seed=3)
    for execution, multiple in (("compact", 1), ("compact", 4), ("masked", 1)):
        network = sparse_network(plain_net(kind), layers, execution, multiple=multiple)
        gradients = run_network(network, mask_U, True).gradients
        for name, mask in by_layer(layers, mask_U, torch.float64).items():
            assert gradients[f"{name}.weight"][~mask.bool()].count_nonzero() == 0
            assert gradients[f"{name}.weight"][mask.bool()].count_nonzero() > 0


@pytest.mark.parametrize("multiple", PADDING)
def test_compact_tensors_have_the_width_that_the_plan_says(multiple):
    layers = NETWORKS["released"].LAYERS
    network = sparse_network(plain_net("released"), layers, multiple=multiple)
    mask_U = flat_mask(layers, MASKS["released"]["first conv beside a projection empty"], seed=5)
    plan = network.plan(mask_U)
    for space, live, count, width in zip(network.graph.spaces, plan.live, plan.counts, plan.widths, strict=True):
        assert count == live.sum()
        assert width == (space.width if space.full else min(-(-count // multiple) * multiple, space.width))
    seen = {}
    original = torch.nn.functional.conv2d

    def spy(x, weight, *args, **kwargs):
        seen[len(seen)] = (x.shape[1], *weight.shape[:2])
        return original(x, weight, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", spy)
        network(batch()[0], plan, update_statistics=False)
    convs = [op for op in network.graph.ops if op.kind == "conv" and plan.counts[op.space]]
    reads = [plan.widths[network.graph.ops[op.inputs[0]].space] for op in convs]
    expected = [(r, plan.widths[op.space], r) for op, r in zip(convs, reads, strict=True) if r]
    assert list(seen.values()) == expected


def test_the_padding_of_this_machine_is_a_small_power_of_two():
    net = plain_net("released", dtype=torch.float32)
    model = sparse_network(net, NETWORKS["released"].LAYERS).model
    assert SparseNetwork(model, IMAGE_SHAPE).multiple in (4, 8, 16)


def optimizer_step(network: SparseNetwork, mask_U: np.ndarray, training: bool) -> dict[str, Tensor]:
    """State after two weight steps with different masks: the second moves what the first left in momentum."""
    optimizer = torch.optim.SGD(network.weight_parameters(), lr=0.1, momentum=0.9, weight_decay=5e-2)
    network.model.train(training)
    full = np.ones_like(mask_U)
    for plan in (network.plan(full), network.plan(mask_U)):
        weight_step(network, optimizer, plan, *batch(), SETTINGS, config())
    return network.model.state_dict()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("released", "random"),
        ("released", "empty branch"),
        ("released", "one channel each"),
        ("plain", "random"),
        ("preactivation", "random"),
        ("preactivation", "inner convs empty"),
    ],
)
def test_one_optimizer_step_with_momentum_and_decay(kind, case, training):
    net, layers = plain_net(kind), NETWORKS[kind].LAYERS
    mask_U = flat_mask(layers, MASKS[kind][case], seed=8)
    masked = optimizer_step(sparse_network(net, layers, "masked"), mask_U, training)
    for multiple in (1, 4):
        compact = optimizer_step(sparse_network(net, layers, multiple=multiple), mask_U, training)
        torch.testing.assert_close(compact, masked, **EXACT)

    # and by hand: SGD over the gradients of the reference, zeros included
    plain = copy.deepcopy(net)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-2)
    for mask in (np.ones_like(mask_U), mask_U):
        for parameter in plain.parameters():
            parameter.grad = torch.zeros_like(parameter)
        outcome = run_reference(kind, plain, mask, training)
        optimizer.step()
        for name, (mean, var) in outcome.statistics.items():
            plain.get_submodule(name).running_mean.copy_(mean)
            plain.get_submodule(name).running_var.copy_(var)
    for name, tensor in plain.state_dict().items():
        if "num_batches_tracked" not in name:
            torch.testing.assert_close(masked[name], tensor, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


def search_step(network: SparseNetwork, masks: list[np.ndarray], weight_samples: int) -> dict[str, Tensor]:
    """State after one `train_step` on given masks."""
    state = SearchState(
        network,
        torch.optim.SGD(network.weight_parameters(), lr=0.1, momentum=0.9, weight_decay=5e-2),
        torch.optim.Adam([network.scores], lr=0.05),
        torch.Generator().manual_seed(0),
        Draw(torch.from_numpy(np.stack(masks)), [network.plan(mask) for mask in masks]),
    )
    network.model.train()
    settings = StepSettings(weight_lr=0.1, score_lr=0.05, kept_fraction=0.5)
    train_step(state, *batch(), settings, config(weight_samples=weight_samples))
    return {**network.model.state_dict(), "next draw": state.draw.masks_KU}


@pytest.mark.parametrize("weight_samples", [1, 2])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_whole_search_step(kind, weight_samples):
    net, layers = plain_net(kind), NETWORKS[kind].LAYERS
    masks = [flat_mask(layers, {}, seed=11), flat_mask(layers, {}, seed=12)]
    masked = search_step(sparse_network(net, layers, "masked"), masks, weight_samples)
    for multiple in (1, 4):
        compact = search_step(sparse_network(net, layers, multiple=multiple), masks, weight_samples)
        torch.testing.assert_close(compact, masked, **EXACT)


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_two_weight_samples_of_which_one_is_full(execution):
    """Scores that start at 1 (a budget that falls from 1) draw such pairs in the first steps."""
    net, layers = plain_net("released"), NETWORKS["released"].LAYERS
    masks = [np.ones(54, dtype=bool), flat_mask(layers, {}, seed=12)]
    expected = [run_reference("released", copy.deepcopy(net), mask, True).gradients for mask in masks]
    network = sparse_network(net, layers, execution)
    search_step(network, masks, weight_samples=2)
    for name, gradient in gradients_of(network.model).items():
        torch.testing.assert_close(gradient, (expected[0][name] + expected[1][name]) / 2, **EXACT)


def test_a_search_step_over_two_masks_averages_their_gradients():
    net, layers = plain_net("released"), NETWORKS["released"].LAYERS
    masks = [flat_mask(layers, {}, seed=11), flat_mask(layers, {}, seed=12)]
    expected = [run_reference("released", copy.deepcopy(net), mask, True).gradients for mask in masks]
    network = sparse_network(net, layers)
    search_step(network, masks, weight_samples=2)
    for name, gradient in gradients_of(network.model).items():
        torch.testing.assert_close(gradient, (expected[0][name] + expected[1][name]) / 2, **EXACT)


# --- mixed precision and memory layout ------------------------------------------------------------------------------

NARROW = [
    ("released", "random"),
    ("released", "first conv of the branch empty"),
    ("released", "first conv beside a projection empty"),
    ("released", "empty branch"),
    ("plain", "random"),
    ("preactivation", "random"),
    ("preactivation", "inner convs empty"),
]


@pytest.mark.parametrize(("kind", "case"), NARROW)
def test_float32_within_1e_3(kind, case):
    """Relative to the largest entry of each tensor; sums run in another order, that is all."""
    net, layers = plain_net(kind, dtype=torch.float32), NETWORKS[kind].LAYERS
    mask_U = flat_mask(layers, MASKS[kind][case], seed=5)
    data = batch(dtype=torch.float32)
    masked = run_network(sparse_network(net, layers, "masked"), mask_U, True, data)
    for multiple in (1, 8):
        compact = run_network(sparse_network(net, layers, multiple=multiple), mask_U, True, data)
        assert_near(compact, masked, tolerance=1e-3)


@pytest.mark.parametrize(("kind", "case"), NARROW)
def test_bfloat16_near_float32(kind, case):
    """Convolutions in bfloat16 (8 bits) against float32: logits within 3 %, the whole gradient within 15 %.

    Seen were 0.8 % and 8 %: small maps behind several batch-norms. Parameters, gradients and statistics stay float32.
    """
    net, layers = plain_net(kind, dtype=torch.float32), NETWORKS[kind].LAYERS
    mask_U = flat_mask(layers, MASKS[kind][case], seed=5)
    images, labels = batch(32, dtype=torch.float32)
    exact = run_network(sparse_network(net, layers, "masked"), mask_U, True, (images, labels))
    for execution, multiple in (("masked", 1), ("compact", 1), ("compact", 4)):
        network = sparse_network(net, layers, execution, multiple=multiple)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(images, network.plan(mask_U))
        F.cross_entropy(logits.float(), labels).backward()
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - exact.logits).abs().max() <= 0.03 * exact.logits.abs().max()
        gradients = gradients_of(network.model)
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        both = [torch.cat([g[name].flatten() for name in gradients]) for g in (gradients, exact.gradients)]
        assert (both[0] - both[1]).norm() <= 0.15 * both[1].norm()
        for name, pair in statistics_of(network.model).items():
            for mine, its in zip(pair, exact.statistics[name], strict=True):
                assert (mine - its).abs().max() <= 0.03 * its.abs().max().clamp(min=1), name


def assert_near(one: Outcome, other: Outcome, tolerance: float) -> None:
    """The largest difference of each tensor against its largest entry (of the statistics: against 1)."""
    assert (one.loss - other.loss).abs() <= tolerance * other.loss
    assert (one.logits - other.logits).abs().max() <= tolerance * other.logits.abs().max()
    scale = max(gradient.abs().max() for gradient in other.gradients.values())
    for name, gradient in one.gradients.items():
        largest = other.gradients[name].abs().max().clamp(min=1e-2 * scale)
        assert (gradient - other.gradients[name]).abs().max() <= tolerance * largest, name
    for name, pair in one.statistics.items():
        for mine, its in zip(pair, other.statistics[name], strict=True):
            assert (mine - its).abs().max() <= tolerance * its.abs().max().clamp(min=1), name


@pytest.mark.parametrize("kind", NETWORKS)
def test_channels_last_gives_the_same_numbers_and_keeps_the_layout(kind):
    net, layers = plain_net(kind), NETWORKS[kind].LAYERS
    mask_U = flat_mask(layers, {}, seed=5)
    images, labels = batch()
    expected = run_network(sparse_network(net, layers), mask_U, True)
    net = net.to(memory_format=torch.channels_last)
    data = images.contiguous(memory_format=torch.channels_last), labels
    for multiple in (1, 4):
        network = sparse_network(net, layers, multiple=multiple)
        outcome = run_network(network, mask_U, True, data)
        assert_same(outcome, expected, **EXACT)
        for name, parameter in network.model.named_parameters():
            if parameter.dim() == 4:
                assert parameter.grad.is_contiguous(memory_format=torch.channels_last), name


# --- small promises -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_a_pass_for_its_loss_alone_moves_no_statistics(execution):
    layers = NETWORKS["released"].LAYERS
    mask_U = flat_mask(layers, {}, seed=5)
    quiet, loud = (sparse_network(plain_net("released"), layers, execution) for _ in range(2))
    before = copy.deepcopy(quiet.model.state_dict())
    images, _ = batch()
    logits = quiet(images, quiet.plan(mask_U), update_statistics=False)
    torch.testing.assert_close(quiet.model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(logits, loud(images, loud.plan(mask_U)), rtol=1e-13, atol=1e-13)


def test_masks_are_gone_after_a_masked_pass_even_if_it_fails():
    network = sparse_network(plain_net("released"), NETWORKS["released"].LAYERS, "masked")
    plan = network.plan(flat_mask(NETWORKS["released"].LAYERS, {}))
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 5"):
        network(torch.zeros(2, 5, 8, 8, dtype=torch.float64), plan, update_statistics=False)
    for module in network.model.modules():
        assert getattr(module, "mask", None) is None
        assert getattr(module, "live", None) is None
        assert getattr(module, "update_statistics", True)


def test_images_are_never_changed():
    """Even where the first layer works in place."""
    for execution in ("compact", "masked"):
        network = sparse_network(plain_net("released"), NETWORKS["released"].LAYERS, execution)
        images, _ = batch()
        before = images.clone()
        network(images, network.plan(flat_mask(NETWORKS["released"].LAYERS, {})))
        assert torch.equal(images, before)


def test_released_semantics_refuse_compact_execution():
    with pytest.raises(ValueError, match="released"):
        SparseNetwork(plain_net("released"), IMAGE_SHAPE, "compact", "released")


def test_layer_scores_are_views_of_the_flat_vector():
    network = sparse_network(plain_net("released"), NETWORKS["released"].LAYERS)
    network.scores.copy_(torch.arange(54) / 54)
    for name, part in zip(network.layers, network.split(network.scores), strict=True):
        assert torch.equal(network.layers[name].scores, part)
    network.layers["layer1.0.conv2"].scores.zero_()
    assert network.scores[12:18].count_nonzero() == 0
    assert all(parameter is not network.scores for parameter in network.weight_parameters())
    assert len(network.weight_parameters()) == len(list(plain_net("released").parameters()))


def test_a_network_without_masks_runs_dense():
    net = plain_net("released")
    images, _ = batch()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        network = SparseNetwork(copy.deepcopy(net), IMAGE_SHAPE)
    finally:
        torch.set_default_dtype(default)
    assert network.num_units == 0
    torch.testing.assert_close(network(images, network.dense_plan), net.train()(images), **EXACT)
