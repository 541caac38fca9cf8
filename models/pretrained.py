"""Starting weights from a file or from torchvision."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models

from utils.errors import UserError

TRAINED_LIKE_THIS = "use the arch, width_mult, set and image size they were trained with"


def load_pretrained(model: nn.Module, source: str) -> None:
    """Copies trained weights into a network.

    Scores are not taken over: a run starts its own search. A dense checkpoint fits a masked network and vice versa.

    Args:
        model: from `models.build_model`.
        source: path of a checkpoint of this project or of a plain state dict, or a name of torchvision's classification
            weights, such as `ResNet50_Weights.IMAGENET1K_V2`; a file goes before a name.
    Raises: UserError if there are no such weights, they cannot be read or downloaded, or do not fit.
    """
    state = _from_file(model, source) if os.path.exists(source) else _from_torchvision(model, source)
    model.load_state_dict(_comparable(state), strict=False)


def _refuse(source: str, reason: str) -> NoReturn:
    raise UserError(f"--pretrained {source}: {reason}")


def _from_file(model: nn.Module, path: str) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has a different exception for each kind of damage
        raise UserError(
            f"--pretrained {path}: not a readable checkpoint or state dict ({type(error).__name__}); "
            "pass a file written by this project or by torch.save(model.state_dict(), path)"
        ) from error
    _refuse_shrunk(state, path)
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        _refuse(path, "holds no state dict; pass torch.save(model.state_dict(), path)")
    _check_fit(model, state, path, TRAINED_LIKE_THIS)
    return state


def _refuse_shrunk(state: Any, path: str) -> None:
    stored = state.get("stored_units") if isinstance(state, dict) else None
    if isinstance(stored, Tensor) and not stored.all():
        num_gone = int((~stored).sum())
        _refuse(
            path,
            f"the weights of {num_gone} of {len(stored)} units of that run are gone, because it shrank while it "
            "trained; go on with the run itself (--resume), or repeat it with --no-shrink and pass its checkpoint",
        )


def torchvision_weights() -> dict[str, str]:
    """All names of torchvision's classification weights, each with the name of its network."""
    return {
        f"{enum.__name__}.{member}": network
        for network in torchvision_models.list_models(module=torchvision_models)
        for enum in [torchvision_models.get_model_weights(network)]
        for member in enum.__members__
    }


def _from_torchvision(model: nn.Module, name: str) -> Mapping[str, Tensor]:
    networks = torchvision_weights()
    if name not in networks:
        by_lower_case = {known.lower(): known for known in networks}
        nearest = [by_lower_case[close] for close in get_close_matches(name.lower(), by_lower_case, n=3)]
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else "one is ResNet50_Weights.DEFAULT"
        _refuse(name, f"there is no such file, and torchvision has no weights of this name; {hint}")
    with torch.device("meta"):  # shapes are enough to refuse before a download
        theirs = torchvision_models.get_model(networks[name], weights=None)
    made_for = f"they are for torchvision's {networks[name]}: width_mult 1, large images in colour"
    _check_fit(model, theirs.state_dict(), name, made_for)
    weights = torchvision_models.get_weight(name)
    try:
        return weights.get_state_dict(map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # no network, no such page, no space, a wrong checksum, a damaged file in the cache
        raise UserError(
            f"--pretrained {name}: {weights.url} could not be downloaded to or read from {torch.hub.get_dir()} "
            f"({type(error).__name__}: {error}); try again, or fetch the file elsewhere and pass its path"
        ) from error


def _comparable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights and statistics. The counters of batch-norms play no part, and older files lack them."""
    return {name: value for name, value in state.items() if not name.endswith((".scores", ".num_batches_tracked"))}


def _check_fit(model: nn.Module, state: Mapping[str, Tensor], source: str, hint: str) -> None:
    given, wanted = _comparable(state), _comparable(model.state_dict())
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is unknown" for name in given if name not in wanted]
    misfits = [name for name in wanted if name in given and given[name].shape != wanted[name].shape]
    if not problems and misfits and all(name.rpartition(".")[0] == model.head for name in misfits):
        num_given, num_wanted = (len(weights[misfits[0]]) for weights in (given, wanted))
        reason = f"the weights tell {num_given} classes apart, but the data has {num_wanted}"
        _refuse(source, f"{reason}; use data of {num_given} classes, or start without --pretrained")
    problems += [
        f"{name} has shape {tuple(given[name].shape)}, the network {tuple(wanted[name].shape)}" for name in misfits
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        _refuse(source, f"the weights do not fit this network ({'; '.join(problems[:3])}{more}); {hint}")
