"""The subnet that a run ended with, as best.pt holds it, and the images that it was tested on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from args import Config, config_from_dict
from data import DataSplits
from tools.export_checks import Network
from trainers.build import make_network, restore_model
from trainers.session import load_data
from utils.channels.network import SparseNetwork
from utils.channels.plain import PlainNetwork, plain_network
from utils.channels.subnet import Subnet
from utils.errors import UserError
from utils.run import checkpoint
from utils.run.folder import BEST, LAST, no_result_yet, resolve_run

CPU = torch.device("cpu")
RANDOM_IMAGES = 64


def find_result(path: Path) -> tuple[Path, Path]:
    """The run folder and the best.pt that a path means, by the rule of `resolve_run`.

    Raises: UserError if there is no such file.
    """
    if path.is_file() and path.absolute().parent.name != "checkpoints":  # a copy of a best.pt
        return path.absolute().parent, path
    folder, file = resolve_run(path, (BEST, LAST))
    if path.is_dir() and file.name == LAST:
        raise UserError(no_result_yet(folder))
    return folder, file


@dataclass(frozen=True)
class Result:
    """The subnet that a run ended with.

    Attributes:
        folder: of the run.
        state: the content of best.pt.
        config: of the run, for weights in float32 that come from nowhere else.
        network: on the CPU, with the weights of best.pt.
        precision: that the run computed in.
    """

    folder: Path
    file: Path
    state: dict[str, Any]
    config: Config
    network: SparseNetwork
    subnet: Subnet
    precision: str

    @classmethod
    def read(cls, path: Path) -> Result:
        folder, file = find_result(path)
        state = checkpoint.load(file)
        if "weight_optimizer" in state or "config" not in state or state.get("subnet") is None:
            raise UserError(f"{file} is not the result of a run; give its checkpoints/best.pt, or the run folder")
        if "images" not in state:
            raise UserError(
                f"{file} does not say which images its network reads, because an older version of this project wrote "
                "it; make the run again with this version"
            )
        stored = config_from_dict(state["config"], str(file))
        if stored.method == "released":
            raise UserError(
                "a network of --method released cannot be exported: the shifts of its dropped channels take part in "
                "its results, so that no channel can leave it; train with --method vrpge for a small network"
            )
        config = replace(stored, train=replace(stored.train, precision="fp32"))
        network = make_network(config, _shapes(state["images"]), CPU, state)
        restore_model(network, state)
        subnet = Subnet.from_state_dict(state["subnet"], CPU)
        return cls(folder, file, state, config, network, subnet, stored.train.precision)

    @property
    def images(self) -> dict[str, Any]:
        """See `DataSplits.facts`."""
        return self.state["images"]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images["channels"], self.images["image_size"], self.images["image_size"]

    @cached_property
    def full(self) -> SparseNetwork:
        """The full network with its first weights, in masked execution: a run may have lost the full weights."""
        config = replace(self.config, sparsity=replace(self.config.sparsity, execution="masked"))
        network = make_network(config, _shapes(self.images), CPU, self.state)
        network.model.to(memory_format=torch.contiguous_format).eval()
        return network

    def dense(self) -> PlainNetwork:
        """The same network with all its channels, as an ordinary one."""
        norms = self.full.batch_norms()
        statistics = {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}
        return plain_network(self.full, Subnet(np.ones(self.full.num_units, dtype=bool), statistics))

    def masked(self) -> Network:
        """The full network, which computes everything and multiplies by masks."""
        return partial(self.full, plan=self.full.plan(self.subnet.mask_U), update_statistics=False)


def _shapes(images: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(
        num_classes=len(images["class_names"]), channels=images["channels"], image_size=images["image_size"]
    )


# ---- images to check on ----


def find_images(result: Result, path: str | None) -> tuple[DataSplits | None, str]:
    """The images of the run, or none of them and a sentence on why.

    Raises: UserError if the user has named a folder that does not hold them.
    """
    config = result.config
    if path is not None:
        config = replace(config, data=replace(config.data, data=path))
    try:
        data = load_data(config, CPU)
        difference = data.difference(result.state)
        if not difference:
            return data, ""
        reason = f"the images under {config.data.data} are not those of the run: they have {difference}"
    except UserError as error:
        reason = f"the images of the run cannot be read ({error})"
    if path is not None:
        raise UserError(f"{reason}; leave --data out to check on random images")
    return None, f"{reason}; --data PATH names their folder"


def batches_for(result: Result, data: DataSplits | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """All test images with their labels, or random images without."""
    if data is not None:
        return data.test.batches(result.config.train.batch_size)
    images = torch.randn((RANDOM_IMAGES, *result.image_shape), generator=torch.Generator().manual_seed(0))
    return iter([(images, None)])
