"""The share of signal that `--gauge-every` watches: what it is made of, and that nothing else notices."""

import csv
import json
import math
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch

from main import main
from tests.tools.test_gauge import tiny_data, training_run
from tests.toy import NETWORKS, batch, config, one_thread, plain_net, sparse_network  # noqa: F401
from tests.trainers.test_methods import program, tiny_images  # noqa: F401  (fixtures)
from trainers.default import SearchState, StepSettings
from trainers.methods import method_of
from trainers.methods.share import NAMES, measure_share, no_share, share_of_signal
from utils.run.checkpoint import differences, load, save
from utils.run.metrics import MetricSums


def test_with_one_undecided_unit_the_products_are_known(one_thread):  # noqa: F811
    """At s = 1/2 an estimate is 0 where the masks agree on the unit, else L(kept) - L(dropped) on its half."""
    network = sparse_network(plain_net("released"), NETWORKS["released"].LAYERS)
    network.model.train()
    network.scores.data.fill_(1.0)
    network.scores.data[2] = 0.5
    search = SearchState(network, None, None, None, draw=None, gauge=torch.Generator().manual_seed(3))
    images, labels = batch(size=7)

    effects = []
    for half in (slice(0, 4), slice(4, 7)):
        losses = []
        for kept in (True, False):
            mask_U = network.scores.detach().numpy() > 0
            mask_U[2] = kept
            with torch.no_grad():
                logits = network(images[half], network.plan(mask_U), update_statistics=False)
            losses.append(float(torch.nn.functional.cross_entropy(logits, labels[half])))
        effects.append(losses[0] - losses[1])
    one, other = effects
    squares = {0.0: 0.0, one**2 / 2: 0.0, other**2 / 2: 0.0, (one**2 + other**2) / 2: one * other}
    seen = set()
    for _ in range(40):
        before = {name: value.clone() for name, value in network.model.state_dict().items()}
        measured, cost = measure_share(search, images, labels, config())
        square = float(measured["gauge_square"])
        match = min(squares, key=lambda known: abs(known - square))
        assert square == pytest.approx(match, abs=1e-12)
        assert float(measured["gauge_product"]) == pytest.approx(squares[match], abs=1e-12)
        assert float(measured["gauge_product_squared"]) == pytest.approx(squares[match] ** 2, abs=1e-12)
        assert len(cost) == 2
        assert not differences(before, network.model.state_dict())
        seen.add(match)
    assert len(seen) == 4


def test_the_share_of_an_epoch_is_a_ratio_of_means_with_its_error():
    products, squares, sums = [0.3, -0.1, 0.2, 0.05], [1.0, 2.0, 1.5, 0.5], MetricSums()
    for step in range(12):
        measured = step % 3 == 0
        product, square = (products[step // 3], squares[step // 3]) if measured else (0.0, 0.0)
        values = torch.tensor([float(measured), product, product**2, square], dtype=torch.float64)
        sums.add(dict(zip(NAMES, values, strict=True)), 20)
    told = share_of_signal(sums.means(), sums.count)
    assert told["share_of_signal"] == pytest.approx(fmean(products) / fmean(squares))
    assert told["share_of_signal_error"] == pytest.approx(stdev(products) / math.sqrt(4) / fmean(squares))
    nothing = MetricSums()
    nothing.add(no_share(torch.device("cpu")), 20)
    assert share_of_signal(nothing.means(), 20) == {}


@pytest.mark.parametrize(
    "options", [(), ("--subbatch", "2"), ("--estimator", "linear_cv_disarm"), ("--method", "coin")]
)
def test_a_run_that_is_watched_trains_as_one_that_is_not(program, options):  # noqa: F811
    assert program(*options, "--no-finetune", name="alone") == 0
    assert program(*options, "--no-finetune", "--gauge-every", "2", name="watched") == 0
    alone, watched = (Path("runs/tiny") / name / "prune_rate=0.5" for name in ("alone", "watched"))
    models = [load(folder / "checkpoints/last.pt")["model"] for folder in (alone, watched)]
    assert not differences(*models)
    with open(watched / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["share_of_signal"]) for row in rows] == [True, True]
    assert all(abs(float(row["share_of_signal"])) <= 1 and float(row["share_of_signal_error"]) > 0 for row in rows)
    costs = [json.loads((folder / "summary.json").read_text())["train_flops_ratio"] for folder in (alone, watched)]
    assert costs[0] < costs[1]


def test_a_batch_that_is_too_small_to_halve_is_refused(capsys):
    assert main(["--gauge-every", "5", "--subbatch", "4", "--batch-size", "15"]) == 2
    assert "gauge_every 5 (command line) measures on halves of a batch" in capsys.readouterr().err


def test_a_watched_run_resumes_bit_equal(tmp_path):
    options = {"gauge_every": 1, "precision": "fp32"}
    whole, settings = training_run(**options)
    watch_steps(whole, settings, first=0, count=4)
    parts, _ = training_run(**options)
    watch_steps(parts, settings, first=0, count=2)
    save(tmp_path / "last.pt", parts.state_dict(settings, "images"))
    resumed, _ = training_run(**options)
    resumed.load_state_dict(load(tmp_path / "last.pt"), settings)
    watch_steps(resumed, settings, first=2, count=2)
    assert differences(*(run.state_dict(settings, "images") for run in (whole, resumed))) == []
    assert whole.sums.means()["gauge_count"] > 0


def watch_steps(run, settings, first: int, count: int) -> None:
    batches = islice(tiny_data().train.train_batches(16, 0, 0), first, first + count)
    for images, labels in batches:
        step = StepSettings(0.05, 0.02, kept_fraction=0.5, gauge=True)
        run.sums.add(method_of(settings).step(run, images, labels, step, settings)[0], len(labels))
