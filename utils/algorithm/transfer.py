"""Small tensors on their way from the host to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent_to(values: Tensor, device: torch.device) -> Tensor:
    """The values on a device, without waiting for what it is still working on.

    A copy from ordinary memory waits for the device, also where it is asked not to. One from pinned memory does not,
    and the pinned memory is kept until the copy is done.
    """
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
