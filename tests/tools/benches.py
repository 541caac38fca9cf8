"""A small bench on the CPU."""

from types import SimpleNamespace

import torch

from tools.bench_networks import Bench
from tools.bench_options import read_command_line

CPU = torch.device("cpu")
SHAPES = SimpleNamespace(image_size=32, num_classes=10, channels=3, fingerprint="none", contents="none", facts=dict)
SMALL = ("--arch", "resnet8_he", "--width-mult", "0.125", "--batch-size", "4", "--device", "cpu")


def bench_of(*words: str, **options: object) -> Bench:
    """Of `SMALL` with other options; an option that both give is that of the words."""
    pairs = [pair for pair in zip(SMALL[::2], SMALL[1::2], strict=True) if pair[0] not in words]
    settings, config = read_command_line([*(word for pair in pairs for word in pair), *words])
    return Bench(config, SHAPES, settings.scores, CPU, settings.multiple, **options)
