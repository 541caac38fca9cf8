"""A network as a list of operations: traced by `torch.fx`, with shapes, multiply-adds and the source line of each.

What `torch.fx` cannot look into, because its Python depends on values, stays one operation: the whole submodule.
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import StochasticDepth

BATCH = 2  # images of the pass that finds shapes

# They are switched off: the loss is compared under two masks, and noise of the two passes would enter the difference.
NOISE_MODULES = (nn.modules.dropout._DropoutNd, StochasticDepth)
NOISE_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


@dataclass(frozen=True)
class NodeFacts:
    """What is known of one operation.

    Attributes:
        shape: of its result for one image; None if the result is not a tensor.
        where: the module that runs it and the source line, for messages.
        untraceable: why `torch.fx` could not look into the module; None if it is no such module.
    """

    shape: tuple[int, ...] | None
    where: str
    untraceable: str | None


@dataclass(frozen=True)
class Trace:
    """The operations of one forward pass.

    Attributes:
        graph: as torch.fx has them, in their order.
        facts: what is known of each.
        macs: multiply-adds of one image of an operation, as torch counts them.
        constants: the tensors that the forward makes from numbers alone, which the graph reads like a buffer.
    """

    graph: fx.Graph
    facts: dict[fx.Node, NodeFacts]
    macs: Callable[[fx.Node], int]
    constants: dict[fx.Node, Tensor]


def trace(model: nn.Module, image_shape: tuple[int, int, int], strict: bool) -> Trace:
    """Follows a network in eval mode, in which it returns its logits alone.

    Args:
        model: its forward takes one batch of images; other arguments keep their defaults.
        image_shape: (channels, height, width) of an image.
        strict: refuse a submodule that cannot be traced.
    Raises: ValueError if the forward of the network itself cannot be traced, or cannot read such images.
    """
    tracer, own = _Tracer(strict), set(vars(model))
    with _eval_mode(model):
        try:
            graph = tracer.trace(model)
        except (_NotOneImage, _Untraceable) as error:
            raise ValueError(str(error)) from error
        except Exception as error:
            raise ValueError(_cannot_trace(type(model).__name__, error)) from error
        for node in reversed(list(graph.nodes)):
            if node.target is torch._assert and not node.users:  # a check of the network, fulfilled by its shapes
                graph.erase_node(node)
        recorder = _recorded(model, graph, image_shape)
    facts = {
        node: NodeFacts(
            recorder.shapes[node],
            tracer.places.get(node, ""),
            tracer.untraceable.get(str(node.target)) if node.op == "call_module" else None,
        )
        for node in graph.nodes
    }
    made = {
        name: value for name, value in vars(model).items() if name.startswith("_tensor_constant") and name not in own
    }
    constants = {node: made[node.target] for node in graph.nodes if node.op == "get_attr" and node.target in made}
    return Trace(graph, facts, recorder.macs, constants)


class _NotOneImage(Exception):
    """A forward that cannot be called with images alone."""


class _Untraceable(Exception):
    """A submodule that cannot be traced, where that is not allowed."""


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".") or type(error).__name__


def _cannot_trace(what: str, error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    where = f" ({_place_of(frames[-1].filename, frames[-1].lineno)})" if frames else ""
    return f"channels cannot be followed through {what}{where}: torch.fx cannot trace its forward: {_first_line(error)}"


def _name_of(name: str, module: nn.Module) -> str:
    """The name and the class of a module, without what `sparsify` has made of it."""
    kind = next(kind for kind in type(module).__mro__ if kind.__module__ != "utils.conv_type")
    return f"module {name} ({kind.__name__})"


def _is_ours(filename: str) -> bool:
    """Whether a file belongs to the tracing, and not to the network."""
    return filename == __file__ or filename.startswith((os.path.dirname(torch.__file__) + os.sep, "<"))


def _place_of(filename: str, line: int | None) -> str:
    """A source line, with the folder that holds the file: models/vgg.py:60."""
    return f"{os.path.join(os.path.basename(os.path.dirname(filename)), os.path.basename(filename))}:{line}"


class _Tracer(fx.Tracer):
    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        self.strict = strict
        self.places: dict[fx.Node, str] = {}
        self.untraceable: dict[str, str] = {}

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        leaf = isinstance(module, (nn.Conv2d, nn.BatchNorm2d, *NOISE_MODULES))
        return leaf or super().is_leaf_module(module, qualified_name)

    def create_args_for_root(self, root_fn: Callable, is_module: bool, concrete_args: Any = None) -> tuple:
        """One placeholder for the images; whatever else the forward takes has its default."""
        self._known = set(self.root.modules())
        _, *parameters = inspect.signature(root_fn).parameters.values()
        fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [p.name for p in parameters[1:] if p.default is p.empty and p.kind not in fixed]
        if not parameters or needed:
            raise _NotOneImage(
                f"the forward of {type(self.root).__name__} must take one batch of images; "
                f"give its other arguments defaults{': ' * bool(needed)}{', '.join(needed)}"
            )
        return root_fn, [self.root, self.create_proxy("placeholder", "images", (), {})]

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        before, depth = len(self.graph.nodes), len(self.module_stack)
        if module not in self._known:
            if list(module.parameters()):
                raise _Untraceable(f"the forward makes a {type(module).__name__} anew; make it in __init__")
            return forward(*args, **kwargs)
        try:
            return super().call_module(module, forward, args, kwargs)
        except (_Untraceable, _NotOneImage):
            raise
        except Exception as error:
            name = self.path_of_module(module)
            reason = _cannot_trace(_name_of(name, module), error)
            if self.strict:
                raise _Untraceable(reason) from error
            for node in list(self.graph.nodes)[before:][::-1]:
                self.graph.erase_node(node)
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            self.untraceable[name] = f"torch.fx cannot trace its forward: {_first_line(error)}"
            return self.create_proxy("call_module", name, args, kwargs)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        if kind.startswith("call"):
            line = _calling_line()
            if kind == "call_module":
                what = _name_of(target, self.root.get_submodule(target))
            else:
                name = target if isinstance(target, str) else target.__name__
                what = f"{name} in {self.scope.module_path or type(self.root).__name__}"
            self.places[node] = what + (f" at {line}" if line else "")
        return node


def _calling_line() -> str | None:
    """The line of the network that is running; None if there is only torch between it and the tracing."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not trace.__code__:
        if not _is_ours(frame.f_code.co_filename):
            return _place_of(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return None


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps all results."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.shapes: dict[fx.Node, tuple[int, ...] | None] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        shape = tuple(result.shape) if isinstance(result, Tensor) else None
        self.shapes[node] = shape if shape is None or node.op == "get_attr" else shape[1:]
        return result

    def macs(self, node: fx.Node) -> int:
        """Multiply-adds of one image of an operation: it runs once more."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            getattr(self, node.op)(node.target, args, kwargs)
        return counter.get_total_flops() // (2 * BATCH)


def shapes_of(model: nn.Module, graph: fx.Graph, image_shape: tuple[int, ...]) -> dict[fx.Node, tuple[int, ...] | None]:
    """The shapes of all results for one image of another size.

    Args:
        model: may be on the meta device.
    Raises: ValueError if the network cannot read such images.
    """
    return _recorded(model, graph, image_shape).shapes


def _recorded(model: nn.Module, graph: fx.Graph, image_shape: tuple[int, int, int]) -> _Recorder:
    """Shapes without data where the operations allow it, otherwise from a pass on the CPU."""
    first_error = None
    for device in ("meta", "cpu"):
        images = torch.zeros((BATCH, *image_shape), dtype=torch.float32, device=device)
        try:
            copied = copy.deepcopy(model).to(device, torch.float32, memory_format=torch.contiguous_format)
            recorder = _Recorder(fx.GraphModule(copied, graph))
            with torch.no_grad():
                recorder.run(images)
        except Exception as error:  # torch's own words for shapes that do not fit
            first_error = first_error or error
        else:
            return recorder
    reason = _first_line(first_error)
    channels, *sides = image_shape
    what = f"{channels} channels and {'x'.join(map(str, sides))} pixels"
    raise ValueError(f"the network cannot read images of {what}: {reason}") from first_error


@contextmanager
def _eval_mode(model: nn.Module) -> Any:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
