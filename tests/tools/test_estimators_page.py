"""The exact variances of docs/estimators.md, which `python -m tests.tools.test_estimators_page` prints."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from args import ESTIMATORS
from tests.tools.toys import (
    interaction_table,
    linear_table,
    pairwise_table,
    probabilities,
    true_gradient,
    variance,
    vector,
)
from utils.algorithm.estimators.linear_cv_gates import LinearControlVariate
from utils.algorithm.estimators.reinforce import Reinforce
from utils.algorithm.estimators.vrpge import VRPGEEstimator

PAGE = Path(__file__).parents[2] / "docs" / "estimators.md"


def toys() -> dict[str, tuple[Tensor, Tensor]]:
    """Scores and losses; 2.3, as of ten classes by chance, stands for all that masks do not change."""
    scores, effects, half = vector(0.2, 0.5, 0.65, 0.9), vector(1.5, -0.6, 0.8, 0.3), vector(0.5, 0.5, 0.5, 0.5)
    decided, rare = vector(0.97, 0.5), vector(0.02, 0.5, 0.5, 0.5)
    strong = linear_table(vector(0.0, 1.0)) + 1 / 0.47 * interaction_table(decided, 0, 1)
    tables = {
        "linear, all scores 1/2": (half, linear_table(effects)),
        "linear": (scores, linear_table(effects)),
        "pairwise, all scores 1/2": (half, pairwise_table(half)),
        "pairwise": (scores, pairwise_table(scores)),
        "mixed": (scores, linear_table(effects) + 0.5 * pairwise_table(scores)),
        "three units that only act together": (rare, interaction_table(rare, 1, 2, 3)),
        "a strong interaction": (decided, strong),
    }
    return {name: (scores_U, 2.3 + table_N) for name, (scores_U, table_N) in tables.items()}


def with_exact_effects(scores_U: Tensor, table_N: Tensor) -> LinearControlVariate:
    estimator = LinearControlVariate(scores_U)
    estimator.slope_U = true_gradient(scores_U, table_N)
    estimator.covariance = estimator.power = torch.ones(())  # full trust
    return estimator


def toy_table() -> str:
    """Exact variances, summed over units; batches shift all losses by one standard deviation of the mask noise."""
    lines = ["| toy | vrpge | reinforce | linear_cv_gates |", "| - | - | - | - |"]
    for toy, (scores_U, table_N) in toys().items():
        weight_N = probabilities(scores_U)
        sigma = float((weight_N @ (table_N - weight_N @ table_N) ** 2).sqrt())
        estimators = [VRPGEEstimator(scores_U), Reinforce(scores_U), with_exact_effects(scores_U, table_N)]

        def total(estimator, scores_U=scores_U, table_N=table_N, sigma=sigma) -> float:
            estimate = partial(estimator.gradient, scores_U)
            return float(variance(estimate, scores_U, table_N, sigma).sum())

        plain, *others = map(total, estimators)
        lines.append(f"| {toy} | {plain:.3f} | " + " | ".join(f"{value / plain:.2f}" for value in others) + " |")
    return "\n".join(lines)


def test_the_page_shows_the_exact_variances_and_describes_every_estimator():
    page = PAGE.read_text(encoding="utf-8")
    assert toy_table() in page
    described = page[: page.index("## Estimators that are no longer in the program")]
    assert all(f"`{name}`" in described for name in ESTIMATORS)
    assert not any(f"`{name}`" in described for name in ("disarm", "shrinkage", "linear_cv", "subbatch"))


def test_exact_effects_can_hurt_where_interactions_rule():
    """Where the masks differ on the decided unit, the slope of the other is 1 - a (0.97 - 1/2) = 0, not its mean 1."""
    scores_U, table_N = toys()["a strong interaction"]
    exact = with_exact_effects(scores_U, table_N)
    torch.testing.assert_close(exact.effects_U, vector(0.0, 1.0), rtol=0, atol=1e-12)
    estimators = (exact, VRPGEEstimator(scores_U))
    ours_U, plain_U = (variance(partial(e.gradient, scores_U), scores_U, table_N) for e in estimators)
    assert 1.8 < ours_U[0] / plain_U[0] < 2
    assert abs(ours_U.sum() / plain_U.sum() - 1) < 0.01


if __name__ == "__main__":
    print(toy_table())
