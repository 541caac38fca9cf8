"""Arguments of the calls that convert a network: each wrong one is one sentence, and the network is as it was."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tests.toy import one_thread  # noqa: F401
from utils.channels.budget import Budget
from utils.channels.network import SparseNetwork
from utils.conv_type import sparsify

SHAPE = (3, 8, 8)


class Own(nn.Conv2d):
    """A convolution that somebody derived."""


def net() -> nn.Sequential:
    layers = {
        "first": nn.Conv2d(3, 4, 3),
        "norm": nn.BatchNorm2d(4),
        "second": nn.Conv2d(4, 4, 3),
        "grouped": nn.Conv2d(4, 4, 1, groups=2),
        "depthwise": nn.Conv2d(4, 4, 1, groups=4),
        "own": Own(4, 4, 1),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "head": nn.Linear(4, 10),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"maskable": "first"}, r"maskable is a list of names, got the text 'first'; write \['first'\]"),
        ({"maskable": ["frist"]}, "maskable names 'frist', and Sequential has no such module; did you mean 'first'?"),
        ({"maskable": ["first", 7]}, "maskable names 7, and Sequential has no such module"),
        ({"maskable": ["first", "head"]}, r"cannot mask module head \(Linear\): only plain nn.Conv2d layers"),
        ({"maskable": ["first", "grouped"]}, r"cannot mask module grouped \(Conv2d\): it is a grouped convolution"),
        ({"maskable": ["first", "depthwise"]}, r"cannot mask module depthwise \(Conv2d\): .* a depthwise one follows"),
        ({"maskable": ["first", "own"]}, r"cannot mask module own \(Own\): only plain nn.Conv2d layers"),
        ({"maskable": []}, "no layer is left to mask"),
        *(
            ({"maskable": ["first"], "score_init": value}, r"score_init is a probability in \(0, 1\], got ")
            for value in (50, float("nan"), 0.0, -0.5, True, "0.5", None, [0.5])
        ),
    ],
)
def test_what_sparsify_refuses_leaves_the_network_as_it_was(arguments, words):
    model = net()
    kinds, state = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words) as caught:
        sparsify(model, **arguments)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == kinds
    assert model.state_dict().keys() == state.keys()
    assert not any(vars(module).get("training") is not True for module in model.modules())


def test_a_network_is_made_maskable_once():
    model = sparsify(net(), ["first", "first"])
    with pytest.raises(ValueError, match=r"module first \(Conv2d\): it has scores already; start from a fresh network"):
        sparsify(model, ["first", "second"])
    assert "second.scores" not in model.state_dict()
    with pytest.raises(ValueError, match="model is a network"):
        sparsify("resnet18")


@pytest.mark.parametrize("score_init", [1, np.float32(0.5), 0.25])
def test_scores_are_numbers_that_masks_can_be_drawn_from(score_init):
    model = sparsify(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10)), score_init=score_init)
    scores = SparseNetwork(model, SHAPE).scores
    assert (scores.dtype, scores.tolist()) == (torch.float32, [float(score_init)] * 4)


@pytest.fixture
def model() -> nn.Module:
    return sparsify(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"execution": "compakt"}, "execution is one of compact, masked, released, got 'compakt'"),
        ({"residual_masks": "Tied"}, "residual_masks is one of free, tied, got 'Tied'"),
        ({"precision": "fp16"}, "precision is one of fp32, bf16, got 'fp16'"),
        ({"multiple": 0}, "multiple is a whole number of channels, at least 1, or None, got 0"),
        ({"multiple": 1.5}, "multiple is a whole number"),
        ({"image_shape": (8, 8)}, r"image_shape is \(channels, height, width\), each at least 1, got \(8, 8\)"),
        ({"image_shape": (3, 8, 0)}, "image_shape is"),
        ({"image_shape": 32}, "image_shape is .* got 32"),
        ({"image_shape": "3x8x8"}, "image_shape is"),
        ({"model": nn.Conv2d}, "model is a network"),
        ({"model": nn.Flatten()}, "has no parameters"),
    ],
)
def test_what_a_sparse_network_refuses(model, options, words):
    arguments = {"model": model, "image_shape": SHAPE, **options}
    with pytest.raises(ValueError, match=words):
        SparseNetwork(arguments.pop("model"), arguments.pop("image_shape"), **arguments)


def test_masks_and_budgets_that_are_none(model):
    network = SparseNetwork(model, SHAPE)
    for mask in (np.ones(5, dtype=bool), np.ones(4), [True] * 4, torch.ones(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="a mask is a numpy array of 4 bool, one for each unit, got "):
            network.plan(mask)
    with pytest.raises(ValueError, match="the unit of a budget is one of channels, params, flops, got 'macs'"):
        Budget(network, "macs")
    for keep_ratio in (0.0, 50, float("nan")):
        with pytest.raises(ValueError, match=r"keep_ratio is a fraction in \(0, 1\], got "):
            Budget(network).project_(keep_ratio)
