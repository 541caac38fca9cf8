"""Which devices train: of one process, or of several that torchrun or `--multigpu` start."""

from __future__ import annotations

from collections.abc import Collection

import torch

from args import Config
from utils.errors import UserError
from utils.options import AUTO
from utils.ranks.launch import local_rank, num_local_ranks, num_started
from utils.run.progress import announce


def gpus_to_start(config: Config) -> int:
    """How many processes to start because `multigpu` names several GPUs; 0: this one does the work.

    Raises: UserError for a GPU that is not there.
    """
    ids = (config.run.multigpu or "").split(",")
    if len(ids) == 1 or num_started() > 1 or torch.cuda.device_count() == 0:
        return 0
    for number in ids:
        _check_gpu(int(number))
    return len(ids)


def find_device(config: Config) -> torch.device:
    """The device to train on: of the ranks on a machine each gets its own GPU, or all share the CPU.

    `multigpu` without a GPU falls back to the CPU and says so.

    Raises: UserError for a GPU that is not there, or that several ranks would share.
    """
    wanted, count, ranks = config.run.device, torch.cuda.device_count(), num_local_ranks()
    if config.run.multigpu is not None:
        if count == 0:
            announce(f"--multigpu {config.run.multigpu}: no CUDA GPU here, training on the CPU instead")
            return torch.device("cpu")
        ids = config.run.multigpu.split(",")
        if len(ids) != ranks:
            raise UserError(
                f"--multigpu {config.run.multigpu} names {len(ids)} GPUs, but torchrun has started {ranks} processes "
                "on this machine; leave --multigpu out, or start without torchrun"
            )
        wanted = f"cuda:{ids[local_rank()]}"
    elif ":" in wanted and ranks > 1:
        raise UserError(
            f"--device {wanted} is one GPU, but torchrun has started {ranks} processes on this machine, and each needs "
            "its own; pass --device cuda"
        )
    if wanted == "cpu" or (wanted == "auto" and count == 0):
        return torch.device("cpu")
    return _check_gpu(int(wanted.partition(":")[2]) if ":" in wanted else local_rank())


def _check_gpu(number: int) -> torch.device:
    count = torch.cuda.device_count()
    if number >= count:
        there = f"this machine has {count}: cuda:0 to cuda:{count - 1}" if count else "this machine has no CUDA GPU"
        raise UserError(f"device cuda:{number} does not exist, {there}; pass --device cpu or another id")
    return torch.device(f"cuda:{number}")


def check_ranks(config: Config, flags: Collection[str]) -> None:
    """Raises UserError for what does not go with the number of ranks.

    Args:
        flags: keys given on the command line.
    """
    ranks = num_started()
    if ranks == 1:
        if "rank_masks" in flags and config.run.multigpu is None:
            raise UserError(
                "--rank-masks (command line) has no effect: there is a single process; start several with torchrun or "
                "--multigpu 0,1, or leave it out"
            )
        return
    sizes = {"batch_size": config.train.batch_size}
    if config.finetunes:
        sizes["finetune_batch_size"] = config.finetune_batch_size
    for what, size in sizes.items():
        if size != AUTO and size < 2 * ranks:
            raise UserError(
                f"{what} {size} is the total of {ranks} processes and leaves less than the 2 images for each that "
                f"batch-norm needs; pass at least {2 * ranks}"
            )


def starter(config: Config) -> list[str]:
    """What stands before main.py in a command that starts as many processes as there are now."""
    if num_started() == 1 or config.run.multigpu is not None:
        return ["python"]
    return ["torchrun", "--standalone", "--nproc_per_node", str(num_started())]


def device_name(device: torch.device) -> str:
    """The device in words: the name of a GPU, or how many threads the CPU runs."""
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"cpu, {thread_words(torch.get_num_threads())}"


def thread_words(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
