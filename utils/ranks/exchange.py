"""What ranks, the processes that train one network together, say to each other. Alone, every function does nothing.

Each rank computes its part of every batch. Afterwards all have the same weights, statistics, scores and optimizer
state, bit by bit: what they are computed from is exchanged, or is the same everywhere to begin with.

Numbers on the device go through NCCL on GPUs and through gloo on CPUs; those on the host always through gloo.

Legend: C channels of all batch-norms of a network.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.channels.network import SparseNetwork
from utils.channels.plan import Plan
from utils.errors import RankError, UserError
from utils.ranks.launch import local_rank, num_started
from utils.ranks.watch import watched

# A rank that dies is noticed at once, and one that is stopped after a minute (see `watched`). This is for one whose
# program hangs, so it must outlast honest work that the others wait for: a download, a checkpoint on a slow disk, the
# check of a million image files.
PATIENCE = timedelta(minutes=30)

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# ---- the group ----


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Joins the other ranks, if torchrun has started several.

    After an error inside nobody is told: the process ends, which the others notice.
    """
    if num_started() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        with watched(rank(), num_ranks()):
            yield
    except UserError as error:
        error.on_one_rank = True
        raise
    dist.destroy_process_group()


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def _partners() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 160)
        raise RankError(
            f"rank {rank()} has lost the others: one has ended, or has not answered for "
            f"{PATIENCE.total_seconds() / 60:.0f} minutes ({reason}); go on from the last checkpoint with --resume"
        ) from error


def _sum_(tensor: Tensor) -> Tensor:
    with _partners():
        dist.all_reduce(tensor)
    return tensor


# ---- on the host ----


def host_sums(values: Sequence[float]) -> list[float]:
    """Sums over all ranks of plain numbers, exact for whole ones below 2^53.

    Takes 0.3 ms between two processes that share two busy CPU cores, so it may run every step.
    """
    if num_ranks() == 1:
        return list(values)
    return _sum_(torch.tensor(values, dtype=torch.float64)).tolist()


def agreed(numbers: Sequence[int]) -> list[int]:
    """The highest of each number on any rank, so that all stop or save at the same step."""
    if num_ranks() == 1:
        return list(numbers)
    highest = torch.tensor(numbers)
    with _partners():
        dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest.tolist()


def wait_for_all() -> None:
    """Returns when all ranks have come here."""
    host_sums([0])


@contextmanager
def first_on_each_machine(wanted: bool = True) -> Iterator[None]:
    """Lets the first rank of each machine go ahead, such as to fetch files, and the others follow."""
    if wanted and local_rank() > 0:
        wait_for_all()
    yield
    if wanted and local_rank() == 0:
        wait_for_all()


def check_equal(tensors: Mapping[str, Tensor], when: str) -> None:
    """Compares checksums (sums of the bits, read as whole numbers) of tensors that should be the same on all ranks.

    Raises: RankError on all ranks, which names the first that differs from rank 0 and in what.
    """
    if num_ranks() == 1:
        return
    sums = torch.stack([_bits(tensor).sum(dtype=torch.int64).cpu() for tensor in tensors.values()])
    everyone = [torch.empty_like(sums) for _ in range(num_ranks())]
    with _partners():
        dist.all_gather(everyone, sums)
    for number, others in enumerate(everyone):
        same = (others == everyone[0]).tolist()
        if different := [name for name, equal in zip(tensors, same, strict=True) if not equal]:
            raise RankError(
                f"rank {number} differs from rank 0 {when} in {different[0]} ({len(different)} of {len(tensors)} "
                "tensors): they no longer train the same network. Give all ranks the same files, versions and "
                "hardware, and go on from the last checkpoint with --resume",
                on_one_rank=False,
            )


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.view(_INTEGER_OF_SIZE[tensor.element_size()])


# ---- on the device ----


def summed(*tensors: Tensor) -> list[Tensor]:
    """Sums over all ranks, of tensors of any shape, by one exchange in float64."""
    if num_ranks() == 1:
        return list(tensors)
    flat = _sum_(torch.cat([tensor.detach().double().flatten() for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def averaged(tensor: Tensor, num_images: int) -> Tensor:
    """Mean over all ranks, each with the weight of its number of images."""
    if num_ranks() == 1:
        return tensor
    weight = torch.full((), float(num_images), dtype=torch.float64, device=tensor.device)
    total, weight = summed(tensor.detach().double() * weight, weight)
    return (total / weight).to(tensor.dtype)


def average_gradients_(parameters: Iterable[nn.Parameter], num_images: int) -> None:
    """Replaces every gradient by its mean over all ranks, weighted by their numbers of images; one exchange.

    Full size, whatever each rank has kept: a unit that it dropped counts with the zeros that it got there.
    """
    if num_ranks() == 1:
        return
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters]
    flat = gradients[0].new_empty(sum(parameter.numel() for parameter in parameters) + 1)
    *parts, weight = flat.split([*(parameter.numel() for parameter in parameters), 1])
    # in the memory order of the parameters, which is the same everywhere; that of gradients need not be
    views = [part.as_strided(p.shape, p.stride()) for part, p in zip(parts, parameters, strict=True)]
    torch._foreach_copy_(views, gradients)
    flat[:-1] *= num_images
    weight.fill_(num_images)
    _sum_(flat)
    flat[:-1] /= weight
    torch._foreach_copy_(gradients, views)  # into their own memory, which compact execution keeps from step to step


def broadcast_scores_(scores: nn.Parameter, known_U: Tensor | None = None) -> None:
    """Makes the scores those of rank 0, where equal gradients need not give equal scores.

    On a GPU the cumulative sum of the projection adds in an order of the moment. A score that differs in its last bit
    may let one rank draw a unit that another does not. On a CPU nothing is sent.

    Args:
        known_U: (U,) what will become the scores, on the host; it is sent instead.
    """
    if num_ranks() > 1 and scores.is_cuda:
        with _partners():
            dist.broadcast(scores.data if known_U is None else known_U, 0)


@contextmanager
def merged_statistics(network: SparseNetwork, plans: Sequence[Plan], num_images: int) -> Iterator[None]:
    """Around the passes of a step that move batch-norm statistics: afterwards all ranks have the same.

        running += sum_r n_r k_r (moved_r - running) / sum_r n_r k_r

    moved_r is where rank r came to from its n_r images, k_r whether it kept the channel. A channel that no rank kept
    stays as it was. It is done every step, as one exchange of three numbers per channel, so at no time does anybody
    have to ask whose statistics the network has.

    Args:
        plans: of those passes.
    """
    if num_ranks() == 1:
        yield
        return
    norms = _norms(network)
    buffers = [norm.running_mean for norm, _ in norms] + [norm.running_var for norm, _ in norms]
    before_2C = torch.cat(buffers)
    yield
    kept_C = torch.from_numpy(np.concatenate([_kept(network, plans, spaces) for _, spaces in norms]))
    weight_C = kept_C.to(before_2C) * num_images
    moved_2C = (torch.cat(buffers) - before_2C) * weight_C.repeat(2)
    moved_2C, weight_C = summed(moved_2C, weight_C)
    weight_2C = weight_C.repeat(2)
    merged_2C = before_2C + torch.where(weight_2C > 0, moved_2C / weight_2C.clamp(min=1), 0.0)
    # .data, because autograd holds these buffers and would refuse changed ones, though training never reads them back
    torch._foreach_copy_([buffer.data for buffer in buffers], merged_2C.split([len(buffer) for buffer in buffers]))


def _norms(network: SparseNetwork) -> list[tuple[nn.BatchNorm2d, set[int]]]:
    """Every batch-norm with the spaces that it runs on."""
    spaces: dict[nn.BatchNorm2d, set[int]] = {}
    for op in network.graph.ops:
        if op.kind == "norm":
            spaces.setdefault(op.module, set()).add(op.space)
    return list(spaces.items())


def _kept(network: SparseNetwork, plans: Sequence[Plan], spaces: set[int]) -> np.ndarray:
    """(C,) bool of the stored channels of some spaces: those of which a pass moves the statistics."""
    if network.execution == "released":  # the statistics of dropped channels move too
        return np.ones(network.graph.spaces[min(spaces)].width, dtype=bool)
    live = np.logical_or.reduce([plan.live[space] for plan in plans for space in spaces])
    return live[network.stored[min(spaces)]]
