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

from utils.channels.graph import ChannelGraph
from utils.channels.plan import Plan, assembled
from utils.channels.slots import slot_hosts
from utils.channels.spaces import Segment, Space

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
        spreading: see `slot_hosts`.
    """

    def __init__(self, graph: ChannelGraph, stored: list[np.ndarray], capacities: Capacities, spreading: int) -> None:
        self.graph, self.stored, self.capacities = graph, stored, capacities
        self.widths = [sum(capacities[segment] for segment in space.segments) for space in graph.spaces]
        self._hosts = slot_hosts(graph, self.widths, spreading)
        self.widths = [self.widths[host] for host in self._hosts]
        self._whole = [
            np.array_equal(stored[space], stored[host]) and width == stored[host].sum()
            for space, (host, width) in enumerate(zip(self._hosts, self.widths, strict=True))
        ]
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
        own = []
        for runs, live_C in zip(self._runs, live, strict=True):
            parts = [_filled(channels, live_C[channels], slots) for channels, slots in runs]
            if any(part is None for part in parts):
                return None
            own.append(np.concatenate(parts))
        channels = [own[host] for host in self._hosts]
        alive = [
            None if space.full else live_C[chosen]
            for space, live_C, chosen in zip(self.graph.spaces, live, channels, strict=True)
        ]
        return assembled(self.graph, mask_U, live, self.widths, channels, alive, self._whole, self.stored, fixed=True)


def _filled(own: np.ndarray, live: np.ndarray, slots: int) -> np.ndarray | None:
    """The channel in each slot of a run, of which free ones hold one that is not live; None if there are too few slots.

    Args:
        own: (c,) the stored channels of the run.
        live: (c,) bool, which of them are.
    """
    if slots == len(own):
        return own
    kept = own[live]
    if len(kept) > slots:
        return None
    spare = own[live.argmin()]  # there is one: fewer slots than channels
    return np.concatenate([kept, np.full(slots - len(kept), spare)])
