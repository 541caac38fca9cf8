"""What `test_ranks.py` has two ranks do: `torchrun -m tests.ranks.program WHAT FOLDER [FOLDER of images]`.

Every rank writes what it came to into FOLDER/rankN.pt; the tests compare that with a single process.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import trainers.recipe
import utils.ranks.watch
from args import METHODS, Config
from data import ImageSet
from main import main
from tests.toy import IMAGE_SHAPE, NETWORKS, batch, config, plain_net, search_of, sparse_network
from trainers.default import StepSettings, evaluate, weight_step
from trainers.methods.base import Method
from trainers.methods.released import Released
from trainers.methods.vrpge import Coin, PolicyGradient
from trainers.state import RunState
from utils.channels.budget import Budget
from utils.channels.network import SparseNetwork
from utils.channels.shrink import drop_dead_units
from utils.errors import RankError, UserError
from utils.ranks.exchange import agreed, check_equal, joined, num_ranks, rank
from utils.run.metrics import CostLedger

RANKS, STEPS, BATCH_SIZE, SHRINK_AFTER = 2, 5, 9, 2
CPU = torch.device("cpu")


class Case(NamedTuple):
    """A search that is run by two ranks and by one process."""

    kind: str = "released"
    execution: str = "compact"
    method: type[Method] = PolicyGradient
    options: Mapping[str, Any] = MappingProxyType({})


INDEPENDENT = {"rank_masks": "independent"}
CASES = {
    "shared": Case(),
    "shared, masked": Case("preactivation", "masked"),
    "shared, clipped": Case("preactivation", options={"clip_norm": 0.1}),
    "shared, every other step": Case(options={"score_every": 2}),
    "shared, tangent of the flops": Case(options={"budget": "flops", "score_gradient": "tangent"}),
    "shared, gates": Case(
        options={"estimator": "linear_cv_gates", "batch_size": BATCH_SIZE, "clip_norm": 0.5},
    ),
    "shared, coin": Case(method=Coin),
    "released": Case(execution="released", method=Released, options={"clip_norm": 0.5}),
    "independent": Case(options={**INDEPENDENT, "clip_norm": 0.5}),
    "independent, masked": Case(execution="masked", options=INDEPENDENT),
    "independent, fixed shapes": Case(options={**INDEPENDENT, "shapes": "fixed"}),
    "independent, three masks": Case("preactivation", options={**INDEPENDENT, "K": 3}),
}


def run_of(name: str) -> tuple[RunState, Method, Config]:
    """A case before its first step."""
    case = CASES[name]
    options = config(**case.options)
    method = case.method(options)
    network = sparse_network(plain_net(case.kind), NETWORKS[case.kind].LAYERS, case.execution)
    generator = torch.Generator().manual_seed(3)
    network.scores.copy_(torch.rand(network.num_units, generator=generator, dtype=torch.float64) * 0.6 + 0.1)
    if options.fixes_shapes:
        network.fix_shapes()
    network.model.train()
    weights = torch.optim.SGD(network.weight_parameters(), lr=9.0, momentum=0.9, weight_decay=5e-2)
    search = search_of(network, options, seed=4, weight_optimizer=weights)
    search.estimator = method.wrapped(search.estimator, CPU)
    return RunState(network, search.budget, weights, "search", network.dense_plan, search), method, options


def settings_of(step: int, options: Config) -> StepSettings:
    return StepSettings(0.05, 0.15, keep_ratio=0.3, update_scores=step % options.sparsity.score_every == 0)


def part(number: int) -> slice:
    """The images of a batch that a rank gets: 4 and 5 of 9."""
    return slice(number * BATCH_SIZE // RANKS, (number + 1) * BATCH_SIZE // RANKS)


def train(name: str) -> dict[str, Any]:
    run, method, options = run_of(name)
    metrics, costs = [], CostLedger()
    for step in range(STEPS):
        images, labels = (t[part(rank())] for t in batch(BATCH_SIZE, seed=step))
        result = method.step(run, images, labels, settings_of(step, options))
        spent = CostLedger()
        spent.add_step(len(labels), result.forward, result.num_backward, run.network.dense_macs)
        costs.add(spent.of_all_ranks())
        metrics.append(result.metrics)
        if step == SHRINK_AFTER and run.network.execution == "compact":
            drop_dead_units(run.network, run.search.score_optimizer, run.weight_optimizer)
            if options.fixes_shapes:
                run.network.fix_shapes()
    return {
        "model": run.network.model.state_dict(),
        "optimizers": [run.weight_optimizer.state_dict(), run.search.score_optimizer.state_dict()],
        "masks": run.search.masks.drawn,
        "memory": run.search.estimator.state_dict(),
        "generator": run.search.generator.get_state(),
        "metrics": metrics,
        "executed": costs.executed,
    }


def train_dense() -> dict[str, Tensor]:
    run = dense_run()
    for step in range(STEPS):
        images, labels = (t[part(rank())] for t in batch(BATCH_SIZE, seed=step))
        weight_step(run, images, labels, StepSettings(0.05), config())
    return run.network.model.state_dict()


def dense_run() -> RunState:
    torch.set_default_dtype(torch.float64)  # the graph is traced in it
    try:
        network = SparseNetwork(plain_net("plain"), IMAGE_SHAPE)
    finally:
        torch.set_default_dtype(torch.float32)
    network.model.train()
    optimizer = torch.optim.SGD(network.weight_parameters(), lr=9.0, momentum=0.9)
    return RunState(network, Budget(network), optimizer, "dense", network.dense_plan)


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
    return [evaluate(network, network.dense_plan, images_of(count).batches(4)) for count in (11, 8, 3, 1)]


def difference() -> str:
    """What is said when a score of rank 1 is no longer that of rank 0."""
    network = run_of("shared")[0].network
    tensors = {"weight": network.model.conv1.weight, "scores": network.scores}
    check_equal(tensors, "before")
    if rank() == 1:
        network.scores[3] += 1e-15
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
            "signals": [agreed([signal.SIGTERM if rank() == 1 else 0])[0], agreed([0])[0]],
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
    short = ("--epochs", "1", "--finetune-epochs", "1", "--mixup", "0.2", "--rand-augment", "1", "--ema", "0.5")
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
        "between steps": failing(*short, check_every=3, at_step=(1, spoil("layer3.0.conv2.weight"))),
        "at the end of an epoch": failing(*short, at_step=(5, spoil("layer2.0.bn1.bias"))),
        "never": failing(*short, check_every=1),
        "masked": program(folder, images, "masked", "--execution", "masked"),
        "trained": program(folder, images, "trained", "--execution", "masked", *ON_TRAINING_IMAGES),
        "dense": program(folder, images, "dense", "--method", "dense"),
    }
    torch.save(results, folder / f"rank{own}.pt")


def fail(_: trainers.recipe.Recipe) -> None:
    raise ValueError("a mistake of rank 1 alone")


def slow_steps(folder: Path, images: Path, name: str, do: Callable[[], object]) -> int:
    """A program with signs of life ten times a second, whose rank 1 does something before its third step."""

    step = trainers.recipe.Recipe.step

    def slow(self: trainers.recipe.Recipe, *batch: Any) -> Any:
        time.sleep(0.1)
        if self.run.steps == 2 and rank() == 1:
            do()
        return step(self, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils.ranks.watch, "BEAT", 0.1)
        patch.setattr(trainers.recipe.Recipe, "step", slow)
        code = program(folder, images, name, "--save-steps", "1")
    (folder / f"{name} of rank {os.environ['RANK']}").write_text(str(code))
    return code


def without_an_image(folder: Path, images: Path) -> int:
    """A program whose rank 1 cannot read its third batch."""
    train_batches = ImageSet.train_batches

    def failing(self: ImageSet, *options: Any, **more: Any) -> Any:
        for number, one in enumerate(train_batches(self, *options, **more)):
            if number == 2 and rank() == 1:
                raise UserError("cannot read cat.jpg")
            yield one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageSet, "train_batches", failing)
        return program(folder, images, "unreadable")


def stop_here() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_the_launcher() -> None:
    os.kill(os.getppid(), signal.SIGKILL)


if __name__ == "__main__":
    what, *folders = sys.argv[1:]
    if what == "steps":
        steps(*map(Path, folders))
    elif what == "programs":
        programs(*map(Path, folders))
    elif what == "checks":
        checks(*map(Path, folders))
    elif what == "unreadable":
        sys.exit(without_an_image(*map(Path, folders)))
    elif what in ("stopped", "orphaned"):
        sys.exit(slow_steps(*map(Path, folders), what, stop_here if what == "stopped" else kill_the_launcher))
    else:
        sys.exit(program(*map(Path, folders), "failing", at_step=(2, fail)))
