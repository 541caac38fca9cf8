"""The whole program on a tiny network and tiny images, watched from outside: what torch was asked to do meanwhile.

Only `Judge`, the time that a batch takes to come, and what reads a checkpoint (`kept_mask`, `scores_of`) know the
inside of the project.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import trainers.recipe
from data import BatchedSet
from main import main

TRAIN, HELDOUT, TEST = 72, 18, 24  # images; six classes
BATCH, FINETUNE_BATCH = 18, 9
STEPS, FINETUNE_STEPS = TRAIN // BATCH, TRAIN // FINETUNE_BATCH  # in an epoch
SEARCH, FINETUNE = 2, 1  # epochs, unless told otherwise
TINY = {
    "set": "ImageFolder",
    "arch": "resnet8_he",
    "width_mult": 0.25,
    "keep_ratio": 0.5,
    "score_lr": 0.05,
    "epochs": SEARCH,
    "batch_size": BATCH,
    "weight_lr": 0.05,
    "finetune_epochs": FINETUNE,
    "finetune_batch_size": FINETUNE_BATCH,
    "num_subnets": 3,
    "bn_batches": 2,
    "holdout": 0.2,
    "workers": 0,
    "device": "cpu",
    "save_every": 1,
}


def make_images(root: Path, turn: int = 0) -> Path:
    """90 training images, of which the program holds out 18, and 24 test images: 8x8, a colour for each class.

    Every test image has a white corner, by which it is told from the others.

    Args:
        turn: by how many classes the labels of the test images are turned; they are then all wrong.
    """
    random = np.random.default_rng(0)
    colours = [(170, 90, 90), (90, 170, 90), (90, 90, 170), (140, 140, 90), (140, 90, 140), (90, 140, 140)]
    for part, count in (("train", 15), ("test", 4)):
        for label, colour in enumerate(colours):
            folder = root / part / f"class{(label + turn * (part == 'test')) % 6}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(random.normal(colour, 40, (8, 8, 3)), 0, 250).astype(np.uint8)
                if part == "test":
                    pixels[0, 0] = 255
                Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return root


@dataclass
class Pass:
    """One forward pass.

    Attributes:
        macs: multiply-adds that ran, over all images.
        live_macs: those of them that are not padding: of rows and columns of a weight that are not all zero.
    """

    images: Tensor
    kind: str  # "graph": backward follows; "free": no graph; "evaluation"
    is_test: bool
    macs: int = 0
    live_macs: int = 0
    loss: float = math.nan
    logits: Tensor | None = None
    labels: Tensor | None = None
    smoothing: float = math.nan

    def hits(self, k: int) -> int:
        """Labels among the k highest logits."""
        own = self.logits.gather(1, self.labels[:, None])
        return int(((self.logits > own).sum(1) < k).sum())


@dataclass
class Step:
    """One step of an optimizer: of the "weights" or the "scores".

    Attributes:
        group: of the optimizer: learning rate, momentum and so on.
        is_fresh: it has no memory of earlier steps.
        before, after, grads: of each of its parameters; None for a gradient that is not there.
    """

    kind: str
    optimizer: type
    group: dict[str, Any]
    is_fresh: bool
    before: list[Tensor]
    grads: list[Tensor | None]
    after: list[Tensor] = field(default_factory=list)


@dataclass
class Save:
    """A checkpoint file when it was written."""

    name: str
    content: bytes = field(repr=False)

    @cached_property
    def state(self) -> dict[str, Any]:
        return torch.load(io.BytesIO(self.content), weights_only=True)


class Record:
    """What happened while `main` ran, in order."""

    def __init__(self, batch_seconds: float = 0.0) -> None:
        self.events: list[Pass | Step | Save] = []
        # of a clock that goes on by 1 in a step of the weights, by 1/4 in an evaluation pass, and while a batch comes
        self.seconds, self.batch_seconds = 0.0, batch_seconds

    def of(self, kind: type, wanted: str | None = None) -> list:
        found = [event for event in self.events if isinstance(event, kind)]
        return [e for e in found if wanted in (None, getattr(e, "kind", None), getattr(e, "name", None))]

    def steps(self, kind: str) -> list[Step]:
        return self.of(Step, kind)

    def passes(self, kind: str | None = None) -> list[Pass]:
        return self.of(Pass, kind)

    def saves(self, name: str | None = None) -> list[Save]:
        return self.of(Save, name)

    def epochs(self) -> list[list[Pass | Step | Save]]:
        """The events of each epoch, its evaluation and checkpoints; those of the choice are with the epoch before."""
        starts = []
        for i, event in enumerate(self.events):
            if isinstance(event, Pass) and event.kind == "graph":
                saved = any(isinstance(e, Save) for e in self.events[starts[-1] : i]) if starts else True
                if saved:
                    starts.append(i)
        return [self.events[a:b] for a, b in zip(starts, [*starts[1:], len(self.events)], strict=True)]

    @contextmanager
    def watching(self, interrupt_at: int | None) -> Iterator[None]:
        depth, count, written = 0, 0, []
        conv2d, linear, cross_entropy = F.conv2d, F.linear, F.cross_entropy
        save, replace, train_batches = torch.save, os.replace, BatchedSet.train_batches

        def add_macs(weight: Tensor, images: int, pixels: int) -> None:
            ones = (weight.detach().flatten(2) != 0).any(2) if weight.dim() == 4 else weight.detach() != 0
            live = int(ones.any(1).sum()) * int(ones.any(0).sum())
            self.events[-1].macs += images * pixels * weight.numel()
            self.events[-1].live_macs += images * pixels * live * weight[0, 0].numel()

        def is_real(x: Any) -> bool:  # not one that only shows the shapes of the network
            return type(x) is Tensor and x.device.type != "meta"

        def watched_conv2d(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not is_real(x):
                return conv2d(x, weight, *args, **kwargs)
            if x.shape[1] == 3:
                kind = "evaluation" if torch.is_inference_mode_enabled() else "free"
                is_test = bool((x[:, :, :1, :1] == x.amax((2, 3), keepdim=True)).all())
                self.events.append(Pass(x.clone(), "graph" if torch.is_grad_enabled() else kind, is_test))
                self.seconds += 0.25 * (kind == "evaluation")
            y = conv2d(x, weight, *args, **kwargs)
            add_macs(weight, len(x), y[0, 0].numel())
            return y

        def watched_batches(*args: Any, **kwargs: Any) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in train_batches(*args, **kwargs):
                self.seconds += self.batch_seconds
                yield batch

        def watched_linear(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if is_real(x):
                add_macs(weight, len(x), 1)
            return linear(x, weight, *args, **kwargs)

        def watched_cross_entropy(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            loss = cross_entropy(logits, labels, *args, **kwargs)
            seen = self.events[-1]
            seen.loss, seen.logits, seen.labels = loss.item(), logits.detach().clone(), labels
            seen.smoothing = kwargs.get("label_smoothing", 0.0)
            return loss

        def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            nonlocal depth, count
            depth += 1
            if depth > 1:  # one kind of optimizer may call another one's step
                return
            (group,) = optimizer.param_groups
            parameters = group["params"]
            kind = "weights" if parameters[0].requires_grad else "scores"
            settings = {key: value for key, value in group.items() if key != "params"}
            before = [p.detach().clone() for p in parameters]
            grads = [None if p.grad is None else p.grad.clone() for p in parameters]
            self.events.append(Step(kind, type(optimizer), settings, not optimizer.state, before, grads))
            if kind == "weights":
                self.seconds += 1
                if count == interrupt_at:
                    os.kill(os.getpid(), signal.SIGINT)
                count += 1

        def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:
                step = self.of(Step)[-1]
                step.after = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]

        def watched_save(state: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            save(state, file, *args, **kwargs)
            written[:] = [file.getvalue()]

        def watched_replace(source: Any, target: Any, *args: Any, **kwargs: Any) -> None:
            replace(source, target, *args, **kwargs)
            if str(target).endswith(".pt"):
                self.events.append(Save(Path(target).name, written[0]))

        hooks = [register_optimizer_step_pre_hook(before_step), register_optimizer_step_post_hook(after_step)]
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(F, "conv2d", watched_conv2d)
                patch.setattr(F, "linear", watched_linear)
                patch.setattr(F, "cross_entropy", watched_cross_entropy)
                patch.setattr(torch, "save", watched_save)
                patch.setattr(BatchedSet, "train_batches", watched_batches)
                patch.setattr(os, "replace", watched_replace)
                patch.setattr(time, "perf_counter", lambda: self.seconds)
                patch.setattr(time, "process_time", lambda: 2 * self.seconds)  # of two busy threads
                for user in ("plan", "capacity"):  # a slot that two tensors share would look like a live channel
                    patch.setattr(
                        f"utils.channels.{user}.slot_hosts", lambda graph, widths, spreading: range(len(widths))
                    )
                yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass
class Run:
    """A run of the program: what it wrote, and what was seen."""

    code: int
    folder: Path
    record: Record

    @cached_property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        with open(self.folder / "results.csv", newline="") as file:
            return list(csv.DictReader(file))

    def column(self, name: str) -> list[float]:
        return [float(row[name]) for row in self.rows]

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """The arrays of scores.npz."""
        with np.load(self.folder / "scores.npz", allow_pickle=False) as file:
            return dict(file)

    def load(self, file: str) -> dict[str, Any]:
        return torch.load(self.folder / "checkpoints" / file, weights_only=True)


def run(
    root: Path,
    images: Path,
    *options: str,
    name: str = "run",
    interrupt_at: int | None = None,
    batch_seconds: float = 0.0,
    **settings: object,
) -> Run:
    """Runs `main` with the tiny configuration and some options.

    Args:
        root: where the runs of several calls lie side by side, each under its name.
        interrupt_at: number of the step of the weights, from 0, in which a signal asks to stop.
        batch_seconds: that pass until a training batch is there.
        settings: other values for keys of the configuration file, or more keys.
    """
    root.mkdir(exist_ok=True)
    config = root / "tiny.yaml"
    config.write_text("".join(f"{key}: {value}\n" for key, value in {**TINY, **settings}.items()))
    record = Record(batch_seconds)
    fixed = ["--config", str(config), "--data", str(images), "--log-dir", str(root / "runs"), "--name", name]
    with record.watching(interrupt_at):
        code = main([*fixed, *options])
    (folder,) = (root / "runs/tiny" / name).glob("prune_rate=*")
    return Run(code, folder, record)


@dataclass
class Judge:
    """Stands in for evaluation: accuracies and losses are those of a script, and what was asked is remembered.

    Args:
        script: (part of the images, number of the network) -> (top-1, loss). Networks are those that differ in weights
            or mask, numbered as they come.
    """

    script: Callable[[str, int], tuple[float, float]]
    asked: list[tuple[str, int]] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    _numbers: dict[bytes, int] = field(default_factory=dict)

    def evaluate(self, network: Any, plan: Any, batches: Any) -> dict[str, float]:
        count = sum(len(labels) for _, labels in batches)
        part = {TRAIN: "train", HELDOUT: "heldout", TEST: "test"}[count]
        weights = next(network.model.parameters()).detach().numpy().tobytes()
        number = self._numbers.setdefault(weights + plan.mask_U.tobytes(), len(self._numbers))
        if number == len(self.masks):
            self.masks.append(plan.mask_U.copy())
        self.asked.append((part, number))
        top1, loss = self.script(part, number)
        return {"loss": loss, "top1": top1, "top5": 100.0}

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(trainers.recipe, "evaluate", self.evaluate)


def kept_mask(state: dict[str, Any]) -> np.ndarray:
    """The units of the subnet in a best.pt: (U,) bool."""
    return state["subnet"]["mask"].numpy()


def scores_of(state: dict[str, Any]) -> Tensor:
    """All scores of a checkpoint in one vector: (U,)."""
    return torch.cat([value for name, value in state["model"].items() if name.endswith("scores")])
