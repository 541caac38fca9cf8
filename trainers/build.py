"""From a configuration to a run before its first step, and from a checkpoint to the run that it was saved from."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import Any

import torch

from args import ESTIMATORS, Config
from data import DataSplits
from models import build_model, initialise, load_pretrained, maskable_convs
from trainers.default import draw_masks, stored_masks
from trainers.methods import make_method
from trainers.methods.base import Method, check_budget
from trainers.state import Best, RunState, Search
from utils.algorithm.estimators.base import Estimator
from utils.algorithm.optimizer import FusedSGD
from utils.channels.budget import Budget
from utils.channels.network import SparseNetwork
from utils.channels.norms import GateReader
from utils.channels.shrink import shrink_to
from utils.channels.subnet import Subnet
from utils.conv_type import sparsify
from utils.errors import UserError
from utils.run.checkpoint import restore_generator
from utils.run.metrics import CostLedger
from utils.seeds import MASK_STREAM, stream_generator


def make_network(config: Config, data: DataSplits, device: torch.device) -> SparseNetwork:
    """The network with its first weights, which depend on the seed alone.

    Raises: UserError for an arch that does not fit the images, or weights that do not fit the arch.
    """
    torch.manual_seed(config.run.seed)
    options = config.model
    model = build_model(options.arch, data.num_classes, data.channels, data.image_size, options.width_mult)
    initialise(model, options.init, options.mode, options.nonlinearity)
    if config.method != "dense":
        names = maskable_convs(
            model, first_layer_dense=options.first_layer_dense, last_layer_dense=options.last_layer_dense
        )
        sparsify(model, names, config.sparsity.score_init)
    if options.pretrained is not None:
        load_pretrained(model, options.pretrained)
    model = model.to(device, memory_format=torch.channels_last)
    released = config.method == "released"  # it does not read some options that a file may hold for other methods
    try:
        return SparseNetwork(
            model,
            (data.channels, data.image_size, data.image_size),
            execution="released" if released else config.sparsity.execution,
            residual_masks="free" if released else config.sparsity.residual_masks,
            precision=config.train.precision,
        )
    except ValueError as error:  # such as a pooling that has nothing left to read
        raise UserError(
            f"{options.arch} does not fit images of {data.image_size}x{data.image_size} pixels ({error}); "
            "use larger images (--image-size) or another arch"
        ) from error


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


def make_estimator(network: SparseNetwork, config: Config) -> Estimator:
    """The estimator that the configuration names, before the first step."""
    name, alpha = config.sparsity.estimator, config.sparsity.alpha
    name = "vrpge" if config.method == "released" else name
    return pkgutil.resolve_name(ESTIMATORS[name].path)(network.scores.detach(), alpha)


def new_run(config: Config, data: DataSplits, device: torch.device) -> RunState:
    """A run before its first step.

    Raises: UserError for a network or a budget that does not suit the method.
    """
    network = make_network(config, data, device)
    budget = Budget(network, config.sparsity.budget, config.sparsity.constrain_by_layer)
    method = make_method(config)
    first_mask_U = method.start(network, budget)
    run = RunState(
        network,
        budget,
        make_weight_optimizer(network, config, config.train.weight_lr),
        phase=method.first_phase,
        plan=network.dense_plan if first_mask_U is None else network.plan(first_mask_U),
        subnet=None if first_mask_U is None else Subnet(first_mask_U, statistics={}),
    )
    if method.has_scores:
        run.search = new_search(run, method, config)
    return run


def new_search(run: RunState, method: Method, config: Config) -> Search:
    """Scores with their optimizer and random streams, and the first masks."""
    network = run.network
    start_within_budget(network, run.budget, config)
    search = Search(
        network,
        run.budget,
        run.weight_optimizer,
        make_score_optimizer(network, config),
        generator=stream_generator(config.run.seed, MASK_STREAM, network.device),
    )
    if method.draws_masks:
        search.estimator = method.wrapped(make_estimator(network, config), network.device)
        search.masks = draw_masks(search, config)
    if search.estimator is not None and search.estimator.needs_gates:
        search.gate_reader = GateReader(network)
        unreadable = int((~search.gate_reader.readable_U).sum())
        if search.estimator.biased and unreadable:  # there is nothing else to judge them by
            raise UserError(
                f"estimator {config.sparsity.estimator} cannot judge {unreadable} of {network.num_units} units of "
                f"{config.model.arch}: no batch-norm of their own is behind them; pass another --estimator or --arch"
            )
    return search


def start_within_budget(network: SparseNetwork, budget: Budget, config: Config) -> None:
    """Sets the first scores where they depend on the network: for a budget of params or flops.

    Raises: UserError for a budget that no subnet meets, or first scores that exceed it.
    """
    sparsity = config.sparsity
    check_budget(budget, config)
    if budget.unit == "channels" or sparsity.budget_schedule == "cubic":  # a falling budget starts with everything
        return
    largest = budget.largest_score(sparsity.keep_ratio)
    if sparsity.score_init_constant is None:
        network.scores.data.fill_(largest)
    elif sparsity.score_init_constant > largest:
        raise UserError(
            f"score_init_constant {sparsity.score_init_constant:g} would overspend the budget, keep_ratio "
            f"{sparsity.keep_ratio:g} of the {budget.unit}; pass --score-init-constant {0.999 * largest:.4g} or "
            "less, leave it out, or pass --budget-schedule cubic"
        )


def fix_subnet(run: RunState, config: Config, subnet: Subnet) -> None:
    """Starts fine-tuning: the network takes over the subnet's batch-norm statistics and gets a fresh optimizer."""
    run.phase, run.subnet, run.search = "finetune", subnet, None
    for name, norm in run.network.batch_norms().items():
        norm.running_mean.copy_(subnet.statistics[name][0])
        norm.running_var.copy_(subnet.statistics[name][1])
    run.weight_optimizer = make_weight_optimizer(run.network, config, config.finetune.finetune_lr)
    if config.shrinks:
        shrink_to(run.network, subnet.mask_U, run.weight_optimizer)
    run.plan = run.network.plan(subnet.mask_U)


def restore_model(network: SparseNetwork, state: Mapping[str, Any]) -> None:
    """Puts weights and scores of a checkpoint into a fresh network, which is first cut down as the stored one was."""
    shrink_to(network, state["stored_units"].numpy())
    network.model.load_state_dict(state["model"])


def restore_run(run: RunState, state: Mapping[str, Any], config: Config) -> None:
    """Puts a whole checkpoint into a new run of the same configuration."""
    device = run.network.device
    restore_model(run.network, state)
    run.phase, run.epoch, run.step = state["phase"], state["epoch"], state["step"]
    if state["subnet"] is not None:
        run.subnet = Subnet.from_state_dict(state["subnet"], device)
        run.plan = run.network.plan(run.subnet.mask_U)
    if state["best"] is not None:
        run.best = Best(**{**state["best"], "subnet": Subnet.from_state_dict(state["best"]["subnet"], device)})
    if run.phase == "finetune":
        run.weight_optimizer = make_weight_optimizer(run.network, config, config.finetune.finetune_lr)
    run.weight_optimizer.load_state_dict(state["weight_optimizer"])
    run.sums.load_state_dict(state["sums"], device)
    run.epoch_cost = CostLedger(**state["epoch_cost"])
    run.ledger = CostLedger(**state["ledger"])
    run.epoch_seconds, run.train_seconds, run.seconds = state["clocks"]
    run.choice, run.history = state["choice"], state["history"]
    if state.get("average") is not None:
        run.average = {name: value.to(device) for name, value in state["average"].items()}
    if state["search"] is None:
        run.search = None
    else:
        _restore_search(run.search, state["search"], config)


def _restore_search(search: Search, state: Mapping[str, Any], config: Config) -> None:
    search.score_optimizer.load_state_dict(state["score_optimizer"])
    restore_generator(search.generator, state["generator"])
    if search.estimator is not None:
        search.estimator.load_state_dict(state["estimator"])
    if search.masks is not None:
        drawn = state["masks"].to(search.network.device)
        # Where every rank draws masks of its own and their number has changed, the stored masks do not fit.
        fits = len(drawn) == len(search.masks.drawn)
        search.masks = stored_masks(drawn, config) if fits else draw_masks(search, config)
