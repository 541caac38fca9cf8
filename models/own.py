"""A network of the user's, made by a function that `--arch package.module:function` names. This runs the user's code.

A name that a checkpoint has stored is not enough to run code: the function must have been named in the running command,
see `allow`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError

PROJECT = Path(__file__).resolve().parents[1]
# What parameters of such functions are called, by what they are given.
PARAMETERS = {
    "num_classes": ("num_classes", "n_classes", "nclasses", "num_class", "classes", "class_num"),
    "in_channels": ("in_channels", "in_chans", "channels", "num_channels", "input_channels"),
    "image_size": ("image_size", "img_size", "input_size"),
    "width_mult": ("width_mult",),
}

_allowed: set[str] = set()


def allow(arch: str | None, origin: str = "command line") -> None:
    """Lets `build_own` run this code if the user has named it in the running command, or in a file that it names.

    Args:
        origin: where the name comes from, as in `args.Arguments`. A default, or a checkpoint, is not the user's word.
    """
    if arch is not None and origin != "default":
        _allowed.add(arch)


def build_own(arch: str, num_classes: int, in_channels: int, image_size: int, width_mult: float = 1.0) -> nn.Module:
    """The network that a user's function makes, with the weights that it gives it.

    The module is searched in the working folder first, then where Python finds installed packages. The function is
    called with the number of classes, and with channels, size and width factor if it has parameters of such names.

    Returns: a network on the CPU that has run once. Its attributes `head_name` and `conv_order` name the layer that
        makes the logits, "" if none does, and all its convolutions as they run.
    Raises: UserError if the code was not named in this command, cannot be found, fails, or makes something else than a
        network of these classes for such images.
    """
    if arch not in _allowed:
        raise UserError(
            f"the network {arch} is code, which runs only if this command names it; add --arch {arch} if you trust it"
        )
    with _imports_from(Path.cwd()):
        function = _found(arch)
        given = _arguments(arch, function, num_classes, in_channels, image_size, width_mult)
        try:
            model = function(*given.args, **given.kwargs)
        except (Exception, SystemExit) as error:
            raise UserError(f"arch {arch} could not be made: {_told(error)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"arch {arch} made a {type(model).__name__}, not a torch.nn.Module; let it return the network")
    model = model.to("cpu")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or not parameter.requires_grad:
            what = "frozen (requires_grad is off)" if parameter.dtype == torch.float32 else f"of type {parameter.dtype}"
            raise UserError(
                f"arch {arch}: its parameter {name} is {what}, and the program trains all parameters, in float32; make "
                "the network so"
            )
    _run_once(model, arch, num_classes, (in_channels, image_size, image_size))
    return model


def check_found(arch: str) -> None:
    """Raises UserError if there is no such function, as `build_own` does. Imports the module, so runs its code."""
    with _imports_from(Path.cwd()):
        _found(arch)


def _found(arch: str) -> Callable[..., Any]:
    module_name, _, path = arch.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(
                f"arch {arch}: there is no module {error.name} in {Path.cwd()}, and none is installed; start the "
                f"program in the folder that holds {module_name.partition('.')[0]}"
            ) from None
        raise UserError(f"arch {arch}: {_told(error)}; install {error.name}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"arch {arch}: importing {module_name} failed: {_told(error)}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            callables = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            known = f"; it has {', '.join(callables[:8])}" if callables else ""
            raise UserError(f"arch {arch}: {module_name} ({_file_of(found)}) has no {name}{known}")
        found = getattr(found, name)
    if not callable(found):
        raise UserError(f"arch {arch}: this is a {type(found).__name__}, and not a function that makes a network")
    return found


def _arguments(
    arch: str, function: Callable[..., Any], num_classes: int, in_channels: int, image_size: int, width_mult: float
) -> inspect.BoundArguments:
    """What the function is called with.

    Raises: UserError for a parameter that nothing is known for, and for a width factor that it does not take.
    """
    values = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        "image_size": image_size,
        "width_mult": width_mult,
    }
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    named = {name: key for key, names in PARAMETERS.items() for name in names}
    kwargs = {p.name: values[named[p.name]] for p in parameters if p.name in named and p.kind != p.POSITIONAL_ONLY}
    taken, args = {named[name] for name in kwargs}, []
    if "num_classes" not in taken:
        first = parameters[0] if parameters else None
        if any(p.kind == p.VAR_KEYWORD for p in parameters):
            kwargs["num_classes"] = num_classes
        elif first and first.name not in kwargs and first.default is first.empty and first.kind != first.KEYWORD_ONLY:
            args = [num_classes]
    if width_mult != 1 and "width_mult" not in taken:
        raise UserError(
            f"width_mult is {width_mult:g}, and arch {arch} has no parameter width_mult; leave it out, or let the "
            "function take it"
        )
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UserError(
            f"arch {arch}: it is called with num_classes, and with in_channels, image_size and width_mult if it has "
            f"them, but here {error}; give other parameters a default, or write a function that calls this one"
        ) from None


def _run_once(model: nn.Module, arch: str, num_classes: int, image_shape: tuple[int, int, int]) -> None:
    """Sends two black images through the network and notes the order of its layers, see `build_own`."""
    order: list[str] = []
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: order.append(name) if name not in order else None)
        for name, layer in layers.items()
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *image_shape))
    except Exception as error:
        raise UserError(
            f"arch {arch} cannot read images of shape {image_shape}: {_told(error)}; the data set decides the shape, "
            "and functions with the parameters in_channels or image_size are told"
        ) from error
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 2:
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(
            f"arch {arch}: from 2 images the network makes {got}; it must be the logits, (2, {num_classes})"
        )
    if logits.shape[1] != num_classes:
        raise UserError(
            f"arch {arch} makes {logits.shape[1]} logits, and the data have {num_classes} classes; let the function "
            "take num_classes"
        )
    last = order[-1] if order else ""
    makes_logits = last and next(iter(layers[last].weight.shape)) == num_classes
    model.head_name = last if makes_logits else ""
    model.conv_order = [name for name in order if isinstance(layers[name], nn.Conv2d)]


@contextmanager
def _imports_from(folder: Path) -> Iterator[None]:
    """Inside, modules are looked for in the folder first, also those whose names this program has for its own.

    Many repositories have a package `models` or `utils`. Behind the block these names mean this program's again.
    """
    if folder.resolve() == PROJECT:
        yield
        return
    ours = {path.stem for path in PROJECT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    taken = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ours}
    for name in taken:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
            del sys.modules[name]
        sys.modules.update(taken)


def _told(error: BaseException) -> str:
    """An error of the user's code in one line, with the place in it."""
    if isinstance(error, SyntaxError):
        return f"{error.msg} ({error.filename} line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(Path.cwd())] or frames
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text} ({own[-1].filename} line {own[-1].lineno})"


def _file_of(thing: Any) -> str:
    return getattr(thing, "__file__", None) or "built in"
