"""VR-PGE and its competitors (`--method`): one small class each, all run by `trainers/recipe.py`.

They share images, augmentation, schedules, number of epochs, held-out images and the rule by which FLOPs are counted.
The channel graph knows all that belongs to a unit, so nothing here needs a pruning package such as torch-pruning.
"""

from __future__ import annotations

from args import Config
from trainers.methods.base import Method
from trainers.methods.gumbel import Gumbel
from trainers.methods.policy_gradient import PolicyGradient
from trainers.methods.pruning import FilterNorm, Slimming, SoftPruning
from trainers.methods.scratch import Dense, RandomMask, Thin

METHODS: dict[str, Method] = {
    "vrpge": PolicyGradient(),
    "dense": Dense(),
    "thin": Thin(),
    "random": RandomMask(),
    "coin": PolicyGradient(tosses=True),
    "l1": FilterNorm(power=1),
    "slimming": Slimming(),
    "sfp": SoftPruning(),
    "gumbel": Gumbel(),
}


def method_of(config: Config) -> Method:
    return METHODS[config.method]
