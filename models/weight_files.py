"""Files of weights as people have them: what they wrap the weights in is taken off, and code in them never runs."""

from __future__ import annotations

import argparse
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.paths import kind_of
from utils.run.progress import announce

# Where training programs keep a network's weights, beside an optimizer or an epoch; the first of these is taken.
WEIGHT_KEYS = ("model", "state_dict", "net", "model_state_dict", "model_state", "network", "weights", "params")
# What torch.nn.DataParallel, DistributedDataParallel and torch.compile put into the names of the layers they wrap.
WRAPPERS = ("module", "_orig_mod")
# Not of a network: the counter of torch.optim.swa_utils.AveragedModel.
NOT_WEIGHTS = ("n_averaged",)

HOW_TO_SAVE = "pass a file written by this project or by torch.save(model.state_dict(), path)"


def read_file(path: str, option: str) -> Any:
    """The content of a file that torch.save or safetensors has written.

    Objects that only hold values, such as an argparse.Namespace beside the weights, are read too.

    Args:
        option: the one that named the file, for messages.
    Raises: UserError naming what is wrong: no file, damage, a class whose code would have to run.
    """

    def refuse(reason: str) -> UserError:
        return UserError(f"{option} {path}: {reason}")

    if kind := kind_of(path):
        raise refuse(f"it is {kind} and no file; {HOW_TO_SAVE}")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not notice a flipped bit in a tensor
            if damaged is not None:
                raise refuse(f"it is damaged (wrong checksum in {damaged}); fetch or write it again")
            return _load(path)
        # behind the length of its header; a pickle does not start like this
        content = _read_safetensors(path, refuse) if start[8:] == b"{" else _load(path)
        announce(f"warning: {path} has no checksums, so a damaged number in it would not be noticed")
        return content
    except UserError:
        raise
    except Exception as error:  # torch.load has a different exception for each kind of damage
        if named := re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error)):
            raise refuse(
                f"it holds an object of the class {named[1]}, and reading that could run code. Where the file comes "
                "from, load it and save the weights alone, with torch.save(model.state_dict(), path)"
            ) from error
        if "TorchScript" in str(error):
            raise refuse(f"it is a TorchScript program and not a state dict; {HOW_TO_SAVE}") from error
        raise refuse(f"not a readable checkpoint or state dict ({type(error).__name__}); {HOW_TO_SAVE}") from error


def weights_in(content: Any, names: Iterable[str], path: str, option: str) -> dict[str, Tensor]:
    """The state dict in a file's content, with the names of a network.

    What wraps it is taken off, and a line says so: a dictionary that has it under one of `WEIGHT_KEYS`, a `WRAPPERS`
    part anywhere in a name, and a first part that all names share, such as that of a Lightning module.

    Args:
        content: of `read_file`.
        names: of all parameters and statistics of the network.
    Raises: UserError if there is no state dict, or its weights are not all finite.
    """
    state, taken_off = content, []
    keys = WEIGHT_KEYS if isinstance(content, dict) else ()
    key = next((key for key in keys if _is_state_dict(content.get(key))), None)
    if key is not None:
        state = content[key]
        if key != "model":  # that of this project needs no mention
            taken_off.append(f"the key {key!r}")
    if not _is_state_dict(state):
        raise UserError(
            f"{option} {path}: holds no state dict; {_found(content)}pass torch.save(model.state_dict(), path)"
        )
    state = {name: value for name, value in state.items() if name not in NOT_WEIGHTS}
    wanted = set(names)
    inner = {name: _without_wrappers(name, wanted) for name in state}
    if len(set(inner.values())) == len(inner):
        parts = {part for name in state if inner[name] != name for part in name.split(".") if part in WRAPPERS}
        taken_off += [f"{part}." for part in WRAPPERS if part in parts]
        state = {inner[name]: value for name, value in state.items()}
    first, *others = {name.partition(".")[0] for name in state}
    if not others and not any(name.startswith(f"{first}.") for name in wanted):
        state = {name.partition(".")[2]: value for name, value in state.items()}
        taken_off.append(f"{first}.")
    if taken_off:
        announce(f"{path}: reading the weights without {' and '.join(taken_off)}")
    return state


def check_finite(state: Mapping[str, Tensor], path: str, option: str) -> None:
    """Raises UserError for values that no training ends with: NaN, infinite, a negative variance, whole numbers."""
    for name, value in state.items():
        reason = ""
        if not value.is_floating_point():
            reason = f"is of type {str(value.dtype).removeprefix('torch.')}, not floating point"
        elif bad := int((~value.float().isfinite()).sum()):
            reason = f"has {bad:,} of {value.numel():,} values that are NaN or infinite in float32"
        elif name.endswith("running_var") and bool((value < 0).any()):
            reason = "has negative values, which no variance has"
        if reason:
            raise UserError(
                f"{option} {path}: {name} {reason}, so no training can start from it; pass weights of a state from "
                "before that"
            )


def _load(path: str) -> Any:
    with torch.serialization.safe_globals(_values_only()):
        return torch.load(path, map_location="cpu", weights_only=True)


def _values_only() -> list[Any]:
    """Classes that training programs save beside their weights and that do nothing but hold values."""
    number = np.float64(0).__reduce__()[0]  # the function that makes numpy's numbers, in this version and before
    dtypes = [getattr(np.dtypes, name) for name in dir(np.dtypes) if name.endswith("DType")]
    return [argparse.Namespace, pathlib.PosixPath, np.dtype, *dtypes, number, (number, "numpy.core.multiarray.scalar")]


def _read_safetensors(path: str, refuse: Callable[[str], UserError]) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError:
        raise refuse(
            "it is a safetensors file, and the package safetensors is not installed; run `python -m pip install "
            "safetensors`"
        ) from None
    return load_file(path)


def _is_state_dict(content: Any) -> bool:
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())


def _without_wrappers(name: str, wanted: set[str]) -> str:
    """A name without the parts that wrappers add, unless the network has it as it is."""
    return name if name in wanted else ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _found(content: Any) -> str:
    """What there is instead, for a message."""
    if not isinstance(content, dict):
        return f"it is a {type(content).__name__}; "
    keys = [repr(key) for key in content]
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"it has the keys {', '.join(keys[:5])}{more}, and weights are looked for under {', '.join(WEIGHT_KEYS)}; "
