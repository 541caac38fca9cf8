"""A network as source text: layers with their constructor arguments, and a forward pass of one expression a step.

The text is all that `plain_network` makes. It is executed to get the network, and it is what a user reads.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from utils.channels.steps import Step
from utils.conv_type import PlainConv, SubnetBatchNorm, SubnetConv

HEADER = """\
import torch
import torch.nn.functional as F
from torch import Tensor, nn
"""
INPUT = "images"
LINE_LENGTH = 100


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of torch that a layer is or is derived from."""
    return next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn."))


def is_of_torch(module: nn.Module) -> bool:
    """Whether a module computes what a layer of torch computes that holds no other layers."""
    own = type(module).__module__.startswith("torch.nn.") or type(module) in (PlainConv, SubnetConv, SubnetBatchNorm)
    return own and not list(module.children())


def arguments_of(module: nn.Module) -> dict[str, Any]:
    """The arguments that a layer of torch was made with, those apart that are the default.

    A layer that works in place is described as one that does not: in a network of another structure the tensor that it
    would change may be read elsewhere.
    """
    arguments = {}
    for name, parameter in inspect.signature(plain_class(module)).parameters.items():
        if name in ("device", "dtype", "inplace") or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        value = getattr(module, name)
        if name == "bias":
            value = value is not None
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if name == "stride" and parameter.default is None and value == arguments["kernel_size"]:
            continue  # of a pooling
        if value != parameter.default:
            arguments[name] = value
    return arguments


def constructor(module: nn.Module) -> str:
    """The expression that makes such a layer, for example `nn.Conv2d(3, 16, 3, padding=1, bias=False)`."""
    required = [
        name for name, p in inspect.signature(plain_class(module)).parameters.items() if p.default is inspect._empty
    ]
    words = [repr(value) if name in required else f"{name}={value!r}" for name, value in arguments_of(module).items()]
    return f"nn.{plain_class(module).__name__}({', '.join(words)})"


SIGNS = {
    **{operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//"},
    **{operator.iadd: "+", operator.isub: "-", operator.imul: "*", operator.itruediv: "/", operator.ifloordiv: "//"},
    **{operator.mod: "%", operator.pow: "**", operator.matmul: "@"},
}


def expression(node: fx.Node) -> str:
    """The form of a call of a function or method; never in place.

    Raises: ValueError for what is no function or method of torch or Python.
    """
    operand = {argument: f"{{{number}}}" for number, argument in enumerate(node.all_input_nodes)}
    function, arguments = node.target, list(node.args)
    options = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if function is operator.getitem:
        index = arguments[1] if isinstance(arguments[1], tuple) else (arguments[1],)
        return f"{operand[arguments[0]]}[{', '.join(_text(part, operand, index=True) for part in index)}]"
    if function is getattr:
        return f"{operand[arguments[0]]}.{arguments[1]}"
    words = [_text(argument, operand) for argument in arguments]
    if function in SIGNS and not options:
        return f"({words[0]} {SIGNS[function]} {words[1]})"
    if function is operator.neg:
        return f"(-{words[0]})"
    options = [f"{key}={_text(value, operand)}" for key, value in options.items()]
    if isinstance(function, str):
        name = method_of(node) if function.startswith("__") else method_of(node).rstrip("_")
        return f"{words[0]}.{name}({', '.join(words[1:] + options)})"
    name = function.__name__.rstrip("_")
    place = _place_of_inplace(function)
    words = words if place is None else words[: place + 1]
    for space, module in (("F", F), ("torch", torch)):
        if getattr(module, function.__name__, None) is function:
            return f"{space}.{name}({', '.join(words + options)})"
    raise ValueError(f"{getattr(function, '__module__', '')}.{name} is no function of torch")


def method_of(node: fx.Node) -> str:
    """The method that a node calls. A view is a reshape where tensors may lie in memory in another order."""
    takes_shape = not any(isinstance(argument, torch.dtype) for argument in node.args)
    return "reshape" if node.target == "view" and takes_shape else str(node.target)


def _text(value: Any, operand: Mapping[fx.Node, str], index: bool = False) -> str:
    """An argument of a call, with operands by their places; as an index, slices are written with colons."""
    if isinstance(value, fx.Node):
        return operand[value]
    if isinstance(value, slice):
        parts = [None if part is None else _text(part, operand) for part in (value.start, value.stop, value.step)]
        if not index:
            return f"slice({', '.join(map(str, parts))})"
        return ":".join("" if part is None else part for part in parts[: 3 if parts[2] else 2])
    if isinstance(value, tuple | list):
        inside = ", ".join(_text(part, operand) for part in value)
        if isinstance(value, list):
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if value is Ellipsis:
        return "..."
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return repr(value).replace("{", "{{").replace("}", "}}")
    raise ValueError(f"{value!r} cannot be written down")


def works_in_place(function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether such a call changes the tensor that it reads."""
    if isinstance(function, str):
        return function.endswith("_")
    place = _place_of_inplace(function)
    return options.get("inplace", False) or (place is not None and any(arguments[place:]))


def _place_of_inplace(function: Any) -> int | None:
    """Where `inplace`, always the last argument, stands behind the tensor; None for a function without it."""
    try:
        names = list(inspect.signature(function).parameters)
    except ValueError:  # a builtin of torch: none of those that are known here has it
        return None
    return names.index("inplace") - 1 if "inplace" in names else None


def identifier(name: str, taken: Collection[str]) -> str:
    """A name as an attribute of a module or a variable that nothing else has: layer1.0.conv1 -> layer1_0_conv1."""
    name = re.sub(r"\W", "_", name)
    if not name.isidentifier():
        name = f"layer_{name}"
    while hasattr(nn.Module, name) or name in ("x", "self", "torch", "F", "nn", INPUT):
        name += "_"
    stem, number = name, 2
    while name in taken:
        name, number = f"{stem}_{number}", number + 1
    return name


def network_source(
    layers: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], steps: Sequence[Step], result: str
) -> str:
    """The class `Network`, without its imports.

    Args:
        layers: by name.
        tensors: parameters (floating point) and buffers (other) that belong to no layer.
        steps: the forward pass, in order.
        result: the tensor that it returns.
    """
    lines = ["class Network(nn.Module):", "    def __init__(self) -> None:", "        super().__init__()"]
    lines += [f"        self.{name} = {constructor(layer)}" for name, layer in layers.items()]
    for name, tensor in tensors.items():
        shape = len(tensor) if tensor.dim() == 1 else tuple(tensor.shape)
        if tensor.is_floating_point():
            lines.append(f"        self.{name} = nn.Parameter(torch.empty({shape}))")
        else:
            lines.append(f'        self.register_buffer("{name}", torch.empty({shape}, dtype={tensor.dtype}))')
    lines += ["", f"    def forward(self, {INPUT}: Tensor) -> Tensor:"]
    return "\n".join([*lines, *(f"        {line}" for line in _forward_lines(steps, result))]) + "\n"


def _forward_lines(steps: Sequence[Step], result: str) -> list[str]:
    """Assignments and the return. A tensor that only the next step reads is written into it, or is called x."""
    readers: dict[str, list[int]] = {}
    for number, step in enumerate(steps):
        for operand in step.operands:
            readers.setdefault(operand, []).append(number)
    lines: list[str] = []
    passing: Step | None = None  # a step whose result only the next one reads, with the text of its expression
    for number, step in enumerate([*steps, Step("", "{0}", (result,))]):
        names = list(step.operands)
        if passing is not None:
            place = names.index(passing.result)
            once = step.form.count(f"{{{place}}}") == 1
            nested = [*names[:place], passing.form, *names[place + 1 :]]
            if once and _may_hold(step.form, passing.form) and len(step.form.format(*nested)) <= LINE_LENGTH - 16:
                names = nested
            else:
                lines.append(f"x = {passing.form}")
                names[place] = "x"
        text, passing = step.form.format(*names), None
        if number == len(steps):
            lines.append(f"return {text}")
        elif readers.get(step.result, [len(steps)]) == [number + 1]:
            passing = Step(step.result, text, ())
        else:
            lines.append(f"{step.result} = {text}")
    return lines


def _may_hold(form: str, text: str) -> bool:
    """Whether an expression can stand inside a step as it is: a sum only as the argument of a call, or alone."""
    return " + " not in text or "({0}" in form or form == "{0}"


def execute(source: str) -> nn.Module:
    """The network that the text describes, on the meta device: its tensors have shapes, but no values yet."""
    names: dict[str, Any] = {}
    exec(compile(HEADER + source, "<exported network>", "exec"), names)
    with torch.device("meta"):
        return names["Network"]()
