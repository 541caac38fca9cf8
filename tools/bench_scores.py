"""The scores that the bench starts every step from: made ones, or those of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from args import Config
from trainers.default import draw_masks
from trainers.methods import make_method
from trainers.state import RunState
from utils.channels.budget import Budget
from utils.errors import UserError
from utils.run import checkpoint

MADE_SCORES = ("uniform", "late")  # anything else is a path

# Late in a search most units have a score of exactly 0, and a working set larger than the budget shares it.
LATE_WORKING_SET = 1.15  # units, as a multiple of the budget
LATE_SURE = 0.8  # of the working set
LATE_SURE_SCORE = 0.97


def put_scores_(run: RunState, scores: str, config: Config) -> None:
    """Sets the scores of a new run and draws its masks again; units whose scores stay at 0 leave, as in training.

    Args:
        scores: "uniform", "late" or the path of a checkpoint.
    """
    network, scores_U = run.network, run.network.scores.data
    constant = run.budget.largest_score(config.sparsity.keep_ratio)
    if scores == "uniform":
        scores_U.fill_(constant)
    elif scores == "late":
        scores_U.copy_(late_scores([layer.stop - layer.start for layer in network.unit_groups()], constant))
        run.budget.project_(config.sparsity.keep_ratio)  # a budget of FLOPs, or of each layer, may be exceeded
    else:
        stored = checkpoint.load(scores)["model"]
        for name, part in zip(network.layers, network.split(scores_U), strict=True):
            values = stored.get(f"{name}.scores")
            if values is None or values.shape != part.shape:
                raise UserError(f"the scores of {scores} do not fit layer {name}; leave out options of the network")
            part.copy_(values)
    if run.search.masks is not None:
        run.search.masks = draw_masks(run.search, config)
    make_method(config).end_of_epoch(run, config.sparsity.keep_ratio)


def late_scores(sizes: Sequence[int], keep_ratio: float) -> Tensor:
    """Scores as they are late in a search, with a sum of exactly the budget: (U,) float32.

    All are 0 but those of a working set of 1.15 budgets, which is spread evenly over the layers, at least one unit in
    each, and at random within them. 80 % of it has a score of 0.97, and the others share what is left of the budget.

    Args:
        sizes: number of units of each layer.
        keep_ratio: the budget, as a fraction of all units.
    Raises: UserError if the budget is too large or too small for that.
    """
    random, scores_U, edges = np.random.default_rng(0), np.zeros(sum(sizes)), np.cumsum([0, *sizes])
    share = min(LATE_WORKING_SET * keep_ratio, 1.0)
    counts = np.diff(np.round(share * edges)).astype(int).clip(1)
    layers = [edge + random.permutation(size)[:count] for edge, size, count in zip(edges, sizes, counts, strict=False)]
    sure, unsure = np.split(random.permutation(np.concatenate(layers)), [round(LATE_SURE * share * edges[-1])])
    rest = keep_ratio * len(scores_U) - len(sure) * LATE_SURE_SCORE
    if not 0 < rest <= len(unsure):
        raise UserError(
            f"{100 * keep_ratio:.3g} % of {len(scores_U)} units in {len(sizes)} layers do not go with --scores late, "
            f"which spreads {LATE_WORKING_SET} budgets over them; pass --scores uniform or another --keep-ratio"
        )
    scores_U[sure], scores_U[unsure] = LATE_SURE_SCORE, rest / len(unsure)
    return torch.from_numpy(scores_U).float()


def spent(budget: Budget) -> float:
    """The smallest `keep_ratio` within which the scores are."""
    scores_U = budget.network.scores.detach().double().cpu().numpy()
    if budget.cost is not None:
        return budget.cost(scores_U) / budget.cost.dense
    return max(float(scores_U[group].mean()) for group in budget.groups)
