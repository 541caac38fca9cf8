"""Takes the network of a run home: an ordinary network with its kept channels only, which needs torch alone.

    python -m tools.export runs/quickstart/vgg16/prune_rate=0.5 --onnx

The folder is written only if the network in it computes what the run's subnet does. See docs/export.md.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

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
    replacing,
    weights_bytes,
    weights_file,
)
from tools.run_result import CPU, Result, batches_for, find_images
from utils.channels.plain import PlainNetwork, plain_network
from utils.errors import UserError
from utils.run.folder import environment_facts, write_json

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
    parser.add_argument("--to", metavar="DIR", help="folder to write, default RUN/export; an older export is replaced")
    parser.add_argument("--onnx", action="store_true", help="also write model.onnx, for any number of images")
    parser.add_argument(
        "--pt2", action="store_true", help="also write model.pt2, the program of torch.export, for any number of images"
    )
    parser.add_argument(
        "--fold-bn",
        action="store_true",
        help="put every batch-norm that alone reads a convolution into the convolution",
    )
    parser.add_argument(
        "--data", metavar="PATH", help="folder of the data sets, where it is no longer the one that the run read"
    )
    parser.add_arch()
    return parser.parse_args(argv)


# ---- files, and what is wrong with them ----


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
    """Raises UserError if the test accuracy is not that of the subnet, and that not the one that best.pt has stored.

    Two images may fall on the other side of a tie, and one point in a run that computed in bf16.
    """
    if data is None:
        return
    subnet, exported = (100 * hits / comparison.images for hits in comparison.hits)
    stored, ties = result.state["test"]["top1"], 200 / comparison.images + 1e-9
    if abs(exported - subnet) > ties:
        raise UserError(
            f"the exported network has {exported:.2f} % test accuracy, and the run's subnet {subnet:.2f} %; nothing "
            "was exported. Please report this with the run's config.yaml"
        )
    if abs(subnet - stored) > (1.0 if result.precision == "bf16" else ties):
        raise UserError(
            f"the run's subnet has {subnet:.2f} % test accuracy now and had {stored:.2f} % when {result.file} was "
            "written, so the images have changed; point --data at the same files, or at none to check on random images"
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
        "width_mult": config.model.width_mult,
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
            "budget_falls": config.budget_falls,
            "widths_of": config.widths_of,
            "epochs": config.total_epochs,
            "seed": config.run.seed,
            "precision": result.precision,
            "subnet_chosen_by": "training" if config.finetune.sample_from_training_set else "held-out",
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
        f"{name}: its logits differ from the run's by at most {c.difference:.1e} on {c.images:,} {kind} "
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
