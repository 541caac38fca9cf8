"""The program on every kind of image set, from files to a summary; test_main.py does so for small image folders."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from main import main
from tests.data.samples import make_photos, write_cifar, write_idx_files
from tests.toy import without_clocks
from utils.run.checkpoint import differences, load

PROJECT = Path(__file__).parents[2]
TINY = [
    *("--arch", "resnet8_he", "--width-mult", "0.1", "--epochs", "1", "--batch-size", "4", "--no-finetune"),
    *("--num-subnets", "0", "--bn-batches", "1", "--holdout", "0", "--sample-from-training-set"),
]
# The program; its second step sends SIGTERM to the whole process group, as `timeout` and batch systems do.
STOPPED = """
import os, subprocess, sys
import main, trainers.recipe

step, count = trainers.recipe.Recipe.step, iter(range(100))

def interrupted_step(self, *arguments, **named):
    if next(count) == 1:
        # by another process: what their parent sends does not surprise the workers
        subprocess.run(["kill", "-TERM", "--", f"-{os.getpid()}"], start_new_session=True)
    return step(self, *arguments, **named)

trainers.recipe.Recipe.step = interrupted_step
sys.exit(main.main(sys.argv[1:]))
"""

# Python 3.12 warns of every fork in a process that has threads, such as those of PyTorch.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def options(name: str, root: Path, *others: str, run: str = "run") -> list[str]:
    return ["--set", name, "--data", str(root), "--log-dir", str(root / "runs"), "--name", run, *TINY, *others]


def folder_of(root: Path, run: str = "run") -> Path:
    return root / "runs" / "no_config" / run / "prune_rate=0.5"


def summary(root: Path) -> dict:
    return json.loads((folder_of(root) / "summary.json").read_text())


def test_grey_images(tmp_path):
    write_idx_files(tmp_path / "MNIST" / "raw", compress=True)
    assert main(options("MNIST", tmp_path)) == 0
    assert summary(tmp_path)["set"] == "MNIST"


def test_a_hundred_classes(tmp_path, monkeypatch):
    write_cifar(tmp_path, "CIFAR100", monkeypatch)
    assert main(options("CIFAR100", tmp_path)) == 0
    assert summary(tmp_path)["set"] == "CIFAR100"


@pytest.mark.slow
def test_streamed_run_stopped_by_a_signal_to_all_its_processes_resumes_bit_equal(tmp_path):
    """And with another number of workers than before it was stopped."""
    make_photos(tmp_path, per_class=12)
    streamed = ("--image-size", "128", "--print-freq", "1")
    assert main(options("ImageFolder", tmp_path, *streamed, "--workers", "0", run="whole")) == 0

    command = [
        sys.executable,
        "-c",
        STOPPED,
        *options("ImageFolder", tmp_path, *streamed, "--workers", "2", run="parts"),
    ]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=240, start_new_session=True)
    assert result.returncode == 143, result.stderr
    assert "stopped after step 2 of epoch 1, saved; go on with: python main.py --resume" in result.stdout

    assert main(["--resume", str(folder_of(tmp_path, "parts")), "--workers", "0"]) == 0
    whole, parts = (load(folder_of(tmp_path, run) / "checkpoints/last.pt") for run in ("whole", "parts"))
    assert differences(without_clocks(whole), without_clocks(parts)) == []


def test_a_bad_file_ends_a_run_with_one_sentence(tmp_path, capsys):
    make_photos(tmp_path, per_class=4)
    for path in (tmp_path / "test").glob("*/*.jpg"):
        path.write_bytes(b"")
    assert main(options("ImageFolder", tmp_path, "--image-size", "128", "--workers", "1")) == 2
    assert capsys.readouterr().err.startswith("error: cannot read image")
