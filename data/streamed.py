"""A set of images that stay in their files and are decoded anew in every epoch, by worker processes."""

import atexit
import hashlib
import math
import os
import signal
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from data.augment import draws_from
from data.batched import AUGMENTATION_STREAM, BatchedSet
from data.files import UnreadableImage, open_rgb
from data.folders import ClassFolder
from utils.errors import UserError

_GRACE_SECONDS = 60
_BYTES_TO_COMPARE = 2**26  # of the files of a part; hashing them takes 0.2 s
_THREADS = 16
_NO_ROOM = ("No space left", "Cannot allocate memory", "shared memory")  # what torch says of a full /dev/shm


@dataclass(eq=False, kw_only=True)
class StreamedSet(BatchedSet):
    """Files of images with their labels; batches are decoded ahead of their use.

    Training images: a random part of the image, resized, and mirrored with probability 1/2 (torchvision's
    RandomResizedCrop and RandomHorizontalFlip), then changed by RandAugment if that is asked for. Other images: the
    shorter side is resized to 8/7 of image_size (256 for 224) and the centre is cut out.

    The workers of an epoch end with it. Starting and ending one takes 0.1 s (2 CPU cores, Linux), while workers that
    persist would lie idle for all of training, calibration, held-out and test images at once.
    """

    folder: Path
    files: np.ndarray = field(repr=False)
    """(N,) bytes, names within the folder: one block of memory, which workers share, not a million of strings."""
    image_size: int
    workers: int
    """Processes that decode; 0 decodes in the calling one."""

    @classmethod
    def from_folder(
        cls,
        part: ClassFolder,
        statistics: tuple[tuple[float, ...], tuple[float, ...]],
        image_size: int,
        workers: int,
    ) -> "StreamedSet":
        """The images of a folder, on the CPU; statistics are their mean and std."""
        mean, std = statistics
        prefix = f"{part.folder}{os.sep}"
        return cls(
            labels=torch.from_numpy(part.labels),
            mean=mean,
            std=std,
            folder=part.folder,
            files=np.array([os.fsencode(path.removeprefix(prefix)) for path in part.files], dtype=np.bytes_),
            image_size=image_size,
            workers=workers,
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), 3, self.image_size, self.image_size

    @property
    def resized_to(self) -> int:
        return evaluated_size(self.image_size)

    @property
    def padding(self) -> int:
        return 0

    def subset(self, indices: Tensor | Sequence[int]) -> "StreamedSet":
        chosen = np.asarray(torch.as_tensor(indices, dtype=torch.int64).cpu())
        labels = self.labels[torch.from_numpy(chosen).to(self.device)]
        return replace(self, files=self.files[chosen], labels=labels)

    def to(self, device: torch.device) -> "StreamedSet":
        return replace(self, labels=self.labels.to(device))

    def identity(self) -> bytes:
        return super().identity() + b"\0".join(self.files.tolist())

    def contents(self) -> bytes:
        """Of the names and sizes of all files and the bytes of as many as `_BYTES_TO_COMPARE` allows, evenly chosen.

        Of a large set only a part is read, so that a start does not take as long as an epoch.
        """
        paths = [self.folder / os.fsdecode(name) for name in self.files]
        with ThreadPool(_THREADS) as pool:  # a server answers many questions at once
            sizes = np.array(pool.map(_size, paths, chunksize=64), dtype=np.int64)
            digest = hashlib.sha256(b"\0".join(self.files.tolist()) + sizes.astype("<i8").tobytes())
            chosen = range(0, len(paths), max(1, math.ceil(sizes.clip(0).sum() / _BYTES_TO_COMPARE)))
            for content in pool.imap(_digest, [paths[number] for number in chosen]):
                digest.update(content)
        return digest.digest()

    def pixels(self, batch_size: int = 64) -> Iterator[Tensor]:
        """All images in order, (B, 3, size, size) uint8: neither augmented nor normalised."""
        parts = [slice(first, first + batch_size) for first in range(0, len(self), batch_size)]
        return (images for images, _ in self._read(torch.arange(len(self)), parts, None))

    def _read(
        self, order_N: Tensor, parts: Sequence[slice], draw: tuple[int, int] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        on_device_N = order_N.to(self.device)
        with _closed_at_exit(self._decoded(order_N.tolist(), parts, draw)) as decoded:
            for images, part in zip(decoded, parts, strict=True):
                # Bytes travel, a quarter of the floats; on a GPU from pinned memory, so nothing waits for the copy.
                yield images.to(self.device, non_blocking=True), self.labels[on_device_N[part]]

    def _transform(self, training: bool) -> v2.Compose:
        if training:
            steps = [v2.RandomResizedCrop(self.image_size), v2.RandomHorizontalFlip(), *self.augmentation.image_steps]
        else:
            steps = [v2.Resize(self.resized_to), v2.CenterCrop(self.image_size)]
        return v2.Compose([*steps, v2.PILToTensor()])

    def _decoded(
        self, order_N: list[int], parts: Sequence[slice], draw: tuple[int, int] | None
    ) -> Generator[Tensor, None, None]:
        """Images of each part (B, 3, size, size) uint8, on the CPU. Its workers end when it is closed."""
        workers = min(self.workers, len(parts))
        loader = _Loader(
            _Decoder(self.folder, self.files, self._transform(training=draw is not None), draw),
            batch_sampler=[order_N[part] for part in parts],
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else the loader advances the global one
            worker_init_fn=_outlive_signals,
        )
        try:
            for batch in loader:
                if isinstance(batch, UnreadableImage):
                    raise batch
                yield batch
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # those of the loader hold its workers, which an exit waits for
            if told := worker_has_died(error, self.workers):
                raise told from error
            raise


def worker_has_died(error: Exception, workers: int) -> UserError | None:
    """What to say if an error of the loader, or of its handler of signals, comes from a worker that has died.

    Args:
        workers: how many the user wants.
    """
    if not isinstance(error, RuntimeError | EOFError | ConnectionError):
        return None
    said = str(error).strip()
    lines = said.splitlines() or [type(error).__name__]
    if isinstance(error, RuntimeError):
        # what is raised in a worker comes with its traceback, of which the last line is the error
        has_no_room = said.startswith("Caught") and any(words in lines[-1] for words in _NO_ROOM)
        if not has_no_room and "DataLoader worker (pid" not in said:
            return None
    reason = lines[-1 if said.startswith("Caught") else 0]
    return UserError(
        f"a process that decodes images has died ({reason.rstrip(' .')}); memory or /dev/shm may be full: go on with "
        f"--resume and fewer --workers (now {workers}), 0 for none"
    )


class _Loader(DataLoader):
    """Does not warn of more workers than cores: that is slow at worst, and the configuration may be for a larger
    machine."""

    def check_worker_number_rationality(self) -> None:
        pass


class _Decoder(Dataset):
    """Image number -> (3, size, size) uint8, or the error that tells the user which file cannot be read.

    The error is returned, not raised, because the loader would add the traceback of a worker to it.
    """

    def __init__(self, folder: Path, files: np.ndarray, transform: v2.Compose, draw: tuple[int, int] | None) -> None:
        self.folder, self.files, self.transform, self.draw = folder, files, transform, draw

    def __getitem__(self, index: int) -> Tensor | UnreadableImage:
        path = self.folder / os.fsdecode(self.files[index])
        try:
            image = open_rgb(path)
        except UnreadableImage as error:
            return error
        if self.draw is None:
            return self.transform(image)
        seed, epoch = self.draw
        with draws_from(seed, epoch, AUGMENTATION_STREAM, index):
            return self.transform(image)


def _size(path: Path) -> int:
    """In bytes; -1 for a file that cannot be reached, which is told when it is decoded."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return b""


def evaluated_size(size: int) -> int:
    """Pixels of the shorter side of an image of which evaluation takes the centre: 256 for 224."""
    return round(size * 256 / 224)


def _collate(samples: list[Tensor | UnreadableImage]) -> Tensor | UnreadableImage:
    errors = [sample for sample in samples if isinstance(sample, UnreadableImage)]
    return errors[0] if errors else default_collate(samples)


@contextmanager
def _closed_at_exit(generator: Generator) -> Iterator[Generator]:
    """Closes it behind the block. If the program ends inside, it is closed before Python terminates child processes."""
    atexit.register(generator.close)
    try:
        yield generator
    finally:
        atexit.unregister(generator.close)
        generator.close()


def _outlive_signals(_worker: int) -> None:
    """Signals often reach all processes at once, but the main process still finishes its step and saves.

    It ends its workers afterwards. If it cannot, the alarm does.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))
