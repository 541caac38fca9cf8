"""A recorder for the CPU that keeps the promises of CUDA graphs, and makes whoever breaks them compute nonsense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

WAITS = ("_local_scalar_dense", "nonzero", "lift_fresh")  # read from the device, or send a number of the host to it


class _Recording(TorchDispatchMode):
    """Every operation with the memory that it reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable, Any, Any, Any]] = []
        self.own: set[int] = set()  # memory that did not exist before
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # memory that did, and what it held

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if any(name in str(operation) for name in WAITS):
            raise RuntimeError(f"operation not permitted when stream is capturing: {operation}")
        kept = tree_map_only(Tensor, torch.Tensor.detach, (args, kwargs or {}))  # with the strides of now
        for tensor in tree_leaves(kept) if _writes(operation) else ():
            if isinstance(tensor, Tensor) and _memory(tensor) not in self.own:
                self.before.setdefault(_memory(tensor), (tensor, tensor.clone()))
        read = {_memory(one) for one in tree_leaves(kept) if isinstance(one, Tensor)}
        result = operation(*args, **(kwargs or {}))
        made = tree_map_only(Tensor, torch.Tensor.detach, result)
        self.own |= {_memory(one) for one in tree_leaves(made) if isinstance(one, Tensor)} - read - self.before.keys()
        self.operations.append((operation, *kept, made))
        return result

    @torch.no_grad()
    def undo(self) -> None:
        """A graph is only recorded: nothing has been computed yet."""
        for tensor, held in self.before.values():
            tensor.copy_(held)
        for *_, made in self.operations:
            for tensor in tree_leaves(made):
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and _memory(tensor) in self.own:
                    tensor.fill_(torch.nan)

    @torch.no_grad()
    def replay(self) -> None:
        for operation, args, kwargs, made in self.operations:
            if not _writes(operation) and any(r.alias_info is not None for r in operation._schema.returns):
                continue  # a view
            result = operation(*args, **kwargs)
            for new, old in zip(tree_leaves(result), tree_leaves(made), strict=True):
                if isinstance(new, Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


class StandIn:
    """See `trainers.replay.Recorder`.

    Attributes:
        warmed, recorded, replayed: how many works were.
        fails: raises at the work of this number, counted from 0 in every recording.
    """

    def __init__(self, fails: int | None = None) -> None:
        self.warmed = self.recorded = self.replayed = 0
        self.fails = fails

    def warm_up(self, work: Callable[[], Any]) -> Any:
        self.warmed += 1
        return work()

    def record(self, *works: Callable[[], None]) -> list[Callable[[], None]]:
        recordings: list[_Recording] = []
        try:
            for number, work in enumerate(works):
                recordings.append(_Recording())
                with recordings[-1]:
                    work()
                    if number == self.fails:
                        raise RuntimeError("no memory for another graph\nand a second line")
        finally:
            for recording in reversed(recordings):
                recording.undo()
        self.recorded += len(works)
        return [lambda one=one: self._replay(one) for one in recordings]

    def _replay(self, recording: _Recording) -> None:
        self.replayed += 1
        recording.replay()


def _writes(operation: Callable) -> bool:
    if operation is torch.ops.aten.native_batch_norm.default:  # it moves running statistics, which its schema hides
        return True
    return any(a.alias_info is not None and a.alias_info.is_write for a in operation._schema.arguments)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
