"""Scale, shift and running statistics of all batch-norms of a network, joined so that one gather serves them all.

A pass needs four short vectors of every batch-norm, cut down to its slots. Here those of all batch-norms stand one
behind the other, and behind them one element for slots that hold no channel: scale 0, shift 0, mean 0, variance 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.channels.graph import ChannelGraph, Op
from utils.channels.plan import Plan


class Norms:
    """The batch-norms of a network.

    Attributes:
        ops: all runs of batch-norms, in the order of the forward pass.
        modules: the batch-norms, each once.
        place: of every run in `ops`.
        last_run: where the batch-norm of a run has run before, of those that run more than once.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self.ops = [op for op in graph.ops if op.kind == "norm"]
        self.place = {op.node: place for place, op in enumerate(self.ops)}
        runs = [op.module for op in self.ops]
        self.modules: list[nn.BatchNorm2d] = list(dict.fromkeys(runs))
        earlier = {place: [i for i in range(place) if runs[i] is runs[place]] for place in range(len(runs))}
        self.last_run = {place: runs[-1] for place, runs in earlier.items() if runs}

    def joined(self, first: str, second: str, end: float) -> Tensor:
        """Two vectors of all batch-norms: (2, channels + 1), the last column being 0 and `end`."""
        one, other = ([getattr(norm, name) for norm in self.modules] for name in (first, second))
        zero = one[0].new_zeros(1)
        return torch.cat([*one, zero, *other, zero + end]).view(2, -1)


class NormPass:
    """The batch-norms of one pass.

    Args:
        norms: of the network.
        plan: of the pass.
        update_statistics: whether batch-norms in training mode move the running statistics of live channels.
    """

    def __init__(self, norms: Norms, plan: Plan, update_statistics: bool) -> None:
        self.norms, self.index = norms, plan.norms
        self.widths = [plan.widths[op.space] for op in norms.ops]
        self.moves = update_statistics and any(norm.training for norm in norms.modules)
        if not norms.ops:
            return
        affine = norms.joined("weight", "bias", 0.0).index_select(1, self.index)
        self._affine = affine.view(-1).split(self.widths * 2)
        if self.moves or not all(norm.training for norm in norms.modules):
            with torch.no_grad():
                self._all = norms.joined("running_mean", "running_var", 1.0)
                self._gathered = self._all.index_select(1, self.index)
            self._parts = self._gathered.view(-1).split(self.widths * 2)

    def __call__(self, op: Op, x: Tensor) -> Tensor:
        """Batch-norm of (B, slots, H, W). Slots without a live channel leave it as zero, whatever they held."""
        norm, place, runs = op.module, self.norms.place[op.node], len(self.norms.ops)
        scale, shift = self._affine[place], self._affine[place + runs]
        if norm.training and not self.moves:
            return F.batch_norm(x, None, None, scale, shift, training=True, eps=norm.eps)
        if self.moves and place in self.norms.last_run:  # it goes on from where its last run has come to
            self._keep(self.norms.last_run[place])
            self._take(place)
        # .data, because autograd notes what it is given, and would refuse it once another part has moved
        mean, var = self._parts[place].data, self._parts[place + runs].data
        return F.batch_norm(x, mean, var, scale, shift, norm.training, norm.momentum, norm.eps)

    @torch.no_grad()
    def finish(self) -> None:
        """Gives the batch-norms the running statistics that the pass has moved."""
        if not self.moves:
            return
        self._all.index_copy_(1, self.index, self._gathered)
        for place in self.norms.last_run:  # where a batch-norm runs twice on a channel, the last run counts
            self._keep(place)
        modules = self.norms.modules
        own = [norm.running_mean for norm in modules] + [norm.running_var for norm in modules]
        sizes = [len(vector) for vector in own]
        torch._foreach_copy_(own, self._all[:, :-1].reshape(-1).split(sizes))

    def _columns(self, place: int) -> tuple[Tensor, Tensor]:
        """A run's part of the index, and of the gathered statistics: (w,) and (2, w)."""
        first = sum(self.widths[:place])
        part = slice(first, first + self.widths[place])
        return self.index[part], self._gathered.data[:, part]

    def _keep(self, place: int) -> None:
        index, moved = self._columns(place)
        self._all.index_copy_(1, index, moved)

    def _take(self, place: int) -> None:
        index, moved = self._columns(place)
        moved.copy_(self._all.index_select(1, index))
