"""Named image sets, small enough to be held in memory, split into training, held-out and test images."""

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.image_folder import load_image_folder
from data.images import ImageSet
from data.sources import RawData, load_cifar, load_fashion_mnist, load_fashion_mnist_mini
from utils.errors import UserError

__all__ = ["SETS", "DataSplits", "ImageSet", "build_data"]

SETS = ("CIFAR10", "CIFAR100", "FashionMNIST", "FashionMNIST-mini", "ImageFolder")

# Not the run's seed: every method and every seed holds out the same images.
_HOLDOUT_SEED = 0


@dataclass(frozen=True)
class DataSplits:
    """The three parts of a set: train to learn from, holdout to choose by, test to report."""

    train: ImageSet
    holdout: ImageSet
    """Chooses subnets and checkpoints; empty if nothing is held out."""
    test: ImageSet
    """Only reported, never used to choose anything."""
    num_classes: int
    channels: int
    image_size: int
    """Height and width in pixels."""
    class_names: tuple[str, ...]
    fingerprint: str
    """Short hash of set name, class names, and shape and labels of each part: equal when a run is resumed."""


def build_data(
    name: str, root: str, *, holdout: float, image_size: int, workers: int, device: torch.device
) -> DataSplits:
    """Load a set and hold out a part of its training images.

    Args:
        name: one of SETS.
        root: folder of the files. CIFAR and FashionMNIST: as torchvision lays them out, fetched if missing;
            ImageFolder: the folder with train/ and test/; FashionMNIST-mini comes with the repository.
        holdout: fraction of the training images of each class to hold out, in [0, 1).
        image_size: pixels that an ImageFolder is resized to, 0 leaves it as it is; other sets are 32x32.
        workers: threads that decode the images of an ImageFolder, 0 for none; other sets need no decoding.
        device: where the images live and batches are made.
    Raises: UserError for values out of range, missing or damaged files, or a class left empty by holdout.
    """
    _check_arguments(name, holdout, image_size, workers)
    raw = _load(name, Path(root).expanduser(), image_size, workers)
    train_indices, holdout_indices = split_holdout(raw.train_labels, holdout, raw.class_names)

    def image_set(images: np.ndarray, labels: np.ndarray) -> ImageSet:
        return ImageSet(
            images=torch.from_numpy(images).to(device),
            labels=torch.from_numpy(labels).to(device),
            mean=raw.mean,
            std=raw.std,
            crop_padding=raw.crop_padding,
            flip=True,
        )

    train = image_set(raw.train_images[train_indices], raw.train_labels[train_indices])
    held_out = image_set(raw.train_images[holdout_indices], raw.train_labels[holdout_indices])
    test = image_set(raw.test_images, raw.test_labels)
    _, channels, size, _ = train.images.shape
    return DataSplits(
        train=train,
        holdout=held_out,
        test=test,
        num_classes=len(raw.class_names),
        channels=channels,
        image_size=size,
        class_names=raw.class_names,
        fingerprint=_fingerprint(name, raw.class_names, (train, held_out, test)),
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


def _check_arguments(name: str, holdout: float, image_size: int, workers: int) -> None:
    if name not in SETS:
        close = difflib.get_close_matches(name, SETS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"unknown data set {name!r}; the sets are {', '.join(SETS)}{hint}")
    if not 0 <= holdout < 1:
        raise UserError(f"holdout must be in [0, 1), got {holdout}; it is a fraction, not a percentage or a count")
    if workers < 0:
        raise UserError(f"workers must be 0 or larger, got {workers}")
    if image_size < 0:
        raise UserError(f"image_size must be 0 (as the images are) or a number of pixels, got {image_size}")
    if name != "ImageFolder" and image_size not in (0, 32):
        raise UserError(
            f"image_size={image_size} is not possible for {name}, whose images are 32x32; leave it 0, "
            f"or use ImageFolder"
        )


def _load(name: str, root: Path, image_size: int, workers: int) -> RawData:
    if name == "ImageFolder":
        return load_image_folder(root, image_size, workers)
    if name == "FashionMNIST":
        return load_fashion_mnist(root)
    if name == "FashionMNIST-mini":
        return load_fashion_mnist_mini()
    return load_cifar(name, root)


def _fingerprint(name: str, class_names: tuple[str, ...], parts: tuple[ImageSet, ...]) -> str:
    digest = hashlib.sha256(repr((name, class_names, [tuple(part.images.shape) for part in parts])).encode())
    for part in parts:
        digest.update(part.labels.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:12]
