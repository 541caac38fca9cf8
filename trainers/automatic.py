"""Options that are `auto`: their values follow from the number of training images, once that is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from args import OPTIONS, Config, config_from_dict, config_to_dict
from data import HOLDOUT_FROM, DataSplits
from utils.errors import UserError
from utils.options import AUTO, why_unread, worded
from utils.run.progress import announce

SMALLEST_BATCH, LARGEST_BATCH = 16, 128
SEARCH_STEPS = 1500
FEWEST_EPOCHS, MOST_EPOCHS = 10, 60
SEARCH_SHARE, SHORT_TRAINING = 0.4, 10_000  # of the steps; steps
SCORE_LR_FACTOR, LARGEST_SCORE_LR = 3.5, 0.5


def batch_size_for(num_images: int) -> int:
    """The power of two nearest to sqrt(num_images), from 16 to 128, and never more than all images.

    An epoch then has about as many steps as a step has images, so a small set still gives many steps. Below 16 images
    batch-norm gets too noisy, and 128 is the batch size of our recipes. Source: ours.
    """
    nearest = 2 ** round(math.log2(num_images) / 2)
    return min(max(nearest, SMALLEST_BATCH), LARGEST_BATCH, num_images)


def epochs_for(steps_per_epoch: int) -> int:
    """Epochs of the search: as many as come nearest to 1,500 steps, from 10 to 60.

    Our recipes search for 936 and 1,248 steps. Fewer steps leave the scores no time to become 0 or 1, and more than 60
    epochs show a network every image too often to be worth their time. Source: ours.
    """
    return min(max(round(SEARCH_STEPS / steps_per_epoch), FEWEST_EPOCHS), MOST_EPOCHS)


def finetune_epochs_for(epochs: int) -> int:
    """Half as many epochs as the search has, rounded up: two thirds of all epochs search, as in our recipes."""
    return math.ceil(epochs / 2)


def search_epochs_for(epochs: int, steps_per_epoch: int) -> int:
    """Epochs of a search that is a part of `epochs`: two fifths of a training of up to 10,000 steps, less of a longer.

    Scores need steps, not a share of the training. Beyond 10,000 steps the search grows with their square root only: it
    takes 13 % of a training of 100,000. The share is that of the table "long" (9,700 steps), the only one that was
    tried there; the square root is a guess that no run of ours has tested. Source: ours.

    Returns: at least 1; below `epochs` unless that is 1.
    """
    steps = epochs * steps_per_epoch
    share = SEARCH_SHARE * math.sqrt(min(1, SHORT_TRAINING / steps))
    return max(1, min(round(share * epochs), epochs - 1))


def score_lr_for(updates: int) -> float:
    """3.5 / sqrt(updates) to three digits, but at most 0.5; the formula is that of our recipes (docs/training.md).

    The limit keeps a score of a very short search from crossing from 0 to 1 in one step. Source: ours.

    Args:
        updates: of the scores in the whole search, one in each step unless `score_every` says otherwise.
    """
    return min(float(f"{SCORE_LR_FACTOR / math.sqrt(updates):.3g}"), LARGEST_SCORE_LR)


def undecided(options: Mapping[str, Any]) -> list[str]:
    """The options of a flat dictionary that wait for a rule; `--device auto` is another word for another matter."""
    return [key for key, entry in OPTIONS.items() if entry.auto and options[key] == AUTO]


def values_by_rule(options: Mapping[str, Any], num_images: int, holdout: float) -> dict[str, Any]:
    """A value for every option that is `auto` and may be read, by key. It follows from the others as they are given.

    Args:
        options: the flat dictionary of a configuration.
        num_images: training images, without held-out ones; at least as many as a given batch size.
        holdout: the fraction that was held out.
    """
    values = dict(options)

    def settle(key: str, value: Any) -> None:
        if values[key] == AUTO:
            values[key] = value

    settle("holdout", holdout)
    settle("sample_from_training_set", values["holdout"] == 0)
    settle("batch_size", batch_size_for(num_images))
    settle("finetune_batch_size", values["batch_size"])
    steps_per_epoch = num_images // values["batch_size"]
    searched = epochs_for(steps_per_epoch)
    if values["search_until"] == "decided":
        settle("epochs", round(searched / SEARCH_SHARE))
        settle("search_epochs", search_epochs_for(values["epochs"], steps_per_epoch))
        searched = values["search_epochs"]
    else:
        settle("epochs", searched)
        searched = values["epochs"]
    settle("finetune_epochs", finetune_epochs_for(searched))
    settle("score_lr", score_lr_for(math.ceil(searched * steps_per_epoch / values["score_every"])))
    return {key: values[key] for key in undecided(options) if values[key] != AUTO}


def settled(config: Config, data: DataSplits) -> Config:
    """The configuration with a value in place of every `auto`. One line tells the values that will be read.

    Raises: UserError if a chosen value contradicts a given one.
    """
    options = config_to_dict(config)
    if not any(not why_unread(OPTIONS, options, key) for key in undecided(options)):
        return config
    chosen = values_by_rule(options, len(data.train), data.holdout_fraction)
    values = options | chosen
    result = config_from_dict(values, "this run")
    read = [key for key in chosen if not why_unread(OPTIONS, values, key)]
    if read:
        told = ", ".join(f"{key} {worded(values[key])}" for key in read)
        announce(f"set from {len(data.train):,} training images: {told}; pass any of these options to change it")
    if "holdout" in read and values["holdout"] == 0:
        announce(
            f"with fewer than {HOLDOUT_FROM:,} images none are held out: training images choose the subnet, "
            "and the last epoch is the result"
        )
    return result


def check_settled(config: Config, program: str) -> None:
    """Refuses `auto` where a program reads no images that could settle it.

    Raises: UserError that names the options.
    """
    options = config_to_dict(config)
    read = [key for key in undecided(options) if not why_unread(OPTIONS, options, key)]
    if read:
        raise UserError(
            f"{', '.join(read)} {'is' if len(read) == 1 else 'are'} auto, which depends on the number of "
            f"training images, and {program} reads none; pass numbers"
        )
