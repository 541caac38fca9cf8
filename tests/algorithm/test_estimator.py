"""The estimator by exact enumeration: few Bernoulli variables make every expectation a finite sum."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet_cifar import BasicBlock
from tests.toy import batch, one_thread, randomise, sparse_network  # noqa: F401
from utils.algorithm.estimator import vrpge_gradient

ALPHAS = (0.5, 0.75)


def all_masks(num_units: int) -> Tensor:
    """(2^U, U) bool, every mask once."""
    return torch.tensor(list(product([False, True], repeat=num_units)))


def probabilities(scores_U: Tensor, masks_NU: Tensor) -> Tensor:
    """(N,) the probability of each mask."""
    return torch.where(masks_NU, scores_U, 1 - scores_U).prod(1)


def enumerated_moments(estimate, scores_U: Tensor, losses_N: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """Exact mean and variance of estimate(masks_KU, losses_K) over all K-tuples of masks."""
    masks_NU = all_masks(len(scores_U))
    weight_N = probabilities(scores_U, masks_NU)
    mean, square = torch.zeros_like(scores_U), torch.zeros_like(scores_U)
    for draw in product(range(len(masks_NU)), repeat=num_samples):
        index = list(draw)
        g = estimate(masks_NU[index], losses_N[index])
        probability = weight_N[index].prod()
        mean += probability * g
        square += probability * g * g
    return mean, square - mean**2


def vrpge(scores_U: Tensor, alpha: float):
    return lambda masks_KU, losses_K: vrpge_gradient(scores_U, masks_KU, losses_K, alpha)


def one_sided(scores_U: Tensor, alpha: float):
    """The paper's form, (L - L') z."""
    scale_U = (scores_U * (1 - scores_U)) ** (1 - alpha)
    return lambda masks_KU, losses_K: (losses_K[0] - losses_K[1]) * (masks_KU[0].double() - scores_U) / scale_U


def reinforce(scores_U: Tensor, alpha: float = 0.0):
    """Plain REINFORCE, L z; preconditioned like VR-PGE if alpha is given."""
    scale_U = (scores_U * (1 - scores_U)) ** (1 - alpha)
    return lambda masks_KU, losses_K: losses_K[0] * (masks_KU[0].double() - scores_U) / scale_U


def expected_loss(scores_U: Tensor, losses_N: Tensor) -> Tensor:
    return probabilities(scores_U, all_masks(len(scores_U))) @ losses_N


def true_gradient(scores_U: Tensor, losses_N: Tensor) -> Tensor:
    """E[L | m_i = 1] - E[L | m_i = 0], which is the derivative because E[L] is linear in each score."""
    gradient = torch.empty_like(scores_U)
    for i in range(len(scores_U)):
        fixed = [scores_U.clone(), scores_U.clone()]
        fixed[0][i], fixed[1][i] = 0.0, 1.0
        gradient[i] = expected_loss(fixed[1], losses_N) - expected_loss(fixed[0], losses_N)
    return gradient


def random_table(num_units: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scores in (0, 1) and a loss for every mask, in float64."""
    generator = torch.Generator().manual_seed(seed)
    scores_U = 0.05 + 0.9 * torch.rand(num_units, generator=generator, dtype=torch.float64)
    return scores_U, torch.randn(2**num_units, generator=generator, dtype=torch.float64) * 2 + 1


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("num_units", "num_samples"), [(3, 2), (4, 2), (5, 2), (3, 3)])
def test_mean_is_the_preconditioned_gradient_on_random_tables(num_units, num_samples, alpha):
    scores_U, losses_N = random_table(num_units, seed=num_units)
    mean, _ = enumerated_moments(vrpge(scores_U, alpha), scores_U, losses_N, num_samples)
    expected = (scores_U * (1 - scores_U)) ** alpha * true_gradient(scores_U, losses_N)
    torch.testing.assert_close(mean, expected, rtol=1e-11, atol=1e-12)


def test_both_ways_to_the_true_gradient_agree():
    scores_U, losses_N = random_table(4, seed=9)
    step = 1e-3
    differences = []
    for i in range(4):
        shift = torch.zeros(4, dtype=torch.float64)
        shift[i] = step
        up, down = expected_loss(scores_U + shift, losses_N), expected_loss(scores_U - shift, losses_N)
        differences.append((up - down) / (2 * step))
    torch.testing.assert_close(torch.stack(differences), true_gradient(scores_U, losses_N), rtol=1e-9, atol=1e-11)


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


SCORES_6 = torch.tensor([0.3, 0.6, 0.2, 0.7, 0.45, 0.55], dtype=torch.float64)


def test_mean_through_a_network_with_empty_draws():
    tiny = TinyNetwork("compact")
    losses_N = tiny.losses(SCORES_6)
    assert losses_N.unique().numel() > 20  # the masks do differ, as far as the guard lets them
    torch.testing.assert_close(TinyNetwork("masked").losses(SCORES_6), losses_N, rtol=1e-11, atol=1e-12)
    mean, _ = enumerated_moments(vrpge(SCORES_6, 0.5), SCORES_6, losses_N, 2)
    scale_U = (SCORES_6 * (1 - SCORES_6)).sqrt()
    torch.testing.assert_close(mean, scale_U * true_gradient(SCORES_6, losses_N), rtol=1e-10, atol=1e-12)

    # central differences of the expected loss, every loss computed afresh at the shifted scores
    step, differences = 1e-3, []
    for i in range(len(SCORES_6)):
        shift = torch.zeros_like(SCORES_6)
        shift[i] = step
        up, down = (expected_loss(s, tiny.losses(s)) for s in (SCORES_6 + shift, SCORES_6 - shift))
        differences.append((up - down) / (2 * step))
    torch.testing.assert_close(mean, scale_U * torch.stack(differences), rtol=1e-8, atol=1e-10)


def test_the_empty_draw_runs_and_the_guard_adds_the_likeliest_units():
    tiny = TinyNetwork("compact")
    tiny.network.scores.copy_(SCORES_6)
    plan = tiny.network.plan(np.zeros(6, dtype=bool))
    # the stem alone; of the second convs and shortcuts, unit 3 (0.7) has the highest score
    assert plan.mask_U.tolist() == [True, False, False, True, False, False]
    assert torch.isfinite(tiny.network(tiny.images, plan, False)).all()


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [0.1, 2.3025851, 0.7, 1e-3])
def test_equal_losses_give_exactly_zero(num_samples, dtype, loss):
    generator = torch.Generator().manual_seed(0)
    scores_U = torch.rand(50, generator=generator, dtype=dtype)
    masks_KU = torch.rand((num_samples, 50), generator=generator, dtype=dtype) < scores_U
    gradient = vrpge_gradient(scores_U, masks_KU, torch.full((num_samples,), loss, dtype=dtype))
    assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("num_samples", [2, 3])
def test_a_unit_on_which_all_masks_agree_gets_exactly_zero(num_samples):
    """z is the same for all samples then. Rounding noise would not do: Adam's first step makes it a full step."""
    generator = torch.Generator().manual_seed(3)
    scores_U = torch.tensor([0.3, 0.5, 0.9, 1 - 1e-6, 0.5])
    masks_KU = torch.ones((num_samples, 5), dtype=torch.bool)
    masks_KU[:, 1] = False
    masks_KU[0, 4] = False
    for _ in range(100):
        losses_K = 2.3 + 0.1 * torch.rand(num_samples, generator=generator)
        gradient = vrpge_gradient(scores_U, masks_KU, losses_K)
        assert gradient[:4].tolist() == [0.0] * 4
        assert gradient[4] != 0


@pytest.mark.parametrize("num_samples", [2, 3])
def test_a_constant_changes_nothing_and_the_order_of_samples_neither(num_samples):
    generator = torch.Generator().manual_seed(1)
    scores_U = 0.1 + 0.8 * torch.rand(20, generator=generator, dtype=torch.float64)
    masks_KU = torch.rand((num_samples, 20), generator=generator, dtype=torch.float64) < scores_U
    losses_K = torch.randint(-64, 64, (num_samples,), generator=generator).double() / 16 * num_samples
    gradient = vrpge_gradient(scores_U, masks_KU, losses_K)
    assert gradient.count_nonzero() > 5
    shifted = vrpge_gradient(scores_U, masks_KU, losses_K + 1024.0)  # dyadic: no rounding
    torch.testing.assert_close(shifted, gradient, rtol=0, atol=1e-12)
    for order in ([1, 0], [1, 2, 0], [2, 1, 0]):
        if len(order) == num_samples:
            swapped = vrpge_gradient(scores_U, masks_KU[order], losses_K[order])
            torch.testing.assert_close(swapped, gradient, rtol=1e-14, atol=1e-14)


def test_two_samples_are_the_formula_of_the_released_code():
    generator = torch.Generator().manual_seed(2)
    scores_U = 0.1 + 0.8 * torch.rand(20, generator=generator, dtype=torch.float64)
    masks_KU = torch.rand((2, 20), generator=generator, dtype=torch.float64) < scores_U
    losses_K = torch.tensor([1.7, 0.4], dtype=torch.float64)
    z, z2 = (masks_KU.double() - scores_U) / (scores_U * (1 - scores_U)).sqrt()
    torch.testing.assert_close(
        vrpge_gradient(scores_U, masks_KU, losses_K), (1.7 - 0.4) / 2 * (z - z2), rtol=1e-13, atol=1e-14
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_saturated_scores_get_exactly_zero(dtype, alpha):
    scores_U = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0], dtype=dtype)
    # the masks even contradict the scores, as masks drawn before a projection may
    masks_KU = torch.tensor([[True, False, True, False, True], [False, True, False, False, True]])
    gradient = vrpge_gradient(scores_U, masks_KU, torch.tensor([2.0, 1.0], dtype=dtype), alpha)
    assert gradient.dtype == dtype
    assert gradient[[0, 1, 3, 4]].tolist() == [0.0] * 4
    assert gradient[2] > 0


def test_nearly_saturated_scores_stay_finite_in_float32():
    tiny = torch.finfo(torch.float32)
    scores_U = torch.tensor([tiny.tiny, 1e-12, 1 - tiny.eps], dtype=torch.float32)
    masks_KU = torch.tensor([[True, True, False], [False, False, True]])
    gradient = vrpge_gradient(scores_U, masks_KU, torch.tensor([2.0, 1.0]))
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).all()


EDGES = (1e-1, 1e-2, 1e-4, 1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("side", ["0", "1"])
def test_variance_is_bounded_at_the_edges_where_that_of_reinforce_is_not(alpha, side):
    _, losses_N = random_table(3, seed=4)
    spread = (losses_N.max() - losses_N.min()) ** 2
    ours, plain = [], []
    for edge in EDGES:
        scores_U = torch.tensor([edge, 0.4, 0.6], dtype=torch.float64)
        if side == "1":
            scores_U[0] = 1 - edge
        ours.append(enumerated_moments(vrpge(scores_U, alpha), scores_U, losses_N, 2)[1])
        plain.append(enumerated_moments(reinforce(scores_U), scores_U, losses_N, 1)[1])
    # E[(z - z')^2] = 2 (s (1-s))^(2 alpha - 1) <= 2, and |L - L'| / 2 <= spread / 2
    assert all((variance_U <= spread / 2).all() for variance_U in ours)
    growth = [(after[0] / before[0]).item() for before, after in pairwise(plain[1:])]
    assert all(factor > 50 for factor in growth), growth  # each step is a factor of 100 in s


def test_variance_under_a_large_offset():
    scores_U, losses_N = random_table(4, seed=5)
    offset_N = losses_N + 100
    without = enumerated_moments(vrpge(scores_U, 0.5), scores_U, losses_N, 2)
    with_offset = enumerated_moments(vrpge(scores_U, 0.5), scores_U, offset_N, 2)
    torch.testing.assert_close(with_offset[1], without[1], rtol=1e-7, atol=1e-9)
    preconditioned = enumerated_moments(reinforce(scores_U, 0.5), scores_U, offset_N, 1)[1]
    assert (with_offset[1] < preconditioned / 500).all()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("seed", range(4))
def test_variance_never_exceeds_the_one_sided_form(seed, alpha):
    scores_U, losses_N = random_table(3, seed)
    ours = enumerated_moments(vrpge(scores_U, alpha), scores_U, losses_N, 2)
    paper = enumerated_moments(one_sided(scores_U, alpha), scores_U, losses_N, 2)
    torch.testing.assert_close(ours[0], paper[0], rtol=1e-11, atol=1e-12)
    assert (ours[1] <= paper[1] * (1 + 1e-12)).all()
    assert (ours[1] < 0.99 * paper[1]).any()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_more_samples_have_less_variance(alpha):
    scores_U, losses_N = random_table(3, seed=6)
    two, three = (enumerated_moments(vrpge(scores_U, alpha), scores_U, losses_N, K)[1] for K in (2, 3))
    assert (three < two).all()
