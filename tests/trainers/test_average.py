"""Runs with `--ema`: averages by hand, and what is evaluated, stored, resumed and compared between ranks."""

from pathlib import Path

import pytest
import torch

from models import build_model
from tests.tiny import SEARCH, STEPS, Pass, Run, make_images, run
from trainers.state import RunState
from utils.run.checkpoint import differences

DECAY = 0.5
DENSE = {"method": "dense", "batch_size": 24, "epochs": 1, "finetune": "off"}  # three steps


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def dense(images, tmp_path_factory) -> tuple[Run, list[dict[str, torch.Tensor]]]:
    """A dense run, and the weights and statistics after each of its three steps."""
    seen, root = [], tmp_path_factory.mktemp("dense")
    move_average = RunState.move_average

    def watched(self: RunState, decay: float) -> None:
        assert decay == DECAY
        seen.append({name: value.clone() for name, value in self.network.model.state_dict().items()})
        move_average(self, decay)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunState, "move_average", watched)
        done = run(root, images, ema=DECAY, **DENSE)
    assert done.code == 0
    return done, seen


@pytest.fixture(scope="module")
def pruned(images, tmp_path_factory) -> tuple[Path, Run]:
    """A search and fine-tuning in which units leave the parameters."""
    root = tmp_path_factory.mktemp("pruned")
    return root, run(root, images, name="whole", ema=DECAY)


def build() -> torch.nn.Module:
    return build_model("resnet8_he", 6, 3, 8, 0.25)


def test_three_steps_by_hand(dense):
    done, (one, two, three) = dense
    steps = [step.after for step in done.record.steps("weights")]
    best, last = done.load("best.pt")["model"], done.load("last.pt")
    assert len(steps) == 3
    trained = [value for name, value in three.items() if name in dict(build().named_parameters())]
    assert all(torch.equal(a, b) for a, b in zip(trained, steps[-1], strict=True)), "seen after the step"
    for name, value in one.items():
        if not value.is_floating_point():
            assert torch.equal(best[name], three[name])
            continue
        by_hand = 0.5 * (0.5 * value + 0.5 * two[name]) + 0.5 * three[name]
        torch.testing.assert_close(best[name], by_hand)
        assert torch.equal(last["average"][name], best[name])
        assert torch.equal(last["model"][name], three[name]), "training goes on with the weights themselves"


def test_the_averages_are_what_is_evaluated_and_its_statistics_too(dense):
    done, _ = dense
    best, passes = done.load("best.pt"), [each for each in done.record.passes("evaluation") if each.is_test]
    model = build().eval()
    model.load_state_dict(best["model"])
    hits = 0
    for seen in passes:
        with torch.no_grad():
            torch.testing.assert_close(seen.logits, model(seen.images), rtol=1e-4, atol=1e-5)
        hits += seen.hits(1)
    assert best["test"]["top1"] == pytest.approx(100 * hits / 24)
    assert done.summary["test_top1"] == best["test"]["top1"]
    for name, (mean, var) in best["subnet"]["statistics"].items():
        assert torch.equal(mean, best["model"][f"{name}.running_mean"])
        assert torch.equal(var, best["model"][f"{name}.running_var"])


def test_training_itself_does_not_change(dense, images, tmp_path):
    plain = run(tmp_path, images, **DENSE)
    raw, own = plain.load("last.pt"), dense[0].load("last.pt")
    assert raw["average"] is None
    assert differences(raw["model"], own["model"]) == []
    assert differences(raw["weight_optimizer"], own["weight_optimizer"]) == []
    assert differences(plain.load("best.pt")["model"], own["model"]) == []


def test_a_search_keeps_no_average_and_fine_tuning_one_of_the_subnet(pruned):
    _, done = pruned
    for save in done.record.saves("last.pt"):
        state = save.state
        fixed = state["phase"] != "search" and (state["epoch"], state["step"]) > (SEARCH, 0)
        assert (state["average"] is not None) == fixed
    last = done.load("last.pt")
    assert set(last["average"]) < set(last["model"])
    assert all(value.shape == last["model"][name].shape for name, value in last["average"].items())
    assert sum(value.numel() for value in last["average"].values()) < 6000, "units have left"


def test_the_stored_result_is_the_evaluated_one(pruned, images, capsys):
    """Evaluation of a run reads best.pt, and holds the averages in place of the weights."""
    from main import main

    _, done = pruned
    assert main(["--evaluate", "--resume", str(done.folder), "--data", str(images), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert f"test top-1 {done.summary['test_top1']:.2f} %" in said
    assert f"loss {done.summary['test_loss']:.4f}" in said


def test_a_run_resumed_in_fine_tuning_ends_bit_equal(pruned, images):
    root, whole = pruned
    first = run(root, images, name="parts", ema=DECAY, interrupt_at=SEARCH * STEPS + 4)
    assert first.code == 130
    assert first.load("last.pt")["average"] is not None
    second = run(root, images, "--resume", name="parts", ema=DECAY)
    assert second.code == 0
    for file in ("last.pt", "best.pt"):
        stored, other = whole.load(file), second.load(file)
        for key in ("model", "average", "subnet", "test", "heldout"):
            assert differences({key: stored.get(key)}, {key: other.get(key)}) == []


def test_ranks_compare_their_averages():
    class Network:
        model, num_units = torch.nn.Linear(1, 1), 0

    state = RunState(Network, None, torch.optim.SGD(Network.model.parameters()), "dense", None)
    before = set(state.replicated())
    state.average = {"weight": torch.zeros(1)}
    assert set(state.replicated()) - before == {"average of weight"}


# ---- mixed images in the step of two passes ----

MIXED = {"mixup": 0.4, "cutmix": 1.0, "rand_augment": 1, "label_smoothing": 0.1, "epochs": 1, "finetune": "off"}


def passes_of_steps(done: Run) -> list[list[Pass]]:
    """The training passes of each step."""
    steps: list[list[Pass]] = [[]]
    for event in done.record.events:
        if isinstance(event, Pass) and event.kind != "evaluation":
            steps[-1].append(event)
        elif getattr(event, "kind", None) == "weights":
            steps.append([])
    return steps[:STEPS]


@pytest.mark.parametrize("method", ["vrpge", "released", "gumbel", "dense"])
def test_all_passes_of_a_step_see_the_same_images_and_mixed_labels(images, tmp_path, method):
    done = run(tmp_path, images, method=method, **MIXED)
    assert done.code == 0
    steps = passes_of_steps(done)
    assert [len(passes) for passes in steps] == [2 if method in ("vrpge", "released") else 1] * STEPS
    for first, *others in steps:
        for other in others:
            assert torch.equal(first.images, other.images)
        for each in (first, *others):
            if method == "released" and each is first:
                continue  # its losses come after both passes, and the last pass alone remembers them
            assert torch.equal(each.labels, others[-1].labels if others else first.labels)
            torch.testing.assert_close(each.labels.sum(1), torch.ones(18))
            smoothed = 0.9 * each.labels + 0.1 / 6
            assert each.loss == pytest.approx(float(-(smoothed * each.logits.log_softmax(1)).sum(1).mean()), rel=1e-5)
    assert any((passes[-1].labels.amax(1) < 1).any() for passes in steps)
    if method == "released":
        return
    # the accuracy of training batches counts the heavier class of each label
    hits = sum(int((first.logits.argmax(1) == first.labels.argmax(1)).sum()) for first, *_ in steps)
    assert done.column("train_top1") == pytest.approx([100 * hits / (18 * STEPS)])
    assert done.column("train_loss") == pytest.approx([sum(first.loss for first, *_ in steps) / STEPS], rel=1e-5)


def test_nothing_is_mixed_unless_asked_for(images, tmp_path):
    done = run(tmp_path, images, epochs=1, finetune="off")
    assert all(each.labels.dim() == 1 for passes in passes_of_steps(done) for each in passes)
    assert done.load("last.pt")["average"] is None
