"""The record of a table: results/NAME.runs.json holds every run that the report tells of, without its files.

With it a table can be checked run by run, one row made again on another machine, and rows added, while the run folders,
which are large, stay where they were made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from args import Config, config_from_dict
from utils.errors import UserError
from utils.table_file import config_hash, hashed_options
from utils.table_runs import Key, Run, read_json

ABOUT = "Runs of a table, one on each line; written by utils.reproduce, not by hand."
# What the report tells of a run's env.json.
FACTS = ("cpu", "cpu_capability", "gpu", "num_threads", "torch", "git_commit", "git_dirty")


def read_record(path: Path, numbers: Sequence[str]) -> tuple[list[Run], dict[str, str]]:
    """The recorded runs, and what is wrong with those that cannot be used, by name; a file need not be there.

    As with a run folder, a run belongs to the hash of its options as they are read today.

    Raises: UserError for a file that is no record.
    """
    if not path.exists():
        return [], {}
    record = read_json(path)
    runs, unreadable = [], {}
    try:
        configs: dict[str, Config] = {}
        for name, options in record["configs"].items():
            try:
                configs[name] = config_from_dict(options, f"{path}, config {name}")
            except UserError as error:
                unreadable[f"{path}, config {name}"] = str(error)
        runs = [
            _run(configs[entry["config"]], entry, numbers) for entry in record["runs"] if entry["config"] in configs
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is no record of runs; restore it, or remove it and make the runs again") from None
    return runs, unreadable


def _run(config: Config, entry: dict[str, Any], names: Sequence[str]) -> Run:
    numbers = {name: entry[name] for name in names}
    if not all(isinstance(number, int | float) for number in numbers.values()):
        raise ValueError(numbers)
    environment = {name: entry[name] for name in FACTS if name in entry}
    key = Key(config_hash(config), entry["seed"])
    return Run(key, 0, hashed_options(config), numbers, environment, entry["date"], entry["alone"])


def write_record(path: Path, numbers: Iterable[str], runs: Iterable[tuple[str, Run]]) -> None:
    """Writes these numbers of finished runs, each run with the name of its row."""
    configs: dict[str, dict[str, Any]] = {}
    lines = []
    for row, run in runs:
        configs[run.key.hash] = run.options
        facts = {name: run.environment[name] for name in FACTS if run.environment.get(name) is not None}
        start = {"row": row, "seed": run.key.seed, "config": run.key.hash, "alone": run.alone, "date": run.date}
        lines.append(json.dumps({**start, **{name: run.summary[name] for name in numbers}, **facts}))
    configs_text = ",\n".join(f"{json.dumps(name)}: {json.dumps(options)}" for name, options in configs.items())
    runs_text = ",\n".join(lines)
    path.write_text(
        f'{{"about": {json.dumps(ABOUT)},\n"configs": {{\n{configs_text}\n}},\n"runs": [\n{runs_text}\n]}}\n',
        encoding="utf-8",
    )
