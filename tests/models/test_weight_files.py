"""Files of weights as people have them, read into a network of this project or refused in one sentence."""

from __future__ import annotations

import argparse
import builtins
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from models import build_model
from models.pretrained import load_pretrained
from tests.models.test_pretrained import saved, small
from tests.toy import one_thread  # noqa: F401
from utils.errors import UserError

State = dict[str, Tensor]
NAMESPACE = argparse.Namespace(lr=0.1, output=Path("runs"), rate=np.float32(0.5))


@pytest.fixture(scope="module")
def state() -> State:
    """Weights that differ from those of every network that the tests start with."""
    return {name: value + 1 for name, value in small().state_dict().items()}


def named(prefix: str) -> Callable[[State], object]:
    return lambda state: {prefix + name: value for name, value in state.items()}


def in_layer(state: State) -> State:
    """One layer alone was wrapped, as VGGs for DataParallel and compiled blocks are."""
    return {name.replace("layer1.", "layer1._orig_mod."): value for name, value in state.items()}


def averaged(state: State) -> State:
    model = small()
    model.load_state_dict(state)
    return AveragedModel(model).state_dict()


def released(state: State) -> dict[str, object]:
    """model_best.pth of the released code: scores and masks lie beside the weights."""
    units = {name[:-6]: len(value) for name, value in state.items() if name.endswith("conv1.weight")}
    extra = ("scores", "subnet", "stored_mask_0", "stored_mask_1")
    masks = {f"{layer}{key}": torch.ones(count, 1, 1, 1) for layer, count in units.items() for key in extra}
    return {"epoch": 3, "arch": "resnet32", "state_dict": named("module.")({**state, **masks}), "best_acc1": 90.0}


@pytest.mark.parametrize(
    ("wrap", "told"),
    [
        (named("module."), "without module."),
        (named("_orig_mod."), "without _orig_mod."),
        (named("_orig_mod.module."), "without module. and _orig_mod."),
        (named("net."), "without net."),
        (in_layer, "without _orig_mod."),
        (averaged, "without module."),
        (lambda state: {"net": state, "acc": 95.0}, "without the key 'net'"),
        (lambda state: {"state_dict": named("model.")(state), "hyper_parameters": {}}, "'state_dict' and model."),
        (lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}}, "'model_state_dict'"),
        (lambda state: {"model": state, "args": NAMESPACE, "epoch": 1}, ""),
        (lambda state: {"model": {"name": "x"}, "state_dict": state, "best": np.float64(90.0)}, "'state_dict'"),
        (released, "the key 'state_dict' and module."),
    ],
)
def test_what_training_programs_wrap_weights_in_is_taken_off(wrap, told, state, tmp_path, capsys):
    model, path = small(), saved(wrap(state), tmp_path / "weights.pt")
    load_pretrained(model, path)
    said = capsys.readouterr().out
    assert said.rstrip().endswith(told) if told else said == ""
    assert (f"{path}: reading the weights" in said) == bool(told)
    for name, value in model.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(value, state[name]), name


def test_a_file_without_checksums_is_read_with_a_warning(state, tmp_path, capsys):
    """The format of torch before 1.6, and safetensors. Of an archive the test above sees that nothing is said."""
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "weights.safetensors")
    for name in ("old.pt", "weights.safetensors"):
        model = small()
        load_pretrained(model, str(tmp_path / name))
        assert torch.equal(model.conv1.weight, state["conv1.weight"])
        warning = f"warning: {tmp_path / name} has no checksums, so a damaged number in it would not be noticed\n"
        assert capsys.readouterr().out.endswith(warning)


def test_safetensors_are_read_by_what_is_in_them(state, tmp_path, monkeypatch):
    save_file(named("module.")(state), tmp_path / "weights.bin")
    model = small()
    load_pretrained(model, str(tmp_path / "weights.bin"))
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "weights.bin").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"cut.safetensors: not a readable checkpoint or state dict"):
        load_pretrained(small(), str(tmp_path / "cut.safetensors"))
    real = builtins.__import__

    def refuse(name: str, *others: object) -> object:
        if name.startswith("safetensors"):
            raise ModuleNotFoundError(name=name)
        return real(name, *others)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(
        UserError, match="package safetensors is not installed; run `python -m pip install safetensors`"
    ):
        load_pretrained(small(), str(tmp_path / "weights.bin"))


def test_names_that_the_network_has_itself_are_left_alone(tmp_path):
    """A network with a part called module, whose names must not be cut."""
    theirs = nn.ModuleDict({"module": nn.Linear(2, 2)})
    theirs.head_name = "module"
    nn.init.constant_(theirs["module"].weight, 3.0)
    path = saved(theirs.state_dict(), tmp_path / "own.pt")
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    model.head_name = "module"
    load_pretrained(model, path)
    assert (model["module"].weight == 3).all()


def test_a_linear_classifier_fits_a_convolution_of_1x1(state, tmp_path):
    linear = {**state, "linear.weight": state["linear.weight"].flatten(1)}
    model = small()
    load_pretrained(model, saved(linear, tmp_path / "linear.pt"))
    assert torch.equal(model.linear.weight, state["linear.weight"])


class Runs:
    """What a pickle can do."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    ("content", "named"),
    [(Runs(), "posix.system"), (nn.Linear(1, 1), "torch.nn.modules.linear.Linear")],
)
def test_code_in_a_file_does_not_run_and_its_class_is_named(content, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_pretrained(small(), saved({"state_dict": content}, tmp_path / "weights.pt"))
    assert f"it holds an object of the class {named}, and reading that could run code" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("conv1.weight", float("nan"), "conv1.weight has 1 of 108 values that are NaN or infinite"),
        ("bn.bias", -float("inf"), "bn.bias has 1 of 4 values that are NaN or infinite"),
        ("bn.running_mean", float("inf"), "bn.running_mean has 1 of 4"),
        ("bn.running_var", -0.5, "bn.running_var has negative values"),
    ],
)
def test_values_that_no_training_can_start_from_are_refused(name, value, message, state, tmp_path):
    broken = {key: tensor.clone() for key, tensor in state.items()}
    broken[name].view(-1)[0] = value
    model = small()
    before = model.conv1.weight.clone()
    with pytest.raises(UserError, match=f"^--pretrained .*weights.pt: {message}"):
        load_pretrained(model, saved(broken, tmp_path / "weights.pt"))
    assert torch.equal(model.conv1.weight, before)


def test_other_number_formats_are_cast_or_refused(state, tmp_path):
    model = small()
    load_pretrained(model, saved({name: value.half() for name, value in state.items()}, tmp_path / "half.pt"))
    torch.testing.assert_close(model.conv1.weight.detach(), state["conv1.weight"], atol=1e-2, rtol=1e-3)
    large = {**state, "conv1.weight": state["conv1.weight"].double() * 1e300}
    with pytest.raises(UserError, match="108 of 108 values that are NaN or infinite in float32"):
        load_pretrained(small(), saved(large, tmp_path / "double.pt"))
    whole = {**state, "conv1.weight": state["conv1.weight"].to(torch.int8)}
    with pytest.raises(UserError, match=r"conv1.weight is of type int8, not floating point"):
        load_pretrained(small(), saved(whole, tmp_path / "int8.pt"))


def test_a_flipped_bit_and_what_is_no_file_are_refused(state, tmp_path):
    path = Path(saved(state, tmp_path / "weights.pt"))
    content = bytearray(path.read_bytes())
    content[content.index(state["conv1.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"weights.pt: it is damaged \(wrong checksum in weights/data/\d+\); fetch"):
        load_pretrained(small(), str(path))
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(UserError, match=r"pipe.pt: it is a named pipe and no file"):
        load_pretrained(small(), str(tmp_path / "pipe.pt"))
    with pytest.raises(UserError, match="it has the keys 'a', 'b', and weights are looked for under model, state_dict"):
        load_pretrained(small(), saved({"a": 1, "b": 2}, tmp_path / "other.pt"))


def test_weights_of_the_released_network_fit_ours_by_name():
    """Its modules have these names; `released` above only imitates the file."""
    names = set(build_model("resnet32", 10, 3, 32, 0.125).state_dict())
    assert {
        "conv1.weight",
        "bn.running_var",
        "layer2.0.shortcut.0.weight",
        "layer3.4.bn2.bias",
        "linear.weight",
    } <= names
