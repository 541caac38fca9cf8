"""Retirement in the course of a search."""

from __future__ import annotations

from trainers.default import SearchState, redraw_plans
from utils.channels.shrink import stays_zero, store_only


def retire(state: SearchState) -> int:
    """Cuts all units whose scores provably stay 0 out of a running search; returns how many.

    The draw for the next step stays as it is: it was made from these scores and cannot hold such a unit.
    """
    gone = stays_zero(state.network.scores, state.score_optimizer).cpu().numpy()
    num_cut = store_only(state.network, ~gone, state.weight_optimizer)
    if num_cut:
        state.draw = redraw_plans(state.network, state.draw)
    return num_cut
