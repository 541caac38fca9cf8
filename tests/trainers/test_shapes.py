"""Searches with fixed shapes (`--shapes fixed`): the same run as with those of the masks, and what it tells."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import trainers.recipe
from tests.toy import CLOCKS, one_thread, without_clocks  # noqa: F401
from utils.channels.network import SparseNetwork
from utils.run.checkpoint import differences, load

SMALL = ("--arch", "resnet8_he", "--width-mult", "0.5", "--epochs", "2", "--finetune-epochs", "1")
FIXED = (*SMALL, "--shapes", "fixed", "--score-lr", "0.3")  # some scores become 0, so that units leave


@pytest.fixture(autouse=True)
def unpadded(monkeypatch) -> None:
    """Layers of few channels would otherwise always be computed as a whole."""
    monkeypatch.setattr("utils.channels.network.preferred_multiple", lambda device: 1)


def folder_of(name: str = "run") -> Path:
    (folder,) = Path("runs/tiny", name).glob("prune_rate=*")
    return folder


def rows_of(name: str = "run") -> list[dict[str, str]]:
    with open(folder_of(name) / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def fitting(monkeypatch) -> list[bool]:
    """Of every step of a search, whether its masks fitted; filled while it runs."""
    seen, plans = [], SparseNetwork.plans

    def watched(self, masks_KU):
        made = plans(self, masks_KU)
        fit = {plan.fixed for plan in made}
        assert len(fit) == 1
        seen.extend(fit)
        return made

    monkeypatch.setattr(SparseNetwork, "plans", watched)
    return seen


def test_it_is_the_run_that_draws_its_shapes(program, fitting):
    """In float32 sums run in another order; after an epoch the two still agree closely."""
    for shapes in ("drawn", "fixed"):
        words = (*SMALL[:4], "--epochs", "1", "--no-finetune", "--shapes", shapes)
        assert program(*words, name=shapes) == 0
    assert sorted(set(fitting[:4])) == [False]
    assert all(fitting[4:])
    drawn, fixed = (load(folder_of(name) / "checkpoints/last.pt") for name in ("drawn", "fixed"))
    for name, value in drawn["model"].items():
        torch.testing.assert_close(value, fixed["model"][name], rtol=1e-3, atol=1e-3, msg=name)
    ratios = [float(rows_of(name)[0]["train_flops_ratio"]) for name in ("drawn", "fixed")]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.02)


def test_auto_is_drawn(program, fitting):
    assert program(*SMALL[:4], "--epochs", "1", "--no-finetune") == 0
    assert not any(fitting)
    assert rows_of()[0]["unfit_steps"] == ""


def test_units_leave_and_shapes_are_fixed_anew_after_every_epoch(program, fitting, monkeypatch):
    slots, fix = [], SparseNetwork.fix_shapes

    def watched(self, given=None):
        fix(self, given)
        slots.append((int(self.stored_units.sum()), sum(self.shapes.slots)))

    monkeypatch.setattr(SparseNetwork, "fix_shapes", watched)
    assert program(*FIXED, "--method", "coin") == 0
    assert len(slots) == 3  # before the first step, and after two epochs
    assert slots[-1][0] < slots[0][0]
    assert slots[-1][1] < slots[0][1]
    assert sum(fitting) > len(fitting) / 2


def test_the_steps_whose_masks_do_not_fit_are_reported(program, fitting, monkeypatch):
    monkeypatch.setattr("utils.channels.capacity.SIGMAS", 0.8)
    assert program(*FIXED) == 0
    misses = 1 - np.array(fitting, dtype=float).reshape(2, -1).mean(axis=1)
    assert 0 < misses.mean() < 1
    rows = rows_of()
    assert [float(row["unfit_steps"]) for row in rows[:2]] == pytest.approx(misses.tolist())
    assert {row["unfit_steps"] for row in rows[2:]} == {""}


def test_a_run_stopped_within_an_epoch_and_resumed_ends_bit_equal(program, monkeypatch):
    monkeypatch.setattr("utils.channels.capacity.SIGMAS", 1.0)  # so that some steps do not fit
    assert program(*FIXED, name="whole") == 0
    step, count = trainers.recipe.Recipe.step, iter(range(1000))

    def interrupted_step(self, images, labels, settings):
        if next(count) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, images, labels, settings)

    with monkeypatch.context() as patch:
        patch.setattr(trainers.recipe.Recipe, "step", interrupted_step)
        assert program(*FIXED, name="parts") == 128 + signal.SIGTERM
    assert len(load(folder_of("parts") / "checkpoints/last.pt")["search"]["slots"]) > 10
    assert program(*FIXED, "--resume", name="parts") == 0
    whole, parts = (load(folder_of(name) / "checkpoints/last.pt") for name in ("whole", "parts"))
    assert differences(without_clocks(whole), without_clocks(parts)) == []
    tables = [[{k: v for k, v in row.items() if k not in CLOCKS} for row in rows_of(n)] for n in ("whole", "parts")]
    assert tables[0] == tables[1]


def test_it_is_refused_where_nothing_reads_it(program, capsys):
    assert program("--shapes", "fixed", "--execution", "masked") == 2
    assert "shapes" in capsys.readouterr().err
    assert program("--shapes", "fixed", "--method", "thin") == 2
    assert "shapes" in capsys.readouterr().err
