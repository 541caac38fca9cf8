"""The training FLOPs that a run reports are the multiply-adds that it really ran, counted at the convolutions."""

from pathlib import Path

import pytest

import trainers.recipe
from tests.tiny import BATCH, HELDOUT, SEARCH, STEPS, TEST, TRAIN, Pass, Run, Save, Step, make_images, run

CASES = {
    "dense": {"method": "dense"},
    "thin": {"method": "thin"},
    "l1": {"method": "l1", "epochs": 1},
    "gumbel": {"method": "gumbel", "finetune": False},
    "vrpge": {"budget_schedule": "cubic"},  # the first two masks keep everything: one of them is not run
    "rarely": {"score_every": 3, "K": 3, "sample_from_training_set": True},
    "masked": {"execution": "masked", "K": 3, "test_every": 0, "finetune": False},
    "released": {"method": "released", "K": 3, "finetune": False},
}


class Runs(dict):
    """The runs of the cases, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.images = root, make_images(root / "images")

    def __missing__(self, name: str) -> Run:
        self[name] = run(self.root, self.images, name=name, **CASES[name])
        return self[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("ledger"))


@pytest.fixture(scope="module")
def dense_macs(runs) -> float:
    """Of one image in one forward pass of the whole network."""
    first = runs["dense"].record.passes("graph")[0]
    return first.macs / len(first.images)


def spent(events: list, padding: bool) -> int:
    """What training ran: a backward pass costs two forward passes; passes on test images are no part of training."""
    passes = [event for event in events if isinstance(event, Pass) and not event.is_test]
    return sum((p.macs if padding else p.live_macs) * (3 if p.kind == "graph" else 1) for p in passes)


def of_dense_training(events: list, dense_macs: float) -> float:
    steps = sum(isinstance(event, Step) and event.kind == "weights" for event in events)
    images = {len(event.images) for event in events if isinstance(event, Pass) and event.kind == "graph"}
    (batch_size,) = images
    return 3 * steps * batch_size * dense_macs


@pytest.mark.parametrize("name", CASES)
def test_the_summary_tells_what_training_ran(runs, dense_macs, name):
    done = runs[name]
    assert done.code == 0
    epochs = done.record.epochs()
    dense = sum(of_dense_training(events, dense_macs) for events in epochs)
    events = done.record.events
    assert done.summary["train_flops_ratio"] == pytest.approx(spent(events, False) / dense, rel=1e-12)
    assert done.summary["train_flops_executed"] == pytest.approx(spent(events, True) / dense, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_every_row_tells_what_was_run_up_to_then(runs, dense_macs, name):
    """A row is written before the checkpoint of its epoch; the choice, which follows the search, is in the next."""
    done, executed, padded, dense, forward = runs[name], 0, 0, 0.0, []
    for row, events in zip(done.rows, done.record.epochs(), strict=True):
        last_step = max(i for i, event in enumerate(events) if isinstance(event, Step) and event.kind == "weights")
        reported = next(i for i, event in enumerate(events) if isinstance(event, Save))
        dense += of_dense_training(events, dense_macs)
        ratio = (executed + spent(events[:reported], False)) / dense
        assert float(row["train_flops_ratio"]) == pytest.approx(ratio, rel=1e-12)
        ratio = (padded + spent(events[:reported], True)) / dense
        assert float(row["train_flops_executed"]) == pytest.approx(ratio, rel=1e-12)
        executed, padded = executed + spent(events, False), padded + spent(events, True)
        steps = [event for event in events[:last_step] if isinstance(event, Pass)]
        now = [p.live_macs / len(p.images) / dense_macs for p in steps]
        forward += now
        assert float(row["forward_flops_ratio"]) == pytest.approx(sum(now) / len(now), rel=1e-12)
        assert float(row["forward_flops_ratio_mean"]) == pytest.approx(sum(forward) / len(forward), rel=1e-12)
        subnet = next(event for event in events[last_step:] if isinstance(event, Pass) and event.kind == "evaluation")
        shown = subnet.live_macs / len(subnet.images) / dense_macs
        assert name in ("masked", "released") or float(row["subnet_flops_ratio"]) == pytest.approx(shown, rel=1e-12)


def test_what_the_cases_are_made_for_did_happen(runs):
    """A twin was left out, a step ran without a structure step, two passes of a step were backward, test passes ran."""

    def passes_of_steps(name: str) -> list[str]:
        kinds, all_steps = "", []
        for event in runs[name].record.events:
            if isinstance(event, Pass):
                kinds += event.kind[0]
            elif isinstance(event, Step) and event.kind == "weights":
                all_steps.append(kinds.rpartition("e")[2])  # what came before were evaluations and statistics
                kinds = ""
        return all_steps[: SEARCH * STEPS]

    assert passes_of_steps("vrpge")[0] == "g"
    assert passes_of_steps("vrpge")[-1] == "gf"
    assert passes_of_steps("rarely") == ["gff" if step % 3 == 0 else "g" for step in range(SEARCH * STEPS)]
    assert set(passes_of_steps("masked")) == {"gff"}
    assert set(passes_of_steps("released")) == {"ggg"}
    assert set(passes_of_steps("gumbel")) == {"g"}
    for name in CASES:
        done = runs[name]
        tested = sum(len(p.images) for p in done.record.passes() if p.is_test)
        assert tested % TEST == 0
        assert tested > 0
        assert name in ("dense", "gumbel", "masked", "released") or done.summary["train_flops_ratio"] < 1.2
    padded, plain = (runs["thin"].summary[key] for key in ("train_flops_executed", "train_flops_ratio"))
    assert padded > 1.5 * plain


def test_choosing_by_training_images_costs_their_passes(runs):
    """Three drawn candidates and the top-scored one, on all training images, after their statistics."""
    events = runs["rarely"].record.epochs()[SEARCH - 1]
    saved = [i for i, event in enumerate(events) if isinstance(event, Save)]
    choice = [event for event in events[saved[0] :] if isinstance(event, Pass)]
    assert sum(len(p.images) for p in choice if p.kind == "free") == 4 * 2 * BATCH
    assert sum(len(p.images) for p in choice if p.kind == "evaluation" and not p.is_test) == 4 * TRAIN + HELDOUT


def test_of_several_ranks_each_estimates_statistics_from_all_images(runs, dense_macs, monkeypatch):
    monkeypatch.setattr(trainers.recipe, "num_ranks", lambda: 2)  # all else that training runs is shared by the ranks
    done = run(runs.root, runs.images, "--no-finetune", name="ranks", **CASES["l1"])
    events = done.record.events
    statistics = sum(event.live_macs for event in events if isinstance(event, Pass) and event.kind == "free")
    assert statistics > 0
    ratio = (spent(events, False) + statistics) / of_dense_training(events, dense_macs)
    assert done.summary["train_flops_ratio"] == pytest.approx(ratio, rel=1e-12)
