"""When the scores of a search are decided, so that the rest of the training can go into one subnet.

Legend: U units.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BUDGET_LEFT = 1.05  # a falling budget has ended, or is at most 5 % above its end: little is left to drop
ENTROPY_LEFT = 0.1  # of the entropy of scores that know nothing
AGREEMENT = 0.95  # of the top-scored units of two epochs in a row


class Decision(NamedTuple):
    """How far a search is from its end.

    Attributes:
        budget_ratio: the budget of now, against that of the end.
        entropy_ratio: the mean entropy of the scores, against that of scores which all have the same value and meet the
            budget of the end. Scores that start there have the ratio 1; scores that all start at 1, as those under a
            falling budget do, are only undecided in between.
        agreement: the fraction of the top-scored units within the budget of the end that were top-scored one epoch
            earlier as well; 0 at the end of the first epoch.
    """

    budget_ratio: float
    entropy_ratio: float
    agreement: float

    @property
    def made(self) -> bool:
        """Whether the search may end.

        All three have to hold. While the budget falls, scores of 1 are no choice yet: more of them have to go. A low
        entropy says that masks hardly differ any more, and an agreement says that the scores which still move decide
        nothing. Source: ours; the last one is the criterion of "early-bird" tickets (You et al., ICLR 2020).
        """
        return self.budget_ratio <= BUDGET_LEFT and self.entropy_ratio <= ENTROPY_LEFT and self.agreement >= AGREEMENT


def decision(
    scores_U: np.ndarray,
    indifferent: float,
    budget_ratio: float,
    top_U: np.ndarray,
    previous_U: np.ndarray | None,
) -> Decision:
    """Judges the scores at the end of an epoch.

    Args:
        scores_U: (U,) in [0, 1].
        indifferent: the value in (0, 1] which, given to every score, meets the budget of the end. At 1 there is nothing
            to decide, and the ratio of the entropies is 0.
        budget_ratio: the budget of now, against that of the end; at least 1.
        top_U: (U,) bool, the top-scored units within the budget of the end.
        previous_U: (U,) bool, those of one epoch earlier; None at the end of the first epoch.
    """
    nothing_known = float(entropy(np.array(indifferent)))
    ratio = float(entropy(scores_U).mean()) / nothing_known if nothing_known > 0 else 0.0
    agreement = 0.0
    if previous_U is not None:
        agreement = float((top_U & previous_U).sum() / max(1, top_U.sum(), previous_U.sum()))
    return Decision(budget_ratio, ratio, agreement)


def entropy(scores: np.ndarray) -> np.ndarray:
    """The entropy of Bernoulli variables, in bits, element by element; 0 at scores of 0 and 1."""
    p = np.clip(scores.astype(np.float64), 0, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(q > 0, -q * np.log2(q), 0.0) for q in (p, 1 - p)]
    return parts[0] + parts[1]
