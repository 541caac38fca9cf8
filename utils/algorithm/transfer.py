"""Small tensors on their way between the host and the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def sent_to(values: Tensor, device: torch.device) -> Tensor:
    """The values on a device, without waiting for what it is still working on.

    A copy from ordinary memory waits for the device, also where it is asked not to. One from pinned memory does not,
    and the pinned memory is kept until the copy is done.
    """
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


@dataclass(frozen=True)
class HostCopy:
    """A copy of a tensor for the host, which may still be on its way.

    Attributes:
        arrived: when it is complete; None if it is already.
    """

    values: Tensor
    arrived: torch.cuda.Event | None = None

    @classmethod
    def of(cls, values: Tensor) -> HostCopy:
        """Starts to copy, without waiting for the device. On a CPU it is the tensor itself."""
        on_host = values.to("cpu", non_blocking=True)
        return cls(on_host, torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None)

    def read(self) -> Tensor:
        """The copy. Waits for what the device was given before it, and for nothing else."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values
