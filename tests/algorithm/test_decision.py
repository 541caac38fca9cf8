"""When scores are decided: each of the three conditions by values computed by hand."""

import math

import numpy as np
import pytest

from utils.algorithm.decision import AGREEMENT, BUDGET_LEFT, ENTROPY_LEFT, Decision, decision, entropy

TEN = np.arange(10)


def units(*indices: int) -> np.ndarray:
    return np.isin(TEN, indices)


def test_entropy_in_bits():
    expected = [0, 0, 1, 0.25 * 2 + 0.75 * math.log2(4 / 3), 0.25 * 2 + 0.75 * math.log2(4 / 3)]
    np.testing.assert_allclose(entropy(np.array([0, 1, 0.5, 0.25, 0.75])), expected, atol=1e-15)
    assert entropy(np.float32([0.5, 1 + 1e-7])).tolist() == [1, 0]  # rounding leaves the box at times


def test_the_entropy_is_told_against_scores_that_know_nothing():
    scores_U = np.array([0.5, 0.5, 1, 0, 0])  # 2 bits in 5 units
    top_U = np.array([1, 0, 1, 0, 0], dtype=bool)
    assert decision(scores_U, 0.5, 1.0, top_U, None) == Decision(1.0, pytest.approx(0.4), 0.0)
    assert decision(scores_U, 0.25, 1.0, top_U, None).entropy_ratio == pytest.approx(0.4 / 0.8112781)
    assert decision(np.ones(5), 1.0, 1.0, np.ones(5, dtype=bool), None).entropy_ratio == 0  # all of them fit


def test_the_agreement_is_a_fraction_of_the_larger_set():
    same, fewer, moved = units(0, 1, 2, 3), units(0, 1, 2), units(0, 1, 8, 9)
    scores_U = np.zeros(10)
    found = [decision(scores_U, 0.4, 1.0, same, before).agreement for before in (None, same, fewer, moved, units())]
    assert found == [0, 1, 0.75, 0.5, 0]
    assert decision(scores_U, 0.4, 1.0, fewer, same).agreement == 0.75


@pytest.mark.parametrize(
    ("budget_ratio", "entropy_ratio", "agreement", "made"),
    [
        (1.0, 0.0, 1.0, True),
        (BUDGET_LEFT, ENTROPY_LEFT, AGREEMENT, True),
        (BUDGET_LEFT + 0.01, 0.0, 1.0, False),
        (1.0, ENTROPY_LEFT + 0.01, 1.0, False),
        (1.0, 0.0, AGREEMENT - 0.01, False),
    ],
)
def test_all_three_have_to_hold(budget_ratio, entropy_ratio, agreement, made):
    assert Decision(budget_ratio, entropy_ratio, agreement).made is made
    assert (BUDGET_LEFT, ENTROPY_LEFT, AGREEMENT) == (1.05, 0.1, 0.95)  # docs/training.md tells them
