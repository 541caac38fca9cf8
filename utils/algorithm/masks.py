"""Drawing masks, and the rule that keeps a draw from cutting the network in two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def sample_masks(scores_U: Tensor, generator: torch.Generator, num_masks: int = 2) -> Tensor:
    """Independent Bernoulli masks: mask[k, i] = 1 with probability scores[i]. A score of 0 never, of 1 always.

    Args:
        scores_U: (U,) in [0, 1].
        generator: on the device of the scores; the only source of randomness.
    Returns: (num_masks, U) bool.
    """
    shape = (num_masks, scores_U.numel())
    uniform = torch.rand(shape, generator=generator, device=scores_U.device, dtype=scores_U.dtype)
    return uniform < scores_U  # uniform lies in [0, 1)


def keep_one_unit(mask_U: np.ndarray, scores_U: Tensor, groups: Sequence[np.ndarray]) -> np.ndarray:
    """The mask of the pass: as drawn, but every group of units in which none was kept gets its likeliest one.

    The estimator goes on to use the mask as drawn, so its mean stays exact; the loss just is, for such a draw, the
    loss of the nearest network that has a path from input to output.

    Args:
        mask_U: (U,) bool.
        scores_U: (U,), decides which unit is added (ties: the lowest index).
        groups: index arrays; see `ChannelGraph.vital_groups`.
    Returns: (U,) bool; `mask_U` itself if no group is empty.
    Source: ours.
    """
    for group in groups:
        if not mask_U[group].any():
            mask_U = mask_U.copy()
            likeliest = scores_U.detach().cpu().numpy()[group].argmax()  # waits for the device, but hardly ever runs
            mask_U[group[likeliest]] = True
    return mask_U
