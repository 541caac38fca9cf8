"""Folders of images held in memory: what is found, how it is read, and the wording of every refusal."""

import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import build_data, image_folder
from data.files import open_rgb
from data.folders import find_image_folder
from tests.data.samples import make_folders
from utils.errors import UserError


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("test", ["test", "val"])
def test_image_folder(tmp_path, test, workers):
    make_folders(tmp_path, test)
    splits = build_data("ImageFolder", tmp_path, holdout=0.4, workers=workers)
    assert (splits.num_classes, splits.channels, splits.image_size, splits.class_names) == (
        2,
        3,
        8,
        ("cat", "dog"),
    )
    assert splits.train.crop_padding == 1
    assert splits.train.flip
    seen = []
    for part, per_class, blue in ((splits.train, 3, 0), (splits.holdout, 2, 0), (splits.test, 5, 200)):
        assert torch.bincount(part.labels).tolist() == [per_class] * 2
        assert torch.equal(part.images[:, 0, 0, 0].long(), part.labels)
        assert (part.images[:, 2] == blue).all()
        seen += [tuple(colour) for colour in part.images[:, :, 3, 3].tolist()]
    assert len(set(seen)) == 20


def test_image_folder_is_shuffled_and_repeatable(tmp_path, monkeypatch):
    make_folders(tmp_path, per_class=20)
    monkeypatch.setattr(image_folder, "_FILES_PER_TASK", 3)
    first, second = (build_data("ImageFolder", tmp_path, workers=workers) for workers in (0, 3))
    assert torch.equal(first.train.images, second.train.images)
    assert first.fingerprint == second.fingerprint
    for part in (first.train, first.test):
        assert 0 < part.labels[:20].sum() < 20


def test_image_folder_prefers_test_to_val(tmp_path):
    make_folders(tmp_path, "test", per_class=5)
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
    assert len(build_data("ImageFolder", tmp_path).test) == 10


def test_image_folder_statistics(tmp_path):
    make_folders(tmp_path)
    train = build_data("ImageFolder", tmp_path, holdout=0.4).train
    # Red is 0 and 1, green 0 to 4, blue always 0: its deviation is held at one grey level.
    np.testing.assert_allclose(np.array(train.mean) * 255, [0.5, 2, 0])
    np.testing.assert_allclose(np.array(train.std) * 255, [1.0, np.sqrt(2), 1.0])


def test_channel_statistics_equal_numpy():
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 5, 5), dtype=np.uint8)
    mean, std = image_folder.channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 2, 3)))


def test_image_folder_resizes_the_shorter_side_and_cuts_the_centre(tmp_path):
    make_folders(tmp_path)
    # 40x20: a red, a green and a red band; the middle half is green and fills the square.
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    wide.paste((0, 255, 0), (8, 0, 32, 20))
    for part in ("train", "test"):
        for path in (tmp_path / part).glob("*/*.png"):
            wide.save(path)
    splits = build_data("ImageFolder", tmp_path, image_size=10)
    assert splits.image_size == 10
    assert (splits.train.images[:, 1] == 255).all()
    assert (splits.train.images[:, 0] == 0).all()


def test_pixels_keep_their_places(tmp_path):
    make_folders(tmp_path, per_class=1)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for name in ("cat", "dog"):
        Image.fromarray(pixels).save(tmp_path / "test" / name / "0.png")
    images = build_data("ImageFolder", tmp_path).test.images.numpy()
    np.testing.assert_array_equal(images, np.stack([pixels.transpose(2, 0, 1)] * 2))


def test_image_folder_without_root_or_parts(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*absent"):
        build_data("ImageFolder", tmp_path / "absent")
    with pytest.raises(
        UserError, match=r"holds no folder train/; expected \S+/train/<class>.* folders: none; files: 0"
    ):
        build_data("ImageFolder", tmp_path)
    make_folders(tmp_path, "testing")
    (tmp_path / "labels.csv").touch()
    with pytest.raises(UserError) as error:
        build_data("ImageFolder", tmp_path)
    assert str(error.value) == (
        f"ImageFolder: {tmp_path} holds no folder test/ or val/; expected {tmp_path}/test/<class>/<image files>, found "
        "folders: testing/, train/; files: 1. Move some images of every class into test/<class>/, such as every fifth; "
        "they measure the trained network"
    )


def test_class_folders_without_parts_are_named(tmp_path):
    for name in "gcbfade":
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.png").touch()
    with pytest.raises(UserError) as error:
        build_data("ImageFolder", tmp_path)
    assert "found folders: a/, b/, c/, d/, e/ and 2 more; files: 0. Give the folder that" in str(error.value)
    assert "or sort the images into train/<class>/ and test/<class>/" in str(error.value)


def test_image_folder_without_classes_or_images(tmp_path):
    make_folders(tmp_path)
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(UserError, match=r"in \S+train there is no image for empty; files count whose"):
        build_data("ImageFolder", tmp_path)
    for part in ("train", "test"):
        (tmp_path / "bare" / part).mkdir(parents=True)
    with pytest.raises(UserError, match=r"train holds no class folder, and 0 files; sort"):
        build_data("ImageFolder", tmp_path / "bare")


def test_image_folder_with_differing_classes(tmp_path):
    make_folders(tmp_path)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "wolf")
    with pytest.raises(UserError, match=r"differ \(only in \S+train: dog; only in \S+test: wolf\)"):
        build_data("ImageFolder", tmp_path)


def test_of_several_unreadable_images_the_first_is_named(tmp_path, monkeypatch):
    make_folders(tmp_path, per_class=20)
    monkeypatch.setattr(image_folder, "_FILES_PER_TASK", 1)
    order = find_image_folder(tmp_path)[0].shuffled().files
    first, later = order[7], order[8:]
    for path in (first, *later):
        Path(path).write_bytes(b"")
    monkeypatch.setattr(image_folder, "open_rgb", lambda path: time.sleep(0.1 * (path == first)) or open_rgb(path))
    with pytest.raises(UserError, match=rf"cannot read image {re.escape(first)} \("):
        build_data("ImageFolder", tmp_path, workers=3)


def test_images_of_several_sizes_are_named(tmp_path):
    make_folders(tmp_path)
    odd = tmp_path / "test" / "dog" / "2.png"
    Image.new("RGB", (9, 8)).save(odd)
    with pytest.raises(
        UserError,
        match=rf"differ in size, \S+train\S+png is 8x8 .*{re.escape(str(odd))} is 9x8.*--image-size",
    ):
        build_data("ImageFolder", tmp_path)
    assert build_data("ImageFolder", tmp_path, image_size=8).image_size == 8


def test_images_that_are_not_square(tmp_path):
    make_folders(tmp_path)
    for path in (tmp_path / "train").glob("*/*.png"):
        Image.new("RGB", (9, 8)).save(path)
    with pytest.raises(UserError, match=r"is 9x8 pixels, not square; pass --image-size"):
        build_data("ImageFolder", tmp_path)


def test_too_many_pixels_are_refused_before_reading_them(tmp_path, monkeypatch):
    make_folders(tmp_path)
    monkeypatch.setattr(image_folder, "MAX_BYTES", 900_000)
    with pytest.raises(UserError, match=r"20 images of 127x127 pixels .* GiB of memory, the limit is .*of 128 or more"):
        build_data("ImageFolder", tmp_path, image_size=127)
