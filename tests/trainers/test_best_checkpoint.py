"""best.pt by itself: what it says of images, widths and result, and its evaluation on other images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from data import DataSplits, build_data, sources
from main import main
from models import build_model
from tests.data.samples import write_cifar, write_idx_files
from tests.tiny import Run, kept_mask, make_images, run

SHORT = {"epochs": 1, "finetune_epochs": 1}


# ---- how a file becomes an image ----


def prepared(pixels: np.ndarray, facts: dict) -> torch.Tensor:
    """An image (H, W, 3) or (H, W) as `facts` say, step by step with torchvision."""
    image = torch.from_numpy(pixels.copy() if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)
    assert len(image) == facts["channels"]
    image = F.resize(image, facts["resized_to"], InterpolationMode.BILINEAR, antialias=True)
    image = F.center_crop(image, [facts["image_size"] - 2 * facts["padding"]] * 2)
    image = F.pad(image, [facts["padding"]] * 4)
    mean, std = (torch.tensor(facts[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (image / 255 - mean) / std


def evaluated(data: DataSplits) -> torch.Tensor:
    return torch.cat([images for images, _ in data.test.batches(7)])


def assert_seen_alike(data: DataSplits, files: list[np.ndarray], levels: int) -> None:
    """Each file, prepared by the facts, is an image of the evaluation, whatever its place there.

    Args:
        levels: of 255 by which a pixel may differ: Pillow and torch round a resized one differently.
    """
    facts, seen = data.facts(), evaluated(data)
    assert seen.shape[1:] == (facts["channels"], facts["image_size"], facts["image_size"])
    tolerance = levels / 255 / min(facts["std"]) + 1e-5
    left = list(range(len(seen)))
    for pixels in files:
        image = prepared(pixels, facts)
        gaps = [float((seen[i] - image).abs().max()) for i in left]
        assert min(gaps) <= tolerance
        left.pop(int(np.argmin(gaps)))


def folder_of_photographs(root: Path, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """Two classes of smooth images of the given (width, height); returns the test images as they are stored."""
    random, stored = np.random.default_rng(0), []
    for part in ("train", "test"):
        for label in range(2):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for number, size in enumerate(sizes):
                coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
                image.save(folder / f"{number}.png")
                stored += [np.array(image)] if part == "test" else []
    return stored


@pytest.mark.parametrize(
    ("image_size", "sizes", "levels"),
    [(0, [(12, 12)] * 2, 0), (16, [(40, 30), (24, 50)], 1), (128, [(160, 200), (190, 150)], 1)],
    ids=["as stored", "resized in memory", "streamed"],
)
def test_the_facts_prepare_a_file_as_evaluation_does(tmp_path, image_size, sizes, levels):
    files = folder_of_photographs(tmp_path, sizes)
    data = build_data("ImageFolder", tmp_path, image_size=image_size)
    assert data.facts()["class_names"] == ["class0", "class1"]
    assert_seen_alike(data, files, levels)


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"])
def test_the_facts_prepare_an_image_of_a_named_set_as_evaluation_does(tmp_path, monkeypatch, name):
    """Stored images are 28x28 and grey, or 32x32 in colour; here they come from small files made for the test."""
    if name.startswith("CIFAR"):
        write_cifar(tmp_path, name, monkeypatch)
        stored = sources.CIFAR_CLASSES[name](str(tmp_path), train=False).data
    else:
        stored = write_idx_files(tmp_path / name / "raw", compress=False)[2]
    data = build_data(name, tmp_path)
    assert data.facts()["padding"] == (0 if name.startswith("CIFAR") else 2)
    assert_seen_alike(data, list(stored), levels=0)


# ---- widths and result ----


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def done(images, tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("best"), images, **SHORT)


def test_best_tells_images_result_and_epoch(done, images):
    best, summary = done.load("best.pt"), done.summary
    data = build_data("ImageFolder", images, holdout=0.2)
    assert best["images"] == data.facts() == done.load("last.pt")["images"]
    assert best["images"]["class_names"] == [f"class{label}" for label in range(6)]
    assert (best["epoch"], best["test"]["top1"]) == (summary["best_epoch"], summary["test_top1"])


def test_widths_are_those_of_the_thin_network_with_the_same_mask(done):
    """Counted by hand: a layer keeps its own units; the stream, which the head reads, is not asked for here."""
    best = done.load("best.pt")
    model = build_model("resnet8_he", 6, 3, 8, 0.25)
    names = [name[: -len(".scores")] for name in best["model"] if name.endswith(".scores")]
    modules = dict(model.named_modules())
    mask, expected, start = kept_mask(best), {}, 0
    for name in names:
        expected[name] = int(mask[start : start + modules[name].out_channels].sum())
        start += modules[name].out_channels
    assert start == len(mask)
    expected["linear"] = 6
    assert best["widths"] == expected


# ---- evaluation on other images ----


def other_images(root: Path, images: Path, parts: tuple[str, ...] = ("train", "test"), dark: int = 0) -> Path:
    """The same files, darker by some levels, so that their own mean is another one."""
    for file in (file for part in parts for file in (images / part).glob("*/*.png")):
        target = root / file.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.asarray(Image.open(file)).astype(int) - dark
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(target)
    return root


def said_of(capsys) -> str:
    return capsys.readouterr().out


def test_evaluation_on_another_folder_normalises_as_in_training(done, images, tmp_path, capsys):
    """With its own mean and standard deviation a darker copy would look as before, so the loss tells them apart."""
    command = ["--evaluate", "--resume", str(done.folder), "--data"]

    def loss(folder: Path) -> float:
        capsys.readouterr()
        assert main([*command, str(folder)]) == 0
        said = said_of(capsys)
        assert ("evaluating on other images than the run had: the 24 test images" in said) == (folder != images)
        return float(said.partition("loss ")[2].split(",")[0])

    same = loss(images)
    assert same == pytest.approx(done.summary["test_loss"], abs=1e-4)
    assert loss(other_images(tmp_path / "copy", images, ("test",))) == same  # without any train/
    assert abs(loss(other_images(tmp_path / "dark", images, dark=60)) - same) > 1e-3


def test_streamed_folders_are_evaluated_too(tmp_path, capsys):
    for name in ("one", "two"):
        folder_of_photographs(tmp_path / name, [(150 + 10 * (name == "two"), 150)] * 3)
    settings = {"image_size": 128, "batch_size": 4, "finetune": "off", "epochs": 1, "arch": "resnet18"}
    small = {"width_mult": 0.03, "num_subnets": 0, "bn_batches": 1, "method": "l1"}
    done = run(tmp_path, tmp_path / "one", **settings, **small)
    assert done.code == 0
    (tmp_path / "two/train").rename(tmp_path / "away")
    assert main(["--evaluate", "--resume", str(done.folder), "--data", str(tmp_path / "two")]) == 0
    assert "the 6 test images" in said_of(capsys)


def test_images_of_another_kind_are_refused_with_what_differs(done, images, tmp_path, capsys):
    command = ["--evaluate", "--resume", str(done.folder), "--data"]
    other = other_images(tmp_path / "classes", images)
    for part in ("train", "test"):
        (other / part / "class5").rename(other / part / "zebra")
    folder_of_photographs(tmp_path / "size", [(9, 9)] * 2)
    for folder, message in (
        ("classes", "class_names ['class0', 'class1', 'class2', 'class3', 'class4', 'zebra'] instead of ['class0'"),
        ("size", "image_size 9 instead of 8"),
    ):
        assert main([*command, str(tmp_path / folder)]) == 2
        assert message in capsys.readouterr().err


def test_what_has_no_subnet_or_no_description_is_evaluated_on_its_own_images_only(done, images, tmp_path, capsys):
    other, checkpoints = other_images(tmp_path / "other", images, dark=9), done.folder / "checkpoints"
    (other / "test/class0/00.png").unlink()
    old = {key: value for key, value in done.load("best.pt").items() if key != "images"}
    torch.save(old, checkpoints / "old.pt")
    for name, message in (
        ("epoch_1.pt", "is no result with a subnet of its own"),
        ("old.pt", "is from before checkpoints described their images"),
    ):
        command = ["--evaluate", "--resume", str(checkpoints / name), "--data"]
        assert main([*command, str(other)]) == 2
        assert message in capsys.readouterr().err
        assert main([*command, str(images)]) == 0
