"""Steps that are recorded and replayed are those that run as they are, bit by bit; on a stand-in for CUDA graphs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from args import config_from_dict
from tests.channels.registry import images_and_labels, network_of
from tests.stand_in_recorder import StandIn
from tests.toy import config, one_thread, search_of  # noqa: F401
from trainers.cuda_graphs import make_replay
from trainers.default import StepSettings, stored_masks, train_step
from trainers.replay import WARM_UP, Replay
from trainers.state import Search
from utils.algorithm.optimizer import FusedSGD
from utils.channels.shrink import drop_dead_units

ARCH = ("resnet8_he", 0.25)


def search_in(replay: Replay | None, arch: tuple[str, float] = ARCH, score: float = 0.5, **options) -> Search:
    network = network_of(*arch, multiple=2)
    network.scores.data.fill_(score)
    weights = FusedSGD(network.weight_parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    search = search_of(network, config(**options), weight_optimizer=weights)
    search.replay = replay
    network.fix_shapes()
    return search


def state_of(search: Search) -> dict[str, torch.Tensor]:
    momenta = [state["momentum_buffer"] for state in search.weight_optimizer.state.values()]
    return {
        **search.network.model.state_dict(),
        "scores": search.network.scores,
        "masks": search.masks.own_KU,
        **{f"momentum {number}": value for number, value in enumerate(momenta)},
    }


def assert_same_steps(search: Search, eager: Search, steps: int, first: int = 0, **options) -> None:
    for step in range(first, first + steps):
        now = StepSettings(
            (1 + step) / 64, 0.05, keep_ratio=0.4, update_scores=step % options.get("score_every", 1) == 0
        )
        batch = images_and_labels(4, step)
        one, other = (train_step(each, *batch, now, config(**options)).metrics for each in (search, eager))
        assert {name: float(value) for name, value in one.items()} == {n: float(v) for n, v in other.items()}
    expected = state_of(eager)
    for name, value in state_of(search).items():
        assert torch.equal(value, expected[name]), name
    assert search.weight_optimizer.param_groups[0]["lr"] == eager.weight_optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("arch", [ARCH, ("vgg16", 0.0625)], ids=lambda arch: arch[0])
def test_replayed_steps_are_those_that_run_as_they_are(arch):
    """Batches, masks and learning rates change from step to step."""
    recorder = StandIn()
    search, eager = search_in(Replay(recorder), arch), search_in(None, arch)
    assert_same_steps(search, eager, WARM_UP + 3)
    assert (recorder.warmed, recorder.recorded) == (2 * WARM_UP, 2)
    assert recorder.replayed >= 4
    assert recorder.replayed % 2 == 0
    assert not search.replay.failed


def test_steps_are_recorded_anew_when_units_leave_and_only_then():
    recorder = StandIn()
    search, eager = search_in(Replay(recorder)), search_in(None)
    assert_same_steps(search, eager, WARM_UP + 2)
    for each in (search, eager):
        each.network.scores.data[::3] = 0
        each.score_optimizer.state.clear()
        assert drop_dead_units(each.network, each.score_optimizer, each.weight_optimizer) > 10
        each.network.fix_shapes()
    search.masks, eager.masks = (
        stored_masks(each.masks.own_KU & torch.from_numpy(each.network.stored_units), config(), each.network.device)
        for each in (search, eager)
    )
    assert_same_steps(search, eager, WARM_UP + 2, first=5)
    assert (recorder.warmed, recorder.recorded) == (4 * WARM_UP, 4)
    shapes = search.network.shapes
    search.network.fix_shapes(shapes.slots)
    assert search.network.shapes is shapes
    eager.network.fix_shapes(eager.network.shapes.slots)
    assert_same_steps(search, eager, 2, first=10)
    assert recorder.recorded == 4


def test_steps_that_do_not_fit_run_as_they_are():
    recorder = StandIn()
    search, eager = search_in(Replay(recorder), score=0.15), search_in(None, score=0.15)
    assert_same_steps(search, eager, WARM_UP + 1)
    replayed = recorder.replayed
    for each in (search, eager):
        wide_KU = torch.ones_like(each.masks.own_KU)
        wide_KU[1, 0] = False
        each.masks = stored_masks(wide_KU, config(), each.network.device)
    assert_same_steps(search, eager, 1, first=4)
    assert recorder.replayed == replayed
    assert_same_steps(search, eager, 1, first=5)
    assert (recorder.replayed, recorder.recorded) == (replayed + 2, 2)


def test_each_number_of_passes_has_a_recording_of_its_own():
    """Three masks, of which two may be the same, and steps that leave the scores alone."""
    recorder, options = StandIn(), {"K": 3, "score_every": 2}
    search, eager = search_in(Replay(recorder), **options), search_in(None, **options)
    assert_same_steps(search, eager, 2 * WARM_UP + 4, **options)
    assert recorder.recorded == 4
    for each in (search, eager):
        each.masks = stored_masks(each.masks.own_KU[[0, 1, 0]], config(**options), each.network.device)
    assert_same_steps(search, eager, 1, first=2 * WARM_UP + 4, **options)
    assert recorder.warmed == 2 * 2 * WARM_UP + 2


@pytest.mark.parametrize("fails", [0, 1])
def test_a_step_that_cannot_be_recorded_runs_as_it_is_and_one_line_says_so(fails, capsys):
    recorder = StandIn(fails)
    search, eager = search_in(Replay(recorder)), search_in(None)
    assert_same_steps(search, eager, WARM_UP + 3)
    assert search.replay.failed
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (2 * WARM_UP, 0, 0)
    said = [line for line in capsys.readouterr().out.splitlines() if "replayed" in line]
    assert len(said) == 1
    assert "cannot be replayed (no memory for another graph); training goes on without CUDA graphs" in said[0]


def test_an_operation_that_waits_for_the_device_cannot_be_recorded(monkeypatch):
    import trainers.default

    search, eager, backward = search_in(Replay(StandIn())), search_in(None), trainers.default.backward_
    monkeypatch.setattr(trainers.default, "backward_", lambda *a: (backward(*a), float(a[1].detach())))
    assert_same_steps(search, eager, WARM_UP + 2)
    assert search.replay.failed


def test_nothing_is_computed_while_a_step_is_recorded():
    recorder, value = StandIn(), torch.ones(3)
    held = []
    (again,) = recorder.record(lambda: held.append(value.add_(1) * 2))
    assert value.tolist() == [1, 1, 1]
    assert held[0].isnan().all()
    again()
    assert (value.tolist(), held[0].tolist()) == ([2, 2, 2], [4, 4, 4])


# ---- when steps are replayed ----


def given(**options) -> SimpleNamespace:
    network = SimpleNamespace(device=torch.device(options.pop("device", "cpu")))
    estimator = SimpleNamespace(needs_gates=options.pop("gates", False))
    values = {"shapes": "fixed", "cuda_graphs": "on", "estimator": "vrpge", **options}
    return SimpleNamespace(network=network, estimator=estimator), config_from_dict(values, "test")


@pytest.mark.parametrize(
    "options", [{"cuda_graphs": "auto"}, {"cuda_graphs": "off"}, {"shapes": "drawn"}, {"shapes": "auto"}]
)
def test_steps_are_not_replayed_unless_somebody_asks(options):
    assert make_replay(*given(device="cuda", **options)) is None


@pytest.mark.parametrize(
    ("ranks", "gates", "reason"),
    [(2, False, "several processes exchange"), (1, True, "estimator vrpge reads gradients within a step")],
)
def test_a_step_that_does_more_is_not_replayed_and_one_line_says_so(monkeypatch, capsys, ranks, gates, reason):
    monkeypatch.setattr("trainers.cuda_graphs.num_ranks", lambda: ranks)
    assert make_replay(*given(device="cuda", gates=gates)) is None
    assert reason in capsys.readouterr().out


def test_the_options_are_refused_where_they_have_no_effect(program, capsys):
    assert program("--shapes", "fixed", "--cuda-graphs", "on", "--device", "cpu") == 2
    assert "--cuda-graphs on needs a CUDA device, and this run is on cpu; leave it out" in capsys.readouterr().err
    assert program("--cuda-graphs", "on") == 2
    assert "cuda_graphs" in capsys.readouterr().err.replace("-", "_")
