"""The fused optimizer takes the steps of PyTorch's plain one, whatever the memory formats."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from utils.algorithm.optimizer import FusedSGD

SHAPES = ((6, 5, 3, 3), (4, 6, 1, 1), (8, 1, 3, 3), (7, 5), (5,))


def parameters(memory_format: torch.memory_format) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [nn.Parameter(t.contiguous(memory_format=memory_format) if t.dim() == 4 else t) for t in tensors]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("grad_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_the_steps_are_those_of_plain_sgd(memory_format, grad_format, nesterov):
    if memory_format == torch.contiguous_format and grad_format == torch.channels_last:
        pytest.skip("the kernel mixes such elements up; no network here has them")
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-2, "nesterov": nesterov}
    plain, fused = parameters(torch.contiguous_format), parameters(memory_format)
    optimizers = torch.optim.SGD(plain, **options), FusedSGD(fused, **options)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for one, other in zip(plain, fused, strict=True):
            one.grad = torch.randn(one.shape, generator=generator, dtype=torch.float64)
            other.grad = one.grad.contiguous(memory_format=grad_format) if one.dim() == 4 else one.grad.clone()
        if step == 2:
            fused[1].grad = plain[1].grad = None  # stays where it is
        grads = [parameter.grad for parameter in fused]
        for optimizer in optimizers:
            optimizer.step()
        assert all(parameter.grad is grad for parameter, grad in zip(fused, grads, strict=True))
    for one, other in zip(plain, fused, strict=True):
        assert other.shape == one.shape
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)
        momentum = optimizers[1].state[other]["momentum_buffer"]
        torch.testing.assert_close(momentum, optimizers[0].state[one]["momentum_buffer"], rtol=1e-12, atol=1e-14)
    if memory_format == torch.channels_last:
        assert fused[0].is_contiguous(memory_format=torch.channels_last)
        assert optimizers[1].state[fused[0]]["momentum_buffer"].is_contiguous(memory_format=torch.channels_last)


def test_stored_state_goes_on_with_the_same_steps():
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-2}
    whole = parameters(torch.channels_last)
    optimizer, copies = FusedSGD(whole, **options), []
    for step in range(4):
        if step == 2:
            copies = [nn.Parameter(p.detach().clone()) for p in whole]
            resumed = FusedSGD(copies, **options)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for number, parameter in enumerate(whole):
            parameter.grad = torch.full_like(parameter, 0.1 * (step + number))
        for parameter, other in zip(whole, copies, strict=False):
            other.grad = parameter.grad.clone()
        optimizer.step()
        if copies:
            resumed.step()
    assert all(torch.equal(one, other) for one, other in zip(whole, copies, strict=True))
