"""The whole program on a network of the user's: trained, resumed, evaluated and exported, where its code is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from args import parse_args
from main import main
from tests.tiny import make_images, run
from tests.toy import one_thread  # noqa: F401
from tools import export
from tools.exported import read_network
from trainers.doctor import Findings, check_arch
from trainers.session import folder_names
from utils.run.checkpoint import load

NET = """
from torch import nn

def make(num_classes):
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
    nn.init.constant_(net[0].weight, 0.25)
    return net
"""
ARCH = "own_net:make"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def trained(root):
    """A finished run; every test starts in the folder of the code, with nothing allowed."""
    (root / "own_net.py").write_text(NET)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        options = ("--arch", ARCH, "--epochs", "1", "--finetune-epochs", "1")
        return run(root, make_images(root / "images"), *options, width_mult=1.0)


@pytest.fixture(autouse=True)
def nothing_allowed(trained, root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr("models.own._allowed", set())


def test_a_run_names_its_code_in_all_commands_that_it_advises(trained, capsys):
    assert trained.code == 0
    assert folder_names(parse_args(["--arch", ARCH]).config)[1] == "own_net.make"  # no colon, which means a host to scp
    assert main(["--resume", str(trained.folder), "--arch", ARCH]) == 2
    said = capsys.readouterr().err
    for what in ("best.pt", "last.pt"):
        assert f"checkpoints/{what} --arch {ARCH} " in said


@pytest.mark.parametrize("word", ["--evaluate", "--finetune-epochs=2"])
def test_a_checkpoint_runs_no_code_until_the_command_names_it(trained, word, capsys, monkeypatch):
    monkeypatch.setattr("models.own._found", lambda arch: pytest.fail(f"{arch} was imported"))
    assert main(["--resume", str(trained.folder), word]) == 2
    assert f"{ARCH} is code, which runs only if this command names it; add --arch {ARCH} if" in capsys.readouterr().err
    assert export.main([str(trained.folder)]) == 2
    assert f"add --arch {ARCH} if you trust it" in capsys.readouterr().err


def test_with_its_code_named_it_is_evaluated_exported_and_trained_on(trained, root, capsys):
    assert main(["--evaluate", "--resume", str(trained.folder), "--arch", ARCH]) == 0
    assert f"test top-1 {trained.summary['test_top1']:.2f} %" in capsys.readouterr().out
    assert export.main([str(trained.folder), "--arch", ARCH, "--to", str(root / "home")]) == 0
    (root / "own_net.py").unlink()  # the exported network needs it no longer
    assert read_network(root / "home")(torch.zeros(1, 3, 8, 8)).shape == (1, 6)
    (root / "moved.py").write_text(NET)
    assert main(["--resume", str(trained.folder), "--arch", "moved:make", "--finetune-epochs", "2"]) == 0
    state = load(trained.folder / "checkpoints/last.pt")
    assert (state["epoch"], state["config"]["arch"]) == (3, "moved:make")


def test_first_weights_are_those_of_the_code(trained, root, capsys):
    (root / "own_net.py").write_text(NET)
    options = ("--config", str(root / "tiny.yaml"), "--data", str(root / "images"), "--width-mult", "1")
    assert main([*options, "--arch", ARCH, "--init", "orthogonal"]) == 2
    assert "--init (command line) has no effect: arch is own_net:make; leave it out" in capsys.readouterr().err
    first = trained.record.steps("weights")[0].before[0]
    assert torch.equal(first, torch.full_like(first, 0.25))


def test_the_doctor_looks_for_the_function(root, capsys):
    (root / "own_net.py").write_text(NET)
    for arch, problems in ((ARCH, 0), ("own_net:absent", 1), ("resnet20", 0)):
        found = Findings()
        check_arch(found, parse_args(["--doctor", "--arch", arch]).config)
        assert len(found.problems) == problems
    assert capsys.readouterr().out == f"network     found: {ARCH}\n"
