"""Runs that a start names: where they lie, which of their checkpoints is read, and what may be done with them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from args import OPTIONS, TWO_PHASE, Config, config_from_file, config_to_dict
from trainers.state import RunState
from utils.choices import named_again
from utils.errors import UserError
from utils.options import worded
from utils.ranks.launch import rank_here
from utils.run import checkpoint
from utils.run.checkpoint import BEST, LAST, PREVIOUS, DamagedError
from utils.run.folder import base_folder, checkpoint_of, find_folder, resolve_run
from utils.run.progress import announce
from utils.run.store import holds

PHASES = ("search", "finetune", "dense", "train", "done")
NEEDED = {"config", "fingerprint", "phase", "epoch", "model", "stored_units"}  # entries of every checkpoint of a run


@dataclass(frozen=True)
class Stored:
    """What a start goes on from, or evaluates.

    Attributes:
        folder: of the run.
        file: the checkpoint that was read; None for a run that ended before it had written one.
        state: its content, of which such a run has only "config".
    """

    folder: Path
    file: Path | None
    state: dict[str, Any]


def folder_names(config: Config) -> tuple[str, str, float]:
    """What the folder of a run is named after: config file, name and kept fraction."""
    stem = Path(config.run.config).stem if config.run.config else "no_config"
    kept = 1.0 if config.method == "dense" else config.sparsity.keep_ratio
    return stem, config.run.name or config.model.arch.replace(":", "."), kept


def find_run(given: Config) -> tuple[Path, Path | None]:
    """The folder of the run that `resume` means, and the checkpoint file if it means one.

    Raises: UserError if there is no such run.
    """
    where = given.run.resume
    if where == "auto":
        where = base_folder(given.run.log_dir, *folder_names(given))
        if not where.is_dir():
            raise UserError(
                f"no run to resume in {where}; start one without --resume, or give its folder with --resume PATH"
            )
    return find_folder(where)


def read_run(folder: Path, named: Path | None, given: Config) -> Stored:
    """The run in a folder, from the first of its checkpoints that is whole; a warning names those that are not.

    An evaluation reads the result, everything else the whole run.

    Args:
        named: the only checkpoint that may be read, if the user named one.
    Raises: UserError if none is whole, or it is no checkpoint of a run.
    """
    wanted = (BEST, LAST, PREVIOUS) if given.run.evaluate else (LAST, PREVIOUS)
    checkpoints = folder / "checkpoints"
    files = [checkpoints / name for name in wanted if (checkpoints / name).is_file()] if named is None else [named]
    if not files:
        if given.run.evaluate or not checkpoints.is_dir() or list(checkpoints.glob("*.pt")):
            resolve_run(folder, wanted[:2])  # which refuses
        return _never_saved(folder, given)
    for file, other in zip(files, [*files[1:], None], strict=True):
        try:
            state = checkpoint.load(file)
        except DamagedError as error:
            if other is None:
                raise
            if rank_here() == 0:
                announce(f"warning: {error.what}; taking {other} instead")
            continue
        break
    is_run = isinstance(state.get("config"), dict) and state.keys() >= NEEDED and state["phase"] in PHASES
    if not is_run:
        raise UserError(f"{file} is not a checkpoint of a run; pass a run folder or its checkpoints/last.pt")
    if given.run.evaluate and named is None and (state.get("best") or {}).get("model"):
        state = state["best"]
    elif "weight_optimizer" in state and not given.run.evaluate:
        state = with_result(state, file)
    return Stored(folder, file, state)


def _never_saved(folder: Path, given: Config) -> Stored:
    """A run that has to start afresh, with the options that it was started with."""
    written = folder / "config.yaml"
    if written.is_file():
        config = config_from_file(str(written))
    elif given.run.resume == "auto":
        config = given
    else:
        raise UserError(f"{folder} holds nothing to go on from; start the run again without --resume")
    return Stored(folder, None, {"config": config_to_dict(config)})


def with_result(state: dict[str, Any], file: Path) -> dict[str, Any]:
    """A checkpoint with its result in it. One from before results were kept there takes it from best.pt beside it.

    Raises: UserError if that one holds another result.
    """
    best = state.get("best")
    if best is None or "model" in best:
        return state
    content = checkpoint.load(file.with_name(BEST))
    if any(content.get(key) != best[key] for key in ("epoch", "heldout", "test")):
        raise UserError(
            f"the result of {file} is of epoch {best['epoch']}, and that of {BEST} beside it is not the same, because "
            "an older version was killed between writing the two; make the run again"
        )
    content.pop("format_version")
    return {**state, "best": content}


@contextmanager
def fits_a_run(file: Path) -> Iterator[None]:
    """Around what reads a checkpoint entry by entry.

    Raises: UserError if its entries are not those that this program writes.
    """
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{file} has entries that do not make up a run of this program ({reason}); pass a checkpoint that was "
            "written by it and not changed since"
        ) from error


def is_complete(folder: Path, run: RunState) -> bool:
    """Whether a finished run has left its result. One that was killed at the last moment has not."""
    return (folder / "summary.json").is_file() and holds(folder / "checkpoints" / BEST, run.best.content)


def finished(folder: Path, config: Config) -> str:
    """What may be done with a finished run, for one that was to be resumed."""
    again = named_again(config.model.arch)
    best, last = (f"{shlex.quote(checkpoint_of(folder, name))}{again}" for name in (BEST, LAST))
    if config.ends_when_decided or config.method not in TWO_PHASE:
        longer = f"--epochs N with N above {config.train.epochs}"
    elif config.finetunes:
        longer = f"--finetune-epochs N with N above {config.finetune.finetune_epochs}"
    else:  # further epochs have nothing to train until its subnet is fine-tuned
        longer = "--finetune --finetune-epochs N"
    return (
        f"the run in {folder} is finished. --evaluate --resume {best} prints its result, --resume {last} {longer} "
        f"trains it longer, and --pretrained {best} starts another run from it"
    )


def growth_of(stored: Stored, config: Config) -> str:
    """What is longer than in the checkpoint, and the rule of the schedules; empty if nothing is."""
    before, now = stored.state["config"], config_to_dict(config)
    grown = [key for key, entry in OPTIONS.items() if entry.resumed == "may grow" and now[key] != before[key]]
    if not grown:
        return ""
    told = ", ".join(f"{key} {worded(before[key])} -> {worded(now[key])}" for key in grown)
    return (
        f"longer than before: {told}. From here on learning rates and budget are those of a run of "
        f"{config.total_epochs} epochs that had this length from the start; a search that has ended stays ended"
    )
