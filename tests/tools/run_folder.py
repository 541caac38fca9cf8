"""The folder of a run with numbers that are all different, so that a report which mixes them up is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.run import checkpoint
from utils.run.folder import write_csv

OPTIONS = {
    **{"arch": "vgg16", "set": "FashionMNIST-mini", "width_mult": 0.25, "method": "vrpge", "keep_ratio": 0.5},
    **{"epochs": 3, "finetune_epochs": 1, "seed": 7},
}
SUMMARY = {
    **{"test_top1": 43.0, "test_loss": 1.77, "heldout_top1": 42.0, "test_images": 400, "heldout_images": 300},
    **{"flops_ratio": 0.234, "params_kept": 0.345, "units_kept": 0.456, "train_flops_ratio": 0.567},
    **{"train_seconds": 100.0, "seconds": 140.0, "epochs": 4, "best_epoch": 4, "data_fingerprint": "abc"},
}
ENVIRONMENT = {
    **{"cpu": "Some CPU", "cpu_capability": "AVX2", "gpu": None, "num_threads": 2},
    **{"torch": "9.8.7", "git_commit": "0123456789abcdef", "git_dirty": False},
}
SCORES = np.array(
    [
        [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
        [0.75, 0.25, 0.5, 0.5, 0.25, 0.25, 0.5, 0.5, 0.5, 0.25],
        [1, 0, 0.75, 0.5, 0.125, 0, 0.5, 0.5, 0.75, 0.125],
        [1, 0, 1, 0.5, 0, 0, 0.25, 0.5, 1, 0],
    ],
    dtype=np.float16,
)
CHOSEN = np.array([1, 0, 1, 1, 0, 0, 0, 1, 1, 0], dtype=bool)


def history() -> list[dict[str, Any]]:
    """Three epochs of search and one of fine-tuning."""
    return [
        {
            **{"epoch": i, "phase": "search" if i < 4 else "finetune"},
            **{"train_loss": 2.1 - 0.1 * i, "train_top1": 1 + 10.0 * i},
            **{"heldout_loss": 2.2 - 0.1 * i, "heldout_top1": 2 + 10.0 * i},
            **{"test_loss": 2.3 - 0.1 * i, "test_top1": 3 + 10.0 * i},
            **{"subnet_flops_ratio": 0.2 + 0.01 * i, "train_flops_ratio": 0.6 - 0.01 * i},
            **{"epoch_seconds": 10.0 * i, "data_seconds": 1.0 * i, "evaluation_seconds": 4.0 + i},
        }
        for i in (1, 2, 3, 4)
    ]


def write_run(
    folder: Path,
    *,
    options: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    rows: list[dict[str, Any]] | None = None,
    scores: bool = True,
    best: bool = True,
) -> Path:
    """Writes a finished run; what is given replaces or adds to the numbers above. An empty summary: not finished."""
    (folder / "checkpoints").mkdir(parents=True)
    told = {**OPTIONS, "name": folder.name, **(options or {})}
    (folder / "config.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in told.items()))
    if (rows := history() if rows is None else rows) != []:
        write_csv(folder / "results.csv", rows)
    if summary != {}:
        (folder / "summary.json").write_text(json.dumps({**SUMMARY, **(summary or {})}))
    (folder / "env.json").write_text(json.dumps({**ENVIRONMENT, **(environment or {})}))
    if scores:
        write_scores(folder, chosen=CHOSEN)
    if best:
        # "head" is no layer whose channels are chosen.
        model = {"first.scores": torch.zeros(4), "second.scores": torch.zeros(6), "head.weight": torch.zeros(5, 2)}
        state = {"model": model, "widths": {"first": 3, "second": 2, "head": 5}}
        checkpoint.save(folder / "checkpoints" / "best.pt", state)
    return folder


def write_scores(folder: Path, scores: np.ndarray = SCORES, **more: np.ndarray) -> None:
    """Writes scores.npz of layers with 4 and 6 units."""
    arrays = {
        "epochs": np.arange(len(scores)),
        "scores": scores,
        "names": np.array(["first", "second"]),
        "first_unit": np.array([0, 4]),
        "widths": np.array([4, 6]),
    }
    np.savez(folder / "scores.npz", **arrays, **more)


def write_dense(folder: Path, **summary: Any) -> Path:
    """A dense run of the same network, images and machine."""
    rows = [row | {"phase": "dense"} for row in history()]
    numbers = {"test_top1": 83.0, "flops_ratio": 1.0, "params_kept": 1.0, "units_kept": None, "train_flops_ratio": 1.1}
    told = {**numbers, "train_seconds": 160.0, "seconds": 200.0, **summary}
    return write_run(folder, options={"method": "dense"}, summary=told, rows=rows, scores=False, best=False)
