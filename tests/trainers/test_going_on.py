"""A run that becomes longer when it is resumed, and what a finished run says: against runs of that length."""

import re
import shlex
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import trainers.recipe
from args import parse_args
from main import main
from tests.tiny import FINETUNE_STEPS, STEPS, Run, make_images, run
from tests.trainers.test_recipe import factor, rates
from utils.run.checkpoint import differences

CONSTANT = {"lr_policy": "constant_lr", "save_every": 0}
SHORT = {"epochs": 1, "finetune_epochs": 1}
LONGER = {  # name -> settings of the first start, steps until it is interrupted, options of the second, the whole run
    "search": (SHORT, STEPS - 1, ("--epochs", "2"), {"epochs": 2, "finetune_epochs": 1}),
    "fine-tuning": (SHORT, STEPS + 2, ("--finetune-epochs", "2"), {"epochs": 1, "finetune_epochs": 2}),
    "finished": (SHORT, None, ("--finetune-epochs", "2"), {"epochs": 1, "finetune_epochs": 2}),
    "finished dense": ({**SHORT, "method": "dense"}, None, ("--epochs", "2"), {"epochs": 2, "finetune_epochs": 1}),
    "finished thin": ({**SHORT, "method": "thin"}, None, ("--epochs", "2"), {"epochs": 2, "finetune_epochs": 1}),
    "no fine-tuning": (
        {**SHORT, "finetune": "off"},
        *(None, ("--finetune", "--finetune-epochs", "1", "--finetune-lr", "0.02")),
        {"finetune": "on", "finetune_epochs": 1, "finetune_lr": 0.02},
    ),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Run:
    """A search of one epoch and one of fine-tuning, by default a cosine over the search."""
    return run(tmp_path_factory.mktemp("finished"), images, **SHORT)


SLOW = ("fine-tuning", "finished", "finished thin", "no fine-tuning")  # nearly the same as others


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in LONGER])
def test_with_constant_rates_a_run_that_became_longer_is_a_run_of_that_length(images, tmp_path, case, capsys):
    """Bit by bit: weights, optimizers, history, clocks, and best.pt, which is that of the whole run."""
    first, interrupt_at, options, whole = LONGER[case]
    first, name = {**CONSTANT, **first}, "grown"
    assert run(tmp_path, images, interrupt_at=interrupt_at, name=name, **first).code == (130 if interrupt_at else 0)
    grown = run(tmp_path, images, "--resume", *options, name=name, **first)
    assert grown.code == 0
    assert "learning rates and budget are those of a run of" in capsys.readouterr().out
    expected = run(tmp_path, images, name="whole", **{**first, **whole})
    names = differences(expected.load("last.pt"), grown.load("last.pt"))
    assert {name for name in names if not name.startswith("best.config")} <= {"config.name", "config.resume"}
    results = [{**each.load("best.pt"), "config": None} for each in (expected, grown)]  # written at different times
    assert differences(*results) == []
    assert grown.rows == expected.rows
    assert {**grown.summary, "run": ""} == {**expected.summary, "run": ""}


def test_rates_and_budget_are_those_of_the_new_length_from_there_on(images, tmp_path):
    """A search of 2 epochs that becomes one of 3 for a step, then one of 4."""
    settings = {"lr_policy": "cosine_lr", "budget_schedule": "cubic", "budget_end": 0.5, "num_subnets": 1}
    before = run(tmp_path, images, interrupt_at=STEPS, epochs=2, **settings)
    (before.folder / "summary.json").touch()
    stopped = run(tmp_path, images, "--resume", "--epochs", "3", interrupt_at=0, epochs=2, **settings)
    assert not (before.folder / "summary.json").exists()  # only a finished run has one
    after = run(tmp_path, images, "--resume", "--epochs", "4", epochs=2, **settings)
    assert (before.code, stopped.code, after.code) == (130, 130, 0)
    places = [step / STEPS for step in range(4 * STEPS)]
    seen = [rates(each.record.steps("weights")) for each in (before, after)]
    assert rates(stopped.record.steps("weights")) == pytest.approx([0.05 * factor("cosine_lr", 1.25, 0, 3, STEPS)])
    assert seen[0] == pytest.approx([0.05 * factor("cosine_lr", p, 0, 2, STEPS) for p in places[: STEPS + 1]])
    assert seen[1][:-FINETUNE_STEPS] == pytest.approx(
        [0.05 * factor("cosine_lr", p, 0, 4, STEPS) for p in places[STEPS + 2 :]]
    )
    scores = rates(after.record.steps("scores"))
    assert scores == pytest.approx([0.05 * factor("cosine_lr", p, 0, 4, STEPS) for p in places[STEPS + 2 :]])
    progress = [(2 * STEPS - 1) / (4 * STEPS), (3 * STEPS - 1) / (4 * STEPS), (4 * STEPS - 1) / (4 * STEPS)]
    fallen = [0.5 + 0.5 * (1 - min(p / 0.5, 1)) ** 3 for p in progress]
    budgets = [float(row["budget"]) for row in after.rows if row["phase"] == "search"]
    assert budgets[1:] == pytest.approx(fallen)


def test_one_curve_over_search_and_fine_tuning_is_that_of_the_new_length(images, tmp_path):
    settings = {**SHORT, "finetune_policy": "continue", "lr_policy": "cosine_lr"}
    assert run(tmp_path, images, **settings).code == 0
    after = run(tmp_path, images, "--resume", "--finetune-epochs", "3", **settings)
    places = [2 + step / FINETUNE_STEPS for step in range(2 * FINETUNE_STEPS)]
    expected = [0.05 * factor("cosine_lr", place, 0, 4, FINETUNE_STEPS) for place in places]
    assert rates(after.record.steps("weights")) == pytest.approx(expected)


def test_a_search_that_has_ended_stays_ended_and_everything_goes_on(images, tmp_path, capsys):
    """More epochs of the search of a finished run train its subnet; rows, curves and clocks go on."""
    before = run(tmp_path, images, **SHORT)
    rows, summary = before.rows, before.summary
    capsys.readouterr()
    after = run(tmp_path, images, "--resume", "--epochs", "3", **SHORT)
    said = capsys.readouterr().out
    assert "longer than before: epochs 1 -> 3. From here on learning rates and budget are those of a run of 4" in said
    assert not after.record.steps("scores")
    assert len(after.record.steps("weights")) == 2 * FINETUNE_STEPS
    assert after.rows[:2] == rows
    assert [(row["epoch"], row["phase"]) for row in after.rows[2:]] == [("3", "finetune"), ("4", "finetune")]
    assert after.summary["epochs"] == 4
    assert after.summary["train_seconds"] == summary["train_seconds"] + 2 * FINETUNE_STEPS
    assert (after.load("last.pt")["subnet"]["mask"] == before.load("last.pt")["subnet"]["mask"]).all()
    assert parse_args(["--config", str(after.folder / "config.yaml")]).config.train.epochs == 3
    assert f"finetune epoch 4/4 step {FINETUNE_STEPS}/{FINETUNE_STEPS}" in said
    events = EventAccumulator(str(after.folder))
    events.Reload()
    ends = [STEPS + epoch * FINETUNE_STEPS for epoch in range(4)]
    assert [event.step for event in events.Scalars("train/loss")] == ends


def test_the_best_of_the_whole_run_stays_the_result(images, tmp_path, monkeypatch):
    """What the additional epochs make worse is no result, and their evaluation does not forget the old one."""
    settings = {**SHORT, "method": "dense"}
    before = run(tmp_path, images, **settings)
    evaluate = trainers.recipe.evaluate
    monkeypatch.setattr(trainers.recipe, "evaluate", lambda *args: {**evaluate(*args), "top1": -1.0})
    after = run(tmp_path, images, "--resume", "--epochs", "2", **settings)
    assert after.summary["epochs"] == 3
    for key in ("best_epoch", "test_top1", "heldout_top1"):
        assert after.summary[key] == before.summary[key]
    assert not after.record.saves("best.pt")


def test_a_finished_run_tells_three_commands_and_each_of_them_works(images, finished, capsys):
    """Also when later runs have the same names."""
    root = finished.folder.parents[3]
    assert run(root, images, "--dry-run", **SHORT).code == 0
    later = finished.folder / "1"
    (later / "checkpoints").mkdir(parents=True)
    capsys.readouterr()
    best = str(finished.folder / "checkpoints/best.pt")
    assert main(["--resume", str(finished.folder / "checkpoints/last.pt")]) == 2
    said = capsys.readouterr().err
    commands = re.findall(r"(--(?:evaluate|resume|pretrained) \S+(?: \S+\.pt)?(?: --finetune-epochs N)?)", said)
    assert commands == [
        f"--evaluate --resume {best}",
        f"--resume {finished.folder / 'checkpoints/last.pt'} --finetune-epochs N",
        f"--pretrained {best}",
    ]
    assert main(shlex.split(commands[0])) == 0
    assert f"{best}: test top-1 {finished.summary['test_top1']:.2f} %" in capsys.readouterr().out
    assert main(["--dry-run", *shlex.split(commands[1].replace("N", "2"))]) == 0
    assert run(root, images, "--dry-run", *commands[2].split(), keep_ratio=0.25).code == 0
    assert "starting from the subnet" in capsys.readouterr().out
    (later / "checkpoints").rmdir()


def test_a_run_without_fine_tuning_names_what_could_make_it_longer(images, tmp_path, capsys):
    settings = {"epochs": 1, "finetune": "off", "method": "l1"}
    assert run(tmp_path, images, **settings).code == 0
    for more in ((), ("--epochs", "2")):
        capsys.readouterr()
        assert run(tmp_path, images, "--resume", *more, **settings).code == 2
        assert "--finetune --finetune-epochs N trains it longer" in capsys.readouterr().err
