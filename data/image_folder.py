"""Images in one folder per class: small ones read into memory, large ones and ImageNet streamed from their files."""

from collections.abc import Iterable
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from torchvision.transforms.functional import center_crop, resize

from data.files import open_rgb
from data.folders import ClassFolder, find_image_folder, find_imagenet
from data.sources import RawData
from data.streamed import StreamedSet
from utils.errors import UserError

# From this image size on an ImageFolder is not held in memory: photographs, not thumbnails.
STREAM_FROM_SIZE = 128
MAX_BYTES = 4 * 2**30
IMAGES_FOR_STATISTICS = 5000
STREAMED_IMAGES_FOR_STATISTICS = 1000

# The values in common use, those of torchvision's pretrained networks.
IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
IMAGENET_IMAGE_SIZE = 224

_FILES_PER_TASK = 16


def load_image_folder(root: Path, image_size: int, workers: int, test_only: bool = False) -> RawData:
    """Read all images as 8-bit RGB into memory.

    Training and test images are shuffled by a fixed generator, so that a few batches already hold all classes.
    Mean and standard deviation are those of the first 5,000 training images in that order, held-out ones included.

    Args:
        root: folder with `train` and `test` (or `val`).
        image_size: 0 to take the images as they are, square and of one size; otherwise the shorter side of
            each image is resized to it (bilinear, antialiased) and its centre is cut out.
        workers: decoding threads, at least one; more of them pay for photographs, not at 32 pixels.
        test_only: see `find_image_folder`.
    Raises: UserError for missing folders, differing classes or sizes, unreadable images, or over 4 GiB.
    """
    train, test = (part.shuffled() for part in find_image_folder(root, test_only))
    first = train.files[0]
    size = image_size or _common_size(first)
    count = len(train) + len(test)
    num_bytes = count * 3 * size * size
    if num_bytes > MAX_BYTES:
        raise UserError(
            f"ImageFolder: {count} images of {size}x{size} pixels in {root} take {num_bytes / 2**30:.1f} GiB of "
            f"memory, the limit is {MAX_BYTES / 2**30:.0f} GiB; pass an --image-size of {STREAM_FROM_SIZE} or more "
            f"to read them from their files in every epoch, or a small one"
        )
    train_images, test_images = (_read(part.files, size, image_size > 0, first, workers) for part in (train, test))
    mean, std = channel_statistics(train_images[:IMAGES_FOR_STATISTICS])
    return RawData(
        train_images,
        train.labels,
        test_images,
        test.labels,
        train.classes,
        mean,
        std,
        crop_padding=size // 8,  # 4 at 32 pixels, as for CIFAR
    )


def load_streamed_folder(
    root: Path, image_size: int, workers: int, test_only: bool = False
) -> tuple[StreamedSet, StreamedSet, tuple[str, ...]]:
    """Training and test images of an ImageFolder, and their class names; the images stay in their files.

    Mean and standard deviation are those of 1,000 training images, evenly chosen among the files sorted by class
    and name, held-out ones included.

    Args: see `load_image_folder`; image_size is above 0, workers are processes.
    Raises: UserError for missing folders, differing classes, or unreadable images among these 1,000.
    """
    train, test = find_image_folder(root, test_only)
    count = min(len(train), STREAMED_IMAGES_FOR_STATISTICS)
    chosen = train.chosen(np.arange(count) * len(train) // count)
    sample = StreamedSet.from_folder(chosen, ((0.0,) * 3, (1.0,) * 3), image_size, workers)
    statistics = channel_statistics(image.numpy() for batch in sample.pixels() for image in batch)
    return _streamed(train, test, statistics, image_size, workers)


def load_imagenet(root: Path, image_size: int, workers: int) -> tuple[StreamedSet, StreamedSet, tuple[str, ...]]:
    """ImageNet, as `load_streamed_folder`; its validation images are the test images. image_size 0 means 224."""
    return _streamed(*find_imagenet(root), IMAGENET_MEAN_STD, image_size or IMAGENET_IMAGE_SIZE, workers)


def channel_statistics(images: Iterable[np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of images (C, H, W) uint8, in units of [0, 1].

    Computed from how often each of the 256 values occurs, so the order of the images cannot change a digit.
    """
    counts = sum(np.stack([np.bincount(values.ravel(), minlength=256) for values in image]) for image in images)
    probabilities = counts / counts.sum(axis=1, keepdims=True)
    levels = np.arange(256) / 255
    mean = probabilities @ levels
    std = np.sqrt((probabilities * (levels - mean[:, None]) ** 2).sum(axis=1))
    # At least one grey level: a channel that never changes must not be divided by zero.
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())


def _streamed(
    train: ClassFolder,
    test: ClassFolder,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    image_size: int,
    workers: int,
) -> tuple[StreamedSet, StreamedSet, tuple[str, ...]]:
    sets = (StreamedSet.from_folder(part.shuffled(), statistics, image_size, workers) for part in (train, test))
    return *sets, train.classes


def _common_size(path: str) -> int:
    width, height = open_rgb(path).size
    if width != height:
        raise UserError(
            f"ImageFolder: {path} is {width}x{height} pixels, not square; pass --image-size to resize and "
            f"crop all images"
        )
    return width


def _read(files: list[str], size: int, resizing: bool, first: str, workers: int) -> np.ndarray:
    """Images (N, 3, size, size) uint8; `first` names the file that `size` is from."""
    images = np.empty((len(files), 3, size, size), dtype=np.uint8)

    def read(index: int) -> None:
        image = open_rgb(files[index])
        if resizing:
            image = center_crop(resize(image, size), [size, size])
        elif image.size != (size, size):
            raise UserError(
                f"ImageFolder: images differ in size, {first} is {size}x{size} pixels and {files[index]} is "
                f"{image.width}x{image.height}; pass --image-size to resize and crop all images"
            )
        images[index] = np.asarray(image).transpose(2, 0, 1)

    with ThreadPool(max(workers, 1)) as pool:
        # In order, so that of several bad files the same one is always named. An error ends the threads.
        for _ in pool.imap(read, range(len(files)), _FILES_PER_TASK):
            pass
    return images
