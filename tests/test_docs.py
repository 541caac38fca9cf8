"""What README and docs tell a reader to type, open or import exists, and programs accept it."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import PROJECT, filled_in, programs
from tests.documents import Page, problems

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")), PROJECT / "data" / "README.md"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_nothing_on_a_page_is_wrong(path, tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    assert problems(Page.read(path), tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash\npython main.py --config configs/quickstart.yaml --keep-ration 0.25\n```", "did you mean"),
        ("```bash\npython main.py --config configs/quickstart.yaml --keep-ratio 25\n```", "keep_ratio must be in"),
        ("```bash\npython main.py --config configs/quick.yaml\n```", "there is no configs/quick.yaml"),
        ("```bash\npython -m tools.bench --config FILE.yaml --repeat 3\n```", "--repeat"),
        ("```bash\npython -m tools.bank\n```", "there is no program tools.bank"),
        ("```bash\npython -m data.check\n```", "folder"),
        ("```bash\npython -m data.check FOLDER --thread x\n```", "invalid int value"),
        ("```bash\npython -m examples.own_network --epochs 3\n```", "exit code 2"),
        ("```bash\npython -m pip install -r requirements-none.txt\n```", "there is no requirements-none.txt"),
        ("```bash\ntorchrun --standalone --nprocs 4 main.py --config FILE.yaml\n```", "--nprocs"),
        ("```bash\ntorchrun --standalone main.py --epoch 4\n```", "unknown option '--epoch'"),
        ("```bash\ntensorboard --folder runs\n```", "tensorboard"),
        ("```bash\nconda install torch\n```", "nothing checks commands of conda"),
        ("```bash\nX=1 python main.py --list && python main.py --lists  # both\n```", "unknown option '--lists'"),
        ("```bash\npython main.py \\\n  --list-all\n```", "unknown option '--list-all'"),
        ("Use `python -m data.check FOLDER --verbose`.", "unrecognized arguments"),
        ("Use `python -m tools.bank`.", "there is no such program"),
        ("Use `--keep-ration`.", "there is no option --keep-ration"),
        ("Use `--score-every none`.", "score_every must be"),
        ("Use `budget: flop`.", "budget must be one of"),
        ("Use `budget_plan: flops`.", "there is no such option"),
        ("See `utils/choice.py`.", "there is no such file"),
        ("See `trainers.default.training_step`.", "there is no such module or name"),
        ("See `utils.choises`.", "there is no such module or name"),
        ("See `mains.py`.", "there is no such file"),
        ("One step (`training_step` in [trainers/default.py](trainers/default.py)).", "training_step is not in"),
        ("See [there](docs/trainings.md).", "there is no such file"),
        ("See [there](docs/training.md#methodes).", "there is no such heading"),
        ("# Start\n\nSee [there](#begin).", "there is no such heading"),
        ("```python\nfrom utils.conv_type import sparsely\n```", "cannot import utils.conv_type.sparsely"),
        ("```python\nmodel = sparsely(None)  # utils/conv_type.py\n```", "sparsely comes from nowhere"),
        ("```python\nimport torchvisions\n```", "cannot import torchvisions"),
        ("```python\nx = 1\n```\n\n```python\nx = x + y\n```", "y comes from nowhere"),
        ("```python\nmodel = f(  # utils/conv_type.py\n```", "python snippet"),
        ("```console\nls\n```", "nothing checks blocks of console"),
    ],
)
def test_a_fault_is_found(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    [found] = problems(Page(PROJECT / "page.md", text), tmp_path)
    assert message in found


def test_the_pages_hold_what_is_checked():
    """A page whose blocks or spans no pattern finds would be right by mistake."""
    pages = [Page.read(path) for path in PAGES]
    commands = [" ".join(command) for page in pages for command in page.commands()]
    assert "python main.py --config configs/quickstart.yaml" in commands
    assert len([command for command in commands if command.startswith("python main.py")]) > 8
    assert len({command.split()[2] for command in commands if " -m " in command}) > 4
    assert sum(len(page.blocks("python")) for page in pages) >= 1
    assert sum(len(page.spans()) for page in pages) > 200


@pytest.mark.parametrize("name", [name for name in programs() if name.startswith(("tools.", "data."))])
def test_a_program_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


# ---- what takes longer than parsing ----


def own_commands() -> list[list[str]]:
    """All different commands that start a program of this repository or pytest."""
    found = {tuple(command): None for path in PAGES for command in Page.read(path).commands()}
    return [list(command) for command in found if command[0] == "python"]


@pytest.mark.slow
def test_options_of_pytest_are_accepted(tmp_path):
    commands = [words[3:] for words in own_commands() if words[1:3] == ["-m", "pytest"]]
    assert commands
    for words in commands:
        command = [sys.executable, "-m", "pytest", *words, "--collect-only", "-q", "tests/test_seeds.py"]
        result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


def trains_on_bundled_images(words: list[str], place: Path) -> bool:
    """Whether a command of main.py trains, on images that come with this repository and on one device."""
    from args import parse_args

    if words[1:2] != ["main.py"] or {"--resume", "--list", "--help", "--multigpu", "--doctor"} & set(words):
        return False
    config = parse_args([filled_in(word, place) for word in words[2:]]).config
    return config.data.set == "FashionMNIST-mini" and not config.run.evaluate


@pytest.mark.slow
def test_training_commands_build_and_take_a_step(tmp_path, monkeypatch, capsys):
    from main import main

    monkeypatch.chdir(PROJECT)
    commands = [words for words in own_commands() if trains_on_bundled_images(words, tmp_path)]
    assert len(commands) >= 3
    for words in commands:
        arguments = [filled_in(word, tmp_path) for word in words[2:]]
        assert main([*arguments, "--dry-run", "--device", "cpu"]) == 0, words
        assert "dry run: one step" in capsys.readouterr().out


@pytest.mark.slow
def test_snippets_of_the_readme_run():
    for code in Page.read(PROJECT / "README.md").blocks("python"):
        names: dict[str, object] = {}
        given = "import torch, torchvision\nfrom torch import nn\nfrom utils.conv_type import sparsify\n"
        exec(f"{given}from utils.channels.network import SparseNetwork\n{code}", names)


def test_every_promise_names_tests_that_exist():
    page = Page.read(PROJECT / "docs/guarantees.md")
    wanted = {span for span in page.spans() if span.startswith("test_")}
    files = [file.read_text(encoding="utf-8") for file in (PROJECT / "tests").rglob("test_*.py")]
    found = {name for text in files for name in re.findall(r"def (test_\w+)", text)}
    assert len(wanted) > 30
    assert wanted - found == set()
    rows = [line for line in page.text.splitlines() if line.startswith("| ") and " | " in line]
    assert all("test" in row.split(" | ")[1] or row.startswith("| - ") for row in rows)
