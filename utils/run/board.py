"""What a run shows in TensorBoard."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter

# Pages of the custom scalars tab: page title -> chart title -> tags of the curves in that chart.
Layout = Mapping[str, Mapping[str, Sequence[str]]]

HISTOGRAM_EDGES = numpy.linspace(0, 1, 31)  # the default ones are logarithmic: seven bins for all above 1/2

# The colour map "viridis" (its brightness grows evenly) at ten equal distances from 0 to 1.
VIRIDIS = numpy.array([
    (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142),
    (31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37),
])  # fmt: skip
ZERO_COLOUR = (88, 88, 88)  # the colour map has no grey
BACKGROUND = (255, 255, 255)
ROW_HEIGHT = 12  # pixels; one more separates two rows
MAP_WIDTH = 512  # pixels, unless a layer has more units
KEY_LABEL = "key: 0 grey, up to 1"


class Board:
    """Event files of one run, read by `tensorboard --logdir FOLDER`.

    Args:
        folder: where the event files go; a resumed run passes the same one.
        purge_step: first step that a resumed run writes again; earlier events from there on are hidden, so
            that no curve runs backwards.
    """

    def __init__(self, folder: str | Path, purge_step: int | None = None) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)

    def layout(self, pages: Layout) -> None:
        """Group curves into charts and charts into pages of the custom scalars tab."""
        # TensorBoard takes tags for patterns that match any longer tag too.
        self._writer.add_custom_scalars(
            {
                page: {title: ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]] for title, tags in charts.items()}
                for page, charts in pages.items()
            }
        )

    def scalars(self, step: int, values: Mapping[str, float | torch.Tensor]) -> None:
        """Write numbers or 0-d tensors under their tags, such as "train/loss"; waits for the device."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, float(value), step)

    def score_histograms(self, step: int, scores: Mapping[str, torch.Tensor]) -> None:
        """Write one histogram over [0, 1] for each layer's scores."""
        for name, layer_scores in scores.items():
            self._writer.add_histogram(f"scores/{name}", layer_scores.detach(), step, bins=HISTOGRAM_EDGES)

    def score_map(self, step: int, scores: Mapping[str, torch.Tensor]) -> None:
        """Write one picture of all scores: a row for each layer, from its first unit to its last."""
        self._writer.add_image("score_map", labelled_score_map(scores), step, dataformats="HWC")

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Write a text in Markdown."""
        self._writer.add_text(tag, text, step)

    def flush(self) -> None:
        """Bring everything written so far onto the disk."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def score_colours(scores: numpy.ndarray) -> numpy.ndarray:
    """Colours of scores in [0, 1]: dark to bright, and grey for exactly 0, a unit that is never drawn.

    Returns: (..., 3) uint8.
    """
    positions = numpy.linspace(0, 1, len(VIRIDIS))
    channels = [numpy.interp(scores, positions, channel) for channel in VIRIDIS.T]
    colours = numpy.stack(channels, axis=-1).round().astype(numpy.uint8)
    colours[scores == 0] = ZERO_COLOUR
    return colours


def draw_score_map(rows: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """Picture with one row of colours for each array of scores, all of the same width, thin lines between.

    Every unit gets at least one column of pixels: nobody has to guess whether one was left out.

    Returns: (height, width, 3) uint8.
    """
    width = max(MAP_WIDTH, *(len(row) for row in rows))
    picture = numpy.full((len(rows) * (ROW_HEIGHT + 1) - 1, width, 3), BACKGROUND, dtype=numpy.uint8)
    for index, row in enumerate(rows):
        units = numpy.arange(width) * len(row) // width
        top = index * (ROW_HEIGHT + 1)
        picture[top : top + ROW_HEIGHT] = score_colours(row)[units]
    return picture


def labelled_score_map(scores: Mapping[str, torch.Tensor]) -> numpy.ndarray:
    """The score map with each layer's name and number of units on the left, and a colour key below.

    Returns: (height, width, 3) uint8.
    """
    rows = [layer_scores.detach().flatten().float().cpu().numpy() for layer_scores in scores.values()]
    layers = draw_score_map(rows)
    key = draw_score_map([numpy.linspace(0, 1, MAP_WIDTH)])
    labels = [f"{name} ({len(row)})" for name, row in zip(scores, rows, strict=True)]

    font = ImageFont.load_default()
    left = 10 + max(int(font.getlength(label)) for label in [*labels, KEY_LABEL])
    key_top = len(layers) + ROW_HEIGHT
    picture = Image.new("RGB", (left + layers.shape[1], key_top + ROW_HEIGHT), BACKGROUND)
    picture.paste(Image.fromarray(layers), (left, 0))
    picture.paste(Image.fromarray(key), (left, key_top))
    draw = ImageDraw.Draw(picture)
    tops = [*(index * (ROW_HEIGHT + 1) for index in range(len(labels))), key_top]
    for top, label in zip(tops, [*labels, KEY_LABEL], strict=True):
        draw.text((4, top), label, fill=(0, 0, 0), font=font)
    return numpy.asarray(picture)
