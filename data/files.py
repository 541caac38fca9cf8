"""Image files in one folder per class: finding and opening them."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets

from utils.errors import UserError

IMAGENET_CLASSES = 1000

_SHUFFLE_SEED = 0
_FOLDERS_NAMED = 5  # in a message

# Pillow refuses images of more than 179 million pixels, but only warns of more than 89 million. Here both are refused,
# in all threads and in all processes that decode.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class UnreadableImage(UserError):
    """A file that is no image, or none of 8 bits: `path, reason = error.args`."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)

    def __str__(self) -> str:
        path, reason = self.args
        return (
            f"cannot read image {path} ({reason}); replace it by an 8-bit image and start or resume again, or delete "
            f"it and start a new run; `python -m data.check FOLDER` finds all such files of a folder"
        )


@dataclass(frozen=True, eq=False)
class ClassFolder:
    """The image files of one part of a set, `<folder>/<class>/**`, sorted by class and name unless shuffled.

    Attributes:
        files: N full paths.
        labels: (N,) int64, places in `classes`.
    """

    folder: Path
    classes: tuple[str, ...]
    files: Sequence[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def chosen(self, indices: np.ndarray) -> "ClassFolder":
        return ClassFolder(self.folder, self.classes, [self.files[index] for index in indices], self.labels[indices])

    def shuffled(self) -> "ClassFolder":
        """In the order of a fixed generator, so that a few batches already hold all classes."""
        return self.chosen(np.random.Generator(np.random.PCG64(_SHUFFLE_SEED)).permutation(len(self)))


def find_image_folder(root: Path, test_only: bool = False) -> tuple[ClassFolder, ClassFolder]:
    """Training and test files of `<root>/train` and `<root>/test`, or `val` where there is no `test`.

    Files and classes are found as by torchvision.datasets.ImageFolder.

    Args:
        test_only: take the test files as training files too, so that `<root>/train` need not exist.
    Raises: UserError for missing folders, empty or differing classes.
    """
    parts = image_folders(root, test_only)
    return _same_classes("ImageFolder", *(_list("ImageFolder", folder) for folder in parts))


def image_folders(root: Path, test_only: bool = False) -> list[Path]:
    """The folders of training and test images, whatever is in them; see `find_image_folder`.

    Raises: UserError if one is not there.
    """
    parts = (("test", "val") if test_only else ("train",), ("test", "val"))
    return [_existing("ImageFolder", root, *names) for names in parts]


def find_imagenet(root: Path) -> tuple[ClassFolder, ClassFolder]:
    """Training and test files of `<root>/ImageNet/train` and `val`, or of `<root>/train` and `val`.

    Raises: UserError for missing folders, empty or differing classes, or a number of classes that is not 1000.
    """
    return _same_classes("ImageNet", *(_list("ImageNet", folder) for folder in imagenet_folders(root)))


def imagenet_folders(root: Path) -> list[Path]:
    """The folders of training and validation images.

    Raises: UserError if one is not there, or does not hold 1000 class folders.
    """
    root = root / "ImageNet" if (root / "ImageNet").is_dir() else root
    folders = [_existing("ImageNet", root, name) for name in ("train", "val")]
    for folder in folders:  # before the files of a wrong folder are listed, which can take minutes
        count = sum(entry.is_dir() for entry in os.scandir(folder))
        if count != IMAGENET_CLASSES:
            raise UserError(
                f"ImageNet: {folder} holds {count} class folders, expected {IMAGENET_CLASSES}: sort its images into "
                f"one folder per class, or pass --set ImageFolder --image-size 224 for other images"
            )
    return folders


def open_rgb(path: str | Path) -> Image.Image:
    """The decoded image as 8-bit RGB.

    Raises: UnreadableImage.
    """
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                # Pillow would clip 16-bit and float pixels to 255, which leaves a white image.
                raise ValueError(f"pixels of mode {image.mode} are not 8-bit")
            if "transparency" in image.info:
                image = image.convert("RGBA")  # palettes with transparency: Pillow warns of the direct way
            return image.convert("RGB")
    except Exception as error:  # for a damaged file Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise UnreadableImage(path, str(error) or type(error).__name__) from error


def _existing(name: str, root: Path, *parts: str) -> Path:
    if not root.is_dir():
        raise UserError(
            f"{name}: there is no folder {root}; give the folder that holds train/ and test/ (or val/) with --data"
        )
    for part in parts:
        if (root / part).is_dir():
            return root / part
    wanted = " or ".join(f"{part}/" for part in parts)
    raise UserError(
        f"{name}: {root} holds no folder {wanted}; expected {root / parts[0]}/<class>/<image files>, found "
        f"{_content(root)}. {_ADVICE[parts[0]]}"
    )


# What to do where a part is missing.
_ADVICE = {
    "train": "Give the folder that holds train/ with --data, or sort the images into train/<class>/ and test/<class>/",
    "test": "Move some images of every class into test/<class>/, such as every fifth; they measure the trained network",
    "val": "Put the validation images there, in one folder per class",
}


def _content(folder: Path) -> str:
    """What a folder holds, in words: its first folders by name, and how many files."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    folders = [f"{entry.name}/" for entry in entries if entry.is_dir()]
    more = f" and {len(folders) - _FOLDERS_NAMED} more" if len(folders) > _FOLDERS_NAMED else ""
    return f"folders: {', '.join(folders[:_FOLDERS_NAMED]) or 'none'}{more}; files: {len(entries) - len(folders)}"


def _list(name: str, folder: Path) -> ClassFolder:
    try:
        found = datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:
        # torchvision's words: no class folder at all, or which classes hold no image and which endings count.
        raise UserError(f"{name}: {folder} cannot be used: {error}") from error
    files = [path for path, _ in found.samples]
    return ClassFolder(folder, tuple(found.classes), files, np.array(found.targets, dtype=np.int64))


def _same_classes(name: str, train: ClassFolder, test: ClassFolder) -> tuple[ClassFolder, ClassFolder]:
    differences = [
        f"only in {ours.folder}: {', '.join(sorted(missing))}"
        for ours, theirs in ((train, test), (test, train))
        if (missing := set(ours.classes) - set(theirs.classes))
    ]
    if differences:
        raise UserError(f"{name}: class folders differ ({'; '.join(differences)}); both parts need the same ones")
    return train, test
