"""The pictures of a report. Every function returns a figure of matplotlib, which nothing else in the project needs.

The colours are those of Okabe and Ito, which people with any kind of colour vision can tell apart. Lines differ in
their dashes as well.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tools.run_facts import RunFacts
from tools.step_times import PARTS, StepTimes

BLUE, ORANGE, GREEN, SKY, PURPLE, YELLOW = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#CC79A7", "#E69F00"
INK, GREY, PALE = "#222222", "#767676", "#d9d9d9"
RUN_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, INK)
DASHES = ("-", "--", "-.", ":")
PHASES = {"search": ("search", "#eef3f8"), "finetune": ("fine-tuning", "#fdf3e4")}  # word and shade of a phase
CURVES = {
    "train": ("training images", GREY, ":"),
    "heldout": ("held-out images", BLUE, "-"),
    "test": ("test images", ORANGE, "--"),
}
PART_COLOURS = dict(zip(PARTS, (BLUE, SKY, YELLOW, ORANGE, GREEN), strict=True))
SECONDS_COLOURS = {
    "waiting for images": YELLOW,
    "training steps": BLUE,
    "training steps and waiting for images": BLUE,
    "evaluation": SKY,
    "evaluation and choosing": SKY,
    "choosing the subnet": PURPLE,
}
WIDTH, HEIGHT, DPI = 5.6, 3.5, 200  # inches and dots per inch; the page shows 100 dots per inch
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def png(figure: Figure) -> bytes:
    """The figure as the content of a PNG file."""
    content = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    return content.getvalue()


def _axes(title: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, pad=10)
    return figure, axes


def _legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """A legend that can hide no data."""
    handles, labels = axes.get_legend_handles_labels()
    with matplotlib.rc_context(STYLE):
        figure.legend(handles, labels, loc="outside lower left", ncols=columns)


# ---- one run ----


def curves(run: RunFacts, quantity: str) -> Figure:
    """Accuracy ("top1") or loss ("loss") over the epochs, with the phases shaded and the result marked.

    A result from the end of the search lies beside the curve, because it is of the subnet that was chosen afterwards.
    """
    accuracy = quantity == "top1"
    figure, axes = _axes("Accuracy" if accuracy else "Loss")
    for prefix, (label, colour, dashes) in CURVES.items():
        epochs, values = run.column(f"{prefix}_{quantity}")
        if values:
            axes.plot(epochs, values, dashes, color=colour, label=label, marker="o", markersize=3)
    _shade_phases(axes, run)
    result = run.summary.get(f"test_{quantity}")
    if run.finished and result is not None:
        mark = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": ORANGE, "markeredgewidth": 1.8}
        axes.plot([run.result_epoch], [result], "o", label="result, on test images", linestyle="none", **mark)
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1 accuracy, %" if accuracy else "cross-entropy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(figure, axes, 2)
    return figure


def _shade_phases(axes: Axes, run: RunFacts) -> None:
    top = axes.get_xaxis_transform()  # a label at the upper edge, whatever the values are
    for stretch in run.stretches:
        if stretch.phase in PHASES:
            word, shade = PHASES[stretch.phase]
            axes.axvspan(stretch.first, stretch.last, color=shade, zorder=0, linewidth=0)
            middle = (stretch.first + stretch.last) / 2
            axes.text(middle, 1.0, word, transform=top, ha="center", va="bottom", fontsize=8, color=GREY)
    axes.set_xlim(left=0, right=max(run.epochs, 1) * 1.02)


def _layer_height(count: int) -> float:
    return max(HEIGHT, 1.3 + 0.2 * count)


def layer_bars(run: RunFacts) -> Figure:
    """The full width of every layer and what the subnet keeps of it."""
    figure, axes = _axes("Kept channels of each layer", _layer_height(len(run.layers)))
    places = np.arange(len(run.layers))
    widest = max(layer.width for layer in run.layers)
    axes.barh(places, [layer.width for layer in run.layers], color=PALE, height=0.75, label="full width")
    axes.barh(places, [layer.kept for layer in run.layers], color=BLUE, height=0.75, label="kept")
    for place, layer in zip(places, run.layers, strict=True):
        text = f"{layer.kept} of {layer.width}"
        axes.text(layer.width + 0.01 * widest, place, text, va="center", fontsize=8)
    axes.set_yticks(places, [layer.name for layer in run.layers], fontsize=8)
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.set_xlim(0, 1.16 * widest)
    axes.set_xlabel("channels")
    _legend_below(figure, axes, 2)
    return figure


def layers_over_time(run: RunFacts) -> Figure:
    """The kept share of each layer after every epoch, and in the chosen subnet."""
    scores = run.scores
    figure, axes = _axes("Kept share of each layer over time", _layer_height(len(scores.layers)))
    columns, labels = scores.shares(), [str(epoch) for epoch in scores.epochs]
    if scores.chosen is not None:
        gap = np.full((len(columns), 1), np.nan)
        columns = np.concatenate([columns, gap, scores.chosen_shares()[:, None]], axis=1)
    image = axes.imshow(columns, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    step = max(1, round(len(labels) / 8))
    ticks = list(range(0, len(labels), step))
    names = [labels[tick] for tick in ticks]
    if scores.chosen is not None:
        ticks, names = [*ticks, columns.shape[1] - 1], [*names, "chosen"]
    axes.set_xticks(ticks, names, fontsize=8)
    axes.set_yticks(range(len(scores.layers)), list(scores.layers), fontsize=8)
    axes.set_xlabel("finished epochs of the search")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1, 0), pad=0.02)
    bar.outline.set_visible(False)
    return figure


def score_maps(run: RunFacts) -> Figure:
    """Every score at the start, halfway and at the end of the search, and the chosen subnet.

    A row is a layer, stretched to the full width. Its units are in the order of their scores at the end, the same in
    all panels.
    """
    scores = run.scores
    panels = {f"{name} (epoch {scores.epochs[row]})": scores.scores[row] for name, row in scores.moments.items()}
    if scores.chosen is not None:
        panels["chosen subnet"] = scores.chosen.astype(np.float32)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 2 * min(4.0, max(1.5, 0.06 * len(scores.layers)))), layout="constrained")
        grid = figure.subplots(2, 2, squeeze=True)
        figure.suptitle("Scores of all channels", fontsize=11, fontweight="bold", x=0.01, ha="left")
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#585858")  # exactly 0: this channel is never drawn
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, values_U) in zip(grid.flat, panels.items(), strict=False):
        picture = np.stack([stretched(values_U, units, scores.scores[-1]) for units in scores.layers.values()])
        image = axes.imshow(
            np.ma.masked_equal(picture, 0), aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest"
        )
        axes.set_title(name, fontsize=9, fontweight="normal")
        axes.set_xticks([])
        axes.set_yticks([0, len(scores.layers) - 1], ["first layer", "last layer"], fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=grid, shrink=0.8, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("score", fontsize=8)
    figure.supxlabel("grey: exactly 0, the channel is dropped for good", fontsize=8, color=GREY, x=0.01, ha="left")
    return figure


def stretched(values_U: np.ndarray, units: slice, order_U: np.ndarray, width: int = 512) -> np.ndarray:
    """The values of one layer in falling order of others, each repeated until the row has `width` columns or more."""
    row = values_U[units][np.argsort(-order_U[units], kind="stable")]
    return row[np.arange(width) * len(row) // width]


def cost_bars(ratios: dict[str, float]) -> Figure:
    """What a run costs, by name, as fractions of what the dense network costs."""
    figure, axes = _axes("Cost against the dense network", max(2.2, 0.9 + 0.42 * len(ratios)))
    places = np.arange(len(ratios))
    percents = [100 * ratio for ratio in ratios.values()]
    axes.barh(places, percents, color=BLUE, height=0.6)
    largest = max(100.0, *percents)
    for place, percent in zip(places, percents, strict=True):
        axes.text(percent + 0.012 * largest, place, f"{percent:.1f} %", va="center", fontsize=9,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    axes.axvline(100, color=INK, linestyle="--", linewidth=1)
    axes.set_yticks(places, list(ratios))
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.set_xlim(0, 1.18 * largest)
    axes.set_xlabel("% of dense (dashed line: 100 %)")
    return figure


def seconds_bar(parts: dict[str, float]) -> Figure:
    """Where the seconds of a run went."""
    figure, axes = _axes("Where the seconds went", 1.9)
    _stack(axes, 0, [(name, seconds, SECONDS_COLOURS[name]) for name, seconds in parts.items()], named=True)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("seconds")
    _legend_below(figure, axes, 2)
    return figure


def step_bars(times: StepTimes) -> Figure:
    """The median parts of a step of the dense, the compact and the thin network."""
    figure, axes = _axes("One training step", 2.9)
    names = list(times.milliseconds)
    for place, name in enumerate(names):
        parts = [(part, times.quartiles(name, part)[1], PART_COLOURS[part]) for part in PARTS]
        _stack(axes, place, parts, named=place == 0)
        low, median, high = times.quartiles(name, "whole step")
        axes.errorbar(
            [median],
            [place + 0.36],
            xerr=[[median - low], [high - median]],
            color=INK,
            capsize=3,
            fmt="|",
            linewidth=1.2,
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms (bars: medians; line below: whole step with its quartiles)")
    _legend_below(figure, axes, 3)
    return figure


def _stack(axes: Axes, place: float, parts: Sequence[tuple[str, float, str]], named: bool) -> None:
    """One horizontal bar of parts."""
    left = 0.0
    for name, size, colour in parts:
        axes.barh(place, size, left=left, color=colour, height=0.6, label=name if named else None, edgecolor="white")
        left += size


# ---- several runs ----


def run_style(number: int) -> dict[str, str]:
    """Colour and dashes of the run with this number, from 0."""
    colours = len(RUN_COLOURS)
    return {"color": RUN_COLOURS[number % colours], "linestyle": DASHES[number // colours % len(DASHES)]}


def scatter(runs: Sequence[RunFacts], costs: Sequence[float | None], what: str, unit: str) -> Figure:
    """Test accuracy with its interval against a cost; runs are called by their numbers in the table, from 1."""
    figure, axes = _axes(f"Accuracy against {what}")
    for number, (run, cost) in enumerate(zip(runs, costs, strict=True)):
        if cost is None or run.accuracy is None:
            continue
        colour = run_style(number)["color"]
        if run.interval is not None:
            low, high = run.interval
            axes.plot([cost, cost], [low, high], color=colour, linewidth=1.2, alpha=0.7)
        axes.plot(
            [cost], [run.accuracy], "o", color=colour, markersize=7, markerfacecolor=colour if run.finished else "white"
        )
        axes.annotate(str(number + 1), (cost, run.accuracy), xytext=(8, 4), textcoords="offset points", fontsize=10)
    axes.set_xlim(left=0)
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel(unit)
    axes.set_ylabel("test top-1 accuracy, %")
    return figure


def overlaid(runs: Sequence[RunFacts], column: str, title: str, unit: str) -> Figure:
    """One column of results.csv over the epochs of all runs."""
    rows = (len(runs) + 1) // 2
    figure, axes = _axes(title, HEIGHT + 0.18 * rows)
    for number, run in enumerate(runs):
        epochs, values = run.column(column)
        label = f"{number + 1} {shortened(run.name)}"
        axes.plot(epochs, values, label=label.replace("$", r"\$"), marker="o", markersize=3, **run_style(number))
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(figure, axes, 2)
    return figure


def shortened(name: str, length: int = 28) -> str:
    """A name that fits into a legend; the end of a name tells more than its beginning."""
    return name if len(name) <= length else f"...{name[3 - length :]}"
