"""The picture of a table: one panel for each network and cost, one labelled point with its interval for each row."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from tools.picture_labels import Box, Mark, places
from tools.report_figures import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, SKY, STYLE, YELLOW
from tools.table_figures import Results
from tools.table_report import IMAGES

COLOURS = {"dense": INK, "thin": ORANGE, "vrpge": BLUE, "coin": SKY, "random": YELLOW, "gumbel": GREEN}  # by method
OTHER_COLOUR = PURPLE
WIDTH, HEIGHT = 6.2, 4.6  # of a panel, in inches
LETTERS = 66  # of the title, that fit above a panel
POINT = 5.5  # diameter of a point, in points of 1/72 inch


class Point(NamedTuple):
    """A row in a panel: cost, accuracy in per cent, half of its interval or None, label and colour."""

    x: float
    y: float
    half: float | None
    label: str
    colour: str


def draw(results: Results, rows: Sequence[str]) -> Figure:
    """One row of panels for each dense row. All of `rows` have runs, and the epochs of their dense rows are known."""
    table = results.table
    networks, drawn = list(dict.fromkeys(table.dense[row] for row in rows)), []
    has_seconds = any(results.values(row, "train_cpu_seconds") for row in rows)
    with matplotlib.rc_context(STYLE):
        across, down = (2, len(networks)) if has_seconds else (len(networks), 1)
        figure = Figure(figsize=(WIDTH * across, HEIGHT * down + 0.7), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(down, across, squeeze=False).reshape(len(networks), -1)
        lines = textwrap.wrap(table.title, LETTERS * across)
        figure.suptitle("\n".join(lines), fontsize=11, fontweight="bold")
        figure.supxlabel(_about(results, rows), fontsize=8, color=GREY)
        for network, of_network in zip(networks, panels, strict=True):
            own = [row for row in rows if table.dense[row] == network]
            epochs = results.dense_epochs(network)
            for axes, cost in zip(of_network, ("flops", "seconds"), strict=False):
                label = f"training FLOPs, in % of {epochs:g} epochs of dense training"
                drawn.append((axes, _panel(axes, results, own, cost, label)))
        figure.canvas.draw()  # places the panels; labels must not move them
        figure.set_layout_engine("none")
        for axes, points in drawn:
            _label(axes, points)
    return figure


def save(figure: Figure, path: Path) -> None:
    """As an .svg or .png file, with the same bytes for the same picture."""
    settings = {**STYLE, "svg.hashsalt": "", "svg.fonttype": "path"}
    with matplotlib.rc_context(settings):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def _about(results: Results, rows: Sequence[str]) -> str:
    counts = sorted({len(results.runs[row]) for row in rows})
    seeds = f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seed{'s' * (counts[0] > 1)}"
    pooled = results.pooled()
    if pooled is None:
        return f"Means over {seeds}."
    apart = [row for row in rows if row in results.table.not_pooled]
    return (
        f"Means over {seeds}. Bars: 95 % intervals of the means by the pooled standard deviation, {pooled.sd:.2f} "
        "points" + (f"\n(of {', '.join(apart)}: by that of their own runs)." if apart else ".")
    )


def _panel(axes: Axes, results: Results, rows: Sequence[str], cost: str, flops_label: str) -> list[Point]:
    """Draws the points of one panel, without their labels."""
    first = rows[0].partition(" ")[0] + " "
    shared = first if len(rows) > 1 and all(row.startswith(first) for row in rows) else ""  # the name of the network
    points = [_point(results, row, cost, row[len(shared) :]) for row in rows]
    points = [point for point in points if point is not None]
    axes.set_xscale("log")
    axes.margins(x=0.16, y=0.12)
    for x, y, half, _, colour in points:
        if half is not None:
            axes.errorbar(x, y, half, fmt="none", ecolor=colour, elinewidth=1.1, capsize=2.5)
        axes.plot([x], [y], "o", color=colour, markersize=POINT, zorder=3)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 4 * low else MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=PALE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel(flops_label if cost == "flops" else "processor seconds of the training steps")
    axes.set_ylabel(f"{IMAGES[results.table.judge]} top-1 accuracy, %")
    axes.set_title(shared.strip(), pad=6)
    return points


def _point(results: Results, row: str, cost: str, label: str) -> Point | None:
    if cost == "flops":
        x = 100 * results.train_flops_to_dense(row)
    elif seconds := results.values(row, "train_cpu_seconds"):
        x = sum(seconds.values()) / len(seconds)
    else:
        return None
    top1 = results.values(row, results.table.accuracy).values()
    options = results.table.rows[row].options
    colour = COLOURS.get(options.get("method", "vrpge"), OTHER_COLOUR)
    return Point(x, sum(top1) / len(top1), results.half_interval(row), label, colour)


# ---- labels ----


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Writes the label of every point beside it, with a line to the point where it is far away."""
    pixels = axes.figure.dpi / 72
    renderer = axes.figure.canvas.get_renderer()
    texts, marks = [], []
    for point in points:
        style = {"fontsize": 8, "color": point.colour, "ha": "center", "va": "center"}
        text = axes.annotate(point.label, (point.x, point.y), (0, 0), textcoords="offset points", **style)
        size = text.get_window_extent(renderer)
        texts.append(text)
        marks.append(_mark(axes, point, size.width / pixels, size.height / pixels))
    area = axes.get_window_extent(renderer)
    spots = places(marks, Box(*(edge / pixels for edge in area.extents)))
    for point, text, mark, spot in zip(points, texts, marks, spots, strict=True):
        centre = (spot.box.left + spot.box.right) / 2, (spot.box.bottom + spot.box.top) / 2
        text.set_position((centre[0] - mark.x, centre[1] - mark.y))
        if spot.line:
            end = axes.transData.inverted().transform([pixels * edge for edge in spot.box.nearest(mark.x, mark.y)])
            style = {"color": point.colour, "linewidth": 0.6, "alpha": 0.7, "scalex": False, "scaley": False}
            axes.plot([point.x, end[0]], [point.y, end[1]], **style)


def _mark(axes: Axes, point: Point, width: float, height: float) -> Mark:
    """Where a point is in the picture and what it covers with its interval."""
    low, high = (point.y - (point.half or 0), point.y + (point.half or 0))
    places = axes.transData.transform([(point.x, y) for y in (point.y, low, high)]) * 72 / axes.figure.dpi
    (x, y), (_, bottom), (_, top) = places.tolist()
    covers = [Box.around(x, y, POINT / 2 + 1, POINT / 2 + 1)]
    if point.half is not None:
        covers.append(Box(x - 3, bottom, x + 3, top))
    return Mark(x, y, tuple(covers), width, height)
