"""VR-PGE and its competitors (`--method`): one file each, registered by name in `args.METHODS`.

All are run by `trainers/recipe.py`, so they share images, augmentation, schedules, number of epochs, held-out images
and the rule by which FLOPs are counted. The channel graph knows everything that belongs to a unit, so nothing here
needs a pruning package.
"""

from __future__ import annotations

import pkgutil

from args import METHODS, Config
from trainers.methods.base import Method


def make_method(config: Config) -> Method:
    """The method that the configuration names."""
    return pkgutil.resolve_name(METHODS[config.method].path)(config)
