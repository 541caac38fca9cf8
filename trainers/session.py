"""One start of the program: finds device, data and run folder, runs the recipe, says what came out."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from args import Arguments, Config, check_resume, config_from_dict, config_to_dict, config_to_yaml
from data import Augmentation, DataSplits, build_data
from models import allow
from trainers.automatic import settled, undecided
from trainers.build import lengthen, new_run, restore_model, restore_run, with_layout_of_start
from trainers.devices import check_ranks, find_device, gpus_to_start, starter
from trainers.divergence import Diverged
from trainers.recipe import Recipe, Stopped
from trainers.report import Reporter, SilentReporter, describe
from trainers.result import accuracies, print_result
from trainers.shortage import shortages_in_words
from trainers.state import RunState
from trainers.stored import (
    Stored,
    find_run,
    finished,
    fits_a_run,
    folder_names,
    growth_of,
    is_complete,
    read_run,
)
from utils.channels.subnet import Subnet
from utils.choices import named_again
from utils.errors import UserError
from utils.options import AUTO
from utils.ranks.exchange import check_equal, first_on_each_machine, joined, num_ranks, rank, wait_for_all
from utils.ranks.launch import become_torchrun, rank_here
from utils.run.checkpoint import LAST
from utils.run.folder import checkpoint_of, create_run_folder, environment_facts, write_facts
from utils.run.lock import lock
from utils.run.progress import announce
from utils.run.signals import StopRequest

UNWRITTEN, DIVERGED = 1, 3  # exit codes


@dataclass(frozen=True)
class Session:
    """One start of the program.

    Attributes:
        command: its words, from main.py on.
    """

    arguments: Arguments
    command: Sequence[str]

    def start(self) -> int:
        """Does what the arguments ask for; see `main.main` for the exit codes."""
        config = self.arguments.config
        allow(config.model.arch, self.arguments.origin["arch"])
        for notice in self.arguments.notices:
            announce(f"note: {notice}")
        if config.run.resume is None:
            return self._on_devices(config, self._begin)
        folder, named = find_run(config)
        reads = config.run.evaluate or config.run.dry_run or config.run.print_config
        # The lock before the files, so that nobody changes them in between.
        with nullcontext() if reads or rank_here() > 0 else lock(folder):
            stored = read_run(folder, named, config)
            place = str(stored.file or folder / "config.yaml")
            config = check_resume(config_from_dict(stored.state["config"], place), self.arguments)
            if config.run.print_config:
                print(config_to_yaml(config), end="")
                return 0
            return self._on_devices(config, partial(self._go_on, stored))

    def _on_devices(self, config: Config, work: Callable[[Config, torch.device], int]) -> int:
        """Does the work on the device of this process, or in new processes, one for each of several GPUs."""
        if wanted := gpus_to_start(config):
            become_torchrun(wanted, self.command[1:])
        device = find_device(config)
        check_ranks(config, [key for key, origin in self.arguments.origin.items() if origin == "command line"])
        with joined(device), shortages_in_words(config):
            return work(config, device)

    def _begin(self, config: Config, device: torch.device, folder: Path | None = None) -> int:
        """A run from its first step.

        Args:
            folder: that it already has, if it was killed before its first checkpoint.
        """
        config = with_layout_of_start(config)
        data = load_data(config, device)
        config = settled(config, data)
        check_ranks(config, [])  # again, for what was chosen
        run = new_run(config, data, device)
        describe(config, data, run)
        if config.run.dry_run:
            return dry_run(config, data, run)
        if folder is not None:
            announce("this run ended before it had written a checkpoint, so it starts afresh")
            return self._train(config, data, run, folder)
        if rank() > 0:
            return self._train(config, data, run, None)
        folder = create_run_folder(config.run.log_dir, *folder_names(config), config_yaml=self._config_text(config))
        with lock(folder):
            return self._train(config, data, run, folder)

    def _go_on(self, stored: Stored, config: Config, device: torch.device) -> int:
        """A run from a checkpoint, or its evaluation."""
        if stored.file is None:
            return self._begin(config, device, stored.folder)
        if config.run.evaluate:
            return evaluate_stored(config, stored, device)
        if "weight_optimizer" not in stored.state:
            raise UserError(
                f"{stored.file} holds what evaluation needs, not a whole run; resume from last.pt beside it"
            )
        data = load_data(config, device)
        if difference := data.difference(stored.state):
            raise UserError(
                f"the images under --data {config.data.data} are not those that {stored.file} was trained on: they "
                f"have {difference}. Point --data at the same files, or start a new run on these"
            )
        with fits_a_run(stored.file):
            run = new_run(config, data, device, stored.state)
            restore_run(run, stored.state, config)
        describe(config, data, run)
        if not lengthen(run, config):
            if config.run.dry_run or is_complete(stored.folder, run):
                raise UserError(finished(stored.folder, config))
            announce("the run is finished, but not all of its result was written; writing it now")
        if config.run.dry_run:
            return dry_run(config, data, run)
        announce(f"going on from {stored.file}: {run.phase}, {run.epoch} epochs and {run.step} steps done")
        if growth := growth_of(stored, config):
            announce(growth)
        return self._train(config, data, run, stored.folder, stored.file.name)

    def _train(
        self, config: Config, data: DataSplits, run: RunState, folder: Path | None, goes_on_from: str | None = None
    ) -> int:
        """Runs the recipe. Only the first rank writes; the others may not even know the folder.

        Args:
            folder: of the run, which this process has locked.
            goes_on_from: name of the checkpoint that the run was restored from.
        """
        announce(f"run folder: {folder}")
        with StopRequest(second_ends=num_ranks() == 1) as stop:
            if rank() == 0:
                reporter = Reporter(folder, config, data, run, goes_on_from)
                with reporter.refusals.tolerated("config.yaml, env.json or command.txt"):
                    self._write_facts(config, folder, run.network.device)
            else:
                reporter = SilentReporter(config)
            recipe = Recipe(config, data, run, reporter, stop)
            try:
                code = self._execute(recipe)
            finally:
                reporter.close()
            wait_for_all()  # the first rank that ends with an error code has the others killed
            return code

    def _execute(self, recipe: Recipe) -> int:
        """Runs what is left of the recipe; saves what is whole, however it ends."""
        reporter = recipe.reporter
        try:
            try:
                recipe.execute()
            except Stopped:
                return recipe.stop.exit_code if self._leave(recipe) else UNWRITTEN
            except Diverged:
                raise
            except Exception:
                if recipe.is_whole:
                    self._leave(recipe)
                raise
        except Diverged as error:
            announce(f"error: {error}. {self._what_is_kept(recipe)}")
            return DIVERGED
        if rank() > 0:
            return 0
        summary, missing = reporter.finish(recipe.run), reporter.refusals.reasons
        if summary is not None:
            print_result(summary, recipe.config)
        if missing:
            reasons = "; ".join(f"{name} ({reason})" for name, reason in missing.items())
            remedy = f". Go on with what follows, which writes it: {self._how_to_go_on(recipe)}"
            announce(
                f"error: the training is done, with test {recipe.run.best.test['top1']:.2f} %, but not all could be "
                f"written: {reasons}{'' if summary else remedy}"
            )
        return UNWRITTEN if missing else 0

    def _leave(self, recipe: Recipe) -> bool:
        """Saves a run that ends before it is done, and says how to go on. Returns whether it was saved."""
        run, saved = recipe.run, recipe.save()
        if rank() > 0:
            return saved
        how, where = self._how_to_go_on(recipe), f"stopped after step {run.step} of epoch {run.epoch + 1}"
        if saved:
            announce(f"{where}, saved; go on with: {how}")
        elif (recipe.reporter.folder / "checkpoints" / LAST).is_file():
            announce(f"error: {where}, which could not be saved; go on from the last checkpoint with: {how}")
        else:
            announce(f"error: {where}, which could not be saved, and there is no checkpoint; train again")
        return saved

    def _what_is_kept(self, recipe: Recipe) -> str:
        if rank() == 0 and not (recipe.reporter.folder / "checkpoints" / LAST).is_file():
            return "There is no checkpoint from before"
        return "The last checkpoint is from before"

    def _how_to_go_on(self, recipe: Recipe) -> str:
        file = checkpoint_of(recipe.reporter.folder, LAST)
        command = shlex.join([*starter(recipe.config), "main.py", "--resume", file])
        return command + named_again(recipe.config.model.arch)

    def _write_facts(self, config: Config, folder: Path, device: torch.device) -> None:
        """Options, command and environment of this start."""
        write_facts(
            folder,
            config_yaml=self._config_text(config),
            command=[*starter(config), *self.command],
            environment=environment_facts(device) | {"ranks": num_ranks()},
        )

    def _config_text(self, config: Config) -> str:
        """The options, as they train a new run; they do not resume."""
        by_rule = undecided(config_to_dict(self.arguments.config))
        origin = {key: f"{place}, auto" if key in by_rule else place for key, place in self.arguments.origin.items()}
        options = replace(config, run=replace(config.run, resume=None))
        return config_to_yaml(options, None if config.run.resume else origin)


def evaluate_stored(config: Config, stored: Stored, device: torch.device) -> int:
    """Prints the test accuracy of a checkpoint's subnet, on the images of its run or on others of the same kind.

    A checkpoint from the middle of the search has no subnet yet. Then it is that of the highest scores, with batch-norm
    statistics from training images.
    """
    state = stored.state
    has_subnet = state.get("subnet") is not None and "weight_optimizer" not in state
    folders = [Path(folder).resolve() for folder in (config.data.data, state["config"]["data"])]
    elsewhere = folders[0] != folders[1]
    data = load_data(config, device, test_only=elsewhere and has_subnet)
    if data.difference(state):
        if not has_subnet:
            raise UserError(
                f"{stored.file} is no result with a subnet of its own, so it can only be evaluated on the images of "
                "its run; pass the checkpoints/best.pt beside it, or the same images"
            )
        data = shown_as_trained(data, stored, config)
        announce(
            f"evaluating on other images than the run had: the {len(data.test):,} test images under "
            f"{config.data.data}{'' if elsewhere else ', which have changed since'}, normalised with the mean and "
            "standard deviation that it was trained with"
        )
    with fits_a_run(stored.file):
        run = new_run(config, data, device, state)
        network = run.network
        restore_model(network, state)
        recipe = Recipe(config, data, run, reporter=None, stop=None)
        run.phase = state["phase"]
        if has_subnet:
            subnet = Subnet.from_state_dict(state["subnet"], network.device)
        else:
            restore_run(run, state, config)
            subnet = recipe.current_subnet(config.sparsity.keep_ratio)
    test = recipe.evaluate_on(subnet, data.test)
    plan = network.plan(subnet.mask_U)
    print(
        f"{stored.file}: test {accuracies(test, data.num_classes)}, loss {test['loss']:.4f}, "
        f"{100 * network.subnet_macs(plan) / network.dense_macs:.1f} % of the dense FLOPs"
    )
    return 0


def shown_as_trained(data: DataSplits, stored: Stored, config: Config) -> DataSplits:
    """Other test images, normalised as the run's own.

    Raises: UserError if they have other classes, channels or another size.
    """
    trained, given = stored.state.get("images"), data.facts()
    if trained is None:
        raise UserError(
            f"{stored.file} is from before checkpoints described their images, so it can only be evaluated on the "
            f"images of its run, which are not those under --data {config.data.data}"
        )
    differing = [key for key in given if key not in ("mean", "std") and given[key] != trained[key]]
    if differing:
        told = "; ".join(f"{key} {given[key]} instead of {trained[key]}" for key in differing)
        raise UserError(
            f"the images under --data {config.data.data} are not of the kind that {stored.file} was trained on: "
            f"{told}. Evaluation needs the same classes in the same order, channels and size"
        )
    return replace(data, test=replace(data.test, mean=tuple(trained["mean"]), std=tuple(trained["std"])))


def dry_run(config: Config, data: DataSplits, run: RunState) -> int:
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


def load_data(config: Config, device: torch.device, test_only: bool = False) -> DataSplits:
    """The images, in the memory layout that is fast for convolutions.

    Args:
        test_only: nothing but the test images is needed; see `build_data`.
    """
    settings = config.data
    with first_on_each_machine(settings.set not in ("ImageFolder", "ImageNet")):  # other sets may have to be fetched
        data = build_data(
            settings.set,
            settings.data,
            holdout=0.0 if test_only else None if settings.holdout == AUTO else settings.holdout,
            train_images=0 if test_only else settings.train_images,
            test_only=test_only,
            image_size=settings.image_size,
            workers=settings.workers,
            device=device,
        )
    numbers = [int(text, 16) for text in (data.fingerprint, data.contents)]
    check_equal({f"the images of {settings.set}": torch.tensor(numbers)}, "before the first step")
    for part in (data.train, data.holdout, data.test):
        part.channels_last = True
        part.rank, part.num_ranks = rank(), num_ranks()
    data.train.augmentation = Augmentation(settings.rand_augment, settings.mixup, settings.cutmix, data.num_classes)
    for what, size in (
        ("batch_size", config.train.batch_size),
        ("finetune_batch_size", config.finetune_batch_size if config.finetunes else AUTO),
    ):
        if size != AUTO and size > len(data.train) and not config.run.evaluate:
            raise UserError(f"{what} is {size}, but there are only {len(data.train)} training images; lower it")
    return data
