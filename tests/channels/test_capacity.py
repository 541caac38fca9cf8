"""Plans of fixed shapes: the numbers of the reference, the same operations for every draw, and how many slots."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.channels.passes import CASES, EXACT, MASKS, Outcome, assert_same, gradients_of, run_reference, statistics_of
from tests.channels.registry import images_and_labels, network_of
from tests.channels.small import SMALL
from tests.channels.test_joined_maps import every_mask, toy_network
from tests.toy import (
    NETWORKS,
    batch,
    config,
    flat_mask,
    one_thread,  # noqa: F401
    plain_net,
    search_of,
    sparse_network,
)
from trainers.default import StepSettings, train_step
from utils.channels.capacity import SIGMAS, capacities_for, stored_runs
from utils.channels.network import SparseNetwork
from utils.channels.plan import Plan
from utils.channels.shrink import drop_dead_units, shrink_to
from utils.channels.spaces import Segment

FAMILIES = [("vgg16", 0.0625), ("resnet20_he", 0.25), ("wrn16_8", 0.05), ("mobilenet_v1", 0.125), ("resnet50", 0.0625)]


def live_counts(network: SparseNetwork, mask_U: np.ndarray) -> list[int]:
    """How many channels of each run are live, and how many are stored."""
    counts = []
    for segment, own in stored_runs(network.graph, network.stored):
        kept = [mask_U[first : first + segment.width] for first in segment.writers]
        counts.append((int(np.any(kept, axis=0).sum()) if kept else segment.width, int(own.sum())))
    return counts


def fixed_plan(network: SparseNetwork, mask_U: np.ndarray, spare: int) -> Plan:
    """A plan of fixed shapes with so many slots beyond those that the mask needs, as far as there are channels."""
    guarded_U = network.plan(mask_U).mask_U
    network.fix_shapes([min(live + spare, stored) for live, stored in live_counts(network, guarded_U)])
    (plan,) = network.plans(mask_U[None])
    assert plan.fixed
    assert np.array_equal(plan.mask_U, guarded_U)
    return plan


def outcome_of(network: SparseNetwork, plan: Plan, data: tuple, training: bool = True) -> Outcome:
    images, labels = data
    network.model.train(training)
    network.model.zero_grad()
    logits = network(images, plan)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return Outcome(loss.detach(), logits.detach(), gradients_of(network.model), statistics_of(network.model))


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_fixed_shapes_are_the_hand_written_reference(kind, case):
    net, layers = plain_net(kind), NETWORKS[kind].LAYERS
    mask_U = flat_mask(layers, MASKS[kind][case], seed=5)
    for training in (False, True):
        expected = run_reference(kind, copy.deepcopy(net), mask_U, training)
        for spare in (0, 1, 2, 99):
            network = sparse_network(net, layers)
            plan = fixed_plan(network, mask_U, spare)
            assert_same(outcome_of(network, plan, batch(), training), expected, **EXACT)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(NETWORKS)), st.data())
def test_any_mask_in_any_number_of_slots(kind, data):
    layers = NETWORKS[kind].LAYERS
    bits = np.array(data.draw(st.lists(st.booleans(), min_size=(n := sum(layers.values())), max_size=n)))
    net = plain_net(kind)
    masked, fixed = (sparse_network(net, layers, execution) for execution in ("masked", "compact"))
    mask_U = fixed.plan(bits).mask_U
    fixed.fix_shapes([data.draw(st.integers(live, stored)) for live, stored in live_counts(fixed, mask_U)])
    (plan,) = fixed.plans(bits[None])
    expected = outcome_of(masked, masked.plan(bits), batch())
    assert_same(outcome_of(fixed, plan, batch()), expected, **EXACT)


@pytest.mark.parametrize("spare", [0, 1])
def test_sums_of_concatenated_maps_of_which_a_part_is_always_there(spare):
    for mask_U in every_mask(12)[::409]:
        masked, fixed = toy_network("masked")[1], toy_network()[1]
        expected = outcome_of(masked, masked.plan(mask_U), batch())
        assert_same(outcome_of(fixed, fixed_plan(fixed, mask_U, spare), batch()), expected, **EXACT)


def test_two_sets_of_channels_in_as_many_slots_are_still_added_channel_by_channel():
    net, layers = plain_net("released"), NETWORKS["released"].LAYERS
    for case in ("disjoint", "random"):
        mask_U = flat_mask(layers, MASKS["released"][case], seed=5)
        network = sparse_network(net, layers)
        most = {6: 0, 12: 0}
        for (segment, _), (live, _) in zip(runs_of(network), live_counts(network, mask_U), strict=True):
            most[segment.width] = max(most.get(segment.width, 0), live if segment.writers else 0)
        network.fix_shapes([most[s.width] if s.writers else s.width for s, _ in runs_of(network)])
        (plan,) = network.plans(mask_U[None])
        expected = run_reference("released", copy.deepcopy(net), mask_U, True)
        assert_same(outcome_of(network, plan, batch()), expected, **EXACT)


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_with_every_operation(name):
    """Among them a layer that runs twice."""
    net = SMALL[name]().double()
    for seed in range(4):
        masked, fixed = (sparse_network(net, SMALL[name].LAYERS, execution) for execution in ("masked", "compact"))
        mask_U = np.random.default_rng(seed).random(fixed.num_units) < 0.5
        images, labels = batch()[0], batch()[1] % 5
        expected = outcome_of(masked, masked.plan(mask_U), (images, labels))
        assert_same(outcome_of(fixed, fixed_plan(fixed, mask_U, 1), (images, labels)), expected, **EXACT)


def cut_like(values: SparseNetwork, outcome: Outcome, units_U: np.ndarray) -> Outcome:
    """Gradients and statistics of a whole network, cut down to some units by a second network that holds them."""
    for name, gradient in outcome.gradients.items():
        values.model.get_parameter(name).data.copy_(gradient)
    for name, (mean, var) in outcome.statistics.items():
        norm = values.model.get_submodule(name)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
    shrink_to(values, units_U)
    gradients = {name: p.detach() for name, p in values.model.named_parameters() if p.requires_grad}
    return Outcome(outcome.loss, outcome.logits, gradients, statistics_of(values.model))


# A chain, additions of residual streams, and depthwise layers; the other families combine them.
QUICK = ("vgg16", "resnet20_he", "mobilenet_v1")


@pytest.mark.parametrize(
    ("arch", "width_mult", "residual_masks", "left"),
    [
        pytest.param(*family, masks, left, marks=[pytest.mark.slow] * (family[0] not in QUICK or tied == left))
        for family in FAMILIES
        for tied, masks in enumerate(("free", "tied"))
        for left in (False, True)  # units have left
    ],
)
def test_every_family_equals_masked_execution(arch, width_mult, residual_masks, left):
    masked = network_of(arch, width_mult, execution="masked", residual_masks=residual_masks)
    fixed, values = (network_of(arch, width_mult, residual_masks=residual_masks, multiple=2) for _ in range(2))
    random = np.random.default_rng(1)
    scores_U = random.random(fixed.num_units)
    if left:
        scores_U[random.random(fixed.num_units) < 0.4] = 0
    for network in (masked, fixed):
        network.scores.data.copy_(torch.from_numpy(scores_U))
    units_U = scores_U > 0
    shrink_to(fixed, units_U)
    fixed.fix_shapes()
    assert any(slots < int(own.sum()) for slots, (_, own) in zip(fixed.shapes.slots, runs_of(fixed), strict=True))
    masks = random.random((2, fixed.num_units)) < scores_U
    plans, data = fixed.plans(masks), images_and_labels(4)
    assert all(plan.fixed for plan in plans)
    expected = outcome_of(masked, masked.plan(plans[0].mask_U), data)
    assert_same(outcome_of(fixed, plans[0], data), cut_like(values, expected, units_U), rtol=1e-6, atol=1e-9)


def runs_of(network: SparseNetwork) -> list[tuple[Segment, np.ndarray]]:
    return stored_runs(network.graph, network.stored)


@pytest.mark.parametrize("kind", NETWORKS)
def test_gradients_of_dropped_units_are_exact_zeros(kind):
    layers = NETWORKS[kind].LAYERS
    mask_U = flat_mask(layers, {}, seed=3)
    network = sparse_network(plain_net(kind), layers)
    gradients = outcome_of(network, fixed_plan(network, mask_U, 2), batch()).gradients
    for name, part in zip(layers, np.split(mask_U, np.cumsum(list(layers.values()))[:-1]), strict=True):
        assert gradients[f"{name}.weight"][~part].count_nonzero() == 0
        assert gradients[f"{name}.weight"][part].count_nonzero() > 0


def test_a_search_takes_the_same_steps_whatever_shapes_it_has():
    drawn, fixed = (search_of(network_of("resnet20_he", 0.25, multiple=2), config()) for _ in range(2))
    settings, num_fixed = StepSettings(weight_lr=0.05, score_lr=0.2, keep_ratio=0.3), 0
    for step in range(6):
        if step % 2 == 0:
            fixed.network.fix_shapes()
        num_fixed += all(plan.fixed for plan in fixed.masks.plans(fixed.network))
        one, other = (train_step(search, *images_and_labels(4, step), settings, config()) for search in (drawn, fixed))
        for name, value in one.metrics.items():
            torch.testing.assert_close(other.metrics[name], value, rtol=1e-7, atol=1e-9, msg=name)
        assert [cost[0] for cost in other.forward] == [cost[0] for cost in one.forward]
        for search in (drawn, fixed):
            drop_dead_units(search.network, search.score_optimizer, search.weight_optimizer)
    assert num_fixed >= 3
    assert fixed.network.stored_units.mean() < 0.9
    for one, other in zip(
        drawn.network.model.state_dict().values(), fixed.network.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-8)


# --- the shapes -----------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Every operation of torch with the shapes and strides of the tensors that it reads and makes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        self.operations.append((str(operation), *((tuple(x.shape), x.stride()) for x in tensors)))
        return result


def operations_of(network: SparseNetwork, plans: list[Plan]) -> list[tuple]:
    images, labels = images_and_labels(2)
    network.clear_gradients()
    with Recorder() as recorder:
        loss = F.cross_entropy(network(images, plans[0]), labels)
        with torch.no_grad():
            network(images, plans[1], update_statistics=False)
        loss.backward()
    return recorder.operations


@pytest.mark.parametrize(
    ("arch", "width_mult"),
    [pytest.param(*family, marks=[pytest.mark.slow] * (family[0] not in QUICK)) for family in FAMILIES],
)
def test_all_draws_run_the_same_operations_on_the_same_shapes(arch, width_mult):
    network = network_of(arch, width_mult, multiple=2)
    scores_U = np.random.default_rng(0).random(network.num_units)
    network.scores.data.copy_(torch.from_numpy(scores_U))
    network.fix_shapes()
    draws = [np.random.default_rng(seed).random((2, network.num_units)) < scores_U for seed in range(4)]
    plans = [pair for pair in map(network.plans, draws) if pair[0].fixed][:3]
    assert len(plans) >= 2
    assert len({plan[0].mask_U.tobytes() for plan in plans}) == len(plans)
    operations_of(network, plans[0])  # after which the buffers of gradients exist
    first, *others = (operations_of(network, pair) for pair in plans)
    assert all(other == first for other in others)
    network.shapes = None
    assert operations_of(network, network.plans(draws[0])) != operations_of(network, network.plans(draws[1]))


def test_a_step_whose_masks_do_not_all_fit_has_the_shapes_of_its_masks():
    layers = NETWORKS["released"].LAYERS
    network = sparse_network(plain_net("released"), layers)
    narrow_U, wide_U = flat_mask(layers, MASKS["released"]["one channel each"]), np.ones(network.num_units, dtype=bool)
    network.fix_shapes([min(live + 1, own) for live, own in live_counts(network, narrow_U)])
    assert [plan.fixed for plan in network.plans(np.stack([narrow_U, narrow_U]))] == [True, True]
    for masks_KU in (np.stack([narrow_U, wide_U]), np.stack([wide_U, narrow_U])):
        plans = network.plans(masks_KU)
        assert [plan.fixed for plan in plans] == [False, False]
        for plan, mask_U in zip(plans, masks_KU, strict=True):
            alone = network.plan(mask_U)
            assert (plan.widths, plan.counts) == (alone.widths, alone.counts)
            for one, other in zip(plan.lists(), alone.lists(), strict=True):
                assert torch.equal(one, other)


def test_shapes_end_when_units_leave_and_can_be_put_back():
    network = network_of("vgg16", 0.0625)
    network.scores.data.fill_(0.5)
    assert not network.plans(np.ones((1, network.num_units), dtype=bool))[0].fixed
    network.fix_shapes()
    slots = network.shapes.slots
    units_U = np.random.default_rng(0).random(network.num_units) < 0.8
    shrink_to(network, units_U)
    assert network.shapes is None
    network.fix_shapes(
        smaller := [min(one, int(own.sum())) for one, (_, own) in zip(slots, runs_of(network), strict=True)]
    )
    assert network.shapes.slots == smaller


# --- how many slots -------------------------------------------------------------------------------------------------


def by_name(network: SparseNetwork, capacities: dict[Segment, int]) -> dict[str, int]:
    """The slots of runs that maskable layers write, by the names of these layers."""
    names = {first: name for name, first in network.graph.first_unit.items()}
    return {"+".join(names[first] for first in sorted(s.writers)): n for s, n in capacities.items() if s.writers}


def test_the_number_of_slots_by_hand():
    network = sparse_network(plain_net("released"), NETWORKS["released"].LAYERS)
    scores_U = np.full(54, 0.5)
    scores_U[:6] = [0, 0, 1, 1, 1, 0]  # conv1: three channels for certain
    scores_U[6:12] = 0.01
    scores_U[30:42] = 0.1  # layer2.0.conv2, which adds to the shortcut
    stored = [np.ones(space.width, dtype=bool) for space in network.graph.spaces]
    slots = by_name(network, capacities_for(network.graph, scores_U, stored, 1))
    assert slots["conv1"] == 3
    assert slots["layer1.0.conv1"] == int(np.ceil(0.06 + 3.3 * (6 * 0.01 * 0.99) ** 0.5)) == 1
    assert slots["layer2.0.conv1"] == int(np.ceil(6 + 3.3 * (12 * 0.25) ** 0.5)) == 12
    assert slots["layer2.0.conv2"] == int(np.ceil(1.2 + 3.3 * (12 * 0.09) ** 0.5)) == 5
    live = 1 - 0.9 * 0.5
    wanted = 12 * live + 3.3 * (12 * live * (1 - live)) ** 0.5
    assert slots["layer2.0.conv2+layer2.0.shortcut.0"] == min(12, int(np.ceil(wanted))) == 12
    rounded = by_name(network, capacities_for(network.graph, scores_U, stored, 4))
    assert (rounded["conv1"], rounded["layer1.0.conv1"], rounded["layer2.0.conv2"]) == (4, 4, 8)
    scores_U[:12] = 0  # the layer guard still keeps a unit
    assert by_name(network, capacities_for(network.graph, scores_U, stored, 1))["conv1"] == 1


def test_only_stored_channels_have_slots():
    network = network_of("vgg16", 0.0625)
    network.scores.data.fill_(0.9)
    units_U = np.random.default_rng(0).random(network.num_units) < 0.5
    network.scores.data[~torch.from_numpy(units_U)] = 0
    shrink_to(network, units_U)
    network.fix_shapes()
    for slots, (segment, own) in zip(network.shapes.slots, runs_of(network), strict=True):
        assert slots <= own.sum()
        assert segment.writers or slots == segment.width


def share_that_fits(network: SparseNetwork, scores_U: np.ndarray, draws: int = 300) -> float:
    random = np.random.default_rng(7)
    masks = random.random((draws, network.num_units)) < scores_U
    return float(np.mean([network.shapes.plan(mask_U) is not None for mask_U in masks]))


@pytest.mark.parametrize("make", [lambda n, _: np.full(n, 0.3), lambda n, random: random.random(n) ** 3])
def test_nearly_all_draws_fit(make: Callable):
    network = network_of("vgg16", 0.25, multiple=1)
    scores_U = make(network.num_units, np.random.default_rng(0))
    network.scores.data.copy_(torch.from_numpy(scores_U))
    network.fix_shapes()
    assert SIGMAS == 3.3
    assert share_that_fits(network, scores_U) >= 0.98
    assert share_that_fits(network, np.minimum(1, scores_U * 1.5)) < 0.9
