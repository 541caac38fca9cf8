"""Euclidean projection of scores onto the box [0, 1] with a budget on their sum, or on what a network costs."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-6  # of the budget
SETTLED = 1e-3  # change of a score in the last round; what is left to go is far less
FULL_ROUNDS, MAX_ROUNDS = 10, 30


class Cost(Protocol):
    """What scores (U,) cost on average: a function that is linear in each score and never falls in any of them.

    Attributes:
        fixed: the cost without any unit.
    """

    fixed: float

    def __call__(self, scores_U: np.ndarray) -> float: ...

    def with_gradient(self, scores_U: np.ndarray) -> tuple[float, np.ndarray]: ...


def project_onto_budget(
    scores_U: Tensor, budget: float, weights_U: Tensor | None = None, spend: bool = False
) -> tuple[Tensor, Tensor]:
    """The nearest feasible scores.

        argmin_p ||p - z||^2  subject to  0 <= p <= 1, sum(w p) <= budget
        p = clip(z - v w, 0, 1) with the smallest feasible v >= 0

    With `spend` the sum is the budget, so v may be negative and then raises scores. A score that is not above 0 has no
    part in this and becomes 0: what has left the network never comes back. If all others at 1 do not reach the budget,
    they are 1.

    Exact: the sum of w clip(z - v w, 0, 1) is piecewise linear in v with breaks at (z - 1) / w and z / w, so v is read
    off the sorted breaks. Runs on the device of the scores and, without weights, asks the host nothing.

    Args:
        scores_U: (U,) float, finite.
        budget: greatest sum of the scores, 0 <= budget <= U; with weights of w p, up to sum(w).
        weights_U: (U,) float, w >= 0; None: all 1.
        spend: see above; ours.
    Returns: the projected scores (same dtype and device), and v (0-d).
    Raises: ValueError if the budget is out of range.
    Source: KKT conditions; the released code bisects for the same v to a tolerance of 1e-3 on the sum.
    """
    z_U = scores_U.double()  # float32 sums of 26,000 scores would miss the budget by more than 1e-6
    w_U = torch.ones_like(z_U) if weights_U is None else weights_U.double()
    largest = scores_U.numel() if weights_U is None else float(w_U.sum())
    if not 0 <= budget <= largest:
        raise ValueError(f"budget must lie in [0, {largest}] (the number of scores), got {budget}")
    if spend:
        w_U = torch.where(z_U > 0, w_U, 0.0)
        largest = w_U.sum()
        budget = largest.clamp(max=budget)
    # Walking v upwards, unit i starts to shrink at v = (z_i - 1) / w_i (slope -w_i^2) and is gone at z_i / w_i.
    divisor_U = torch.where(w_U > 0, w_U, 1.0)  # a unit of weight 0 has no say, wherever its breaks are
    breaks, order = torch.cat([(z_U - 1) / divisor_U, z_U / divisor_U]).sort()
    slopes = torch.cat([-w_U.square(), w_U.square()])[order].cumsum(0).clamp(max=0)
    sums = largest + torch.cat([breaks.new_zeros(1), (slopes[:-1] * breaks.diff()).cumsum(0)])
    # The last break whose sum is still above the budget starts the segment that crosses it.
    segment = (sums > budget).sum().clamp(min=1) - 1
    slope = slopes.index_select(0, segment.view(1)).minimum(-divisor_U.square().min())
    v = breaks.index_select(0, segment.view(1)) + (budget - sums.index_select(0, segment.view(1))) / slope
    v = v.squeeze(0)
    if not spend:
        v = torch.where((w_U * z_U.clamp(0, 1)).sum() <= budget, 0.0, v).clamp(min=0)
    return (z_U - v * w_U).clamp(0, 1).to(scores_U.dtype), v.to(scores_U.dtype)


def project_onto_cost(scores_U: Tensor, cost: Cost, budget: float, spend: bool = False) -> tuple[Tensor, Tensor]:
    """Feasible scores near the given ones: a stationary point of their distance.

        argmin_p ||p - z||^2  subject to  0 <= p <= 1, cost(p) <= budget
        p = clip(z - v g, 0, 1) with the slopes g of the cost at p and v >= 0

    With `spend` the cost is the budget and v may be negative, as in `project_onto_budget`.

    The cost is replaced by its tangent at a point and z projected onto that budget, exactly; the result is the next
    point, until its cost meets the budget. In training, where z is one optimizer step away, this takes two rounds. The
    feasible set is not convex, so from far away it may go back and forth: then half steps, and in the end the budget is
    met on the way between two points, one above and one below it.

    Args:
        scores_U: (U,) float, finite; on the host, since a few thousand numbers with a decision every round are no work
            for a GPU.
        cost: of the network.
        budget: in the unit of the cost, at least `cost.fixed`.
        spend: see above; ours.
    Returns: the projected scores (same dtype; without `spend` never above the given ones), the cost of which
        is the budget to 1e-6 of it unless it is below without any projection, or, with `spend`, with all scores at 1
        that are not 0; and v for a unit of mean slope (0-d).
    Raises: ValueError if no scores meet the budget.
    Source: sequential linearisation; ours.
    """
    if not cost.fixed <= budget:
        raise ValueError(f"budget must be at least {cost.fixed} (what is always there costs as much), got {budget}")

    def like_scores(values: Tensor) -> Tensor:
        return values.to(scores_U.dtype)

    z_U = scores_U.detach().double()
    boxed_U = point_U = z_U.clamp(0, 1)
    spent, slope_U = _tangent(cost, point_U)
    most_U = boxed_U
    if spent < budget and spend:
        most_U = (z_U > 0).double()
        if not cost(most_U.numpy()) > budget:
            return like_scores(most_U), scores_U.new_zeros(())
    elif not spent > budget:  # nor with scores of a run that has diverged, which ends by its loss
        return like_scores(boxed_U), scores_U.new_zeros(())
    for number in range(MAX_ROUNDS):
        unit = float(slope_U.mean()) or 1.0
        weights_U = slope_U / unit
        room = (budget - spent) / unit + float(weights_U @ point_U)
        result_U, v = project_onto_budget(z_U, min(max(room, 0.0), float(weights_U.sum())), weights_U, spend)
        reached, _ = result = _tangent(cost, result_U)
        moved = float((result_U - point_U).abs().max())
        if abs(reached - budget) <= TOLERANCE * budget and moved <= SETTLED:
            break
        if number < FULL_ROUNDS:
            point_U, (spent, slope_U) = result_U, result
        else:
            point_U = (point_U + result_U) / 2
            spent, slope_U = _tangent(cost, point_U)
    else:
        result_U = _between(most_U, result_U, cost, budget)
    return like_scores(result_U), like_scores(v)


def _tangent(cost: Cost, point_U: Tensor) -> tuple[float, Tensor]:
    value, slope_U = cost.with_gradient(point_U.numpy())
    return value, torch.from_numpy(slope_U)


def _between(most_U: Tensor, result_U: Tensor, cost: Cost, budget: float) -> Tensor:
    """The point that meets the budget on the way from 0 over the result of a round to scores that exceed it.

    The result is nowhere above those, so the cost only grows on the way.
    """
    low_U, high_U = result_U, most_U
    if cost(result_U.numpy()) > budget:
        low_U, high_U = torch.zeros_like(result_U), result_U
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if cost((low_U + middle * (high_U - low_U)).numpy()) > budget:
            high = middle
        else:
            low = middle
    return low_U + low * (high_U - low_U)
