"""A subnet as an ordinary network of `torch.nn` layers that have the kept channels only, without padding.

It follows `ChannelGraph` operation by operation, as compact execution does, and computes the same numbers. Every tensor
remembers which channels of the full network it has and in which order they lie, and the layer behind it is cut to read
them in that order. Where an addition joins tensors of different channels, those that only the smaller one has are put
behind those of the larger one:

    F.pad(larger, (0, 0, 0, 0, 0, missing)).index_add(1, places, smaller)

That costs no FLOPs, and on one thread of a CPU no other way was clearly faster, in torch or in onnxruntime: to gather
both tensors, to write into zeros, to multiply by a 0/1 matrix, or to widen the layer that wrote the smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.channels.coverage import is_noise
from utils.channels.graph import Op, columns_of
from utils.channels.network import SparseNetwork
from utils.channels.source import (
    INPUT,
    arguments_of,
    execute,
    expression,
    identifier,
    is_of_torch,
    network_source,
    plain_class,
    works_in_place,
)
from utils.channels.steps import Step, fold_batch_norms, steps_towards
from utils.channels.subnet import Subnet
from utils.channels.trace import NOISE_MODULES
from utils.channels.written import as_written


@dataclass(frozen=True)
class PlainNetwork:
    """An ordinary network: its text and its tensors.

    Attributes:
        source: the class `Network`, see `utils/channels/source.py`.
        tensors: its state dict.
        kept: the channels of the full network that each of its convolutions and linear layers still makes, by name.
    """

    source: str
    tensors: dict[str, Tensor]
    kept: dict[str, list[int]]

    def module(self) -> nn.Module:
        """The network itself, in eval mode, with tensors of its own."""
        network = execute(self.source)
        network.load_state_dict({name: tensor.clone() for name, tensor in self.tensors.items()}, assign=True)
        return network.eval()


def plain_network(network: SparseNetwork, subnet: Subnet, fold_batch_norm: bool = False) -> PlainNetwork:
    """The subnet as an ordinary network, in the dtype and on the device of the network.

    Args:
        fold_batch_norm: put every batch-norm that alone reads a convolution into that convolution.
    Raises: ValueError for the released execution, where dropped channels still take part.
    """
    if network.execution == "released":
        raise ValueError("the shifts of dropped channels take part in its results, so that no channel can leave it")
    writer = _Writer(network, subnet)
    for op in network.graph.ops:
        writer.follow(op)
    writer.remove_unread()
    if fold_batch_norm:
        writer.fold_batch_norms()
    return writer.finished()


@dataclass(frozen=True, eq=False)
class _Value:
    """A tensor of the forward pass.

    Attributes:
        channels: (C,) int64: which channels of the full network it has, in their order.
    """

    name: str
    channels: np.ndarray


class _Writer:
    """Writes the layers and the steps of the plain network, one operation after the other.

    A tensor without any channel has no value, as in compact execution.
    """

    def __init__(self, network: SparseNetwork, subnet: Subnet) -> None:
        self.network, self.statistics = network, subnet.statistics
        self.live = network.plan(subnet.mask_U).live
        self.layers: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self.steps: list[Step] = []
        self.kept: dict[str, list[int]] = {}
        self._values: list[_Value | None] = []
        self._cut: dict[tuple, str] = {}  # a layer and the channels that it reads and writes -> its name here

    def follow(self, op: Op) -> None:
        """Writes one operation, which may be none: of a tensor without channels, or a sum of which one part is left."""
        self._values.append(self._followed(op, [self._values[i] for i in op.inputs]))

    def _followed(self, op: Op, operands: list[_Value | None]) -> _Value | None:
        if op.kind == "input":
            return _Value(INPUT, np.arange(op.shape[0]))
        if op.kind in ("conv", "linear"):
            return self._mixing(op, operands[0])
        if op.kind == "add":
            return self._sum(op, [x for x in operands if x is not None])
        if op.kind == "concat":
            return self._concatenation(op, operands)
        if op.kind == "output":
            return self._in_order(op.inputs[0], operands[0])
        if op.kind == "size":
            return self._size(op)
        if op.kind == "dense":
            return self._dense(op, [self._in_order(i, x) for i, x in zip(op.inputs, operands, strict=True)])
        if any(x is None for x in operands):
            return None
        if op.kind in ("depthwise", "norm"):
            return self._run(op, operands[0], operands[0].channels, None)
        return self._pointwise(op, operands)

    # ---- layers with parameters ----

    def _mixing(self, op: Op, x: _Value | None) -> _Value | None:
        """A convolution or a linear layer; one that reads nothing is its shift."""
        channels = np.flatnonzero(self.live[op.space])
        self.kept[str(op.node.target)] = channels.tolist()
        if len(channels) == 0:
            return None
        if x is not None:
            return self._run(op, x, channels, x.channels)
        shape = ", ".join(map(str, (f"{INPUT}.shape[0]", len(channels), *op.shape[1:])))
        name, form = None, f"{INPUT}.new_zeros(({shape}))"
        if op.module.bias is not None:
            name = identifier(f"{op.node.target}.bias", self._names())
            self.tensors[name] = op.module.bias.detach()[self._stored(op.space, channels)].clone()
            form += f" + self.{name}" + ".view(-1, 1, 1)" * (len(op.shape) == 3)
        return self._step(op, channels, form, (), tensor=name)

    def _run(self, op: Op, x: _Value, written: np.ndarray, read: np.ndarray | None) -> _Value:
        """A step through a layer that is cut to the channels that it writes and, where it mixes them, reads."""
        if op.kind == "depthwise":
            self.kept[str(op.node.target)] = np.sort(written).tolist()
        key = (op.module, written.tobytes(), None if read is None else read.tobytes())
        if key not in self._cut:
            name = self._cut[key] = identifier(str(op.node.target), self._names())
            self.layers[name] = self._smaller(op, written, read)
        return self._step(op, written, f"self.{self._cut[key]}({{0}})", (x,), self._cut[key])

    def _smaller(self, op: Op, written: np.ndarray, read: np.ndarray | None) -> nn.Module:
        """The layer with only these channels, with the parameters and statistics that they have."""
        module, graph = op.module, self.network.graph
        rows = self._stored(op.space, written)
        tensors = {name: tensor.detach() for name, tensor in module.state_dict().items() if name != "scores"}
        widths: dict[str, Any]
        if op.kind == "norm":
            mean, variance = self.statistics[str(op.node.target)]
            tensors |= {"running_mean": mean, "running_var": variance}
            widths = {"num_features": len(rows)}
        elif op.kind == "depthwise":
            widths = {"in_channels": len(rows), "out_channels": len(rows), "groups": len(rows)}
        else:
            per_channel = graph.columns_per_channel(op) if op.kind == "linear" else 1
            columns = columns_of(self._stored(graph.ops[op.inputs[0]].space, read), per_channel)
            tensors["weight"] = tensors["weight"][:, columns]
            ends = ("in_features", "out_features") if op.kind == "linear" else ("in_channels", "out_channels")
            widths = dict(zip(ends, (len(columns), len(rows)), strict=True))
        cut = {name: tensor[rows].contiguous() if tensor.dim() else tensor.clone() for name, tensor in tensors.items()}
        with torch.device("meta"):
            layer = plain_class(module)(**{**arguments_of(module), **widths})
        layer.load_state_dict(cut, assign=True)
        return layer.eval()

    def _stored(self, space: int, channels: np.ndarray) -> Tensor:
        """Where channels of the full network stand in the parameters, from which others may have left."""
        places = np.cumsum(self.network.stored[space])[channels] - 1
        return torch.from_numpy(places).to(self.network.device)

    def _pointwise(self, op: Op, operands: list[_Value]) -> _Value:
        module, node = op.module, op.node
        spaces = [self.network.graph.ops[i].space for i in op.inputs]
        x = operands[spaces.index(op.space)]
        if isinstance(module, (nn.Identity, *NOISE_MODULES)) or node.target == "contiguous" or is_noise(op):
            return x
        if op.kind == "reshape":
            return self._reshaped(op, x)
        operands = [
            self._reordered(value, x.channels, op) if space == op.space and len(value.channels) > 1 else value
            for space, value in zip(spaces, operands, strict=True)
        ]
        return self._call(op, operands, x)

    def _dense(self, op: Op, operands: list[_Value]) -> _Value:
        """What the user wrote, of tensors with all channels in their order."""
        channels = _Value("", np.arange(self.network.graph.spaces[op.space].width))
        if op.node.op != "get_attr":
            return self._call(op, operands, channels)
        name = identifier(op.name, self._names())
        self.tensors[name] = as_written(op, ()).detach().clone()
        return self._step(op, channels.channels, f"self.{name}", (), tensor=name)

    def _call(self, op: Op, operands: list[_Value], like: _Value) -> _Value:
        """A step through a layer without channels of its own, or through a function or method."""
        module, node = op.module, op.node
        try:
            if module is None:
                result = self._step(op, like.channels, expression(node), operands)
                in_place = works_in_place(node.target, node.args[1:], node.kwargs)
            else:
                name = self._cut.get((module,)) or self._whole(op, module)
                result = self._step(op, like.channels, f"self.{name}({{0}})", operands, name)
                in_place = getattr(module, "inplace", False)
        except ValueError as error:
            raise ValueError(f"{self.network.graph.where(op)} has no place in an ordinary network: {error}") from error
        if in_place:  # whoever reads it later reads what it has become
            self._values[:] = [result if value is operands[0] else value for value in self._values]
        return result

    def _whole(self, op: Op, module: nn.Module) -> str:
        """The name of a layer that has all that it had."""
        if not is_of_torch(module) or len(op.node.args) > 1 or op.node.kwargs:
            raise ValueError("only layers of torch.nn that hold no others can be written down")
        try:
            layer = plain_class(module)(**arguments_of(module))
        except (AttributeError, TypeError) as error:
            raise ValueError(f"the arguments that it was made with are not known ({error})") from error
        state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        if op.name in self.statistics:
            state |= dict(zip(("running_mean", "running_var"), self.statistics[op.name], strict=True))
        layer.load_state_dict(state, assign=True)
        name = self._cut[(module,)] = identifier(op.name, self._names())
        self.layers[name] = layer.eval()
        return name

    def _size(self, op: Op) -> _Value:
        """The shape of the full tensor, whatever channels are left of it."""
        shape = (f"{INPUT}.shape[0]", *map(str, self.network.graph.ops[op.inputs[0]].shape))
        node = op.node
        if node.target == "size" and (len(node.args) > 1 or node.kwargs):
            form = shape[node.args[1] if len(node.args) > 1 else node.kwargs["dim"]]
        elif node.target == "numel":
            form = f"({' * '.join(shape)})"
        elif node.target == "dim" or node.args[1:] == ("ndim",):
            form = str(len(shape))
        else:
            form = f"({', '.join(shape)},)"
        return self._step(op, np.arange(0), form, ())

    def _reshaped(self, op: Op, x: _Value) -> _Value:
        shape = ", ".join(map(str, op.shape[1:]))
        if op.node.target in ("expand", "expand_as"):
            return self._step(op, x.channels, f"{{0}}.expand(-1, -1, {shape})", (x,))
        form = "{0}.flatten(1)" + f".unflatten(1, (-1, {shape}))" * (len(op.shape) > 1)
        return self._step(op, x.channels, form, (x,))

    def _in_order(self, op: int, x: _Value) -> _Value:
        """A tensor that has all channels, with its channels in the order of the full network."""
        return self._reordered(x, np.arange(len(x.channels)), self.network.graph.ops[op])

    def _reordered(self, x: _Value, channels: np.ndarray, op: Op) -> _Value:
        if np.array_equal(x.channels, channels):
            return x
        place_of = {channel: place for place, channel in enumerate(x.channels.tolist())}
        places = torch.tensor([place_of[channel] for channel in channels.tolist()], device=self.network.device)
        space = self.network.graph.spaces[op.space].width
        per_channel = op.shape[0] // space if op.kind != "concat" and len(op.shape) == 1 else 1
        name = identifier(f"{op.node.name}_order", self._names())
        self.tensors[name] = columns_of(places, per_channel)
        return self._step(op, channels, f"{{0}}.index_select(1, self.{name})", (x,), tensor=name)

    def _sum(self, op: Op, present: list[_Value]) -> _Value | None:
        if len(present) < 2:
            return present[0] if present else None
        if np.array_equal(present[0].channels, present[1].channels):
            return self._step(op, present[0].channels, "{0} + {1}", present)
        larger, smaller = sorted(present, key=lambda x: len(x.channels), reverse=True)
        missing = smaller.channels[~np.isin(smaller.channels, larger.channels)]
        channels = np.concatenate([larger.channels, missing])
        place_of = {channel: place for place, channel in enumerate(channels.tolist())}
        name = identifier(f"{op.node.name}_places", self._names())
        self.tensors[name] = torch.tensor([place_of[c] for c in smaller.channels.tolist()], device=self.network.device)
        padded = f"F.pad({{0}}, (0, 0, 0, 0, 0, {len(missing)}))" if len(missing) else "{0}"
        return self._step(op, channels, f"{padded}.index_add(1, self.{name}, {{1}})", (larger, smaller), tensor=name)

    def _concatenation(self, op: Op, operands: list[_Value | None]) -> _Value | None:
        graph = self.network.graph
        widths = [graph.spaces[graph.ops[i].space].width for i in op.inputs]
        firsts = np.cumsum([0, *widths[:-1]])
        parts = [(x, x.channels + first) for x, first in zip(operands, firsts, strict=True) if x is not None]
        if not parts:
            return None
        channels = np.concatenate([part for _, part in parts])
        if len(parts) == 1:
            return _Value(parts[0][0].name, channels)
        places = ", ".join(f"{{{number}}}" for number in range(len(parts)))
        return self._step(op, channels, f"torch.cat([{places}], 1)", [x for x, _ in parts])

    def _step(
        self,
        op: Op,
        channels: np.ndarray,
        form: str,
        operands: Sequence[_Value],
        layer: str | None = None,
        tensor: str | None = None,
    ) -> _Value:
        name = identifier(op.node.name, {step.result for step in self.steps})
        self.steps.append(Step(name, form, tuple(x.name for x in operands), layer, tensor))
        return _Value(name, channels)

    def _names(self) -> set[str]:
        return {*self.layers, *self.tensors}

    # ---- the end ----

    def remove_unread(self) -> None:
        """Removes what does not lead to the output: the layers of a branch whose last layer keeps no channel."""
        self.steps = steps_towards(self._values[-1].name, self.steps)
        self._remove_unused()

    def fold_batch_norms(self) -> None:
        """Puts each batch-norm that alone reads a convolution into it; the convolution must run only once."""
        self.steps = fold_batch_norms(self.layers, self.steps)
        self._remove_unused()

    def _remove_unused(self) -> None:
        used = {name for step in self.steps for name in (step.layer, step.tensor)}
        self.layers = {name: layer for name, layer in self.layers.items() if name in used}
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name in used}

    def finished(self) -> PlainNetwork:
        result = self._values[-1].name
        tensors = {f"{name}.{key}": t for name, layer in self.layers.items() for key, t in layer.state_dict().items()}
        source = network_source(self.layers, self.tensors, self.steps, result)
        return PlainNetwork(source, {**tensors, **self.tensors}, self.kept)
