"""The record of a table: results/NAME.runs.json holds every run that the report tells of, without its files.

With it a table can be checked run by run, one row made again on another machine, and rows added, while the run folders,
which are large, stay where they were made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from args import Config, config_from_dict
from tools.table_file import config_hash, hashed_options
from tools.table_runs import HARDWARE, Key, Run, machine_of, read_json
from utils.errors import UserError

ABOUT = "Runs of a table, one on each line; written by tools.reproduce, not by hand."
# What the report tells of a run's env.json, and which images it saw.
FACTS = (*HARDWARE, "torch", "git_commit", "git_dirty", "data_fingerprint")


def read_record(path: Path, numbers: Sequence[str]) -> tuple[list[Run], dict[str, str]]:
    """The recorded runs, and what is wrong with those that cannot be used, by name; a file need not be there.

    As with a run folder, a run belongs to the hash of its options as they are read today.

    Args:
        numbers: what a run must have.
    Raises: UserError for a file that is no record.
    """
    record, runs, unreadable = _read(path), [], {}
    try:
        configs: dict[str, Config] = {}
        for name, options in record["configs"].items():
            try:
                configs[name] = config_from_dict(options, f"{path}, config {name}")
            except UserError as error:
                unreadable[f"{path}, config {name}"] = str(error)
        for entry in record["runs"]:
            missing = [name for name in numbers if entry.get(name) is None]
            if missing:
                unreadable[f"{path}, {entry['row']}, seed {entry['seed']}"] = f"it has no {', '.join(missing)}"
            elif entry["config"] in configs:
                runs.append(_run(configs[entry["config"]], entry, numbers))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise _no_record(path) from None
    return runs, unreadable


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"configs": {}, "runs": []}
    record = read_json(path)
    if record is None:
        raise _no_record(path)
    return record


def _no_record(path: Path) -> UserError:
    return UserError(f"{path} is no record of runs; restore it, or remove it and make the runs again")


def _run(config: Config, entry: dict[str, Any], names: Sequence[str]) -> Run:
    numbers = {name: entry[name] for name in names}
    if not all(isinstance(number, int | float) for number in numbers.values()):
        raise ValueError(numbers)
    environment = {name: entry[name] for name in FACTS if name in entry}
    key = Key(config_hash(config), entry["seed"])
    return Run(key, entry["started"], hashed_options(config), numbers, environment, entry["date"], entry["alone"])


def write_record(path: Path, numbers: Sequence[str], runs: Iterable[tuple[str, Run]]) -> None:
    """Adds finished runs, each with the name of its row; one that was made again replaces what was recorded of it.

    All other entries stay as they are, whether the table still has them or today's options can read them or not: this
    file may hold the only copy.

    Args:
        numbers: what is recorded of a summary.
    Raises: UserError for a file that is no record.
    """
    record = _read(path)
    try:
        configs = dict(record["configs"])
        entries = {_identity(entry): entry for entry in record["runs"]}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise _no_record(path) from None
    for row, run in runs:
        entry = _entry(row, run, numbers)
        if run.folder is not None:  # the others came from here
            configs[run.key.hash] = run.options
            entries[_identity(entry)] = entry
    ordered = sorted(entries.values(), key=lambda entry: (entry["row"], entry["seed"], entry["config"]))
    configs_text = ",\n".join(f"{json.dumps(name)}: {json.dumps(configs[name])}" for name in sorted(configs))
    runs_text = ",\n".join(json.dumps(entry) for entry in ordered)
    text = f'{{"about": {json.dumps(ABOUT)},\n"configs": {{\n{configs_text}\n}},\n"runs": [\n{runs_text}\n]}}\n'
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _identity(entry: dict[str, Any]) -> tuple[Any, ...]:
    """The same for a run that was made again; every machine has seconds of its own."""
    return (entry["config"], entry["seed"], entry["alone"], machine_of(entry) if entry["alone"] else None)


def _entry(row: str, run: Run, numbers: Sequence[str]) -> dict[str, Any]:
    start = {"row": row, "seed": run.key.seed, "config": run.key.hash, "alone": run.alone}
    start |= {"date": run.date, "started": run.started}
    told = {name: run.summary[name] for name in numbers if run.summary.get(name) is not None}
    facts = {name: run.environment[name] for name in FACTS if run.environment.get(name) is not None}
    return {**start, **told, **facts}
