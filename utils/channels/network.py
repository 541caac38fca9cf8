"""A network together with its scores, its channel graph and its way of execution."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from utils.algorithm.masks import keep_one_unit
from utils.algorithm.transfer import sent_to
from utils.channels.capacity import FixedShapes, capacities_for, stored_runs
from utils.channels.compact import CompactForward
from utils.channels.cost import ExpectedCost
from utils.channels.coverage import Coverage, bystanders, is_noise, keep_maskable, silenced
from utils.channels.graph import ChannelGraph, Op
from utils.channels.hooks import check_no_hooks, check_own_layers
from utils.channels.masked import maskable_ops, masks_set
from utils.channels.plan import Plan, make_plan, on_device, preferred_multiple
from utils.channels.python_state import python_state_kept
from utils.channels.self_check import check_conversion
from utils.channels.slots import SPREADING
from utils.channels.written import buffers_kept, logits_of, without_noise
from utils.conv_type import VRPGE, subnet_convs

EXECUTIONS, RESIDUAL_MASKS, PRECISIONS = ("compact", "masked", "released"), ("free", "tied"), ("fp32", "bf16")


class SparseNetwork:
    """Runs a network under masks.

    Args:
        model: a network on its device, made maskable by `sparsify`; without `VRPGE` layers it simply runs dense.
        image_shape: (channels, height, width).
        execution: "compact" computes kept channels only. "masked" computes all channels and multiplies them by masks:
            the readable reference with the same results. "released" is what the released code computes: the mask
            multiplies the weight of the convolution only, so the shift of the batch-norm behind it leaks.
        residual_masks: "free" or "tied", see `ChannelGraph`.
        precision: "fp32", or "bf16" for autocast.
        multiple: what kept channel counts are padded to in compact execution; None: what suits the device.
        strict: refuse a network through which channels cannot be followed everywhere, instead of leaving the layers
            around such places dense.
        self_check: try out on a copy whether the network computes what its plain form computes, see
            `utils/channels/self_check.py`. It can be left out for a network that is known to.
    Raises: ValueError for a network of which nothing is left to mask, that does not pass the check, or that is refused
        because of `strict`.

    Attributes:
        coverage: how much of the network can be masked, and what is left dense; printed if something is.
        stored_units: (U,) bool: units whose parameters still exist; all of them until the network shrinks.
        stored: the same per space of the graph.
        shapes: what makes the plans of a step have shapes that stay; None: they are as wide as their masks.
    """

    def __init__(
        self,
        model: nn.Module,
        image_shape: tuple[int, int, int],
        *,
        execution: str = "compact",
        residual_masks: str = "free",
        precision: str = "fp32",
        multiple: int | None = None,
        strict: bool = False,
        self_check: bool = True,
    ) -> None:
        _check_arguments(model, image_shape, execution, residual_masks, precision, multiple)
        self.model = model
        self.image_shape = tuple(image_shape)
        self.execution = execution
        self.precision = precision
        check_no_hooks(model)
        all_units = sum(layer.out_channels for layer in subnet_convs(model).values())
        with python_state_kept(model):
            self.graph = ChannelGraph(model, self.image_shape, residual_masks, strict)
        kinds = ("conv", "depthwise", "norm", "linear")
        check_own_layers(model, [op.module for op in self.graph.ops if op.kind in kinds])
        quiet = silenced(model, self.graph)
        self.layers = keep_maskable(model, self.graph.first_unit)
        self._noisy = any(is_noise(op) for op in self.graph.ops)
        self._dense_modules, self._never_run = bystanders(model, self.graph)
        self._no_scores = nn.Parameter(torch.empty(0), requires_grad=False)
        self._join_scores()
        self.multiple = preferred_multiple(self.device) if multiple is None else multiple
        self.stored_units = np.ones(self.num_units, dtype=bool)
        self.stored = [np.ones(space.width, dtype=bool) for space in self.graph.spaces]
        self.shapes: FixedShapes | None = None
        self._compact = CompactForward(self.graph)
        self._costs: dict[str, ExpectedCost] = {}
        self._dense_plan = self.plan(self.stored_units)
        self.dense_macs = sum(self.graph.layer_macs(self.dense_plan.counts).values())
        self.dense_parameters = sum(self.graph.layer_parameters(self.dense_plan.counts).values())
        self._sizes = {self.image_shape}  # of images that it may be given
        if self_check and self.num_units:
            check_conversion(self, self.image_shape)
        self.coverage = Coverage.of(self.graph, all_units, quiet)
        if self.coverage.partial:
            print(self.coverage)

    def _join_scores(self) -> None:
        """Gives all layers one parameter with the scores of all units. One that they have already stays."""
        if not self.layers:
            return
        firsts = [self.graph.first_unit[name] for name in self.layers]
        layers = list(self.layers.values())
        if self.scores.numel() == self.num_units and all(
            layer.shared_scores is self.scores and layer.units.start == first
            for first, layer in zip(firsts, layers, strict=True)
        ):
            return
        joined = nn.Parameter(self.scores.new_empty(self.num_units), requires_grad=False)
        for first, layer in zip(firsts, layers, strict=True):
            joined[first : first + layer.out_channels] = layer.scores
            layer.share_scores(joined, first)

    @property
    def scores(self) -> nn.Parameter:
        """(U,) of all units, the parameter that the layers share, see `VRPGE`; empty without maskable layers."""
        return next((layer.shared_scores for layer in self.layers.values()), self._no_scores)

    @property
    def device(self) -> torch.device:
        """That of the model now."""
        return next(self.model.parameters()).device

    @property
    def dense_plan(self) -> Plan:
        """The plan that keeps all units."""
        if self._dense_plan.norms.device != self.device:
            self._dense_plan = self._dense_plan.with_lists([one.to(self.device) for one in self._dense_plan.lists()])
        return self._dense_plan

    @property
    def num_units(self) -> int:
        return self.graph.num_units

    def split(self, vector_U: Tensor) -> list[Tensor]:
        """A flat vector of units as one view per layer, in the order of `layers`; tied layers get the same view."""
        firsts = self.graph.first_unit
        return [vector_U[firsts[name] : firsts[name] + layer.out_channels] for name, layer in self.layers.items()]

    def unit_groups(self) -> list[slice]:
        """The units of each layer in a flat vector, those of tied layers once."""
        widths = {self.graph.first_unit[name]: layer.out_channels for name, layer in self.layers.items()}
        return [slice(first, first + width) for first, width in widths.items()]

    def weight_parameters(self) -> list[nn.Parameter]:
        """Everything that is trained by backward: all parameters but the scores."""
        return list(self._weights().values())

    def _weights(self) -> dict[str, nn.Parameter]:
        named = self.model.named_parameters()
        return {name: value for name, value in named if value.requires_grad and value is not self.scores}

    def moving_tensors(self) -> dict[str, Tensor]:
        """What a training step moves beside the scores, by name: weights and the statistics of batch-norms."""
        buffers = {name: value for name, value in self.model.named_buffers() if value.is_floating_point()}
        return self._weights() | buffers

    def clear_gradients(self) -> None:
        """Before a backward: no parameter has a gradient other than zero."""
        self._compact.gradients.clear(self.weight_parameters())

    @property
    def vital_groups(self) -> list[np.ndarray]:
        """See `ChannelGraph.vital_groups`, of stored units.

        None where the shifts of dropped channels leak through an empty layer.
        """
        groups = [] if self.execution == "released" else self.graph.vital_groups
        return [group[self.stored_units[group]] for group in groups]

    @property
    def spreading(self) -> int:
        """See `utils/channels/slots.py`. Where nothing is padded, no tensor has a slot that it does not need."""
        return SPREADING[self.precision] if self.multiple > 1 else 0

    def plan(self, mask_U: np.ndarray) -> Plan:
        """The channels of a pass under a drawn mask, the layer guard applied (see `keep_one_unit`).

        Args:
            mask_U: (U,) bool on the host.
        """
        return on_device([self._drawn(self._guarded(mask_U))], self.device)[0]

    def plans(self, masks_KU: np.ndarray) -> list[Plan]:
        """The plans of the masks of a step, all of fixed shapes if there are some and every mask fits them.

        Args:
            masks_KU: (K, U) bool on the host.
        """
        masks = [self._guarded(mask_U) for mask_U in masks_KU]
        plans = [None if self.shapes is None else self.shapes.plan(mask_U) for mask_U in masks]
        if any(plan is None for plan in plans):
            plans = [self._drawn(mask_U) for mask_U in masks]
        return on_device(plans, self.device)

    def fix_shapes(self, slots: list[int] | None = None) -> None:
        """From now on the plans of a step have fixed shapes, until units leave or the shapes are fixed anew.

        Args:
            slots: as `FixedShapes.slots` gave them for the units that are stored now; None: what nearly all masks
                need that are drawn from the scores of now, which waits for the device.
        """
        if slots is None:
            scores_U = self.scores.detach().cpu().numpy()
            capacities = capacities_for(self.graph, scores_U, self.stored, self.multiple)
        else:
            runs = [segment for segment, _ in stored_runs(self.graph, self.stored)]
            capacities = dict(zip(runs, slots, strict=True))
        if self.shapes is None or self.shapes.capacities != capacities:
            self.shapes = FixedShapes(self.graph, self.stored, capacities, self.spreading)

    def _guarded(self, mask_U: np.ndarray) -> np.ndarray:
        if not isinstance(mask_U, np.ndarray) or mask_U.dtype != bool or mask_U.shape != (self.num_units,):
            found = f"{mask_U.dtype} {tuple(mask_U.shape)}" if hasattr(mask_U, "dtype") else type(mask_U).__name__
            raise ValueError(f"a mask is a numpy array of {self.num_units} bool, one for each unit, got {found}")
        mask_U = keep_one_unit(mask_U, self.scores, self.vital_groups)
        assert not (mask_U & ~self.stored_units).any(), "a mask keeps units that have left the parameters"
        return mask_U

    def _drawn(self, mask_U: np.ndarray) -> Plan:
        return make_plan(self.graph, mask_U, self.multiple, self.stored, self.spreading)

    def __call__(self, images: Tensor, plan: Plan, update_statistics: bool = True) -> Tensor:
        """Logits (B, classes) under a plan, in float32 or wider; train or eval mode is the model's.

        Args:
            images: (B, C, H, W).
            update_statistics: whether a pass in training mode moves the running statistics of live channels.
        Raises: ValueError for images that the network cannot read.
        """
        if self.num_units and tuple(images.shape[1:]) not in self._sizes:
            self._admit(tuple(images.shape))
        kept = self._never_run + (self._dense_modules if not update_statistics else [])
        with self.autocast(), buffers_kept(kept):
            if self.num_units == 0:
                logits = self.whole(images)
            elif self.execution == "compact":
                logits = self._compact(images, plan, update_statistics)
            else:
                with masks_set(self._masks_of(plan), update_statistics):
                    logits = self.whole(images)
        return logits.float() if self.precision == "bf16" else logits

    def _admit(self, shape: tuple[int, ...]) -> None:
        """Looks at the first images of another size than the network was converted for."""
        channels = self.image_shape[0]
        if len(shape) != 4 or shape[1] != channels:
            raise ValueError(f"images have the shape (batch, {channels} channels, height, width), got {shape}")
        self.graph.shapes_at(shape[1:])
        if self.stored_units.all():
            check_conversion(self, shape[1:], any_size=False)
        self._sizes.add(shape[1:])

    def whole(self, images: Tensor) -> Tensor:
        """Logits of the whole network, run as the user wrote it but for noise, and without those of auxiliary heads."""
        with without_noise() if self._noisy else nullcontext():
            return logits_of(self.model(images))

    def autocast(self) -> torch.autocast:
        """Context in which layers compute in the precision of the network."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _masks_of(self, plan: Plan) -> list[tuple[Op, Tensor | None]]:
        """The mask of every run of a layer in the reference."""
        leaks = self.execution == "released"  # then a mask multiplies its own convolution and nothing behind it
        return [
            (op, None if leaks and not isinstance(op.module, VRPGE) else sent_to(torch.from_numpy(live), self.device))
            for op in maskable_ops(self.graph.ops)
            for live in [plan.live[op.space]]
        ]

    def subnet_macs(self, plan: Plan) -> int:
        """Multiply-adds of one image, one forward pass, of the network that a plan describes."""
        return sum(self.graph.layer_macs(plan.counts).values())

    def executed_macs(self, plan: Plan) -> int:
        """Multiply-adds that a pass under the plan runs, padding apart: only compact execution leaves channels out."""
        return self.subnet_macs(plan) if self.execution == "compact" else self.dense_macs

    def padded_macs(self, plan: Plan) -> int:
        """The same with the zero channels that compact execution adds."""
        if self.execution != "compact":
            return self.dense_macs
        return sum(self.graph.layer_macs(plan.widths).values())

    def pass_cost(self, plan: Plan) -> tuple[int, int]:
        """Multiply-adds of one image and one forward pass under the plan, without and with padding."""
        return self.executed_macs(plan), self.padded_macs(plan)

    def subnet_parameters(self, plan: Plan) -> int:
        return sum(self.graph.layer_parameters(plan.counts).values())

    def expected_cost(self, unit: str) -> ExpectedCost:
        """What the subnets of drawn masks cost on average, in "params" or "flops"; laid out once."""
        if unit not in self._costs:
            self._costs[unit] = ExpectedCost(self.graph, unit)
        return self._costs[unit]

    def batch_norms(self) -> dict[str, nn.BatchNorm2d]:
        """Those that have running statistics, by name; also of vectors (`nn.BatchNorm1d`)."""
        norms = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        return {name: norm for name, norm in norms.items() if norm.running_mean is not None}


def _check_arguments(
    model: nn.Module,
    image_shape: Sequence[int],
    execution: str,
    residual_masks: str,
    precision: str,
    multiple: int | None,
) -> None:
    """Raises ValueError, with its name, for an argument of `SparseNetwork` that is none."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a network (nn.Module), got {type(model).__name__}")
    if next(model.parameters(), None) is None:
        raise ValueError(f"the network {type(model).__name__} has no parameters, so there is nothing to train")
    shape = image_shape if isinstance(image_shape, Sequence) else ()
    if len(shape) != 3 or not all(_is_count(side) for side in shape):
        raise ValueError(f"image_shape is (channels, height, width), each at least 1, got {image_shape!r}")
    for name, value, choices in (
        ("execution", execution, EXECUTIONS),
        ("residual_masks", residual_masks, RESIDUAL_MASKS),
        ("precision", precision, PRECISIONS),
    ):
        if value not in choices:
            raise ValueError(f"{name} is one of {', '.join(choices)}, got {value!r}")
    if multiple is not None and not _is_count(multiple):
        raise ValueError(f"multiple is a whole number of channels, at least 1, or None, got {multiple!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
