"""Options that are `auto`: the rules by hand-computed values, and what a run makes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from args import OPTIONS, config_to_dict, parse_args
from trainers.automatic import (
    batch_size_for,
    check_settled,
    epochs_for,
    finetune_epochs_for,
    score_lr_for,
    search_epochs_for,
    settled,
    undecided,
    values_by_rule,
)
from trainers.devices import check_ranks
from utils.errors import UserError
from utils.run.checkpoint import load

OWN_IMAGES = str(Path(__file__).parents[2] / "configs/own_images.yaml")


def options_of_config(*words: str) -> dict[str, object]:
    return config_to_dict(parse_args(["--config", OWN_IMAGES, *words]).config)


@pytest.mark.parametrize(
    ("num_images", "batch_size"),
    # sqrt(240) = 15.5; sqrt(500) = 22.4 is nearer to 16 and sqrt(520) = 22.8 to 32, by their logarithms;
    # sqrt(2000) = 44.7; sqrt(2100) = 45.8 is nearer to 64; sqrt(18000) = 134
    [(3, 3), (15, 15), (40, 16), (240, 16), (500, 16), (520, 32), (2000, 32), (2100, 64), (18000, 128), (10**6, 128)],
)
def test_the_batch_is_the_power_of_two_nearest_to_the_root(num_images, batch_size):
    assert batch_size_for(num_images) == batch_size


@pytest.mark.parametrize(
    ("steps_per_epoch", "epochs"),
    [(1, 60), (15, 60), (25, 60), (31, 48), (62, 24), (140, 11), (150, 10), (7812, 10)],  # 1500/62 = 24.2
)
def test_the_search_has_about_1500_steps(steps_per_epoch, epochs):
    assert epochs_for(steps_per_epoch) == epochs


def test_fine_tuning_is_half_as_long():
    assert [finetune_epochs_for(epochs) for epochs in (1, 10, 11, 24, 60)] == [1, 5, 6, 12, 30]


@pytest.mark.parametrize(("updates", "score_lr"), [(900, 0.117), (1488, 0.0907), (1540, 0.0892), (100, 0.35), (4, 0.5)])
def test_the_learning_rate_of_the_scores_falls_with_the_root_of_their_updates(updates, score_lr):
    assert score_lr_for(updates) == score_lr


@pytest.mark.parametrize(
    ("words", "num_images", "holdout", "expected"),
    [
        ("", 240, 0.0, "0.0 True 16 16 60 30 0.117"),
        ("", 2000, 0.0, "0.0 True 32 32 24 12 0.0907"),
        ("", 18000, 0.1, "0.1 False 128 128 11 6 0.0892"),
        # what is given stays, and the rest follows from it
        ("--batch-size 100", 2000, 0.0, "0.0 True - 100 60 30 0.101"),  # 20 steps an epoch, 1200 in the search
        ("--epochs 5", 2000, 0.0, "0.0 True 32 32 - 3 0.199"),  # 5 x 62 steps
        ("--epochs 5 --score-every 2", 2000, 0.0, "0.0 True 32 32 - 3 0.281"),  # 155 updates
        ("--epochs 5 --score-every 4", 2000, 0.0, "0.0 True 32 32 - 3 0.396"),  # 77.5, the first step is one: 78
        ("--holdout 0.2", 240, 0.2, "- False 16 16 60 30 0.117"),
        ("--finetune-epochs 7 --score-lr 0.5", 240, 0.0, "0.0 True 16 16 60 - -"),
    ],
)
def test_values_follow_from_the_images_and_from_what_is_given(words, num_images, holdout, expected):
    keys = [
        "holdout",
        "sample_from_training_set",
        "batch_size",
        "finetune_batch_size",
        "epochs",
        "finetune_epochs",
        "score_lr",
    ]
    found = values_by_rule(options_of_config(*words.split()), num_images, holdout)
    assert " ".join(str(found.get(key, "-")) for key in keys) == expected
    assert set(found) <= set(keys)


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "search_epochs"),
    [
        (60, 156, 24),  # 9,360 steps: two fifths
        (100, 100, 40),  # 10,000
        (160, 100, 51),  # 16,000: 0.4 x sqrt(10,000 x 16,000) = 5,060 steps
        (300, 352, 37),  # 105,600: 12,999
        (100, 5004, 6),  # 500,400: 28,296
        (2, 10, 1),
        (1, 10, 1),  # is refused afterwards, since nothing is left for the subnet
    ],
)
def test_the_search_of_a_longer_training_takes_a_smaller_share(epochs, steps_per_epoch, search_epochs):
    assert search_epochs_for(epochs, steps_per_epoch) == search_epochs


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--epochs 60", "24 - 0.0572"),  # 24 x 156 steps
        ("--epochs 60 --score-every 4", "24 - 0.114"),  # 936 updates
        ("--epochs 60 --search-epochs 8", "- - 0.0991"),
        ("", "10 25 0.0886"),  # a search of 10 epochs, 1,560 steps, is two fifths of 25
    ],
)
def test_with_search_until_decided_the_search_is_a_part_of_all_epochs(words, expected):
    options = options_of_config("--search-until", "decided", "--batch-size", "128", *words.split())
    found = values_by_rule(options, 20_000, 0.1)
    assert " ".join(str(found.get(key, "-")) for key in ("search_epochs", "epochs", "score_lr")) == expected


def test_device_auto_is_another_matter():
    options = options_of_config("--device", "auto")
    assert "device" not in undecided(options)
    assert set(undecided(options)) == {key for key, entry in OPTIONS.items() if entry.auto}


def some_data(images: int, holdout: float) -> SimpleNamespace:
    return SimpleNamespace(train=range(images), holdout_fraction=holdout)


def test_what_was_chosen_is_told_in_the_words_of_options(capsys):
    config = parse_args(["--config", OWN_IMAGES, "--epochs", "20"]).config
    result = settled(config, some_data(240, 0.0))
    told = capsys.readouterr().out
    assert (
        "set from 240 training images: holdout 0.0, batch_size 16, score_lr 0.202, finetune_epochs 10, "
        "finetune_batch_size 16, sample_from_training_set on; pass any of these options to change it\n"
    ) in told
    assert "with fewer than 5,000 images none are held out" in told
    assert "the last epoch is the result" in told
    assert (result.train.epochs, result.train.batch_size, result.finetune.finetune_epochs) == (20, 16, 10)
    assert result.finetune.sample_from_training_set is True


def test_only_what_the_method_reads_is_told(capsys):
    settled(parse_args(["--config", OWN_IMAGES, "--method", "thin"]).config, some_data(18000, 0.1))
    told = capsys.readouterr().out
    assert "set from 18,000 training images: holdout 0.1, epochs 11, batch_size 128, finetune_epochs 6;" in told
    assert "held out:" not in told


def test_without_auto_nothing_is_told_or_changed(capsys):
    config = parse_args([]).config
    assert settled(config, some_data(240, 0.1)) is config
    assert capsys.readouterr().out == ""


def test_a_chosen_value_may_contradict_a_given_one():
    config = parse_args(["--config", OWN_IMAGES, "--no-sample-from-training-set"]).config
    with pytest.raises(
        UserError, match=r"^holdout 0.0 \(this run\) and sample_from_training_set off .* leave no images"
    ):
        settled(config, some_data(240, 0.0))
    config = parse_args(["--config", OWN_IMAGES, "--warmup-length", "15"]).config
    with pytest.raises(UserError, match=r"warmup_length 15 .* must be below epochs 11"):
        settled(config, some_data(18000, 0.1))


def test_a_program_without_images_refuses_auto():
    with pytest.raises(
        UserError, match=r"^holdout, epochs, batch_size, score_lr, .* are auto, .* the bench reads none"
    ):
        check_settled(parse_args(["--config", OWN_IMAGES]).config, "the bench")
    check_settled(parse_args(["--device", "auto"]).config, "the bench")


def test_sizes_that_are_auto_are_checked_once_they_are_known(monkeypatch):
    monkeypatch.setattr("trainers.devices.num_started", lambda: 10)
    config = parse_args(["--config", OWN_IMAGES]).config
    check_ranks(config, [])
    with pytest.raises(UserError, match="batch_size 16 is the total of 10 processes"):
        check_ranks(settled(config, some_data(240, 0.0)), [])


# ---- a whole run ----


def test_a_run_keeps_what_was_chosen(program, capsys):
    """80 images: batches of 16, so 5 steps an epoch; 2 + 1 epochs; 3.5 / sqrt(10) = 1.1 is above 0.5."""
    words = "--holdout auto --batch-size auto --score-lr auto --finetune-epochs auto --sample-from-training-set auto"
    command = [*words.split(), "--epochs", "2"]
    assert program(*command, "--arch", "resnet8_he") == 0
    folder = Path("runs/tiny/run/prune_rate=0.5")
    wanted = {
        "holdout": 0.0,
        "sample_from_training_set": True,
        "batch_size": 16,
        "finetune_epochs": 1,
        "score_lr": 0.5,
    }
    stored = load(folder / "checkpoints/last.pt")
    assert {key: stored["config"][key] for key in wanted} == wanted
    lines = (folder / "config.yaml").read_text().splitlines()
    for key, value in wanted.items():
        assert f"{key}: {json.dumps(value)}  # command line, auto" in lines
    assert "epochs: 2  # command line" in lines
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["epochs"], summary["best_epoch"], summary["heldout_top1"]) == (3, 3, None)
    said = capsys.readouterr().out
    assert "by training images" in said
    assert program("--resume", "--evaluate", *command, "--arch", "resnet8_he") == 0  # auto agrees with what is stored
    assert "test top-1" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["dense", "thin", "random", "l1"])
def test_a_value_that_the_method_does_not_read_may_stay_auto(method, program, tmp_path):
    file = tmp_path / "tiny.yaml"  # on the command line, what the method does not read is refused
    file.write_text(re.sub("score_lr: .*", "score_lr: auto", file.read_text()))
    assert program("--method", method, "--epochs", "1", "--no-finetune") == 0
