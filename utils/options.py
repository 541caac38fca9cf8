"""Options declared as dataclass fields: what each accepts, what reads it, and how a whole config is made of them.

This module knows none of the options but `method`, which decides who reads the others. A config class has one frozen
dataclass per group. Each field of a group is made by `option`, which holds its help and its limits, so that checks,
`--help` and the YAML written back come from one place. All keys live in one flat namespace.

Wherever a value comes from, it is first a piece of text with its place (`Given`, see `utils/option_text.py`). The
declared type of the option turns it into a value, never YAML's guess: 12e-3 is a number, 012 is 12, `on` is a switch
or a word.
"""

import dataclasses
import difflib
import math
import re
import string
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from utils.errors import UserError
from utils.paths import expanded

AUTO = "auto"  # the value of an option until the program knows enough to choose it
NONE_WORDS = ("None", "none")  # plain null, ~ and nothing at all are recognised by the YAML reader
NULL_SCALARS = ("", "~", "null", "Null", "NULL")
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
KIND_WORDS = {
    bool: "on or off",
    int: "a whole number",
    float: "a finite number",
    str: "a text of one line",
}
MANY = 8  # choices, of which a message names none
METAVARS = {bool: "on|off", int: "N", float: "X", str: "NAME"}


@dataclass(frozen=True)
class Option:
    """One key of the flat namespace: its type (bool, int, float or str), what it accepts and who reads it.

    optional: whether it may be None. auto: whether it may be `AUTO`. Its type says both. choices: the words allowed.
    besides: a regular expression of texts that are allowed beside them, and its words.
    within: an interval as text, such as "(0, 1]" or "[1, inf)". check: returns None for an allowed value, else what it
    "must be". hint: added when a number lies outside `within`. is_path: whether `~` at its start means
    the home directory. aliases: other names, accepted everywhere. metavar: what
    `--help` prints for the value, default_text for a default that is decided later. bare: the text meant when the flag
    is given without a value. read_by: the methods that read it; nothing for all of them. needs: values of other options
    without which nothing reads it. common: shown by a plain `--help`. resumed: whether a run that is resumed keeps its
    "stored" value, or the value "may change" or "may grow", or belongs to "this command" and is never taken from the
    stored run.
    """

    key: str
    group: str
    kind: type
    optional: bool
    auto: bool
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()
    within: str = ""
    check: Callable[[Any], str | None] | None = None
    hint: str = ""
    is_path: bool = False
    aliases: tuple[str, ...] = ()
    metavar: str = ""
    default_text: str = ""
    bare: str | None = None
    read_by: tuple[str, ...] = ()
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    common: bool = False
    resumed: str = "stored"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.key, *self.aliases)


@dataclass(frozen=True)
class Removed:
    """An option that is gone, but that an old file or checkpoint may still hold.

    harmless: the values that mean what the program does today. advice: what to do about any other. implies: by value,
    the option that it decides and the values of it that agree; a single one is taken unless that option is given.
    flag: whether the command line accepts it too.
    """

    harmless: tuple[str, ...]
    advice: str
    implies: Mapping[str, tuple[str, tuple[Any, ...]]] = field(default_factory=dict)
    flag: bool = False


class Options(dict[str, Option]):
    """Every option by its key, in the order of declaration, and those that are gone."""

    def __init__(self, entries: Iterable[Option], removed: Mapping[str, Removed]) -> None:
        super().__init__((entry.key, entry) for entry in entries)
        self.removed = removed


class Rule(NamedTuple):
    """Values that contradict each other. A group lists its own as `RULES`, the config those between groups.

    broken: tells it from the group or the config. sentence: names the options in braces; it holds only where all of
    them are read.
    """

    broken: Callable[[Any], bool]
    sentence: str


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
    return field(default=default, metadata={"help": help, **limits})


def declared(group_class: type) -> list[dataclasses.Field]:
    """The fields of a group that are options."""
    return [item for item in dataclasses.fields(group_class) if item.metadata]


def options_of(config_class: type, removed: Mapping[str, Removed] | None = None) -> Options:
    """Every option of a config class. `DEFAULTS` of a group are limits of those of its options that set no others."""
    entries = []
    for group in dataclasses.fields(config_class):
        hints = typing.get_type_hints(group.type)
        for item in declared(group.type):
            kinds = typing.get_args(hints[item.name]) or (hints[item.name],)
            limits = {**getattr(group.type, "DEFAULTS", {}), **item.metadata}
            limits |= {key: tuple(limits[key]) for key in ("choices", "read_by") if key in limits}
            optional, auto = type(None) in kinds, Literal[AUTO] in kinds
            entries.append(Option(item.name, group.name, kinds[0], optional, auto, item.default, **limits))
    return Options(entries, removed or {})


# ---- from text to values ----


def resolve(options: Options, given: Iterable[Given], below: Mapping[str, Setting] | None = None) -> dict[str, Setting]:
    """Checked values by key, from what one place gives; unknown, repeated or wrong ones raise UserError.

    Args:
        below: what another place gives that counts less; an option that is gone must not contradict it either.
    """
    by_name = {name: entry for entry in options.values() for name in entry.names}
    settings: dict[str, Setting] = {}
    first: dict[str, Given] = {}
    for item in given:
        entry = by_name.get(item.name)
        if entry is None and item.name not in options.removed:
            raise UserError(f"unknown key {shown(item.name)} ({item.where}); {nearest(item.name, by_name)}")
        key = entry.key if entry else item.name
        if key in first:
            raise UserError(_repeated(first[key], item))
        first[key] = item
        if entry:
            where = item.where if item.name == key else f"{item.where}, as {item.name}"
            settings[key] = Setting(convert(entry, dataclasses.replace(item, where=where)), where)
    for name, gone in options.removed.items():
        if name in first:
            _resolve_removed(gone, first[name], settings, below or {})
    return settings


def _resolve_removed(gone: Removed, given: Given, settings: dict[str, Setting], below: Mapping[str, Setting]) -> None:
    """Adds to the settings what an option implies that is gone."""
    name, text = given.name, str(given.text)
    word = text.lower() if text.lower() in BOOLEANS else text
    if word not in gone.harmless:
        raise UserError(f"{name} {text} ({given.where}) is no longer possible; {gone.advice}")
    if word in gone.implies:
        key, values = gone.implies[word]
        if len(values) == 1 and key not in settings:
            settings[key] = Setting(values[0], f"{given.where}, as {name}")
        other = settings.get(key) or below.get(key)
        if other and other.value not in values:
            raise UserError(
                f"{name} {text} ({given.where}) and {key} {other.value} ({other.where}) contradict each other; leave "
                f"{name} out, it is an old name"
            )


def convert(entry: Option, given: Given) -> Any:
    """The value of one option from its text; raises UserError naming value, place and what is allowed."""
    if given.text is None or given.text in NONE_WORDS:
        if entry.optional:
            return None
        raise _refusal(entry, given, _allowed(entry), "nothing (null)")
    if entry.auto and given.text == AUTO:
        return AUTO
    if given.quoted and entry.kind is int:
        raise _refusal(entry, given, _allowed(entry), f"the text {shown(given.text)}", "write it without quotes")
    try:
        value = _read_as(entry.kind, given.text)
    except (ValueError, OverflowError):
        raise _refusal(entry, given, _allowed(entry), shown(given.text)) from None
    if entry.choices and value not in entry.choices and not (entry.besides and re.fullmatch(entry.besides[0], value)):
        raise _refusal(entry, given, _allowed(entry), shown(value), nearest(value, entry.choices, ""))
    if entry.within and not _inside(entry.within, value):
        raise _refusal(entry, given, range_words(entry.within), shown(value), entry.hint)
    if entry.is_path:
        try:
            value = expanded(value)
        except ValueError as error:
            raise UserError(f"{entry.key}: {error} ({given.where})") from None
    if entry.check and (must_be := entry.check(value)):
        raise _refusal(entry, given, must_be, shown(value))
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


# ---- the words of messages ----


def range_words(interval: str) -> str:
    """An interval in words."""
    if interval.endswith("inf)"):
        return f"{'at least' if interval[0] == '[' else 'above'} {interval[1:].split(',')[0]}"
    return f"in {interval}"


def _allowed(entry: Option) -> str:
    if entry.choices:
        return f"one of {', '.join(entry.choices)}" + (f", or {entry.besides[1]}" if entry.besides else "")
    limits = f", {range_words(entry.within)}" if entry.within else ""
    return KIND_WORDS[entry.kind] + limits + f", or {AUTO}" * entry.auto


def shown(value: object) -> str:
    """A value as a message quotes it, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def worded(value: object) -> str:
    """A value as a user would write it."""
    return ("on" if value else "off") if isinstance(value, bool) else "none" if value is None else str(value)


def flag_of(key: str) -> str:
    """The spelling of an option on the command line."""
    return f"--{key.replace('_', '-')}"


def _refusal(entry: Option, given: Given, must_be: str, got: str, advice: str = "") -> UserError:
    return UserError(f"{entry.key} must be {must_be}, got {got} ({given.where})" + (f"; {advice}" if advice else ""))


def _repeated(one: Given, two: Given) -> str:
    if one.name == two.name:
        places = "" if one.where == two.where else f": {one.where} and {two.where}"
        return f"{one.name!r} is given twice{places or f' ({one.where})'}; keep one"
    return f"{one.name!r} ({one.where}) and {two.name!r} ({two.where}) are two names of one option; keep one of them"


def nearest(word: str, names: Iterable[str], otherwise: str = "--help all lists every option") -> str:
    """A clause that proposes the most similar name, or else points to the help."""
    by_lower_case = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), by_lower_case, n=1)
    return f"did you mean {by_lower_case[close[0]]!r}?" if close else otherwise


# ---- whole configs ----


def why_unread(options: Options, values: Mapping[str, Any], key: str) -> str:
    """Why nothing reads an option in a config of these values; empty if something does.

    The reason has {it} where it speaks of the option.
    """
    entry, method = options[key], values.get("method")
    if entry.read_by and method not in entry.read_by:
        others = ", ".join(entry.read_by)
        return f"method {method} does not read {{it}}; leave {{it}} out, or pass another --method ({others})"
    for other, allowed in entry.needs.items():
        if values[other] not in allowed:
            wanted = " or ".join(map(worded, allowed)) if len(allowed) <= MANY else "with one of the names of --list"
            return f"{other} is {worded(values[other])}; leave {{it}} out, or pass {flag_of(other)} {wanted}"
        if reason := why_unread(options, values, other):
            return reason
    return ""


def check_effect(options: Options, config: Any, flags: Iterable[str], resumed: bool = False) -> None:
    """Refuse keys on the command line (`flags`) that nothing reads in this config.

    A run that is `resumed` keeps its options, so no other ones are advised then.
    """
    values = flatten(config)
    useless: dict[str, list[str]] = {}
    for key in flags:
        if reason := why_unread(options, values, key):
            reason = reason.partition(", or pass")[0] if resumed else reason
            useless.setdefault(reason, []).append(flag_of(key))
    for reason, names in useless.items():
        verb, it = ("has", "it") if len(names) == 1 else ("have", "them")
        raise UserError(f"{', '.join(names)} (command line) {verb} no effect: {reason.format(it=it)}")


def check_together(options: Options, config: Any, where: Mapping[str, str]) -> None:
    """Refuse values that contradict each other; `where` says for the keys given who gave them."""
    values = flatten(config)
    told = {key: f"{key} {worded(value)} ({where.get(key, 'default')})" for key, value in values.items()}
    for owner in (*(getattr(config, group.name) for group in dataclasses.fields(config)), config):
        for rule in getattr(owner, "RULES", ()):
            keys = [key for _, key, *_ in string.Formatter().parse(rule.sentence) if key]
            if rule.broken(owner) and not any(why_unread(options, values, key) for key in keys):
                raise UserError(rule.sentence.format(**told))


def assemble(config_class: type, values: Mapping[str, object]) -> Any:
    """A config from a flat dictionary; keys that are missing keep their defaults."""
    groups = {}
    for group in dataclasses.fields(config_class):
        keys = [item.name for item in declared(group.type)]
        groups[group.name] = group.type(**{key: values[key] for key in keys if key in values})
    return config_class(**groups)


def flatten(config: Any) -> dict[str, Any]:
    """The flat dictionary of a config."""
    groups = (getattr(config, group.name) for group in dataclasses.fields(config))
    return {item.name: getattr(group, item.name) for group in groups for item in declared(type(group))}
