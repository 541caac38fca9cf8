"""What is in the folder of an exported network: its files, how they are written and how they are read again."""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError

FACTS = "model.json"
CODE = "model.py"
SAFETENSORS, STATE_DICT = "model.safetensors", "model.pt"
ONNX, PROGRAM = "model.onnx", "model.pt2"
CARD = "MODEL_CARD.md"
FORMAT = 1  # raise it when the meaning of an entry of model.json changes

READ_SAFETENSORS = """\
    from safetensors.torch import load_file

    tensors = load_file(Path(folder) / "model.safetensors")
"""
READ_STATE_DICT = """\
    tensors = torch.load(Path(folder) / "model.pt", weights_only=True)
"""


def has_package(name: str) -> bool:
    return find_spec(name) is not None


def weights_file() -> str:
    """The name of the file for weights: what it is depends on whether the package safetensors is installed."""
    return SAFETENSORS if has_package("safetensors") else STATE_DICT


def weights_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of such a file."""
    if weights_file() == SAFETENSORS:
        from safetensors.torch import save

        return save(dict(tensors))
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    return buffer.getvalue()


def code(network_source: str, title: str, image_shape: tuple[int, int, int], num_classes: int) -> str:
    """The text of model.py.

    Args:
        network_source: the class `Network`.
        title: one sentence on what it is.
    """
    shape = ", ".join(map(str, image_shape))
    functional = "import torch.nn.functional as F\n" if "F." in network_source else ""
    return f'''"""{title}

    from model import load

    network = load()          # in eval mode, with the weights beside this file
    logits = network(images)  # (B, {shape}) float32, prepared as model.json says -> (B, {num_classes})
"""

from __future__ import annotations

from pathlib import Path

import torch
{functional}from torch import Tensor, nn


{network_source}

def load(folder: str | Path = Path(__file__).parent, device: str = "cpu") -> Network:
    """The trained network, in eval mode."""
{READ_SAFETENSORS if weights_file() == SAFETENSORS else READ_STATE_DICT}\
    network = Network()
    network.load_state_dict(tensors)
    return network.to(device).eval()


if __name__ == "__main__":
    network = load()
    logits = network(torch.zeros(1, {shape}))
    count = sum(parameter.numel() for parameter in network.parameters())
    print(f"{{count:,}} parameters; images ({shape}) -> {{logits.shape[1]}} classes")
'''


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of model.json.

    Raises: UserError if the folder is not one that the export has written, or a newer version has.
    """
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = None
    if not isinstance(facts, dict) or "format" not in facts:
        raise UserError(
            f"{folder} is no exported network: it has no readable {FACTS}; give the folder that "
            "`python -m tools.export RUN` has written"
        )
    if facts["format"] > FORMAT:
        raise UserError(
            f"{folder} was exported in format {facts['format']}, and this version reads format {FORMAT}; update the "
            "project, or export the run again"
        )
    return facts


def read_network(folder: Path) -> nn.Module:
    """The network of an exported folder, in eval mode on the CPU. Runs the folder's own model.py.

    Raises: UserError if it cannot be read.
    """
    try:
        return runpy.run_path(str(folder / CODE), run_name="exported_network")["load"](folder)
    except ModuleNotFoundError as error:
        raise UserError(f"{folder / CODE} needs {error.name}; run `python -m pip install {error.name}`") from error
    except Exception as error:  # anybody may have edited the file, and damaged weights have many errors
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"the network in {folder} cannot be read ({reason}); export the run again") from error


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` at the end; after an error nothing has changed.

    Raises: UserError if there is something in the place that is not an export, or it cannot be written.
    """
    if folder.exists() and not (folder / FACTS).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an exported network; give another folder with --to")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        temporary.chmod(0o777 & ~_umask())
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; give another folder with --to") from error
    try:
        yield temporary
        old = temporary.with_name(temporary.name + ".old")
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; give another folder with --to") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
