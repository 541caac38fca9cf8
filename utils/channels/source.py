"""A network as source text: layers with their constructor arguments, and a forward pass of one expression a step.

The text is all that `plain_network` makes. It is executed to get the network, and it is what a user reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADER = """\
import torch
import torch.nn.functional as F
from torch import Tensor, nn
"""
INPUT = "images"
LINE_LENGTH = 100


@dataclass(frozen=True)
class Step:
    """One operation of the forward pass.

    Attributes:
        result: name of the tensor that it makes.
        form: its expression, with {0} and {1} in place of the tensors that it reads.
        operands: their names.
        layer: name of the layer that it runs, where it runs one.
        tensor: name of the parameter or buffer that it reads and that belongs to no layer, where it reads one.
    """

    result: str
    form: str
    operands: tuple[str, ...]
    layer: str | None = None
    tensor: str | None = None


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of torch that a layer is or is derived from."""
    return next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn."))


def arguments_of(module: nn.Module) -> dict[str, Any]:
    """The arguments that a layer of torch was made with, those apart that are the default.

    A layer that works in place is described as one that does not: in a network of another structure the tensor that it
    would change may be read elsewhere.
    """
    arguments = {}
    for name, parameter in inspect.signature(plain_class(module)).parameters.items():
        if name in ("device", "dtype", "inplace"):
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


def call(function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> str:
    """The form of a call of a function of torch, or of a method given by name, on a tensor; never in place.

    Args:
        arguments: those behind the tensor.
    """
    if isinstance(function, str):
        start = f"{{0}}.{function.rstrip('_')}("
    else:
        name = function.__name__
        start = f"{'F' if getattr(F, name, None) is function else 'torch'}.{name}({{0}}"
        arguments = arguments[: _place_of_inplace(function)]
    words = [repr(a) for a in arguments] + [f"{key}={a!r}" for key, a in options.items() if key != "inplace"]
    comma = ", " if words and not isinstance(function, str) else ""
    return f"{start}{comma}{', '.join(words)})"


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
    name = name.replace(".", "_")
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
        if tensor.is_floating_point():
            lines.append(f"        self.{name} = nn.Parameter(torch.empty({len(tensor)}))")
        else:
            lines.append(f'        self.register_buffer("{name}", torch.empty({len(tensor)}, dtype={tensor.dtype}))')
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
            nested = [*names[:place], passing.form, *names[place + 1 :]]
            if _may_hold(step.form, passing.form) and len(step.form.format(*nested)) <= LINE_LENGTH - 16:
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
