"""Folders of images, one folder per class: which files belong to a set, and which do not."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.errors import UserError
from utils.paths import kind_of
from utils.run.progress import announce

IMAGENET_CLASSES = 1000

# Folders that file managers, archives and file systems leave behind. Like hidden ones they hold no data.
LEFT_BEHIND = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")

_SHUFFLE_SEED = 0
_FOLDERS_NAMED = 5  # in a message
_ENDINGS_NAMED = 5


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


@dataclass
class Walk:
    """Collects the image files below folders, and what lies beside them.

    Attributes:
        places: of every folder that was entered its identity and its path, by which loops of links are seen.
        hidden: how many files and folders were left out because they are hidden or in `LEFT_BEHIND`.
        outside: how many files were found where only class folders belong.
        endings: how many files have which unknown ending.
    """

    places: dict[tuple[int, int], str] = field(default_factory=dict)
    hidden: int = 0
    outside: int = 0
    endings: Counter[str] = field(default_factory=Counter)

    def files(self, folder: str | Path) -> list[str]:
        """All image files below a folder, sorted as torchvision.datasets.ImageFolder sorts them.

        Raises: UserError for a folder that is reached twice, by a link, or a pipe or device with the name of an image.
        """
        found = sorted(self._walk(str(folder)))
        return [os.path.join(where, name) for where, names in found for name in sorted(names)]

    def entries(self, folder: str) -> tuple[list[os.DirEntry], list[os.DirEntry]]:
        """The folders in a folder, and all else in it but what is hidden.

        Raises: UserError if it has been here before, which only links can cause.
        """
        facts = os.stat(folder)
        first = self.places.setdefault((facts.st_dev, facts.st_ino), folder)
        if first != folder:
            raise UserError(
                f"{folder} and {first} are the same folder, by a link, so its images would be read twice or without "
                f"end; remove the link"
            )
        folders, others = [], []
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith(".") or entry.name in LEFT_BEHIND:
                    self.hidden += 1
                else:
                    (folders if entry.is_dir() else others).append(entry)
        return folders, others

    def _walk(self, folder: str) -> Iterator[tuple[str, list[str]]]:
        """Every folder from this one on, with the names of its images."""
        waiting = [folder]
        while waiting:
            folders, others = self.entries(where := waiting.pop())
            waiting += [entry.path for entry in folders]
            images = []
            for entry in others:
                if not entry.name.lower().endswith(IMG_EXTENSIONS):
                    self.endings[_ending(entry.name)] += 1
                    continue
                if not entry.is_file() and (kind := kind_of(entry.path)):
                    raise UserError(f"{entry.path} is no file but {kind}; remove it")
                images.append(entry.name)
            yield where, images

    def announce_left_out(self, name: str, root: Path) -> None:
        """One line about everything that was left out, if there is any."""
        parts = []
        if count := self.endings.total():
            told = [f"{ending} {number:,}" for ending, number in self.endings.most_common(_ENDINGS_NAMED)]
            more = ", ..." if len(self.endings) > _ENDINGS_NAMED else ""
            parts.append(f"{_counted(count, 'file')} with an ending that is none of images ({', '.join(told)}{more})")
        if self.outside:
            parts.append(f"{_counted(self.outside, 'file')} beside the class folders")
        if self.hidden:
            parts.append(f"{_counted(self.hidden, 'hidden file or folder', 'hidden files or folders')}")
        if parts:
            announce(f"{name}: left out under {root}: {'; '.join(parts)}")


def find_image_folder(root: Path, test_only: bool = False) -> tuple[ClassFolder, ClassFolder]:
    """Training and test files of `<root>/train` and `<root>/test`, or `val` where there is no `test`.

    Args:
        test_only: take the test files as training files too, so that `<root>/train` need not exist.
    Raises: UserError for missing folders, a single class, empty or differing classes.
    """
    return _listed("ImageFolder", root, image_folders(root, test_only))


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
    return _listed("ImageNet", root, imagenet_folders(root))


def imagenet_folders(root: Path) -> list[Path]:
    """The folders of training and validation images.

    Raises: UserError if one is not there, or does not hold 1000 class folders.
    """
    root = root / "ImageNet" if (root / "ImageNet").is_dir() else root
    folders = [_existing("ImageNet", root, name) for name in ("train", "val")]
    for folder in folders:  # before the files of a wrong folder are listed, which can take minutes
        count = len(Walk().entries(str(folder))[0])
        if count != IMAGENET_CLASSES:
            raise UserError(
                f"ImageNet: {folder} holds {count} class folders, expected {IMAGENET_CLASSES}: sort its images into "
                f"one folder per class, or pass --set ImageFolder --image-size 224 for other images"
            )
    return folders


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
    folders, files = Walk().entries(str(folder))
    return f"folders: {_named(folders) or 'none'}; files: {len(files)}"


def _named(folders: Sequence[os.DirEntry]) -> str:
    more = f" and {len(folders) - _FOLDERS_NAMED} more" if len(folders) > _FOLDERS_NAMED else ""
    return ", ".join(f"{entry.name}/" for entry in folders[:_FOLDERS_NAMED]) + more


def _listed(name: str, root: Path, folders: Sequence[Path]) -> tuple[ClassFolder, ClassFolder]:
    """Training and test files of the two folders, which may be one and the same."""
    walk = Walk()
    parts = [_list(name, folder, walk) for folder in dict.fromkeys(folders)]
    walk.announce_left_out(name, root)
    return _same_classes(name, parts[0], parts[-1])


def _list(name: str, folder: Path, walk: Walk) -> ClassFolder:
    classes, others = walk.entries(str(folder))
    walk.outside += len(others)
    if not classes:
        raise UserError(
            f"{name}: {folder} holds no class folder, and {_counted(len(others), 'file')}; sort the images into one "
            f"folder per class"
        )
    lost = [entry.path for entry in others if entry.is_symlink() and not os.path.exists(entry.path)]
    if lost:
        raise UserError(f"{name}: {lost[0]} is a link to something that is not there; mend or remove the link")
    files = [walk.files(entry.path) for entry in classes]
    if len(classes) == 1:
        below = Walk().entries(classes[0].path)[0]
        advice = (
            f"the folder {classes[0].name} may be one level too many: if {_named(below)} are the classes, move them up "
            f"into {folder}"
            if below
            else f"add a folder for every other class beside {classes[0].path}"
        )
        raise UserError(
            f"{name}: {folder} holds one class only, {classes[0].name}, and one class is nothing to learn; {advice}"
        )
    if empty := [entry.name for entry, paths in zip(classes, files, strict=True) if not paths]:
        more = f" and {len(empty) - _FOLDERS_NAMED} more" if len(empty) > _FOLDERS_NAMED else ""
        raise UserError(
            f"{name}: in {folder} there is no image for {', '.join(empty[:_FOLDERS_NAMED])}{more}; files count whose "
            f"names end in {', '.join(IMG_EXTENSIONS)}, so add some, convert those that are there, or remove the folder"
        )
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(paths) for paths in files])
    return ClassFolder(
        folder, tuple(entry.name for entry in classes), [path for part in files for path in part], labels
    )


def _same_classes(name: str, train: ClassFolder, test: ClassFolder) -> tuple[ClassFolder, ClassFolder]:
    differences = [
        f"only in {ours.folder}: {', '.join(sorted(missing))}"
        for ours, theirs in ((train, test), (test, train))
        if (missing := set(ours.classes) - set(theirs.classes))
    ]
    if differences:
        raise UserError(f"{name}: class folders differ ({'; '.join(differences)}); both parts need the same ones")
    return train, test


def _ending(name: str) -> str:
    return ascii(os.path.splitext(name)[1].lower())[1:-1] or "no ending"


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
