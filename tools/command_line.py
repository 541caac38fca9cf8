"""What the tools beside `main.py` have in common: how they read a command line, how they end, what they ran on."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch

from models import allow
from trainers.devices import thread_words
from utils.errors import UserError
from utils.paths import expanded
from utils.run.folder import environment_facts


class ToolParser(argparse.ArgumentParser):
    """Takes no abbreviations, reads `~` as the home directory, and tells a mistake as a UserError."""

    def __init__(self, module: str, description: str) -> None:
        super().__init__(prog=f"python -m {module}", description=description, allow_abbrev=False)

    def add_arch(self) -> None:
        """Adds the option by which a user lets the code of a run's own network run; see `models.own.allow`."""
        self.add_argument(
            "--arch",
            metavar="PACKAGE.MODULE:FUNCTION",
            type=lambda text: allow(text) or text,
            help="the network of the run if it is one of your own; this runs that code",
        )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse does it. A shell leaves the `~` of `--out=~/page` alone, so it is still there."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._expanded(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; --help lists every option")

    def _expanded(self, word: str) -> str:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        try:
            return name + equals + expanded(value)
        except ValueError as error:
            self.error(str(error))


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """The `type` of an argument that is a whole number from `low` to `high`."""

    def convert(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return convert


def exit_code_of(run: Callable[[], int | None]) -> int:
    """Runs a tool: its own exit code (None: 0), or 2 and one sentence for a user's mistake."""
    try:
        return run() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def import_with_matplotlib(module: str, what: str, instead: str = "") -> ModuleType:
    """A module that draws.

    Args:
        what: what it draws, for the message.
        instead: what can be done without it.
    Raises: UserError without matplotlib, which only pictures need.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise UserError(
            f"{what} needs matplotlib, which is not installed; install it with "
            f"`python -m pip install -r requirements-extra.txt`{instead}"
        ) from None


def headline(device: torch.device) -> str:
    """The processor, torch and the commit that a measurement was made with."""
    facts = environment_facts(device)
    return (
        f"{facts['gpu'] or facts['cpu']} ({facts['cpu_capability']}), {thread_words(facts['num_threads'])}, "
        f"torch {facts['torch']}, commit {facts['git_commit']}{' with changes' if facts['git_dirty'] else ''}"
    )


def aligned(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of texts by column as a Markdown table that can be read as it stands; the first column names the rows."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    sides = {name: "<" if number == 0 else ">" for number, name in enumerate(widths)}
    lines = [{name: name for name in widths}, {name: "-" * width for name, width in widths.items()}, *rows]
    return "\n".join(
        "| " + " | ".join(f"{line[name]:{sides[name]}{widths[name]}}" for name in widths) + " |" for line in lines
    )
