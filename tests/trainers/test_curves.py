"""Curves, pictures and the HParams tab of TensorBoard, scores.npz and the clocks; also of a run that was resumed."""

import io
import itertools
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

import trainers.curves
from args import OPTIONS, parse_args
from tests.tiny import (
    BATCH,
    FINETUNE,
    FINETUNE_STEPS,
    SEARCH,
    STEPS,
    Pass,
    Run,
    Save,
    kept_mask,
    make_images,
    run,
    scores_of,
)
from utils.run.board import labelled_rows

CURVES = {  # column of results.csv -> curve in TensorBoard
    **{
        f"{part}_{name}": f"{part}/{name}" for part in ("train", "heldout", "test") for name in ("loss", "top1", "top5")
    },
    "budget": "sparsity/budget",
    "keep_ratio_expected": "sparsity/keep_ratio_expected",
    "keep_ratio_drawn": "sparsity/keep_ratio_drawn",
    "v": "scores/v",
    "max_score": "scores/max",
    "score_entropy": "scores/entropy_bits",
    "share_zero": "scores/share_exactly_0",
    "share_one": "scores/share_exactly_1",
    "entropy_left": "scores/entropy_left",
    "top_agreement": "scores/top_agreement",
    "loss_difference": "vrpge/loss_difference",
    "unfit_steps": "vrpge/unfit_steps",
    "forward_flops_ratio": "flops/forward_ratio",
    "forward_flops_ratio_mean": "flops/forward_ratio_running_mean",
    "subnet_flops_ratio": "flops/subnet_ratio",
    "train_flops_ratio": "flops/train_ratio",
    "train_flops_executed": "flops/train_executed",
    "weight_lr": "lr/weights",
    "score_lr": "lr/scores",
    "images_per_second": "perf/images_per_second",
    "step_ms": "perf/step_ms",
    "evaluation_seconds": "perf/evaluation_seconds",
}
OF_THE_SEARCH = (
    *("budget", "keep_ratio_expected", "keep_ratio_drawn", "v", "max_score", "score_entropy", "share_zero"),
    *("share_one", "entropy_left", "top_agreement", "loss_difference", "unfit_steps", "score_lr"),
)
WITHIN_EPOCHS = {  # curves with points within an epoch
    *("steps/train_loss", "steps/train_top1", "lr/weights", "lr/scores", "sparsity/budget"),
    *("sparsity/keep_ratio_expected", "progress/epoch", "progress/phase"),
}
RESULTS = {
    f"result/{name}": name for name in ("test_top1", "heldout_top1", "flops_ratio", "train_flops_ratio", "seconds")
}
# large steps of the scores: some are exactly 0 or 1 at the end of an epoch
SETTINGS = {
    "shapes": "fixed",
    "budget_schedule": "cubic",
    "score_lr": 0.3,
    "lr_policy": "cosine_lr",
    "warmup_length": 0,
    "seed": 3,
}
# With two points an epoch: after every second step of the search and every fourth one of fine-tuning.
EPOCH_ENDS = [STEPS, 2 * STEPS, 2 * STEPS + FINETUNE_STEPS]
SEARCH_POINTS = [0, 2, 4, 6, 8]
POINTS = [*SEARCH_POINTS, 12, 16]


@pytest.fixture(scope="module", autouse=True)
def two_points_an_epoch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers.curves, "POINTS_PER_EPOCH", 2)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def done(images, tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("curves"), images, batch_seconds=0.5, **SETTINGS)


@pytest.fixture(scope="module")
def parts(images, tmp_path_factory) -> Run:
    """The same run. It goes on from an epoch before its end, and is stopped between two points of both phases."""
    root, same = tmp_path_factory.mktemp("parts"), {"batch_seconds": 0.5, **SETTINGS}
    first = run(root, images, interrupt_at=STEPS + 2, **same)
    earlier = str(first.folder / "checkpoints/epoch_1.pt")
    wait_for_the_next_second()
    second = run(root, images, "--resume", earlier, interrupt_at=2, **same)
    wait_for_the_next_second()
    third = run(root, images, "--resume", interrupt_at=5, **same)
    wait_for_the_next_second()
    assert [each.code for each in (first, second, third)] == [130] * 3
    (third.folder / "scores.npz").unlink()
    return run(root, images, "--resume", **same)


def wait_for_the_next_second() -> None:
    """TensorBoard reads the files of a run in the order of their names, which tell of time only the second."""
    time.sleep(1 - time.time() % 1)


def events_of(each: Run) -> EventAccumulator:
    return events_in(each.folder)


@cache
def events_in(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def curve(each: Run, tag: str) -> dict[int, float]:
    points = [(event.step, event.value) for event in events_of(each).Scalars(tag)]
    assert len(dict(points)) == len(points), f"{tag} has two points at a step"
    return dict(points)


def close(values: object) -> object:
    return pytest.approx(values, rel=1e-5, abs=1e-6)


# ---- curves ----


def test_the_columns_of_the_search_are_empty_in_fine_tuning(done):
    for name in CURVES:
        filled = [row[name] != "" for row in done.rows]
        assert filled == [True] * SEARCH + [name not in OF_THE_SEARCH] * FINETUNE, name


def test_every_column_is_a_curve_with_a_point_at_the_last_step_of_each_epoch(done):
    events = events_of(done)
    assert [int(row["step"]) for row in done.rows] == EPOCH_ENDS
    for column, tag in CURVES.items():
        points = {event.step: event.value for event in events.Scalars(tag)}
        told = {int(row["step"]): float(row[column]) for row in done.rows if row[column]}
        assert {step: points[step] for step in told} == pytest.approx(told, rel=1e-6), column
        assert tag in WITHIN_EPOCHS or set(points) == set(told), column
    waits = [100 * float(row["data_seconds"]) / float(row["epoch_seconds"]) for row in done.rows]
    assert curve(done, "perf/data_wait_percent") == close(dict(zip(EPOCH_ENDS, waits, strict=True)))
    layers = {f"layers/{name}" for name in done.scores["names"]}
    named = {*CURVES.values(), "perf/data_wait_percent", *WITHIN_EPOCHS, *layers, *RESULTS}
    assert set(events.Tags()["scalars"]) == named


def test_the_curves_within_an_epoch_are_those_of_the_steps(done):
    passes, weights = done.record.passes("graph"), done.record.steps("weights")
    scores = [step.before[0] for step in done.record.steps("scores")]
    scores = [*scores, scores_of(done.load(f"epoch_{SEARCH}.pt"))]  # of 0, 1, 2 ... finished steps
    means, hits = {}, {}
    for start, end in itertools.pairwise(POINTS):
        own = passes[start:end]
        count = sum(len(p.images) for p in own)
        means[end] = sum(p.loss * len(p.images) for p in own) / count
        hits[end] = 100 * sum(p.hits(1) for p in own) / count
    assert curve(done, "steps/train_loss") == close(means)
    assert curve(done, "steps/train_top1") == close(hits)
    of_step = {point: max(point - 1, 0) for point in POINTS}  # the settings are those of the last step
    assert curve(done, "lr/weights") == close({point: weights[i].group["lr"] for point, i in of_step.items()})
    steps = done.record.steps("scores")
    assert curve(done, "lr/scores") == close({point: steps[of_step[point]].group["lr"] for point in SEARCH_POINTS})
    assert len({step.group["lr"] for step in steps}) == len(steps)
    assert curve(done, "sparsity/keep_ratio_expected") == close(
        {point: float(scores[point].double().mean()) for point in SEARCH_POINTS}
    )
    fall = {point: max(0, 1 - of_step[point] / (SEARCH * STEPS) / 0.4) ** 3 for point in SEARCH_POINTS}
    assert curve(done, "sparsity/budget") == close({point: 0.5 + 0.5 * left for point, left in fall.items()})
    assert curve(done, "progress/epoch") == {0: 0, 2: 0.5, 4: 1, 6: 1.5, 8: 2, 12: 2.5, 16: 3}
    assert curve(done, "progress/phase") == {point: float(point > SEARCH * STEPS) for point in POINTS}

    record = done.scores
    for name, first, width in zip(record["names"], record["first_unit"], record["widths"], strict=True):
        expected = {point: float(scores[point][first : first + width].double().mean()) for point in SEARCH_POINTS}
        kept = dict.fromkeys(POINTS[len(SEARCH_POINTS) :], float(record["chosen"][first : first + width].mean()))
        assert curve(done, f"layers/{name}") == close(expected | kept)


def test_the_curves_of_a_resumed_run_are_those_of_one_that_was_not_stopped(done, parts):
    whole, resumed = events_of(done), events_of(parts)
    assert whole.Tags()["scalars"] == resumed.Tags()["scalars"]
    for tag in whole.Tags()["scalars"]:
        one, other = ([(e.step, e.value) for e in events.Scalars(tag)] for events in (whole, resumed))
        assert one == other, tag
    for tag in whole.Tags()["images"]:
        one, other = ([(e.step, e.encoded_image_string) for e in events.Images(tag)] for events in (whole, resumed))
        assert one == other, tag


def test_an_epoch_has_ten_points_or_one_after_every_step(monkeypatch):
    monkeypatch.setattr(trainers.curves, "POINTS_PER_EPOCH", 10)
    due = {
        n: [step for step in range(1, n + 1) if trainers.curves.is_point_due(step, n)] for n in (1, 4, 15, 100, 5004)
    }
    assert (due[1], due[4], due[15]) == ([], [1, 2, 3], list(range(1, 15)))
    assert due[100] == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert due[5004] == list(range(500, 5004, 500))


def test_five_classes_have_no_top5(images, tmp_path):
    for part in ("train", "test"):
        (tmp_path / "five" / part).mkdir(parents=True)
        for label in range(5):
            name = f"class{label}"
            (tmp_path / "five" / part / name).symlink_to(images / part / name, target_is_directory=True)
    few = run(tmp_path, tmp_path / "five", "--no-finetune", method="thin", epochs=1)
    assert few.code == 0
    assert [name for name, value in few.rows[0].items() if "top1" in name and value] != []
    assert [name for name, value in few.rows[0].items() if "top5" in name and value] == []
    assert [tag for tag in events_of(few).Tags()["scalars"] if "top5" in tag] == []


# ---- pictures, texts, and the HParams tab ----


def test_the_maps_show_the_scores_and_the_chosen_subnet(done):
    record, events = done.scores, events_of(done)

    def parts_of(values: np.ndarray) -> dict[str, torch.Tensor]:
        spans = zip(record["names"], record["first_unit"], record["widths"], strict=True)
        return {name: torch.from_numpy(values[first : first + width]) for name, first, width in spans}

    assert [event.step for event in events.Images("score_map")] == [0, *EPOCH_ENDS[:SEARCH]]
    (event,) = events.Images("chosen_subnet")
    assert event.step == SEARCH * STEPS
    seen = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    np.testing.assert_array_equal(seen, labelled_rows(parts_of(record["chosen"])))


def test_the_end_of_the_search_and_the_result_are_texts(done):
    events = events_of(done)
    (phase,), (summary,) = (events.Tensors(f"{tag}/text_summary") for tag in ("phase", "summary"))
    assert (phase.step, summary.step) == (SEARCH * STEPS, EPOCH_ENDS[-1])
    assert b"ended at step 8, after 2 epochs" in phase.tensor_proto.string_val[0]
    assert f"test_top1: {done.summary['test_top1']}".encode() in summary.tensor_proto.string_val[0]


def test_the_hparams_tab_has_each_run_once_with_its_options_and_results(done, parts, images, tmp_path):
    dense = run(tmp_path, images, "--no-finetune", method="dense", epochs=1, clip_norm=3.5)
    multiplexer = EventMultiplexer().AddRun(str(parts.folder), "parts").AddRun(str(dense.folder), "dense").Reload()
    provider = MultiplexerDataProvider(multiplexer, "unused")
    context, request = backend_context.Context(TBContext(data_provider=provider)), RequestContext()
    columns = list(trainers.curves.RESULTS.values())
    asked = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=list(api_pb2.Status.values()),
        col_params=[api_pb2.ColParams(metric=api_pb2.MetricName(tag=tag)) for tag, _ in columns],
        slice_size=10,
    )
    experiment = get_experiment.Handler(request, context, "", api_pb2.GetExperimentRequest(include_metrics=True)).run()
    names = [info.name for info in experiment.hparam_infos]
    assert set(names[:5]) == {"method", "arch", "keep_ratio", "epochs", "seed"}
    assert [info.name.tag for info in experiment.metric_infos] == list(RESULTS)
    found = list_session_groups.Handler(request, context, "", asked).run()
    groups = {group.name: group for group in found.session_groups}
    assert set(groups) == {"parts", "dense"}
    for each, (name, group) in zip((dense, parts), sorted(groups.items()), strict=True):
        (session,) = group.sessions
        assert session.status == api_pb2.STATUS_SUCCESS, name
        metrics = {value.name.tag: value.value for value in session.metric_values}
        assert metrics == close({tag: each.summary[key] for tag, key in RESULTS.items()}), name

    def value(run_name: str, option: str) -> object:
        told = dict(groups[run_name].hparams).get(option)
        return told and getattr(told, told.WhichOneof("kind"))

    told = {name: value("parts", name) for name in names}
    assert {key: told[key] for key in ("method", "arch", "keep_ratio", "epochs", "seed", "score_lr", "batch_size")} == {
        **{"method": "vrpge", "arch": "resnet8_he", "keep_ratio": 0.5, "epochs": SEARCH, "seed": 3, "score_lr": 0.3},
        "batch_size": BATCH,
    }
    assert (value("dense", "method"), value("dense", "score_lr"), value("dense", "keep_ratio")) == ("dense", None, None)
    assert "clip_norm=3.5" in value("dense", "others").split(", ")
    assert "clip_norm" not in told["others"]


def test_every_option_that_differs_is_in_the_hparams_tab():
    words = ["--method", "vrpge", "--K", "4", "--bn-batches", "7", "--name", "x", "--data", "/x", "--set", "CIFAR10"]
    told = trainers.curves.hyperparameters(parse_args(words).config)
    assert told["others"].split(", ") == ["K=4", "bn_batches=7"]
    assert told["estimator"] == OPTIONS["estimator"].default
    assert set(told) <= set(trainers.curves.columns())


# ---- the record of the scores ----


def test_the_record_of_the_scores_is_that_of_the_checkpoints(done):
    record, states = done.scores, [done.load(f"epoch_{epoch}.pt") for epoch in range(1, SEARCH + 1)]
    first = done.record.steps("scores")[0].before[0]  # the state before the first step
    expected = torch.stack([first, *map(scores_of, states)]).half().numpy()
    assert record["scores"].dtype == np.float16
    np.testing.assert_array_equal(record["scores"], expected)
    assert (record["epochs"].dtype, record["epochs"].tolist()) == (np.int64, [0, 1, 2])
    assert record["chosen"].dtype == bool
    np.testing.assert_array_equal(record["chosen"], kept_mask(done.load("best.pt")))
    # every layer's part of the flat vector, by its name
    layers = {name.removesuffix(".scores"): t for name, t in states[-1]["model"].items() if name.endswith(".scores")}
    assert record["names"].tolist() == list(layers)
    for name, start, width in zip(record["names"], record["first_unit"], record["widths"], strict=True):
        np.testing.assert_array_equal(record["scores"][-1, start : start + width], layers[name].half().numpy())
    assert record["first_unit"].dtype == record["widths"].dtype == np.int64


def test_the_record_goes_on_where_a_run_was_stopped(done, parts):
    """The resumed run has lost the file, and takes the earlier scores from its checkpoint."""
    record, resumed = done.scores, parts.scores
    assert set(record) == set(resumed)
    for name, values in record.items():
        np.testing.assert_array_equal(resumed[name], values)


# ---- clocks ----


def test_clocks_go_on_where_a_run_was_stopped(done, parts):
    assert parts.code == done.code == 0
    steps, evaluations = SEARCH * STEPS + FINETUNE * FINETUNE_STEPS, len(done.record.passes("evaluation"))
    for each in (done, parts):
        assert each.summary["train_seconds"] == 1.5 * steps  # half a second more until its batch is there
        assert each.summary["seconds"] == 1.5 * steps + evaluations / 4
        assert each.column("epoch_seconds") == [1.5 * STEPS] * SEARCH + [1.5 * FINETUNE_STEPS] * FINETUNE
        assert each.column("data_seconds") == [0.5 * STEPS] * SEARCH + [0.5 * FINETUNE_STEPS] * FINETUNE


def test_evaluation_has_a_clock_of_its_own(done):
    """Before the row is written: the choice of the subnet comes later."""
    for row, events in zip(done.rows, done.record.epochs(), strict=True):
        before = events[: next(i for i, event in enumerate(events) if isinstance(event, Save))]
        passes = [event for event in before if isinstance(event, Pass) and event.kind == "evaluation"]
        assert passes
        assert float(row["evaluation_seconds"]) == len(passes) / 4
