"""What a run knows between two steps: data only. `trainers/build.py` makes it, and a checkpoint holds it.

Legend: U maskable units of the network, K masks drawn in one step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from args import Config, config_to_dict
from data import DataSplits
from trainers.replay import Replay
from utils.algorithm.average import lent, move_average
from utils.algorithm.decision import Decision
from utils.algorithm.estimators.base import Estimator
from utils.algorithm.transfer import HostCopy
from utils.channels.budget import Budget
from utils.channels.network import SparseNetwork
from utils.channels.norms import GateReader
from utils.channels.plan import Plan
from utils.channels.subnet import Subnet
from utils.run.metrics import CostLedger, MetricSums


@dataclass(frozen=True)
class Masks:
    """The masks of one step, drawn at the end of the step before.

    Attributes:
        own_KU: (K, U) bool on the device, of this rank.
        drawn: the masks of all ranks in their order, the same on each of them; `own_KU` itself where ranks share masks.
        on_host: a copy of `own_KU`.
        scores: (U,) the scores that they were drawn from, on the host; None if the host does not know them.
    """

    own_KU: Tensor
    drawn: Tensor
    on_host: HostCopy
    scores: Tensor | None = None

    @property
    def shared(self) -> bool:
        """Whether all ranks have the same masks."""
        return self.drawn is self.own_KU

    def plans(self, network: SparseNetwork) -> list[Plan]:
        """The channels that each mask leaves, with the layer guard applied. May wait for the device."""
        return network.plans(self.on_host.read().numpy())


@dataclass
class Search:
    """What the search of scores reads and changes in every step.

    Attributes:
        generator: of the masks; on the host where the budget is met there, otherwise on the device of the scores.
        masks: of the next step; None for a method that draws none.
        estimator: of the score gradient; None for a method that needs none.
        gate_reader: for an estimator that learns from gates.
        replay: what records the steps and replays them; None where they run as they are.
    """

    network: SparseNetwork
    budget: Budget
    weight_optimizer: torch.optim.Optimizer
    score_optimizer: torch.optim.Optimizer
    generator: torch.Generator
    masks: Masks | None = None
    estimator: Estimator | None = None
    gate_reader: GateReader | None = None
    replay: Replay | None = None


@dataclass(frozen=True)
class Best:
    """The state with the best held-out accuracy so far: what is reported, and stored as best.pt.

    Attributes:
        subnet: that it is best with.
        content: of best.pt, on the host. Training goes on without changing it.
    """

    subnet: Subnet
    content: dict[str, Any]

    @classmethod
    def from_content(cls, content: dict[str, Any], device: torch.device) -> Best:
        return cls(Subnet.from_state_dict(content["subnet"], device), content)

    @property
    def epoch(self) -> int:
        return self.content["epoch"]

    @property
    def heldout(self) -> dict[str, float]:
        return self.content["heldout"]

    @property
    def test(self) -> dict[str, float]:
        return self.content["test"]


class ScoreHistory:
    """The scores before the first step and after every epoch of a search, on the host and in half precision.

    Attributes:
        epochs: finished epochs at each time.
        scores: (E, U) float16; empty, with E = 0, for a method without scores.
    """

    def __init__(self, num_units: int) -> None:
        self.epochs: list[int] = []
        self.scores = torch.empty(0, num_units, dtype=torch.float16)

    def add(self, epoch: int, scores_U: Tensor) -> None:
        """Remembers the scores (U,) of now. Waits for the device."""
        row = scores_U.detach().to("cpu", torch.float16).unsqueeze(0)
        self.epochs, self.scores = [*self.epochs, epoch], torch.cat([self.scores, row])

    def state_dict(self) -> dict:
        return {"epochs": self.epochs, "scores": self.scores}

    def load_state_dict(self, state: dict) -> None:
        self.epochs, self.scores = state["epochs"], state["scores"].cpu()


@dataclass
class RunState:
    """The run between two steps.

    Attributes:
        phase: "search", "finetune", "done"; of methods without a search "dense" or "train" instead of the first two.
        plan: what ordinary steps train: the channels of the fixed subnet, or of the whole network.
        subnet: the fixed subnet that is trained; None during a search and for a dense network.
        epoch: finished epochs of all phases.
        step: finished steps of the epoch under way.
        start_share: what the network that the run started from was of the whole one, in what the budget counts; below 1
            for the subnet of another run. A falling budget falls from there.
        steps: finished steps of all phases, the horizontal axis of all curves.
        at_last_point: sums of the training metrics when the last point of the curves was written in this epoch.
        sums, epoch_cost, epoch_seconds: training metrics, arithmetic and time of the epoch under way.
        data_seconds: the part of `epoch_seconds` in which the loop waited for its next batch.
        train_seconds: time of the training steps of all finished epochs.
        seconds: time of everything else in the recipe (evaluating, choosing, reporting, saving).
        cpu_seconds: processor time of the training steps, of all threads of this process.
        top_U: (U,) bool, the units that the search would have kept at the end of the last epoch; None before.
        decision: how far the search was from its end when the last epoch ended.
        decided: whether the search has ended because its scores are decided (`--search-until decided`).
        choice: how the candidates did when the subnet was chosen.
        history: one row for every finished epoch, the content of results.csv.
        average: with `--ema` the moving averages of weights and batch-norm statistics, by name, from the first step of
            a fixed network on. They are what is evaluated and stored as the result.
        importance: (U,) what a method has learnt of the units in the steps of the epoch under way, or of the last one;
            None for a method that learns nothing beside scores.
        score_history: the scores at the end of every epoch, the content of scores.npz.
    """

    network: SparseNetwork
    budget: Budget
    weight_optimizer: torch.optim.Optimizer
    phase: str
    plan: Plan
    search: Search | None = None
    subnet: Subnet | None = None
    epoch: int = 0
    step: int = 0
    start_share: float = 1.0
    steps: int = 0
    at_last_point: dict[str, float] = field(default_factory=dict)
    best: Best | None = None
    sums: MetricSums = field(default_factory=MetricSums)
    epoch_cost: CostLedger = field(default_factory=CostLedger)
    ledger: CostLedger = field(default_factory=CostLedger)
    epoch_seconds: float = 0.0
    data_seconds: float = 0.0
    train_seconds: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    top_U: np.ndarray | None = None
    decision: Decision | None = None
    decided: bool = False
    choice: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    average: dict[str, Tensor] | None = None
    importance: Tensor | None = None
    score_history: ScoreHistory = field(init=False)

    def __post_init__(self) -> None:
        self.score_history = ScoreHistory(self.network.num_units)

    def batch_size(self, config: Config) -> int:
        """Images of a step of the current phase."""
        return config.finetune_batch_size if self.phase == "finetune" else config.train.batch_size

    def num_epochs(self, config: Config) -> int:
        """Finished epochs at the end of the current phase."""
        if self.phase != "search":
            return config.total_epochs
        return self.epoch if self.decided else config.search_epochs

    def move_average(self, decay: float) -> None:
        """Follows a step of the weights."""
        self.average = move_average(self.average, self.network.moving_tensors(), decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Lends the averaged weights and statistics to the network. Without an average it stays as it is."""
        with lent(self.network.moving_tensors(), self.average or {}):
            yield

    def replicated(self) -> dict[str, Tensor]:
        """What is the same on all ranks, by name: weights, statistics, scores, state of the optimizers, masks."""
        tensors, optimizers = dict(self.network.model.state_dict()), [self.weight_optimizer]
        tensors |= {f"average of {name}": value for name, value in (self.average or {}).items()}
        if self.importance is not None:
            tensors["importance"] = self.importance
        if self.search is not None:
            optimizers.append(self.search.score_optimizer)
            if self.search.masks is not None:
                tensors["masks"] = self.search.masks.drawn
            if self.search.estimator is not None:
                remembered = self.search.estimator.state_dict()
                tensors |= {f"{key} of the estimator": value for key, value in remembered.items()}
        for optimizer in optimizers:
            for number, state in optimizer.state_dict()["state"].items():
                named = {f"{key} {number} of {type(optimizer).__name__}": value for key, value in state.items()}
                tensors |= {name: value for name, value in named.items() if isinstance(value, Tensor)}
        return tensors

    def score_record(self) -> dict[str, np.ndarray]:
        """The content of scores.npz; empty for a network without maskable units.

        Returns:
            epochs: (E,) int64, finished epochs at each time; 0 is the state before the first step.
            scores: (E, U) float16; no rows for a method without scores.
            names, first_unit, widths: (L,) of the maskable layers in their order. Unit i of the network is channel
                i - first_unit of its layer; layers with tied masks have the same units.
            chosen: (U,) bool, the units of the fixed subnet; only once there is one.
        """
        network = self.network
        if network.num_units == 0:
            return {}
        record = {
            "epochs": np.array(self.score_history.epochs, dtype=np.int64),
            "scores": self.score_history.scores.numpy(),
            "names": np.array(list(network.layers)),
            "first_unit": np.array([network.graph.first_unit[name] for name in network.layers], dtype=np.int64),
            "widths": np.array([layer.out_channels for layer in network.layers.values()], dtype=np.int64),
        }
        if self.subnet is not None:
            record["chosen"] = network.plan(self.subnet.mask_U).mask_U
        return record

    def model_state(self, config: Config, data: DataSplits) -> dict[str, Any]:
        """What evaluation needs, whatever else a checkpoint holds; also on images that were not trained on."""
        return {
            "config": config_to_dict(config),
            "fingerprint": data.fingerprint,
            "contents": data.contents,
            "images": data.facts(),
            "phase": self.phase,
            "epoch": self.epoch,
            "model": self.network.model.state_dict(),
            "stored_units": torch.from_numpy(self.network.stored_units),
        }

    def remember_best(
        self, config: Config, data: DataSplits, subnet: Subnet, heldout: dict[str, float], test: dict[str, float]
    ) -> None:
        """Makes the state of now the result: the weights, or their average, with the subnet that they are best with.

        Beside its configuration this is all that somebody needs who takes the network home: the widths of its layers
        (kept output channels by name), the images that it reads, how accurate it is, and the epoch that it is from.
        """
        network, stored = self.network, self.model_state(config, data)
        content = {
            **stored,
            "model": {**stored["model"], **(self.average or {})},
            "widths": network.graph.layer_widths(network.plan(subnet.mask_U).counts),
            "subnet": subnet.state_dict(),
            "heldout": heldout,
            "test": test,
        }
        self.best = Best(subnet, _on_host(content))

    def first_not_finite(self) -> str | None:
        """The name of the first tensor of a checkpoint that is not finite, or None. Waits for the device.

        Weights, statistics, scores, averages, memories of optimizers and estimator, and the result's statistics.
        """
        tensors = self.replicated()
        for name, pair in self.best.subnet.statistics.items() if self.best else ():
            tensors |= {f"{name}.{key} of the result": value for key, value in zip(("mean", "var"), pair, strict=True)}
        flags: dict[torch.device, list[Tensor]] = {}  # Adam counts its steps on the host
        for value in tensors.values():
            flags.setdefault(value.device, []).append(value.isfinite().all())
        if all(torch.stack(of_device).all() for of_device in flags.values()):
            return None
        return next(name for name, value in tensors.items() if not value.isfinite().all())

    def state_dict(self, config: Config, data: DataSplits) -> dict[str, Any]:
        """Everything. A run restored from it goes on as if it had never stopped."""
        return {
            **self.model_state(config, data),
            "step": self.step,
            "start_share": self.start_share,
            "steps": self.steps,
            "at_last_point": self.at_last_point,
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "subnet": self.subnet and self.subnet.state_dict(),
            "best": self.best and self.best.content,
            "sums": self.sums.state_dict(),
            "epoch_cost": self.epoch_cost.state_dict(),
            "ledger": self.ledger.state_dict(),
            "clocks": [self.epoch_seconds, self.train_seconds, self.seconds, self.data_seconds, self.cpu_seconds],
            "top_units": None if self.top_U is None else torch.from_numpy(self.top_U),
            "decided": self.decided,
            "choice": self.choice,
            "history": self.history,
            "average": self.average,
            "importance": self.importance,
            "score_history": self.score_history.state_dict(),
            "search": None if self.search is None else _search_state(self.search),
        }


def _on_host(value: Any) -> Any:
    """A copy of a nested state whose tensors are on the host, and in no other one's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, _on_host(entry)) for key, entry in value.items())
    return [_on_host(entry) for entry in value] if isinstance(value, list) else value


def _search_state(search: Search) -> dict[str, Any]:
    return {
        "score_optimizer": search.score_optimizer.state_dict(),
        "generator": search.generator.get_state(),
        "masks": search.masks and search.masks.drawn,
        "estimator": search.estimator and search.estimator.state_dict(),
        "slots": search.network.shapes and search.network.shapes.slots,
    }
