"""Euclidean projection of scores onto the box [0, 1] with a budget on their sum."""

from __future__ import annotations

import torch
from torch import Tensor


def project_onto_budget(scores_U: Tensor, budget: float) -> tuple[Tensor, Tensor]:
    """The nearest feasible scores.

        argmin_p ||p - z||^2  subject to  0 <= p <= 1, sum(p) <= budget
        p = clip(z - v, 0, 1) with the smallest feasible v >= 0

    Exact: the sum of clip(z - v, 0, 1) is piecewise linear in v with breaks at z - 1 and z, so v is read off the
    sorted breaks. Runs on the device of the scores and asks the host nothing.

    Args:
        scores_U: (U,) float, finite.
        budget: greatest sum of the scores, 0 <= budget <= U.
    Returns: the projected scores (same dtype and device), and v (0-d).
    Raises: ValueError if the budget is out of range.
    Source: KKT conditions; the released code bisects for the same v to a tolerance of 1e-3 on the sum.
    """
    if not 0 <= budget <= scores_U.numel():
        raise ValueError(f"budget must lie in [0, {scores_U.numel()}] (the number of scores), got {budget}")
    z_U = scores_U.double()  # float32 sums of 26,000 scores would miss the budget by more than 1e-6
    # Walking v upwards, unit i starts to shrink at v = z_i - 1 (slope -1) and is gone at v = z_i (slope +1 again).
    breaks, order = torch.cat([z_U - 1, z_U]).sort()
    slopes = torch.where(order < len(z_U), -1.0, 1.0).to(breaks.dtype).cumsum(0)
    sums = len(z_U) + torch.cat([breaks.new_zeros(1), (slopes[:-1] * breaks.diff()).cumsum(0)])
    # The last break whose sum is still above the budget starts the segment that crosses it.
    segment = (sums > budget).sum().clamp(min=1) - 1
    slope = slopes.index_select(0, segment.view(1)).clamp(max=-1.0)
    v = breaks.index_select(0, segment.view(1)) + (budget - sums.index_select(0, segment.view(1))) / slope
    v = torch.where(z_U.clamp(0, 1).sum() <= budget, 0.0, v.squeeze(0)).clamp(min=0)
    return (z_U - v).clamp(0, 1).to(scores_U.dtype), v.to(scores_U.dtype)
