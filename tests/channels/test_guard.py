"""The layer guard on a network: draws that empty a layer run, and the estimate keeps its exact mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet_cifar import BasicBlock
from tests.algorithm.enumeration import all_masks, expected_loss, moments, variance_of, vector
from tests.toy import batch, one_thread, randomise, sparse_network  # noqa: F401
from utils.algorithm.estimators.vrpge import VRPGEEstimator


class TinyNet(nn.Module):
    """Six units: a stem of one, a projection block with one inside and two outside."""

    LAYERS = ("conv1", "block.conv1", "block.conv2", "block.shortcut.0")

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(1)
        self.block = BasicBlock(1, 2, 1)
        self.block.conv1, self.block.bn1 = nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1)
        self.block.conv2 = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.linear = nn.Linear(2, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))
        return self.linear(self.block(x).mean((2, 3)))


class TinyNetwork:
    """The tiny network driven by `SparseNetwork`; gives the loss of a batch under every mask."""

    def __init__(self, execution: str) -> None:
        net = randomise(TinyNet(), seed=3).double()
        self.network = sparse_network(net, TinyNet.LAYERS, execution, image_shape=(1, 4, 4))
        self.images, self.labels = batch(5, seed=2, image_shape=(1, 4, 4))

    def losses(self, scores_U: Tensor) -> Tensor:
        """(2^U,) the loss under each mask as drawn; the layer guard of `plan` acts on the pass."""
        self.network.scores.copy_(scores_U)
        masks_NU = all_masks(self.network.num_units).numpy()
        with torch.no_grad():
            logits = [self.network(self.images, self.network.plan(mask), False) for mask in masks_NU]
        return torch.stack([F.cross_entropy(out, self.labels) for out in logits])


SCORES = vector(0.3, 0.6, 0.2, 0.7, 0.45, 0.55)


def test_the_mean_through_a_network_is_the_slope_of_its_expected_loss():
    """Central differences, every loss computed afresh at the shifted scores: the guard's choice is among them."""
    tiny, step = TinyNetwork("compact"), 1e-3
    losses_N = tiny.losses(SCORES)
    assert losses_N.unique().numel() > 20  # the masks do differ, as far as the guard lets them
    torch.testing.assert_close(TinyNetwork("masked").losses(SCORES), losses_N, rtol=1e-11, atol=1e-12)
    mean_U, _ = moments(VRPGEEstimator(SCORES), SCORES, losses_N)
    slopes = []
    for shift_U in step * torch.eye(6, dtype=torch.float64):
        up, down = (expected_loss(s, tiny.losses(s)) for s in (SCORES + shift_U, SCORES - shift_U))
        slopes.append((up - down) / (2 * step))
    expected_U = variance_of(SCORES).sqrt() * torch.stack(slopes)
    torch.testing.assert_close(mean_U, expected_U, rtol=1e-8, atol=1e-10)
    assert expected_U[1:].abs().min() > 1e-4  # the stem has one unit, which the guard keeps always


@pytest.mark.parametrize("execution", ["compact", "masked", "released"])
def test_the_empty_draw_runs_and_the_guard_adds_the_likeliest_units(execution):
    tiny = TinyNetwork(execution)
    tiny.network.scores.copy_(SCORES)
    plan = tiny.network.plan(np.zeros(6, dtype=bool))
    # The stem alone. Of the first convolution and the shortcut, unit 1 (0.6) has the highest score, of the second one
    # and the shortcut unit 3 (0.7). In released execution an empty layer lets the shifts behind it through, so nothing
    # is added.
    kept = [] if execution == "released" else [0, 1, 3]
    assert np.flatnonzero(plan.mask_U).tolist() == kept
    assert torch.isfinite(tiny.network(tiny.images, plan, False)).all()
