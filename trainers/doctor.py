"""What there is here to train with, and whether a training could start: `python main.py --doctor`.

Works without torch too, since that may be what is missing. Nothing is downloaded, and nothing stays behind.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from args import SETS, Config
from utils.choices import is_own
from utils.errors import UserError

PROJECT = Path(__file__).resolve().parents[1]
OLDEST_PYTHON = (3, 11)
WIDTH, INDENT = 80, 12  # of a line, and of the text behind its label
UNBROKEN = {"break_long_words": False, "break_on_hyphens": False}  # paths and options stay whole
GIB = 2**30
LITTLE_DISK, LITTLE_SHARED_MEMORY = GIB, GIB // 4
BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")  # instructions of x86 and of ARM
BF16_CAPABILITY = (8, 0)  # of the first CUDA GPUs that have them
MEMORY, CONTAINER, SHARED_MEMORY = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/dev/shm")
NOT_WITH = ("resume", "evaluate", "print_config", "dry_run")


@dataclass
class Findings:
    """What is wrong.

    Attributes:
        problems: why no training could start, each with what to do about it.
        hints: what a training could do without, likewise.
    """

    problems: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)


def tell(label: str, *texts: str) -> None:
    """Prints texts behind a label, in lines of at most 80 characters but for paths that are longer."""
    for text in texts:
        start, indent = f"{label:{INDENT}}", " " * INDENT
        print(textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=indent, **UNBROKEN), flush=True)
        label = ""


def examine(config: Config) -> int:
    """Prints what there is. Returns the exit code: 0 if a training with these options could start, else 1.

    Raises: UserError for an option that asks for something else.
    """
    if other := [f"--{key.replace('_', '-')}" for key in NOT_WITH if getattr(config.run, key)]:
        raise UserError(f"--doctor looks at the machine and starts nothing, so it does not go with {other[0]}")
    found = Findings()
    check_packages(found)
    usable = not found.problems
    if usable:
        check_devices(found, config)
    check_memory(found, config)
    check_folders(found, config)
    if usable:
        check_data(found, config)
        check_arch(found, config)
    print()
    for kind, texts in (("problem", found.problems), ("hint", found.hints)):
        for text in texts:
            tell(kind, text)
    can = "cannot start as things are" if found.problems else "can start here"
    print(f"A training of {config.model.arch} on {config.data.set} {can}.")
    return 1 if found.problems else 0


# ---- Python and packages ----


def check_packages(found: Findings) -> None:
    """Versions of Python, of what training needs, and of what other programs of this project can use."""
    tell("python", f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})")
    if sys.version_info < OLDEST_PYTHON:
        found.problems.append("Python is too old; make a virtual environment with Python 3.11 or later")
    for name, least in requirements(PROJECT / "requirements.txt").items():
        version = installed_version(name)
        tell(name, version or "not installed")
        if version is None:
            found.problems.append(f"{name} is not installed; run `python -m pip install -r requirements.txt`")
        elif numbers(version) < numbers(least):
            found.problems.append(
                f"{name} {version} is older than {least}; run `python -m pip install -U -r requirements.txt`"
            )
    optional = {name: installed_version(name) for name in requirements(PROJECT / "requirements-extra.txt")}
    if optional:
        tell("optional", ", ".join(f"{name} {version or 'not installed'}" for name, version in optional.items()))
    for name in ("torch", "torchvision"):
        try:
            if installed_version(name) is not None:
                importlib.import_module(name)
        except Exception as error:  # a library that does not fit raises ImportError, OSError, RuntimeError, ...
            reason = " ".join(str(error).split())
            found.problems.append(
                f"{name} cannot be imported ({reason}); install torch and torchvision again, together"
            )
            return


def requirements(path: Path) -> dict[str, str]:
    """The packages that a requirements file names, and the least version of each; "0" where it says none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    named = (re.match(r"([A-Za-z0-9._-]+)(?:.*?>=\s*([0-9.]+))?", line) for line in lines if line[:1].isalpha())
    return {match[1]: match[2] or "0" for match in named}


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, such as (2, 14, 1) of 2.14.1+cpu."""
    return tuple(map(int, re.match(r"\d+(?:\.\d+)*", version)[0].split(".")))


# ---- processor and GPUs ----


def check_devices(found: Findings, config: Config) -> None:
    """Operating system, processor, threads and GPUs, and whether the device that the options name is there."""
    import torch

    from trainers.devices import device_name, find_device, gpus_to_start, thread_words
    from utils.run.folder import environment_facts

    device = torch.device("cpu")
    try:
        count = gpus_to_start(config)
        device = device if count else find_device(config)
        chosen = f"{count} processes, on the GPUs {config.run.multigpu}" if count else device_name(device)
    except UserError as error:
        found.problems.append(str(error))
        chosen = "none"
    facts = environment_facts("cpu")
    has_bf16 = [flag for flag in BF16_FLAGS if flag in facts["cpu_flags"]]
    bf16 = f"has instructions of its own ({', '.join(has_bf16)})" if has_bf16 else "has no instructions and is slow"
    tell("system", facts["platform"])
    tell(
        "processor",
        facts["cpu"] or "unknown",
        f"instructions: {' '.join(facts['cpu_flags']) or 'unknown'}; torch uses {facts['cpu_capability']}",
        f"bf16 {bf16}",
    )
    threads = os.environ.get("OMP_NUM_THREADS")
    tell(
        "cores",
        f"{usable_cores()} of {facts['cpu_count']}; torch computes in {thread_words(facts['num_threads'])}"
        + (f" (OMP_NUM_THREADS is {threads})" if threads else ""),
    )
    tell("GPUs", *(gpus() or [f"none: {why_no_gpu()}"]))
    tell("trains on", f"{chosen} (--device {config.run.device})")
    if config.train.precision == "bf16" and device.type == "cpu" and not has_bf16:
        found.hints.append("--precision bf16 has no instructions of its own on this processor; fp32 is faster")


def usable_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """Every GPU that torch can use, with its memory."""
    import torch

    lines = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        capability = (facts.major, facts.minor)
        free, total = torch.cuda.mem_get_info(number)
        bf16 = "bf16 has instructions of its own" if capability >= BF16_CAPABILITY else "bf16 is slow"
        lines.append(
            f"cuda:{number}: {facts.name}, {size(free)} free of {size(total)}, compute capability "
            f"{facts.major}.{facts.minor}, {bf16}"
        )
    return lines


def why_no_gpu() -> str:
    """Why torch can use no GPU."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return "torch was built without CUDA"
    try:
        torch.cuda.init()
        reason = "torch finds no GPU"
    except Exception as error:  # torch has no kind of its own for a missing driver
        reason = " ".join(str(error).split()).partition(". ")[0]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"{reason} (torch was built for CUDA {torch.version.cuda})" + (
        "" if hidden is None else f", and CUDA_VISIBLE_DEVICES is {hidden!r}"
    )


# ---- memory and disks ----


def check_memory(found: Findings, config: Config) -> None:
    """Main memory, and the shared memory through which processes that read images hand them over."""
    if memory := memory_bytes():
        available, total = memory
        tell("memory", f"{size(available)} free of {size(total)}")
    if SHARED_MEMORY.is_dir():
        usage = shutil.disk_usage(SHARED_MEMORY)
        tell("/dev/shm", f"{size(usage.free)} free of {size(usage.total)}")
        if usage.free < LITTLE_SHARED_MEMORY and config.data.workers and config.data.set in ("ImageFolder", "ImageNet"):
            found.hints.append(
                "/dev/shm is small for processes that read images; in a container start it with a larger one "
                "(docker run --shm-size 2g), or pass --workers 0"
            )


def memory_bytes() -> tuple[int, int] | None:
    """Bytes of main memory that are free and that there are, those of a container with a limit; None if unknown."""
    try:
        lines = MEMORY.read_text(encoding="ascii").splitlines()
        entries = {key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines)}
        available, total = entries["MemAvailable"], entries["MemTotal"]
    except (OSError, KeyError, ValueError, IndexError):
        return None
    try:
        limit, used = (int((CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit, which says "max"
        return available, total
    return min(available, max(0, limit - used)), min(total, limit)


def check_folders(found: Findings, config: Config) -> None:
    """Free space for runs and images, and whether a run folder can be made."""
    for option, name in (("--log-dir", config.run.log_dir), ("--data", config.data.data)):
        there = nearest_folder(Path(name))
        free = shutil.disk_usage(there).free
        missing = "" if Path(name).is_dir() else ", a folder that is not there yet"
        tell("disk" if option == "--log-dir" else "", f"{size(free)} free at {name} ({option}){missing}")
        if option == "--log-dir" and free < LITTLE_DISK:
            found.hints.append(
                f"less than 1 GiB is free for checkpoints at {name}; choose another place with --log-dir"
            )
    reason = why_not_writable(nearest_folder(Path(config.run.log_dir)))
    tell("run folder", f"{config.run.log_dir}: " + ("cannot be written" if reason else "can be written"))
    if reason:
        found.problems.append(
            f"no run folder can be made at {config.run.log_dir} ({reason}); choose another place with --log-dir"
        )


def nearest_folder(path: Path) -> Path:
    """The path itself, or what is there of it."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def why_not_writable(folder: Path) -> str:
    """Why a run could not write and lock files there; "" if it could."""
    try:
        import fcntl

        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as name, open(Path(name, "lock"), "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write("a few words")
    except ImportError:
        return "this operating system cannot lock files as Linux and macOS do"
    except OSError as error:
        return error.strerror or str(error)
    return ""


# ---- network ----


def check_arch(found: Findings, config: Config) -> None:
    """Whether the function is there that makes a network of the user's."""
    if not is_own(config.model.arch):
        return
    from models import check_found

    try:
        check_found(config.model.arch)
        tell("network", f"found: {config.model.arch}")
    except UserError as error:
        found.problems.append(str(error))


# ---- images ----


def check_data(found: Findings, config: Config) -> None:
    """Which sets are here, where they were looked for, and whether the one that the options name is among them."""
    from data.places import find_set

    root, wanted = Path(config.data.data), config.data.set
    width, label = max(map(len, SETS)), "data sets"
    for name in SETS:
        place = find_set(name, root, list_files=name == wanted)
        paths = (" or " if place.problem else " and ").join(map(shown, place.paths))
        tell(label, f"{name:{width}}  {'not in' if place.problem else 'found:'} {paths}")
        label = ""
        if place.problem and name == wanted:
            advice = "; a training tries to download them, or pass the folder that has them with --data"
            found.problems.append(place.problem + (advice if place.fetched else ""))


def shown(path: Path) -> str:
    """A path as short as it can be said from here."""
    absolute, here = path.absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)


def size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
