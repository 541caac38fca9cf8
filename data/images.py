"""A small set of images, all in memory, with shuffling and augmentation that can be repeated exactly."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError

# Two independent random streams of an epoch: a change of augmentation never changes the order.
_ORDER_STREAM, _AUGMENTATION_STREAM = 0, 1


@dataclass(eq=False)
class ImageSet:
    """Images and labels on one device; hands out normalised float32 batches.

    Every batch is freshly allocated and not touched again here, so it may be kept, changed, or read later.
    Nothing here reads or advances a global random generator.
    """

    images: Tensor = field(repr=False)
    """(N, C, size, size) uint8; its device is where batches are made and returned."""
    labels: Tensor = field(repr=False)
    """(N,) int64 class numbers, on the same device."""
    mean: tuple[float, ...]
    """Per channel, in units of [0, 1]: a pixel becomes (value / 255 - mean) / std."""
    std: tuple[float, ...]
    """Per channel, in units of [0, 1], above 0."""
    crop_padding: int = 0
    """Zeros put around a training image before a random part of its old size is cut out; 0: no crop."""
    flip: bool = False
    """Mirror each training image left to right with probability 1/2."""
    channels_last: bool = False
    """Return images in torch.channels_last memory format."""

    def __post_init__(self) -> None:
        self._mean_255 = self._per_channel(self.mean)
        self._std_255 = self._per_channel(self.std)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor | Sequence[int]) -> "ImageSet":
        """A copy with these images only, in this order, with the same settings."""
        indices = torch.as_tensor(indices, dtype=torch.int64, device=self.images.device)
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def num_train_batches(self, batch_size: int) -> int:
        """Number of full batches in one epoch."""
        return len(self) // batch_size

    def train_batches(self, batch_size: int, seed: int, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of shuffled, augmented batches; a last incomplete batch is dropped.

        The order depends on (seed, epoch), how an image is augmented on (seed, epoch, its index). Neither
        depends on batch_size or start: a run resumed in the middle of an epoch sees what it would have seen.

        Args:
            batch_size: images in a batch, B.
            seed: 0 or larger.
            epoch: 0 or larger.
            start: number of batches to leave out at the beginning; they are not computed.
        Returns: iterator of images (B, C, size, size) float32 and labels (B,) int64.
        Raises: UserError if the set does not fill a single batch.
        """
        num_batches = self.num_train_batches(batch_size)
        if num_batches == 0:
            raise UserError(
                f"batch_size is {batch_size}, but there are only {len(self)} training images, and incomplete "
                f"batches are dropped; choose a batch_size of at most {len(self)}"
            )
        return self._train_batches(batch_size, seed, epoch, range(start, num_batches))

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, not augmented, the last smaller batch included; at most `limit` batches."""
        num_batches = -(-len(self) // batch_size)
        if limit is not None:
            num_batches = min(num_batches, limit)
        for batch in range(num_batches):
            chosen = slice(batch * batch_size, (batch + 1) * batch_size)
            yield self._normalise(self.images[chosen]), self.labels[chosen].clone()

    def _train_batches(self, batch_size: int, seed: int, epoch: int, numbers: range) -> Iterator[tuple[Tensor, Tensor]]:
        # Drawn on the CPU, so that an epoch is the same on every device; copied once an epoch, not per batch.
        device = self.images.device
        order = torch.randperm(len(self), generator=_generator(seed, epoch, _ORDER_STREAM)).to(device)
        generator = _generator(seed, epoch, _AUGMENTATION_STREAM)
        shifts = torch.randint(0, 2 * self.crop_padding + 1, (len(self), 2), generator=generator).to(device)
        flips = torch.randint(0, 2, (len(self),), generator=generator, dtype=torch.bool).to(device)
        for number in numbers:
            indices = order[number * batch_size : (number + 1) * batch_size]
            images = self._crop_and_flip(self.images[indices], shifts[indices], flips[indices])
            yield self._normalise(images), self.labels[indices]

    def _crop_and_flip(self, images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
        """Pad with zeros, crop at `shifts` (B, 2: row, column), mirror where `flips` (B,); uint8 in and out.

        One gather by pixel number for the whole batch: 1.8 ms for 256 CIFAR images on 2 CPU cores, 4 ms for a
        loop over images, 2.5 ms for indexing a view of all windows. Padding the whole set once would save
        another 0.5 ms and cost 1.6 times its memory.
        """
        if self.crop_padding == 0 and not self.flip:
            return images
        count, channels, size, _ = images.shape
        padding, padded_size = self.crop_padding, size + 2 * self.crop_padding
        padded = images.new_zeros(count, channels, padded_size, padded_size)
        padded[:, :, padding : padding + size, padding : padding + size] = images

        places = torch.arange(size, device=images.device)
        rows = shifts[:, :1] + places
        columns = shifts[:, 1:] + places
        if self.flip:
            columns = torch.where(flips[:, None], columns.flip(1), columns)
        pixels = (rows[:, :, None] * padded_size + columns[:, None, :]).view(count, 1, size * size)
        cropped = padded.view(count, channels, -1).gather(2, pixels.expand(-1, channels, -1))
        return cropped.view(count, channels, size, size)

    def _normalise(self, images: Tensor) -> Tensor:
        normalised = images.to(torch.float32).sub_(self._mean_255).div_(self._std_255)
        if self.channels_last:
            # Last, not first: 0.5 ms against 2.7 ms for 256 CIFAR images on 2 CPU cores.
            normalised = normalised.contiguous(memory_format=torch.channels_last)
        return normalised

    def _per_channel(self, values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, device=self.images.device).mul_(255).view(1, -1, 1, 1)


def _generator(seed: int, epoch: int, stream: int) -> torch.Generator:
    """A CPU generator for one purpose in one epoch; SeedSequence mixes neighbouring seeds and epochs well."""
    mixed = np.random.SeedSequence(entropy=seed, spawn_key=(epoch, stream)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))
