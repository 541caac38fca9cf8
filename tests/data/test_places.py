"""Where sets are looked for: what is said to be there is what would be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

import data.places
import data.sources
from data.places import Place, find_set

IDX = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
CIFAR100 = ["train", "test", "meta"]


@pytest.mark.parametrize(
    ("name", "folder", "files"),
    [
        ("CIFAR100", "cifar-100-python", CIFAR100),
        ("MNIST", "MNIST/raw", IDX),
        ("FashionMNIST", "FashionMNIST/raw", IDX),
    ],
)
def test_a_set_is_there_when_all_its_files_are(tmp_path: Path, monkeypatch, name, folder, files):
    monkeypatch.setattr(data.places, "FASHION_MNIST_DEBIAN", tmp_path / "debian")
    (tmp_path / folder).mkdir(parents=True)
    for file in files[:-1]:
        (tmp_path / folder / file).touch()
    place = find_set(name, tmp_path)
    assert place.paths[0] == tmp_path / folder
    assert place.fetched
    assert f"{tmp_path / folder} lacks {files[-1]}" in place.problem
    assert files[0] not in place.problem
    (tmp_path / folder / files[-1]).touch()
    assert find_set(name, tmp_path) == Place((tmp_path / folder,))


def test_fashion_mnist_may_be_debians(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(data.places, "FASHION_MNIST_DEBIAN", tmp_path / "debian")
    assert find_set("FashionMNIST", tmp_path).paths == (tmp_path / "FashionMNIST/raw", tmp_path / "debian")
    (tmp_path / "debian").mkdir()
    for file in IDX:
        (tmp_path / "debian" / f"{file}.gz").touch()
    assert find_set("FashionMNIST", tmp_path) == Place((tmp_path / "debian",))


def test_the_sample_is_there_and_whole(tmp_path: Path, monkeypatch):
    assert find_set("FashionMNIST-mini", tmp_path) == Place((data.sources.FASHION_MNIST_MINI,))
    (tmp_path / "damaged").touch()
    monkeypatch.setattr(data.sources, "FASHION_MNIST_MINI", tmp_path / "damaged")
    assert "damaged" in find_set("FashionMNIST-mini", tmp_path).problem


def test_folders_of_images(tmp_path: Path):
    for name in ("ImageFolder", "ImageNet"):
        assert "there is no folder" in find_set(name, tmp_path / "none").problem
    (tmp_path / "train" / "cats").mkdir(parents=True)
    assert "holds no folder test/ or val/" in find_set("ImageFolder", tmp_path).problem
    (tmp_path / "val" / "cats").mkdir(parents=True)
    assert find_set("ImageFolder", tmp_path) == Place((tmp_path / "train", tmp_path / "val"))
    assert "holds one class only, cats" in find_set("ImageFolder", tmp_path, list_files=True).problem
    assert "holds 1 class folders, expected 1000" in find_set("ImageNet", tmp_path).problem
