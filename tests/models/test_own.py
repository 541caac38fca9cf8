"""Networks that a user's function makes: found, called with what it takes, or refused with the place in their code."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import models
import utils.errors
from models import build_model, initialise, maskable_convs
from models.own import allow
from tests.toy import one_thread  # noqa: F401
from utils.errors import UserError

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, in_channels=3, image_size=0):
        super().__init__()
        self.made_for = (num_classes, in_channels, image_size)
        self.head = nn.Linear(4, num_classes)  # a name that networks of this program have for a text
        self.second = nn.Conv2d(6, 4, 3, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.first = nn.Conv2d(in_channels, 6, 3, padding=1)

    def forward(self, x):
        return self.head(self.second(self.grouped(self.first(x)).relu()).mean((2, 3)))

class Plain:
    pass

def positional(n): return Net(n, 1)
def kwargs(**options): return Net(**options, in_channels=1)
def fixed(): return Net(10, 1)
def other_names(n_classes, in_chans, img_size): return Net(n_classes, in_chans, img_size)
def widened(num_classes, in_channels, width_mult): return Net(num_classes, in_channels, width_mult)
def needs_depth(num_classes, depth): return Net(num_classes)
def colour(num_classes): return Net(num_classes, 3)
def breaks(num_classes): return Net(num_classes, 1) / 0
def leaves(num_classes): raise SystemExit(1)
def no_network(num_classes): return Plain()
def maps(num_classes): return nn.Conv2d(1, num_classes, 3)
def double(num_classes): return Net(num_classes, 1).double()
def frozen(num_classes):
    net = Net(num_classes, 1)
    net.first.weight.requires_grad = False
    return net
number = 3
"""


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("models.own._allowed", set())
    (tmp_path / "net.py").write_text(NET)
    yield tmp_path
    for name in ("net", "broken", "absent_import"):
        sys.modules.pop(name, None)


def made(arch: str, num_classes: int = 10, channels: int = 1, size: int = 8, width_mult: float = 1.0) -> nn.Module:
    allow(arch)
    return build_model(arch, num_classes, channels, size, width_mult)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("Net", (5, 1, 8)),
        ("positional", (5, 1, 0)),
        ("kwargs", (5, 1, 0)),
        ("other_names", (5, 1, 8)),
        ("widened", (5, 1, 0.5)),
    ],
)
def test_a_function_is_called_with_what_its_parameters_name(function, expected):
    assert made(f"net:{function}", 5, width_mult=0.5 if function == "widened" else 1.0).made_for == expected


def test_layers_are_in_the_order_in_which_they_run_and_the_head_is_what_makes_the_logits():
    model = made("net:Net", training := 5)
    assert model.training
    assert (model.head_name, model.conv_order) == ("head", ["first", "grouped", "second"])
    assert isinstance(model.head, nn.Linear)
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, training)
    for first, last, names in (
        (False, False, ["first", "second"]),
        (True, False, ["second"]),
        (False, True, ["first"]),
    ):
        assert maskable_convs(model, first_layer_dense=first, last_layer_dense=last) == names


def test_code_that_no_command_has_named_does_not_run(working_folder):
    (working_folder / "net.py").write_text("open('ran', 'w')")
    with pytest.raises(
        UserError, match=r"net:Net is code, which runs only if this command names it; add --arch net:Net"
    ):
        build_model("net:Net", 10, 1, 8)
    allow("net:Net", origin="default")
    allow("net:other")
    with pytest.raises(UserError, match="runs only if"):
        build_model("net:Net", 10, 1, 8)
    assert not (working_folder / "ran").exists()


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("nowhere:Net", r"there is no module nowhere in \S+, and none is installed; start the program in the folder"),
        ("net.inner:Net", r"importing net.inner failed|no module net.inner"),
        ("net:Nett", r"net \(\S+net.py\) has no Nett; it has Net, Plain, positional"),
        ("net:number", "this is a int, and not a function"),
        ("net:needs_depth", "here missing a required argument: 'depth'; give other parameters a default"),
        (
            "net:colour",
            r"cannot read images of shape \(1, 8, 8\): RuntimeError: .* \(\S+net.py line 15\); the data set",
        ),
        ("net:breaks", r"could not be made: TypeError: unsupported operand .* \(\S+net.py line 27\)"),
        ("net:leaves", r"could not be made: SystemExit: 1 \(\S+net.py line 28\)"),
        ("net:no_network", "made a Plain, not a torch.nn.Module"),
        (
            "net:maps",
            r"from 2 images the network makes a tensor of shape \(2, 7, 6, 6\); it must be the logits, \(2, 7\)",
        ),
        ("net:fixed", "makes 10 logits, and the data have 7 classes; let the function take num_classes"),
        ("net:double", r"parameter head.weight is of type torch.float64, and the program trains all parameters"),
        ("net:frozen", r"parameter first.weight is frozen \(requires_grad is off\)"),
        ("broken:Net", r"importing broken failed: .* \(\S+broken.py line 2\)"),
        ("absent_import:Net", r"No module named 'not_installed' \(\S+absent_import.py line 1\); install not_installed"),
    ],
)
def test_what_stands_in_the_way_is_told_in_one_sentence(arch, message, working_folder):
    (working_folder / "broken.py").write_text("x = 1\ndef Net(:\n")
    (working_folder / "absent_import.py").write_text("import not_installed\n")
    with pytest.raises(UserError) as caught:
        made(arch, 7)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert str(caught.value).startswith(f"arch {arch}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_width_that_the_function_does_not_take_is_refused():
    with pytest.raises(
        UserError, match=r"width_mult is 0.5, and arch net:Net has no parameter width_mult; leave it out"
    ):
        made("net:Net", width_mult=0.5)


def test_packages_with_the_names_of_this_program_are_the_users_inside_and_ours_afterwards(working_folder):
    """Many repositories have a package `models` and a module `utils`."""
    (working_folder / "models").mkdir()
    (working_folder / "models/__init__.py").write_text("from .small import *\n")
    (working_folder / "models/small.py").write_text(
        "from utils import make\ndef small(num_classes): return make(num_classes)\n"
    )
    (working_folder / "utils.py").write_text("from net import positional as make\n")
    before, path = dict(sys.modules), list(sys.path)
    assert made("models.small:small", 6).made_for == (6, 1, 0)
    assert made("models:small", 6).made_for == (6, 1, 0)
    assert sys.modules["models"] is models
    assert sys.modules["utils.errors"] is utils.errors
    assert set(sys.modules) - set(before) == {"net"}
    assert sys.path == path


def test_installed_packages_are_found_too():
    model = made("torchvision.models:resnet18", 7, channels=3, size=32)
    assert (model.head_name, model.fc.out_features, model.conv_order[0]) == ("fc", 7, "conv1")


def test_first_weights_are_those_of_the_code_and_follow_the_seed():
    torch.manual_seed(3)
    model = made("net:Net")
    torch.manual_seed(3)
    again = made("net:Net")
    assert torch.equal(model.first.weight, again.first.weight)
    initialise(again, "kaiming_normal", "fan_in", "relu")  # which the program leaves out for such networks
    assert not torch.equal(model.first.weight, again.first.weight)
