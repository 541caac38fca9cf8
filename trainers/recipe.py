"""The whole recipe: search, choice of a subnet, fine-tuning; or one network in one phase through the same loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from args import Config
from data import BatchedSet, DataSplits
from trainers.build import fix_subnet
from trainers.default import StepSettings, evaluate
from trainers.divergence import check_losses, check_tensors
from trainers.methods import make_method
from trainers.methods.base import Method
from trainers.report import Reporter, progress_values
from trainers.schedule import stages, step_settings
from trainers.state import RunState
from utils.algorithm.decision import decision
from utils.channels.subnet import Subnet, estimate_statistics, installed
from utils.errors import RankError
from utils.ranks.exchange import agreed, check_equal, num_ranks, rank
from utils.run.metrics import CostLedger, MetricSums
from utils.run.progress import Progress
from utils.run.signals import StopRequest

CHECK_EVERY = 100  # steps; reads all weights once and makes a GPU wait


class Stopped(Exception):
    """The user asked to stop; the run is saved at the end of a step."""


@dataclass
class Recipe:
    """A run, its images and its configuration: what all steps of the recipe share.

    Attributes:
        calibration: shuffled training images, not augmented, for batch-norm statistics. The same in every run, and on
            every rank: each computes all of them, so the statistics are those of a single process, bit by bit.
        is_whole: whether the run has changed since this start and nothing is half done, so that it is worth saving.
        saved_at: when the last checkpoint was written, and after how many steps.
    """

    config: Config
    data: DataSplits
    run: RunState
    reporter: Reporter | None  # None: single steps and evaluation only
    stop: StopRequest | None

    def __post_init__(self) -> None:
        self.method = make_method(self.config)
        self.finetuning = Method(self.config)  # ordinary steps of the chosen subnet, whatever chose it
        wanted = self.config.finetune.bn_batches * self.config.train.batch_size
        order = np.random.default_rng(0).permutation(len(self.data.train))[:wanted]
        self.calibration = self.data.train.subset(torch.from_numpy(order))
        self.calibration.rank, self.calibration.num_ranks = 0, 1
        self.is_whole = False
        self.saved_at = (time.monotonic(), self.run.steps)

    # ---- the phases -------------------------------------------------------------------------------------------

    def execute(self) -> None:
        """Runs what is left of the recipe.

        Raises: Stopped after the step in which a signal came; Diverged when a number is not finite; RankError.
        """
        self.check_ranks()
        steps = self.data.train.num_train_batches(self.batch_size)
        self.reporter.start(self.run, self.settings(self.run.step, steps), steps)
        with Progress(stages(self.run, self.config, self.data), self.config.run.print_freq) as progress:
            while self.run.phase != "done":
                if self.run.epoch < self.run.num_epochs(self.config):
                    self.train_epoch(progress)
                    self.finish_epoch()
                elif self.run.phase == "search":
                    self.choose_subnet()
                    progress.plan(stages(self.run, self.config, self.data))  # the search may have ended before its time
                else:
                    self.run.phase = "done"
                    self.save()
                if self.run.phase != "done":
                    self.stop_or_save()

    @property
    def batch_size(self) -> int:
        return self.run.batch_size(self.config)

    def settings(self, step: int, steps_per_epoch: int) -> StepSettings:
        return step_settings(self.run, self.config, step, steps_per_epoch)

    @property
    def last_settings(self) -> StepSettings:
        """Those of the last step."""
        return self.settings(self.run.step - 1, self.data.train.num_train_batches(self.batch_size))

    def train_epoch(self, progress: Progress) -> None:
        """The rest of the epoch under way, with a save whenever one is due."""
        run = self.run
        steps = self.data.train.num_train_batches(self.batch_size)
        batches = self.data.train.train_batches(self.batch_size, self.config.run.seed, run.epoch, start=run.step)
        batches, is_unfinished = self.awaited(batches), True
        progress.begin_epoch(run.epoch, run.step)
        while is_unfinished:
            with self.timed("epoch_seconds"), self.timed("cpu_seconds", time.process_time):
                is_unfinished = self.train_until_due(batches, steps, progress)
            if is_unfinished:
                self.save()

    def train_until_due(self, batches: Iterator[tuple[Tensor, Tensor]], steps: int, progress: Progress) -> bool:
        """Takes steps until a save is due or the batches are used up; says whether it was a save."""
        run, config = self.run, self.config
        for images, labels in batches:
            with self.changing():
                settings = self.settings(run.step, steps)
                run.sums.add(self.step(images, labels, settings), self.batch_size)
                run.step += 1
                run.steps += 1
                self.reporter.step_end(run, settings, steps)
                # on a GPU reading the loss waits; all ranks do it at the same steps, whatever their consoles show
                if images.device.type == "cpu" or run.step % config.run.print_freq == 0:
                    check_losses(run, settings)
                if run.step % CHECK_EVERY == 0:
                    self.check_ranks()
            values = progress_values(run) if progress.wants_values() else None
            progress.update(self.batch_size, values)
            if self.stop_or_save() and run.step < steps:
                return True
        return False

    def awaited(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batches. The time until each of them is there goes to a clock of its own.

        Raises: RankError if another rank has no batch because of an error.
        """
        while True:
            start, batch, error = time.perf_counter(), None, None
            try:
                batch = next(batches, None)
            except Exception as failure:
                error = failure
            if agreed([int(error is not None)]) != [0]:  # before any of them begins the step, so what is saved is whole
                raise error or RankError("another rank could not read its next images, for the reason that it says")
            self.run.data_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def step(self, images: Tensor, labels: Tensor, settings: StepSettings) -> dict[str, Tensor]:
        """One step of the current phase, entered into the ledger of costs."""
        run, network = self.run, self.run.network
        method = self.finetuning if run.phase == "finetune" else self.method
        result = method.step(run, images, labels, settings)
        if self.config.train.ema and run.phase != "search":
            run.move_average(self.config.train.ema)
        spent = CostLedger()
        spent.add_step(len(labels), result.forward, result.num_backward, network.dense_macs)
        spent = spent.of_all_ranks()
        run.ledger.add(spent)
        run.epoch_cost.add(spent)
        return result.metrics

    def add_passes(self, images: int, subnet: Subnet) -> None:
        """Enters forward passes of a subnet outside training steps into the ledger of costs."""
        network = self.run.network
        self.run.ledger.add_forward(images, network.pass_cost(network.plan(subnet.mask_U)))

    # ---- the end of an epoch ----------------------------------------------------------------------------------

    def finish_epoch(self) -> None:
        """Evaluates, reports, remembers the best state, saves.

        If the evaluation is interrupted, the run is as it was after the last step, and saved like that. What a method
        does to the network between two epochs it may then do twice, which is the same as once.
        """
        run, sparsity, settings = self.run, self.config.sparsity, self.last_settings
        seconds_before = run.seconds
        check_tensors(run, settings)
        with self.judging(), self.timed("seconds"):
            if run.phase == "search":
                with self.changing():
                    self.method.end_of_epoch(run, settings.keep_ratio)
                self.judge_search(settings)
            subnet = self.current_subnet(settings.keep_ratio)
            heldout = self.evaluate_heldout(subnet)
            check_losses(run, settings, held_out=heldout.get("loss", 0.0))
            # while the budget falls, a state that still exceeds the final one is no candidate
            allowed = run.phase != "search" or settings.keep_ratio <= sparsity.keep_ratio + 1e-9
            is_best = allowed and (
                run.best is None or not heldout or self.merit(heldout) > self.merit(run.best.heldout)
            )
            may_be_result = is_best and run.phase != "search"  # a search ends with a choice, and that is tested
            is_tested = may_be_result or self.is_test_due(run.epoch + 1)
            test = self.evaluate_on(subnet, self.data.test) if is_tested else {}
        evaluation_seconds = run.seconds - seconds_before
        with self.changing(), self.timed("seconds"):
            run.epoch += 1
            run.step = 0
            self.check_ranks()
            if is_best:
                run.remember_best(self.config, self.data, subnet, heldout, test)
            self.reporter.epoch_end(run, subnet, settings, heldout, test, evaluation_seconds)
            run.train_seconds += run.epoch_seconds
            run.sums, run.epoch_cost, run.at_last_point = MetricSums(), CostLedger(), {}
            run.epoch_seconds = run.data_seconds = 0.0
        self.save(epoch_end=True)

    def judge_search(self, settings: StepSettings) -> None:
        """Asks whether the scores are decided, and ends the search if that is what it waits for."""
        run, sparsity = self.run, self.config.sparsity
        if not self.method.has_scores:
            return
        top_U = self.method.mask(run, sparsity.keep_ratio)
        run.decision = decision(
            run.network.scores.detach().cpu().numpy(),
            run.budget.indifferent_score(sparsity.keep_ratio),
            settings.keep_ratio / sparsity.keep_ratio,
            top_U,
            run.top_U,
        )
        run.top_U = top_U
        run.decided = self.config.ends_when_decided and run.decision.made

    def current_subnet(self, keep_ratio: float) -> Subnet:
        """What would be shipped now: in a search the subnet that it would keep, else the network as it is."""
        network = self.run.network
        if self.run.phase == "search":
            return self.calibrated(self.method.mask(self.run, keep_ratio))
        with self.run.averaged():
            norms = network.batch_norms().items()
            statistics = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms}
        return Subnet(self.run.plan.mask_U, statistics)

    def calibrated(self, mask_U: np.ndarray) -> Subnet:
        """A subnet with batch-norm statistics from the calibration images."""
        network = self.run.network
        batches = self.calibration.batches(self.config.train.batch_size)
        subnet = estimate_statistics(network, mask_U, batches)
        self.add_passes(num_ranks() * len(self.calibration), subnet)
        return subnet

    def is_test_due(self, epoch: int) -> bool:
        """Whether `--test-every` wants test metrics of this epoch, counted from 1."""
        every = self.config.run.test_every
        return every > 0 and epoch % every == 0

    def evaluate_heldout(self, subnet: Subnet) -> dict[str, float]:
        """Held-out metrics, which choose; none without held-out images. Test metrics are only reported."""
        heldout = self.evaluate_on(subnet, self.data.holdout) if len(self.data.holdout) else {}
        self.add_passes(len(self.data.holdout), subnet)
        return heldout

    def evaluate_on(self, subnet: Subnet, images: BatchedSet) -> dict[str, float]:
        network = self.run.network
        with self.run.averaged(), installed(network, subnet):
            return evaluate(network, network.plan(subnet.mask_U), images.batches(self.config.train.batch_size))

    @staticmethod
    def merit(metrics: dict[str, float]) -> tuple[float, float]:
        """What is compared: accuracy, then loss. Nothing is worse than a loss that is not finite."""
        return (metrics["top1"], -metrics["loss"]) if math.isfinite(metrics["loss"]) else (-math.inf, -math.inf)

    # ---- the choice of the subnet -----------------------------------------------------------------------------

    def choose_subnet(self) -> None:
        """Ends the search: the best of the method's candidates, by held-out or training images.

        Whatever interrupts it, the run is as it was at the end of its last epoch.
        """
        run, config = self.run, self.config
        masks = self.method.candidates(run)
        judges = self.data.train if config.finetune.sample_from_training_set else self.data.holdout
        with self.judging(), self.timed("seconds"):
            subnets, merits = [], []
            for mask_U in masks:
                subnets.append(self.calibrated(mask_U))
                if self.method.has_scores:  # others have a single candidate
                    merits.append(self.merit(self.evaluate_on(subnets[-1], judges)))
                    self.add_passes(len(judges), subnets[-1])
                self.stop_or_save()
            chosen = max(range(len(merits)), key=merits.__getitem__, default=0)  # ties: the top-scored one
            subnet = subnets[chosen]
            heldout, test = self.evaluate_heldout(subnet), self.evaluate_on(subnet, self.data.test)
        check_losses(run, self.last_settings, held_out=heldout.get("loss", 0.0))
        with self.changing():
            if merits:
                drawn = [accuracy for accuracy, _ in merits[1:]]
                run.choice = {
                    "chosen_candidate": chosen,
                    "top_scored_top1": merits[0][0],
                    "drawn_top1_mean": float(np.mean(drawn)) if drawn else math.nan,
                    "drawn_top1_sd": float(np.std(drawn)) if drawn else math.nan,
                }
            run.remember_best(config, self.data, subnet, heldout, test)  # with the weights of the search's end
            self.reporter.choice(run, len(subnets))
            if config.finetune.finetune:
                fix_subnet(run, config, subnet)
            else:
                run.phase, run.subnet = "done", subnet
        self.save()

    # ---- small helpers ----------------------------------------------------------------------------------------

    def save(self, epoch_end: bool = False) -> bool:
        """As `Reporter.save`. A checkpoint cannot hold the time of its own writing; the next one does.

        Raises: Diverged rather than save what is not finite.
        """
        check_tensors(self.run, self.last_settings)
        with self.timed("seconds"):
            saved = self.reporter.save(self.run, epoch_end)
        self.saved_at = (time.monotonic(), self.run.steps)
        return saved

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around everything that changes the run: if it is interrupted inside, it cannot go on from what is left."""
        self.is_whole = False
        yield
        self.is_whole = True

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Around evaluations and what follows from them: if it is interrupted, nothing of it is counted."""
        run = self.run
        before = {"ledger": replace(run.ledger), "decision": run.decision, "top_U": run.top_U, "decided": run.decided}
        try:
            yield
        except BaseException:
            for name, value in before.items():
                setattr(run, name, value)
            raise

    def check_ranks(self) -> None:
        """Raises RankError unless all ranks still train the same network."""
        check_equal(self.run.replicated(), f"after {self.run.epoch} epochs and {self.run.step} steps")

    def stop_or_save(self) -> bool:
        """Whether a save is due, on all ranks alike.

        Raises: Stopped on all ranks as soon as a signal has reached one of them.
        """
        wanted = self.config.run
        seconds, steps = time.monotonic() - self.saved_at[0], self.run.steps - self.saved_at[1]
        is_due = (rank() == 0 and 0 < wanted.save_interval <= seconds) or 0 < wanted.save_steps <= steps
        number, is_due = agreed([self.stop.signal or 0, int(is_due)])
        if number:
            self.stop.signal = number
            raise Stopped
        return bool(is_due)

    @contextmanager
    def timed(self, clock: str, now: Callable[[], float] | None = None) -> Iterator[None]:
        """Adds the time spent inside to one of the run's clocks: that on the wall, or as `now` tells it."""
        now = now or time.perf_counter
        start = now()
        try:
            yield
        finally:
            if self.run.network.device.type == "cuda":
                torch.cuda.synchronize(self.run.network.device)
            setattr(self.run, clock, getattr(self.run, clock) + now() - start)
