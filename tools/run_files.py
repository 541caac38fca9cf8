"""Reading runs from their folders, and what several of them have in common."""

from __future__ import annotations

import csv
import json
import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from args import OPTIONS, config_from_dict, config_to_dict
from tools.run_facts import Layer, RunFacts, Scores
from tools.table_record import NO_NUMBERS
from utils.errors import UserError
from utils.options import why_unread, worded
from utils.run import checkpoint

READS = "the report reads config.yaml, results.csv, summary.json, scores.npz and checkpoints/best.pt of a run"


# ---- reading ----


def read_runs(folders: Sequence[str | Path]) -> list[RunFacts]:
    """The runs in some folders, under names that tell them apart.

    Raises: UserError for a folder that holds no run, a folder that is named twice, or a damaged file.
    """
    paths = [Path(folder) for folder in folders]
    for number, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:number]]:
            raise UserError(f"the run {path} is named twice; name every run once")
    runs = [read_run(path) for path in paths]
    if len({run.name for run in runs}) == len(runs):
        return runs
    places = [path.resolve() for path in paths]
    common = os.path.commonpath(places)
    return [replace(run, name=place.relative_to(common).as_posix()) for run, place in zip(runs, places, strict=True)]


def read_run(folder: Path) -> RunFacts:
    """One run; see `read_runs`."""
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder} is not the folder of a run, because it has no config.yaml; {READS}")
    try:
        flat = yaml.safe_load(config.read_text(encoding="utf-8"))
        options = config_to_dict(config_from_dict(flat, str(config)))
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError, RecursionError):
        raise UserError(f"{config} is not a file of options as a run writes it; restore it") from None
    missing: list[str] = []
    history, summary = _read_history(folder / "results.csv"), _read_json(folder / "summary.json")
    if not history:
        missing.append("results.csv has no finished epoch yet, so there are no curves.")
    elif history[0].get("data_seconds") is None or history[0].get("evaluation_seconds") is None:
        missing.append(
            "results.csv does not tell how long the run waited for images and how long it evaluated. "
            "The version that made the run did not record it."
        )
    if summary and not summary.get("test_images"):
        missing.append("summary.json does not tell the number of test images, so the accuracy has no interval.")
    best = folder / "checkpoints" / "best.pt"
    layers = None if options["method"] == "dense" and not best.is_file() else _read_layers(best, missing)
    scores = read_scores(folder / "scores.npz")
    if scores is None and options["method"] in OPTIONS["score_lr"].read_by:
        missing.append("scores.npz is missing, so the page cannot show scores and kept channels over time.")
    name = options["name"] or options["arch"]
    environment = _read_json(folder / "env.json")
    return RunFacts(folder, name, options, history, summary, environment, layers, scores, missing)


def _read_history(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return [
            {key: text if key == "phase" else float(text) if text else None for key, text in row.items()}
            for row in rows
        ]
    except (ValueError, TypeError, csv.Error):
        raise UserError(f"{path} is not a table of epochs as a run writes it; restore it") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged; restore it, or remove it to report on the run without it") from None


def _read_layers(path: Path, missing: list[str]) -> list[Layer] | None:
    """The layers of best.pt whose channels are chosen, in the order of the network."""
    if not path.is_file():
        missing.append("checkpoints/best.pt is missing, so the page cannot show what each layer keeps.")
        return None
    state = checkpoint.load(path)
    if "widths" not in state:
        missing.append("checkpoints/best.pt is from a version that did not store the widths of the layers.")
        return None
    widths = {name.removesuffix(".scores"): len(t) for name, t in state["model"].items() if name.endswith(".scores")}
    return [Layer(name, width, state["widths"][name]) for name, width in widths.items()] or None


def read_scores(path: Path) -> Scores | None:
    """The content of scores.npz; None if there is no such file, or the method has no scores.

    Raises: UserError for a damaged file.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            ends = zip(stored["names"], stored["first_unit"], stored["widths"], strict=True)
            layers = {str(name): slice(int(first), int(first + width)) for name, first, width in ends}
            chosen = stored.get("chosen")
            found = Scores(stored["epochs"], stored["scores"].astype(np.float32), layers, chosen)
        sizes = {found.scores.shape[1], max(units.stop for units in layers.values())}
        if len(found.epochs) != len(found.scores) or len(sizes) > 1:
            raise ValueError
    except (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile):
        raise UserError(f"{path} is damaged; restore it, or remove it to report on the run without it") from None
    return found if len(found.epochs) else None


# ---- several runs ----


def comparison_notes(runs: Sequence[RunFacts]) -> list[str]:
    """Sentences that a reader needs who compares these runs."""
    notes = ["Training FLOPs are given as the number of epochs of dense training that cost as much."]
    fingerprints = {run.summary.get("data_fingerprint") for run in runs} - {None}
    if len({run.task for run in runs}) > 1 or len(fingerprints) > 1:
        notes.append(
            "The runs are of different networks or training images. FLOPs are given against the dense network of each "
            "run, so they can be compared only between runs of one network."
        )
    if len({run.machine for run in runs}) > 1:
        notes.append("The runs were made on different machines or threads, so their seconds cannot be compared.")
    if not all(run.finished for run in runs):
        notes.append("Numbers of an unfinished run are those that it has reached so far.")
    return notes


def by_cost(runs: Sequence[RunFacts]) -> list[RunFacts]:
    """The cheapest network first, among equal ones the cheapest training; runs that are not finished come last."""
    unknown = math.inf
    return sorted(
        runs,
        key=lambda run: (
            not run.finished,
            unknown if run.flops_ratio is None else run.flops_ratio,
            unknown if run.dense_epochs is None else run.dense_epochs,
            run.name,
        ),
    )


def differing_options(runs: Sequence[RunFacts]) -> dict[str, list[Any]]:
    """The options that can change a number and that differ between the runs, with the value in each run.

    The value is None for a run whose method does not read the option.
    """
    found = {}
    for key in OPTIONS:
        if key in NO_NUMBERS and key != "seed":
            continue
        values = [None if why_unread(OPTIONS, run.options, key) else worded(run.options[key]) for run in runs]
        if len(set(values) - {None}) > 1:
            found[key] = values
    return found


def dense_twin(run: RunFacts, runs: Sequence[RunFacts]) -> RunFacts | None:
    """A finished dense run whose seconds can be compared: same network, images and machine, as many epochs."""

    def told(one: RunFacts) -> tuple[Any, ...]:
        images = one.summary.get("data_fingerprint")
        return one.task, images, one.machine, one.epochs, one.options["batch_size"]

    if run.is_dense or not run.finished or not any(run.machine):
        return None
    return next((other for other in runs if other.is_dense and other.finished and told(other) == told(run)), None)
