"""Checkpoints: whole or absent, every damage noticed, nothing run, every bit compared."""

import ast
import errno
import os
import resource
import subprocess
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch

from utils.errors import UserError
from utils.run import checkpoint
from utils.run.checkpoint import (
    CheckpointError,
    differences,
    load,
    restore_generator,
    save,
)

PROJECT_FOLDER = Path(__file__).resolve().parents[2]


def example_state(value: float = 1.0) -> dict:
    return {
        "model": OrderedDict(weight=torch.full((3, 4), value), bias=torch.nn.Parameter(torch.zeros(2))),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]},
        "epoch": 3,
        "best": None,
        "arch": "resnet20",
        "done": False,
        "generator": torch.Generator().get_state(),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A valid checkpoint in a folder of its own."""
    save(tmp_path / "last.pt", example_state())
    return tmp_path / "last.pt"


def assert_untouched(path: Path) -> None:
    assert differences(load(path), {**example_state(), "format_version": checkpoint.FORMAT_VERSION}) == []
    assert os.listdir(path.parent) == ["last.pt"]


def test_a_state_comes_back_bit_equal(path: Path) -> None:
    assert_untouched(path)
    save(path, example_state(2.0))
    assert differences(load(path), example_state()) == ["model.weight", "format_version"]


def test_a_crash_while_serialising_leaves_the_old_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(state: dict, file: object) -> None:
        file.write(b"half")
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", crash)
        with pytest.raises(RuntimeError, match="boom"):
            save(path, example_state(2.0))
    assert_untouched(path)


@pytest.mark.parametrize("function", [pytest.param("fsync", marks=pytest.mark.slow), "replace"])
def test_a_process_killed_while_saving_leaves_the_old_checkpoint(path: Path, function: str) -> None:
    script = f"""
        import os, sys, torch
        from utils.run.checkpoint import save
        os.{function} = lambda *arguments: os._exit(9)
        save(sys.argv[1], {{"epoch": 4}})
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    assert subprocess.run(command, cwd=PROJECT_FOLDER, check=False).returncode == 9
    assert sorted(os.listdir(path.parent)) == ["last.pt", "last.pt.partial"]
    assert load(path)["epoch"] == 3
    # The next save, of whichever checkpoint, clears what the crash left.
    save(path.with_name("best.pt"), example_state())
    assert sorted(os.listdir(path.parent)) == ["best.pt", "last.pt"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    size = f"{path.stat().st_size:,}"
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(CheckpointError) as caught:
            save(path, example_state(2.0))
    assert str(path) in str(caught.value)
    assert f"No space left on device; it needs {size} bytes and" in str(caught.value)
    assert_untouched(path)
    save(path, example_state(2.0))
    assert load(path)["model"]["weight"][0, 0] == 2.0


def test_a_real_write_error_leaves_the_old_checkpoint(path: Path) -> None:
    # A limit on the size of files makes the system refuse a write half way, as a full disk does.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            save(path, {"weight": torch.zeros(10000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_untouched(path)


def test_a_folder_that_is_gone_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file or directory"):
        save(tmp_path / "gone" / "last.pt", example_state())


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        (Path("x"), "state.list.1.key is a PosixPath"),
        (numpy.float64(1.0), "state.list.1.key is a float64"),
        (numpy.zeros(2), "state.list.1.key is a ndarray"),
        ({1, 2}, "state.list.1.key is a set"),
        ({(1, numpy.int64(2)): 3}, "state.list.1.key key .* is a int64"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(path: Path, entry: object, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        save(path, {"list": [0, {"key": entry}]})
    assert_untouched(path)


def test_a_truncated_checkpoint_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"last\.pt is damaged .*; pass a checkpoint of a run"):
            load(path)


def test_a_flipped_bit_in_a_tensor_is_refused_although_torch_loads_it(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((3, 4), 1.0).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["model"]["weight"][0, 0] != 1.0
    with pytest.raises(UserError, match=r"damaged .*\(BadZipFile: wrong checksum in .*data/\d+\)"):
        load(path)


def test_a_flipped_bit_in_any_place_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    state = {"weight": torch.arange(4.0), "epoch": 3}
    save(path, state)
    content = path.read_bytes()
    expected = load(path)
    num_refused = 0
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            loaded = load(path)
        except UserError:
            num_refused += 1
        else:
            assert differences(loaded, expected) == [], position
    assert num_refused > len(content) / 3 / 10


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_malicious_checkpoint_runs_nothing(tmp_path: Path, as_zip: bool) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "proof"),)

    state = {"format_version": 1, "model": Payload()}
    torch.save(state, tmp_path / "evil.pt", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(UserError, match=r"evil\.pt is damaged or not from this project"):
        load(tmp_path / "evil.pt")
    assert not (tmp_path / "proof").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "none.pt")
    with pytest.raises(UserError, match="IsADirectoryError"):
        load(tmp_path)
    for content in ([1, 2], {"weight": torch.zeros(2)}, {"format_version": "1"}):
        torch.save(content, tmp_path / "foreign.pt")
        with pytest.raises(UserError, match="is not a checkpoint of this project"):
            load(tmp_path / "foreign.pt")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (checkpoint.FORMAT_VERSION - 1, "by an older version .*, in format 1 instead of 2; use it with commit"),
        (checkpoint.FORMAT_VERSION + 1, "has format version 3, and this project reads version 2; update"),
    ],
)
def test_another_format_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch, version: int, message: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", version)
        save(path, example_state())
        assert load(path)["format_version"] == version
    with pytest.raises(UserError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("a", "b", "names"),
    [
        ({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}, ["b.c"]),
        ({"a": 1}, {"b": 1}, ["a", "b"]),
        ({"a": [1, 2, 3]}, {"a": [1, 5, 3]}, ["a.1"]),
        ({"a": [1, 2]}, {"a": [1, 2, 3]}, ["a"]),
        ({"a": [1]}, {"a": (1,)}, ["a"]),
        ({"a": 1}, {"a": 1.0}, ["a"]),
        ({"a": True}, {"a": 1}, ["a"]),
        ({"a": 0.0}, {"a": -0.0}, ["a"]),
        ({"a": float("nan")}, {"a": float("nan")}, []),
        ({"a": None, "b": "x"}, {"a": None, "b": "y"}, ["b"]),
        ({"a": torch.tensor([0.0, float("nan")])}, {"a": torch.tensor([0.0, float("nan")])}, []),
        ({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}, ["a"]),
        ({"a": torch.tensor(1.0)}, {"a": torch.tensor(1.0, dtype=torch.float64)}, ["a"]),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.int32)}, ["a"]),
        ({"a": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, ["a"]),
        ({"a": torch.zeros(2, 3).T}, {"a": torch.zeros(3, 2)}, []),
        ({"a": torch.zeros(0)}, {"a": torch.zeros(0)}, []),
        ({"a": torch.tensor(True)}, {"a": torch.tensor(False)}, ["a"]),
        ({"a": numpy.zeros(2)}, {"a": numpy.ones(2)}, ["a"]),
        ({"a": numpy.zeros(2)}, {"a": torch.zeros(2)}, ["a"]),
    ],
)
def test_differences_are_named_to_the_last_bit(a: dict, b: dict, names: list[str]) -> None:
    assert differences(a, b) == names
    assert sorted(differences(b, a)) == names
    assert differences(a, b, "whole") == [f"whole.{name}" for name in names]


def test_a_generator_continues_where_it_was() -> None:
    generator, restored = torch.Generator().manual_seed(1), torch.Generator()
    torch.rand(5, generator=generator)
    restore_generator(restored, generator.get_state())
    assert torch.equal(torch.rand(3, generator=restored), torch.rand(3, generator=generator))


def test_a_state_of_another_device_is_refused_and_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    with pytest.raises(UserError, match="does not fit device cpu; resume the run on the kind of device"):
        restore_generator(generator, torch.zeros(16, dtype=torch.uint8))  # as long as that of a GPU
    assert torch.equal(generator.get_state(), before)


# ---- No file of the project may load in a way that runs code ----


def unsafe_calls(source: str) -> list[str]:
    """Calls in a Python file that could run code hidden in a file they read.

    Allowed are `torch.load(..., weights_only=True)` and `yaml.load` with `yaml.SafeLoader`, with `yaml.BaseLoader`,
    which makes nothing but texts, or with a class of the same file that is derived from one of them.
    """
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    loaders = {"yaml.SafeLoader", "yaml.BaseLoader"}
    for node in nodes:
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) in loaders for base in node.bases):
            loaders.add(node.name)
    found = []
    for node in nodes:
        # Such an import would hide the call from the search below.
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "yaml", "pickle"):
            found += [alias.name for alias in node.names if "load" in alias.name.lower()]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "torch.load":
            safe = keywords.get("weights_only") == "True"
        elif name == "yaml.load":
            loader = ast.unparse(node.args[1]) if len(node.args) > 1 else keywords.get("Loader")
            safe = loader in loaders
        elif name in ("numpy.load", "np.load"):
            safe = keywords.get("allow_pickle", "False") == "False"
        else:
            yaml_loads = name.startswith("yaml.") and "load" in name and not name.startswith("yaml.safe_load")
            copies = ast.unparse(node).startswith("pickle.loads(pickle.dumps(")  # of what is in memory, not of a file
            safe = copies or not (yaml_loads or name in ("pickle.load", "pickle.loads", "pickle.Unpickler"))
        if not safe:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    ("source", "num_unsafe"),
    [
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("torch.load(path, weights_only=flag)", 1),
        ("torch.load(path, 'cpu', weights_only=True)", 0),
        ("from torch import load", 1),
        ("from pickle import loads", 1),
        ("pickle.loads(content)", 1),
        ("pickle.Unpickler(file).load()", 1),
        ("pickle.dumps(content)", 0),
        ("pickle.loads(pickle.dumps(content))", 0),
        ("yaml.load(text)", 1),
        ("yaml.load(text, Loader=yaml.FullLoader)", 1),
        ("yaml.load(text, yaml.SafeLoader)", 0),
        ("class Strict(yaml.SafeLoader): pass\nyaml.load(text, Loader=Strict)", 0),
        ("class Texts(yaml.BaseLoader): pass\nyaml.load(text, Loader=Texts)", 0),
        ("class Loose(yaml.Loader): pass\nyaml.load(text, Loader=Loose)", 1),
        ("yaml.unsafe_load(text)", 1),
        ("yaml.safe_load(text)", 0),
        ("numpy.load(path, allow_pickle=True)", 1),
        ("numpy.load(path)", 0),
    ],
)
def test_the_search_for_unsafe_calls_finds_them(source: str, num_unsafe: int) -> None:
    assert len(unsafe_calls(source)) == num_unsafe


def test_no_file_of_the_project_loads_unsafely() -> None:
    folders = ("models", "utils", "trainers", "data", "tests", "tools", "examples")
    files = [
        *PROJECT_FOLDER.glob("*.py"),
        *(file for folder in folders for file in (PROJECT_FOLDER / folder).rglob("*.py")),
    ]
    assert len(files) > 10
    unsafe = {str(file): calls for file in files if (calls := unsafe_calls(file.read_text(encoding="utf-8")))}
    assert unsafe == {}
