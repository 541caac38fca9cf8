"""Whole programs on two ranks: ranks that differ end the run, and the arithmetic of all of them is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from main import main
from tests.conftest import TINY
from tests.ranks import program as ranks
from tests.ranks.test_ranks import torchrun
from tests.toy import one_thread  # noqa: F401
from utils.run.checkpoint import load

pytestmark = pytest.mark.slow

EPOCHS, BATCH, FINETUNE_EPOCHS, FINETUNE_BATCH, NUM_SUBNETS, BN_BATCHES = 3, 16, 2, 12, 2, 2
LENGTHS = f"""
epochs: {EPOCHS}
batch_size: {BATCH}
finetune_epochs: {FINETUNE_EPOCHS}
finetune_batch_size: {FINETUNE_BATCH}
num_subnets: {NUM_SUBNETS}
bn_batches: {BN_BATCHES}
budget_schedule: constant
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checks")
    fixed = [line for line in TINY.splitlines() if f"{line.partition(':')[0]}:" not in LENGTHS]
    (folder / "tiny.yaml").write_text("\n".join(fixed) + LENGTHS)
    return folder


@pytest.fixture(scope="module")
def results(folder, tiny_images) -> list[dict[str, Any]]:
    """What each rank came to in `ranks.checks`."""
    result = torchrun("-m", "tests.ranks.program", "checks", str(folder), str(tiny_images))
    assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"rank{number}.pt", weights_only=True) for number in range(ranks.RANKS)]


@pytest.mark.parametrize(
    ("when", "message"),
    [
        # different seeds are different first weights, in all layers
        ("at the start", "rank 0: error: rank 1 differs from rank 0 after 0 epochs and 0 steps in conv1.weight ("),
        # the weight and its momentum, which its decay feeds; every third step is checked, and the second differs
        ("between steps", "rank 1 differs from rank 0 after 0 epochs and 3 steps in layer3.0.conv2.weight (2 of "),
        ("at the end of an epoch", "rank 1 differs from rank 0 after 2 epochs and 0 steps in layer2.0.bn1.bias ("),
    ],
)
def test_ranks_that_differ_end_the_run_with_4_and_one_sentence(results, when, message):
    assert [result[when]["code"] for result in results] == [4, 4]
    said = [result[when]["said"] for result in results if result[when]["said"]]
    assert len(said) == 1, "one rank speaks for all"
    assert message in said[0]
    assert said[0].count("\n") == 1
    assert "Traceback" not in said[0]


def test_ranks_that_are_alike_go_on(results):
    assert [result["never"] for result in results] == [{"code": 0, "said": ""}] * 2


def passes(num_ranks: int, method: str, heldout: int, judges: int) -> int:
    """What a run computes, in forward passes of single images through the whole network."""
    train, calibration = 80 - heldout, num_ranks * BN_BATCHES * BATCH  # every rank re-estimates from all images
    search_steps = EPOCHS * (train // BATCH) * BATCH
    if method == "dense":
        return (EPOCHS + FINETUNE_EPOCHS) * ((train // BATCH) * BATCH * 3 + heldout)
    search = search_steps * (2 + 2) + EPOCHS * (calibration + heldout)
    choice = (1 + NUM_SUBNETS) * (calibration + judges) + heldout
    finetuning = FINETUNE_EPOCHS * ((train // FINETUNE_BATCH) * FINETUNE_BATCH * 3 + heldout)
    return search + choice + finetuning


@pytest.mark.parametrize("num_ranks", [2, 1])
@pytest.mark.parametrize(
    ("name", "method", "options", "heldout", "judges"),
    [
        ("masked", "vrpge", ("--execution", "masked"), 16, 16),
        ("trained", "vrpge", ("--execution", "masked", *ranks.ON_TRAINING_IMAGES), 0, 80),
        ("dense", "dense", ("--method", "dense"), 16, 16),
    ],
)
def test_the_ledger_counts_every_pass_of_every_rank(
    request, folder, tmp_path, tiny_images, num_ranks, name, method, options, heldout, judges
):  # fmt: skip
    """Masked execution computes every channel, so every pass costs what a dense one does."""
    runs = folder / "runs"
    if num_ranks == 1:
        runs = tmp_path / "runs"
        fixed = ["--config", str(folder / "tiny.yaml"), "--data", str(tiny_images), "--device", "cpu", "--name", name]
        assert main([*fixed, "--log-dir", str(runs), *options]) == 0
    else:
        assert [result[name] for result in request.getfixturevalue("results")] == [0, 0]
    [checkpoint] = runs.glob(f"tiny/{name}/*/checkpoints/last.pt")
    ledger = load(checkpoint)["ledger"]
    train = 80 - heldout
    images = EPOCHS * (train // BATCH) * BATCH
    size = BATCH if method == "dense" else FINETUNE_BATCH
    images += FINETUNE_EPOCHS * (train // size) * size
    dense_pass, rest = divmod(ledger["dense"], 3 * images)
    assert rest == 0
    assert ledger["executed"] == dense_pass * passes(num_ranks, method, heldout, judges)
    summary = json.loads((checkpoint.parent.parent / "summary.json").read_text())
    assert summary["train_flops_ratio"] == pytest.approx(ledger["executed"] / ledger["dense"])
