"""One start of the program: finds device, data and run folder, runs the recipe, says what came out."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from args import Arguments, Config, check_resume, config_from_dict, config_to_yaml
from data import DataSplits, build_data
from trainers.build import new_run, restore_model, restore_run
from trainers.devices import check_ranks, find_device, gpus_to_start, starter
from trainers.recipe import Diverged, Recipe, Stopped
from trainers.report import Reporter, SilentReporter, device_name
from trainers.state import RunState
from utils.channels.subnet import Subnet
from utils.errors import UserError
from utils.ranks.exchange import check_equal, first_on_each_machine, joined, num_ranks, rank, wait_for_all
from utils.ranks.launch import become_torchrun
from utils.run import checkpoint
from utils.run.folder import (
    create_run_folder,
    environment_facts,
    latest_run_folder,
    lock,
    resolve_run,
    write_facts,
)
from utils.run.progress import announce
from utils.run.signals import StopRequest

DIVERGED = 3  # exit code


def start(arguments: Arguments, command: Sequence[str]) -> int:
    """Does what the arguments ask for; see `main.main` for the exit codes."""
    if arguments.config.run.resume is not None:
        return _resume(arguments, command)
    return _on_devices(arguments.config, arguments, command, partial(_begin, arguments, command))


def _on_devices(
    config: Config, arguments: Arguments, command: Sequence[str], work: Callable[[Config, torch.device], int]
) -> int:
    """Does the work on the device of this process, or in new processes, one for each of several GPUs."""
    if wanted := gpus_to_start(config):
        become_torchrun(wanted, command[1:])
    device = find_device(config)
    check_ranks(config, [key for key, origin in arguments.origin.items() if origin == "command line"])
    with joined(device):
        return work(config, device)


def _begin(arguments: Arguments, command: Sequence[str], config: Config, device: torch.device) -> int:
    data = load_data(config, device)
    run = new_run(config, data, device)
    describe(config, data, run)
    if config.run.dry_run:
        return _dry_run(config, data, run)
    folder = None
    if rank() == 0:
        stem = Path(config.run.config).stem if config.run.config else "no_config"
        folder = create_run_folder(config.run.log_dir, stem, run_name(config), _kept(config))
    return _train(config, arguments, command, data, run, folder)


def _resume(arguments: Arguments, command: Sequence[str]) -> int:
    given = arguments.config
    if given.run.resume == "auto":
        stem = Path(given.run.config).stem if given.run.config else "no_config"
        where = latest_run_folder(given.run.log_dir, stem, run_name(given), _kept(given))
        folder, file = resolve_run(where)
    else:
        folder, file = resolve_run(given.run.resume)
    if given.run.evaluate and file.name == "last.pt" and (folder / "checkpoints" / "best.pt").exists():
        file = file.with_name("best.pt")  # what the summary reports
    state = checkpoint.load(file)
    if "config" not in state:
        raise UserError(f"{file} is not a checkpoint of a run; pass a run folder or its checkpoints/last.pt")
    config = check_resume(config_from_dict(state["config"], str(file)), arguments)
    if config.run.print_config:
        print(config_to_yaml(config), end="")
        return 0
    return _on_devices(config, arguments, command, partial(_go_on, arguments, command, folder, file, state))


def _go_on(
    arguments: Arguments,
    command: Sequence[str],
    folder: Path,
    file: Path,
    state: dict[str, Any],
    config: Config,
    device: torch.device,
) -> int:
    data = load_data(config, device)
    if data.fingerprint != state["fingerprint"]:
        raise UserError(
            f"the images under --data {config.data.data} are not those that {file} was trained on (fingerprint "
            f"{data.fingerprint} instead of {state['fingerprint']}); point --data at the same files"
        )
    fresh = replace(config, model=replace(config.model, pretrained=None))  # all weights come from the checkpoint
    run = new_run(fresh, data, device)
    if config.run.evaluate:
        return _evaluate(config, data, run, state, file)
    if "weight_optimizer" not in state:
        raise UserError(f"{file} holds what evaluation needs, not a whole run; resume from last.pt beside it")
    restore_run(run, state, config)
    describe(config, data, run)
    if config.run.dry_run:
        return _dry_run(config, data, run)
    if run.phase == "done":
        raise UserError(f"the run in {folder} is finished; --evaluate --resume {folder} prints its result")
    announce(f"going on from {file}: {run.phase}, {run.epoch} epochs and {run.step} steps done")
    return _train(config, arguments, command, data, run, folder)


def _train(
    config: Config,
    arguments: Arguments,
    command: Sequence[str],
    data: DataSplits,
    run: RunState,
    folder: Path | None,
) -> int:
    """Runs the recipe. Only the first rank writes; the others may not even know the folder."""
    announce(f"run folder: {folder}")
    writes = rank() == 0
    with lock(folder) if writes else nullcontext(), StopRequest(second_ends=num_ranks() == 1) as stop:
        if writes:
            origin = None if config.run.resume else arguments.origin
            facts = environment_facts(run.network.device) | {"ranks": num_ranks()}
            again = config_to_yaml(replace(config, run=replace(config.run, resume=None)), origin)  # trains, not resumes
            write_facts(folder, config_yaml=again, command=[*starter(config), *command], environment=facts)
        reporter = Reporter(folder, config, data, run) if writes else SilentReporter(config)
        try:
            Recipe(config, data, run, reporter, stop).execute()
        except Stopped:
            reporter.save(run)
            how = shlex.join([*starter(config), "main.py", "--resume", str(folder)])
            announce(f"stopped after step {run.step} of epoch {run.epoch + 1}, saved; go on with: {how}")
            code = stop.exit_code
        except Diverged as error:
            announce(f"error: {error}")
            code = DIVERGED
        else:
            if writes:
                print_result(reporter.finish(run), config)
            code = 1 if reporter.save_failed else 0
        finally:
            reporter.close()
        wait_for_all()  # the first rank that ends with an error code has the others killed
        return code


def _evaluate(config: Config, data: DataSplits, run: RunState, state: dict[str, Any], file: Path) -> int:
    """Test accuracy of a checkpoint's subnet. A checkpoint from the middle of the search has none yet: then that of
    its highest scores, with batch-norm statistics from training images."""
    network = run.network
    restore_model(network, state)
    recipe = Recipe(config, data, run, reporter=None, stop=None)
    run.phase = state["phase"]
    if state.get("subnet") is not None and "weight_optimizer" not in state:
        subnet = Subnet.from_state_dict(state["subnet"], network.device)
    else:
        restore_run(run, state, config)
        subnet = recipe.current_subnet(config.sparsity.keep_ratio)
    test = recipe.evaluate_on(subnet, data.test)
    plan = network.plan(subnet.mask_U)
    print(
        f"{file}: test top-1 {test['top1']:.2f} %, top-5 {test['top5']:.2f} %, loss {test['loss']:.4f}, "
        f"{100 * network.subnet_macs(plan) / network.dense_macs:.1f} % of the dense FLOPs"
    )
    return 0


def _dry_run(config: Config, data: DataSplits, run: RunState) -> int:
    """One training step and one batch of evaluation; writes nothing."""
    recipe = Recipe(replace(config, finetune=replace(config.finetune, bn_batches=1)), data, run, None, None)
    steps = data.train.num_train_batches(recipe.batch_size)
    images, labels = next(data.train.train_batches(recipe.batch_size, config.run.seed, run.epoch))
    metrics = recipe.step(images, labels, recipe.settings(run.step, steps))
    loss = float(metrics["loss"]) / recipe.batch_size
    subnet = recipe.current_subnet(config.sparsity.keep_ratio)
    first = data.test.subset(torch.arange(min(len(data.test), config.train.batch_size)))
    recipe.evaluate_on(subnet, first)
    print(f"dry run: one step of {recipe.batch_size} images, loss {loss:.3f}; everything was built, nothing written")
    return 0


def load_data(config: Config, device: torch.device) -> DataSplits:
    """The images, in the memory layout that is fast for convolutions."""
    settings = config.data
    with first_on_each_machine(settings.set not in ("ImageFolder", "ImageNet")):  # other sets may have to be fetched
        data = build_data(
            settings.set,
            settings.data,
            holdout=settings.holdout,
            train_images=settings.train_images,
            image_size=settings.image_size,
            workers=settings.workers,
            device=device,
        )
    check_equal({f"the images of {settings.set}": torch.tensor(int(data.fingerprint, 16))}, "before the first step")
    for part in (data.train, data.holdout, data.test):
        part.channels_last = True
        part.rank, part.num_ranks = rank(), num_ranks()
    for what, size in (
        ("batch_size", config.train.batch_size),
        ("finetune_batch_size", config.finetunes * config.finetune.finetune_batch_size),
    ):
        if size > len(data.train):
            raise UserError(f"{what} is {size}, but there are only {len(data.train)} training images; lower it")
    return data


def _kept(config: Config) -> float:
    """The fraction that names the run folder."""
    return 1.0 if config.method == "dense" else config.sparsity.keep_ratio


def run_name(config: Config) -> str:
    return config.run.name or config.model.arch


def describe(config: Config, data: DataSplits, run: RunState) -> None:
    """The first lines of a run: what is trained, on what, where."""
    network = run.network
    announce(f"device: {device_name(network.device)}, {config.train.precision}")
    announce(
        f"data: {config.data.set}, {len(data.train):,} training, {len(data.holdout):,} held-out and "
        f"{len(data.test):,} test images, {data.num_classes} classes, {data.image_size}x{data.image_size}"
    )
    if num_ranks() > 1:
        part, rest = divmod(config.train.batch_size, num_ranks())
        sizes = f"{part} or {part + 1}" if rest else f"{part}"
        masks = {"shared": "the same masks", "independent": "masks of its own"}[config.sparsity.rank_masks]
        draws = run.search is not None and run.search.masks is not None
        announce(
            f"batch size {config.train.batch_size}: {num_ranks()} ranks x {sizes}"
            + (f", each with {masks}" if draws else "")
        )
    size = f"{network.dense_parameters / 1e6:.2f} M parameters, {network.dense_macs / 1e6:.1f} M multiply-adds"
    announce(f"network: {config.model.arch}, dense {size}")
    if network.num_units:
        kept, counted = config.sparsity.keep_ratio, config.sparsity.budget
        units = f"{network.num_units:,} units in {len(network.layers)} layers"
        if counted == "channels":
            budget = f"{units} (at most {kept * network.num_units:,.0f} expected)"
        else:
            most = kept * network.expected_cost(counted).dense / 1e6
            what = {"params": "parameters", "flops": "multiply-adds"}[counted]
            budget = f"the {what} (at most {most:,.2f} M expected), choosing among {units}"
        announce(f"{config.method}: keeping {100 * kept:g} % of {budget}; {network.execution} execution")


def print_result(summary: dict[str, Any], config: Config) -> None:
    """The last lines of a run."""
    kept = "" if summary["units_kept"] is None else f", {100 * summary['units_kept']:.1f} % of its units kept"
    print(
        f"\ntrained {summary['arch']} on {summary['set']}: {summary['epochs']} epochs in "
        f"{summary['seconds']:.0f} s ({summary['train_seconds']:.0f} s of training steps){kept}\n"
        f"test accuracy      {summary['test_top1']:.2f} % top-1, {summary['test_top5']:.2f} % top-5\n"
        f"inference FLOPs    {100 * summary['flops_ratio']:.1f} % of dense, "
        f"parameters {100 * summary['params_kept']:.1f} %\n"
        f"training FLOPs     {100 * summary['train_flops_ratio']:.1f} % of dense training for as many epochs\n"
        f"run folder         {summary['run']}\n"
        f"curves             tensorboard --logdir {shlex.quote(config.run.log_dir)} --host 127.0.0.1\n"
        f"same number again  python main.py --evaluate --resume {shlex.quote(summary['run'])}"
    )
