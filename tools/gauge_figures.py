"""How good estimators are, from the losses of many masks on several batches.

Batches are drawn independently of each other, and so are the estimates on one batch. Everything below is a mean over
estimates, over batches, or over pairs of different batches, so squares of means carry no bias from their own noise. The
standard errors are the jackknife's over batches: they hold for differences and ratios too.

Legend: N batches, E estimates on each batch, K masks of one estimate, U units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from utils.algorithm.estimator import vrpge_gradient

from tools.gauge_passes import Batch, Draws, collect, kind_of, warm_memories
from utils.algorithm.estimators import ESTIMATORS, Memory

REFERENCE = "vrpge"  # what variances are compared with; its masks also make the reference gradient


class Figure(NamedTuple):
    """A number and its standard error; not a number where it cannot be told."""

    value: float
    error: float


@dataclass(frozen=True)
class Sums:
    """What is kept of an estimator's estimates.

    Attributes:
        products_NN: of the mean estimates of two batches.
        deviations_NN: of the mean estimates less the references.
        squares_N: mean squared norm of an estimate.
        alignments_NEN: of an estimate of unit length with the reference of each batch.
    """

    products_NN: Tensor
    deviations_NN: Tensor
    squares_N: Tensor
    alignments_NEN: Tensor


# ---- estimates ----


def reference_gradients(scores_U: Tensor, draws: Draws, alpha: float) -> Tensor:
    """(N, U): for each batch VR-PGE in the K-sample form over all of its masks, which must be independent."""
    both = zip(draws.masks_NEKU.flatten(1, 2), draws.losses.flatten(1), strict=True)
    return torch.stack([vrpge_gradient(scores_U, masks_KU, losses_K, alpha) for masks_KU, losses_K in both])


def sums_of(
    name: str, scores_U: Tensor, draws: Draws, alpha: float, memory: Memory | None, reference_NU: Tensor
) -> Sums:
    """Makes all estimates of one estimator, batch by batch, and keeps what `figures` reads."""
    means, squares, alignments = [], [], []
    for masks_EKU, losses_E in zip(draws.masks_NEKU, draws.losses, strict=True):
        estimates_EU = torch.stack(
            [
                ESTIMATORS[name].gradient(scores_U, masks_KU, losses, alpha, memory)
                for masks_KU, losses in zip(masks_EKU, losses_E, strict=True)
            ]
        )
        norms_E = estimates_EU.norm(dim=1)
        directions_EU = estimates_EU / norms_E.masked_fill(norms_E == 0, 1.0)[:, None]
        means.append(estimates_EU.mean(dim=0))
        squares.append((norms_E**2).mean())
        alignments.append(directions_EU @ reference_NU.T)
    means_NU = torch.stack(means)
    deviations_NU = means_NU - reference_NU
    return Sums(
        products_NN=(means_NU @ means_NU.T).cpu(),
        deviations_NN=(deviations_NU @ deviations_NU.T).cpu(),
        squares_N=torch.stack(squares).cpu(),
        alignments_NEN=torch.stack(alignments).cpu(),
    )


# ---- figures ----


def squared_mean(products_NN: Tensor) -> float:
    """|E x|^2 from products of independent vectors: the mean over pairs of different ones, so unbiased."""
    count = len(products_NN)
    return float((products_NN.sum() - products_NN.trace()) / (count * (count - 1)))


def estimator_figures(sums: Sums, plain: Sums, reference_NN: Tensor) -> dict[str, Figure]:
    """What is said of one estimator; squares and variances are summed over units.

    variance: E |g|^2 - |E g|^2 over batches and masks; mask_variance: of one batch over masks, mean over batches;
    batch_variance: the rest, which no estimator can take away; relative_variance: to that of VR-PGE;
    squared_bias: |E g - gradient|^2; share_of_signal: |E g|^2 / E |g|^2; cosine, cosine_sd: mean and standard
    deviation of the cosine between one estimate and the gradient, the noise of the reference taken off.

    Args:
        plain: of VR-PGE on the same batches.
        reference_NN: products of the reference gradients.
    """

    def statistics(kept: Tensor) -> dict[str, float]:
        square = float(sums.squares_N[kept].mean())
        signal = squared_mean(_pairs(sums.products_NN, kept))
        variance = _beyond_rounding(square - signal, square)
        mask_variance = _beyond_rounding(_mask_variance(sums, kept), square)
        plain_variance = float(plain.squares_N[kept].mean()) - squared_mean(_pairs(plain.products_NN, kept))
        cosine, cosine_sd = _cosine(sums.alignments_NEN[kept][:, :, kept], squared_mean(_pairs(reference_NN, kept)))
        return {
            "variance": variance,
            "mask_variance": mask_variance,
            "batch_variance": variance - mask_variance,
            "relative_variance": _ratio(variance, plain_variance),
            "squared_bias": squared_mean(_pairs(sums.deviations_NN, kept)),
            "share_of_signal": _ratio(signal, square),
            "cosine": cosine,
            "cosine_sd": cosine_sd,
        }

    return jackknife(statistics, len(sums.squares_N))


def reference_figures(reference_NN: Tensor) -> dict[str, Figure]:
    """squared_norm: of the gradient. squared_error: expected squared error of the mean of the references, over masks
    and batches.
    """

    def statistics(kept: Tensor) -> dict[str, float]:
        products = _pairs(reference_NN, kept)
        squared_norm = squared_mean(products)
        return {"squared_norm": squared_norm, "squared_error": float(products.mean()) - squared_norm}

    return jackknife(statistics, len(reference_NN))


def _pairs(products_NN: Tensor, kept: Tensor) -> Tensor:
    return products_NN[kept][:, kept]


def _mask_variance(sums: Sums, kept: Tensor) -> float:
    count = sums.alignments_NEN.shape[1]
    within_N = (sums.squares_N - sums.products_NN.diagonal()) * (count / (count - 1))
    return float(within_N[kept].mean())


def _cosine(alignments_NEN: Tensor, squared_norm: float) -> tuple[float, float]:
    """An estimate meets only references of other batches, and in the square two different ones of them."""
    others = len(alignments_NEN) - 1
    own_NE = alignments_NEN.diagonal(dim1=0, dim2=2).T
    sum_NE = alignments_NEN.sum(dim=2) - own_NE
    pairs_NE = sum_NE**2 - ((alignments_NEN**2).sum(dim=2) - own_NE**2)
    if squared_norm <= 0:  # the reference is nothing but noise
        return math.nan, math.nan
    cosine = float(sum_NE.mean()) / others / math.sqrt(squared_norm)
    square = float(pairs_NE.mean()) / (others * (others - 1)) / squared_norm
    return cosine, math.sqrt(square - cosine**2) if square > cosine**2 else math.nan


def _beyond_rounding(difference: float, size: float) -> float:
    """0 for a difference of two numbers of this size that only rounding makes: an estimate without any noise."""
    return difference if abs(difference) > 1e-9 * size else 0.0


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan


def jackknife(statistics: Callable[[Tensor], Mapping[str, float]], count: int) -> dict[str, Figure]:
    """Each statistic of all batches, with the standard error that leaving out one batch at a time shows.

    Args:
        statistics: of the batches with the given numbers, in rising order.
    Source: Tukey 1958; Efron, Stein, "The Jackknife Estimate of Variance", Annals of Statistics 1981.
    """
    everything = torch.arange(count)
    values = statistics(everything)
    without = [statistics(everything[everything != left_out]) for left_out in range(count)]

    def error(name: str) -> float:
        others = torch.tensor([entry[name] for entry in without], dtype=torch.float64)
        return float(((count - 1) * others.var(correction=0)).sqrt())

    return {name: Figure(value, error(name)) for name, value in values.items()}


@dataclass(frozen=True)
class Measured:
    """All figures of one checkpoint.

    Attributes:
        reference: see `reference_figures`.
        estimators: by name, see `estimator_figures`.
        costs: by name, of one estimate in dense forward passes.
        memories: what the estimators with memory went into the measurement with.
        reference_U: (U,) the reference gradient, preconditioned as the estimates are.
    """

    reference: dict[str, Figure]
    estimators: dict[str, dict[str, Figure]]
    costs: dict[str, float]
    memories: dict[str, Memory]
    reference_U: Tensor


def measure(
    batches: Iterable[Batch],
    warm_up: Iterable[Batch],
    scores_U: Tensor,
    names: Sequence[str],
    *,
    alpha: float,
    num_masks: int,
    num_parts: int,
    seed: int,
) -> Measured:
    """Measures estimators at the price of two forward passes an estimate, all on the same batches.

    Args:
        batches: at least 4, drawn independently of each other.
        warm_up: other batches, one for each step that memories learn from.
        scores_U: (U,) in [0, 1]; float64 keeps rounding out of small differences.
        names: of `ESTIMATORS`; VR-PGE is measured anyway.
        num_masks: masks on each batch for every kind of estimator, even, at least 4.
        num_parts: of a batch, for `subbatch`.
    Raises: FloatingPointError for a loss that is not finite.
    """
    names = list(dict.fromkeys([REFERENCE, *names]))
    memories = warm_memories(warm_up, scores_U, names, seed)
    kinds = list(dict.fromkeys(map(kind_of, names)))
    draws = collect(batches, scores_U, kinds, num_masks // 2, num_parts, seed)
    if not all(bool(torch.isfinite(drawn.losses).all()) for drawn in draws.values()):
        raise FloatingPointError("a loss is not finite")
    reference_NU = reference_gradients(scores_U, draws[kind_of(REFERENCE)], alpha)
    reference_NN = (reference_NU @ reference_NU.T).cpu()
    sums = {
        name: sums_of(name, scores_U, draws[kind_of(name)], alpha, memories.get(name), reference_NU) for name in names
    }
    return Measured(
        reference=reference_figures(reference_NN),
        estimators={name: estimator_figures(sums[name], sums[REFERENCE], reference_NN) for name in names},
        costs={name: draws[kind_of(name)].cost for name in names},
        memories=memories,
        reference_U=reference_NU.mean(dim=0),
    )
