"""What one mask means for every tensor of a network: the channel lists of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.algorithm.transfer import sent_to
from utils.channels.graph import ChannelGraph


@dataclass(frozen=True)
class Plan:
    """The channels that exist under one mask, by space of `ChannelGraph`.

    Attributes:
        mask_U: (U,) bool on the host: the mask of the pass (with the layer guard applied).
        live: per space a (width,) bool array on the host.
        counts: per space the number of live channels.
        widths: per space the number of channels that a compact tensor has: live ones first, then zero channels up to
            the next multiple that the hardware likes, at most the width of the full network.
        index: per space where the live channels stand in the stored parameters, ascending, int64 on the device; None
            if all that are stored are live.
        positions: for a pair of spaces (inner, outer), where the live channels of `inner` stand among those of
            `outer`, int64 on the device; only for pairs that an addition joins and that differ.
    """

    mask_U: np.ndarray
    live: list[np.ndarray]
    counts: list[int]
    widths: list[int]
    index: list[Tensor | None]
    positions: dict[tuple[int, int], Tensor]


def preferred_multiple(device: torch.device) -> int:
    """Channel counts at which convolutions are fast: a 17th channel costs as much as the 24th.

    One vector register of float32 on a CPU (measured with AVX2: 7 to 9 channels take 3.7 ms, 8 to 8 take 1.5 ms), the
    alignment of the tensor cores on a GPU.
    """
    if device.type == "cuda":
        return 8
    return {"AVX2": 8, "AVX512": 16}.get(torch.backends.cpu.get_cpu_capability(), 4)


def make_plan(
    graph: ChannelGraph,
    mask_U: np.ndarray,
    device: torch.device,
    multiple: int = 1,
    stored: list[np.ndarray] | None = None,
) -> Plan:
    """Follows one mask through the graph on the host; a single copy takes all channel lists to the device.

    Args:
        mask_U: (U,) bool, the mask of the pass.
        multiple: what the channel counts of maskable tensors are padded to.
        stored: per space a (width,) bool array: the channels whose parameters still exist (see
            `utils/channels/shrink.py`), at least the live ones; None: all.
    """
    live = graph.live_channels(mask_U)
    counts = [int(channels.sum()) for channels in live]
    widths, index = [], []
    for i, space in enumerate(graph.spaces):
        padded = -(-counts[i] // multiple) * multiple
        widths.append(space.width if space.full else min(padded, space.width))
        kept = live[i] if stored is None else live[i][stored[i]]
        index.append(None if kept.all() else np.flatnonzero(kept))
    pairs = {
        (graph.ops[i].space, op.space)
        for op in graph.ops
        if op.kind == "add"
        for i in op.inputs
        if graph.ops[i].space != op.space
    }
    positions = {
        (inner, outer): np.flatnonzero(live[inner][live[outer]])
        for inner, outer in sorted(pairs)
        if counts[inner] < counts[outer]
    }
    arrays = [array for array in index if array is not None] + list(positions.values())
    sizes = [len(array) for array in arrays]
    packed = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)
    on_device = iter(sent_to(torch.from_numpy(packed), device).split(sizes))
    return Plan(
        mask_U=mask_U,
        live=live,
        counts=counts,
        widths=widths,
        index=[None if array is None else next(on_device) for array in index],
        positions={pair: next(on_device) for pair in positions},
    )
