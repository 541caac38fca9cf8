"""A table of results: the file that describes it.

The file is YAML. Every row is a set of options of main.py, and all rows are checked before anything runs:

    title: ...
    note: a paragraph under the title
    base: {set: FashionMNIST-mini, arch: resnet20_he}   # options of every row, which rows may override
    seeds: [0, 1, 2]
    dense: dense                                        # the row, or rows, that the others are compared with
    seconds_of: thin                                    # the same for the seconds; left out: none are compared
    rows:
      dense: {method: dense}
      thin: {method: thin, keep_ratio: 0.5}
      half: {keep_ratio: 0.5}
      same cost: {budget: flops, keep_ratio: {flops_of: half}}   # the FLOPs ratio that a row above came to
      pruned: {method: l1, pretrained: {run_of: dense}}          # the network that a row above trained
      coin: {method: coin}
    primary: [half, thin]                               # the pair that was chosen before the first run
    compare: [[half, same cost]]                        # more pairs whose difference the report states
    not_pooled: [coin]                                  # rows that spread more than others, for reasons of their own
    judge: heldout                                      # the images that measure the accuracy; test unless given

Any option may stand in a row. `flops_of` and `run_of` mean the run of the same seed; a row waits until that run has its
result. Whether two rows can be compared is for the reader of the table to judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from args import OPTIONS, config_from_dict
from utils.errors import UserError
from utils.options import NULL_SCALARS, Given, nearest, resolve

KEYS = ("title", "note", "base", "seeds", "dense", "seconds_of", "rows", "primary", "compare", "not_pooled", "judge")
NEEDED = ("title", "seeds", "dense", "rows")
JUDGES = ("test", "heldout")  # test images must choose nothing, so a table to choose from needs held-out ones
KIND_WORDS = {dict: "a mapping, such as {key: value}", list: "a list, such as [a, b]", str: "plain text"}
# Whoever starts a run decides these, so a table may not set them.
DECIDED_ELSEWHERE = ("config", "name", "log_dir", "seed", "resume", "evaluate", "print_config", "dry_run", "doctor")
SOURCES = {"keep_ratio": "flops_of", "pretrained": "run_of", "widths_of": "run_of"}  # options that a row above can give
RUN_OF = tuple(key for key, word in SOURCES.items() if word == "run_of")
SAME_NETWORK = ("set", "data", "arch", "width_mult")  # equal for a row and the dense row that it is compared with


@dataclass(frozen=True)
class Row:
    """One line of a table: its options, those of `base` included.

    Attributes:
        flops_of: by option, the row whose FLOPs ratio, seed by seed, is its value.
        run_of: by option, the row whose run of the same seed is its value.
        where: for messages.
    """

    name: str
    options: dict[str, Any]
    where: str
    flops_of: dict[str, str] = field(default_factory=dict)
    run_of: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A whole file.

    Attributes:
        dense: for every row the name of the row that its accuracy is compared with.
        seconds_of: the same for its seconds; nothing if they are not compared.
        primary: the pair whose difference the table was made for.
        not_pooled: rows whose spread is not taken to be that of the others.
    """

    path: Path
    title: str
    note: str
    seeds: tuple[int, ...]
    rows: dict[str, Row]
    dense: dict[str, str]
    compare: tuple[tuple[str, str], ...] = ()
    judge: str = JUDGES[0]
    seconds_of: dict[str, str] = field(default_factory=dict)
    primary: tuple[str, str] | None = None
    not_pooled: tuple[str, ...] = ()

    @property
    def accuracy(self) -> str:
        """The accuracy that is reported, by its name in summary.json."""
        return f"{self.judge}_top1"


def read_table(path: str | Path) -> Table:
    """Reads a table and checks every row as main.py would.

    Raises: UserError for the first mistake, with file, row and key.
    """
    path = Path(path)
    parts = load_mapping(path, lambda text: yaml.load(text, Loader=_TextLoader))
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
    apart, pairs = (_expect(list, parts.get(key, []), f"{path}: {key}") for key in ("not_pooled", "compare"))
    return Table(
        path=path,
        title=_expect(str, parts["title"], f"{path}: title"),
        note=_expect(str, parts.get("note", ""), f"{path}: note").strip(),
        seeds=_read_seeds(parts["seeds"], f"{path}: seeds"),
        rows=rows,
        dense=_read_partners(parts["dense"], rows, f"{path}: dense"),
        compare=tuple(_read_pair(pair, rows, f"{path}: compare") for pair in pairs),
        judge=judge,
        seconds_of=_read_partners(parts["seconds_of"], rows, f"{path}: seconds_of") if "seconds_of" in parts else {},
        primary=_read_pair(parts["primary"], rows, f"{path}: primary") if "primary" in parts else None,
        not_pooled=tuple(row_name(row, rows, f"{path}: not_pooled") for row in apart),
    )


class _TextLoader(yaml.BaseLoader):
    """Keeps every scalar as text: the declared type of an option decides what 12e-3 or `off` is, not YAML."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:  # PyYAML would drop the first of the two without a word
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply; it is made of a few levels of keys and lists") from None
    return _expect(dict, content, f"{path}: the file")


def _expect(kind: type, value: Any, what: str) -> Any:
    if not isinstance(value, kind):
        raise UserError(f"{what} must be {KIND_WORDS[kind]}")
    return value


def _read_row(name: str, given: Any, base: Mapping[str, Any], above: Mapping[str, Row], path: Path) -> Row:
    where = f"{path}, row {name!r}"
    if not name.strip() or not name.isprintable() or "|" in name:
        raise UserError(f"{where}: the name of a row must be one line without |")
    texts, sources = dict(_expect(dict, given, where)), {"flops_of": {}, "run_of": {}}
    for text_key, value in texts.items():
        key = text_key.replace("-", "_")
        if isinstance(value, dict) and key in SOURCES:
            word = SOURCES[key]
            if list(value) != [word]:
                raise UserError(f"{where}: {key} must be a single value or {{{word}: ROW}}")
            source = sources[word][key] = row_name(value[word], above, f"{where}: {word}", "no row above")
            # Until the other row has a result, a value stands here that is checked like any other.
            texts[text_key] = f"{{run_of: {source}}}" if word == "run_of" else str(OPTIONS[key].default)
    options = {**base, **_read_options(texts, where)}
    config_from_dict(options, where)
    return Row(name, options, where, **sources)


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
                f"{name} must be a single value ({where}); only a row's keep_ratio can be {{flops_of: ROW}}, and only "
                f"its {' or '.join(RUN_OF)} {{run_of: ROW}}"
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


def _read_partners(given: Any, rows: Mapping[str, Row], what: str) -> dict[str, str]:
    """By row, the one that it is compared with. A single name holds for all; of several, that of its own network."""
    names = [row_name(name, rows, what) for name in (given if isinstance(given, list) else [given])]
    networks = {
        name: [row.options.get(key, OPTIONS[key].default) for key in SAME_NETWORK] for name, row in rows.items()
    }
    partners = {row: [name for name in names if len(names) == 1 or networks[name] == networks[row]] for row in rows}
    for row, same in partners.items():
        if len(same) != 1:
            own = _listed(f"{key} {value}" for key, value in zip(SAME_NETWORK, networks[row], strict=True))
            raise UserError(f"{what} must name one row of the network of row {row!r} ({own})")
    return {row: same for row, [same] in partners.items()}


def _read_pair(given: Any, rows: Mapping[str, Row], what: str) -> tuple[str, str]:
    pair = tuple(row_name(name, rows, what) for name in _expect(list, given, f"a pair of {what}"))
    if len(pair) != 2 or pair[0] == pair[1]:
        raise UserError(f"a pair of {what} must be two different rows, got {_listed(pair) or 'none'}")
    return pair


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
