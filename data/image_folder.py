"""Images in one folder per class: `<root>/train/<class>/*` and `<root>/test/<class>/*` (or `val`)."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets
from torchvision.transforms.functional import center_crop, resize

from data.sources import RawData
from utils.errors import UserError

MAX_BYTES = 4 * 2**30
IMAGES_FOR_STATISTICS = 5000
_SHUFFLE_SEED = 0
_IMAGES_PER_TASK = 64


def load_image_folder(root: Path, image_size: int, workers: int) -> RawData:
    """Read all images as 8-bit RGB into memory.

    Files and classes are found as by torchvision.datasets.ImageFolder; of `test` and `val`, `test` is read if
    both are there. Training and test images are then shuffled by a fixed generator, so that a few batches
    already hold all classes. Mean and standard deviation are those of the first 5,000 training images in that
    order, held-out ones included.

    Args:
        root: folder with `train` and `test` (or `val`).
        image_size: 0 to take the images as they are, square and of one size; otherwise the shorter side of
            each image is resized to it (bilinear, antialiased) and its centre is cut out.
        workers: decoding threads, 0 decodes in the calling thread; they pay for photographs, not at 32 pixels.
    Raises: UserError for missing folders, differing classes or sizes, unreadable images, or over 4 GiB.
    """
    train, test = _list_folder(_existing(root, "train")), _list_folder(_existing(root, "test", "val"))
    _check_same_classes(train, test)
    samples = [_shuffled(train.samples), _shuffled(test.samples)]
    size = image_size or _common_size(Path(samples[0][0][0]))
    num_bytes = (len(samples[0]) + len(samples[1])) * 3 * size * size
    if num_bytes > MAX_BYTES:
        raise UserError(
            f"ImageFolder: {len(samples[0]) + len(samples[1])} images of {size}x{size} pixels in {root} take "
            f"{num_bytes / 2**30:.1f} GiB of memory, the limit is {MAX_BYTES / 2**30:.0f} GiB; pass a "
            f"smaller --image-size or use fewer images"
        )
    first = samples[0][0][0]
    (train_images, train_labels), (test_images, test_labels) = (
        _read(part, size, image_size > 0, first, workers) for part in samples
    )
    mean, std = channel_statistics(train_images[:IMAGES_FOR_STATISTICS])
    return RawData(
        train_images,
        train_labels,
        test_images,
        test_labels,
        tuple(train.classes),
        mean,
        std,
        crop_padding=size // 8,  # 4 at 32 pixels, as for CIFAR
    )


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of (N, C, H, W) uint8, in units of [0, 1].

    Computed from how often each of the 256 values occurs, so the order of the images cannot change a digit.
    """
    counts = np.zeros((images.shape[1], 256), dtype=np.int64)
    for image in images:
        for channel, values in enumerate(image):
            counts[channel] += np.bincount(values.ravel(), minlength=256)
    probabilities = counts / counts.sum(axis=1, keepdims=True)
    levels = np.arange(256) / 255
    mean = probabilities @ levels
    std = np.sqrt((probabilities * (levels - mean[:, None]) ** 2).sum(axis=1))
    # At least one grey level: a channel that never changes must not be divided by zero.
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())


def _existing(root: Path, *names: str) -> Path:
    if not root.is_dir():
        raise UserError(f"ImageFolder: there is no folder {root}; give the folder that holds train/ and test/")
    for name in names:
        if (root / name).is_dir():
            return root / name
    wanted = " or ".join(f"{name}/" for name in names)
    raise UserError(f"ImageFolder: {root} holds no folder {wanted}; expected {root / names[0]}/<class>/<image files>")


def _list_folder(folder: Path) -> datasets.ImageFolder:
    try:
        return datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:
        # torchvision's words: no class folder at all, or which classes hold no image and which endings count.
        raise UserError(f"ImageFolder: {folder} cannot be used: {error}") from error


def _check_same_classes(train: datasets.ImageFolder, test: datasets.ImageFolder) -> None:
    if train.classes == test.classes:
        return
    differences = [
        f"only in {ours.root}: {', '.join(sorted(set(ours.classes) - set(theirs.classes)))}"
        for ours, theirs in ((train, test), (test, train))
        if set(ours.classes) - set(theirs.classes)
    ]
    raise UserError(f"ImageFolder: class folders differ ({'; '.join(differences)}); both parts need the same ones")


def _shuffled(samples: list[tuple[str, int]]) -> list[tuple[str, int]]:
    random = np.random.Generator(np.random.PCG64(_SHUFFLE_SEED))
    return [samples[index] for index in random.permutation(len(samples))]


def _common_size(path: Path) -> int:
    width, height = _open_rgb(path).size
    if width != height:
        raise UserError(
            f"ImageFolder: {path} is {width}x{height} pixels, not square; pass --image-size to resize and "
            f"crop all images"
        )
    return width


def _read(
    samples: list[tuple[str, int]], size: int, resizing: bool, first: str, workers: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, size, size) uint8 and labels (N,) int64; `first` names the file that `size` is from."""
    images = np.empty((len(samples), 3, size, size), dtype=np.uint8)

    def read_range(start: int) -> None:
        for index in range(start, min(start + _IMAGES_PER_TASK, len(samples))):
            path = samples[index][0]
            image = _open_rgb(Path(path))
            if resizing:
                image = center_crop(resize(image, size), [size, size])
            elif image.size != (size, size):
                raise UserError(
                    f"ImageFolder: images differ in size, {first} is {size}x{size} pixels and {path} is "
                    f"{image.width}x{image.height}; pass --image-size to resize and crop all images"
                )
            images[index] = np.asarray(image).transpose(2, 0, 1)

    starts = range(0, len(samples), _IMAGES_PER_TASK)
    with warnings.catch_warnings():
        # An image of more than 90 million pixels is refused like a broken one.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if workers == 0:
            for start in starts:
                read_range(start)
        else:
            with ThreadPoolExecutor(workers) as pool:
                # In order: of several bad files the same one is always named. An error cancels what is left.
                for _ in pool.map(read_range, starts):
                    pass
    return images, np.array([label for _, label in samples], dtype=np.int64)


def _open_rgb(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                # Pillow would clip 16-bit and float pixels to 255, which leaves a white image.
                raise ValueError(f"pixels of mode {image.mode} are not 8-bit")
            if "transparency" in image.info:
                image = image.convert("RGBA")  # palettes with transparency: Pillow warns of the direct way
            return image.convert("RGB")
    except Exception as error:  # for a damaged file Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(
            f"ImageFolder: cannot read image {path} ({error}); remove it or replace it by an 8-bit image"
        ) from error
