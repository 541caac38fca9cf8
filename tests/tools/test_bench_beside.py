"""The bench: the networks beside the three, and what a GPU is asked for. On a CPU with stand-ins."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.stand_in_recorder import StandIn
from tests.tools.benches import CPU, SMALL, bench_of
from tests.toy import one_thread  # noqa: F401  (a fixture)
from tools import bench, bench_measures
from tools.bench_measures import StepTime, peak_on_gpu, time_of
from tools.bench_networks import Network
from trainers.replay import WARM_UP
from utils.run import checkpoint

TINY = ("--arch", "resnet8_he", "--keep-ratio", "0.4")
ON_GPU = SimpleNamespace(type="cuda")


# ---- the networks ----


@pytest.mark.parametrize(("name", "recordings"), [("dense", 1), ("thin", 2)])
def test_recorded_steps_are_the_ordinary_ones(name, recordings):
    recorder = StandIn()
    trial = bench_of(*TINY, recorder=lambda device: recorder)
    recorded, plain = trial.build(f"{name}, CUDA graph"), trial.build(name)
    for passes in ([2], [2], [1], [2]):  # another number of passes of thin is another recording
        trial.num_passes = passes
        before = recorder.warmed
        recorded.step()
        for _ in range(1 + recorder.warmed - before):
            plain.step()
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (recordings * WARM_UP, recordings, 4)
    states = [network.run.network.model.state_dict() for network in (recorded, plain)]
    assert checkpoint.differences(*states) == []
    assert recorded.costs == plain.costs


def test_the_dense_network_is_compiled_in_the_mode_that_its_name_says(monkeypatch):
    modes, marks = [], []
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: modes.append((mode, self)))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(0))
    trial = bench_of(*TINY, "--score-every", "2")
    compiled, plain = trial.build("dense, compiled with CUDA graphs"), trial.build("dense")
    assert modes == [("reduce-overhead", compiled.run.network.model)]
    trial.build("dense, compiled")
    assert modes[1][0] == "default"
    for network in (compiled, plain):
        network.step()
    assert len(marks) == 2
    states = [network.run.network.model.state_dict() for network in (compiled, plain)]
    assert checkpoint.differences(*states) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("default")
def test_a_compiled_step_is_near_the_ordinary_one():
    trial = bench_of(*TINY)
    compiled, plain = trial.build("dense, compiled"), trial.build("dense")
    for network in (compiled, plain):
        network.step()
    for name, value in plain.run.network.model.state_dict().items():
        torch.testing.assert_close(compiled.run.network.model.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_compact_runs_with_either_kind_of_shapes_and_is_named_after_it():
    trial = bench_of(*TINY, "--shapes", "fixed")
    assert trial.further(["shapes"]) == ["compact, shapes drawn"]
    assert trial.further(["compiled", "shapes"]) == ["dense, compiled", "compact, shapes drawn"]
    trial.device = ON_GPU
    graphs = ["dense, CUDA graph", "thin, CUDA graph"]
    replayed = "compact, shapes fixed, CUDA graphs"
    assert trial.further(["graphs", "shapes"]) == [*graphs, "compact, shapes drawn", replayed]
    trial.device = CPU
    fixed, drawn = trial.build("compact"), trial.build("compact, shapes drawn")
    masks = [network.run.search.masks.own_KU for network in (fixed, drawn)]
    assert torch.equal(*masks)
    for network in (fixed, drawn):
        network.step()
    assert [network.execution for network in (fixed, drawn)] == ["compact, shapes fixed", "compact, shapes drawn"]
    assert fixed.run.network.shapes is not None
    fixed.replay = SimpleNamespace(failed=False)
    assert fixed.execution == "compact, shapes fixed, CUDA graphs"
    fixed.replay.failed = True
    assert fixed.execution == "compact, shapes fixed"
    assert len(fixed.unfit) == 1
    assert drawn.unfit == []
    masked = bench_of(*TINY, "--execution", "masked").build("compact")
    masked.step()
    assert masked.execution == "compact"


# ---- figures ----


def test_shapes_that_libraries_have_not_seen_are_counted_over_the_timed_steps():
    trial = bench_of(*TINY, "--K", "3", "--score-every", "2")
    compact = trial.build("compact")
    for _ in range(2):
        compact.step()
    assert [len(passes) for passes in compact.widths] == [4, 4]  # 3 masks, then 1
    graph = compact.run.network.graph
    width = np.array([space.width for space in graph.spaces])
    (other,) = [i for i, space in enumerate(graph.spaces) if not space.full][:1]
    changed = width.copy()
    changed[other] += 1
    readers = [op for op in graph.ops if op.kind in ("conv", "linear")]
    touching = sum(other in (op.space, graph.ops[op.inputs[0]].space) for op in readers)
    assert 0 < touching < len(readers)
    compact.widths = [[width], [changed, width], [width, width]]
    assert compact.new_shapes(2) == pytest.approx(touching / (4 * len(readers)))
    assert compact.new_shapes(1) == 0
    assert compact.new_shapes(3) == pytest.approx((len(readers) + touching) / (5 * len(readers)))
    assert trial.build("dense").new_shapes(1) is None


def test_figures_of_further_networks_and_remarks_reach_the_table_and_the_last_line(monkeypatch, capsys):
    further = ["dense, compiled", "thin, CUDA graph", "compact, shapes fixed"]
    seconds = dict(zip(("dense", "compact", "thin", *further), (0.8, 0.4, 0.2, 0.6, 0.1, 0.5), strict=True))

    def made_up(steps, repeats, device, warm_up):
        assert list(steps) == list(seconds)
        for _ in range(2):
            steps["compact"]()
        return {name: [StepTime(value, value / 4)] * repeats for name, value in seconds.items()}

    build, made = bench.Bench.build, {}

    def built(self, name):
        if name == "dense, CUDA graph":
            return Network(None, lambda: (_ for _ in ()).throw(RuntimeError("no room for it\nsecond line")), [])
        if name in made or (name.split(",")[0] in ("dense", "thin") and "," in name):
            return made[name.split(",")[0]]
        network = made[name] = build(self, name)
        if name == "compact, shapes fixed":
            network.unfit = [torch.tensor(1.0)] * 4
            step = network.step
            network.step = lambda: (step(), network.unfit.extend([torch.tensor(0.25), torch.tensor(0.5)]))
        return network

    monkeypatch.setattr(bench.Bench, "build", built)
    monkeypatch.setattr(bench, "interleaved_times", made_up)
    monkeypatch.setattr(Network, "new_shapes", lambda self, timed: 0.125 if timed == 2 and self.widths else None)
    monkeypatch.setattr(bench, "further_networks", lambda *_: [*further[:1], "dense, CUDA graph", *further[1:]])
    peaks = []

    def peak(trial, name, argv):
        peaks.append(name)
        return {"peak_mb": 100.0 + len(peaks), "baseline_mb": 7.0}

    monkeypatch.setattr(bench, "measure_peak", peak)
    assert bench.main([*SMALL[2:], *TINY, "--repeats", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert figures["left_out"] == {"dense, CUDA graph": "no room for it"}
    assert "dense, CUDA graph is left out, because it cannot run here: no room for it" in lines
    ratios = {
        **{"dense/compact": 2, "compact/thin": 2, "dense/thin": 4, "dense, compiled/compact": 1.5},
        **{"compact/thin, CUDA graph": 4, "compact, shapes fixed/compact": 1.25},
    }
    for name, ratio in ratios.items():
        assert figures[name] == pytest.approx(ratio), name
        assert f"{name}: {ratio:.2f}" in lines
    assert figures["networks"]["compact"]["new_shapes"] == 0.125
    assert any(line.startswith("compact, shapes drawn: 12.5 % of the layers") for line in lines)
    assert figures["networks"]["compact, shapes fixed"]["unfit_steps"] == pytest.approx(0.375)
    assert "compact, shapes fixed: the masks of 37.5 % of the timed steps did not fit" in lines
    # memory of a compiled network on a CPU would be that of the compiler
    assert peaks == ["dense", "compact", "thin", "dense, CUDA graph", "thin, CUDA graph", "compact, shapes fixed"]
    assert figures["networks"]["thin, CUDA graph"]["peak_mb"] == 105
    assert figures["networks"]["dense, compiled"]["peak_mb"] is None
    table = {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}
    assert list(table)[2:] == ["dense", "compact, shapes drawn", "thin", *further]
    assert "105 (7 before)" in table["thin, CUDA graph"]
    assert [cell.strip() for cell in table["dense, compiled"].split("|")][2:6] == [
        "600.0 (600.0-600.0)",
        "600.0",
        "150.0",
        "-",
    ]


# ---- what a GPU is asked for ----


@pytest.fixture
def card(monkeypatch):
    """A stand-in for `torch.cuda` with a clock: what it was asked for, in order."""
    at = SimpleNamespace(now=0.0, asked=[], allocated=3 * 2**20, peak=0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            at.asked.append("record")
            self.at = at.now

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at) + 70  # what is left to do when the host has gone on

    def synchronize(device):
        at.asked.append("wait")
        at.now += 5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: at.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: at.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(at, "peak", at.allocated))
    monkeypatch.setattr(bench_measures.time, "perf_counter", lambda: at.now)
    return at


def test_host_and_device_are_timed_apart(card):
    def step():
        card.asked.append("step")
        card.now += 2

    assert time_of(step, ON_GPU) == pytest.approx(StepTime(total=2 + 5, host=2, device=2.07))
    assert card.asked == ["wait", "record", "step", "record", "wait"]
    assert time_of(step, CPU) == StepTime(2, 2, None)


def test_peak_memory_on_a_gpu_is_that_of_the_steps_of_one_network(card):
    steps = []

    def build(name):
        card.peak = 900 * 2**20  # while it is built
        card.allocated += 10 * 2**20

        def step():
            steps.append(name)
            card.peak = max(card.peak, card.allocated + len(steps) * 2**20)

        return Network(None, step, [])

    trial = SimpleNamespace(device=ON_GPU, build=build)
    assert peak_on_gpu(trial, "thin") == {"peak_mb": 13 + len(steps), "baseline_mb": 3}
    assert len(steps) > WARM_UP + 1  # a step is recorded after those of warm-up, and replayed
    assert bench_measures.measure_peak(trial, "thin", ["no process is started"])["baseline_mb"] == 13


def test_on_a_gpu_the_fair_opponents_are_timed_unless_they_are_not_wanted(monkeypatch):
    trial = bench_of(*TINY)
    trial.device = ON_GPU

    def further(*words: str) -> list[str]:
        settings, _ = bench.read_command_line([*SMALL, *words])
        return bench.further_networks(settings, trial)

    compiled = ["dense, compiled", "dense, compiled with CUDA graphs"]
    assert further() == [*compiled, "dense, CUDA graph", "thin, CUDA graph"]
    assert further("--beside", "compiled") == compiled
    assert further("--beside", "none") == []
    trial.device = CPU
    assert further() == []


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--beside graphs", "--beside graphs needs a CUDA device"),
        ("--beside everything", "invalid choice"),
        ("--beside none shapes", "none goes with nothing else"),
        ("--shapes fixed --cuda-graphs on --warm-up 3", "pass --warm-up 4 or more"),
        ("--shapes fixed --cuda-graphs on", "--cuda-graphs on needs a CUDA device"),
        ("--count-ops vgg17", "did you mean 'vgg1"),
        ("--count-ops --repeats 3", "--repeats (command line) has no effect with --count-ops"),
        ("--count-ops --shapes fixed", "--shapes (command line) has no effect with --count-ops"),
        ("--count-ops --batch-size 3", "--batch-size (command line) has no effect with --count-ops"),
        ("--count-ops --method gumbel", "--count-ops runs compact with either value of --shapes, which method gumbel"),
        ("--beside shapes --execution masked", "masked execution does not read"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(words, part, capsys):
    assert bench.main(["--arch", "resnet8_he", "--device", "cpu", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert part in error, error
