"""Options as text: read from YAML files, stored dictionaries and command lines, and written as YAML and as help."""

import argparse
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import yaml

from utils.errors import UserError
from utils.options import (
    AUTO,
    METAVARS,
    NULL_SCALARS,
    Given,
    Option,
    Options,
    declared,
    flag_of,
    nearest,
    range_words,
    shown,
    worded,
)

MAX_FILE_BYTES = 2**20
SHORT_CHOICES = 17  # characters of a|b|c that `--help` shows beside the flag; longer lists go into the text
NO_KEYS = "the file holds no keys; write lines 'key: value' or leave out --config"


# ---- YAML files and dictionaries ----


class _FlatLoader(yaml.BaseLoader):
    """Takes one flat mapping. Every value stays text, so tags, aliases and deep nesting cannot do harm."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise _refusal(event, "anchors and aliases (& and *) are not allowed; write the plain value")
        if event.tag:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _refusal(event, f"the tag {shown(tag)} is not allowed; write the plain value")
        if parent is None and not isinstance(event, yaml.MappingStartEvent):
            raise _refusal(event, "expected lines 'key: value' (with a space after the colon)")
        if parent is not None and not isinstance(event, yaml.ScalarEvent):
            what = (
                f"{index.value} must be a single value, no list and no mapping" if index else "a key must be one word"
            )
            raise _refusal(index or event, f"{what}; the keys form one flat list")
        return super().compose_node(parent, index)


def _refusal(place: Any, what: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=place.start_mark)


def read_yaml(path: str) -> Iterator[Given]:
    """The lines `key: value` of a YAML file, as text."""
    text = _read_text(path)
    try:
        root = yaml.compose(text, Loader=_FlatLoader)
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line + 1
        problem = ", ".join(filter(None, (error.context, error.problem)))
        advice = "; use spaces instead of tabs" if "\\t" in problem else ""
        raise UserError(f"{path} line {line}: {problem}{advice}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{path} line {line} holds a control character; remove it") from None
    if root is None or not root.value:
        raise UserError(f"{path} line 1: {NO_KEYS}")
    for key, value in root.value:
        quoted = value.style is not None
        null = not quoted and value.value in NULL_SCALARS
        where = f"{path} line {key.start_mark.line + 1}"
        yield Given(key.value.replace("-", "_"), None if null else value.value, quoted, where)


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


def to_yaml(config: Any, comments: Mapping[str, str], leave_out: Sequence[str] = ()) -> str:
    """A config as YAML: a heading per group, a line per key, with a comment behind the keys that have one."""
    lines = []
    for group in dataclasses.fields(config):
        lines.append(f"# {group.name} - {group_title(group.type)}")
        for item in declared(group.type):
            if item.name in leave_out:
                continue
            value = getattr(getattr(config, group.name), item.name)
            line = yaml.safe_dump({item.name: value}, width=math.inf, allow_unicode=True).strip()
            lines.append(f"{line}  # {comments[item.name]}" if item.name in comments else line)
        lines.append("")
    return "\n".join(lines)


# ---- the command line ----


class _Record(argparse.Action):
    """Keep what was written, in order; `resolve` judges it."""

    def __call__(self, parser, namespace, values, option_string=None):
        text = self.const if self.nargs == 0 else values
        namespace.given.append(Given(self.dest, text, False, "command line"))


class _Print(argparse.Action):
    """Print a text and exit with code 0."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(self.const(values))
        parser.exit()


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose only result is a list of `Given` and whose errors are `UserError`s.

    Args:
        prints: by name, further flags that print a text and exit, as `--help` does: their help, and what they print.
    """

    def __init__(
        self,
        options: Options,
        config_class: type,
        usage: str,
        description: str,
        prints: Mapping[str, tuple[str, Callable[[], str]]],
    ):
        super().__init__(
            usage=usage, description=description, formatter_class=_HelpFormatter, allow_abbrev=False, add_help=False
        )
        self.removed = options.removed
        self.uncommon: list[argparse.Action] = []
        section = self.add_argument_group("help - each of these prints something and exits")
        about = "print the options that are needed first, or all of them"
        section.add_argument("--help", "-h", action=_Print, nargs="?", const=self.help_text, metavar="all", help=about)
        for name, (about, text) in prints.items():
            section.add_argument(flag_of(name), action=_Print, nargs=0, const=lambda _, text=text: text(), help=about)
        self.flags = ["--help", *map(flag_of, prints)]
        for group in dataclasses.fields(config_class):
            section = self.add_argument_group(f"{group.name} - {group_title(group.type)}")
            for entry in (entry for entry in options.values() if entry.group == group.name):
                # The first spelling carries the help; the others are accepted and mentioned in its text.
                for number, (name, settings) in enumerate(_spellings(entry)):
                    about = argparse.SUPPRESS if number else _help_text(entry)
                    action = section.add_argument(flag_of(name), action=_Record, help=about, **settings)
                    self.flags.append(flag_of(name))
                    self.uncommon += [] if entry.common else [action]
        for name, gone in options.removed.items():
            if gone.flag:
                self.add_argument(flag_of(name), action=_Record, dest=name, help=argparse.SUPPRESS)

    def help_text(self, which: str | Callable | None) -> str:
        """The help: the common options, or with "all" every one."""
        if which != "all":
            for action in self.uncommon:
                action.help = argparse.SUPPRESS
        return self.format_help().rstrip()

    def read(self, argv: Sequence[str]) -> list[Given]:
        """What the command line gives, in order; `--help` prints and exits with code 0."""
        words = [_dashed(word) for word in argv]
        namespace, unknown = self.parse_known_args(words, argparse.Namespace(given=[]))
        if not unknown:
            return namespace.given
        if not unknown[0].startswith("-"):
            raise UserError(
                f"unexpected word {shown(unknown[0])} (command line); a value follows its option (--name value)"
            )
        flag = unknown[0].partition("=")[0]
        gone = self.removed.get(flag.removeprefix("--").removeprefix("no-").replace("-", "_"))
        advice = gone.advice if gone else nearest(flag, self.flags)
        raise UserError(f"unknown option {shown(flag)} (command line); {advice}")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; --help all lists every option")


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
    bare = "true" if entry.kind is bool else entry.bare
    settings = {"nargs": "?" if bare else None, "const": bare, "metavar": _metavar(entry), "default": argparse.SUPPRESS}
    spellings = [(name, {"dest": name, **settings}) for name in entry.names]
    if entry.kind is bool:
        no = {"dest": entry.key, "nargs": 0, "const": "false", "default": argparse.SUPPRESS}
        spellings.append((f"no_{entry.key}", no))
    return spellings


def _metavar(entry: Option) -> str:
    choices = "|".join(entry.choices)
    if 0 < len(choices) <= SHORT_CHOICES:
        return choices
    return entry.metavar or "PATH" * entry.is_path or f"{METAVARS[entry.kind]}{f'|{AUTO}' * entry.auto}"


def _help_text(entry: Option) -> str:
    parts = [entry.help]
    if len("|".join(entry.choices)) > SHORT_CHOICES:
        besides = f", or {entry.besides[1]}" if entry.besides else ""
        parts.append(f"one of {', '.join(entry.choices)}{besides}")
    if entry.within:
        parts.append(range_words(entry.within))
    parts += [f"also {flag_of(alias)}" for alias in entry.aliases]
    return f"{'; '.join(parts)} (default: {_default_text(entry)})".replace("%", "%%")


def _default_text(entry: Option) -> str:
    if entry.default is None:
        return entry.default_text or "none"
    return f"{entry.default:g}" if entry.kind is float else worded(entry.default)


def group_title(group_class: type) -> str:
    """The first line of the class's docstring, for headings."""
    return group_class.__doc__.splitlines()[0].rstrip(".")
