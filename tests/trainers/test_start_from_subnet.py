"""`--pretrained` with the subnet of another run: the same function, and units that are gone stay gone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from args import Config, config_from_dict
from data import DataSplits
from main import main
from tests.tiny import STEPS, TINY, Run, kept_mask, make_images, run
from trainers.build import make_network, new_run, restore_model, with_layout_of_start
from trainers.methods import make_method
from trainers.session import load_data
from trainers.state import RunState
from utils.channels.network import SparseNetwork
from utils.channels.subnet import Subnet, installed
from utils.errors import UserError
from utils.run.checkpoint import differences

CPU = torch.device("cpu")
SHORT = {"epochs": 1, "finetune_epochs": 1}
SOURCES = {  # units of the first have left after its choice only, those of the others before the first step
    "vrpge": {"residual_masks": "tied", "finetune": "off"},
    "fine-tuned": {"method": "l1", "finetune_lr": 0.05, "score_lr": 0.05},
    "thin": {"method": "thin"},
    "random": {"method": "random", "seed": 3},
}
FROM_SUBNET = ["dense", "vrpge", "coin", "l1", "sfp", "slimming", "taylor_cut"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def sources(images, tmp_path_factory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("sources")
    return {name: run(root, images, name=name, **{**SHORT, **options}) for name, options in SOURCES.items()}


@pytest.fixture(scope="module")
def data(images) -> DataSplits:
    return load_data(config_of(images), CPU)


def config_of(images: Path, source: Run | None = None, **options: object) -> Config:
    given = {} if source is None else {"pretrained": str(source.folder), "keep_ratio": 0.2}
    if source is not None:
        given["residual_masks"] = source.load("best.pt")["config"]["residual_masks"]
    return config_from_dict({**TINY, "data": str(images), **given, **options}, "test")


def started(images: Path, data: DataSplits, source: Run, **options: object) -> RunState:
    config = with_layout_of_start(config_of(images, source, **options))
    return new_run(config, data, CPU)


def logits_of(network: SparseNetwork, mask_U: np.ndarray) -> torch.Tensor:
    network.model.eval()
    with torch.no_grad():
        return network(torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)), network.plan(mask_U))


def logits_of_result(images: Path, data: DataSplits, source: Run) -> torch.Tensor:
    """Of the subnet in best.pt, as its evaluation runs it."""
    best = source.load("best.pt")
    network = make_network(config_from_dict(best["config"], "test"), data, CPU, best)
    restore_model(network, best)
    with installed(network, Subnet.from_state_dict(best["subnet"], CPU)):
        return logits_of(network, kept_mask(best))


@pytest.mark.parametrize("name", SOURCES)
def test_a_run_starts_with_exactly_the_function_of_the_subnet(images, data, sources, name):
    """Of the masks, weights and batch-norm statistics, and nothing else of the source is in the network."""
    expected, mask_U = logits_of_result(images, data, sources[name]), kept_mask(sources[name].load("best.pt"))
    for method in FROM_SUBNET:
        new = started(images, data, sources[name], method=method)
        assert torch.equal(logits_of(new.network, new.plan.mask_U), expected), method
        assert np.array_equal(new.plan.mask_U, mask_U)
        assert np.array_equal(new.network.stored_units, mask_U)
        assert new.start_share == mask_U.mean()
        if method in ("vrpge", "coin"):
            scores_U = new.network.scores.detach()
            assert (scores_U[~torch.from_numpy(mask_U)] == 0).all()
            assert float(scores_U.sum()) == pytest.approx(0.2 * len(mask_U), rel=1e-5)
            assert scores_U.max() == scores_U[torch.from_numpy(mask_U)].min()


def test_the_file_of_the_result_means_the_same_as_the_run(images, data, sources):
    file = str(sources["thin"].folder / "checkpoints/best.pt")
    one, other = (started(images, data, sources["thin"], **path) for path in ({}, {"pretrained": file}))
    assert differences(dict(one.network.model.state_dict()), dict(other.network.model.state_dict())) == []


@pytest.mark.parametrize("unit", ["params", "flops"])
def test_first_scores_of_the_rest_meet_other_budgets_too(images, data, sources, unit):
    new = started(images, data, sources["random"], budget=unit)
    cost, scores_U = new.network.expected_cost(unit), new.network.scores.detach().double().numpy()
    assert cost(scores_U) == pytest.approx(0.2 * cost.dense, rel=1e-5)
    assert (scores_U[~new.network.stored_units] == 0).all()
    assert new.start_share == cost(new.network.stored_units) / cost.dense


def test_where_all_scores_of_a_layer_are_0_a_unit_that_exists_keeps_the_path_open(images, data, sources):
    """The units that left may be the first of their layers."""
    new = started(images, data, sources["random"])
    firsts = [group[0] for group in new.network.graph.vital_groups]
    assert not new.network.stored_units[firsts].all()
    new.network.scores.data.zero_()
    nothing_U = np.zeros(new.network.num_units, dtype=bool)
    assert logits_of(new.network, nothing_U).isfinite().all()
    assert not (new.budget.best_units(nothing_U.astype(float), nothing_U.astype(float), 0.2) & ~kept(new)).any()


def kept(new: RunState) -> np.ndarray:
    return new.network.stored_units


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dense"},
        {"method": "vrpge", "budget_schedule": "cubic", "budget_end": 1.0},
        pytest.param(
            {"method": "vrpge", "estimator": "linear_cv_gates", "constrain_by_layer": True}, marks=pytest.mark.slow
        ),
        pytest.param({"method": "sfp"}, marks=pytest.mark.slow),
        pytest.param({"method": "slimming"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: options.get("estimator", options["method"]),
)
def test_such_a_run_trains_stays_within_the_subnet_and_resumes_bit_equal(images, tmp_path, sources, options, capsys):
    source = sources["random"]
    mask_U, start = kept_mask(source.load("best.pt")), ("--pretrained", str(source.folder))
    settings = {**SHORT, "keep_ratio": 0.3, "save_every": 0, **options}
    whole = run(tmp_path, images, *start, name="whole", **settings)
    assert whole.code == 0
    told = f"starting from the subnet of {source.folder}/checkpoints/best.pt: {mask_U.sum()} of {len(mask_U)} units"
    assert told in capsys.readouterr().out
    best = whole.load("best.pt")
    assert not (kept_mask(best) & ~mask_U).any()
    dense = options["method"] == "dense"
    assert whole.summary["units_kept"] == pytest.approx(mask_U.mean() if dense else kept_mask(best).mean())
    assert whole.summary["units_kept"] <= (1 if dense else 0.3)
    assert whole.summary["keep_ratio"] == (1 if dense else 0.3)
    if "budget_schedule" in options:
        progress = (STEPS - 1) / STEPS
        assert float(whole.rows[0]["budget"]) == pytest.approx(0.3 + (mask_U.mean() - 0.3) * (1 - progress) ** 3)
    capsys.readouterr()
    assert main(["--evaluate", "--resume", str(whole.folder)]) == 0
    assert f"test top-1 {whole.summary['test_top1']:.2f} %" in capsys.readouterr().out

    assert run(tmp_path, images, *start, name="parts", interrupt_at=1, **settings).code == 130
    parts = run(tmp_path, images, "--resume", name="parts", **settings)
    for file in ("last.pt", "best.pt"):
        different = [name for name in differences(whole.load(file), parts.load(file)) if "config." not in name]
        assert different == [], file


def test_other_classes_get_a_new_head(images, data, tmp_path, sources, capsys):
    other = tmp_path / "five"
    for part in ("train", "test"):
        for label in range(5):
            (other / part).mkdir(parents=True, exist_ok=True)
            (other / part / f"kind{label}").symlink_to(images / part / f"class{label}")
    theirs = started(images, data, sources["thin"]).network.model.state_dict()
    new = started(other, load_data(config_of(other), CPU), sources["thin"], method="dense")
    assert "best.pt tells 6 classes apart and the data have 5, so layer linear starts anew" in capsys.readouterr().out
    ours = new.network.model.state_dict()
    assert ours["linear.weight"].shape == (5, *theirs["linear.weight"].shape[1:])
    same = [name for name in ours if not name.startswith("linear.") and not name.endswith("scores")]
    assert all(torch.equal(ours[name], theirs[name]) for name in same)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gumbel"}, "method gumbel computes channels that the subnet does not have; pass --method vrpge"),
        ({"method": "released"}, "method released computes channels"),
        ({"execution": "masked"}, "masked execution computes channels that the subnet does not have"),
        ({"keep_ratio": 0.5}, r"this subnet is \d+\.\d\d % of the channels .*leaves nothing to choose"),
        ({"width_mult": 0.5}, r"it was trained with width_mult 0\.25, not 0\.5; pass --width-mult 0\.25"),
        ({"residual_masks": "tied"}, "trained with residual_masks free, not tied; pass --residual-masks free"),
        ({"first_layer_dense": True}, "trained with first_layer_dense off, not on; pass --first-layer-dense off"),
    ],
)
def test_what_does_not_fit_a_subnet_is_refused(images, data, sources, options, message):
    with pytest.raises(UserError, match=message) as caught:
        started(images, data, sources["random"], **options)
    assert str(caught.value).startswith("--pretrained ")
    assert "\n" not in str(caught.value)


def test_a_run_that_keeps_all_weights_stands_for_them(images, data, tmp_path):
    source = run(tmp_path, images, "--no-shrink", **SHORT)
    for file in ("", "checkpoints/last.pt"):
        new = started(images, data, source, method="dense", pretrained=str(source.folder / file))
        assert new.network.num_units == 0
        model = source.load(Path(file or "best.pt").name)["model"]
        assert torch.equal(new.network.model.conv1.weight, model["conv1.weight"])


def test_pruning_keeps_of_a_layer_at_most_what_the_subnet_has(images, data, sources):
    new = started(images, data, sources["random"], method="l1", keep_ratio=0.45)
    mask_U = make_method(config_of(images, sources["random"], method="l1", keep_ratio=0.45)).mask(new, 0.45)
    assert not (mask_U & ~new.network.stored_units).any()
    scarce = 0
    for layer in new.network.unit_groups():
        wanted, there = max(1, round(0.45 * (layer.stop - layer.start))), int(new.network.stored_units[layer].sum())
        assert mask_U[layer].sum() == min(wanted, there)
        scarce += there < wanted
    assert scarce
