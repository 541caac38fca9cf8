"""Learning rates and the budget as curves: ends, shape, no jumps where none belong."""

from __future__ import annotations

from itertools import pairwise
from math import cos, pi

import pytest

from utils.algorithm.schedules import falling_keep_ratio, learning_rate_factor

POLICIES = ("cosine_lr", "multistep_lr", "constant_lr")


def curve(policy: str, total: int, warmup: int = 0) -> list[float]:
    return [learning_rate_factor(policy, step, total, warmup) for step in range(total + 1)]


def test_cosine_from_one_to_zero():
    factors = curve("cosine_lr", 100)
    assert factors[0] == 1
    assert factors[25] == pytest.approx(0.5 * (1 + cos(pi / 4)))
    assert factors[50] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0, abs=1e-15)
    assert all(after < before for before, after in pairwise(factors))


def test_multistep_divides_by_ten_at_half_and_three_quarters():
    factors = curve("multistep_lr", 100)
    assert factors[0] == factors[49] == 1
    assert factors[50] == factors[74] == pytest.approx(0.1)
    assert factors[75] == factors[99] == pytest.approx(0.01)


def test_constant():
    assert set(curve("constant_lr", 10)) == {1.0}


@pytest.mark.parametrize("policy", POLICIES)
def test_warm_up_climbs_in_equal_steps_to_one(policy):
    factors = curve(policy, 100, warmup=10)
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[10] == 1  # the first step behind it


def test_the_curve_behind_a_warm_up_still_ends_at_zero():
    factors = curve("cosine_lr", 110, warmup=10)
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == pytest.approx(0, abs=1e-15)
    stairs = curve("multistep_lr", 110, warmup=10)
    assert [stairs[i] for i in (59, 60, 84, 85)] == pytest.approx([1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize("warmup", [0, 20])
def test_no_jumps(warmup):
    factors = curve("cosine_lr", 1000, warmup)
    largest = max(abs(after - before) for before, after in pairwise(factors))
    assert largest <= (1 / warmup if warmup else pi / 2 / 1000) * 1.01


@pytest.mark.parametrize("policy", POLICIES)
def test_the_longest_warm_up_and_steps_beyond_the_end(policy):
    assert learning_rate_factor(policy, 9, 10, 10) == 1
    assert 0 <= learning_rate_factor(policy, 10, 10, 10) <= 1
    assert learning_rate_factor("cosine_lr", 999, 10) == pytest.approx(0, abs=1e-15)


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="'step_lr'"):
        learning_rate_factor("step_lr", 0, 10)


def test_the_falling_budget_by_its_formula():
    def at(progress):
        return falling_keep_ratio(progress, 0.2, start=0.1, end=0.5)

    assert [at(progress) for progress in (0, 0.05, 0.1)] == [1, 1, 1]
    assert at(0.2) == pytest.approx(0.2 + 0.8 * 0.75**3)
    assert at(0.3) == pytest.approx(0.2 + 0.8 * 0.5**3)
    assert at(0.4) == pytest.approx(0.2 + 0.8 * 0.25**3)
    assert [at(progress) for progress in (0.5, 0.51, 1, 10)] == [0.2] * 4


def test_the_falling_budget_never_rises_never_jumps_and_never_falls_below():
    values = [falling_keep_ratio(step / 1000, 0.25) for step in range(1001)]
    assert values[0] == 1
    assert values[400] == 0.25
    assert all(after <= before for before, after in pairwise(values))
    assert max(before - after for before, after in pairwise(values)) < 3 * 0.75 / 400 * 1.01
    assert min(values) == 0.25


def test_a_keep_ratio_of_one_stays_one():
    assert {falling_keep_ratio(step / 10, 1.0) for step in range(11)} == {1.0}
