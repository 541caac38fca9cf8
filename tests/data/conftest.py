"""Image files that several tests read, written once."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import DataSplits, build_data
from tests.data.samples import in_memory, streamed


@pytest.fixture(scope="session")
def noise(tmp_path_factory) -> Path:
    """23 images of several shapes and formats in one folder; the name of each is its number."""
    folder, random = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for number in range(23):
        pixels = random.integers(0, 256, (40 + number % 7, 60 - number % 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.{('png', 'jpg')[number % 2]}")
    return folder


@pytest.fixture(params=["in memory", "streamed"])
def make_set(request, noise):
    """Makes a set of 23 augmented images, where image i has label i: make_set(rank=1, num_ranks=2)."""
    return partial(in_memory, crop_padding=2, flip=True) if request.param == "in memory" else partial(streamed, noise)


@pytest.fixture(scope="session")
def mini() -> DataSplits:
    """The bundled sample, a tenth of it held out. Not to be changed."""
    return build_data("FashionMNIST-mini", "nowhere", holdout=0.1)
