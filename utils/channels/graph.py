"""How channels flow through a network: traced once, then read by every draw of a mask.

Each tensor of the forward pass has a *space*: the set of its channels that exist under a mask. A maskable convolution
opens a space of its own units; batch-norm, activation, pooling and depthwise convolutions hand a space on; an addition
joins two spaces (a channel is live once any writer kept it); a concatenation puts them side by side; everything else is
full. That is all that compact execution, the masked reference, the cost count and the layer guard need to know about a
network.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from utils.algorithm.cuts import smallest_cuts
from utils.conv_type import VRPGE, PlainConv, SubnetBatchNorm, SubnetConv, is_depthwise, kind_of, subnet_convs


@dataclass(frozen=True)
class Segment:
    """A run of channels that the same layers write.

    Attributes:
        width: number of channels of the full network.
        writers: first unit of each maskable layer that writes into the run (its units are `first + channel`);
            a channel is live if any writer kept it. Empty: every channel always exists.
    """

    width: int
    writers: frozenset[int]


@dataclass(frozen=True)
class Space:
    """Channels of a tensor, as the units that can bring them to life; several segments behind a concatenation."""

    segments: tuple[Segment, ...]

    @property
    def width(self) -> int:
        """Number of channels of the full network."""
        return sum(segment.width for segment in self.segments)

    @property
    def writers(self) -> frozenset[int]:
        """First unit of each maskable layer that writes into the tensor."""
        return frozenset().union(*(segment.writers for segment in self.segments))

    @property
    def full(self) -> bool:
        """Whether all channels always exist."""
        return not self.writers

    @property
    def never_empty(self) -> bool:
        """Whether some channels always exist."""
        return any(not segment.writers for segment in self.segments)


@dataclass(frozen=True)
class Op:
    """One node of the forward pass.

    Attributes:
        kind: "input", "conv", "depthwise" (a convolution that filters channel by channel), "norm", "pointwise" (any map
            of channels that takes 0 to 0), "add", "concat", "linear", "output".
        node: its fx node (arguments, target).
        module: the layer, where there is one.
        inputs: the ops whose results it reads.
        space: index into `ChannelGraph.spaces`.
        shape: shape of the full result for one image, channels first.
    """

    kind: str
    node: fx.Node
    module: nn.Module | None
    inputs: tuple[int, ...]
    space: int
    shape: tuple[int, ...]


POINTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Identity),
    *(nn.Dropout, nn.Dropout2d),  # with p=0 only
)
POOLING_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten)
POINTWISE_FUNCTIONS: set[Callable | str] = {
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, torch.relu, torch.tanh),
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.flatten),
    *("relu", "relu_", "tanh", "mean", "flatten", "contiguous"),
}
ADDITIONS: set[Callable | str] = {operator.add, operator.iadd, torch.add, "add", "add_"}
CONCATENATIONS: set[Callable | str] = {torch.cat, torch.concat, torch.concatenate}


def _unfollowed(what: str, reason: str) -> ValueError:
    return ValueError(f"channels cannot be followed through {what}: {reason}")


def _module_refusal(module: nn.Module) -> str | None:
    """Why channels cannot be followed through a layer, whatever it reads; None if they can."""
    if isinstance(module, nn.Conv2d):
        if type(module) not in (nn.Conv2d, PlainConv, SubnetConv, VRPGE):
            return "it is a convolution of its own kind"
        if module.groups != 1 and not is_depthwise(module):
            return "it is a grouped convolution; only depthwise ones, which filter each channel by itself, are known"
        if module.padding_mode != "zeros":
            return f"its padding_mode is {module.padding_mode!r}, only 'zeros' is known"
    if isinstance(module, nn.BatchNorm2d):
        if type(module) not in (nn.BatchNorm2d, SubnetBatchNorm):
            return "it is a batch-norm of its own kind"
        if not module.affine or not module.track_running_stats or module.momentum is None:
            return "it needs scale and shift, running statistics and a momentum"
    if isinstance(module, nn.Dropout | nn.Dropout2d) and module.p > 0:
        return "its noise would enter the differences of losses that the scores learn from; set its p to 0"
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
        return "only flatten from dimension 1 to the last is known"
    return None


def _node_refusal(op: fx.Node, module: nn.Module | None) -> str | None:
    """Why channels cannot be followed through a known operation, seeing what it reads; None if they can."""
    shapes = [node.meta["shape"] for node in op.all_input_nodes]
    if isinstance(module, nn.Linear) and len(shapes[0]) != 1:
        return "it reads a map; flatten it first"
    if op.target in ("flatten", torch.flatten) and (op.args[1:] not in ((1,), (1, -1)) or op.kwargs):
        return "only flatten from dimension 1 to the last is known"
    if op.target == "mean":
        dims = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim")
        spatial = isinstance(dims, tuple | list) and all(dim in (2, 3, -1, -2) for dim in dims)
        if not spatial or len(shapes[0]) != 3:
            return "only a mean over the pixels of a map, dim=(2, 3), is known"
    if op.target in ADDITIONS:
        if len(set(shapes)) != 1 or len(shapes[0]) != 3:
            return f"it adds shapes {' and '.join(map(str, shapes))}, only maps of one shape are known"
        if op.kwargs or len(op.args) != 2:
            return "it adds with a factor"
        if op.target in (operator.iadd, "add_") and len(op.args[0].users) > 1:
            return "it changes a tensor in place that is read elsewhere too"
    if op.target in CONCATENATIONS:
        dim = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
        if dim not in (1, -3) or any(len(shape) != 3 for shape in shapes):
            return "only a concatenation of maps by their channels, dim=1, is known"
        if len(shapes) < len(op.args[0] if op.args else op.kwargs["tensors"]):
            return "it reads a tensor twice"
    return None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        leaf = isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
        return leaf or super().is_leaf_module(module, qualified_name)


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph on the meta device (shapes without data) and keeps the shape of every result."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if not isinstance(result, torch.Tensor):
            raise _unfollowed(node.name, "its result is not a tensor")
        self.shapes[node] = tuple(result.shape[1:])
        return result


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


def _joined(one: Space, other: Space) -> tuple[Segment, ...]:
    """The segments of a sum.

    Raises: ValueError for maps that were concatenated at different places.
    """
    if one.full or other.full:
        return (Segment(one.width, frozenset()),)
    if [segment.width for segment in one.segments] != [segment.width for segment in other.segments]:
        raise _unfollowed("an addition", "the maps that it adds were concatenated from different numbers of channels")
    pairs = zip(one.segments, other.segments, strict=True)
    return tuple(Segment(a.width, a.writers | b.writers if a.writers and b.writers else frozenset()) for a, b in pairs)


class ChannelGraph:
    """The traced network with a channel space for every tensor.

    Args:
        model: a network whose maskable convolutions are `VRPGE` modules; its forward takes one image tensor.
        image_shape: (channels, height, width) of an image.
        residual_masks: "free": every maskable layer has units of its own; "tied": layers whose results are added share
            theirs, so that all writers of a residual stream keep the same channels.
    Raises: ValueError naming the module or operation through which channels cannot be followed.

    Attributes:
        ops: in the order of the forward pass.
        spaces: all distinct spaces.
        first_unit: of each maskable layer that the logits depend on, by name; unit i of the flat vector is channel
            i - first_unit.
        num_units: U.
        vital_groups: index arrays; if no unit of such a group is kept, nothing gets from input to output.
    """

    def __init__(self, model: nn.Module, image_shape: tuple[int, int, int], residual_masks: str = "free") -> None:
        for name, module in model.named_modules():
            if reason := _module_refusal(module):
                raise _unfollowed(f"module {name} ({type(module).__name__})", reason)
        self._traced = graph = _Tracer().trace(model)
        self._skeleton = copy.deepcopy(model).to("meta", torch.float32)
        self._shapes: dict[tuple[int, ...], dict[fx.Node, tuple[int, ...]]] = {}
        for node, shape in self.shapes_at(image_shape).items():
            node.meta["shape"] = shape
        used = _names_that_reach_the_output(graph)
        widths = {name: conv.out_channels for name, conv in subnet_convs(model).items() if name in used}
        self._follow_all(model, graph, widths, tied_to={name: name for name in widths})
        if residual_masks == "tied":
            self._follow_all(model, graph, widths, self._writers_of_one_stream())
        if not self.spaces[self.ops[-1].space].full:
            raise ValueError("the output of the network itself would be masked; leave its last layer unmasked")
        self.vital_groups = self._find_vital_groups()

    def shapes_at(self, image_shape: tuple[int, ...]) -> dict[fx.Node, tuple[int, ...]]:
        """The shapes of all results for one image, channels first, of the full network; found once for each size.

        Raises: ValueError for images that the network cannot read.
        """
        if image_shape not in self._shapes:
            recorder = _ShapeRecorder(fx.GraphModule(self._skeleton, self._traced))
            try:
                recorder.run(torch.empty((2, *image_shape), dtype=torch.float32, device="meta"))
            except RuntimeError as error:  # torch's own words for shapes that do not fit
                reason = str(error).splitlines()[0]
                channels, *sides = image_shape
                what = f"{channels} channels and {'x'.join(map(str, sides))} pixels"
                raise ValueError(f"the network cannot read images of {what}: {reason}") from error
            self._shapes[image_shape] = recorder.shapes
        return self._shapes[image_shape]

    def __deepcopy__(self, memo: dict) -> ChannelGraph:
        """The same graph of the copied modules. Its fx nodes, of which nothing changes, are those of this graph.

        They are linked in a chain, and to copy that would exceed the recursion limit in a deep network.
        """
        memo |= {id(op.node): op.node for op in self.ops}
        other = memo[id(self)] = copy.copy(self)  # of one network, so what is known of its shapes is shared
        other.ops = [replace(op, module=copy.deepcopy(op.module, memo)) for op in self.ops]
        return other

    def _follow_all(self, model: nn.Module, graph: fx.Graph, widths: dict[str, int], tied_to: dict[str, str]) -> None:
        """Lays out the units, layers that are tied to another one on its units, and follows them through the graph."""
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
        position: dict[fx.Node, int] = {}
        for node in graph.nodes:
            self.ops.append(self._follow(node, model, position))
            position[node] = len(self.ops) - 1

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

    def _space(self, *segments: Segment) -> int:
        if all(not segment.writers for segment in segments):
            segments = (Segment(sum(segment.width for segment in segments), frozenset()),)
        space = Space(segments)
        if space not in self.spaces:
            self.spaces.append(space)
        return self.spaces.index(space)

    def _follow(self, node: fx.Node, model: nn.Module, position: dict[fx.Node, int]) -> Op:
        inputs = tuple(position[argument] for argument in node.all_input_nodes)
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        kind, space = self._kind_and_space(node, module, inputs)
        return Op(kind, node, module, inputs, space, node.meta["shape"])

    def _kind_and_space(self, node: fx.Node, module: nn.Module | None, inputs: tuple[int, ...]) -> tuple[str, int]:
        what = f"module {node.target} ({type(module).__name__})" if module is not None else f"{node.target}"
        if node.op.startswith("call") and (reason := _node_refusal(node, module)):
            raise _unfollowed(what, reason)
        if node.op == "placeholder":
            return "input", self._space(Segment(node.meta["shape"][0], frozenset()))
        space = self.ops[inputs[0]].space if inputs else -1
        if node.op == "output":
            return "output", space
        if isinstance(module, VRPGE) and node.target in self.first_unit:
            return "conv", self._space(Segment(module.out_channels, frozenset({self.first_unit[str(node.target)]})))
        if isinstance(module, nn.Conv2d) and is_depthwise(module):
            return "depthwise", space
        if isinstance(module, nn.Conv2d):
            return "conv", self._space(Segment(module.out_channels, frozenset()))
        if isinstance(module, nn.BatchNorm2d):
            return "norm", space
        if isinstance(module, nn.Linear):
            return "linear", self._space(Segment(module.out_features, frozenset()))
        if isinstance(module, POINTWISE_MODULES + POOLING_MODULES):
            return "pointwise", space
        if module is None and node.target in POINTWISE_FUNCTIONS and len(inputs) == 1:
            return "pointwise", space
        if module is None and node.target in ADDITIONS and len(inputs) == 2:
            return "add", self._space(*_joined(*(self.spaces[self.ops[i].space] for i in inputs)))
        if module is None and node.target in CONCATENATIONS:
            return "concat", self._space(*(s for i in inputs for s in self.spaces[self.ops[i].space].segments))
        raise _unfollowed(what, "it is not a known layer or operation")

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

    def where(self, op: Op) -> str:
        """An operation in words."""
        module = "" if op.module is None else f" ({kind_of(op.module)})"
        return f"module {op.node.target}{module}" if module else op.node.name

    def columns_per_channel(self, op: Op) -> int:
        """How many columns of a linear layer read one channel: more than one behind a flatten of a map."""
        return op.module.in_features // self.spaces[self.ops[op.inputs[0]].space].width

    def layer_widths(self, live_counts: list[int]) -> dict[str, int]:
        """Output channels of each convolution and linear layer, for live channels per space."""
        kinds = ("conv", "depthwise", "linear")
        return {str(op.node.target): live_counts[op.space] for op in self.ops if op.kind in kinds}

    def layer_macs(self, live_counts: list[int]) -> dict[str, int]:
        """Multiply-adds of one image per convolution and linear layer, for live channels per space."""
        macs = {}
        for op in self.ops:
            if op.kind in ("conv", "depthwise", "linear"):
                read = 1 if op.kind == "depthwise" else live_counts[self.ops[op.inputs[0]].space]
                written = live_counts[op.space]
                if op.kind != "linear":
                    per_pair = prod(op.module.kernel_size) * prod(op.shape[1:])
                else:
                    per_pair = self.columns_per_channel(op)
                name = str(op.node.target)
                macs[name] = macs.get(name, 0) + read * written * per_pair  # a layer may run more than once
        return macs

    def layer_parameters(self, live_counts: list[int]) -> dict[str, int]:
        """Weights, shifts and scales that belong to live channels, per layer."""
        parameters = {}
        for op in self.ops:
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
            parameters[str(op.node.target)] = count
        return parameters
