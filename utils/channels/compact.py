"""Compact execution: the forward pass of a masked network, computed from its kept channels alone.

The same numbers as the masked reference (`utils/conv_type.py`): a dropped channel is zero there and absent here, so
no activation is ever gathered. Only weights are sliced, by the channels that arrive and the channels to produce.
A tensor of which no channel exists is passed on as None. Parameters that took no part keep the zero gradient
that they were given: momentum and weight decay move them exactly as they move masked ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.channels.graph import ChannelGraph, Op, columns_of
from utils.channels.plan import Plan
from utils.channels.vectors import NormPass, Norms
from utils.channels.written import as_written, reshaped
from utils.conv_type import conv2d


class GradientBuffers:
    """Full-size gradients of gathered weights, kept from step to step.

    A fresh one in every step is mapped and zeroed page by page: 64 MB cost 27 ms, zeroing them again 5 ms.
    """

    def __init__(self) -> None:
        self._buffers: dict[Tensor, Tensor] = {}

    def add_(self, weight: Tensor, outputs: Tensor | None, inputs: Tensor | None, grad: Tensor) -> None:
        """weight.grad[outputs][:, inputs] += grad, in the order of the memory (None: all of them)."""
        if weight.grad is None:
            weight.grad = self._buffers[weight] = torch.zeros_like(weight)
        memory, grad = weight.grad.movedim(1, -1), grad.movedim(1, -1)
        if inputs is not None:  # whole rows first: half the time of picking both at once
            grad = grad.new_zeros((*grad.shape[:-1], memory.shape[-1])).index_add_(-1, inputs, grad)
        if outputs is None:
            memory.add_(grad)
        else:
            memory.index_add_(0, outputs, grad)

    def clear(self, weights: Iterable[Tensor]) -> None:
        """Sets gradients to zero: those held here in place, others to None."""
        held = []
        for weight in weights:
            if weight.grad is not None and weight.grad is self._buffers.get(weight):
                held.append(weight.grad)
            else:
                weight.grad = None
                self._buffers.pop(weight, None)
        if held:
            torch._foreach_zero_(held)


class _GatherWeight(torch.autograd.Function):
    """weight[outputs][:, inputs] with rows that are not alive set to zero, padded with zeros to a given size.

    The backward adds to `weight.grad` itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        outputs: Tensor | None,
        inputs: Tensor | None,
        alive: Tensor | None,
        num_rows: int,
        num_columns: int,
        buffers: GradientBuffers,
    ) -> Tensor:
        ctx.save_for_backward(outputs, inputs, alive)
        ctx.weight, ctx.buffers = weight, buffers
        # Inputs vary fastest in memory (channels_last), so that is the order to gather and to write in.
        memory = weight.movedim(1, -1)
        if outputs is not None:
            memory = memory.index_select(0, outputs)
        if inputs is not None:
            memory = memory.index_select(-1, inputs)
        if alive is not None:
            memory = memory * alive.view(-1, *[1] * (memory.dim() - 1))
        rows, columns = memory.shape[0], memory.shape[-1]
        ctx.live = (rows, columns)
        if (rows, columns) != (num_rows, num_columns):
            padded = memory.new_zeros((num_rows, *memory.shape[1:-1], num_columns))
            padded[:rows, ..., :columns] = memory
            memory = padded
        return memory.movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        outputs, inputs, alive = ctx.saved_tensors
        rows, columns = ctx.live
        grad = grad[:rows, :columns]
        if alive is not None:
            grad = grad * alive.view(-1, *[1] * (grad.dim() - 1))
        ctx.buffers.add_(ctx.weight, outputs, inputs, grad)
        return (None,) * 7


def _zeros(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What a layer gives for these images when no channel of its input exists, in the dtype it would have."""
    kind = images.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else images.dtype
    return torch.zeros((len(images), *shape), dtype=dtype, device=images.device)


class CompactForward:
    """Runs a traced network on the channels of a plan.

    Backward puts gradients into the `grad` of the network's parameters as usual; `torch.autograd.grad` cannot see
    the gathered ones.

    Args:
        graph: of the network; its modules hold the parameters that are read and trained.

    Attributes:
        gradients: of the gathered weights.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.gradients = GradientBuffers()
        self._norms = Norms(graph)
        readers: dict[int, list[int]] = {}
        for position, op in enumerate(graph.ops):
            for operand in op.inputs:
                readers.setdefault(operand, []).append(position)
        self._free_after: list[list[int]] = [[] for _ in graph.ops]
        for operand, positions in readers.items():
            self._free_after[positions[-1]].append(operand)
        # whatever a slot without a channel holds there, the batch-norms make it zero
        self._only_normed = {
            graph.ops[operand].node
            for operand, positions in readers.items()
            if all(graph.ops[position].kind == "norm" for position in positions)
        }

    def __call__(self, images: Tensor, plan: Plan, update_statistics: bool = True) -> Tensor:
        """Logits of the network under a plan.

        Args:
            images: (B, C, H, W).
            update_statistics: whether a training pass moves the running statistics of the kept channels.
        """
        results: list[Tensor | None] = []
        self._shapes = self.graph.shapes_at(tuple(images.shape[1:]))
        norms = NormPass(self._norms, plan, update_statistics)
        for op, finished in zip(self.graph.ops, self._free_after, strict=True):
            operands = [results[i] for i in op.inputs]
            results.append(self._run(op, operands, images, plan, norms))
            for operand in finished:
                results[operand] = None
        norms.finish()
        return results[-1]

    def _run(self, op: Op, operands: list[Any], images: Tensor, plan: Plan, norms: NormPass) -> Any:
        if op.kind == "input":
            return images
        if op.kind == "output":
            return operands[0]
        if op.kind == "add":
            return self._add(op, operands, plan)
        if op.kind == "conv":
            return self._conv(op, operands[0], images, plan)
        if op.kind == "linear":
            return self._linear(op, operands[0], images, plan)
        if op.kind == "concat":
            return self._concat(op, operands, plan)
        if op.kind == "size":  # of the full tensor
            source = self.graph.ops[op.inputs[0]].node
            return as_written(op, [torch.empty((len(images), *self._shapes[source]), device="meta")])
        if op.kind == "dense":
            return as_written(op, operands)
        if any(operand is None for operand in operands):
            return None
        if op.kind == "depthwise":
            return self._depthwise(op, operands[0], plan)
        if op.kind == "norm":
            return norms(op, operands[0])
        return reshaped(op, operands[0], self._shapes[op.node]) if op.kind == "reshape" else as_written(op, operands)

    def _conv(self, op: Op, x: Tensor | None, images: Tensor, plan: Plan) -> Tensor | None:
        conv: nn.Conv2d = op.module
        if plan.widths[op.space] == 0:
            return None
        bias = self._bias(op, plan)
        if x is None:  # torch has no convolution of zero channels; it would be the bias alone
            zeros = _zeros(images, (plan.widths[op.space], *self._shapes[op.node][1:]))
            return zeros if bias is None else zeros + bias.to(zeros.dtype).view(-1, 1, 1)
        source = self.graph.ops[op.inputs[0]].space
        return conv2d(conv, x, self._weight(op, plan, plan.index[source], plan.widths[source]), bias)

    def _depthwise(self, op: Op, x: Tensor, plan: Plan) -> Tensor:
        """A filter per slot; those of slots without a live channel are zero."""
        return conv2d(op.module, x, self._weight(op, plan, None, 1), self._bias(op, plan))

    def _linear(self, op: Op, x: Tensor | None, images: Tensor, plan: Plan) -> Tensor | None:
        width, bias = plan.widths[op.space], self._bias(op, plan)
        if width == 0:
            return None
        if x is None:
            zeros = _zeros(images, (width,))
            return zeros if bias is None else zeros + bias.to(zeros.dtype)
        source = self.graph.ops[op.inputs[0]].space
        columns, per_channel = plan.index[source], self.graph.columns_per_channel(op)
        if columns is not None:
            columns = columns_of(columns, per_channel)
        return F.linear(x, self._weight(op, plan, columns, plan.widths[source] * per_channel), bias)

    def _weight(self, op: Op, plan: Plan, inputs: Tensor | None, num_columns: int) -> Tensor:
        """The weight of a layer for the slots of a plan.

        Args:
            inputs: the columns that it reads (None: all of them), filled up with zeros to `num_columns`.
        """
        weight, outputs, num_rows = op.module.weight, plan.index[op.space], plan.widths[op.space]
        alive = None if op.node in self._only_normed else plan.alive[op.space]
        if outputs is None and inputs is None and alive is None and weight.shape[:2] == (num_rows, num_columns):
            return weight
        return _GatherWeight.apply(weight, outputs, inputs, alive, num_rows, num_columns, self.gradients)

    def _bias(self, op: Op, plan: Plan) -> Tensor | None:
        """The bias of a layer for the slots of a plan, 0 where there is no live channel."""
        bias, index, alive = op.module.bias, plan.index[op.space], plan.alive[op.space]
        if bias is None:
            return None
        if index is not None:
            bias = bias.index_select(0, index)
        if alive is not None:
            bias = bias * alive
        missing = plan.widths[op.space] - len(bias)
        return F.pad(bias, (0, missing)) if missing else bias

    def _add(self, op: Op, operands: list[Tensor | None], plan: Plan) -> Tensor | None:
        """Joins two sets of channels. Always a new tensor: what it feeds may be changed in place."""
        spaces = [self.graph.ops[i].space for i in op.inputs]
        total, widening = None, []
        for x, space in zip(operands, spaces, strict=True):
            if x is None:
                continue
            if (positions := plan.positions.get((space, op.space))) is not None:
                widening.append((x, positions))
            else:
                total = x if total is None else total + x
        if not widening:
            return total.clone() if sum(x is not None for x in operands) == 1 else total
        for x, positions in widening:
            total = add_channels(total, x, positions, plan.widths[op.space])
        return total

    def _concat(self, op: Op, operands: list[Tensor | None], plan: Plan) -> Tensor | None:
        """Filled slots side by side, padding behind all of them. Always a new tensor."""
        filled = [plan.filled[self.graph.ops[i].space] for i in op.inputs]
        parts = [x[:, :count] for x, count in zip(operands, filled, strict=True) if x is not None]
        if not parts:
            return None
        if missing := plan.widths[op.space] - sum(filled):
            shape = (len(parts[0]), missing, *self._shapes[op.node][1:])
            parts.append(parts[0].new_zeros(shape).contiguous(memory_format=torch.channels_last))
        return torch.cat(parts, dim=1)


class _AddChannels(torch.autograd.Function):
    """total[:, positions] += x, out of place, for rows of channels."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.width = x.shape[1]
        return total.clone().index_add_(1, positions, x[:, : len(positions)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (positions,) = ctx.saved_tensors
        read = grad.gather(1, positions.expand(len(grad), -1))  # half the time of index_select
        return grad, F.pad(read, (0, ctx.width - len(positions))) if ctx.width > len(positions) else read, None


def add_channels(total: Tensor | None, x: Tensor, positions: Tensor, width: int) -> Tensor:
    """total + x, where channel i of x goes to channel positions[i] and channels of x beyond them are padding.

    On rows of channels, as they lie in memory: 32,768 pixels, 40 of 160 channels, two CPU threads, forward and
    backward: 3.1 ms, as a product with a 0/1 matrix 8.6 ms, by `index_add` on the map itself more than twice that.

    Args:
        total: (B, width, H, W), or None for zero.
        x: (B, C, H, W).
        positions: (c,) int64, c <= C.
    """
    batch, channels, height, image_width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(-1, channels)
    if total is None:
        rows = pixels.new_zeros((len(pixels), width))
    else:
        rows = total.permute(0, 2, 3, 1).reshape(-1, width)
    joined = _AddChannels.apply(rows, pixels, positions)
    return joined.view(batch, height, image_width, width).permute(0, 3, 1, 2)
