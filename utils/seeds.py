"""Independent random streams of one seed."""

from __future__ import annotations

import numpy as np
import torch

MASK_STREAM, CANDIDATE_STREAM, COIN_STREAM, RANDOM_MASK_STREAM = 1, 2, 3, 4


def mixed_seed(seed: int, *purpose: int) -> int:
    """An unsigned 64-bit seed for one purpose, such as (epoch, stream) or (epoch, stream, image).

    The image sets draw order and augmentation with it, so that an epoch depends on its number and on nothing that was
    drawn before it. SeedSequence mixes neighbouring seeds and epochs well, and purposes of one, two and three numbers
    do not meet.
    """
    return int(np.random.SeedSequence(entropy=seed, spawn_key=purpose).generate_state(1, np.uint64)[0])


def stream_seed(seed: int, stream: int) -> int:
    """A 63-bit seed for a generator that lasts for the whole run, such as that of the masks (MASK_STREAM)."""
    return mixed_seed(seed, stream) >> 1


def stream_generator(seed: int, stream: int, device: torch.device) -> torch.Generator:
    """A generator on a device for such a stream."""
    return torch.Generator(device).manual_seed(stream_seed(seed, stream))
