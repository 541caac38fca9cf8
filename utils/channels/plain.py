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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from utils.channels.graph import Op, columns_of
from utils.channels.network import SparseNetwork
from utils.channels.source import (
    INPUT,
    Step,
    arguments_of,
    call,
    execute,
    identifier,
    network_source,
    plain_class,
    works_in_place,
)
from utils.channels.subnet import Subnet


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
        if op.kind == "output" or operands[0] is None:
            return operands[0]
        if op.kind in ("depthwise", "norm"):
            return self._run(op, operands[0], operands[0].channels, None)
        return self._pointwise(op, operands[0])

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

    # ---- everything else ----

    def _pointwise(self, op: Op, x: _Value) -> _Value:
        module, node = op.module, op.node
        if isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d) or node.target == "contiguous":
            return x
        if module is not None:
            name = self._cut.get((module,)) or identifier(str(node.target), self._names())
            self._cut[(module,)] = name
            self.layers[name] = plain_class(module)(**arguments_of(module))
            in_place = getattr(module, "inplace", False)
            result = self._step(op, x.channels, f"self.{name}({{0}})", (x,), name)
        else:
            in_place = works_in_place(node.target, node.args[1:], node.kwargs)
            result = self._step(op, x.channels, call(node.target, node.args[1:], node.kwargs), (x,))
        if in_place:  # whoever reads x later reads what it has become
            self._values[:] = [result if value is x else value for value in self._values]
        return result

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
        wanted, steps = {self._values[-1].name}, []
        for step in reversed(self.steps):
            if step.result in wanted:
                wanted.update(step.operands)
                steps.insert(0, step)
        self.steps = steps
        self._remove_unused()

    def fold_batch_norms(self) -> None:
        """Puts each batch-norm that alone reads a convolution into it; the convolution must run only once."""
        made_by = {step.result: step for step in self.steps}
        read = [operand for step in self.steps for operand in step.operands]
        ran = [step.layer for step in self.steps]
        for norm in [step for step in self.steps if isinstance(self.layers.get(step.layer), nn.BatchNorm2d)]:
            conv = made_by.get(norm.operands[0])
            if conv is None or not isinstance(self.layers.get(conv.layer), nn.Conv2d):
                continue
            if read.count(conv.result) > 1 or ran.count(conv.layer) > 1:
                continue
            self.layers[conv.layer] = fuse_conv_bn_eval(self.layers[conv.layer], self.layers[norm.layer])
            self.steps[self.steps.index(conv)] = replace(conv, result=norm.result)
            self.steps.remove(norm)
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
