"""Images streamed from files: the same whatever decodes them, bytes until the device, and bad files named."""

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import data.streamed
from data import StreamedSet, build_data, files
from tests.data.samples import assert_same_batches, make_photos, streamed
from utils.errors import UserError

# Python 3.12 warns of every fork in a process that has threads, such as those of PyTorch.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_start_change_nothing(noise, workers):
    images, others = streamed(noise), streamed(noise, workers)
    whole = list(images.train_batches(5, seed=1, epoch=7))
    for start in (0, 3, 4):
        assert_same_batches(others.train_batches(5, seed=1, epoch=7, start=start), whole[start:])
    assert_same_batches(others.batches(10), images.batches(10))
    assert [len(labels) for _, labels in others.batches(10)] == [10, 10, 3]


def test_what_start_leaves_out_is_not_decoded(noise, monkeypatch):
    opened = []
    monkeypatch.setattr(data.streamed, "open_rgb", lambda path: opened.append(path) or files.open_rgb(path))
    list(streamed(noise).train_batches(5, seed=0, epoch=0, start=3))
    assert len(opened) == len(set(opened)) == 5
    opened.clear()
    list(streamed(noise, rank=1, num_ranks=2).train_batches(5, seed=0, epoch=0, start=3))
    assert len(opened) == 3


def test_training_crops_are_those_of_torchvision(tmp_path):
    """Red counts columns and green rows, so an image shows which part of the original it is, and if mirrored."""
    size = 200
    ramp = np.arange(size, dtype=np.uint8)
    pixels = np.zeros((size, size, 3), dtype=np.uint8)
    pixels[:, :, 0], pixels[:, :, 1] = ramp[None, :], ramp[:, None]
    Image.fromarray(pixels).save(tmp_path / "0.png")
    levels = streamed(tmp_path, image_size=50, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    [(batch, _)] = levels.subset([0] * 400).train_batches(400, seed=0, epoch=0)
    # Between the centres of the outermost pixels lie 49 of 50 parts of the crop; rounding moves each by half a level.
    columns = (batch[:, 0, 25, -1] - batch[:, 0, 25, 0]) * 50 / 49
    rows = (batch[:, 1, -1, 25] - batch[:, 1, 0, 25]) * 50 / 49
    area, ratio = (columns.abs() * rows / size**2).numpy(), (columns.abs() / rows).numpy()
    assert (rows > 0).all()
    assert 0.07 < area.min() < 0.12
    assert 0.9 < area.max() < 1.02
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draw = transforms.RandomResizedCrop(50)
        drawn = np.array([draw.get_params(torch.empty(1, size, size), draw.scale, draw.ratio) for _ in range(2000)])
    expected = drawn[:, 2] * drawn[:, 3] / size**2
    assert abs(area.mean() - expected.mean()) < 5 * expected.std() * np.sqrt(1 / 400 + 1 / 2000)
    assert 0.72 < ratio.min() < 0.85
    assert 1.2 < ratio.max() < 1.37
    assert abs((columns < 0).double().mean() - 0.5) < 5 * 0.5 / 20


def test_evaluation_is_the_usual_resize_and_centre_crop(noise):
    images = streamed(noise, image_size=28)
    usual = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(28), transforms.PILToTensor()])
    expected = [usual(Image.open(noise / os.fsdecode(name)).convert("RGB")) for name in images.files]
    assert all(
        torch.equal(image, other) for image, other in zip(torch.cat(list(images.pixels())), expected, strict=True)
    )
    normalise = transforms.Normalize(images.mean, images.std)
    normalised = torch.stack([normalise(image / 255) for image in expected])
    torch.testing.assert_close(torch.cat([batch for batch, _ in images.batches(5)]), normalised, rtol=1e-5, atol=1e-6)


def test_bytes_leave_the_workers_and_floats_the_set(noise, monkeypatch):
    seen, normalise = [], StreamedSet._normalise
    monkeypatch.setattr(
        StreamedSet, "_normalise", lambda self, batch: seen.append(batch.dtype) or normalise(self, batch)
    )
    images = streamed(noise, workers=1)
    assert [batch.dtype for batch, _ in images.batches(12)] == [torch.float32] * 2
    assert seen == [torch.uint8] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_cuda_gives_the_same_batches_from_pinned_memory(noise, workers):
    images = streamed(noise, workers)
    on_gpu = images.to(torch.device("cuda:0"))
    for (a, b), (c, d) in zip(
        on_gpu.train_batches(8, seed=1, epoch=1), images.train_batches(8, seed=1, epoch=1), strict=True
    ):
        torch.testing.assert_close(a.cpu(), c)
        assert torch.equal(b.cpu(), d)
    assert all(batch.is_pinned() for batch in on_gpu._decoded(list(range(23)), [slice(0, 8)], None))


# --- whole sets ---


def stream(root: Path, **settings):
    return build_data("ImageFolder", root, **{"image_size": 128} | settings)


def test_image_folder_is_streamed_from_128_pixels_on(tmp_path):
    make_photos(tmp_path)
    splits = stream(tmp_path, holdout=1 / 3, workers=2)
    assert isinstance(splits.train, StreamedSet)
    assert not isinstance(stream(tmp_path, image_size=127).train, StreamedSet)
    assert (splits.num_classes, splits.channels, splits.image_size) == (2, 3, 128)
    seen = []
    for part, per_class in ((splits.train, 4), (splits.holdout, 2), (splits.test, 6)):
        assert torch.bincount(part.labels).tolist() == [per_class] * 2
        red = torch.cat(list(part.pixels()))[:, 0].float().mean(dim=(1, 2))
        assert torch.equal((red > 100).long(), part.labels)
        seen += [(part.folder, name) for name in part.files.tolist()]
    assert len(set(seen)) == 24
    assert 0 < stream(tmp_path).test.labels[:6].sum() < 6  # shuffled, not sorted by class


def test_statistics_are_those_of_the_training_images_as_they_are_evaluated(tmp_path, monkeypatch):
    make_photos(tmp_path)
    train = stream(tmp_path).train
    pixels = torch.cat(list(train.pixels())).double() / 255
    np.testing.assert_allclose(train.mean, pixels.mean(dim=(0, 2, 3)))
    np.testing.assert_allclose(train.std, pixels.std(dim=(0, 2, 3), correction=0))
    # Of many images an even choice is read: both classes, whatever is held out.
    monkeypatch.setattr("data.image_folder.STREAMED_IMAGES_FOR_STATISTICS", 4)
    mean = stream(tmp_path, holdout=0.5).train.mean
    assert mean[0] == pytest.approx(100 / 255, abs=0.03)
    assert mean == stream(tmp_path, workers=2).train.mean


def test_fingerprint_tells_files_apart_but_not_places(tmp_path):
    make_photos(tmp_path / "here")
    first = stream(tmp_path / "here").fingerprint
    assert first != stream(tmp_path / "here", image_size=130).fingerprint
    (tmp_path / "here").rename(tmp_path / "there")
    assert first == stream(tmp_path / "there", workers=2).fingerprint
    photo = tmp_path / "there" / "train" / "cat" / "1.jpg"
    photo.rename(photo.with_name("1b.jpg"))  # its place in the order stays
    assert first != stream(tmp_path / "there").fingerprint
    photo.with_name("1b.jpg").rename(photo)
    assert first == stream(tmp_path / "there").fingerprint
    photo.rename(tmp_path / "there" / "train" / "dog" / "1b.jpg")
    assert first != stream(tmp_path / "there").fingerprint


def test_contents_see_a_byte_of_any_file_and_sizes_where_not_all_are_read(tmp_path, monkeypatch):
    make_photos(tmp_path / "here", per_class=3)
    first = stream(tmp_path / "here").contents
    (tmp_path / "here").rename(tmp_path / "there")
    assert first == stream(tmp_path / "there", workers=2).contents
    files = sorted((tmp_path / "there").rglob("*.jpg"))
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content + b"\1")
        longer = stream(tmp_path / "there").contents
        file.write_bytes(content + b"\2")
        assert len({first, longer, stream(tmp_path / "there").contents}) == 3
        file.write_bytes(content)
    monkeypatch.setattr(data.streamed, "_BYTES_TO_COMPARE", 1)  # of each part the first file alone
    first = stream(tmp_path / "there").contents
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content + b"\1")
        assert first != stream(tmp_path / "there").contents
        file.write_bytes(content)
    assert first == stream(tmp_path / "there").contents


@pytest.mark.parametrize("inner", ["", "ImageNet"])
def test_imagenet_layouts_statistics_and_size(tmp_path, monkeypatch, inner):
    make_photos(tmp_path / inner, per_class=2, test="val")
    monkeypatch.setattr("data.folders.IMAGENET_CLASSES", 2)
    splits = build_data("ImageNet", tmp_path)
    assert (splits.image_size, len(splits.train), len(splits.test)) == (224, 4, 4)
    assert splits.train.mean == (0.485, 0.456, 0.406)
    [(batch, _)] = splits.test.batches(4)
    assert batch.shape == (4, 3, 224, 224)
    assert build_data("ImageNet", tmp_path, image_size=64).train.shape == (4, 3, 64, 64)


def test_imagenet_with_another_number_of_classes_is_refused(tmp_path):
    make_photos(tmp_path, test="val")
    with pytest.raises(UserError, match=r"train holds 2 class folders, expected 1000: .*--set ImageFolder"):
        build_data("ImageNet", tmp_path)
    with pytest.raises(UserError, match=r"there is no folder \S+nowhere"):
        build_data("ImageNet", tmp_path / "nowhere")
    (tmp_path / "val").rename(tmp_path / "test")
    with pytest.raises(UserError, match=r"holds no folder val/"):
        build_data("ImageNet", tmp_path)


def test_a_class_that_only_one_part_has_is_refused_before_files_are_read(tmp_path, monkeypatch):
    make_photos(tmp_path, per_class=1, test="val")
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "wolf")
    monkeypatch.setattr("data.folders.IMAGENET_CLASSES", 2)
    for name in ("ImageNet", "ImageFolder"):
        with pytest.raises(UserError, match=r"differ \(only in \S+train: dog; only in \S+val: wolf\)"):
            build_data(name, tmp_path, image_size=128)


# --- bad files ---


def test_files_are_not_opened_before_they_are_needed(tmp_path, monkeypatch):
    """A set of a million files must not delay every start."""
    make_photos(tmp_path, test="val")
    monkeypatch.setattr("data.folders.IMAGENET_CLASSES", 2)
    monkeypatch.setattr("data.image_folder.STREAMED_IMAGES_FOR_STATISTICS", 4)
    opened = []
    monkeypatch.setattr(files.Image, "open", lambda path, open=Image.open: opened.append(path) or open(path))
    build_data("ImageNet", tmp_path)
    assert opened == []
    stream(tmp_path)
    assert len(opened) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_ends_the_epoch_that_meets_it_and_is_named(tmp_path, workers):
    make_photos(tmp_path)
    splits = stream(tmp_path, workers=workers)
    for part, bad in ((splits.train, "train/dog/3.jpg"), (splits.test, "test/cat/1.jpg")):
        (tmp_path / bad).write_bytes((tmp_path / bad).read_bytes()[:300])
        for batches in (part.train_batches(2, seed=0, epoch=0), part.batches(2)):
            with pytest.raises(UserError) as caught:
                list(batches)
            assert str(caught.value).startswith(f"cannot read image {tmp_path / bad} (")
            assert len(str(caught.value).splitlines()) == 1
        good = [index for index, name in enumerate(part.files) if os.fsdecode(name) not in bad]
        assert len(list(part.subset(good).batches(2))) == 6  # the others can still be read
    with pytest.raises(UserError, match=r"cannot read image \S+train/dog/3.jpg"):
        stream(tmp_path, workers=workers)  # the statistics need it


def test_workers_of_an_epoch_that_is_not_finished_end_before_the_program(noise, monkeypatch):
    """Python waits for its processes at exit, while workers outlive the signal that it sends them."""
    at_exit = []
    monkeypatch.setattr(data.streamed.atexit, "register", at_exit.append)
    monkeypatch.setattr(data.streamed.atexit, "unregister", at_exit.remove)
    others = set(multiprocessing.active_children())
    batches = streamed(noise, workers=2).train_batches(2, seed=0, epoch=0)
    next(batches)
    assert len(set(multiprocessing.active_children()) - others) == 2
    [end] = at_exit
    end()
    assert set(multiprocessing.active_children()) == others
    del batches
    assert at_exit == []


def test_a_worker_that_is_killed_is_a_user_error(noise, monkeypatch):
    """As by the kernel, when memory is full."""
    monkeypatch.setattr(data.streamed, "open_rgb", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"a process that decodes images has died .*fewer --workers \(now 1\)"):
        list(streamed(noise, workers=1).batches(4))


def test_a_worker_without_shared_memory_is_a_user_error_and_its_process_ends(noise, monkeypatch):
    """The error keeps the frames in which it arose; a program that is about to end would wait for what they hold."""

    def full(path: Path) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(data.streamed, "open_rgb", full)
    others = set(multiprocessing.active_children())
    with pytest.raises(
        UserError, match=r"died \(RuntimeError: unable .* device \(28\)\); memory or /dev/shm"
    ) as raised:
        list(streamed(noise, workers=2).batches(4))
    assert "\n" not in str(raised.value)
    assert set(multiprocessing.active_children()) == others


def test_an_error_of_the_program_within_a_worker_stays_one(noise, monkeypatch):
    def wrong(path: Path) -> None:
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(data.streamed, "open_rgb", wrong)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        list(streamed(noise, workers=1).batches(4))
