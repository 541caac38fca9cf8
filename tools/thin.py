"""The network that a draw describes, as an ordinary dense one: the reference for the speed of compact execution.

It is built with as many channels as the draw keeps, so it gathers nothing and pads nothing at run time; what compact
execution costs beyond it is overhead. Where a residual addition joins tensors of different widths, the narrower one
is added to the first channels of the wider one: no channel lists, which a thin network would not have.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.channels.graph import ChannelGraph, Op
from utils.conv_type import PlainConv


def add_to_first_channels(x: Tensor, y: Tensor, width: int) -> Tensor:
    """x + y in a map of `width` channels, both padded with zero channels. Always a new tensor."""
    wide, narrow = (x, y) if x.shape[1] >= y.shape[1] else (y, x)
    if narrow.shape[1] == width:
        return wide + narrow
    total = F.pad(narrow, (0, 0, 0, 0, 0, width - narrow.shape[1]))
    # the new tensor is added to in place; a sum into slices of it was twice as slow for bf16 and 32 channels
    return total.add_(F.pad(wide, (0, 0, 0, 0, 0, width - wide.shape[1])) if wide.shape[1] < width else wide)


class ThinNetwork(nn.Module):
    """A dense network with the operations of a graph and any number of channels for each tensor.

    A tensor without channels is left out, with all that would be computed from it alone.

    Args:
        graph: of the full network; layers are new, with torch's own first weights.
        widths: channels per space of the graph, those of the full network where a space is full.
    """

    def __init__(self, graph: ChannelGraph, widths: list[int]) -> None:
        super().__init__()
        self.widths = widths
        # of the full network's modules only those without parameters are run; the others need not stay in memory
        self.ops = [replace(op, module=op.module if op.kind == "pointwise" else None) for op in graph.ops]
        last_reader = {operand: position for position, op in enumerate(graph.ops) for operand in op.inputs}
        self.finished = [[i for i in op.inputs if last_reader[i] == at] for at, op in enumerate(graph.ops)]
        self.layers = nn.ModuleDict()
        for position, op in enumerate(graph.ops):
            reads = widths[graph.ops[op.inputs[0]].space] if op.inputs else 0
            if op.kind == "linear":
                reads *= graph.columns_per_channel(op)
            if layer := self._layer(op, reads, widths[op.space]):
                self.layers[str(position)] = layer

    @staticmethod
    def _layer(op: Op, reads: int, writes: int) -> nn.Module | None:
        full = op.module
        if reads == 0 or writes == 0:
            return None
        if op.kind in ("conv", "depthwise"):
            shape = (full.kernel_size, full.stride, full.padding, full.dilation)
            groups = writes if op.kind == "depthwise" else 1
            return PlainConv(reads, writes, *shape, groups, bias=full.bias is not None)
        if op.kind == "norm":
            return nn.BatchNorm2d(writes, full.eps, full.momentum)
        if op.kind == "linear":
            return nn.Linear(reads, writes, full.bias is not None)
        return None

    def weight_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def clear_gradients(self) -> None:
        self.zero_grad(set_to_none=True)

    def forward(self, images: Tensor, plan: None = None, update_statistics: bool = True) -> Tensor:
        """Logits. The other arguments are those of a `SparseNetwork`, so that the trainer's step can run it."""
        results: list[Tensor | None] = []
        for position, op in enumerate(self.ops):
            operands = [results[i] for i in op.inputs]
            results.append(self._run(op, str(position), operands, images))
            for operand in self.finished[position]:
                results[operand] = None
        return results[-1]

    def _run(self, op: Op, name: str, operands: list[Tensor | None], images: Tensor) -> Tensor | None:
        if op.kind == "input":
            return images
        if op.kind == "output":
            return operands[0]
        if name in self.layers:
            return self.layers[name](operands[0])
        width = self.widths[op.space]
        if width == 0:
            return None
        if op.kind in ("conv", "linear"):  # of nothing: zero, as no network here has a shift there
            return images.new_zeros((len(images), width, *op.shape[1:]))
        if op.kind == "add":
            present = [x for x in operands if x is not None]
            return add_to_first_channels(*present, width) if len(present) == 2 else present[0].clone()
        if op.kind == "concat":
            joined = torch.cat([x for x in operands if x is not None], dim=1)
            return joined if joined.shape[1] == width else F.pad(joined, (0, 0, 0, 0, 0, width - joined.shape[1]))
        return self._pointwise(op, operands[0])

    @staticmethod
    def _pointwise(op: Op, x: Tensor) -> Tensor:
        node = op.node
        if op.module is not None:
            return op.module(x)
        if node.op == "call_method":
            return getattr(x, node.target)(*node.args[1:], **node.kwargs)
        return node.target(x, *node.args[1:], **node.kwargs)
