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
from utils.channels.slots import joined_spaces, slot_hosts

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
        filled: per space the number of slots in front of the padding.
        index: per space where the channels of its slots stand in the stored parameters; a channel that is not live may
            stand anywhere, and slots behind the end of the list are padding. None if the slots are all stored channels
            in their order.
        alive: per space which of the filled slots hold a live channel, 1 or 0; None if all do.
        positions: for a pair of spaces (inner, outer), the slots of `outer` to which those of `inner` are added; only
            for pairs that an addition joins and that differ.
        norms: the slots of all batch-norms in the joined vectors of `utils/channels/vectors.py`.
        fixed: whether its shapes are those of `FixedShapes`, whatever the mask.
    """

    mask_U: np.ndarray
    live: list[np.ndarray]
    counts: list[int]
    widths: list[int]
    filled: list[int]
    index: list[List | None]
    alive: list[List | None]
    positions: dict[tuple[int, int], List]
    norms: List
    fixed: bool = False

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
    """The multiple to which numbers of channels are rounded up, because layers in between cost as much or more.

    One vector register of float32 on a CPU: with AVX2, convolutions from 7 to 9 channels take 3.7 ms, and from 8 to 8
    1.5 ms. With AVX-512, batch-norm decides, whose backward pass is slow next to multiples of 16. A batch of 128 maps
    takes there, forward and backward, in ms (3x3 convolutions on one thread, batch-norm on two):

        channels                                8     16     24     32     48     64
        convolution, bfloat16, 32x32 pixels    4.1    6.1   11.2   11.1
        convolution, bfloat16, 16x16 pixels    1.3    1.6    3.1    3.1    6.6    9.4
        convolution, float32,  32x32 pixels   11.5   20.2   49.6   69.1
        convolution, float32,  16x16 pixels    4.1    6.0   13.7   17.9   35.9   61.6
        batch-norm,  bfloat16, 32x32 pixels   14.8    5.2   18.8    9.2   14.3   22.2
        batch-norm,  bfloat16, 16x16 pixels           1.4    4.7    2.3    3.7    4.5
        batch-norm,  float32,  32x32 pixels   15.5    5.2   17.1   15.7   23.4   32.9
        batch-norm,  float32,  16x16 pixels           1.5    4.3    3.2    4.4    5.6

    The alignment of the tensor cores on a GPU.
    """
    if device.type == "cuda":
        return 8
    return {"AVX2": 8, "AVX512": 16}.get(torch.backends.cpu.get_cpu_capability(), 4)


def make_plan(graph: ChannelGraph, mask_U: np.ndarray, multiple: int, stored: list[np.ndarray], spreading: int) -> Plan:
    """Follows one mask through the graph, on the host: as many slots as there are live channels, padded.

    Args:
        mask_U: (U,) bool, the mask of the pass.
        multiple: what the channel counts of maskable tensors are padded to.
        stored: per space a (width,) bool array: the channels whose parameters still exist (see
            `utils/channels/shrink.py`), at least the live ones.
        spreading: see `slot_hosts`.
    """
    live = graph.live_channels(mask_U)
    counts = [int(channels.sum()) for channels in live]
    padded = [-(-count // multiple) * multiple for count in counts]
    widths = [s.width if s.full else min(slots, s.width) for s, slots in zip(graph.spaces, padded, strict=True)]
    hosts = slot_hosts(graph, widths, spreading)
    own = [np.flatnonzero(live_C) for live_C in live]
    channels, widths = [own[host] for host in hosts], [widths[host] for host in hosts]
    alive = [live_C[chosen] for live_C, chosen in zip(live, channels, strict=True)]
    alive = [None if lives.all() else lives for lives in alive]
    whole = [np.array_equal(chosen, np.flatnonzero(own)) for own, chosen in zip(stored, channels, strict=True)]
    return assembled(graph, mask_U, live, widths, channels, alive, whole, stored)


def assembled(
    graph: ChannelGraph,
    mask_U: np.ndarray,
    live: list[np.ndarray],
    widths: list[int],
    channels: list[np.ndarray],
    alive: list[np.ndarray | None],
    whole: list[bool],
    stored: list[np.ndarray],
    fixed: bool = False,
) -> Plan:
    """The plan that puts given channels into the slots, on the host.

    Args:
        mask_U, live, widths, fixed: see `Plan`.
        channels: per space the channel of the full network in every slot in front of the padding, all live ones among
            them. Spaces that share their slots have the same array.
        alive: per space which of them are live: bool arrays; None where all are.
        whole: per space whether they are all stored channels in their order.
        stored: as for `make_plan`.
    """
    # a channel that is not live may not be stored either: any will do
    index = [(np.cumsum(own) - 1).clip(min=0)[chosen] for own, chosen in zip(stored, channels, strict=True)]
    slots = [
        np.concatenate(
            [np.where(True if lives is None else lives, places, NOTHING), np.full(width - len(places), NOTHING)]
        )
        for places, lives, width in zip(index, alive, widths, strict=True)
    ]
    return Plan(
        mask_U=mask_U,
        live=live,
        counts=[int(live_C.sum()) for live_C in live],
        widths=widths,
        filled=[len(chosen) for chosen in channels],
        index=[None if is_whole else places for is_whole, places in zip(whole, index, strict=True)],
        alive=[None if lives is None else lives.astype(np.int64) for lives in alive],
        positions={
            (inner, outer): places_in(channels[outer], channels[inner], graph.spaces[outer].width)
            for inner, outer in joined_spaces(graph)
            if channels[inner] is not channels[outer]
        },
        norms=norm_places(graph, slots, stored),
        fixed=fixed,
    )


def places_in(channels: np.ndarray, wanted: np.ndarray, width: int) -> np.ndarray:
    """Where some channels stand in a list of channels; 0 for one that is not in it.

    Args:
        width: of the full network.
    """
    place_of = np.zeros(width, dtype=np.int64)
    place_of[channels] = np.arange(len(channels))
    return place_of[wanted]


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
