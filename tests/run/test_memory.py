"""Freed memory stays with the process, so that a step does not get every page anew."""

import ctypes
import os
import subprocess
import sys

import pytest

import main
from tools import bench
from utils.run import memory
from utils.run.memory import keep_freed_memory

FAULTS = """
import resource
import sys

from utils.run.memory import keep_freed_memory

done = keep_freed_memory() if sys.argv[1] == "kept" else None

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

counts = []
for _ in range(31):  # the first ones find no freed block of this size
    before = faults()
    b"x" * 64_000_000  # above the 32 MB up to which glibc adapts by itself
    counts.append(faults() - before)
print(sorted(counts[20:])[5], done)
"""


def faults(which: str) -> tuple[int, str]:
    """Page faults of a step that allocates 64 MB, in a process of its own, and what the function said."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(memory.SET_BY_USER)}
    program = subprocess.run(
        [sys.executable, "-c", FAULTS, which],
        capture_output=True,
        text=True,
        check=True,
        env={**clean, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    count, said = program.stdout.split()
    return int(count), said


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_a_step_gets_its_pages_once():
    kept, said = faults("kept")
    assert said == "True"
    assert 10 * kept < faults("by default")[0]


def test_whoever_sets_options_of_malloc_is_obeyed(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("malloc was asked"))
    assert keep_freed_memory() is False


def test_other_c_libraries_are_left_alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith(memory.SET_BY_USER):
            monkeypatch.delenv(name)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False


def test_training_and_the_bench_ask_for_it_before_anything_else(program, monkeypatch):
    class Asked(Exception):
        pass

    def ask():
        raise Asked

    for module in (main, bench):
        monkeypatch.setattr(module, "keep_freed_memory", ask)
    with pytest.raises(Asked):
        program()
    with pytest.raises(Asked):
        bench.main(["--arch", "resnet8_he", "--device", "cpu"])
