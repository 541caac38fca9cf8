"""What one mask means for every tensor of a network: the channel lists of one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from utils.algorithm.transfer import sent_to
from utils.channels.graph import ChannelGraph

List = np.ndarray | Tensor
NOTHING = -1  # in a slot without a live channel


@dataclass(frozen=True)
class Plan:
    """The channels that exist under one mask, by space of `ChannelGraph`.

    The tensors of a pass have *slots* for channels. A slot that holds no live channel is zero. Lists of channels are
    int64; `make_plan` makes them on the host as arrays, and `on_device` sends those of several plans together.

    Attributes:
        mask_U: (U,) bool on the host: the mask of the pass (with the layer guard applied).
        live: per space a (width,) bool array on the host.
        counts: per space the number of live channels.
        widths: per space the number of slots, at most the width of the full network.
        index: per space where the channels of its slots stand in the stored parameters; slots behind the end of the
            list are padding. None if the slots are all stored channels in their order.
        alive: per space which slots hold a live channel, 1 or 0; None if all do that `index` fills.
        positions: for a pair of spaces (inner, outer), the slots of `outer` to which those of `inner` are added; only
            for pairs that an addition joins and that differ.
        norms: the slots of all batch-norms in the joined vectors of `utils/channels/vectors.py`.
    """

    mask_U: np.ndarray
    live: list[np.ndarray]
    counts: list[int]
    widths: list[int]
    index: list[List | None]
    alive: list[List | None]
    positions: dict[tuple[int, int], List]
    norms: List

    @property
    def fixed(self) -> bool:
        """Whether its shapes are those of `FixedShapes`, whatever the mask."""
        return any(alive is not None for alive in self.alive)

    @property
    def filled(self) -> list[int]:
        """Per space the number of slots in front of the padding."""
        return [
            count if alive is None else width
            for count, width, alive in zip(self.counts, self.widths, self.alive, strict=True)
        ]

    def lists(self) -> list[List]:
        """All lists of channels, in the order in which `with_lists` takes them."""
        return [one for one in (*self.index, *self.alive, *self.positions.values(), self.norms) if one is not None]

    def with_lists(self, lists: Iterable[List]) -> Plan:
        """The same plan with other lists: those that `lists` gave, in another place."""
        rest = iter(lists)
        return replace(
            self,
            index=[one if one is None else next(rest) for one in self.index],
            alive=[one if one is None else next(rest) for one in self.alive],
            positions={pair: next(rest) for pair in self.positions},
            norms=next(rest),
        )


def preferred_multiple(device: torch.device) -> int:
    """Channel counts at which convolutions are fast: a 17th channel costs as much as the 24th.

    One vector register of float32 on a CPU (measured with AVX2: 7 to 9 channels take 3.7 ms, 8 to 8 take 1.5 ms), the
    alignment of the tensor cores on a GPU.
    """
    if device.type == "cuda":
        return 8
    return {"AVX2": 8, "AVX512": 16}.get(torch.backends.cpu.get_cpu_capability(), 4)


def joined_spaces(graph: ChannelGraph) -> list[tuple[int, int]]:
    """The pairs (inner, outer) of different spaces of which an addition joins the first into the second."""
    pairs = {
        (graph.ops[i].space, op.space)
        for op in graph.ops
        if op.kind == "add"
        for i in op.inputs
        if graph.ops[i].space != op.space
    }
    return sorted(pairs)


def make_plan(graph: ChannelGraph, mask_U: np.ndarray, multiple: int, stored: list[np.ndarray]) -> Plan:
    """Follows one mask through the graph, on the host: as many slots as there are live channels, padded.

    Args:
        mask_U: (U,) bool, the mask of the pass.
        multiple: what the channel counts of maskable tensors are padded to.
        stored: per space a (width,) bool array: the channels whose parameters still exist (see
            `utils/channels/shrink.py`), at least the live ones.
    """
    live = graph.live_channels(mask_U)
    counts = [int(channels.sum()) for channels in live]
    widths, index, slots = [], [], []
    for space, count, channels, own in zip(graph.spaces, counts, live, stored, strict=True):
        padded = -(-count // multiple) * multiple
        widths.append(space.width if space.full else min(padded, space.width))
        kept = channels[own]
        index.append(None if kept.all() else np.flatnonzero(kept))
        slots.append(np.concatenate([np.flatnonzero(kept), np.full(widths[-1] - count, NOTHING)]))
    positions = {
        (inner, outer): np.flatnonzero(live[inner][live[outer]])
        for inner, outer in joined_spaces(graph)
        if counts[inner] < counts[outer]
    }
    norms = norm_places(graph, slots, stored)
    return Plan(mask_U, live, counts, widths, index, [None] * len(live), positions, norms)


def norm_places(graph: ChannelGraph, slots: list[np.ndarray], stored: list[np.ndarray]) -> np.ndarray:
    """Where the slots of all batch-norms, one after the other as they run, stand in their joined vectors.

    Args:
        slots: per space the stored channel in every slot, or `NOTHING`, which stands behind the end of all of them.
        stored: as for `make_plan`.
    """
    ops = [op for op in graph.ops if op.kind == "norm"]
    widths = {op.module: int(stored[op.space].sum()) for op in ops}
    firsts = dict(zip(widths, accumulate(widths.values(), initial=0), strict=False))
    end = sum(widths.values())
    places = [np.where(slots[op.space] == NOTHING, end, slots[op.space] + firsts[op.module]) for op in ops]
    return np.concatenate([np.empty(0, dtype=np.int64), *places])


def packed(plans: Sequence[Plan]) -> np.ndarray:
    """The lists of all plans, one behind the other."""
    return np.concatenate([one for plan in plans for one in plan.lists()])


def spread(plans: Sequence[Plan], lists: Tensor) -> list[Plan]:
    """The plans with views of one tensor as their lists: what `packed` gave, on the device."""
    parts = iter(lists.split([len(one) for plan in plans for one in plan.lists()]))
    return [plan.with_lists(parts) for plan in plans]


def on_device(plans: Sequence[Plan], device: torch.device) -> list[Plan]:
    """The same plans with their lists on the device, where a single copy takes all of them."""
    return spread(plans, sent_to(torch.from_numpy(packed(plans)), device))
