"""The curves of a run in TensorBoard: their names, their charts, and the values within an epoch.

All curves have one horizontal axis: the number of finished training steps of all phases.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from args import OPTIONS, Config, config_to_dict
from trainers.default import StepSettings
from trainers.state import RunState
from utils.channels.network import SparseNetwork
from utils.options import why_unread

TAGS = {  # column of results.csv -> curve with a point at the end of every epoch
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
    "entropy_left": "scores/entropy_left",
    "top_agreement": "scores/top_agreement",
    "loss_difference": "vrpge/loss_difference",
    "unfit_steps": "vrpge/unfit_steps",
    "forward_flops_ratio": "flops/forward_ratio",
    "forward_flops_ratio_mean": "flops/forward_ratio_running_mean",
    "subnet_flops_ratio": "flops/subnet_ratio",
    "train_flops_ratio": "flops/train_ratio",
    "train_flops_executed": "flops/train_executed",
    "weight_lr": "lr/weights",
    "score_lr": "lr/scores",
    "images_per_second": "perf/images_per_second",
    "step_ms": "perf/step_ms",
    "evaluation_seconds": "perf/evaluation_seconds",
}
TOP5 = ("train_top5", "heldout_top5", "test_top5")  # say nothing where there are five classes or fewer
POINTS_PER_EPOCH = 10  # or a few more, of the curves that also have points within an epoch; in short epochs every step

PAGES = {
    "Compare runs": {  # one quantity a chart, so that a chart has one curve for each run
        "test top-1 (%)": ["test/top1"],
        "held-out top-1 (%)": ["heldout/top1"],
        "training loss of the last steps": ["steps/train_loss"],
        "kept share of the channels, expected": ["sparsity/keep_ratio_expected"],
        "budget": ["sparsity/budget"],
        "FLOPs of the subnet, of dense": ["flops/subnet_ratio"],
        "training FLOPs so far, of dense": ["flops/train_ratio"],
        "the same with padding": ["flops/train_executed"],
        "phase: 0 search, 1 fine-tuning": ["progress/phase"],
    },
    "One run": {  # several quantities a chart: select a single run on the left
        "top-1 (%)": ["train/top1", "heldout/top1", "test/top1"],
        "loss": ["train/loss", "heldout/loss", "test/loss"],
        "kept share of the channels": [
            *("sparsity/budget", "sparsity/keep_ratio_expected", "sparsity/keep_ratio_drawn"),
        ],
        "kept share of each layer": ["layers/"],
        "FLOPs, of dense": ["flops/forward_ratio", "flops/forward_ratio_running_mean", "flops/subnet_ratio"],
        "decided scores": [
            *("scores/share_exactly_0", "scores/share_exactly_1", "scores/entropy_left", "scores/top_agreement"),
        ],
    },
    "Speed": {
        "images/s": ["perf/images_per_second"],
        "ms a step": ["perf/step_ms"],
        "waiting for images (% of the epoch)": ["perf/data_wait_percent"],
        "evaluation at the end of an epoch (s)": ["perf/evaluation_seconds"],
    },
}

# Columns of the HParams tab. TensorBoard takes the columns of one run for all of them, so they are always the same.
COLUMNS = (
    *("method", "arch", "width_mult", "set", "keep_ratio", "budget", "estimator", "budget_schedule", "score_lr"),
    *("weight_lr", "epochs", "search_until", "finetune_epochs", "batch_size", "seed"),
)
WHERE_FROM = ("data", "workers")  # like the group of the run: they decide no result
FIRST_COLUMNS = ("method", "arch", "keep_ratio", "epochs", "seed")
RESULTS = {  # entry of summary.json -> curve of one point, and its heading in the HParams tab
    "test_top1": ("result/test_top1", "test top-1 (%)"),
    "heldout_top1": ("result/heldout_top1", "held-out top-1 (%)"),
    "flops_ratio": ("result/flops_ratio", "inference FLOPs, of dense"),
    "train_flops_ratio": ("result/train_flops_ratio", "training FLOPs, of dense"),
    "seconds": ("result/seconds", "seconds"),
}


def is_point_due(step: int, steps: int) -> bool:
    """Whether curves get a point after a step of an epoch; the last one has its point anyway. Each makes a GPU wait."""
    return step < steps and step % max(1, steps // POINTS_PER_EPOCH) == 0


def point(run: RunState, settings: StepSettings, steps_per_epoch: int) -> dict[str, float]:
    """The values of the curves that have points within an epoch, by tag. Waits for the device.

    The training loss and accuracy are those of the steps since the last point; there are none before the first step.
    """
    values = {
        "lr/weights": settings.weight_lr,
        "progress/epoch": run.epoch + run.step / steps_per_epoch,
        "progress/phase": float(run.phase != "search"),
    }
    if run.search is not None:
        scores_U = run.network.scores.detach().double().cpu()
        values |= {
            "lr/scores": settings.score_lr,
            "sparsity/budget": settings.keep_ratio,
            "sparsity/keep_ratio_expected": float(scores_U.mean()),
            **layer_shares(run.network, scores_U),
        }
    elif run.subnet is not None:
        values |= layer_shares(run.network, torch.from_numpy(run.plan.mask_U).double())
    return values | since_last_point(run)


def since_last_point(run: RunState) -> dict[str, float]:
    """Means of loss and top-1 (per cent) over the images since the last call in this epoch."""
    sums = {name: mean * run.sums.count for name, mean in run.sums.means().items() if name in ("loss", "top1")}
    sums["count"] = run.sums.count
    new = {name: value - run.at_last_point.get(name, 0.0) for name, value in sums.items()}
    run.at_last_point = sums
    if not new["count"]:
        return {}
    return {
        "steps/train_loss": new["loss"] / new["count"],
        "steps/train_top1": 100 * new["top1"] / new["count"],
    }


def layer_shares(network: SparseNetwork, values_U: Tensor) -> dict[str, float]:
    """The kept share of the channels of each maskable layer, by tag, of scores (expected) or of a mask."""
    parts = network.split(values_U)
    return {f"layers/{name}": float(part.mean()) for name, part in zip(network.layers, parts, strict=True)}


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


def columns() -> dict[str, type]:
    """Name and type of the columns of the HParams tab."""
    return {name: OPTIONS[name].kind for name in COLUMNS} | {"others": str}


def hyperparameters(config: Config) -> dict[str, Any]:
    """The values of the columns that mean something in a run.

    "others" lists all other options that the method reads and that differ from their defaults.
    """
    values = config_to_dict(config)
    read = {name: value for name, value in values.items() if not why_unread(OPTIONS, values, name)}
    others = [
        f"{name}={value}"
        for name, value in read.items()
        if value != OPTIONS[name].default
        and not (name in COLUMNS or name in WHERE_FROM or OPTIONS[name].group == "run")
    ]
    return {name: read[name] for name in COLUMNS if name in read} | {"others": ", ".join(others)}
