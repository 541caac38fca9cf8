"""What `test_distributed.py` has two ranks do: `torchrun -m tests.ranks.program WHAT FOLDER [FOLDER of images]`.

Every rank writes what it came to into FOLDER/rankN.pt; the tests compare that with a single process.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from trainers.retirement import retire

import trainers.recipe
from args import Config
from data import ImageSet
from main import main
from tests.toy import IMAGE_SHAPE, NETWORKS, batch, config, plain_net, sparse_network
from trainers.default import (
    SearchState,
    StepSettings,
    draw_masks,
    estimator_of,
    evaluate,
    first_memory,
    num_drawing_ranks,
    num_full_passes,
    num_masks,
    train_step,
    weight_step,
)
from trainers.methods import METHODS
from utils.channels.network import SparseNetwork
from utils.channels.norms import GateReader
from utils.errors import RankError
from utils.ranks.exchange import agreed_signal, check_equal, joined, num_ranks, rank
from utils.run.metrics import CostLedger

RANKS, STEPS, BATCH_SIZE, RETIRE_AFTER = 2, 5, 9, 2
CPU = torch.device("cpu")

# name -> (network, execution, options of the sparsity, options of the training)
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "shared": ("released", "compact", {}, {}),
    "shared, masked": ("preactivation", "masked", {}, {}),
    "shared, clipped jointly": ("preactivation", "compact", {}, {"clip_jointly": True, "clip_norm": 0.1}),
    "shared, in parts": ("released", "compact", {"subbatch": 2}, {}),
    "shared, every other step": ("released", "compact", {"score_every": 2}, {}),
    "shared, gates": (
        *("released", "compact"),
        {"estimator": "linear_cv_gates"},
        {"batch_size": BATCH_SIZE, "clip_norm": 0.5},
    ),
    "independent": ("released", "compact", {"rank_masks": "independent"}, {"clip_norm": 0.5}),
    "independent, masked": ("released", "masked", {"rank_masks": "independent"}, {}),
    "independent, three masks": ("preactivation", "compact", {"rank_masks": "independent", "K": 3}, {}),
    "independent, two for the weights": (
        *("released", "compact"),
        {"rank_masks": "independent", "K": 3, "weight_samples": 2},
        {},
    ),
    "independent, in parts": ("released", "compact", {"rank_masks": "independent", "subbatch": 2}, {}),
}


def case_config(name: str) -> Config:
    _, _, sparsity, train = CASES[name]
    base = config()
    return replace(base, sparsity=replace(base.sparsity, **sparsity), train=replace(base.train, **train))


def search_state(name: str) -> SearchState:
    """The state before the first step of a case."""
    kind, execution, _, _ = CASES[name]
    sparsity = case_config(name).sparsity
    network = sparse_network(plain_net(kind), NETWORKS[kind].LAYERS, execution)
    generator = torch.Generator().manual_seed(4)
    network.scores.copy_(torch.rand(network.num_units, generator=generator, dtype=torch.float64) * 0.6 + 0.1)
    network.model.train()
    return SearchState(
        network,
        torch.optim.SGD(network.weight_parameters(), lr=9.0, momentum=0.9, weight_decay=5e-2),
        torch.optim.Adam([network.scores], lr=9.0),
        generator,
        draw_masks(network, generator, num_masks(sparsity), num_drawing_ranks(sparsity)),
        memory=first_memory(network.scores, sparsity),
        gate_reader=GateReader(network) if estimator_of(sparsity).reads_gates else None,
    )


def settings_of(step: int, options: Config) -> StepSettings:
    return StepSettings(0.05, 0.15, kept_fraction=0.3, update_scores=step % options.sparsity.score_every == 0)


def part(number: int) -> slice:
    """The images of a batch that a rank gets: 4 and 5 of 9."""
    return slice(number * BATCH_SIZE // RANKS, (number + 1) * BATCH_SIZE // RANKS)


def train(name: str) -> dict[str, Any]:
    state, options = search_state(name), case_config(name)
    metrics, costs = [], CostLedger()
    for step in range(STEPS):
        images, labels = (t[part(rank())] for t in batch(BATCH_SIZE, seed=step))
        settings = settings_of(step, options)
        forward = [
            (state.network.executed_macs(plan), 0)
            for plan in state.draw.plans[: num_full_passes(options.sparsity, settings.update_scores)]
        ]
        spent = CostLedger()
        spent.add_step(len(labels), forward, options.sparsity.weight_samples, state.network.dense_macs)
        costs.add(spent.of_all_ranks())
        metrics.append(train_step(state, images, labels, settings, options))
        if step == RETIRE_AFTER and state.network.execution == "compact":
            retire(state)
    return {
        "model": state.network.model.state_dict(),
        "optimizers": [state.weight_optimizer.state_dict(), state.score_optimizer.state_dict()],
        "masks": state.draw.drawn,
        "memory": {} if state.memory is None else dict(vars(state.memory)),
        "generator": state.generator.get_state(),
        "metrics": metrics,
        "executed": costs.executed,
    }


def train_dense() -> dict[str, Tensor]:
    network = dense_network()
    optimizer = torch.optim.SGD(network.weight_parameters(), lr=9.0, momentum=0.9)
    for step in range(STEPS):
        images, labels = (t[part(rank())] for t in batch(BATCH_SIZE, seed=step))
        weight_step(network, optimizer, network.dense_plan, images, labels, StepSettings(0.05), config())
    return network.model.state_dict()


def dense_network() -> SparseNetwork:
    torch.set_default_dtype(torch.float64)  # the graph is traced in it
    try:
        network = SparseNetwork(plain_net("plain"), IMAGE_SHAPE)
    finally:
        torch.set_default_dtype(torch.float32)
    network.model.train()
    return network


def images_of(count: int) -> ImageSet:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, *IMAGE_SHAPE), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (count,), generator=generator)
    return ImageSet(
        images=images, labels=labels, mean=(0.5,) * 3, std=(0.25,) * 3, crop_padding=0, flip=False,
        rank=rank(), num_ranks=num_ranks(),
    )  # fmt: skip


def evaluate_sets() -> list[dict[str, float]]:
    """Sets of which a rank gets more than the other, one image, or none."""
    network = sparse_network(plain_net("released").float(), NETWORKS["released"].LAYERS)
    sets = [images_of(count) for count in (11, 8, 3, 1)]
    return [evaluate(network, network.dense_plan, images.batches(4), config().train) for images in sets]


def difference() -> str:
    """What is said when a score of rank 1 is no longer that of rank 0."""
    state = search_state("shared")
    tensors = {"weight": state.network.model.conv1.weight, "scores": state.network.scores}
    check_equal(tensors, "before")
    if rank() == 1:
        state.network.scores[3] += 1e-15
    try:
        check_equal(tensors, "after 3 steps")
    except RankError as error:
        return str(error)
    return ""


def steps(folder: Path) -> None:
    torch.set_num_threads(1)
    with joined(CPU):
        results = {
            "cases": {name: train(name) for name in CASES},
            "dense": train_dense(),
            "evaluations": evaluate_sets(),
            "difference": difference(),
            "signals": [agreed_signal(signal.SIGTERM if rank() == 1 else None), agreed_signal(None)],
        }
        torch.save(results, folder / f"rank{rank()}.pt")


# ---- whole programs ----

_starts = iter(range(1000))
ON_TRAINING_IMAGES = ("--holdout", "0", "--sample-from-training-set")


def meet_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups use part of torchrun's store under fixed names, so a second group in a process needs another part."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    place = {"rank": int(os.environ["RANK"]), "world_size": RANKS, "store": dist.PrefixStore(str(next(_starts)), store)}
    monkeypatch.setattr(dist, "init_process_group", partial(dist.init_process_group, **place))


def program(folder: Path, images: Path, name: str, *options: str, at_step: tuple[int, Callable] | None = None) -> int:
    """Runs main on this rank; before the given step, `at_step` does something on rank 1 (or alone)."""
    step, count = trainers.recipe.Recipe.step, iter(range(1000))

    def interrupted_step(self, *arguments):
        if at_step is not None and rank() == num_ranks() - 1 and next(count) == at_step[0]:
            at_step[1](self)
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        meet_anew(patch)
        patch.setattr(trainers.recipe.Recipe, "step", interrupted_step)
        log_dir = str(folder / "runs")
        fixed = ["--config", str(folder / "tiny.yaml"), "--data", str(images), "--device", "cpu", "--log-dir", log_dir]
        return main([*fixed, "--name", name, *options])


def send(number: int) -> Callable[[trainers.recipe.Recipe], None]:
    return lambda _: os.kill(os.getpid(), number)


def programs(folder: Path, images: Path) -> None:
    codes = {"whole": [program(folder, images, "whole")]}
    codes["parts"] = [
        program(folder, images, "parts", at_step=(5, send(signal.SIGTERM))),
        program(folder, images, "parts", "--resume", at_step=(7, send(signal.SIGINT))),
        program(folder, images, "parts", "--resume"),
    ]
    codes["mixed"] = [program(folder, images, "mixed", at_step=(5, send(signal.SIGTERM)))]
    place = os.environ.pop("TORCHELASTIC_RUN_ID")
    done = folder / "alone is done"
    if os.environ["RANK"] == "0":
        codes["mixed"].append(program(folder, images, "mixed", "--resume", at_step=(3, send(signal.SIGTERM))))
        done.touch()
    else:
        next(_starts)
        while not done.exists():
            time.sleep(0.05)
    os.environ["TORCHELASTIC_RUN_ID"] = place
    codes["mixed"].append(program(folder, images, "mixed", "--resume"))
    short = ("--epochs", "1", "--finetune-epochs", "1")
    codes["methods"] = [program(folder, images, name, "--method", name, *short) for name in METHODS]
    torch.save(codes, folder / f"rank{os.environ['RANK']}.pt")


def spoil(name: str) -> Callable[[trainers.recipe.Recipe], None]:
    """Moves what a weight holds for its last channel."""

    def spoil_(recipe: trainers.recipe.Recipe) -> None:
        with torch.no_grad():
            recipe.run.network.model.get_parameter(name)[-1] += 1e-3

    return spoil_


def failing(*arguments: Any, check_every: int = 1000, **options: Any) -> dict[str, Any]:
    """A program that ranks are to end because they differ: its exit code, and what this rank says."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(next(_starts))  # who fails first is asked anew
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        patch.setattr(trainers.recipe, "CHECK_EVERY", check_every)
        code = program(*arguments, **options)
    if dist.is_initialized():  # as the end of the process would
        dist.destroy_process_group()
    return {"code": code, "said": said.getvalue()}


def checks(folder: Path, images: Path) -> None:
    """Runs whose ranks are made to differ, and runs whose costs are counted."""
    short = (folder, images, "differing", "--epochs", "2", "--no-finetune")
    own = int(os.environ["RANK"])
    results = {
        "at the start": failing(*short, "--seed", str(own)),
        "between steps": failing(*short, check_every=3, at_step=(1, spoil("layer3.2.conv2.weight"))),
        "at the end of an epoch": failing(*short, at_step=(5, spoil("layer2.0.bn1.bias"))),
        "never": failing(*short, check_every=1),
        "masked": program(folder, images, "masked", "--execution", "masked"),
        "trained": program(folder, images, "trained", "--execution", "masked", *ON_TRAINING_IMAGES),
        "dense": program(folder, images, "dense", "--method", "dense"),
    }
    torch.save(results, folder / f"rank{own}.pt")


def fail(_: trainers.recipe.Recipe) -> None:
    raise ValueError("a mistake of rank 1 alone")


if __name__ == "__main__":
    what, *folders = sys.argv[1:]
    if what == "steps":
        steps(*map(Path, folders))
    elif what == "programs":
        programs(*map(Path, folders))
    elif what == "checks":
        checks(*map(Path, folders))
    else:
        sys.exit(program(*map(Path, folders), "failing", at_step=(2, fail)))
