"""Shapes that stay while masks change: every tensor of a pass has a fixed number of slots for its channels.

Compact execution makes tensors as wide as a mask wants them, so every step has shapes of its own. Here a tensor is as
wide as nearly all masks need it, and which channel a slot holds is data. All draws then run the same operations on the
same shapes, which is what a CUDA graph asks for. A slot that a draw leaves free holds a channel that is not live and is
multiplied by 0. A mask that does not fit has no such plan. Source: ours.

Legend: U maskable units of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from utils.channels.graph import ChannelGraph, Segment, Space
from utils.channels.plan import NOTHING, Plan, joined_spaces, norm_places

SIGMAS = 3.3  # of the number of live channels, above its mean: one draw of a run of channels in 2,000 needs more

Capacities = dict[Segment, int]  # the slots of every run of channels


def capacities_for(
    graph: ChannelGraph, scores_U: np.ndarray, stored: Sequence[np.ndarray], multiple: int
) -> Capacities:
    """Slots for nearly all masks that are drawn from some scores.

    Args:
        scores_U: (U,) probabilities by which units are kept; 0 for those that have left.
        multiple: what numbers of slots are rounded up to.
        stored: per space a (width,) bool array: the channels whose parameters still exist. No run has more slots.
    """
    found = {}
    for segment, own in stored_runs(graph, stored):
        dropped = np.ones(segment.width)
        for first in segment.writers:
            dropped = dropped * (1 - scores_U[first : first + segment.width].astype(np.float64))
        live = 1 - dropped if segment.writers else np.ones(segment.width)
        wanted = live.sum() + SIGMAS * np.sqrt((live * (1 - live)).sum())
        rounded = multiple * max(1, ceil(wanted / multiple - 1e-9))
        found[segment] = min(rounded, int(own.sum()))
    return found


def stored_runs(graph: ChannelGraph, stored: Sequence[np.ndarray]) -> list[tuple[Segment, np.ndarray]]:
    """All runs of channels, each once, and which channels of it are stored: (width,) bool."""
    runs = {}
    for space, own in zip(graph.spaces, stored, strict=True):
        runs |= dict(zip(space.segments, _split(space, own), strict=True))
    return list(runs.items())


def _split(space: Space, channels: np.ndarray) -> list[np.ndarray]:
    """One value per channel of a space, cut at the ends of its runs."""
    return np.split(channels, np.cumsum([segment.width for segment in space.segments])[:-1])


class FixedShapes:
    """Makes plans that all have the same shapes.

    Args:
        graph: of the network.
        stored: per space a (width,) bool array: the channels whose parameters still exist.
        capacities: slots of every run of channels, at most those that are stored. With all of them, a run is computed
            as a whole, and dropped channels are set to 0.
    """

    def __init__(self, graph: ChannelGraph, stored: list[np.ndarray], capacities: Capacities) -> None:
        self.graph, self.stored, self.capacities = graph, stored, capacities
        self.widths = [sum(capacities[segment] for segment in space.segments) for space in graph.spaces]
        self._in_order = [width == own.sum() for width, own in zip(self.widths, stored, strict=True)]
        self._runs: list[list[tuple[np.ndarray, int]]] = []  # per space: its channels that are stored, and their slots
        for space, own in zip(graph.spaces, stored, strict=True):
            channels = [run[own[run]] for run in _split(space, np.arange(space.width))]
            slots = [capacities[segment] for segment in space.segments]
            self._runs.append(list(zip(channels, slots, strict=True)))

    @property
    def slots(self) -> list[int]:
        """Those of every run, as `SparseNetwork.fix_shapes` takes them."""
        return [self.capacities[segment] for segment, _ in stored_runs(self.graph, self.stored)]

    def plan(self, mask_U: np.ndarray) -> Plan | None:
        """The plan of a mask, on the host; None if more channels are live than there are slots.

        Args:
            mask_U: (U,) bool, the layer guard applied; no unit whose parameters have left.
        """
        live = self.graph.live_channels(mask_U)
        channels, alive = [], []
        for runs, live_C in zip(self._runs, live, strict=True):
            parts = [_filled(own, live_C[own], slots) for own, slots in runs]
            if any(part is None for part in parts):
                return None
            channels.append(np.concatenate([part[0] for part in parts]))
            alive.append(np.concatenate([part[1] for part in parts]))
        index = [(np.cumsum(own) - 1)[chosen] for own, chosen in zip(self.stored, channels, strict=True)]
        slots = [np.where(lives, places, NOTHING) for places, lives in zip(index, alive, strict=True)]
        return Plan(
            mask_U=mask_U,
            live=live,
            counts=[int(live_C.sum()) for live_C in live],
            widths=self.widths,
            index=[None if whole else places for whole, places in zip(self._in_order, index, strict=True)],
            alive=[
                None if space.full else lives.astype(np.int64)
                for space, lives in zip(self.graph.spaces, alive, strict=True)
            ],
            positions={
                (inner, outer): _positions(channels[inner], channels[outer], len(live[outer]))
                for inner, outer in joined_spaces(self.graph)
                if not self._same_order(inner, outer)
            },
            norms=norm_places(self.graph, slots, self.stored),
        )

    def _same_order(self, inner: int, outer: int) -> bool:
        """Whether two spaces have all the same channels in the same slots, whatever the mask."""
        both = self._in_order[inner] and self._in_order[outer]
        return both and np.array_equal(self.stored[inner], self.stored[outer])


def _filled(own: np.ndarray, live: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The channel in each slot of a run, and whether it is live; None if there are too few slots.

    Args:
        own: (c,) the stored channels of the run.
        live: (c,) bool, which of them are.
    """
    if slots == len(own):
        return own, live
    kept = own[live]
    if len(kept) > slots:
        return None
    spare = own[live.argmin()]  # there is one that is not live: fewer slots than channels
    return np.concatenate([kept, np.full(slots - len(kept), spare)]), np.arange(slots) < len(kept)


def _positions(inner: np.ndarray, outer: np.ndarray, width: int) -> np.ndarray:
    """The slots of a wider set of channels to which those of a narrower one are added; free ones add 0 anywhere.

    Args:
        inner, outer: the channel in every slot. All live ones of `inner` are live in `outer`.
        width: of the full network.
    """
    slot_of = np.zeros(width, dtype=np.int64)
    slot_of[outer] = np.arange(len(outer))
    return slot_of[inner]
