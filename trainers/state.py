"""Everything a run carries from step to step, as one object that a checkpoint can hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from args import Config, config_to_dict
from data import DataSplits
from models import build_model
from models.pretrained import load_pretrained
from trainers.default import SearchState, draw_masks, estimator_of, first_memory, how_to_draw, stored_draw
from trainers.methods import method_of
from trainers.methods.base import check_budget
from utils.algorithm.optimizer import FusedSGD
from utils.channels.cost import constant_score
from utils.channels.network import SparseNetwork
from utils.channels.norms import GateReader
from utils.channels.plan import Plan
from utils.channels.shrink import store_only
from utils.channels.subnet import Subnet
from utils.errors import UserError
from utils.run.checkpoint import generator_states, restore_generators
from utils.run.metrics import CostLedger, MetricSums
from utils.seeds import COIN_STREAM, GAUGE_STREAM, MASK_STREAM, stream_seed


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
        phase: "search", "finetune", "done"; of methods without a search "dense" or "train" instead of the first two.
        epoch: finished epochs of all phases.
        step: finished steps of the epoch under way.
        subnet: the fixed subnet that is trained; None during a search and for a dense network.
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
    _fixed: tuple[tuple[Subnet, object], Plan] | None = None  # the last fixed plan, and what it was made from

    @property
    def fixed_plan(self) -> Plan:
        """What ordinary steps train: the fixed subnet, else the whole network."""
        if self.subnet is None:
            return self.network.dense_plan
        made_from = self.subnet, self.network.stored
        if self._fixed is None or any(one is not other for one, other in zip(self._fixed[0], made_from, strict=True)):
            self._fixed = made_from, self.network.plan(self.subnet.mask_U)
        return self._fixed[1]

    def start_finetuning(self, config: Config, subnet: Subnet) -> None:
        """Fixes the subnet: its batch-norm statistics become the network's, its weights get a fresh optimizer."""
        self.phase, self.subnet, self.search = "finetune", subnet, None
        for name, norm in self.network.batch_norms().items():
            norm.running_mean.copy_(subnet.statistics[name][0])
            norm.running_var.copy_(subnet.statistics[name][1])
        self.weight_optimizer = make_weight_optimizer(self.network, config, config.finetune.finetune_lr)

    def replicated(self) -> dict[str, Tensor]:
        """What is the same on all ranks, by name: weights, statistics, scores, state of the optimizers, masks."""
        tensors, optimizers = dict(self.network.model.state_dict()), [self.weight_optimizer]
        if self.search is not None:
            optimizers.append(self.search.score_optimizer)
            if self.search.draw is not None:
                tensors["masks"] = self.search.draw.drawn
            if self.search.memory is not None:
                tensors |= {f"{key} of the estimator": value for key, value in vars(self.search.memory).items()}
        for optimizer in optimizers:
            for number, state in optimizer.state_dict()["state"].items():
                named = {f"{key} {number} of {type(optimizer).__name__}": value for key, value in state.items()}
                tensors |= {name: value for name, value in named.items() if isinstance(value, Tensor)}
        return tensors

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
                "generators": generator_states(self.search_generators()),
                "masks": self.search.draw and self.search.draw.drawn,
                "memory": self.search.memory and dict(vars(self.search.memory)),
            }
        return state

    def search_generators(self) -> dict[str, torch.Generator]:
        named = {"masks": self.search.generator, "coin": self.search.coin, "gauge": self.search.gauge}
        return {name: generator for name, generator in named.items() if generator is not None}

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
        restore_generators(self.search_generators(), search["generators"])
        if self.search.memory is not None:
            memory = {key: value.to(device) for key, value in search["memory"].items()}
            self.search.memory = type(self.search.memory)(**memory)
        if self.search.draw is None:
            return
        count, drawing, sample = how_to_draw(config.sparsity)
        if len(search["masks"]) == drawing * count:
            self.search.draw = stored_draw(self.network, search["masks"].to(device), count)
        else:  # each rank drew masks of its own, and now there are more ranks or fewer
            self.search.draw = draw_masks(self.network, self.search.generator, count, drawing, sample)


def load_model_state(network: SparseNetwork, state: dict[str, Any]) -> None:
    """Weights and scores of a checkpoint, into a fresh network that is first cut down as the stored one was."""
    store_only(network, state["stored_units"].numpy())
    network.model.load_state_dict(state["model"])


def make_weight_optimizer(network: SparseNetwork, config: Config, learning_rate: float) -> FusedSGD:
    return FusedSGD(
        network.weight_parameters(),
        lr=learning_rate,
        momentum=config.train.momentum,
        weight_decay=config.train.weight_decay,
        nesterov=config.train.nesterov,
    )


def make_score_optimizer(network: SparseNetwork, config: Config) -> torch.optim.Optimizer:
    if config.train.optimizer == "adam":
        return torch.optim.Adam([network.scores], lr=config.train.score_lr)
    return torch.optim.SGD([network.scores], lr=config.train.score_lr, momentum=config.train.momentum)


def make_network(config: Config, data: DataSplits, device: torch.device) -> SparseNetwork:
    """The network with its first weights, which depend on the seed alone."""
    torch.manual_seed(config.run.seed)
    model = build_model(config.model, config.sparsity.score_init, data.num_classes, data.channels, data.image_size)
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


def start_within_budget(network: SparseNetwork, config: Config) -> None:
    """Sets the first scores where they depend on the network: a budget of params or flops.

    Raises: UserError for a budget that no subnet meets, or first scores that exceed it.
    """
    check_budget(network, config)
    sparsity = config.sparsity
    cost = network.expected_cost(sparsity.budget)
    budget = sparsity.keep_ratio * cost.dense
    if sparsity.budget_schedule == "cubic":  # starts with a budget of everything
        return
    largest = constant_score(cost, budget)
    if sparsity.score_init_constant is None:
        network.scores.data.fill_(largest)
    elif sparsity.score_init_constant > largest:
        raise UserError(
            f"score_init_constant {sparsity.score_init_constant:g} would overspend the budget, keep_ratio "
            f"{sparsity.keep_ratio:g} of the {sparsity.budget}; pass --score-init-constant {0.999 * largest:.4g} or "
            "less, leave it out, or pass --budget-schedule cubic"
        )


def new_run(config: Config, data: DataSplits, device: torch.device) -> RunState:
    """A run before its first step."""
    network = make_network(config, data, device)
    method = method_of(config)
    first_mask_U = method.start(network, config)
    run = RunState(
        network,
        make_weight_optimizer(network, config, config.train.weight_lr),
        search=None,
        phase=method.first_phase,
        subnet=None if first_mask_U is None else Subnet(first_mask_U, statistics={}),
    )
    if method.has_scores:
        run.search = new_search(run, config)
    return run


def new_search(run: RunState, config: Config) -> SearchState:
    """Scores with their optimizer and random streams, and the first draw."""
    network, method = run.network, method_of(config)

    def generator(stream: int) -> torch.Generator:
        return torch.Generator(network.device).manual_seed(stream_seed(config.run.seed, stream))

    if config.sparsity.budget != "channels":
        start_within_budget(network, config)
    gate_reader = GateReader(network) if estimator_of(config.sparsity).reads_gates else None
    if config.sparsity.estimator == "taylor" and not gate_reader.readable_U.all():
        raise UserError(
            f"estimator taylor cannot judge {int((~gate_reader.readable_U).sum())} of {network.num_units} units of "
            f"{config.model.arch}: no batch-norm of their own is behind them; pass another --estimator or --arch"
        )
    masks = generator(MASK_STREAM)
    return SearchState(
        network=network,
        weight_optimizer=run.weight_optimizer,
        score_optimizer=make_score_optimizer(network, config),
        generator=masks,
        draw=draw_masks(network, masks, *how_to_draw(config.sparsity)) if method.draws_masks else None,
        coin=generator(COIN_STREAM) if method.tosses else None,
        gauge=generator(GAUGE_STREAM) if config.sparsity.gauge_every else None,
        memory=first_memory(network.scores, config.sparsity) if method.draws_masks else None,
        gate_reader=gate_reader,
    )
