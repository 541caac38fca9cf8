"""The emulated device itself: what its tensors say, what it refuses and writes down, and that it leaves nothing."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.emulated.device import CUDA, HOST, CudaTensor, Generator, emulated_cuda
from tests.emulated.log import Log


@pytest.fixture
def log() -> Iterator[Log]:
    """Of the device that is there in the test."""
    with emulated_cuda() as log:
        yield log


def here() -> str:
    """The test that runs, as the log names it."""
    return f"tests/emulated/test_device.py {inspect.stack()[1].function}"


# ---- tensors and results ----


@pytest.mark.parametrize("make", [
    lambda: torch.zeros(3, device="cuda"), lambda: torch.tensor([1.0], device=CUDA), lambda: torch.ones(3).to(CUDA),
    lambda: torch.ones(3).cuda(), lambda: torch.ones(3).to(torch.zeros(1, device=CUDA)),
    lambda: nn.Linear(2, 3).to("cuda").weight, lambda: torch.ones(3, device=CUDA)[1:].double().sum(),
])  # fmt: skip
def test_a_tensor_says_that_it_is_on_the_device(log, make):
    tensor = make()
    assert isinstance(tensor, CudaTensor)
    assert (tensor.device, tensor.is_cuda, tensor.is_cpu, tensor.is_meta) == (CUDA, True, False, False)
    assert tensor.cpu().device == HOST
    assert not isinstance(tensor.cpu(), CudaTensor)


def test_to_is_a_copy_only_where_something_changes(log):
    tensor = torch.ones(3, device=CUDA)
    assert tensor.to("cuda") is tensor
    assert tensor.to(CUDA, torch.float32) is tensor
    assert tensor.to(torch.float64).dtype == torch.float64
    assert tensor.to(torch.zeros(2, dtype=torch.float64)).device == HOST
    assert log.waits == {here(): 1}  # the last one


def test_numbers_and_gradients_are_those_of_the_cpu(log):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    there = copy.deepcopy(model).to(CUDA)
    F.cross_entropy(model(images), labels).backward()
    F.cross_entropy(there(images.to(CUDA)), labels.to(CUDA)).backward()
    for expected, actual in zip(model.parameters(), there.parameters(), strict=True):
        assert isinstance(actual, nn.Parameter)
        assert actual.grad.device == CUDA
        assert torch.equal(actual.grad.cpu(), expected.grad)
    with torch.inference_mode():
        assert torch.equal(there(images.to(CUDA)).cpu(), model(images))


def test_meta_is_a_device_of_its_own(log):
    shape = nn.Linear(2, 3).to(CUDA).to("meta").weight
    assert shape.device.type == "meta"
    assert not isinstance(shape, CudaTensor)
    assert torch.zeros(2, 2, device="meta").sum(0).new_zeros(4).device.type == "meta"
    with torch.device("meta"):
        assert F.linear(torch.ones(4, 2), torch.ones(3, 2)).shape == (4, 3)
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=CUDA) * torch.ones((), device="meta")


# ---- what it refuses ----


@pytest.mark.parametrize("operation", [
    lambda a, b: a + b, lambda a, b: a.add_(b), lambda a, b: b.add_(a), lambda a, b: torch.stack([a, b]),
    lambda a, b: b.mul_(a[0]), lambda a, b: a.index_select(0, b.long()), lambda a, b: torch.where(a > 0, a, b),
    lambda a, b: a.__setitem__(a.long(), b), lambda a, b: F.linear(b, a.diag()),
])  # fmt: skip
def test_tensors_of_two_devices_do_not_meet(log, operation):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        operation(torch.ones(3, device=CUDA), torch.ones(3))


def test_a_number_from_the_host_may_meet_a_tensor_number_by_number(log):
    tensor, number = torch.ones(3, device=CUDA), torch.tensor(2.0)
    assert (tensor * number).tolist() == [2.0, 2.0, 2.0]
    assert tensor.masked_fill(tensor > 0, number).tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.stack([tensor[0], number])


@pytest.mark.parametrize("read", [lambda tensor: tensor.numpy(), np.asarray, lambda tensor: tensor.detach().numpy()])
def test_numpy_does_not_read_it(log, read):
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        read(torch.ones(3, device=CUDA))


def test_a_generator_draws_for_its_own_device(log):
    own, of_host = torch.Generator(CUDA).manual_seed(3), torch.Generator().manual_seed(3)
    assert (own.device, of_host.device) == (CUDA, HOST)
    drawn = torch.rand(5, generator=own, device=CUDA)
    assert torch.equal(drawn.cpu(), torch.rand(5, generator=of_host))
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.rand(5, generator=of_host, device=CUDA)
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.bernoulli(drawn, generator=of_host)
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
        torch.randperm(5, generator=own)


# ---- waits and copies ----


@pytest.mark.parametrize(("wait", "count"), [
    (lambda x: x.sum().item(), 1), (lambda x: float(x[0]), 1), (lambda x: bool(x[0]), 1), (lambda x: x.tolist(), 1),
    (lambda x: x.cpu(), 1), (lambda x: x.to("cpu"), 1), (lambda x: torch.ones(3).copy_(x), 1),
    (lambda x: torch.ones(3).to(CUDA), 1), (lambda x: x.copy_(torch.ones(3)), 1),
    (lambda x: torch.tensor([1.0], device=CUDA), 1), (lambda x: x.nonzero(), 1), (lambda x: x[x > 0], 1),
    (lambda x: torch.equal(x, x), 1), (lambda x: x[torch.tensor([0, 1])], 1), (lambda x: x[[0, 1]].cpu(), 2),
    (lambda x: torch.cuda.synchronize(), 1), (lambda x: torch.cuda.current_stream().synchronize(), 1),
    (lambda x: x + 1, 0), (lambda x: x[0], 0), (lambda x: x.new_zeros(4), 0), (lambda x: x[x.long()], 0),
    (lambda x: x.masked_fill(x > 0, 0.0), 0), (lambda x: torch.ones(3).to(CUDA, non_blocking=True), 0),
    (lambda x: x.to("cpu", non_blocking=True), 0), (lambda x: torch.where(x > 0, x, 0.0), 0), (len, 0), (repr, 0),
])  # fmt: skip
def test_what_waits_is_written_down(log, wait, count):
    tensor = torch.ones(3, device=CUDA)
    log.clear()
    wait(tensor)
    assert log.waits.total() == count


def test_waits_are_written_down_by_place(log):
    torch.ones(3, device=CUDA).sum().item()
    assert log.waits == {here(): 1}
    assert log.copies == []


def test_copies_are_written_down(log):
    torch.ones(3).to(CUDA, non_blocking=True)
    torch.ones(5).pin_memory().to(CUDA, non_blocking=True)
    torch.ones(2, dtype=torch.float64, device=CUDA).cpu()
    found = [(c.to_device, c.pinned, c.blocking, c.num_bytes) for c in log.copies]
    assert found == [(True, False, False, 12), (True, True, False, 20), (False, False, True, 16)]
    assert {copy.place for copy in log.copies} == {here()}


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_a_copy_to_the_host_is_garbage_until_somebody_waits(log, dtype):
    sent = torch.zeros(4, dtype=dtype, device=CUDA)
    on_host, later = sent.to("cpu", non_blocking=True), torch.ones(4, dtype=dtype)
    arrived = torch.cuda.current_stream().record_event()
    later.copy_(sent, non_blocking=True)
    sent.fill_(1)  # comes after the copies
    assert not arrived.query()
    assert (on_host != 0).all()
    arrived.synchronize()
    assert arrived.query()
    assert (on_host == 0).all()
    assert (later != 0).all()  # the event was recorded before this copy
    torch.cuda.synchronize()
    assert (later == 0).all()


def test_pinned_memory_must_not_change_while_it_is_read(log):
    memory = torch.empty(3, pin_memory=True)
    assert memory.is_pinned()
    assert not torch.empty(3).is_pinned()
    memory.fill_(1)
    sent = memory.to(CUDA, non_blocking=True)
    torch.cuda.synchronize()
    memory.fill_(2)  # the device has read it
    sent = memory[1:].to(CUDA, non_blocking=True)
    memory.fill_(3)
    with pytest.raises(RuntimeError, match="page-locked memory was changed"):
        sent.cpu()


# ---- what it leaves behind ----


def test_nothing_is_left_of_it():
    def patched() -> list[object]:
        names = ("Event", "current_stream", "synchronize", "device_count", "get_device_name")
        return [torch.Generator, torch._C._group_tensors_by_device_and_dtype, *(getattr(torch.cuda, n) for n in names)]

    before = patched()
    with contextlib.suppress(ZeroDivisionError), emulated_cuda():
        assert torch.Generator is Generator
        tensor = torch.ones(3, device=CUDA)
        assert all(a is not b for a, b in zip(before, patched(), strict=True))
        raise ZeroDivisionError
    assert all(a is b for a, b in zip(before, patched(), strict=True))
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert type(torch.ones(2) + 1) is torch.Tensor
    with pytest.raises(RuntimeError, match="outside of `emulated_cuda`"):
        tensor + 1
