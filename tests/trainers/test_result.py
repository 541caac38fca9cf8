"""The last lines of a run: every number, and the reason why it is the result."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from args import Config
from trainers.result import accuracies, duration, origin, result_lines, standard_error

SUMMARY = {
    "arch": "vgg16",
    "set": "CIFAR100",
    "classes": 100,
    "method": "vrpge",
    "keep_ratio": 0.3,
    "budget": "channels",
    "test_top1": 71.25,
    "test_top5": 92.5,
    "test_images": 10_000,
    "heldout_top1": 73.5,
    "heldout_images": 5000,
    "heldout_standard_error": 0.62,
    "flops_ratio": 0.123,
    "flops_ratio_padded": 0.145,
    "train_flops_ratio": 0.456,
    "train_flops_executed": 0.478,
    "params_kept": 0.234,
    "units_kept": 0.299,
    "train_seconds": 3700.0,
    "seconds": 7510.0,
    "epochs": 13,
    "best_epoch": 12,
    "best_phase": "finetune",
    "last_heldout_top1": 72.75,
    "last_test_top1": 70.5,
    "execution": "compact",
    "choice": {"chosen_candidate": 0},
    "run": "my runs/a",
}


def lines(**changes: Any) -> dict[str, str]:
    config = Config(run=replace(Config().run, log_dir="my runs"))
    first, *rest = result_lines({**SUMMARY, **changes}, config)
    assert len({line.index(line[17:].lstrip(), 17) for line in rest}) == 1, "the texts begin in one column"
    return {"": first, **{line[:17].strip(): line[17:].strip() for line in rest}}


def test_every_number_stands_where_it_belongs():
    assert lines() == {
        "": "trained vgg16 on CIFAR100: 13 epochs",
        "result from": "epoch 12 of 13, fine-tuning: the best on held-out images since the end of the search",
        "held-out accuracy": "73.50 % top-1 on the 5,000 images that decide",
        "test accuracy": "71.25 % top-1, 92.50 % top-5 on 10,000 images",
        "last epoch": "72.75 % on held-out and 70.50 % on test images; it is not the result",
        "channels kept": "29.9 %, asked for 30 %",
        "inference FLOPs": "12.3 % of dense, 14.5 % with padding; parameters 23.4 %",
        "training FLOPs": "45.6 % of dense training for as many epochs, 47.8 % with padding",
        "time": "2 h 5 min: 1 h 1 min of training steps, 1 h 3 min of evaluating, choosing and saving",
        "run folder": "my runs/a",
        "curves": "tensorboard --logdir 'my runs' --host 127.0.0.1",
        "same number again": "python main.py --evaluate --resume 'my runs/a/checkpoints/best.pt'",
        "take it home": "python -m tools.export 'my runs/a/checkpoints/best.pt'",
    }


@pytest.mark.parametrize(
    ("budget", "line", "told"),
    [("params", "parameters kept", "23.4 %, asked for 30 %"), ("flops", "FLOPs kept", "12.3 %, asked for 30 %")],
)
def test_what_is_kept_is_told_in_the_unit_that_was_asked_for(budget, line, told):
    told_of = lines(budget=budget)
    assert told_of[line] == told
    assert "channels kept" not in told_of


def test_a_dense_network_has_no_kept_share():
    told = lines(budget=None, units_kept=None, execution="dense", method="dense")
    assert not {"channels kept", "parameters kept", "FLOPs kept"} & told.keys()
    assert "take it home" in told


def test_a_network_that_cannot_be_exported_is_not_said_to_be():
    assert "take it home" not in lines(method="released")


def test_curves_are_looked_for_where_the_run_lies():
    assert lines(run="elsewhere/a")["curves"] == "tensorboard --logdir elsewhere/a --host 127.0.0.1"


def test_masked_execution_computes_what_it_computes():
    told = lines(execution="masked", flops_ratio_padded=1.0)
    assert told["inference FLOPs"] == "12.3 % of dense, 100.0 % with masked execution; parameters 23.4 %"


def test_few_held_out_images_are_a_warning():
    assert "warning" not in lines(heldout_images=500)
    warned = lines(heldout_images=499, heldout_standard_error=1.98)["warning"]
    assert warned == "499 held-out images are few: the standard error of their accuracy is 2.0 points"
    assert len(lines(heldout_images=499)) == 14


def test_without_held_out_images_there_is_no_accuracy_of_them():
    told = lines(
        heldout_top1=None, heldout_images=0, heldout_standard_error=None, last_heldout_top1=None, best_epoch=13
    )
    assert not {"held-out accuracy", "warning"} & told.keys()
    assert told["result from"] == "epoch 13 of 13, the last one: no images are held out to choose another"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"last_heldout_top1": 73.5, "last_test_top1": 71.25}, None),
        ({"last_heldout_top1": 73.5, "last_test_top1": None}, None),
        ({"last_test_top1": None}, "72.75 % on held-out images; it is not the result"),
        ({"last_heldout_top1": None, "heldout_top1": None}, "70.50 % on test images; it is not the result"),
    ],
)
def test_the_last_epoch_is_told_where_the_result_has_other_numbers(changes, said):
    assert lines(**changes).get("last epoch") == said


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"best_epoch": 11, "best_phase": "search"},
            "epoch 11 of 13, the end of the search: fine-tuning did not improve on held-out images",
        ),
        ({"best_epoch": 13, "best_phase": "search"}, "epoch 13 of 13, the end of the search"),
        (
            {"best_epoch": 11, "best_phase": "search", "choice": {}},
            "epoch 11 of 13, pruned, before fine-tuning: fine-tuning did not improve on held-out images",
        ),
        ({"best_epoch": 13, "best_phase": "search", "choice": {}}, "epoch 13 of 13, after which it was pruned"),
        ({"best_epoch": 9, "best_phase": "train"}, "epoch 9 of 13, the best of 13 on held-out images"),
        ({"best_epoch": 9, "best_phase": "dense"}, "epoch 9 of 13, the best of 13 on held-out images"),
    ],
)
def test_the_reason_is_told(changes, reason):
    assert origin({**SUMMARY, **changes}) == reason


def test_top_5_says_nothing_among_five_classes():
    metrics = {"top1": 60.0, "top5": 100.0}
    assert accuracies(metrics, 6) == "top-1 60.00 %, top-5 100.00 %"
    assert accuracies(metrics, 5) == "top-1 60.00 %"
    assert lines(classes=5)["test accuracy"] == "71.25 % top-1 on 10,000 images"


def test_the_standard_error_is_that_of_a_share():
    assert standard_error(80.0, 100) == pytest.approx(4.0)
    assert standard_error(80.0, 400) == pytest.approx(2.0)
    for extreme in (0.0, 100.0):  # nobody is sure after 20 images
        assert standard_error(extreme, 20) == pytest.approx(100 * math.sqrt(0.025 * 0.975 / 20))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4.16, "4.2 s"), (41.4, "41 s"), (59.6, "1 min 0 s"), (161, "2 min 41 s"), (3755, "1 h 2 min")],
)
def test_times_are_told_in_full(seconds: float, words: str):
    assert duration(seconds) == words
