"""How noisy each estimator is on the checkpoints of a run: `python -m tools.gauge RUN`.

At a checkpoint weights and scores stand still. On some training batches, drawn anew with the augmentation of training,
the losses of many masks are measured as a training step would: batch-norm by the batch, running statistics untouched,
but in full float32 whatever the run's precision, and on the whole batch in one process. From these losses come the
gradient of the expected loss, and for every estimator at the price of two forward passes its variance, bias, and how
far it points the right way (`tools/gauge_figures.py`). Nothing of the run is changed; the report goes into its folder.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from args import OPTIONS as TRAINING_OPTIONS
from args import Config, config_from_dict
from data import DataSplits
from tools.bench import headline
from tools.command_line import ToolParser, exit_code_of
from tools.gauge_figures import Measured, measure
from tools.gauge_passes import independent_batches, warm_up_batches
from tools.gauge_report import aligned, entry_of, table_rows, write_report
from trainers.devices import find_device
from trainers.methods import method_of
from trainers.session import load_data
from trainers.state import load_model_state, make_network
from utils.algorithm.estimators import ESTIMATORS
from utils.errors import UserError
from utils.options import Given, Option, convert, nearest
from utils.run import checkpoint
from utils.run.folder import environment_facts
from utils.run.progress import announce

NUM_PARTS = 4  # of a batch for `subbatch`, if the run does not say

# ---- the command line ----

DEVICE = TRAINING_OPTIONS["device"]
NUMBERS = (
    Option("batches", "", int, False, 16, "training batches to measure on", within="[4, 100000]"),
    Option("masks", "", int, False, 64, "masks on each of them, for every kind of estimator", within="[4, 100000]",
           check=lambda count: "even: estimates use two each" if count % 2 else None),
    Option("warm_up", "", int, False, 200, "batches before, from which estimators with memory learn",
           within="[0, 10000000]"),
    Option("seed", "", int, False, 0, "seed of batches and masks", within="[0, 2147483647]"),
)  # fmt: skip


def read_command_line(argv: Sequence[str] | None) -> argparse.Namespace:
    """All options, each value checked; `--help` prints and exits with code 0.

    Raises: UserError for every mistake.
    """
    parser = ToolParser(
        "tools.gauge",
        "Measures the noise of every estimator on checkpoints of a search (see --save-every of main.py).",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        metavar="FILE",
        help="of its checkpoints, such as epoch_5.pt (default: all numbered ones of the search, and last.pt)",
    )
    parser.add_argument(
        "--estimators", nargs="+", metavar="NAME", help=f"of {', '.join(ESTIMATORS)} (default: all of them)"
    )
    for option in NUMBERS:
        flag = f"--{option.key.replace('_', '-')}"
        parser.add_argument(flag, metavar="N", help=f"{option.help} (default: {option.default})")
    parser.add_argument("--device", metavar="DEVICE", help=f"{DEVICE.help} (default: auto)")
    parser.add_argument("--data", metavar="PATH", help="root folder of the data sets (default: that of the run)")
    parser.add_argument("--out", type=Path, metavar="PATH", help="folder of the report (default: RUN/gauge)")
    arguments = parser.parse_args(argv)
    for option in (*NUMBERS, DEVICE):
        text = getattr(arguments, option.key)
        value = option.default if text is None else convert(option, Given(option.key, text, False, "command line"))
        setattr(arguments, option.key, value)
    for name in arguments.estimators or ():
        if name not in ESTIMATORS:
            advice = nearest(name, ESTIMATORS, f"they are {', '.join(ESTIMATORS)}")
            raise UserError(f"--estimators: there is no estimator {name!r}; {advice}")
    return arguments


# ---- checkpoints ----


@dataclass(frozen=True)
class Source:
    """A checkpoint from the search of a run, and the configuration to measure it with."""

    file: Path
    config: Config
    state: dict[str, Any]


def find_checkpoints(run: Path, names: Sequence[str] | None) -> list[Path]:
    """The files named, else the numbered checkpoints in their order and last.pt.

    Raises: UserError for what is not there.
    """
    folder = run / "checkpoints"
    there = sorted(folder.glob("*.pt"), key=lambda file: file.name)
    if not there:
        raise UserError(f"{run} has no checkpoints/*.pt; give the folder of a run, such as runs/NAME/prune_rate=0.5")
    if not names:
        numbered = {int(found[1]): file for file in there if (found := re.fullmatch(r"epoch_(\d+)\.pt", file.name))}
        return [numbered[epoch] for epoch in sorted(numbered)] + [file for file in there if file.name == "last.pt"]
    files = []
    for name in names:
        file = next((path for path in (folder / name, Path(name)) if path.is_file()), None)
        if file is None or file.resolve().parent != folder.resolve():
            raise UserError(f"--checkpoint: {folder} has no {name}; it has {', '.join(file.name for file in there)}")
        files.append(file)
    return list(dict.fromkeys(files))


def load_source(file: Path, settings: argparse.Namespace) -> Source:
    """Raises UserError unless it is the checkpoint of a run that trains scores."""
    state = checkpoint.load(file)
    if "config" not in state:
        raise UserError(f"{file} is not a checkpoint of a run; give a run folder that main.py made")
    config = config_from_dict(state["config"], str(file))
    if not method_of(config).has_scores:
        raise UserError(f"{file} is of method {config.method}, which has no scores; give a run of method vrpge")
    config = replace(
        config,
        run=replace(config.run, device=settings.device, multigpu=None),
        data=replace(config.data, data=settings.data or config.data.data),
        model=replace(config.model, pretrained=None),
        train=replace(config.train, precision="fp32"),
    )
    return Source(file, config, state)


def reason_against(source: Source) -> str | None:
    """Why there is nothing to estimate, if so."""
    if source.state["phase"] != "search":
        return f"is from after the search (phase {source.state['phase']})"
    scores = [value for name, value in source.state["model"].items() if name.endswith(".scores")]
    decided = all(bool(((values == 0) | (values == 1)).all()) for values in scores)
    return "has scores of 0 and 1 only" if decided else None


def find_sources(settings: argparse.Namespace) -> Iterator[Source]:
    """The checkpoints to measure, each loaded when its turn comes. Unless named, those that do not fit are left out.

    Raises: UserError before the first one if one that is named does not fit, or none does.
    """
    fitting, reasons = [], []
    for file in find_checkpoints(settings.run, settings.checkpoint):
        if reason := reason_against(load_source(file, settings)):
            reasons.append(f"{file.name} {reason}")
        else:
            fitting.append(file)
    if not fitting or (reasons and settings.checkpoint):
        raise UserError(
            f"there is nothing to estimate: in {settings.run} {', '.join(reasons)}; take checkpoints from the middle "
            "of a search, which --save-every N of main.py keeps"
        )
    for reason in reasons:
        announce(f"left out: {reason}")
    return (load_source(file, settings) for file in fitting)


@contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions on a GPU would round to 10 bits otherwise, which drowns the effect of a single unit."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def measure_checkpoint(
    source: Source, data: DataSplits, device: torch.device, settings: argparse.Namespace
) -> Measured:
    """Raises UserError for weights that have diverged."""
    config = source.config
    network = make_network(config, data, device)
    load_model_state(network, source.state)
    network.model.train()
    batch_size, subbatch = config.train.batch_size, config.sparsity.subbatch
    batches = independent_batches(network, data, config, settings.seed, settings.batches)
    warm_up = warm_up_batches(network, data, config, settings.seed, settings.warm_up)
    try:
        with full_float32():
            return measure(
                tqdm(batches, "batches", settings.batches, disable=None),
                tqdm(warm_up, "warm-up", settings.warm_up, disable=None),
                network.scores.detach().double(),
                settings.estimators or list(ESTIMATORS),
                alpha=config.sparsity.alpha,
                num_masks=settings.masks,
                num_parts=subbatch or min(NUM_PARTS, batch_size // 2),
                seed=settings.seed,
            )
    except FloatingPointError as error:
        raise UserError(f"{source.file} cannot be measured: {error}; take an earlier checkpoint") from error


# ---- the program ----


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
    sources = find_sources(settings)
    folder = report_folder(settings)
    data, entries = None, []
    for source in sources:
        if data is None:  # the same for all checkpoints of a run
            device = find_device(source.config)
            print(headline(device), flush=True)
            data = load_data(source.config, device)
        if data.fingerprint != source.state["fingerprint"]:
            raise UserError(
                f"the images under --data {source.config.data.data} are not those that {source.file} was trained on; "
                "point --data at the same files"
            )
        announce(f"measuring {source.file.name}")
        measured = measure_checkpoint(source, data, device, settings)
        entries.append(entry_of(source.file.name, source.state["epoch"], measured))
        print(aligned(table_rows(entries[-1])), flush=True)
    facts = {
        "run": str(settings.run),
        **{option.key: getattr(settings, option.key) for option in NUMBERS},
        "batch_size": source.config.train.batch_size,
        "alpha": source.config.sparsity.alpha,
        "environment": environment_facts(device),
    }
    write_report(folder, facts, headline(device), entries)
    print(f"written: {folder / 'gauge.md'}, gauge.json and gauge.svg")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 a user's mistake."""
    return exit_code_of(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
