"""Checkpoint files: written whole or not at all, checked before use, and never able to run code.

A state is made of dicts, lists, tuples, tensors, numbers, strings and None, so that it loads with
`weights_only=True`.
"""

import io
import os
import shlex
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch

from utils.errors import UserError

FORMAT_VERSION = 2  # raise it when the meaning of an entry changes
LAST_COMMIT_OF_FORMAT_1 = "f14d36b"

PARTIAL = ".pt.partial"
BEST, LAST, PREVIOUS = "best.pt", "last.pt", "previous.pt"  # the result; what a run is resumed from; the one before


class CheckpointError(OSError):
    """A checkpoint could not be written; the one before it is untouched, so the run may go on."""


class DamagedError(UserError):
    """A file is not whole, or is no checkpoint at all. Another file may be.

    Attributes:
        what: the message without its advice.
    """

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(f"{what}; {advice}" if advice else what)
        self.what = what


def save(path: str | Path, state: Mapping[str, Any], previous: Path | None = None) -> None:
    """Write a state so that `path` holds the old checkpoint or the new one, whenever the machine stops.

    Only one process may save into a folder: what an earlier crash left half written there is removed.

    Args:
        path: file to write, `*.pt`, in a folder that exists.
        state: nested state; `format_version` is added.
        previous: a file that keeps what `path` held until now.
    Raises: CheckpointError if the disk refuses, TypeError for an entry that `load` would refuse.
    """
    path = Path(path)
    _check_plain(state, "state")
    # Into memory first: then a full disk can only fail in a plain write, and the size needed is known.
    buffer = io.BytesIO()
    torch.save({**state, "format_version": FORMAT_VERSION}, buffer)
    temporary = path.with_name(path.stem + PARTIAL)
    try:
        for stray in path.parent.glob("*" + PARTIAL):
            stray.unlink()
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {error.strerror or error}; "
            f"it needs {buffer.getbuffer().nbytes:,} bytes and {_free_bytes(path.parent)} are free"
        ) from error


def load(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint, having checked every byte of it.

    Raises: UserError if the file is missing, made to run code, or written by another version; DamagedError, which is
        one, if it is not whole or no checkpoint of this project.
    """
    path = Path(path)
    try:
        return _load(path, map_location)
    except DamagedError as error:
        raise DamagedError(error.what, _advice(path)) from error


def _load(path: Path, map_location: str | torch.device) -> dict[str, Any]:
    """As `load`, but the message tells no remedy for a damaged file."""
    try:
        with open(path, "rb") as file:
            check_archive(file)
            file.seek(0)
            state = torch.load(file, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"the checkpoint {path} does not exist") from None
    except Exception as error:  # each kind of damage has its own; none may end in a traceback
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DamagedError(f"the checkpoint {path} is damaged or not from this project ({reason})") from error
    version = state.get("format_version") if isinstance(state, dict) else None
    if type(version) is not int:
        raise DamagedError(f"{path} is not a checkpoint of this project: it has no format_version")
    if version > FORMAT_VERSION:
        raise UserError(
            f"the checkpoint {path} has format version {version}, and this project reads version {FORMAT_VERSION}; "
            "update the project to use it"
        )
    if version < FORMAT_VERSION:
        raise UserError(
            f"the checkpoint {path} was written by an older version of this project, in format {version} instead of "
            f"{FORMAT_VERSION}; use it with commit {LAST_COMMIT_OF_FORMAT_1}, or make the run again"
        )
    return state


def check_archive(file: BinaryIO) -> None:
    """Raises: zipfile.BadZipFile if one of the checksums of a zip archive is wrong, or it is no such archive."""
    # torch.load does not notice a flipped bit in a tensor; the checksums of the zip archive do.
    damaged = zipfile.ZipFile(file).testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"wrong checksum in {damaged}")


def _advice(path: Path) -> str:
    """What to do about a damaged file. It names another one only if that is whole."""
    if path.parent.name != "checkpoints":
        return "pass a checkpoint of a run, or a folder with a run"
    others = [file for file in path.parent.glob("*.pt") if file != path]
    for file in sorted(others, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        with suppress(UserError):
            if "weight_optimizer" in _load(file, "cpu"):
                command = f"python main.py --resume {shlex.quote(str(file))}"
                if path.name == BEST:
                    return f"the same result is in {file.name}, and `{command}` writes {BEST} again"
                return f"`{command}` goes on from another checkpoint of this run"
    return "no other checkpoint in its folder can be resumed, so make the run again"


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Names of the entries of two nested states that are not bit-equal, such as "model.conv.weight".

    Types, shapes and precisions count; devices do not. NaN equals the same NaN, 0.0 differs from -0.0.
    """
    if type(a) is type(b) and isinstance(a, list | tuple) and len(a) == len(b):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return [] if _same_bits(a, b) else [prefix]
    names = []
    for key in [*a, *(key for key in b if key not in a)]:
        name = f"{prefix}.{key}" if prefix else str(key)
        if key in a and key in b:
            names += differences(a[key], b[key], name)
        else:
            names.append(name)
    return names


def restore_generator(generator: torch.Generator, state: torch.Tensor) -> None:
    """Sets a random generator to a saved state.

    Raises: UserError if the state was saved on another kind of device.
    """
    if state.numel() != generator.get_state().numel():
        raise UserError(
            f"the state of the random generator does not fit device {generator.device}; resume the run on the kind of "
            "device that it started on"
        )
    generator.set_state(state.cpu())


def _check_plain(value: Any, name: str) -> None:
    """Refuse while saving what `weights_only=True` would refuse when it is too late."""
    if isinstance(value, torch.Tensor):
        return
    if type(value) in (dict, OrderedDict):
        for key, entry in value.items():
            _check_plain(key, f"{name} key {key!r}")
            _check_plain(entry, f"{name}.{key}")
    elif type(value) in (list, tuple):
        for index, entry in enumerate(value):
            _check_plain(entry, f"{name}.{index}")
    # The exact type: numpy.float64 is a float to isinstance, and a refused class to torch.load.
    elif type(value) not in (int, float, bool, str, bytes, type(None)):
        raise TypeError(f"{name} is a {type(value).__name__}; a checkpoint holds only plain values and tensors")


def _keep(path: Path, previous: Path) -> None:
    """Gives a file a second name."""
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)  # `path` is there at any moment
    except OSError:  # a file system without hard links
        os.replace(path, previous)


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"


def _same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes_of(a), _bytes_of(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, numpy.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return bool(a == b)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
