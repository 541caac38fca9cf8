"""Takes the network of a run home: an ordinary network with its kept channels only, which needs torch alone.

    python -m tools.export runs/quickstart/vgg16/prune_rate=0.5 --onnx

The folder is written only if the network in it computes what the run's subnet does. See docs/export.md.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from tools.command_line import ToolParser, aligned, exit_code_of, headline
from tools.export_card import card
from tools.export_checks import (
    TOLERANCE,
    Comparison,
    Network,
    compare,
    latencies,
    multiply_adds,
    onnx_network,
    read_program,
    write_onnx,
    write_program,
)
from tools.exported import (
    CARD,
    CODE,
    FACTS,
    FORMAT,
    ONNX,
    PROGRAM,
    STATE_DICT,
    code,
    has_package,
    read_network,
    weights_bytes,
    weights_file,
)
from trainers.build import make_network, restore_model
from trainers.session import load_data
from utils.channels.network import SparseNetwork
from utils.channels.plain import PlainNetwork, plain_network
from utils.channels.subnet import Subnet
from utils.errors import UserError
from utils.run import checkpoint
from utils.run.folder import environment_facts, write_json

CPU = torch.device("cpu")
RANDOM_IMAGES = 64
BATCHES = (1, 128)  # sizes that are timed
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
PREPARATION = (
    "Read an image in `channels` channels (1: grey, 3: RGB). Resize its shorter side to `resized_to` pixels (bilinear, "
    "antialiased) and cut out its centre of `image_size` - 2 `padding` pixels. Put `padding` zeros on every side. A "
    "pixel then becomes (value / 255 - mean) / std."
)


def read_command_line(argv: Sequence[str]) -> Namespace:
    parser = ToolParser(
        "tools.export",
        "Write the subnet of a run as an ordinary network with the kept channels only. It needs torch and no part of "
        "this project.",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, or a best.pt")
    parser.add_argument("--to", metavar="DIR", help="folder to write (default: RUN/export); an older export is replaced")
    parser.add_argument("--onnx", action="store_true", help="also write model.onnx, for any number of images")
    parser.add_argument(
        "--pt2", action="store_true", help="also write model.pt2, the program of torch.export, for any number of images"
    )
    parser.add_argument(
        "--fold-bn", action="store_true", help="put every batch-norm behind a convolution into the convolution"
    )
    parser.add_argument(
        "--data", metavar="PATH", help="folder of the data sets, where it is no longer the one that the run read"
    )
    return parser.parse_args(argv)


# ---- the result of a run ----


def find_result(path: Path) -> tuple[Path, Path]:
    """The run folder and the best.pt that a path means.

    Raises: UserError if there is no such file.
    """
    if path.is_file():
        inside = path.absolute().parent
        return inside.parent if inside.name == "checkpoints" else inside, path
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run folder or a best.pt")
    file = path / "checkpoints" / "best.pt"
    if not file.is_file() and (path / "checkpoints").is_dir():
        raise UserError(
            f"the run in {path} has no checkpoints/best.pt yet: it is written once a subnet has been chosen; finish the "
            f"run with `python main.py --resume {path}`"
        )
    if not file.is_file():
        raise UserError(f"{path} is no run folder: it has no checkpoints/best.pt; give the folder that a run has printed")
    return path, file


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
        config = replace(
            stored,
            model=replace(stored.model, pretrained=None),  # the weights come from the checkpoint
            train=replace(stored.train, precision="fp32"),
        )
        network = make_network(config, _shapes(state["images"]), CPU)
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
        network = make_network(config, _shapes(self.images), CPU)
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
        if data.fingerprint == result.state["fingerprint"]:
            return data, ""
        reason = f"the images under {config.data.data} are not those of the run"
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


# ---- the folder ----


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` at the end; after an error nothing has changed.

    Raises: UserError if there is something in the place that is not an export, or it cannot be written.
    """
    if folder.exists() and not (folder / FACTS).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an exported network; give another folder with --to")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        temporary.chmod(0o777 & ~_umask())
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; give another folder with --to") from error
    try:
        yield temporary
        old = temporary.with_name(temporary.name + ".old")
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; give another folder with --to") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_packages(settings: Namespace) -> None:
    """Raises UserError if a wanted file cannot be written here."""
    missing = [name for name in ONNX_PACKAGES if settings.onnx and not has_package(name)]
    if missing:
        raise UserError(f"--onnx needs {', '.join(missing)}; run `python -m pip install -r requirements-extra.txt`")


def write_network(folder: Path, plain: PlainNetwork, result: Result) -> None:
    """The weights and model.py."""
    images, model, data = result.images, result.config.model, result.config.data
    title = f"{model.arch} for {data.set}, with the channels that it kept only."
    (folder / weights_file()).write_bytes(weights_bytes(plain.tensors))
    text = code(plain.source, title, result.image_shape, len(images["class_names"]))
    (folder / CODE).write_text(text, encoding="utf-8")


def checked(
    folder: Path, result: Result, settings: Namespace, data: DataSplits | None
) -> tuple[dict[str, Network], dict[str, Comparison]]:
    """Writes the optional files; reads all of them again and compares each with the run's subnet.

    Returns: the networks that are timed, and the comparisons, by name.
    Raises: UserError for a network that computes something else.
    """
    exported = read_network(folder)
    comparisons = {weights_file(): compare(result.network, result.subnet, exported, batches_for(result, data))}
    first, _ = next(batches_for(result, data))
    first = first.contiguous()
    some = [(first, None), (first[:1], None)]  # two sizes: the number of images must be free
    networks: dict[str, Network] = {"exported": exported}
    if settings.onnx:
        write_onnx(exported, first[:2], folder / ONNX)
        networks["exported, onnxruntime"] = onnx_network(folder / ONNX)
        comparisons[ONNX] = compare(result.network, result.subnet, networks["exported, onnxruntime"], some)
    if settings.pt2:
        write_program(exported, first[:2], folder / PROGRAM)
        comparisons[PROGRAM] = compare(result.network, result.subnet, read_program(folder / PROGRAM), some)
    for name, comparison in comparisons.items():
        comparison.check(name)
    check_accuracy(result, comparisons[weights_file()], data)
    return networks, comparisons


def check_accuracy(result: Result, comparison: Comparison, data: DataSplits | None) -> None:
    """Raises UserError if the test accuracy is not that of best.pt: to two images, or one point for a bf16 run."""
    if data is None:
        return
    recorded, got = result.state["test"]["top1"], 100 * comparison.hits[1] / comparison.images
    allowed = 1.0 if result.precision == "bf16" else 200 / comparison.images + 1e-9
    if abs(recorded - got) > allowed:
        raise UserError(
            f"the exported network has {got:.2f} % test accuracy, and {result.file} says {recorded:.2f} %; nothing was "
            "exported. Please report this with the run's config.yaml"
        )


# ---- what it costs ----


def costs(folder: Path, result: Result, networks: dict[str, Network]) -> dict[str, dict[str, Any]]:
    """Parameters, bytes of the weights, multiply-adds and latency, by network."""
    plain = result.dense()
    dense, exported = plain.module(), networks["exported"]
    size = len(weights_bytes(plain.tensors))
    parameters = sum(p.numel() for p in dense.parameters())
    macs = multiply_adds(dense, result.image_shape)
    full = {"parameters": parameters, "bytes": size, "multiply_adds": macs}
    rows = {
        "dense": full,
        "masked": full,
        "exported": {
            "parameters": sum(p.numel() for p in exported.parameters()),
            "bytes": (folder / weights_file()).stat().st_size,
            "multiply_adds": multiply_adds(exported, result.image_shape),
        },
    }
    if (folder / ONNX).exists():
        rows["exported, onnxruntime"] = rows["exported"] | {"bytes": (folder / ONNX).stat().st_size}
    timed = {"dense": dense, "masked": result.masked(), **networks}
    rows = {name: {**row, "latency": {}} for name, row in rows.items()}
    for batch in BATCHES:
        images = torch.randn((batch, *result.image_shape), generator=torch.Generator().manual_seed(0))
        for name, latency in latencies(timed, images).items():
            rows[name]["latency"][str(batch)] = latency
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The costs as an aligned table."""

    def milliseconds(latency: dict[str, Any]) -> str:
        return "{:.2f} ({:.2f}-{:.2f})".format(latency["median_ms"], *latency["quartiles_ms"])

    return aligned(
        [
            {
                "network": name,
                "parameters": f"{row['parameters']:,}",
                "file": f"{row['bytes'] / 1e6:.2f} MB",
                "FLOPs": f"{row['multiply_adds'] / 1e6:.2f} M",
                **{f"batch {batch}, ms": milliseconds(latency) for batch, latency in row["latency"].items()},
            }
            for name, row in rows.items()
        ]
    )


# ---- the program ----


def facts_of(
    result: Result,
    plain: PlainNetwork,
    rows: dict[str, dict[str, Any]],
    comparisons: dict[str, Comparison],
    data: DataSplits | None,
    folded: bool,
) -> dict[str, Any]:
    """The content of model.json."""
    config, state = result.config, result.state
    environment = environment_facts(CPU)
    checks = {
        name: {"images": c.images, "largest_difference": c.difference, "allowed_difference": c.allowed}
        for name, c in comparisons.items()
    }
    return {
        "format": FORMAT,
        "arch": config.model.arch,
        "set": config.data.set,
        "images": result.images,
        "preparation": PREPARATION,
        "widths": {name: len(channels) for name, channels in plain.kept.items()},
        "kept_channels": plain.kept,
        "batch_norm_folded": folded,
        "result": {
            "epoch": state["epoch"],
            "phase": state["phase"],
            "test": state["test"],
            "heldout": state["heldout"],
            "test_images": None if data is None else len(data.test),
            "heldout_images": None if data is None else len(data.holdout),
        },
        "recipe": {
            "method": config.method,
            "keep_ratio": config.sparsity.keep_ratio,
            "budget": config.sparsity.budget,
            "epochs": config.total_epochs,
            "seed": config.run.seed,
            "precision": result.precision,
            "fingerprint": state["fingerprint"],
        },
        "checked_on": "test images" if data is not None else "random images",
        "checks": checks,
        "costs": rows,
        "versions": {key: environment[key] for key in ("python", "torch", "cpu", "cpu_capability", "num_threads")},
        "commit": environment["git_commit"],
    }


def run(argv: Sequence[str]) -> None:
    settings = read_command_line(argv)
    check_packages(settings)
    result = Result.read(Path(settings.run))
    folder = Path(settings.to) if settings.to else result.folder / "export"
    with replacing(folder) as temporary:
        data, reason = find_images(result, settings.data)
        print(headline(CPU), flush=True)
        plain = plain_network(result.network, result.subnet, settings.fold_bn)
        write_network(temporary, plain, result)
        networks, comparisons = checked(temporary, result, settings, data)
        print(check_lines(result, comparisons, reason), flush=True)
        rows = costs(temporary, result, networks)
        facts = facts_of(result, plain, rows, comparisons, data, settings.fold_bn)
        write_json(temporary / FACTS, facts)
        (temporary / CARD).write_text(card(facts, weights_file()), encoding="utf-8")
    print(f"\n{table(rows)}\n\nFLOPs are multiply-adds of one image; milliseconds are medians (quartiles) on the CPU.")
    if weights_file() == STATE_DICT:
        print(f"the package safetensors is not installed, so the weights are in {STATE_DICT}, a state dict of torch")
    print(f"exported to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def check_lines(result: Result, comparisons: dict[str, Comparison], reason: str) -> str:
    """What was compared, and how closely it agrees."""
    kind = f"random images, because {reason}" if reason else "test images"
    lines = [
        f"{name}: logits of the run's subnet on {c.images:,} {kind}, to {c.difference:.1e} "
        f"(allowed: {c.allowed:.1e}, that is {TOLERANCE:g} of the largest logit)"
        for name, c in comparisons.items()
    ]
    whole = comparisons[weights_file()]
    if not reason:
        before, after = (100 * hits / whole.images for hits in whole.hits)
        lines.append(
            f"test accuracy: {after:.2f} %, the subnet in {result.file} has {before:.2f} % "
            f"({result.state['test']['top1']:.2f} % when it was stored)"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 a user's mistake or an export that failed its checks."""
    return exit_code_of(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
