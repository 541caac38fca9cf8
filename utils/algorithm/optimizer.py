"""The optimizer of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class FusedSGD(torch.optim.SGD):
    """`torch.optim.SGD(fused=True)` that sees channels_last tensors in the order in which they lie in memory.

    The numbers are the same. Left to itself the kernel for the CPU (torch 2.14) first copies every gradient that is not
    contiguous in the default order, which takes as long as the step; and it mixes up the elements of a weight whose
    gradient has another memory format.
    """

    def __init__(self, params: list[Tensor], **options: float | bool) -> None:
        super().__init__(params, fused=True, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        with self._in_memory_order():
            return super().step(closure)

    @contextmanager
    def _in_memory_order(self) -> Iterator[None]:
        """Parameters, gradients and momentum as contiguous views, channels last dimension, while a step runs."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen = [(p, p.data, p.grad) for p in parameters if _is_channels_last(p)]
        for parameter, data, grad in seen:
            grad = grad.contiguous(memory_format=torch.channels_last)
            self._show(parameter, data.movedim(1, -1), grad.movedim(1, -1), (1, -1))
        try:
            yield
        finally:
            for parameter, data, grad in seen:
                self._show(parameter, data, grad, (-1, 1))

    def _show(self, parameter: Tensor, data: Tensor, grad: Tensor, move: tuple[int, int]) -> None:
        parameter.grad = None  # its shape has to follow that of the parameter
        parameter.data, parameter.grad = data, grad
        momentum = self.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            self.state[parameter]["momentum_buffer"] = momentum.movedim(*move)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
