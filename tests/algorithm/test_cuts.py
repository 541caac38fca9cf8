"""The smallest cuts: on every small random network, a mask leaves a path if and only if it hits all of them."""

from __future__ import annotations

import random
from itertools import product

import pytest

from utils.algorithm import cuts
from utils.algorithm.cuts import smallest_cuts


def has_path(inputs, layers, is_image, empty) -> bool:
    reached = []
    for reads, own, image in zip(inputs, layers, is_image, strict=True):
        lost = own is not None and own <= empty
        reached.append(not lost and (image or any(reached[i] for i in reads)))
    return reached[-1]


def some_network(seed: int) -> tuple[list, list, list, int]:
    """Of at most seven layers, with joined tensors, constants and layers that share their units."""
    draw = random.Random(seed)
    inputs, layers, count = [()], [None], 0
    for i in range(1, 14):
        inputs.append(tuple(draw.sample(range(i), min(i, draw.choice([0, 1, 1, 1, 2, 2])))))
        own = None
        if inputs[-1] and count < 7 and draw.random() < 0.6:
            own = frozenset({draw.randrange(count) if count and draw.random() < 0.2 else count})
            count = max(count, *(u + 1 for u in own))
        layers.append(own)
    inputs.append(tuple(draw.sample(range(8, 14), 2)))
    return inputs, [*layers, None], [True] + [False] * 14, count


@pytest.mark.parametrize("most", [256, 1])
def test_a_mask_leaves_a_path_if_and_only_if_it_hits_every_cut(most, monkeypatch):
    monkeypatch.setattr(cuts, "MOST_CUTS", most)
    both = set()
    for seed in range(150):
        *network, count = some_network(seed)
        if not has_path(*network, frozenset()):
            continue
        found = smallest_cuts(*network)
        for kept in product((False, True), repeat=count):
            empty = frozenset(unit for unit in range(count) if not kept[unit])
            hit, path = not any(cut <= empty for cut in found), has_path(*network, empty)
            assert path or not hit
            if most == 256:
                assert hit == path
            both.add((hit, path))
    assert both == ({(True, True), (False, False)} if most == 256 else {(True, True), (False, False), (False, True)})


def test_parallel_branches_do_not_multiply_without_end():
    inputs, layers = [()], [None]
    for branch in range(12):
        inputs += [(0,), (len(inputs),), (len(inputs) + 1,)]
        layers += [frozenset({3 * branch + i}) for i in range(3)]
    ends = list(range(3, len(inputs), 3))
    for end in ends:
        inputs.append((end, len(inputs) - 1) if end != 3 else (3,))
        layers.append(None)
    found = smallest_cuts(inputs, layers, [True] + [False] * (len(inputs) - 1))
    assert 0 < len(found) <= cuts.MOST_CUTS
