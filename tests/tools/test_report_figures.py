"""The pictures of a report: what is drawn is what the files say, read back from the figures."""

import io

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex

from tests.tools.run_folder import CHOSEN, SCORES, history, write_dense, write_run, write_scores
from tests.tools.test_report import TIMES
from tools import report
from tools import report_figures as figures
from tools.run_files import read_run, read_runs
from tools.step_times import PARTS


def lines(axes):
    """The points of every line by its name."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


def bars(axes):
    """Left end and length of every bar, from the first to the last drawn."""
    return [(round(bar.get_x(), 9), round(bar.get_width(), 9)) for bar in axes.patches]


def words(axes):
    return [text.get_text() for text in axes.texts]


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_a_picture_is_a_png_of_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "DPI", 20)
    figure = figures.curves(read_run(write_run(tmp_path / "a")), "loss")
    assert Image.open(io.BytesIO(figures.png(figure))).size == (112, 70)


@pytest.mark.parametrize(
    ("quantity", "first", "slope", "offset", "result"),
    [("top1", 1, 10, 1, 43.0), ("loss", 2.1, -0.1, 0.1, 1.77)],
)
def test_curves_are_the_columns_of_the_file(quantity, first, slope, offset, result, tmp_path):
    axes = figures.curves(read_run(write_run(tmp_path / "a", summary={"best_epoch": 3})), quantity).axes[0]
    seen = lines(axes)
    for number, name in enumerate(("training images", "held-out images", "test images")):
        told = [[i, first + number * offset + slope * i] for i in (1, 2, 3, 4)]
        assert np.allclose(seen.pop(name), told)
    assert seen.pop("result, on test images") == [[3, result]]
    assert seen == {}
    spans = [(bar.get_x(), bar.get_width(), to_hex(bar.get_facecolor())) for bar in axes.patches]
    assert spans == [(0, 3, "#eef3f8"), (3, 1, "#fdf3e4")]
    assert words(axes) == ["search", "fine-tuning"]


def test_an_unfinished_run_reports_no_epoch(tmp_path):
    axes = figures.curves(read_run(write_run(tmp_path / "a", summary={}, rows=history()[:2])), "top1").axes[0]
    assert list(lines(axes)) == ["training images", "held-out images", "test images"]
    assert words(axes) == ["search"]


def test_the_bars_of_layers_are_their_widths_and_what_is_kept(tmp_path):
    axes = figures.layer_bars(read_run(write_run(tmp_path / "a"))).axes[0]
    assert bars(axes) == [(0, 4), (0, 6), (0, 3), (0, 2)]
    assert words(axes) == ["3 of 4", "2 of 6"]
    assert ticks(axes.yaxis) == ["first", "second"]


@pytest.mark.parametrize("chosen", [True, False])
def test_layers_over_time_are_mean_scores_and_then_the_chosen_share(chosen, tmp_path):
    folder = write_run(tmp_path / "a", scores=False)
    write_scores(folder, **({"chosen": CHOSEN} if chosen else {}))
    axes, bar = figures.layers_over_time(read_run(folder)).axes
    own = SCORES.astype(float)
    seen = np.ma.getdata(axes.images[0].get_array())
    assert np.allclose(seen[:, :4], [own[:, :4].mean(1), own[:, 4:].mean(1)])
    if chosen:
        assert np.isnan(seen[:, 4]).all()
        assert np.allclose(seen[:, 5], [3 / 4, 2 / 6])
    assert seen.shape[1] == (6 if chosen else 4)
    assert ticks(axes.xaxis) == ["0", "1", "2", "3", *(["chosen"] if chosen else [])]
    assert ticks(axes.yaxis) == ["first", "second"]
    assert axes.images[0].get_clim() == (0, 1)
    assert bar.get_ylim() == (0, 1)


def test_score_maps_show_the_scores_of_their_time_in_the_order_of_the_end(tmp_path):
    panels = figures.score_maps(read_run(write_run(tmp_path / "a"))).axes[:4]
    assert [axes.get_title() for axes in panels] == [
        *("start (epoch 0)", "middle (epoch 1)", "end (epoch 3)", "chosen subnet")
    ]
    orders = ([0, 2, 3, 1], [8, 7, 6, 4, 5, 9])  # of falling scores at the end; equal ones as they stand
    for axes, values in zip(panels, (SCORES[0], SCORES[1], SCORES[3], CHOSEN), strict=True):
        picture = axes.images[0].get_array()
        for row, order in zip(picture, orders, strict=True):
            shown = [float(np.ma.getdata(row)[(2 * i + 1) * 512 // (2 * len(order))]) for i in range(len(order))]
            assert shown == [float(values[unit]) for unit in order]
        assert np.array_equal(np.ma.getmaskarray(picture), np.ma.getdata(picture) == 0)  # grey is exactly 0


def test_a_row_of_the_score_map_gives_every_channel_a_place_of_its_own():
    row = figures.stretched(np.arange(7.0), slice(2, 7), -np.arange(7.0), width=12)
    assert row.tolist() == [2, 2, 2, 3, 3, 4, 4, 4, 5, 5, 6, 6]


def test_cost_bars_are_percentages_of_dense():
    axes = figures.cost_bars({"inference FLOPs": 0.234, "time of the whole run": 1.25}).axes[0]
    assert bars(axes) == [(0, 23.4), (0, 125)]
    assert words(axes) == ["23.4 %", "125.0 %"]
    assert axes.get_lines()[0].get_xdata() == [100, 100]
    assert ticks(axes.yaxis) == ["inference FLOPs", "time of the whole run"]


def test_the_bar_of_seconds_is_their_sum(tmp_path):
    run = read_run(write_run(tmp_path / "a"))
    axes = figures.seconds_bar(run.parts).axes[0]
    assert bars(axes) == [(0, 10), (10, 90), (100, 26), (126, 14)]
    assert axes.get_legend_handles_labels()[1] == list(run.parts)


def test_every_part_of_the_seconds_has_a_colour(tmp_path):
    late = ("data_seconds", "evaluation_seconds")
    rows = [{key: value for key, value in row.items() if key not in late} for row in history()]
    older = read_run(write_run(tmp_path / "a", rows=rows))
    assert bars(figures.seconds_bar(older.parts).axes[0]) == [(0, 100), (100, 40)]


def test_the_bars_of_a_step_are_the_medians_of_its_parts():
    axes = figures.step_bars(TIMES).axes[0]
    medians = [[base + 4 + n for n in range(len(PARTS))] for base in (100, 200, 300)]
    told = [(sum(parts[:n]), size) for parts in medians for n, size in enumerate(parts)]
    assert bars(axes) == told
    spans = [line for line in axes.collections if len(line.get_segments()) == 1]
    ends = [line.get_segments()[0][:, 0].tolist() for line in spans]
    assert ends == [[base + 7, base + 15] for base in (100, 200, 300)]  # the quartiles of whole steps
    assert ticks(axes.yaxis) == ["dense", "compact", "thin"]


# ---- several runs ----


def test_runs_stand_at_their_cost_and_accuracy_with_their_interval(tmp_path):
    runs = read_runs([write_run(tmp_path / "a"), write_dense(tmp_path / "d"), write_run(tmp_path / "u", summary={})])
    axes = figures.scatter(runs, [23.4, None, 24.0], "inference FLOPs", "%").axes[0]
    interval, point, unfinished = [line.get_xydata() for line in axes.get_lines()]
    assert np.allclose(interval, [[23.4, 38.24], [23.4, 47.89]], atol=0.01)
    assert np.allclose(point, [[23.4, 43]])
    assert np.allclose(unfinished, [[24.0, 43]])
    assert words(axes) == ["1", "3"]
    assert axes.get_lines()[2].get_markerfacecolor() == "white"


def test_each_comparison_has_its_own_cost(tmp_path, monkeypatch):
    runs = read_runs([write_run(tmp_path / "a"), write_dense(tmp_path / "d")])
    monkeypatch.setattr(figures, "scatter", lambda runs, costs, what, unit: (what, costs))
    monkeypatch.setattr(figures, "overlaid", lambda runs, column, title, unit: (title, column))
    monkeypatch.setattr(figures, "png", lambda told: told)
    assert {picture.stem: picture.content for picture in report.comparison_pictures(runs)} == {
        "compare_inference_FLOPs": ("inference FLOPs", [pytest.approx(23.4), 100.0]),
        "compare_training_FLOPs": ("training FLOPs", [pytest.approx(4 * 0.567), pytest.approx(4.4)]),
        "compare_seconds": ("seconds", [140.0, 200.0]),
        "compare_accuracy": ("Accuracy on held-out images", "heldout_top1"),
        "compare_loss": ("Loss on training images", "train_loss"),
    }
    rows = [{key: value for key, value in row.items() if not key.startswith("heldout")} for row in history()]
    without = read_run(write_run(tmp_path / "b", rows=rows))
    told = report.comparison_pictures([*runs, without])[3].content
    assert told == ("Accuracy on test images", "test_top1")


def test_overlaid_curves_are_those_of_each_run(tmp_path):
    other = [row | {"train_loss": 9.0} for row in history()[:2]]
    runs = read_runs([write_run(tmp_path / "a$b$"), write_run(tmp_path / "b", rows=other, summary={})])
    axes = figures.overlaid(runs, "train_loss", "Loss", "cross-entropy").axes[0]
    seen = lines(axes)
    assert list(seen) == [r"1 a\$b\$", "2 b"]
    assert np.allclose(seen[r"1 a\$b\$"], [[1, 2.0], [2, 1.9], [3, 1.8], [4, 1.7]])
    assert seen["2 b"] == [[1, 9], [2, 9]]


def test_no_two_of_many_runs_look_alike():
    styles = {tuple(figures.run_style(number).items()) for number in range(28)}
    assert len(styles) == 28


def test_long_names_keep_their_end():
    assert figures.shortened("short") == "short"
    assert figures.shortened("a" * 40 + "/1") == "..." + "a" * 23 + "/1"
