"""The folder of one run: where it lies, who may write into it, and the facts and results kept in it.

<log_dir>/<config_stem>/<name>/prune_rate=<keep_ratio>/        the first run, as in the released code
<log_dir>/<config_stem>/<name>/prune_rate=<keep_ratio>/1/      the second, and so on
    config.yaml  command.txt  env.json  results.csv  scores.npz  events.out.tfevents.*  checkpoints/
"""

import csv
import importlib.metadata
import io
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from utils.errors import UserError
from utils.options import shown
from utils.ranks.launch import rank_here
from utils.run.checkpoint import BEST, LAST
from utils.run.progress import announce

PROJECT_FOLDER = Path(__file__).resolve().parents[2]
CPU_INFO = Path("/proc/cpuinfo")
LONGEST_NAME = 255  # bytes of a file name on nearly all file systems

# What decides the speed and the rounding of a matrix product; /proc/cpuinfo lists some hundred more.
CPU_FLAGS = [
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "sve", "i8mm", "bf16"),
]


# ---- Where a run lies ----


def create_run_folder(log_dir: str | Path, config_stem: str, name: str, keep_ratio: float, *, config_yaml: str) -> Path:
    """Make the folder of a new run, with config.yaml and `checkpoints/`; never one that another run has.

    `os.mkdir` decides: of several processes that ask for the same folder exactly one gets it, the others
    go on to the next number. Only a folder with `checkpoints/` counts as a run, so config.yaml is there first: a run
    that is killed a moment later can start afresh with its options.

    Args:
        config_yaml: text of config.yaml.
    Raises: UserError if `config_stem` or `name` is not a plain folder name, or the folder cannot be made.
    """
    base = base_folder(log_dir, config_stem, name, keep_ratio)
    folder = base
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                folder.mkdir()
                break
            except FileExistsError:
                # One above the highest, not the first gap: then the highest is always the newest.
                folder = base / str(max(_repeats(base), default=0) + 1)
        _replace_text(folder / "config.yaml", config_yaml)
        (folder / "checkpoints").mkdir()
    except OSError as error:
        raise UserError(
            f"cannot make the run folder {folder}: {error.strerror}; choose another place with --log-dir"
        ) from error
    return folder


def base_folder(log_dir: str | Path, config_stem: str, name: str, keep_ratio: float) -> Path:
    """The folder that the first run of this configuration has, and below which later ones are numbered.

    Raises: UserError if `config_stem` or `name` is not a plain folder name.
    """
    for label, part in (("config", config_stem), ("name", name)):
        too_long = len(os.fsencode(part)) > LONGEST_NAME
        if part in ("", ".", "..") or "/" in part or "\\" in part or not part.isprintable() or too_long:
            raise UserError(
                f"{label} must be a plain folder name, got {shown(part)}; it becomes one folder below {log_dir}, so "
                f"leave out slashes and use at most {LONGEST_NAME} bytes"
            )
    return Path(log_dir) / config_stem / name / f"prune_rate={keep_ratio:g}"


def resolve_run(path: str | Path, wanted: Sequence[str] = (LAST,)) -> tuple[Path, Path]:
    """Find the run folder and the checkpoint file that `path` means.

    A file means itself. A folder means the newest run in it: of numbered runs the one with the highest number, of a
    folder above them the run that has saved last. If there are several, a line on standard error says which was taken.
    So only its files lead to the first of several numbered runs.

    Args:
        path: a run folder, a folder above several runs, or a checkpoint file inside a run folder.
        wanted: names of checkpoint files; of a run folder the first that exists is taken.
    Returns: (run folder, checkpoint file); both exist.
    Raises: UserError if one of them does not.
    """
    folder, file = find_folder(path)
    if file is not None:
        return folder, file
    for name in wanted:
        if (file := folder / "checkpoints" / name).is_file():
            return folder, file
    others = sorted(file.name for file in folder.glob("checkpoints/*.pt"))
    found = f"it has {', '.join(others)}" if others else "it has no checkpoint at all"
    raise UserError(f"{folder} has no checkpoints/{wanted[-1]} ({found}); give a run folder or a checkpoint file")


def find_folder(path: str | Path) -> tuple[Path, Path | None]:
    """The run folder that `path` means, as in `resolve_run`, and the checkpoint file if it is one.

    Raises: UserError if there is no such file or folder.
    """
    path = Path(path)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError) as error:  # such as a name that is too long
        raise UserError(f"{str(path)[:80]!r} is not a path ({error.__class__.__name__}); give a run folder") from error
    if is_file and path.absolute().parent.name == "checkpoints":
        return (path if path.parent.name == "checkpoints" else path.absolute()).parent.parent, path
    if is_file:
        raise UserError(
            f"{path} is not in the checkpoints/ folder of a run; give a run folder, "
            "or a file such as RUN/checkpoints/last.pt"
        )
    if not is_folder:
        raise UserError(f"{path} does not exist; give a run folder or a checkpoint file inside one")
    return _newest_run(path), None


def checkpoint_of(folder: str | Path, name: str) -> str:
    """The path by which a message names a run: also where its folder means a newer one, this file means itself."""
    return str(Path(folder) / "checkpoints" / name)


def no_result_yet(folder: str | Path) -> str:
    """Why a run folder with a last.pt has no best.pt, and what to do."""
    return (
        f"the run in {folder} has no checkpoints/{BEST} yet: it is written once a subnet has been chosen; finish the "
        f"run with `python main.py --resume {checkpoint_of(folder, LAST)}`"
    )


def _newest_run(path: Path) -> Path:
    """The newest run in a folder, which is announced if there are others; the folder itself if there is none."""
    numbers = [number for number in _repeats(path) if (path / str(number) / "checkpoints").is_dir()]
    is_run = (path / "checkpoints").is_dir()
    if numbers:
        newest, count = path / str(max(numbers)), len(numbers) + is_run
        why = f"the newest of {count} runs in {path}, by its number"
    elif is_run:
        return path
    else:
        saved = {file.parent.parent: file.stat().st_mtime_ns for file in path.glob(f"**/checkpoints/{LAST}")}
        if not saved:
            return path
        newest, count = max(saved, key=saved.__getitem__), len(saved)
        why = f"the newest of {count} runs in {path}, by the time of its {LAST}"
    if count > 1 and rank_here() == 0:
        announce(f"taking {newest}, {why}", sys.stderr)  # standard output may be a config to train from
    return newest


def _repeats(base: Path) -> list[int]:
    """Numbers of the repeated runs below the first one."""
    if not base.is_dir():
        return []
    return [int(entry.name) for entry in base.iterdir() if entry.name.isdecimal() and entry.is_dir()]


# ---- What it was: configuration, command, environment ----


def write_facts(
    folder: str | Path, *, config_yaml: str, command: Sequence[str], environment: Mapping[str, Any]
) -> None:
    """Write config.yaml and env.json of the latest start, and one line for each start in command.txt."""
    folder = Path(folder)
    _replace_text(folder / "config.yaml", config_yaml)
    write_json(folder / "env.json", dict(environment))
    with open(folder / "command.txt", "a", encoding="utf-8") as file:
        file.write(shlex.join(command) + "\n")


def environment_facts(device: torch.device | str) -> dict[str, Any]:
    """What a result can depend on besides configuration and seed: versions, code, processor, GPU.

    A list of named facts, never a copy of the environment variables: those hold secrets.
    """
    commit, dirty = _git_state()
    cpu_model, cpu_flags = _cpu_facts()
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _package_version("torchvision"),
        "numpy": numpy.__version__,
        "git_commit": commit,
        "git_dirty": dirty,
        "platform": platform.platform(),
        "cpu": cpu_model,
        "cpu_flags": cpu_flags,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": None,
        "gpu_driver": None,
        "cuda": torch.version.cuda,
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        drivers = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["gpu_driver"] = drivers.splitlines()[0] if drivers else None
    return facts


def _git_state() -> tuple[str | None, bool | None]:
    """Commit of the project and whether tracked files differ from it; twice None outside its checkout."""
    git = ("git", "--no-optional-locks", "-C", str(PROJECT_FOLDER))
    top = _output_of(*git, "rev-parse", "--show-toplevel")
    # A copy of the project inside some other repository must not claim that one's commit.
    if top is None or Path(top).resolve() != PROJECT_FOLDER:
        return None, None
    commit = _output_of(*git, "rev-parse", "--verify", "HEAD")
    changes = _output_of(*git, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None, None
    return commit, changes != ""


def _output_of(*command: str) -> str | None:
    """Standard output of a command; None if it is not installed, fails or takes longer than ten seconds."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_facts() -> tuple[str, list[str]]:
    """Name of the processor and those of CPU_FLAGS that it has (none are known outside Linux).

    Virtual machines give generations of very different speed one name, so family and model (x86) are part of it.
    """
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # Every core repeats its lines; on x86 the line is called "flags", on ARM "Features".
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (entries.get("flags") or entries.get("Features") or "").split()
    name = entries.get("model name") or platform.processor()
    if "cpu family" in entries and "model" in entries:
        name = f"{name}, family {entries['cpu family']} model {entries['model']}"
    return name, [flag for flag in CPU_FLAGS if flag in flags]


# ---- What came out: tables and summaries ----


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV table whole, with the columns of its first row; a reader sees the old content or the new."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _replace_text(Path(path), text.getvalue())


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file; a reader sees the old content or the new, never half of it."""
    _replace_text(Path(path), json.dumps(content, indent=2) + "\n")


def write_arrays(path: str | Path, arrays: Mapping[str, numpy.ndarray]) -> None:
    """Write named arrays as an .npz file; a reader sees the old content or the new, never half of it."""
    buffer = io.BytesIO()
    numpy.savez(buffer, **arrays)
    _replace(Path(path), buffer.getvalue())


def _replace_text(path: Path, text: str) -> None:
    _replace(path, text.encode())


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)
