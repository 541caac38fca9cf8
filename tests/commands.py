"""What is wrong with a command of the documentation, as far as it can be told without running it.

Words in capitals stand for what a reader has: RUN, DIR, FILE.yaml, IMAGE, N and so on. Something that exists takes
their place before a command is parsed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import inspect
import io
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from args import OPTIONS, parse_args
from utils.errors import UserError

PROJECT = Path(__file__).parents[1]
PACKAGES = ("data", "examples", "models", "tools", "trainers", "utils")
FOLDERS = (*PACKAGES, ".ci", "configs", "docs", "results", "tests")
SHELL_WORDS = ("cd", "source", ".", "git")  # what they do is no matter of this repository
MODULES = ("pip", "pytest", "venv")  # of others, that the documentation starts


def commands_of(code: str) -> Iterator[list[str]]:
    """The words of each command of a shell script: one on each line, or several joined by && ; or |."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", ";", "|")), len(words))
            command, words = words[:end], words[end + 1 :]
            while command and re.fullmatch(r"[A-Z_]+=\S*", command[0]):  # variables of the environment
                command = command[1:]
            if command:
                yield command


def in_project(word: str) -> bool:
    """Whether a word names a place in this repository."""
    named = re.fullmatch(r"[\w./-]+", word) and "NAME" not in word
    return bool(named) and word.partition("/")[0] in FOLDERS and "/" in word


def filled_in(word: str, place: Path) -> str:
    """A word of a command with something that exists in place of a placeholder."""
    folder = place / "folder"
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    image = place / "image.png"
    image.touch()
    if word.startswith("runs/"):
        return str(folder)
    stand_ins = {
        r"TABLE\.yaml": str(PROJECT / "configs/tables/cifar.yaml"),
        r"FILE\.yaml": str(PROJECT / "configs/quickstart.yaml"),
        r"IMAGE\d?(\.\w+)?|my_\w+\.(png|jpe?g)": str(image),
        r"RUN\d?|DIR|FOLDER|PATH|EXPORT|my_\w+": str(folder),
        r"HOST": "localhost",
        r"N|S": "3",
    }
    for pattern, stand_in in stand_ins.items():
        word = re.sub(rf"(?<![\w.])({pattern})(?!\w)(\.\.\.)?", lambda _, text=stand_in: text, word)
    return word


def command_problems(command: Sequence[str], place: Path) -> list[str]:
    """Why a command would not run, as far as it can be told without running it."""
    missing = [word for word in command if in_project(word) and not (PROJECT / word).exists()]
    if missing:
        return [f"there is no {word}" for word in missing]
    program, *words = (filled_in(word.strip("[]"), place) for word in command if word.strip("[]") != "...")
    if program in SHELL_WORDS:
        return []
    if program == "tensorboard":
        known = re.fullmatch(r"--logdir \S+( --host \S+| --port \d+| --bind_all)*", " ".join(words))
        return [] if known else ["expected tensorboard --logdir FOLDER [--host HOST] [--port N] [--bind_all]"]
    if program == "torchrun":
        return refusal(lambda: read_torchrun(words))
    if program.startswith("python") and words[:1] == ["main.py"]:
        return refusal(lambda: parse_args(words[1:]))
    if program.startswith("python") and words[:1] == ["-m"]:
        return module_problems(words[1], words[2:])
    return [f"nothing checks commands of {program}"]


def module_problems(name: str, words: Sequence[str]) -> list[str]:
    """The same for `python -m name words`."""
    if name == "venv":
        return [] if len(words) == 1 else ["python -m venv takes one folder"]
    if name == "pip":
        files = [file for flag, file in pairwise(words) if flag == "-r"]
        return [f"there is no {file}" for file in files if not (PROJECT / file).is_file()]
    if name == "pytest":
        return []  # a slow test asks pytest itself
    if name not in programs():
        return [f"there is no program {name}"]
    return refusal(lambda: read_words(name, words))


def refusal(read: Callable[[], object]) -> list[str]:
    """What a reader of command lines says against one, if anything."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = read()
    except UserError as error:
        return [str(error)]
    except SystemExit as error:  # --help and --list end with 0
        code = error.code
    return [said.getvalue().strip() or f"exit code {code}"] if code in (1, 2) else []


def read_torchrun(words: Sequence[str]) -> None:
    settings = get_args_parser().parse_args(words)
    if settings.training_script != "main.py":
        raise UserError(f"torchrun starts main.py, not {settings.training_script}")
    parse_args(settings.training_script_args)


class HasRead(BaseException):
    """Ends a program as soon as it has read its command line; no `except Exception` can catch it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def read_words(name: str, words: Sequence[str]) -> int | None:
    """Has a program of this repository read a command line, and do nothing more. Returns 2 if it refuses the words."""
    module = importlib.import_module(name)
    if hasattr(module, "read_command_line"):
        module.read_command_line(words)
        return None
    if not hasattr(module, "main") or not inspect.signature(module.main).parameters:
        return 2 if words else None
    original = argparse.ArgumentParser.parse_args

    def parse_and_end(parser: argparse.ArgumentParser, *arguments: object) -> None:
        original(parser, *arguments)
        raise HasRead(parser)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(HasRead):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
        return module.main(words)
    return None


@cache
def programs() -> list[str]:
    """All modules that are started by `python -m`."""
    files = [file for folder in FOLDERS for file in (PROJECT / folder).rglob("*.py")]
    started = [file for file in files if is_program(file)]
    return [".".join(file.relative_to(PROJECT).with_suffix("").parts) for file in started]


def is_program(file: Path) -> bool:
    """Whether a file asks for its `__name__` outside functions; a text that it holds may do so as well."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tests = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
    return "__name__ == '__main__'" in tests


@cache
def flags() -> frozenset[str]:
    """Every option of `main.py` and of the programs beside it."""
    found = {f"--{prefix}{name.replace('_', '-')}" for entry in OPTIONS.values() for name in entry.names
             for prefix in ("", "no-")}  # fmt: skip
    found |= {"--help", "--list", "--doctor"} | {f"--{name.replace('_', '-')}" for name in OPTIONS.removed}

    def collect(parser: argparse.ArgumentParser, *_: object) -> None:
        raise HasRead(parser)

    for name in programs():
        if name.startswith(("tools.", "data.")):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(argparse.ArgumentParser, "parse_known_args", collect)
                module = importlib.import_module(name)
                try:
                    getattr(module, "read_command_line", module.main)([])
                except HasRead as ended:
                    found |= set(ended.parser._option_string_actions)
    return frozenset(found)
