"""A table of results: the file that describes it, and what one of its runs is.

The file is YAML. Every row is a set of options of main.py, and all rows are checked before anything runs:

    title: ...
    note: a paragraph under the title
    base: {set: FashionMNIST-mini, arch: resnet20_he}   # options of every row, which rows may override
    seeds: [0, 1, 2]
    dense: dense                                        # the row, or rows, that the others are compared with
    rows:
      dense: {method: dense}
      half: {keep_ratio: 0.5}
      same cost: {budget: flops, keep_ratio: {flops_of: half}}   # the FLOPs ratio that a row above came to
    compare: [[half, same cost]]                        # pairs whose difference the report states
    judge: heldout                                      # the images that measure the accuracy; test unless given

Any option may stand in a row. Whether two rows can be compared is for the reader of the table to judge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from args import OPTIONS, config_from_dict, config_to_dict
from utils.errors import UserError
from utils.options import NULL_SCALARS, Given, nearest, resolve

KEYS = ("title", "note", "base", "seeds", "dense", "rows", "compare", "judge")
NEEDED = ("title", "seeds", "dense", "rows")
JUDGES = ("test", "heldout")  # test images must choose nothing, so a table to choose from needs held-out ones
KIND_WORDS = {dict: "a mapping, such as {key: value}", list: "a list, such as [a, b]", str: "plain text"}
# Whoever starts a run decides these, so a table may not set them.
DECIDED_ELSEWHERE = ("config", "name", "log_dir", "seed", "resume", "evaluate", "print_config", "dry_run", "doctor")
# These options change no number of a run. The seed does, but it stands beside the hash.
NO_NUMBERS = {*DECIDED_ELSEWHERE, "print_freq", "save_every", "test_every", "workers"}
SAME_NETWORK = ("set", "data", "arch", "width_mult")  # equal for a row and the dense row that it is compared with

OTHER_NUMBERS = ("flops_ratio", "params_kept", "train_flops_ratio", "train_seconds", "epochs")  # beside the accuracy
HARDWARE = ("cpu", "cpu_capability", "gpu", "num_threads")  # decides how long a run takes
FACTS = (*HARDWARE, "torch", "git_commit", "git_dirty", "data_fingerprint")  # recorded beside the numbers


# ---- the file ----


@dataclass(frozen=True)
class Row:
    """One line of a table: its options, those of `base` included.

    `flops_of` is the row whose FLOPs ratio, seed by seed, is the keep_ratio of this one. `where` is for messages.
    """

    name: str
    options: dict[str, Any]
    flops_of: str | None
    where: str


@dataclass(frozen=True)
class Table:
    """A whole file. `dense` has for every row the name of the row that it is compared with."""

    path: Path
    title: str
    note: str
    seeds: tuple[int, ...]
    rows: dict[str, Row]
    dense: dict[str, str]
    compare: tuple[tuple[str, str], ...]
    judge: str

    @property
    def accuracy(self) -> str:
        """The accuracy that is reported, by its name in summary.json."""
        return f"{self.judge}_top1"

    @property
    def numbers(self) -> tuple[str, ...]:
        """What the report needs of summary.json. A run that lacks one of them cannot be used."""
        return (self.accuracy, *OTHER_NUMBERS)


def read_table(path: str | Path) -> Table:
    """Reads a table and checks every row as main.py would.

    Raises: UserError for the first mistake, with file, row and key.
    """
    path = Path(path)
    parts = _load(path, lambda text: yaml.load(text, Loader=_TextLoader))
    for key in parts:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key!r}; {nearest(key, KEYS, f'a table has {_listed(KEYS)}')}")
    for key in NEEDED:
        if not parts.get(key):
            raise UserError(f"{path}: {key} is missing; a table needs {_listed(NEEDED)}")
    base = _read_options(_expect(dict, parts.get("base", {}), f"{path}: base"), f"{path}, base")
    rows: dict[str, Row] = {}
    for name, given in _expect(dict, parts["rows"], f"{path}: rows").items():
        rows[name] = _read_row(name, given, base, rows, path)
    judge = parts.get("judge", JUDGES[0])
    if judge not in JUDGES:
        raise UserError(f"{path}: judge must be {' or '.join(JUDGES)}, got {judge!r}")
    for row in rows.values():
        if judge == "heldout" and row.options.get("holdout", OPTIONS["holdout"].default) == 0:
            raise UserError(f"{row.where}: judge heldout needs held-out images, holdout is 0")
    return Table(
        path=path,
        title=_expect(str, parts["title"], f"{path}: title"),
        note=_expect(str, parts.get("note", ""), f"{path}: note").strip(),
        seeds=_read_seeds(parts["seeds"], f"{path}: seeds"),
        rows=rows,
        dense=_read_dense(parts["dense"], rows, f"{path}: dense"),
        compare=_read_pairs(parts.get("compare", []), rows, f"{path}: compare"),
        judge=judge,
    )


class _TextLoader(yaml.BaseLoader):
    """Keeps every scalar as text: the declared type of an option decides what 12e-3 or `off` is, not YAML."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:  # PyYAML would drop the first of the two without a word
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _load(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return _expect(dict, content, f"{path}: the file")


def _expect(kind: type, value: Any, what: str) -> Any:
    if not isinstance(value, kind):
        raise UserError(f"{what} must be {KIND_WORDS[kind]}")
    return value


def _read_row(name: str, given: Any, base: Mapping[str, Any], above: Mapping[str, Row], path: Path) -> Row:
    where = f"{path}, row {name!r}"
    if not name.strip() or not name.isprintable() or "|" in name:
        raise UserError(f"{where}: the name of a row must be one line without |")
    texts, source = dict(_expect(dict, given, where)), None
    if isinstance(texts.get("keep_ratio"), dict):
        if list(texts["keep_ratio"]) != ["flops_of"]:
            raise UserError(f"{where}: keep_ratio must be a number or {{flops_of: ROW}}")
        source = row_name(texts["keep_ratio"]["flops_of"], above, f"{where}: flops_of", "no row above")
        texts["keep_ratio"] = str(OPTIONS["keep_ratio"].default)  # until the other row has a result
    options = {**base, **_read_options(texts, where)}
    config_from_dict(options, where)
    return Row(name, options, source, where)


def _read_options(texts: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checked values by key."""
    given = []
    for key, text in texts.items():
        name = key.replace("-", "_")
        if name in DECIDED_ELSEWHERE:
            advice = "list it under seeds" if name == "seed" else "leave it out"
            raise UserError(f"{name} cannot be set in a table ({where}), whoever runs it decides it; {advice}")
        if not isinstance(text, str):
            raise UserError(
                f"{name} must be a single value ({where}); only a row's keep_ratio can be {{flops_of: ROW}}"
            )
        given.append(Given(name, None if text in NULL_SCALARS else text, False, where))
    return {key: setting.value for key, setting in resolve(OPTIONS, given).items()}


def row_name(name: Any, rows: Mapping[str, Row], what: str, otherwise: str = "no row") -> str:
    if _expect(str, name, what) not in rows:
        advice = nearest(name, rows, f"choose from {_listed(rows) or 'none'}")
        raise UserError(f"{what} names {name!r}, which is {otherwise}; {advice}")
    return name


def _read_seeds(given: Any, what: str) -> tuple[int, ...]:
    texts = [_expect(str, text, f"each of {what}") for text in _expect(list, given, what)]
    seeds = tuple(resolve(OPTIONS, [Given("seed", text, False, what)])["seed"].value for text in texts)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{what} must be distinct, got {_listed(texts)}")
    return seeds


def _read_dense(given: Any, rows: Mapping[str, Row], what: str) -> dict[str, str]:
    """A single name holds for all rows. Of several names a row gets the one of its own network."""
    names = [row_name(name, rows, what) for name in (given if isinstance(given, list) else [given])]
    networks = {
        name: [row.options.get(key, OPTIONS[key].default) for key in SAME_NETWORK] for name, row in rows.items()
    }
    dense = {row: [name for name in names if len(names) == 1 or networks[name] == networks[row]] for row in rows}
    for row, same in dense.items():
        if len(same) != 1:
            own = _listed(f"{key} {value}" for key, value in zip(SAME_NETWORK, networks[row], strict=True))
            raise UserError(f"{what} must name one row of the network of row {row!r} ({own})")
    return {row: same for row, [same] in dense.items()}


def _read_pairs(given: Any, rows: Mapping[str, Row], what: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for entry in _expect(list, given, what):
        pair = tuple(row_name(name, rows, what) for name in _expect(list, entry, f"a pair of {what}"))
        if len(pair) != 2 or pair[0] == pair[1]:
            raise UserError(f"a pair of {what} must be two different rows, got {_listed(pair) or 'none'}")
        pairs.append(pair)
    return tuple(pairs)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


# ---- runs ----


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
    flat = _load(config, yaml.safe_load)
    options = options_of(flat, str(config), defaults)
    summary, environment = _read_json(folder / "summary.json"), _read_json(folder / "env.json")
    environment["data_fingerprint"] = summary.get("data_fingerprint")
    date, facts = "", {}
    if all(isinstance(summary.get(name), int | float) for name in table.numbers):
        date = f"{datetime.fromtimestamp((folder / 'summary.json').stat().st_mtime, UTC):%Y-%m-%d}"
        # Never the test accuracy, if held-out images judge.
        numbers = dict.fromkeys((table.accuracy, "heldout_top1", *OTHER_NUMBERS))
        facts = {name: summary[name] for name in numbers if summary.get(name) is not None}
        facts |= {name: environment[name] for name in FACTS if environment.get(name) is not None}
    elif not (folder / "checkpoints" / "last.pt").is_file():
        return None
    started = config.stat().st_mtime_ns
    return Run("", flat["seed"], config_hash(options, defaults), alone, date, started, facts, options, folder)


def _read_json(path: Path) -> dict[str, Any]:
    """What a run wrote; nothing if it did not come to it, or was interrupted."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
