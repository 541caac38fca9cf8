"""The named sets: what their files must hold, and what is said if they are missing. Nothing here downloads."""

import hashlib
import re
import socket
import sys
import tarfile
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets

from data import build_data, make_fashion_mnist_mini, sources
from data.idx import idx_bytes, read_idx_file
from tests.data.samples import write_cifar, write_idx_files
from utils.errors import UserError

# --- the bundled sample ---


def test_bundled_sample(mini):
    splits = mini
    assert (len(splits.train), len(splits.holdout), len(splits.test)) == (9000, 1000, 2000)
    for part, per_class in ((splits.train, 900), (splits.holdout, 100), (splits.test, 200)):
        assert part.images.shape[1:] == (1, 32, 32)
        assert torch.bincount(part.labels).tolist() == [per_class] * 10
        assert part.labels[:50].unique().numel() > 5  # shuffled, not sorted by class
    assert (splits.num_classes, splits.channels, splits.image_size) == (10, 1, 32)
    assert splits.class_names[9] == "Ankle boot"
    assert (splits.train.crop_padding, splits.train.flip) == (2, True)
    border = splits.test.images.clone()
    border[:, :, 2:30, 2:30] = 0
    assert not border.any()
    # The statistics are those of the full training set; the sample must come close.
    pixels = torch.cat([batch for batch, _ in splits.train.batches(1000)])
    assert abs(pixels.mean()) < 0.01
    assert abs(pixels.std() - 1) < 0.01


def test_damaged_sample_is_refused(tmp_path, monkeypatch):
    content = bytearray(sources.FASHION_MNIST_MINI.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = tmp_path / "fashion_mnist_mini.xz"
    damaged.write_bytes(content)
    monkeypatch.setattr(sources, "FASHION_MNIST_MINI", damaged)
    with pytest.raises(UserError, match=r"fashion_mnist_mini.xz is missing or damaged .*git checkout"):
        build_data("FashionMNIST-mini", tmp_path)
    damaged.unlink()
    with pytest.raises(UserError, match=r"SHA-256 missing, expected"):
        build_data("FashionMNIST-mini", tmp_path)


def test_readme_states_the_checksum_and_the_size_is_small():
    readme = sources.FASHION_MNIST_MINI.with_name("README.md").read_text()
    assert sources.FASHION_MNIST_MINI_SHA256 in readme
    assert sources.FASHION_MNIST_MINI.stat().st_size < 6_000_000


def test_making_the_sample_is_balanced_and_repeatable(tmp_path, monkeypatch, capsys):
    train_images, train_labels, test_images, _ = write_idx_files(tmp_path, compress=True, count=40)
    monkeypatch.setattr(make_fashion_mnist_mini, "TRAIN_PER_CLASS", 3)
    monkeypatch.setattr(make_fashion_mnist_mini, "TEST_PER_CLASS", 2)
    outputs = tmp_path / "one.xz", tmp_path / "two.xz"
    for output in outputs:
        make_fashion_mnist_mini.main(["--source", str(tmp_path), "--output", str(output)])
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert hashlib.sha256(outputs[0].read_bytes()).hexdigest() in capsys.readouterr().out
    images, labels, few_images, few_labels = read_idx_file(outputs[0], num_arrays=4)
    assert np.bincount(labels).tolist() == [3] * 10
    assert np.bincount(few_labels).tolist() == [2] * 10
    assert labels.tolist() != sorted(labels)
    originals = {(image.tobytes(), label) for image, label in zip(train_images, train_labels, strict=True)}
    drawn = {(image.tobytes(), label) for image, label in zip(images, labels, strict=True)}
    assert len(drawn) == 30
    assert drawn <= originals
    assert {image.tobytes() for image in few_images} <= {image.tobytes() for image in test_images}


# --- MNIST and Fashion-MNIST ---


@pytest.fixture
def no_debian_package(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "FASHION_MNIST_DEBIAN", tmp_path / "no package")


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
@pytest.mark.usefixtures("no_debian_package")
def test_idx_files_from_root(tmp_path, name, compress):
    arrays = write_idx_files(tmp_path / name / "raw", compress)
    splits = build_data(name, tmp_path)
    assert splits.train.images.shape == (20, 1, 32, 32)
    np.testing.assert_array_equal(splits.train.images[:, 0, 2:30, 2:30].numpy(), arrays[0])
    np.testing.assert_array_equal(splits.test.images[:, 0, 2:30, 2:30].numpy(), arrays[2])
    assert splits.train.labels.tolist() == arrays[1].tolist()
    assert (splits.train.mean, splits.train.std) == sources.MEAN_STD[name]
    assert len(splits.holdout) == 0


def test_digits_are_not_mirrored(tmp_path):
    write_idx_files(tmp_path / "MNIST" / "raw", compress=False)
    splits = build_data("MNIST", tmp_path)
    assert (splits.train.crop_padding, splits.train.flip) == (2, False)
    assert splits.class_names[7] == "7 - seven"


@pytest.mark.parametrize(
    ("at_28", "at_32"),
    [((0.1307, 0.3081), sources.MEAN_STD["MNIST"]), ((0.2860, 0.3530), sources.MEAN_STD["FashionMNIST"])],
)
def test_statistics_of_padded_sets_follow_from_those_in_common_use(at_28, at_32):
    share, (mean, std) = 28**2 / 32**2, at_28
    expected = share * mean, np.sqrt(share * (mean**2 + std**2) - (share * mean) ** 2)
    np.testing.assert_allclose(np.ravel(at_32), expected, atol=1e-4)


def test_fashion_mnist_from_debian_package(tmp_path, monkeypatch):
    package = tmp_path / "package"
    write_idx_files(package, compress=True)
    monkeypatch.setattr(sources, "FASHION_MNIST_DEBIAN", package)
    assert len(build_data("FashionMNIST", tmp_path / "empty").train) == 20


@pytest.mark.usefixtures("no_debian_package")
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("keep", [0, 2, 10, 16, 500])
def test_truncated_idx_file_is_named(tmp_path, compress, keep):
    raw = tmp_path / "FashionMNIST" / "raw"
    write_idx_files(raw, compress)
    damaged = raw / ("t10k-images-idx3-ubyte" + (".gz" if compress else ""))
    damaged.write_bytes(damaged.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"{re.escape(str(damaged))} is damaged or not an IDX file"):
        build_data("FashionMNIST", tmp_path)


@pytest.mark.usefixtures("no_debian_package")
def test_wrong_idx_content_is_named(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    images, labels, *_ = write_idx_files(raw, compress=False)
    label_file, image_file = raw / "train-labels-idx1-ubyte", raw / "train-images-idx3-ubyte"
    for content, message in (
        (idx_bytes([labels]) + b"x", "1 bytes are left over"),
        (idx_bytes([labels])[:-3], "it ends after 17 of 20 values"),
        (
            idx_bytes([labels[:5]]),
            r"labels-idx1-ubyte holds an array of shape \(5,\).*expected 20 labels below 10",
        ),
        (idx_bytes([labels + 1]), "values up to 10; expected 20 labels below 10"),
    ):
        label_file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            build_data("FashionMNIST", tmp_path)
    image_file.write_bytes(idx_bytes([images[:, :20]]))
    with pytest.raises(UserError, match=r"images-idx3-ubyte holds .* \(20, 20, 28\); expected .* 28x28"):
        build_data("FashionMNIST", tmp_path)


# --- downloads that fail ---


@pytest.fixture
def no_network(monkeypatch):
    """torchvision's download talks and fails as without a network; returns the timeouts it ran under."""
    timeouts = []

    def fail(*arguments, **settings):
        timeouts.append(socket.getdefaulttimeout())
        print("noise")
        print("noise", file=sys.stderr)
        raise URLError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    return timeouts


@pytest.mark.usefixtures("no_debian_package")
@pytest.mark.parametrize(
    ("name", "folder", "parts"),
    [
        ("CIFAR10", "cifar-10-batches-py", ["data_batch_1", "cifar-10-python.tar.gz", "toronto.edu"]),
        ("CIFAR100", "cifar-100-python", ["train, test, meta", "cifar-100-python.tar.gz", "toronto.edu"]),
        (
            "FashionMNIST",
            "FashionMNIST/raw",
            ["train-images-idx3-ubyte", "dataset-fashion-mnist", "no package"],
        ),
        ("MNIST", "MNIST/raw", ["t10k-labels-idx1-ubyte", "ossci-datasets"]),
    ],
)
def test_failed_download_says_what_to_do(tmp_path, no_network, capsys, name, folder, parts):
    with pytest.raises(UserError) as caught:
        build_data(name, tmp_path)
    message = str(caught.value)
    quickstart = "python main.py --config configs/quickstart.yaml"
    for part in (name, str(tmp_path / folder), "Name or service not known", quickstart, *parts):
        assert part in message
    assert "\n" not in message
    assert set(no_network) == {10}  # each attempt: MNIST has two mirrors
    assert socket.getdefaulttimeout() is None
    output = capsys.readouterr()
    assert "noise" not in output.out + output.err


# --- CIFAR ---


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar(tmp_path, monkeypatch, no_network, name):
    pixels, labels = write_cifar(tmp_path, name, monkeypatch)
    splits = build_data(name, tmp_path)
    np.testing.assert_array_equal(splits.train.images.numpy(), pixels.reshape(-1, 3, 32, 32))
    assert splits.train.labels.tolist() == labels
    assert len(splits.test) == 20
    assert splits.num_classes == len(splits.class_names) == (10 if name == "CIFAR10" else 100)
    assert (splits.channels, splits.image_size, splits.train.crop_padding, splits.train.flip) == (
        3,
        32,
        4,
        True,
    )
    assert no_network == []


def test_cifar10_statistics_are_the_released_ones():
    assert sources.MEAN_STD["CIFAR10"] == ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))


# Python 3.12 wants tarfile.extractall to be called with a filter; torchvision does not do so.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_cifar_archive_in_root_is_unpacked_without_network(tmp_path, monkeypatch):
    write_cifar(tmp_path / "made", "CIFAR10", monkeypatch)
    root = tmp_path / "root"
    root.mkdir()
    archive = root / datasets.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / datasets.CIFAR10.base_folder, datasets.CIFAR10.base_folder)
    checksum = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", checksum)
    assert len(build_data("CIFAR10", root).train) == 100


def test_damaged_cifar_file_is_named(tmp_path, monkeypatch, no_network):
    write_cifar(tmp_path, "CIFAR10", monkeypatch)
    damaged = tmp_path / datasets.CIFAR10.base_folder / "data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"data_batch_3 is damaged .*cifar-10-python.tar.gz"):
        build_data("CIFAR10", tmp_path)
    assert no_network == []
