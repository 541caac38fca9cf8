"""Retired units leave the parameters, and nothing else changes; tied streams; cheaper structure steps."""

import dataclasses

import numpy as np
import pytest
import torch
from trainers.retirement import retire
from utils.algorithm.estimator import subbatch_gradient, vrpge_gradient

from args import ModelConfig, SparsityConfig
from models import build_model
from tests.toy import config
from trainers.default import SearchState, StepSettings, draw_masks, num_masks, train_step
from utils.channels.network import SparseNetwork
from utils.channels.shrink import stays_zero, store_only

IMAGE_SHAPE = (3, 32, 32)
NETWORKS = [("vgg16", 0.0625), ("resnet20_he", 0.25), ("wrn28_10", 0.03)]


def network_of(arch: str, width_mult: float, **options) -> SparseNetwork:
    """In float64, with batch-norms that are not trivial."""
    torch.manual_seed(3)
    model = build_model(ModelConfig(arch=arch, width_mult=width_mult), 0.5, 10, 3, 32).double()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and not name.endswith("scores"):
            torch.nn.init.uniform_(parameter, 0.2, 1.0)
    return SparseNetwork(model.to(memory_format=torch.channels_last), IMAGE_SHAPE, **options)


def state_of(network: SparseNetwork, sparsity: SparsityConfig) -> SearchState:
    generator = torch.Generator().manual_seed(0)
    return SearchState(
        network=network,
        weight_optimizer=torch.optim.SGD(network.weight_parameters(), 0.05, 0.9, weight_decay=5e-4, fused=True),
        score_optimizer=torch.optim.Adam([network.scores], lr=0.2),
        generator=generator,
        draw=draw_masks(network, generator, num_masks(sparsity)),
    )


def images_and_labels(size: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn((size, *IMAGE_SHAPE), generator=generator, dtype=torch.float64)
    return images, torch.randint(10, (size,), generator=generator)


@pytest.mark.parametrize("stream", ["free", "tied"])
@pytest.mark.parametrize(("arch", "width_mult"), NETWORKS)
def test_the_trajectory_is_the_same_with_and_without_retirement(arch, width_mult, stream):
    states = [state_of(network_of(arch, width_mult, stream=stream), SparsityConfig()) for _ in range(2)]
    settings, num_retired = StepSettings(weight_lr=0.05, score_lr=0.2, kept_fraction=0.3), 0
    for step in range(8):
        images, labels = images_and_labels(seed=step)
        kept, retiring = (train_step(state, images, labels, settings, config()) for state in states)
        for name, value in kept.items():
            torch.testing.assert_close(retiring[name], value, rtol=1e-7, atol=1e-9, msg=name)
        torch.testing.assert_close(states[1].network.scores, states[0].network.scores, rtol=1e-7, atol=1e-9)
        num_retired += retire(states[1])
    assert num_retired > 0.2 * states[0].network.num_units
    sizes = [sum(p.numel() for p in state.network.weight_parameters()) for state in states]
    assert sizes[1] < 0.8 * sizes[0]
    momenta = [sum(s["momentum_buffer"].numel() for s in state.weight_optimizer.state.values()) for state in states]
    assert momenta[1] == sizes[1]
    mask_U = states[1].network.stored_units & (states[1].network.scores.numpy() > 0.5)
    for state in states:
        state.network.model.eval()
    images, _ = images_and_labels(seed=99)
    full, small = (state.network(images, state.network.plan(mask_U)) for state in states)
    torch.testing.assert_close(small, full, rtol=1e-7, atol=1e-9)


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


def test_a_retired_unit_cannot_be_kept_again():
    network = network_of("vgg16", 0.0625)
    units = np.random.default_rng(0).random(network.num_units) < 0.5
    assert store_only(network, units) > 0
    with pytest.raises(AssertionError, match="retired"):
        network.plan(np.ones(network.num_units, dtype=bool))


def test_the_fallback_of_the_layer_guard_never_retires():
    network = network_of("vgg16", 0.0625)
    store_only(network, np.zeros(network.num_units, dtype=bool))
    network.scores.data.zero_()
    plan = network.plan(np.zeros(network.num_units, dtype=bool))
    images, _ = images_and_labels()
    assert network(images, plan).shape == (8, 10)
    assert network.stored_units.sum() == len(network.layers)


def test_cutting_twice_is_cutting_once():
    once, twice = (network_of("resnet20_he", 0.25) for _ in range(2))
    random = np.random.default_rng(1)
    first = random.random(once.num_units) < 0.7
    second = first & (random.random(once.num_units) < 0.7)
    store_only(once, second)
    store_only(twice, first)
    store_only(twice, second)
    for a, b in zip(once.model.state_dict().values(), twice.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("arch", "width_mult"), NETWORKS)
def test_tied_compact_equals_tied_masked(arch, width_mult):
    compact, masked = (network_of(arch, width_mult, stream="tied", execution=e) for e in ("compact", "masked"))
    for seed in range(3):
        mask_U = np.random.default_rng(seed).random(compact.num_units) < 0.4
        images, labels = images_and_labels(seed=seed)
        results = []
        for network in (compact, masked):
            network.model.zero_grad()
            logits = network(images, network.plan(mask_U))
            torch.nn.functional.cross_entropy(logits, labels).backward()
            results.append(logits)
        torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)
        for one, other in zip(compact.weight_parameters(), masked.weight_parameters(), strict=True):
            torch.testing.assert_close(
                one.grad if one.grad is not None else torch.zeros_like(one), other.grad, rtol=1e-8, atol=1e-10
            )
        for one, other in zip(compact.model.buffers(), masked.model.buffers(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_tied_layers_share_units_and_the_stream_is_as_wide_as_they_keep():
    free, tied = (network_of("resnet20_he", 0.25, stream=stream) for stream in ("free", "tied"))
    writers = [name for name in tied.layers if name == "conv1" or (name.startswith("layer1") and "conv2" in name)]
    assert len({tied.graph.first_unit[name] for name in writers}) == 1
    assert len({free.graph.first_unit[name] for name in writers}) == len(writers) == 4
    # one group a stage for the stream, one for each first convolution of a block
    assert tied.num_units == sum((1 + 3) * width for width in (4, 8, 16))
    tied.scores.data.copy_(torch.arange(tied.num_units))
    assert all(torch.equal(tied.layers[name].scores, tied.layers["conv1"].scores) for name in writers)
    mask_U = np.random.default_rng(0).random(tied.num_units) < 0.5
    plan = tied.plan(mask_U)
    sums = [op for op in tied.graph.ops if op.kind == "add"]
    assert all(tied.graph.ops[i].space == op.space for op in sums for i in op.inputs)
    assert plan.positions == {}


def test_scores_move_only_every_nth_step_and_other_steps_run_one_pass(monkeypatch):
    state = state_of(network_of("vgg16", 0.0625), SparsityConfig())
    passes = []
    forward = SparseNetwork.__call__
    monkeypatch.setattr(SparseNetwork, "__call__", lambda *a, **k: passes.append(1) or forward(*a, **k))
    before = state.network.scores.clone()
    images, labels = images_and_labels()
    train_step(state, images, labels, StepSettings(0.05, 0.1, 0.5, update_scores=False), config())
    assert torch.equal(state.network.scores, before)
    assert len(passes) == 1
    train_step(state, images, labels, StepSettings(0.05, 0.1, 0.5), config())
    assert not torch.equal(state.network.scores, before)
    assert len(passes) == 3


def test_subbatch_estimator_is_unbiased_when_every_part_has_its_own_losses():
    """By enumeration of three masks of three units: the mean over parts of the true gradients."""
    scores = torch.tensor([0.3, 0.6, 0.8], dtype=torch.float64)
    bits = torch.tensor([[i >> k & 1 for k in range(3)] for i in range(8)], dtype=torch.bool)
    probability = torch.where(bits, scores, 1 - scores).prod(dim=1)
    tables = torch.randn((2, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # (part, mask)
    mean = torch.zeros(3, dtype=torch.float64)
    for i in range(8):
        for j in range(8):
            for k in range(8):
                losses = torch.stack([tables[0, [i, j]], tables[1, [i, k]]])
                weight = probability[i] * probability[j] * probability[k]
                mean += weight * subbatch_gradient(scores, bits[[i, j, k]], losses)
    expected = torch.zeros(3, dtype=torch.float64)
    for i in range(8):
        for j in range(8):
            losses = tables[:, [i, j]].mean(dim=0)
            expected += probability[i] * probability[j] * vrpge_gradient(scores, bits[[i, j]], losses)
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)


def test_a_subbatch_step_trains_with_one_extra_mask_for_each_part():
    sparsity = SparsityConfig(subbatch=4)
    state = state_of(network_of("vgg16", 0.0625), sparsity)
    assert state.draw.masks_KU.shape == (5, state.network.num_units)
    before = state.network.scores.clone()
    images, labels = images_and_labels()
    options = dataclasses.replace(config(), sparsity=sparsity)
    metrics = train_step(state, images, labels, StepSettings(0.05, 0.1, 0.5), options)
    assert torch.isfinite(metrics["loss"])
    assert not torch.equal(state.network.scores, before)
