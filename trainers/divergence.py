"""Numbers that are no longer finite: noticed before anything is saved, so that they never replace a good checkpoint."""

from __future__ import annotations

import math

from trainers.default import StepSettings
from trainers.state import RunState


class Diverged(Exception):
    """A loss, a weight or a score is no longer finite."""


def check_losses(run: RunState, now: StepSettings, **losses: float) -> None:
    """Raises Diverged if the mean training loss of the epoch, or another loss by its name, is not finite.

    Args:
        now: of the last step.
    """
    losses = {"training": run.sums.means().get("loss", 0.0), **losses}
    for name, loss in losses.items():
        if not math.isfinite(loss):
            first = run.first_not_finite()
            raise _diverged(f"the {name.replace('_', '-')} loss is {loss}", run, now, first)


def check_tensors(run: RunState, now: StepSettings) -> None:
    """Raises Diverged if anything that a checkpoint would keep is not finite. Waits for the device."""
    if (first := run.first_not_finite()) is not None:
        raise _diverged(f"{first} is no longer finite", run, now)


def _diverged(what: str, run: RunState, now: StepSettings, first: str | None = None) -> Diverged:
    where = f"step {run.step} of epoch {run.epoch + 1}" if run.step else f"the end of epoch {run.epoch}"
    layer = f", and so is {first}" if first else ""
    scores = run.search is not None
    rates = f"weight_lr {now.weight_lr:.4g}" + f" and score_lr {now.score_lr:.4g}" * scores
    return Diverged(
        f"{what} after {where}{layer}. This step had {rates}. Train again with a smaller --weight-lr, "
        f"--clip-norm{' or --score-lr' * scores}"
    )
