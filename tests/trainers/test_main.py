"""The program from the outside: what it writes, what it says, how it stops and goes on."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import trainers.recipe
from args import Config, parse_args
from main import main
from tests.conftest import program_in
from tests.toy import CLOCKS, without_clocks
from trainers.result import result_lines
from utils.run.checkpoint import differences, load

PROJECT = Path(__file__).parents[2]
SUMMARY_KEYS = {
    *("arch", "set", "keep_ratio", "test_top1", "test_top5", "flops_ratio", "train_flops_ratio", "params_kept"),
    *("seconds", "seed", "execution", "precision", "device"),
}


def folder_of(name: str = "run", kept: str = "0.5") -> Path:
    return Path("runs/tiny") / name / f"prune_rate={kept}"


def test_whole_recipe_writes_what_it_promises_and_evaluates_to_the_same_number(program, capsys):
    assert program() == 0
    said = capsys.readouterr().out
    folder = folder_of()
    for file in ("config.yaml", "command.txt", "env.json", "checkpoints/last.pt", "checkpoints/best.pt"):
        assert (folder / file).exists(), file
    assert list(folder.glob("events.out.tfevents.*"))
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) >= SUMMARY_KEYS
    assert summary["flops_ratio"] < 1
    assert summary["units_kept"] <= 0.5
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [row["phase"] for row in rows] == ["search"] * 3 + ["finetune"] * 2
    assert said.partition("\n\n")[2].splitlines() == result_lines(summary, Config())
    assert "warning            16 held-out images are few" in said
    assert "search epoch 3/5 step 4/4" in said
    assert "finetune epoch 5/5 step 5/5" in said

    assert program("--evaluate", "--resume", str(folder)) == 0
    evaluated = capsys.readouterr().out
    assert "top-5" not in said + evaluated  # four classes
    again = re.search(r"test top-1 ([\d.]+) %", evaluated)
    assert float(again[1]) == pytest.approx(summary["test_top1"], abs=0.005)


@pytest.mark.parametrize("options", [(), ("--method", "thin", "--no-finetune", "--epochs", "5")], ids=["vrpge", "thin"])
def test_test_images_may_be_looked_at_rarely_and_decide_nothing(program, options):
    def told(name: str) -> tuple[dict, list[dict[str, str]]]:
        summary = json.loads((folder_of(name) / "summary.json").read_text())
        with open(folder_of(name) / "results.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        others = (
            "seconds",
            "train_seconds",
            "train_cpu_seconds",
            "run",
            "last_test_top1",
        )  # the last is what was looked at
        return {key: value for key, value in summary.items() if key not in others}, rows

    assert program(*options, name="always") == 0
    result, rows = told("always")
    assert all(row["test_top1"] for row in rows)
    assert result["test_top1"] is not None
    for every, due in ((2, {"2", "4"}), (0, set()))[: 1 if options else 2]:
        assert program(*options, "--test-every", str(every), name=f"every-{every}") == 0
        same, rarer = told(f"every-{every}")
        assert same == result
        for row, rare in zip(rows, rarer, strict=True):
            is_result = row["phase"] != "search" and int(row["epoch"]) == result["best_epoch"]
            was_better = any(
                float(row["heldout_top1"]) < float(other["heldout_top1"]) for other in rows[: rows.index(row)]
            )
            if row["epoch"] in due or is_result:
                assert rare["test_top1"] == row["test_top1"]
            elif row["phase"] == "search" or (row["phase"] == "train" and was_better):
                assert rare["test_top1"] == rare["test_top5"] == rare["test_loss"] == ""
            others = [key for key in row if not key.startswith("test_") and key not in CLOCKS]
            assert [rare[key] for key in others] == [row[key] for key in others]


def test_training_learns_the_tiny_images(program):
    assert program("--epochs", "12", "--budget-schedule", "constant", "--no-finetune") == 0
    assert json.loads((folder_of() / "summary.json").read_text())["test_top1"] >= 75  # chance is 25


def test_original_options_without_a_gpu_fall_back_to_the_cpu(program, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert program("--multigpu", "0", "--dry-run") == 0
    assert "no CUDA GPU here, training on the CPU instead" in capsys.readouterr().out


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, tiny_images) -> Path:
    """The folder of a run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        assert program_in(folder, tiny_images, patch)(name="whole") == 0
    return folder / folder_of("whole")


@pytest.mark.parametrize(
    ("stop_at", "number"),
    [
        *((0, signal.SIGINT), (11, signal.SIGTERM), (13, signal.SIGINT)),  # first and last step of search, fine-tuning
        *(pytest.param(n, signal.SIGINT, marks=pytest.mark.slow) for n in (3, 7, 17)),
    ],
)
def test_a_run_stopped_anywhere_and_resumed_ends_bit_equal(program, whole_run, monkeypatch, capsys, stop_at, number):
    step, count = trainers.recipe.Recipe.step, iter(range(1000))

    def interrupted_step(self, images, labels, settings):
        if next(count) == stop_at:
            os.kill(os.getpid(), number)
        return step(self, images, labels, settings)

    with monkeypatch.context() as patch:
        patch.setattr(trainers.recipe.Recipe, "step", interrupted_step)
        assert program(name="parts") == 128 + number
    said = capsys.readouterr().out
    assert "go on with: python main.py --resume runs/tiny/parts/prune_rate=0.5" in said
    assert program("--resume", name="parts") == 0
    assert parse_args(["--config", str(folder_of("parts") / "config.yaml")]).config.run.resume is None

    folders = (whole_run, folder_of("parts"))
    for file in ("checkpoints/last.pt", "checkpoints/best.pt"):
        whole, parts = (load(folder / file) for folder in folders)
        assert differences(without_clocks(whole), without_clocks(parts)) == []
    tables = []
    for folder in folders:
        with open(folder / "results.csv", newline="") as file:
            tables.append([{k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)])
    assert tables[0] == tables[1]


def test_checkpoints_of_different_epochs_differ(program):
    """The negative twin of the test above: equality there is not that of everything with everything."""
    assert program("--save-every", "1", "--no-finetune") == 0
    two, three = (load(folder_of() / "checkpoints" / f"epoch_{epoch}.pt") for epoch in (2, 3))
    names = differences(without_clocks(two), without_clocks(three))
    assert any(name.startswith("model.") for name in names)
    assert "search.generator" in names


def test_a_second_run_gets_a_folder_of_its_own(program):
    assert program("--epochs", "1", "--no-finetune") == 0
    before = (folder_of() / "summary.json").read_bytes()
    assert program("--epochs", "1", "--no-finetune", "--seed", "1") == 0
    assert (folder_of() / "1" / "summary.json").exists()
    assert (folder_of() / "summary.json").read_bytes() == before


def test_a_finished_run_is_not_resumed(program, capsys):
    assert program("--epochs", "1", "--no-finetune") == 0
    assert program("--epochs", "1", "--no-finetune", "--resume") == 2
    assert "is finished" in capsys.readouterr().err


def test_resuming_with_another_option_is_refused(program, capsys):
    assert program("--epochs", "1", "--no-finetune", "--keep-ratio", "0.5") == 0
    assert program("--resume", str(folder_of()), "--keep-ratio", "0.25") == 2
    assert "keep_ratio: stored 0.5, given 0.25" in capsys.readouterr().err


def test_resuming_on_other_images_is_refused(program, capsys, tmp_path, tiny_images):
    """Fewer images, and as many with the same names, labels and sizes of which one has other pixels."""
    assert program("--epochs", "1", "--no-finetune") == 0
    for number, (other, difference) in enumerate((("fewer", "other labels"), ("changed", "other contents"))):
        shutil.copytree(tiny_images, tmp_path / other)
        for folder in (tmp_path / other / "train").iterdir() if number == 0 else ():
            (folder / "19.png").unlink()
        if number == 1:
            Image.new("RGB", (8, 8)).save(tmp_path / other / "train/class1/03.png")
        assert main(["--resume", str(folder_of()), "--data", str(tmp_path / other)]) == 2
        error = capsys.readouterr().err
        assert f"are not those that {folder_of()}/checkpoints/last.pt was trained on: they have {difference}" in error
        assert len(error.splitlines()) == 1


def test_dense_training_runs_through_the_same_harness(program):
    assert program("--conv-type", "DenseConv", "--epochs", "2") == 0
    folder = folder_of(kept="1")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["flops_ratio"], summary["params_kept"], summary["execution"]) == (1, 1, "dense")
    assert summary["train_flops_ratio"] == pytest.approx(1, abs=0.2)  # held-out images choose the epoch
    assert not any(name.endswith("scores") for name in load(folder / "checkpoints/last.pt")["model"])


def test_masked_and_compact_runs_are_the_same_run(program):
    """In float32 the two add in different orders; after one epoch they still agree closely."""
    for execution in ("compact", "masked"):
        assert program("--epochs", "1", "--no-finetune", "--execution", execution, name=execution) == 0
    compact, masked = (load(folder_of(name) / "checkpoints/last.pt") for name in ("compact", "masked"))
    for name, value in compact["model"].items():
        torch.testing.assert_close(value, masked["model"][name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize(
    "options", [("--K", "3"), ("--constrain-by-layer",), ("--estimator", "reinforce"), ("--estimator", "taylor")]
)
def test_variants_of_the_search_train(program, options):
    assert program("--epochs", "1", "--no-finetune", *options) == 0


def test_the_released_method_trains_and_evaluates(program, capsys):
    assert program("--method", "released", "--epochs", "1", "--finetune-epochs", "1") == 0
    summary = json.loads((folder_of() / "summary.json").read_text())
    assert summary["execution"] == "released"
    assert summary["train_flops_ratio"] > 1  # two dense passes forward and backward, choice and fine-tuning
    assert main(["--evaluate", "--resume", str(folder_of())]) == 0
    assert f"test top-1 {summary['test_top1']:.2f} %" in capsys.readouterr().out


def test_the_released_method_does_not_read_what_a_file_says_for_other_methods(program, tmp_path):
    short = ("--method", "released", "--epochs", "1", "--no-finetune")
    assert program(*short, name="plain") == 0
    others = (
        "execution: masked\nresidual_masks: tied\nestimator: linear_cv_gates\nscore_every: 2\nscore_gradient: tangent\n"
    )
    (tmp_path / "tiny.yaml").write_text((tmp_path / "tiny.yaml").read_text() + others)
    assert program(*short, name="others") == 0
    plain, other = (load(folder_of(name) / "checkpoints/last.pt") for name in ("plain", "others"))
    assert differences(without_clocks(plain), without_clocks(other)) == []


def test_a_diverging_run_stops_with_3_and_keeps_the_last_good_checkpoint(program, capsys, monkeypatch):
    step, count = trainers.recipe.Recipe.step, iter(range(1000))

    def broken_step(self, images, labels, settings):
        metrics = step(self, images, labels, settings)
        return {**metrics, "loss": metrics["loss"] * float("nan")} if next(count) == 6 else metrics

    monkeypatch.setattr(trainers.recipe.Recipe, "step", broken_step)
    assert program() == 3
    assert "training loss is nan after step 3 of epoch 2" in capsys.readouterr().out
    assert load(folder_of() / "checkpoints/last.pt")["epoch"] == 1


def test_dry_run_writes_nothing(program, tmp_path, capsys):
    assert program("--dry-run") == 0
    assert "one step of 16 images" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_print_config_can_be_trained_from(program, capsys, tmp_path):
    assert program("--print-config") == 0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(capsys.readouterr().out)
    assert main(["--config", str(resolved), "--dry-run"]) == 0


def test_pretrained_weights_start_a_run_and_misfits_are_named(program, capsys):
    assert program("--conv-type", "DenseConv", "--epochs", "1") == 0
    weights = str(folder_of(kept="1") / "checkpoints/best.pt")
    assert program("--pretrained", weights, "--dry-run") == 0
    assert program("--pretrained", weights, "--dry-run", "--width-mult", "0.5") == 2
    assert "conv1.weight has shape (4, 3, 3, 3), the network (8, 3, 3, 3)" in capsys.readouterr().err
    assert program("--pretrained", "nowhere.pt", "--dry-run") == 2
    assert "--pretrained nowhere.pt: there is no such file" in capsys.readouterr().err


def test_a_run_goes_on_without_the_file_that_its_weights_once_came_from(program, tmp_path):
    assert program("--conv-type", "DenseConv", "--epochs", "1") == 0
    weights = (folder_of(kept="1") / "checkpoints/best.pt").rename(tmp_path / "weights.pt")
    assert program("--pretrained", str(weights), "--epochs", "1", "--no-finetune", name="second") == 0
    weights.unlink()
    assert main(["--evaluate", "--resume", str(folder_of("second"))]) == 0


def test_the_original_command_without_data_or_network_says_what_to_do(tmp_path, monkeypatch, capsys):
    def refuse(*_args, **_kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    original = (
        "--config configs/config.yaml --multigpu 0 --score-init-constant 0.5 --prune-rate 0.5 "
        "--arch resnet32 --set CIFAR10 --lr 12e-3"
    )
    monkeypatch.chdir(PROJECT)
    assert main([*original.split(), "--data", str(tmp_path / "none"), "--log-dir", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "none") in error
    assert "cifar-10-python.tar.gz" in error
    assert "configs/quickstart.yaml" in error


def test_images_too_small_for_the_network_are_refused(program, capsys):
    assert program("--arch", "vgg16", "--dry-run") == 2
    assert "vgg16 does not fit images of 8x8 pixels" in capsys.readouterr().err


@pytest.mark.slow  # tools/test_reproduce.py starts the program too
def test_two_steps_as_a_subprocess(tmp_path):
    command = [sys.executable, "main.py", "--config", "configs/quickstart.yaml", "--log-dir", str(tmp_path / "runs")]
    command += ["--epochs", "1", "--batch-size", "100", "--train-images", "200", "--no-finetune"]
    command += ["--arch", "vgg11", "--width-mult", "0.0625"]
    command += ["--num-subnets", "1", "--bn-batches", "1"]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "trained vgg11 on FashionMNIST-mini: 1 epoch\n" in result.stdout
    assert (tmp_path / "runs/quickstart/vgg11/prune_rate=0.5/summary.json").exists()


def test_a_mistake_is_one_sentence_and_exit_code_2():
    result = subprocess.run(
        [sys.executable, "main.py", "--kep-ratio", "0.5"], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert "--keep-ratio" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow  # test_ledger.py counts such steps one by one
def test_cheaper_structure_steps_cost_less_in_the_ledger(program):
    ratios = []
    for name, options in (("every", ()), ("third", ("--score-every", "3"))):
        constant = ("--epochs", "2", "--no-finetune", "--budget-schedule", "constant", "--num-subnets", "0")
        assert program(*constant, *options, name=name) == 0
        ratios.append(json.loads((folder_of(name) / "summary.json").read_text())["train_flops_ratio"])
    every, third = ratios
    assert third < 0.95 * every  # five of eight steps run 3 instead of 4 forward-equivalents; choosing costs the same
