"""A tiny run that nothing happens to, against which the others are held."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import trainers.session
from tests.faults.machine import folder_of, train
from tests.tiny import make_images
from utils.run.board import Board


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """A fork may wait for ever for threads that it has not got."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package", autouse=True)
def no_pictures() -> Iterator[None]:
    """Pictures for TensorBoard, and asking git for the commit, take a third of the time of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("score_map", "score_histograms", "subnet"):
            patch.setattr(Board, name, lambda *_: None)
        patch.setattr(trainers.session, "environment_facts", lambda _device: {})
        yield


@pytest.fixture(scope="package")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="package")
def untouched(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    root = tmp_path_factory.mktemp("untouched")
    assert train(root, images) == 0
    return folder_of(root)
