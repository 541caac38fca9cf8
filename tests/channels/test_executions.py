"""Whole steps under every execution, the released one, low precision, and the layout in memory."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from args import Config
from tests.channels.passes import (
    EXACT,
    MASKS,
    Outcome,
    assert_same,
    gradients_of,
    run_network,
    run_reference,
    statistics_of,
)
from tests.toy import (
    NETWORKS,
    Reference,
    batch,
    config,
    flat_mask,
    one_thread,  # noqa: F401
    plain_net,
    search_of,
    sparse_network,
)
from trainers.default import StepSettings, train_step, weight_step
from trainers.state import RunState
from utils.channels.budget import Budget
from utils.channels.network import SparseNetwork

SETTINGS = StepSettings(weight_lr=0.1)


def optimizer_step(network: SparseNetwork, mask_U: np.ndarray, training: bool) -> dict[str, Tensor]:
    """State after two weight steps with different masks: the second moves what the first left in momentum."""
    optimizer = torch.optim.SGD(network.weight_parameters(), lr=0.1, momentum=0.9, weight_decay=5e-2)
    network.model.train(training)
    full = np.ones_like(mask_U)
    run = RunState(network, Budget(network), optimizer, "train", network.plan(full))
    weight_step(run, *batch(), SETTINGS, config())
    run.plan = network.plan(mask_U)
    weight_step(run, *batch(), SETTINGS, config())
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


def search_step(network: SparseNetwork, masks: list[np.ndarray], options: Config) -> dict[str, Tensor]:
    """State after one `train_step` on given masks."""
    optimizer = torch.optim.SGD(network.weight_parameters(), lr=9.0, momentum=0.9, weight_decay=5e-2)
    search = search_of(network, options, masks_KU=torch.from_numpy(np.stack(masks)), weight_optimizer=optimizer)
    network.model.train()
    train_step(search, *batch(), StepSettings(weight_lr=0.1, score_lr=0.05, keep_ratio=0.5), options)
    memory = {f"memory {name}": value for name, value in search.estimator.state_dict().items()}
    return {**network.model.state_dict(), **memory, "next masks": search.masks.own_KU}


@pytest.mark.parametrize("estimator", ["vrpge", "linear_cv_gates"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_whole_search_step(kind, estimator):
    net, layers = plain_net(kind), NETWORKS[kind].LAYERS
    masks = [flat_mask(layers, {}, seed=seed) for seed in (11, 12)]
    masked = search_step(sparse_network(net, layers, "masked"), masks, config(estimator=estimator))
    assert any(name.startswith("memory") for name in masked) == (estimator == "linear_cv_gates")
    for multiple in (1, 4):
        compact = search_step(sparse_network(net, layers, multiple=multiple), masks, config(estimator=estimator))
        torch.testing.assert_close(compact, masked, **EXACT)


# --- released execution ---------------------------------------------------------------------------------------------


class Leaking(Reference):
    """Masks act on convolutions alone: the shift of the batch-norm behind a dropped channel goes on."""

    def norm(self, name: str, x: Tensor, live: Tensor) -> Tensor:
        return super().norm(name, x, torch.ones_like(live))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["released", "plain", "preactivation"])
def test_in_released_execution_shifts_leak_through_dropped_channels(kind, training):
    net, layers = plain_net(kind), NETWORKS[kind].LAYERS
    mask_U = flat_mask(layers, {}, seed=5)
    network = sparse_network(net, layers, "released")
    expected = run_reference(kind, copy.deepcopy(net), mask_U, training, Leaking)
    assert_same(run_network(network, mask_U, training), expected, **EXACT)
    absent = run_reference(kind, copy.deepcopy(net), mask_U, training)
    leak = (absent.logits - expected.logits).abs().max()
    # A constant that reaches a 1x1 convolution is taken away by the batch-norm behind it.
    assert leak < 1e-12 if kind == "plain" and training else leak > 1e-3


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
        network = sparse_network(net, layers, execution, multiple=multiple, precision="bf16")
        dtypes = []
        network.model.get_submodule(next(iter(layers))).register_forward_hook(lambda *a, d=dtypes: d.append(a[2].dtype))
        logits = network(images, network.plan(mask_U))
        F.cross_entropy(logits, labels).backward()
        assert logits.dtype == torch.float32
        assert execution == "compact" or dtypes == [torch.bfloat16]
        assert (logits - exact.logits).abs().max() <= 0.03 * exact.logits.abs().max()
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
