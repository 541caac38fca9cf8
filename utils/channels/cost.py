"""What a network costs on average under masks drawn from the scores, in parameters or in multiply-adds.

Masks are independent, so the expected number of live channels is a sum over channels of

    P(live) = 1 - prod (1 - s_u)  over the units u that can bring the channel to life.

What a layer costs grows with the channels it writes, and for most with those it reads too. The mean of a product of
two such counts is the product of their means, but for pairs of channels that have a unit in common (a stream with tied
masks whose layers read what they write, a layer that runs twice):

    E[a b] - E[a] E[b] = prod (1 - s_u) over the units of both  -  P(a not live) P(b not live).

Source: ours.
"""

from __future__ import annotations

import numpy as np

from utils.channels.graph import ChannelGraph
from utils.channels.spaces import Segment

COUNTS = {"params": ChannelGraph.layer_parameters, "flops": ChannelGraph.layer_macs}


class ExpectedCost:
    """The mean cost as a function of the scores: one closed form, laid out once for a network.

    The layer guard (`keep_one_unit`) is no part of it: what it adds to a draw that empties a layer is rare and small,
    and has no such form.

    Args:
        graph: of a network with maskable layers.
        unit: "params", or "flops" (multiply-adds of one image, one forward pass).

    Attributes:
        dense: cost of the whole network.
        fixed: cost without any unit.
    """

    # S spaces of the graph; G segments, the R rows of which are their channels: the first U rows are the units

    def __init__(self, graph: ChannelGraph, unit: str) -> None:
        self.num_units = graph.num_units
        constant, linear_S, quadratic_SS = _coefficients(graph, unit)
        written = {segment for space in graph.spaces for segment in space.segments if segment.writers}
        single = sorted((s for s in written if len(s.writers) == 1), key=lambda segment: min(segment.writers))
        self._rows: dict[Segment, slice] = {}
        self._products: list[tuple[slice, slice, slice]] = []
        for segment in [*single, *sorted(written - set(single), key=lambda s: (len(s.writers), sorted(s.writers)))]:
            self._add(segment)
        assert sum(segment.width for segment in single) == self.num_units, "a unit without a row of its own"

        # the same polynomial, with n = always + holds @ (live channels per segment) put in
        always_S = np.array([sum(s.width for s in space.segments if not s.writers) for space in graph.spaces])
        holds_SG = np.array([[space.segments.count(segment) for segment in self._rows] for space in graph.spaces])
        self._constant = constant + linear_S @ always_S + always_S @ quadratic_SS @ always_S
        self._linear_G = holds_SG.T @ (linear_S + 2 * quadratic_SS @ always_S)
        self._quadratic_GG = holds_SG.T @ quadratic_SS @ holds_SG
        self._shared = self._find_shared()
        self.dense = self(np.ones(self.num_units))
        self.fixed = self(np.zeros(self.num_units))

    def _add(self, segment: Segment) -> slice:
        """Gives a segment its rows; those of several writers are products of earlier ones, a stream's one by one."""
        if segment in self._rows:
            return self._rows[segment]
        factors = []
        if len(segment.writers) > 1:
            inner = [s.writers for s in self._rows if s.width == segment.width and s.writers < segment.writers]
            last = frozenset({max(segment.writers - max(inner, key=len))})
            factors = [self._add(Segment(segment.width, writers)) for writers in (segment.writers - last, last)]
        start = max((rows.stop for rows in self._rows.values()), default=0)
        rows = self._rows[segment] = slice(start, start + segment.width)
        if factors:
            self._products.append((rows, *factors))
        return rows

    def _find_shared(self) -> list[tuple[float, slice, slice, slice]]:
        """The pairs of segments whose channels share units, as rows, with the rows of their union and what it costs."""
        segments, shared = list(self._rows), []
        for g, h in np.argwhere(self._quadratic_GG).tolist():
            one, other = segments[g], segments[h]
            if one.writers & other.writers:
                both = self._add(Segment(one.width, one.writers | other.writers))
                shared.append((self._quadratic_GG[g, h], self._rows[one], self._rows[other], both))
        missing = len(self._rows) - len(segments)  # unions that are no segment of the network cost nothing themselves
        self._linear_G = np.pad(self._linear_G, (0, missing))
        self._quadratic_GG = np.pad(self._quadratic_GG, (0, missing))
        return shared

    def __call__(self, scores_U: np.ndarray) -> float:
        """The expected cost; under a mask, what the network costs with it.

        Args:
            scores_U: (U,) in [0, 1], or bool.
        """
        return self.with_gradient(scores_U)[0]

    def with_gradient(self, scores_U: np.ndarray) -> tuple[float, np.ndarray]:
        """The expected cost and its gradient: (U,) float64, nowhere negative.

        The cost is linear in each score alone, so the gradient under a mask is what a unit adds, or has added, exactly.
        Written out and on the host, because all that use it decide by it there: 0.1 ms for a resnet32.

        Args:
            scores_U: (U,) in [0, 1], or bool.
        """
        starts = [rows.start for rows in self._rows.values()]
        widths = [segment.width for segment in self._rows]
        dropped_R = np.empty(sum(widths))  # probability that a channel is not live
        dropped_R[: self.num_units] = 1 - scores_U.astype(np.float64)
        for rows, one, other in self._products:
            np.multiply(dropped_R[one], dropped_R[other], out=dropped_R[rows])
        counts_G = np.add.reduceat(1 - dropped_R, starts)
        slope_G = self._linear_G + 2 * self._quadratic_GG @ counts_G
        cost = self._constant + (self._linear_G + slope_G) @ counts_G / 2

        slope_R = -np.repeat(slope_G, widths)
        for weight, one, other, both in self._shared:
            cost += weight * (dropped_R[both].sum() - dropped_R[one] @ dropped_R[other])
            slope_R[both] += weight
            slope_R[one] -= weight * dropped_R[other]
            slope_R[other] -= weight * dropped_R[one]
        for rows, one, other in reversed(self._products):
            slope_R[one] += slope_R[rows] * dropped_R[other]
            slope_R[other] += slope_R[rows] * dropped_R[one]
        return float(cost), (-slope_R[: self.num_units]).clip(0)  # rounding can leave less than 0 where it is 0


def _coefficients(graph: ChannelGraph, unit: str) -> tuple[float, np.ndarray, np.ndarray]:
    """The cost as constant + linear n + n quadratic n, for n live channels per space.

    Read off the counts of the graph at a few n, so that nothing is counted in two places.
    """
    num_spaces = len(graph.spaces)

    def cost(*spaces: int) -> int:
        return sum(COUNTS[unit](graph, [spaces.count(space) for space in range(num_spaces)]).values())

    constant, single = cost(), [cost(i) for i in range(num_spaces)]
    quadratic_SS = np.zeros((num_spaces, num_spaces))
    for i in range(num_spaces):
        quadratic_SS[i, i] = (cost(i, i) - 2 * single[i] + constant) / 2
    for i, j in {(graph.ops[k].space, op.space) for op in graph.ops for k in op.inputs}:
        if i != j:
            quadratic_SS[i, j] = quadratic_SS[j, i] = (cost(i, j) - single[i] - single[j] + constant) / 2
    linear_S = np.array(single) - constant - quadratic_SS.diagonal()
    return float(constant), linear_S, quadratic_SS


def constant_score(cost: ExpectedCost, budget: float, units_U: np.ndarray) -> float:
    """The largest score which, given to some units, keeps the expected cost within the budget.

    Args:
        budget: in the unit of the cost, at least `cost.fixed`.
        units_U: (U,) bool, the units that get it; all others have score 0.
    """
    everywhere = units_U.astype(np.float64)
    low, high = 0.0, 1.0
    if cost(everywhere) <= budget:
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if cost(middle * everywhere) <= budget:
            low = middle
        else:
            high = middle
    return low
