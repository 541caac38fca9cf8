"""Batches of every kind of set: order, the parts of several processes, augmentation, normalisation."""

import random as python_random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.samples import assert_same_batches, by_label, in_memory, in_order
from utils.errors import UserError


def test_epoch_visits_each_image_once_and_drops_the_incomplete_batch(make_set):
    images = make_set()
    assert images.num_train_batches(5) == 4
    batches = list(images.train_batches(5, seed=1, epoch=0))
    assert [len(labels) for _, labels in batches] == [5, 5, 5, 5]
    assert len(set(in_order(batches))) == 20


def test_order_depends_on_seed_and_epoch_only(make_set):
    def order(batch_size, seed, epoch, images):
        return in_order(images.train_batches(batch_size, seed, epoch))[:20]

    images, plain = make_set(), in_memory()
    assert order(4, 3, 2, images) == order(5, 3, 2, images) == order(4, 3, 2, plain) != list(range(20))
    different = [order(5, seed, epoch, images) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


def test_start_leaves_out_batches_and_changes_nothing_else(make_set, monkeypatch):
    images = make_set()
    whole = list(images.train_batches(4, seed=5, epoch=3))
    for start in range(6):
        assert_same_batches(images.train_batches(4, seed=5, epoch=3, start=start), whole[start:])
    computed, normalise = [], type(images)._normalise
    monkeypatch.setattr(type(images), "_normalise", lambda self, batch: computed.append(1) or normalise(self, batch))
    list(images.train_batches(4, seed=5, epoch=3, start=3))
    assert len(computed) == 2


def test_batches_that_cannot_be_made_are_refused_at_once(make_set):
    with pytest.raises(UserError, match="only 23 training images"):
        make_set().train_batches(24, seed=0, epoch=0)
    with pytest.raises(UserError, match="3 processes share each batch"):
        make_set(num_ranks=3).train_batches(2, seed=0, epoch=0)


# --- several processes share a batch ---


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_parts_of_all_ranks_are_the_batches_of_one(make_set, num_ranks):
    parts = [make_set(rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert {part.num_train_batches(7) for part in parts} == {3}
    batches = [part.train_batches(7, seed=5, epoch=3, start=1) for part in parts]
    for expected, *shared in zip(make_set().train_batches(7, seed=5, epoch=3, start=1), *batches, strict=True):
        sizes = [len(labels) for _, labels in shared]
        assert max(sizes) - min(sizes) <= 1
        for one, several in zip(expected, zip(*shared, strict=True), strict=True):
            assert torch.equal(one, torch.cat(several))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 6), st.none() | st.integers(0, 4))
def test_each_image_is_evaluated_on_exactly_one_rank(count, batch_size, num_ranks, limit):
    """Also where a rank gets nothing of a small last batch."""
    whole = in_memory(20).subset(range(count))
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


# --- augmentation, normalisation, subsets ---


def assert_augmentation_is_each_images_own(images):
    first = by_label(images.train_batches(23, seed=1, epoch=7))
    second = by_label(images.train_batches(6, seed=1, epoch=7, start=1))
    assert len(second) == 12
    assert all(torch.equal(first[label], image) for label, image in second.items())
    for seed, epoch in ((1, 8), (2, 7)):
        other = by_label(images.train_batches(23, seed=seed, epoch=epoch))
        assert sum(not torch.equal(first[label], image) for label, image in other.items()) > 3


def test_augmentation_depends_on_seed_epoch_and_image_alone(make_set):
    assert_augmentation_is_each_images_own(make_set())


@pytest.mark.parametrize("settings", [{"crop_padding": 2}, {"flip": True}])
def test_crop_and_flip_alone_depend_on_seed_epoch_and_image_alone(settings):
    assert_augmentation_is_each_images_own(in_memory(**settings))


def test_evaluation_is_in_order_with_the_last_smaller_batch(make_set):
    images = make_set()
    batches = list(images.batches(5))
    assert [len(labels) for _, labels in batches] == [5, 5, 5, 5, 3]
    assert in_order(batches) == list(range(23))
    assert in_order(images.batches(5, limit=2)) == list(range(10))
    assert len(list(images.batches(5, limit=99))) == 5
    assert list(images.batches(5, limit=0)) == []


@pytest.mark.parametrize("channels_last", [False, True])
def test_type_and_memory_format(make_set, channels_last):
    images = make_set(channels_last=channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for batches in (images.batches(12), images.train_batches(11, seed=0, epoch=0)):
        for batch, labels in batches:
            assert (batch.dtype, labels.dtype) == (torch.float32, torch.int64)
            assert batch.is_contiguous(memory_format=memory_format)


def test_no_global_generator_is_read_or_advanced(make_set):
    images = make_set()

    def states():
        return torch.random.get_rng_state(), np.random.get_state()[1].tolist(), python_random.getstate()  # noqa: NPY002

    torch.manual_seed(1)
    before = states()
    first = list(images.train_batches(8, seed=0, epoch=0))
    assert torch.equal(before[0], states()[0])
    assert before[1:] == states()[1:]
    torch.manual_seed(2)
    assert_same_batches(images.train_batches(8, seed=0, epoch=0), first)


def test_subset_keeps_order_and_settings(make_set):
    images = make_set(channels_last=True, rank=1, num_ranks=2)
    part = images.subset(torch.tensor([7, 1, 4]))
    for name in {"mean", "std", "channels_last", "rank", "num_ranks", "crop_padding", "flip", "image_size"}:
        assert getattr(part, name, None) == getattr(images, name, None)
    images.rank, images.num_ranks, part.rank, part.num_ranks = 0, 1, 0, 1
    assert in_order(part.batches(2)) == [7, 1, 4]
    whole = by_label(images.batches(23))
    assert all(torch.equal(image, whole[label]) for label, image in by_label(part.batches(3)).items())
    assert list(images.subset([]).batches(4)) == []
