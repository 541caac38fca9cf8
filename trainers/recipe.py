"""The whole recipe: search, choice of a subnet, fine-tuning; or plain dense training through the same loop."""

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
from data import DataSplits, ImageSet
from trainers.default import StepSettings, evaluate, num_full_passes, train_step, twin_of, weight_step
from trainers.report import Reporter
from trainers.retirement import retire
from trainers.state import CANDIDATE_STREAM, Best, RunState, stream_seed
from utils.metrics import Cost, CostLedger, MetricSums
from utils.plan import Plan
from utils.retirement import store_only
from utils.schedules import kept_fraction, learning_rate_factor
from utils.signals import StopRequest
from utils.subnet import Subnet, best_within_budget, estimate_statistics, installed


class Stopped(Exception):
    """The user asked to stop; the run is saved at the end of a step."""


class Diverged(Exception):
    """The loss is no longer finite."""


@dataclass
class Recipe:
    """A run, its images and its configuration: what all steps of the recipe share.

    Attributes:
        calibration: shuffled training images, not augmented, for batch-norm statistics. The same in every run.
    """

    config: Config
    data: DataSplits
    run: RunState
    reporter: Reporter | None  # None: single steps and evaluation only
    stop: StopRequest | None

    def __post_init__(self) -> None:
        wanted = self.config.finetune.bn_batches * self.config.train.batch_size
        order = np.random.default_rng(0).permutation(len(self.data.train))[:wanted]
        self.calibration = self.data.train.subset(torch.from_numpy(order))

    # ---- the phases -------------------------------------------------------------------------------------------

    def execute(self) -> None:
        """Runs what is left of the recipe.

        Raises: Stopped after the step in which a signal came; Diverged when the loss is not finite.
        """
        while self.run.phase != "done":
            if self.run.epoch < self.last_epoch_of_phase:
                self.train_epoch()
                self.finish_epoch()
            elif self.run.phase == "search":
                self.choose_subnet()
            else:
                self.run.phase = "done"
                self.reporter.save(self.run)
            if self.stop.signal is not None and self.run.phase != "done":
                raise Stopped

    @property
    def last_epoch_of_phase(self) -> int:
        epochs = self.config.train.epochs
        return epochs + self.config.finetune.finetune_epochs if self.run.phase == "finetune" else epochs

    @property
    def batch_size(self) -> int:
        config = self.config
        return config.finetune.finetune_batch_size if self.run.phase == "finetune" else config.train.batch_size

    def settings(self, step: int, steps_per_epoch: int) -> StepSettings:
        """Learning rates and budget of a step of the epoch under way (counted from 0)."""
        config, sparsity = self.config, self.config.sparsity
        if self.run.phase == "finetune":
            return StepSettings(config.finetune.finetune_lr)
        now, total = self.run.epoch * steps_per_epoch + step, config.train.epochs * steps_per_epoch
        warmup = config.train.warmup_length * steps_per_epoch
        factor = learning_rate_factor(config.train.lr_policy, now, total, warmup)
        fraction = kept_fraction(
            *(sparsity.budget_schedule, now, total),
            *(sparsity.keep_ratio, sparsity.budget_start, sparsity.budget_end),
        )
        return StepSettings(
            weight_lr=config.train.weight_lr * factor,
            score_lr=config.train.score_lr * factor,
            kept_fraction=fraction,
            update_scores=now % sparsity.score_every == 0,
        )

    def train_epoch(self) -> None:
        """The rest of the epoch under way."""
        run, config = self.run, self.config
        steps = self.data.train.num_train_batches(self.batch_size)
        batches = self.data.train.train_batches(self.batch_size, config.run.seed, run.epoch, start=run.step)
        with self.reporter.progress(run, steps) as progress, self.timed("epoch_seconds"):
            for images, labels in batches:
                settings = self.settings(run.step, steps)
                run.sums.add(self.step(images, labels, settings), len(labels))
                run.step += 1
                if images.device.type == "cpu" or progress.wants_values():  # on a GPU reading the loss waits
                    self.check_finite()
                values = self.progress_values() if progress.wants_values() else None
                progress.update(len(labels), values)
                if self.stop.signal is not None:
                    raise Stopped

    def step(self, images: Tensor, labels: Tensor, settings: StepSettings) -> dict[str, Tensor]:
        """One step of the current phase, entered into the ledger of costs."""
        run, network = self.run, self.run.network
        if run.search is not None:
            forward, num_backward = self.costs_of_search_step(settings), self.config.sparsity.weight_samples
            metrics = train_step(run.search, images, labels, settings, self.config)
        else:
            plan, num_backward = self.fixed_plan, 1
            forward = [self.cost(plan)]
            metrics = weight_step(network, run.weight_optimizer, plan, images, labels, settings, self.config)
        for cost in (run.ledger, run.epoch_cost):
            cost.add_step(len(labels), forward, num_backward, network.dense_macs)
        return metrics

    def costs_of_search_step(self, settings: StepSettings) -> list[Cost]:
        """What the forward passes of the coming step cost per image of the batch."""
        sparsity, plans = self.config.sparsity, self.run.search.draw.plans
        costs = [
            self.cost(plan)
            for k, plan in enumerate(plans[: num_full_passes(sparsity, settings.update_scores)])
            if k < sparsity.weight_samples or twin_of(plans, k) is None  # a repeated mask runs once
        ]
        if settings.update_scores and sparsity.subbatch:  # each of the other masks sees its part of the batch
            parts = [self.cost(plan) for plan in plans[1:]]
            costs.append(tuple(sum(values) // len(parts) for values in zip(*parts, strict=True)))
        return costs

    def cost(self, plan: Plan) -> Cost:
        return self.run.network.executed_macs(plan), self.run.network.padded_macs(plan)

    @property
    def retires(self) -> bool:
        """Whether units leave the parameters: an exact saving that only compact execution can make."""
        return self.config.sparsity.retire == "on" and self.config.sparsity.execution == "compact"

    @property
    def fixed_plan(self) -> Plan:
        network, subnet = self.run.network, self.run.subnet
        return network.dense_plan if subnet is None else network.plan(subnet.mask_U)

    # ---- the end of an epoch ----------------------------------------------------------------------------------

    def finish_epoch(self) -> None:
        """Evaluates, reports, remembers the best state, saves."""
        run, sparsity = self.run, self.config.sparsity
        settings = self.settings(run.step - 1, self.data.train.num_train_batches(self.batch_size))
        with self.timed("seconds"):
            if run.search is not None and self.retires:
                retire(run.search)
            subnet = self.current_subnet(settings.kept_fraction)
            heldout, test = self.evaluate_subnet(subnet)
        run.epoch += 1
        run.step = 0
        # while the budget falls, a state that still exceeds the final one is no candidate
        allowed = run.search is None or settings.kept_fraction <= sparsity.keep_ratio + 1e-9
        is_best = allowed and (run.best is None or not heldout or self.merit(heldout) > self.merit(run.best.heldout))
        if is_best:
            run.best = Best(subnet, run.epoch, heldout, test)
        self.check_finite()
        self.reporter.epoch_end(run, subnet, settings, heldout, test)
        run.train_seconds += run.epoch_seconds
        run.sums, run.epoch_cost, run.epoch_seconds = MetricSums(), CostLedger(), 0.0
        self.reporter.save(run, best=is_best, epoch_end=True)

    def current_subnet(self, fraction: float) -> Subnet:
        """What would be shipped now: the top-scored subnet in the search, else the network as it is."""
        network = self.run.network
        if self.run.search is not None:
            return self.calibrated(self.top_scored_mask(fraction))
        mask_U = self.fixed_plan.mask_U
        statistics = {
            name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in network.batch_norms().items()
        }
        return Subnet(mask_U, statistics)

    def calibrated(self, mask_U: np.ndarray) -> Subnet:
        """A subnet with batch-norm statistics from the calibration images."""
        network = self.run.network
        batches = self.calibration.batches(self.config.train.batch_size)
        subnet = estimate_statistics(network, mask_U, batches, self.config.train)
        self.run.ledger.add_forward(len(self.calibration), self.cost(network.plan(subnet.mask_U)))
        return subnet

    def evaluate_subnet(self, subnet: Subnet) -> tuple[dict[str, float], dict[str, float]]:
        """Held-out metrics, which choose, and test metrics, which are only reported."""
        heldout = self.evaluate_on(subnet, self.data.holdout) if len(self.data.holdout) else {}
        self.run.ledger.add_forward(len(self.data.holdout), self.cost(self.run.network.plan(subnet.mask_U)))
        return heldout, self.evaluate_on(subnet, self.data.test)

    def evaluate_on(self, subnet: Subnet, images: ImageSet) -> dict[str, float]:
        network = self.run.network
        with installed(network, subnet):
            batches = images.batches(self.config.train.batch_size)
            return evaluate(network, network.plan(subnet.mask_U), batches, self.config.train)

    @staticmethod
    def merit(metrics: dict[str, float]) -> tuple[float, float]:
        """What is compared: accuracy, then loss."""
        return metrics["top1"], -metrics["loss"]

    # ---- the choice of the subnet -----------------------------------------------------------------------------

    def top_scored_mask(self, fraction: float) -> np.ndarray:
        scores_U = self.run.network.scores.detach().cpu().numpy()
        return self.best_of(scores_U, scores_U, fraction)

    def drawn_mask(self, fraction: float, random: np.random.Generator) -> np.ndarray:
        """A mask drawn from the scores; where it exceeds the budget, its least likely units are left out."""
        scores_U = self.run.network.scores.detach().cpu().numpy()
        return self.best_of(np.where(random.random(len(scores_U)) < scores_U, scores_U, 0), scores_U, fraction)

    def best_of(self, values_U: np.ndarray, scores_U: np.ndarray, fraction: float) -> np.ndarray:
        network, by_layer = self.run.network, self.config.sparsity.constrain_by_layer
        groups = network.unit_groups() if by_layer else [slice(0, network.num_units)]
        vital = network.graph.vital_groups if network.semantics == "unit" else []
        return best_within_budget(values_U, scores_U, groups, fraction, vital)

    def choose_subnet(self) -> None:
        """Ends the search: the best of the top-scored and some drawn subnets, by held-out or training images.

        The candidates come from the scores and a stream of their own, so choosing again gives the same subnet.
        """
        run, config = self.run, self.config
        ratio = config.sparsity.keep_ratio
        random = np.random.default_rng(stream_seed(config.run.seed, CANDIDATE_STREAM))
        masks = [self.top_scored_mask(ratio)]
        masks += [self.drawn_mask(ratio, random) for _ in range(config.finetune.num_subnets)]
        judges = self.data.train if config.finetune.sample_from_training_set else self.data.holdout
        with self.timed("seconds"):
            candidates = []
            for mask_U in masks:
                subnet = self.calibrated(mask_U)
                candidates.append((self.merit(self.evaluate_on(subnet, judges)), subnet))
                run.ledger.add_forward(len(judges), self.cost(run.network.plan(subnet.mask_U)))
            chosen = max(range(len(candidates)), key=lambda i: candidates[i][0])  # ties: the top-scored one
            subnet = candidates[chosen][1]
            heldout, test = self.evaluate_subnet(subnet)
        drawn = [accuracy for (accuracy, _), _ in candidates[1:]]
        run.choice = {
            "chosen_candidate": chosen,
            "top_scored_top1": candidates[0][0][0],
            "drawn_top1_mean": float(np.mean(drawn)) if drawn else math.nan,
            "drawn_top1_sd": float(np.std(drawn)) if drawn else math.nan,
        }
        run.best = Best(subnet, run.epoch, heldout, test)
        self.reporter.choice(run, len(candidates))
        self.reporter.save(run, best=True)  # the weights of best.pt are those of the search's end
        if config.finetune.finetune:
            run.start_finetuning(config, subnet)
            if self.retires:
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

    def progress_values(self) -> dict[str, float]:
        means = self.run.sums.means()
        return {
            "loss": means["loss"],
            "top1": 100 * means["top1"],
            "keep": float(self.run.network.scores.mean()) if self.run.search is not None else self.kept_units,
        }

    @property
    def kept_units(self) -> float:
        mask_U = self.fixed_plan.mask_U
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
