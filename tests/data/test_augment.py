"""RandAugment, MixUp and CutMix: the formulas of torchvision, and draws that nothing but their purpose decides."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from data import Augmentation
from data.batched import AUGMENTATION_STREAM
from tests.data.samples import assert_same_batches, in_memory
from utils.seeds import mixed_seed

# Python 3.12 warns of every fork in a process that has threads, such as those of PyTorch.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

CLASSES = 23  # one for each image
MIXUP, CUTMIX = (Augmentation(mixup=0.4, num_classes=CLASSES), Augmentation(cutmix=1.0, num_classes=CLASSES))
ALL = Augmentation(rand_augment=2, mixup=0.4, cutmix=1.0, num_classes=CLASSES)


def own_weights(plain, mixed) -> list[float]:
    """For each batch the weight that its images kept in their labels, which is the same for all of them."""
    found = []
    for (_, numbers), (_, labels) in zip(plain, mixed, strict=True):
        expected = torch.nn.functional.one_hot(numbers, CLASSES).float()
        own = labels.gather(1, numbers[:, None])
        assert torch.equal(own, own[:1].expand_as(own))
        torch.testing.assert_close(labels, own * expected + (1 - own) * expected.roll(1, 0))
        torch.testing.assert_close(labels.sum(1), torch.ones(len(labels)))
        found.append(float(own[0]))
    return found


def test_mixup_adds_images_as_it_adds_labels(make_set):
    plain, mixed = ([*make_set(augmentation=how).train_batches(6, 1, 2)] for how in (Augmentation(), MIXUP))
    weights = own_weights(plain, mixed)
    assert len(set(weights)) == 3, "each batch has a draw of its own"
    for (images, _), (changed, _), weight in zip(plain, mixed, weights, strict=True):
        torch.testing.assert_close(changed, weight * images + (1 - weight) * images.roll(1, 0))


def test_cutmix_labels_have_the_shares_of_the_pixels(make_set):
    plain, mixed = ([*make_set(augmentation=how).train_batches(6, 1, 2)] for how in (Augmentation(), CUTMIX))
    for (images, _), (changed, _), weight in zip(plain, mixed, own_weights(plain, mixed), strict=True):
        from_partner = (changed != images).any(1)
        assert torch.equal(changed, torch.where(from_partner[:, None], images.roll(1, 0), images))
        box = from_partner.any(0)  # the same in all images of a batch
        assert float(box.double().mean()) == pytest.approx(1 - weight, abs=1e-6)


def test_with_both_each_batch_takes_one_of_them_at_random():
    images = in_memory(CLASSES, augmentation=Augmentation(mixup=0.4, cutmix=1.0, num_classes=CLASSES))
    plain = in_memory(CLASSES)
    are_cut = []
    for epoch in range(20):
        for (before, _), (after, labels) in zip(
            plain.train_batches(23, 0, epoch), images.train_batches(23, 0, epoch), strict=True
        ):
            if labels.max() < 1:
                whole = (after == before) | (after == before.roll(1, 0))
                are_cut.append(bool(whole.all()))
    assert 5 < sum(are_cut) < len(are_cut) - 5


def test_the_weights_have_the_beta_distribution_of_alpha():
    """Its variance is 1 / (4 (2 alpha + 1))."""
    images = in_memory(CLASSES, augmentation=Augmentation(mixup=0.2, num_classes=CLASSES))
    plain = in_memory(CLASSES)
    weights = torch.tensor(
        [own_weights(plain.train_batches(23, 0, e), images.train_batches(23, 0, e))[0] for e in range(120)]
    )
    assert float(weights.mean()) == pytest.approx(0.5, abs=0.12)
    assert float(weights.var()) == pytest.approx(1 / (4 * 1.4), abs=0.04)


def test_neither_start_nor_workers_nor_global_draws_change_anything(make_set):
    images = make_set(augmentation=ALL)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    whole = list(images.train_batches(5, seed=1, epoch=7))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    images.workers = 2  # nothing to sets in memory
    for start in (0, 3):
        assert_same_batches(images.train_batches(5, seed=1, epoch=7, start=start), whole[start:])
    for seed, epoch in ((2, 7), (1, 8)):
        other, _ = next(images.train_batches(5, seed=seed, epoch=epoch))
        assert not torch.equal(other, whole[0][0])


def test_all_ranks_mix_alike_within_their_parts(make_set):
    for how in (MIXUP, CUTMIX):
        whole = own_weights(*([*make_set(augmentation=x).train_batches(7, 1, 2)] for x in (Augmentation(), how)))
        for rank in (0, 1):
            parts = (
                [*make_set(augmentation=x, rank=rank, num_ranks=2).train_batches(7, 1, 2)]
                for x in (Augmentation(), how)
            )
            assert own_weights(*parts) == whole


def test_rand_augment_is_that_of_torchvision_with_a_draw_for_each_image():
    """Crops and mirroring come first, and depend on the image alone as well."""
    plain = in_memory(CLASSES, crop_padding=2, flip=True)
    changed = in_memory(CLASSES, crop_padding=2, flip=True, augmentation=Augmentation(rand_augment=3))
    order, before = next(plain._read(torch.arange(CLASSES), [slice(0, CLASSES)], (5, 6)))[::-1]
    after, _ = next(changed._read(torch.arange(CLASSES), [slice(0, CLASSES)], (5, 6)))
    assert (after != before).flatten(1).any(1).double().mean() > 0.8
    usual = v2.RandAugment(3, interpolation=InterpolationMode.BILINEAR)
    for number in order.tolist():
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed_seed(5, 6, AUGMENTATION_STREAM, number))
            assert torch.equal(after[number], usual(before[number]))


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_keeps_shape_and_type(channels):
    images = in_memory(CLASSES, channels, augmentation=Augmentation(rand_augment=14))
    [(batch, _)] = images.train_batches(23, 0, 0)
    assert (batch.shape, batch.dtype) == ((23, channels, 8, 8), torch.float32)


def test_rand_augment_of_an_image_depends_on_no_batch(make_set):
    images = make_set(augmentation=Augmentation(rand_augment=2))
    whole, labels = next(images.train_batches(23, 3, 4))
    assert not torch.equal(whole, next(make_set().train_batches(23, 3, 4))[0])
    again = [*images.train_batches(4, 3, 4)]
    assert torch.equal(torch.cat([batch for batch, _ in again]), whole[:20])
    images.rank, images.num_ranks = 1, 2
    [(part, numbers)] = images.train_batches(23, 3, 4)
    assert torch.equal(numbers, labels[11:])
    assert torch.equal(part, whole[11:])


def test_only_training_batches_are_changed(make_set):
    assert_same_batches(make_set(augmentation=ALL).batches(5), make_set().batches(5))


def test_mixed_batches_keep_the_memory_format_and_a_subset_the_augmentation(make_set):
    images = make_set(augmentation=ALL, channels_last=True)
    for batch, labels in images.subset(range(10)).train_batches(5, 0, 0):
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert (labels.shape, labels.dtype) == ((5, CLASSES), torch.float32)
