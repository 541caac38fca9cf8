"""What `tools/gauge.py` writes: gauge.json with all figures, gauge.md with tables, gauge.svg with the variances."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from tools.gauge_figures import REFERENCE, Figure, Measured
from utils.run.folder import write_json

VISIBLE = 3.0  # standard errors from which on a bias is told; with so many estimators two would cry wolf now and then
MISSING = "-"
LEGEND = f"""\
Standard errors in brackets. All estimators cost two forward passes and are measured on the same batches, in the scale
that all share, (s (1 - s))^alpha times the gradient, summed over units. Variance: against {REFERENCE}. Of it masks: the
part that more masks on the same batch would take away; the rest is due to the choice of the batch. Signal:
|E g|^2 / E |g|^2. Cosine: between one estimate and the gradient, mean and standard deviation (sd). Squared bias: as a
part of the squared gradient, where it is more than {VISIBLE:g} standard errors. Forwards: multiply-adds of an estimate,
as a multiple of a dense forward pass; taylor needs half of it. That one reads no masks, so at a checkpoint it has no
variance: its noise is that of what it learnt before. {MISSING}: drowned in noise, take more batches and masks."""


def entry_of(file: str, epoch: int, measured: Measured) -> dict[str, Any]:
    """One checkpoint as plain values, for JSON; None for what could not be told."""

    def plain(figures: Mapping[str, Figure]) -> dict[str, dict[str, float | None]]:
        return {
            name: {"value": _finite(figure.value), "error": _finite(figure.error)} for name, figure in figures.items()
        }

    return {
        "checkpoint": file,
        "epoch": epoch,
        "reference": plain(measured.reference),
        "estimators": {
            name: {**plain(figures), "cost": measured.costs[name]} for name, figures in measured.estimators.items()
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_report(folder: Path, facts: Mapping[str, Any], headline: str, entries: Sequence[dict[str, Any]]) -> None:
    """Writes the three files into a folder that exists, over older ones."""
    write_json(folder / "gauge.json", {**facts, "checkpoints": entries})
    (folder / "gauge.md").write_text(markdown(facts, headline, entries), encoding="utf-8")
    (folder / "gauge.svg").write_text(picture(entries), encoding="utf-8")


# ---- tables ----


def table_rows(entry: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row for each estimator, as texts by column."""
    squared_norm = entry["reference"]["squared_norm"]["value"]
    return [
        {
            "estimator": name,
            "variance": _with_error(figures["relative_variance"], 1),
            "of it masks": _share(figures["mask_variance"]["value"], figures["variance"]["value"]),
            "signal": _with_error(figures["share_of_signal"], 100, " %"),
            "cosine": _with_error(figures["cosine"], 1),
            "its sd": _with_error(figures["cosine_sd"], 1),
            "squared bias": _bias(figures["squared_bias"], squared_norm),
            "forwards": f"{figures['cost']:.2f}",
        }
        for name, figures in entry["estimators"].items()
    ]


def _with_error(figure: Mapping[str, float | None], factor: float, unit: str = "") -> str:
    if figure["value"] is None:
        return MISSING
    error = MISSING if figure["error"] is None else _short(factor * figure["error"])
    return f"{_short(factor * figure['value'])} ({error}){unit}"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3f}"


def _share(part: float | None, whole: float | None) -> str:
    return MISSING if part is None or not whole else f"{100 * part / whole:.0f} %"


def _bias(figure: Mapping[str, float | None], squared_norm: float | None) -> str:
    value, error = figure["value"], figure["error"]
    if value is None or error is None or not squared_norm or squared_norm < 0:
        return MISSING
    return f"{100 * value / squared_norm:.2g} %" if value > VISIBLE * error else "none seen"


def aligned(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a Markdown table that can be read as it stands."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [{name: name for name in widths}, {name: "-" * width for name, width in widths.items()}, *rows]
    return "\n".join(
        "| " + " | ".join(f"{line[name]:{'<' if name == 'estimator' else '>'}{widths[name]}}" for name in widths) + " |"
        for line in lines
    )


def markdown(facts: Mapping[str, Any], headline: str, entries: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"# Estimators on checkpoints of {facts['run']}",
        "",
        f"{facts['batches']} batches of {facts['batch_size']} images, {facts['masks']} masks on each, "
        f"{facts['warm_up']} steps of warm-up, seed {facts['seed']}, alpha {facts['alpha']:g}; {headline}",
        "",
        LEGEND,
        "",
        "![variance of each estimator](gauge.svg)",
    ]
    for entry in entries:
        norm, error = (entry["reference"][name]["value"] for name in ("squared_norm", "squared_error"))
        lines += ["", f"## {entry['checkpoint']} ({entry['epoch']} epochs)", "", aligned(table_rows(entry)), ""]
        lines += [f"Reference gradient: squared norm {norm:.4g}, its expected squared error {error:.4g}."]
    return "\n".join(lines) + "\n"


# ---- the picture ----

WIDTH, LEFT, RIGHT = 760, 150, 120  # pixels; on the right stand the values
ROW, TITLE, GAP, BOTTOM = 22, 28, 12, 30
BETTER, WORSE, INK, FAINT = "#2a7f62", "#b5483a", "#333333", "#cccccc"
FINEST_TICKS = 8  # more ticks than that: powers of ten only
LARGEST = 4.0  # longer bars are cut: plain REINFORCE, thousands of times noisier, would leave no room for the others


def picture(entries: Sequence[Mapping[str, Any]]) -> str:
    """An SVG with one panel for each checkpoint: bars from 1 to the relative variance, whiskers of two errors."""
    panels = [
        (entry["checkpoint"], {name: figures["relative_variance"] for name, figures in entry["estimators"].items()})
        for entry in entries
    ]
    low, high = _range([figure for _, bars in panels for figure in bars.values()])

    def x(value: float) -> float:
        done = math.log(min(max(value, low), high) / low) / math.log(high / low)
        return LEFT + done * (WIDTH - LEFT - RIGHT)

    parts, top = [], 0
    for title, bars in panels:
        bottom = top + TITLE + ROW * len(bars)
        parts.append(_text(8, top + 19, title, "start", bold=True))
        for tick in _ticks(low, high):
            parts.append(_line(x(tick), top + TITLE, x(tick), bottom, INK if tick == 1 else FAINT))
        for number, (name, figure) in enumerate(bars.items()):
            parts += _bar(name, figure, top + TITLE + ROW * number, x)
        top = bottom + GAP
    parts += [_text(x(tick), top + 4, f"{tick:g}") for tick in _ticks(low, high)]
    parts.append(
        _text(
            LEFT,
            top + 22,
            f"variance, as a multiple of that of {REFERENCE} (logarithmic; bars end at {high:.3g})",
            "start",
        )
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + BOTTOM}" width="{WIDTH}" '
        f'height="{top + BOTTOM}" font-family="sans-serif" font-size="12" role="img">\n'
        f"<title>Variance of each estimator as a multiple of that of {REFERENCE}</title>\n"
        f'<rect width="{WIDTH}" height="{top + BOTTOM}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _range(figures: Sequence[Mapping[str, float | None]]) -> tuple[float, float]:
    """What the axis shows: 1 and all values up to `LARGEST`, with some room."""
    values = [figure["value"] for figure in figures if figure["value"] is not None and figure["value"] > 0]
    return min([*values, 1.0]) / 1.25, min(max([*values, 1.0]), LARGEST) * 1.25


def _ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks if len(ticks) <= FINEST_TICKS else [10.0**decade for decade in decades if low <= 10.0**decade <= high]


def _bar(name: str, figure: Mapping[str, float | None], top: float, x: Any) -> Iterator[str]:
    middle = top + ROW / 2
    yield _text(LEFT - 8, middle + 4, name, "end")
    value, error = figure["value"], figure["error"] or 0.0
    if value is None or value <= 0:
        yield _text(WIDTH - RIGHT + 8, middle + 4, MISSING, "start")
        return
    start, end = sorted((x(1.0), x(value)))
    colour = BETTER if value < 1 else WORSE
    yield f'<rect x="{start:.1f}" y="{top + 4}" width="{end - start:.1f}" height="{ROW - 8}" fill="{colour}"/>'
    yield _line(x(value - 2 * error), middle, x(value + 2 * error), middle, INK)
    yield _text(WIDTH - RIGHT + 8, middle + 4, f"{_short(value)} +- {_short(error)}", "start")


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight} fill="{INK}">{escape(text)}</text>'
