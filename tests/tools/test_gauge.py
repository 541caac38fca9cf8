"""The gauge: its figures against exact enumeration, its passes against the masked reference, and the program; and
training with each of the estimators.

`python -m tests.tools.test_gauge` prints the exact variances of toys that docs/estimators.md shows.
"""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trainers.retirement import retire
from utils.algorithm.estimator import vrpge_gradient

import args
from args import config_from_dict, parse_args
from tests.algorithm.test_estimator import all_masks, random_table, true_gradient
from tests.algorithm.test_estimators import (
    EFFECTS,
    SCORES,
    UNBIASED,
    baseline_of,
    draws,
    interaction_table,
    linear_memory,
    linear_table,
    look_up,
    losses_of,
    pairwise_table,
    probabilities,
    variance,
    vector,
)
from tests.toy import PlainNet, batch, config, one_thread, plain_net, sparse_network  # noqa: F401
from tools import gauge
from tools.gauge_figures import Measured, jackknife, measure
from tools.gauge_passes import NetworkBatch, kind_of
from trainers.default import StepSettings, draw_masks, how_to_draw, train_step
from trainers.methods import method_of
from trainers.session import load_data
from trainers.state import RunState, new_run
from utils.algorithm.estimators import ESTIMATORS, BaselineMemory, Estimator, GateMemory, Gates, LinearMemory
from utils.algorithm.masks import sample_masks
from utils.errors import UserError
from utils.run import checkpoint

ALPHA = 0.5
NUM_PARTS = 2
TOY_SCORES = vector(0.3, 0.5, 0.8)
FIGURES = (
    *("variance", "mask_variance", "batch_variance", "relative_variance", "squared_bias"),
    *("share_of_signal", "cosine", "cosine_sd"),
)


# ---- the figures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyBatch:
    """Losses from a table for each part of the batch: (P, 2^U)."""

    tables: Tensor

    def run(self, masks_KU: Tensor, in_parts: bool) -> tuple[Tensor, float]:
        if in_parts:
            return losses_of("subbatch", self.tables, masks_KU), 2.0
        return look_up(self.tables.mean(dim=0), masks_KU), 2.0

    def gates(self, mask_U: Tensor) -> Gates:
        """Slopes of the function that is linear in every unit and has the table's values at the corners."""
        flipped = mask_U ^ torch.eye(len(mask_U), dtype=torch.bool)
        losses, table = look_up(self.tables.mean(dim=0), flipped), look_up(self.tables.mean(dim=0), mask_U[None])
        return Gates((table - losses) * (2.0 * mask_U - 1), mask_U, num_images=1)


@cache
def population() -> Tensor:
    """(3, P, 2^U): the batches that there are, equally likely. Much in common, so that there is a signal."""
    shared = random_table(3, seed=0)[1]
    own = [torch.stack([random_table(3, seed=10 * i + p)[1] for p in range(NUM_PARTS)]) for i in (1, 2, 3)]
    return torch.stack([shared + 0.3 * tables for tables in own])


def toy_batches(count: int, seed: int) -> list[ToyBatch]:
    choice = torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))
    return [ToyBatch(population()[i]) for i in choice.tolist()]


def measure_toy(names, num_batches: int, num_masks: int, seed: int, warm_up: int = 0) -> Measured:
    return measure(
        toy_batches(num_batches, 2 * seed),
        toy_batches(warm_up, 2 * seed + 1),
        TOY_SCORES,
        names,
        alpha=ALPHA,
        num_masks=num_masks,
        num_parts=NUM_PARTS,
        seed=seed,
    )


def exact_gradient() -> Tensor:
    return (TOY_SCORES * (1 - TOY_SCORES)) ** ALPHA * true_gradient(TOY_SCORES, population().mean((0, 1)))


def exact_figures(name: str, memory) -> dict[str, float]:
    """All figures by enumeration of batches and masks."""
    in_parts = name == "subbatch"
    weight_D, masks_DKU = draws(name, TOY_SCORES, 1 + NUM_PARTS if in_parts else 2)

    def estimates(tables: Tensor) -> Tensor:
        table = tables if in_parts else tables.mean(0)
        gradient = ESTIMATORS[name].gradient
        return torch.vmap(lambda m: gradient(TOY_SCORES, m, losses_of(name, table, m), ALPHA, memory))(masks_DKU)

    g_TDU = torch.stack([estimates(tables) for tables in population()])
    mean_TU = torch.einsum("d,tdu->tu", weight_D, g_TDU)
    square_T = torch.einsum("d,tdu->t", weight_D, g_TDU**2)
    mean_U = mean_TU.mean(0)
    signal, square = (mean_U @ mean_U).item(), square_T.mean().item()
    mask_variance = (square_T - (mean_TU**2).sum(1)).mean().item()
    truth_U = exact_gradient()
    norms_TD = g_TDU.norm(dim=2)
    cosines_TD = (g_TDU @ truth_U) / truth_U.norm() / norms_TD.where(norms_TD > 0, 1.0)
    cosine, cosine_square = ((weight_D @ moment.T).mean().item() for moment in (cosines_TD, cosines_TD**2))
    return {
        "variance": square - signal,
        "mask_variance": mask_variance,
        "batch_variance": square - signal - mask_variance,
        "squared_bias": ((mean_U - truth_U) ** 2).sum().item(),
        "share_of_signal": signal / square,
        "cosine": cosine,
        "cosine_sd": (cosine_square - cosine**2) ** 0.5,
    }


def test_every_figure_is_the_enumerated_one_within_its_own_error():
    names = [name for name in UNBIASED if name != "linear_cv_gates"]  # the function of linear_cv, taught by networks
    measured = measure_toy(names, num_batches=120, num_masks=24, seed=1, warm_up=150)
    assert list(measured.estimators) == names
    plain = exact_figures("vrpge", None)["variance"]
    deviations = []
    for name, figures in measured.estimators.items():
        exact = exact_figures(name, measured.memories.get(name))
        exact["relative_variance"] = exact["variance"] / plain
        assert set(figures) == set(FIGURES) == set(exact)
        for what, figure in figures.items():
            if name == "vrpge" and what == "relative_variance":
                assert figure == (1.0, 0.0)
                continue
            if what == "squared_bias":  # there is none, and around 0 it is far from normal
                assert exact[what] < 1e-20
                assert figure.value < 3 * figure.error < 0.1 * measured.reference["squared_norm"].value, name
                continue
            assert abs(figure.value - exact[what]) < 4 * figure.error, (name, what)
            deviations.append((figure.value - exact[what]) / figure.error)
        for what in ("variance", "mask_variance", "share_of_signal", "cosine", "cosine_sd"):
            assert figures[what].error < 0.2 * exact[what], (name, what)  # so that it could fail
    assert 0.5 < torch.tensor(deviations).square().mean().sqrt() < 1.5  # errors are neither boasted nor padded
    for name, memory in measured.memories.items():
        assert any((value != 0).any() for value in vars(memory).values()), name


def test_the_reference_is_as_far_from_the_gradient_as_it_says():
    squared_errors, told = [], []
    for seed in range(40):
        measured = measure_toy(["vrpge"], num_batches=8, num_masks=8, seed=seed)
        squared_errors.append(((measured.reference_U - exact_gradient()) ** 2).sum().item())
        told.append(measured.reference["squared_error"].value)
    assert sum(told) / 40 < 0.2 * (exact_gradient() ** 2).sum()
    assert 0.7 < sum(squared_errors) / sum(told) < 1.4


def test_a_bias_is_seen(monkeypatch):
    def too_long(scores_U, masks_KU, losses_K, alpha, _):
        return 1.5 * vrpge_gradient(scores_U, masks_KU, losses_K, alpha)

    monkeypatch.setitem(ESTIMATORS, "too_long", Estimator(sample_masks, too_long))
    figures = measure_toy(["too_long"], num_batches=100, num_masks=40, seed=3).estimators["too_long"]
    expected = 0.25 * (exact_gradient() ** 2).sum().item()
    value, error = figures["squared_bias"]
    assert abs(value - expected) < 3 * error < 0.6 * expected
    assert figures["relative_variance"].value == pytest.approx(1.5**2, rel=1e-9)


def test_figures_of_one_estimator_do_not_depend_on_which_others_are_asked_for():
    every = measure_toy(list(ESTIMATORS), num_batches=5, num_masks=4, seed=2, warm_up=60).estimators
    for name in ("vrpge", "linear_cv_disarm", "subbatch"):
        alone = measure_toy([name], num_batches=5, num_masks=4, seed=2, warm_up=60).estimators
        assert list(alone) == list(dict.fromkeys(["vrpge", name]))
        assert repr(alone[name]) == repr(every[name])  # not a number is the same as itself here
    other = measure_toy(["vrpge"], num_batches=5, num_masks=4, seed=3).estimators["vrpge"]
    assert other["variance"] != every["vrpge"]["variance"]


def test_masks_of_a_kind_are_run_once_and_shared():
    runs = {True: 0, False: 0}

    class Counting(ToyBatch):
        def run(self, masks_KU, in_parts):
            runs[in_parts] += 1
            return super().run(masks_KU, in_parts)

    batches, warm_up = ([Counting(population()[0])] * count for count in (5, 3))
    arguments = {"alpha": ALPHA, "num_masks": 6, "num_parts": NUM_PARTS, "seed": 0}
    measure(batches, warm_up, TOY_SCORES, ["reinforce", "shrinkage", "linear_cv"], **arguments)
    assert runs == {True: 0, False: 3 + 5 * 3}
    measure(batches, warm_up, TOY_SCORES, list(ESTIMATORS), **arguments)
    assert runs == {True: 5 * 3, False: 3 + 5 * 3 + 2 * (3 + 5 * 3)}


def test_jackknife_of_a_mean_is_the_usual_standard_error():
    values = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, error = jackknife(lambda kept: {"mean": float(values[kept].mean())}, 30)["mean"]
    assert mean == pytest.approx(values.mean().item())
    assert error == pytest.approx(values.std().item() / 30**0.5)


def test_a_loss_that_is_not_finite_is_refused():
    batches = [ToyBatch(population()[0] * torch.inf)] * 4
    with pytest.raises(FloatingPointError, match="not finite"):
        measure(batches, [], TOY_SCORES, [], alpha=ALPHA, num_masks=4, num_parts=2, seed=0)


# ---- the passes ----------------------------------------------------------------------------------------------------


def test_passes_are_those_of_the_masked_reference_and_leave_no_trace():
    net, layers = plain_net("plain"), list(PlainNet.LAYERS)
    compact, masked = (sparse_network(net, layers, execution) for execution in ("compact", "masked"))
    images, labels = batch(6)
    state = {name: value.clone() for name, value in compact.model.state_dict().items()}
    random_state = torch.get_rng_state()
    masks_KU = sample_masks(compact.scores.detach(), torch.Generator().manual_seed(4), 3)
    losses_K, cost = NetworkBatch(compact, images, labels, config()).run(masks_KU, in_parts=False)
    pairs, cost_in_parts = NetworkBatch(compact, images, labels, config()).run(masks_KU, in_parts=True)

    plans = [masked.plan(mask_U) for mask_U in masks_KU.numpy()]
    logits = [masked(images, plan, False) for plan in plans]
    expected_K = torch.stack([F.cross_entropy(answers, labels) for answers in logits])
    torch.testing.assert_close(losses_K, expected_K.detach(), rtol=1e-9, atol=1e-9)
    for part, (own, other) in enumerate(pairs):
        half = slice(3 * part, 3 * part + 3)
        extra = masked(images[half], plans[1 + part], False)
        assert own.item() == pytest.approx(F.cross_entropy(logits[0][half], labels[half]).item(), rel=1e-9)
        assert other.item() == pytest.approx(F.cross_entropy(extra, labels[half]).item(), rel=1e-9)
    shares = [masked.subnet_macs(plan) / masked.dense_macs for plan in plans]
    assert cost == pytest.approx(sum(shares))
    assert cost_in_parts == pytest.approx(shares[0] + (shares[1] + shares[2]) / 2)
    assert not losses_K.requires_grad
    assert not pairs.requires_grad
    assert checkpoint.differences(state, dict(compact.model.state_dict())) == []
    assert torch.equal(random_state, torch.get_rng_state())


# ---- the program ---------------------------------------------------------------------------------------------------

OPTIONS = {
    "arch": "resnet20_he",
    "width_mult": 0.125,
    "batch_size": 16,
    "keep_ratio": 0.5,
    "device": "cpu",
    "precision": "bf16",
    "multigpu": None,
}


def save_checkpoint(folder: Path, name: str, phase: str = "search", fingerprint: str | None = None, **changes) -> Path:
    """A checkpoint of a run as main.py writes it, after one that never trained."""
    settings = config_from_dict({**OPTIONS, **changes}, "test")
    device = torch.device("cpu")
    data = load_data(settings, device)
    run = new_run(settings, data, device)
    if run.network.num_units:
        decided = 0.0 if name.startswith("decided") else 0.5
        run.network.scores.data.mul_(2 * decided)
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


SMALL = ("--batches", "4", "--masks", "4", "--warm-up", "2")


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
        for name, figures in entry["estimators"].items():
            assert set(figures) == {*FIGURES, "cost"}
            assert figures["variance"]["value"] > 0 or name == "taylor"
            assert 0.2 < figures["cost"] < 1
        assert entry["estimators"]["taylor"]["variance"]["value"] == 0
    assert written["checkpoints"][0]["estimators"] == written["checkpoints"][1]["estimators"]  # equal networks

    picture = ElementTree.parse(finished_run / "gauge" / "gauge.svg").getroot()
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("disarm") == texts.count("epoch_9.pt") + texts.count("epoch_10.pt") == 2
    text = (finished_run / "gauge" / "gauge.md").read_text()
    assert "## epoch_10.pt (3 epochs)" in text
    assert all(line in said for line in text.splitlines() if line.startswith("| "))

    torch.rand(3)  # a global generator elsewhere
    some = ("--checkpoint", "epoch_9.pt", "--estimators", "disarm", "--out", str(tmp_path / "other"))
    assert gauge.main([str(finished_run), *SMALL, *some]) == 0
    again = json.loads((tmp_path / "other" / "gauge.json").read_text())
    first, second = (content["checkpoints"][0]["estimators"] for content in (written, again))
    assert second == {name: first[name] for name in ("vrpge", "disarm")}


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
        ("RUN --estimators vrpge disram", "there is no estimator 'disram'; did you mean 'disarm'?"),
        ("RUN --masks 7", "masks must be even"),
        ("RUN --batches 2", "batches must be in [4, 100000]"),
        ("RUN --batches many", "batches must be a whole number"),
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


# ---- training with an estimator -------------------------------------------------------------------------------------


@cache
def tiny_data():
    return load_data(config_from_dict(OPTIONS, "test"), torch.device("cpu"))


def training_run(**options) -> tuple[RunState, args.Config]:
    settings = config_from_dict({**OPTIONS, "precision": "fp32", "clip_norm": 1e9, **options}, "test")
    return new_run(settings, tiny_data(), torch.device("cpu")), settings


def options_of(name: str) -> dict[str, object]:
    return {"subbatch": 2} if name == "subbatch" else {"estimator": name}


def take_steps(run: RunState, settings: args.Config, first: int, count: int) -> None:
    batches = islice(tiny_data().train.train_batches(16, 0, 0), first, first + count)
    for images, labels in batches:
        method_of(settings).step(run, images, labels, StepSettings(0.05, 0.02, kept_fraction=0.5), settings)


def test_the_options_name_the_estimators_that_there_are():
    assert list(args.ESTIMATORS) == list(ESTIMATORS)
    assert set(args.PAIR_ESTIMATORS) == {name for name, estimator in ESTIMATORS.items() if estimator.most == 2}
    assert set(args.GATE_ESTIMATORS) == {name for name, estimator in ESTIMATORS.items() if estimator.reads_gates}
    assert set(args.LEARNING_ESTIMATORS) == {name for name, estimator in ESTIMATORS.items() if estimator.start}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_step_makes_the_estimate_from_earlier_steps_and_then_learns(name):
    run, settings = training_run(**options_of(name))
    search, estimator = run.search, ESTIMATORS[name]
    assert type(search.memory) is (type(None) if estimator.start is None else type(estimator.start(torch.ones(2))))
    if name == "shrinkage":
        search.memory = BaselineMemory(torch.tensor(1000), *map(torch.tensor, (2.0, 0.03, 0.02)))
    elif search.memory is not None:
        effects_U, fit = torch.linspace(-1, 1, run.network.num_units), (torch.tensor(0.6), torch.tensor(1.0))
        search.memory = LinearMemory(effects_U, *fit)
        if estimator.reads_gates:
            search.memory = GateMemory(torch.full_like(effects_U, 9), effects_U, effects_U**2, *fit)
    memory, masks_KU = search.memory, search.draw.masks_KU
    scores_U = search.network.scores.detach().clone()
    images, labels = next(tiny_data().train.train_batches(16, 0, 1))
    still = NetworkBatch(copy.deepcopy(search.network), images, labels, settings)
    losses, _ = still.run(masks_KU, in_parts=name == "subbatch")
    expected = estimator.gradient(scores_U, masks_KU, losses, settings.sparsity.alpha, memory)
    train_step(search, images, labels, StepSettings(0.05, 0.02, kept_fraction=0.5), settings)
    torch.testing.assert_close(search.network.scores.grad, expected, rtol=1e-3, atol=1e-5)
    assert expected.abs().max() > 1e-3
    if memory is not None:
        gates = still.gates(masks_KU[0]) if estimator.reads_gates else None
        learnt = estimator.update(memory, masks_KU, losses, gates)
        for key, value in vars(learnt).items():
            torch.testing.assert_close(getattr(search.memory, key), value, rtol=1e-3, atol=1e-5)
        for other in (learnt, estimator.start(scores_U)):
            wrong = estimator.gradient(scores_U, masks_KU, losses, settings.sparsity.alpha, other)
            assert not torch.allclose(wrong, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("jointly", [False, True])
def test_gates_are_read_before_gradients_are_clipped(jointly):
    memories = []
    for clip_norm in (1e9, 1e-6):
        run, settings = training_run(estimator="taylor", clip_norm=clip_norm, clip_jointly=jointly)
        take_steps(run, settings, first=0, count=1)
        memories.append(run.search.memory.slope_U)
    assert memories[0].abs().max() > 1e-4
    assert torch.equal(*memories)


@pytest.mark.parametrize("name", ["linear_cv_gates", "taylor"])
def test_gates_go_on_when_units_retire(name):
    """The same with retired units as with all of them: their gates would never be seen again."""
    runs = [training_run(estimator=name) for _ in range(2)]
    for (run, settings), retires in zip(runs, (False, True), strict=True):
        run.network.scores.data[::4] = 0
        run.search.draw = draw_masks(run.network, run.search.generator, *how_to_draw(settings.sparsity))
        if retires:
            assert retire(run.search) > 0
        take_steps(run, settings, first=0, count=4)
    (whole, _), (cut, _) = runs
    assert not cut.network.stored_units.all()
    for one, other in zip(vars(whole.search.memory).values(), vars(cut.search.memory).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(whole.network.scores, cut.network.scores, rtol=1e-2, atol=1e-3)


def test_taylor_is_refused_where_it_cannot_see():
    with pytest.raises(UserError, match=r"taylor cannot judge \d+ of \d+ units of wrn16_8: no batch-norm of their own"):
        training_run(estimator="taylor", arch="wrn16_8", width_mult=0.125)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_masks_of_every_step_are_those_of_the_estimator(name):
    run, settings = training_run(**options_of(name), optimizer="sgd")
    for step in range(3):
        source = run.search.generator.clone_state()
        take_steps(run, settings, first=step, count=1)
        count = {"subbatch": 3, "taylor": 1}.get(name, 2)
        expected = ESTIMATORS[name].sample(run.network.scores.detach(), source, count)
        assert torch.equal(run.search.draw.masks_KU, expected)


@pytest.mark.parametrize("name", ["shrinkage", "linear_cv", "linear_cv_gates", "linear_cv_disarm", "taylor"])
def test_an_estimator_that_learns_resumes_bit_equal(name, tmp_path):
    whole, settings = training_run(estimator=name)
    take_steps(whole, settings, first=0, count=5)
    parts, _ = training_run(estimator=name)
    take_steps(parts, settings, first=0, count=3)
    checkpoint.save(tmp_path / "last.pt", parts.state_dict(settings, "images"))
    stored = checkpoint.load(tmp_path / "last.pt")
    resumed, _ = training_run(estimator=name)
    resumed.load_state_dict(stored, settings)
    take_steps(resumed, settings, first=3, count=2)
    ends = [run.state_dict(settings, "images") for run in (whole, resumed)]
    assert checkpoint.differences(*ends) == []
    assert any(key.startswith("search.memory.") for key in checkpoint.differences(stored, ends[1]))
    assert any(key.endswith("of the estimator") for key in whole.replicated())


def test_parts_are_an_estimator_by_either_name_and_the_nearest_word_counts(tmp_path):
    def estimator(*words: str) -> tuple[str, int]:
        sparsity = parse_args(words).config.sparsity
        return sparsity.estimator, sparsity.subbatch

    assert estimator() == ("vrpge", 0)
    assert estimator("--subbatch", "3") == estimator("--estimator", "subbatch", "--subbatch", "3") == ("subbatch", 3)
    file = tmp_path / "disarm.yaml"
    file.write_text("estimator: disarm\n")
    assert estimator("--config", str(file), "--subbatch", "3") == ("subbatch", 3)
    file.write_text("subbatch: 4\n")
    assert estimator("--config", str(file)) == ("subbatch", 4)
    assert estimator("--config", str(file), "--estimator", "disarm", "--subbatch", "0") == ("disarm", 0)
    settings = parse_args(["--config", str(file)]).config
    assert config_from_dict(args.config_to_dict(settings), "checkpoint") == settings


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--estimator subbatch", "estimator subbatch (command line) and subbatch 0 (default) contradict each other"),
        ("--estimator vrpge --subbatch 2", "estimator vrpge (command line) and subbatch 2 (command line) contradict"),
        ("--estimator disarm --K 4", "draws masks in pairs, so it needs K 2, got K 4 (command line); leave K out"),
        ("--estimator linear_cv --rank-masks independent", "got rank_masks independent (command line); leave one"),
        ("--estimator disram", "did you mean 'disarm'?"),
        ("--method gumbel --estimator disarm", "--estimator (command line) has no effect: method is gumbel"),
        ("--method dense --subbatch 2", "--subbatch (command line) has no effect: conv_type is DenseConv"),
    ],
)
def test_estimators_that_contradict_other_options_are_refused(words, part):
    with pytest.raises(UserError) as error:
        parse_args(words.split())
    assert part in str(error.value)


# ---- the toys of docs/estimators.md --------------------------------------------------------------------------------


def toys() -> dict[str, tuple[Tensor, Tensor]]:
    """Scores and losses; 2.3, as of ten classes by chance, stands for all that masks do not change."""
    half = torch.full((4,), 0.5, dtype=torch.float64)
    decided = vector(0.97, 0.5)
    rare = vector(0.02, 0.5, 0.5, 0.5)
    tables = {
        "linear, all scores 1/2": (half, linear_table(EFFECTS)),
        "linear": (SCORES, linear_table(EFFECTS)),
        "pairwise, all scores 1/2": (half, pairwise_table(half, 0)),
        "pairwise": (SCORES, pairwise_table(SCORES, 0)),
        "mixed": (SCORES, linear_table(EFFECTS) + 0.5 * pairwise_table(SCORES, 0)),
        "three units that only act together": (rare, interaction_table(rare, 1, 2, 3)),
        "a strong interaction": (
            decided,
            linear_table(vector(0.0, 1.0)) + 1 / 0.47 * interaction_table(decided, 0, 1),
        ),
    }
    return {name: (scores_U, 2.3 + table_N) for name, (scores_U, table_N) in tables.items()}


def toy_table() -> str:
    """Exact variances, summed over units; batches shift all losses by one standard deviation of the mask noise."""
    others = [name for name in UNBIASED if name not in ("vrpge", "linear_cv_gates")]  # the last learns otherwise only
    lines = [f"| toy | vrpge | {' | '.join(others)} |", "| - | - |" + " - |" * len(others)]
    for toy, (scores_U, table_N) in toys().items():
        mean = probabilities(scores_U, all_masks(len(scores_U))) @ table_N
        sigma = (probabilities(scores_U, all_masks(len(scores_U))) @ (table_N - mean) ** 2).sqrt().item()
        known = linear_memory(true_gradient(scores_U, table_N))
        memories = {
            "shrinkage": baseline_of(scores_U, table_N, sigma),
            "linear_cv": known,
            "linear_cv_disarm": known,
        }

        def total(name, scores_U=scores_U, table_N=table_N, memories=memories, sigma=sigma) -> float:
            options = {"num_masks": 1 + NUM_PARTS} if name == "subbatch" else {}
            noise = (-sigma, sigma)
            return variance(name, scores_U, table_N, memories.get(name), batch_noise=noise, **options).sum().item()

        plain = total("vrpge")
        ratios = [f"{total(name) / plain:.2f}" for name in others]
        lines.append(f"| {toy} | {plain:.3f} | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


@pytest.mark.parametrize("s", [0.5, 0.2])
def test_a_running_mean_of_estimates_diverges_from_the_rate_that_the_page_names(s):
    """Expected squared error of the mean after a step, to that before, for a linear loss without any noise."""
    scores_U, before_U = torch.full((3,), s, dtype=torch.float64), vector(1.0, -2.0, 0.5)
    probability_N, masks_N2U = draws("vrpge", scores_U)
    zero_2 = torch.zeros(2, dtype=torch.float64)  # the truth is 0, so the mean is its own error
    memory = linear_memory(before_U)
    scale = (s * (1 - s)) ** ALPHA

    def growth(rate: float) -> float:
        gradient = ESTIMATORS["linear_cv"].gradient
        estimates_NU = torch.stack([gradient(scores_U, m, zero_2, ALPHA, memory) / scale for m in masks_N2U])
        after_NU = torch.lerp(before_U.expand_as(estimates_NU), estimates_NU, rate)
        return (probability_N @ (after_NU**2).sum(1) / (before_U @ before_U)).item()

    limit = 2 / (3 - 1 + 1 / (2 * s * (1 - s)))
    assert growth(limit) == pytest.approx(1, abs=1e-12)
    assert growth(0.99 * limit) < 1 < growth(1.01 * limit)
    assert s != 0.5 or limit == pytest.approx(2 / (3 + 1))


def test_the_page_on_estimators_shows_these_numbers():
    page = (Path(__file__).parents[2] / "docs" / "estimators.md").read_text()
    assert toy_table() in page
    assert all(f"`{name}`" in page for name in ESTIMATORS)


def test_every_kind_of_masks_has_its_estimators():
    kinds = {kind: [name for name in ESTIMATORS if kind_of(name) == kind] for kind in map(kind_of, ESTIMATORS)}
    assert kinds == {
        "independent": ["vrpge", "reinforce", "shrinkage", "linear_cv", "linear_cv_gates", "taylor"],
        "antithetic": ["disarm", "linear_cv_disarm"],
        "parts": ["subbatch"],
    }


if __name__ == "__main__":
    print(toy_table())
