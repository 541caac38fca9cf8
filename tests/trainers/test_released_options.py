"""Options that mean in the released method what they mean in the released code: they drive the scores alone."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from args import Config, parse_args
from trainers.build import make_score_optimizer, make_weight_optimizer
from trainers.default import StepSettings
from trainers.recipe import Recipe
from utils.algorithm.schedules import learning_rate_factor

STEPS, EPOCHS = 5, 70


def config_of(method: str, **options: object) -> Config:
    given = {"method": method, "epochs": EPOCHS, "weight_decay": 0.125, "momentum": 0.8, **options}
    words = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    return parse_args([*words, "--weight-lr=0.5", "--score-lr=0.25"]).config


@pytest.mark.parametrize(
    ("method", "optimizer", "weights", "scores"),
    [("released", "adam", 5e-4, 0.125), ("released", "sgd", 5e-4, 1e-6), ("vrpge", "adam", 0.125, 0.0)],
)
def test_weight_decay_is_that_of_the_scores_by_adam(method, optimizer, weights, scores):
    network = SimpleNamespace(weight_parameters=lambda: [nn.Parameter(torch.ones(2))], scores=torch.ones(2))
    config = config_of(method, optimizer=optimizer)
    for made, decay in (
        (make_weight_optimizer(network, config, 0.1), weights),
        (make_score_optimizer(network, config), scores),
    ):
        assert [group["weight_decay"] for group in made.param_groups] == [decay]


def settings(config: Config) -> list[StepSettings]:
    """Of every step of the search."""
    run = SimpleNamespace(phase="search", epoch=0, search=object(), start_share=1.0)
    recipe, found = SimpleNamespace(config=config, run=run), []
    for run.epoch in range(EPOCHS):
        found += [Recipe.settings(recipe, step, STEPS) for step in range(STEPS)]
    return found


def test_policy_and_warm_up_are_those_of_the_scores_and_weights_follow_the_cosine():
    now = settings(config_of("released", lr_policy="constant_lr", warmup_length=2))
    rise = [min(1.0, (step + 1) / (2 * STEPS)) for step in range(EPOCHS * STEPS)]
    cosine = [0.25 * (1 + math.cos(math.pi * step / (EPOCHS * STEPS))) for step in range(EPOCHS * STEPS)]
    assert [step.score_lr for step in now] == pytest.approx([0.25 * factor for factor in rise])
    assert [step.weight_lr for step in now] == pytest.approx(cosine)
    others = settings(config_of("vrpge", lr_policy="constant_lr", warmup_length=2))
    assert [step.weight_lr for step in others] == pytest.approx([0.5 * factor for factor in rise])


def test_multistep_divides_every_30_epochs_and_does_not_warm_up():
    now = settings(config_of("released", lr_policy="multistep_lr", warmup_length=2))
    assert [step.score_lr for step in now] == pytest.approx(
        [0.25 * 0.1 ** (epoch // 30) for epoch in range(EPOCHS) for _ in range(STEPS)]
    )
    others = settings(config_of("vrpge", lr_policy="multistep_lr"))
    assert others[-1].score_lr == pytest.approx(0.25 * 0.01)
    assert others[32 * STEPS].score_lr == 0.25
    assert learning_rate_factor("cosine_lr", 50, 100, drop_every=30) == pytest.approx(0.5)
