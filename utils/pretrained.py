"""Starting weights from a file."""

from __future__ import annotations

import torch
from torch import nn

from utils.errors import UserError


def load_pretrained(model: nn.Module, path: str) -> None:
    """Copies the weights of a checkpoint of this project, or of a plain state dict, into a network.

    Scores are not taken over: a run starts its own search. A dense checkpoint fits a masked network and vice versa.

    Raises: UserError if the file cannot be read or its weights do not fit.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--pretrained {path}: there is no such file") from None
    except Exception as error:  # torch.load has a different exception for each kind of damage
        raise UserError(
            f"--pretrained {path}: not a readable checkpoint or state dict ({type(error).__name__}); "
            "pass a file written by this project or by torch.save(model.state_dict(), path)"
        ) from error
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"--pretrained {path}: holds no state dict; pass torch.save(model.state_dict(), path)")
    wanted = {name: value for name, value in model.state_dict().items() if not name.endswith(".scores")}
    given = {name: value for name, value in state.items() if not name.endswith(".scores")}
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is unknown" for name in given if name not in wanted]
    problems += [
        f"{name} has shape {tuple(given[name].shape)}, the network {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in given and given[name].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"--pretrained {path}: the weights do not fit this network ({'; '.join(problems[:3])}{more}); "
            "use the arch, width_mult and set they were trained with"
        )
    model.load_state_dict(given, strict=False)
