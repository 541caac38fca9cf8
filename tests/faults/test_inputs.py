"""Files and options that are not what they should be: one sentence and exit code 2, never a traceback."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tools.report
from main import main
from tests.faults.machine import train, words
from tools.tables import read_table
from utils.errors import UserError
from utils.run.checkpoint import load


@pytest.fixture
def copy(untouched: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(untouched, tmp_path / "copy"))


def test_a_budget_below_one_channel_for_each_path_is_refused(images, tmp_path, capsys):
    assert train(tmp_path, images, "--keep-ratio", "1e-9", "--dry-run") == 2
    said = capsys.readouterr().err
    assert "keep_ratio 1e-09 of the channels is less than the smallest subnet of resnet8_he has; pass" in said
    least = said.partition("--keep-ratio ")[2].split()[0]
    assert train(tmp_path, images, "--keep-ratio", least, "--dry-run") == 0


def test_a_name_or_a_path_that_no_file_system_takes_is_one_sentence(images, tmp_path, capsys):
    assert train(tmp_path, images, "--name", "x" * 300) == 2
    assert "leave out slashes and use at most 255 bytes" in capsys.readouterr().err
    assert train(tmp_path, images, "--name", "x" * 300, "--resume") == 2
    assert "leave out slashes and use at most 255 bytes" in capsys.readouterr().err
    assert main(["--resume", "y" * 5000]) == 2
    assert "is not a path" in capsys.readouterr().err


CHANGES: dict[str, Callable[[dict], None]] = {
    "an entry is missing": lambda state: state.pop("ledger"),
    "a weight is missing": lambda state: state["model"].pop("conv1.weight"),
    "a weight has another shape": lambda state: state["model"].update({"conv1.weight": torch.zeros(2)}),
    "an entry is another thing": lambda state: state.update(clocks=3),
    "the result is another thing": lambda state: state["best"].update(subnet=[1, 2]),
    "the images are not named": lambda state: state.pop("fingerprint"),
    "the configuration is a list": lambda state: state.update(config=[1]),
    "the configuration is not ours": lambda state: state.update(config={"a": 1}),
    "the phase is not one": lambda state: state.update(phase=7),
}


def test_contents_made_by_hand_behind_a_right_version_are_one_sentence(copy, capsys):
    last = copy / "checkpoints/last.pt"
    whole = load(last)
    for what, change in CHANGES.items():
        state = {**whole, "model": dict(whole["model"]), "best": dict(whole["best"])}
        change(state)
        torch.save(state, last)
        for command in (["--resume", str(last), "--finetune-epochs", "2"], ["--evaluate", "--resume", str(last)]):
            code = main(command)
            said = capsys.readouterr()
            assert code == 2 or (code == 0 and "--evaluate" in command), what  # which does not read all of it
            assert said.err.count("\n") == (code == 2), what


def test_tables_and_pages_made_of_rubbish_are_one_sentence(copy, tmp_path):
    deep = tmp_path / "deep.yaml"
    deep.write_text("[" * 1000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_table(deep)
    (copy / "results.csv").write_bytes(b"epoch,phase\n\0\0\0,search\n" + bytes(range(32)))
    with pytest.raises(UserError, match=r"results\.csv is not a table of epochs"):
        tools.report.read_runs([copy])
    (copy / "config.yaml").write_text("[" * 1000)
    with pytest.raises(UserError, match="is not a file of options"):
        tools.report.read_runs([copy])


def test_first_weights_are_checked_like_a_checkpoint(images, untouched, tmp_path, capsys):
    """A flipped bit is noticed."""
    state = torch.load(untouched / "checkpoints/best.pt", weights_only=True)["model"]
    plain = tmp_path / "plain.pt"
    torch.save({name: value for name, value in state.items() if not name.endswith("scores")}, plain)
    content = bytearray(plain.read_bytes())
    content[content.index(state["bn.running_var"].numpy().tobytes())] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    command = ("--method", "dense", "--dry-run", "--pretrained")
    assert train(tmp_path, images, *command, str(tmp_path / "flipped.pt")) == 2
    assert "wrong checksum" in capsys.readouterr().err


def fuzzed_words(choose: random.Random, images: Path, root: Path, copy: Path) -> list[str]:
    """A command line that is nearly right."""
    from args import OPTIONS

    arguments = words(root, images, "--dry-run")
    values = [
        "",
        "-1",
        "0",
        "1e308",
        "-1e308",
        "nan",
        "inf",
        "auto",
        "on",
        "\0",
        "é" * 200,
        "1e-9",
        "99999999999999999999",
    ]
    values += [
        str(copy),
        str(copy / "checkpoints/last.pt"),
        "/dev/null",
        "/proc/self/mem",
        "[1]",
        "{a: 1}",
        "!!python/x",
    ]
    for _ in range(choose.randint(1, 3)):
        key = choose.choice([*OPTIONS, "no-such-option"])
        if key in ("multigpu", "doctor", "workers", "set", "image_size", "num_subnets", "width_mult", "data"):
            continue
        arguments += [f"--{key.replace('_', '-')}", choose.choice(values)]
    return arguments


def fuzzed_file(choose: random.Random, content: bytes) -> bytes:
    """A file with a few bytes changed, cut, doubled or replaced."""
    content = bytearray(content)
    for _ in range(choose.randint(1, 4)):
        place = choose.randrange(max(1, len(content)))
        match choose.randrange(4):
            case 0:
                content[place : place + 1] = bytes([choose.randrange(256)])
            case 1:
                del content[place:]
            case 2:
                content[place:place] = content[place : place + choose.randrange(50)]
            case _:
                content[place : place + 4] = choose.choice([b"\0\0\0\0", b"nan ", b"}{][", b"-1e9"])
    return bytes(content)


@pytest.mark.slow
def test_five_hundred_broken_inputs_end_without_a_traceback(images, untouched, tmp_path, monkeypatch, capsys):
    """Command lines, YAML files, checkpoints and files of run folders, from one seed."""
    monkeypatch.chdir(tmp_path)
    choose = random.Random(0)
    yaml = Path(words(tmp_path / "base", images)[1]).read_bytes()
    for number in range(520):
        kind = number % 4
        root = tmp_path / str(number)
        copy = Path(shutil.copytree(untouched, root / "copy"))
        if kind == 0:
            command = fuzzed_words(choose, images, root, copy)
        elif kind == 1:
            command = words(root, images, "--dry-run")
            Path(command[1]).write_bytes(fuzzed_file(choose, yaml))
        else:
            file = choose.choice(sorted(f for f in copy.rglob("*") if f.is_file()))
            file.write_bytes(fuzzed_file(choose, file.read_bytes()))
            command = choose.choice([["--evaluate"], ["--dry-run"], []])
            command = ["--resume", str(choose.choice([copy, copy / "checkpoints/last.pt"])), *command]
        try:
            with contextlib.suppress(SystemExit):
                code = main(command)
                assert code in (0, 1, 2, 3), code
        except Exception as error:
            raise AssertionError(f"input {number}: {command}") from error
        capsys.readouterr()
        shutil.rmtree(root)
