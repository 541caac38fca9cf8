"""Who may import whom: a module knows what lies below it and nothing above it.

`main` and `tools` import trainers. Trainers import data, models, args and utils. Data and models import utils, and args
imports how options are read. Inside utils the order is run, ranks, channels, then algorithm and conv_type. Errors,
seeds, options and the names of choices lie below everything. Only main takes care of the standard output.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
ROOMS = ("main", "args", "tools", "examples", "tests", "trainers", "data", "models", "utils")

OPTIONS = {"utils.options", "utils.option_text", "utils.choices", "utils.errors", "utils.paths"}
BASE = {"utils.seeds"} | OPTIONS
ALGORITHM = {"utils.algorithm"}
CHANNELS = {"utils.channels", "utils.conv_type"} | ALGORITHM | BASE
RANKS = {"utils.ranks"} | CHANNELS
UTILS = {"utils.run"} | RANKS
EVERYTHING = {"main", "args", "tools", "examples", "trainers", "data", "models", "utils.output"} | UTILS
# What a room may import, its own modules included. The longest name that fits a module decides.
ALLOWED = {
    "main": EVERYTHING,
    "tools": EVERYTHING,
    "tests": EVERYTHING | {"tests"},
    "examples": EVERYTHING - {"tools"},
    "trainers": {"trainers", "data", "models", "args"} | UTILS,
    "data": {"data"} | UTILS,
    "models": {"models"} | UTILS,
    "args": OPTIONS,
    "utils.run": UTILS,
    "utils.ranks": RANKS,
    "utils.channels": CHANNELS,
    "utils.conv_type": BASE,
    "utils.algorithm": ALGORITHM,
    "utils.options": {"utils.errors", "utils.paths"},
    "utils.option_text": {"utils.options", "utils.errors"},
    "utils.choices": set(),
    "utils.errors": set(),
    "utils.output": set(),
    "utils.paths": set(),
    "utils.seeds": set(),
    "utils": set(),
}


def tracked_modules() -> dict[str, Path]:
    """Every Python file that git knows and that can be imported, by its name; .ci is no package."""
    files = subprocess.run(
        ["git", "ls-files", "*.py", ":!.ci"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    paths = [Path(line) for line in files.stdout.splitlines() if (PROJECT / line).exists()]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): PROJECT / path for path in paths}


def imports(name: str, source: str, modules: dict[str, Path]) -> set[str]:
    """Modules of ours that a module imports, wherever in the file, for types only or not."""
    found = set()
    is_package = name in modules and modules[name].name == "__init__.py"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")[: None if is_package and node.level == 1 else -node.level or None]
            base = ".".join([*(parts if node.level else []), *([node.module] if node.module else [])])
            inside = {f"{base}.{alias.name}" for alias in node.names}
            submodules = inside & modules.keys()
            found |= submodules if len(submodules) == len(inside) else submodules | {base}
    return {module for module in found if module.split(".")[0] in ROOMS} - {name}


def fits(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def violations(graph: dict[str, set[str]]) -> list[str]:
    found = []
    for name, imported in sorted(graph.items()):
        room = max((room for room in ALLOWED if fits(name, room)), key=len)
        found += [
            f"{name} imports {module}"
            for module in sorted(imported)
            if not any(fits(module, allowed) for allowed in ALLOWED[room])
        ]
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of modules, each of which imports the next; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    modules = tracked_modules()
    return {name: imports(name, path.read_text(encoding="utf-8"), modules) for name, path in modules.items()}


def test_every_import_goes_down(graph):
    assert len(graph) > 80
    assert sum(map(len, graph.values())) > 200
    assert violations(graph) == []


def test_no_modules_import_each_other_in_a_circle(graph):
    assert cycle(graph) == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("utils.channels.plan", "def f():\n    from utils.ranks.exchange import rank", ["utils.ranks.exchange"]),
        ("utils.run.board", "if TYPE_CHECKING:\n    import trainers.state", ["trainers.state"]),
        ("utils.algorithm.masks", "from utils.errors import UserError", ["utils.errors"]),
        ("utils.algorithm.masks", "from . import optimizer\nfrom ..channels import plan", ["utils.channels.plan"]),
        ("trainers.state", "from tools import bench", ["tools.bench"]),
        ("tools.bench", "import tests.toy", ["tests.toy"]),
        ("args", "from models import MODELS", ["models"]),
        ("data.files", "import args", ["args"]),
        ("models.vgg", "from data import images", ["data.images"]),
        ("main", "import trainers.session, utils.errors, numpy", []),
        ("utils.ranks.exchange", "from utils.channels import network", []),
    ],
)
def test_the_rule_sees_what_it_should(module, source, expected):
    imported = imports(module, source, tracked_modules())
    assert violations({module: imported}) == [f"{module} imports {name}" for name in expected]


def test_a_circle_is_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"d", "a"}, "d": set()})
    assert not cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_options_are_read_without_torch():
    check = "import args, sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], cwd=PROJECT, check=True, timeout=60)
