"""Time and memory of a training step: `python -m tools.bench --help`.

Three networks run the same batch in one process, one step each in turn, so that a change in the machine meets all:

    dense    the plain network, one ordinary training step: what the method is to be faster than
    thin     an ordinary network with as many channels as a typical draw keeps, as many forward passes as compact runs
             and one backward: what compact execution can come close to
    compact  `trainers.default.train_step` on the masked network, new masks in every step as in training

The batch is random and lies on the device: no data loading. Score learning rate 0 holds the scores where they were
put; the structure step runs all the same.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trainers.retirement import retire

from args import OPTIONS as TRAINING_OPTIONS
from args import Config, ModelConfig, RunConfig, SparsityConfig, TrainConfig, config_from_dict
from tools.command_line import ToolParser, exit_code_of
from tools.thin import ThinNetwork
from trainers.default import (
    SearchState,
    StepSettings,
    draw_masks,
    forward_loss,
    num_full_passes,
    num_masks,
    train_step,
    weight_step,
)
from trainers.session import find_device
from trainers.state import make_weight_optimizer, new_run
from utils.channels.network import SparseNetwork
from utils.channels.plan import Plan
from utils.errors import UserError
from utils.options import METAVARS, Given, Option, convert
from utils.run import checkpoint
from utils.run.folder import PROJECT_FOLDER, environment_facts, resolve_run

NETWORKS = ("dense", "thin", "compact")
ROUNDINGS = (1, 8, 16, 32)  # of thin's channel counts; 1: as drawn
WARM_UP_STEPS = 5  # each draw brings new shapes
PEAK_STEPS = 4
TYPICAL_OF = 9  # draws, of which the one with the median arithmetic is thin

# Late in a search: most units have a score of exactly 0; a working set larger than the budget shares it.
LATE_WORKING_SET = 1.15  # units, as a multiple of the budget
LATE_SURE = 0.8  # of the working set
LATE_SURE_SCORE = 0.97

IN_CHANNELS = 3


@dataclass(frozen=True)
class Shapes:
    """What a network has to know about the images that it will read (see `data.DataSplits`)."""

    image_size: int
    num_classes: int
    channels: int = IN_CHANNELS


@dataclass(frozen=True)
class Case:
    """One line of the table: a training configuration and where its scores come from.

    Attributes:
        scores: "uniform", "late" or the path of a checkpoint.
    """

    config: Config
    shapes: Shapes
    scores: str


# ---- the command line ----

OWN_OPTIONS = (
    Option("input_size", "", int, False, 32, "height and width of the images", within="[8, 512]"),
    Option("num_classes", "", int, False, 10, "classes", within="[2, inf)"),
    Option("scores", "", str, False, "uniform", "uniform: all equal to keep_ratio; late: most are exactly 0; or a "
           "checkpoint or run folder, which also gives arch, width_mult, keep_ratio and stream"),
)  # fmt: skip
TAKEN_FROM_TRAINING = (
    *("arch", "keep_ratio", "batch_size", "precision", "device", "stream", "width_mult", "score_every", "subbatch"),
)
OPTIONS = {key: TRAINING_OPTIONS[key] for key in TAKEN_FROM_TRAINING} | {option.key: option for option in OWN_OPTIONS}
REPEATS = Option("repeats", "", int, False, 7, "steps that are timed", within="[1, 10000]")
MADE_SCORES = ("uniform", "late")  # anything else is a path
FROM_CHECKPOINT = ("arch", "keep_ratio", "width_mult", "stream")

VARIANTS = ("dense", "compact", *(f"thin{rounding}" for rounding in ROUNDINGS))


def read_command_line(argv: Sequence[str] | None) -> argparse.Namespace:
    """All options, each value checked; `--help` prints and exits with code 0.

    Raises: UserError for every mistake.
    """
    parser = ToolParser(
        "tools.bench",
        "Times a training step: dense, thin and compact. Options with dots take several values; "
        "every combination is timed.",
    )
    for option in (*OPTIONS.values(), REPEATS):
        parser.add_argument(
            _flag(option.key),
            **({} if option is REPEATS else {"nargs": "+", "action": "extend"}),
            metavar=option.metavar or METAVARS[option.kind],
            help=f"{option.help}{_choices(option)} (default: {option.default})",
        )
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory (one process per network)")
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.given = [key for key in OPTIONS if getattr(arguments, key) is not None]
    for key, option in OPTIONS.items():
        texts = getattr(arguments, key)
        setattr(arguments, key, [option.default] if texts is None else [_value(option, text) for text in texts])
    if arguments.repeats is None:
        arguments.repeats = REPEATS.default
    else:
        arguments.repeats = _value(REPEATS, arguments.repeats)
    return arguments


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _choices(option: Option) -> str:
    explained = all(f"{choice}: " in option.help for choice in option.choices)
    return "" if explained else f": {', '.join(option.choices)}"


def _value(option: Option, text: str) -> Any:
    return convert(option, Given(option.key, text, False, "command line"))


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """Every combination of the values, one per checkpoint for those that a checkpoint decides.

    Raises: UserError for a checkpoint that cannot be used, and for options that would have no effect.
    """
    useless = [key for key in FROM_CHECKPOINT if key in arguments.given]
    if useless and not set(MADE_SCORES) & set(arguments.scores):
        flags = ", ".join(map(_flag, useless))
        raise UserError(f"{flags} (command line) cannot be combined with a checkpoint, which decides it; leave it out")
    cases: list[Case] = []
    for values in itertools.product(*(getattr(arguments, key) for key in OPTIONS)):
        case = make_case(**dict(zip(OPTIONS, values, strict=True)))
        if case not in cases:
            cases.append(case)
    return cases


def make_case(
    *,
    arch: str,
    keep_ratio: float,
    batch_size: int,
    precision: str,
    device: str,
    stream: str,
    width_mult: float,
    score_every: int,
    subbatch: int,
    input_size: int,
    num_classes: int,
    scores: str,
) -> Case:
    model = ModelConfig(arch=arch, width_mult=width_mult)
    if scores not in MADE_SCORES:
        scores = str(resolve_run(scores)[1].resolve())
        stored = stored_config(scores)
        model = replace(stored.model, pretrained=None)
        keep_ratio, stream = stored.sparsity.keep_ratio, stored.sparsity.stream
    config = Config(
        run=RunConfig(device=device),
        model=model,
        sparsity=SparsityConfig(keep_ratio=keep_ratio, stream=stream, score_every=score_every, subbatch=subbatch),
        train=TrainConfig(batch_size=batch_size, precision=precision),
    )
    return Case(config, Shapes(input_size, num_classes), scores)


def values_of(case: Case) -> dict[str, Any]:
    """The value of every option."""
    config = case.config
    return {
        "arch": config.model.arch,
        "keep_ratio": config.sparsity.keep_ratio,
        "batch_size": config.train.batch_size,
        "precision": config.train.precision,
        "device": config.run.device,
        "stream": config.sparsity.stream,
        "scores": case.scores,
        "width_mult": config.model.width_mult,
        "score_every": config.sparsity.score_every,
        "subbatch": config.sparsity.subbatch,
        "input_size": case.shapes.image_size,
        "num_classes": case.shapes.num_classes,
    }


def stored_config(path: str) -> Config:
    state = checkpoint.load(path)
    if "config" not in state:
        raise UserError(f"{path} is not a checkpoint of a run; pass --scores a run folder or its checkpoints/last.pt")
    config = config_from_dict(state["config"], path)
    if config.model.conv_type != "VRPGE":
        raise UserError(f"{path} is of a dense run, which has no scores; pass --scores uniform, late or another run")
    return config


# ---- scores ----


def scores_of(case: Case, network: SparseNetwork) -> Tensor:
    """The scores that a case asks for: (U,) on the CPU."""
    keep_ratio = case.config.sparsity.keep_ratio
    if case.scores == "uniform":
        return torch.full((network.num_units,), keep_ratio)
    if case.scores == "late":
        sizes = [group.stop - group.start for group in network.unit_groups()]
        return late_scores(sizes, keep_ratio)
    model = checkpoint.load(case.scores)["model"]
    scores_U = torch.empty(network.num_units)
    for name, part in zip(network.layers, network.split(scores_U), strict=True):
        part.copy_(model[f"{name}.scores"])
    return scores_U


def late_scores(sizes: Sequence[int], keep_ratio: float) -> Tensor:
    """Scores as they are late in a search, with a sum of exactly the budget.

    Zero but for a working set of 1.15 budgets, spread evenly over the layers and at random within them. 80 % of it
    has a score of 0.97, the others share what is left of the budget.

    Args:
        sizes: number of units of each layer.
    Returns: (U,) float32.
    Raises: UserError if the budget is too large or too small for that.
    """
    num_units = sum(sizes)
    budget = keep_ratio * num_units
    working_set = min(round(LATE_WORKING_SET * budget), num_units)
    num_sure = round(LATE_SURE * working_set)
    rest = budget - num_sure * LATE_SURE_SCORE
    if working_set < len(sizes) or not 0 < rest <= working_set - num_sure:
        raise UserError(
            f"keep_ratio {keep_ratio} of {num_units} units does not go with --scores late, which spreads "
            f"{LATE_WORKING_SET} budgets over {len(sizes)} layers; use --scores uniform or another keep_ratio"
        )
    random = np.random.default_rng(0)
    firsts = np.cumsum([0, *sizes[:-1]])
    units = [
        first + random.permutation(size)[:count]
        for first, size, count in zip(firsts, sizes, _spread(working_set, sizes), strict=True)
    ]
    order = random.permutation(np.concatenate(units))
    scores_U = np.zeros(num_units)
    scores_U[order[:num_sure]] = LATE_SURE_SCORE
    scores_U[order[num_sure:]] = rest / (working_set - num_sure)
    return torch.from_numpy(scores_U).float()


def _spread(total: int, sizes: Sequence[int]) -> np.ndarray:
    """Shares of a total in proportion to sizes: whole numbers, at least 1 each."""
    exact = total * np.array(sizes) / sum(sizes)
    shares = np.maximum(1, np.floor(exact)).astype(int)
    while shares.sum() < total:
        shares[(exact - shares).argmax()] += 1
    while shares.sum() > total:
        shares[np.where(shares > 1, exact - shares, np.inf).argmin()] -= 1
    return shares


# ---- the three networks ----


@dataclass
class Bench:
    """The batch of a case, and steps on it. A *step* here is `score_every` training steps, of which one is whole."""

    case: Case
    device: torch.device

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        size, shapes = self.case.config.train.batch_size, self.case.shapes
        images = torch.randn((size, shapes.channels, shapes.image_size, shapes.image_size), generator=generator)
        self.images = images.to(self.device, memory_format=torch.channels_last)
        self.labels = torch.randint(shapes.num_classes, (size,), generator=generator).to(self.device)

    @property
    def num_steps(self) -> int:
        return self.case.config.sparsity.score_every

    def settings(self, step: int, kept_fraction: float = 1.0) -> StepSettings:
        return StepSettings(
            self.case.config.train.weight_lr, score_lr=0.0, kept_fraction=kept_fraction, update_scores=step == 0
        )

    def dense(self) -> tuple[SparseNetwork, Callable[[], None]]:
        """The plain network, and its step."""
        config = replace(self.case.config, model=replace(self.case.config.model, conv_type="DenseConv"))
        run = new_run(config, self.case.shapes, self.device)

        def step() -> None:
            for i in range(self.num_steps):
                weight_step(
                    run.network,
                    run.weight_optimizer,
                    run.network.dense_plan,
                    self.images,
                    self.labels,
                    self.settings(i),
                    config,
                )

        return run.network, step

    def search(self) -> SearchState:
        """The masked network with the scores of the case, before its first step."""
        search = new_run(self.case.config, self.case.shapes, self.device).search
        search.network.scores.data.copy_(scores_of(self.case, search.network))
        search.draw = draw_masks(search.network, search.generator, num_masks(self.case.config.sparsity))
        return search

    def typical_counts(self, network: SparseNetwork) -> list[int]:
        """Live channels per space in a draw of median arithmetic."""
        generator = torch.Generator(self.device).manual_seed(0)
        plans = draw_masks(network, generator, TYPICAL_OF).plans
        return sorted(plans, key=network.subnet_macs)[TYPICAL_OF // 2].counts

    def thin(self, network: SparseNetwork, counts: list[int], rounding: int) -> tuple[ThinNetwork, Callable[[], None]]:
        """An ordinary network with the given channel counts, rounded up, and its step."""
        thin = ThinNetwork(network.graph, rounded_widths(network, counts, rounding))
        thin = thin.to(self.device, memory_format=torch.channels_last)
        config = self.case.config
        optimizer = make_weight_optimizer(thin, config, config.train.weight_lr)

        def step() -> None:
            for i in range(self.num_steps):
                in_parts = i == 0 and config.sparsity.subbatch > 0  # all parts together are one more pass
                for _ in range(num_full_passes(config.sparsity, update_scores=i == 0) - 1 + in_parts):
                    with torch.no_grad():
                        forward_loss(thin, None, self.images, self.labels, config.train, update_statistics=False)
                weight_step(thin, optimizer, None, self.images, self.labels, self.settings(i), config)

        return thin, step

    def compact(self, search: SearchState, executed: list[Plan]) -> Callable[[], None]:
        """The step of the masked network itself; the plans of the passes that it ran are added to `executed`."""
        config = self.case.config
        prepare(search)
        # a checkpoint from before the end of a falling budget holds more than keep_ratio
        kept_fraction = min(1.0, max(config.sparsity.keep_ratio, float(search.network.scores.double().mean())))

        def step() -> None:
            for i in range(self.num_steps):
                executed.extend(search.draw.plans[: num_full_passes(config.sparsity, update_scores=i == 0)])
                train_step(search, self.images, self.labels, self.settings(i, kept_fraction), config)

        return step


def prepare(search: SearchState) -> None:
    """What training has done by the time that scores look like this: units that stay at 0 have left."""
    retire(search)


def rounded_widths(network: SparseNetwork, counts: list[int], rounding: int) -> list[int]:
    """Channel counts per space, rounded up but never beyond the full network."""
    return [
        min(-(-count // rounding) * rounding, space.width)
        for count, space in zip(counts, network.graph.spaces, strict=True)
    ]


# ---- time ----


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """One line of the table, without memory: medians and quartiles of milliseconds, and what follows from them."""
    device = find_device(case.config)
    bench = Bench(case, device)
    dense, dense_step = bench.dense()
    search = bench.search()
    counts = bench.typical_counts(search.network)
    executed: list[Plan] = []
    steps = {"dense": dense_step}
    widths_seen = []
    for rounding in ROUNDINGS:
        widths = rounded_widths(search.network, counts, rounding)
        if widths not in widths_seen:
            widths_seen.append(widths)
            steps[f"thin{rounding}"] = bench.thin(search.network, counts, rounding)[1]
    steps["compact"] = bench.compact(search, executed)
    times = interleaved_times(steps, repeats, device)
    times = {name: [1000 * seconds / bench.num_steps for seconds in values] for name, values in times.items()}

    fastest = min((name for name in steps if name.startswith("thin")), key=lambda name: np.median(times[name]))
    times["thin"] = times[fastest]
    dense_ms, thin_ms, compact_ms = (float(np.median(times[name])) for name in ("dense", "thin", "compact"))
    flops_ratio = float(np.mean([search.network.subnet_macs(plan) for plan in executed])) / dense.dense_macs
    padded_ratio = float(np.mean([search.network.padded_macs(plan) for plan in executed])) / dense.dense_macs
    return {
        **values_of(case),
        "device": str(device),
        "dense_ms": dense_ms,
        "thin_ms": thin_ms,
        "compact_ms": compact_ms,
        "dense_over_compact": dense_ms / compact_ms,
        "compact_over_thin": compact_ms / thin_ms,
        "dense_over_thin": dense_ms / thin_ms,
        "ideal": 3 / (4 * flops_ratio),
        "flops_ratio": flops_ratio,
        "padded_flops_ratio": padded_ratio,
        "thin_rounding": int(fastest.removeprefix("thin")),
        **{f"{name}_ms_quartiles": np.percentile(times[name], (25, 75)).tolist() for name in NETWORKS},
        "images_per_second": 1000 * case.config.train.batch_size / compact_ms,
        "repeats": repeats,
    }


def interleaved_times(
    steps: dict[str, Callable[[], None]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every step, all of them once a round, after rounds that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(WARM_UP_STEPS + repeats):
        for name, step in steps.items():
            synchronise(device)
            start = time.perf_counter()
            step()
            synchronise(device)
            if repeat >= WARM_UP_STEPS:
                times[name].append(time.perf_counter() - start)
    return times


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- memory ----


def measure_peaks(case: Case, thin_rounding: int) -> dict[str, float | None]:
    """Peak memory of each network in a process of its own, in MB: of the process on a CPU, of tensors on a GPU.

    `baseline_peak_mb` is what such a process needs before it builds a network.
    """
    row: dict[str, float | None] = {}
    for name, variant in (("dense", "dense"), ("thin", f"thin{thin_rounding}"), ("compact", "compact")):
        command = [sys.executable, "-m", "tools.bench", *as_arguments(case), "--peak", variant]
        result = subprocess.run(command, cwd=PROJECT_FOLDER, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
            raise UserError(f"peak memory of {name} cannot be measured ({reason}); leave it out with --no-memory")
        answer = json.loads(result.stdout.splitlines()[-1])
        row[f"{name}_peak_mb"] = answer["peak_mb"]
        row["baseline_peak_mb"] = answer["baseline_mb"]
    return row


def as_arguments(case: Case) -> list[str]:
    """The command line of one case."""
    decided = () if case.scores in MADE_SCORES else FROM_CHECKPOINT
    pairs = [(_flag(key), str(value)) for key, value in values_of(case).items() if key not in decided]
    return [word for pair in pairs for word in pair]


def own_peak(case: Case, variant: str) -> dict[str, float | None]:
    """What this process needs for a few steps of one network."""
    device = find_device(case.config)
    baseline = peak_mb(device)
    bench = Bench(case, device)
    if variant == "dense":
        step = bench.dense()[1]
    elif variant == "compact":
        step = bench.compact(bench.search(), [])
    else:
        network = bench.search().network
        step = bench.thin(network, bench.typical_counts(network), int(variant.removeprefix("thin")))[1]
        del network
        gc.collect()  # a traced graph is a cycle: the full network would stay in memory
    for _ in range(PEAK_STEPS):
        step()
    return {"peak_mb": peak_mb(device), "baseline_mb": baseline}


def peak_mb(device: torch.device) -> float | None:
    """Peak so far of tensors on a GPU, or of all memory of this process; None where the system does not tell.

    Not `getrusage`: there a new process starts at the peak of the one that started it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


# ---- the table ----


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as an aligned Markdown table."""
    cells = [_cells(row) for row in rows]
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in cells[0]}
    lines = [{name: name for name in widths}, {name: "-" * width for name, width in widths.items()}, *cells]
    return "\n".join("| " + " | ".join(f"{row[name]:>{widths[name]}}" for name in widths) + " |" for row in lines)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    def milliseconds(name: str) -> str:
        low, high = row[f"{name}_ms_quartiles"]
        return f"{row[f'{name}_ms']:.1f} ({low:.1f}-{high:.1f})"

    def megabytes(name: str) -> str:
        peak = row[f"{name}_peak_mb"]
        return "-" if peak is None else f"{peak:.0f}"

    rounding = row["thin_rounding"]
    return {
        "arch": row["arch"],
        "width": f"{row['width_mult']:g}",
        "input": str(row["input_size"]),
        "keep": f"{row['keep_ratio']:g}",
        "batch": str(row["batch_size"]),
        "precision": row["precision"],
        "stream": row["stream"],
        "scores": row["scores"] if row["scores"] in MADE_SCORES else Path(row["scores"]).name,
        "score every": str(row["score_every"]),
        "subbatch": str(row["subbatch"]),
        **{f"{name} ms": milliseconds(name) for name in NETWORKS},
        "thin widths": "as drawn" if rounding == 1 else f"x{rounding}",
        "compact images/s": f"{row['images_per_second']:.0f}",
        "r": f"{row['flops_ratio']:.4f}",
        "padded r": f"{row['padded_flops_ratio']:.4f}",
        "dense/compact": f"{row['dense_over_compact']:.2f}",
        "compact/thin": f"{row['compact_over_thin']:.2f}",
        "dense/thin": f"{row['dense_over_thin']:.2f}",
        "3/(4r)": f"{row['ideal']:.2f}",
        **{f"{name} MB": megabytes(name) for name in NETWORKS},
    }


def headline(device: torch.device) -> str:
    facts = environment_facts(device)
    return (
        f"{facts['gpu'] or facts['cpu']} ({facts['cpu_capability']}), {facts['num_threads']} threads, "
        f"torch {facts['torch']}, commit {facts['git_commit']}{' with changes' if facts['git_dirty'] else ''}"
    )


NOTES = """\
Medians of interleaved steps (quartiles in brackets), after warm-up; random images, no data loading; new masks in
every step, score learning rate 0. thin: a dense network as wide as one typical draw, the fastest of all roundings."""


def run(argv: Sequence[str] | None) -> None:
    arguments = read_command_line(argv)
    cases = cases_of(arguments)
    if arguments.peak:
        print(json.dumps(own_peak(cases[0], arguments.peak)))
        return
    for device in dict.fromkeys(find_device(case.config) for case in cases):
        print(headline(device), flush=True)
    rows = []
    for number, case in enumerate(cases, 1):
        row = measure(case, arguments.repeats)
        if arguments.no_memory:
            row |= dict.fromkeys((*(f"{name}_peak_mb" for name in NETWORKS), "baseline_peak_mb"))
        else:
            row |= measure_peaks(case, row["thin_rounding"])
        rows.append(row)
        done = ", ".join(f"{name} {value}" for name, value in _cells(row).items())
        print(f"{number} of {len(cases)}: {done}", file=sys.stderr, flush=True)
    print(NOTES)
    if not arguments.no_memory:
        baselines = sorted({round(row["baseline_peak_mb"] or 0) for row in rows})
        print(
            f"MB: peak of one process for each network, torch itself included on a CPU "
            f"({' to '.join(map(str, baselines[:: max(1, len(baselines) - 1)]))} MB before a network is built)."
        )
    print(table(rows))
    print(json.dumps(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 a user's mistake."""
    return exit_code_of(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
