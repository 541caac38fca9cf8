"""Whether an exported network computes what the run's subnet does, and how long networks take."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from utils.channels.network import SparseNetwork
from utils.channels.subnet import Subnet, installed
from utils.errors import UserError

TOLERANCE = 1e-4  # of the largest logit, at least of 1: float32 sums in another order
WARM_UP, LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 2, 3, 30, 10.0

Network = Callable[[Tensor], Tensor]


@dataclass
class Comparison:
    """Two networks on the same images.

    Attributes:
        images: how many.
        largest: the largest absolute logit of the first network.
        difference: the largest absolute difference of two logits.
        hits: correct answers of each network; 0 where there are no labels.
    """

    images: int = 0
    largest: float = 0.0
    difference: float = 0.0
    hits: tuple[int, int] = (0, 0)

    @property
    def allowed(self) -> float:
        return TOLERANCE * max(1.0, self.largest)

    def add(self, expected: Tensor, got: Tensor, labels: Tensor | None = None) -> None:
        self.images += len(expected)
        self.largest = max(self.largest, float(expected.abs().max()))
        difference = float((expected - got).abs().max())
        self.difference = max(self.difference, difference if difference == difference else float("inf"))  # NaN: no
        if labels is not None:
            pair = (int((logits.argmax(1) == labels).sum()) for logits in (expected, got))
            self.hits = tuple(old + new for old, new in zip(self.hits, pair, strict=True))

    def check(self, what: str) -> None:
        """Raises UserError if the logits are not the same."""
        if not self.difference <= self.allowed:
            raise UserError(
                f"{what} does not compute what the run's subnet does: logits differ by up to {self.difference:.2g}, "
                f"and {self.allowed:.2g} is allowed; nothing was exported. Please report this with the run's "
                "config.yaml"
            )


def compare(
    network: SparseNetwork, subnet: Subnet, exported: Network, batches: Iterable[tuple[Tensor, Tensor | None]]
) -> Comparison:
    """The subnet, in compact execution, and the exported network on batches of images and labels."""
    comparison, plan = Comparison(), network.plan(subnet.mask_U)
    network.model.eval()
    with torch.inference_mode(), installed(network, subnet):
        for images, labels in batches:
            comparison.add(network(images, plan, update_statistics=False), exported(images), labels)
    return comparison


def onnx_network(path: Path) -> Network:
    """An ONNX file in onnxruntime, on as many threads of the CPU as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_onnx(network: nn.Module, images: Tensor, path: Path) -> None:
    """ONNX by the exporter that traces with torch.export; the number of images stays free."""
    batch = {"images": {0: torch.export.Dim("batch")}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts
        torch.onnx.export(
            network,
            (images,),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            dynamic_shapes=batch,
            external_data=False,
            verbose=False,
        )


def write_program(network: nn.Module, images: Tensor, path: Path) -> None:
    """torch.export; the number of images stays free."""
    program = torch.export.export(network, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    torch.export.save(program, path)


def read_program(path: Path) -> Network:
    return torch.export.load(path).module()


# ---- what networks cost ----


def multiply_adds(network: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of the convolutions and linear layers for one image, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, *image_shape))
    return counter.get_total_flops() // 2


def latencies(networks: Mapping[str, Network], images: Tensor, seconds: float = SECONDS) -> dict[str, dict[str, Any]]:
    """Milliseconds of a pass, networks in turn so that all see the same machine: median, quartiles, rounds.

    Args:
        images: one batch.
        seconds: stop after so many, but not before every network has run `LEAST_ROUNDS` times.
    """
    times: dict[str, list[float]] = {name: [] for name in networks}
    start = time.perf_counter()
    with torch.inference_mode():
        for number in range(WARM_UP + MOST_ROUNDS):
            for name, network in networks.items():
                before = time.perf_counter()
                network(images)
                if number >= WARM_UP:
                    times[name].append(1000 * (time.perf_counter() - before))
            if number + 1 >= WARM_UP + LEAST_ROUNDS and time.perf_counter() - start > seconds:
                break
    return {
        name: {
            "median_ms": float(np.median(values)),
            "quartiles_ms": [float(np.percentile(values, 25)), float(np.percentile(values, 75))],
            "rounds": len(values),
        }
        for name, values in times.items()
    }
