"""Images in memory: crops and mirror images against a slow reference, and whose memory a batch is."""

import numpy as np
import pytest
import torch

from data import ImageSet
from tests.data.samples import by_label, in_memory


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_and_flip_equal_a_slow_reference(padding, channels):
    images = in_memory(40, channels, crop_padding=padding, flip=True)
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
    images = in_memory(6, crop_padding=1)
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


def test_batches_are_normalised_per_channel():
    images = in_memory(20)
    mean, std = (np.array(values)[None, :, None, None] for values in (images.mean, images.std))
    actual = torch.cat([batch for batch, _ in images.batches(5)])
    np.testing.assert_allclose(actual.numpy(), (images.images.numpy() / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    trained = by_label(images.train_batches(5, seed=0, epoch=0))
    assert all(torch.equal(trained[label], actual[label]) for label in range(20))


def test_batches_share_no_memory_with_the_set():
    images = in_memory(10)
    before = images.images.clone(), images.labels.clone()
    for batches in (images.batches(5), images.train_batches(5, seed=0, epoch=0)):
        for batch, labels in batches:
            batch.zero_()
            labels.zero_()
    assert torch.equal(images.images, before[0])
    assert torch.equal(images.labels, before[1])
    part = images.subset([7])
    part.images.zero_()
    assert torch.equal(images.images, before[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_batches_and_waits_for_nothing():
    images = in_memory(64, crop_padding=2, flip=True, channels_last=True)
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
