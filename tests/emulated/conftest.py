"""Every test here: one thread, the padding of a GPU on the CPU too, and the parts of torch that the emulation needs."""

from __future__ import annotations

import pkgutil

import pytest
import torch

import utils.channels.network
from tests.emulated.device import CUDA
from utils.channels.plan import preferred_multiple

# Parts of torch that are not public. Without one of them nothing here works.
INSIDE_TORCH = (
    "torch._C._DisableTorchDispatch",
    "torch._C._disabled_torch_function_impl",
    "torch._C._group_tensors_by_device_and_dtype",
    "torch._C._nn._parse_to",
    "torch._has_compatible_shallow_copy_type",
    "torch.Tag.inplace_view",
    "torch.Tensor._make_wrapper_subclass",
)


@pytest.fixture(autouse=True)
def comparable(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """What makes a run on the CPU compute what a run on the device computes, bit by bit."""
    monkeypatch.setattr(utils.channels.network, "preferred_multiple", lambda device: preferred_multiple(CUDA))


@pytest.fixture(autouse=True, scope="session")
def torch_has_what_is_needed() -> None:
    missing = []
    for name in INSIDE_TORCH:
        try:
            pkgutil.resolve_name(name)
        except AttributeError:
            missing.append(name)
    if missing:
        pytest.skip(f"the emulated device cannot work inside torch {torch.__version__}: it has no {', '.join(missing)}")
