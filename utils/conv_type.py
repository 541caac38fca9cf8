"""Layers whose channels can be dropped. A *unit* is one output channel and everything per-channel behind it.

Legend: B batch, C channels of one layer, U all units of a network.

These modules are the readable reference (`execution: masked`): they compute every channel and multiply by masks
that were set from outside. `utils/channels/compact.py` computes the same numbers from the kept channels alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, SupportsFloat

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv2d(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv` applied to x with (a part of) its weight; a depthwise one filters as many channels as x has.

    A 1x1 convolution with a stride reads every stride-th pixel only, so they are picked first: the same numbers. Left
    to oneDNN (torch 2.14.1, AVX2, channels_last) its weight gradient corrupts the heap for 2 to 6 input channels. They
    are picked by a pool of one pixel: the gradient of a slice has the default memory format, and every layer in front
    of it would be slower for it.
    """
    stride = conv.stride
    if conv.kernel_size == (1, 1) and conv.padding == (0, 0) and stride != (1, 1):
        x, stride = F.avg_pool2d(x, 1, stride), (1, 1)
    groups = len(weight) if is_depthwise(conv) else conv.groups
    return F.conv2d(x, weight, bias, stride, conv.padding, conv.dilation, groups)


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution filters every channel by itself. Such a layer has no units: it follows its input's."""
    return 1 < conv.groups == conv.in_channels == conv.out_channels


def is_ordinary(norm: nn.BatchNorm2d) -> bool:
    """Whether a batch-norm has what most have: scale and shift, and running statistics with a momentum."""
    return norm.affine and norm.track_running_stats and norm.momentum is not None


class PlainConv(nn.Conv2d):
    """An ordinary convolution that goes through `conv2d` above."""

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(self, x, self.weight, self.bias)


class SubnetConv(PlainConv):
    """A convolution of which a subset of output channels is in use.

    `masks` are set from outside for one forward pass: one (C,) bool tensor for every run of the layer in that pass, or
    None in place of one that keeps every channel. A mask acts before batch-norm, so on its own it leaves a dropped
    channel as a constant (the shift of the batch-norm). That is the released execution; for dropped to mean absent, the
    `SubnetBatchNorm` behind needs its masks too.
    """

    masks: Iterator[Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y, mask = super().forward(x), _next_mask(self.masks)
        return y if mask is None else y * mask.view(-1, 1, 1)


def _next_mask(masks: Iterator[Tensor | None] | None) -> Tensor | None:
    """The mask of the run of a layer that has begun.

    Raises: RuntimeError for a layer that runs more often than it has masks.
    """
    if masks is None:
        return None
    for mask in masks:
        return mask
    raise RuntimeError("a layer runs more often than it did when the network was traced")


class VRPGE(SubnetConv):
    """A `SubnetConv` that owns the probabilities by which its channels are kept.

    `scores` (C,) in [0, 1]: unit i is kept with probability scores[i]. They are trained by the policy gradient of
    `utils/algorithm/estimators`, never by backward.

    All layers of a `SparseNetwork` share one parameter with the scores of all units, and `scores` is a view of this
    layer's part. So whatever moves, copies, converts or stores the model finds a single place. A state dict has the
    part alone, as `scores`.

    Attributes:
        shared_scores: (U,) of all layers; (C,) of this one until it belongs to a `SparseNetwork`.
        units: where this layer's part of them is.
    """

    shared_scores: nn.Parameter
    units: slice

    @property
    def scores(self) -> Tensor:
        return self.shared_scores[self.units]

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, score_init: float) -> VRPGE:
        """Turns `conv` into a VRPGE layer in place (same weight tensor, same name in its network).

        Raises: ValueError for a layer that cannot have scores.
        """
        if reason := why_unmaskable(conv):
            raise ValueError(f"cannot mask a {kind_of(conv)}: {reason}")
        conv.__class__ = cls
        scores = torch.full((conv.out_channels,), float(score_init), device=conv.weight.device)
        conv.share_scores(nn.Parameter(scores, requires_grad=False), first_unit=0)
        return conv

    def unmask(self) -> None:
        """Makes this an ordinary convolution again."""
        del self.shared_scores, self.units
        self.__class__ = PlainConv

    def share_scores(self, scores_U: nn.Parameter, first_unit: int) -> None:
        """From now on the scores of this layer are those of its units in `scores_U`."""
        self.units = slice(first_unit, first_unit + self.out_channels)
        self.shared_scores = scores_U

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}scores"] = destination.pop(f"{prefix}shared_scores")[self.units]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Loads a parameter `scores` that is there meanwhile, so that torch's own rules hold, and copies its values."""
        shared = self._parameters.pop("shared_scores")
        own = self._parameters["scores"] = nn.Parameter(shared[self.units].clone(), requires_grad=False)
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            own = self._parameters.pop("scores")
            self._parameters["shared_scores"] = shared
        with torch.no_grad():
            self.scores.copy_(own)


class SubnetBatchNorm(nn.BatchNorm2d):
    """A batch-norm that knows which of its channels exist.

    `masks` are set from outside for one forward pass, see `SubnetConv`. Channels that do not exist leave as exact zeros
    and keep their running statistics. `update_statistics` is off in passes of which only the loss is used.
    """

    masks: Iterator[Tensor | None] | None = None
    update_statistics: bool = True

    def forward(self, x: Tensor) -> Tensor:
        live = _next_mask(self.masks)
        if not self.training:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        elif not self.update_statistics:
            y = F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        else:
            mean, var = self.running_mean.clone(), self.running_var.clone()
            y = F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
            with torch.no_grad():
                self.running_mean.copy_(mean if live is None else mean.where(live, self.running_mean))
                self.running_var.copy_(var if live is None else var.where(live, self.running_var))
        return y if live is None else y * live.view(-1, 1, 1)


def why_unmaskable(module: nn.Module) -> str | None:
    """Why a module cannot get scores; None if it can."""
    if isinstance(module, VRPGE):
        return "it has scores already; start from a fresh network"
    if type(module) not in (nn.Conv2d, PlainConv):
        return "only plain nn.Conv2d layers can get scores"
    if is_depthwise(module):
        return "it is depthwise, and a depthwise one follows the channels that it filters"
    if module.groups != 1:
        return "it is a grouped convolution"
    if module.padding_mode != "zeros":
        return f"its padding_mode is {module.padding_mode!r}, only 'zeros' is known"
    return None


def is_maskable(module: nn.Module) -> bool:
    """Whether a module can get scores."""
    return why_unmaskable(module) is None


def sparsify(model: nn.Module, maskable: Iterable[str] | None = None, score_init: float = 0.5) -> nn.Module:
    """Makes convolutions of a plain network maskable, and what follows them aware of live channels.

    Args:
        model: any network of `nn.Conv2d` and `nn.BatchNorm2d`; changed in place, weights untouched.
        maskable: names of its `nn.Conv2d` modules that get scores; None: all plain ones that are not grouped. The
            depthwise ones follow the channels that they filter.
        score_init: start value of every score, in (0, 1].
    Raises: ValueError where there is nothing to mask, or for a layer that cannot be. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a network (nn.Module), got {type(model).__name__}")
    if isinstance(score_init, bool | str) or not isinstance(score_init, SupportsFloat) or not 0 < score_init <= 1:
        raise ValueError(f"score_init is a probability in (0, 1], got {score_init!r}")
    modules = dict(model.named_modules())
    if maskable is None:
        convs = {name: module for name, module in modules.items() if isinstance(module, nn.Conv2d)}
        maskable = [name for name, conv in convs.items() if is_maskable(conv)]
    elif isinstance(maskable, str):
        raise ValueError(f"maskable is a list of names, got the text {maskable!r}; write [{maskable!r}]")
    names = list(dict.fromkeys(maskable))
    if not names:
        raise ValueError("no layer is left to mask; leave first_layer_dense / last_layer_dense off")
    for name in names:
        if name not in modules:
            close = get_close_matches(str(name), modules, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"maskable names {name!r}, and {type(model).__name__} has no such module{hint}")
        if reason := why_unmaskable(modules[name]):
            raise ValueError(
                f"cannot mask module {name} ({kind_of(modules[name])}): {reason}; leave it out of maskable"
            )
    for name in names:
        VRPGE.from_conv2d(modules[name], score_init)
    for module in modules.values():
        if type(module) in (nn.Conv2d, PlainConv) and module.padding_mode == "zeros":
            module.__class__ = SubnetConv if is_depthwise(module) else PlainConv
        if type(module) is nn.BatchNorm2d and is_ordinary(module):
            module.__class__ = SubnetBatchNorm
    return model


def kind_of(module: nn.Module) -> str:
    """The class of a layer as its user wrote it."""
    if isinstance(module, PlainConv):
        return nn.Conv2d.__name__
    return nn.BatchNorm2d.__name__ if isinstance(module, SubnetBatchNorm) else type(module).__name__


def subnet_convs(model: nn.Module) -> dict[str, VRPGE]:
    """The maskable layers by name, in the order that fixes the layout of the flat score vector."""
    return {name: module for name, module in model.named_modules() if isinstance(module, VRPGE)}
