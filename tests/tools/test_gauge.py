"""The gauge: its figures against exact enumeration, its passes against the masked reference, and the program."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from args import ESTIMATORS, config_from_dict
from tests.tools.toys import enumerated, look_up, random_table, true_gradient, vector
from tests.toy import PlainNet, batch, config, one_thread, plain_net, sparse_network  # noqa: F401
from tools import gauge
from tools.gauge_figures import Figure, jackknife
from trainers.build import new_run
from trainers.session import load_data
from utils.algorithm.estimators.base import Estimator, Gates
from utils.algorithm.estimators.linear_cv_gates import LinearControlVariate
from utils.algorithm.estimators.reinforce import Reinforce
from utils.algorithm.estimators.taylor import Taylor
from utils.algorithm.estimators.vrpge import VRPGEEstimator
from utils.algorithm.masks import sample_masks
from utils.channels.norms import GateReader
from utils.run import checkpoint

ALPHA = 0.5
TOY_SCORES = vector(0.3, 0.5, 0.8)
CLASSES = {"vrpge": VRPGEEstimator, "reinforce": Reinforce, "linear_cv_gates": LinearControlVariate, "taylor": Taylor}
FIGURES = ("variance", "relative_variance", "mask_share", "bias", "share_of_signal", "cosine", "cosine_sd")


# ---- the figures ----


@dataclass(frozen=True)
class ToyBatch:
    """Losses from a table (2^U,)."""

    table_N: Tensor

    def run(self, masks_KU: Tensor) -> tuple[Tensor, float]:
        return look_up(self.table_N, masks_KU), 2.0

    def gates(self, mask_U: Tensor) -> Gates:
        """Slopes of the function that is linear in every unit and has the table's values at the corners."""
        flipped = mask_U ^ torch.eye(len(mask_U), dtype=torch.bool)
        change_U = look_up(self.table_N, mask_U[None]) - look_up(self.table_N, flipped)
        return Gates(change_U * (2.0 * mask_U - 1), mask_U, num_images=1)


@cache
def population() -> Tensor:
    """(3, 2^U): the batches that there are, equally likely. Much in common, so that there is a signal.

    The losses are small, so that the second order of `Taylor` does not outweigh the first.
    """
    return 0.01 * (random_table(3, seed=0) + 0.3 * torch.stack([random_table(3, seed=i) for i in (10, 20, 30)]))


def toy_batches(count: int, seed: int) -> list[ToyBatch]:
    choice = torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))
    return [ToyBatch(population()[i]) for i in choice.tolist()]


def measure_toy(
    names, num_batches: int, num_masks: int, seed: int, warm_up: int = 0
) -> tuple[dict[str, dict[str, Figure]], dict[str, Estimator]]:
    estimators = {name: CLASSES[name](TOY_SCORES, ALPHA) for name in names}
    gauge.warm_up_(estimators.values(), toy_batches(warm_up, 2 * seed + 1), TOY_SCORES, seed)
    figures, cost = gauge.measure(toy_batches(num_batches, 2 * seed), estimators, TOY_SCORES, num_masks, seed)
    assert cost == 2.0
    return figures, estimators


def exact_figures(estimator: Estimator) -> dict[str, float]:
    """All figures by enumeration of batches and masks, but for the relative variance."""
    draws = [
        enumerated(lambda m, losses: estimator.gradient(TOY_SCORES, m, losses), TOY_SCORES, table_N)
        for table_N in population()
    ]
    weight_D, g_TDU = draws[0][0], torch.stack([g_DU for _, g_DU in draws])
    mean_TU = torch.einsum("d,tdu->tu", weight_D, g_TDU)
    square_T = torch.einsum("d,tdu->t", weight_D, g_TDU**2)
    mean_U = mean_TU.mean(0)
    signal, square = (mean_U @ mean_U).item(), square_T.mean().item()
    truth_U = (TOY_SCORES * (1 - TOY_SCORES)) ** ALPHA * true_gradient(TOY_SCORES, population().mean(0))
    norms_TD = g_TDU.norm(dim=2)
    cosines_TD = (g_TDU @ truth_U) / truth_U.norm() / norms_TD.where(norms_TD > 0, 1.0)
    cosine, cosine_square = ((weight_D @ moment.T).mean().item() for moment in (cosines_TD, cosines_TD**2))
    return {
        "variance": square - signal,
        "mask_share": (square_T - (mean_TU**2).sum(1)).mean().item() / (square - signal or 1.0),
        "bias": ((mean_U - truth_U) ** 2).sum().item() / (truth_U @ truth_U).item(),
        "share_of_signal": signal / square,
        "cosine": cosine,
        "cosine_sd": max(0.0, cosine_square - cosine**2) ** 0.5,
    }


def test_every_figure_is_the_enumerated_one_within_its_own_error():
    names = ["vrpge", "reinforce", "linear_cv_gates"]
    measured, estimators = measure_toy(names, num_batches=120, num_masks=24, seed=1, warm_up=150)
    plain = exact_figures(estimators["vrpge"])["variance"]
    deviations = []
    for name, figures in measured.items():
        exact = exact_figures(estimators[name])
        exact["relative_variance"] = exact["variance"] / plain
        assert set(figures) == set(FIGURES) == set(exact)
        for what, figure in figures.items():
            if name == "vrpge" and what == "relative_variance":
                assert figure == (1.0, 0.0)
            elif what == "bias":  # there is none, and around 0 it is far from normal
                assert exact[what] < 1e-20
                assert figure.value < 3 * figure.error < 0.3, name
            else:
                assert abs(figure.value - exact[what]) < 4 * figure.error, (name, what)
                deviations.append((figure.value - exact[what]) / figure.error)
        for what in ("variance", "mask_share", "share_of_signal", "cosine", "cosine_sd"):
            assert figures[what].error < 0.2 * exact[what], (name, what)  # so that it could fail
    assert 0.5 < torch.tensor(deviations).square().mean().sqrt() < 1.5  # errors are neither boasted nor padded
    assert 0.3 < estimators["linear_cv_gates"].scale < 1  # so it had something to say


def test_an_estimate_that_reads_no_masks_has_no_variance_and_its_bias_is_seen():
    measured, estimators = measure_toy(["vrpge", "taylor"], num_batches=100, num_masks=40, seed=3, warm_up=150)
    figures, exact = measured["taylor"], exact_figures(estimators["taylor"])
    assert figures["variance"] == figures["relative_variance"] == (0.0, 0.0)
    assert math.isnan(figures["mask_share"].value)
    assert figures["share_of_signal"].value == pytest.approx(1)
    assert abs(figures["bias"].value - exact["bias"]) < 3 * figures["bias"].error < 0.6 * exact["bias"]
    assert abs(figures["cosine"].value - exact["cosine"]) < 4 * figures["cosine"].error < 0.25


def test_figures_of_one_estimator_do_not_depend_on_which_others_are_asked_for():
    every, _ = measure_toy(list(CLASSES), num_batches=5, num_masks=4, seed=2, warm_up=60)
    for name in CLASSES:
        alone, _ = measure_toy(dict.fromkeys(["vrpge", name]), num_batches=5, num_masks=4, seed=2, warm_up=60)
        assert repr(alone[name]) == repr(every[name])  # not a number is the same as itself here
    other, _ = measure_toy(["vrpge"], num_batches=5, num_masks=4, seed=3)
    assert other["vrpge"]["variance"] != every["vrpge"]["variance"]


def test_masks_are_run_once_and_shared_and_the_warm_up_only_for_those_that_learn():
    runs = []

    class Counting(ToyBatch):
        def run(self, masks_KU):
            runs.append("run")
            return super().run(masks_KU)

        def gates(self, mask_U):
            runs.append("gates")
            return super().gates(mask_U)

    estimators = {name: CLASSES[name](TOY_SCORES, ALPHA) for name in CLASSES}
    gauge.measure([Counting(population()[0])] * 5, estimators, TOY_SCORES, 6, seed=0)
    assert runs == ["run"] * 5 * 3
    gauge.warm_up_([estimators["reinforce"]], [Counting(population()[0])] * 3, TOY_SCORES, seed=0)
    assert len(runs) == 5 * 3
    gauge.warm_up_(estimators.values(), [Counting(population()[0])] * 3, TOY_SCORES, seed=0)
    assert runs[5 * 3 :] == ["run", "gates"] * 3


def test_jackknife_of_a_mean_is_the_usual_standard_error():
    values = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, error = jackknife(lambda kept: {"mean": float(values[kept].mean())}, 30)["mean"]
    assert mean == pytest.approx(values.mean().item())
    assert error == pytest.approx(values.std().item() / 30**0.5)


def test_a_loss_that_is_not_finite_is_refused():
    batches = [ToyBatch(population()[0] * torch.inf)] * 4
    with pytest.raises(FloatingPointError, match="not finite"):
        gauge.measure(batches, {"vrpge": VRPGEEstimator(TOY_SCORES)}, TOY_SCORES, num_masks=4, seed=0)


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
    "arch": "resnet20_he",
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
    if run.network.num_units and name.startswith("decided"):
        run.network.scores.data.fill_(0.0)
    run.phase, run.epoch = phase, 3
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder / "checkpoints" / name, run.state_dict(settings, fingerprint or data.fingerprint))
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
            assert set(figures) == set(FIGURES)
            assert (figures["variance"]["value"] > 0) == (name != "taylor")
    assert written["checkpoints"][0]["estimators"] == written["checkpoints"][1]["estimators"]  # equal networks

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
        ({"fingerprint": "other"}, "point --data at the same files"),
    ],
)
def test_runs_that_cannot_be_measured_are_refused(changes, part, tmp_path, capsys):
    save_checkpoint(tmp_path, "last.pt", **changes)
    assert gauge.main([str(tmp_path), *SMALL]) == 2
    check_error(capsys, part)
