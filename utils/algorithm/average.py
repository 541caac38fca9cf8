"""An exponential moving average of tensors, as `torch.optim.swa_utils.AveragedModel` keeps it.

That class copies a module. Here a copy would be of no use, because the channel graph that runs a subnet holds the
modules of the original; so its averaging function is applied to the tensors alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


@torch.no_grad()
def move_average(average: dict[str, Tensor] | None, tensors: Mapping[str, Tensor], decay: float) -> dict[str, Tensor]:
    """The average after one more step: decay * average + (1 - decay) * tensor, in place; first a copy of the tensors.

    Args:
        average: by name, None before the first step.
        tensors: by the same names, floating-point.
    """
    if average is None:
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}
    get_ema_multi_avg_fn(decay)(list(average.values()), [tensors[name].detach() for name in average], None)
    return average


@contextmanager
def lent(tensors: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> Iterator[None]:
    """Shows averages in place of the tensors of the same names; afterwards those hold their own values again."""
    own = {name: tensors[name].data for name in average}
    for name, value in average.items():
        tensors[name].data = value
    try:
        yield
    finally:
        for name, value in own.items():
            tensors[name].data = value
