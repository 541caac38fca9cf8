"""Errors of a machine that has run out of something, in one sentence instead of a traceback.

torch raises them from anywhere. News that a process for images has died comes as a signal, in the middle of a step as
well as while an image is awaited.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from args import Config
from data.streamed import worker_has_died
from utils.errors import UserError

# What torch says, in a RuntimeError that has no class of its own.
NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "_ALLOC_FAILED", "out of memory")
NO_PROCESS = (errno.EAGAIN, errno.ENOMEM)


@contextmanager
def shortages_in_words(config: Config) -> Iterator[None]:
    """Raises: UserError for an error inside that comes from too little memory, or from a worker that was killed."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if isinstance(error, RuntimeError) and (told := worker_has_died(error, config.data.workers)):
            raise told from error
        if _is_out_of_memory(error):
            raise UserError(_out_of_memory(error, config)) from error
        raise


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in NO_PROCESS
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)


def _out_of_memory(error: Exception, config: Config) -> str:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    sizes = {"--batch-size": config.train.batch_size}
    if config.finetunes:
        sizes["--finetune-batch-size"] = config.finetune_batch_size
    smaller = " or ".join(f"{flag} (now {size})" for flag, size in sizes.items())
    fewer = f" and pass fewer --workers (now {config.data.workers})" if config.data.workers else ""
    bf16 = ", or with --precision bf16" if config.train.precision == "fp32" else ""
    return (
        f"there is not enough memory: {said.rstrip('.')}. Train anew with a smaller {smaller}{bf16}; or free memory"
        f"{fewer}, and go on with --resume"
    )
