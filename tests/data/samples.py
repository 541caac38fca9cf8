"""Small image sets: files in every layout that is read, and what batches hold."""

import gzip
import hashlib
import pickle
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import ImageSet, StreamedSet, sources
from data.folders import ClassFolder
from data.idx import idx_bytes


def in_memory(count: int = 23, channels: int = 3, **settings) -> ImageSet:
    """Random 8x8 images; image i has label i, so that a batch says which images it holds."""
    random = np.random.default_rng(0)
    return ImageSet(
        images=torch.from_numpy(random.integers(0, 256, (count, channels, 8, 8), dtype=np.uint8)),
        labels=torch.arange(count),
        mean=(0.4, 0.5, 0.6)[:channels],
        std=(0.2, 0.3, 0.25)[:channels],
        **settings,
    )


def streamed(folder: Path, workers: int = 0, image_size: int = 16, **settings) -> StreamedSet:
    """All images of a folder, numbered like those in memory."""
    found = sorted(str(path) for path in folder.iterdir())
    part = ClassFolder(folder, tuple(found), found, np.arange(len(found)))
    images = StreamedSet.from_folder(part, ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)), image_size, workers)
    for name, value in settings.items():
        setattr(images, name, value)
    return images


def assert_same_batches(actual, expected):
    for (a, b), (c, d) in zip(actual, expected, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def by_label(batches) -> dict[int, torch.Tensor]:
    return {int(label): image for images, labels in batches for image, label in zip(images, labels, strict=True)}


def in_order(batches) -> list[int]:
    return [int(label) for _, labels in batches for label in labels]


def write_idx_files(folder: Path, compress: bool, count: int = 20) -> list[np.ndarray]:
    """Four small IDX files; returns their arrays."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    for _ in ("train", "test"):
        arrays.append(random.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        arrays.append((np.arange(count) % 10).astype(np.uint8))
    for name, array in zip(sources.IDX_FILES, arrays, strict=True):
        content = idx_bytes([array])
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)
    return arrays


def write_cifar(root: Path, name: str, monkeypatch) -> tuple[np.ndarray, list[int]]:
    """Small files in CIFAR's layout, their checksums known to torchvision; returns the training part."""
    cifar = sources.CIFAR_CLASSES[name]
    label_key, classes = ("labels", 10) if name == "CIFAR10" else ("fine_labels", 100)
    folder = root / cifar.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    parts = []

    def write(file: str, content: dict) -> tuple[str, str]:
        (folder / file).write_bytes(pickle.dumps(content))
        return file, hashlib.md5((folder / file).read_bytes(), usedforsecurity=False).hexdigest()

    for list_name in ("train_list", "test_list"):
        entries = []
        for file, _ in getattr(cifar, list_name):
            pixels, labels = (
                random.integers(0, 256, (20, 3072), dtype=np.uint8),
                [i % classes for i in range(20)],
            )
            parts.append((pixels, labels))
            entries.append(list(write(file, {"data": pixels, label_key: labels})))
        monkeypatch.setattr(cifar, list_name, entries)
    names = [f"class {i}" for i in range(classes)]
    _, checksum = write(cifar.meta["filename"], {cifar.meta["key"]: names})
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": checksum})
    train = parts[:-1]
    return np.concatenate([pixels for pixels, _ in train]), [label for _, labels in train for label in labels]


def make_folders(root: Path, test: str = "test", size: int = 8, per_class: int = 5) -> None:
    """Two classes; every image has one colour: red is its class, green its number, blue 200 in the test."""
    for part in ("train", test):
        for label, name in enumerate(("cat", "dog")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                colour = (label, number, 0 if part == "train" else 200)
                Image.new("RGB", (size, size), colour).save(folder / f"{number}.png")


def make_photos(root: Path, per_class: int = 6, test: str = "test") -> None:
    """Two classes of JPEG and PNG files, larger than they are read; red is the class."""
    random = np.random.default_rng(0)
    for part in ("train", test):
        for label, name in enumerate(("cat", "dog")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                pixels = random.integers(0, 256, (150, 170, 3), dtype=np.uint8)
                pixels[:, :, 0] = 200 * label
                Image.fromarray(pixels).save(folder / f"{number}.{('png', 'jpg')[number % 2]}", quality=95)
