"""Which files of a folder are images of the set, which are left out and said to be, and which folders are refused."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from data import build_data, check
from data.folders import find_image_folder, find_imagenet
from tests.data.samples import make_folders
from utils.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_folders(tmp_path)
    return tmp_path


def refusal(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        find_image_folder(root)
    return str(caught.value)


def test_files_come_in_the_order_of_torchvision(root, capsys):
    """Held-out images are chosen by their numbers, so another order would be another experiment."""
    cats = root / "train" / "cat"
    for name in ("b/c/2.PNG", "b/a.jpg", "b-a/1.png", "B/0.webp", "10.png", "a.jpeg"):
        (cats / name).parent.mkdir(parents=True, exist_ok=True)
        (cats / name).touch()
    theirs, (train, test) = ImageFolder(str(root / "train")), find_image_folder(root)
    assert train.files == [path for path, _ in theirs.samples]
    assert train.labels.tolist() == theirs.targets
    assert (train.classes, len(train), len(test)) == (("cat", "dog"), 16, 10)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("size", [0, 128])
def test_what_programs_leave_behind_is_no_data(root, size, capsys):
    """Copies that editors keep in hidden folders would be trained on and held out at the same time."""
    before = build_data("ImageFolder", root, image_size=size)
    for name in ("train/.ipynb_checkpoints", "train/cat/.ipynb_checkpoints", "train/__MACOSX", "test/dog/@eaDir"):
        (root / name).mkdir()
        (root / name / "0-checkpoint.png").write_bytes((root / "train/cat/0.png").read_bytes())
    (root / "train/cat/._0.png").touch()
    for name in ("train/cat/0.txt", "train/cat/1.txt", "test/dog/2.HEIC", "test/dog/README", "train/labels.csv"):
        (root / name).touch()
    capsys.readouterr()
    data = build_data("ImageFolder", root, image_size=size)
    assert (data.fingerprint, data.contents) == (before.fingerprint, before.contents)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(
        f"ImageFolder: left out under {root}: 4 files with an ending that is none of images (.txt 2, .heic 1, no "
        "ending 1); 1 file beside the class folders; 5 hidden files or folders"
    )


def test_one_class_is_refused_with_the_level_that_may_be_too_many(root):
    for part in ("train", "test"):
        (root / part).rename(root / f"old_{part}")
        (root / part).mkdir()
        (root / f"old_{part}").rename(root / part / "images")
    assert refusal(root) == (
        f"ImageFolder: {root}/train holds one class only, images, and one class is nothing to learn; the folder images "
        f"may be one level too many: if cat/, dog/ are the classes, move them up into {root}/train"
    )
    for name in ("cat", "dog"):
        for file in (root / "train/images" / name).iterdir():
            file.rename(root / "train/images" / f"{name}{file.name}")
        (root / "train/images" / name).rmdir()
    assert refusal(root).endswith(f"add a folder for every other class beside {root}/train/images")


def test_loops_and_second_ways_into_a_folder_are_refused(root):
    link = root / "train/cat/again"
    for target, first in (("train/cat", "train/cat"), ("train", "train"), ("train/dog", "train/cat/again")):
        link.symlink_to(root / target)
        second = "train/dog" if target == "train/dog" else "train/cat/again"
        assert refusal(root).startswith(f"{root}/{second} and {root}/{first} are the same folder, by a link")
        with pytest.raises(SystemExit):
            check.main([str(root)])
        link.unlink()
    (root / "val").symlink_to(root / "train")  # the images that the network was trained on would measure it
    for file in sorted((root / "test").rglob("*.png")):
        file.unlink()
    (root / "test/cat").rmdir(), (root / "test/dog").rmdir(), (root / "test").rmdir()
    assert "are the same folder" in refusal(root)
    assert len(find_image_folder(root, test_only=True)[1]) == 10


def test_links_to_other_folders_and_files_are_followed(root):
    (root / "elsewhere").mkdir()
    (root / "train/cat").rename(root / "elsewhere/cat")
    (root / "train/cat").symlink_to(root / "elsewhere/cat")
    (root / "train/dog/more.png").symlink_to(root / "elsewhere/cat/0.png")
    assert len(find_image_folder(root)[0]) == 11
    (root / "train/cat").unlink()
    (root / "train/cat").symlink_to(root / "unmounted")
    assert (
        refusal(root)
        == f"ImageFolder: {root}/train/cat is a link to something that is not there; mend or remove the link"
    )


def test_pipes_devices_and_sockets_among_the_images_are_refused(root, monkeypatch):
    odd = root / "train/cat/odd.png"
    os.mkfifo(odd)
    assert refusal(root) == f"{odd} is no file but a named pipe; remove it"
    odd.unlink()
    odd.symlink_to("/dev/zero")
    assert refusal(root) == f"{odd} is no file but a device; remove it"
    odd.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(odd.parent)  # the name of a socket must be short
        server.bind(odd.name)
        assert refusal(root) == f"{odd} is no file but a socket; remove it"


def test_classes_without_images_are_named_with_the_endings_that_count(root):
    (root / "train/eel").mkdir()
    (root / "train/eel/photo.heic").touch()
    assert "train there is no image for eel; files count whose names end in .jpg, " in refusal(root)


def test_hidden_folders_are_no_classes_of_imagenet(tmp_path, monkeypatch):
    make_folders(tmp_path, "val")
    monkeypatch.setattr("data.folders.IMAGENET_CLASSES", 2)
    (tmp_path / "train/.cache").mkdir()
    assert find_imagenet(tmp_path)[0].classes == ("cat", "dog")
