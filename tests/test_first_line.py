"""A training says something before it imports torch; what prints a file or a help text prints nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
# Runs the program until it imports torch. Then it ends at once, so what is not flushed is lost.
STUB = """
    import os, runpy, sys

    class Torch:
        def find_spec(self, name, path=None, target=None):
            if name == "torch":
                os.write(1, b"torch")
                os._exit(0)

    sys.meta_path.insert(0, Torch())
    runpy.run_path("main.py", run_name="__main__")
"""


def output_of(*options: str, **variables: str) -> list[str]:
    command = [sys.executable, "-c", textwrap.dedent(STUB), *options]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize("options", [(), ("--resume", "somewhere"), ("--evaluate", "--resume", "somewhere")])
def test_a_line_is_out_before_torch_is_imported(options):
    line, torch = output_of("--config", "configs/quickstart.yaml", *options)
    assert line[20:] == "the options are read, starting PyTorch"
    assert torch == "torch"


def test_only_the_first_rank_says_it():
    place = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert output_of(**place, RANK="1", LOCAL_RANK="1") == ["torch"]
    assert len(output_of(**place, RANK="0", LOCAL_RANK="0")) == 2


def test_what_is_asked_to_print_a_text_prints_nothing_else():
    assert "PyTorch" not in "".join(output_of("--print-config"))
    assert output_of("--print-config", "--resume", "somewhere") == ["torch"]
    assert "starting PyTorch" not in "".join(output_of("--help"))
    assert "starting PyTorch" not in "".join(output_of("--list"))


def test_a_package_that_is_missing_is_one_sentence():
    hidden = "import sys; sys.modules['yaml'] = None; import main"
    done = subprocess.run([sys.executable, "-c", hidden], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.stderr == "error: the package yaml is not installed; run `python -m pip install -r requirements.txt`\n"
    assert done.returncode == 1
