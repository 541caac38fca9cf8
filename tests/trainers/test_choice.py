"""What is chosen, by which images: the subnet at the end of a search, and the epoch that is reported.

Evaluation is replaced by a script here, so that held-out, training and test images each favour another network.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import FINETUNE_STEPS, STEPS, Judge, Run, Save, Step, kept_mask, make_images, run, scores_of
from trainers.result import last_epoch, origin
from utils.run.checkpoint import differences

OTHERS = 3  # drawn candidates
SEARCH, FINETUNE = 2, 3  # epochs
# networks in the order in which they are judged: after each epoch of the search (the last is also the top-scored
# candidate), the drawn candidates, after each epoch of fine-tuning
HELDOUT = [50, 20, 40, 60, 30, 70, 90, 80]
TRAIN = [10, 30, 80, 20, 60, 0, 0, 0]
TESTED = [95, 90, 15, 25, 96, 98, 5, 99]
DRAWN = slice(SEARCH, SEARCH + OTHERS)

Script = Callable[[str, int], tuple[float, float]]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def scripted(part: str, number: int) -> tuple[float, float]:
    return {"heldout": HELDOUT, "train": TRAIN, "test": TESTED}[part][number], 1.0


def judged(root: Path, images: Path, script: Script, *options: str, **settings: object) -> tuple[Run, Judge]:
    judge = Judge(script)
    short = {"epochs": SEARCH, "finetune_epochs": FINETUNE, "num_subnets": OTHERS}
    with pytest.MonkeyPatch.context() as patch:
        judge.install(patch)
        done = run(root, images, *options, **{**short, **settings})
    assert done.code == 0
    return done, judge


@pytest.fixture(scope="module", params=["heldout", "train"])
def choice(request, images, tmp_path_factory) -> tuple[str, Run, Judge]:
    """Who judges the candidates, the run, and what was judged."""
    options = ["--sample-from-training-set"] if request.param == "train" else []
    return request.param, *judged(tmp_path_factory.mktemp("choice"), images, scripted, *options)


def chosen_by(done: Run) -> Save:
    """The best.pt that the choice writes, with the weights of the end of the search."""
    saves = done.record.saves()
    (end,) = (i for i, save in enumerate(saves) if save.name == f"epoch_{SEARCH}.pt")
    return next(save for save in saves[end:] if save.name == "best.pt")


def is_best(done: Run) -> list[bool]:
    """For each epoch whether best.pt was written at its end."""
    names = [save.name for save in done.record.saves()]
    ends = [names.index(f"epoch_{epoch}.pt") for epoch in range(1, len(done.rows) + 1)]
    return [names[end - 1] == "best.pt" for end in ends]


def test_held_out_or_training_images_choose_the_subnet_and_test_images_do_not(choice):
    judging, done, judge = choice
    accuracies = {"heldout": HELDOUT, "train": TRAIN}[judging]
    best = max(range(SEARCH - 1, SEARCH + OTHERS), key=accuracies.__getitem__)
    assert best != max(range(SEARCH - 1, SEARCH + OTHERS), key=TESTED.__getitem__)
    written = chosen_by(done)
    assert np.array_equal(kept_mask(written.state), judge.masks[best])
    assert written.state["heldout"]["top1"] == HELDOUT[best]
    assert written.state["test"]["top1"] == TESTED[best]
    told = done.summary["choice"]
    assert told["chosen_candidate"] == best - (SEARCH - 1)
    assert told["top_scored_top1"] == accuracies[SEARCH - 1]
    assert told["drawn_top1_mean"] == pytest.approx(np.mean(accuracies[DRAWN]))
    assert told["drawn_top1_sd"] == pytest.approx(np.std(accuracies[DRAWN]))


def test_held_out_images_choose_the_epoch_of_fine_tuning_and_test_images_do_not(choice):
    _, done, judge = choice
    assert is_best(done)[SEARCH:] == [True, True, False]
    assert [number for part, number in judge.asked if part == "test"][-1] == SEARCH + OTHERS + 2
    assert (done.summary["best_epoch"], done.summary["epochs"]) == (SEARCH + 2, SEARCH + FINETUNE)
    assert done.summary["heldout_top1"] == 90
    assert done.summary["test_top1"] == 5  # test images liked every other epoch better
    assert done.column("heldout_top1") == [HELDOUT[i] for i in (0, 1, *range(SEARCH + OTHERS, len(HELDOUT)))]
    assert done.column("test_top1") == [TESTED[i] for i in (0, 1, *range(SEARCH + OTHERS, len(HELDOUT)))]


def test_the_best_checkpoint_holds_the_network_of_the_best_epoch(choice):
    _, done, _ = choice
    best, then, later = (done.load(f"{name}.pt") for name in ("best", f"epoch_{SEARCH + 2}", f"epoch_{SEARCH + 3}"))
    assert best["epoch"] == SEARCH + 2
    assert differences(best["model"], then["model"]) == []
    assert differences(best["model"], later["model"]) != []
    assert best["subnet"]["mask"].equal(then["subnet"]["mask"])
    for name, (mean, var) in best["subnet"]["statistics"].items():
        assert mean.equal(then["model"][f"{name}.running_mean"])
        assert var.equal(then["model"][f"{name}.running_var"])


def test_a_run_is_saved_after_every_epoch_and_around_the_choice(choice):
    _, done, _ = choice
    events = [e for e in done.record.events if isinstance(e, Save) or (isinstance(e, Step) and e.kind == "weights")]
    written, steps = [], 0
    for event in events:
        if isinstance(event, Step):
            steps += 1
        else:
            written.append((steps, event.name))
            steps = 0
    first = [(STEPS, "last.pt"), (0, "best.pt"), (0, "epoch_1.pt")]
    second = [(STEPS, "last.pt"), (0, "epoch_2.pt")]  # not better than the first
    assert written[:5] == first + second
    assert written[5:7] == [(0, "last.pt"), (0, "best.pt")]  # the choice
    assert written[7:10] == [(FINETUNE_STEPS, "last.pt"), (0, "best.pt"), (0, "epoch_3.pt")]
    assert written[10:13] == [(FINETUNE_STEPS, "last.pt"), (0, "best.pt"), (0, "epoch_4.pt")]
    assert written[13:] == [(FINETUNE_STEPS, "last.pt"), (0, "epoch_5.pt"), (0, "last.pt")]
    states = [save.state["phase"] for save in done.record.saves()]
    assert states == ["search"] * 5 + ["finetune", "search"] + ["finetune"] * 8 + ["done"]


def test_numbered_checkpoints_come_as_often_as_asked(images, tmp_path):
    done, _ = judged(tmp_path, images, scripted, "--no-finetune", method="l1", epochs=3, save_every=2)
    assert [save.name for save in done.record.saves() if save.name.startswith("epoch")] == ["epoch_2.pt"]


def stream_of_candidates(seed: int) -> np.random.Generator:
    """Written out: a run that is resumed before the choice, or repeated years later, draws the same candidates."""
    words = np.random.SeedSequence(entropy=seed, spawn_key=(2,)).generate_state(1, np.uint64)
    return np.random.default_rng(int(words[0]) >> 1)


def test_candidates_are_the_highest_scores_and_draws_from_the_scores(images, tmp_path):
    """Of a draw beyond the budget its least likely units are left out; one drawn in vain is not filled up."""

    def script(part: str, number: int) -> tuple[float, float]:
        return 50.0, 1.0

    seed = 5
    settings = {"epochs": 1, "num_subnets": 5, "score_lr": 0.2, "seed": seed}
    done, judge = judged(tmp_path, images, script, "--no-finetune", **settings)
    asked = [number for part, number in judge.asked if part == "heldout"]
    masks = [judge.masks[number] for number in asked[1 : 1 + 6]]
    scores = scores_of(done.load("epoch_1.pt")).numpy()
    assert len(scores) == len(masks[0])
    budget, random = len(scores) // 2, stream_of_candidates(seed)
    draws = [scores > 0, *(random.random(len(scores)) < scores for _ in range(5))]
    sizes = [int(draw.sum()) for draw in draws[1:]]
    assert min(sizes) < budget < max(sizes)  # both kinds are there
    for mask, draw in zip(masks, draws, strict=True):
        values = np.where(draw, scores, 0)
        expected = np.zeros(len(scores), dtype=bool)
        expected[np.argsort(-values, kind="stable")[: min(budget, int((values > 0).sum()))]] = True
        assert np.array_equal(mask, expected)


@pytest.mark.parametrize(("losses", "chosen"), [([1.0] * 4, 0), ([1.0, 1.0, 0.5, 0.5], 2)])
def test_equal_accuracies_go_to_the_lowest_loss_then_to_the_top_scored(images, tmp_path, losses, chosen):
    def script(part: str, number: int) -> tuple[float, float]:
        return 50.0, (losses[number] if part == "heldout" else 9.0 - number)

    done, _ = judged(tmp_path, images, script, "--no-finetune", epochs=1)
    assert done.summary["choice"]["chosen_candidate"] == chosen


def test_without_drawn_candidates_there_is_no_mean_of_them(images, tmp_path):
    done, _ = judged(tmp_path, images, scripted, "--no-finetune", epochs=1, num_subnets=0)
    choice = {"chosen_candidate": 0, "top_scored_top1": 50, "drawn_top1_mean": None, "drawn_top1_sd": None}
    assert done.summary["choice"] == choice


@pytest.mark.parametrize("loss", [1.0, 0.5])
def test_of_equally_accurate_epochs_the_one_of_lower_loss_is_kept_else_the_first(images, tmp_path, loss):
    def script(part: str, number: int) -> tuple[float, float]:
        return 50.0, (loss if number == 2 else 1.0) if part == "heldout" else 1.0 / (number + 1)

    done, _ = judged(tmp_path, images, script, "--method", "thin", "--no-finetune", epochs=3)
    assert done.summary["best_epoch"] == (3 if loss < 1 else 1)
    assert done.summary["heldout_top1"] == 50


def test_a_state_that_exceeds_the_final_budget_is_no_candidate(images, tmp_path):
    """The budget falls over the first half of four epochs, and the first of them has the best accuracy."""
    accuracies = [99, 98, 60, 70, 40, 0, 0, 0]

    def script(part: str, number: int) -> tuple[float, float]:
        return accuracies[number], 1.0

    falling = {"epochs": 4, "budget_schedule": "cubic", "budget_end": 0.5}
    done, _ = judged(tmp_path, images, script, "--no-finetune", **falling)
    assert is_best(done) == [False, False, True, True]
    budgets = done.column("budget")
    assert budgets[1] > 0.5 + 1e-6
    assert budgets[2:] == [0.5, 0.5]


def test_fine_tuning_that_never_improves_leaves_the_end_of_the_search_as_the_result(images, tmp_path):
    def script(part: str, number: int) -> tuple[float, float]:
        return {"heldout": 50.0, "test": 30.0}[part] - number, 1.0

    done, _ = judged(tmp_path, images, script, epochs=1, finetune_epochs=2, num_subnets=0)
    reason = "epoch 1 of 3, the end of the search: fine-tuning did not improve on held-out images"
    assert origin(done.summary) == reason
    assert last_epoch(done.summary) == "48.00 % on held-out and 28.00 % on test images; it is not the result"


def test_without_held_out_images_the_last_epoch_is_the_result(images, tmp_path):
    done = run(tmp_path, images, "--no-finetune", method="thin", holdout=0)
    assert (done.summary["best_epoch"], done.summary["heldout_top1"]) == (2, None)
    assert origin(done.summary) == "epoch 2 of 2, the last one: no images are held out to choose another"
    assert is_best(done) == [True, True]
    assert all(math.isnan(float(row["heldout_top1"] or "nan")) for row in done.rows)


# ---- with real evaluations ----


@pytest.mark.parametrize("method", ["vrpge", pytest.param("thin", marks=pytest.mark.slow)])
def test_wrong_labels_on_all_test_images_change_nothing_but_the_test_columns(images, tmp_path, method):
    """Bit by bit. Here test images would choose another epoch: the better the network, the worse it does on them."""
    turned = make_images(tmp_path / "turned", turn=1)
    settings = {"method": method, "epochs": 3, "finetune_epochs": 3, "finetune_lr": 0.05}
    right, wrong = (run(tmp_path / name, where, **settings) for name, where in (("a", images), ("b", turned)))
    (right_test, wrong_test) = (done.column("test_top1") for done in (right, wrong))
    assert right_test != wrong_test
    counted = slice(3 if method == "vrpge" else 0, None)
    best = [int(np.argmax(values[counted])) for values in (right_test, wrong_test)]
    assert best[0] != best[1]
    for file in ("last.pt", "best.pt"):
        states = [done.load(file) for done in (right, wrong)]
        for state in states:
            for content in (state, state["best"]) if "best" in state else (state,):
                for key in ("config", "fingerprint", "contents", "clocks", "test"):
                    content.pop(key, None)
            for row in state.get("history", ()):
                for column in [name for name in row if "test" in name or name == "epoch_seconds"]:
                    row.pop(column)
        assert differences(*states) == []
    for key in ("best_epoch", "heldout_top1", "choice", "units_kept", "train_flops_ratio"):
        assert right.summary[key] == wrong.summary[key]
    for one, other in zip(right.rows, wrong.rows, strict=True):
        assert {k: v for k, v in one.items() if "test" not in k} == {k: v for k, v in other.items() if "test" not in k}
