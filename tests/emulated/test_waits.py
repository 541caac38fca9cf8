"""How often the host waits for the device in a step of every shipped recipe, and in steps that a real card has seen."""

from __future__ import annotations

import pytest

from tests.emulated.device import CUDA
from tests.emulated.trial import RECIPES, steps_of, take_steps
from tests.gpu import test_steps as on_a_card

# Where a step waits: for the masks that the step before has drawn, or, with a budget of cost, for its scores.
MASKS = {"utils/algorithm/transfer.py read": 1}

WAITS = {
    "best_resnet20": MASKS,
    "best_resnet8": MASKS,
    "best_vgg16_quarter": MASKS,
    "cifar100_resnet20": MASKS,
    "cifar100_resnet32": MASKS,
    "cifar100_vgg16": MASKS,
    "cifar100_wrn28_10": MASKS,
    "cifar10_jpeg_vgg16_quarter": MASKS,
    "cifar10_resnet20": MASKS,
    "cifar10_resnet32": MASKS,
    "cifar10_vgg16": MASKS,
    "cifar10_wrn28_10": MASKS,
    "config": MASKS,
    "early_vgg16_quarter": MASKS,
    "imagenet_mobilenet_v1": MASKS,
    "imagenet_resnet50": MASKS,
    "own_images": MASKS,
    "quickstart": MASKS,
    "released": MASKS,
    "shrink_pretrained": MASKS,
}


def test_the_table_has_every_recipe():
    assert list(WAITS) == RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_waits_where_it_is_known_to_wait(recipe):
    """A wait that is new has to go; the entry of one that has been removed has to go from the table."""
    assert steps_of(CUDA, recipe).waits == WAITS[recipe]


def test_a_step_copies_its_masks_to_the_host_and_their_channel_lists_to_the_device():
    """One copy for the lists of both masks."""
    copies = [(c.place, c.to_device, c.pinned, c.blocking) for c in steps_of(CUDA, "cifar10_resnet20").copies]
    lists = ("utils/algorithm/transfer.py sent_to", True, True, False)
    assert copies == [lists, ("utils/algorithm/transfer.py of", False, True, False)]


@pytest.mark.slow
@pytest.mark.parametrize("options", [o for o in on_a_card.FLOWS if o != {"method": "thin"}], ids=str)
def test_nothing_else_waits_where_a_card_does_not_wait(options):
    """Thin networks draw their weights anew, on the CPU, which the emulated device cannot follow."""
    assert set(take_steps(CUDA, options).waits) <= set(MASKS)


@pytest.mark.slow
@pytest.mark.parametrize("options", on_a_card.WAITS, ids=str)
def test_something_else_waits_where_a_card_waits(options):
    assert set(take_steps(CUDA, options).waits) - set(MASKS)
