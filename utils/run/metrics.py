"""Sums that stay on the device until somebody reads them, and the ledger of executed arithmetic."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from utils.ranks.exchange import host_sums, summed

Cost = tuple[int, int]  # multiply-adds of one image, without and with padding


def count_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """How many labels are among the k highest logits: 0-d float on the device.

    Args:
        labels: (B,) class numbers, or (B, classes) weights, of which the heaviest class counts (ties: the lowest).
    """
    if labels.dim() == 2:
        labels = labels.argmax(dim=1)
    k = min(k, logits.shape[1])
    return (logits.topk(k, dim=1).indices == labels.unsqueeze(1)).any(dim=1).sum(dtype=torch.float64)


class MetricSums:
    """Named sums over batches, kept in one float64 vector on the device; reading them is the only synchronisation."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self.count = 0

    def add(self, values: dict[str, Tensor], count: int) -> None:
        """Adds sums over `count` images (values that are means must come multiplied by it)."""
        names = tuple(values)
        total = torch.stack([value.detach().double() for value in values.values()])
        if self._sums is None:
            self._names, self._sums = names, total
        elif names != self._names:
            raise ValueError(f"the metrics changed from {self._names} to {names}")
        else:
            self._sums += total
        self.count += count

    def add_other_ranks(self) -> None:
        """Adds what the other ranks have summed, on all of them; each must have added something."""
        count = torch.tensor(self.count, dtype=torch.float64, device=self._sums.device)
        self._sums, count = summed(self._sums, count)
        self.count = int(count)

    def means(self) -> dict[str, float]:
        """Mean per image; empty before there is one. Waits for the device."""
        if self.count == 0:
            return {}
        return dict(zip(self._names, (self._sums / self.count).tolist(), strict=True))

    def state_dict(self) -> dict:
        return {"names": list(self._names), "sums": self._sums, "count": self.count}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self._names, self.count = tuple(state["names"]), state["count"]
        self._sums = None if state["sums"] is None else state["sums"].to(device)


@dataclass
class CostLedger:
    """Multiply-adds executed so far, against what dense training on the same images would have cost.

    A backward pass counts as two forward passes. Everything that training needed is in `executed`: all forward passes,
    choosing subnets and re-estimating batch-norm included; reporting test accuracy is not. `padded` adds the zero
    channels that compact tensors are padded with.
    """

    executed: int = 0
    padded: int = 0
    dense: int = 0
    forward_ratio_sum: float = 0.0
    forward_passes: int = 0

    def add(self, other: CostLedger) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def of_all_ranks(self) -> CostLedger:
        """The sum of all ranks' ledgers."""
        values = vars(self)
        sums = host_sums(list(values.values()))
        return CostLedger(**{name: type(values[name])(total) for name, total in zip(values, sums, strict=True)})

    def add_step(self, images: int, forward: list[Cost], num_backward: int, dense_macs: int) -> None:
        """One training step: all forward passes run, the first `num_backward` of them also backward."""
        forward_macs, padded_macs = zip(*forward, strict=True)
        self.executed += images * (sum(forward_macs) + 2 * sum(forward_macs[:num_backward]))
        self.padded += images * (sum(padded_macs) + 2 * sum(padded_macs[:num_backward]))
        self.dense += images * 3 * dense_macs
        self.forward_ratio_sum += sum(forward_macs) / dense_macs
        self.forward_passes += len(forward_macs)

    def add_forward(self, images: int, cost: Cost) -> None:
        self.executed += images * cost[0]
        self.padded += images * cost[1]

    @property
    def train_flops_ratio(self) -> float:
        return self.executed / max(1, self.dense)

    @property
    def padded_train_flops_ratio(self) -> float:
        return self.padded / max(1, self.dense)

    @property
    def mean_forward_ratio(self) -> float:
        return self.forward_ratio_sum / max(1, self.forward_passes)

    def state_dict(self) -> dict:
        return asdict(self)
