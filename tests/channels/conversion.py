"""Compares the executions of a converted network with each other and with the plain network, in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.toy import randomise
from utils.channels.network import SparseNetwork
from utils.channels.plain import plain_network
from utils.channels.shrink import shrink_to
from utils.channels.subnet import Subnet, use_statistics
from utils.channels.written import logits_of, without_noise
from utils.conv_type import sparsify


def converted(plain: nn.Module, image_shape: tuple[int, int, int], **options: Any) -> SparseNetwork:
    """A `SparseNetwork` over a copy of a network, with all of its convolutions that can be masked."""
    torch.set_default_dtype(torch.float64)
    try:
        return SparseNetwork(sparsify(copy.deepcopy(plain).double()), image_shape, **{"multiple": 2, **options})
    finally:
        torch.set_default_dtype(torch.float32)


def outcome(model: nn.Module, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Logits, and after a backward pass the gradients and the buffers."""
    for parameter in model.parameters():
        parameter.grad = None
    if logits.requires_grad:
        F.cross_entropy(logits, labels).backward()
    gradients = {
        f"gradient of {name}": torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    buffers = {
        name: buffer.clone() for name, buffer in model.named_buffers() if not name.endswith("num_batches_tracked")
    }
    return {"logits": logits.detach(), **gradients, **buffers}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-8) -> None:
    """Equal but for rounding, measured against the largest element of all gradients (or of the tensor itself)."""
    assert one.keys() == other.keys()
    largest = max([float(t.abs().max()) for name, t in other.items() if name.startswith("gradient")], default=0.0)
    for name, tensor in one.items():
        scale = largest if name.startswith("gradient") else float(other[name].abs().max())
        assert torch.isfinite(tensor).all(), name
        torch.testing.assert_close(
            tensor, other[name], rtol=0, atol=tolerance * max(scale, 1e-12), msg=lambda m, n=name: f"{n}: {m}"
        )


def check(
    net: nn.Module,
    image_shape: tuple[int, int, int] = (3, 8, 8),
    size: int = 3,
    shares: tuple[float, ...] = (0.3, 0.6),
    **options: Any,
) -> SparseNetwork:
    """All units kept: both executions are the plain network. Under masks they are each other. Returns the compact one.

    Args:
        shares: of the units that masks keep.
    """
    torch.manual_seed(0)
    plain = randomise(net, seed=1).double()
    compact, masked = (converted(plain, image_shape, execution=kind, **options) for kind in ("compact", "masked"))
    for module in plain.modules():
        if isinstance(getattr(module, "p", None), float):
            module.p = 0.0  # as the conversion has done to its copies
    images, labels = torch.randn(size, *image_shape, dtype=torch.float64), torch.randint(2, (size,))
    random = np.random.default_rng(0)
    masks = [np.ones(compact.num_units, dtype=bool), *(random.random(compact.num_units) < share for share in shares)]
    states = [copy.deepcopy(network.model.state_dict()) for network in (compact, masked)]
    for training in (False, True):
        for mask_U in masks:
            results = []
            for network, state in zip((compact, masked), states, strict=True):
                network.model.load_state_dict(state)
                network.model.train(training)
                logits = network(images, network.plan(mask_U))
                results.append(outcome(network.model, logits, labels))
            assert_same(results[0], results[1])
            if mask_U.all():
                whole = copy.deepcopy(plain).train(training)
                with without_noise():
                    expected = outcome(whole, logits_of(whole(images)), labels)
                assert_same(
                    results[0], expected | {name: results[0][name] for name in never_run(compact) if name in expected}
                )
    return compact


def check_the_rest(network: SparseNetwork, image_shape: tuple[int, int, int], export: bool = True) -> None:
    """Fixed shapes, units that leave and the ordinary network of a subnet give what compact execution gives."""
    images = torch.randn(3, *image_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    random = np.random.default_rng(1)
    mask_U = random.random(network.num_units) < 0.6
    for group in network.unit_groups():
        mask_U[group.start] = True
    subnet = Subnet(mask_U, {n: (m.running_mean + 0.1, m.running_var * 1.5) for n, m in network.batch_norms().items()})
    network.model.eval()
    use_statistics(network, subnet)

    def logits() -> Tensor:
        with torch.no_grad():
            return network(images, network.plans([mask_U])[0])

    expected, plan = logits(), network.plan(mask_U)
    network.scores.fill_(0.8)
    network.fix_shapes()
    assert network.plans([mask_U])[0].fixed
    torch.testing.assert_close(logits(), expected, rtol=1e-8, atol=1e-10)
    if export:
        plain = plain_network(network, subnet)
        for exported in (plain, plain_network(network, subnet, fold_batch_norm=True)):
            torch.testing.assert_close(exported.module()(images), expected, rtol=1e-8, atol=1e-10)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            plain.module()(images[:1])
        assert counter.get_total_flops() // 2 == network.subnet_macs(plan)
        parameters = sum(p.numel() for p in plain.module().parameters())
        assert parameters == network.subnet_parameters(plan)
    assert network.expected_cost("flops")(mask_U) == pytest.approx(network.subnet_macs(plan))
    assert network.expected_cost("params")(mask_U) == pytest.approx(network.subnet_parameters(plan))
    assert shrink_to(network, mask_U | (random.random(network.num_units) < 0.3), keep_fallback=False)
    torch.testing.assert_close(logits(), expected, rtol=1e-8, atol=1e-10)
    if export:  # its own statistics have shrunk with it
        statistics = {name: (norm.running_mean, norm.running_var) for name, norm in network.batch_norms().items()}
        exported = plain_network(network, Subnet(mask_U, statistics)).module()
        torch.testing.assert_close(exported(images), expected, rtol=1e-8, atol=1e-10)


def never_run(network: SparseNetwork) -> list[str]:
    """The buffers of auxiliary heads: a plain network in training mode moves them."""
    buffers = {buffer for module in network._never_run for buffer in module.buffers(recurse=False)}
    return [name for name, buffer in network.model.named_buffers() if buffer in buffers]
