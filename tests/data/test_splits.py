"""From a set's name to training, held-out and test images."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from args import SETS
from data import HOLDOUT, HOLDOUT_FROM, build_data, sources, split_holdout
from tests.data.samples import make_folders, write_cifar, write_idx_files
from utils.errors import UserError


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


def test_a_tenth_is_held_out_by_rule_from_5000_images_on(tmp_path, monkeypatch):
    assert (HOLDOUT, HOLDOUT_FROM) == (0.1, 5000)
    make_folders(tmp_path, per_class=10)
    monkeypatch.setattr("data.HOLDOUT_FROM", 20)
    some = build_data("ImageFolder", tmp_path, holdout=None)
    assert (len(some.train), len(some.holdout), some.holdout_fraction) == (18, 2, 0.1)
    monkeypatch.setattr("data.HOLDOUT_FROM", 21)
    none = build_data("ImageFolder", tmp_path, holdout=None)
    assert (len(none.train), len(none.holdout), none.holdout_fraction) == (20, 0, 0.0)
    assert build_data("ImageFolder", tmp_path, holdout=0.4).holdout_fraction == 0.4


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 0), (0.9, 3)])
def test_holdout_must_leave_something_on_both_sides(fraction, count):
    with pytest.raises(UserError, match=rf"holdout={fraction} would hold out {count} of the 3 .*class pear"):
        split_holdout(np.array([0] * 100 + [1] * 3), fraction, ("apple", "pear"))


def test_building_a_set_neither_reads_nor_advances_a_global_generator(tmp_path):
    make_folders(tmp_path)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = build_data("ImageFolder", tmp_path, holdout=0.4, train_images=4).train.images
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert torch.equal(first, build_data("ImageFolder", tmp_path, holdout=0.4, train_images=4).train.images)


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
    write_idx_files(tmp_path / "MNIST" / "raw", compress=False)
    with pytest.raises(UserError, match="image_size=64 is not possible for MNIST"):
        build_data("MNIST", tmp_path, image_size=64)


def test_a_disk_that_cannot_be_read_is_a_user_error(tmp_path, monkeypatch):
    write_cifar(tmp_path, "CIFAR10", monkeypatch)

    def refuse(path, checksum):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sources, "check_integrity", refuse)
    with pytest.raises(UserError, match=r"CIFAR10: .*Permission denied: '\S+data_batch_1'; check that .* is readable"):
        build_data("CIFAR10", tmp_path)


# --- fingerprints ---


def test_fingerprint_tells_splits_apart(mini):
    assert re.fullmatch("[0-9a-f]{12}", mini.fingerprint)
    assert mini.fingerprint == build_data("FashionMNIST-mini", holdout=0.1).fingerprint
    assert mini.fingerprint != build_data("FashionMNIST-mini", holdout=0.2).fingerprint


def test_fingerprint_depends_on_labels(tmp_path):
    make_folders(tmp_path)
    first = build_data("ImageFolder", tmp_path).fingerprint
    (tmp_path / "test" / "cat" / "4.png").rename(tmp_path / "test" / "dog" / "5.png")
    assert first != build_data("ImageFolder", tmp_path).fingerprint


def test_contents_depend_on_pixels_alone(tmp_path):
    """Every part counts, its names and its place do not, and labels are left to the fingerprint."""
    make_folders(tmp_path)
    first = build_data("ImageFolder", tmp_path, holdout=0.4)
    seen = {first.contents}
    for part in ("train/cat", "test/dog"):
        for number in range(5):  # some are held out
            Image.new("RGB", (8, 8), (7, number, len(seen))).save(tmp_path / part / f"{number}.png")
            changed = build_data("ImageFolder", tmp_path, holdout=0.4)
            assert changed.fingerprint == first.fingerprint
            assert first.difference({"fingerprint": changed.fingerprint, "contents": changed.contents})
            seen.add(changed.contents)
    assert len(seen) == 11
    assert first.difference({"fingerprint": first.fingerprint, "contents": first.contents}) == ""
    assert first.difference({"fingerprint": first.fingerprint}) == ""  # an older checkpoint
    assert "labels" in first.difference({"fingerprint": "other", "contents": first.contents})
