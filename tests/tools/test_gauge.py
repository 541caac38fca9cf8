"""The gauge: its passes against the masked reference, and the program."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from args import ESTIMATORS, config_from_dict
from tests.tools.test_gauge_figures import FIGURES
from tests.toy import PlainNet, batch, config, one_thread, plain_net, sparse_network  # noqa: F401
from tools import gauge
from trainers.build import new_run
from trainers.session import load_data
from utils.algorithm.masks import sample_masks
from utils.channels.norms import GateReader
from utils.run import checkpoint

# ---- the passes ----


def test_passes_are_those_of_the_masked_reference_and_leave_no_trace():
    net, layers, options = plain_net("plain"), list(PlainNet.LAYERS), config(label_smoothing=0.1)
    compact, masked = (sparse_network(net, layers, execution) for execution in ("compact", "masked"))
    images, labels = batch(6)
    state = {name: value.clone() for name, value in compact.model.state_dict().items()}
    random_state = torch.get_rng_state()
    masks_KU = sample_masks(compact.scores.detach(), torch.Generator().manual_seed(4), 3)
    measured = gauge.Batch(compact, images, labels, options)
    losses_K, cost = measured.run(masks_KU)

    plans = [masked.plan(mask_U) for mask_U in masks_KU.numpy()]
    expected = [F.cross_entropy(masked(images, plan, False), labels, label_smoothing=0.1) for plan in plans]
    torch.testing.assert_close(losses_K, torch.stack(expected).detach(), rtol=1e-9, atol=1e-9)
    assert cost == pytest.approx(sum(masked.subnet_macs(plan) for plan in plans) / masked.dense_macs)
    assert not losses_K.requires_grad

    gates = measured.gates(masks_KU[0])
    expected[0].backward()
    theirs = GateReader(masked).read(plans[0], 6)
    assert gates.observed_U.any()
    torch.testing.assert_close(gates.gradients_U * gates.observed_U, theirs.gradients_U * theirs.observed_U)
    assert (gates.num_images, gates.observed_U.tolist()) == (6, theirs.observed_U.tolist())
    assert all(w.grad is None or not w.grad.any() for w in compact.weight_parameters())
    assert checkpoint.differences(state, dict(compact.model.state_dict())) == []
    assert torch.equal(random_state, torch.get_rng_state())


# ---- the program ----

OPTIONS = {
    "arch": "resnet8_he",
    "width_mult": 0.125,
    "batch_size": 16,
    "keep_ratio": 0.5,
    "device": "cpu",
    "precision": "bf16",
}
SMALL = ("--batches", "4", "--masks", "4", "--warm-up", "2")


def save_checkpoint(folder: Path, name: str, phase: str = "search", fingerprint: str | None = None, **changes) -> Path:
    """A checkpoint of a run as main.py writes it, after one that never trained."""
    settings = config_from_dict({**OPTIONS, **changes}, "test")
    device = torch.device("cpu")
    data = load_data(settings, device)
    run = new_run(settings, data, device)
    if name == "decided.pt":
        run.network.scores.data.fill_(0.0)
    if name == "epoch_10.pt":
        next(iter(run.network.layers.values())).weight.data.neg_()
    run.phase, run.epoch = phase, 3
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    checkpoint.save(
        folder / "checkpoints" / name,
        run.state_dict(settings, replace(data, fingerprint=fingerprint or data.fingerprint)),
    )
    return folder


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A folder with two checkpoints of the search, one of them without a decision left, and one of fine-tuning."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("epoch_10.pt", "epoch_9.pt", "decided.pt"):
        save_checkpoint(folder, name)
    return save_checkpoint(folder, "last.pt", phase="finetune")


def test_the_program_measures_all_checkpoints_of_the_search_and_changes_nothing(finished_run, tmp_path, capsys):
    files = {file: file.read_bytes() for file in (finished_run / "checkpoints").iterdir()}
    assert gauge.main([str(finished_run), *SMALL]) == 0
    said = capsys.readouterr().out
    assert "left out: last.pt is from after the search (phase finetune)" in said
    assert {file: file.read_bytes() for file in (finished_run / "checkpoints").iterdir()} == files

    written = json.loads((finished_run / "gauge" / "gauge.json").read_text())
    assert [entry["checkpoint"] for entry in written["checkpoints"]] == ["epoch_9.pt", "epoch_10.pt"]
    for entry in written["checkpoints"]:
        assert list(entry["estimators"]) == list(ESTIMATORS)
        assert entry["epoch"] == 3
        assert 0.2 < entry["cost"] < 1
        for name, figures in entry["estimators"].items():
            assert set(figures) == FIGURES
            assert (figures["variance"]["value"] > 0) == (name != "taylor")
    assert written["checkpoints"][0]["estimators"] != written["checkpoints"][1]["estimators"]  # other weights

    text = (finished_run / "gauge" / "gauge.md").read_text()
    assert "## epoch_10.pt (3 epochs)" in text
    assert all(line in said for line in text.splitlines() if line.startswith("| "))
    cells = next(line for line in text.splitlines() if line.startswith("| reinforce")).split("|")
    figures = written["checkpoints"][0]["estimators"]["reinforce"]
    for cell, name, factor in ((2, "relative_variance", 1), (3, "mask_share", 100), (4, "share_of_signal", 100)):
        told = float(cells[cell].split("(")[0])
        assert told == pytest.approx(factor * figures[name]["value"], abs=0.51 if abs(told) >= 100 else 0.001)

    torch.rand(3)  # a global generator elsewhere
    some = ("--checkpoint", "epoch_9.pt", "--estimators", "linear_cv_gates", "--out", str(tmp_path / "other"))
    assert gauge.main([str(finished_run), *SMALL, *some]) == 0
    again = json.loads((tmp_path / "other" / "gauge.json").read_text())
    first, second = (content["checkpoints"][0]["estimators"] for content in (written, again))
    assert second == {name: first[name] for name in ("vrpge", "linear_cv_gates")}


def test_measured_batches_share_no_epoch_and_are_those_of_training(finished_run):
    settings = config_from_dict(OPTIONS, "test")
    data = load_data(settings, torch.device("cpu"))
    batches = list(gauge.independent_batches(None, data, settings, seed=5, count=3))
    others = list(gauge.warm_up_batches(None, data, settings, seed=5, count=3))
    epoch = settings.total_epochs + 3
    images, labels = next(data.train.train_batches(16, 5, epoch))
    assert torch.equal(batches[1].images, images)
    assert torch.equal(batches[1].labels, labels)
    for i, (images, _) in enumerate(islice(data.train.train_batches(16, 5, settings.total_epochs), 3)):
        assert torch.equal(others[i].images, images)
    seen = [tuple(b.images.flatten()[:3000].tolist()) for b in [*batches, *others]]
    assert len(set(seen)) == 6


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("RUN --estimators vrpge disarm", "invalid choice: 'disarm'"),
        ("RUN --masks 7", "--masks must be even"),
        ("RUN --batches 2", "--batches: must be a whole number from 4"),
        ("RUN --device tpu", "device must be auto, cpu, cuda or cuda:N"),
        ("RUN --checkpoint epoch_11.pt", "has no epoch_11.pt; it has decided.pt, epoch_10.pt, epoch_9.pt, last.pt"),
        ("RUN --checkpoint epoch_9.pt last.pt", "last.pt is from after the search (phase finetune)"),
        ("RUN --checkpoint decided.pt", "decided.pt has scores of 0 and 1 only"),
        ("nowhere", "nowhere has no checkpoints/*.pt"),
        ("RUN --colour red", "--help lists every option"),
        ("RUN --out FILE --checkpoint epoch_9.pt --estimators vrpge", "choose another folder with --out"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(words, part, finished_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    places = {"RUN": str(finished_run), "FILE": str(tmp_path / "file")}
    assert gauge.main([*(places.get(word, word) for word in words.split()), *("--warm-up", "0")]) == 2
    check_error(capsys, part)


def check_error(capsys, part: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert part in error


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"method": "dense"}, "is of method dense, which has no scores"),
        ({"method": "l1"}, "is of method l1, which has no scores"),
        ({"phase": "done"}, "last.pt is from after the search (phase done)"),
        ({"fingerprint": "other"}, "Point --data at the same files"),
    ],
)
def test_runs_that_cannot_be_measured_are_refused(changes, part, tmp_path, capsys):
    save_checkpoint(tmp_path, "last.pt", **changes)
    assert gauge.main([str(tmp_path), *SMALL]) == 2
    check_error(capsys, part)
