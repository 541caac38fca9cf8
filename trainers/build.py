"""From a configuration to a run before its first step, and from a checkpoint to the run that it was saved from."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from args import ESTIMATORS, OPTIONS, Config, config_from_dict, config_to_dict
from data import DataSplits
from models import (
    MODELS,
    SubnetOfRun,
    build_model,
    find_choice,
    find_subnet,
    initialise,
    load_pretrained,
    maskable_convs,
    take_over,
)
from trainers.cuda_graphs import make_replay
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
from utils.channels.subnet import Subnet, use_statistics
from utils.choices import is_own
from utils.conv_type import sparsify
from utils.errors import UserError
from utils.options import flag_of, worded
from utils.run.checkpoint import restore_generator
from utils.run.metrics import CostLedger
from utils.run.progress import announce
from utils.seeds import MASK_STREAM, stream_generator

LAYOUT = ("first_layer_dense", "last_layer_dense", "residual_masks")  # decide which units there are
SAME_AS_START = ("arch", "width_mult", *LAYOUT)
SAME_AS_FOUND = (*SAME_AS_START, "budget", "keep_ratio")


def make_network(
    config: Config, data: DataSplits, device: torch.device, stored: Mapping[str, Any] | None = None
) -> SparseNetwork:
    """The network with its first weights, which depend on the seed and on `pretrained` alone.

    Args:
        stored: a checkpoint of the run, if `restore_model` is to put its weights into the network; `pretrained` plays
            no part then.
    Raises: UserError for an arch that does not fit the images, or weights that do not fit the arch or the method.
    """
    torch.manual_seed(config.run.seed)
    options = config.model
    model = build_model(options.arch, data.num_classes, data.channels, data.image_size, options.width_mult)
    if not is_own(options.arch):
        initialise(model, options.init, options.mode, options.nonlinearity)
    source = options.pretrained if stored is None else None
    start = None if source is None else find_subnet(source)
    # a dense run has units only if it trains the channels of a subnet
    starts_from_subnet = start is not None or (stored is not None and len(stored["stored_units"]) > 0)
    if config.method != "dense" or starts_from_subnet:
        names = maskable_convs(
            model, first_layer_dense=options.first_layer_dense, last_layer_dense=options.last_layer_dense
        )
        try:
            sparsify(model, names, config.sparsity.score_init)
        except ValueError as error:
            raise UserError(f"arch {options.arch}: {error}") from error
    if source is not None and start is None:
        load_pretrained(model, source)
    model = model.to(device, memory_format=torch.channels_last)
    # the released and the dense method do not read some options that a file may hold for others
    released, dense = config.method == "released", config.method == "dense"
    try:
        network = SparseNetwork(
            model,
            (data.channels, data.image_size, data.image_size),
            execution="released" if released else "compact" if dense else config.sparsity.execution,
            residual_masks="free" if released else config.sparsity.residual_masks,
            precision=config.train.precision,
            self_check=options.arch not in MODELS,  # ours are tested
        )
    except ValueError as error:  # such as a pooling that has nothing left to read
        if is_own(options.arch):  # it has read such images before
            raise UserError(f"arch {options.arch}: {error}") from error
        raise UserError(
            f"{options.arch} does not fit images of {data.image_size}x{data.image_size} pixels ({error}); "
            "use larger images (--image-size) or another arch"
        ) from error
    if start is not None:
        start_from_subnet(network, start, config)
    return network


def start_from_subnet(network: SparseNetwork, start: SubnetOfRun, config: Config) -> None:
    """Cuts a fresh network down to the subnet of another run, with its weights and statistics: the same function.

    Units keep their places and ratios stay fractions of the whole network. Units that the subnet lacks are gone for
    good.

    Raises: UserError for a method that cannot train such a network, or a subnet of another network.
    """
    if config.method in ("gumbel", "released") or network.execution != "compact":
        what = f"method {config.method}" if config.method in ("gumbel", "released") else "masked execution"
        start.refuse(
            f"{what} computes channels that the subnet does not have; pass --method vrpge, dense, l1, sfp, slimming "
            "or taylor_cut with compact execution, or a checkpoint of a run with --no-shrink, which holds all weights"
        )
    check_same(start, network, config, SAME_AS_START)
    stored_U, mask_U = start.state["stored_units"].numpy(), start.state["subnet"]["mask"].numpy()
    shrink_to(network, stored_U, keep_fallback=False)
    take_over(network.model, start.state["model"], start.source)
    use_statistics(network, Subnet.from_state_dict(start.state["subnet"], network.device))
    shrink_to(network, mask_U, keep_fallback=False)
    announce(f"starting from the subnet of {start.source}: {mask_U.sum()} of {network.num_units} units")


def check_same(start: SubnetOfRun, network: SparseNetwork, config: Config, keys: Iterable[str]) -> None:
    """Raises UserError for other values of options, or other units, than in the run that a subnet is from."""
    for key in keys:
        mine, theirs = config_to_dict(config)[key], start.state["config"].get(key, OPTIONS[key].default)
        if mine != theirs:
            start.refuse(
                f"it was trained with {key} {worded(theirs)}, not {worded(mine)}; pass {flag_of(key)} {worded(theirs)}"
            )
    units = len(start.state["stored_units"])
    if units != network.num_units:
        start.refuse(f"it has {units} units, and this network {network.num_units}; use the same images")


def found_units(network: SparseNetwork, config: Config, data: DataSplits) -> np.ndarray:
    """The units that the run of `widths_of` kept: (U,) bool.

    Raises: UserError for the subnet of another network, of another budget, or for images that make its costs others.
    """
    found = find_choice(config.widths_of)
    check_same(found, network, config, SAME_AS_FOUND)
    mine = {"image_size": data.image_size, "channels": data.channels, "classes": data.num_classes}
    if images := found.state.get("images"):  # an older checkpoint does not know them
        theirs = images | {"classes": len(images["class_names"])}
        differing = [f"{key} {theirs[key]} instead of {value}" for key, value in mine.items() if theirs[key] != value]
        if differing:
            found.refuse(f"it was trained on images of another kind, with {', '.join(differing)}; use the same kind")
    mask_U = found.state["subnet"]["mask"].numpy()
    announce(f"widths of {found.source}: {mask_U.sum()} of {network.num_units} units, with new weights")
    return mask_U


def with_layout_of_start(config: Config) -> Config:
    """The configuration with what decides which units there are, as far as the method does not read it otherwise.

    It is that of the run whose subnet dense training starts from, or whose widths a thin network has.
    """
    start, keys = None, LAYOUT
    if config.widths_of is not None:
        start, keys = find_choice(config.widths_of), ("residual_masks",)
    elif config.method == "dense" and config.model.pretrained:
        start = find_subnet(config.model.pretrained)
    if start is None:
        return config
    theirs = {key: start.state["config"].get(key, OPTIONS[key].default) for key in keys}
    return config_from_dict({**config_to_dict(config), **theirs}, start.source)


# In the released code the option weight_decay is that of Adam on the scores; these two decays are constants.
RELEASED_DECAY_OF_WEIGHTS, RELEASED_DECAY_OF_SCORES_BY_SGD = 5e-4, 1e-6


def make_weight_optimizer(network: SparseNetwork, config: Config, learning_rate: float) -> FusedSGD:
    return FusedSGD(
        network.weight_parameters(),
        lr=learning_rate,
        momentum=config.train.momentum,
        weight_decay=RELEASED_DECAY_OF_WEIGHTS if config.method == "released" else config.train.weight_decay,
        nesterov=config.train.nesterov,
    )


def make_score_optimizer(network: SparseNetwork, config: Config) -> torch.optim.Optimizer:
    train, released = config.train, config.method == "released"
    if train.optimizer == "adam":
        decay = train.weight_decay if released else 0.0
        return torch.optim.Adam([network.scores], lr=train.score_lr, weight_decay=decay)
    decay = RELEASED_DECAY_OF_SCORES_BY_SGD if released else 0.0
    return torch.optim.SGD([network.scores], lr=train.score_lr, momentum=train.momentum, weight_decay=decay)


def make_estimator(network: SparseNetwork, config: Config) -> Estimator:
    """The estimator that the configuration names, before the first step."""
    name, alpha = config.sparsity.estimator, config.sparsity.alpha
    name = "vrpge" if config.method == "released" else name
    return pkgutil.resolve_name(ESTIMATORS[name].path)(network.scores.detach(), alpha)


def new_run(
    config: Config, data: DataSplits, device: torch.device, stored: Mapping[str, Any] | None = None
) -> RunState:
    """A run before its first step.

    Args:
        stored: the checkpoint that `restore_run` is to restore the run from, if there is one.
    Raises: UserError for a network or a budget that does not suit the method.
    """
    network = make_network(config, data, device, stored)
    if config.widths_of is not None:
        units_U = found_units(network, config, data) if stored is None else stored["stored_units"].numpy()
        shrink_to(network, units_U, keep_fallback=False)
    spends = config.sparsity.spend_budget and config.method != "released"
    budget = Budget(network, config.sparsity.budget, config.sparsity.constrain_by_layer, spends)
    method, start_share = make_method(config), 1.0
    if not network.stored_units.all():
        start_share = budget.stored_share()
        if method.first_phase == "search" and config.sparsity.keep_ratio >= start_share:
            raise UserError(
                f"--pretrained {config.model.pretrained}: this subnet is {100 * start_share:.2f} % of the "
                f"{config.sparsity.budget} of the whole network, so keep_ratio {config.sparsity.keep_ratio:g} leaves "
                "nothing to choose; pass a smaller --keep-ratio, or --method dense to train all of the subnet"
            )
    first_mask_U = method.start(network, budget)
    run = RunState(
        network,
        budget,
        make_weight_optimizer(network, config, config.train.weight_lr),
        phase=method.first_phase,
        plan=network.plan(network.stored_units if first_mask_U is None else first_mask_U),
        subnet=None if first_mask_U is None else Subnet(first_mask_U, statistics={}),
        start_share=start_share,
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
        generator=stream_generator(
            config.run.seed, MASK_STREAM, torch.device("cpu") if run.budget.on_host else network.device
        ),
    )
    if config.fixes_shapes:
        network.fix_shapes()
    if method.draws_masks:
        search.estimator = method.wrapped(make_estimator(network, config), network.device)
        search.masks = draw_masks(search, config)
    if search.estimator is not None and search.estimator.needs_gates:
        search.gate_reader = GateReader(network)
        if search.estimator.biased:  # there is nothing else to judge units by
            search.gate_reader.check_sees_all(f"estimator {config.sparsity.estimator}", config.model.arch)
    search.replay = make_replay(search, config)
    return search


def start_within_budget(network: SparseNetwork, budget: Budget, config: Config) -> None:
    """Sets the first scores where they depend on the network: on what its units cost, and on which have left it.

    Raises: UserError for a budget that no subnet meets, or first scores that exceed it.
    """
    sparsity = config.sparsity
    check_budget(budget, config)
    first = sparsity.budget_top if sparsity.budget_schedule == "cubic" else sparsity.keep_ratio
    largest = budget.largest_score(first)
    if sparsity.score_init_constant is None:
        network.scores.data.fill_(largest)
    network.scores.data[torch.from_numpy(~network.stored_units).to(network.device)] = 0
    if sparsity.score_init_constant is not None and sparsity.score_init_constant > largest:
        raise UserError(
            f"score_init_constant {sparsity.score_init_constant:g} would overspend the first budget, {first:g} of the "
            f"{budget.unit}; pass --score-init-constant {0.999 * largest:.4g} or less, leave it out, or raise the "
            f"budget with {'--budget-top' if sparsity.budget_schedule == 'cubic' else '--budget-schedule cubic'}"
        )


def fix_subnet(run: RunState, config: Config, subnet: Subnet) -> None:
    """Starts fine-tuning: the network takes over the subnet's batch-norm statistics and gets a fresh optimizer."""
    run.phase, run.subnet, run.search = "finetune", subnet, None
    use_statistics(run.network, subnet)
    run.weight_optimizer = make_weight_optimizer(run.network, config, config.finetune.finetune_lr)
    if config.shrinks:
        shrink_to(run.network, subnet.mask_U, run.weight_optimizer)
    run.plan = run.network.plan(subnet.mask_U)


def restore_model(network: SparseNetwork, state: Mapping[str, Any]) -> None:
    """Puts weights and scores of a checkpoint into a fresh network, which is first cut down as the stored one was."""
    shrink_to(network, state["stored_units"].numpy(), keep_fallback=False)
    network.model.load_state_dict(state["model"])


def restore_run(run: RunState, state: Mapping[str, Any], config: Config) -> None:
    """Puts a whole checkpoint into a run that was made for it. Its configuration may have grown, see `lengthen`."""
    device = run.network.device
    restore_model(run.network, state)
    run.phase, run.epoch, run.step = state["phase"], state["epoch"], state["step"]
    run.start_share = state.get("start_share", 1.0)
    run.plan = run.network.plan(run.network.stored_units)
    if state["subnet"] is not None:
        run.subnet = Subnet.from_state_dict(state["subnet"], device)
        run.plan = run.network.plan(run.subnet.mask_U)
    if state["best"] is not None:
        run.best = Best.from_content(state["best"], device)
    if run.phase == "finetune":
        run.weight_optimizer = make_weight_optimizer(run.network, config, config.finetune.finetune_lr)
    run.weight_optimizer.load_state_dict(state["weight_optimizer"])
    run.sums.load_state_dict(state["sums"], device)
    run.epoch_cost = CostLedger(**state["epoch_cost"])
    run.ledger = CostLedger(**state["ledger"])
    run.epoch_seconds, run.train_seconds, run.seconds, *later = state["clocks"]
    run.data_seconds, run.cpu_seconds, *_ = *later, 0.0, 0.0  # an older checkpoint has none
    run.decided = state.get("decided", False)
    run.top_U = None if state.get("top_units") is None else state["top_units"].numpy()
    run.choice, run.history = state["choice"], state["history"]
    if state.get("importance") is not None:
        run.importance = state["importance"].to(device)
    if state.get("average") is not None:
        run.average = {name: value.to(device) for name, value in state["average"].items()}
    if "score_history" in state:  # nor does it have these: the curves then start anew, at step 0
        run.steps, run.at_last_point = state["steps"], state["at_last_point"]
        run.score_history.load_state_dict(state["score_history"])
    if state["search"] is None:
        run.search = None
    else:
        _restore_search(run.search, state["search"], config)


def lengthen(run: RunState, config: Config) -> bool:
    """Lets a finished run go on if its configuration has more epochs than it has done; says whether it does.

    Its search stays ended: further epochs train the network that it has ended with.
    """
    if run.phase != "done" or run.epoch >= config.total_epochs:
        return run.phase != "done"
    last_phase = run.history[-1]["phase"]
    if last_phase != "search":
        run.phase = last_phase
    elif config.finetunes:  # it had no fine-tuning before
        fix_subnet(run, config, run.subnet)
    return run.phase != "done"


def _restore_search(search: Search, state: Mapping[str, Any], config: Config) -> None:
    if config.fixes_shapes:
        search.network.fix_shapes(state["slots"])
    search.score_optimizer.load_state_dict(state["score_optimizer"])
    restore_generator(search.generator, state["generator"])
    if search.estimator is not None:
        search.estimator.load_state_dict(state["estimator"])
    if search.masks is not None:
        drawn = state["masks"].to(search.network.device)
        # Where every rank draws masks of its own and their number has changed, the stored masks do not fit.
        fits = len(drawn) == len(search.masks.drawn)
        search.masks = stored_masks(drawn, config, search.network.device) if fits else draw_masks(search, config)
