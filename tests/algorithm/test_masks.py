"""Sampling, and the guard that keeps a draw from cutting the network in two."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
import torch

from utils.algorithm.masks import keep_one_unit, sample_masks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_never_and_one_always(dtype):
    scores_U = torch.tensor([0.0, 1.0, 0.5], dtype=dtype)
    masks = sample_masks(scores_U, generator(), num_masks=20_000)
    assert masks.dtype == torch.bool
    assert masks.shape == (20_000, 3)
    assert not masks[:, 0].any()
    assert masks[:, 1].all()
    assert 0 < masks[:, 2].sum() < 20_000


def test_the_smallest_uniform_number_keeps_no_unit_with_score_zero(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    assert sample_masks(torch.tensor([0.0, 1e-30, 1.0]), generator()).tolist() == [[False, True, True]] * 2


def test_the_largest_uniform_number_keeps_a_unit_with_score_one(monkeypatch):
    largest = 1 - torch.finfo(torch.float32).eps / 2
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, largest))
    assert sample_masks(torch.tensor([0.0, 0.99, 1.0]), generator()).tolist() == [[False, False, True]] * 2


def test_the_same_state_gives_the_same_masks_and_the_state_moves_on():
    scores_U = torch.full((200,), 0.5)
    one, other = generator(7), generator(7)
    first = sample_masks(scores_U, one)
    assert torch.equal(first, sample_masks(scores_U, other))
    assert not torch.equal(first, sample_masks(scores_U, one))
    assert not torch.equal(first, sample_masks(scores_U, generator(8)))


def test_no_other_randomness_is_used():
    before = torch.get_rng_state()
    sample_masks(torch.full((10,), 0.5), generator())
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(TypeError):
        sample_masks(torch.full((10,), 0.5))


def test_masks_of_one_step_are_independent():
    """The product of two independent coins: correlations stay within five standard errors."""
    num_units = 20_000
    masks = sample_masks(torch.full((num_units,), 0.3), generator(1), num_masks=3).double()
    bound = 5 / sqrt(num_units)
    correlation = torch.corrcoef(masks)
    assert (correlation - torch.eye(3)).abs().max() < bound
    shifted = torch.corrcoef(torch.stack([masks[0, :-1], masks[0, 1:]]))
    assert shifted[0, 1].abs() < bound


@pytest.mark.parametrize("score", [0.01, 0.3, 0.5, 0.97])
def test_frequencies_within_five_standard_errors(score):
    num_draws = 40_000
    masks = sample_masks(torch.full((4,), score), generator(2), num_draws)
    bound = 5 * sqrt(score * (1 - score) / num_draws)
    assert (masks.double().mean(0) - score).abs().max() < bound


GROUPS = [np.array([0, 1, 2]), np.array([4, 5, 7])]


def test_nothing_happens_where_every_group_keeps_a_unit():
    mask_U = np.array([0, 1, 0, 0, 0, 0, 0, 1], dtype=bool)
    assert keep_one_unit(mask_U, torch.rand(8), GROUPS) is mask_U


def test_an_empty_group_gets_its_likeliest_unit():
    mask_U = np.array([0, 0, 0, 1, 0, 1, 0, 0], dtype=bool)
    scores_U = torch.tensor([0.1, 0.2, 0.15, 0.9, 0.9, 0.0, 0.9, 0.9])
    before = mask_U.copy()
    kept = keep_one_unit(mask_U, scores_U, GROUPS)
    assert kept.tolist() == [False, True, False, True, False, True, False, False]
    assert np.array_equal(mask_U, before)  # the estimator still needs the mask as drawn


def test_ties_go_to_the_lowest_index_and_scores_may_all_be_zero():
    nothing = np.zeros(8, dtype=bool)
    scores_U = torch.tensor([0.2, 0.3, 0.3, 0.9, 0.0, 0.0, 0.9, 0.0])
    assert np.flatnonzero(keep_one_unit(nothing, scores_U, GROUPS)).tolist() == [1, 4]


def test_scores_that_require_grad_are_read_all_the_same():
    scores_U = torch.nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))
    assert keep_one_unit(np.zeros(3, dtype=bool), scores_U, [np.arange(3)]).tolist() == [False, False, True]
