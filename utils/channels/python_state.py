"""What a network remembers in Python, beside its parameters and buffers, and where it takes random numbers from."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

TORCHS_OWN = {*vars(nn.Module()), "training"}  # what every module has; hooks are refused elsewhere
LARGEST = 100  # elements of a list or a dictionary that is looked into
DEEPEST = 3  # levels of objects inside objects

Values = dict[str, Any]


def python_values(model: nn.Module) -> Values:
    """Numbers, texts and their collections that the forward of a network can read, by place.

    These are attributes of its modules and of their classes, and the global and enclosing variables of its forwards.
    Tensors are left out: a pass that depends on one from an earlier pass shows in its results.
    """
    values: Values = {}
    seen: set[type] = set()
    for name, module in model.named_modules():
        kind = type(module)
        for key, value in vars(module).items():
            if key not in TORCHS_OWN:
                values[f"attribute {key!r} of module {name or kind.__name__}"] = _plain(value)
        if kind in seen or kind.__module__.startswith("torch."):
            continue
        seen.add(kind)
        for owner in kind.__mro__:
            if owner is nn.Module:
                break
            for key, value in vars(owner).items():
                if not key.startswith("__"):
                    values[f"attribute {key!r} of class {owner.__name__}"] = _plain(value)
        forward = getattr(kind.forward, "__wrapped__", kind.forward)
        for key, value in getattr(forward, "__globals__", {}).items():
            if not key.startswith("__"):
                values[f"global variable {key!r} of {kind.__module__}"] = _plain(value)
        code = getattr(forward, "__code__", None)
        for key, cell in zip(
            code.co_freevars if code else (), getattr(forward, "__closure__", None) or (), strict=True
        ):
            values[f"variable {key!r} around the forward of {kind.__name__}"] = _plain(_content(cell))
    return values


def changed_value(before: Values, after: Values) -> str | None:
    """The place of a value that has changed; None if none has."""
    return next((place for place, value in after.items() if place in before and before[place] != value), None)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _plain(value: Any, depth: int = DEEPEST) -> Any:
    """Something that can be compared and stays as it is: numbers and texts as they are, anything else by its kind."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)  # nan is not equal to itself
    if isinstance(value, list | tuple | set | frozenset | dict):
        if len(value) > LARGEST or depth == 0:
            return type(value).__name__, len(value)
        parts = value.items() if isinstance(value, dict) else value
        return type(value).__name__, [_plain(part, depth - 1) for part in parts]
    fields = getattr(value, "__dict__", None)
    if depth == 0 or not isinstance(fields, dict) or isinstance(value, type | nn.Module | torch.Tensor):
        return type(value).__name__
    if callable(value) or type(value) is type(sys):
        return type(value).__name__
    return type(value).__name__, [(key, _plain(part, depth - 1)) for key, part in list(fields.items())[:LARGEST]]


@contextmanager
def python_state_kept(model: nn.Module) -> Iterator[None]:
    """Attributes of modules are afterwards what they were: a traced forward may count, or keep what it was given."""
    before = {
        module: {
            key: copy.copy(value) if isinstance(value, list | dict | set) else value
            for key, value in vars(module).items()
            if key not in TORCHS_OWN
        }
        for module in model.modules()
    }
    try:
        yield
    finally:
        for module, values in before.items():
            for key in [key for key in vars(module) if key not in TORCHS_OWN and key not in values]:
                del vars(module)[key]
            for key, value in values.items():
                if isinstance(value, list | dict | set) and vars(module).get(key) is not None:
                    _put_back(vars(module), key, value)
                else:
                    vars(module)[key] = value


def _put_back(fields: dict[str, Any], key: str, value: Any) -> None:
    """The content of a list, dictionary or set, in the object that others may hold too."""
    now = fields[key]
    if type(now) is not type(value):
        fields[key] = value
    elif isinstance(now, list):
        now[:] = value
    else:
        now.clear()
        now.update(value)


@contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[list[str]]:
    """All generators are afterwards what they were. Gives a list that then names those that were drawn from."""
    drawn_from: list[str] = []
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        before = _generators()
        try:
            yield drawn_from
        finally:
            after = _generators()
            drawn_from += [name for name, state in before.items() if after[name] != state]
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _generators() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "random": random.getstate(),
        "numpy": (kind, keys.tobytes(), rest),
    }
