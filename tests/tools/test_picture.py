"""The picture of a table: what it shows, and that no label lies on anything."""

from __future__ import annotations

import csv
import sys
from itertools import combinations
from math import sqrt
from pathlib import Path

import pytest

from tests.tools.stand_in import PROJECT
from tools import picture
from tools.picture_labels import Box, Mark, places
from tools.table_figures import Results, t_95
from tools.table_record import Record, record_path
from tools.tables import Table, read_table

pytest.importorskip("matplotlib")

from tools import picture_figure as drawing


def drawn(table: Table):
    results = Results.of(table, None, Record(record_path(table)))
    return results, drawing.draw(results, [row for row in table.rows if results.runs[row]])


def labels(axes) -> dict[str, tuple[float, float]]:
    """The points of a panel by their labels: where a label points to."""
    return {text.get_text(): text.xy for text in axes.texts}


def bars(axes) -> list[tuple[float, float, float]]:
    """The ends of all intervals of a panel: x, low, high."""
    return [tuple(line[i] for line, i in ((part[0], 0), (part[0], 1), (part[1], 1))) for part in segments(axes)]


def segments(axes) -> list:
    return [segment.tolist() for lines in axes.collections for segment in lines.get_segments()]


# ---- what it shows ----


@pytest.fixture(scope="module")
def cifar():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(PROJECT)
        return drawn(read_table("configs/tables/cifar.yaml"))


def test_the_points_are_the_figures_of_the_table(cifar):
    results, figure = cifar
    pooled = results.pooled()
    with open(PROJECT / "results/cifar.csv", newline="") as file:
        rows = {row["row"]: row for row in csv.DictReader(file) if row["seeds"] != "not run yet"}
    shown = {f"{axes.get_title('left')} {label}": xy for axes in figure.axes for label, xy in labels(axes).items()}
    assert set(shown) == set(rows)
    ends = [bar for axes in figure.axes for bar in bars(axes)]
    for name, row in rows.items():
        x, y = 100 * float(row["train_flops_to_dense"]), float(row["test_top1"])
        assert shown[name] == pytest.approx((x, y))
        seeds = len(row["seeds"].split())
        apart = "coin" in name
        half = t_95(seeds - 1 if apart else pooled.freedom) / sqrt(seeds)
        half *= float(row["test_top1_sd"]) if apart else pooled.sd
        assert any(bar == pytest.approx((x, y - half, y + half)) for bar in ends), name
    words = figure.get_supxlabel()
    assert "Means over 3 to 5 seeds" in words
    assert f"{pooled.sd:.2f} points" in words
    assert "vgg16 coin 0.25" in words


def test_no_label_lies_on_another_or_on_a_point_and_none_leaves_its_panel(cifar):
    _, figure = cifar
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        boxes = [text.get_window_extent(renderer) for text in axes.texts]
        assert len(boxes) > 8
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        frame = axes.get_window_extent(renderer)
        assert all(frame.contains(*box.min) and frame.contains(*box.max) for box in boxes)
        points = axes.transData.transform(list(labels(axes).values()))
        assert not any(box.contains(*point) for box in boxes for point in points)


def test_crowded_labels_find_room():
    """Eighteen points on a small place, six of them nearly on each other."""
    spots = [(100 + 0.1 * n, 100.0) for n in range(6)] + [(110 + 9 * n, 95.0 + 7 * (n % 5)) for n in range(12)]
    marks = [
        Mark(x, y, (Box.around(x, y, 4, 4), Box(x - 3, y - 20, x + 3, y + 20)), 40 + 5 * (n % 7), 9)
        for n, (x, y) in enumerate(spots)
    ]
    area = Box(0, 0, 400, 260)
    found = places(marks, area)
    covered = [box for mark in marks for box in mark.covers]
    for spot in found:
        assert area.contains(spot.box)
        assert not any(spot.box.overlaps(box) for box in covered)
        assert not any(spot.box.overlaps(other.box) for other in found if other is not spot)
        others = [other for other in found if other is not spot]
        assert not any(spot.box.overlaps(part) for other in others for part in other.line)
    assert [spot.away for spot in places(marks[-1:], area)] == [5]  # alone, a label is beside its point
    assert all(spot.away < 30 or spot.line for spot in found)


def test_processor_seconds_have_a_panel_of_their_own_from_the_record_alone(make, monkeypatch, capsys):
    monkeypatch.setenv("TEST_CPU_SECONDS", "100")
    assert make() == 0
    Path("runs").rename("far away")
    _, figure = drawn(read_table("table.yaml"))
    flops, seconds = figure.axes
    assert labels(seconds)["dense"] == pytest.approx((100.5, 90.5))
    assert labels(seconds)["half"] == pytest.approx((50.5, 86))
    assert labels(seconds)["same cost"] == pytest.approx((25.5 + 50 / 1024, 83.5 + 5 / 1024))
    assert labels(flops)["half"] == pytest.approx((50, 86))
    assert "training FLOPs, in % of 4 epochs of dense training" in flops.get_xlabel()
    assert "processor seconds" in seconds.get_xlabel()
    for _ in range(2):
        assert picture.main(["table.yaml"]) == 0
        first = Path("results/table.svg").read_bytes()
    assert picture.main(["table.yaml", "--rows", "half", "--out", "half.png"]) == 0
    assert Path("half.png").read_bytes()[:4] == b"\x89PNG"
    assert picture.main(["table.yaml"]) == 0
    assert Path("results/table.svg").read_bytes() == first
    assert "written: results/table.svg" in capsys.readouterr().out


def test_one_seed_has_a_point_without_an_interval(make):
    assert make("--seeds", "0") == 0
    _, figure = drawn(read_table("table.yaml"))
    [axes] = figure.axes
    assert len(labels(axes)) == 3
    assert segments(axes) == []
    assert figure.get_supxlabel() == "Means over 1 seed."


# ---- mistakes ----


def test_what_cannot_be_drawn_is_told(make, capsys, monkeypatch):
    assert make("--dry-run") == 0
    assert picture.main(["table.yaml"]) == 2
    assert "has no run of these rows; make them with `python -m tools.reproduce table.yaml`" in capsys.readouterr().err
    assert make("--rows", "half") == 0
    assert picture.main(["table.yaml"]) == 0  # the epochs of the dense row are known without a run of it
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Results, "dense_epochs", lambda self, row: None)
        assert picture.main(["table.yaml"]) == 2
    error = capsys.readouterr().err
    assert "compared with those of 'dense', of which results/table.runs.json has no run and table.yaml leaves" in error
    assert make("--rows", "dense") == 0
    for options, said in (
        (["--out", "x.pdf"], "--out must end with .svg or .png, got x.pdf"),
        (["--rows", "haf"], "--rows names 'haf', which is no row; did you mean 'half'?"),
        (["--out", "nowhere/x.svg"], "cannot write nowhere/x.svg: No such file or directory"),
    ):
        assert picture.main(["table.yaml", *options]) == 2
        assert said in capsys.readouterr().err
    assert picture.main(["table.yaml", "--out", "x.svg"]) == 0
    assert "not run yet, so not drawn: same cost" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "tools.picture_figure")
    monkeypatch.delitem(sys.modules, "tools.report_figures")
    assert picture.main(["table.yaml"]) == 2
    assert "a picture needs matplotlib" in capsys.readouterr().err
