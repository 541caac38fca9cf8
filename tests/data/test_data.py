"""Image sets in memory: order, augmentation, loading, and the wording of every refusal. Nothing here downloads."""

import hashlib
import re
import socket
import sys
import tarfile
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import datasets

from args import SETS
from data import ImageSet, build_data, make_fashion_mnist_mini, sources, split_holdout
from data.idx import idx_bytes, read_idx_file
from tests.images import by_label, in_order, make_folders, write_cifar, write_idx_files
from utils.errors import UserError


def make_set(count: int = 23, channels: int = 3, size: int = 8, **settings) -> ImageSet:
    """Random images; image i has label i, so that a batch says which images it holds."""
    random = np.random.default_rng(0)
    return ImageSet(
        images=torch.from_numpy(random.integers(0, 256, (count, channels, size, size), dtype=np.uint8)),
        labels=torch.arange(count),
        mean=(0.4, 0.5, 0.6)[:channels],
        std=(0.2, 0.3, 0.25)[:channels],
        **settings,
    )


# --- order ---


def test_epoch_visits_each_image_once_and_drops_the_incomplete_batch():
    images = make_set(23)
    assert images.num_train_batches(5) == 4
    batches = list(images.train_batches(5, seed=1, epoch=0))
    assert [len(labels) for _, labels in batches] == [5, 5, 5, 5]
    assert len(set(in_order(batches))) == 20


def test_order_depends_on_seed_and_epoch_only():
    images = make_set(24)

    def order(batch_size, seed, epoch, which=images):
        return in_order(which.train_batches(batch_size, seed, epoch))

    assert order(4, 3, 2) == order(8, 3, 2) == order(4, 3, 2, make_set(24, crop_padding=2, flip=True))
    assert order(4, 3, 2) != list(range(24))
    different = [order(4, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


def test_start_leaves_out_batches_and_changes_nothing_else():
    images = make_set(23, crop_padding=2, flip=True)
    whole = list(images.train_batches(4, seed=5, epoch=3))
    for start in range(6):
        rest = list(images.train_batches(4, seed=5, epoch=3, start=start))
        assert len(rest) == 5 - start
        for (a, b), (c, d) in zip(rest, whole[start:], strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)


def test_start_does_not_compute_what_it_leaves_out(monkeypatch):
    images = make_set(23)
    computed = []
    normalise = ImageSet._normalise
    monkeypatch.setattr(ImageSet, "_normalise", lambda self, batch: computed.append(1) or normalise(self, batch))
    list(images.train_batches(4, seed=0, epoch=0, start=3))
    assert len(computed) == 2


def test_too_few_images_for_a_batch_are_refused_at_once():
    with pytest.raises(UserError, match=r"batch_size is 24, .* only 23 training images.* at most 23"):
        make_set(23).train_batches(24, seed=0, epoch=0)


# --- several processes share a batch ---


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_parts_of_all_ranks_are_the_batches_of_one(num_ranks):
    whole = make_set(23, crop_padding=2, flip=True)
    parts = [whole.subset(range(23)) for _ in range(num_ranks)]
    for rank, part in enumerate(parts):
        part.rank, part.num_ranks = rank, num_ranks
    assert {part.num_train_batches(7) for part in parts} == {3}

    batches = [part.train_batches(7, seed=5, epoch=3, start=1) for part in parts]
    for expected, *shared in zip(whole.train_batches(7, seed=5, epoch=3, start=1), *batches, strict=True):
        sizes = [len(labels) for _, labels in shared]
        assert max(sizes) - min(sizes) <= 1
        for one, several in zip(expected, zip(*shared, strict=True), strict=True):
            assert torch.equal(one, torch.cat(several))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 6), st.none() | st.integers(0, 4))
def test_each_image_is_evaluated_on_exactly_one_rank(count, batch_size, num_ranks, limit):
    """Also where a rank gets nothing of a small last batch."""
    whole = make_set(20).subset(range(count))
    expected = by_label(whole.batches(batch_size, limit))
    seen = []
    for rank in range(num_ranks):
        part = whole.subset(range(count))
        part.rank, part.num_ranks = rank, num_ranks
        for images, labels in part.batches(batch_size, limit):
            assert 0 < len(labels) <= -(-batch_size // num_ranks)
            assert all(torch.equal(image, expected[int(label)]) for image, label in zip(images, labels, strict=True))
            seen += labels.tolist()
    assert sorted(seen) == sorted(expected)


def test_a_batch_that_does_not_feed_all_ranks_is_refused():
    images = make_set(23)
    images.num_ranks = 3
    with pytest.raises(UserError, match=r"batch_size is 2, but 3 processes share .*of at least 3"):
        images.train_batches(2, seed=0, epoch=0)
    part = images.subset(range(9))
    assert (part.rank, part.num_ranks) == (0, 3)


# --- augmentation ---


@pytest.mark.parametrize("settings", [{"crop_padding": 2}, {"flip": True}, {"crop_padding": 2, "flip": True}])
def test_augmentation_of_an_image_does_not_depend_on_its_batch(settings):
    images = make_set(24, **settings)
    first = by_label(images.train_batches(4, seed=1, epoch=7))
    second = by_label(images.train_batches(12, seed=1, epoch=7, start=1))
    assert len(second) == 12
    assert all(torch.equal(first[label], image) for label, image in second.items())
    for seed, epoch in ((1, 8), (2, 7)):
        other = by_label(images.train_batches(4, seed=seed, epoch=epoch))
        assert any(not torch.equal(first[label], image) for label, image in other.items())


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_and_flip_equal_a_slow_reference(padding, channels):
    images = make_set(40, channels, crop_padding=padding, flip=True)
    random = np.random.default_rng(1)
    shifts, flips = random.integers(0, 2 * padding + 1, (40, 2)), random.integers(0, 2, 40).astype(bool)
    actual = images._crop_and_flip(images.images, torch.from_numpy(shifts), torch.from_numpy(flips))
    for index, image in enumerate(images.images.numpy()):
        row, column = shifts[index]
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        expected = padded[:, row : row + 8, column : column + 8]
        if flips[index]:
            expected = expected[:, :, ::-1]
        np.testing.assert_array_equal(actual[index].numpy(), expected)
    assert actual.dtype == torch.uint8


def test_crop_without_flip_ignores_the_flips():
    images = make_set(6, crop_padding=1)
    shifts = torch.ones(6, 2, dtype=torch.int64)
    assert torch.equal(images._crop_and_flip(images.images, shifts, torch.ones(6, dtype=torch.bool)), images.images)


def test_every_shift_and_both_directions_occur_about_equally():
    # A single bright pixel in the middle shows by its place how its image was shifted and mirrored.
    count, size, padding = 9000, 5, 1
    image = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    image[:, :, 2, 1] = 255
    images = ImageSet(
        images=image, labels=torch.arange(count), mean=(0.0,), std=(1.0,), crop_padding=padding, flip=True
    )
    [(batch, _)] = images.train_batches(count, seed=0, epoch=0)
    counts = batch[:, 0].round().sum(0)
    # Columns 0, 1, 2 unmirrored, 2, 3, 4 mirrored: each of 3 x 3 x 2 cases has probability 1/18.
    expected = torch.zeros(size, size)
    expected[1:4] = torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0]) / 18 * count
    deviation = (expected * (1 - expected / count)).sqrt()
    assert ((counts - expected).abs() <= 5 * deviation).all()


# --- normalisation, plain batches, subsets ---


def test_batches_come_in_order_normalised_with_the_last_smaller_one():
    images = make_set(23, crop_padding=2, flip=True)
    batches = list(images.batches(5))
    assert [len(labels) for _, labels in batches] == [5, 5, 5, 5, 3]
    assert in_order(batches) == list(range(23))
    mean, std = (np.array(values)[None, :, None, None] for values in (images.mean, images.std))
    expected = (images.images.numpy() / 255 - mean) / std
    actual = torch.cat([batch for batch, _ in batches])
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_training_batches_are_normalised_the_same_way():
    images = make_set(20)
    trained, plain = by_label(images.train_batches(5, seed=0, epoch=0)), by_label(images.batches(20))
    assert all(torch.equal(trained[label], plain[label]) for label in range(20))


def test_limit_is_a_number_of_batches():
    images = make_set(23)
    assert in_order(images.batches(5, limit=2)) == list(range(10))
    assert len(list(images.batches(5, limit=99))) == 5
    assert list(images.batches(5, limit=0)) == []


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format(channels_last):
    images = make_set(20, crop_padding=1, flip=True, channels_last=channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for batches in (images.batches(5), images.train_batches(5, seed=0, epoch=0)):
        assert all(batch.is_contiguous(memory_format=memory_format) for batch, _ in batches)


def test_batches_share_no_memory_with_the_set():
    images = make_set(10)
    before = images.images.clone(), images.labels.clone()
    for batches in (images.batches(5), images.train_batches(5, seed=0, epoch=0)):
        for batch, labels in batches:
            batch.zero_()
            labels.zero_()
    assert torch.equal(images.images, before[0])
    assert torch.equal(images.labels, before[1])


def test_subset_keeps_order_and_settings():
    images = make_set(10, crop_padding=2, flip=True, channels_last=True)
    part = images.subset([7, 1, 4])
    assert in_order(part.batches(2)) == [7, 1, 4]
    assert torch.equal(part.images[0], images.images[7])
    assert (part.mean, part.std, part.crop_padding, part.flip, part.channels_last) == (
        images.mean,
        images.std,
        2,
        True,
        True,
    )
    assert len(images.subset([])) == 0
    assert list(images.subset([]).batches(4)) == []
    part.images.zero_()
    assert images.images[7].any()


def test_no_global_generator_is_read_or_advanced(tmp_path):
    make_folders(tmp_path)
    images = make_set(23, crop_padding=2, flip=True)

    def everything():
        build_data("ImageFolder", tmp_path, holdout=0.4)
        return [batch for batch, _ in images.train_batches(4, seed=0, epoch=0)]

    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch_before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = everything()
    assert torch.equal(torch_before, torch.random.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # noqa: NPY002
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_batches_and_waits_for_nothing():
    images = make_set(64, crop_padding=2, flip=True, channels_last=True)
    expected = [batch for batch, _ in images.train_batches(8, seed=1, epoch=1)]
    images.images, images.labels = images.images.cuda(), images.labels.cuda()
    batches = images.subset(range(64)).train_batches(8, seed=1, epoch=1)
    actual = [next(batches)[0]]  # makes the tables of the epoch, which are copied to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual += [batch for batch, _ in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b)


# --- the held-out part ---


def test_holdout_is_balanced_disjoint_and_complete():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [100, 50, 10]))
    train, held_out = split_holdout(labels, 0.1, ("a", "b", "c"))
    assert np.bincount(labels[held_out]).tolist() == [10, 5, 1]
    assert sorted([*train, *held_out]) == list(range(160))
    assert not set(train) & set(held_out)
    # A fixed generator, not the first images of each class.
    assert set(held_out[labels[held_out] == 0]) != set(np.flatnonzero(labels == 0)[:10])
    torch.manual_seed(9)
    np.random.seed(9)  # noqa: NPY002
    assert np.array_equal(held_out, split_holdout(labels, 0.1, ("a", "b", "c"))[1])


def test_no_holdout():
    train, held_out = split_holdout(np.array([0, 1, 1]), 0.0, ("a", "b"))
    assert train.tolist() == [0, 1, 2]
    assert held_out.tolist() == []


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 0), (0.9, 3)])
def test_holdout_must_leave_something_on_both_sides(fraction, count):
    with pytest.raises(UserError, match=rf"holdout={fraction} would hold out {count} of the 3 .*class pear"):
        split_holdout(np.array([0] * 100 + [1] * 3), fraction, ("apple", "pear"))


# --- arguments ---


def test_every_set_that_can_be_chosen_is_known(tmp_path, monkeypatch):
    """Each looks for its files; a set that is only in a list would be refused as unknown."""
    monkeypatch.setattr(sources, "FASHION_MNIST_MINI", tmp_path / "absent")
    monkeypatch.setattr(sources, "FASHION_MNIST_DEBIAN", tmp_path / "absent")
    monkeypatch.setattr(
        sources, "_download", lambda *what: (_ for _ in ()).throw(UserError(f"{what[0].__name__} is missing"))
    )
    for name in SETS:
        with pytest.raises(UserError, match=rf"^{name}.*(missing|there is no folder)"):
            build_data(name, tmp_path / "absent")
    with pytest.raises(UserError, match="there is no data set 'CIFAR-10'"):
        build_data("CIFAR-10", tmp_path)


def test_sets_of_one_size_refuse_another(tmp_path):
    with pytest.raises(UserError, match="image_size=64 is not possible for FashionMNIST"):
        build_data("FashionMNIST", tmp_path, image_size=64)


def test_a_disk_that_cannot_be_read_is_a_user_error(tmp_path, monkeypatch):
    write_cifar(tmp_path, "CIFAR10", monkeypatch)

    def refuse(path, checksum):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sources, "check_integrity", refuse)
    with pytest.raises(UserError, match=r"CIFAR10: .*Permission denied: '\S+data_batch_1'; check that .* is readable"):
        build_data("CIFAR10", tmp_path)


# --- the bundled sample ---


def test_bundled_sample(tmp_path):
    splits = build_data("FashionMNIST-mini", tmp_path / "not there", holdout=0.1)
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


def test_fingerprint_tells_splits_apart(tmp_path):
    first = build_data("FashionMNIST-mini", tmp_path, holdout=0.1)
    assert first.fingerprint == build_data("FashionMNIST-mini", tmp_path, holdout=0.1).fingerprint
    assert first.fingerprint != build_data("FashionMNIST-mini", tmp_path, holdout=0.2).fingerprint
    assert re.fullmatch("[0-9a-f]{12}", first.fingerprint)


def test_fingerprint_depends_on_labels(tmp_path):
    make_folders(tmp_path)
    first = build_data("ImageFolder", tmp_path).fingerprint
    (tmp_path / "test" / "cat" / "4.png").rename(tmp_path / "test" / "dog" / "5.png")
    assert first != build_data("ImageFolder", tmp_path).fingerprint


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
