"""Where the images of each named set come from: CIFAR, Fashion-MNIST, and the bundled sample."""

import contextlib
import hashlib
import http.client
import io
import socket
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
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


# Of the released recipe (CIFAR10) and the values in common use (CIFAR100).
CIFAR_MEAN_STD = {
    "CIFAR10": ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
    "CIFAR100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
}
CIFAR_CLASSES = {"CIFAR10": datasets.CIFAR10, "CIFAR100": datasets.CIFAR100}

# Computed from the 60,000 training images after padding to 32x32.
FASHION_MNIST_MEAN_STD = ((0.2190,), (0.3318,))
FASHION_MNIST_FILES = (
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

DOWNLOAD_TIMEOUT_SECONDS = 10
NO_DOWNLOAD_HINT = "`python main.py --config configs/quickstart.yaml` needs no download"


def load_cifar(name: str, root: Path) -> RawData:
    """CIFAR10 or CIFAR100 from `root`, downloaded if a file is not there.

    Raises: UserError if files are missing and cannot be downloaded, or are damaged.
    """
    cifar = CIFAR_CLASSES[name]
    folder = root / cifar.base_folder
    checksums = dict([*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])])
    missing = [file for file in checksums if not (folder / file).is_file()]
    if missing:
        _download(
            name,
            lambda: cifar(str(root), download=True),
            f"{name}: {', '.join(missing)} not found in {folder}, and the download failed ({{error}}); get "
            f"{cifar.filename} from https://www.cs.toronto.edu/~kriz/cifar.html and put it into {root}, "
            f"unpacked or as it is; {NO_DOWNLOAD_HINT}",
        )
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
    mean, std = CIFAR_MEAN_STD[name]
    return RawData(
        _channels_first(train.data),
        np.asarray(train.targets, dtype=np.int64),
        _channels_first(test.data),
        np.asarray(test.targets, dtype=np.int64),
        tuple(train.classes),
        mean,
        std,
        crop_padding=4,
    )


def load_fashion_mnist(root: Path) -> RawData:
    """Fashion-MNIST from `root` (torchvision's layout), or from Debian's package, or downloaded to `root`.

    Raises: UserError if files are missing and cannot be downloaded, or are damaged.
    """
    folder = root / "FashionMNIST" / "raw"
    files = _find_fashion_mnist(folder) or _find_fashion_mnist(FASHION_MNIST_DEBIAN)
    if files is None:
        _download(
            "FashionMNIST",
            lambda: datasets.FashionMNIST(str(root), download=True),
            f"FashionMNIST: {', '.join(FASHION_MNIST_FILES)} (plain or .gz) are neither all in {folder} nor "
            f"in {FASHION_MNIST_DEBIAN}, and the download failed ({{error}}); install Debian's package "
            f"dataset-fashion-mnist, or get the four .gz files from "
            f"https://github.com/zalandoresearch/fashion-mnist and put them into {folder}; "
            f"{NO_DOWNLOAD_HINT}",
        )
        files = [folder / name for name in FASHION_MNIST_FILES]
    arrays = [read_idx_file(path)[0] for path in files]
    return _fashion_mnist(*arrays, names=[str(path) for path in files])


def load_fashion_mnist_mini() -> RawData:
    """The sample of Fashion-MNIST that comes with this repository: 10,000 training and 2,000 test images.

    Raises: UserError if its file is missing or is not the one that was released.
    """
    path = FASHION_MNIST_MINI
    checksum = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
    if checksum != FASHION_MNIST_MINI_SHA256:
        raise UserError(
            f"FashionMNIST-mini: {path} is missing or damaged (SHA-256 {checksum}, expected "
            f"{FASHION_MNIST_MINI_SHA256}); check it out again with `git checkout -- data/{path.name}`"
        )
    return _fashion_mnist(*read_idx_file(path, num_arrays=4), names=[str(path)] * 4)


def _find_fashion_mnist(folder: Path) -> list[Path] | None:
    """The four files, each plain or compressed; None unless all are there."""
    files = []
    for name in FASHION_MNIST_FILES:
        present = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        files += present[:1]
    return files if len(files) == len(FASHION_MNIST_FILES) else None


def _fashion_mnist(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    names: list[str],
) -> RawData:
    class_names = tuple(datasets.FashionMNIST.classes)
    pairs = ((train_images, train_labels, *names[:2]), (test_images, test_labels, *names[2:]))
    for images, labels, images_name, labels_name in pairs:
        if images.ndim != 3 or images.shape[1:] != (28, 28) or len(images) == 0:
            raise UserError(f"{images_name} holds an array of shape {images.shape}; expected images of 28x28 pixels")
        if labels.shape != images.shape[:1] or labels.max() >= len(class_names):
            raise UserError(
                f"{labels_name} holds an array of shape {labels.shape} with values up to "
                f"{labels.max(initial=0)}; expected {len(images)} labels below {len(class_names)}"
            )
    mean, std = FASHION_MNIST_MEAN_STD
    return RawData(
        _pad_to_32(train_images),
        train_labels.astype(np.int64),
        _pad_to_32(test_images),
        test_labels.astype(np.int64),
        class_names,
        mean,
        std,
        crop_padding=2,  # on top of the 2 black pixels that padding to 32x32 has put on every side
    )


def _pad_to_32(images: np.ndarray) -> np.ndarray:
    """(N, 28, 28) to (N, 1, 32, 32), zeros around, so that networks for CIFAR fit."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None]


def _channels_first(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _download(name: str, attempt: Callable[[], object], message: str) -> None:
    """Run a download of torchvision quietly; a failure raises UserError(message) with {error} filled in."""
    print(f"{name}: fetching the files, this can take minutes", file=sys.stderr)
    try:
        with (
            _socket_timeout(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            attempt()
    except (OSError, RuntimeError, http.client.HTTPException, tarfile.TarError) as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(message.replace("{error}", cause)) from error


@contextlib.contextmanager
def _socket_timeout() -> Iterator[None]:
    # Without it an unreachable server, or a firewall that answers nothing, holds a run for minutes.
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)
