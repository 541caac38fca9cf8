#!/usr/bin/env python3
"""Trains the same three runs from two checkouts and compares what they end with, bit by bit.

    python .ci/equal_runs.py CHECKOUT CHECKOUT [--short]

The runs: two seeds of configs/quickstart.yaml, and configs/best_resnet8.yaml, which searches with the estimator
linear_cv_gates under a budget of FLOPs. Compared are all weights, scores and statistics of last.pt and best.pt, every
column of results.csv that both have (the clocks apart), and every number of summary.json that both have. Results of a
checkout are kept below CHECKOUT/runs/equal and used again for the same commit. Both sides run with one thread.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

RUNS = {
    "quickstart-0": ["--config", "configs/quickstart.yaml", "--seed", "0"],
    "quickstart-1": ["--config", "configs/quickstart.yaml", "--seed", "1"],
    "resnet8-flops": ["--config", "configs/best_resnet8.yaml", "--seed", "0"],
}
SHORT = ["--train-images", "1500", "--epochs", "3"]
CLOCKS = {
    "images_per_second",
    "step_ms",
    "evaluation_seconds",
    "epoch_seconds",
    "data_seconds",
    "seconds",
    "train_seconds",
    "train_cpu_seconds",
    "run",
    "device",
}


def train(checkout: Path, name: str, options: list[str]) -> Path:
    """The folder of a finished run."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    root = checkout.resolve() / "runs" / "equal" / commit[:12] / name
    if not list(root.rglob("summary.json")):
        program = [sys.executable, "main.py", *options, "--log-dir", str(root), "--device", "cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(program, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(f"{name} in {checkout} ended with {result.returncode}: {result.stderr.strip()[-2000:]}")
    (summary,) = root.rglob("summary.json")
    return summary.parent


def tensors(folder: Path, file: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / file, weights_only=True)["model"]


def differences(one: Path, two: Path) -> list[str]:
    """Names of what differs."""
    found = []
    for file in ("last.pt", "best.pt"):
        ours, theirs = tensors(one, file), tensors(two, file)
        found += [f"{file}: {name} is missing" for name in ours.keys() ^ theirs.keys()]
        found += [
            f"{file}: {name}" for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])
        ]
    rows = []
    for folder in (one, two):
        with open(folder / "results.csv", newline="", encoding="utf-8") as file:
            rows.append(list(csv.DictReader(file)))
    if len(rows[0]) != len(rows[1]):
        found.append("results.csv: number of rows")
    for ours, theirs in zip(*rows, strict=False):
        columns = (ours.keys() & theirs.keys()) - CLOCKS
        found += [f"results.csv: {c} of epoch {ours['epoch']}" for c in sorted(columns) if ours[c] != theirs[c]]
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (one, two))
    found += [f"summary.json: {k}" for k in sorted((ours.keys() & theirs.keys()) - CLOCKS) if ours[k] != theirs[k]]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", nargs=2, type=Path)
    parser.add_argument("--short", action="store_true", help="a few epochs on 1,500 images")
    arguments = parser.parse_args()
    code = 0
    for name, options in RUNS.items():
        suffix, options = ("-short", [*options, *SHORT]) if arguments.short else ("", options)
        folders = [train(checkout, name + suffix, options) for checkout in arguments.checkout]
        found = differences(*folders)
        print(f"{name}{suffix}: {'bit-equal' if not found else '; '.join(found[:8])}", flush=True)
        code |= bool(found)
    return code


if __name__ == "__main__":
    sys.exit(main())
