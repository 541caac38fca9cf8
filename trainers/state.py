"""Everything a run carries from step to step, as one object that a checkpoint can hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from args import Config, config_to_dict
from data import DataSplits
from models import build_model
from trainers.default import Draw, SearchState, draw_masks, num_masks
from utils.checkpoint import generator_states, restore_generators
from utils.errors import UserError
from utils.metrics import CostLedger, MetricSums
from utils.network import SparseNetwork
from utils.pretrained import load_pretrained
from utils.retirement import store_only
from utils.subnet import Subnet

MASK_STREAM, CANDIDATE_STREAM = 1, 2  # independent random streams of one seed


@dataclass
class Best:
    """The state with the best held-out accuracy so far: what is reported, and stored as best.pt."""

    subnet: Subnet
    epoch: int
    heldout: dict[str, float]
    test: dict[str, float]


@dataclass
class RunState:
    """The run between two steps.

    Attributes:
        phase: "search", "finetune", "dense" or "done".
        epoch: finished epochs of all phases.
        step: finished steps of the epoch under way.
        subnet: the fixed subnet that is fine-tuned; None during the search.
        sums, epoch_cost, epoch_seconds: training metrics, arithmetic and time of the epoch under way.
        train_seconds: time of the training steps of all finished epochs.
        seconds: time of everything else (choosing, evaluating).
        choice: how the candidates did when the subnet was chosen.
    """

    network: SparseNetwork
    weight_optimizer: torch.optim.Optimizer
    search: SearchState | None
    phase: str
    epoch: int = 0
    step: int = 0
    subnet: Subnet | None = None
    best: Best | None = None
    sums: MetricSums = field(default_factory=MetricSums)
    epoch_cost: CostLedger = field(default_factory=CostLedger)
    ledger: CostLedger = field(default_factory=CostLedger)
    epoch_seconds: float = 0.0
    train_seconds: float = 0.0
    seconds: float = 0.0
    choice: dict[str, float] = field(default_factory=dict)

    def start_finetuning(self, config: Config, subnet: Subnet) -> None:
        """Fixes the subnet: its batch-norm statistics become the network's, its weights get a fresh optimizer."""
        self.phase, self.subnet, self.search = "finetune", subnet, None
        for name, norm in self.network.batch_norms().items():
            norm.running_mean.copy_(subnet.statistics[name][0])
            norm.running_var.copy_(subnet.statistics[name][1])
        self.weight_optimizer = make_weight_optimizer(self.network, config, config.finetune.finetune_lr)

    def model_state(self, config: Config, fingerprint: str) -> dict[str, Any]:
        """What evaluation needs, whatever else a checkpoint holds."""
        return {
            "config": config_to_dict(config),
            "fingerprint": fingerprint,
            "phase": self.phase,
            "epoch": self.epoch,
            "model": self.network.model.state_dict(),
            "stored_units": torch.from_numpy(self.network.stored_units),
        }

    def state_dict(self, config: Config, fingerprint: str) -> dict[str, Any]:
        """Everything: a run restored from it goes on as if it had never stopped."""
        state = self.model_state(config, fingerprint)
        state |= {
            "step": self.step,
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "subnet": self.subnet and self.subnet.state_dict(),
            "best": self.best and {**vars(self.best), "subnet": self.best.subnet.state_dict()},
            "sums": self.sums.state_dict(),
            "epoch_cost": self.epoch_cost.state_dict(),
            "ledger": self.ledger.state_dict(),
            "clocks": [self.epoch_seconds, self.train_seconds, self.seconds],
            "choice": self.choice,
            "search": None,
        }
        if self.search is not None:
            state["search"] = {
                "score_optimizer": self.search.score_optimizer.state_dict(),
                "generators": generator_states({"masks": self.search.generator}),
                "masks": self.search.draw.masks_KU,
                "pass_masks": torch.from_numpy(np.stack([plan.mask_U for plan in self.search.draw.plans])),
            }
        return state

    def load_state_dict(self, state: dict[str, Any], config: Config) -> None:
        device = self.network.device
        load_model_state(self.network, state)
        self.phase, self.epoch, self.step = state["phase"], state["epoch"], state["step"]
        if state["subnet"] is not None:
            self.subnet = Subnet.from_state_dict(state["subnet"], device)
        if state["best"] is not None:
            best = {**state["best"], "subnet": Subnet.from_state_dict(state["best"]["subnet"], device)}
            self.best = Best(**best)
        if self.phase == "finetune":
            self.weight_optimizer = make_weight_optimizer(self.network, config, config.finetune.finetune_lr)
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.sums.load_state_dict(state["sums"], device)
        self.epoch_cost = CostLedger(**state["epoch_cost"])
        self.ledger = CostLedger(**state["ledger"])
        self.epoch_seconds, self.train_seconds, self.seconds = state["clocks"]
        self.choice = state["choice"]
        if state["search"] is None:
            self.search = None
            return
        search = state["search"]
        self.search.score_optimizer.load_state_dict(search["score_optimizer"])
        restore_generators({"masks": self.search.generator}, search["generators"])
        plans = [self.network.plan(mask_U) for mask_U in search["pass_masks"].numpy()]
        self.search.draw = Draw(search["masks"].to(device), plans)


def load_model_state(network: SparseNetwork, state: dict[str, Any]) -> None:
    """Weights and scores of a checkpoint, into a fresh network that is first cut down as the stored one was."""
    store_only(network, state["stored_units"].numpy())
    network.model.load_state_dict(state["model"])


def make_weight_optimizer(network: SparseNetwork, config: Config, learning_rate: float) -> torch.optim.SGD:
    return torch.optim.SGD(
        network.weight_parameters(),
        lr=learning_rate,
        momentum=config.train.momentum,
        weight_decay=config.train.weight_decay,
        nesterov=config.train.nesterov,
        fused=True,  # one kernel for all tensors, on CPU and CUDA alike
    )


def make_score_optimizer(network: SparseNetwork, config: Config) -> torch.optim.Optimizer:
    if config.train.optimizer == "adam":
        return torch.optim.Adam([network.scores], lr=config.train.score_lr)
    return torch.optim.SGD([network.scores], lr=config.train.score_lr, momentum=config.train.momentum)


def make_network(config: Config, data: DataSplits, device: torch.device) -> SparseNetwork:
    """The network with its first weights, which depend on the seed alone."""
    torch.manual_seed(config.run.seed)
    model = build_model(config.model, config.sparsity.score_init, data.num_classes, data.channels)
    if config.model.pretrained is not None:
        load_pretrained(model, config.model.pretrained)
    model = model.to(device, memory_format=torch.channels_last)
    image_shape = (data.channels, data.image_size, data.image_size)
    try:
        sparsity = config.sparsity
        return SparseNetwork(model, image_shape, sparsity.execution, sparsity.semantics, sparsity.stream)
    except ValueError as error:  # such as a pooling that has nothing left to read
        raise UserError(
            f"{config.model.arch} does not fit images of {data.image_size}x{data.image_size} pixels ({error}); "
            "use larger images (--image-size) or another arch"
        ) from error


def new_run(config: Config, data: DataSplits, device: torch.device) -> RunState:
    """A run before its first step."""
    network = make_network(config, data, device)
    weight_optimizer = make_weight_optimizer(network, config, config.train.weight_lr)
    if network.num_units == 0:
        return RunState(network, weight_optimizer, search=None, phase="dense")
    generator = torch.Generator(device).manual_seed(stream_seed(config.run.seed, MASK_STREAM))
    search = SearchState(
        network=network,
        weight_optimizer=weight_optimizer,
        score_optimizer=make_score_optimizer(network, config),
        generator=generator,
        draw=draw_masks(network, generator, num_masks(config.sparsity)),
    )
    return RunState(network, weight_optimizer, search, phase="search")


def stream_seed(seed: int, stream: int) -> int:
    """A seed for one purpose; SeedSequence keeps the streams of neighbouring seeds apart."""
    return int(np.random.SeedSequence(entropy=seed, spawn_key=(stream,)).generate_state(1, np.uint64)[0] >> 1)
