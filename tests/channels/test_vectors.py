"""The joined vectors of batch-norms: how many operations they take, and a batch-norm that runs more than once."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.channels.registry import images_and_labels, network_of
from tests.channels.test_capacity import Recorder, fixed_plan
from tests.toy import batch, one_thread, randomise, sparse_network  # noqa: F401

EXACT = {"rtol": 1e-9, "atol": 1e-11}


class SharedNorm(nn.Module):
    """One batch-norm behind two layers with channels of their own, and behind their sum; another that never trains."""

    LAYERS: ClassVar = {"one": 3, "other": 3, "last": 2}

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 3, 1, bias=False)
        self.other = nn.Conv2d(3, 3, 1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.last = nn.Conv2d(3, 2, 1, bias=False)
        self.frozen = nn.BatchNorm2d(2)
        self.linear = nn.Linear(2, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.relu(self.norm(self.one(x))) + F.relu(self.norm(self.other(x))))
        return self.linear(F.relu(self.frozen(self.last(x))).mean((2, 3)))


def by_hand(net: SharedNorm, x: Tensor, mask_U: np.ndarray) -> Tensor:
    one, other, last = torch.from_numpy(mask_U).split([3, 3, 2])

    def norm(x: Tensor, live: Tensor) -> Tensor:
        mean, var = net.norm.running_mean.clone(), net.norm.running_var.clone()
        y = F.batch_norm(x, mean, var, net.norm.weight, net.norm.bias, True, net.norm.momentum, net.norm.eps)
        net.norm.running_mean[live], net.norm.running_var[live] = mean[live], var[live]
        return y * live.view(-1, 1, 1)

    left = F.relu(norm(net.one(x) * one.view(-1, 1, 1), one))
    x = norm(left + F.relu(norm(net.other(x) * other.view(-1, 1, 1), other)), one | other)
    frozen = net.frozen
    y = F.batch_norm(net.last(x), frozen.running_mean, frozen.running_var, frozen.weight, frozen.bias, eps=frozen.eps)
    return net.linear(F.relu(y * last.view(-1, 1, 1)).mean((2, 3)))


@pytest.mark.parametrize("shapes", ["drawn", "fixed"])
@pytest.mark.parametrize("seed", range(4))
def test_a_batch_norm_that_runs_again_goes_on_from_its_last_run(seed, shapes):
    net = randomise(SharedNorm(), seed=1).double()
    network = sparse_network(net, list(SharedNorm.LAYERS), multiple=2)
    network.model.train()
    network.model.get_submodule("frozen").eval()
    mask_U = network.plan(np.random.default_rng(seed).random(8) < 0.6).mask_U
    plan = network.plan(mask_U) if shapes == "drawn" else fixed_plan(network, mask_U, 1)
    images, labels = batch()
    F.cross_entropy(network(images, plan), labels).backward()
    F.cross_entropy(by_hand(net, images, mask_U), labels).backward()
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(network.model.get_buffer(name), buffer, **EXACT)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(network.model.get_parameter(name).grad, parameter.grad, **EXACT)


@pytest.mark.parametrize("shapes", ["drawn", "fixed"])
def test_one_gather_serves_all_batch_norms(shapes):
    """Scale and shift by one, mean and variance by another, and one operation copies the statistics back."""
    network = network_of("vgg16", 0.0625)
    mask_U = np.random.default_rng(0).random(network.num_units) < 0.5
    plan = network.plan(mask_U) if shapes == "drawn" else fixed_plan(network, mask_U, 1)
    assert len(network.batch_norms()) == 13
    with torch.no_grad(), Recorder() as recorder:
        network(images_and_labels(2)[0], plan)
    names = [operation[0] for operation in recorder.operations]
    weights = [op for op in network.graph.ops if op.kind in ("conv", "linear")]
    assert sum("index_select" in name for name in names) <= 2 * len(weights) + 2
    assert sum("_foreach_copy_" in name for name in names) == 1
    assert sum("index_copy_" in name for name in names) == 1
