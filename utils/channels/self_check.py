"""The check of a converted network: does it compute what the plain network computes?

What is traced of a network is not all of it. A parametrization, a forward that asks for `self.training`, a counter or a
random number leave no trace, or a wrong one. So every conversion is tried out on a copy, with a few small images: the
plain network against compact execution with all units kept, and masked against compact execution under drawn masks.
Results, running statistics and gradients must agree, in training and in evaluation mode, not only in a first pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from utils.channels.compact import CompactForward
from utils.channels.differences import first_difference, names_of, place_of_error, words_of
from utils.channels.graph import ChannelGraph, Op
from utils.channels.plan import Plan
from utils.channels.python_state import Values, changed_value, python_values, random_numbers_kept
from utils.conv_type import PlainConv, SubnetBatchNorm

FEW, MORE = 3, 8  # images of a pass; more where maps shrink to one pixel, of which few have hardly any variance
SMALL_SIZES = (8, 16, 32, 64)  # pixels of the shorter side; the first one that the network can read
LARGE = 2e8  # multiply-adds of a pass above which float64, which takes longer, is for what float32 finds different
TOLERANCES = {torch.float64: (1e-6, 1e-4), torch.float32: (1e-2, 1e-2)}  # relative error; what is 0 beside the largest
MODES = {True: "training", False: "evaluation"}

Pass = Callable[[Tensor], Tensor]


class Network(Protocol):
    """What is read of a `SparseNetwork`, which imports this file."""

    model: nn.Module
    graph: ChannelGraph
    execution: str
    precision: str
    image_shape: tuple[int, int, int]
    dense_macs: int
    _compact: CompactForward

    def unit_groups(self) -> list[slice]: ...
    def plan(self, mask_U: np.ndarray) -> Plan: ...
    def whole(self, images: Tensor) -> Tensor: ...
    def __call__(self, images: Tensor, plan: Plan) -> Tensor: ...


class _Difference(Exception):
    """What is not as it is in the plain network."""


class _Unreadable(Exception):
    """The plain network itself fails."""


def check_conversion(network: Network, image_shape: tuple[int, int, int], any_size: bool = True) -> None:
    """Tries a network out on a copy. Neither the network nor any generator of random numbers changes.

    Args:
        image_shape: (channels, height, width) that it is to read.
        any_size: try smaller images first, which take less time.
    Raises: ValueError for a network that computes something else than its plain form.
    """
    channels, *sides = image_shape
    sizes = [size for size in SMALL_SIZES if size < min(sides)] if any_size else []
    shapes = [(channels, *(side * size // min(sides) for side in sides)) for size in sizes]
    device, reason = next(network.model.parameters()).device, None
    # twice in full size: a difference by chance, where a rounding error turns a relu off, does not come again
    for seed, shape in enumerate([*shapes, image_shape, image_shape]):
        if reason is not None and shape != image_shape:
            continue  # a network may treat smaller images in another way, so those that it is for decide
        try:
            with random_numbers_kept(device), _default_dtype(torch.get_default_dtype()):
                _try_out(network, shape, seed)
            return
        except _Difference as error:
            reason = str(error)
        except _Unreadable as error:
            if shape == image_shape:
                raise _refused(network, f"it fails on images of shape {shape} itself, {error}") from error
    raise _refused(network, reason)


def _refused(network: Network, reason: str) -> ValueError:
    return ValueError(f"{type(network.model).__name__} cannot be trained by its kept channels: {reason}")


def _num_images(image_shape: tuple[int, ...]) -> int:
    return FEW if min(image_shape[1:]) > SMALL_SIZES[1] else MORE


def _try_out(network: Network, image_shape: tuple[int, ...], seed: int) -> None:
    device = next(network.model.parameters()).device.type
    macs = (
        _num_images(image_shape) * network.dense_macs * math.prod(image_shape[1:]) / math.prod(network.image_shape[1:])
    )
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        if macs < LARGE:
            try:
                _Trial(network, image_shape, seed, torch.float64).run()
            except _Unreadable:  # such as a network that makes tensors in float32
                _Trial(network, image_shape, seed, torch.float32).run()
            return
        try:
            _Trial(network, image_shape, seed, torch.float32).run()
        except _Difference as error:  # or the rounding errors of a deep network, which float64 tells apart
            try:
                _Trial(network, image_shape, seed, torch.float64).run()
            except _Unreadable:
                raise error from None


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Afterwards it is the default again."""
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def _plain_classes(model: nn.Module) -> Iterator[None]:
    """Inside, the layers of a converted network run as torch's own."""
    own = {m: type(m) for m in model.modules() if isinstance(m, PlainConv | SubnetBatchNorm)}
    for module in own:
        module.__class__ = nn.Conv2d if isinstance(module, PlainConv) else nn.BatchNorm2d
    try:
        yield
    finally:
        for module, kind in own.items():
            module.__class__ = kind


def _in_dtype(op: Op, dtype: torch.dtype) -> Op:
    """A constant has the default dtype, as the plain network makes it anew."""
    if op.constant is None or op.constant.dtype != torch.float32:
        return op
    return replace(op, constant=op.constant.to(dtype))


@dataclass(frozen=True)
class _Outcome:
    """What a pass came to.

    Attributes:
        tensors: logits, running statistics and gradients by their names in messages.
        unreached: the parameters that got no gradient.
    """

    tensors: dict[str, Tensor]
    unreached: set[str]


class _Trial:
    """A copy of a network with what is tried on it.

    Args:
        dtype: of all its tensors.
    """

    def __init__(self, network: Network, image_shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> None:
        torch.set_default_dtype(dtype)
        try:
            self.network = copy.deepcopy(network)
        except Exception as error:
            raise _refused(network, f"it cannot be copied: {words_of(error)}") from error
        self.network.precision, self.dtype = "fp32", dtype
        self.network._sizes.add(image_shape)
        self.model, self.graph = self.network.model.to(dtype), self.network.graph
        self.graph.ops = [_in_dtype(op, dtype) for op in self.graph.ops]
        self.device = next(self.model.parameters()).device
        self.draw = torch.Generator().manual_seed(seed)
        self.images = self._normal(_num_images(image_shape), *image_shape)
        self.weights: Tensor | None = None
        self._fill()
        self.buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw, dtype=self.dtype).to(self.device)

    @torch.no_grad()
    def _fill(self) -> None:
        """Scales, shifts and statistics that are still 0 or 1 would hide what becomes of them."""
        for parameter in self.model.parameters():
            if parameter.dim() <= 1 or not parameter.any():
                parameter.add_(0.1 * self._normal(*parameter.shape))
        for module in self.model.modules():
            if isinstance(module, SubnetBatchNorm):
                module.running_mean.add_(0.1 * self._normal(*module.running_mean.shape))
                module.running_var.mul_(1 + 0.1 * self._normal(*module.running_var.shape).abs())

    def run(self) -> None:
        """All passes.

        Raises: _Difference; _Unreadable.
        """
        draw, groups = np.random.default_rng(0), self.network.unit_groups()
        plans = []
        for share_of_layers in (1.0, 0.6):
            mask_U = np.concatenate([(draw.random(units.stop - units.start) < 0.5) for units in groups])
            for units in groups:
                mask_U[units] &= draw.random() < share_of_layers
            plans.append(self.network.plan(mask_U))
        full = self.network.plan(np.ones(len(mask_U), dtype=bool))
        before = {training: self._plain_pass(training)[1] for training in MODES}
        after: dict[bool, Values] = {}
        try:
            for (training, mode), plan in zip(MODES.items(), plans, strict=True):
                plain, after[training] = self._plain_pass(training)
                self._compare(plain, self._plain, full, f"in {mode} mode")
                masked = partial(self._executed, "masked", plan)
                self._compare(self._outcome(masked), masked, plan, f"in {mode} mode under a mask")
        except _Difference as error:
            place = self._moved(before, after)
            raise _Difference(f"{error}; and each pass changes {place}" if place else str(error)) from error
        if place := self._moved(before, after):
            raise _Difference(f"each pass changes {place}, on which later ones may depend")

    @staticmethod
    def _moved(before: dict[bool, Values], after: dict[bool, Values]) -> str | None:
        """The place of a value that is another one after a later pass in the same mode."""
        changes = [changed_value(before[training], values) for training, values in after.items()]
        return next((place for place in changes if place), None)

    def _plain_pass(self, training: bool) -> tuple[_Outcome, Values]:
        """What the plain network comes to, and what its Python remembers of it."""
        self.model.train(training)
        with random_numbers_kept(self.device) as drawn_from:
            outcome = self._plain_outcome()
        if drawn_from:
            raise _Difference(f"in {MODES[training]} mode, its forward draws random numbers ({drawn_from[0]})")
        return outcome, python_values(self.model)

    def _plain(self, images: Tensor) -> Tensor:
        with _plain_classes(self.model):
            return self.network.whole(images)

    def _executed(self, execution: str, plan: Plan, images: Tensor) -> Tensor:
        self.network.execution = execution
        return self.network(images, plan)

    def _plain_outcome(self) -> _Outcome:
        """Raises _Unreadable if the network fails, and _Difference if it works in a precision of its own."""
        inside: list[nn.Module] = []

        def watch(module: nn.Module, _: Any) -> None:
            if torch.is_autocast_enabled(self.device.type):
                inside.append(module)

        called = {op.module for op in self.graph.ops if op.node.op == "call_module"}
        handles = [module.register_forward_pre_hook(watch) for module in called]
        try:
            outcome = self._outcome(self._plain)
        except Exception as error:
            mode = MODES[self.model.training]
            raise _Unreadable(f"in {mode} mode, {place_of_error(error, self.model)}{words_of(error)}") from error
        finally:
            for handle in handles:
                handle.remove()
        if not all(tensor.isfinite().all() for tensor in outcome.tensors.values()):
            raise _Unreadable(f"in {MODES[self.model.training]} mode, results or gradients are not finite")
        if inside:
            raise _Difference(
                f"module {names_of(self.model)[inside[0]]} runs under an autocast of the network's own; remove it, "
                "and pass precision='bf16' instead"
            )
        return outcome

    def _outcome(self, run: Pass) -> _Outcome:
        """The logits, and the running statistics and gradients that a pass leaves. Evaluation has no gradients."""
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self.buffers[name])
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for parameter in parameters.values():
            parameter.grad = None
        with torch.set_grad_enabled(self.model.training):
            logits = run(self.images.clone())
        if self.weights is None:
            self.weights = self._normal(*logits.shape)
        if logits.requires_grad:
            (logits * self.weights).sum().backward()
        norms = {op.node.target: op.module for op in self.graph.ops if op.kind == "norm"}
        moved = {
            f"the {name.replace('_', ' ')} of module {norm}": getattr(module, name).clone()
            for norm, module in norms.items()
            for name in ("running_mean", "running_var")
        }
        gradients = {
            f"the gradient of {name}": torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in parameters.items()
        }
        unreached = {f"the gradient of {name}" for name, p in parameters.items() if p.grad is None}
        return _Outcome({"the result": logits.detach()} | moved | gradients, unreached)

    def _compare(self, expected: _Outcome, run: Pass, plan: Plan, mode: str) -> None:
        """Compact execution against the outcome of another one, which `run` repeats."""
        try:
            got = self._outcome(partial(self._executed, "compact", plan))
        except Exception as error:
            raise _Difference(f"{mode}, its compact execution fails: {words_of(error)}") from error
        relative, least = TOLERANCES[self.dtype]
        norms = {name: tensor.norm().item() for name, tensor in expected.tensors.items()}
        largest = max((norm for name, norm in norms.items() if "gradient" in name), default=0.0)
        for name, wanted in expected.tensors.items():
            found = got.tensors[name]
            size = max(norms[name], least * largest if "gradient" in name else 0.0)
            error = (found - wanted).norm().item() if found.shape == wanted.shape else math.inf
            if error <= relative * size:
                continue
            if name in expected.unreached:
                raise _Difference(
                    f"{mode}, {name} is none in the plain network, where torch.no_grad() or detach() may stand before "
                    "it, and compact execution would train it; set requires_grad of the parameter to False"
                )
            place = self._first_place(run, plan) if name == "the result" else ""
            raise _Difference(f"{mode}, {name} differs from what the plain network computes{place}")

    def _first_place(self, run: Pass, plan: Plan) -> str:
        return first_difference(
            self.model,
            self.network._compact,
            plan,
            lambda: run(self.images.clone()),
            lambda: self._executed("compact", plan, self.images.clone()),
        )
