"""What a run of a table is: the hash of its options, its facts as its folder tells them, and the record of all runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from args import OPTIONS, config_from_dict, config_to_dict
from tools.tables import DECIDED_ELSEWHERE, RUN_OF, Table, load_mapping
from trainers.automatic import undecided
from utils.errors import UserError
from utils.options import AUTO

TABLES_FOLDER = Path(__file__).resolve().parent.parent / "configs/tables"  # tables that lie elsewhere are a user's own
RESULTS_FOLDER = Path("results")
# These options change no number of a run. The seed does, but it stands beside the hash.
NO_NUMBERS = {*DECIDED_ELSEWHERE, "print_freq", "save_every", "test_every", "workers"}
OTHER_NUMBERS = ("flops_ratio", "params_kept", "train_flops_ratio", "train_seconds", "epochs")  # beside the accuracy
LATER_NUMBERS = ("train_cpu_seconds", "train_flops_executed")  # which runs of older versions do not have
HARDWARE = ("cpu", "cpu_capability", "gpu", "num_threads")  # decides how long a run takes
FACTS = (*HARDWARE, "torch", "git_commit", "git_dirty", "data_fingerprint")  # recorded beside the numbers
ENTRY = ("row", "seed", "config", "alone", "date", "started")  # how a recorded run begins, its facts follow
ABOUT = "Runs of a table, one on each line; written by tools.reproduce, not by hand."
BEST = Path("checkpoints/best.pt")  # the result of a run, from its folder


def numbers_of(table: Table) -> tuple[str, ...]:
    """What the report needs of summary.json. A run that lacks one of them cannot be used."""
    return (table.accuracy, *OTHER_NUMBERS)


def options_of(flat: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every option that can change a number, the seed excepted, from those that were given.

    Args:
        defaults: of a run that was made earlier, the first default of every option, see `config_hash`. A run that
            does not name an option is older than the option, so it counts as a run with its first default.
    """
    options = config_to_dict(config_from_dict(flat, where))
    for key, first in (defaults or {}).items():
        if first != OPTIONS[key].default and flat.keys().isdisjoint(OPTIONS[key].names):
            options[key] = first
    return {key: value for key, value in options.items() if key not in NO_NUMBERS}


def named_by_hash(options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The same options, in which the run of another row, of the same seed, is named by its hash instead of its path.

    A run of a table lies in `HASH/ROW-seedN/`, wherever that folder is and whatever it is moved to. So two runs that
    start from runs of equal options have equal options themselves, and no path of a machine is recorded.
    """
    named = dict(options)
    for key in RUN_OF:
        if found := re.search(rf"(?:^|/)([0-9a-f]{{12}})/[^/]+-seed{seed}(?:/|$)", str(options.get(key))):
            named[key] = run_name(found[1])
    return named


def run_name(hash: str) -> str:
    """How options name the run of the same seed whose options have this hash."""
    return f"run of {hash}"


def config_hash(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """12 hex digits that stand for those of the `options_of` a run whose values differ from `defaults`.

    `defaults` are not those of today: the record of a table keeps the default with which it first saw each option. So
    an option that the program gains or loses, and that stands at its default, leaves every hash as it is. When a
    default changes, the rows that rely on it differ from the first default: they get a new hash and are run again,
    while the runs that were made before keep theirs.
    """
    told = {key: value for key, value in options.items() if value != defaults[key]}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Run:
    """A run that has a result or can go on, as its folder or the record of the table describes it.

    Attributes:
        row: its row when it was recorded.
        alone: nothing else ran at the same time, so its seconds count.
        date: the day, in UTC, on which it was finished; "" before.
        started: the time of its latest start, in ns.
        facts: the numbers of its summary, then what it wrote about machine, versions and images.
        folder: None: it is only recorded.
    """

    row: str
    seed: int
    hash: str
    alone: bool
    date: str
    started: int
    facts: dict[str, Any]
    options: dict[str, Any]
    folder: Path | None = None

    @property
    def finished(self) -> bool:
        """Whether it has a result."""
        return bool(self.facts)

    @property
    def machine(self) -> tuple[Any, ...]:
        """Equal for runs on one machine, the only ones whose seconds make a ratio."""
        return tuple(self.facts.get(name) for name in HARDWARE)

    @property
    def age(self) -> tuple[int, bool]:
        """Larger for newer runs; of a run that is both here and recorded, the one here counts."""
        return self.started, self.folder is not None


def read_run(folder: Path, alone: bool, table: Table, defaults: Mapping[str, Any]) -> Run | None:
    """The run in a folder; None if it has neither a result nor a checkpoint.

    Raises: UserError for a config that today's options refuse.
    """
    config = folder / "config.yaml"
    flat = load_mapping(config, yaml.safe_load)
    options = options_of(named_by_hash(flat, flat["seed"]), str(config), defaults)
    options |= {key: AUTO for key in left_to_a_rule(folder) if key in options}
    summary, environment = _read_json(folder / "summary.json"), _read_json(folder / "env.json")
    environment["data_fingerprint"] = summary.get("data_fingerprint")
    date, facts = "", {}
    if all(isinstance(summary.get(name), int | float) for name in numbers_of(table)):
        date = f"{datetime.fromtimestamp((folder / 'summary.json').stat().st_mtime, UTC):%Y-%m-%d}"
        # Never the test accuracy, if held-out images judge.
        numbers = dict.fromkeys((table.accuracy, "heldout_top1", *OTHER_NUMBERS, *LATER_NUMBERS))
        summary.setdefault("train_flops_executed", summary.get("train_flops_ratio_padded"))  # its name in older runs
        facts = {name: summary[name] for name in numbers if summary.get(name) is not None}
        facts |= {name: environment[name] for name in FACTS if environment.get(name) is not None}
    elif not (folder / "checkpoints" / "last.pt").is_file():
        return None
    started = config.stat().st_mtime_ns
    return Run("", flat["seed"], config_hash(options, defaults), alone, date, started, facts, options, folder)


def left_to_a_rule(folder: Path) -> list[str]:
    """The options of a table's run that its row leaves `auto`, while the config of the run has the values they got.

    A table started it with the file `HASH.yaml`, which lies beside the folder `HASH` and has the options as the row
    gives them.
    """
    file = next((p.with_suffix(".yaml") for p in folder.parents if re.fullmatch("[0-9a-f]{12}", p.name)), None)
    if file is None or not file.is_file():
        return []
    return undecided(config_to_dict(config_from_dict(load_mapping(file, yaml.safe_load), str(file))))


def _read_json(path: Path) -> dict[str, Any]:
    """What a run wrote; nothing if it did not come to it, or was interrupted."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


# ---- the record ----


def record_path(table: Table) -> Path:
    """Where the record of a table is, with its report beside it: next to the table, or in results/ for one of this
    repository, in a folder there that is named as its folder in configs/tables/ is.

    Raises: UserError if a file of a user's own has the name of the report: one that has no record beside it.
    """
    folder = table.path.resolve().parent
    own = folder.is_relative_to(TABLES_FOLDER.resolve())
    place = RESULTS_FOLDER / folder.relative_to(TABLES_FOLDER.resolve()) if own else table.path.parent
    path = place / f"{table.path.stem}.runs.json"
    for other in (path.with_name(f"{table.path.stem}{ending}") for ending in (".md", ".csv")):
        if not own and other.exists() and not path.exists():
            raise UserError(
                f"{other} is there already, and no {path.name} beside it says that it is a report; the report of "
                f"{table.path} would replace it, so rename one of the two"
            )
    return path


class Record:
    """Every run that a report was made from, with its options and without its files.

    With it a table can be checked run by run, single rows can be made again on another machine, and rows can be added,
    while the run folders, which are large, stay where they were made.

    Attributes:
        defaults: of every option that can change a number, the first one that this record saw.
        runs: those whose options can be read today.
        unreadable: what is wrong with the options of the others, which stay in the file as they are.
    """

    def __init__(self, path: Path) -> None:
        """Raises: UserError for a file that is no record; it need not be there."""
        self.path, self.runs, self.unreadable = path, [], {}
        self._configs, self._entries = {}, []  # of runs that cannot be read
        try:
            stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"configs": {}, "runs": []}
            firsts, options = stored.get("defaults", {}), {}
            self.defaults = {key: firsts.get(key, OPTIONS[key].default) for key in OPTIONS if key not in NO_NUMBERS}
            for name, config in stored["configs"].items():
                try:
                    options[name] = options_of(config, f"{path}, config {name}", self.defaults)
                except UserError as error:
                    self.unreadable[f"{path}, config {name}"] = str(error)
                    self._configs[name] = config
            for entry in stored["runs"]:
                if entry["config"] in self._configs:
                    self._entries.append(entry)
                else:
                    self.runs.append(self._run(entry, options[entry["config"]]))
        except (OSError, AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{path} is no record of runs; restore it, or remove it and make the runs again") from None

    def _run(self, entry: dict[str, Any], options: dict[str, Any]) -> Run:
        facts = dict(entry)
        row, seed, _, alone, date, started = (facts.pop(name) for name in ENTRY)
        for name in ("test_top1", "heldout_top1", *OTHER_NUMBERS, *LATER_NUMBERS):
            if not isinstance(facts.get(name, 0), int | float):
                raise TypeError(name)
        return Run(row, seed, config_hash(options, self.defaults), alone, date, started, facts, options)

    def write(self, told: Iterable[Run]) -> None:
        """Adds the runs of a report. A run that was made again replaces what was recorded of it.

        All other runs stay, whether the table still has them or not, since this may be the only copy of them.
        """
        made = [run for run in told if run.folder is not None]
        newest_last = sorted([*self.runs, *made], key=lambda run: run.age)
        # Every machine has seconds of its own.
        runs = {(run.hash, run.seed, run.alone, run.alone and run.machine): run for run in newest_last}
        configs = self._configs | {run.hash: run.options for run in runs.values()}
        entries = [*self._entries, *map(_entry, runs.values())]
        entries.sort(key=lambda entry: (entry["row"], entry["seed"], entry["config"]))
        config_lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(configs[name])}" for name in sorted(configs))
        run_lines = ",\n".join(map(json.dumps, entries))
        text = f'{{"about": {json.dumps(ABOUT)},\n"defaults": {json.dumps(self.defaults)},\n'
        text += f'"configs": {{\n{config_lines}\n}},\n"runs": [\n{run_lines}\n]}}\n'
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path)


def _entry(run: Run) -> dict[str, Any]:
    start = (run.row, run.seed, run.hash, run.alone, run.date, run.started)
    return dict(zip(ENTRY, start, strict=True)) | run.facts
