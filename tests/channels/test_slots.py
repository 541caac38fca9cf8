"""Tensors that share their slots with the sum that they enter: when, and that nothing but the shapes changes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.channels.passes import EXACT, MASKS, assert_same, run_network
from tests.channels.test_joined_maps import toy_network
from tests.toy import NETWORKS, flat_mask, one_thread, plain_net, sparse_network  # noqa: F401
from utils.channels.network import SparseNetwork
from utils.channels.slots import SPREADING, joined_spaces, slot_hosts

NEVER, ALWAYS = 0, 10**9


def network_of(kind: str = "preactivation", execution: str = "compact", multiple: int = 2) -> SparseNetwork:
    return sparse_network(plain_net(kind), NETWORKS[kind].LAYERS, execution, multiple=multiple)


def space_of(network: SparseNetwork, name: str) -> int:
    """The space of what a layer writes."""
    (op,) = [op for op in network.graph.ops if op.node.target == name]
    return op.space


@pytest.mark.parametrize("spreading", [NEVER, ALWAYS])
@pytest.mark.parametrize("kind", ["released", "preactivation", "mixed"])
def test_shared_or_not_a_pass_is_that_of_the_masked_reference(kind, spreading, monkeypatch):
    monkeypatch.setitem(SPREADING, "fp32", spreading)
    spread = 0
    for case in list(MASKS[kind].values())[::3]:
        mask_U, network = flat_mask(NETWORKS[kind].LAYERS, case, seed=5), network_of(kind)
        spread += sum(len(positions) > 0 for positions in network.plan(mask_U).positions.values())
        expected = run_network(network_of(kind, "masked"), mask_U, True)
        assert_same(run_network(network, mask_U, True), expected, **EXACT)
    assert (spread == 0) == (spreading == ALWAYS)


@pytest.mark.parametrize("spreading", [NEVER, ALWAYS])
def test_sums_of_concatenations_keep_slots_of_their_own(spreading, monkeypatch):
    monkeypatch.setitem(SPREADING, "fp32", spreading)
    network, masked = toy_network("compact", 2)[1], toy_network("masked")[1]
    random = np.random.default_rng(0)
    for _ in range(6):
        mask_U = random.random(network.num_units) < 0.6
        assert_same(run_network(network, mask_U, True), run_network(masked, mask_U, True), **EXACT)


def test_a_tensor_shares_slots_where_they_cost_less_than_spreading_it():
    """stem (3x3 from 3 channels) enters the first sum of the stream, and is read by the first conv of a branch."""
    network = network_of()
    stem, branch = space_of(network, "stem"), space_of(network, "block1.conv1")
    widths = [6] * len(network.graph.spaces)
    widths[stem], widths[branch], widths[network.graph.ops[0].space] = 2, 3, 3
    # 4 additional slots: per pixel 9 x 3 products to write each, 9 x 3 to read it, and what is done element by element
    least = 4 * (9 * 3 + 9 * 3) / (6 - 4)
    hosts = [slot_hosts(network.graph, widths, spreading)[stem] for spreading in (int(least), int(least) + 1)]
    assert hosts[0] == stem != hosts[1]
    assert widths[hosts[1]] == 6


def test_the_sum_of_a_sum_lends_its_slots_and_an_empty_tensor_takes_none():
    network = network_of()
    chain = [space_of(network, "stem")]
    for inner, outer in joined_spaces(network.graph):
        if inner == chain[-1]:
            chain.append(outer)
    assert len(chain) == 3
    widths = [2] * len(network.graph.spaces)
    assert {slot_hosts(network.graph, widths, NEVER)[space] for space in chain} == {chain[-1]}
    widths[chain[0]] = 0
    assert slot_hosts(network.graph, widths, ALWAYS)[chain[0]] == chain[0]


def test_where_nothing_is_padded_no_tensor_has_a_slot_too_many(monkeypatch):
    monkeypatch.setitem(SPREADING, "fp32", ALWAYS)
    network = network_of(multiple=1)
    plan = network.plan(flat_mask(NETWORKS["preactivation"].LAYERS, {}, seed=5))
    assert plan.widths == [s.width if s.full else n for s, n in zip(network.graph.spaces, plan.counts, strict=True)]
    assert any(lives is None for lives in plan.alive)
