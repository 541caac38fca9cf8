"""The operations through which channels are followed: what each does to the channels of the tensors that it reads.

An operation that is not here is no error. It runs as the user wrote it, on tensors whose channels always exist.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from utils.channels.spaces import Space, full, joined, side_by_side
from utils.channels.trace import NOISE_FUNCTIONS, NOISE_MODULES, NodeFacts
from utils.conv_type import VRPGE, PlainConv, SubnetBatchNorm, SubnetConv, is_depthwise, is_ordinary

Function = Callable | str


@dataclass(frozen=True)
class Value:
    """What is known of the result of an operation.

    Attributes:
        shape: for one image, channels first; None if it is not a tensor.
        space: the channels that exist.
        zero: whether channels that do not exist are 0 where all channels are computed. Behind a sigmoid they are not,
            and only a product with a map in which they are 0 makes that good.
    """

    shape: tuple[int, ...] | None
    space: Space
    zero: bool = True


class Unfollowed(Exception):
    """Channels cannot be followed through an operation.

    Attributes:
        reading: the operands because of which; None for all.
    """

    def __init__(self, reason: str, reading: tuple[fx.Node, ...] | None = None) -> None:
        super().__init__(reason)
        self.reading = reading


# Maps of single channels that take 0 to 0: kept apart from those that do not.
ZERO_TO_ZERO_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh),
    *(nn.Softsign, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Identity),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d),
    *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad2d, nn.ReflectionPad2d),
    nn.ReplicationPad2d,
)
ZERO_TO_ZERO_FUNCTIONS: set[Function] = {
    *(F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.hardswish, F.tanh),
    *(F.softsign, torch.relu, torch.relu_, torch.tanh, torch.abs, torch.neg, operator.neg),
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.lp_pool2d, F.interpolate),
    *("relu", "relu_", "tanh", "tanh_", "abs", "neg", "contiguous", "clone", "float"),
}
ELSEWHERE_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid)
ELSEWHERE_FUNCTIONS: set[Function] = {
    *(F.sigmoid, F.hardsigmoid, F.softplus, F.logsigmoid, torch.sigmoid, torch.exp),
    *("sigmoid", "sigmoid_", "exp"),
}
REDUCTIONS: set[Function] = {torch.mean, torch.sum, torch.amax, "mean", "sum", "amax"}
RESHAPES: set[Function] = {
    *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.unflatten),
    *(
        "flatten",
        "reshape",
        "view",
        "squeeze",
        "unsqueeze",
        "unflatten",
        "view_as",
        "reshape_as",
        "expand",
        "expand_as",
    ),
}
ADDITIONS: set[Function] = {operator.add, operator.iadd, torch.add, "add", "add_"}
SUBTRACTIONS: set[Function] = {operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_"}
PRODUCTS: set[Function] = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"}
QUOTIENTS: set[Function] = {operator.truediv, operator.itruediv, torch.div, torch.divide, "div", "div_"}
CONCATENATIONS: set[Function] = {torch.cat, torch.concat, torch.concatenate}
SIZES: set[Function] = {"size", "dim", "numel"}

Result = tuple[str, Space, bool]  # kind of the operation, the channels of its result, and `Value.zero`


def is_size(node: fx.Node) -> bool:
    """Whether an operation asks a tensor for its shape only."""
    return node.target in SIZES or (node.target is getattr and node.args[1] in ("shape", "ndim"))


def follow(
    node: fx.Node,
    module: nn.Module | None,
    values: Mapping[fx.Node, Value],
    facts: NodeFacts,
    written: Space | None,
) -> Result:
    """What an operation does to channels.

    Args:
        node: a call.
        module: that it calls, where it calls one.
        values: of the operations before it.
        facts: of the operation.
        written: the channels that it gives if it is a convolution or a linear layer; None: all of them, always.
    Raises: Unfollowed.
    """
    if is_size(node):
        return "size", full(0), True
    if facts.shape is None:
        raise Unfollowed("its result is not a tensor")
    if facts.untraceable:
        raise Unfollowed(facts.untraceable)
    tensors = [n for n in node.all_input_nodes if values[n].shape is not None]
    if not tensors:
        raise Unfollowed("it reads no tensor")
    if module is not None:
        return _module(module, values[tensors[0]], facts.shape, written)
    if node.target in CONCATENATIONS:
        return _concatenation(node, values)
    for signs, rule in ((ADDITIONS, _sum), (SUBTRACTIONS, _difference), (PRODUCTS, _product), (QUOTIENTS, _quotient)):
        if node.target in signs:
            return rule(node, _operands_of_two(node), values, facts.shape)
    x = values[tensors[0]]
    if node.target in RESHAPES:
        return _reshape(node, x, facts.shape)
    if len(tensors) == 1 and is_channelwise(node, None, x.shape):
        return "pointwise", x.space, x.zero and node.target not in ELSEWHERE_FUNCTIONS
    if node.target in REDUCTIONS:
        raise Unfollowed("only a mean, a sum or a maximum over the pixels of a map, dim=(2, 3), is known")
    raise Unfollowed("it is not a known layer or operation")


def is_channelwise(node: fx.Node, module: nn.Module | None, shape: tuple[int, ...]) -> bool:
    """Whether a call maps every channel by itself, whatever it does to its pixels.

    Args:
        shape: of what it reads, for one image.
    """
    if module is not None:
        single_slope = isinstance(module, nn.PReLU) and module.num_parameters == 1
        return isinstance(module, ZERO_TO_ZERO_MODULES + ELSEWHERE_MODULES + NOISE_MODULES) or single_slope
    if node.target in REDUCTIONS:
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dims = (dims,) if isinstance(dims, int) else dims
        return isinstance(dims, tuple | list) and all(isinstance(d, int) and d % (len(shape) + 1) > 1 for d in dims)
    if node.target is operator.getitem:
        index = node.args[1]
        return isinstance(index, tuple) and Ellipsis not in index and index[:2] == (slice(None), slice(None))
    return node.target in ZERO_TO_ZERO_FUNCTIONS | ELSEWHERE_FUNCTIONS or node.target in NOISE_FUNCTIONS


# ---- layers ----


def module_refusal(module: nn.Module) -> str | None:
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
        if not is_ordinary(module):
            return "it needs scale and shift, running statistics and a momentum"
    return None


def _module(module: nn.Module, x: Value, shape: tuple[int, ...], written: Space | None) -> Result:
    if reason := module_refusal(module):
        raise Unfollowed(reason)
    if isinstance(module, nn.Conv2d) and is_depthwise(module):
        return "depthwise", x.space, True
    if isinstance(module, nn.Conv2d):
        _needs_zero(x)
        return "conv", written or full(module.out_channels), True
    if isinstance(module, nn.BatchNorm2d):
        return "norm", x.space, True
    if type(module) is nn.Linear:
        if len(x.shape) != 1:
            raise Unfollowed("it reads a map; flatten it first")
        _needs_zero(x)
        return "linear", written or full(module.out_features), True
    if isinstance(module, nn.Flatten | nn.Unflatten):
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return "pointwise", x.space, x.zero
        return _reshaped(x, shape, expands=False)
    if not is_channelwise(None, module, x.shape):
        raise Unfollowed("it is not a known layer or operation")
    return "pointwise", x.space, x.zero and not isinstance(module, ELSEWHERE_MODULES)


def _needs_zero(x: Value) -> None:
    if not (x.zero or x.space.full):
        raise Unfollowed("it reads a map in which channels that are dropped would not be 0")


# ---- shapes ----


def _reshape(node: fx.Node, x: Value, shape: tuple[int, ...]) -> Result:
    flattens = node.target in ("flatten", torch.flatten) and shape == (prod(x.shape),)
    if flattens and not any(isinstance(argument, fx.Node) for argument in node.args[1:]):
        return "pointwise", x.space, x.zero
    return _reshaped(x, shape, expands=node.target in ("expand", "expand_as"))


def _reshaped(x: Value, shape: tuple[int, ...], expands: bool) -> Result:
    """Batch and channels stay where they are, or the pixels of each channel become columns side by side."""
    width, size = x.space.width, prod(x.shape)
    flattens = shape == (size,)
    keeps = shape[:1] == (width,) and x.shape[:1] in ((width,), (size,))
    if not (flattens or keeps) or not (expands or prod(shape) == size):
        raise Unfollowed("it moves channels to another dimension, or takes them apart")
    return "reshape", x.space, x.zero


# ---- operations of two tensors ----


def _operands_of_two(node: fx.Node) -> tuple[Any, Any]:
    options = {key: value for key, value in node.kwargs.items() if not (key == "alpha" and value == 1)}
    operands = [*node.args, *(options.pop(key) for key in ("input", "other") if key in options)]
    if options or len(operands) != 2:
        raise Unfollowed("it adds with a factor" if "alpha" in options else "it has more than two operands")
    return operands[0], operands[1]


def _split(operands: tuple[Any, Any], values: Mapping[fx.Node, Value]) -> tuple[list[fx.Node], list[Any]]:
    """Tensors with channels, and numbers: also those that are parameters of a single element."""
    tensors, numbers = [], []
    for operand in operands:
        value = values.get(operand) if isinstance(operand, fx.Node) else None
        if value is None or value.shape is None or (operand.op == "get_attr" and prod(value.shape) == 1):
            numbers.append(operand)
        else:
            tensors.append(operand)
    return tensors, numbers


def _sum(node: fx.Node, operands: tuple[Any, Any], values: Mapping[fx.Node, Value], shape: tuple[int, ...]) -> Result:
    tensors, numbers = _split(operands, values)
    if len(tensors) == 1:
        x = values[tensors[0]]
        return _of_number(x, shape, zero=x.zero and isinstance(numbers[0], int | float) and numbers[0] == 0)
    a, b = (values[tensor] for tensor in tensors)
    if tensors[0] is tensors[1]:
        return "pointwise", a.space, a.zero
    if a.shape != b.shape or len(a.shape) != 3:
        raise Unfollowed(f"it adds shapes {a.shape} and {b.shape}, only maps of one shape are known")
    if node.target in (operator.iadd, "add_") and len(tensors[0].users) > 1:
        raise Unfollowed("it changes a tensor in place that is read elsewhere too")
    _needs_zero(a)
    _needs_zero(b)
    space = joined(a.space, b.space)
    if space is None:
        raise Unfollowed("the maps that it adds were concatenated from different numbers of channels")
    return "add", space, True


def _difference(
    node: fx.Node, operands: tuple[Any, Any], values: Mapping[fx.Node, Value], shape: tuple[int, ...]
) -> Result:
    tensors, _ = _split(operands, values)
    if len(tensors) == 1:
        return _of_number(values[tensors[0]], shape, zero=False)
    a, b = (values[tensor] for tensor in tensors)
    if a.space != b.space or a.shape != b.shape:
        raise Unfollowed("it subtracts maps of different channels")
    return "pointwise", a.space, a.zero and b.zero


def _product(
    node: fx.Node, operands: tuple[Any, Any], values: Mapping[fx.Node, Value], shape: tuple[int, ...]
) -> Result:
    """Of a map with a number, with a map of the same channels (such as its own gate), or with a map of one channel."""
    tensors, _ = _split(operands, values)
    if len(tensors) == 1:
        x = values[tensors[0]]
        return _of_number(x, shape, zero=x.zero)
    for carrier, factor in (tensors, tensors[::-1]):
        a, b = values[carrier], values[factor]
        if a.shape != shape or len(a.shape) != len(b.shape) or factor.op == "get_attr" or carrier.op == "get_attr":
            continue
        if a.space == b.space and a.shape[0] == b.shape[0]:
            return "pointwise", a.space, a.zero or b.zero
        if b.shape[0] == 1 and len(b.shape) == 3:
            if not b.space.full:
                raise Unfollowed("it multiplies all channels by one", (factor,))
            return "pointwise", a.space, a.zero
    raise Unfollowed("it multiplies maps of different channels")


def _quotient(
    node: fx.Node, operands: tuple[Any, Any], values: Mapping[fx.Node, Value], shape: tuple[int, ...]
) -> Result:
    tensors, _ = _split(operands, values)
    if len(tensors) == 1 and tensors[0] is operands[0]:
        x = values[tensors[0]]
        return _of_number(x, shape, zero=x.zero)
    raise Unfollowed("it divides by a map")


def _of_number(x: Value, shape: tuple[int, ...], zero: bool) -> Result:
    if shape != x.shape:
        raise Unfollowed("it changes the shape of a map")
    return "pointwise", x.space, zero


def _concatenation(node: fx.Node, values: Mapping[fx.Node, Value]) -> Result:
    parts = node.args[0] if node.args else node.kwargs["tensors"]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    inputs = node.all_input_nodes
    if dim not in (1, -3) or any(values[n].shape is None or len(values[n].shape) != 3 for n in inputs):
        raise Unfollowed("only a concatenation of maps by their channels, dim=1, is known")
    if len(inputs) < len(parts):
        raise Unfollowed("it reads a tensor twice")
    for n in inputs:
        _needs_zero(values[n])
    return "concat", side_by_side([values[n].space for n in inputs]), True
