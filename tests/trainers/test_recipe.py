"""The recipe from step to step: what optimizers, passes and statistics really were, against formulas written anew."""

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import trainers.default
import trainers.methods.gumbel
import trainers.recipe
import trainers.schedule
from args import config_from_dict, parse_args
from data import build_data
from models import build_model, maskable_convs
from tests.tiny import BATCH, FINETUNE_BATCH, FINETUNE_STEPS, STEPS, Run, Step, make_images, run, scores_of
from trainers.methods.uniform import layers_by_stream, uniform_mask
from utils.channels.network import SparseNetwork
from utils.conv_type import sparsify
from utils.run.progress import Stage

SEARCH, FINETUNE = 3, 2  # epochs
CASES = {  # name -> what differs from the tiny configuration
    "cosine": {
        **{"lr_policy": "cosine_lr", "finetune_policy": "constant", "finetune_lr": 0.003},
        **{
            "optimizer": "sgd",
            "score_lr": 0.2,
            "momentum": 0.8,
            "nesterov": True,
            "weight_decay": 0.02,
            "clip_norm": 0.5,
        },
    },
    "multistep": {
        **{"lr_policy": "multistep_lr", "finetune_policy": "continue", "optimizer": "adam", "score_lr": 1e-5},
        **{"budget_schedule": "cubic", "budget_start": 0.2, "budget_end": 0.8, "momentum": 0.9, "weight_decay": 0.0},
    },
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory) -> dict[str, Run]:
    """Units do not leave the parameters here, so that every tensor keeps its shape through the run."""
    root, common = tmp_path_factory.mktemp("recipe"), {"epochs": SEARCH, "finetune_epochs": FINETUNE, "retire": "off"}
    done = {name: run(root, images, name=name, warmup_length=1, **common, **case) for name, case in CASES.items()}
    assert all(each.code == 0 for each in done.values())
    return done


def phases(steps: list[Step]) -> tuple[list[Step], list[Step]]:
    assert len(steps) == SEARCH * STEPS + FINETUNE * FINETUNE_STEPS
    return steps[: SEARCH * STEPS], steps[SEARCH * STEPS :]


def factor(policy: str, epoch: float, warmup_epochs: int, epochs: int, per_epoch: int) -> float:
    """What multiplies a learning rate at a place that is counted in epochs."""
    if epoch < warmup_epochs:
        return (epoch + 1 / per_epoch) / warmup_epochs
    done = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    if policy == "cosine_lr":
        return (1 + math.cos(math.pi * done)) / 2
    return {"constant_lr": 1.0, "multistep_lr": 0.1 ** sum(done >= part for part in (0.5, 0.75))}[policy]


def rates(steps: list[Step]) -> list[float]:
    return [step.group["lr"] for step in steps]


# ---- learning rates, batches, optimizers ----


@pytest.mark.parametrize("name", CASES)
def test_every_learning_rate_of_a_run(runs, name):
    """Scores follow the search, weights the search or, with finetune_policy continue, all epochs as one."""
    policy, one_curve = CASES[name]["lr_policy"], CASES[name]["finetune_policy"] == "continue"
    search, finetune = phases(runs[name].record.steps("weights"))
    places = [step / STEPS for step in range(SEARCH * STEPS)]
    whole = SEARCH + FINETUNE if one_curve else SEARCH
    assert rates(search) == pytest.approx([0.05 * factor(policy, place, 1, whole, STEPS) for place in places])
    later = [SEARCH + step / FINETUNE_STEPS for step in range(FINETUNE * FINETUNE_STEPS)]
    continued = [0.05 * factor(policy, place, 1, whole, FINETUNE_STEPS) for place in later]
    assert rates(finetune) == pytest.approx(continued if one_curve else [0.003] * len(finetune))
    scores = runs[name].record.steps("scores")
    score_lr = CASES[name]["score_lr"]
    assert rates(scores) == pytest.approx([score_lr * factor(policy, place, 1, SEARCH, STEPS) for place in places])


def test_methods_without_a_search_have_one_curve_and_one_batch_size(images, tmp_path):
    policy = "cosine_lr"
    done = run(tmp_path, images, method="thin", epochs=2, finetune_epochs=1, warmup_length=1, lr_policy=policy)
    steps = done.record.steps("weights")
    assert rates(steps) == pytest.approx(
        [0.05 * factor(policy, step / STEPS, 1, 3, STEPS) for step in range(3 * STEPS)]
    )
    assert {len(p.images) for p in done.record.passes("graph")} == {BATCH}


@pytest.mark.parametrize("name", CASES)
def test_each_phase_has_its_batch_size(runs, name):
    sizes = [len(p.images) for p in runs[name].record.passes("graph")]
    assert sizes == [BATCH] * SEARCH * STEPS + [FINETUNE_BATCH] * FINETUNE * FINETUNE_STEPS


@pytest.mark.parametrize("name", CASES)
def test_every_step_of_the_weights_is_sgd_and_fine_tuning_starts_without_momentum(runs, name):
    """Also nothing else moves the weights, between the phases neither."""
    options = {"nesterov": False, **CASES[name]}
    momentum, decay = options["momentum"], options["weight_decay"]
    steps = runs[name].record.steps("weights")
    for earlier, later in pairwise(steps):
        assert all(a.equal(b) for a, b in zip(earlier.after, later.before, strict=True))
    for part in phases(steps):
        assert [step.is_fresh for step in part] == [True] + [False] * (len(part) - 1)
        moments: list[Tensor] | None = None
        for step in part:
            slopes = [g + decay * p for g, p in zip(step.grads, step.before, strict=True)]
            pairs = zip(moments or slopes, slopes, strict=True)
            moments = [momentum * m + s for m, s in pairs] if moments else slopes
            pushes = (
                [s + momentum * m for m, s in zip(moments, slopes, strict=True)] if options["nesterov"] else moments
            )
            for before, push, after in zip(step.before, pushes, step.after, strict=True):
                torch.testing.assert_close(after, before - step.group["lr"] * push, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_every_step_of_the_scores_is_that_of_the_optimizer_asked_for_without_decay(runs, name):
    steps = runs[name].record.steps("scores")
    assert len(steps) == SEARCH * STEPS
    scores = torch.nn.Parameter(steps[0].before[0].clone())
    is_adam, momentum = CASES[name]["optimizer"] == "adam", CASES[name]["momentum"]
    optimizer = torch.optim.Adam([scores], 1.0) if is_adam else torch.optim.SGD([scores], 1.0, momentum)
    for step in steps:
        scores.data, scores.grad = step.before[0].clone(), step.grads[0].clone()
        optimizer.param_groups[0]["lr"] = step.group["lr"]
        optimizer.step()
        torch.testing.assert_close(step.after[0], scores.data, rtol=0, atol=2e-7)
    assert sum(bool(step.grads[0].any()) for step in steps) > len(steps) / 2


def test_the_budget_falls_over_the_steps_of_the_search_alone(runs):
    """With scores that hardly learn, their sum is the budget of every step; here one learning rate curve runs on."""
    done = runs["multistep"]
    steps = done.record.steps("scores")
    sums = [float(step.before[0].double().mean()) for step in steps[1:]]
    sums.append(float(scores_of(done.load(f"epoch_{SEARCH}.pt")).double().mean()))
    places = [(step / len(steps) - 0.2) / 0.6 for step in range(len(steps))]
    expected = [0.5 + 0.5 * (1 - min(max(place, 0), 1)) ** 3 for place in places]
    assert sums == pytest.approx(expected, rel=1e-4)
    assert expected[2] == 1 > expected[3]
    told = [float(row["budget"]) for row in done.rows[:SEARCH]]
    assert told == pytest.approx(expected[STEPS - 1 :: STEPS])
    assert [row["budget"] for row in done.rows[SEARCH:]] == [""] * FINETUNE


def test_scores_that_want_to_grow_stay_within_a_constant_budget(runs):
    means = [float(step.before[0].double().mean()) for step in runs["cosine"].record.steps("scores")]
    assert max(means) <= 0.5 + 1e-6
    outside = [step.after[0] for step in runs["cosine"].record.steps("scores")]
    assert any(scores.double().mean() > 0.5 + 1e-4 for scores in outside)  # before the projection


# ---- statistics of batch-norm ----


@pytest.fixture(scope="module")
def pruned(images, tmp_path_factory) -> list[Run]:
    """Two seeds of a method whose training steps have no pass without a graph: such passes estimate statistics."""
    root, settings = tmp_path_factory.mktemp("pruned"), {"method": "l1", "retire": "off", "bn_batches": 3}
    return [run(root, images, name=f"seed{seed}", seed=seed, **settings) for seed in (0, 1)]


def test_statistics_are_of_training_images_that_are_not_augmented_and_the_same_for_every_seed(images, pruned):
    data = build_data(
        *("ImageFolder", str(images)),
        **{"holdout": 0.2, "image_size": 0, "workers": 0, "device": torch.device("cpu")},
    )
    (own,) = (part for part, _ in data.train.batches(len(data.train)))
    numbers = {image.numpy().tobytes(): number for number, image in enumerate(own)}
    estimates = [done.record.passes("free") for done in pruned]
    for passes in estimates:
        assert [len(p.images) for p in passes] == [BATCH] * 3 * 3  # after two epochs, and of the choice
        used = [numbers[image.numpy().tobytes()] for p in passes for image in p.images.contiguous()]
        assert used[: 3 * BATCH] == used[3 * BATCH : 6 * BATCH] == used[6 * BATCH :]
        assert len(set(used)) == 3 * BATCH
        assert used[:BATCH] != sorted(used[:BATCH])
    assert all(a.images.equal(b.images) for a, b in zip(*estimates, strict=True))


def test_a_subnet_has_the_mean_statistics_of_these_batches_and_fine_tuning_starts_from_them(pruned):
    done = pruned[0]
    saves = done.record.saves()
    phases = [save.state["phase"] for save in saves]
    (number,) = (i for i in range(len(saves)) if phases[i - 1 : i + 1] == ["finetune", "search"])
    first, chosen = saves[number - 1].state, saves[number].state
    statistics = chosen["subnet"]["statistics"]
    maps = [F.conv2d(p.images, chosen["model"]["conv1.weight"], padding=1) for p in done.record.passes("free")[-3:]]
    kept = chosen["subnet"]["mask"][: maps[0].shape[1]]
    mean, var = next(iter(statistics.values()))
    torch.testing.assert_close(mean[kept], torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)[kept])
    torch.testing.assert_close(var[kept], torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0)[kept])
    for name, (mean, var) in statistics.items():
        assert first["model"][f"{name}.running_mean"].equal(mean)
        assert first["model"][f"{name}.running_var"].equal(var)
        assert not chosen["model"][f"{name}.running_mean"].equal(mean)  # of the search, over all its masks


# ---- losses and gradients ----


@pytest.fixture(scope="module", params=["vrpge", "gumbel", "dense", "slimming"])
def smoothed(request, images, tmp_path_factory) -> Run:
    settings = {"epochs": 1, "label_smoothing": 0.125, "clip_norm": 0.02, "slimming_penalty": 5.0}
    return run(tmp_path_factory.mktemp(request.param), images, method=request.param, **settings)


def test_labels_are_smoothed_in_training_and_not_in_evaluation(smoothed):
    """In all passes of a step and in fine-tuning. Passes that estimate statistics have no loss."""
    seen = {kind: {p.smoothing for p in smoothed.record.passes(kind)} for kind in ("graph", "evaluation")}
    assert seen == {"graph": {0.125}, "evaluation": {0.0}}
    assert {p.smoothing for p in smoothed.record.passes("free") if not math.isnan(p.loss)} <= {0.125}
    losses = [p for p in smoothed.record.passes() if not math.isnan(p.loss)]
    for p in losses:
        smoothing = 0.0 if p.kind == "evaluation" else 0.125
        assert p.loss == pytest.approx(float(F.cross_entropy(p.logits, p.labels, label_smoothing=smoothing)), rel=1e-6)


def test_gradients_are_clipped_as_the_last_thing_before_a_step(smoothed):
    """With the penalty of slimming in them, and scores by themselves."""
    steps = smoothed.record.of(Step)
    norms = [math.sqrt(sum(float(g.double().square().sum()) for g in step.grads if g is not None)) for step in steps]
    assert max(norms) <= 0.02 * (1 + 1e-4)
    assert sum(norm > 0.019 for norm in norms) > len(norms) / 2


def test_the_penalty_is_added_to_what_ranks_have_averaged(images, tmp_path, monkeypatch):
    """Nothing but the penalty is left if the average is zero; a penalty in the average would be scaled with it."""

    def average_to_zero(weights: list[Tensor], _num_images: int) -> None:
        for weight in weights:
            weight.grad.zero_()

    monkeypatch.setattr(trainers.default, "average_gradients_", average_to_zero)
    settings = {"method": "slimming", "slimming_penalty": 0.25, "clip_norm": 1e6, "epochs": 1}
    first = run(tmp_path, images, "--no-finetune", **settings).record.steps("weights")[0]
    for before, gradient in zip(first.before, first.grads, strict=True):
        is_scale = before.dim() == 1 and bool((before == 1).all())  # scales start at 1
        assert gradient.equal(torch.full_like(gradient, 0.25 if is_scale else 0.0))


def test_the_temperature_of_gumbel_falls_over_the_search(images, tmp_path, monkeypatch):
    seen, gates = [], trainers.methods.gumbel.concrete_gates

    def watched(scores: Tensor, noise: Tensor, temperature: float) -> Tensor:
        seen.append(temperature)
        return gates(scores, noise, temperature)

    monkeypatch.setattr(trainers.methods.gumbel, "concrete_gates", watched)
    assert run(tmp_path, images, "--no-finetune", method="gumbel", epochs=2).code == 0
    assert seen == pytest.approx([1 - 0.97 * step / (2 * STEPS) for step in range(2 * STEPS)])


def test_scores_move_every_so_many_steps_of_the_run_not_of_the_epoch(images, tmp_path):
    done = run(tmp_path, images, "--no-finetune", score_every=3)
    kinds = [step.kind for step in done.record.of(Step) if step.grads[0] is not None]
    expected = [["scores", "weights"] if step % 3 == 0 else ["weights"] for step in range(2 * STEPS)]
    assert kinds == [kind for step in expected for kind in step]


# ---- what methods do to the network ----


def test_soft_pruning_zeroes_the_weakest_filters_after_every_epoch(images, tmp_path):
    done = run(tmp_path, images, "--no-finetune", method="sfp", keep_ratio=0.75)
    for epoch in (1, 2):
        model = done.load(f"epoch_{epoch}.pt")["model"]
        layers = [model[name.replace("scores", "weight")] for name in model if name.endswith("scores")]
        zero = [int((~weight.flatten(1).any(1)).sum()) for weight in layers]
        assert zero == [len(weight) // 4 for weight in layers]


@pytest.mark.parametrize("unit", ["flops", "params"])
@pytest.mark.parametrize("ratio", [0.2, 0.35, 0.6])
def test_a_thin_network_has_no_room_for_one_more_channel_where_it_was_rounded_down(unit, ratio):
    options = ["--arch", "resnet20_he", "--method", "thin", "--budget", unit, "--keep-ratio", str(ratio)]
    config = parse_args(options).config
    model = build_model(config.model.arch, 10, 3, 8)
    names = maskable_convs(model, first_layer_dense=False, last_layer_dense=False)
    network = SparseNetwork(sparsify(model, names), (3, 8, 8), self_check=False)
    mask_U = uniform_mask(network, np.zeros(network.num_units), config.sparsity.keep_ratio, config)
    streams = layers_by_stream(network)
    widths = [layers[0].stop - layers[0].start for layers in streams]
    cost = network.expected_cost(unit)

    def fits(counts: list[int]) -> bool:
        kept_U = np.zeros(network.num_units, dtype=bool)
        for layers, count in zip(streams, counts, strict=True):
            for layer in layers:
                kept_U[layer.start : layer.start + count] = True
        return cost(kept_U) <= ratio * cost.dense * (1 + 1e-9)

    kept = [int(mask_U[layers[0]].sum()) for layers in streams]
    ends = sorted({(count + 0.5) / width for width in widths for count in range(width)})
    rounded = [[max(1, round((end - 1e-9) * width)) for width in widths] for end in ends]
    base = [counts for counts in rounded if fits(counts)][-1]
    assert fits(kept)
    assert all(k in (b, b + 1) for k, b in zip(kept, base, strict=True))
    assert kept != base  # in all of these cases there is room
    for i, (count, width) in enumerate(zip(kept, widths, strict=True)):
        if count == base[i] < width:
            assert not fits([*kept[:i], count + 1, *kept[i + 1 :]])


# ---- progress ----


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({}, [Stage("search", 3, 10, 100), Stage("finetune", 2, 20, 50)]),
        ({"method": "l1"}, [Stage("search", 3, 10, 100), Stage("finetune", 2, 20, 50)]),
        ({"method": "dense"}, [Stage("dense", 5, 10, 100)]),
        ({"method": "thin"}, [Stage("train", 5, 10, 100)]),
        ({"finetune": False}, [Stage("search", 3, 10, 100)]),
        (
            {"search_until": "decided", "epochs": 9, "search_epochs": 4},
            [Stage("search", 4, 10, 100), Stage("finetune", 5, 10, 100)],
        ),
        ({"search_until": "decided", "epochs": 9, "search_epochs": 4, "method": "thin"}, [Stage("train", 9, 10, 100)]),
    ],
)
def test_the_stages_of_a_run_are_all_of_its_steps(options, stages):
    sizes = {"epochs": 3, "batch_size": 100, "finetune_epochs": 2, "finetune_batch_size": 50}
    config = config_from_dict({**sizes, **options}, "here")
    images = SimpleNamespace(num_train_batches=lambda size: 1000 // size)
    data, run = SimpleNamespace(train=images), SimpleNamespace(phase=stages[0].name)
    assert trainers.schedule.stages(run, config, data) == stages
