"""Learning rates and the budget as pure functions of the step."""

from __future__ import annotations

import math


def learning_rate_factor(policy: str, step: int, total_steps: int, warmup_steps: int = 0, drop_every: int = 0) -> float:
    """What the base learning rate is multiplied with at `step`, counted from 0.

    Warm-up climbs linearly to 1; after it `cosine_lr` falls to 0 at `total_steps`, `multistep_lr` divides by 10 at one
    half and three quarters of the way, `constant_lr` stays. The released code changes the rate once an epoch, we every
    step: the same curve, but short runs are not cut into coarse stairs.

    Args:
        drop_every: steps after which `multistep_lr` divides by 10, again and again and without warm-up, as in the
            released code; 0: at one half and three quarters.
    """
    if drop_every and policy == "multistep_lr":
        return 0.1 ** (step // drop_every)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if policy == "cosine_lr":
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if policy == "multistep_lr":
        return 0.1 ** ((done >= 0.5) + (done >= 0.75))
    if policy == "constant_lr":
        return 1.0
    raise ValueError(f"lr_policy must be cosine_lr, multistep_lr or constant_lr, got {policy!r}")


def falling_keep_ratio(
    progress: float, keep_ratio: float, start: float = 0.0, end: float = 0.4, highest: float = 1.0
) -> float:
    """The budget of a schedule that falls from everything to `keep_ratio`, as a fraction of what the budget counts.

    It is `highest` until `start`, then keep_ratio + (highest - keep_ratio) (1 - t)^3 with t going from 0 at `start` to
    1 at `end`, and keep_ratio afterwards.

    Args:
        progress: finished fraction of the steps of the search.
        start, end: fractions of these steps, start < end.
        highest: what the network has that the search starts from, below 1 for the subnet of another run.
    Source: the cubic rule of gradual pruning (Zhu and Gupta, 2017), applied to the budget; ours.
    """
    t = (progress - start) / (end - start)
    return keep_ratio + (highest - keep_ratio) * (1 - min(max(t, 0.0), 1.0)) ** 3
