"""One iteration, taken apart: what each of its parts sees, in which order, and what it leaves alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import trainers.default
from args import Config
from tests.toy import (
    NETWORKS,
    ReleasedNet,
    batch,
    by_layer,
    config,
    flat_mask,
    one_thread,  # noqa: F401
    plain_net,
    search_of,
    sparse_network,
)
from trainers.default import StepSettings, calculateGrad, stored_masks, train_step, weight_step
from trainers.methods.released import Released
from trainers.state import RunState, Search
from utils.algorithm.estimators.vrpge import VRPGEEstimator, vrpge_gradient
from utils.algorithm.masks import sample_masks
from utils.channels.budget import Budget
from utils.channels.network import SparseNetwork

LAYERS = ReleasedNet.LAYERS
EXACT = {"rtol": 1e-12, "atol": 1e-14}
STEP = StepSettings(weight_lr=0.1, score_lr=0.05, keep_ratio=0.4)


def search_state(
    masks: list[np.ndarray] | None = None,
    execution: str = "compact",
    kind: str = "released",
    score_optimizer: Callable = torch.optim.Adam,
    **options: Any,
) -> tuple[Search, Config]:
    """A search whose next step runs `masks`, or drawn ones, and its options."""
    network = sparse_network(plain_net(kind), NETWORKS[kind].LAYERS, execution)
    generator = torch.Generator().manual_seed(4)
    network.scores.copy_(torch.rand(network.num_units, generator=generator, dtype=torch.float64) * 0.6 + 0.1)
    network.model.train()
    settings = config(**{"K": 2 if masks is None else len(masks), **options})
    search = search_of(
        network,
        settings,
        masks_KU=None if masks is None else torch.from_numpy(np.stack(masks)),
        seed=4,
        weight_optimizer=torch.optim.SGD(network.weight_parameters(), lr=9.0, momentum=0.9, weight_decay=5e-2),
        score_optimizer=score_optimizer([network.scores], lr=9.0),
    )
    return search, settings


def set_masks(search: Search, options: Config, masks: list[np.ndarray]) -> None:
    """Lets the next step run these masks."""
    search.masks = stored_masks(torch.from_numpy(np.stack(masks)), options, search.network.device)


def run_of(search: Search) -> RunState:
    return RunState(search.network, search.budget, search.weight_optimizer, "search", search.network.dense_plan, search)


def random_masks(*seeds: int) -> list[np.ndarray]:
    return [flat_mask(LAYERS, {}, seed) for seed in seeds]


def snapshot(network: SparseNetwork) -> dict[str, Tensor]:
    return copy.deepcopy(network.model.state_dict())


def loss_under(state: Search, mask_U: np.ndarray, **kwargs) -> Tensor:
    """The loss under a mask on a copy, so that nothing of `state` moves."""
    network = copy.deepcopy(state.network)
    images, labels = batch()
    return F.cross_entropy(network(images, network.plan(mask_U)), labels, **kwargs).detach()


@pytest.fixture
def count_passes(monkeypatch) -> list[tuple[bool, bool]]:
    """Per forward pass: did it keep a graph, did it update statistics."""
    passes: list[tuple[bool, bool]] = []
    original = SparseNetwork.__call__

    def counted(self, images, plan, update_statistics=True):
        passes.append((torch.is_grad_enabled(), update_statistics))
        return original(self, images, plan, update_statistics)

    monkeypatch.setattr(SparseNetwork, "__call__", counted)
    return passes


# --- the passes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        ((1, 2), [(True, True), (False, False)]),
        ((1, 1), [(True, True)]),  # the same subnet: its loss is known
        ((1, 2, 3), [(True, True), (False, False), (False, False)]),
        ((1, 2, 1), [(True, True), (False, False)]),
        ((1, 2, 2), [(True, True), (False, False)]),
        ((1, 1, 2), [(True, True), (False, False)]),
        ((1, 1, 1, 1), [(True, True)]),
    ],
)
def test_which_passes_run_keep_a_graph_and_move_statistics(count_passes, seeds, expected):
    state, options = search_state(random_masks(*seeds))
    network, plans = state.network, state.masks.plans(state.network)
    result = train_step(state, *batch(), STEP, options)
    assert count_passes == expected
    assert state.masks.own_KU.shape == (len(seeds), 54)
    ran = [plan for k, plan in enumerate(plans) if not any(np.array_equal(plan.mask_U, p.mask_U) for p in plans[:k])]
    assert result.forward == [(network.executed_macs(plan), network.padded_macs(plan)) for plan in ran]
    assert result.num_backward == 1


def test_a_step_without_a_structure_step_runs_one_pass_and_draws_anew(count_passes):
    state, options = search_state(random_masks(1, 2))
    before, masks = state.network.scores.clone(), state.masks.own_KU
    settings = dataclasses.replace(STEP, update_scores=False, keep_ratio=1.0)
    result = train_step(state, *batch(), settings, options)
    assert count_passes == [(True, True)]
    assert len(result.forward) == 1
    assert torch.equal(state.network.scores, before)
    assert not torch.equal(state.masks.own_KU, masks)


def test_the_released_step_runs_every_pass_with_a_graph(count_passes):
    state, options = search_state(random_masks(1, 1, 2), "released")
    result = Released(options).step(run_of(state), *batch(), STEP)
    assert count_passes == [(True, True)] * 3
    assert result.num_backward == 3
    assert result.forward == [(state.network.dense_macs,) * 2] * 3


def test_masks_that_only_the_guard_makes_equal_share_a_pass(count_passes):
    """Drawn differently, run alike: both stems are empty or keep the very unit that the guard would add."""
    one = flat_mask(LAYERS, {"conv1": ()}, seed=1)
    state, options = search_state([one, one])
    other = state.network.plan(one).mask_U.copy()
    assert not np.array_equal(one, other)
    set_masks(state, options, [one, other])
    result = train_step(state, *batch(), STEP, options).metrics
    assert len(count_passes) == 1
    assert result["loss_difference"] == 0
    assert state.network.scores.grad.count_nonzero() == 0


def test_equal_masks_leave_the_scores_to_the_projection_alone():
    state, options = search_state(random_masks(1, 1))
    before = state.network.scores.clone()
    train_step(state, *batch(), StepSettings(0.1, 0.05, 1.0), options)
    assert torch.equal(state.network.scores, before)


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_running_statistics_come_from_the_weight_pass_alone(execution):
    masks = random_masks(1, 2, 3)
    state, options = search_state(masks, execution)
    by_hand = copy.deepcopy(state.network)
    images, labels = batch()
    by_hand(images, by_hand.plan(masks[0]))
    train_step(state, images, labels, STEP, options)
    norms = by_hand.batch_norms()
    assert len(norms) == 6
    for name, norm in state.network.batch_norms().items():
        assert torch.equal(norm.running_mean, norms[name].running_mean)
        assert torch.equal(norm.running_var, norms[name].running_var)


# --- the structure step ---------------------------------------------------------------------------------------------


def test_calculate_grad_writes_exactly_the_estimator():
    scores = torch.nn.Parameter(torch.rand(54), requires_grad=False)
    masks_KU = torch.rand(3, 54) < 0.5
    losses_K = torch.tensor([2.3, 1.1, 1.9], requires_grad=True)
    estimator = VRPGEEstimator(scores, alpha=0.75)
    calculateGrad(scores, masks_KU, losses_K, estimator)
    assert torch.equal(scores.grad, vrpge_gradient(scores, masks_KU, losses_K.detach(), 0.75))
    assert scores.grad.count_nonzero() > 20
    assert not scores.grad.requires_grad
    first = scores.grad
    calculateGrad(scores, masks_KU, losses_K.flip(0), estimator)
    assert not torch.equal(first, scores.grad)  # written, not added up
    torch.testing.assert_close(scores.grad, vrpge_gradient(scores, masks_KU, losses_K.detach().flip(0), 0.75))


@pytest.mark.parametrize("alpha", [0.5, 0.75])
@pytest.mark.parametrize("num_masks", [2, 3])
def test_the_score_gradient_is_that_of_the_losses_under_the_masks(num_masks, alpha):
    masks = random_masks(*range(1, num_masks + 1))
    state, options = search_state(masks, alpha=alpha)
    before = state.network.scores.clone()
    losses_K = torch.stack([loss_under(state, mask) for mask in masks])
    train_step(state, *batch(), STEP, options)
    expected = vrpge_gradient(before, torch.from_numpy(np.stack(masks)), losses_K, alpha)
    torch.testing.assert_close(state.network.scores.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seeds", [(1, 2, 2), (1, 2, 1), (1, 1, 2)])
def test_a_pass_that_is_not_run_has_the_loss_of_its_twin(seeds):
    masks = random_masks(*seeds)
    state, options = search_state(masks)
    before = state.network.scores.clone()
    losses_K = torch.stack([loss_under(state, mask) for mask in masks])
    result = train_step(state, *batch(), STEP, options).metrics
    expected = vrpge_gradient(before, torch.from_numpy(np.stack(masks)), losses_K)
    torch.testing.assert_close(state.network.scores.grad, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result["loss"] / 6, losses_K[0], rtol=1e-10, atol=0)


def test_the_estimator_sees_the_masks_as_drawn_not_as_run():
    empty = flat_mask(LAYERS, {"conv1": ()}, seed=1)
    other = flat_mask(LAYERS, {"conv1": [2, 3]}, seed=2)
    state, options = search_state([empty, other])
    before = state.network.scores.clone()
    run = state.network.plan(empty).mask_U
    assert run[:6].sum() == 1
    losses_K = torch.stack([loss_under(state, empty), loss_under(state, other)])
    train_step(state, *batch(), STEP, options)
    expected = vrpge_gradient(before, torch.from_numpy(np.stack([empty, other])), losses_K)
    torch.testing.assert_close(state.network.scores.grad, expected, rtol=1e-9, atol=1e-12)
    as_run = vrpge_gradient(before, torch.from_numpy(np.stack([run, other])), losses_K)
    assert (expected - as_run).abs().max() > 1e-3


@pytest.mark.parametrize("by_layer_", [False, True])
def test_scores_stay_in_the_box_and_the_budget(by_layer_):
    state, options = search_state(K=3, constrain_by_layer=by_layer_)
    settings = StepSettings(weight_lr=0.01, score_lr=0.3, keep_ratio=0.4)
    saturated = set()
    for number in range(12):
        train_step(state, *batch(seed=number), settings, options)
        scores = state.network.scores
        assert scores.min() >= 0
        assert scores.max() <= 1
        assert scores.sum() <= 0.4 * 54 * (1 + 1e-6)
        if by_layer_:
            for part in state.network.split(scores):
                assert part.sum() <= 0.4 * len(part) * (1 + 1e-6)
        saturated |= {float(value) for value in scores if value in (0, 1)}
    assert saturated >= {0.0}  # the steps were big enough for the box to matter
    for layer, part in zip(state.network.layers.values(), state.network.split(scores), strict=True):
        assert torch.equal(layer.scores, part)


def test_the_next_masks_are_drawn_from_the_projected_scores():
    state, options = search_state()
    generator = torch.Generator()
    generator.set_state(state.generator.get_state())
    train_step(state, *batch(), StepSettings(0.1, 0.05, keep_ratio=0.2), options)  # v is large
    assert torch.equal(state.masks.own_KU, sample_masks(state.network.scores, generator, 2))
    assert torch.equal(state.generator.get_state(), generator.get_state())
    for mask, plan in zip(state.masks.own_KU.numpy(), state.masks.plans(state.network), strict=True):
        assert np.array_equal(state.network.plan(mask).mask_U, plan.mask_U)


@pytest.mark.parametrize("budget", ["channels", "flops"])
def test_a_gpu_has_the_weight_step_to_do_while_the_host_meets_a_budget_of_cost(monkeypatch, budget):
    """What the GPU projects itself comes before, so that the next masks are on their way early."""
    order = []
    for owner, name in ((Budget, "project_"), (Budget, "projected"), (trainers.default, "backward_")):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, name=name, original=original, **k: (order.append(name), original(*a, **k))[1]
        )
    state, options = search_state(budget=budget)
    train_step(state, *batch(), STEP, options)
    assert order == (["backward_", "projected"] if budget == "flops" else ["project_", "backward_"])


def test_the_slope_of_a_cost_is_that_at_the_scores_the_masks_were_drawn_from(monkeypatch):
    """The host knows them from the step before, and has to read them only once, in the first step of a start."""
    given = []
    original = Budget.remove_normal_
    monkeypatch.setattr(
        Budget,
        "remove_normal_",
        lambda self, ratio, known_U=None: (given.append(known_U), original(self, ratio, known_U)),
    )
    state, options = search_state(budget="flops", score_gradient="tangent")
    for _ in range(3):
        before = state.network.scores.detach().clone()
        train_step(state, *batch(), StepSettings(0.1, 0.05, keep_ratio=0.2), options)
        assert torch.equal(given[-1], before)
    assert not torch.equal(given[1], given[2])
    twins = [search_state(budget="flops", score_gradient="tangent") for _ in range(2)]
    twins[1][0].masks = stored_masks(twins[1][0].masks.own_KU, twins[1][1], torch.device("cpu"))
    for twin, settings in twins:
        train_step(twin, *batch(), StepSettings(0.1, 0.05, keep_ratio=0.2), settings)
    assert torch.equal(twins[0][0].network.scores, twins[1][0].network.scores)


def test_the_global_generator_is_not_used():
    (state, options), before = search_state(), torch.get_rng_state()
    train_step(state, *batch(), STEP, options)
    assert torch.equal(before, torch.get_rng_state())


# --- the weight step ------------------------------------------------------------------------------------------------


def gradients_of(loss: Tensor, weights: list[Tensor]) -> list[Tensor]:
    loss.backward()
    return [torch.zeros_like(weight) if weight.grad is None else weight.grad.clone() for weight in weights]


@pytest.mark.parametrize("released", [False, True])
def test_weights_take_the_step_of_the_masks_before_the_structure_step(released):
    """By hand: gradients of the mean loss at the state before, then SGD. The score step must not show in them."""
    masks = random_masks(1, 2, 3)
    state, options = search_state(masks, "released" if released else "compact")
    by_hand = copy.deepcopy(state.network)
    images, labels = batch()
    if released:
        Released(options).step(run_of(state), images, labels, STEP)
    else:
        train_step(state, images, labels, STEP, options)

    feeding = masks if released else masks[:1]
    losses = [F.cross_entropy(by_hand(images, by_hand.plan(mask), False), labels) for mask in feeding]
    weights = by_hand.weight_parameters()
    gradients = gradients_of(sum(losses) / len(feeding), weights)
    assert len(gradients) == len(state.network.weight_parameters()) == 6 * 3 + 1
    for before, after, gradient in zip(weights, state.network.weight_parameters(), gradients, strict=True):
        torch.testing.assert_close(after.grad, gradient, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(after, before - 0.1 * (gradient + 5e-2 * before), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_dropped_weights_get_exact_zeros_and_move_all_the_same(execution):
    """By weight decay in the first step, by momentum too in the second; a gradient of None would freeze them."""
    masks = random_masks(1, 2)
    state, options = search_state(masks, execution)
    conv = state.network.model.layer2[0].conv2
    dropped = ~by_layer(LAYERS, masks[0], torch.bool)["layer2.0.conv2"]
    assert 0 < dropped.sum() < 12
    start = conv.weight.detach().clone()
    train_step(state, *batch(), STEP, options)
    assert conv.weight.grad[dropped].count_nonzero() == 0
    torch.testing.assert_close(conv.weight.detach()[dropped], start[dropped] * (1 - 0.1 * 5e-2), **EXACT)

    middle = conv.weight.detach().clone()
    set_masks(state, options, masks)
    train_step(state, *batch(), STEP, options)
    momentum = 0.9 * 5e-2 * start[dropped] + 5e-2 * middle[dropped]
    torch.testing.assert_close(conv.weight.detach()[dropped], middle[dropped] - 0.1 * momentum, **EXACT)
    assert (conv.weight.detach()[dropped] != middle[dropped]).all()


def test_a_gradient_of_the_step_before_is_not_kept():
    """A unit kept in one step and dropped in the next: its gradient must be zero again, not the old one."""
    full, few = np.ones(54, dtype=bool), flat_mask(LAYERS, {"layer2.0.conv2": [0]}, seed=1)
    state, options = search_state([full, full])
    train_step(state, *batch(), STEP, options)
    conv = state.network.model.layer2[0].conv2
    assert conv.weight.grad[1:].count_nonzero() > 0
    set_masks(state, options, [few, few])
    train_step(state, *batch(), STEP, options)
    assert conv.weight.grad[1:].count_nonzero() == 0
    assert conv.weight.grad[0].count_nonzero() > 0


def test_a_parameter_that_took_no_part_at_all_still_moves():
    """Everything of an empty branch; with the gradient None, SGD would skip it."""
    mask = flat_mask(LAYERS, {"layer1.0.conv1": (), "layer1.0.conv2": ()}, seed=1)
    state, options = search_state([mask, mask])
    before = snapshot(state.network)
    train_step(state, *batch(), STEP, options)
    after = state.network.model.state_dict()
    for name in ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias"):
        name = f"layer1.0.{name}"
        torch.testing.assert_close(after[name], before[name] * (1 - 0.1 * 5e-2), **EXACT)


# --- clipping, learning rates, loss ---------------------------------------------------------------------------------


def norm_of(tensors: list[Tensor]) -> float:
    return float(torch.cat([tensor.grad.flatten() for tensor in tensors]).norm())


def test_weights_and_scores_are_clipped_apart():
    state, options = search_state(random_masks(1, 2), clip_norm=0.01)
    train_step(state, *batch(), STEP, options)
    assert norm_of(state.network.weight_parameters()) == pytest.approx(0.01, rel=1e-3)
    assert norm_of([state.network.scores]) == pytest.approx(0.01, rel=1e-3)


def test_the_released_step_clips_them_jointly():
    loose, options = search_state(random_masks(1, 2), "released")
    tight, tight_options = search_state(random_masks(1, 2), "released", clip_norm=0.01)
    Released(options).step(run_of(loose), *batch(), STEP)
    Released(tight_options).step(run_of(tight), *batch(), STEP)
    everything = [*tight.network.weight_parameters(), tight.network.scores]
    assert norm_of(everything) == pytest.approx(0.01, rel=1e-3)
    before = [*loose.network.weight_parameters(), loose.network.scores]
    factor = 0.01 / norm_of(before)
    for clipped, unclipped in zip(everything, before, strict=True):
        torch.testing.assert_close(clipped.grad, unclipped.grad * factor, rtol=1e-3, atol=1e-12)


def test_a_large_norm_clips_nothing():
    loose, options = search_state(random_masks(1, 2), clip_norm=1e3)
    none, no_options = search_state(random_masks(1, 2), clip_norm=1e12)
    train_step(loose, *batch(), STEP, options)
    train_step(none, *batch(), STEP, no_options)
    torch.testing.assert_close(snapshot(loose.network), snapshot(none.network), rtol=0, atol=0)


def test_the_learning_rates_of_the_step_are_used():
    state, options = search_state(random_masks(1, 2), score_optimizer=torch.optim.SGD)
    weights, scores = state.network.weight_parameters(), state.network.scores
    before = [tensor.detach().clone() for tensor in (*weights, scores)]
    train_step(state, *batch(), StepSettings(weight_lr=0.02, score_lr=1e-3, keep_ratio=1.0), options)
    for old, weight in zip(before, weights, strict=False):
        torch.testing.assert_close(weight.detach(), old - 0.02 * (weight.grad + 5e-2 * old), **EXACT)
    torch.testing.assert_close(scores.detach(), before[-1] - 1e-3 * scores.grad, **EXACT)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_returned_sums(smoothing):
    masks = random_masks(1, 2)
    state, options = search_state(masks, label_smoothing=smoothing)
    images, labels = batch(7)
    network = copy.deepcopy(state.network)
    logits = [network(images, network.plan(mask), False).detach() for mask in masks]
    losses = [F.cross_entropy(out, labels, label_smoothing=smoothing) for out in logits]
    result = train_step(state, images, labels, STEP, options).metrics
    assert set(result) == {"loss", "top1", "top5", "loss_difference", "v"}
    torch.testing.assert_close(result["loss"], losses[0] * 7, rtol=1e-10, atol=0)
    torch.testing.assert_close(result["loss_difference"], (losses[0] - losses[1]).abs() * 7, rtol=1e-9, atol=1e-12)
    ranks = (logits[0] > logits[0].gather(1, labels[:, None])).sum(1)
    assert result["top1"] == (ranks < 1).sum()
    assert result["top5"] == (ranks < 5).sum()
    assert not any(value.requires_grad for value in result.values())


def test_v_is_what_the_projection_took():
    state, options = search_state(random_masks(1, 1))  # equal masks: the projection alone moves the scores
    before = state.network.scores.clone()
    result = train_step(state, *batch(5), StepSettings(0.1, 0.05, 0.3), options).metrics
    v = result["v"] / 5
    assert v > 0
    torch.testing.assert_close(state.network.scores.detach(), (before - v).clamp(0, 1), **EXACT)


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_a_step_in_bfloat16_keeps_its_losses_in_float32(execution):
    network = sparse_network(plain_net("released", dtype=torch.float32), LAYERS, execution, precision="bf16")
    network.model.train()
    masks = random_masks(1, 2)
    state = search_of(network, config(), masks_KU=torch.from_numpy(np.stack(masks)))
    images, labels = batch(16, dtype=torch.float32)
    exact = copy.deepcopy(network)
    exact.precision = "fp32"
    exact_loss = F.cross_entropy(exact(images, exact.plan(masks[0])), labels)
    result = train_step(state, images, labels, STEP, config()).metrics
    assert result["loss"].dtype == torch.float32
    assert torch.isfinite(torch.stack([value.double() for value in result.values()])).all()
    assert result["loss"] / 16 == pytest.approx(exact_loss.item(), rel=0.02)
    assert result["loss"] / 16 != pytest.approx(exact_loss.item(), rel=1e-7)  # it did run in bfloat16
    assert {p.dtype for p in network.model.parameters()} == {torch.float32}


def test_the_same_state_takes_the_same_step():
    (one, options), (other, _) = search_state(), search_state()
    for number in range(3):
        for state in (one, other):
            train_step(state, *batch(seed=number), STEP, options)
    torch.testing.assert_close(snapshot(one.network), snapshot(other.network), rtol=0, atol=0)
    assert torch.equal(one.masks.own_KU, other.masks.own_KU)


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_a_weight_step_of_a_fixed_subnet(execution):
    """Clipped SGD on the loss under one plan; scores do not move, statistics do."""
    network = sparse_network(plain_net("released"), LAYERS, execution)
    network.model.train()
    by_hand, scores = copy.deepcopy(network), network.scores.clone()
    mask = random_masks(1)[0]
    optimizer = torch.optim.SGD(network.weight_parameters(), lr=9.0)
    images, labels = batch()
    run = RunState(network, search_of(network, config()).budget, optimizer, "finetune", network.plan(mask))
    result = weight_step(run, images, labels, StepSettings(weight_lr=0.5), config(clip_norm=0.1)).metrics
    loss = F.cross_entropy(by_hand(images, by_hand.plan(mask)), labels)
    gradients = gradients_of(loss, by_hand.weight_parameters())
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert norm > 0.1
    pairs = zip(by_hand.weight_parameters(), network.weight_parameters(), gradients, strict=True)
    for before, after, gradient in pairs:
        torch.testing.assert_close(after, before - 0.5 * 0.1 / norm * gradient, rtol=1e-4, atol=1e-9)
    assert torch.equal(network.scores, scores)
    torch.testing.assert_close(result["loss"], loss.detach() * len(labels), **EXACT)
    for name, norm_layer in network.batch_norms().items():
        assert torch.equal(norm_layer.running_mean, by_hand.batch_norms()[name].running_mean)


# --- the tangent of the budget --------------------------------------------------------------------------------------


def test_a_step_takes_the_tangent_if_asked():
    (raw, options), (state, tangent_options) = search_state(), search_state(score_gradient="tangent")
    images, labels = batch()
    settings = dataclasses.replace(STEP, score_lr=0.0, keep_ratio=0.1)
    train_step(raw, images, labels, settings, options)
    train_step(state, images, labels, settings, tangent_options)
    scores = raw.network.scores
    assert raw.network.scores.grad.abs().max() > 0
    expected = scores.grad - scores.grad.mean().clamp(max=0)
    torch.testing.assert_close(state.network.scores.grad, expected, **EXACT)
