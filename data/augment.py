"""Augmentation by torchvision's transforms, beside the crops and mirroring of every image set; off by default.

RandAugment changes each image by itself. MixUp and CutMix mix the images of a batch in pairs, and their labels alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from utils.seeds import mixed_seed


@dataclass(frozen=True)
class Augmentation:
    """What training images undergo. Each part is drawn by torchvision, so draw inside `draws_from`."""

    rand_augment: int = 0
    """Operations that RandAugment applies to each image, of torchvision's usual magnitude; 0: none."""
    mixup: float = 0.0
    """Both parameters of the beta distribution of MixUp's weights; 0: no MixUp."""
    cutmix: float = 0.0
    """The same for CutMix. With both, each batch is mixed by one of them, which is chosen at random."""

    num_classes: int = 0
    """Of the labels; MixUp and CutMix need to know."""

    @property
    def mixes(self) -> bool:
        """Whether labels become probabilities."""
        return self.mixup > 0 or self.cutmix > 0

    @cached_property
    def image_steps(self) -> list[v2.Transform]:
        """What changes a single image, (C, size, size) uint8 or of PIL; empty for nothing."""
        if self.rand_augment == 0:
            return []
        return [v2.RandAugment(self.rand_augment, interpolation=InterpolationMode.BILINEAR)]  # torchvision's recipes

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The images (B, C, size, size), each mixed with the one before it, and their labels (B, classes).

        A row of labels holds the weight of each class, and they add up to 1.
        """
        ways = ((v2.MixUp, self.mixup), (v2.CutMix, self.cutmix))
        mixers = [way(alpha=alpha, num_classes=self.num_classes) for way, alpha in ways if alpha > 0]
        return v2.RandomChoice(mixers)(images, labels)


@contextmanager
def draws_from(seed: int, *purpose: int) -> Iterator[None]:
    """Seeds what torchvision draws inside, which is from the global generator. Afterwards that is as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mixed_seed(seed, *purpose))
        yield
