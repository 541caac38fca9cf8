"""Named image sets, in memory or streamed from files, split into training, held-out and test images."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.augment import Augmentation
from data.batched import BatchedSet
from data.image_folder import STREAM_FROM_SIZE, load_image_folder, load_imagenet, load_streamed_folder
from data.images import ImageSet
from data.sources import RawData, load_cifar, load_fashion_mnist, load_fashion_mnist_mini, load_mnist
from data.streamed import StreamedSet
from utils.errors import UserError

__all__ = [
    "HOLDOUT",
    "HOLDOUT_FROM",
    "Augmentation",
    "BatchedSet",
    "DataSplits",
    "ImageSet",
    "StreamedSet",
    "build_data",
    "first_in_proportion",
    "split_holdout",
]

# The usual fraction to hold out, and from how many training images on it pays: a tenth of fewer is below 500 images, so
# few that differences between subnets drown in their noise (2.2 points for one standard deviation at 50 %).
HOLDOUT = 0.1
HOLDOUT_FROM = 5000

# Not the run's seed: every method and every seed holds out the same images.
_HOLDOUT_SEED = 0


@dataclass(frozen=True)
class DataSplits:
    """The three parts of a set: train to learn from, holdout to choose by, test to report."""

    train: BatchedSet
    holdout: BatchedSet
    """Chooses subnets and checkpoints; empty if nothing is held out."""
    test: BatchedSet
    """Only reported, never used to choose anything."""
    num_classes: int
    channels: int
    image_size: int
    """Height and width in pixels."""
    class_names: tuple[str, ...]
    holdout_fraction: float
    """Of the training images of each class."""
    fingerprint: str
    """Short hash of set name, class names, shape and labels of each part, and of the names of streamed files."""
    contents: str
    """Short hash of the pixels of each part; of streamed files, of their sizes and bytes (`StreamedSet.contents`)."""

    def difference(self, stored: Mapping[str, Any]) -> str:
        """What these images have not in common with those of a checkpoint, in words; "" if they are the same.

        A run is resumed on the same images only. A checkpoint from before contents were compared has none.
        """
        if self.fingerprint != stored["fingerprint"]:
            return "other labels, classes, names of files, size or number"
        return "other contents" if self.contents != stored.get("contents", self.contents) else ""

    def facts(self) -> dict[str, Any]:
        """What somebody needs who shows an image to a network that was trained on these.

        An image is read in `channels` channels (1: grey, 3: RGB), its shorter side is resized to `resized_to` pixels
        (bilinear, antialiased), the centre of `image_size` - 2 `padding` pixels is cut out, `padding` zeros are put on
        every side, and a pixel becomes (value / 255 - mean) / std.
        """
        return {
            "class_names": list(self.class_names),
            "channels": self.channels,
            "image_size": self.image_size,
            "resized_to": self.test.resized_to,
            "padding": self.test.padding,
            "mean": list(self.test.mean),
            "std": list(self.test.std),
        }


def build_data(
    name: str,
    root: str | Path = "dataset",
    *,
    image_size: int = 0,
    workers: int = 0,
    holdout: float | None = 0.0,
    train_images: int = 0,
    test_only: bool = False,
    device: torch.device | str = "cpu",
) -> DataSplits:
    """Load a set and hold out a part of its training images.

    Args:
        name: CIFAR10, CIFAR100, MNIST, FashionMNIST, FashionMNIST-mini, ImageFolder or ImageNet.
        root: folder of the files. CIFAR, MNIST and FashionMNIST: as torchvision lays them out, fetched if missing;
            ImageFolder: the folder with train/ and test/; ImageNet: that with ImageNet/train/ and ImageNet/val/, or
            with train/ and val/; FashionMNIST-mini comes with the repository.
        image_size: pixels that an ImageFolder is resized to, 0 leaves it as it is; from 128 on it is streamed.
            ImageNet: 0 is 224. Other sets are 32x32.
        workers: threads that decode the images of an ImageFolder in memory, or processes that decode streamed images,
            0 for none; other sets need no decoding.
        holdout: fraction of the training images of each class to hold out, in [0, 1). None chooses it by their
            number: a tenth of 5,000 or more images, nothing of fewer.
        train_images: train on so many of those that are left, see `first_in_proportion`; 0: on all.
        test_only: nothing but the test images is needed. An ImageFolder may then lack train/; the training images of
            the result are its test images.
        device: where batches are made, and images in memory live.
    Raises: UserError for an unknown set, missing or damaged files, or a class left empty by holdout. A streamed set
        raises it too, while its batches are made, for a file that cannot be decoded.
    """
    try:
        train, test, class_names = _load(name, Path(root).expanduser(), image_size, workers, test_only)
    except OSError as error:
        raise UserError(
            f"{name}: {error}; check that everything under {root} is readable and its disk works"
        ) from error
    if holdout is None:
        holdout = HOLDOUT if len(train) >= HOLDOUT_FROM else 0.0
    train_indices, holdout_indices = split_holdout(train.labels.numpy(), holdout, class_names)
    if train_images > len(train_indices):
        raise UserError(
            f"train_images is {train_images}, but there are only {len(train_indices)} training images beside the "
            f"{len(holdout_indices)} held-out ones; pass at most {len(train_indices)}, or 0 for all"
        )
    if train_images:
        train_indices = first_in_proportion(train.labels.numpy(), train_indices, train_images)
    parts = (train.subset(train_indices), train.subset(holdout_indices), test)
    contents = hashlib.sha256(b"".join(part.contents() for part in parts)).hexdigest()[:12]
    parts = tuple(part.to(device) for part in parts)
    _, channels, size, _ = test.shape
    return DataSplits(
        *parts,
        num_classes=len(class_names),
        channels=channels,
        image_size=size,
        class_names=class_names,
        holdout_fraction=holdout,
        fingerprint=_fingerprint(name, class_names, parts),
        contents=contents,
    )


def split_holdout(labels: np.ndarray, fraction: float, class_names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and indices held out, both rising: of each class the given fraction, rounded.

    Raises: UserError if a fraction above 0 would hold out none or all of the images of a class.
    """
    random = np.random.Generator(np.random.PCG64(_HOLDOUT_SEED))
    is_held_out = np.zeros(len(labels), dtype=bool)
    if fraction > 0:
        for label, class_name in enumerate(class_names):
            members = random.permutation(np.flatnonzero(labels == label))
            count = round(fraction * len(members))
            if not 0 < count < len(members):
                raise UserError(
                    f"holdout={fraction} would hold out {count} of the {len(members)} training images of "
                    f"class {class_name}; some must be held out and some must be left: choose another "
                    f"fraction, or 0 for no held-out part"
                )
            is_held_out[members[:count]] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def first_in_proportion(labels: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """The first of some images, rising, in an order that is the same in every run and has all classes in proportion.

    Of a class with n of N images the first c have round(c n / N), to within one; a smaller count gives a part of those
    of a larger one.
    """
    random = np.random.Generator(np.random.PCG64(_HOLDOUT_SEED))
    place = np.empty(len(indices))
    for label in np.unique(labels[indices]):
        members = random.permutation(np.flatnonzero(labels[indices] == label))
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(indices[np.argsort(place, kind="stable")[:count]])


def _load(
    name: str, root: Path, image_size: int, workers: int, test_only: bool
) -> tuple[BatchedSet, BatchedSet, tuple[str, ...]]:
    """Training and test images, on the CPU, and class names."""
    if name == "ImageNet":
        return load_imagenet(root, image_size, workers)
    if name == "ImageFolder" and image_size >= STREAM_FROM_SIZE:
        return load_streamed_folder(root, image_size, workers, test_only)
    if name == "ImageFolder":
        return _in_memory(load_image_folder(root, image_size, workers, test_only))
    if image_size not in (0, 32):
        raise UserError(
            f"image_size={image_size} is not possible for {name}, whose images are 32x32; leave it 0, "
            f"or use ImageFolder"
        )
    if name == "FashionMNIST-mini":
        return _in_memory(load_fashion_mnist_mini())
    if name == "FashionMNIST":
        return _in_memory(load_fashion_mnist(root))
    if name == "MNIST":
        return _in_memory(load_mnist(root))
    if name in ("CIFAR10", "CIFAR100"):
        return _in_memory(load_cifar(name, root))
    raise UserError(f"there is no data set {name!r}")


def _in_memory(raw: RawData) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    train, test = (
        ImageSet(
            images=torch.from_numpy(images),
            labels=torch.from_numpy(labels),
            mean=raw.mean,
            std=raw.std,
            crop_padding=raw.crop_padding,
            flip=raw.flip,
            padding=raw.padding,
        )
        for images, labels in ((raw.train_images, raw.train_labels), (raw.test_images, raw.test_labels))
    )
    return train, test, raw.class_names


def _fingerprint(name: str, class_names: tuple[str, ...], parts: tuple[BatchedSet, ...]) -> str:
    digest = hashlib.sha256(repr((name, class_names, [part.shape for part in parts])).encode())
    for part in parts:
        digest.update(part.identity())
    return digest.hexdigest()[:12]
