"""The figures of the gauge, against exact enumeration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from tests.tools.toys import enumerated, look_up, random_table, true_gradient, vector
from tests.toy import one_thread  # noqa: F401
from tools import gauge
from tools.gauge_figures import Figure, cosine_moments, jackknife, squared_mean
from utils.algorithm.estimators.base import Estimator, Gates
from utils.algorithm.estimators.linear_cv_gates import LinearControlVariate
from utils.algorithm.estimators.reinforce import Reinforce
from utils.algorithm.estimators.taylor import Taylor
from utils.algorithm.estimators.vrpge import VRPGEEstimator

ALPHA = 0.5
TOY_SCORES = vector(0.3, 0.5, 0.8)
CLASSES = {"vrpge": VRPGEEstimator, "reinforce": Reinforce, "linear_cv_gates": LinearControlVariate, "taylor": Taylor}
FIGURES = {"variance", "relative_variance", "mask_share", "bias", "share_of_signal", "cosine", "cosine_sd"}


@dataclass(frozen=True)
class ToyBatch:
    """Losses from a table (2^U,)."""

    table_N: Tensor

    def run(self, masks_KU: Tensor) -> tuple[Tensor, float]:
        return look_up(self.table_N, masks_KU), 2.0

    def gates(self, mask_U: Tensor) -> Gates:
        """Slopes of the function that is linear in every unit and has the table's values at the corners."""
        flipped = mask_U ^ torch.eye(len(mask_U), dtype=torch.bool)
        change_U = look_up(self.table_N, mask_U[None]) - look_up(self.table_N, flipped)
        return Gates(change_U * (2.0 * mask_U - 1), mask_U, num_images=1)


@cache
def population() -> Tensor:
    """(3, 2^U): the batches that there are, equally likely. Much in common, so that there is a signal.

    The losses are small, so that the second order of `Taylor` does not outweigh the first.
    """
    return 0.01 * (random_table(3, seed=0) + 0.3 * torch.stack([random_table(3, seed=i) for i in (10, 20, 30)]))


def toy_batches(count: int, seed: int) -> list[ToyBatch]:
    choice = torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))
    return [ToyBatch(population()[i]) for i in choice.tolist()]


def measure_toy(
    names, num_batches: int, num_masks: int, seed: int, warm_up: int = 0
) -> tuple[dict[str, dict[str, Figure]], dict[str, Estimator]]:
    estimators = {name: CLASSES[name](TOY_SCORES, ALPHA) for name in names}
    gauge.warm_up_(estimators.values(), toy_batches(warm_up, 2 * seed + 1), TOY_SCORES, seed)
    figures, cost = gauge.measure(toy_batches(num_batches, 2 * seed), estimators, TOY_SCORES, num_masks, seed)
    assert cost == 2.0
    return figures, estimators


def exact_figures(estimator: Estimator) -> dict[str, float]:
    """All figures by enumeration of batches and masks, but for the relative variance."""
    draws = [
        enumerated(lambda m, losses: estimator.gradient(TOY_SCORES, m, losses), TOY_SCORES, table_N)
        for table_N in population()
    ]
    weight_D, g_TDU = draws[0][0], torch.stack([g_DU for _, g_DU in draws])
    mean_TU = torch.einsum("d,tdu->tu", weight_D, g_TDU)
    square_T = torch.einsum("d,tdu->t", weight_D, g_TDU**2)
    mean_U = mean_TU.mean(0)
    signal, square = (mean_U @ mean_U).item(), square_T.mean().item()
    truth_U = (TOY_SCORES * (1 - TOY_SCORES)) ** ALPHA * true_gradient(TOY_SCORES, population().mean(0))
    norms_TD = g_TDU.norm(dim=2)
    cosines_TD = (g_TDU @ truth_U) / truth_U.norm() / norms_TD.where(norms_TD > 0, 1.0)
    cosine, cosine_square = ((weight_D @ moment.T).mean().item() for moment in (cosines_TD, cosines_TD**2))
    return {
        "variance": square - signal,
        "mask_share": (square_T - (mean_TU**2).sum(1)).mean().item() / (square - signal or 1.0),
        "bias": ((mean_U - truth_U) ** 2).sum().item() / (truth_U @ truth_U).item(),
        "share_of_signal": signal / square,
        "cosine": cosine,
        "cosine_sd": max(0.0, cosine_square - cosine**2) ** 0.5,
    }


def test_every_figure_is_the_enumerated_one_within_its_own_error():
    names = ["vrpge", "reinforce", "linear_cv_gates"]
    measured, estimators = measure_toy(names, num_batches=120, num_masks=24, seed=1, warm_up=150)
    plain = exact_figures(estimators["vrpge"])["variance"]
    deviations = []
    for name, figures in measured.items():
        exact = exact_figures(estimators[name])
        exact["relative_variance"] = exact["variance"] / plain
        assert set(figures) == FIGURES == set(exact)
        for what, figure in figures.items():
            if name == "vrpge" and what == "relative_variance":
                assert figure == (1.0, 0.0)
            elif what == "bias":  # there is none, and around 0 it is far from normal
                assert exact[what] < 1e-20
                assert figure.value < 3 * figure.error < 0.3, name
            else:
                assert abs(figure.value - exact[what]) < 4 * figure.error, (name, what)
                deviations.append((figure.value - exact[what]) / figure.error)
        for what in ("variance", "mask_share", "share_of_signal", "cosine", "cosine_sd"):
            assert figures[what].error < 0.2 * exact[what], (name, what)  # so that it could fail
    assert 0.5 < torch.tensor(deviations).square().mean().sqrt() < 1.5  # errors are neither boasted nor padded
    assert 0.3 < estimators["linear_cv_gates"].scale < 1  # so it had something to say


def test_squares_and_cosines_have_no_bias_from_their_own_noise():
    """Exactly: the mean over all draws of four batches out of three, each with one estimate and one reference."""
    generator = torch.Generator().manual_seed(0)
    references_3U, directions_3U = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    squares, cosines = [], []
    for batches in map(list, product(range(3), repeat=4)):
        references_NU, directions_NU = references_3U[batches], directions_3U[batches]
        squares.append(squared_mean(references_NU @ references_NU.T))
        cosines.append(cosine_moments((directions_NU @ references_NU.T)[:, None], 4.0))
    mean_U = references_3U.mean(0)
    exact_3 = directions_3U @ mean_U / 2  # as if the reference had norm 2
    assert sum(squares) / 81 == pytest.approx((mean_U @ mean_U).item())
    assert sum(first for first, _ in cosines) / 81 == pytest.approx(exact_3.mean().item())
    assert sum(second for _, second in cosines) / 81 == pytest.approx((exact_3**2).mean().item())


def test_an_estimate_that_reads_no_masks_has_no_variance_and_its_bias_is_seen():
    measured, estimators = measure_toy(["vrpge", "taylor"], num_batches=100, num_masks=40, seed=3, warm_up=150)
    figures, exact = measured["taylor"], exact_figures(estimators["taylor"])
    assert figures["variance"] == figures["relative_variance"] == (0.0, 0.0)
    assert math.isnan(figures["mask_share"].value)
    assert figures["share_of_signal"].value == pytest.approx(1)
    assert abs(figures["bias"].value - exact["bias"]) < 3 * figures["bias"].error < 0.6 * exact["bias"]
    assert abs(figures["cosine"].value - exact["cosine"]) < 4 * figures["cosine"].error < 0.25


def test_figures_of_one_estimator_do_not_depend_on_which_others_are_asked_for():
    every, _ = measure_toy(list(CLASSES), num_batches=5, num_masks=4, seed=2, warm_up=60)
    for name in CLASSES:
        alone, _ = measure_toy(dict.fromkeys(["vrpge", name]), num_batches=5, num_masks=4, seed=2, warm_up=60)
        assert repr(alone[name]) == repr(every[name])  # not a number is the same as itself here
    other, _ = measure_toy(["vrpge"], num_batches=5, num_masks=4, seed=3)
    assert other["vrpge"]["variance"] != every["vrpge"]["variance"]


def test_masks_are_run_once_and_shared_and_the_warm_up_only_for_those_that_learn():
    runs, masks = [], []

    class Counting(ToyBatch):
        def run(self, masks_KU):
            runs.append("run")
            masks.append(masks_KU)
            return super().run(masks_KU)

        def gates(self, mask_U):
            runs.append("gates")
            assert torch.equal(mask_U, masks[-1][0])  # that of the weight step
            return super().gates(mask_U)

    estimators = {name: CLASSES[name](TOY_SCORES, ALPHA) for name in CLASSES}
    gauge.measure([Counting(population()[0])] * 5, estimators, TOY_SCORES, 6, seed=0)
    assert runs == ["run"] * 5 * 3
    gauge.warm_up_([estimators["reinforce"]], [Counting(population()[0])] * 3, TOY_SCORES, seed=0)
    assert len(runs) == 5 * 3
    gauge.warm_up_(estimators.values(), [Counting(population()[0])] * 8, TOY_SCORES, seed=0)
    assert runs[5 * 3 :] == ["run", "gates"] * 8


def test_jackknife_of_a_mean_is_the_usual_standard_error():
    values = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, error = jackknife(lambda kept: {"mean": float(values[kept].mean())}, 30)["mean"]
    assert mean == pytest.approx(values.mean().item())
    assert error == pytest.approx(values.std().item() / 30**0.5)


def test_a_loss_that_is_not_finite_is_refused():
    batches = [ToyBatch(population()[0] * torch.inf)] * 4
    with pytest.raises(FloatingPointError, match="not finite"):
        gauge.measure(batches, {"vrpge": VRPGEEstimator(TOY_SCORES)}, TOY_SCORES, num_masks=4, seed=0)
