"""Time and memory of a training step: `python -m tools.bench --config FILE.yaml`.

It takes a training configuration just as `main.py` does and builds three networks as training builds them:

    dense    the whole network, one ordinary training step (method dense)
    thin     a narrower network with the FLOPs of a typical draw (method thin with a budget of FLOPs), as many forward
             passes as compact runs, and one backward pass
    compact  the step of the configured method on the masked network, with new masks in every step

They run one random batch in one process, one step each in turn, so that a change in the machine meets all of them.
Before each step of compact the scores are put back where they were; structure step and projection run as in training.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from args import OPTIONS, Config, config_from_dict, config_to_dict, parse_args
from tools.command_line import ToolParser, aligned, exit_code_of, headline, whole_number
from trainers.automatic import check_settled
from trainers.build import new_run
from trainers.default import StepResult, StepSettings, draw_masks
from trainers.devices import find_device
from trainers.methods import make_method
from trainers.state import RunState
from utils.algorithm.masks import sample_masks
from utils.channels.budget import Budget
from utils.channels.plan import preferred_multiple
from utils.errors import UserError
from utils.run import checkpoint
from utils.run.folder import resolve_run
from utils.run.memory import keep_freed_memory
from utils.run.metrics import Cost

NETWORKS = ("dense", "compact", "thin")  # in the order of their steps
MADE_SCORES = ("uniform", "late")  # anything else is a path
WARM_UP_STEPS = 5  # unless --warm-up says otherwise: each draw brings new shapes
PEAK_STEPS = 4
TYPICAL_OF = 9  # draws, an odd number: the one with the median FLOPs is typical

# Late in a search most units have a score of exactly 0, and a working set larger than the budget shares it.
LATE_WORKING_SET = 1.15  # units, as a multiple of the budget
LATE_SURE = 0.8  # of the working set
LATE_SURE_SCORE = 0.97


# ---- the command line ----


def read_command_line(argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The options of the bench, and the configuration that all others make, as in `main.py`.

    Raises: UserError for every mistake.
    """
    about = "Times a training step against a dense and a thin network. Takes the options of main.py as well."
    parser = ToolParser("tools.bench", about)
    parser.add_argument("--repeats", type=whole_number(1, 10000), default=7, metavar="N", help="steps that are timed")
    about = "steps before them, which do not count; a GPU needs about 100 until it has seen the shapes of the draws"
    parser.add_argument("--warm-up", type=whole_number(1, 10000), default=WARM_UP_STEPS, metavar="N", help=about)
    about = "pad kept channels to a multiple of N (default: what suits the device)"
    parser.add_argument("--multiple", type=whole_number(1, 128), metavar="N", help=about)
    parser.add_argument("--input-size", type=whole_number(8, 512), default=32, metavar="N", help="pixels of an image")
    parser.add_argument("--num-classes", type=whole_number(2, 10**6), default=10, metavar="N", help="classes")
    about = "uniform: all equal; late: most are 0; or those of a run or checkpoint, which brings its configuration"
    parser.add_argument("--scores", default="uniform", metavar="uniform|late|RUN", help=about)
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory (one process per network)")
    parser.add_argument("--peak", choices=NETWORKS, help=argparse.SUPPRESS)
    settings, others = parser.parse_known_args(argv)
    arguments = parse_args(others)
    config = arguments.config
    if config.run.resume is not None:
        raise UserError("--resume (command line) goes on with a run, which the bench never does; pass --scores RUN")
    if settings.scores not in MADE_SCORES:
        settings.scores = str(resolve_run(settings.scores)[1])
        stored = checkpoint.load(settings.scores)["config"] | {"device": "auto", "multigpu": None}
        given = {key: config_to_dict(config)[key] for key, origin in arguments.origin.items() if origin != "default"}
        config = config_from_dict(stored | given, settings.scores)
    if not make_method(config).has_scores:
        raise UserError(f"method {config.method} has no scores to draw masks from; pass --method vrpge")
    check_settled(config, "the bench")
    return settings, replace(config, model=replace(config.model, pretrained=None, widths_of=None))


def changed(config: Config, **options: object) -> Config:
    """The configuration with other values of some options. Those that follow from others are found anew."""
    own = {key: value for key, value in config_to_dict(config).items() if value != OPTIONS[key].default}
    return config_from_dict({**own, **options}, "bench")


# ---- scores ----


def put_scores_(run: RunState, scores: str, config: Config) -> None:
    """Sets the scores of a new run and draws its masks again; units whose scores stay at 0 leave, as in training.

    Args:
        scores: "uniform", "late" or the path of a checkpoint.
    """
    network, scores_U = run.network, run.network.scores.data
    constant = run.budget.largest_score(config.sparsity.keep_ratio)
    if scores == "uniform":
        scores_U.fill_(constant)
    elif scores == "late":
        scores_U.copy_(late_scores([layer.stop - layer.start for layer in network.unit_groups()], constant))
        run.budget.project_(config.sparsity.keep_ratio)  # a budget of FLOPs, or of each layer, may be exceeded
    else:
        stored = checkpoint.load(scores)["model"]
        for name, part in zip(network.layers, network.split(scores_U), strict=True):
            values = stored.get(f"{name}.scores")
            if values is None or values.shape != part.shape:
                raise UserError(f"the scores of {scores} do not fit layer {name}; leave out options of the network")
            part.copy_(values)
    if run.search.masks is not None:
        run.search.masks = draw_masks(run.search, config)
    make_method(config).end_of_epoch(run, config.sparsity.keep_ratio)


def late_scores(sizes: Sequence[int], keep_ratio: float) -> Tensor:
    """Scores as they are late in a search, with a sum of exactly the budget: (U,) float32.

    All are 0 but those of a working set of 1.15 budgets, which is spread evenly over the layers, at least one unit in
    each, and at random within them. 80 % of it has a score of 0.97, and the others share what is left of the budget.

    Args:
        sizes: number of units of each layer.
        keep_ratio: the budget, as a fraction of all units.
    Raises: UserError if the budget is too large or too small for that.
    """
    random, scores_U, edges = np.random.default_rng(0), np.zeros(sum(sizes)), np.cumsum([0, *sizes])
    share = min(LATE_WORKING_SET * keep_ratio, 1.0)
    counts = np.diff(np.round(share * edges)).astype(int).clip(1)
    layers = [edge + random.permutation(size)[:count] for edge, size, count in zip(edges, sizes, counts, strict=False)]
    sure, unsure = np.split(random.permutation(np.concatenate(layers)), [round(LATE_SURE * share * edges[-1])])
    rest = keep_ratio * len(scores_U) - len(sure) * LATE_SURE_SCORE
    if not 0 < rest <= len(unsure):
        raise UserError(
            f"{100 * keep_ratio:.3g} % of {len(scores_U)} units in {len(sizes)} layers do not go with --scores late, "
            f"which spreads {LATE_WORKING_SET} budgets over them; pass --scores uniform or another --keep-ratio"
        )
    scores_U[sure], scores_U[unsure] = LATE_SURE_SCORE, rest / len(unsure)
    return torch.from_numpy(scores_U).float()


def spent(budget: Budget) -> float:
    """The smallest `keep_ratio` within which the scores are."""
    scores_U = budget.network.scores.detach().double().cpu().numpy()
    if budget.cost is not None:
        return budget.cost(scores_U) / budget.cost.dense
    return max(float(scores_U[group].mean()) for group in budget.groups)


# ---- the networks ----


Network = tuple[RunState, Callable[[], None], list[Cost]]  # a run, its step, and the costs of its forward passes


@dataclass
class Bench:
    """A configuration with one batch. A *step* here is `--score-every` training steps; the first updates the scores."""

    config: Config
    shapes: SimpleNamespace  # image_size, num_classes, channels, which a network takes from a `DataSplits`
    scores: str
    device: torch.device
    multiple: int | None = None  # what kept channels are padded to; None: what suits the device

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        count, size = self.config.train.batch_size, self.shapes.image_size
        images = torch.randn((count, self.shapes.channels, size, size), generator=generator)
        self.images = images.to(self.device, memory_format=torch.channels_last)
        self.labels = torch.randint(self.shapes.num_classes, (count,), generator=generator).to(self.device)
        self.period = self.config.sparsity.score_every
        self.num_passes = [1] * self.period  # of each training step in the last step of compact

    def build(self, name: str) -> Network:
        """One of `NETWORKS`."""
        if name == "compact":
            return self.compact()
        if name == "dense":
            return self.fixed(changed(self.config, method="dense"))
        options = {"budget": "flops", "execution": "compact", "constrain_by_layer": False}
        config = changed(self.config, method="thin", keep_ratio=self.typical_flops(), **options)
        gc.collect()  # a traced graph is a cycle, so the masked network would stay in memory
        return self.fixed(config)

    def typical_flops(self) -> float:
        """The FLOPs of a typical draw, as a fraction of the dense ones."""
        network = self.masked_run().network
        generator = torch.Generator(self.device).manual_seed(0)
        masks = sample_masks(network.scores.detach(), generator, TYPICAL_OF).cpu().numpy()
        return float(np.median([network.subnet_macs(network.plan(mask_U)) for mask_U in masks])) / network.dense_macs

    def masked_run(self) -> RunState:
        run = new_run(self.config, self.shapes, self.device)
        run.network.multiple = self.multiple or run.network.multiple
        put_scores_(run, self.scores, self.config)
        return run

    def compact(self) -> Network:
        run, costs = self.masked_run(), []
        start_U = run.network.scores.detach().clone()
        # A checkpoint from before the end of a falling budget holds more than the final one.
        keep_ratio = min(1.0, max(self.config.sparsity.keep_ratio, spent(run.budget)))

        def step() -> None:
            for i in range(self.period):
                run.network.scores.data.copy_(start_U)
                ran = self.training_step(run, self.config, i, keep_ratio).forward
                self.num_passes[i] = len(ran)
                costs.extend(ran)

        return run, step, costs

    def fixed(self, config: Config) -> Network:
        """Dense or thin. A thin network runs as many forward passes as compact has just run."""
        run = new_run(config, self.shapes, self.device)

        def step() -> None:
            for i in range(self.period):
                for _ in range(self.num_passes[i] - 1 if config.method == "thin" else 0):
                    with torch.no_grad():
                        F.cross_entropy(run.network(self.images, run.plan, update_statistics=False), self.labels)
                self.training_step(run, config, i)

        return run, step, [run.network.pass_cost(run.plan)]

    def training_step(self, run: RunState, config: Config, i: int, keep_ratio: float = 1.0) -> StepResult:
        """Step i of a period, as the recipe takes it."""
        now = StepSettings(config.train.weight_lr, config.train.score_lr, keep_ratio, update_scores=i == 0)
        return make_method(config).step(run, self.images, self.labels, now)


# ---- time and memory ----


def measure(bench: Bench, repeats: int, warm_up: int = WARM_UP_STEPS) -> dict[str, Any]:
    """All figures but memory, by network and in comparison."""
    networks, rows = {name: bench.build(name) for name in NETWORKS}, {}
    steps = {name: step for name, (_, step, _) in networks.items()}
    times = interleaved_times(steps, repeats, bench.device, warm_up)
    for name, (run, _, costs) in networks.items():
        milliseconds = 1000 * np.array([time.total for time in times[name]]) / bench.period
        low, median, high = np.percentile(milliseconds, (25, 50, 75)).tolist()
        flops, padded_flops = (np.mean(costs, axis=0) / run.network.dense_macs).tolist()
        rows[name] = {
            **{"ms": median, "ms_quartiles": [low, high], "mean_ms": milliseconds.mean().item()},
            "host_ms": float(np.median([1000 * time.host / bench.period for time in times[name]])),
            "images_per_second": 1000 * len(bench.labels) / median,
            **{"flops_ratio": flops, "padded_flops_ratio": padded_flops},
        }
    dense, compact, thin = (rows[name]["ms"] for name in NETWORKS)
    ratios = {"dense/compact": dense / compact, "compact/thin": compact / thin, "dense/thin": dense / thin}
    return {"networks": rows, **ratios, "ideal dense/compact, 3/(4r)": 3 / (4 * rows["compact"]["flops_ratio"])}


class StepTime(NamedTuple):
    """Seconds of a step until everything is done, and until the host is free to start the next one."""

    total: float
    host: float


def interleaved_times(
    steps: Mapping[str, Callable[[], None]], repeats: int, device: torch.device, warm_up: int = WARM_UP_STEPS
) -> dict[str, list[StepTime]]:
    """Times of every step, all of them once a round, after `warm_up` rounds that are not counted."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    times: dict[str, list[StepTime]] = {name: [] for name in steps}
    for repeat in range(warm_up + repeats):
        for name, step in steps.items():
            synchronise(device)
            start = time.perf_counter()
            step()
            host = time.perf_counter() - start
            synchronise(device)
            if repeat >= warm_up:
                times[name].append(StepTime(time.perf_counter() - start, host))
    return times


def measure_peak(argv: Sequence[str], name: str) -> dict[str, float | None]:
    """Peak memory of one network in a process of its own, and what such a process needs before it builds one."""
    command = [sys.executable, "-m", "tools.bench", *argv, "--peak", name]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise UserError(f"peak memory of {name} cannot be measured ({reason}); leave it out with --no-memory")
    return json.loads(result.stdout.splitlines()[-1])


def peak_mb(device: torch.device) -> float | None:
    """Peak so far, in MB: of tensors on a GPU, of the process on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")  # in getrusage a process has its parent's peak
    except OSError:
        return None
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


# ---- the program ----

NOTES = """\
Medians (quartiles) of {repeats} interleaved steps after {warm_up} that do not count, on random images. "host" is the
time until the host may start the next step: on a GPU, which works on while the host goes ahead, the larger of both
bounds the training. FLOPs are those of one forward pass as a fraction of the dense network's; those of compact are r.
MB is the peak of a process for each network; on a CPU it includes torch itself."""


def report(figures: Mapping[str, Any]) -> str:
    """The networks as a Markdown table, and how they compare."""
    rows = [
        {
            "network": name,
            "ms": "{:.1f} ({:.1f}-{:.1f})".format(row["ms"], *row["ms_quartiles"]),
            "mean": f"{row['mean_ms']:.1f}",
            "host": f"{row['host_ms']:.1f}",
            "images/s": f"{row['images_per_second']:.0f}",
            "FLOPs": f"{row['flops_ratio']:.4f}",
            "padded": f"{row['padded_flops_ratio']:.4f}",
            "MB": "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f} ({row['baseline_mb']:.0f} before)",
        }
        for name, row in figures["networks"].items()
    ]
    ratios = [f"{name}: {value:.2f}" for name, value in figures.items() if name != "networks"]
    return "\n".join([aligned(rows), "", *ratios])


def run(argv: Sequence[str]) -> None:
    settings, config = read_command_line(argv)
    keep_freed_memory()  # as main.py does
    device = find_device(config)
    shapes = SimpleNamespace(image_size=settings.input_size, num_classes=settings.num_classes, channels=3)
    bench = Bench(config, shapes, settings.scores, device, settings.multiple)
    if settings.peak:
        before, (_, step, _) = peak_mb(device), bench.build(settings.peak)
        for _ in range(PEAK_STEPS):
            step()
        print(json.dumps({"peak_mb": peak_mb(device), "baseline_mb": before}))
        return
    print(headline(device), flush=True)
    figures = measure(bench, settings.repeats, settings.warm_up)
    for name, row in figures["networks"].items():
        row |= {"peak_mb": None, "baseline_mb": None} if settings.no_memory else measure_peak(argv, name)
    print(f"{config.model.arch}, method {config.method}, scores {settings.scores}, {config.train.precision}")
    notes = NOTES.format(repeats=settings.repeats, warm_up=settings.warm_up)
    print(f"{notes}\n\n{report(figures)}\n")
    asked = {key: getattr(settings, key) for key in ("scores", "repeats", "warm_up", "input_size", "num_classes")}
    asked["multiple"] = settings.multiple or preferred_multiple(device)
    print(json.dumps({**figures, **asked, "device": str(device), "config": config_to_dict(config)}))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 a user's mistake."""
    return exit_code_of(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
