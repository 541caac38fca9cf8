"""The ImageNet configurations, whole, on a generated folder of 224x224 JPEG files in 64 classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
NUM_CLASSES = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four training images and a validation image of each class: noise around the colour of the class."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label in range(NUM_CLASSES):
        colour = np.array([label % 4, label // 4 % 4, label // 16]) * 70
        for part, count in (("train", 4), ("val", 1)):
            place = root / part / f"class{label:02}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = colour + random.integers(0, 40, (224, 224, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.jpg", quality=90)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet50", "mobilenet_v1"])
def test_the_pipeline(arch, folder, tmp_path):
    """Search, choice and fine-tuning at a tenth of the widths; classes, sizes and the two budgets come out right."""
    changes = "--set ImageFolder --image-size 224 --width-mult 0.1 --epochs 2 --finetune-epochs 1 --warmup-length 1 "
    changes += "--batch-size 48 --finetune-batch-size 48 --holdout 0.25 --num-subnets 1 --bn-batches 2 --workers 2 "
    changes += "--precision fp32 --device cpu"
    command = [sys.executable, "main.py", "--config", f"configs/imagenet_{arch}.yaml", *changes.split()]
    result = subprocess.run(
        [*command, "--data", str(folder), "--log-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.rglob("summary.json")
    summary = json.loads(path.read_text())
    assert summary["arch"] == arch
    assert summary["units_kept"] <= 0.5
    assert 0 < summary["flops_ratio"] < 0.5
    assert 0 <= summary["test_top1"] <= 100
    assert "64 classes, 224x224" in result.stdout
