"""Image files in one folder per class: finding them, opening them, and checking them before a run starts."""

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets
from tqdm import tqdm

from utils.errors import UserError
from utils.run.progress import announce

IMAGENET_CLASSES = 1000

_SHUFFLE_SEED = 0
_FILES_PER_TASK = 64
_LISTED_FILES = 20

# What the last bytes of a whole file hold. 64 bytes leave room for the padding that some writers append.
_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_TAIL_BYTES = 64


class UnreadableImage(Exception):
    """The file is no image that can be used; the message says why, the caller says which file and what to do."""


@dataclass(frozen=True, eq=False)
class ClassFolder:
    """The image files of one part of a set, `<folder>/<class>/**`, sorted by class and name unless shuffled.

    Attributes:
        files: N full paths.
        labels: (N,) int64, places in `classes`.
        num_bytes: (N,) int64 sizes of the files, 0 until `without_bad_images` has looked at them.
    """

    folder: Path
    classes: tuple[str, ...]
    files: Sequence[str]
    labels: np.ndarray
    num_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def chosen(self, indices: np.ndarray) -> "ClassFolder":
        files = [self.files[index] for index in indices]
        return ClassFolder(self.folder, self.classes, files, self.labels[indices], self.num_bytes[indices])

    def shuffled(self) -> "ClassFolder":
        """In the order of a fixed generator, so that a few batches already hold all classes."""
        return self.chosen(np.random.Generator(np.random.PCG64(_SHUFFLE_SEED)).permutation(len(self)))


def find_image_folder(root: Path) -> tuple[ClassFolder, ClassFolder]:
    """Training and test files of `<root>/train` and `<root>/test`, or `val` where there is no `test`.

    Files and classes are found as by torchvision.datasets.ImageFolder.

    Raises: UserError for missing folders, empty or differing classes.
    """
    return _same_classes(
        "ImageFolder",
        *(_list("ImageFolder", _existing("ImageFolder", root, *names)) for names in (("train",), ("test", "val"))),
    )


def find_imagenet(root: Path) -> tuple[ClassFolder, ClassFolder]:
    """Training and test files of `<root>/ImageNet/train` and `val`, or of `<root>/train` and `val`.

    Raises: UserError for missing folders, empty or differing classes, or a number of classes that is not 1000.
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
    return _same_classes("ImageNet", *(_list("ImageNet", folder) for folder in folders))


def open_rgb(path: str | Path) -> Image.Image:
    """The decoded image as 8-bit RGB.

    Raises: UnreadableImage.
    """
    try:
        with Image.open(path) as image:
            _check_depth(image)
            if "transparency" in image.info:
                image = image.convert("RGBA")  # palettes with transparency: Pillow warns of the direct way
            return image.convert("RGB")
    except Exception as error:  # for a damaged file Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise UnreadableImage(str(error) or type(error).__name__) from error


def check_by_decoding(path: str) -> int:
    """The size of a file in bytes, once all of it has been decoded.

    Raises: UnreadableImage.
    """
    open_rgb(path)
    return os.path.getsize(path)


def check_by_ends(path: str) -> int:
    """The size of a file in bytes, if its header and its last bytes are those of a whole image.

    JPEG and PNG are not decoded; other formats, and files with something else at their end, are.

    Raises: UnreadableImage.
    """
    try:
        with open(path, "rb") as stream:
            with Image.open(stream) as image:
                _check_depth(image)
                marker = _END_MARKERS.get(image.format)
            num_bytes = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, num_bytes - _TAIL_BYTES))
            is_whole = marker is not None and marker in stream.read()
    except Exception as error:
        raise UnreadableImage(str(error) or type(error).__name__) from error
    return num_bytes if is_whole else check_by_decoding(path)


def without_bad_images(
    part: ClassFolder, bad_images: str, workers: int, check: Callable[[str], int] = check_by_ends
) -> ClassFolder:
    """The part with the sizes of its files, and without those that cannot be used.

    Args:
        bad_images: "error" refuses the first bad file, "skip" leaves bad files out and prints their names.
        workers: threads that read, at least one.
        check: one of the two functions above.
    Raises: UserError for a bad file if they are refused, or if they leave a class empty.
    """

    def check_range(start: int) -> list[tuple[int, int | str]]:
        """Numbers of files with their size, or with what is wrong with them."""
        results = []
        for index in range(start, min(start + _FILES_PER_TASK, len(part))):
            try:
                results.append((index, check(part.files[index])))
            except UnreadableImage as error:
                results.append((index, str(error)))
        return results

    announce(f"checking {len(part):,} image files in {part.folder}")
    num_bytes, bad = np.zeros(len(part), dtype=np.int64), {}
    with (
        strict_about_size(),
        ThreadPoolExecutor(max(workers, 1)) as pool,
        tqdm(total=len(part), desc=part.folder.name, unit="file", leave=False, disable=None) as bar,
    ):
        # In order: of several bad files the same one is always named. An error cancels what is left.
        for results in pool.map(check_range, range(0, len(part), _FILES_PER_TASK)):
            for index, result in results:
                if isinstance(result, int):
                    num_bytes[index] = result
                elif bad_images == "error":
                    raise refusal(part.files[index], result)
                else:
                    bad[index] = result
            bar.update(len(results))
    part = ClassFolder(part.folder, part.classes, part.files, part.labels, num_bytes)
    return _left_out(part, bad) if bad else part


def refusal(path: str, reason: object) -> UserError:
    """What to say of a bad file before a run starts."""
    return UserError(
        f"cannot read image {path} ({reason}); replace it by an 8-bit image, remove it, or pass --bad-images skip to "
        f"leave out such files"
    )


def strict_about_size() -> warnings.catch_warnings:
    """Context in which an image of more than 90 million pixels is refused like a broken one, in all threads."""
    return warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)


def _left_out(part: ClassFolder, bad: dict[int, str]) -> ClassFolder:
    announce(f"leaving out {len(bad)} of the {len(part)} images in {part.folder}, which cannot be read:")
    for index in list(bad)[:_LISTED_FILES]:
        announce(f"  {part.files[index]} ({bad[index]})")
    if len(bad) > _LISTED_FILES:
        announce(f"  and {len(bad) - _LISTED_FILES} more")
    kept = part.chosen(np.setdiff1d(np.arange(len(part)), list(bad)))
    for label, count in enumerate(np.bincount(kept.labels, minlength=len(part.classes))):
        if count == 0:
            raise UserError(
                f"no image of class {part.classes[label]} in {part.folder} can be read, so --bad-images skip would "
                f"leave the class empty; repair its images, or remove the class from training and test images"
            )
    return kept


def _check_depth(image: Image.Image) -> None:
    if image.mode[0] in "IF":
        # Pillow would clip 16-bit and float pixels to 255, which leaves a white image.
        raise ValueError(f"pixels of mode {image.mode} are not 8-bit")


def _existing(name: str, root: Path, *parts: str) -> Path:
    if not root.is_dir():
        raise UserError(
            f"{name}: there is no folder {root}; give the folder that holds train/ and test/ (or val/) with --data"
        )
    for part in parts:
        if (root / part).is_dir():
            return root / part
    wanted = " or ".join(f"{part}/" for part in parts)
    raise UserError(f"{name}: {root} holds no folder {wanted}; expected {root / parts[0]}/<class>/<image files>")


def _list(name: str, folder: Path) -> ClassFolder:
    try:
        found = datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:
        # torchvision's words: no class folder at all, or which classes hold no image and which endings count.
        raise UserError(f"{name}: {folder} cannot be used: {error}") from error
    files, labels = [path for path, _ in found.samples], np.array(found.targets, dtype=np.int64)
    return ClassFolder(folder, tuple(found.classes), files, labels, np.zeros(len(files), dtype=np.int64))


def _same_classes(name: str, train: ClassFolder, test: ClassFolder) -> tuple[ClassFolder, ClassFolder]:
    if train.classes == test.classes:
        return train, test
    differences = [
        f"only in {ours.folder}: {', '.join(sorted(set(ours.classes) - set(theirs.classes)))}"
        for ours, theirs in ((train, test), (test, train))
        if set(ours.classes) - set(theirs.classes)
    ]
    raise UserError(f"{name}: class folders differ ({'; '.join(differences)}); both parts need the same ones")
