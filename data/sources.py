"""Where the images of each named set come from: CIFAR, MNIST, Fashion-MNIST, and the bundled sample."""

import contextlib
import hashlib
import http.client
import io
import socket
import sys
import tarfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from data.idx import read_idx_file
from utils.errors import UserError


class RawData(NamedTuple):
    """The images of a set as they are on disk, before anything is held out."""

    train_images: np.ndarray
    """(N, C, size, size) uint8."""
    train_labels: np.ndarray
    """(N,) int64."""
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel, in units of [0, 1]."""
    std: tuple[float, ...]
    crop_padding: int
    flip: bool = True
    """Whether a mirrored image still shows its class."""
    padding: int = 0
    """Zeros that were put on every side of the images."""


CIFAR_CLASSES = {"CIFAR10": datasets.CIFAR10, "CIFAR100": datasets.CIFAR100}
MEAN_STD = {
    "CIFAR10": ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),  # those of the released recipe
    "CIFAR100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),  # the values in common use
    "MNIST": ((0.1000,), (0.2752,)),  # the values in common use, 0.1307 and 0.3081, after padding to 32x32
    "FashionMNIST": ((0.2190,), (0.3318,)),  # of the 60,000 training images after padding to 32x32
}
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
# Where Debian's package `dataset-fashion-mnist` puts its files.
FASHION_MNIST_DEBIAN = Path("/usr/share/datasets/fashion-mnist")

# The bundled sample, made by make_fashion_mnist_mini.py.
FASHION_MNIST_MINI = Path(__file__).with_name("fashion_mnist_mini.xz")
FASHION_MNIST_MINI_SHA256 = "2596867d84b65bffda98eab0f5fbe6163c2ed23ea21d9aff2f85707a9708e760"

PADDING = 2  # from 28x28 to 32x32 pixels
DOWNLOAD_TIMEOUT_SECONDS = 10
NO_DOWNLOAD_HINT = "`python main.py --config configs/quickstart.yaml` needs no download"


def load_cifar(name: str, root: Path) -> RawData:
    """CIFAR10 or CIFAR100 from `root`, downloaded if a file is not there.

    Raises: UserError if files are missing and cannot be downloaded, or are damaged.
    """
    cifar = CIFAR_CLASSES[name]
    folder, checksums, missing = find_cifar(name, root)
    if missing:
        remedy = (
            f"get {cifar.filename} from https://www.cs.toronto.edu/~kriz/cifar.html and put it into {root}, "
            f"unpacked or as it is"
        )
        _download(cifar, root, f"{', '.join(missing)} not found in {folder}", remedy)
    for file, checksum in checksums.items():
        if not check_integrity(folder / file, checksum):
            raise UserError(
                f"{name}: {folder / file} is damaged (its MD5 is not {checksum}); delete it and unpack "
                f"{cifar.filename} into {root} again"
            )
    with warnings.catch_warnings():
        # NumPy 2.4.0 dislikes how the released files were pickled; nobody here can change that.
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        train, test = cifar(str(root), train=True), cifar(str(root), train=False)
    return RawData(
        _channels_first(train.data),
        np.asarray(train.targets, dtype=np.int64),
        _channels_first(test.data),
        np.asarray(test.targets, dtype=np.int64),
        tuple(train.classes),
        *MEAN_STD[name],
        crop_padding=4,
    )


def find_cifar(name: str, root: Path) -> tuple[Path, dict[str, str], list[str]]:
    """The folder of CIFAR10 or CIFAR100, the MD5 sums of its files by name, and which of them are not there."""
    cifar = CIFAR_CLASSES[name]
    folder = root / cifar.base_folder
    checksums = dict([*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])])
    return folder, checksums, [file for file in checksums if not (folder / file).is_file()]


def load_mnist(root: Path) -> RawData:
    """MNIST from `root` (torchvision's layout), downloaded if a file is not there. Never mirrored: these are digits.

    Raises: UserError if files are missing and cannot be downloaded, or are damaged.
    """
    files = _idx_files(datasets.MNIST, root, f"get the four .gz files from {datasets.MNIST.mirrors[0]}")
    return _padded(datasets.MNIST, files, [read_idx_file(path)[0] for path in files], flip=False)


def load_fashion_mnist(root: Path) -> RawData:
    """Fashion-MNIST from `root` (torchvision's layout), or from Debian's package, or downloaded to `root`.

    Raises: UserError if files are missing and cannot be downloaded, or are damaged.
    """
    remedy = (
        f"install Debian's package dataset-fashion-mnist (its files are not in {FASHION_MNIST_DEBIAN} either), or get "
        f"the four .gz files from https://github.com/zalandoresearch/fashion-mnist"
    )
    files = _idx_files(datasets.FashionMNIST, root, remedy, FASHION_MNIST_DEBIAN)
    return _padded(datasets.FashionMNIST, files, [read_idx_file(path)[0] for path in files])


def load_fashion_mnist_mini() -> RawData:
    """The sample of Fashion-MNIST that comes with this repository: 10,000 training and 2,000 test images.

    Raises: UserError if its file is missing or is not the one that was released.
    """
    path = find_fashion_mnist_mini()
    return _padded(datasets.FashionMNIST, [path] * 4, read_idx_file(path, num_arrays=4))


def find_fashion_mnist_mini() -> Path:
    """The file of the sample. Raises: UserError as `load_fashion_mnist_mini`."""
    path = FASHION_MNIST_MINI
    checksum = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
    if checksum != FASHION_MNIST_MINI_SHA256:
        raise UserError(
            f"FashionMNIST-mini: {path} is missing or damaged (SHA-256 {checksum}, expected "
            f"{FASHION_MNIST_MINI_SHA256}); check it out again with `git checkout -- data/{path.name}`"
        )
    return path


def _idx_files(dataset: type[datasets.MNIST], root: Path, remedy: str, elsewhere: Path | None = None) -> list[Path]:
    """The four files, each plain or compressed: from torchvision's folder, or all elsewhere, or downloaded."""
    folder = root / dataset.__name__ / "raw"
    for place in filter(None, (folder, elsewhere)):
        if not missing_idx_files(place):
            return [_plain_or_compressed(place / name) for name in IDX_FILES]
    missing = missing_idx_files(folder)
    _download(
        dataset, root, f"{', '.join(missing)} (plain or .gz) not found in {folder}", f"{remedy} and put them there"
    )
    return [folder / name for name in IDX_FILES]


def missing_idx_files(folder: Path) -> list[str]:
    """Which of the four files are not in a folder, neither plain nor compressed."""
    return [name for name in IDX_FILES if _plain_or_compressed(folder / name) is None]


def _plain_or_compressed(path: Path) -> Path | None:
    return next((file for file in (path, path.with_name(f"{path.name}.gz")) if file.is_file()), None)


def _padded(
    dataset: type[datasets.MNIST], files: Sequence[Path], arrays: Sequence[np.ndarray], flip: bool = True
) -> RawData:
    """The set with its images padded to 32x32.

    Args:
        arrays: training images, their labels, test images, their labels.
        files: the file of each array.
    Raises: UserError naming the file if images are not 28x28 pixels, or do not have one label of a known class each.
    """
    class_names = tuple(dataset.classes)
    for number in (0, 2):
        (images, labels), (images_file, labels_file) = arrays[number : number + 2], files[number : number + 2]
        if images.ndim != 3 or images.shape[1:] != (28, 28) or len(images) == 0:
            raise UserError(
                f"{images_file} holds an array of shape {images.shape}; expected images of 28x28 pixels: delete it "
                f"and fetch it again"
            )
        if labels.shape != images.shape[:1] or labels.max() >= len(class_names):
            raise UserError(
                f"{labels_file} holds an array of shape {labels.shape} with values up to {labels.max(initial=0)}; "
                f"expected {len(images)} labels below {len(class_names)}: delete it and fetch it again"
            )
    train_images, train_labels, test_images, test_labels = arrays
    return RawData(
        _pad_to_32(train_images),
        train_labels.astype(np.int64),
        _pad_to_32(test_images),
        test_labels.astype(np.int64),
        class_names,
        *MEAN_STD[dataset.__name__],
        crop_padding=2,  # on top of the 2 black pixels that padding to 32x32 has put on every side
        flip=flip,
        padding=PADDING,
    )


def _pad_to_32(images: np.ndarray) -> np.ndarray:
    """(N, 28, 28) to (N, 1, 32, 32), zeros around, so that networks for CIFAR fit."""
    return np.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))[:, None]


def _channels_first(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _download(dataset: type[datasets.CIFAR10 | datasets.MNIST], root: Path, missing: str, remedy: str) -> None:
    """Have torchvision download a set quietly; a failure raises UserError with the cause and the remedy."""
    name, previous = dataset.__name__, socket.getdefaulttimeout()
    print(f"{name}: fetching the files, this can take minutes", file=sys.stderr)
    # Without a timeout an unreachable server, or a firewall that answers nothing, holds a run for minutes.
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            dataset(str(root), download=True)
    except (OSError, RuntimeError, http.client.HTTPException, tarfile.TarError) as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{name}: {missing}, and the download failed ({cause}); {remedy}; {NO_DOWNLOAD_HINT}"
        ) from error
    finally:
        socket.setdefaulttimeout(previous)
