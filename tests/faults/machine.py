"""A tiny run of the program, processes of it that are killed at a chosen moment, and the comparison of what they leave.

A process is a fork of this one, so it starts in no time; nothing but its files comes back, as after `kill -9`.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from main import main
from tests.tiny import TINY
from tests.toy import CLOCKS, without_clocks
from utils.run.checkpoint import differences, load

# With this seed held-out images choose a drawn subnet, and fine-tuning improves it.
SHORT = {**TINY, "seed": 4, "epochs": 1, "finetune_epochs": 1, "num_subnets": 1, "bn_batches": 1, "save_every": 0}
STEPS = 4  # in an epoch of the search; twice as many in one of fine-tuning
TIMES = ("seconds", "train_seconds", "train_cpu_seconds", "run")  # what differs between summaries of equal runs


def words(root: Path, images: Path, *options: str, **settings: object) -> list[str]:
    """The command line of a tiny run below `root`. The configuration file takes the settings."""
    root.mkdir(exist_ok=True, parents=True)
    config = root / "tiny.yaml"
    config.write_text("".join(f"{key}: {value}\n" for key, value in {**SHORT, **settings}.items()))
    return ["--config", str(config), "--data", str(images), "--log-dir", str(root / "runs"), *options]


def train(root: Path, images: Path, *options: str, **settings: object) -> int:
    """Runs the program in this process; its exit code."""
    return main(words(root, images, *options, **settings))


def folder_of(root: Path) -> Path:
    """The only run below a root."""
    (config,) = (root / "runs").rglob("checkpoints")
    return config.parent


def in_process(work: Callable[[], int], silent: bool = True) -> int:
    """Does some work in a process of its own; its exit code, or the negative number of the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            torch.set_num_threads(1)
            with open(os.devnull, "w") as nowhere:
                if silent:
                    with redirect_stdout(nowhere), redirect_stderr(nowhere):
                        code = work()
                else:
                    code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def killed_at(number: int, root: Path, images: Path, *options: str, **settings: object) -> int:
    """Runs the program in a process that is killed before it renames a file for the `number`-th time, from 0.

    Returns: as `in_process`: -9 if it was killed; another code if it ended before.
    """
    arguments = words(root, images, *options, **settings)

    def work() -> int:
        replace, count = os.replace, iter(range(10**9))

        def killing(source: Any, target: Any) -> None:
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = killing
        return main(arguments)

    return in_process(work)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key not in CLOCKS} for row in csv.DictReader(file)]


def summary_of(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key not in TIMES}


def unlike(one: Path, two: Path) -> list[str]:
    """What two finished runs do not have in common, bit by bit, apart from clocks and options."""
    found = []
    for name in ("last.pt", "best.pt"):
        states = [without_clocks(load(folder / "checkpoints" / name)) for folder in (one, two)]
        found += [f"{name}: {key}" for key in differences(*states)]
    found += ["results.csv"] * (rows_of(one) != rows_of(two))
    ours, theirs = summary_of(one), summary_of(two)
    found += [f"summary.json: {key}" for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
    arrays = []
    for folder in (one, two):
        with np.load(folder / "scores.npz", allow_pickle=False) as file:
            arrays.append(dict(file))
    return found + ["scores.npz"] * bool(differences(*arrays))
