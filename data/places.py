"""Where the files of each set are looked for. Nothing is read into memory and nothing is fetched."""

from pathlib import Path
from typing import NamedTuple

from data.folders import find_image_folder, find_imagenet, image_folders, imagenet_folders
from data.sources import (
    CIFAR_CLASSES,
    FASHION_MNIST_DEBIAN,
    FASHION_MNIST_MINI,
    find_cifar,
    find_fashion_mnist_mini,
    missing_idx_files,
)
from utils.errors import UserError


class Place(NamedTuple):
    """Where a set is, or where it was looked for.

    Attributes:
        paths: files or folders; of a set that is there those that hold it, else all that were looked at.
        problem: why the set cannot be used as it is; "" where it was found. Files may still be damaged.
        fetched: whether a training would try to download it.
    """

    paths: tuple[Path, ...]
    problem: str = ""
    fetched: bool = False


def find_set(name: str, root: Path, list_files: bool = False) -> Place:
    """Looks for a set as `data.build_data` does.

    Args:
        name: one of `utils.choices.SETS`.
        root: the folder that `build_data` is given.
        list_files: look at every file of an image folder too, which takes minutes for a large set on a slow disk.
    """
    if name in CIFAR_CLASSES:
        folder, _, missing = find_cifar(name, root)
        return Place((folder,), f"{folder} lacks {', '.join(missing)}" if missing else "", bool(missing))
    if name in ("MNIST", "FashionMNIST"):
        folders = [root / name / "raw"]
        if name == "FashionMNIST":
            folders.append(FASHION_MNIST_DEBIAN)
        found = [folder for folder in folders if not missing_idx_files(folder)]
        if found:
            return Place((found[0],))
        missing = ", ".join(missing_idx_files(folders[0]))
        return Place(tuple(folders), f"{folders[0]} lacks {missing}, plain or .gz", fetched=True)
    try:
        if name == "FashionMNIST-mini":
            return Place((find_fashion_mnist_mini(),))
        if list_files:
            return Place(
                tuple(part.folder for part in (find_imagenet if name == "ImageNet" else find_image_folder)(root))
            )
        return Place(tuple((imagenet_folders if name == "ImageNet" else image_folders)(root)))
    except (UserError, OSError) as error:
        return Place((FASHION_MNIST_MINI if name == "FashionMNIST-mini" else root,), str(error))
