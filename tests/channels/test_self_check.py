"""The check at conversion: what a trace does not hold is found, what it holds passes, and nothing is changed by it."""

from __future__ import annotations

import copy
import random
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.toy import batch, one_thread  # noqa: F401
from utils.channels import self_check
from utils.channels.compact import CompactForward
from utils.channels.network import SparseNetwork
from utils.conv_type import sparsify

SHAPE = (3, 8, 8)
CALLS = {"count": 0}


class Net(nn.Module):
    """Two convolutions with batch-norms and a head; `run` is its forward."""

    def __init__(self, run: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc, self.run, self.calls, self.flags = nn.Linear(8, 10), run, 0, [0]

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


def plain(net: Net, x: Tensor) -> Tensor:
    return net.head(F.relu(net.other(net.b(F.relu(net.norm(net.a(x)))))))


def asks_for_training(net: Net, x: Tensor) -> Tensor:
    x = net.b(F.relu(net.norm(net.a(x))))
    return net.head(net.other(x) if net.training else x)


def asks_for_evaluation(net: Net, x: Tensor) -> Tensor:
    return net.head(F.relu(net.norm(net.a(x))) if net.training else F.relu(net.other(net.a(x))))


def counts(net: Net, x: Tensor) -> Tensor:
    net.calls += 1
    x = net.a(x)
    return net.head(net.b(F.relu(x) if net.calls > 1000 else x.tanh()))


def counts_in_a_list(net: Net, x: Tensor) -> Tensor:
    net.flags[0] += 1
    return plain(net, x)


def counts_globally(net: Net, x: Tensor) -> Tensor:
    CALLS["count"] += 1
    return plain(net, x)


def switches(net: Net, x: Tensor) -> Tensor:
    net.calls = 1 - net.calls
    return plain(net, x) if net.calls else net.head(net.norm(net.a(x)))


def without_gradient(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = F.relu(net.norm(net.a(x)))
    return net.head(net.b(x))


def without_gradient_when_training(net: Net, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(not net.training):
        x = F.relu(net.a(x))
    return net.head(net.b(x))


def with_its_own_precision(net: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        x = net.a(x)
    return net.head(net.b(x))


def adds_to_an_alias(net: Net, x: Tensor) -> Tensor:
    x = net.b(F.relu(net.a(x)))
    alias = x.contiguous()
    alias += F.relu(x)
    return net.head(x)


def skips_at_random(net: Net, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.head(net.b(x) if random.random() < 0.999999 else x)


def torchs_random_numbers(net: Net, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.head(net.b(x) if float(torch.rand(())) > 1e-6 else x)


def numpys_random_numbers(net: Net, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.head(net.b(x) if np.random.rand() > 1e-6 else x)  # noqa: NPY002


REFUSED = {
    asks_for_training: "module other runs, which did not run when the network was traced; a forward must not depend",
    asks_for_evaluation: "module norm runs, which did not run when the network was traced",
    counts: "each pass changes attribute 'calls' of module Net, on which later ones may depend",
    counts_in_a_list: "each pass changes attribute 'flags' of module Net",
    counts_globally: "each pass changes global variable 'CALLS'",
    switches: "the result differs from what the plain network computes",
    without_gradient: "the gradient of a.weight is none in the plain network, where torch.no_grad()",
    without_gradient_when_training: "the gradient of a.weight is none in the plain network",
    with_its_own_precision: "module a runs under an autocast of the network's own",
    adds_to_an_alias: "the result differs from what the plain network computes",
    skips_at_random: "in training mode, its forward draws random numbers (random)",
    torchs_random_numbers: "its forward draws random numbers (torch)",
    numpys_random_numbers: "its forward draws random numbers (numpy)",
}


@pytest.mark.parametrize("run", REFUSED, ids=lambda run: run.__name__)
def test_python_that_a_trace_does_not_hold_is_refused(run):
    net = Net(run)
    with pytest.raises(ValueError) as caught:
        SparseNetwork(sparsify(net), SHAPE)
    assert type(caught.value) is ValueError
    assert str(caught.value).startswith("Net cannot be trained by its kept channels: ")
    assert REFUSED[run] in str(caught.value)
    assert (net.calls, net.flags) == (0, [0])  # not even by the tracing


# ---- layers that compute more than their weights ----


def replaced_forward(net: Net) -> None:
    net.b.forward = types.MethodType(lambda conv, x: F.conv2d(x, conv.weight.abs(), conv.bias, padding=1), net.b)


def replaced_convolution(net: Net) -> None:
    net.b._conv_forward = types.MethodType(lambda conv, x, weight, bias: F.conv2d(x, weight, bias, padding=1), net.b)


ATTACHED: dict[str, tuple[Callable[[Net], object], str]] = {
    "weight norm as a hook": (lambda net: nn.utils.weight_norm(net.b), r"module b \(Conv2d\).*remove_weight_norm"),
    "spectral norm as a hook": (lambda net: nn.utils.spectral_norm(net.b), r"module b .*remove_spectral_norm"),
    "pre-hook on the network": (
        lambda net: net.register_forward_pre_hook(lambda module, args: (args[0] - 1,)),
        r"the network \(Net\) has a forward pre-hook",
    ),
    "hook on a layer": (lambda net: net.b.register_forward_hook(print), r"module b \(Conv2d\) has a forward hook"),
    "backward hook": (lambda net: net.a.register_full_backward_hook(print), r"module a .* has a backward hook"),
    "hook on a gradient": (lambda net: net.a.weight.register_hook(abs), r"parameter weight of module a .* hook"),
    "hook behind a gradient": (
        lambda net: net.norm.bias.register_post_accumulate_grad_hook(print),
        r"parameter bias of module norm \(BatchNorm2d\) has a gradient hook",
    ),
    "forward of an instance": (replaced_forward, r"module b \(Conv2d\) has a forward of its own"),
    "convolution of an instance": (replaced_convolution, r"module b \(Conv2d\) has a _conv_forward of its own"),
    "forward of the network": (
        lambda net: setattr(net, "forward", types.MethodType(plain, net)),
        r"the network \(Net\) has a forward of its own",
    ),
    "weight of another layer": (
        lambda net: setattr(net.other, "weight", net.norm.weight),
        r"module other \(BatchNorm2d\) shares its weight with module norm, so neither can lose channels",
    ),
    "no weights yet": (lambda net: setattr(net, "fc", nn.LazyLinear(10)), r"module fc .* has no weights yet"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("case", ATTACHED)
def test_what_is_attached_to_a_layer_is_refused_by_name(case):
    attach, words = ATTACHED[case]
    before, after = Net(plain), sparsify(Net(plain))
    attach(before)
    attach(after)
    for net in (sparsify(before, ["a", "b"]), after):
        with pytest.raises(ValueError, match=words):
            SparseNetwork(net, SHAPE)


# ---- what passes ----


@pytest.mark.parametrize("function", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrized_layer_runs_as_it_is_and_all_of_it_learns(function):
    net = Net(plain)
    function(net.fc)
    network = SparseNetwork(sparsify(net), SHAPE)
    images, _ = batch(4)
    network(images.float(), network.plan(np.arange(network.num_units) % 2 == 0)).square().sum().backward()
    learning = dict(net.fc.named_parameters())
    assert any("parametrizations" in name for name in learning)
    assert all(parameter.grad.count_nonzero() for parameter in learning.values())


def keeps_what_it_saw(net: Net, x: Tensor) -> Tensor:
    net.seen, net.size = x, x.shape[2:] if isinstance(x, Tensor) else None
    return plain(net, x)


def test_a_network_that_keeps_what_it_saw_passes_and_has_nothing_of_the_trace():
    net = Net(keeps_what_it_saw)
    before = dict(vars(net))
    SparseNetwork(sparsify(net), SHAPE)
    assert vars(net).keys() == before.keys()


def test_the_check_changes_nothing():
    net = sparsify(Net(plain))
    net.eval()
    net.norm.train()
    before = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()], torch.get_default_dtype()
    states = random.getstate(), repr(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    network = SparseNetwork(net, SHAPE)
    assert net is network.model
    torch.testing.assert_close(net.state_dict(), before[0], rtol=0, atol=0)
    assert ([m.training for m in net.modules()], torch.get_default_dtype()) == before[1:]
    assert (random.getstate(), repr(np.random.get_state())) == states[:2]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("run", [skips_at_random, torchs_random_numbers, numpys_random_numbers])
def test_the_generators_that_a_forward_draws_from_are_put_back(run):
    network = SparseNetwork(sparsify(Net(run)), SHAPE, self_check=False)
    states = random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
    with pytest.raises(ValueError, match="its forward draws random numbers"):
        self_check.check_conversion(network, SHAPE)
    assert (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()) == states  # noqa: NPY002


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_works_for_networks_of_any_precision(dtype):
    SparseNetwork(sparsify(Net(plain)).to(dtype), SHAPE)


def test_a_tensor_that_the_forward_makes_has_the_precision_of_the_check():
    filtered = Net(lambda net, x: plain(net, F.conv2d(x, torch.ones(3, 3, 1, 1) / 3)))
    network = SparseNetwork(sparsify(filtered), SHAPE)
    assert not [name for name in vars(network.model) if "constant" in name]
    images, plan = torch.rand(4, *SHAPE), network.dense_plan
    torch.testing.assert_close(network(images, plan), network.whole(images))


@pytest.fixture
def large(monkeypatch):
    """Every network counts as large, and rounding errors of float32 as differences."""
    monkeypatch.setattr(self_check, "LARGE", 0)
    monkeypatch.setitem(self_check.TOLERANCES, torch.float32, (0.0, 0.0))


def test_rounding_errors_of_a_large_network_are_told_apart_in_float64(large):
    SparseNetwork(sparsify(Net(plain)), SHAPE)


def test_a_large_network_is_refused_for_what_differs_in_float64_too(large):
    with pytest.raises(ValueError, match="which did not run when the network was traced"):
        SparseNetwork(sparsify(Net(asks_for_training)), SHAPE)


def test_a_large_network_that_does_not_run_in_float64_is_judged_in_float32(large):
    def in_float32(net: Net, x: Tensor) -> Tensor:
        return asks_for_training(net, x.float())

    with pytest.raises(ValueError, match="which did not run when the network was traced"):
        SparseNetwork(sparsify(Net(in_float32)), SHAPE)


# ---- faults of the engine that it finds ----


def zero_gradient(original: Callable) -> Callable:
    def faulty(self, weight, outputs, inputs, grad):
        return original(self, weight, outputs, inputs, 0 * grad)

    return faulty


def other_channels(original: Callable) -> Callable:
    def faulty(self, op, plan, inputs, columns):
        return original(self, op, plan, None if inputs is None else inputs.flip(0), columns)

    return faulty


def twice(original: Callable) -> Callable:
    def faulty(self, op, plan):
        bias = original(self, op, plan)
        return None if bias is None else 1.01 * bias

    return faulty


@pytest.mark.parametrize(
    ("place", "name", "fault", "words"),
    [
        ("GradientBuffers", "add_", zero_gradient, "in training mode under a mask, the gradient of "),
        ("CompactForward", "_weight", other_channels, "under a mask, the result differs .*, first behind module b"),
        ("CompactForward", "_bias", twice, "in training mode, the .*differs"),
    ],
)
def test_a_fault_of_compact_execution_is_found(place, name, fault, words, monkeypatch):
    from utils.channels import compact

    holder = getattr(compact, place)
    monkeypatch.setattr(holder, name, fault(getattr(holder, name)))
    with pytest.raises(ValueError, match=words):
        SparseNetwork(sparsify(Net(plain)), SHAPE)
    SparseNetwork(sparsify(Net(plain)), SHAPE, self_check=False)


def test_an_exception_of_compact_execution_is_one_sentence(monkeypatch):
    def fails(*_):
        raise IndexError("<Net object at 0x7f00> has no\nsuch thing.")

    monkeypatch.setattr(CompactForward, "_bias", fails)
    with pytest.raises(ValueError) as caught:
        SparseNetwork(sparsify(Net(plain)), SHAPE)
    assert str(caught.value).endswith("in training mode, its compact execution fails: <Net object")


def test_where_the_plain_network_itself_fails_the_module_and_the_line_are_named():
    def fails_in_training(net: Net, x: Tensor) -> Tensor:
        return net.head(net.a(x).reshape(-1, 7) if net.training else net.a(x))

    net = Net(fails_in_training).eval()
    with pytest.raises(ValueError, match=r"itself, in training mode, in module Net \(test_self_check.py:\d+\): shape"):
        SparseNetwork(sparsify(net), SHAPE)


# ---- images of another size ----


class Joined(nn.Module):
    """A concatenation and a residual stream, whose layers may be empty."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1), nn.Conv2d(12, 4, 3, padding=1)
        self.d, self.e, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(torch.cat([self.a(x), self.b(x)], 1))
        return self.fc((x + self.e(F.relu(self.d(x)))).mean((2, 3)))


def test_images_of_another_size_are_followed():
    model = sparsify(Joined()).double()
    compact, masked = (SparseNetwork(model, SHAPE, execution=e, multiple=8) for e in ("compact", "masked"))
    draw = np.random.default_rng(0)
    for shape in ((3, 12, 12), (3, 8, 5)):
        images, _ = batch(2, image_shape=shape)
        for _ in range(10):
            plan = compact.plan(draw.random(compact.num_units) < 0.3)
            torch.testing.assert_close(compact(images, plan), masked(images, plan))


def test_images_of_a_size_that_does_not_fit_are_always_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 10))
    network = SparseNetwork(sparsify(net), SHAPE)
    for mask_U in (np.ones(4, dtype=bool), np.array([True, False, False, False])):
        with pytest.raises(ValueError, match="cannot read images of 3 channels and 12x12 pixels"):
            network(torch.zeros(2, 3, 12, 12), network.plan(mask_U))
    for shape in ((2, 8, 8), (2, 3, 8), (2, 1, 8, 8)):
        with pytest.raises(ValueError, match="images have the shape"):
            network(torch.zeros(shape), network.dense_plan)


# ---- layers that never run ----


class Ghost(nn.Module):
    """A layer that never runs, and one whose result nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.never, self.unread, self.fc = nn.Conv2d(8, 100, 1), nn.Conv2d(8, 50, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        self.unread(x)
        return self.fc(F.relu(self.b(x)).mean((2, 3)))


def test_units_that_the_logits_do_not_depend_on_are_not_counted():
    network = SparseNetwork(sparsify(Ghost()), SHAPE)
    assert (network.num_units, list(network.layers)) == (16, ["a", "b"])
    assert network.expected_cost("params").dense == network.dense_parameters
    assert sorted(name for name in network.model.state_dict() if "scores" in name) == ["a.scores", "b.scores"]
