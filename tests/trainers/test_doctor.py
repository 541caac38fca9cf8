"""`--doctor`: what it says of this machine, what counts as a problem, and that it leaves nothing behind."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import shutil
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import data.sources
import utils.run.folder
from main import main
from trainers import doctor


@pytest.fixture
def examine(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Runs `--doctor` with more options in an empty folder. Returns exit code and text, with every text on one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("a doctor downloads nothing")

    monkeypatch.setattr(data.sources, "_download", refuse)

    def run(*options: str) -> tuple[int, str]:
        code = main(["--doctor", *options])
        said = capsys.readouterr().out
        assert all(len(line) <= 80 or " " not in line.strip() for line in said.splitlines())
        return code, re.sub(r"\n {12}(?! )", " ", said)

    return run


def line_of(said: str, label: str) -> str:
    return next(line for line in said.splitlines() if line.startswith(label))[12:]


def test_a_machine_that_is_ready(examine, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    code, said = examine()
    assert code == 0
    assert said.splitlines()[-1] == "A training of resnet32 on FashionMNIST-mini can start here."
    assert "problem" not in said
    for name in ("torch", "torchvision", "numpy"):
        assert line_of(said, f"{name} ").strip() == importlib.metadata.version(name)
    assert f"torch computes in {torch.get_num_threads()} thread" in said
    assert "OMP_NUM_THREADS is 7" in said
    assert "FashionMNIST-mini  found: " in said
    assert "CIFAR10            not in dataset/cifar-10-batches-py" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--set", "CIFAR10"), "dataset/cifar-10-batches-py lacks data_batch_1, "),
        (("--set", "MNIST"), "dataset/MNIST/raw lacks train-images-idx3-ubyte, "),
        (("--set", "ImageFolder"), "ImageFolder: there is no folder dataset; "),
        (("--set", "ImageNet"), "ImageNet: there is no folder dataset; "),
        (("--device", "cuda"), "device cuda:0 does not exist, this machine has no CUDA GPU; "),
        (("--log-dir", "file/runs"), "no run folder can be made at file/runs (Not a directory); "),
    ],
)
def test_what_is_missing_is_one_problem_with_advice(examine, tmp_path, options, problem):
    (tmp_path / "file").touch()
    code, said = examine(*options)
    assert code == 1
    assert re.findall(r"^problem     (.*)$", said, re.MULTILINE) == [line_of(said, "problem")]
    assert line_of(said, "problem").startswith(problem)
    assert said.splitlines()[-1].endswith("cannot start as things are.")


def test_a_set_that_is_named_is_looked_at_closely(examine, tiny_images, tmp_path):
    assert examine("--set", "ImageFolder", "--data", str(tiny_images))[0] == 0
    copy = shutil.copytree(tiny_images, tmp_path / "copy")
    shutil.rmtree(copy / "test" / "class3")
    code, said = examine("--set", "ImageFolder", "--data", "copy")
    assert code == 1
    assert "class folders differ" in line_of(said, "problem")
    assert "ImageFolder        found: copy/train and copy/test" in examine("--data", "copy")[1]


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        (None, "numpy is not installed; run `python -m pip install -r requirements.txt`"),
        ("1.9.3", "numpy 1.9.3 is older than 1.26; run `python -m pip install -U -r requirements.txt`"),
    ],
)
def test_a_package_that_is_missing_or_old_is_a_problem(examine, monkeypatch, version, problem):
    true_version = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: version if name == "numpy" else true_version(name))
    code, said = examine()
    assert code == 1
    assert line_of(said, "problem") == problem
    assert "run folder  runs: can be written" in said, "what does not need packages is told all the same"


def test_a_torch_that_does_not_load_is_a_problem(examine, monkeypatch):
    def fail(_name: str) -> None:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fail)
    code, said = examine()
    assert code == 1
    assert "torch cannot be imported (libcudart.so.12: cannot open shared object file)" in line_of(said, "problem")


def test_every_gpu_is_told_with_its_memory(examine, monkeypatch):
    facts = [SimpleNamespace(name="Old", major=7, minor=5), SimpleNamespace(name="New", major=9, minor=0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", facts.__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: ((3 + number) * 2**30, 80 * 2**30))
    said = examine("--device", "cpu")[1]
    assert (
        "cuda:0: Old, 3.0 GiB free of 80.0 GiB, compute capability 7.5, bf16 is slow "
        "cuda:1: New, 4.0 GiB free of 80.0 GiB, compute capability 9.0, bf16 has instructions of its own\n"
    ) in said
    assert line_of(said, "trains on").startswith("cpu")


def test_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    assert doctor.why_no_gpu() == "torch was built without CUDA"

    def init() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system. Please check")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.why_no_gpu() == (
        "Found no NVIDIA driver on your system (torch was built for CUDA 13.0), and CUDA_VISIBLE_DEVICES is ''"
    )


@pytest.mark.parametrize(
    ("flags", "bf16", "hints"),
    [("avx2 amx_bf16", "has instructions of its own (amx_bf16)", 0), ("avx2", "has no instructions and is slow", 1)],
)
def test_bf16_goes_by_the_processor(examine, tmp_path, monkeypatch, flags, bf16, hints):
    (tmp_path / "cpuinfo").write_text(f"model name\t: Abacus\nflags\t: {flags}\n")
    monkeypatch.setattr(utils.run.folder, "CPU_INFO", tmp_path / "cpuinfo")
    code, said = examine("--precision", "bf16")
    assert f"instructions: {flags}; " in said
    assert f"bf16 {bf16}" in said
    assert code == 0
    assert said.count("hint        --precision bf16") == hints


def test_memory_is_that_of_a_container_with_a_limit(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 8192 kB\nMemFree: 1 kB\nMemAvailable: 4096 kB\nHugePages_Total: 0\n")
    monkeypatch.setattr(doctor, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(doctor, "CONTAINER", tmp_path)
    assert doctor.memory_bytes() == (4096 * 1024, 8192 * 1024)
    (tmp_path / "memory.current").write_text("1000")
    (tmp_path / "memory.max").write_text("max")
    assert doctor.memory_bytes() == (4096 * 1024, 8192 * 1024)
    (tmp_path / "memory.max").write_text("5000")
    assert doctor.memory_bytes() == (4000, 5000)


def test_memory_and_disks_are_told_with_what_is_free(examine, tmp_path, monkeypatch):
    free = {str(tmp_path): 0.5, str(tmp_path / "images"): 2.5, "/dev/shm": 0.125}
    (tmp_path / "images").mkdir()
    usage = lambda place: SimpleNamespace(free=free[str(place)] * 2**30, total=9 * 2**30)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(doctor, "memory_bytes", lambda: (3 * 2**30, 7 * 2**30))
    code, said = examine("--data", "images")
    assert line_of(said, "memory") == "3.0 GiB free of 7.0 GiB"
    assert line_of(said, "/dev/shm") == "0.5 GiB free of 9.0 GiB"
    disks = "0.5 GiB free at runs (--log-dir), a folder that is not there yet 2.5 GiB free at images (--data)"
    assert line_of(said, "disk") == disks
    assert (code, said.count("\nhint ")) == (0, 1)
    assert "less than 1 GiB is free for checkpoints at runs" in line_of(said, "hint")
    free[str(tmp_path)] = 0.125  # also that of the shared memory, which only processes that read images need
    assert "/dev/shm is small" not in examine("--data", "images")[1]
    assert "/dev/shm is small" in examine("--set", "ImageFolder", "--data", "images")[1]


@pytest.mark.parametrize("options", [("--resume", "x"), ("--dry-run",), ("--print-config",)])
def test_what_a_doctor_does_not_do_is_refused(examine, options):
    assert examine(*options) == (2, "")


def test_requirements_are_read_from_their_file(tmp_path):
    (tmp_path / "some.txt").write_text("# optional\n-r other.txt\nonnx>=1.17\nsafetensors\n")
    assert doctor.requirements(tmp_path / "some.txt") == {"onnx": "1.17", "safetensors": "0"}
    assert doctor.requirements(tmp_path / "none.txt") == {}
    assert doctor.numbers("2.14.1+cpu") == (2, 14, 1)
