"""What is known of a run from its folder: every number is the one of the file that it stands in."""

import json

import numpy as np
import pytest

from tests.tools.run_folder import CHOSEN, SCORES, history, write_dense, write_run, write_scores
from tools.run_facts import Layer, Stretch, binomial_interval
from tools.run_files import by_cost, comparison_notes, dense_twin, differing_options, read_run, read_runs
from utils.errors import UserError
from utils.run import checkpoint


def test_a_finished_run_has_the_numbers_of_its_summary(tmp_path):
    run = read_run(write_run(tmp_path / "a"))
    assert run.finished
    assert (run.epochs, run.planned_epochs, run.result_epoch, run.result_phase) == (4, 4, 4, "finetune")
    assert (run.accuracy, run.flops_ratio, run.kept, run.train_flops_ratio) == (43.0, 0.234, 0.456, 0.567)
    assert (run.seconds, run.train_seconds) == (140.0, 100.0)
    assert run.dense_epochs == pytest.approx(4 * 0.567)
    assert run.interval == pytest.approx((38.24, 47.89), abs=0.01)
    assert run.stretches == [Stretch("search", 0, 3), Stretch("finetune", 3, 4)]
    assert run.column("heldout_top1") == ([1, 2, 3, 4], [12.0, 22.0, 32.0, 42.0])
    assert run.missing == []


def test_an_unfinished_run_has_the_numbers_of_its_last_tested_epoch(tmp_path):
    rows = history()[:3]
    rows[2] |= {"test_top1": "", "test_loss": ""}
    run = read_run(write_run(tmp_path / "a", summary={}, rows=rows))
    assert not run.finished
    assert (run.epochs, run.planned_epochs, run.result_epoch) == (3, 4, 2)
    assert (run.accuracy, run.flops_ratio) == (23.0, pytest.approx(0.22))  # both of epoch 2
    assert run.train_flops_ratio == pytest.approx(0.57)  # of epoch 3
    assert (run.interval, run.kept) == (None, None)
    assert run.column("test_top1") == ([1, 2], [13.0, 23.0])
    assert run.seconds == 60 + 5 + 6 + 7
    assert run.parts == {"waiting for images": 6.0, "training steps": 54.0, "evaluation": 18.0}


def test_a_run_that_goes_on_after_its_end_is_unfinished_again(tmp_path):
    assert not read_run(write_run(tmp_path / "a", summary={"epochs": 3, "best_epoch": 3})).finished


def test_fine_tuning_that_is_switched_off_is_not_planned(tmp_path):
    assert read_run(write_run(tmp_path / "a", options={"finetune": False})).planned_epochs == 3


def test_the_parts_of_the_seconds_are_those_of_the_columns_and_add_up(tmp_path):
    run = read_run(write_run(tmp_path / "a"))
    told = {"waiting for images": 10.0, "training steps": 90.0, "evaluation": 26.0, "choosing the subnet": 14.0}
    assert run.parts == told
    assert sum(run.parts.values()) == run.seconds
    dense = read_run(write_dense(tmp_path / "d", train_seconds=100.0, seconds=126.0))
    assert dense.parts == {"waiting for images": 10.0, "training steps": 90.0, "evaluation": 26.0}


def test_an_older_run_has_coarser_parts_and_says_so(tmp_path):
    late = ("data_seconds", "evaluation_seconds")
    rows = [{key: value for key, value in row.items() if key not in late} for row in history()]
    run = read_run(write_run(tmp_path / "a", rows=rows, summary={"test_images": None}, scores=False, best=False))
    assert run.parts == {"training steps and waiting for images": 100.0, "evaluation and choosing": 40.0}
    assert run.interval is None
    assert [sentence.split(" ")[0] for sentence in run.missing] == [
        *("results.csv", "summary.json", "checkpoints/best.pt", "scores.npz")
    ]


def test_a_folder_of_a_run_that_has_just_begun_is_read(tmp_path):
    run = read_run(write_run(tmp_path / "a", summary={}, rows=[], scores=False, best=False))
    assert (run.epochs, run.accuracy, run.seconds, run.train_flops_ratio, run.dense_epochs) == (0, *[None] * 4)
    assert "no finished epoch" in run.missing[0]


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),  # from the tables of statistics packages
    [(0.5, 10, 0.2366, 0.7634), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0.9, 1000, 0.8799, 0.9171)],
)
def test_the_interval_is_that_of_wilson(share, count, low, high):
    assert binomial_interval(share, count) == pytest.approx((low, high), abs=1e-4)


# ---- layers and scores ----


def test_layers_are_those_whose_channels_are_chosen(tmp_path):
    assert read_run(write_run(tmp_path / "a")).layers == [Layer("first", 4, 3), Layer("second", 6, 2)]


def test_best_without_widths_is_told(tmp_path):
    folder = write_run(tmp_path / "a")
    checkpoint.save(folder / "checkpoints" / "best.pt", {"model": {}})
    run = read_run(folder)
    assert run.layers is None
    assert "widths" in run.missing[0]


def test_scores_are_averaged_over_each_layer_and_time(tmp_path):
    scores = read_run(write_run(tmp_path / "a")).scores
    own = SCORES.astype(float)
    assert np.allclose(scores.shares(), [own[:, :4].mean(1), own[:, 4:].mean(1)])
    assert np.allclose(scores.chosen_shares(), [3 / 4, 2 / 6])
    assert np.array_equal(scores.chosen, CHOSEN)


@pytest.mark.parametrize(
    ("epochs", "moments"),
    [
        ([0, 1, 2, 3], {"start": 0, "middle": 1, "end": 3}),
        ([0, 8, 10, 20], {"start": 0, "middle": 2, "end": 3}),
        ([0, 1], {"start": 0, "end": 1}),
        ([0], {"start": 0}),
    ],
)
def test_the_moments_of_the_score_map_are_told_by_epochs_not_by_rows(epochs, moments, tmp_path):
    folder = write_run(tmp_path / "a", scores=False)
    write_scores(folder, SCORES[: len(epochs)])
    with np.load(folder / "scores.npz") as stored:
        np.savez(folder / "scores.npz", **{**stored, "epochs": np.array(epochs)})
    scores = read_run(folder).scores
    assert scores.moments == moments
    assert scores.chosen_shares() is None


def test_a_method_without_scores_lacks_none(tmp_path):
    folder = write_run(tmp_path / "a", options={"method": "thin"}, scores=False)
    assert read_run(folder).missing == []
    write_scores(folder, SCORES[:0], chosen=CHOSEN)
    assert read_run(folder).scores is None


# ---- several runs ----


def test_runs_are_sorted_by_inference_then_training_cost_and_unfinished_ones_come_last(tmp_path):
    made = {
        "dear": {"flops_ratio": 0.3, "train_flops_ratio": 0.1},
        "longer": {"flops_ratio": 0.2, "train_flops_ratio": 0.9},
        "shorter": {"flops_ratio": 0.2, "train_flops_ratio": 0.4},
        "running": {},  # not finished; its FLOPs so far are between those of the others
    }
    for name, told in made.items():
        write_run(tmp_path / name, summary=told, best=False)
    runs = read_runs([tmp_path / name for name in made])
    assert [run.name for run in by_cost(runs)] == ["shorter", "longer", "dear", "running"]


def test_only_options_that_differ_are_told_and_not_for_methods_that_do_not_read_them(tmp_path):
    write_run(tmp_path / "a", options={"print_freq": 3})
    write_run(tmp_path / "b", options={"keep_ratio": 0.25, "seed": 8})
    write_dense(tmp_path / "c")
    runs = read_runs([tmp_path / name for name in "abc"])
    assert differing_options(runs) == {
        "seed": ["7", "8", "7"],
        "method": ["vrpge", "vrpge", "dense"],
        "keep_ratio": ["0.5", "0.25", None],
    }
    assert differing_options(runs[:1]) == {}


def test_a_dense_run_is_compared_only_if_all_that_decides_its_time_is_the_same(tmp_path):
    run, dense = read_runs([write_run(tmp_path / "a"), write_dense(tmp_path / "d")])
    assert dense_twin(run, [run, dense]) is dense
    assert dense_twin(dense, [run, dense]) is None
    part = write_dense(tmp_path / "part", flops_ratio=0.2, units_kept=0.5)  # it started from a subnet
    assert dense_twin(run, [run, read_run(part)]) is None
    assert read_run(part).kept == 0.5
    assert run.costs(dense) == {
        **{"inference FLOPs": 0.234, "parameters": 0.345, "training FLOPs": 0.567},
        **{"time of training steps": 100 / 160, "time of the whole run": 140 / 200},
    }
    assert "time of the whole run" not in run.costs(None)
    others = [
        write_run(tmp_path / "machine", environment={"num_threads": 1}),
        write_run(tmp_path / "images", summary={"data_fingerprint": "abd"}),
        write_run(tmp_path / "network", options={"width_mult": 0.5}),
        write_run(tmp_path / "batch", options={"batch_size": 99}),
        write_run(tmp_path / "unknown", environment=dict.fromkeys(("cpu", "cpu_capability", "num_threads"))),
        write_run(tmp_path / "running", summary={}),
        write_run(tmp_path / "length", rows=history()[:3], summary={"epochs": 3, "best_epoch": 3}),
    ]
    for folder in others:
        assert dense_twin(read_run(folder), [run, dense]) is None, folder


def test_notes_warn_of_what_cannot_be_compared(tmp_path):
    same = read_runs([write_run(tmp_path / "a"), write_dense(tmp_path / "b")])
    assert len(comparison_notes(same)) == 1
    machine = read_run(write_run(tmp_path / "c", environment={"cpu": "Other"}))
    network = read_run(write_run(tmp_path / "d", options={"arch": "vgg11"}))
    images = read_run(write_run(tmp_path / "e", summary={"data_fingerprint": "abd"}))
    running = read_run(write_run(tmp_path / "f", summary={}))
    assert "seconds cannot be compared" in comparison_notes([*same, machine])[1]
    assert "different networks or training images" in comparison_notes([*same, network])[1]
    assert "different networks or training images" in comparison_notes([*same, images])[1]
    assert ["unfinished" in note for note in comparison_notes([*same, running])] == [False, True]


def test_runs_of_one_name_are_called_by_their_folders(tmp_path):
    folders = [write_run(tmp_path / "x" / place, options={"name": "same"}) for place in ("p", "p/1")]
    other = write_run(tmp_path / "x" / "q", options={"name": "q"})
    assert [run.name for run in read_runs([*folders, other])] == ["p", "p/1", "q"]
    assert [run.name for run in read_runs([folders[0], other])] == ["same", "q"]


# ---- mistakes ----


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is not the folder of a run, because it has no config.yaml"):
        read_runs([tmp_path / "nowhere"])


def test_a_run_that_is_named_twice_is_refused(tmp_path):
    folder = write_run(tmp_path / "a")
    with pytest.raises(UserError, match="named twice"):
        read_runs([folder, tmp_path / "b" / ".." / "a"])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("results.csv", "epoch,phase\none,search\n"), ("summary.json", "{"), ("summary.json", "[1]")),
        *(("scores.npz", "text"), ("config.yaml", "a: [")),
    ],
)
def test_a_damaged_file_is_told_by_its_name(file, content, tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=rf"{file}.*restore it"):
        read_run(folder)


def test_scores_that_do_not_fit_their_layers_are_refused(tmp_path):
    folder = write_run(tmp_path / "a", scores=False)
    write_scores(folder, SCORES[:, :9])
    with pytest.raises(UserError, match=r"scores.npz is damaged"):
        read_run(folder)


def test_the_summary_may_lack_what_is_unknown(tmp_path):
    folder = write_run(tmp_path / "a")
    stored = json.loads((folder / "summary.json").read_text())
    del stored["params_kept"], stored["data_fingerprint"]
    (folder / "summary.json").write_text(json.dumps(stored))
    assert list(read_run(folder).costs(None)) == ["inference FLOPs", "training FLOPs"]
