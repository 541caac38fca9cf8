"""The forward pass of a plain network as a list of steps, and what can be left out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


@dataclass(frozen=True)
class Step:
    """One operation of the forward pass.

    Attributes:
        result: name of the tensor that it makes.
        form: its expression, with {0} and {1} in place of the tensors that it reads.
        operands: their names.
        layer: name of the layer that it runs, where it runs one.
        tensor: name of the parameter or buffer that it reads and that belongs to no layer, where it reads one.
    """

    result: str
    form: str
    operands: tuple[str, ...]
    layer: str | None = None
    tensor: str | None = None


def steps_towards(result: str, steps: Sequence[Step]) -> list[Step]:
    """Those that a tensor depends on."""
    wanted, found = {result}, []
    for step in reversed(steps):
        if step.result in wanted:
            wanted.update(step.operands)
            found.insert(0, step)
    return found


def fold_batch_norms(layers: dict[str, nn.Module], steps: Sequence[Step]) -> list[Step]:
    """Puts each batch-norm that alone reads a convolution into it, in `layers`; the convolution must run only once.

    Returns: the steps without those of batch-norms that are gone.
    """
    steps = list(steps)
    made_by = {step.result: step for step in steps}
    read = [operand for step in steps for operand in step.operands]
    ran = [step.layer for step in steps]
    for norm in [step for step in steps if isinstance(layers.get(step.layer), nn.BatchNorm2d)]:
        conv = made_by.get(norm.operands[0])
        if conv is None or not isinstance(layers.get(conv.layer), nn.Conv2d):
            continue
        if read.count(conv.result) > 1 or ran.count(conv.layer) > 1:
            continue
        layers[conv.layer] = fuse_conv_bn_eval(layers[conv.layer], layers[norm.layer])
        steps[steps.index(conv)] = replace(conv, result=norm.result)
        steps.remove(norm)
    return steps
