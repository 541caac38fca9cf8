"""The whole recipe: search, choice of a subnet, fine-tuning; or one network in one phase through the same loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from args import Config
from data import BatchedSet, DataSplits
from trainers.default import StepSettings, evaluate
from trainers.methods import method_of
from trainers.methods.base import Method, cost_of
from trainers.report import Reporter
from trainers.state import Best, RunState
from utils.algorithm.schedules import kept_fraction, learning_rate_factor
from utils.channels.plan import Plan
from utils.channels.shrink import store_only
from utils.channels.subnet import Subnet, estimate_statistics, installed
from utils.ranks.exchange import agreed_signal, check_equal, num_ranks, synchronised_batch_norm
from utils.run.metrics import Cost, CostLedger, MetricSums
from utils.run.signals import StopRequest

CHECK_EVERY = 100  # steps; reads all weights once and makes a GPU wait
FINETUNING = Method()  # ordinary steps of the chosen subnet, whatever chose it


class Stopped(Exception):
    """The user asked to stop; the run is saved at the end of a step."""


class Diverged(Exception):
    """The loss is no longer finite."""


@dataclass
class Recipe:
    """A run, its images and its configuration: what all steps of the recipe share.

    Attributes:
        calibration: shuffled training images, not augmented, for batch-norm statistics. The same in every run, and on
            every rank: each computes all of them, so the statistics are those of a single process, bit by bit.
    """

    config: Config
    data: DataSplits
    run: RunState
    reporter: Reporter | None  # None: single steps and evaluation only
    stop: StopRequest | None

    def __post_init__(self) -> None:
        self.method = method_of(self.config)
        wanted = self.config.finetune.bn_batches * self.config.train.batch_size
        order = np.random.default_rng(0).permutation(len(self.data.train))[:wanted]
        self.calibration = self.data.train.subset(torch.from_numpy(order))
        self.calibration.rank, self.calibration.num_ranks = 0, 1

    # ---- the phases -------------------------------------------------------------------------------------------

    def execute(self) -> None:
        """Runs what is left of the recipe.

        Raises: Stopped after the step in which a signal came; Diverged when the loss is not finite; RankError.
        """
        self.check_ranks()
        while self.run.phase != "done":
            if self.run.epoch < self.last_epoch_of_phase:
                self.train_epoch()
                self.finish_epoch()
            elif self.run.phase == "search":
                self.choose_subnet()
            else:
                self.run.phase = "done"
                self.reporter.save(self.run)
            if self.run.phase != "done":
                self.stop_if_asked()

    @property
    def last_epoch_of_phase(self) -> int:
        return self.config.train.epochs if self.run.phase == "search" else self.config.total_epochs

    @property
    def batch_size(self) -> int:
        config = self.config
        return config.finetune.finetune_batch_size if self.run.phase == "finetune" else config.train.batch_size

    def settings(self, step: int, steps_per_epoch: int) -> StepSettings:
        """Learning rates and budget of a step of the epoch under way (counted from 0)."""
        config, sparsity, train = self.config, self.config.sparsity, self.config.train
        now, total = self.run.epoch * steps_per_epoch + step, self.last_epoch_of_phase * steps_per_epoch
        warmup = train.warmup_length * steps_per_epoch
        one_curve = config.finetune.finetune_policy == "continue"
        span = config.total_epochs * steps_per_epoch if one_curve else total
        weight_lr = train.weight_lr * learning_rate_factor(train.lr_policy, now, span, warmup)
        if self.run.phase == "finetune":
            return StepSettings(weight_lr if one_curve else config.finetune.finetune_lr)
        fraction = kept_fraction(
            *(sparsity.budget_schedule if self.method.has_scores else "constant", now, total),
            *(sparsity.keep_ratio, sparsity.budget_start, sparsity.budget_end),
        )
        return StepSettings(
            weight_lr=weight_lr,
            score_lr=train.score_lr * learning_rate_factor(train.lr_policy, now, total, warmup),
            kept_fraction=fraction,
            update_scores=now % sparsity.score_every == 0,
            gauge=sparsity.gauge_every > 0 and now % sparsity.gauge_every == 0,
            progress=now / total,
        )

    def train_epoch(self) -> None:
        """The rest of the epoch under way."""
        run, config = self.run, self.config
        steps = self.data.train.num_train_batches(self.batch_size)
        batches = self.data.train.train_batches(self.batch_size, config.run.seed, run.epoch, start=run.step)
        with self.reporter.progress(run, steps) as progress, self.timed("epoch_seconds"):
            for images, labels in batches:
                settings = self.settings(run.step, steps)
                run.sums.add(self.step(images, labels, settings), self.batch_size)
                run.step += 1
                # on a GPU reading the loss waits; all ranks do it at the same steps, whatever their consoles show
                if images.device.type == "cpu" or run.step % config.run.print_freq == 0:
                    self.check_finite()
                if run.step % CHECK_EVERY == 0:
                    self.check_ranks()
                values = self.progress_values() if progress.wants_values() else None
                progress.update(self.batch_size, values)
                self.stop_if_asked()

    def step(self, images: Tensor, labels: Tensor, settings: StepSettings) -> dict[str, Tensor]:
        """One step of the current phase, entered into the ledger of costs."""
        run, network = self.run, self.run.network
        method = FINETUNING if run.phase == "finetune" else self.method
        with synchronised_batch_norm(network, self.config.train.sync_bn):
            metrics, cost = method.step(run, images, labels, settings, self.config)
        spent = CostLedger()
        spent.add_step(len(labels), cost.forward, cost.num_backward, network.dense_macs)
        spent = spent.of_all_ranks()
        run.ledger.add(spent)
        run.epoch_cost.add(spent)
        return metrics

    def cost(self, plan: Plan) -> Cost:
        return cost_of(self.run.network, plan)

    # ---- the end of an epoch ----------------------------------------------------------------------------------

    def finish_epoch(self) -> None:
        """Evaluates, reports, remembers the best state, saves."""
        run, sparsity = self.run, self.config.sparsity
        settings = self.settings(run.step - 1, self.data.train.num_train_batches(self.batch_size))
        with self.timed("seconds"):
            if run.phase == "search":
                self.method.end_of_epoch(run, self.config)
            subnet = self.current_subnet(settings.kept_fraction)
            heldout = self.evaluate_heldout(subnet)
            # while the budget falls, a state that still exceeds the final one is no candidate
            allowed = run.search is None or settings.kept_fraction <= sparsity.keep_ratio + 1e-9
            is_best = allowed and (
                run.best is None or not heldout or self.merit(heldout) > self.merit(run.best.heldout)
            )
            may_be_result = is_best and run.phase != "search"  # a search ends with a choice, and that is tested
            is_tested = may_be_result or self.is_test_due(run.epoch + 1)
            test = self.evaluate_on(subnet, self.data.test) if is_tested else {}
        run.epoch += 1
        run.step = 0
        if is_best:
            run.best = Best(subnet, run.epoch, heldout, test)
        self.check_finite()
        self.check_ranks()
        self.reporter.epoch_end(run, subnet, settings, heldout, test)
        run.train_seconds += run.epoch_seconds
        run.sums, run.epoch_cost, run.epoch_seconds = MetricSums(), CostLedger(), 0.0
        self.reporter.save(run, best=is_best, epoch_end=True)

    def current_subnet(self, fraction: float) -> Subnet:
        """What would be shipped now: in a search the subnet that it would keep, else the network as it is."""
        network = self.run.network
        if self.run.phase == "search":
            return self.calibrated(self.method.mask(network, self.config, fraction))
        mask_U = self.run.fixed_plan.mask_U
        statistics = {
            name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in network.batch_norms().items()
        }
        return Subnet(mask_U, statistics)

    def calibrated(self, mask_U: np.ndarray) -> Subnet:
        """A subnet with batch-norm statistics from the calibration images."""
        network = self.run.network
        batches = self.calibration.batches(self.config.train.batch_size)
        subnet = estimate_statistics(network, mask_U, batches, self.config.train)
        images = num_ranks() * len(self.calibration)
        self.run.ledger.add_forward(images, self.cost(network.plan(subnet.mask_U)))
        return subnet

    def is_test_due(self, epoch: int) -> bool:
        """Whether `--test-every` wants test metrics of this epoch, counted from 1."""
        every = self.config.run.test_every
        return every > 0 and epoch % every == 0

    def evaluate_heldout(self, subnet: Subnet) -> dict[str, float]:
        """Held-out metrics, which choose; none without held-out images. Test metrics are only reported."""
        heldout = self.evaluate_on(subnet, self.data.holdout) if len(self.data.holdout) else {}
        self.run.ledger.add_forward(len(self.data.holdout), self.cost(self.run.network.plan(subnet.mask_U)))
        return heldout

    def evaluate_on(self, subnet: Subnet, images: BatchedSet) -> dict[str, float]:
        network = self.run.network
        with installed(network, subnet):
            batches = images.batches(self.config.train.batch_size)
            return evaluate(network, network.plan(subnet.mask_U), batches, self.config.train)

    @staticmethod
    def merit(metrics: dict[str, float]) -> tuple[float, float]:
        """What is compared: accuracy, then loss."""
        return metrics["top1"], -metrics["loss"]

    # ---- the choice of the subnet -----------------------------------------------------------------------------

    def choose_subnet(self) -> None:
        """Ends the search: the best of the method's candidates, by held-out or training images."""
        run, config = self.run, self.config
        masks = self.method.candidates(run.network, config)
        judges = self.data.train if config.finetune.sample_from_training_set else self.data.holdout
        with self.timed("seconds"):
            subnets, merits = [], []
            for mask_U in masks:
                subnets.append(self.calibrated(mask_U))
                if self.method.has_scores:  # others have a single candidate
                    merits.append(self.merit(self.evaluate_on(subnets[-1], judges)))
                    run.ledger.add_forward(len(judges), self.cost(run.network.plan(subnets[-1].mask_U)))
            chosen = max(range(len(merits)), key=merits.__getitem__, default=0)  # ties: the top-scored one
            subnet = subnets[chosen]
            heldout, test = self.evaluate_heldout(subnet), self.evaluate_on(subnet, self.data.test)
        if merits:
            drawn = [accuracy for accuracy, _ in merits[1:]]
            run.choice = {
                "chosen_candidate": chosen,
                "top_scored_top1": merits[0][0],
                "drawn_top1_mean": float(np.mean(drawn)) if drawn else math.nan,
                "drawn_top1_sd": float(np.std(drawn)) if drawn else math.nan,
            }
        run.best = Best(subnet, run.epoch, heldout, test)
        self.reporter.choice(run, len(subnets))
        self.reporter.save(run, best=True)  # the weights of best.pt are those of the search's end
        if config.finetune.finetune:
            run.start_finetuning(config, subnet)
            if config.sparsity.retires:
                store_only(run.network, subnet.mask_U, run.weight_optimizer)
        else:
            run.phase, run.subnet = "done", subnet
        self.reporter.save(run)

    # ---- small helpers ----------------------------------------------------------------------------------------

    def check_finite(self) -> None:
        loss = self.run.sums.means().get("loss", 0.0)
        if not math.isfinite(loss):
            raise Diverged(
                f"the training loss is {loss} after step {self.run.step} of epoch {self.run.epoch + 1}; the last "
                f"checkpoint is from before. Lower --weight-lr (now {self.config.train.weight_lr}) or --clip-norm"
            )

    def check_ranks(self) -> None:
        """Raises RankError unless all ranks still train the same network."""
        check_equal(self.run.replicated(), f"after {self.run.epoch} epochs and {self.run.step} steps")

    def stop_if_asked(self) -> None:
        """Raises Stopped on all ranks as soon as a signal has reached one of them."""
        if (number := agreed_signal(self.stop.signal)) is not None:
            self.stop.signal = number
            raise Stopped

    def progress_values(self) -> dict[str, float]:
        means = self.run.sums.means()
        return {
            "loss": means["loss"],
            "top1": 100 * means["top1"],
            "keep": float(self.run.network.scores.mean()) if self.run.search is not None else self.kept_units,
        }

    @property
    def kept_units(self) -> float:
        mask_U = self.run.fixed_plan.mask_U
        return float(mask_U.mean()) if len(mask_U) else 1.0

    @contextmanager
    def timed(self, clock: str) -> Iterator[None]:
        """Adds the time spent inside to one of the run's clocks."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.run.network.device.type == "cuda":
                torch.cuda.synchronize(self.run.network.device)
            setattr(self.run, clock, getattr(self.run, clock) + time.perf_counter() - start)
