"""`--method released` reproduces one iteration of the released code, number by number.

`released_step.npz` was recorded from the released code itself (float64): a tiny network of its own layers, K = 2,
kept fraction 0.4. The masks were drawn there, so they are injected here. Not compared: `num_batches_tracked`, which
this project does not keep, and `linear.scores`, which the released code has for the classifier and never uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.toy import ReleasedNet, config, one_thread, search_of, sparse_network  # noqa: F401
from trainers.default import StepSettings
from trainers.methods.released import Released
from trainers.state import RunState, Search
from utils.channels import budget

TIGHT = {"rtol": 1e-10, "atol": 1e-13}
KEEP_RATIO = 0.4
LAYERS = list(ReleasedNet.LAYERS)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    with np.load(Path(__file__).with_name("released_step.npz"), allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def flat(recorded: dict[str, Tensor], pattern: str) -> Tensor:
    """A per-layer record as one vector of 54 units."""
    return torch.cat([recorded[pattern.format(layer)].flatten() for layer in LAYERS])


@dataclass
class Step:
    """What `train_step` was seen to do."""

    state: Search
    result: dict[str, Tensor]
    losses: list[Tensor]
    logits: list[Tensor]
    gradients: dict[str, Tensor]
    score_gradient: Tensor
    clip_norm: Tensor
    unprojected: Tensor
    budget: float
    v: Tensor


@pytest.fixture(scope="module")
def step(recorded) -> Step:
    net = ReleasedNet().double()
    weights = {
        key.removeprefix("before/"): value
        for key, value in recorded.items()
        if key.startswith("before/") and not key.endswith("scores")
    }
    net.load_state_dict(weights)
    network = sparse_network(net, LAYERS, "released")
    network.scores.copy_(flat(recorded, "before/{}.scores"))
    masks_KU = torch.stack([flat(recorded, f"mask/{j}/{{}}") for j in range(2)]).bool()
    options = config(clip_norm=3.0, label_smoothing=0.0)
    search = search_of(
        network,
        options,
        masks_KU=masks_KU,
        weight_optimizer=torch.optim.SGD(network.weight_parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4),
        score_optimizer=torch.optim.Adam([network.scores], lr=1.0, weight_decay=0.0),
    )
    run = RunState(network, search.budget, search.weight_optimizer, "search", network.dense_plan, search)
    seen: dict = {"losses": [], "logits": []}

    def cross_entropy(logits, labels, **options):
        loss = original_cross_entropy(logits, labels, **options)
        seen["losses"].append(loss.detach())
        seen["logits"].append(logits.detach())
        return loss

    def clip(parameters, max_norm, *args, **kwargs):
        parameters = list(parameters)
        assert max_norm == 3
        assert len(parameters) == len(network.weight_parameters()) + 1  # jointly: weights and scores
        seen["gradients"] = {n: p.grad.clone() for n, p in network.model.named_parameters() if p.requires_grad}
        seen["score_gradient"] = network.scores.grad.clone()
        seen["clip_norm"] = original_clip(parameters, max_norm, *args, **kwargs)
        return seen["clip_norm"]

    def project(scores_U, budget, spend):
        assert not spend
        seen["unprojected"], seen["budget"] = scores_U.clone(), budget
        projected, seen["v"] = original_project(scores_U, budget)
        return projected, seen["v"]

    original_cross_entropy, original_clip = torch.nn.functional.cross_entropy, torch.nn.utils.clip_grad_norm_
    original_project = budget.project_onto_budget
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        patch.setattr(budget, "project_onto_budget", project)
        network.model.train()
        settings = StepSettings(weight_lr=0.1, score_lr=12e-3, keep_ratio=KEEP_RATIO)
        result = Released(options).step(run, recorded["x"], recorded["y"], settings)
    return Step(state=search, result=result.metrics, **seen)


def test_the_network_has_the_released_names_and_units(recorded, step):
    ours = {name for name, p in step.state.network.model.named_parameters() if p.requires_grad}
    theirs = {
        key.removeprefix("before/")
        for key in recorded
        if key.startswith("before/") and key.endswith((".weight", ".bias"))
    }
    assert ours == theirs
    assert step.state.network.num_units == 54


def test_both_losses_and_logits(recorded, step):
    assert len(step.losses) == 2
    for j in range(2):
        torch.testing.assert_close(step.losses[j], recorded[f"loss/{j}"], **TIGHT)
        torch.testing.assert_close(step.logits[j], recorded[f"logits/{j}"], **TIGHT)
    torch.testing.assert_close(step.result["loss"] / 8, recorded["loss/0"], **TIGHT)
    difference = (recorded["loss/0"] - recorded["loss/1"]).abs()
    torch.testing.assert_close(step.result["loss_difference"] / 8, difference, rtol=1e-9, atol=1e-12)


def test_every_weight_gradient(recorded, step):
    assert len(step.gradients) == sum(key.startswith("grad/") and not key.endswith("scores") for key in recorded)
    for name, gradient in step.gradients.items():
        torch.testing.assert_close(gradient, recorded[f"grad/{name}"], **TIGHT, msg=lambda m, n=name: f"{n}: {m}")


def test_the_score_gradient(recorded, step):
    theirs = flat(recorded, "grad/{}.scores")
    torch.testing.assert_close(step.score_gradient, theirs, **TIGHT)
    # a unit that both masks treat alike learns nothing; not even noise, which Adam would blow up
    assert torch.equal(step.score_gradient == 0, theirs == 0)
    assert 10 < theirs.count_nonzero() < 54


def test_the_joint_norm(recorded, step):
    torch.testing.assert_close(step.clip_norm, recorded["clip_norm"], **TIGHT)


def test_scores_after_adam(recorded, step):
    torch.testing.assert_close(step.unprojected, flat(recorded, "scores_unprojected/{}"), **TIGHT)


def test_projection_to_the_released_tolerance(recorded, step):
    """They bisect until the sum is within 1e-3 of the budget; all 54 scores stay above v, so v is within 1e-3 / 54."""
    assert step.budget == pytest.approx(21.6, rel=1e-12)
    tolerance = 1e-3 / 54
    assert (step.v - recorded["v"]).abs() <= tolerance
    theirs = flat(recorded, "after/{}.scores")
    ours = step.state.network.scores
    assert theirs.min() > 0
    assert (ours - theirs).abs().max() <= tolerance
    assert ours.sum().item() == pytest.approx(21.6, rel=1e-9)
    # theirs is the same formula with their v
    torch.testing.assert_close((step.unprojected - recorded["v"]).clamp(0, 1), theirs, **TIGHT)
    torch.testing.assert_close(step.result["v"] / 8, step.v, **TIGHT)


def test_weights_and_running_statistics_after_the_step(recorded, step):
    state = step.state.network.model.state_dict()
    compared = 0
    for key, value in recorded.items():
        name = key.removeprefix("after/")
        if not key.startswith("after/") or name.endswith(("scores", "num_batches_tracked")):
            continue
        torch.testing.assert_close(state[name], value, **TIGHT, msg=lambda m, n=name: f"{n}: {m}")
        compared += 1
    assert compared == 7 + 4 * 6  # conv weights (classifier included), four tensors of six batch-norms


def test_the_record_shows_leaking_shifts(recorded):
    """Why it needs semantics of its own: the stem keeps nothing, and yet its batch-norm shift gets a gradient."""
    assert recorded["mask/0/conv1"].count_nonzero() == 0
    assert recorded["grad/bn.bias"][:5].count_nonzero() > 0
