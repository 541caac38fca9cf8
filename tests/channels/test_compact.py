"""Compact = masked = a reference written by hand: loss, gradients, running statistics."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.channels.passes import (
    CASES,
    EXACT,
    MASKS,
    PADDING,
    assert_same,
    gradients_of,
    run_network,
    run_reference,
    statistics_of,
)
from tests.toy import (
    IMAGE_SHAPE,
    NETWORKS,
    batch,
    by_layer,
    flat_mask,
    one_thread,  # noqa: F401
    plain_net,
    sparse_network,
)
from utils.channels.network import SparseNetwork
from utils.channels.slots import SPREADING, joined_spaces


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
    spreading = data.draw(st.sampled_from([0, SPREADING["fp32"], 10**9]))
    expected = run_reference(kind, copy.deepcopy(net), mask_U, True)
    assert_same(run_network(masked, np.array(bits), True), expected, **EXACT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPREADING, "fp32", spreading)
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
    sums = {inner: plan.widths[outer] for inner, outer in joined_spaces(network.graph)}
    for i, (space, live, count) in enumerate(zip(network.graph.spaces, plan.live, plan.counts, strict=True)):
        assert count == live.sum()
        own = space.width if space.full else min(-(-count // multiple) * multiple, space.width)
        assert plan.widths[i] == own or (multiple > 1 and plan.widths[i] == sums[i] > own)
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
    with pytest.raises(RuntimeError, match="should be the same"):
        network(torch.zeros(2, 3, 8, 8, dtype=torch.float32), plan, update_statistics=False)
    for module in network.model.modules():
        assert getattr(module, "masks", None) is None
        assert getattr(module, "update_statistics", True)


def test_images_are_never_changed():
    """Even where the first layer works in place."""
    for execution in ("compact", "masked"):
        network = sparse_network(plain_net("released"), NETWORKS["released"].LAYERS, execution)
        images, _ = batch()
        before = images.clone()
        network(images, network.plan(flat_mask(NETWORKS["released"].LAYERS, {})))
        assert torch.equal(images, before)


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
