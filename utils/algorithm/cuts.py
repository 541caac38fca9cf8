"""Which layers a mask must not empty together: if it does, nothing of the images gets to the logits.

A set of layers is a cut if no path is left from the images to the logits once all of them are empty. A mask that keeps
a unit in each of the smallest cuts leaves a path, and no other mask does. A residual block with a projection has
several cuts, because the path through the block is lost with either of its convolutions. Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

MOST_CUTS = 256  # of one tensor: parallel branches multiply them

Cut = frozenset[int]


def smallest_cuts(inputs: Sequence[Sequence[int]], layers: Sequence[Cut | None], is_image: Sequence[bool]) -> list[Cut]:
    """The smallest cuts of the last tensor, in order.

    With more than `MOST_CUTS` of them, some have fewer layers than are needed to cut. Such a mask leaves a path too.

    Args:
        inputs: for each tensor of the forward pass those that it is computed from, as indices.
        layers: what must be empty so that the tensor is lost whatever it reads; None if nothing can do that.
        is_image: whether the tensor is the images. One that reads nothing else is a constant.
    """
    cuts: list[list[Cut]] = []
    for reads, own, image in zip(inputs, layers, is_image, strict=True):
        if image:
            found: list[Cut] = []
        elif not reads:
            found = [frozenset()]  # nothing of the images is in a constant
        else:
            found = cuts[reads[0]]
            for other in reads[1:]:
                found = _of_both(found, cuts[other])
        cuts.append(found if own is None else _smallest([*found, own]))
    return sorted((cut for cut in cuts[-1] if cut), key=sorted)


def _of_both(one: list[Cut], other: list[Cut]) -> list[Cut]:
    """The cuts of what two tensors are joined to, which is lost with both of them."""
    joined = _smallest([a | b for a, b in product(one, other)])
    if len(joined) <= MOST_CUTS:
        return joined
    return min((cuts for cuts in (one, other) if frozenset() not in cuts), key=len)  # as if the other were lost already


def _smallest(cuts: list[Cut]) -> list[Cut]:
    """Those that hold no other one."""
    smallest: list[Cut] = []
    for cut in sorted(set(cuts), key=lambda cut: (len(cut), sorted(cut))):
        if not any(other <= cut for other in smallest):
            smallest.append(cut)
    return smallest
