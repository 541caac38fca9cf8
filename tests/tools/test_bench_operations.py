"""The operations of a training step that the bench counts."""

import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from tests.tools.benches import SMALL, bench_of
from tests.toy import one_thread  # noqa: F401  (a fixture)
from tools import bench, bench_operations
from tools.bench_networks import Bench
from tools.bench_operations import OperationCounter, StepCount, count_networks, count_steps


def test_views_and_memory_that_is_only_reserved_start_nothing():
    weight = torch.ones(2, 3, requires_grad=True)
    with OperationCounter() as counter:
        rows = weight.detach().t()[1:].view(2, 2).expand(3, 2, 2)  # a slice of a slice is a view as well
        room = torch.empty_like(rows)
        room.copy_(rows).add_(1)
        (weight * 2).sum().backward()  # backward: ones, which are expanded, times 2
        with torch.profiler.record_function("a mark, no operation"):
            int(room.new_zeros(()))
        counter.counts = False
        room.mul_(2)
    assert counter.started == Counter(copy_=1, add_=1, mul=2, sum=1, ones_like=1, new_zeros=1, _local_scalar_dense=1)
    seen = {name: counter.views[name] for name in ("t", "slice", "view", "empty_like")}
    assert seen == {"t": 1, "slice": 1, "view": 1, "empty_like": 1}
    assert counter.views["expand"] == 2


TINY = ("--arch", "resnet8_he", "--width-mult", "0.5")  # no mask leaves a layer empty


@pytest.fixture(autouse=True)
def two_steps(monkeypatch):
    monkeypatch.setattr(bench_operations, "STEPS", 2)


def test_a_step_is_counted_as_training_runs_it():
    trial = bench_of(*TINY)
    counts = count_networks(trial)
    layers = sum(isinstance(module, torch.nn.Conv2d) for module in trial.build("dense").run.network.model.modules())
    for name, count in counts.items():
        names, passes = count.names, 1 if name == "dense" else 2
        assert names["convolution"] == passes * layers, name
        assert names["convolution_backward"] == layers
        assert names["native_batch_norm"] == passes * names["native_batch_norm_backward"]
        assert names["_fused_sgd_"] == 1
        assert names.get("rand", 0) == names.get("sort", 0) == ("compact" in name)
        # the median of a sum is not the sum of medians
        assert sum(names.values()) == pytest.approx(count.operations, rel=0.05)
        assert sum(count.parts.values()) == pytest.approx(count.operations, rel=0.05)
        assert count.parts["backward"] > 2 * layers
    dense = counts["dense"]
    assert sum(dense.names.values()) == sum(dense.parts.values()) == dense.operations
    assert counts["compact, shapes fixed"].operations < counts["compact, shapes drawn"].operations
    assert counts["thin"].parts["rest"] == dense.parts["rest"]
    assert counts["compact, shapes fixed"].parts["rest"] > dense.parts["rest"] + 40


def test_the_batch_does_not_change_the_count_and_what_the_bench_does_around_a_step_is_left_out(monkeypatch):
    counts = [count_steps(bench_of(*TINY, "--batch-size", size), "dense") for size in ("2", "7")]
    assert counts[0] == counts[1]
    trial, build, cross_entropy = bench_of(*TINY, "--score-every", "2"), Bench.build, F.cross_entropy

    def extended(self, name):
        network = build(self, name)
        step = network.step
        network.step = lambda: (torch.ones(3).neg_(), step())
        return network

    monkeypatch.setattr(Bench, "build", extended)
    monkeypatch.setattr(F, "cross_entropy", lambda *a, **b: cross_entropy(*a, **b).acos())
    count = count_steps(trial, "compact, shapes fixed")
    assert "neg_" not in count.names
    assert count.names["acos"] == (2 + 1) / 2  # two passes, then one
    assert count.names["convolution_backward"] == counts[0].names["convolution_backward"]
    assert count.names["rand"] == 1
    assert count.names["sort"] == 1


NUMBERS = {"dense": (99, 5), "compact, shapes drawn": (500, 7), "compact, shapes fixed": (301, 8), "thin": (200, 6)}


def test_counts_of_every_network_reach_the_table_and_the_last_line(capsys, monkeypatch):
    def made_up(trial):
        assert (len(trial.labels), trial.config.sparsity.keep_ratio, trial.multiple) == (2, 0.3, 4)
        more = 1000 * (trial.config.model.arch == "vgg11")
        parts = {"forward": 70.0, "backward": 20.0, "rest": 9.6}
        return {name: StepCount(more + number, views, parts, {"add": 3.0}) for name, (number, views) in NUMBERS.items()}

    monkeypatch.setattr(bench, "count_networks", made_up)
    words = [word for word in SMALL if word not in ("--batch-size", "4")]
    words += ["--num-classes", "7", "--keep-ratio", "0.3", "--multiple", "4", "--count-ops", "resnet8_he", "vgg11"]
    assert bench.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0] == ["network", "step", "operations", "of thin", "views", "forward", "backward", "rest"]
    assert rows[2:6] == [
        ["resnet8_he", "dense", "99", "0.49", "5", "70", "20", "10"],
        ["resnet8_he", "thin", "200", "1.00", "6", "70", "20", "10"],
        ["resnet8_he", "compact, shapes drawn", "500", "2.50", "7", "70", "20", "10"],
        ["resnet8_he", "compact, shapes fixed", "301", "1.50", "8", "70", "20", "10"],
    ]
    assert rows[7][:4] == ["vgg11", "thin", "1200", "1.00"]
    figures = json.loads(lines[-1])
    assert figures["operations"]["vgg11"]["compact, shapes fixed"]["operations"] == 1301
    assert figures["operations"]["resnet8_he"]["dense"]["names"] == {"add": 3}
    assert (figures["num_classes"], figures["config"]["keep_ratio"]) == (7, 0.3)
    assert "medians of 2 steps" in " ".join(lines)
    assert "scores uniform, keep_ratio 0.3" in lines[1]
