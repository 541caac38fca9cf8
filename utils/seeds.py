"""Independent random streams of one seed."""

from __future__ import annotations

import numpy as np
import torch

MASK_STREAM, CANDIDATE_STREAM, COIN_STREAM, RANDOM_MASK_STREAM = 1, 2, 3, 4


def stream_seed(seed: int, stream: int) -> int:
    """A seed for one purpose; SeedSequence keeps the streams of neighbouring seeds apart."""
    return int(np.random.SeedSequence(entropy=seed, spawn_key=(stream,)).generate_state(1, np.uint64)[0] >> 1)


def stream_generator(seed: int, stream: int, device: torch.device) -> torch.Generator:
    """A generator of its own for one purpose."""
    return torch.Generator(device).manual_seed(stream_seed(seed, stream))
