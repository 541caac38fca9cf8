"""The measured parts of a step: which part gets which time. How fast a step is, is never asserted."""

from types import SimpleNamespace

import pytest
import torch

import trainers.default
from tests.tools.run_folder import write_run
from tools import step_times
from tools.bench_measures import WARM_UP_STEPS
from tools.bench_networks import NETWORKS, Bench
from tools.bench_options import read_command_line
from tools.run_files import read_run
from tools.step_times import PARTS, PartClock, StepTimes, measure_bench
from utils.channels.network import SparseNetwork
from utils.run import checkpoint

CPU = torch.device("cpu")
SMALL = ("--arch", "resnet8_he", "--width-mult", "0.25", "--batch-size", "4", "--device", "cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only goes on in the functions of a step: each costs a number of seconds of its own."""
    at = SimpleNamespace(now=0.0)

    def costs(owner, name, seconds):
        function = getattr(owner, name)

        def slow(*arguments, **by_name):
            at.now += seconds
            return function(*arguments, **by_name)

        monkeypatch.setattr(owner, name, slow)

    monkeypatch.setattr(step_times, "WARM_UP_STEPS", 1)
    costs(SparseNetwork, "__call__", 1)
    costs(trainers.default, "calculateGrad", 100)
    costs(trainers.default, "backward_", 1000)
    costs(trainers.default.StepResult, "of", 10000)  # the last thing that a step does
    monkeypatch.setattr(step_times.PartClock.__init__, "__defaults__", (lambda: at.now,))
    return at


@pytest.mark.parametrize(("words", "passes"), [((), 1), (("--K", "4"), 3)])
def test_every_part_gets_the_time_of_its_functions_alone(words, passes, clock):
    settings, config = read_command_line([*SMALL, *words])
    trial = Bench(config, SimpleNamespace(image_size=16, num_classes=4, channels=3), settings.scores, CPU)
    times = measure_bench(trial, repeats=2)
    assert times.batch_size == 4
    ends = {"backward": [1e6] * 2, "weight update": [1e7] * 2}
    told = {
        "dense": {"first pass": [1e3] * 2, "second pass": [0.0] * 2, "structure step": [0.0] * 2},
        "compact": {"first pass": [1e3] * 2, "second pass": [passes * 1e3] * 2, "structure step": [1e5] * 2},
        "thin": {"first pass": [1e3] * 2, "second pass": [passes * 1e3] * 2, "structure step": [0.0] * 2},
    }
    for name, parts in told.items():
        seen = dict(times.milliseconds[name])
        assert seen.pop("whole step") == [sum(values) for values in zip(*seen.values(), strict=True)]
        assert seen == parts | ends, name


def test_a_step_is_a_mean_over_the_period_of_the_scores(clock):
    settings, config = read_command_line([*SMALL, "--score-every", "2"])
    trial = Bench(config, SimpleNamespace(image_size=16, num_classes=4, channels=3), settings.scores, CPU)
    compact = measure_bench(trial, repeats=1).milliseconds["compact"]
    assert (compact["second pass"], compact["structure step"]) == ([500.0], [5e4])  # in every other step


def test_training_is_as_it_was_after_measuring(clock):
    settings, config = read_command_line([*SMALL])
    trial = Bench(config, SimpleNamespace(image_size=16, num_classes=4, channels=3), settings.scores, CPU)
    before = (trainers.default.losses_under, trainers.default.backward_)
    with PartClock(CPU).watching(trial):
        assert trainers.default.backward_ is not before[1]
    assert (trainers.default.losses_under, trainers.default.backward_) == before
    assert "training_step" not in vars(trial)


def test_warm_up_does_not_count_and_quartiles_are_those_of_the_rest(monkeypatch):
    parts = {part: [1.0, 2.0, 4.0, 8.0, 16.0] for part in PARTS}
    times = StepTimes({name: parts | {"whole step": [3.0] * 5} for name in NETWORKS}, 8, "a machine")
    assert times.quartiles("thin", "backward") == (2.0, 4.0, 8.0)
    assert times.rows()[1] == {
        "network": "compact",
        **dict.fromkeys(PARTS, "4.0 (2.0-8.0)"),
        "whole step": "3.0 (3.0-3.0)",
    }
    note = " ".join(times.note.split())
    assert f"5 steps on one random batch of 8 images after {WARM_UP_STEPS} that do not count" in note
    assert "a machine" in note


def test_a_run_is_measured_with_its_own_options_images_and_scores(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "a", best=False)
    config = read_command_line([*SMALL, "--keep-ratio", "0.25"])[1]
    shapes = SimpleNamespace(image_size=16, num_classes=4, channels=1)
    run = Bench(config, shapes, "late", CPU).masked_run()
    data = SimpleNamespace(
        fingerprint="abc", contents="abc", facts=lambda: {"image_size": 16, "class_names": list("abcd"), "channels": 1}
    )
    state = run.model_state(config, data) | {
        "images": data.facts(),
        "widths": dict.fromkeys(run.network.layers, 1),
    }
    checkpoint.save(folder / "checkpoints" / "best.pt", state)

    made = []
    monkeypatch.setattr(step_times, "measure_bench", lambda bench, repeats: made.append(bench))
    step_times.measure(read_run(folder))
    (trial,) = made
    assert trial.config.model == config.model
    assert trial.config.sparsity == config.sparsity
    assert (trial.images.shape, int(trial.labels.max()) < 4) == ((4, 1, 16, 16), True)
    assert torch.equal(trial.masked_run().network.scores, run.network.scores)
