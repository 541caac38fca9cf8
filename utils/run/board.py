"""What a run shows in TensorBoard."""

import itertools
import re
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy
import torch
from google.protobuf.message import Message
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

# Pages of the custom scalars tab: page title -> chart title -> tags of the curves in that chart.
Layout = Mapping[str, Mapping[str, Sequence[str]]]

Option = str | bool | float

HISTOGRAM_EDGES = numpy.linspace(0, 1, 31)  # the default ones are logarithmic: seven bins for all above 1/2

# The colour map "viridis" (its brightness grows evenly) at ten equal distances from 0 to 1.
VIRIDIS = numpy.array([
    (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142),
    (31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37),
])  # fmt: skip
ZERO_COLOUR = (88, 88, 88)  # the colour map has no grey
BACKGROUND = (255, 255, 255)
KEY_LABEL = "0 (grey) to 1"
# In pixels, for a network without wide layers. TensorBoard shows every picture 350 pixels wide.
PICTURE_WIDTH, ROW_HEIGHT, GAP, MARGIN, FONT_SIZE = 700, 26, 2, 6, 22


class Board:
    """Event files of one run, read by `tensorboard --logdir FOLDER`.

    Args:
        folder: where the event files go; a resumed run passes the same one.
        purge_step: first step that a resumed run writes again; earlier events from there on are hidden, so
            that no curve runs backwards.

    Once the disk has refused anything, all methods but `close` raise OSError.
    """

    def __init__(self, folder: str | Path, purge_step: int | None = None) -> None:
        self._open = partial(SummaryWriter, str(folder), purge_step=purge_step, flush_secs=10)
        self._opened: SummaryWriter | None = None
        self._error: OSError | None = None

    @property
    def _writer(self) -> SummaryWriter:
        if self._error is not None:
            raise self._error
        if self._opened is None:
            silence_writers()
            try:
                self._opened = self._open()
            except OSError as error:
                self._error = error
                raise
        return self._opened

    def layout(self, pages: Layout) -> None:
        """Group curves into charts and charts into pages of the custom scalars tab.

        A tag that ends with a slash stands for all curves below it.
        """
        self._writer.add_custom_scalars(
            {
                page: {title: ["Multiline", list(map(_pattern, tags))] for title, tags in charts.items()}
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
        self._writer.add_image("score_map", labelled_rows(scores, KEY_LABEL), step, dataformats="HWC")

    def subnet(self, step: int, masks: Mapping[str, torch.Tensor]) -> None:
        """Write a picture of a fixed subnet: kept channels are bright, the others grey."""
        self._writer.add_image("chosen_subnet", labelled_rows(masks), step, dataformats="HWC")

    def hyperparameters(
        self, columns: Mapping[str, type], given: Mapping[str, Option], results: Mapping[str, str], first: Sequence[str]
    ) -> None:
        """Write the row of the run in the HParams tab.

        Args:
            columns: the type of each column. TensorBoard shows the columns of one run for all runs, so every run must
                pass the same ones.
            given: the columns that have a value in this run.
            results: tags of the curves whose last values are shown beside them -> headings.
            first: the columns that are shown without a click: TensorBoard selects the first five.
        """
        types = {str: "DATA_TYPE_STRING", bool: "DATA_TYPE_BOOL"}
        experiment = api_pb2.Experiment(
            hparam_infos=[
                # TensorBoard sorts by name, but puts those before all others that are said to differ between runs.
                api_pb2.HParamInfo(name=name, type=types.get(kind, "DATA_TYPE_FLOAT64"), differs=name in first)
                for name, kind in columns.items()
            ],
            metric_infos=[
                api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=heading)
                for tag, heading in results.items()
            ],
        )
        start = plugin_data_pb2.SessionStartInfo()
        for name, value in given.items():
            kind = {str: "string_value", bool: "bool_value"}.get(type(value), "number_value")
            setattr(start.hparams[name], kind, value)
        self._of_hparams(metadata.EXPERIMENT_TAG, experiment=experiment)
        self._of_hparams(metadata.SESSION_START_INFO_TAG, session_start_info=start)

    def finished(self) -> None:
        """Mark the run as finished in the HParams tab."""
        end = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.Value("STATUS_SUCCESS"))
        self._of_hparams(metadata.SESSION_END_INFO_TAG, session_end_info=end)

    def _of_hparams(self, tag: str, **content: Message) -> None:
        # add_hparams of the writer would make a run of its own for them, named after the time.
        data = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content)
        plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString())
        value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
        self._writer.file_writer.add_summary(Summary(value=[value]))

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Write a text in Markdown."""
        self._writer.add_text(tag, text, step)

    def flush(self) -> None:
        """Bring everything written so far onto the disk."""
        self._writer.flush()

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()


def silence_writers() -> None:
    """Keeps a thread of TensorBoard from printing a traceback when the disk refuses what it writes.

    It passes the error on to whoever writes next.
    """
    told = threading.excepthook
    if getattr(told, "leaves_out_writers", False):
        return

    def tell(thread: threading.ExceptHookArgs) -> None:
        if not (isinstance(thread.exc_value, OSError) and type(thread.thread).__module__.startswith("tensorboard")):
            told(thread)

    tell.leaves_out_writers = True
    threading.excepthook = tell


def _pattern(tag: str) -> str:
    """TensorBoard takes a tag for a pattern, which would match any longer tag too."""
    return f"^{re.escape(tag)}" if tag.endswith("/") else f"^{re.escape(tag)}$"


def score_colours(scores: numpy.ndarray) -> numpy.ndarray:
    """Colours of scores in [0, 1]: dark to bright, and grey for exactly 0, a unit that is never drawn.

    Returns: (..., 3) uint8.
    """
    positions = numpy.linspace(0, 1, len(VIRIDIS))
    channels = [numpy.interp(scores, positions, channel) for channel in VIRIDIS.T]
    colours = numpy.stack(channels, axis=-1).round().astype(numpy.uint8)
    colours[scores == 0] = ZERO_COLOUR
    return colours


def draw_rows(rows: Sequence[numpy.ndarray], width: int, scale: int = 1) -> numpy.ndarray:
    """Picture with one row of colours for each array of scores, all of the same width, thin lines between.

    Args:
        rows: none has more scores than the picture has columns.
        scale: factor on all heights.
    Returns: (height, width, 3) uint8.
    """
    pitch, gap = scale * (ROW_HEIGHT + GAP), scale * GAP
    picture = numpy.full((len(rows) * pitch - gap, width, 3), BACKGROUND, dtype=numpy.uint8)
    for index, row in enumerate(rows):
        units = numpy.arange(width) * len(row) // width
        picture[index * pitch : (index + 1) * pitch - gap] = score_colours(row)[units]
    return picture


def labelled_rows(values: Mapping[str, torch.Tensor], key: str = "") -> numpy.ndarray:
    """One row of colours for each layer, from its first unit to its last.

    On the left of a row are the layer's name and how many of its channels are kept: the sum of its mask, or of its
    scores, which is what is expected. Every unit gets at least one column of pixels, so a network with wide layers gets
    a picture that is larger in all its parts. It reads the same when TensorBoard makes it as small as any other.

    Args:
        values: scores in [0, 1] or masks (units,) by layer.
        key: text beside a last row that shows the colours from 0 to 1; none if it is empty.
    Returns: (height, width, 3) uint8.
    """
    rows = [layer_values.detach().flatten().float().cpu().numpy() for layer_values in values.values()]
    labels = [f"{name}  {row.sum():.0f}/{len(row)}" for name, row in zip(values, rows, strict=True)]
    font = ImageFont.load_default(size=FONT_SIZE)
    left = 3 * MARGIN + max(int(font.getlength(label)) for label in [*labels, key])
    map_width = max(PICTURE_WIDTH - left, PICTURE_WIDTH // 3)  # names may be long
    scale = -(-max(map(len, rows)) // map_width)

    layers, pitch = draw_rows(rows, scale * map_width, scale), scale * (ROW_HEIGHT + GAP)
    if key:
        ramp = draw_rows([numpy.linspace(0, 1, scale * map_width)], scale * map_width, scale)
        layers = numpy.concatenate([layers, numpy.full_like(ramp[: pitch // 2], BACKGROUND[0]), ramp])
    picture = Image.new("RGB", (scale * (left + map_width), len(layers)), BACKGROUND)
    picture.paste(Image.fromarray(layers), (scale * left, 0))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=scale * FONT_SIZE)
    tops = [*range(0, len(rows) * pitch, pitch), len(layers) - scale * ROW_HEIGHT]
    for top, label in zip(tops, [*labels, key], strict=True):
        # TensorBoard leaves out pixels to make a picture smaller, and with them thin lines of letters: these are bold.
        for right, down in itertools.product((0, scale), repeat=2):
            draw.text((scale * MARGIN + right, top + down), label, fill=(0, 0, 0), font=font)
    return numpy.asarray(picture)
