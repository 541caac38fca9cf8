"""What a run tells: progress, one row an epoch, TensorBoard, checkpoints; the result is in `trainers/result.py`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from args import Config
from data import DataSplits
from trainers import curves
from trainers.default import StepSettings
from trainers.devices import device_name
from trainers.result import summarise
from trainers.state import RunState
from utils.algorithm.decision import AGREEMENT, ENTROPY_LEFT
from utils.channels.subnet import Subnet
from utils.ranks.exchange import num_ranks
from utils.run.board import Board
from utils.run.checkpoint import LAST
from utils.run.folder import write_arrays, write_csv, write_json
from utils.run.progress import announce
from utils.run.refusals import Refusals
from utils.run.store import Store

EVENTS = "the event file of TensorBoard"


class Reporter:
    """Writes into a run folder; the training loop tells it what happened.

    Args:
        folder: of the run, with `checkpoints/`.
        run: as it starts. What an interrupted run reported beyond its finished steps is dropped.
        goes_on_from: name of the checkpoint that it was restored from; None for a run before its first step.
    """

    def __init__(
        self, folder: Path, config: Config, data: DataSplits, run: RunState, goes_on_from: str | None = None
    ) -> None:
        self.folder, self.config, self.data = folder, config, data
        self.refusals = Refusals()
        self.store = Store(folder, self.refusals, goes_on_from == LAST)
        # a checkpoint holds the weights, as many numbers of momentum, and the weights of the result
        weights = run.network.model.state_dict().values()
        self.store.warn_if_short(3 * sum(weight.numel() * weight.element_size() for weight in weights))
        with self.refusals.tolerated("summary.json"):  # that of a run which was finished before it became longer
            (folder / "summary.json").unlink(missing_ok=True)
        self._write_rows(run)
        self.board = Board(folder, purge_step=run.steps + 1 if run.steps else None)
        with self._curves():
            self.board.layout(curves.PAGES)
            self.board.hyperparameters(
                curves.columns(), curves.hyperparameters(config), dict(curves.RESULTS.values()), curves.FIRST_COLUMNS
            )

    def start(self, run: RunState, settings: StepSettings, steps: int) -> None:
        """The state before the first step; a resumed run has told it.

        Args:
            settings: of the next step.
            steps: in an epoch of the current phase.
        """
        if run.search is not None and (run.epoch, run.step) == (0, 0):
            run.score_history.add(0, run.network.scores)
        self._write_scores(run)
        if run.steps == 0:
            with self._curves():
                self.board.scalars(0, curves.point(run, settings, steps))
                self._write_pictures(run)
                if run.subnet is not None:
                    self._write_subnet(run, run.subnet)

    def step_end(self, run: RunState, settings: StepSettings, steps: int) -> None:
        """Now and then a point of the curves within an epoch; the one at its end is written by `epoch_end`."""
        if curves.is_point_due(run.step, steps):
            with self._curves():
                self.board.scalars(run.steps, curves.point(run, settings, steps))

    def epoch_end(
        self,
        run: RunState,
        subnet: Subnet,
        settings: StepSettings,
        heldout: dict[str, float],
        test: dict[str, float],
        evaluation_seconds: float,
    ) -> None:
        """One row of results.csv, the same numbers as curves, and the scores as histograms and as a picture."""
        network, means = run.network, run.sums.means()
        plan = network.plan(subnet.mask_U)
        seconds = max(run.epoch_seconds, 1e-9)
        values = {
            "train_loss": means["loss"],
            "train_top1": 100 * means["top1"],
            "train_top5": 100 * means["top5"],
            **{f"heldout_{name}": value for name, value in heldout.items()},
            **{f"test_{name}": value for name, value in test.items()},
            "forward_flops_ratio": run.epoch_cost.mean_forward_ratio,
            "forward_flops_ratio_mean": run.ledger.mean_forward_ratio,
            "subnet_flops_ratio": network.subnet_macs(plan) / network.dense_macs,
            "train_flops_ratio": run.ledger.train_flops_ratio,
            "train_flops_executed": run.ledger.padded_train_flops_ratio,
            "weight_lr": settings.weight_lr,
            "images_per_second": run.sums.count / seconds,
            "step_ms": 1000 * seconds * run.batch_size(self.config) / run.sums.count,
            "evaluation_seconds": evaluation_seconds,
        }
        if self.data.num_classes <= 5:
            values = {name: value for name, value in values.items() if name not in curves.TOP5}
        if run.phase == "search" and self.config.budget_falls:
            values["budget"] = settings.keep_ratio
        if run.search is not None:
            values |= curves.score_facts(network.scores)
            values |= {
                "entropy_left": run.decision.entropy_ratio,
                "top_agreement": run.decision.agreement,
                "budget": settings.keep_ratio,
                "score_lr": settings.score_lr,
                **{name: means[name] for name in ("v", "loss_difference", "unfit_steps") if name in means},
            }
            if run.search.masks is not None:
                values["keep_ratio_drawn"] = float(run.search.masks.own_KU[0].double().mean())
        where = {"epoch": run.epoch, "phase": run.phase, "step": run.steps}
        clocks = {"epoch_seconds": run.epoch_seconds, "data_seconds": run.data_seconds}
        run.history.append({**where, **{name: values.get(name, "") for name in curves.TAGS}, **clocks})
        if run.search is not None:
            run.score_history.add(run.epoch, network.scores)
        with self._curves():
            self._write_curves(run, settings, values)
        self._write_rows(run)
        seen = (("held-out", heldout), ("test", test))
        accuracies = "".join(f", {name} {metrics['top1']:.2f} %" for name, metrics in seen if metrics)
        announce(
            f"{run.phase} epoch {run.epoch}/{self.config.total_epochs}: "
            f"train loss {values['train_loss']:.3f}{accuracies} with "
            f"{100 * values['subnet_flops_ratio']:.1f} % of the dense FLOPs, "
            f"{values['step_ms']:.0f} ms a step"
        )

    def _write_curves(self, run: RunState, settings: StepSettings, values: dict[str, float]) -> None:
        steps = self.data.train.num_train_batches(run.batch_size(self.config))
        wait = {"perf/data_wait_percent": 100 * run.data_seconds / max(run.epoch_seconds, 1e-9)}
        shown = {curves.TAGS[name]: value for name, value in values.items()}
        self.board.scalars(run.steps, curves.point(run, settings, steps) | wait | shown)
        self._write_pictures(run)
        self.board.flush()

    def _write_rows(self, run: RunState) -> None:
        if run.history:
            columns = run.history[-1]  # rows that an older version wrote may lack some
            rows = [{name: row.get(name, "") for name in columns} for row in run.history]
            with self.refusals.tolerated("results.csv"):
                write_csv(self.folder / "results.csv", rows)

    def _write_pictures(self, run: RunState) -> None:
        if run.search is not None:
            scores = {name: layer.scores for name, layer in run.network.layers.items()}
            self.board.score_histograms(run.steps, scores)
            self.board.score_map(run.steps, scores)

    def _write_subnet(self, run: RunState, subnet: Subnet) -> None:
        mask_U = torch.from_numpy(run.network.plan(subnet.mask_U).mask_U)
        parts = zip(run.network.layers, run.network.split(mask_U), strict=True)
        self.board.subnet(run.steps, dict(parts))

    def _write_scores(self, run: RunState) -> None:
        with self.refusals.tolerated("scores.npz"):
            if record := run.score_record():
                write_arrays(self.folder / "scores.npz", record)

    def choice(self, run: RunState, num_candidates: int) -> None:
        kept = int(run.best.subnet.mask_U.sum())
        which = "a drawn one" if run.choice.get("chosen_candidate") else "the top-scored one"
        judged = "training" if self.config.finetune.sample_from_training_set else "held-out"
        how = f"chose {which} of {num_candidates} subnets by {judged} images" if run.choice else "pruned"
        if self.config.ends_when_decided and run.decision is not None:
            announce(end_of_search(run, self.config))
        announce(f"{how}: {kept} of {run.network.num_units} units, test {run.best.test['top1']:.2f} %")
        with self._curves():
            self._write_subnet(run, run.best.subnet)
            fixed = " From here on the chosen subnet is trained alone." if self.config.finetunes else ""
            self.board.text(
                "phase", f"The search ended at step {run.steps}, after {run.epoch} epochs.{fixed}", run.steps
            )

    def save(self, run: RunState, epoch_end: bool = False) -> bool:
        """Writes the checkpoints, at the end of every `save_every`-th epoch a numbered one too, then scores.npz.

        A disk that refuses is reported and the run goes on.

        Returns: whether the run can go on from here.
        """
        every = self.config.run.save_every
        numbered = f"epoch_{run.epoch}.pt" if epoch_end and every and run.epoch % every == 0 else None
        saved = self.store.save(run.state_dict(self.config, self.data), numbered)
        self._write_scores(run)
        return saved

    def finish(self, run: RunState) -> dict[str, Any] | None:
        """summary.json, the last file of a run, and in TensorBoard the hyper-parameters.

        Returns: the content of summary.json; None if that was not written because another file is missing or old. Then
            the run can be resumed, which writes all of them.
        """
        self.store.copy_result(run.best.content)
        if not self.refusals.reasons.keys() <= {EVENTS}:
            return None
        summary = summarise(run, self.config, self.data, self.folder)
        with self.refusals.tolerated("summary.json"):
            write_json(self.folder / "summary.json", summary)
        if "summary.json" in self.refusals.reasons:
            return None
        with self._curves():
            lines = [f"    {name}: {value}" for name, value in summary.items()]
            self.board.text("summary", "\n".join(lines), run.steps)
            results = {tag: summary[name] for name, (tag, _) in curves.RESULTS.items() if summary[name] is not None}
            self.board.scalars(run.steps, results)
            self.board.finished()
            self.board.close()
        return summary

    def close(self) -> None:
        with self._curves():
            self.board.close()

    def _curves(self) -> AbstractContextManager[None]:
        return self.refusals.tolerated(EVENTS)


class SilentReporter(Reporter):
    """The reporter of all ranks but the first: it has no folder and writes nothing."""

    def __init__(self, config: Config) -> None:
        self.config, self.refusals = config, Refusals()

    def start(self, *_: object) -> None:
        pass

    def step_end(self, *_: object) -> None:
        pass

    def epoch_end(self, *_: object) -> None:
        pass

    def choice(self, *_: object) -> None:
        pass

    def save(self, run: RunState, epoch_end: bool = False) -> bool:
        return True

    def close(self) -> None:
        pass


def progress_values(run: RunState) -> dict[str, float]:
    """What the progress of a run shows beside its speed. Waits for the device."""
    means, mask_U = run.sums.means(), run.plan.mask_U
    kept = float(mask_U.mean()) if len(mask_U) else 1.0
    return {
        "loss": means["loss"],
        "top1": 100 * means["top1"],
        "keep": kept if run.search is None else float(run.network.scores.mean()),
    }


def end_of_search(run: RunState, config: Config) -> str:
    """Why a search ended that waits for its scores to be decided."""
    decision, longest = run.decision, config.search_epochs
    state = (
        f"the entropy of the scores is {100 * decision.entropy_ratio:.1f} % of that of scores that know nothing, and "
        f"{100 * decision.agreement:.1f} % of the top-scored units are those of the epoch before"
    )
    if run.decided:
        return f"the scores are decided after {run.epoch} of at most {longest} epochs of search: {state}"
    wanted = f"at most {100 * ENTROPY_LEFT:g} % and at least {100 * AGREEMENT:g} %"
    return f"the search ends after its {longest} epochs, before its scores are decided ({wanted}): {state}"


# ---- the first lines of a run ----


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
        masks = "masks of its own" if config.independent_masks else "the same masks"
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
        keeping = f"keeping {100 * kept:g} % of {budget}"
        if config.method == "dense":  # the channels of a subnet that it starts from
            keeping = f"training {int(run.plan.mask_U.sum()):,} of {units}"
        shapes = " with fixed shapes" if config.fixes_shapes else ""
        announce(f"{config.method}: {keeping}; {network.execution} execution{shapes}")
