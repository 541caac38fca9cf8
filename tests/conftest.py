"""Fixtures that several rooms share. Workers of `pytest -n` get one thread each, before torch starts its own."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

TINY = """
set: ImageFolder
arch: resnet8_he
width_mult: 0.25
keep_ratio: 0.5
budget_schedule: cubic
score_lr: 0.1
epochs: 3
batch_size: 16
weight_lr: 0.05
finetune_epochs: 2
finetune_lr: 0.002
finetune_batch_size: 12
num_subnets: 2
bn_batches: 2
holdout: 0.2
workers: 0
"""


@pytest.fixture(scope="session", autouse=True)
def git_is_asked_once() -> Iterator[None]:
    """Each of the runs of the tests would start three git processes to learn the same commit."""
    from utils.run import folder

    project, ask = folder.PROJECT_FOLDER, folder._git_state
    ask_once = functools.cache(ask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "_git_state", lambda: ask_once() if project == folder.PROJECT_FOLDER else ask())
        yield


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of 8x8 images that differ in colour: 20 training and 5 test images each."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    colours = [(200, 60, 60), (60, 200, 60), (60, 60, 200), (160, 160, 60)]
    for part, count in (("train", 20), ("test", 5)):
        for label, colour in enumerate(colours):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(random.normal(colour, 40, (8, 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return root


def program_in(folder: Path, images: Path, patch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Changes into an empty folder, and returns a function that runs `main` there with further options."""
    from main import main

    config = folder / "tiny.yaml"
    config.write_text(TINY)
    patch.chdir(folder)

    def run(*options: str, name: str = "run") -> int:
        return main(["--config", str(config), "--data", str(images), "--name", name, *options])

    return run


@pytest.fixture
def program(tmp_path: Path, tiny_images: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `main` on the tiny images, in an empty folder, with the given options; returns its exit code."""
    return program_in(tmp_path, tiny_images, monkeypatch)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors of toys are tiny, and a second thread would only wait for the first."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
