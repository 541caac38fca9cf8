"""Reads pages of documentation and says what in them is wrong: commands, options, files, names, links, snippets."""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import importlib.util
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from args import OPTIONS
from tests.commands import (
    FOLDERS,
    MODULES,
    PACKAGES,
    PROJECT,
    command_problems,
    commands_of,
    flags,
    in_project,
    programs,
    refusal,
)
from utils.options import Given, convert

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
WRITTEN_BY_EXPORT = ("model.load",)  # model.py in the folder of an export
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """A page of Markdown. `path` is where its relative links start."""

    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path, path.read_text(encoding="utf-8"))

    @property
    def prose(self) -> str:
        """The page without its fenced blocks and comments."""
        return COMMENT.sub("", FENCE.sub("", self.text))

    def blocks(self, language: str) -> list[str]:
        return [code for name, code in FENCE.findall(self.text) if name == language]

    def spans(self) -> list[str]:
        """Texts between back quotes, outside blocks, each on one line."""
        return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", self.prose)]

    def commands(self) -> list[list[str]]:
        """The words of all commands, in `bash` blocks and in code spans, with their placeholders."""
        found = [command for code in self.blocks("bash") for command in commands_of(code)]
        spans = [shlex.split(span) for span in self.spans() if span.startswith(("python ", "torchrun "))]
        return found + [words for words in spans if words[1] != "-m" or len(words) > 3]  # others name a program


def problems(page: Page, place: Path) -> list[str]:
    """One sentence for everything that is wrong on a page.

    Args:
        place: an empty folder for what stands in for placeholders.
    """
    found = []
    for command in page.commands():
        found += [f"{shlex.join(command)}: {reason}" for reason in command_problems(command, place)]
    found += snippet_problems(page.blocks("python"))
    for span in page.spans():
        found += [f"`{span}`: {reason}" for reason in span_problems(span)]
    found += [f"{name} is not in {path}" for name, path in named_places(page) if name not in names_in(PROJECT / path)]
    found += link_problems(page)
    languages = {name for name, _ in FENCE.findall(page.text)} - {"bash", "python", "text", "yaml", ""}
    return found + [f"nothing checks blocks of {name}" for name in sorted(languages)]


# ---- code spans and snippets ----


def span_problems(span: str) -> list[str]:
    """What a code span names that does not exist."""
    if named := re.fullmatch(r"python -m (\S+)", span):
        return [] if named[1] in (*programs(), *MODULES) else ["there is no such program"]
    if in_project(span):
        return [] if (PROJECT / span).exists() else ["there is no such file"]
    if re.fullmatch(r"\w+\.py", span):
        return [] if any(file.name == span for file in sources()) or span == "model.py" else ["there is no such file"]
    if span.startswith("--"):
        return flag_problems(span.split())
    setting = re.fullmatch(r"([A-Za-z_]+): (\S+)", span)
    if setting and setting[1] in OPTIONS:
        return value_problems(setting[1], setting[2])
    if setting and setting[1].islower() and "_" in setting[1]:
        return ["there is no such option"]
    if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", span) and span.partition(".")[0] in PACKAGES:
        return [] if resolves(span) else ["there is no such module or name"]
    return []


def flag_problems(words: Sequence[str]) -> list[str]:
    """Unknown options, and values that an option of `main.py` does not take."""
    found = []
    for flag, value in zip(words, [*words[1:], "--"], strict=True):
        if flag.startswith("--"):
            flag, has_value, own = flag.partition("=")
            if flag not in flags():
                found.append(f"there is no option {flag}")
            elif flag[2:].replace("-", "_") in OPTIONS and (has_value or not value.startswith("-")):
                found += value_problems(flag[2:].replace("-", "_"), own or value)
    return found


def value_problems(key: str, value: str) -> list[str]:
    if value.isupper() or "=" in value:  # a placeholder
        return []
    return refusal(lambda: convert(OPTIONS[key], Given(key, value, False, "documentation")) and None)


def resolves(name: str) -> bool:
    """Whether a dotted name is a module of this repository, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            value: object = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:]:
                if not hasattr(value, part):
                    return False
                value = getattr(value, part)
            return True
    return False


@cache
def sources() -> tuple[Path, ...]:
    return (*PROJECT.glob("*.py"), *(file for folder in FOLDERS for file in (PROJECT / folder).rglob("*.py")))


def named_places(page: Page) -> list[tuple[str, str]]:
    """Names that the page places in a file: `name` in [file.py](...), or `name` in `file.py`."""
    found = re.findall(r"`(\w+)`\s+(?:in|of)\s+[\[`]([\w./]+\.py)[\]`]", page.prose)
    return [(name, path) for name, path in found if (PROJECT / path).is_file()]


def names_in(file: Path) -> set[str]:
    """What a Python file defines, also inside classes."""
    return names_in_tree(ast.parse(file.read_text(encoding="utf-8")))


def names_in_tree(tree: ast.AST) -> set[str]:
    """All names that are assigned, imported, defined or parameters."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
    return found


def snippet_problems(snippets: Sequence[str]) -> list[str]:
    """What keeps the snippets of a page from compiling, and names in them that come from nowhere.

    A name may be built in, assigned or imported in this snippet or an earlier one, a module such as torch, or defined
    in a file that a comment of the snippet names, such as `# utils/conv_type.py`.
    """
    known, found = {*dir(builtins), "torch", "torchvision", "nn"}, []
    for code in snippets:
        try:
            tree = ast.parse(code)
        except SyntaxError as error:
            found.append(f"python snippet: {error}")
            continue
        for path in re.findall(r"#\s*([\w./]+\.py)\b", code):
            if (PROJECT / path).is_file():
                known |= names_in(PROJECT / path)
            else:
                found.append(f"python snippet: there is no {path}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                names = [f"{prefix}{each.name}" for each in node.names]
                found += [f"python snippet: cannot import {name}" for name in names if not importable(name)]
        known |= names_in_tree(tree)
        loaded = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
        unknown = sorted({node.id for node in loaded} - known)
        found += [f"python snippet: {name} comes from nowhere" for name in unknown]
    return found


def importable(name: str) -> bool:
    """Whether a snippet can import a name: from this repository, from what an export writes, or from a package that is
    installed or at least listed in a file of requirements."""
    first = name.partition(".")[0]
    if name in WRITTEN_BY_EXPORT or first in PACKAGES or importlib.util.find_spec(first):
        return name in WRITTEN_BY_EXPORT or resolves(name)
    return any(re.search(rf"^{first}\b", file.read_text(), re.MULTILINE) for file in PROJECT.glob("requirements*.txt"))


# ---- links ----


def link_problems(page: Page) -> list[str]:
    """Relative links to files or headings that do not exist."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.prose):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+://|mailto:", target):
            continue
        file = page.path.parent / path if path else page.path
        if path and not file.exists():
            found.append(f"link to {target}: there is no such file")
        elif anchor and anchor not in anchors(page.text if not path else file.read_text(encoding="utf-8")):
            found.append(f"link to {target}: there is no such heading")
    return found


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
