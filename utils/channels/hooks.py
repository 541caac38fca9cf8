"""What people attach to layers beside their forward: hooks, parametrizations, a forward of one instance.

Compact execution computes layers from slices of their weights and does not call them, so nothing of this would run.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from utils.conv_type import kind_of

HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def check_no_hooks(model: nn.Module) -> None:
    """Raises ValueError for a network that has hooks, or layers without weights, and names them."""
    for name, module in model.named_modules():
        what = f"module {name} ({kind_of(module)})" if name else f"the network ({kind_of(module)})"
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise ValueError(f"{what} has no weights yet; run a batch through the network first")
        for attribute, kind in HOOKS.items():
            for hook in getattr(module, attribute).values():
                title = getattr(hook, "__qualname__", type(hook).__name__)
                raise ValueError(
                    f"{what} has a {kind} ({title}), which would not run with the kept channels alone; remove it, "
                    f"{_instead_of(title)}"
                )
        for own, parameter in module.named_parameters(recurse=False):
            if any(getattr(parameter, attribute, None) for attribute in PARAMETER_HOOKS):
                raise ValueError(
                    f"parameter {own} of {what} has a gradient hook, which would not run with the kept channels alone; "
                    "remove it"
                )


def _instead_of(title: str) -> str:
    if title in ("WeightNorm", "SpectralNorm"):
        function = "remove_weight_norm" if title == "WeightNorm" else "remove_spectral_norm"
        return f"with torch.nn.utils.{function}"
    return "or put what it does into the forward of the network"


def check_own_layers(model: nn.Module, computed: Iterable[nn.Module]) -> None:
    """Raises ValueError, with its name, for a layer that computes more than its weights and its kind tell.

    Args:
        computed: the layers that are computed without being called.
    """
    names = {module: name for name, module in model.named_modules()}
    owners: dict[nn.Parameter, nn.Module] = {}
    for module in dict.fromkeys([model, *computed]):
        name = names.get(module)
        what = f"module {name} ({kind_of(module)})" if name else f"the network ({kind_of(module)})"
        if is_parametrized(module) and module is not model:
            tensors = ", ".join(module.parametrizations)
            raise ValueError(
                f"{what} computes its {tensors} by a parametrization, whose parameters compact execution would not "
                "train; call torch.nn.utils.parametrize.remove_parametrizations on it first"
            )
        replaced = [key for key in ("forward", "_conv_forward", "__call__") if key in vars(module)]
        if replaced:
            raise ValueError(
                f"{what} has a {replaced[0]} of its own, set on the instance, which would not run; "
                "write a class for it, whose forward calls torch's layers"
            )
        for own, parameter in module.named_parameters(recurse=False) if module is not model else ():
            other = owners.setdefault(parameter, module)
            if other is not module and own != "shared_scores":
                raise ValueError(
                    f"{what} shares its {own} with module {names[other]}, so neither can lose channels by itself; "
                    "run one module in both places, or give each a parameter of its own"
                )
        for own in ("weight", "bias"):
            tensor = getattr(module, own, None)
            if tensor is not None and module is not model and not isinstance(tensor, nn.Parameter):
                raise ValueError(f"{what} has a {own} that is no parameter, so it would not be trained")
