"""How noisy each estimator is on the checkpoints of a run: `python -m tools.gauge RUN`.

At a checkpoint weights and scores stand still. On some training batches, drawn anew with the augmentation of training,
the losses of many masks are measured as a training step would: batch-norm by the batch, running statistics untouched,
but in full float32 whatever the run's precision, and on the whole batch in one process. From these losses come the
gradient of the expected loss and, for every estimator at the price of two forward passes, its variance, its bias and
how far it points the right way (`tools/gauge_figures.py`). The run itself is not changed; the report goes into its
folder.

Legend: K masks of one estimate, U units.
"""

from __future__ import annotations

import argparse
import itertools
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from args import ESTIMATORS, Config, config_from_dict
from data import DataSplits
from tools.command_line import ToolParser, exit_code_of, headline, whole_number
from tools.gauge_figures import (
    REFERENCE,
    Draws,
    Figure,
    estimator_figures,
    plain,
    reference_gradients,
    sums_of,
    table,
    write_report,
)
from trainers.build import make_network, restore_model
from trainers.default import backward_
from trainers.devices import find_device
from trainers.methods import make_method
from trainers.session import load_data
from utils.algorithm.estimators.base import Estimator, Gates
from utils.algorithm.masks import sample_masks
from utils.channels.network import SparseNetwork
from utils.channels.norms import GateReader
from utils.channels.plan import Plan
from utils.errors import UserError
from utils.run import checkpoint
from utils.run.folder import environment_facts
from utils.run.progress import announce
from utils.seeds import stream_generator

MASKS_OF_AN_ESTIMATE = 2
WARMING_UP, MEASURING = 0, 1  # purposes of random numbers


# ---- batches ----


@dataclass(frozen=True)
class Batch:
    """Images under masks of a network that stands still."""

    network: SparseNetwork
    images: Tensor
    labels: Tensor
    config: Config

    def run(self, masks_KU: Tensor) -> tuple[Tensor, float]:
        """Mean losses (K,) under the masks, and the multiply-adds of the passes, in dense forward passes."""
        network, plans = self.network, [self.network.plan(mask_U) for mask_U in masks_KU.cpu().numpy()]
        with torch.no_grad():
            losses_K = torch.stack([self._loss(plan) for plan in plans])
        return losses_K, sum(network.executed_macs(plan) for plan in plans) / network.dense_macs

    def gates(self, mask_U: Tensor) -> Gates:
        """What a backward pass under the mask shows."""
        plan = self.network.plan(mask_U.cpu().numpy())
        backward_(self.network, self._loss(plan), len(self.labels))
        gates = GateReader(self.network).read(plan, len(self.labels))
        self.network.clear_gradients()
        return gates

    def _loss(self, plan: Plan) -> Tensor:
        logits = self.network(self.images, plan, update_statistics=False)
        return F.cross_entropy(logits, self.labels, label_smoothing=self.config.train.label_smoothing)


def independent_batches(
    network: SparseNetwork, data: DataSplits, config: Config, seed: int, count: int
) -> Iterator[Batch]:
    """The first batch of each of several epochs that the run never reaches.

    Those of a single epoch share no image, so they depend on each other; where the signal is small that would show.
    """
    for epoch in range(config.total_epochs + 1, config.total_epochs + 1 + 2 * count, 2):
        images, labels = next(data.train.train_batches(config.train.batch_size, seed, epoch))
        yield Batch(network, images, labels, config)


def warm_up_batches(network: SparseNetwork, data: DataSplits, config: Config, seed: int, count: int) -> Iterator[Batch]:
    """One batch after the other, as in training, of epochs that `independent_batches` leaves out."""
    epochs = itertools.count(config.total_epochs, step=2)
    batches = (data.train.train_batches(config.train.batch_size, seed, epoch) for epoch in epochs)
    for images, labels in itertools.islice(itertools.chain.from_iterable(batches), count):
        yield Batch(network, images, labels, config)


# ---- measuring ----


def warm_up_(estimators: Iterable[Estimator], batches: Iterable[Batch], scores_U: Tensor, seed: int) -> None:
    """Lets estimators with memory learn from a step on each batch, with scores and weights held fixed."""
    learning = [estimator for estimator in estimators if estimator.needs_gates]
    generator = stream_generator(seed, WARMING_UP, scores_U.device)
    for batch in batches if learning else ():
        masks_KU = sample_masks(scores_U, generator, MASKS_OF_AN_ESTIMATE)
        losses_K, gates = batch.run(masks_KU)[0].to(scores_U.dtype), batch.gates(masks_KU[0])
        for estimator in learning:
            estimator.observe(masks_KU, losses_K, gates)


def measure(
    batches: Iterable[Batch], estimators: dict[str, Estimator], scores_U: Tensor, num_masks: int, seed: int
) -> tuple[dict[str, dict[str, Figure]], float]:
    """Measures estimators at the price of two forward passes an estimate, all on the same batches and masks.

    Args:
        batches: at least 4, drawn independently of each other.
        estimators: by name, with `REFERENCE` among them; they learn nothing here.
        scores_U: (U,) in [0, 1]; float64 keeps rounding out of small differences.
        num_masks: masks on each batch, even, at least 4.
    Returns: figures by estimator, see `estimator_figures`, and what an estimate costs in dense forward passes.
    Raises: FloatingPointError for a loss that is not finite.
    """
    generator = stream_generator(seed, MEASURING, scores_U.device)
    masks, losses, costs = [], [], []
    for batch in batches:
        drawn = [sample_masks(scores_U, generator, MASKS_OF_AN_ESTIMATE) for _ in range(0, num_masks, 2)]
        results, spent = zip(*(batch.run(masks_KU) for masks_KU in drawn), strict=True)
        masks.append(torch.stack(drawn))
        losses.append(torch.stack(results).to(scores_U.dtype))
        costs += spent
    draws = Draws(torch.stack(masks), torch.stack(losses))
    if not torch.isfinite(draws.losses_NEK).all():
        raise FloatingPointError("a loss is not finite")
    reference_NU = reference_gradients(scores_U, draws, estimators[REFERENCE].alpha)
    reference_NN = (reference_NU @ reference_NU.T).cpu()
    sums = {name: sums_of(estimator, scores_U, draws, reference_NU) for name, estimator in estimators.items()}
    figures = {name: estimator_figures(entry, sums[REFERENCE], reference_NN) for name, entry in sums.items()}
    return figures, sum(costs) / len(costs)


# ---- checkpoints ----


Source = tuple[Path, Config, dict[str, Any]]  # a checkpoint, the configuration to measure it with, its content


def find_checkpoints(run: Path, names: Sequence[str] | None) -> list[Path]:
    """The files named, else the numbered checkpoints in their order and last.pt.

    Raises: UserError for what is not there.
    """
    folder = run / "checkpoints"
    there = {file.name: file for file in sorted(folder.glob("*.pt"))}
    if not there:
        raise UserError(f"{run} has no checkpoints/*.pt; give the folder of a run, such as runs/NAME/prune_rate=0.5")
    if names:
        for name in names:
            if Path(name).name not in there:
                raise UserError(f"--checkpoint: {folder} has no {name}; it has {', '.join(there)}")
        return [there[Path(name).name] for name in dict.fromkeys(names)]
    numbered = {
        int(found[1]): file for name, file in there.items() if (found := re.fullmatch(r"epoch_(\d+)\.pt", name))
    }
    return [numbered[epoch] for epoch in sorted(numbered)] + [file for name, file in there.items() if name == "last.pt"]


def load_source(file: Path, settings: argparse.Namespace) -> Source:
    """Raises UserError unless it is the checkpoint of a run that trains scores."""
    state = checkpoint.load(file)
    given = {"data": settings.data} if settings.data else {}
    stored = {**state["config"], "multigpu": None, "pretrained": None, "precision": "fp32"}
    config = config_from_dict({**stored, "device": settings.device, **given}, str(file))
    if not make_method(config).has_scores:
        raise UserError(f"{file} is of method {config.method}, which has no scores; give a run of method vrpge")
    return file, config, state


def reason_against(state: dict[str, Any]) -> str | None:
    """Why there is nothing to estimate at a checkpoint, if so."""
    if state["phase"] != "search":
        return f"is from after the search (phase {state['phase']})"
    scores = [value for name, value in state["model"].items() if name.endswith(".scores")]
    decided = all(bool(((values == 0) | (values == 1)).all()) for values in scores)
    return "has scores of 0 and 1 only" if decided else None


def find_sources(settings: argparse.Namespace) -> Iterator[Source]:
    """The checkpoints to measure, each loaded when its turn comes. Unless named, those that do not fit are left out.

    Raises: UserError before the first one if one that is named does not fit, or none does.
    """
    files = find_checkpoints(settings.run, settings.checkpoint)
    reasons = {file: reason_against(load_source(file, settings)[2]) for file in files}
    against = [f"{file.name} {reason}" for file, reason in reasons.items() if reason]
    if len(against) == len(reasons) or (against and settings.checkpoint):
        raise UserError(
            f"there is nothing to estimate: in {settings.run} {', '.join(against)}; take checkpoints from the middle "
            "of a search, which --save-every N of main.py keeps"
        )
    for reason in against:
        announce(f"left out: {reason}")
    return (load_source(file, settings) for file, reason in reasons.items() if not reason)


def measure_checkpoint(source: Source, data: DataSplits, device: torch.device, settings: argparse.Namespace) -> dict:
    """Raises UserError for weights that have diverged."""
    (file, config, state), seed = source, settings.seed
    network = make_network(config, data, device, state)
    restore_model(network, state)
    network.model.train()
    scores_U, alpha = network.scores.detach().double(), config.sparsity.alpha
    names = dict.fromkeys([REFERENCE, *(settings.estimators or ESTIMATORS)])
    estimators = {name: pkgutil.resolve_name(ESTIMATORS[name].path)(scores_U, alpha) for name in names}
    warm_up = warm_up_batches(network, data, config, seed, settings.warm_up)
    batches = independent_batches(network, data, config, seed, settings.batches)
    try:
        # A GPU would round to 10 bits otherwise, which drowns the effect of a single unit.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            warm_up_(estimators.values(), tqdm(warm_up, "warm-up", settings.warm_up, disable=None), scores_U, seed)
            batches = tqdm(batches, "batches", settings.batches, disable=None)
            figures, cost = measure(batches, estimators, scores_U, settings.masks, seed)
    except FloatingPointError as error:
        raise UserError(f"{file} cannot be measured: {error}; take an earlier checkpoint") from error
    return {"checkpoint": file.name, "epoch": state["epoch"], "cost": cost, "estimators": plain(figures)}


# ---- the program ----


def read_command_line(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises UserError for every mistake."""
    parser = ToolParser(
        "tools.gauge", "Measures the noise of estimators on checkpoints of a search (see --save-every of main.py)."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    about = "some of its checkpoints, such as epoch_5.pt (default: all numbered ones of the search, and last.pt)"
    parser.add_argument("--checkpoint", nargs="+", metavar="FILE", help=about)
    parser.add_argument("--estimators", nargs="+", choices=list(ESTIMATORS), metavar="NAME", help="(default: all)")
    numbers = {
        "batches": (16, 4, "training batches to measure on"),
        "masks": (64, 4, "masks on each of them, an even number"),
        "warm-up": (200, 0, "batches before, from which estimators with memory learn"),
        "seed": (0, 0, "seed of batches and masks"),
    }
    for name, (default, least, about) in numbers.items():
        kind = whole_number(least, 2**31 - 1)
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{about} (default: {default})")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--data", metavar="PATH", help="root folder of the data sets (default: that of the run)")
    parser.add_argument("--out", type=Path, metavar="PATH", help="folder of the report (default: RUN/gauge)")
    parser.add_arch()
    settings = parser.parse_args(argv)
    if settings.masks % MASKS_OF_AN_ESTIMATE:
        raise UserError(f"--masks must be even, because an estimate takes two of them, got {settings.masks}")
    return settings


def report_folder(settings: argparse.Namespace) -> Path:
    """Makes the folder before the minutes of measuring. Raises UserError if it cannot be written into."""
    folder = settings.out or settings.run / "gauge"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gauge.md").touch()
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; choose another folder with --out") from error
    return folder


def run(argv: Sequence[str] | None) -> None:
    settings = read_command_line(argv)
    sources, folder = find_sources(settings), report_folder(settings)
    data, entries = None, []
    for file, config, state in sources:
        if data is None:  # the same for all checkpoints of a run
            device = find_device(config)
            print(headline(device), flush=True)
            data = load_data(config, device)
        if difference := data.difference(state):
            raise UserError(
                f"the images under --data {config.data.data} are not those that {file} was trained on: they have "
                f"{difference}. Point --data at the same files"
            )
        announce(f"measuring {file.name}")
        entries.append(measure_checkpoint((file, config, state), data, device, settings))
        print(table(entries[-1]), flush=True)
    facts = {key: getattr(settings, key) for key in ("batches", "masks", "warm_up", "seed")}
    facts |= {"batch_size": config.train.batch_size, "alpha": config.sparsity.alpha}
    facts |= {"run": str(settings.run), "environment": environment_facts(device)}
    write_report(folder, facts, headline(device), entries)
    print(f"written: {folder / 'gauge.md'} and gauge.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 a user's mistake."""
    return exit_code_of(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
