"""Units that provably stay dropped leave the parameters, batch-norms and optimizer state for good.

A score of exactly 0 has gradient 0, so with a first moment (or momentum) that is not negative no step of the score
optimizer can lift it, and the projection raises no score of 0 or below. Its unit is never drawn again; nothing reads
its parameters any more. Masks and scores keep their full length: a few bytes a unit, and draws, projection and indices
of units stay what they were. Source: ours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from utils.channels.graph import Op, columns_of
from utils.channels.network import SparseNetwork


def stays_zero(scores_U: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Which scores are 0 and can never leave it, whatever the losses: (U,) bool.

    Args:
        scores_U: the parameter of the optimizer, after a projection.
        optimizer: Adam or SGD, without weight decay.
    """
    state = optimizer.state.get(scores_U, {})
    moment = state.get("exp_avg", state.get("momentum_buffer"))
    zero = scores_U == 0
    return zero if moment is None else zero & (moment >= 0)


def drop_dead_units(
    network: SparseNetwork, score_optimizer: torch.optim.Optimizer, weight_optimizer: torch.optim.Optimizer
) -> int:
    """Cuts all units whose scores provably stay 0 out of a running search; returns how many.

    Masks that are drawn already stay valid: they were drawn from these scores and cannot hold such a unit.
    """
    dead_U = stays_zero(network.scores, score_optimizer).cpu().numpy()
    return shrink_to(network, ~dead_U, weight_optimizer)


def shrink_to(
    network: SparseNetwork,
    units_U: np.ndarray,
    optimizer: torch.optim.Optimizer | None = None,
    keep_fallback: bool = True,
) -> int:
    """Cuts parameters, running statistics and optimizer state down to the channels of some units.

    Compact execution only.

    Args:
        units_U: (U,) bool, the units to keep; those that were cut before stay cut.
        optimizer: of the weights; its state per parameter is cut alike.
        keep_fallback: also keep the first stored unit of every vital group: it is what the layer guard falls back to
            when all scores of the group are 0. Off if `units_U` has a unit of each.
    Returns: how many units were cut.
    """
    keep_U = units_U & network.stored_units
    for group in network.vital_groups if keep_fallback else ():
        keep_U[group[0]] = True
    num_cut = int((network.stored_units & ~keep_U).sum())
    if num_cut == 0:
        return 0
    before = network.stored
    after = network.graph.live_channels(keep_U)
    kept = [
        torch.from_numpy(np.flatnonzero(new[old])).to(network.device) for old, new in zip(before, after, strict=True)
    ]
    for op in _layers(network):
        module, reads, writes = op.module, _source(network, op), op.space
        per_channel = network.graph.columns_per_channel(op) if op.kind == "linear" else 1
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name == "shared_scores" or tensor.dim() == 0:
                continue
            rows = kept[writes]
            mixes = tensor.dim() > 1 and op.kind != "depthwise"
            columns = columns_of(kept[reads], per_channel) if mixes else None
            state = {} if optimizer is None else optimizer.state.get(tensor, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == tensor.shape:
                    state[key] = _cut(value, rows, columns)
            tensor.data = _cut(tensor.data, rows, columns)
            if isinstance(tensor, nn.Parameter):
                tensor.grad = None
    network.stored_units, network.stored, network.shapes = keep_U, after, None
    return num_cut


def _layers(network: SparseNetwork) -> list[Op]:
    """One op for each layer with parameters.

    Raises: ValueError for a layer that runs more than once, on different channels.
    """
    first_runs: dict[nn.Module, Op] = {}
    for op in network.graph.ops:
        if op.kind in ("conv", "depthwise", "norm", "linear"):
            first = first_runs.setdefault(op.module, op)
            if (_source(network, first), first.space) != (_source(network, op), op.space):
                raise ValueError(f"{op.node.target} runs on different channels; its units cannot leave it")
    return list(first_runs.values())


def _source(network: SparseNetwork, op: Op) -> int:
    return network.graph.ops[op.inputs[0]].space


def _cut(tensor: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
    cut = tensor.index_select(0, rows)
    if columns is not None:
        cut = cut.index_select(1, columns)
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return cut.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
