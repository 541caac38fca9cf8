"""Arguments and results of operations, which are nested in lists, tuples and dicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The same arguments or results of an operation with a function applied to each."""
    if isinstance(value, dict):
        return {key: mapped(function, entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mapped(function, entry) for entry in value)
    return function(value)


def leaves(value: Any) -> Iterator[Any]:
    """What arguments or results consist of, out of their lists, tuples and dicts."""
    if isinstance(value, list | tuple | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from leaves(entry)
    else:
        yield value
