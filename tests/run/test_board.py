"""What TensorBoard is told, read back with its own reader."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from utils.run import board
from utils.run.board import Board, draw_rows, labelled_rows, score_colours


@pytest.fixture
def event_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time by which event files are named, to the second; a resumed run comes later than the first."""
    now = [1_700_000_000.0]
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time.time", lambda: now[0])
    return now


def read(folder: Path) -> EventAccumulator:
    # 0 keeps every event instead of a sample.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0})
    return events.Reload()


def write_epochs(folder: Path, epochs: range, purge_step: int | None = None) -> None:
    writer = Board(folder, purge_step=purge_step)
    for epoch in epochs:
        scores = {"conv1": torch.full((4,), epoch / 10), "conv2": torch.rand(8)}
        writer.scalars(epoch, {"train/loss": torch.tensor(epoch / 4), "test/top1": 10.0 * epoch})
        writer.score_histograms(epoch, scores)
        writer.score_map(epoch, scores)
    writer.close()


def test_everything_is_at_its_step(tmp_path: Path) -> None:
    write_epochs(tmp_path, range(3))
    events = read(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (0, 0.0),
        (1, 0.25),
        (2, 0.5),
    ]
    assert [(event.step, event.value) for event in events.Scalars("test/top1")] == [
        (0, 0.0),
        (1, 10.0),
        (2, 20.0),
    ]
    assert [event.step for event in events.Images("score_map")] == [0, 1, 2]
    histograms = events.Histograms("scores/conv1")
    assert [event.step for event in histograms] == [0, 1, 2]
    assert [event.histogram_value.num for event in histograms] == [4, 4, 4]


def test_histogram_bins_are_even_and_hold_every_score(tmp_path: Path) -> None:
    writer = Board(tmp_path)
    writer.score_histograms(7, {"conv": torch.tensor([0.0, 0.0, 0.51, 0.95, 1.0], requires_grad=True)})
    writer.close()
    (event,) = read(tmp_path).Histograms("scores/conv")
    counts = numpy.array(event.histogram_value.bucket)
    limits = numpy.array(event.histogram_value.bucket_limit)
    assert counts.sum() == 5
    numpy.testing.assert_allclose(numpy.diff(limits), 1 / 30)
    assert counts[numpy.isclose(limits, 1 / 30)] == 2
    assert counts[numpy.isclose(limits, 16 / 30)] == 1
    assert counts[numpy.isclose(limits, 29 / 30)] == 1
    assert counts[numpy.isclose(limits, 1)] == 1


def test_a_resumed_run_hides_what_it_writes_again(tmp_path: Path, event_clock: list[float]) -> None:
    write_epochs(tmp_path, range(5))
    event_clock[0] += 60
    write_epochs(tmp_path, range(3, 7), purge_step=3)
    events = read(tmp_path)
    for tag in ("train/loss", "test/top1"):
        assert [event.step for event in events.Scalars(tag)] == list(range(7))
    assert [event.step for event in events.Histograms("scores/conv1")] == list(range(7))
    assert [event.step for event in events.Images("score_map")] == list(range(7))


def test_without_a_purge_step_the_curves_would_run_backwards(tmp_path: Path, event_clock: list[float]) -> None:
    write_epochs(tmp_path, range(5))
    event_clock[0] += 60
    write_epochs(tmp_path, range(3, 7))
    assert [event.step for event in read(tmp_path).Scalars("train/loss")] == [0, 1, 2, 3, 4, 3, 4, 5, 6]


def test_the_layout_has_pages_charts_and_exact_tags(tmp_path: Path) -> None:
    writer = Board(tmp_path)
    writer.layout(
        {
            "Accuracy": {"top 1": ["train/acc@1", "test/acc@1"]},
            "Speed": {"step": ["speed/step.ms"], "layers": ["layers/"]},
        }
    )
    writer.text("command", "python main.py")
    writer.flush()
    events = read(tmp_path)
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [page.title for page in layout.category] == ["Accuracy", "Speed"]
    assert layout.category[0].chart[0].title == "top 1"
    assert list(layout.category[0].chart[0].multiline.tag) == ["^train/acc@1$", "^test/acc@1$"]
    assert [list(chart.multiline.tag) for chart in layout.category[1].chart] == [[r"^speed/step\.ms$"], ["^layers/"]]
    assert events.Tensors("command/text_summary")[0].tensor_proto.string_val == [b"python main.py"]
    writer.close()


def test_colours_run_from_dark_to_bright_and_zero_stands_out() -> None:
    colours = score_colours(numpy.array([0.0, 1e-6, 1 / 9, 1.0]))
    assert colours.tolist() == [[88, 88, 88], [68, 1, 84], [72, 40, 120], [253, 231, 37]]
    ramp = score_colours(numpy.linspace(1e-6, 1, 200)).astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (numpy.diff(ramp) > -1).all()
    assert ramp[-1] - ramp[0] > 150


def test_the_map_has_a_row_a_layer_and_a_column_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "ROW_HEIGHT", 2)
    monkeypatch.setattr(board, "GAP", 1)
    picture = draw_rows([numpy.array([0.0, 1.0]), numpy.array([1.0, 1 / 9, 0.0])], width=6)
    zero, low, one, white = [88, 88, 88], [72, 40, 120], [253, 231, 37], [255, 255, 255]
    first, second = [zero] * 3 + [one] * 3, [one] * 2 + [low] * 2 + [zero] * 2
    assert picture.tolist() == [first, first, [white] * 6, second, second]


@pytest.mark.parametrize("num_units", [1, 3, 511, 513, 2048])
def test_every_unit_has_a_column(num_units: int) -> None:
    scores = torch.linspace(0, 1, num_units)
    scores[::2] = 0  # neighbours differ
    line = labelled_rows({"conv": scores})[1].astype(int)
    changes = (numpy.diff(line, axis=0) != 0).any(axis=1).sum()
    colours = score_colours(scores.numpy())
    between = (numpy.diff(colours.astype(int), axis=0) != 0).any(axis=1).sum()
    assert between == max(0, num_units - 1)
    assert changes == between + 1  # and from the white beside the label to the first unit


@pytest.mark.parametrize("widest", [32, 2048])
def test_the_labelled_map_shows_the_map_beside_its_labels(tmp_path: Path, widest: int) -> None:
    """As large beside its text as any other, however wide the layers are."""
    scores = {"conv1": torch.rand(16), "layer1.0.conv1": torch.rand(widest, dtype=torch.bfloat16)}
    picture = labelled_rows(scores, key="key")
    scale, rest = divmod(picture.shape[1], board.PICTURE_WIDTH)
    assert rest == 0
    assert (scale > 1) == (widest > 500)
    height, pitch = scale * board.ROW_HEIGHT, scale * (board.ROW_HEIGHT + board.GAP)
    left = int((picture[0] == 255).all(axis=1).cumprod().sum())  # the first row of pixels has no letters
    rows = [values.float().numpy() for values in scores.values()]
    assert (picture[: 2 * pitch - scale * board.GAP, left:] == draw_rows(rows, picture.shape[1] - left, scale)).all()
    for top in (0, pitch, len(picture) - height):
        label = picture[top : top + height, :left]
        assert (label < 128).any(), "no label beside the row"
        assert (label[:, -4 * scale :] == 255).all(), "the label runs into the map"
    ramp = picture[-height:, left:]
    assert (ramp == draw_rows([numpy.linspace(0, 1, ramp.shape[1])], ramp.shape[1], scale)).all()
    writer = Board(tmp_path)
    writer.score_map(0, scores)
    writer.subnet(3, {"conv": torch.tensor([True, False])})
    writer.close()
    (event,), (chosen,) = (read(tmp_path).Images(tag) for tag in ("score_map", "chosen_subnet"))
    seen = numpy.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert (seen == labelled_rows(scores, board.KEY_LABEL)).all()
    assert chosen.step == 3


def test_a_label_counts_the_kept_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(board.ImageDraw.ImageDraw, "text", lambda _self, _at, text, **_: written.append(text))
    labelled_rows({"a": torch.tensor([0.9, 0.8, 0.0]), "b": torch.tensor([True, False])}, "key")
    assert list(dict.fromkeys(written)) == ["a  2/3", "b  1/2", "key"]
