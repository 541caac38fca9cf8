"""Masked execution: the forward pass of the network itself, in which every layer multiplies by a mask.

The readable reference for compact execution. It runs the Python of the network, so it does not depend on what was
traced of it, apart from the number and the order of the runs of each layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from utils.channels.graph import Op
from utils.conv_type import SubnetBatchNorm, SubnetConv


@contextmanager
def masks_set(masks: Iterable[tuple[Op, Tensor | None]], update_statistics: bool) -> Iterator[None]:
    """Sets the masks of one forward pass of the network. A layer that runs several times has a mask for each run.

    Args:
        masks: for each op with a `SubnetConv` or a `SubnetBatchNorm`, in the order of the forward pass, its mask of
            (C,) elements; None for a run that is not masked.
        update_statistics: whether batch-norms in training mode move their running statistics.
    """
    of_module: dict[nn.Module, list[Tensor | None]] = {}
    for op, mask in masks:
        of_module.setdefault(op.module, []).append(mask)
    try:
        for module, runs in of_module.items():
            module.masks = iter(runs)
            if isinstance(module, SubnetBatchNorm):
                module.update_statistics = update_statistics
        yield
    finally:
        for module in of_module:
            module.masks = None
            if isinstance(module, SubnetBatchNorm):
                module.update_statistics = True


def maskable_ops(ops: Iterable[Op]) -> list[Op]:
    """Those whose layer can be given masks."""
    return [op for op in ops if isinstance(op.module, SubnetConv | SubnetBatchNorm)]
