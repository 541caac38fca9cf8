"""What a run tells: progress, one row an epoch, TensorBoard, checkpoints; the result is in `trainers/result.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from args import Config
from data import DataSplits
from trainers.default import StepSettings
from trainers.devices import device_name
from trainers.result import summarise
from trainers.state import RunState
from utils.channels.subnet import Subnet
from utils.ranks.exchange import num_ranks
from utils.run import checkpoint
from utils.run.board import Board
from utils.run.folder import write_csv, write_json
from utils.run.progress import announce

TAGS = {  # column of results.csv -> curve in TensorBoard
    "train_loss": "train/loss",
    "train_top1": "train/top1",
    "train_top5": "train/top5",
    "heldout_loss": "heldout/loss",
    "heldout_top1": "heldout/top1",
    "heldout_top5": "heldout/top5",
    "test_loss": "test/loss",
    "test_top1": "test/top1",
    "test_top5": "test/top5",
    "budget": "sparsity/budget",
    "keep_ratio_expected": "sparsity/keep_ratio_expected",
    "keep_ratio_drawn": "sparsity/keep_ratio_drawn",
    "v": "scores/v",
    "max_score": "scores/max",
    "score_entropy": "scores/entropy_bits",
    "share_zero": "scores/share_exactly_0",
    "share_one": "scores/share_exactly_1",
    "loss_difference": "vrpge/loss_difference",
    "forward_flops_ratio": "flops/forward_ratio",
    "forward_flops_ratio_mean": "flops/forward_ratio_running_mean",
    "subnet_flops_ratio": "flops/subnet_ratio",
    "train_flops_ratio": "flops/train_ratio",
    "weight_lr": "lr/weights",
    "score_lr": "lr/scores",
    "images_per_second": "perf/images_per_second",
    "step_ms": "perf/step_ms",
}
PAGES = {
    "Accuracy": {
        "top-1": ["train/top1", "heldout/top1", "test/top1"],
        "loss": ["train/loss", "heldout/loss", "test/loss"],
    },
    "Sparsity": {
        "kept units": ["sparsity/budget", "sparsity/keep_ratio_expected", "sparsity/keep_ratio_drawn"],
        "FLOPs": ["flops/forward_ratio", "flops/forward_ratio_running_mean", "flops/subnet_ratio"],
        "decided scores": ["scores/share_exactly_0", "scores/share_exactly_1", "scores/entropy_bits"],
    },
    "Speed": {"images/s": ["perf/images_per_second"], "step": ["perf/step_ms"]},
}


class Reporter:
    """Writes into a run folder; the training loop tells it what happened.

    Args:
        folder: of the run, with `logs/` and `checkpoints/`.
        run: as it starts. What an interrupted run reported beyond its finished epochs is dropped.
    """

    def __init__(self, folder: Path, config: Config, data: DataSplits, run: RunState) -> None:
        self.folder, self.config, self.data = folder, config, data
        self.save_failed = False
        (folder / "summary.json").unlink(missing_ok=True)  # of a run that was finished before it became longer
        if run.history:
            write_csv(folder / "results.csv", run.history)
        self.board = Board(folder / "logs", purge_step=run.epoch + 1 if run.epoch else None)
        self.board.layout(PAGES)

    def epoch_end(
        self,
        run: RunState,
        subnet: Subnet,
        settings: StepSettings,
        heldout: dict[str, float],
        test: dict[str, float],
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
            "weight_lr": settings.weight_lr,
            "images_per_second": run.sums.count / seconds,
            "step_ms": 1000 * seconds * run.batch_size(self.config) / run.sums.count,
        }
        if run.search is not None:
            values |= score_facts(network.scores)
            values |= {
                "budget": settings.keep_ratio,
                "score_lr": settings.score_lr,
                **{name: means[name] for name in ("v", "loss_difference") if name in means},
            }
            if run.search.masks is not None:
                values["keep_ratio_drawn"] = float(run.search.masks.own_KU[0].double().mean())
        row = {"epoch": run.epoch, "phase": run.phase, **{name: values.get(name, "") for name in TAGS}}
        run.history.append({**row, "epoch_seconds": run.epoch_seconds})
        try:
            self._write(run, values)
        except OSError as error:  # such as a full disk: no reason to lose the training
            announce(f"warning: the report of epoch {run.epoch} could not be written ({error}); training goes on")
        seen = (("held-out", heldout), ("test", test))
        accuracies = "".join(f", {name} {metrics['top1']:.2f} %" for name, metrics in seen if metrics)
        announce(
            f"{run.phase} epoch {run.epoch}/{self.config.total_epochs}: "
            f"train loss {values['train_loss']:.3f}{accuracies} with "
            f"{100 * values['subnet_flops_ratio']:.1f} % of the dense FLOPs, "
            f"{values['step_ms']:.0f} ms a step"
        )

    def _write(self, run: RunState, values: dict[str, float]) -> None:
        self.board.scalars(run.epoch, {TAGS[name]: value for name, value in values.items()})
        if run.search is not None:
            scores = {name: layer.scores for name, layer in run.network.layers.items()}
            self.board.score_histograms(run.epoch, scores)
            self.board.score_map(run.epoch, scores)
        self.board.flush()
        write_csv(self.folder / "results.csv", run.history)

    def choice(self, run: RunState, num_candidates: int) -> None:
        kept = int(run.best.subnet.mask_U.sum())
        which = "a drawn one" if run.choice.get("chosen_candidate") else "the top-scored one"
        judged = "training" if self.config.finetune.sample_from_training_set else "held-out"
        how = f"chose {which} of {num_candidates} subnets by {judged} images" if run.choice else "pruned"
        announce(f"{how}: {kept} of {run.network.num_units} units, test {run.best.test['top1']:.2f} %")

    def save(self, run: RunState, best: bool = False, epoch_end: bool = False) -> None:
        """Writes last.pt, with `best` also best.pt, at the end of every `save_every`-th epoch a numbered one too.

        A disk that refuses is reported and the run goes on.
        """
        folder = self.folder / "checkpoints"
        state = run.state_dict(self.config, self.data)
        files = {folder / "last.pt": state}
        if best:
            files[folder / "best.pt"] = run.best_state(self.config, self.data)
        every = self.config.run.save_every
        if epoch_end and every and run.epoch % every == 0:
            files[folder / f"epoch_{run.epoch}.pt"] = state
        self.save_failed = False
        for path, content in files.items():
            try:
                checkpoint.save(path, content)
            except checkpoint.CheckpointError as error:
                self.save_failed = True
                announce(f"warning: {error}; training goes on without it")

    def finish(self, run: RunState) -> dict[str, Any]:
        """summary.json, the hyper-parameters in TensorBoard, and the last lines for the terminal."""
        summary = summarise(run, self.config, self.data, self.folder)
        write_json(self.folder / "summary.json", summary)
        lines = [f"    {name}: {value}" for name, value in summary.items()]
        self.board.text("summary", "\n".join(lines), run.epoch)
        self.board.close()
        return summary

    def close(self) -> None:
        self.board.close()


class SilentReporter(Reporter):
    """The reporter of all ranks but the first: it has no folder and writes nothing."""

    def __init__(self, config: Config) -> None:
        self.config, self.save_failed = config, False

    def epoch_end(self, *_: object) -> None:
        pass

    def choice(self, *_: object) -> None:
        pass

    def save(self, run: RunState, best: bool = False, epoch_end: bool = False) -> None:
        pass

    def close(self) -> None:
        pass


def score_facts(scores_U: Tensor) -> dict[str, float]:
    """How decided the scores are; entropy is the mean per unit, in bits."""
    s = scores_U.detach().double()
    entropy = torch.special.entr(s) + torch.special.entr(1 - s)
    return {
        "keep_ratio_expected": float(s.mean()),
        "max_score": float(s.max()),
        "score_entropy": float(entropy.mean()) / math.log(2),
        "share_zero": float((s == 0).double().mean()),
        "share_one": float((s == 1).double().mean()),
    }


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
        announce(f"{config.method}: {keeping}; {network.execution} execution")
