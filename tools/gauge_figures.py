"""How good estimators are, from the losses of many masks on several batches, and the report on it.

Batches are drawn independently of each other, and so are the estimates on one batch. Everything below is a mean over
estimates, over batches, or over pairs of different batches, so squares of means carry no bias from their own noise. The
standard errors are the jackknife's over batches, which hold for differences and ratios too.

Legend: N batches, E estimates on each batch, K masks of one estimate, U units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tools.command_line import aligned
from utils.algorithm.estimators.base import Estimator
from utils.algorithm.estimators.vrpge import vrpge_gradient
from utils.run.folder import write_json

REFERENCE = "vrpge"  # whose variance is the unit
VISIBLE = 3.0  # standard errors from which on a bias is told; with several estimators two would cry wolf now and then
MISSING = "-"


class Figure(NamedTuple):
    """A number and its standard error; not a number where it cannot be told."""

    value: float
    error: float


class Draws(NamedTuple):
    """All that estimates are made of: masks, bool, and the mean loss of each batch under them."""

    masks_NEKU: Tensor
    losses_NEK: Tensor


# ---- estimates ----


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


def reference_gradients(scores_U: Tensor, draws: Draws, alpha: float) -> Tensor:
    """(N, U): for each batch VR-PGE in the K-sample form over all of its masks."""
    both = zip(draws.masks_NEKU.flatten(1, 2), draws.losses_NEK.flatten(1), strict=True)
    return torch.stack([vrpge_gradient(scores_U, masks_KU, losses_K, alpha) for masks_KU, losses_K in both])


def sums_of(estimator: Estimator, scores_U: Tensor, draws: Draws, reference_NU: Tensor) -> Sums:
    """Makes all estimates of one estimator, batch by batch, and keeps what `estimator_figures` reads."""
    means, squares, alignments = [], [], []
    for masks_EKU, losses_EK in zip(draws.masks_NEKU, draws.losses_NEK, strict=True):
        pairs = zip(masks_EKU, losses_EK, strict=True)
        estimates_EU = torch.stack([estimator.gradient(scores_U, masks_KU, losses_K) for masks_KU, losses_K in pairs])
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

    variance: E |g|^2 - |E g|^2 over batches and masks; relative_variance: to that of VR-PGE; mask_share: the part of it
    that the masks on one batch make, the rest is due to the choice of the batch, which no estimator can take away;
    bias: |E g - gradient|^2 / |gradient|^2; share_of_signal: |E g|^2 / E |g|^2; cosine, cosine_sd: mean and standard
    deviation of the cosine between one estimate and the gradient, the noise of the reference taken off.

    Args:
        plain: of VR-PGE on the same batches.
        reference_NN: products of the reference gradients.
    """

    def statistics(kept: Tensor) -> dict[str, float]:
        square = float(sums.squares_N[kept].mean())
        signal = squared_mean(_pairs(sums.products_NN, kept))
        variance = _beyond_rounding(square - signal, square)
        squared_norm = squared_mean(_pairs(reference_NN, kept))
        plain_variance = float(plain.squares_N[kept].mean()) - squared_mean(_pairs(plain.products_NN, kept))
        cosine, cosine_square = cosine_moments(sums.alignments_NEN[kept][:, :, kept], squared_norm)
        cosine_variance = cosine_square - cosine**2
        return {
            "variance": variance,
            "relative_variance": _ratio(variance, plain_variance),
            "mask_share": _ratio(_mask_variance(sums, kept), variance),
            "bias": _ratio(squared_mean(_pairs(sums.deviations_NN, kept)), squared_norm),
            "share_of_signal": _ratio(signal, square),
            "cosine": cosine,
            "cosine_sd": math.sqrt(cosine_variance) if cosine_variance > 0 else math.nan,
        }

    return jackknife(statistics, len(sums.squares_N))


def _pairs(products_NN: Tensor, kept: Tensor) -> Tensor:
    return products_NN[kept][:, kept]


def _mask_variance(sums: Sums, kept: Tensor) -> float:
    count = sums.alignments_NEN.shape[1]
    within_N = (sums.squares_N - sums.products_NN.diagonal()) * (count / (count - 1))
    return float(within_N[kept].mean())


def cosine_moments(alignments_NEN: Tensor, squared_norm: float) -> tuple[float, float]:
    """Means of the cosine and of its square.

    An estimate meets only references of other batches, and in the square two different ones of them.
    """
    others = len(alignments_NEN) - 1
    own_NE = alignments_NEN.diagonal(dim1=0, dim2=2).T
    sum_NE = alignments_NEN.sum(dim=2) - own_NE
    pairs_NE = sum_NE**2 - ((alignments_NEN**2).sum(dim=2) - own_NE**2)
    if squared_norm <= 0:  # the reference is nothing but noise
        return math.nan, math.nan
    cosine = float(sum_NE.mean()) / others / math.sqrt(squared_norm)
    return cosine, float(pairs_NE.mean()) / (others * (others - 1)) / squared_norm


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


# ---- the report ----

LEGEND = f"""\
Standard errors are in brackets. All estimators cost two forward passes and are measured on the same batches, in the
scale that all share, (s (1 - s))^alpha times the gradient, summed over units. Variance: as a multiple of that of
{REFERENCE}. Masks: the part of the variance that more masks on the same batch would take away; the rest is due to the
choice of the batch. Signal: |E g|^2 / E |g|^2. Cosine: between one estimate and the gradient, mean and standard
deviation (sd). Bias: its square as a part of the squared gradient, where it is more than {VISIBLE:g} standard errors.
Forwards: multiply-adds of an estimate, as a multiple of a dense forward pass. taylor reads no masks, so at a checkpoint
it has no variance: its noise is that of what it learnt before, and it needs half of the forwards. {MISSING}: drowned in
noise, take more batches and masks."""


def plain(estimators: Mapping[str, Mapping[str, Figure]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """The figures of one checkpoint as plain values, for JSON; None for what could not be told."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        name: {key: {"value": finite(f.value), "error": finite(f.error)} for key, f in figures.items()}
        for name, figures in estimators.items()
    }


def table(entry: Mapping[str, Any]) -> str:
    """One row for each estimator of a checkpoint."""
    return aligned(
        [
            {
                "estimator": name,
                "variance": _told(figures["relative_variance"], 1),
                "masks": _told(figures["mask_share"], 100, " %"),
                "signal": _told(figures["share_of_signal"], 100, " %"),
                "cosine": _told(figures["cosine"], 1),
                "its sd": _told(figures["cosine_sd"], 1),
                "bias": _told(figures["bias"], 100, " %", least=VISIBLE),
                "forwards": f"{entry['cost']:.2f}",
            }
            for name, figures in entry["estimators"].items()
        ]
    )


def _told(figure: Mapping[str, float | None], factor: float, unit: str = "", least: float = -math.inf) -> str:
    """A figure with its error; "none seen" if it is less than so many errors."""
    if figure["value"] is None or figure["error"] is None:
        return MISSING
    value, error = factor * figure["value"], factor * figure["error"]
    digits = 0 if abs(value) >= 100 else 3
    return f"{value:.{digits}f} ({error:.{digits}f}){unit}" if value > least * error else "none seen"


def write_report(folder: Path, facts: Mapping[str, Any], headline: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """Writes gauge.json and gauge.md into a folder that exists, over older ones."""
    write_json(folder / "gauge.json", {**facts, "checkpoints": list(entries)})
    lines = [
        f"# Estimators on checkpoints of {facts['run']}",
        "",
        f"{facts['batches']} batches of {facts['batch_size']} images, {facts['masks']} masks on each, "
        f"{facts['warm_up']} steps of warm-up, seed {facts['seed']}, alpha {facts['alpha']:g}; {headline}",
        "",
        LEGEND,
    ]
    for entry in entries:
        lines += ["", f"## {entry['checkpoint']} ({entry['epoch']} epochs)", "", table(entry)]
    (folder / "gauge.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
