"""Operations that run as the user wrote them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from utils.channels.graph import Op
from utils.channels.source import method_of
from utils.channels.trace import NOISE_FUNCTIONS


def as_written(op: Op, operands: Sequence[Any]) -> Any:
    """The result of an operation of the network, given those that it reads.

    Args:
        operands: in the order of `op.inputs`.
    """
    node = op.node
    if op.constant is not None:
        return op.constant.clone()
    if node.op == "get_attr":
        return getattr(op.module, str(node.target).rpartition(".")[2])
    value_of = dict(zip(node.all_input_nodes, operands, strict=True))
    args = fx.map_arg(node.args, value_of.__getitem__)
    kwargs = fx.map_arg(node.kwargs, value_of.__getitem__)
    if node.op == "call_module":
        return op.module(*args, **kwargs)
    if node.target in NOISE_FUNCTIONS:
        return args[0] if args else kwargs["input"]
    if node.op == "call_method":
        return getattr(args[0], method_of(node))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


def reshaped(op: Op, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The result of a "reshape" op for a map that has only some of its channels.

    Args:
        x: (B, C, ...), or (B, C * pixels).
        shape: of the full result for one image.
    """
    if op.node.target in ("expand", "expand_as"):
        return x.expand(-1, -1, *shape[1:])
    return x.reshape(len(x), -1, *shape[1:])


@contextmanager
def buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Running statistics and other buffers of some modules come out unchanged."""
    buffers = [buffer for module in modules for buffer in module.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.data.copy_(value)  # .data, because autograd would refuse what it holds


class without_noise(TorchFunctionMode):
    """Inside, the dropout functions of torch drop nothing."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in NOISE_FUNCTIONS:
            return args[0] if args else kwargs["input"]
        return function(*args, **(kwargs or {}))


def logits_of(result: Any) -> Tensor:
    """The logits of a forward that, in training mode, gives those of auxiliary heads behind them."""
    return result if isinstance(result, Tensor) else result[0]
