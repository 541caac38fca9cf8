"""A run goes in, a folder comes out that computes the same without this project; or a sentence, and nothing is left."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from args import METHODS
from tests.tiny import Run, make_images, run
from tools import export, export_checks, exported
from tools.export_card import card
from tools.exported import read_facts, read_network
from tools.predict import prepared, read_image
from tools.run_result import Result
from utils.errors import UserError
from utils.run import checkpoint


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("export") / "images")


@pytest.fixture(scope="module")
def trained(images: Path) -> Run:
    return run(images.parent / "runs", images)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(export_checks, "MOST_ROUNDS", 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits_of_subnet(folder: Path, batch: Tensor) -> Tensor:
    """By compact execution, as evaluation does it."""
    result = Result.read(folder)
    norms = result.network.batch_norms()
    for name, (mean, variance) in result.subnet.statistics.items():
        norms[name].running_mean.copy_(mean)
        norms[name].running_var.copy_(variance)
    result.network.model.eval()
    with torch.no_grad():
        return result.network(batch, result.network.plan(result.subnet.mask_U))


def error_of(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """The sentence with which the program refuses."""
    assert export.main([str(word) for word in argv]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


# ---- what is written ----


def test_the_folder_needs_nothing_of_this_project(trained, tmp_path, capsys):
    folder = tmp_path / "home"
    assert export.main([str(trained.folder), "--to", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} >= {"model.py", "model.json", "MODEL_CARD.md"}
    batch = torch.randn(5, 3, 8, 8)
    np.save(tmp_path / "batch.npy", batch.numpy())
    script = (
        "import numpy, sys, torch; from model import load; network = load(); assert not network.training; "
        "numpy.save('../logits.npy', network(torch.from_numpy(numpy.load('../batch.npy'))).detach().numpy()); "
        "assert not any(name.split('.')[0] in ('utils', 'trainers', 'models', 'data', 'args') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=folder, env={"PATH": ""}, check=True, timeout=120)
    logits = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(logits, logits_of_subnet(trained.folder, batch), rtol=1e-4, atol=1e-5)


def test_numbers_are_those_of_the_run(trained, tmp_path, capsys):
    folder = tmp_path / "home"
    assert export.main([str(trained.folder / "checkpoints" / "best.pt"), "--to", str(folder)]) == 0
    output, facts, summary = capsys.readouterr().out, read_facts(folder), trained.summary
    costs, state = facts["costs"], trained.load("best.pt")
    for name, key in (("multiply_adds", "flops_ratio"), ("parameters", "params_kept")):
        assert costs["exported"][name] / costs["dense"][name] == pytest.approx(summary[key], abs=1e-12)
    full = Result.read(trained.folder).full
    for name, expected in (("multiply_adds", full.dense_macs), ("parameters", full.dense_parameters)):
        assert costs["masked"][name] == costs["dense"][name] == expected
    weights = folder / exported.weights_file()
    assert costs["exported"]["bytes"] == weights.stat().st_size < costs["dense"]["bytes"]
    assert facts["widths"] == state["widths"]
    kept = state["subnet"]["mask"]
    assert sum(map(len, facts["kept_channels"].values())) == int(kept.sum()) + 6  # the classifier keeps its six classes
    assert facts["images"] == state["images"]
    assert facts["result"]["test"]["top1"] == summary["test_top1"]
    assert facts["result"]["heldout"]["top1"] == summary["heldout_top1"]
    assert (facts["result"]["test_images"], facts["result"]["heldout_images"]) == (24, 18)
    assert facts["result"]["epoch"] == summary["best_epoch"]
    assert facts["checks"][weights.name]["images"] == 24
    assert facts["checks"][weights.name]["largest_difference"] <= facts["checks"][weights.name]["allowed_difference"]
    assert f"test accuracy: {summary['test_top1']:.2f} %, " in output
    assert "on 24 test images" in output
    rows = [line for line in output.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["dense", "masked", "exported"]
    assert f"{costs['exported']['parameters']:,}" in rows[4]
    assert f"{costs['exported']['multiply_adds'] / 1e6:.2f} M" in rows[4]
    assert "{:.2f} (".format(costs["exported"]["latency"]["128"]["median_ms"]) in rows[4].split("|")[-2]


def test_the_card_tells_the_facts_in_a_header_that_yaml_reads(trained, tmp_path, capsys):
    assert export.main([str(trained.folder), "--to", str(tmp_path / "home")]) == 0
    text, facts = (tmp_path / "home" / "MODEL_CARD.md").read_text(), read_facts(tmp_path / "home")
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["model-index"][0]["results"][0]["metrics"][0]["value"] == round(facts["result"]["test"]["top1"], 2)
    ratio = facts["costs"]["exported"]["multiply_adds"] / facts["costs"]["dense"]["multiply_adds"]
    for words in (
        f"{100 * ratio:.1f} % of the multiply-adds",
        "6 classes apart: class0, class1, class2, class3, class4, class5.",
        "on 24 test images",
        f"{facts['result']['heldout']['top1']:.2f} % of 18 held-out training images",
        "resized to 8 pixels",
        f"after epoch {facts['result']['epoch']} (",
        "Seed 0",
        f"| exported | {facts['costs']['exported']['parameters']:,} |",
        facts["versions"]["cpu"],
        f"torch {torch.__version__}",
    ):
        assert words in text
    assert "drew masks from the scores" in text

    def told(**recipe: object) -> str:
        return card({**facts, "recipe": {**facts["recipe"], **recipe}}, "weights")

    for method in METHODS.keys() - {"released"}:
        assert "{" not in told(method=method)
    assert "were pruned after dense training." in told(method="taylor_cut", budget_falls=False)
    assert "were pruned after every epoch while the budget fell." in told(method="l1", budget_falls=True)
    found = told(method="thin", budget_falls=False, widths_of="runs/x")
    assert "channels are those of the result of another run" in found
    assert "first channels" not in found


@pytest.fixture(scope="module")
def complete(trained: Run) -> Path:
    """An export with all files."""
    for package in export.ONNX_PACKAGES:
        pytest.importorskip(package)
    folder = trained.folder / "export"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_checks, "MOST_ROUNDS", 1)
        assert export.main([str(trained.folder), "--onnx", "--pt2"]) == 0
    return folder


def test_optional_files_compute_the_same_for_any_number_of_images(trained, complete):
    facts = read_facts(complete)
    assert facts["checks"].keys() == {exported.weights_file(), "model.onnx", "model.pt2"}
    assert (
        facts["checks"]["model.onnx"]["images"] == facts["checks"]["model.pt2"]["images"] == 18 + 1
    )  # a batch and one
    assert facts["costs"].keys() == {"dense", "masked", "exported", "exported, onnxruntime"}
    networks = [
        read_network(complete),
        export_checks.onnx_network(complete / "model.onnx"),
        export_checks.read_program(complete / "model.pt2"),
    ]
    for count in (1, 3):
        batch = torch.randn(count, 3, 8, 8)
        for network in networks:
            expected = logits_of_subnet(trained.folder, batch)
            torch.testing.assert_close(network(batch).detach(), expected, rtol=1e-4, atol=1e-4)


def test_the_examples_of_the_page(trained, images, complete, tmp_path, monkeypatch, capsys):
    """They run in order, on the folder that they name, and prepare an image as the network was evaluated."""
    place = tmp_path / "runs/quickstart/vgg16/prune_rate=0.5/export"
    place.parent.mkdir(parents=True)
    place.symlink_to(complete)
    noise = np.random.default_rng(0).integers(0, 256, (11, 14, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    names: dict = {}
    for block in page.split("```python\n")[1:]:
        exec(block.split("```")[0], names)
    sys.modules.pop("model")
    image = prepared(read_image(Path("image.png")), read_facts(complete)["images"])
    torch.testing.assert_close(names["prepare"]("image.png"), image, rtol=0, atol=1e-6)
    with torch.no_grad():
        expected = read_network(complete)(image)
    torch.testing.assert_close(names["logits"].detach(), expected, rtol=1e-4, atol=1e-4)
    (logits,) = names["session"].run(None, {"images": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
    assert capsys.readouterr().out == f"class{int(expected.argmax())}\n"


def test_folded_batch_norms(trained, tmp_path, capsys):
    assert export.main([str(trained.folder), "--to", str(tmp_path / "home"), "--fold-bn"]) == 0
    assert read_facts(tmp_path / "home")["batch_norm_folded"]
    assert "BatchNorm2d" not in (tmp_path / "home" / "model.py").read_text()


def test_without_safetensors_the_weights_are_a_state_dict(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exported, "has_package", lambda name: name != "safetensors")
    assert export.main([str(trained.folder), "--to", str(tmp_path / "home")]) == 0
    assert "the package safetensors is not installed" in capsys.readouterr().out
    tensors = torch.load(tmp_path / "home" / "model.pt", weights_only=True)
    assert tensors.keys() == read_network(tmp_path / "home").state_dict().keys()
    assert "safetensors" not in (tmp_path / "home" / "model.py").read_text()


def test_a_dense_network(images, tmp_path, capsys):
    dense = run(tmp_path, images, "--method", "dense", epochs=1)
    assert export.main([str(dense.folder)]) == 0
    facts = read_facts(dense.folder / "export")
    assert facts["costs"]["exported"]["parameters"] == facts["costs"]["dense"]["parameters"]
    assert facts["costs"]["exported"]["bytes"] == facts["costs"]["dense"]["bytes"]


def test_a_dense_run_that_started_from_a_subnet(images, trained, tmp_path):
    """Its network is that subnet, though the method keeps all channels."""
    start = str(trained.folder / "checkpoints" / "best.pt")
    dense = run(tmp_path, images, "--method", "dense", "--pretrained", start, epochs=1, finetune_epochs=1)
    assert export.main([str(dense.folder)]) == 0
    costs = read_facts(dense.folder / "export")["costs"]
    assert costs["exported"]["parameters"] / costs["dense"]["parameters"] == pytest.approx(dense.summary["params_kept"])
    assert dense.summary["params_kept"] < 0.9


def test_latencies_are_medians_of_rounds_in_turn(monkeypatch):
    clock, order = [0.0], []

    def network(name, seconds):
        def forward(_):
            order.append(name)
            clock[0] += seconds[min(len([n for n in order if n == name]), len(seconds)) - 1]

        return forward

    monkeypatch.setattr(export_checks.time, "perf_counter", lambda: clock[0])
    found = export_checks.latencies(
        {"a": network("a", [9, 9, 0.004, 0.001, 0.002]), "b": network("b", [0.01])}, torch.zeros(1), seconds=0
    )
    assert order == ["a", "b"] * 5
    assert found["a"] == {
        "median_ms": pytest.approx(2),
        "quartiles_ms": [pytest.approx(1.5), pytest.approx(3)],
        "rounds": 3,
    }
    assert found["b"]["median_ms"] == pytest.approx(10)


# ---- images to check on ----


def test_without_the_images_of_the_run_random_ones_check_the_logits(trained, images, tmp_path, capsys):
    run_folder = tmp_path / "run"
    (run_folder / "checkpoints").mkdir(parents=True)
    state = trained.load("best.pt")
    state["config"]["data"] = str(tmp_path / "moved")
    del state["contents"]  # from before contents were compared: accuracy tells that images have changed
    checkpoint.save(run_folder / "checkpoints" / "best.pt", state)
    assert export.main([str(run_folder)]) == 0
    output = capsys.readouterr().out
    assert "on 64 random images, because the images of the run cannot be read (" in output
    assert "--data PATH names their folder" in output
    assert "test accuracy" not in output
    facts = read_facts(run_folder / "export")
    assert facts["checked_on"] == "random images"
    assert facts["result"]["test_images"] is None
    assert export.main([str(run_folder), "--data", str(images)]) == 0  # replaces the export
    assert read_facts(run_folder / "export")["checked_on"] == "test images"
    others = make_images(tmp_path / "others", turn=1)
    assert "so the images have changed" in error_of(capsys, run_folder, "--data", others)
    next((others / "test").rglob("*.png")).unlink()
    assert "are not those of the run: they have other labels" in error_of(capsys, run_folder, "--data", others)
    assert read_facts(run_folder / "export")["checked_on"] == "test images"


# ---- what is refused ----


@pytest.mark.parametrize("name", ["running_mean", "weight", "places"])
def test_a_network_that_computes_something_else_is_not_left_behind(trained, tmp_path, capsys, monkeypatch, name):
    original = export.plain_network

    def broken(*args, **options):
        plain = original(*args, **options)
        key = next(key for key in plain.tensors if key.endswith(name))
        tensor = plain.tensors[key]
        plain.tensors[key] = tensor.flip(0) if name == "places" else tensor * 1.01 + 0.01
        return plain

    monkeypatch.setattr(export, "plain_network", broken)
    folder = tmp_path / "out" / "home"
    assert "does not compute what the run's subnet does: logits differ by up to" in error_of(
        capsys, trained.folder, "--to", folder
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_logits_that_are_not_numbers_are_no_match():
    comparison = export_checks.Comparison()
    comparison.add(torch.zeros(1, 2), torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(UserError, match="differ by up to inf"):
        comparison.check("it")


def test_another_test_accuracy_than_stored_is_refused(trained, tmp_path, capsys):
    state = trained.load("best.pt")
    state["test"]["top1"] = (state["test"]["top1"] + 100 * 3 / 24) % 100
    checkpoint.save(tmp_path / "best.pt", state)
    assert f"% test accuracy now and had {state['test']['top1']:.2f} %" in error_of(capsys, tmp_path / "best.pt")
    assert not (tmp_path / "export").exists()


def test_paths_that_are_no_result(trained, tmp_path, capsys):
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    (tmp_path / "unfinished" / "checkpoints" / "last.pt").touch()
    assert "no checkpoints/best.pt yet" in error_of(capsys, tmp_path / "unfinished")
    assert "--resume" in error_of(capsys, tmp_path / "unfinished")
    assert "does not exist" in error_of(capsys, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "it has no checkpoint at all" in error_of(capsys, tmp_path / "empty")
    assert "is not the result of a run" in error_of(capsys, trained.folder / "checkpoints" / "last.pt")


def test_checkpoints_that_cannot_be_exported(trained, tmp_path, capsys):
    old = {key: value for key, value in trained.load("best.pt").items() if key != "images"}
    checkpoint.save(tmp_path / "old.pt", old)
    assert "make the run again with this version" in error_of(capsys, tmp_path / "old.pt")
    released = trained.load("best.pt")
    released["config"]["method"] = "released"
    checkpoint.save(tmp_path / "released.pt", released)
    assert "--method released cannot be exported" in error_of(capsys, tmp_path / "released.pt")


def test_packages_that_are_missing_are_named(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "has_package", lambda name: name != "onnxscript")
    message = error_of(capsys, trained.folder, "--onnx", "--to", tmp_path / "home")
    assert "--onnx needs onnxscript; run `python -m pip install -r requirements-extra.txt`" in message
