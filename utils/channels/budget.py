"""The budget: how much of a network the scores may keep, and everything that is decided by it.

Legend: U units.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from utils.algorithm.projection import project_onto_budget, project_onto_cost
from utils.algorithm.transfer import HostCopy, sent_to
from utils.channels.cost import ExpectedCost, constant_score
from utils.channels.network import SparseNetwork
from utils.channels.subnet import best_within_budget, best_within_cost

BUDGET_UNITS = ("channels", "params", "flops")
TIGHT = 0.999  # of a budget: as good as spent


class Budget:
    """A bound on what is kept of a network. It is given as `keep_ratio` in every call, since it may fall in training.

    Args:
        network: whose scores are bounded.
        unit: what the bound counts: "channels", or what they cost on average in "params" or "flops".
        by_layer: whether every layer has a bound of its own; only with channels.
        spend: whether the scores meet the bound in every step, see `project_onto_budget`, and candidates for the subnet
            at the end.
    """

    def __init__(
        self, network: SparseNetwork, unit: str = "channels", by_layer: bool = False, spend: bool = False
    ) -> None:
        if unit not in BUDGET_UNITS:
            raise ValueError(f"the unit of a budget is one of {', '.join(BUDGET_UNITS)}, got {unit!r}")
        if by_layer and unit != "channels":
            raise ValueError(f"a budget by layer counts channels, got {unit!r}")
        self.network, self.unit, self.spend = network, unit, spend
        self.groups = network.unit_groups() if by_layer else [slice(0, network.num_units)]

    @property
    def cost(self) -> ExpectedCost | None:
        """The expected cost that is bounded; None for a bound on channels."""
        return None if self.unit == "channels" else self.network.expected_cost(self.unit)

    @property
    def on_host(self) -> bool:
        """Whether scores are projected on the host: what they cost takes decisions that a GPU would wait for."""
        return self.unit != "channels"

    def project_(self, keep_ratio: float) -> Tensor:
        """Puts the scores back into the box [0, 1] and the budget. Returns v, the largest of several (0-d)."""
        scores_U = self.network.scores.data
        if self.on_host:
            projected_U, v = self.projected(HostCopy.of(scores_U).read(), keep_ratio)
            scores_U.copy_(sent_to(projected_U, scores_U.device))
            return sent_to(v, scores_U.device)
        _check_fraction(keep_ratio)
        thresholds = []
        for part in (scores_U[group] for group in self.groups):
            projected, v = project_onto_budget(part, keep_ratio * part.numel(), spend=self.spend)
            part.copy_(projected)
            thresholds.append(v)
        return torch.stack(thresholds).max()

    def projected(self, scores_U: Tensor, keep_ratio: float) -> tuple[Tensor, Tensor]:
        """Scores in the box [0, 1] and a budget of cost, and v (0-d); both on the host.

        Args:
            scores_U: (U,) on the host.
        """
        _check_fraction(keep_ratio)
        return project_onto_cost(scores_U, self.cost, keep_ratio * self.cost.dense, self.spend)

    def remove_normal_(self, keep_ratio: float, known_U: Tensor | None = None) -> None:
        """Takes from `scores.grad` the part along which a descent would exceed the budget, where that is spent.

        The projection would undo this part. Where keeping any unit helps, it is most of the gradient, and Adam, which
        scales every coordinate by its own size, would see little else. What is left adds up to nothing over the scores
        between 0 and 1, so a score may move for which the estimate is 0.

        Args:
            keep_ratio: the budget that the scores were last projected onto, or a lower one.
            known_U: (U,) the scores, where the host has them; a budget of cost waits for them otherwise.
        Source: projected gradients; ours here.
        """
        gradient_U, scores_U, cost = self.network.scores.grad, self.network.scores.data, self.cost
        free_U = (scores_U > 0) & (scores_U < 1)
        if cost is not None:
            known_U = HostCopy.of(scores_U).read() if known_U is None else known_U
            spent, normal = cost.with_gradient(known_U.double().numpy())
            is_spent = spent >= TIGHT * keep_ratio * cost.dense
            normal_U = sent_to(torch.from_numpy(normal).to(gradient_U.dtype), gradient_U.device)
            normals = [normal_U * free_U * is_spent]
        else:
            normals = [torch.zeros_like(gradient_U) for _ in self.groups]
            for normal_U, group in zip(normals, self.groups, strict=True):
                is_spent = scores_U[group].sum() >= TIGHT * keep_ratio * scores_U[group].numel()
                normal_U[group] = (free_U[group] & is_spent).to(gradient_U.dtype)
        for normal_U in normals:
            square = normal_U @ normal_U
            outwards = (gradient_U @ normal_U / square.masked_fill(square <= 0, 1.0)).clamp(max=0)
            gradient_U.sub_(normal_U * outwards)

    def best_units(self, values_U: np.ndarray, scores_U: np.ndarray, keep_ratio: float) -> np.ndarray:
        """The units of highest value that fit: (U,) bool; see `best_within_budget` and `best_within_cost`."""
        vital, cost = self.network.vital_groups, self.cost
        if cost is not None:
            return best_within_cost(values_U, scores_U, cost, keep_ratio * cost.dense, vital)
        return best_within_budget(values_U, scores_U, self.groups, keep_ratio, vital)

    def smallest_keep_ratio(self) -> float:
        """The budget below which no subnet fits: what the layer guard leaves of an empty mask."""
        smallest = self.network.plan(np.zeros(self.network.num_units, dtype=bool)).mask_U
        if self.cost is None:
            return float(smallest.mean())
        return self.cost(smallest) / self.cost.dense

    def largest_score(self, keep_ratio: float) -> float:
        """The largest score which, given to every stored unit, keeps the budget."""
        if self.cost is not None:
            return constant_score(self.cost, keep_ratio * self.cost.dense, self.network.stored_units)
        return min(1.0, keep_ratio / self.stored_share())

    def indifferent_score(self, keep_ratio: float) -> float:
        """The score which, given to every unit of the whole network, meets the budget."""
        if self.cost is not None:
            return constant_score(self.cost, keep_ratio * self.cost.dense, np.ones(self.network.num_units, dtype=bool))
        return keep_ratio

    def stored_share(self) -> float:
        """What the stored units are of the whole network, in what the budget counts: 1 until units have left.

        Where every layer has a budget of its own, the largest share of any layer.
        """
        units_U = self.network.stored_units
        if self.cost is not None:
            return self.cost(units_U) / self.cost.dense
        return max(float(units_U[group].mean()) for group in self.groups)


def _check_fraction(keep_ratio: float) -> None:
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio is a fraction in (0, 1], got {keep_ratio!r}")
