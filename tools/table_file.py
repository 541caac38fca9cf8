"""A table of results as a YAML file: every row is a set of options of main.py, all checked before anything runs.

A file looks like this:

    title: ...
    note: a paragraph under the title
    base: {set: FashionMNIST-mini, arch: resnet20_he}   # options of every row, which rows may override
    seeds: [0, 1, 2]
    dense: dense                                        # the row, or rows, that others are told relative to
    rows:
      dense: {conv_type: DenseConv}
      half: {keep_ratio: 0.5}
      same cost: {budget: flops, keep_ratio: {flops_of: half}}   # the FLOPs ratio that this row's run came to
    compare: [[half, same cost]]                        # their differences are told in words
    judge: heldout                                      # the images whose accuracy is told; test unless said

Every option may stand in a row; what two rows need in common is for the reader to judge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from args import OPTIONS, Config, config_from_dict, config_to_dict
from utils.errors import UserError
from utils.options import NULL_SCALARS, Given, convert, nearest, resolve

KEYS = ("title", "note", "base", "seeds", "dense", "rows", "compare", "judge")
NEEDED = ("title", "seeds", "dense", "rows")
JUDGES = ("test", "heldout")  # test images must choose nothing: a table to choose from needs held-out ones

# What a run is told by whoever starts it; a table may not say it.
DECIDED_ELSEWHERE = ("config", "name", "log_dir", "seed", "resume", "evaluate", "print_config", "dry_run")
# Left out of the hash: these change no number. The seed stands beside the hash.
NO_NUMBERS = {*DECIDED_ELSEWHERE, "print_freq", "save_every", "test_every", "workers"}
OTHER_NUMBERS = ("flops_ratio", "params_kept", "train_flops_ratio", "train_seconds", "epochs")  # beside the accuracy
SAME_NETWORK = ("set", "data", "arch", "width_mult")  # what a row and its dense row have in common


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        options: values by key, those of `base` included.
        flops_of: the row whose realised FLOPs ratio, seed by seed, is this row's keep_ratio; None: as in `options`.
        where: file and name, for messages.
    """

    name: str
    options: dict[str, Any]
    flops_of: str | None
    where: str

    def options_with(self, flops_ratio: float | None) -> dict[str, Any]:
        """The options of a run; `flops_ratio` is the one of the row `flops_of`."""
        return self.options if self.flops_of is None else {**self.options, "keep_ratio": flops_ratio}


@dataclass(frozen=True)
class Table:
    """A whole file.

    Attributes:
        name: of the file, without its ending.
        dense: for every row the row that it is told relative to.
        compare: pairs of rows.
        judge: one of `JUDGES`.
    """

    path: Path
    title: str
    note: str
    seeds: tuple[int, ...]
    rows: dict[str, Row]
    dense: dict[str, str]
    compare: tuple[tuple[str, str], ...]
    judge: str = "test"

    @property
    def accuracy(self) -> str:
        """The accuracy that is told, as summary.json calls it."""
        return f"{self.judge}_top1"

    @property
    def numbers(self) -> tuple[str, ...]:
        """What the report needs of summary.json; one without them was not written by a finished run."""
        return (self.accuracy, *OTHER_NUMBERS)

    @property
    def recorded(self) -> tuple[str, ...]:
        """What is kept of summary.json: never a test accuracy of a table that held-out images judge."""
        return (*dict.fromkeys((self.accuracy, "heldout_top1")), *OTHER_NUMBERS)

    @property
    def name(self) -> str:
        return self.path.stem


def hashed_options(config: Config) -> dict[str, Any]:
    """Every option that can change a number, the seed excepted."""
    return {key: value for key, value in config_to_dict(config).items() if key not in NO_NUMBERS}


def config_hash(config: Config) -> str:
    """12 hex digits that stand for the `hashed_options`."""
    return hashlib.sha256(json.dumps(hashed_options(config), sort_keys=True).encode()).hexdigest()[:12]


def read_table(path: str | Path) -> Table:
    """Reads a table and checks every row as main.py would.

    Raises: UserError for the first mistake, with row and key.
    """
    path = Path(path)
    parts = _mapping(_root(path), path, "the table")
    for key, node in parts.items():
        if key not in KEYS:
            raise _refusal(path, node, f"unknown key {key!r}; {nearest(key, KEYS, f'a table has {_listed(KEYS)}')}")
    for key in NEEDED:
        if key not in parts:
            raise UserError(f"{path}: {key} is missing; a table needs {_listed(NEEDED)}")
    base = _read_options(_mapping(parts["base"], path, "base"), f"{path}, base") if "base" in parts else {}
    rows = {name: _read_row(name, node, base, path) for name, node in _mapping(parts["rows"], path, "rows").items()}
    if not rows:
        raise _refusal(path, parts["rows"], "rows must hold at least one row")
    _check_sources(rows)
    judge = _read_judge(parts["judge"], rows, path) if "judge" in parts else JUDGES[0]
    return Table(
        path=path,
        title=_text(parts["title"], path, "title"),
        note=_text(parts["note"], path, "note").strip() if "note" in parts else "",
        seeds=_read_seeds(parts["seeds"], path),
        rows=rows,
        dense=_read_dense(parts["dense"], rows, path),
        compare=_read_pairs(parts["compare"], rows, path) if "compare" in parts else (),
        judge=judge,
    )


# ---- rows ----


def _read_row(name: str, node: yaml.Node, base: Mapping[str, Any], path: Path) -> Row:
    if not name.strip() or not name.isprintable() or "|" in name:
        raise _refusal(path, node, f"a row must have a name of one line without |, got {name!r}")
    where = f"{path}, row {name!r}"
    given = _mapping(node, path, f"row {name!r}")
    source = None
    if isinstance(given.get("keep_ratio"), yaml.MappingNode):
        source = _read_source(given.pop("keep_ratio"), name, path)
    own = _read_options(given, where)
    if source is not None and "keep_ratio" in own:
        raise _refusal(path, node, f"row {name!r} gives keep_ratio twice, once as flops_of; keep one")
    options = {**base, **own}
    if source is not None:
        options.pop("keep_ratio", None)
    config_from_dict(options, where)
    return Row(name, options, source, where)


def _read_source(node: yaml.Node, row: str, path: Path) -> str:
    parts = _mapping(node, path, f"keep_ratio of row {row!r}")
    if list(parts) != ["flops_of"]:
        raise _refusal(path, node, f"keep_ratio of row {row!r} must be a number or {{flops_of: ROW}}")
    return _text(parts["flops_of"], path, f"flops_of of row {row!r}")


def _read_options(nodes: Mapping[str, yaml.Node], where: str) -> dict[str, Any]:
    """Checked values by key. Texts become values by the declared type of the option, as in a config file."""
    given = []
    for key, node in nodes.items():
        name, place = key.replace("-", "_"), f"{where}, line {node.start_mark.line + 1}"
        if name in DECIDED_ELSEWHERE:
            advice = "list it under seeds" if name == "seed" else "leave it out"
            raise UserError(f"{name} cannot be set in a table ({place}), whoever runs it decides it; {advice}")
        if not isinstance(node, yaml.ScalarNode):
            raise UserError(
                f"{name} must be a single value ({place}); only a row's keep_ratio can be {{flops_of: ROW}}"
            )
        given.append(_given(name, node, place))
    return {key: setting.value for key, setting in resolve(OPTIONS, given).items()}


def _given(name: str, node: yaml.ScalarNode, where: str) -> Given:
    quoted = node.style is not None
    return Given(name, None if not quoted and node.value in NULL_SCALARS else node.value, quoted, where)


def _check_sources(rows: Mapping[str, Row]) -> None:
    """Every `flops_of` names a row, and no rows wait for each other."""
    for row in rows.values():
        chain = [row.name]
        while (source := rows[chain[-1]].flops_of) is not None:
            if source not in rows:
                raise UserError(f"{rows[chain[-1]].where}: flops_of names {source!r}; {_no_row(source, rows)}")
            if source in chain:
                names = " -> ".join(repr(name) for name in (*chain, source))
                raise UserError(f"{row.where}: flops_of goes in a circle, {names}; give one of them a number")
            chain.append(source)


def _no_row(name: str, rows: Iterable[str]) -> str:
    return f"there is no such row; {nearest(name, rows, f'the rows are {_listed(rows)}')}"


# ---- the other keys ----


def _read_seeds(node: yaml.Node, path: Path) -> tuple[int, ...]:
    nodes = _sequence(node, path, "seeds")
    if not all(isinstance(entry, yaml.ScalarNode) for entry in nodes) or not nodes:
        raise _refusal(path, node, "seeds must be a list of at least one whole number, such as [0, 1, 2]")
    seeds = tuple(convert(OPTIONS["seed"], _given("seed", entry, f"{path}, seeds")) for entry in nodes)
    if len(set(seeds)) < len(seeds):
        raise _refusal(path, node, f"seeds must be distinct, got {_listed(map(str, seeds))}")
    return seeds


def _read_dense(node: yaml.Node, rows: Mapping[str, Row], path: Path) -> dict[str, str]:
    """With one name it is everybody's; of several a row has the one of its own network."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    names = [_row_name(entry, rows, path, "dense") for entry in nodes]
    if len(names) == 1:
        return dict.fromkeys(rows, names[0])
    dense = {}
    for row in rows.values():
        network = _network_of(row)
        same = [name for name in names if _network_of(rows[name]) == network]
        if len(same) != 1:
            raise _refusal(
                path,
                node,
                f"dense must name one row of the network of row {row.name!r} "
                f"({', '.join(f'{key} {value}' for key, value in network.items())}), got {len(same)}",
            )
        dense[row.name] = same[0]
    return dense


def _network_of(row: Row) -> dict[str, Any]:
    return {key: row.options.get(key, OPTIONS[key].default) for key in SAME_NETWORK}


def _read_pairs(node: yaml.Node, rows: Mapping[str, Row], path: Path) -> tuple[tuple[str, str], ...]:
    pairs = []
    for entry in _sequence(node, path, "compare"):
        names = tuple(_row_name(part, rows, path, "compare") for part in _sequence(entry, path, "a pair of compare"))
        if len(set(names)) != 2 or len(names) != 2:
            raise _refusal(path, entry, f"a pair of compare must be two different rows, got {_listed(names) or 'none'}")
        pairs.append(names)
    return tuple(pairs)


def _read_judge(node: yaml.Node, rows: Mapping[str, Row], path: Path) -> str:
    judge = _text(node, path, "judge")
    if judge not in JUDGES:
        raise _refusal(path, node, f"judge must be {' or '.join(JUDGES)}, got {judge!r}")
    for row in rows.values():
        if judge == "heldout" and row.options.get("holdout", OPTIONS["holdout"].default) == 0:
            raise _refusal(path, node, f"judge heldout needs held-out images, row {row.name!r} has holdout 0")
    return judge


def _row_name(node: yaml.Node, rows: Mapping[str, Row], path: Path, key: str) -> str:
    name = _text(node, path, key)
    if name not in rows:
        raise _refusal(path, node, f"{key} names {name!r}; {_no_row(name, rows)}")
    return name


# ---- YAML ----


def _root(path: Path) -> yaml.Node:
    """The tree of a file, as text with places: nothing is constructed."""
    try:
        text = path.read_text(encoding="utf-8")
        if any(_is_fancy(event) for event in yaml.parse(text, yaml.SafeLoader)):
            raise UserError(f"{path}: anchors, aliases and tags (&, * and !) are not allowed; write the plain value")
        root = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"cannot read the table {path}: {error.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if root is None:
        raise UserError(f"{path} is empty; a table needs {_listed(NEEDED)}")
    return root


def _is_fancy(event: yaml.Event) -> bool:
    return bool(getattr(event, "anchor", None) or getattr(event, "tag", None))


def _mapping(node: yaml.Node, path: Path, what: str) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        raise _refusal(path, node, f"{what} must be a mapping, such as {{key: value}}")
    entries: dict[str, yaml.Node] = {}
    for key, value in node.value:
        name = _text(key, path, f"a key of {what}")
        if name in entries:
            raise _refusal(path, key, f"{name!r} is given twice in {what}; keep one")
        entries[name] = value
    return entries


def _sequence(node: yaml.Node, path: Path, what: str) -> list[yaml.Node]:
    if not isinstance(node, yaml.SequenceNode):
        raise _refusal(path, node, f"{what} must be a list, such as [a, b]")
    return node.value


def _text(node: yaml.Node, path: Path, what: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise _refusal(path, node, f"{what} must be plain text")
    return node.value


def _refusal(path: Path, node: yaml.Node, what: str) -> UserError:
    return UserError(f"{path} line {node.start_mark.line + 1}: {what}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
