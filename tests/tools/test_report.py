"""The report: what stands in its table and on its page, read back from the text and the HTML."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.page_reader import Page
from tests.tools.run_folder import history, write_dense, write_run
from tools import report, report_page, step_times
from tools.report_page import duration, percent, sentences
from tools.run_files import read_run, read_runs
from tools.step_times import PARTS, StepTimes

TIMES = StepTimes(
    {
        network: {part: [base + step + i for i in (0, 4, 16)] for step, part in enumerate((*PARTS, "whole step"))}
        for network, base in (("dense", 100.0), ("compact", 200.0), ("thin", 300.0))
    },
    batch_size=32,
    machine="Some CPU",
)


@pytest.fixture
def unpainted(monkeypatch) -> None:
    """Painting takes longer than everything else. Here the content of a picture is the title of its figure."""
    pytest.importorskip("matplotlib")
    from tools import report_figures

    def title(figure):
        return b"\x89PNG" + (figure.axes[0].get_title(loc="left") or figure.get_suptitle()).encode()

    monkeypatch.setattr(report_figures, "png", title)


@pytest.fixture
def page(tmp_path: Path, unpainted: None) -> Callable[..., Page]:
    """Writes the report on some runs and reads it."""

    def made(*folders: Path, out: Path = tmp_path / "out") -> Page:
        assert report.main([*map(str, folders), "--out", str(out)]) == 0
        return Page(out / "index.html")

    return made


# ---- words ----


def test_the_sentences_about_a_finished_run(tmp_path):
    run, dense = read_runs([write_run(tmp_path / "a", options={"budget": "flops"}), write_dense(tmp_path / "d")])
    assert sentences(run, dense) == [
        "vgg16 at 0.25 times its width was trained on FashionMNIST-mini with method vrpge.",
        "It keeps 45.6 % of the channels (budget: 50 % of the FLOPs).",
        "It classifies 43.00 % of 400 test images correctly (95 % interval 38.2 % to 47.9 %).",
        "This is the network after epoch 4 of 4.",
        "It needs 23.4 % of the FLOPs of the dense network and has 34.5 % of its parameters.",
        "Training took 2 min 20 s, of which 1 min 40 s were training steps.",
        "It cost 56.7 % of the FLOPs of dense training for as many epochs.",
        'The dense run "d" took 3 min 20 s on the same machine, of which 2 min 40 s were training steps.',
    ]
    assert sentences(dense, None) == [
        "vgg16 at 0.25 times its width was trained on FashionMNIST-mini with method dense.",
        "It classifies 83.00 % of 400 test images correctly (95 % interval 79.0 % to 86.4 %).",
        "This is the network after epoch 4 of 4.",
        "Training took 3 min 20 s, of which 2 min 40 s were training steps.",
        "It cost 110.0 % of the FLOPs of dense training for as many epochs.",
    ]


def test_the_sentences_about_an_unfinished_run(tmp_path):
    run = read_run(write_run(tmp_path / "a", summary={}, rows=history()[:2], options={"width_mult": 1.0}))
    assert sentences(run, None) == [
        "vgg16 was trained on FashionMNIST-mini with method vrpge.",
        "The run is not finished: 2 of 4 epochs are done.",
        "It classifies 23.00 % of the test images correctly.",
        "This is the network after epoch 2, the last one that was tested.",
        "It needs 22.0 % of the FLOPs of the dense network.",
        "Training has taken 41 s, of which 30 s were training steps.",
        "It cost 58.0 % of the FLOPs of dense training for as many epochs.",
    ]


def test_a_result_from_the_end_of_the_search_says_why(tmp_path):
    run = read_run(write_run(tmp_path / "a", summary={"best_epoch": 3}))
    assert (
        "This is the subnet as it was chosen after epoch 3; the fine-tuning up to epoch 4 did not improve it on "
        "held-out images."
    ) in sentences(run, None)


def test_numbers_in_words():
    assert [percent(None), percent(0.12345), percent(0.5, 0)] == ["unknown", "12.3 %", "50 %"]
    told = [duration(seconds) for seconds in (None, 9.876, 59.96, 100, 3599.6, 6000, 7170)]
    assert told == ["unknown", "9.88 s", "60 s", "1 min 40 s", "60 min 0 s", "1 h 40 min", "2 h 0 min"]


def test_the_machine_is_told_as_far_as_it_is_known(tmp_path):
    known = read_run(write_run(tmp_path / "a", environment={"git_dirty": True}))
    words = "Made with Some CPU, 2 threads, fp32, torch 9.8.7, commit 0123456789ab with changes, seed 7."
    assert report_page.machine_words(known) == words
    gpu = read_run(write_run(tmp_path / "b", environment={"gpu": "Some GPU", "git_commit": None, "num_threads": 1}))
    assert report_page.machine_words(gpu) == "Made with Some GPU, 1 thread, fp32, torch 9.8.7, seed 7."


# ---- the table as text ----


def test_the_text_table_has_every_number_of_every_run(tmp_path, capsys):
    folders = [
        write_dense(tmp_path / "d"),
        write_run(tmp_path / "half"),
        write_run(tmp_path / "more", summary={}, rows=history()[:2], options={"keep_ratio": 0.75}),
    ]
    assert report.main([*map(str, folders), "--table"]) == 0
    table, notes = capsys.readouterr().out.split("\n\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert [rows[0], *rows[2:]] == [
        [
            *("run", "test accuracy", "95 % interval", "kept channels", "inference FLOPs", "training FLOPs"),
            *("seconds", "method", "keep_ratio"),
        ],
        ["half", "43.00 %", "38.2 to 47.9 %", "45.6 %", "23.4 %", "2.27 epochs", "140", "vrpge", "0.5"],
        ["d", "83.00 %", "79.0 to 86.4 %", "100.0 %", "100.0 %", "4.40 epochs", "200", "dense", "-"],
        ["more (unfinished: 2 of 4 epochs)", "23.00 %", "-", "-", "22.0 %", "1.16 epochs", "41", "vrpge", "0.75"],
    ]
    assert "number of epochs of dense training" in notes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "half", "more"]  # nothing was written


def test_the_text_table_needs_no_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "tools.report_figures", raising=False)
    assert report.main([str(write_run(tmp_path / "a")), "--table"]) == 0
    assert "43.00 %" in capsys.readouterr().out


# ---- the page ----


def test_the_page_of_one_run_has_its_numbers_and_its_pictures(tmp_path, page):
    folder = write_run(tmp_path / "a")
    seen = page(folder)
    assert " ".join(sentences(read_run(folder), None)) in seen.text
    assert seen.table("Cost against the dense network") == [
        {"cost": "inference FLOPs", "of dense": "23.4 %"},
        {"cost": "parameters", "of dense": "34.5 %"},
        {"cost": "training FLOPs", "of dense": "56.7 %"},
    ]
    assert seen.table("Where the seconds went") == [
        {"part": "waiting for images", "seconds": "10.0", "share": "7.1 %"},
        {"part": "training steps", "seconds": "90.0", "share": "64.3 %"},
        {"part": "evaluation", "seconds": "26.0", "share": "18.6 %"},
        {"part": "choosing the subnet", "seconds": "14.0", "share": "10.0 %"},
    ]
    facts = "test accuracy\n43.00 %38.2 to 47.9 %\n\ninference FLOPs\n23.4 %of dense\n\nparameters\n34.5 %of dense\n\n"
    assert facts + "channels kept\n45.6 %\n\ntime\n2 min 20 s\n" in seen.text
    assert "The time against dense is not known." in seen.text
    names = ["accuracy", "loss", "layers", "layers_over_time", "cost", "seconds", "score_map"]
    files = [(tmp_path / "out" / f"{name}.png").read_bytes() for name in names]
    assert [content for _, content in seen.pictures] == files  # the same pictures, in this order
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.png")) == sorted(names)
    assert all(content.startswith(b"\x89PNG") and alt for alt, content in seen.pictures)


def test_the_page_needs_nothing_but_itself(tmp_path, page):
    seen = page(write_run(tmp_path / "a"), write_dense(tmp_path / "d"))
    assert all(reference.startswith("data:image/png;base64,") for reference in seen.references)
    assert not {"script", "link", "iframe", "object"} & set(seen.tags)
    assert "http" not in seen.source.replace("base64,", "").split("data:image")[0]
    assert "url(" not in report_page.CSS
    assert "@import" not in report_page.CSS


def test_the_page_of_several_runs_compares_them_and_then_shows_each(tmp_path, page):
    folders = [write_dense(tmp_path / "d"), write_run(tmp_path / "half")]
    seen = page(*folders)
    run, dense = read_runs(reversed(folders))
    assert seen.table("") == [{"#": str(n)} | row for n, row in enumerate(report.comparison([run, dense]), start=1)]
    assert seen.marked == {"method", "vrpge", "dense"}
    assert seen.tags.count("details") == 2
    assert " ".join(sentences(run, dense)) in seen.text
    assert {"cost": "time of the whole run", "of dense": "70.0 %"} in seen.table("Cost against the dense network")
    assert "The time against dense is not known." not in seen.text
    names = {path.stem for path in (tmp_path / "out").glob("*.png")}
    compared = {"inference_FLOPs", "training_FLOPs", "seconds", "accuracy", "loss"}
    assert {f"compare_{name}" for name in compared} | {"run_1_layers", "run_2_accuracy"} <= names
    assert len(seen.pictures) == len(names)


def test_text_from_a_run_is_escaped(tmp_path, page):
    name = "<b>&\"'$x$ <img src=x>"
    odd = write_run(tmp_path / "a", options={"name": name}, environment={"cpu": "<i>CPU"})
    dense = write_run(tmp_path / "d", options={"name": "<u>", "method": "dense"}, scores=False, best=False)
    alone, both = page(odd, out=tmp_path / "one"), page(odd, dense, out=tmp_path / "two")
    for seen in (alone, both):
        assert not {"b", "i", "u"} & set(seen.tags)
        assert len(seen.pictures) == len(seen.references)  # the picture in the name is none
        assert "Made with <i>CPU" in seen.text
    assert alone.text.strip().startswith(f"{name}\n{name}\n")  # title and heading
    assert [row["run"] for row in both.table("")] == [name, "<u>"]
    assert f"1 {name}" in both.text
    assert any(name in alt for alt, _ in both.pictures)


def test_the_page_of_a_run_that_has_just_begun_says_so(tmp_path, page):
    seen = page(write_run(tmp_path / "a", summary={}, rows=[], scores=False, best=False))
    assert "unfinished: 0 of 4 epochs" in seen.text
    assert "results.csv has no finished epoch yet" in seen.text
    assert "scores.npz is missing" in seen.text
    assert seen.pictures == []


def test_the_page_goes_into_the_folder_of_a_single_run_unless_told(tmp_path, unpainted, capsys):
    folder = write_run(tmp_path / "a")
    assert report.main([str(folder), "--html"]) == 0
    assert (folder / "report" / "index.html").is_file()
    assert capsys.readouterr().out == f"wrote {folder}/report/index.html and 7 pictures beside it\n"


# ---- measured steps ----


def test_measured_steps_stand_on_the_page_and_in_the_text(tmp_path, page, monkeypatch, capsys):
    monkeypatch.setattr(report, "measure", lambda run: TIMES if run.name == "a" else "of reasons")
    folders = [str(write_run(tmp_path / name, scores=False, best=False)) for name in "ab"]
    assert report.main([*folders, "--measure", "--out", str(tmp_path / "out")]) == 0
    seen = Page(tmp_path / "out" / "index.html")
    assert seen.table("One training step, in ms") == [
        {
            "network": name,
            **{part: f"{base + 4 + n}.0 ({base + 2 + n}.0-{base + 10 + n}.0)" for n, part in enumerate(PARTS)},
            "whole step": f"{base + 9}.0 ({base + 7}.0-{base + 15}.0)",
        }
        for name, base in (("dense", 100), ("compact", 200), ("thin", 300))
    ]
    assert "of 3 steps on one random batch of 32 images" in " ".join(seen.text.split())
    assert "The step was not measured, because of reasons." in seen.text
    capsys.readouterr()
    assert report.main([*folders, "--measure", "--table"]) == 0
    text = capsys.readouterr().out
    assert "| dense   | 104.0 (102.0-110.0) |" in text
    assert "The step of b was not measured, because of reasons." in text


def test_nothing_is_measured_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "measure", None)
    assert report.main([str(write_run(tmp_path / "a")), "--table"]) == 0


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"options": {"method": "gumbel"}}, "the step of method gumbel does not have these parts"),
        ({"best": False}, "checkpoints/best.pt is missing"),
        ({}, "checkpoints/best.pt is from a version that did not store the shape of the images"),
    ],
)
def test_a_step_that_cannot_be_measured_is_told_why(told, reason, tmp_path):
    assert step_times.measure(read_run(write_run(tmp_path / "a", **told))) == reason


# ---- mistakes ----


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "the following arguments are required: RUN"),
        ("a b", "say where it goes with --out DIR"),
        ("a --table --out x", "leave out --out or --table"),
        ("a --table --html", "not allowed with argument"),
        ("a --tab", "unrecognized arguments"),
        ("nowhere", "nowhere is not the folder of a run"),
    ],
)
def test_mistakes_are_told_in_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_run(tmp_path / name)
    assert report.main(words.split()) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_without_matplotlib_the_command_to_install_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "tools.report_figures", raising=False)
    monkeypatch.delattr("tools.report_figures", raising=False)
    assert report.main([str(write_run(tmp_path / "a")), "--measure"]) == 2
    assert "python -m pip install -r requirements-extra.txt" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told(tmp_path, unpainted, capsys):
    (tmp_path / "file").write_text("")
    assert report.main([str(write_run(tmp_path / "a")), "--out", str(tmp_path / "file" / "x")]) == 2
    assert "choose another --out" in capsys.readouterr().err
