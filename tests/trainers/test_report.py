"""What a run reports: every column, curve, clock and number of the summary against what was seen from outside."""

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

import trainers.recipe
import trainers.report
from main import main
from tests.tiny import (
    BATCH,
    FINETUNE,
    FINETUNE_BATCH,
    FINETUNE_STEPS,
    HELDOUT,
    SEARCH,
    STEPS,
    TEST,
    Pass,
    Run,
    Save,
    Step,
    kept_mask,
    make_images,
    run,
    scores_of,
)
from utils.errors import RankError

# large steps of the scores: some are exactly 0 or 1 at the end of an epoch
SETTINGS = {"budget_schedule": "cubic", "score_lr": 0.3, "lr_policy": "constant_lr", "seed": 3}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def done(images, tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("report"), images, **SETTINGS)


@pytest.fixture(scope="module")
def epochs(done) -> list[list[Pass | Step | Save]]:
    """What happened in each epoch until its row was written, which is before its checkpoint."""
    return [events[: next(i for i, e in enumerate(events) if isinstance(e, Save))] for events in done.record.epochs()]


def close(values: list[float]) -> object:
    return pytest.approx(values, rel=1e-5, abs=1e-6)


def losses_and_hits(passes: list[Pass]) -> tuple[float, float, float]:
    """Mean loss, and the shares of the labels that are the highest or among the five highest logits, in per cent."""
    count = sum(len(p.images) for p in passes)
    loss = sum(p.loss * len(p.images) for p in passes) / count
    return loss, *(100 * sum(p.hits(k) for p in passes) / count for k in (1, 5))


def test_losses_and_accuracies_are_means_over_images_in_per_cent(done, epochs):
    kinds = {
        "train": lambda p: p.kind == "graph",
        "heldout": lambda p: p.kind == "evaluation" and not p.is_test,
        "test": lambda p: p.kind == "evaluation" and p.is_test,
    }
    for part, belongs in kinds.items():
        seen = [losses_and_hits([p for p in events if isinstance(p, Pass) and belongs(p)]) for events in epochs]
        for name, values in zip(("loss", "top1", "top5"), zip(*seen, strict=True), strict=True):
            assert done.column(f"{part}_{name}") == close(list(values)), (part, name)
    assert all(
        one < five < 100.001 for one, five in zip(done.column("test_top1"), done.column("test_top5"), strict=True)
    )


def test_scores_are_summed_up_as_they_are_in_the_checkpoint(done):
    seen, states = [], [done.load(f"epoch_{epoch}.pt") for epoch in range(1, SEARCH + 1)]
    for row, state in zip(done.rows, states, strict=False):
        scores = scores_of(state).double().tolist()
        open_ = [s for s in scores if 0 < s < 1]
        bits = -sum(s * math.log2(s) + (1 - s) * math.log2(1 - s) for s in open_) / len(scores)
        zero, one = (sum(s == end for s in scores) / len(scores) for end in (0, 1))
        seen.append((zero, one))
        told = [float(row[name]) for name in ("keep_ratio_expected", "max_score", "score_entropy")]
        assert told == close([statistics.mean(scores), max(scores), bits])
        assert [float(row[name]) for name in ("share_zero", "share_one")] == close([zero, one])
        assert float(row["keep_ratio_drawn"]) == close(float(state["search"]["masks"][0].double().mean()))
    assert any(0 < zero != one > 0 for zero, one in seen)


def test_what_the_structure_steps_did_is_a_mean_over_the_steps(done, epochs):
    """v is by how much the projection lowered the scores that are still between 0 and 1."""
    for number, events in enumerate(epochs[:SEARCH]):
        differences, shifts, first, second = [], [], None, None
        steps = [e for e in events if isinstance(e, Step) and e.kind == "scores"]
        projected = [*(step.before[0] for step in steps[1:]), scores_of(done.load(f"epoch_{number + 1}.pt"))]
        for step, then in zip(steps, projected, strict=True):
            inside = (then > 0) & (then < 1)
            shifts.append(float((step.after[0] - then)[inside].double().mean()) if inside.any() else 0.0)
        for event in events:
            if isinstance(event, Pass) and event.kind in ("graph", "free"):
                first, second = (event.loss, event.loss) if event.kind == "graph" else (first, event.loss)
            elif isinstance(event, Step) and event.kind == "weights":
                differences.append(abs(first - second))
        assert float(done.rows[number]["v"]) == pytest.approx(statistics.mean(shifts), rel=1e-3)
        assert max(shifts) > 0.01
        assert float(done.rows[number]["loss_difference"]) == close(statistics.mean(differences))
        assert max(differences) > 0


def test_rates_and_speeds_are_those_of_the_steps(done, epochs):
    """By a clock on which a training step takes a second."""
    for kind, column in (("weights", "weight_lr"), ("scores", "score_lr")):
        last = [[e.group["lr"] for e in events if isinstance(e, Step) and e.kind == kind] for events in epochs]
        told = [row[column] for row in done.rows]
        assert [float(value) if value else None for value in told] == [lr[-1] if lr else None for lr in last]
    assert done.column("epoch_seconds") == [STEPS] * SEARCH + [FINETUNE_STEPS] * FINETUNE
    assert done.column("images_per_second") == [BATCH] * SEARCH + [FINETUNE_BATCH] * FINETUNE
    assert done.column("step_ms") == [1000] * (SEARCH + FINETUNE)
    assert [row["phase"] for row in done.rows] == ["search"] * SEARCH + ["finetune"] * FINETUNE
    assert [row["epoch"] for row in done.rows] == ["1", "2", "3"]


def test_the_summary_is_that_of_the_best_checkpoint(done):
    summary, best = done.summary, done.load("best.pt")
    for part in ("test", "heldout"):
        assert summary[f"{part}_top1"] == best[part]["top1"]
    assert (summary["test_top5"], summary["test_loss"]) == (best["test"]["top5"], best["test"]["loss"])
    assert summary["units_kept"] == pytest.approx(kept_mask(best).mean())
    whole = done.record.passes("graph")[0]  # the first budget is everything
    last = next(p for p in reversed(done.record.passes("evaluation")) if p.is_test)
    ratio = (last.live_macs / len(last.images)) / (whole.macs / len(whole.images))
    assert summary["flops_ratio"] == pytest.approx(ratio, rel=1e-12)
    assert summary["flops_ratio_padded"] == pytest.approx(
        (last.macs / len(last.images)) / (whole.macs / len(whole.images))
    )
    assert (summary["heldout_images"], summary["test_images"], summary["classes"]) == (HELDOUT, TEST, 6)
    p = summary["heldout_top1"] / 100
    assert summary["heldout_standard_error"] == pytest.approx(100 * math.sqrt(p * (1 - p) / HELDOUT))
    same = {"method": "vrpge", "arch": "resnet8_he", "keep_ratio": 0.5, "seed": 3, "epochs": SEARCH + FINETUNE}
    assert {key: summary[key] for key in same} == same


def test_the_summary_knows_where_the_result_is_from_and_what_the_last_epoch_has(done):
    summary = done.summary
    assert (summary["best_epoch"], summary["best_phase"]) == (
        done.load("best.pt")["epoch"],
        done.load("best.pt")["phase"],
    )
    assert [summary[f"last_{part}_top1"] for part in ("heldout", "test")] == [
        float(done.rows[-1][f"{part}_top1"]) for part in ("heldout", "test")
    ]


def test_training_flops_are_told_without_and_with_padding(done):
    ledger = done.load("last.pt")["ledger"]
    for name, key in (("executed", "train_flops_ratio"), ("padded", "train_flops_executed")):
        assert done.summary[key] == ledger[name] / ledger["dense"]
    assert done.summary["train_flops_ratio"] < done.summary["train_flops_executed"]


def test_parameters_kept_are_those_of_the_thin_network(images, tmp_path):
    def run_of(method: str) -> tuple[float, int]:
        each = run(tmp_path, images, "--no-finetune", name=method, method=method, epochs=1)
        model = each.load("best.pt")["model"]
        return each.summary["params_kept"], sum(t.numel() for n, t in model.items() if n.endswith(("weight", "bias")))

    (kept, thin), (all_of_them, dense) = run_of("thin"), run_of("dense")
    assert kept == pytest.approx(thin / dense, rel=1e-12)
    assert all_of_them == 1


# ---- the record of the scores; its content is tested in test_curves.py ----


def test_without_scores_the_record_holds_the_mask_and_without_units_there_is_none(images, tmp_path):
    thin = run(tmp_path, images, "--no-finetune", name="thin", method="thin", epochs=1)
    record = thin.scores
    mask = kept_mask(thin.load("best.pt"))
    assert record["scores"].shape == (0, len(mask))
    assert record["epochs"].shape == (0,)
    np.testing.assert_array_equal(record["chosen"], mask)
    dense = run(tmp_path, images, "--no-finetune", name="dense", method="dense", epochs=1)
    assert not (dense.folder / "scores.npz").exists()


def test_a_disk_that_refuses_the_record_does_not_end_the_run(images, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainers.report, "write_arrays", full)
    done = run(tmp_path, images, "--no-finetune", epochs=1)
    assert done.code == 1
    assert not (done.folder / "scores.npz").exists()
    said = capsys.readouterr().out
    assert said.count("warning: scores.npz could not be written") == 1
    assert "train loss" in said.partition("warning: scores.npz")[2]  # said at the start


def test_a_run_of_an_older_version_goes_on(images, tmp_path):
    """Its checkpoint lacks the steps of all phases, a clock, the scores of earlier epochs, and columns of the table."""
    options = ("--no-finetune",), {"method": "thin", "epochs": 2}
    stopped = run(tmp_path, images, *options[0], interrupt_at=STEPS, **options[1])
    state = stopped.load("last.pt")
    state = {key: value for key, value in state.items() if key not in ("steps", "at_last_point", "score_history")}
    new = ("step", "evaluation_seconds", "data_seconds")
    state["history"] = [{key: value for key, value in row.items() if key not in new} for row in state["history"]]
    state["clocks"] = state["clocks"][:3]
    torch.save(state, stopped.folder / "checkpoints/last.pt")
    resumed = run(tmp_path, images, "--resume", *options[0], **options[1])
    assert resumed.code == 0
    assert [row["step"] for row in resumed.rows] == ["", str(STEPS - 1)]
    assert resumed.rows[0]["train_loss"] == stopped.rows[0]["train_loss"] != ""


# ---- ranks and devices ----


def test_ranks_are_compared_at_the_start_now_and_then_and_after_every_epoch(images, tmp_path, monkeypatch):
    seen = []

    def compared(tensors: dict[str, torch.Tensor], when: str) -> None:
        if when.startswith("after"):
            seen.append((when, dict(tensors)))

    monkeypatch.setattr(trainers.recipe, "check_equal", compared)
    monkeypatch.setattr(trainers.recipe, "CHECK_EVERY", 3)
    done = run(tmp_path, images, "--no-finetune", retire="off")
    places = [(0, 0), (0, 3), (1, 0), (1, 3), (2, 0)]
    assert [when for when, _ in seen] == [f"after {epoch} epochs and {step} steps" for epoch, step in places]
    tensors = list(seen[-1][1].values())
    state = done.load("epoch_2.pt")
    optimizers = state["weight_optimizer"], state["search"]["score_optimizer"]
    inner = [t for optimizer in optimizers for values in optimizer["state"].values() for t in values.values()]
    inner = [t for t in inner if isinstance(t, torch.Tensor)]
    assert len(inner) > len(done.record.steps("weights")[0].before)
    for tensor in (*state["model"].values(), *inner, state["search"]["masks"]):  # weights, statistics and scores first
        assert any(t.shape == tensor.shape and torch.equal(t, tensor) for t in tensors)


def test_ranks_that_differ_end_with_exit_code_4(images, tmp_path, monkeypatch, capsys):
    def differ(_tensors: dict[str, torch.Tensor], when: str) -> None:
        if when.startswith("after 1 epochs"):
            raise RankError("conv1.weight differs")

    monkeypatch.setattr(trainers.recipe, "check_equal", differ)
    assert run(tmp_path, images).code == 4
    assert "conv1.weight differs" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1"])
def test_a_gpu_that_was_asked_for_and_is_not_there_is_one_sentence(images, tmp_path, monkeypatch, capsys, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    small = ["--set", "ImageFolder", "--data", str(images), "--arch", "resnet8_he", "--batch-size", str(BATCH)]
    assert main([*small, "--device", device, "--log-dir", str(tmp_path / "runs"), "--dry-run"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "no CUDA GPU" in said.err


def test_the_released_way_to_name_a_gpu_falls_back_to_the_cpu_and_says_so(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    done = run(tmp_path, images, "--multigpu", "0", "--no-finetune", method="thin", epochs=1, device="auto")
    assert done.code == 0
    assert done.summary["device"].startswith("cpu")
    assert "no CUDA GPU here, training on the CPU instead" in capsys.readouterr().out
