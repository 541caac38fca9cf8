"""A CUDA device that is emulated on the CPU, so that a machine without a GPU can tell how the program treats one.

Inside `emulated_cuda()` tensors may be on `cuda:0`. Each of them holds an ordinary CPU tensor that does the computing,
so results are numbers and can be compared with those of a CPU bit by bit. The device refuses what a GPU refuses: an
operation on tensors of two devices, `numpy()` of its tensors, and random numbers from a generator of the CPU. A copy
to the host that does not block holds garbage until somebody waits for it. A log says where the host waits and what is
copied.

C++ is told "meta" wherever Python says "cuda": it runs its dispatcher and autograd on that device without having one.
`_Naming` translates between the two names. `_Execution` gets every operation of the dispatcher, those of backward
passes included, and runs it on the CPU tensors that are held.

What it cannot show: autocast, which does not see these tensors, so bf16 is left to a real card; the kernels of a GPU
and their rounding; several streams or GPUs; memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.emulated.log import Copy, Log, place
from tests.emulated.nested import leaves, mapped
from tests.emulated.stand_ins import Event, Generator, Stream

CUDA, HOST, META = torch.device("cuda:0"), torch.device("cpu"), torch.device("meta")
GARBAGE = 0xA5  # every byte of a copy that has not arrived
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
TAKE_NUMBERS = ("fill", "fill_", "masked_fill", "masked_fill_", *INDEXING)  # beside what works number by number

# ---- tensors ----


class CudaTensor(Tensor):
    """A tensor on the device.

    Attributes:
        held: its numbers, in the same shape and memory format, on the CPU.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> CudaTensor:
        layout = {"dtype": held.dtype, "strides": held.stride(), "storage_offset": held.storage_offset()}
        with torch.inference_mode(False):
            new = Tensor._make_wrapper_subclass(cls, held.size(), device=META, requires_grad=requires_grad, **layout)
        new.held = held.detach()
        return new

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: object) -> Any:
        raise RuntimeError(f"{function} of a tensor on the emulated device, outside of `emulated_cuda`")

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @property
    def data(self) -> CudaTensor:
        return CudaTensor(self.held)

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, CudaTensor):
            raise NotImplementedError("a tensor on the emulated device cannot become one on the CPU in place")
        Tensor.data.__set__(self, value)
        self.held = value.held

    def numpy(self, *_: object, **__: object) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        new = CudaTensor(self.held.clone(), self.requires_grad)
        memo[id(self)] = new = nn.Parameter(new, self.requires_grad) if isinstance(self, nn.Parameter) else new
        return new

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)  # in a file it is as one that is loaded to the CPU

    def __repr__(self, **_: object) -> str:
        return f"CudaTensor({self.held!r})"


def held(value: Any) -> Any:
    """The CPU tensor that holds the numbers of a tensor on the device; anything else as it is."""
    return value.held if isinstance(value, CudaTensor) else value


def is_elsewhere(value: Any) -> bool:
    """Whether it is a tensor, but not on the device."""
    return isinstance(value, Tensor) and not isinstance(value, CudaTensor)


# ---- operations ----


class _Execution(TorchDispatchMode):
    """Runs what the dispatcher is asked for, by the program, by a backward pass or by C++ itself.

    Attributes:
        means_meta: whether "meta" is that very device just now, and no other name of this one.
        pinned: page-locked memory by its address; it is kept, so that no other memory gets the address.
    """

    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log
        self.means_meta = False
        self.pinned: dict[int, Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = dict(kwargs or {}), function.overloadpacket.__name__
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
        asked = kwargs.get("device")
        makes = asked is not None and torch.device(asked).type == "meta" and not self.means_meta
        if not here and not makes:
            return function(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # here only, operations that consist of others come as they are
            with self:
                if (result := function.decompose(*args, **kwargs)) is not NotImplemented:
                    return result
        if name == "_to_copy":
            return self._copied(args[0], makes or (asked is None and bool(here)), kwargs)
        if name == "copy_":
            return self._copy_into(*args, **kwargs)
        if name in INDEXING:
            args = (args[0], [self._index(index) for index in args[1]], *args[2:])
            tensors = [args[0], *args[2:]]
        elif {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags):
            self.log.wait()
        if any(map(is_elsewhere, tensors)):
            takes_numbers = torch.Tag.pointwise in function.tags or name in TAKE_NUMBERS
            _check_same_device(name, tensors, takes_numbers and bool(here))
        return self._run(function, args, {**kwargs, "device": HOST} if makes else kwargs, here)

    def _run(self, function: Any, args: tuple, kwargs: dict, here: list[CudaTensor]) -> Any:
        """Runs an operation on the CPU. What it gives back in place is the tensor that it was given."""
        results = function(*mapped(held, args), **mapped(held, kwargs))
        if torch.Tag.inplace_view in function.tags:  # it has changed the shape of what is held
            with torch._C._DisableTorchDispatch():
                function(*args, **kwargs)
        given = {id(tensor.held): tensor for tensor in here}

        def on_device(result: Any) -> Any:
            if id(result) in given:
                return given[id(result)]
            return CudaTensor(result) if isinstance(result, Tensor) else result

        return mapped(on_device, results)

    def _index(self, index: Tensor | None) -> Tensor | None:
        """Torch sends an index from the host by itself. It waits to learn how often a mask on the device is True."""
        if is_elsewhere(index):
            return self._copied(index, True, {})
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            self.log.wait()
        return index

    # ---- copies ----

    def _copied(self, source: Tensor, to_device: bool, options: dict) -> Tensor:
        """The operation behind `Tensor.to`."""
        blocking = not options.get("non_blocking", False)
        form = {key: value for key, value in options.items() if key not in ("device", "non_blocking", "pin_memory")}
        new = torch.ops.aten._to_copy.default(held(source), **form, device=HOST)
        if isinstance(source, CudaTensor) and to_device:
            return CudaTensor(new)
        return self._transfer(source, CudaTensor(new) if to_device else torch.empty_like(new), new, blocking)

    def _copy_into(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if isinstance(target, CudaTensor) and isinstance(source, CudaTensor):
            target.held.copy_(source.held)
            return target
        arriving = held(source).to(target.dtype).expand(target.shape).clone()
        return self._transfer(source, target, arriving, not non_blocking)

    def _transfer(self, source: Tensor, target: Tensor, arriving: Tensor, blocking: bool) -> Tensor:
        """A copy between the host and the device. `arriving` has the numbers as the target will hold them."""
        to_device = isinstance(target, CudaTensor)
        # torch pins by itself what `Tensor.to` makes on the host without blocking
        pinned = self.is_pinned(source) if to_device else self.is_pinned(target) or not blocking
        self.log.copies.append(Copy(to_device, pinned, blocking, arriving.nbytes, place()))
        if not to_device:
            target.copy_(_garbage_like(arriving))
            self.log.queue(lambda: target.copy_(arriving))
        else:
            target.held.copy_(arriving)
            if pinned:  # other memory has been read when the call returns
                sent = source.clone()
                self.log.queue(lambda: _check_unchanged(source, sent))
        if blocking:
            self.log.wait()
        return target

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned


def _check_same_device(name: str, tensors: list[Any], takes_numbers: bool) -> None:
    """Raises RuntimeError for tensors elsewhere, but for numbers without dimensions where the operation takes them."""
    tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    foreign = [t for t in tensors if is_elsewhere(t) and (t.dim() > 0 or t.device == META or not takes_numbers)]
    if foreign:
        told = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two: {name} of {told}")


def _garbage_like(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bool:
        return torch.ones_like(tensor)  # other bytes are no truth values
    return torch.full((tensor.nbytes,), GARBAGE, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)


def _check_unchanged(source: Tensor, sent: Tensor) -> None:
    if not torch.equal(source, sent):
        raise RuntimeError("page-locked memory was changed before the device had read it")


# ---- names ----


class _Naming(TorchFunctionMode):
    """Tells C++ "meta" where Python says "cuda", and does what C++ would do wrong under that name."""

    def __init__(self, execution: _Execution) -> None:
        super().__init__()
        self.execution = execution

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if function.__name__ == "__get__":  # most of all calls
            return function(*args)
        if function is torch._C._nn._parse_to:  # reads the arguments of `nn.Module.to`, and makes no tensor
            return function(*args, **kwargs)
        if function is torch._has_compatible_shallow_copy_type:  # so that `nn.Module.to` makes new parameters
            return False
        if function is Tensor.cuda:
            function, args = Tensor.to, (args[0], CUDA)
        if function in (Tensor.__getitem__, Tensor.__setitem__) and is_here(args[0]):  # C++ would lose lists
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            lists_sent = tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
            args = (args[0], lists_sent, *args[2:])
        if function is Tensor.is_pinned:
            return is_elsewhere(args[0]) and self.execution.is_pinned(args[0])
        if function is Tensor.pin_memory:
            return self.execution.pin(args[0].clone())
        if kwargs.pop("pin_memory", False):
            return self.execution.pin(function(*args, **kwargs))
        asked, given = _device_asked_for(function, args, kwargs), list(leaves((args, kwargs)))
        for generator in given:
            if isinstance(generator, torch._C.Generator):
                _check_generator(generator, asked or ("cuda" if any(map(is_here, given)) else "cpu"))
        if asked == "meta":
            args, kwargs = mapped(held, args), mapped(held, kwargs)  # only shapes matter
        if asked == "meta" or any(isinstance(value, Tensor) and value.device == META for value in given):
            with self._meaning_meta():
                return function(*args, **kwargs)
        if asked == "cuda":
            if function in (torch.tensor, torch.as_tensor) and not is_here(args[0]):
                return function(*args, **{**kwargs, "device": HOST}).to(META)  # made on "meta" it would have no numbers
            if "device" in kwargs:
                kwargs["device"] = META
            else:
                args = (args[0], META, *args[2:])
        return function(*args, **kwargs)

    @contextmanager
    def _meaning_meta(self) -> Iterator[None]:
        before, self.execution.means_meta = self.execution.means_meta, True
        try:
            yield
        finally:
            self.execution.means_meta = before


def is_here(value: Any) -> bool:
    return isinstance(value, CudaTensor)


def _device_asked_for(function: Any, args: tuple, kwargs: dict) -> str | None:
    """The type of the device that a call names; None if it names none."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type
    names_it = function is Tensor.to and len(args) > 1 and isinstance(args[1], str | torch.device)
    return torch.device(args[1]).type if names_it else None


def _check_generator(generator: torch._C.Generator, needed: str) -> None:
    if generator.device.type != needed:
        raise RuntimeError(f"Expected a '{needed}' device type for generator but found '{generator.device.type}'")


# ---- what the program and torch itself ask for ----


def _grouped(group: Callable[..., dict], tensors: list, *options: Any) -> dict:
    """What optimizers and clipping ask C++ for, which tells them the device of each group."""
    device_of = {META: CUDA} if any(map(is_here, leaves(tensors))) else {}
    return {(device_of.get(device, device), kind): found for (device, kind), found in group(tensors, *options).items()}


@contextmanager
def emulated_cuda() -> Iterator[Log]:
    """Inside, there is one CUDA device, `cuda:0`. Gives its log. Tensors on it are of no use afterwards."""
    log = Log()
    execution = _Execution(log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch.cuda, "Event", lambda **_: Event(log))
        patch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(log))
        patch.setattr(torch.cuda, "synchronize", lambda device=None: log.wait())
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "emulated")
        group = torch._C._group_tensors_by_device_and_dtype
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", partial(_grouped, group))
        with execution, _Naming(execution):
            yield log
