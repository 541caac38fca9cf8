"""Time and memory of a training step: `python -m tools.bench --config FILE.yaml`.

It takes a training configuration just as `main.py` does and builds three networks as training builds them:

    dense    the whole network, one ordinary training step (method dense)
    thin     a narrower network with the FLOPs of a typical draw (method thin with a budget of FLOPs), as many forward
             passes as compact runs, and one backward pass
    compact  the step of the configured method on the masked network, with new masks in every step

They run one random batch in one process, one step each in turn, so that a change in the machine meets all of them.
Before each step of compact the scores are put back where they were; structure step and projection run as in training.

`--beside` adds others: dense compiled by `torch.compile`, dense and thin in CUDA graphs, and compact with the other
values of `--shapes` and `--cuda-graphs`. `--count-ops` counts operations and times nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from args import Config, config_to_dict
from tools.bench_measures import WARM_UP_STEPS, StepTime, interleaved_times, measure_peak, peak_of_this_process
from tools.bench_networks import COMPILED, NETWORKS, Bench, Network, changed
from tools.bench_operations import BATCH_SIZE, count_networks, note, table
from tools.bench_options import read_command_line
from tools.command_line import aligned, exit_code_of, headline
from trainers.devices import find_device
from trainers.replay import WARM_UP
from utils.channels.plan import preferred_multiple
from utils.errors import UserError
from utils.run.memory import keep_freed_memory


def further_networks(settings: argparse.Namespace, bench: Bench) -> list[str]:
    """What `--beside` adds to the three networks.

    Raises: UserError for what this device cannot run, and for a warm-up that ends before steps are recorded.
    """
    on_gpu = bench.device.type == "cuda"
    asked = settings.beside or (["compiled", "graphs"] if on_gpu else ["none"])
    if "graphs" in asked and not on_gpu:
        raise UserError(f"--beside graphs needs a CUDA device, and this run is on {bench.device.type}; leave it out")
    further = bench.further([kind for kind in asked if kind != "none"])
    replays = bench.config.replays_steps or any(name.endswith("CUDA graphs") for name in further)
    if replays and settings.warm_up <= WARM_UP:
        raise UserError(
            f"--warm-up {settings.warm_up}: steps are recorded after {WARM_UP} others, which must not be timed; pass "
            f"--warm-up {WARM_UP + 1} or more"
        )
    return further


# ---- figures ----


def measure(bench: Bench, repeats: int, warm_up: int = WARM_UP_STEPS, further: Sequence[str] = ()) -> dict[str, Any]:
    """All figures but memory, by network and in comparison.

    Args:
        further: networks beside the three. Those that cannot run are left out, with the reason.
    """
    networks = {name: bench.build(name) for name in NETWORKS}
    if further:
        networks["compact"].step()  # a thin network that is recorded has to know the number of passes
    left_out = {}
    for name in further:
        try:
            network = bench.build(name)
            network.step()
        except RuntimeError as error:
            left_out[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        else:
            networks[name] = network
    times = interleaved_times({name: one.step for name, one in networks.items()}, repeats, bench.device, warm_up)
    rows = {name: figures_of(bench, one, times[name], repeats) for name, one in networks.items()}
    return {"networks": rows, "left_out": left_out, **ratios_of(rows)}


def figures_of(bench: Bench, network: Network, times: Sequence[StepTime], repeats: int) -> dict[str, Any]:
    """What the times and the passes of one network come to, by training step."""
    milliseconds = 1000 * np.array([time.total for time in times]) / bench.period
    low, median, high = np.percentile(milliseconds, (25, 50, 75)).tolist()
    flops, padded_flops = (np.mean(network.costs, axis=0) / network.run.network.dense_macs).tolist()
    on_device = [1000 * time.device / bench.period for time in times if time.device is not None]
    unfit = network.unfit[-repeats * bench.period :]
    return {
        **{"ms": median, "ms_quartiles": [low, high], "mean_ms": milliseconds.mean().item()},
        "host_ms": float(np.median([1000 * time.host / bench.period for time in times])),
        "device_ms": float(np.median(on_device)) if on_device else None,
        "images_per_second": 1000 * len(bench.labels) / median,
        **{"flops_ratio": flops, "padded_flops_ratio": padded_flops},
        "new_shapes": network.new_shapes(repeats),
        "unfit_steps": float(np.mean([float(share) for share in unfit])) if unfit else None,
        "execution": network.execution if network.run.search is not None else None,
    }


def ratios_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How the medians of the networks compare."""
    ms = {name: row["ms"] for name, row in rows.items()}
    ratios = {f"{one}/{other}": ms[one] / ms[other] for one, other in (("dense", "compact"), ("compact", "thin"))}
    ratios["dense/thin"] = ms["dense"] / ms["thin"]
    for name in ms:
        if name not in NETWORKS:
            one, other = ("compact", name) if name.startswith("thin") else (name, "compact")
            ratios[f"{one}/{other}"] = ms[one] / ms[other]
    return {**ratios, "ideal dense/compact, 3/(4r)": 3 / (4 * rows["compact"]["flops_ratio"])}


# ---- the program ----

NOTES = """\
Medians (quartiles) of {repeats} interleaved steps after {warm_up} that do not count, on random images. "host" is the
time until the host may start the next step: on a GPU, which works on while the host goes ahead, the larger of both
bounds the training. "device" is the time between the first and the last of the work of a GPU, in which it may have
waited for the host. FLOPs are those of one forward pass as a fraction of the dense network's; those of compact are r.
MB is the peak of tensors on a GPU, or of a process for each network on a CPU, which includes torch itself."""


def report(figures: Mapping[str, Any]) -> str:
    """The networks as a Markdown table, and how they compare."""
    networks = figures["networks"]
    rows = [
        {
            "network": row["execution"] or name,
            "ms": "{:.1f} ({:.1f}-{:.1f})".format(row["ms"], *row["ms_quartiles"]),
            "mean": f"{row['mean_ms']:.1f}",
            "host": f"{row['host_ms']:.1f}",
            "device": "-" if row["device_ms"] is None else f"{row['device_ms']:.1f}",
            "images/s": f"{row['images_per_second']:.0f}",
            "FLOPs": f"{row['flops_ratio']:.4f}",
            "padded": f"{row['padded_flops_ratio']:.4f}",
            "MB": "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f} ({row['baseline_mb']:.0f} before)",
        }
        for name, row in networks.items()
    ]
    ratios = [f"{name}: {value:.2f}" for name, value in figures.items() if isinstance(value, float)]
    return "\n".join([aligned(rows), "", *ratios, *remarks(figures)])


def remarks(figures: Mapping[str, Any]) -> list[str]:
    """What a reader has to know about single networks, one sentence each."""
    said = []
    for name, row in figures["networks"].items():
        label = row["execution"] or name
        if row["new_shapes"] is not None:
            said.append(
                f"{label}: {100 * row['new_shapes']:.1f} % of the layers of the timed steps had a shape that had not "
                "come before, which libraries prepare anew; a longer --warm-up makes it less"
            )
        if row["unfit_steps"] is not None:
            said.append(f"{label}: the masks of {100 * row['unfit_steps']:.1f} % of the timed steps did not fit")
    return said + [
        f"{name} is left out, because it cannot run here: {why}" for name, why in figures["left_out"].items()
    ]


def run(argv: Sequence[str]) -> None:
    settings, config = read_command_line(argv)
    keep_freed_memory()  # as main.py does
    device = find_device(config)
    shapes = SimpleNamespace(image_size=settings.input_size, num_classes=settings.num_classes, channels=3)
    if settings.count_ops is not None:
        print_counts(settings, config, shapes, device)
        return
    bench = Bench(config, shapes, settings.scores, device, settings.multiple)
    further = further_networks(settings, bench)
    if settings.peak:
        print(json.dumps(peak_of_this_process(bench, settings.peak)))
        return
    print(headline(device), flush=True)
    # On a GPU before anything else is built: the memory of this process is read there.
    peaks = {} if settings.no_memory or device.type != "cuda" else peaks_of(bench, further, argv)
    figures = measure(bench, settings.repeats, settings.warm_up, further)
    if not settings.no_memory and device.type != "cuda":
        peaks = peaks_of(bench, [name for name in further if name not in COMPILED], argv)  # not of a compiler
    for name, row in figures["networks"].items():
        row |= peaks.get(name, {"peak_mb": None, "baseline_mb": None})
    print(f"{config.model.arch}, method {config.method}, scores {settings.scores}, {config.train.precision}")
    notes = NOTES.format(repeats=settings.repeats, warm_up=settings.warm_up)
    print(f"{notes}\n\n{report(figures)}\n")
    asked = {key: getattr(settings, key) for key in ("scores", "repeats", "warm_up", "input_size", "num_classes")}
    asked["multiple"] = settings.multiple or preferred_multiple(device)
    print(json.dumps({**figures, **asked, "device": str(device), "config": config_to_dict(config)}))


def peaks_of(bench: Bench, further: Sequence[str], argv: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Peak memory by network, without further ones that cannot run."""
    peaks = {}
    for name in (*NETWORKS, *further):
        try:
            peaks[name] = measure_peak(bench, name, argv)
        except RuntimeError:
            if name in NETWORKS:
                raise
    return peaks


def print_counts(settings: argparse.Namespace, config: Config, shapes: SimpleNamespace, device: torch.device) -> None:
    """Counts operations and prints them as a table, and as JSON in the last line."""
    counts = {}
    for arch in settings.count_ops or [config.model.arch]:
        one = Bench(
            changed(config, arch=arch, batch_size=BATCH_SIZE), shapes, settings.scores, device, settings.multiple
        )
        counts[arch] = count_networks(one)
    keep_ratio = config.sparsity.keep_ratio
    print(f"{headline(device)}\nmethod {config.method}, scores {settings.scores}, keep_ratio {keep_ratio:g}")
    print(f"{note()}\n\n{table(counts)}\n")
    stored = {arch: {name: asdict(count) for name, count in by_name.items()} for arch, by_name in counts.items()}
    asked = {key: getattr(settings, key) for key in ("scores", "input_size", "num_classes")}
    print(json.dumps({"operations": stored, **asked, "device": str(device), "config": config_to_dict(config)}))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 a user's mistake."""
    return exit_code_of(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
