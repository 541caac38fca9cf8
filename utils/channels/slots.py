"""Which tensors of a pass share their slots for channels, so that an addition of them need not spread channels.

An addition joins tensors of different channels. Added as they are, the channels of one are first spread over the slots
of the other, which is what masks cost most. Where both have the same slots, it is an ordinary addition; the price is
that layers compute slots which a tensor does not need and which are zero. Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from utils.channels.graph import ChannelGraph

# How many multiply-adds of a convolution take as long as to spread one element, forward and backward. One thread of a
# CPU with AVX-512 and AMX, resnet20_he at batch 128: about 150 in float32; in bfloat16, whose products are faster, 300.
SPREADING = {"fp32": 150, "bf16": 300}


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


def slot_hosts(graph: ChannelGraph, widths: Sequence[int], spreading: int) -> list[int]:
    """Per space the one whose slots it shares; often itself.

    A tensor that enters a sum has the slots of the sum where to compute the additional ones costs less than to spread
    it. Tensors that stand side by side in another one always have their own.

    Args:
        widths: per space the number of slots.
        spreading: multiply-adds that take as long as to spread one element, see `SPREADING`.
    """
    concats = [op for op in graph.ops if op.kind == "concat"]
    side_by_side = {space for op in concats for space in (op.space, *(graph.ops[i].space for i in op.inputs))}
    sums: dict[int, list[int]] = {}
    for inner, outer in joined_spaces(graph):
        if widths[inner] and inner not in side_by_side:
            sums.setdefault(inner, []).append(outer)
    work = _work_per_slot(graph, widths)
    hosts: dict[int, int] = {}

    def is_worth_it(space: int, host: int) -> bool:
        additional = widths[host] - widths[space]
        return not additional or additional * (spreading + work[space]) < widths[host] * spreading

    def host_of(space: int) -> int:
        if space not in hosts:
            nearby = (host_of(outer) for outer in sums.get(space, ()))
            hosts[space] = next((host for host in nearby if is_worth_it(space, host)), space)
        return hosts[space]

    return [host_of(space) for space in range(len(widths))]


def _work_per_slot(graph: ChannelGraph, widths: Sequence[int]) -> list[float]:
    """Per space the multiply-adds that convolutions do for a slot of it, per pixel of the slot."""
    work = [0.0] * len(graph.spaces)
    for op in graph.ops:
        if op.kind == "conv":
            source = graph.ops[op.inputs[0]]
            taps = prod(op.module.kernel_size)
            work[op.space] += widths[source.space] * taps
            work[source.space] += widths[op.space] * taps * prod(op.shape[1:]) / prod(source.shape[1:])
    return work
