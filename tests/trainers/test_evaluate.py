"""Evaluation, re-estimation of statistics and choosing a mask: right numbers, and nothing left changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.toy import (
    NETWORKS,
    REFERENCES,
    Reference,
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
from trainers.default import StepSettings, evaluate, train_step
from trainers.methods.vrpge import PolicyGradient, drawn_mask
from trainers.state import RunState, Search
from utils.channels.budget import Budget
from utils.channels.network import SparseNetwork
from utils.channels.subnet import Subnet, best_within_budget, estimate_statistics, installed

LAYERS = ReleasedNet.LAYERS


def batches(count: int = 3, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [batch(size, seed) for seed in range(count)]


def everything(state: Search) -> dict[str, object]:
    """A copy of every tensor, mode, attribute and generator that could move."""
    network = state.network
    tensors = {
        **{f"model/{name}": tensor for name, tensor in network.model.state_dict().items()},
        **{f"grad/{n}": p.grad for n, p in network.model.named_parameters() if p.grad is not None},
        "scores": network.scores,
        "score gradient": network.scores.grad,
        "generator": state.generator.get_state(),
        "global generator": torch.get_rng_state(),
        "masks": state.masks.own_KU,
    }
    for kind, optimizer in (("weights", state.weight_optimizer), ("scores", state.score_optimizer)):
        for i, values in optimizer.state_dict()["state"].items():
            tensors |= {f"{kind}/{i}/{k}": v for k, v in values.items() if isinstance(v, Tensor)}
    settings = {
        f"{name}/{key}": getattr(module, key)
        for name, module in network.model.named_modules()
        for key in ("training", "momentum", "update_statistics")
        if hasattr(module, key)
    }
    identities = {
        name: tensor.data_ptr() for name, tensor in (*network.model.named_buffers(), *network.model.named_parameters())
    }
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "settings": settings,
        "storage": identities,
        "masks": [getattr(m, "masks", None) for m in network.model.modules()],
        "groups": copy.deepcopy(
            [o.state_dict()["param_groups"] for o in (state.weight_optimizer, state.score_optimizer)]
        ),
        "requires_grad": [p.requires_grad for p in network.model.parameters()],
        "numpy": repr(np.random.get_state()),  # noqa: NPY002  (that it is not used is the point)
        "python": random.getstate(),
    }


def assert_untouched(before: dict, after: dict) -> None:
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name]), name
    for key in before.keys() - {"tensors"}:
        assert before[key] == after[key], key


@pytest.fixture(params=["compact", "masked"])
def state(request) -> Search:
    return search_in_the_middle(request.param)


def search_in_the_middle(execution: str) -> Search:
    """Momentum, gradients and statistics are there."""
    network = sparse_network(plain_net("released"), LAYERS, execution)
    network.model.train()
    masks = [flat_mask(LAYERS, {}, seed) for seed in (1, 2)]
    state = search_of(network, config(), masks_KU=torch.from_numpy(np.stack(masks)))
    for number in range(2):
        train_step(state, *batch(seed=number), StepSettings(0.01, 0.01, 0.5), config())
    return state


def failing(good: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from batches(good)
    raise OSError("the disk is gone")


MASK = flat_mask(LAYERS, {"layer1.0.conv2": ()}, seed=6)


def run_evaluate(network: SparseNetwork, data) -> object:
    return evaluate(network, network.plan(MASK), data)


def run_estimate(network: SparseNetwork, data) -> object:
    return estimate_statistics(network, MASK, data)


def run_installed(network: SparseNetwork, data) -> object:
    statistics = {name: (norm.running_mean + 1, norm.running_var * 2) for name, norm in network.batch_norms().items()}
    with installed(network, Subnet(MASK, statistics)):
        return evaluate(network, network.plan(MASK), data)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("run", [run_evaluate, run_estimate, run_installed])
def test_nothing_is_changed(state, run: Callable, training):
    state.network.model.train(training)
    before = everything(state)
    run(state.network, batches())
    assert_untouched(before, everything(state))


@pytest.mark.parametrize("good", [0, 2])
@pytest.mark.parametrize("run", [run_evaluate, run_estimate, run_installed])
def test_nothing_is_changed_by_a_failure_either(state, run: Callable, good):
    before = everything(state)
    with pytest.raises(OSError, match="disk"):
        run(state.network, failing(good))
    assert_untouched(before, everything(state))


def test_the_comparison_above_can_see_a_change(state):
    """One step moves tensors, and a single bit of one of them is enough."""
    before = everything(state)
    state.network.model.layer2[0].bn2.running_var[3] += 1e-15
    with pytest.raises(AssertionError, match=r"layer2.0.bn2.running_var"):
        assert_untouched(before, everything(state))


def test_training_goes_on_as_if_nothing_had_been_evaluated(state):
    """The step after is the same with and without, in every bit."""
    other = search_in_the_middle(state.network.execution)
    for run in (run_evaluate, run_estimate, run_installed):
        run(state.network, batches())
    for each in (state, other):
        train_step(each, *batch(seed=9), StepSettings(0.01, 0.01, 0.5), config())
    for name, tensor in state.network.model.state_dict().items():
        assert torch.equal(tensor, other.network.model.state_dict()[name]), name


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["compact", "masked"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_evaluate_is_the_mean_over_images_in_eval_mode(kind, execution):
    """Batches of unequal size: every image counts the same."""
    layers, net = NETWORKS[kind].LAYERS, plain_net(kind)
    mask_U = flat_mask(layers, {}, seed=6)
    network = sparse_network(net, layers, execution)
    network.model.train()
    data = [batch(5, 1), batch(2, 2), batch(1, 3)]
    result = evaluate(network, network.plan(mask_U), data)

    run = Reference(net.eval(), by_layer(layers, mask_U, torch.float64), {})
    logits = torch.cat([REFERENCES[kind](run, images) for images, _ in data])
    labels = torch.cat([labels for _, labels in data])
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert set(result) == {"loss", "top1", "top5"}
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-10)
    assert result["top1"] == pytest.approx(100 * (ranks < 1).double().mean().item())
    assert result["top5"] == pytest.approx(100 * (ranks < 5).double().mean().item())


def test_evaluate_of_nothing_is_nothing():
    network = sparse_network(plain_net("plain"), NETWORKS["plain"].LAYERS)
    assert evaluate(network, network.dense_plan, []) == {}


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_statistics_are_plain_averages_over_the_batches(execution):
    """Of the first batch-norm by hand: means of the batches' means and unbiased variances, equal weights."""
    mask_U = flat_mask(LAYERS, {"conv1": [1, 4]}, seed=6)
    net = plain_net("released")
    network = sparse_network(net, LAYERS, execution)
    before = copy.deepcopy(network.model.state_dict())
    data = batches(4)
    subnet = estimate_statistics(network, mask_U, data)

    maps = [net.conv1(images).detach() for images, _ in data]
    mean, var = subnet.statistics["bn"]
    for channel in (1, 4):
        torch.testing.assert_close(mean[channel], torch.stack([m[:, channel].mean() for m in maps]).mean())
        torch.testing.assert_close(var[channel], torch.stack([m[:, channel].var() for m in maps]).mean())
    for channel in (0, 2, 3, 5):
        assert mean[channel] == before["bn.running_mean"][channel]
        assert var[channel] == before["bn.running_var"][channel]


@pytest.mark.parametrize("kind", NETWORKS)
def test_statistics_of_every_layer_against_the_reference(kind):
    """The hand-written pass gives each batch's own statistics if its momentum is 1."""
    layers, net = NETWORKS[kind].LAYERS, plain_net(kind)
    mask_U = flat_mask(layers, {}, seed=6)
    reference = copy.deepcopy(net).train()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    seen = []
    for images, _ in batches():
        run = Reference(reference, by_layer(layers, mask_U, torch.float64), {})
        REFERENCES[kind](run, images)
        seen.append(run.statistics)
    for execution in ("compact", "masked"):
        subnet = estimate_statistics(sparse_network(net, layers, execution), mask_U, batches())
        assert subnet.statistics.keys() == seen[0].keys()
        for name, pair in subnet.statistics.items():
            for which, tensor in enumerate(pair):
                average = torch.stack([statistics[name][which] for statistics in seen]).mean(0)
                torch.testing.assert_close(tensor, average, rtol=1e-9, atol=1e-11)


def test_a_subnet_keeps_the_mask_that_was_run():
    """With the guard applied: plan(mask of the subnet) is then the same whatever becomes of the scores."""
    network = sparse_network(plain_net("released"), LAYERS)
    network.scores.copy_(torch.linspace(0.9, 0.1, 54))
    subnet = estimate_statistics(network, np.zeros(54, dtype=bool), batches(1))
    assert np.flatnonzero(subnet.mask_U).tolist() == [0, 18, 30]
    network.scores.copy_(torch.linspace(0.1, 0.9, 54))
    assert np.array_equal(network.plan(subnet.mask_U).mask_U, subnet.mask_U)


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_installed_statistics_are_the_ones_used(execution):
    net = plain_net("released")
    network = sparse_network(net, LAYERS, execution)
    subnet = estimate_statistics(network, MASK, batches())
    own = evaluate(network, network.plan(MASK), batches())
    with installed(network, subnet):
        lent = evaluate(network, network.plan(MASK), batches())
    reference = copy.deepcopy(net).eval()
    for name, (mean, var) in subnet.statistics.items():
        reference.get_submodule(name).running_mean.copy_(mean)
        reference.get_submodule(name).running_var.copy_(var)
    run = Reference(reference, by_layer(LAYERS, MASK, torch.float64), {})
    losses = [F.cross_entropy(REFERENCES["released"](run, images), labels) for images, labels in batches()]
    assert lent["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-10)
    assert lent["loss"] != pytest.approx(own["loss"], rel=1e-3)


def test_a_subnet_is_not_changed_by_training_while_it_is_put_away():
    network = sparse_network(plain_net("released"), LAYERS)
    subnet = estimate_statistics(network, MASK, batches())
    before = copy.deepcopy(subnet.statistics)
    network.model.train()
    network(batch()[0], network.dense_plan)
    for name, pair in subnet.statistics.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, before[name], strict=True))


def test_a_subnet_survives_its_state_dict(tmp_path):
    network = sparse_network(plain_net("released"), LAYERS)
    subnet = estimate_statistics(network, MASK, batches())
    torch.save(subnet.state_dict(), tmp_path / "subnet.pt")
    loaded = Subnet.from_state_dict(torch.load(tmp_path / "subnet.pt", weights_only=True), torch.device("cpu"))
    assert loaded.mask_U.dtype == np.bool_
    assert np.array_equal(loaded.mask_U, subnet.mask_U)
    with installed(network, loaded):
        again = evaluate(network, network.plan(loaded.mask_U), batches())
    with installed(network, subnet):
        assert evaluate(network, network.plan(subnet.mask_U), batches()) == again


def test_bfloat16_statistics_are_kept_in_float32():
    net = plain_net("released", dtype=torch.float32)
    data = [batch(16, seed, torch.float32) for seed in range(3)]
    exact = estimate_statistics(sparse_network(net, LAYERS), MASK, data)
    rounded = estimate_statistics(sparse_network(net, LAYERS, precision="bf16"), MASK, data)
    for name, pair in rounded.statistics.items():
        for mine, its in zip(pair, exact.statistics[name], strict=True):
            assert mine.dtype == torch.float32
            assert (mine - its).abs().max() <= 0.05 * its.abs().max()
    different = [not torch.equal(rounded.statistics[name][0], exact.statistics[name][0]) for name in exact.statistics]
    assert any(different)  # it did run in bfloat16


# --- choosing a mask ------------------------------------------------------------------------------------------------


def scored(*layers: np.ndarray, by_layer: bool = True) -> RunState:
    """A run of which no more than scores and budget exist, with a budget for each layer and no layer guard."""
    ends = np.cumsum([len(part) for part in layers])
    groups = [slice(end - len(part), end) for end, part in zip(ends, layers, strict=True)]
    network = SimpleNamespace(
        scores=torch.nn.Parameter(torch.from_numpy(np.concatenate(layers)), requires_grad=False),
        num_units=int(ends[-1]),
        unit_groups=lambda: groups,
        vital_groups=[],
    )
    return RunState(network, Budget(network, by_layer=by_layer), None, "search", None)


def best_of(layers: list[np.ndarray], fraction: float, by_layer: bool = True) -> np.ndarray:
    return PolicyGradient(config()).mask(scored(*layers, by_layer=by_layer), fraction)


def draw_of(layers: list[np.ndarray], fraction: float, generator: np.random.Generator) -> np.ndarray:
    return drawn_mask(scored(*layers), fraction, generator)


def test_a_vital_layer_keeps_its_best_unit_inside_the_budget():
    scores = np.array([0.9, 0.8, 0.1, 0.2, 0.7, 0.0, 0.0])
    vital, dead = np.array([2, 3]), np.array([5, 6])
    whole = [slice(0, 7)]
    assert best_within_budget(scores, scores, whole, 3 / 7, [vital]).nonzero()[0].tolist() == [0, 1, 3]
    assert best_within_budget(scores, scores, whole, 3 / 7, [vital, dead]).nonzero()[0].tolist() == [0, 3, 5]
    drawn = np.where(np.arange(7) == 2, scores, 0)  # the better unit of the vital layer was not drawn
    assert best_within_budget(drawn, scores, whole, 3 / 7, [vital]).nonzero()[0].tolist() == [2]


def test_the_highest_scores_within_the_budget():
    scores = np.array([0.9, 0.1, 0.5, 0.7, 0.3])
    assert best_of([scores], 0.4).tolist() == [True, False, False, True, False]
    assert best_of([scores], 0.59).sum() == 2
    assert best_of([scores], 0.6).sum() == 3
    assert best_of([scores], 1.0).all()


def test_ties_go_to_the_lowest_index():
    assert best_of([np.full(6, 0.5)], 0.5).tolist() == [True] * 3 + [False] * 3
    assert best_of([np.array([0.2, 1.0, 0.5, 1.0, 0.5, 0.5])], 2 / 3).tolist() == [
        False, True, True, True, True, False,
    ]  # fmt: skip


def test_never_a_score_of_zero_even_within_the_budget():
    assert best_of([np.array([0.0, 0.3, 0.0, 1e-30])], 1.0).tolist() == [False, True, False, True]
    assert not best_of([np.zeros(4)], 1.0).any()


@pytest.mark.parametrize(("fraction", "units", "kept"), [(0.1, 30, 3), (0.3, 10, 3), (0.7, 10, 7), (0.29, 100, 29)])
def test_a_budget_that_is_whole_but_for_rounding(fraction, units, kept):
    assert best_of([np.linspace(0.1, 1, units)], fraction).sum() == kept


def test_groups_have_budgets_of_their_own():
    groups = [np.array([0.9, 0.8, 0.7, 0.6]), np.array([0.1, 0.2])]
    assert best_of(groups, 0.5).tolist() == [True, True, False, False, False, True]
    assert best_of([np.concatenate(groups)], 0.5).tolist() == [True, True, True, False, False, False]


def test_drawn_masks_obey_scores_and_budget():
    scores = np.concatenate([np.zeros(5), np.ones(5), np.full(20, 0.5)])
    generator = np.random.default_rng(0)
    drawn = np.stack([draw_of([scores], 0.5, generator) for _ in range(400)])
    assert drawn.sum(1).max() == 15
    assert not drawn[:, :5].any()
    assert drawn[:, 5:10].all()  # of a draw above the budget, the likely ones stay
    assert drawn.sum(1).min() < 15
    assert len(np.unique(drawn, axis=0)) > 300


def test_drawn_masks_have_the_frequencies_of_the_scores():
    scores = np.array([0.1, 0.5, 0.9])
    generator, made_once = np.random.default_rng(1), scored(scores)
    frequency = np.mean([drawn_mask(made_once, 1.0, generator) for _ in range(10_000)], axis=0)
    assert np.abs(frequency - scores).max() < 5 * 0.5 / 100


def test_the_generator_decides_a_draw():
    scores = [np.full(40, 0.5), np.full(40, 0.3)]
    one, same, other = (draw_of(scores, 0.5, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert one[:40].sum() <= 20
    assert one[40:].sum() <= 20


def test_one_budget_for_all_layers_unless_each_is_to_have_its_own():
    layers = [np.array([0.9, 0.8, 0.7, 0.6]), np.array([0.1, 0.2])]
    assert best_of(layers, 0.5, by_layer=False).tolist() == [True, True, True, False, False, False]
    assert best_of(layers, 0.5).tolist() == [True, True, False, False, False, True]


def test_candidates_are_the_top_scored_mask_and_draws_that_only_the_seed_decides():
    run, options = scored(np.linspace(0.05, 0.95, 40)), config()

    def candidates(seed: int, count: int = 4) -> list[np.ndarray]:
        seeded = replace(options.run, seed=seed)
        finetune = replace(options.finetune, num_subnets=count)
        return PolicyGradient(replace(options, run=seeded, finetune=finetune)).candidates(run)

    first, *drawn = candidates(0)
    assert np.array_equal(first, PolicyGradient(options).mask(run, options.sparsity.keep_ratio))
    assert len(drawn) == 4
    assert len(np.unique(drawn, axis=0)) == 4
    assert all(mask.sum() <= options.sparsity.keep_ratio * 40 for mask in drawn)
    torch.rand(7)  # the global generator has no part in it
    assert all(np.array_equal(a, b) for a, b in zip(candidates(0), [first, *drawn], strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(candidates(0, 2), [first, *drawn[:2]], strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(candidates(1)[1:], drawn, strict=True))
