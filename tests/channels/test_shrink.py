"""Units that leave the parameters change nothing else; layers of one residual stream that are tied share units."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.channels.registry import NETWORKS, images_and_labels, network_of
from tests.channels.small import SMALL
from tests.toy import (
    config,
    one_thread,  # noqa: F401
    search_of,
    sparse_network,
)
from trainers.default import StepSettings, train_step
from trainers.state import Search
from utils.channels.shrink import drop_dead_units, shrink_to, stays_zero

CLOSE = {"rtol": 1e-7, "atol": 1e-9}


def search_in(arch: str, width_mult: float, estimator: str = "vrpge", residual_masks: str = "free") -> Search:
    network = network_of(arch, width_mult, residual_masks=residual_masks)
    weights = torch.optim.SGD(network.weight_parameters(), 0.05, 0.9, weight_decay=5e-4, fused=True)
    return search_of(network, config(estimator=estimator), weight_optimizer=weights)


# Every network with both estimators and, if it has residual streams, with both kinds of masks; the rest is slow.
FAST = (
    *(("vgg16", "vrpge", "free"), ("vgg16", "linear_cv_gates", "free")),
    *(("resnet20_he", "vrpge", "free"), ("resnet20_he", "linear_cv_gates", "tied")),
    *(("wrn28_10", "vrpge", "tied"), ("wrn28_10", "linear_cv_gates", "free")),
)


@pytest.mark.parametrize(
    ("arch", "width_mult", "estimator", "residual_masks"),
    [
        pytest.param(*network, *case, marks=[pytest.mark.slow] * ((network[0], *case) not in FAST))
        for network in NETWORKS
        for case in product(("vrpge", "linear_cv_gates"), ("free", "tied"))
    ],
)
def test_a_search_takes_the_same_steps_whether_dead_units_leave_or_not(arch, width_mult, estimator, residual_masks):
    whole, shrinking = (search_in(arch, width_mult, estimator, residual_masks) for _ in range(2))
    options, num_left = config(estimator=estimator, batch_size=8), 0
    settings = StepSettings(weight_lr=0.05, score_lr=0.2, keep_ratio=0.3)
    for step in range(8):
        kept, other = (train_step(s, *images_and_labels(seed=step), settings, options) for s in (whole, shrinking))
        for name, value in kept.metrics.items():
            torch.testing.assert_close(other.metrics[name], value, **CLOSE, msg=name)
        assert [cost[0] for cost in other.forward] == [cost[0] for cost in kept.forward]
        torch.testing.assert_close(shrinking.network.scores, whole.network.scores, **CLOSE)
        for name, value in whole.estimator.state_dict().items():
            torch.testing.assert_close(shrinking.estimator.state_dict()[name], value, rtol=1e-6, atol=1e-8, msg=name)
        num_left += drop_dead_units(shrinking.network, shrinking.score_optimizer, shrinking.weight_optimizer)
    assert num_left > 0.2 * whole.network.num_units
    assert num_left == (~shrinking.network.stored_units).sum()
    sizes = [sum(p.numel() for p in search.network.weight_parameters()) for search in (whole, shrinking)]
    assert sizes[1] < 0.8 * sizes[0]
    momenta = [state["momentum_buffer"] for state in shrinking.weight_optimizer.state.values()]
    assert sum(momentum.numel() for momentum in momenta) == sizes[1]
    mask_U = shrinking.network.stored_units & (shrinking.network.scores.numpy() > 0.5)
    images, _ = images_and_labels(seed=99)
    for network in (whole.network, shrinking.network):
        network.model.eval()
    logits = [network(images, network.plan(mask_U)) for network in (whole.network, shrinking.network)]
    torch.testing.assert_close(logits[1], logits[0], **CLOSE)


def test_which_scores_stay_zero():
    scores = torch.nn.Parameter(torch.tensor([0.0, 0.0, 0.5, 1.0]), requires_grad=False)
    optimizer = torch.optim.Adam([scores], lr=0.0)
    assert stays_zero(scores, optimizer).tolist() == [True, True, False, False]  # no step yet: no moment
    scores.grad = torch.tensor([-1.0, 1.0, 1.0, 1.0])
    optimizer.step()
    assert stays_zero(scores, optimizer).tolist() == [False, True, False, False]  # the first is about to rise
    descent = torch.optim.SGD([scores], lr=0.0, momentum=0.9)
    descent.step()
    assert stays_zero(scores, descent).tolist() == [False, True, False, False]


def test_what_is_left_are_the_rows_and_columns_of_live_channels():
    """By hand on a chain: a convolution in the middle without units, and a flatten that reads four pixels each."""
    network = sparse_network(SMALL["chain"]().double(), SMALL["chain"].LAYERS)
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    images, _ = images_and_labels()
    F.cross_entropy(network(images[:, :, :8, :8], network.dense_plan), torch.arange(8) % 5).backward()
    units_U = np.array([True, False, True, False, True, True, False])
    assert shrink_to(network, units_U, keep_fallback=False) == 3
    one, three, columns = [0, 2], [1, 2], [4, 5, 6, 7, 8, 9, 10, 11]
    expected = before | {f"conv1.{key}": before[f"conv1.{key}"][one] for key in ("weight", "bias")}
    expected |= {f"bn.{key}": before[f"bn.{key}"][one] for key in ("weight", "bias", "running_mean", "running_var")}
    expected["conv2.weight"] = before["conv2.weight"][:, one]
    expected["conv3.weight"] = before["conv3.weight"][three]
    expected["linear.weight"] = before["linear.weight"][:, columns]
    for name, tensor in network.model.state_dict().items():
        if "running" not in name:  # which the pass above moved
            assert torch.equal(tensor, expected[name]), name
        assert tensor.shape == expected[name].shape
    assert all(parameter.grad is None for parameter in network.weight_parameters())


def test_a_unit_that_has_left_cannot_be_kept_again():
    network = network_of("vgg16", 0.0625)
    units_U = np.random.default_rng(0).random(network.num_units) < 0.5
    assert shrink_to(network, units_U) > 0
    with pytest.raises(AssertionError, match="have left the parameters"):
        network.plan(np.ones(network.num_units, dtype=bool))


def test_the_fallback_of_the_layer_guard_stays_unless_it_is_not_needed():
    network = network_of("vgg16", 0.0625)
    shrink_to(network, np.zeros(network.num_units, dtype=bool))
    network.scores.data.zero_()
    plan = network.plan(np.zeros(network.num_units, dtype=bool))
    assert network(images_and_labels()[0], plan).shape == (8, 10)
    assert network.stored_units.sum() == len(network.layers)

    network = network_of("vgg16", 0.0625)
    last_U = np.zeros(network.num_units, dtype=bool)
    last_U[[group[-1] for group in network.graph.vital_groups]] = True
    shrink_to(network, last_U, keep_fallback=False)
    assert np.array_equal(network.stored_units, last_U)
    assert network(images_and_labels()[0], network.plan(last_U)).shape == (8, 10)


def test_cutting_twice_is_cutting_once():
    once, twice = (network_of("resnet20_he", 0.25) for _ in range(2))
    random = np.random.default_rng(1)
    first_U = random.random(once.num_units) < 0.7
    second_U = random.random(once.num_units) < 0.7
    shrink_to(once, first_U & second_U)
    shrink_to(twice, first_U)
    shrink_to(twice, second_U)  # what was cut before stays cut
    for one, other in zip(once.model.state_dict().values(), twice.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_layer_that_runs_on_different_channels_cannot_shrink():
    network = sparse_network(SMALL["twice"](), SMALL["twice"].LAYERS)
    with pytest.raises(ValueError, match="again runs on different channels"):
        shrink_to(network, np.arange(network.num_units) > 1)


# --- tied residual masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "width_mult"), NETWORKS)
def test_tied_compact_equals_tied_masked(arch, width_mult):
    networks = [network_of(arch, width_mult, residual_masks="tied", execution=e) for e in ("compact", "masked")]
    for seed in range(3):
        mask_U = np.random.default_rng(seed).random(networks[0].num_units) < 0.4
        images, labels = images_and_labels(seed=seed)
        for network in networks:
            network.model.zero_grad()
            F.cross_entropy(network(images, network.plan(mask_U)), labels).backward()
        for one, other in zip(*(network.weight_parameters() for network in networks), strict=True):
            gradient = torch.zeros_like(one) if one.grad is None else one.grad
            torch.testing.assert_close(gradient, other.grad, rtol=1e-8, atol=1e-10)
        for one, other in zip(*(network.model.buffers() for network in networks), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_tied_layers_share_units_and_the_stream_is_as_wide_as_they_keep():
    free, tied = (network_of("resnet20_he", 0.25, residual_masks=masks) for masks in ("free", "tied"))
    writers = [name for name in tied.layers if name == "conv1" or (name.startswith("layer1") and "conv2" in name)]
    assert len({tied.graph.first_unit[name] for name in writers}) == 1
    assert len({free.graph.first_unit[name] for name in writers}) == len(writers) == 4
    # one group a stage for the stream, one for each first convolution of a block
    assert tied.num_units == sum((1 + 3) * width for width in (4, 8, 16))
    tied.scores.data.copy_(torch.arange(tied.num_units))
    assert all(torch.equal(tied.layers[name].scores, tied.layers["conv1"].scores) for name in writers)
    plan = tied.plan(np.random.default_rng(0).random(tied.num_units) < 0.5)
    sums = [op for op in tied.graph.ops if op.kind == "add"]
    assert all(tied.graph.ops[i].space == op.space for op in sums for i in op.inputs)
    assert plan.positions == {}
