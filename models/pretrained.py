"""Starting weights from a file or from torchvision."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models

from models.weight_files import check_finite, read_file, weights_in
from utils.errors import UserError
from utils.run.folder import BEST, LAST, no_result_yet, resolve_run
from utils.run.progress import announce

PRETRAINED, WIDTHS_OF = "--pretrained", "--widths-of"  # the options that name a source
TRAINED_LIKE_THIS = "use the arch, width_mult, set and image size they were trained with"


@dataclass(frozen=True)
class SubnetOfRun:
    """The subnet of a run as a start: its best.pt.

    Attributes:
        source: the file.
        state: its content.
        option: the one that named it.
    """

    source: str
    state: dict[str, Any]
    option: str = PRETRAINED

    def refuse(self, reason: str) -> NoReturn:
        _refuse(self.source, reason, self.option)


def find_subnet(source: str) -> SubnetOfRun | None:
    """The subnet that `source` stands for: of a run whose dropped units leave its parameters.

    That is every run of a masked method with `shrink` on, as it is by default, whether units have left yet or not. A
    run with --no-shrink, a dense run and a plain state dict stand for all of their weights instead.

    Args:
        source: a run folder, which means its best.pt, a folder above several runs, or a checkpoint file.
    Returns: None if `source` stands for all weights of a file or of torchvision.
    Raises: UserError if there is no such file, it cannot be read, or it has no subnet yet.
    """
    if not os.path.exists(source):
        return None
    path = _file_of(source)
    state = read_file(path, PRETRAINED)
    units = state.get("stored_units") if isinstance(state, dict) else None
    if not isinstance(units, Tensor) or not len(units):
        return None
    config = state.get("config", {})
    shrinks = config.get("method") not in ("dense", "released") and config.get("execution") == "compact"
    if units.all() and not (shrinks and config.get("shrink", True)):
        return None
    if "weight_optimizer" in state or state.get("subnet") is None:
        _refuse(
            path,
            "it holds a run to go on with, whose dropped units leave it, and not its result; pass the run folder or "
            "its checkpoints/best.pt",
        )
    return SubnetOfRun(path, state)


def find_choice(source: str) -> SubnetOfRun:
    """The subnet that a run chose, for `--widths-of`, which takes no weights of it.

    Args:
        source: as that of `find_subnet`.
    Raises: UserError if there is no such file, it cannot be read, or it holds no subnet that another network can have.
    """
    if not os.path.exists(source):
        _refuse(source, "does not exist; pass a run folder or its checkpoints/best.pt", WIDTHS_OF)
    path = _file_of(source, WIDTHS_OF)
    state = read_file(path, WIDTHS_OF)
    if not isinstance(state, dict) or not {"config", "stored_units"} <= state.keys():
        _refuse(path, "it is no checkpoint of a run; pass a run folder or its checkpoints/best.pt", WIDTHS_OF)
    method = state["config"].get("method")
    if method in ("dense", "released"):
        why = "keeps all channels that it starts with" if method == "dense" else "computes its dropped channels too"
        _refuse(path, f"method {method} {why}; pass a run of another method", WIDTHS_OF)
    if "weight_optimizer" in state or state.get("subnet") is None:
        _refuse(
            path,
            "it holds a run to go on with, and not its result; pass the run folder or its checkpoints/best.pt",
            WIDTHS_OF,
        )
    return SubnetOfRun(path, state, WIDTHS_OF)


def load_pretrained(model: nn.Module, source: str) -> None:
    """Copies all trained weights of a source into a network of the same shapes.

    Scores are not taken over: a run starts its own search. A dense checkpoint fits a masked network and vice versa.

    Args:
        model: from `models.build_model`.
        source: path of a run, of a checkpoint of this project or of a file that holds a state dict
            (`models.weight_files` says which are read), or a name of torchvision's classification weights, such as
            `ResNet50_Weights.IMAGENET1K_V2`; a file goes before a name.
    Raises: UserError if there are no such weights, they cannot be read or downloaded, or do not fit.
    """
    if os.path.exists(source):
        path = _file_of(source)
        state = weights_in(read_file(path, PRETRAINED), model.state_dict(), path, PRETRAINED)
        take_over(model, _with_head_of(model, state), path)
    else:
        _load_from_torchvision(model, source)


def take_over(model: nn.Module, state: Mapping[str, Tensor], source: str, hint: str = TRAINED_LIKE_THIS) -> None:
    """Copies weights and statistics into a network of the same shapes.

    If the head tells another number of classes apart, it keeps the weights it has, and that is announced.

    Raises: UserError for any other misfit, and for values that are not finite.
    """
    _check_fit(model, state, source, hint)
    check_finite(_comparable(state), source, PRETRAINED)
    if left_out := _other_classes(model, state):
        given, wanted = (len(weights[left_out[0]]) for weights in (state, model.state_dict()))
        announce(
            f"{source} tells {given} classes apart and the data have {wanted}, so layer {model.head_name} starts anew"
        )
    model.load_state_dict({k: v for k, v in _comparable(state).items() if k not in left_out}, strict=False)


def _refuse(source: str, reason: str, option: str = PRETRAINED) -> NoReturn:
    raise UserError(f"{option} {source}: {reason}")


def _file_of(source: str, option: str = PRETRAINED) -> str:
    """A run folder means its result."""
    if not os.path.isdir(source):
        return source
    folder, file = resolve_run(source, (BEST, LAST))
    if file.name == LAST:
        _refuse(source, no_result_yet(folder), option)
    return str(file)


def torchvision_weights() -> dict[str, str]:
    """All names of torchvision's classification weights, each with the name of its network."""
    return {
        f"{enum.__name__}.{member}": network
        for network in torchvision_models.list_models(module=torchvision_models)
        for enum in [torchvision_models.get_model_weights(network)]
        for member in enum.__members__
    }


def _load_from_torchvision(model: nn.Module, name: str) -> None:
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
        state = weights.get_state_dict(map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # no network, no such page, no space, a wrong checksum, a damaged file in the cache
        raise UserError(
            f"--pretrained {name}: {weights.url} could not be downloaded to or read from {torch.hub.get_dir()} "
            f"({type(error).__name__}: {error}); try again, or fetch the file elsewhere and pass its path"
        ) from error
    take_over(model, state, name, made_for)


def _comparable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights and statistics. Older files lack the counters of batch-norms, and scores start anew.

    The released code keeps its masks beside its scores.
    """
    left_out = (".scores", ".num_batches_tracked", ".subnet", ".stored_mask_0", ".stored_mask_1")
    return {name: value for name, value in state.items() if not name.endswith(left_out)}


def _with_head_of(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights; a 1x1 convolution and a linear layer are two forms of one classifier."""
    name = f"{model.head_name}.weight"
    mine, given = model.state_dict().get(name), state.get(name)
    if mine is None or given is None or {mine.dim(), given.dim()} != {2, 4}:
        return state
    if given.shape[1] != mine.shape[1] or given[0].numel() != mine[0].numel():
        return state
    return {**state, name: given.reshape(-1, *mine.shape[1:])}


def _check_fit(model: nn.Module, state: Mapping[str, Tensor], source: str, hint: str) -> None:
    given, wanted = _comparable(state), _comparable(model.state_dict())
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is unknown" for name in given if name not in wanted]
    others = _other_classes(model, given)
    misfits = [n for n in wanted if n in given and n not in others and given[n].shape != wanted[n].shape]
    problems += [
        f"{name} has shape {tuple(given[name].shape)}, the network {tuple(wanted[name].shape)}" for name in misfits
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        _refuse(source, f"the weights do not fit this network ({'; '.join(problems[:3])}{more}); {hint}")


def _other_classes(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """The parameters of the head, if it fits but for the number of classes."""
    if not model.head_name:  # no single layer makes the logits of this network
        return []
    wanted = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] == model.head_name}
    if any(name not in state or state[name].shape[1:] != value.shape[1:] for name, value in wanted.items()):
        return []
    return [name for name, value in wanted.items() if len(state[name]) != len(value)]
