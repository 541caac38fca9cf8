"""How channels flow through a network: traced once, then read by every draw of a mask.

Each tensor of the forward pass has a *space*: the set of its channels that exist under a mask. A maskable convolution
opens a space of its own units; batch-norm, activation, pooling and depthwise convolutions hand a space on; an addition
joins two spaces (a channel is live once any writer kept it); a concatenation puts them side by side. Any other
operation is a *barrier*. It runs as the user wrote it, and the channels that it reads always exist, as do those that it
gives: the layers that write them have no units. That is all that compact execution, the masked reference, the cost
count and the layer guard need to know about a network.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor, fx, nn

from utils.algorithm.cuts import smallest_cuts
from utils.channels.follow import Result, Unfollowed, Value, follow
from utils.channels.gates import gates_in
from utils.channels.spaces import Space, full, written_by
from utils.channels.trace import shapes_of, trace
from utils.conv_type import subnet_convs


@dataclass(frozen=True)
class Op:
    """One node of the forward pass.

    Attributes:
        kind: "input", "conv", "depthwise" (a convolution that filters channel by channel), "norm", "pointwise" (any map
            of single channels), "reshape" (which leaves the channels where they are), "add", "concat", "linear",
            "size" (the shape of a tensor), "dense" (everything else: it runs as the user wrote it), "output".
        node: its fx node (arguments, target).
        module: the layer, where there is one; for a parameter or buffer, the module that has it.
        inputs: the ops whose results it reads, in the order of `node.all_input_nodes`.
        space: index into `ChannelGraph.spaces`.
        shape: shape of the full result for one image, channels first; () if it is not a tensor.
        macs: multiply-adds of one image, of a dense op.
        constant: a tensor that the forward makes anew from numbers alone, and that never changes.
    """

    kind: str
    node: fx.Node
    module: nn.Module | None
    inputs: tuple[int, ...]
    space: int
    shape: tuple[int, ...]
    macs: int = 0
    constant: Tensor | None = None

    @property
    def name(self) -> str:
        """That of its layer, parameter or buffer, otherwise one that no other op has."""
        return str(self.node.target) if self.module is not None else self.node.name


@dataclass(frozen=True)
class Barrier:
    """An operation through which channels cannot be followed.

    Attributes:
        where: the module and the source line.
        reason: a sentence.
        layers: the maskable layers that keep all channels because of it.
    """

    where: str
    reason: str
    layers: tuple[str, ...]


def _names_that_reach_the_output(graph: fx.Graph) -> set[str]:
    """The modules that run, and whose results the logits are computed from."""
    reached: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or any(reader in reached for reader in node.users):
            reached.add(node)
    return {str(node.target) for node in reached if node.op == "call_module"}


def columns_of(channels: torch.Tensor, per_channel: int) -> torch.Tensor:
    """The columns of a weight that read some channels: behind a flatten, a channel is a run of columns.

    Args:
        channels: (C,) int64.
        per_channel: columns that read one channel, see `ChannelGraph.columns_per_channel`.
    """
    if per_channel == 1:
        return channels
    offsets = torch.arange(per_channel, device=channels.device)
    return (channels.unsqueeze(1) * per_channel + offsets).flatten()


class ChannelGraph:
    """The traced network with a channel space for every tensor.

    Args:
        model: a network whose maskable convolutions are `VRPGE` modules; its forward takes one image tensor.
        image_shape: (channels, height, width) of an image.
        residual_masks: "free": every maskable layer has units of its own; "tied": layers whose results are added share
            theirs, so that all writers of a residual stream keep the same channels.
        strict: refuse a network with a barrier.
    Raises: ValueError if the network cannot be traced, if no layer is left to mask, or naming the module or operation
        of a barrier that is not allowed.

    Attributes:
        ops: in the order of the forward pass.
        spaces: all distinct spaces.
        first_unit: of each maskable layer by name; unit i of the flat vector is channel i - first_unit. Of the layers
            that are `VRPGE` modules, those are missing that the next three attributes name.
        widths: output channels of each maskable layer by name.
        barriers: what makes layers keep all channels.
        unused: maskable layers that the logits do not depend on, most often because they never run: they have no units.
        gates: layers that make the gate of a map, as in squeeze-and-excitation; they follow the channels of that map.
        num_units: U.
        vital_groups: index arrays; if no unit of such a group is kept, nothing gets from input to output.
    """

    def __init__(
        self, model: nn.Module, image_shape: tuple[int, int, int], residual_masks: str = "free", strict: bool = False
    ) -> None:
        traced = trace(model, image_shape, strict)
        self._graph, self._facts = traced.graph, traced.facts
        self._modules = {node: _module_of(node, model) for node in self._graph.nodes}
        self._gates = gates_in(self._graph, self._facts, self._modules)
        self.gates = [str(node.target) for node in self._gates]
        self._strict, self._stopped = strict, dict[fx.Node, Barrier]()
        self._skeleton = copy.deepcopy(model).to("meta", torch.float32)
        self._shapes = {image_shape: {node: facts.shape for node, facts in self._facts.items()}}
        convs, running = subnet_convs(model), _names_that_reach_the_output(self._graph)
        self._name_of = {conv: name for name, conv in convs.items()}
        widths = {n: conv.out_channels for n, conv in convs.items() if n in running and n not in self.gates}
        self.widths = widths
        self._follow_all(widths, tied_to={name: name for name in widths})
        if residual_masks == "tied":
            self._follow_all(widths, self._writers_of_one_stream())
        self.ops = [
            replace(op, macs=traced.macs(op.node), constant=traced.constants.get(op.node)) if op.kind == "dense" else op
            for op in self.ops
        ]
        dense = {name for barrier in self._stopped.values() for name in barrier.layers}
        self.unused = [name for name in convs if name not in {*self.first_unit, *self.gates, *dense}]
        self.barriers = [barrier for barrier in self._stopped.values() if barrier.layers]
        if convs and not self.first_unit:
            raise ValueError(f"no layer of the network is left to mask{_told(self.barriers)}")
        self.vital_groups = self._find_vital_groups()

    def shapes_at(self, image_shape: tuple[int, ...]) -> dict[fx.Node, tuple[int, ...] | None]:
        """The shapes of all results for one image, channels first, of the full network; found once for each size.

        Raises: ValueError for images that the network cannot read.
        """
        if image_shape not in self._shapes:
            self._shapes[image_shape] = shapes_of(self._skeleton, self._graph, image_shape)
        return self._shapes[image_shape]

    def __deepcopy__(self, memo: dict) -> ChannelGraph:
        """The same graph of the copied modules. Its fx nodes, of which nothing changes, are those of this graph.

        They are linked in a chain, and to copy that would exceed the recursion limit in a deep network.
        """
        memo |= {id(node): node for node in self._graph.nodes}
        other = memo[id(self)] = copy.copy(self)  # of one network, so what is known of its shapes is shared
        other.ops = [replace(op, module=copy.deepcopy(op.module, memo)) for op in self.ops]
        return other

    def _follow_all(self, widths: dict[str, int], tied_to: dict[str, str]) -> None:
        """Lays out the units, layers that are tied to another one on its units, and follows them through the graph.

        A barrier takes a layer out of `widths`, for each run of channels that it reads the first one that writes it:
        then the run always exists, and the others that write it can still be masked. Then all is followed once more.
        """
        again = True
        while again:
            self.first_unit: dict[str, int] = {}
            self.num_units = 0
            for name, width in widths.items():
                if tied_to[name] != name:
                    self.first_unit[name] = self.first_unit[tied_to[name]]
                    continue
                self.first_unit[name] = self.num_units
                self.num_units += width
            self.spaces: list[Space] = []
            self.ops: list[Op] = []
            self._values: dict[fx.Node, Value] = {}
            position: dict[fx.Node, int] = {}
            again = False
            for node in self._graph.nodes:
                facts = self._facts[node]
                try:
                    kind, space, zero = self._followed(node)
                except Unfollowed as barrier:
                    again |= self._stop(node, barrier, widths)
                    kind, space, zero = "dense", full(facts.shape[0] if facts.shape else 0), True
                self._values[node] = Value(facts.shape, space, zero)
                inputs = tuple(position[argument] for argument in node.all_input_nodes)
                position[node] = len(self.ops)
                self.ops.append(Op(kind, node, self._modules[node], inputs, self._place(space), facts.shape or ()))

    def _followed(self, node: fx.Node) -> Result:
        facts = self._facts[node]
        if node.op == "placeholder":
            return "input", full(facts.shape[0]), True
        if node.op == "get_attr":
            return "dense", full(0), True
        if node.op == "output":
            if not isinstance(node.args[0], fx.Node) or facts.shape is None:
                raise ValueError("the forward of the network must return its logits alone, as one tensor")
            value = self._values[node.args[0]]
            if not value.space.full:
                if self._strict:
                    raise ValueError("the output of the network itself would be masked; leave its last layer unmasked")
                raise Unfollowed("its channels are the classes")
            return "output", value.space, True
        module, name = self._modules[node], str(node.target)
        if node in self._gates:  # what it makes for channels that are dropped is never 0, and multiplied by 0
            space = self._values[self._gates[node]].space
            return follow(node, module, self._values, facts, space)[0], space, space.full
        own = written_by(module.out_channels, self.first_unit[name]) if name in self.first_unit else None
        return follow(node, module, self._values, facts, own)

    def _stop(self, node: fx.Node, barrier: Unfollowed, widths: dict[str, int]) -> bool:
        """Takes the units of layers around a barrier; whether there were any."""
        name_of = {first: name for name, first in reversed(self.first_unit.items())}
        reading = node.all_input_nodes if barrier.reading is None else barrier.reading
        dense = [
            name_of[min(segment.writers)]
            for operand in reading
            for segment in self._values[operand].space.segments
            if segment.writers
        ]
        where = self._facts[node].where or "the output of the network"
        if dense and self._strict:
            raise ValueError(f"channels cannot be followed through {where}: {barrier}")
        inside = [] if node.op != "call_module" else list(self._modules[node].modules())[1:]
        dense += [self._name_of[module] for module in inside if module in self._name_of]
        before = self._stopped.get(node, Barrier(where, str(barrier), ()))
        layers = tuple(dict.fromkeys([*before.layers, *dense]))
        self._stopped[node] = Barrier(before.where, before.reason, layers)
        return any(widths.pop(name, None) is not None for name in dict.fromkeys(dense))

    def where(self, op: Op) -> str:
        """The module and the source line of an operation."""
        return self._facts[op.node].where or "the output of the network"

    def _place(self, space: Space) -> int:
        if space not in self.spaces:
            self.spaces.append(space)
        return self.spaces.index(space)

    def _writers_of_one_stream(self) -> dict[str, str]:
        """For each maskable layer the first one whose result its own is added to, however indirectly."""
        name_of = {first: name for name, first in self.first_unit.items()}
        tied_to = {name: name for name in self.first_unit}
        for segment in (segment for space in self.spaces for segment in space.segments):
            streams = {tied_to[name_of[first]] for first in segment.writers}
            if len(streams) > 1:
                earliest = min(streams, key=lambda name: self.first_unit[name])
                tied_to = {name: earliest if owner in streams else owner for name, owner in tied_to.items()}
        return tied_to

    def live_channels(self, mask_U: np.ndarray) -> list[np.ndarray]:
        """For each space the channels that exist under a mask: (width,) bool."""
        live = {
            segment: np.logical_or.reduce([mask_U[first : first + segment.width] for first in segment.writers])
            if segment.writers
            else np.ones(segment.width, dtype=bool)
            for segment in {segment for space in self.spaces for segment in space.segments}
        }
        return [np.concatenate([live[segment] for segment in space.segments]) for space in self.spaces]

    def _find_vital_groups(self) -> list[np.ndarray]:
        """The units of the smallest sets of layers that cut every path to the output if all of them are empty."""
        spaces = [self.spaces[op.space] for op in self.ops]
        mixing = [op.kind in ("conv", "linear") for op in self.ops]  # the others are lost with what they read
        cuts = smallest_cuts(
            [op.inputs for op in self.ops],
            [None if s.never_empty or not mixes else s.writers for s, mixes in zip(spaces, mixing, strict=True)],
            [op.kind == "input" for op in self.ops],
        )
        widths = {first: segment.width for s in spaces for segment in s.segments for first in segment.writers}
        return [np.concatenate([np.arange(first, first + widths[first]) for first in sorted(cut)]) for cut in cuts]

    # ---- what the layers cost ----

    def columns_per_channel(self, op: Op) -> int:
        """How many columns of a linear layer read one channel: more than one behind a flatten of a map."""
        return op.module.in_features // self.spaces[self.ops[op.inputs[0]].space].width

    def layer_widths(self, live_counts: list[int]) -> dict[str, int]:
        """Output channels of each convolution and linear layer, for live channels per space."""
        return {op.name: live_counts[op.space] for op in self.ops if op.kind in ("conv", "depthwise", "linear")}

    def layer_macs(self, live_counts: list[int]) -> dict[str, int]:
        """Multiply-adds of one image per convolution, linear layer and dense op, for live channels per space."""
        macs: dict[str, int] = {}
        for op in self.ops:
            if op.macs:
                macs[op.name] = macs.get(op.name, 0) + op.macs
            if op.kind in ("conv", "depthwise", "linear"):
                read = 1 if op.kind == "depthwise" else live_counts[self.ops[op.inputs[0]].space]
                written = live_counts[op.space]
                if op.kind != "linear":
                    per_pair = prod(op.module.kernel_size) * prod(op.shape[1:])
                else:
                    per_pair = self.columns_per_channel(op)
                macs[op.name] = macs.get(op.name, 0) + read * written * per_pair  # a layer may run more than once
        return macs

    def layer_parameters(self, live_counts: list[int]) -> dict[str, int]:
        """Weights, shifts and scales that belong to live channels, per layer."""
        parameters = {}
        for op in self.ops:
            if op.kind == "dense" and op.module is not None:
                parameters[op.name] = sum(tensor.numel() for tensor in parameters_of(op).values())
            if op.kind not in ("conv", "depthwise", "linear", "norm"):
                continue
            read, written = live_counts[self.ops[op.inputs[0]].space], live_counts[op.space]
            count = 2 * written if op.kind == "norm" else 0
            if op.kind == "depthwise":
                count = written * prod(op.module.kernel_size)
            if op.kind == "conv":
                count = read * written * prod(op.module.kernel_size)
            if op.kind == "linear":
                count = read * written * self.columns_per_channel(op)
            if op.kind != "norm" and op.module.bias is not None:
                count += written
            parameters[op.name] = count
        return parameters


def parameters_of(op: Op) -> dict[str, nn.Parameter]:
    """The parameters of a dense op by their names in its module: all of that module, or the one that it reads."""
    named = dict(op.module.named_parameters())
    if op.node.op == "get_attr":
        own = str(op.node.target).rpartition(".")[2]
        named = {own: named[own]} if own in named else {}
    return {name: parameter for name, parameter in named.items() if name.rpartition(".")[2] != "shared_scores"}


def _module_of(node: fx.Node, model: nn.Module) -> nn.Module | None:
    if node.op == "call_module":
        return model.get_submodule(str(node.target))
    return model.get_submodule(str(node.target).rpartition(".")[0]) if node.op == "get_attr" else None


def _told(barriers: list[Barrier]) -> str:
    """Barriers as the rest of a sentence."""
    places = "; ".join(f"{barrier.where}: {barrier.reason}" for barrier in barriers)
    return f", because its channels cannot be followed through {places}" if places else ""
