"""Options declared as dataclass fields, read from YAML files, command lines and stored dictionaries.

This module knows none of the options. A config class has one frozen dataclass per group; each field of a
group is made by `option`, which holds its help and its limits, so that checks, `--help` and the YAML written
back come from one place. All keys live in one flat namespace.

Wherever a value comes from, it is first a piece of text with its place (`Given`). The declared type of the
option turns it into a value, never YAML's guess: 12e-3 is a number, 012 is 12, `on` is a switch or a word.
"""

import argparse
import dataclasses
import difflib
import math
import shutil
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from utils.errors import UserError

MAX_FILE_BYTES = 2**20
NONE_WORDS = ("None", "none")  # plain null, ~ and nothing at all are recognised by the YAML reader
NULL_SCALARS = ("", "~", "null", "Null", "NULL")
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
KIND_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text of one line",
}
METAVARS = {int: "N", float: "X", str: "NAME"}
SHORT_CHOICES = 17  # characters of a|b|c that `--help` shows beside the flag; longer lists go into the text


@dataclass(frozen=True)
class Option:
    """One key of the flat namespace: its type (bool, int, float or str) and what it accepts.

    choices: the words allowed. within: an interval as text, such as "(0, 1]" or "[1, inf)". check: returns
    None for an allowed value, else what it "must be". hint: added when a number lies outside `within`.
    aliases: other names, accepted everywhere. metavar: what `--help` prints for the value, default_text for a
    default that is decided later. bare: the text meant when the flag is given without a value.
    """

    key: str
    group: str
    kind: type
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    within: str = ""
    check: Callable[[Any], str | None] | None = None
    hint: str = ""
    aliases: tuple[str, ...] = ()
    metavar: str = ""
    default_text: str = ""
    bare: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.key, *self.aliases)


@dataclass(frozen=True)
class Given:
    """One value as somebody wrote it: its name, its text (None: null), whether it was quoted, and where."""

    name: str
    text: str | None
    quoted: bool
    where: str


@dataclass(frozen=True)
class Setting:
    """One value after all checks, and where it was given."""

    value: Any
    where: str


def option(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field that describes itself; `limits` are fields of `Option`, from `choices` on."""
    return dataclasses.field(default=default, metadata={"help": help, **limits})


def options_of(config_class: type) -> dict[str, Option]:
    """Every option of a config class by its key, in the order of declaration."""
    options = {}
    for group in dataclasses.fields(config_class):
        hints = typing.get_type_hints(group.type)
        for field in dataclasses.fields(group.type):
            kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
            options[field.name] = Option(
                key=field.name,
                group=group.name,
                kind=kinds[0],
                optional=type(None) in kinds,
                default=field.default,
                **field.metadata,
            )
    return options


# ---- from text to values ----


def resolve(options: Mapping[str, Option], given: Iterable[Given]) -> dict[str, Setting]:
    """Checked values by key, from what one place gives; unknown, repeated or wrong ones raise UserError."""
    by_name = {name: entry for entry in options.values() for name in entry.names}
    settings: dict[str, Setting] = {}
    first: dict[str, Given] = {}
    for item in given:
        if item.name not in by_name:
            raise UserError(f"unknown key {_shown(item.name)} ({item.where}); {nearest(item.name, by_name)}")
        entry = by_name[item.name]
        if entry.key in first:
            raise UserError(_repeated(first[entry.key], item))
        first[entry.key] = item
        where = item.where if item.name == entry.key else f"{item.where}, as {item.name}"
        settings[entry.key] = Setting(convert(entry, dataclasses.replace(item, where=where)), where)
    return settings


def convert(entry: Option, given: Given) -> Any:
    """The value of one option from its text; raises UserError naming value, place and what is allowed."""
    if given.text is None or given.text in NONE_WORDS:
        if entry.optional:
            return None
        raise _refusal(entry, given, _allowed(entry), "nothing (null)")
    if given.quoted and entry.kind in (int, bool):
        raise _refusal(entry, given, _allowed(entry), f"the text {_shown(given.text)}", "write it without quotes")
    try:
        value = _read_as(entry.kind, given.text)
    except (ValueError, OverflowError):
        raise _refusal(entry, given, _allowed(entry), _shown(given.text)) from None
    if entry.choices and value not in entry.choices:
        raise _refusal(entry, given, _allowed(entry), _shown(value), nearest(value, entry.choices, ""))
    if entry.within and not _inside(entry.within, value):
        raise _refusal(entry, given, _range_words(entry.within), _shown(value), entry.hint)
    if entry.check and (must_be := entry.check(value)):
        raise _refusal(entry, given, must_be, _shown(value))
    return value


def _read_as(kind: type, text: str) -> Any:
    """Text as a value of one of the four kinds; ValueError if it is none."""
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError
        return BOOLEANS[text.lower()]
    if kind is str:
        if not text.strip() or not text.isprintable():
            raise ValueError
        return text
    value = kind(text)
    if not text.isascii() or not math.isfinite(value):
        raise ValueError
    return value


def _inside(interval: str, value: float) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def _range_words(interval: str) -> str:
    low, high = interval[1:-1].split(", ")
    if high == "inf":
        return f"at least {low}" if interval[0] == "[" else f"above {low}"
    return f"in {interval}"


def _allowed(entry: Option) -> str:
    if entry.choices:
        return f"one of {', '.join(entry.choices)}"
    words = KIND_WORDS[entry.kind]
    return f"{words}, {_range_words(entry.within)}" if entry.within else words


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _refusal(entry: Option, given: Given, must_be: str, got: str, advice: str = "") -> UserError:
    return UserError(f"{entry.key} must be {must_be}, got {got} ({given.where})" + (f"; {advice}" if advice else ""))


def _repeated(one: Given, two: Given) -> str:
    if one.name == two.name:
        places = "" if one.where == two.where else f": {one.where} and {two.where}"
        return f"{one.name!r} is given twice{places or f' ({one.where})'}; keep one"
    return f"{one.name!r} ({one.where}) and {two.name!r} ({two.where}) are two names of one option; keep one of them"


def nearest(word: str, names: Iterable[str], otherwise: str = "--help lists every option") -> str:
    """A clause that proposes the most similar name, or else points to the help."""
    by_lower_case = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), by_lower_case, n=1)
    return f"did you mean {by_lower_case[close[0]]!r}?" if close else otherwise


# ---- YAML files and dictionaries ----


def read_yaml(path: str) -> Iterator[Given]:
    """The lines `key: value` of a YAML file, as text.

    Only the parser's events are used and nothing is constructed, so tags, aliases and nesting cannot do harm.
    """
    text = _read_text(path)
    try:
        yield from _flat_pairs(text, path)
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line + 1
        advice = "; use spaces instead of tabs" if "\\t" in str(error.problem) else ""
        raise UserError(f"{path} line {line} is not valid YAML: {error.problem}{advice}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{path} line {line} holds a control character; remove it") from None


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}; check the path") from None
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"config file {path} is larger than {MAX_FILE_BYTES} bytes; it should be lines 'key: value'")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line} is not UTF-8 text; save the file as UTF-8") from None


def _flat_pairs(text: str, path: str) -> Iterator[Given]:
    frame = (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentStartEvent, yaml.DocumentEndEvent)
    events = (event for event in yaml.parse(text, yaml.SafeLoader) if not isinstance(event, frame))

    def refuse(event: yaml.Event, what: str) -> UserError:
        return UserError(f"{path} line {event.start_mark.line + 1}: {what}")

    def plain(event: yaml.Event) -> yaml.Event:
        if getattr(event, "tag", None):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise refuse(event, f"the tag {_shown(tag)} is not allowed; write the plain value")
        if getattr(event, "anchor", None):
            raise refuse(event, "anchors and aliases (& and *) are not allowed; write the plain value")
        return event

    start = next(events, None)
    if start is None:
        raise UserError(f"{path} line 1: the file holds no keys; write lines 'key: value' or leave out --config")
    if not isinstance(plain(start), yaml.MappingStartEvent):
        raise refuse(start, "expected lines 'key: value' (with a space after the colon)")
    empty = True
    while not isinstance(key := plain(next(events)), yaml.MappingEndEvent):
        empty = False
        value = plain(next(events))
        if not isinstance(key, yaml.ScalarEvent):
            raise refuse(key, "a key must be one word")
        if not isinstance(value, yaml.ScalarEvent):
            raise refuse(
                key,
                f"{key.value} must be a single value, not a list or a mapping; the keys form one flat list",
            )
        quoted = value.style is not None
        null = not quoted and value.value in NULL_SCALARS
        where = f"{path} line {key.start_mark.line + 1}"
        yield Given(key.value.replace("-", "_"), None if null else value.value, quoted, where)
    if empty:
        raise refuse(start, "the file holds no keys; write lines 'key: value' or leave out --config")
    if (extra := next(events, None)) is not None:
        raise refuse(extra, "a second YAML document starts here; keep one")


def read_dict(flat: Mapping[str, object], where: str) -> Iterator[Given]:
    """The entries of a flat dictionary of plain Python values, as text; `repr` keeps floats exact."""
    for name, value in flat.items():
        if value is None:
            yield Given(str(name), None, False, where)
        elif isinstance(value, str):
            yield Given(str(name), value, True, where)
        elif isinstance(value, bool | int | float):
            yield Given(str(name), repr(value), False, where)
        else:
            raise UserError(f"{name} must be a single value, got {type(value).__name__} ({where})")


# ---- the command line ----


class _Record(argparse.Action):
    """Keep what was written, in order; `resolve` judges it."""

    def __call__(self, parser, namespace, values, option_string=None):
        text = self.const if self.nargs == 0 else values
        namespace.given.append(Given(self.dest, text, False, "command line"))


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose only result is a list of `Given` and whose errors are `UserError`s."""

    def __init__(self, config_class: type, usage: str, description: str):
        super().__init__(
            usage=usage,
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.flags = ["--help"]
        options = options_of(config_class)
        for group in dataclasses.fields(config_class):
            section = self.add_argument_group(f"{group.name} - {group_title(group.type)}")
            for entry in options.values():
                if entry.group != group.name:
                    continue
                # The first spelling carries the help; the others are accepted and mentioned in its text.
                for number, (name, settings) in enumerate(_spellings(entry)):
                    flag = _dashed(f"--{name}")
                    help = argparse.SUPPRESS if number else _help_text(entry)
                    section.add_argument(flag, action=_Record, default=argparse.SUPPRESS, help=help, **settings)
                    self.flags.append(flag)
        section.add_argument("--help", "-h", action="help", help="print this help and exit")

    def read(self, argv: Sequence[str]) -> list[Given]:
        """What the command line gives, in order; `--help` prints and exits with code 0."""
        words = [_dashed(word) for word in argv]
        namespace, unknown = self.parse_known_args(words, argparse.Namespace(given=[]))
        if not unknown:
            return namespace.given
        if not unknown[0].startswith("-"):
            raise UserError(
                f"unexpected word {_shown(unknown[0])} (command line); a value follows its option "
                "(--name value), a switch takes none (--name or --no-name)"
            )
        flag = unknown[0].partition("=")[0]
        raise UserError(f"unknown option {_shown(flag)} (command line); {nearest(flag, self.flags)}")

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"command line: {message}; --help lists every option")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        width = min(shutil.get_terminal_size().columns, 112) - 2
        super().__init__(prog, max_help_position=30, width=width)


def _dashed(word: str) -> str:
    """--score_lr=a_b as --score-lr=a_b; every other word is left alone."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _spellings(entry: Option) -> list[tuple[str, dict[str, Any]]]:
    """The names an option has on the command line, each with its settings for argparse."""
    if entry.kind is bool:
        return [
            (entry.key, {"dest": entry.key, "nargs": 0, "const": "true"}),
            (f"no_{entry.key}", {"dest": entry.key, "nargs": 0, "const": "false"}),
        ]
    settings = {"nargs": "?" if entry.bare else None, "const": entry.bare, "metavar": _metavar(entry)}
    return [(name, {"dest": name, **settings}) for name in entry.names]


def _metavar(entry: Option) -> str:
    choices = "|".join(entry.choices)
    if 0 < len(choices) <= SHORT_CHOICES:
        return choices
    return entry.metavar or METAVARS[entry.kind]


def _help_text(entry: Option) -> str:
    parts = [entry.help]
    if len("|".join(entry.choices)) > SHORT_CHOICES:
        parts.append(f"one of {', '.join(entry.choices)}")
    if entry.within:
        parts.append(_range_words(entry.within))
    parts += [f"also {_dashed(f'--{alias}')}" for alias in entry.aliases]
    return f"{'; '.join(parts)} (default: {_default_text(entry)})".replace("%", "%%")


def _default_text(entry: Option) -> str:
    if entry.kind is bool:
        return "on" if entry.default else "off"
    if entry.default is None:
        return entry.default_text or "none"
    return f"{entry.default:g}" if entry.kind is float else str(entry.default)


# ---- whole configs ----


def group_title(group_class: type) -> str:
    """The first line of the class's docstring, for headings."""
    return group_class.__doc__.splitlines()[0].rstrip(".")


def assemble(config_class: type, values: Mapping[str, object]) -> Any:
    """A config from a flat dictionary; keys that are missing keep their defaults."""
    groups = {}
    for group in dataclasses.fields(config_class):
        keys = [field.name for field in dataclasses.fields(group.type)]
        groups[group.name] = group.type(**{key: values[key] for key in keys if key in values})
    return config_class(**groups)


def flatten(config: Any) -> dict[str, Any]:
    """The flat dictionary of a config."""
    groups = (getattr(config, group.name) for group in dataclasses.fields(config))
    return {field.name: getattr(group, field.name) for group in groups for field in dataclasses.fields(group)}


def to_yaml(config: Any, comments: Mapping[str, str], leave_out: Sequence[str] = ()) -> str:
    """A config as YAML: a heading per group, a line per key, with a comment behind the keys that have one."""
    lines = []
    for group in dataclasses.fields(config):
        lines.append(f"# {group.name} - {group_title(group.type)}")
        for field in dataclasses.fields(group.type):
            if field.name in leave_out:
                continue
            value = getattr(getattr(config, group.name), field.name)
            line = yaml.safe_dump({field.name: value}, width=math.inf, allow_unicode=True).strip()
            lines.append(f"{line}  # {comments[field.name]}" if field.name in comments else line)
        lines.append("")
    return "\n".join(lines)
