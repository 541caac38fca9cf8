"""One fraction for all layers: how wide a network is that is thinned without asking which layer needs what."""

from __future__ import annotations

import numpy as np

from args import Config
from utils.channels.network import SparseNetwork
from utils.errors import UserError


def uniform_mask(network: SparseNetwork, values_U: np.ndarray, keep_ratio: float, config: Config) -> np.ndarray:
    """The units of highest value of every layer: round(fraction * width) of each, at least one (ties: the lowest).

    With a budget of channels the fraction is `keep_ratio`. With one of params or flops it is the largest whose network
    is within the budget; then layers that were rounded down get one unit more, where that still fits. Layers whose
    results are added keep equally many units. Of a layer that units have left, at most the rest is kept.

    Args:
        values_U: (U,) float.
        keep_ratio: the budget, as a fraction of what `config` has it count.
    Returns: (U,) bool.
    Raises: UserError for a budget that one unit in each layer exceeds.
    """
    unit, streams = config.sparsity.budget, layers_by_stream(network)
    widths = [layers[0].stop - layers[0].start for layers in streams]
    rank_U = np.empty(network.num_units, dtype=np.int64)  # of a unit in its layer
    for layer in network.unit_groups():
        order = np.argsort(np.where(network.stored_units[layer], -values_U[layer], np.inf), kind="stable")
        rank_U[layer][order] = np.arange(layer.stop - layer.start)

    def counts(fraction: float) -> list[int]:
        return [max(1, round(fraction * width)) for width in widths]

    def mask(kept: list[int]) -> np.ndarray:
        mask_U = np.zeros(network.num_units, dtype=bool)
        for layers, count in zip(streams, kept, strict=True):
            for layer in layers:
                mask_U[layer] = rank_U[layer] < count
        return mask_U & network.stored_units

    if unit == "channels":
        return mask(counts(keep_ratio))
    cost = network.expected_cost(unit)
    budget = (keep_ratio + 1e-12) * cost.dense  # a whole number but for rounding is that number

    def fits(kept: list[int]) -> bool:
        return cost(mask(kept)) <= budget

    if not fits(counts(0)):
        raise UserError(
            f"keep_ratio {keep_ratio:g} of the {unit} is less than {config.model.arch} has with "
            f"one channel in each layer; pass --keep-ratio {1.001 * cost(mask(counts(0))) / cost.dense:.4g} or more"
        )
    if fits(counts(1)):
        return mask(counts(1))
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(counts(middle)) else (low, middle)
    kept = counts(low)
    for i in sorted(range(len(streams)), key=lambda i: kept[i] - low * widths[i]):
        wider = [*kept[:i], kept[i] + 1, *kept[i + 1 :]]
        if kept[i] < widths[i] and fits(wider):
            kept = wider
    return mask(kept)


def layers_by_stream(network: SparseNetwork) -> list[list[slice]]:
    """The units of each layer, layers whose results are added (however indirectly) together."""
    streams = [{layer.start} for layer in network.unit_groups()]
    for segment in {segment for space in network.graph.spaces for segment in space.segments}:
        joined = [stream for stream in streams if stream & segment.writers]
        if len(joined) > 1:
            streams = [stream for stream in streams if stream not in joined] + [set().union(*joined)]
    return [[layer for layer in network.unit_groups() if layer.start in stream] for stream in sorted(streams, key=min)]
