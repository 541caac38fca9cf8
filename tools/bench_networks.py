"""The networks that the bench times, and their steps."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from args import OPTIONS, Config, config_from_dict, config_to_dict
from tools.bench_scores import put_scores_, spent
from trainers.build import new_run
from trainers.cuda_graphs import CudaRecorder
from trainers.default import StepResult, StepSettings
from trainers.methods import make_method
from trainers.replay import WARM_UP, Recorder, Replay
from trainers.state import RunState
from utils.algorithm.masks import sample_masks
from utils.channels.plan import Plan
from utils.run.metrics import Cost

NETWORKS = ("dense", "compact", "thin")  # in the order of their steps
COMPILED = {
    "dense, compiled": "default",
    "dense, compiled with CUDA graphs": "reduce-overhead",
}  # modes of torch.compile
GRAPHS = {"dense, CUDA graph": "dense", "thin, CUDA graph": "thin"}
SHAPES = {  # options of the search
    "compact, shapes drawn": {"shapes": "drawn", "cuda_graphs": "auto"},
    "compact, shapes fixed": {"shapes": "fixed", "cuda_graphs": "auto"},
    "compact, shapes fixed, CUDA graphs": {"shapes": "fixed", "cuda_graphs": "on"},
}
EVERY_NETWORK = (*NETWORKS, *COMPILED, *GRAPHS, *SHAPES)
FURTHER = {"compiled": tuple(COMPILED), "graphs": tuple(GRAPHS), "shapes": tuple(SHAPES)}  # what --beside can add
CUDA_ONLY = ("dense, compiled with CUDA graphs", *GRAPHS, "compact, shapes fixed, CUDA graphs")
WEIGHTED = ("conv", "depthwise", "linear")  # operations of a channel graph that have a weight
TYPICAL_OF = 9  # draws, an odd number: the one with the median FLOPs is typical


def changed(config: Config, **options: object) -> Config:
    """The configuration with other values of some options. Those that follow from others are found anew."""
    own = {key: value for key, value in config_to_dict(config).items() if value != OPTIONS[key].default}
    return config_from_dict({**own, **options}, "bench")


@dataclass
class Network:
    """A network with its step.

    Attributes:
        step: takes `--score-every` training steps.
        costs: of its forward passes so far; of one of them if they all cost the same.
        widths: by step, the slots per space of every pass that ran. Empty where they are the same in every step.
        unfit: by training step, the share of its images whose masks did not fit fixed shapes; 0-d on the device.
        replay: what records its training steps; None where they run as they are.
    """

    run: RunState
    step: Callable[[], None]
    costs: list[Cost]
    widths: list[list[Sequence[int]]] = field(default_factory=list)
    unfit: list[Tensor] = field(default_factory=list)
    replay: Replay | None = None

    @property
    def execution(self) -> str:
        """How the step of a search runs, in words."""
        if self.run.network.execution != "compact" or not self.widths:
            return "compact"
        if self.replay is not None and not self.replay.failed:
            return "compact, shapes fixed, CUDA graphs"
        return "compact, shapes drawn" if self.run.network.shapes is None else "compact, shapes fixed"

    def new_shapes(self, timed: int) -> float | None:
        """How many layers of the last `timed` steps had a shape that had not come before in any step, as a fraction."""
        if not self.widths:
            return None
        graph, seen, new, total = self.run.network.graph, set(), 0, 0
        reading = [
            (i, graph.ops[op.inputs[0]].space, op.space) for i, op in enumerate(graph.ops) if op.kind in WEIGHTED
        ]
        for number, passes in enumerate(self.widths):
            for widths in passes:
                for layer, source, target in reading:
                    shape = (layer, widths[source], widths[target])
                    if number >= len(self.widths) - timed:
                        total, new = total + 1, new + (shape not in seen)
                    seen.add(shape)
        return new / total


@dataclass
class Bench:
    """A configuration with one batch. A *step* here is `--score-every` training steps; the first updates the scores."""

    config: Config
    shapes: SimpleNamespace  # image_size, num_classes, channels, which a network takes from a `DataSplits`
    scores: str
    device: torch.device
    multiple: int | None = None  # what kept channels are padded to; None: what suits the device
    recorder: Callable[[torch.device], Recorder] = CudaRecorder  # of dense and thin

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        count, size = self.config.train.batch_size, self.shapes.image_size
        images = torch.randn((count, self.shapes.channels, size, size), generator=generator)
        self.images = images.to(self.device, memory_format=torch.channels_last)
        self.labels = torch.randint(self.shapes.num_classes, (count,), generator=generator).to(self.device)
        self.period = self.config.sparsity.score_every
        self.num_passes = [1] * self.period  # of each training step in the last step of compact

    def further(self, kinds: Sequence[str]) -> list[str]:
        """The networks that `--beside` adds: those of some kinds of `FURTHER` that this device can run."""
        config = self.config
        own = (
            "compact, shapes " + ("fixed" if config.fixes_shapes else "drawn") + ", CUDA graphs" * config.replays_steps
        )
        names = [name for kind in kinds for name in FURTHER[kind] if name != own]
        return [name for name in names if self.device.type == "cuda" or name not in CUDA_ONLY]

    def build(self, name: str) -> Network:
        """One of `EVERY_NETWORK`."""
        if name in GRAPHS:
            return self.recorded(GRAPHS[name])
        if name in COMPILED:
            return self.compiled(COMPILED[name])
        if name == "dense":
            return self.fixed(changed(self.config, method="dense"))
        if name != "thin":
            return self.compact(changed(self.config, **SHAPES[name]) if name in SHAPES else self.config)
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

    def masked_run(self, config: Config | None = None) -> RunState:
        config = config or self.config
        run = new_run(config, self.shapes, self.device)
        run.network.multiple = self.multiple or run.network.multiple
        put_scores_(run, self.scores, config)
        return run

    def compact(self, config: Config) -> Network:
        run = self.masked_run(config)
        start_U = run.network.scores.detach().clone()
        # A checkpoint from before the end of a falling budget holds more than the final one.
        keep_ratio = min(1.0, max(config.sparsity.keep_ratio, spent(run.budget)))
        planned: list[Plan] = []
        plans = run.network.plans

        def watched(masks_KU: np.ndarray) -> list[Plan]:
            planned[:] = plans(masks_KU)
            return list(planned)

        def step() -> None:
            passes: list[Sequence[int]] = []
            for i in range(self.period):
                run.network.scores.data.copy_(start_U)
                result = self.training_step(run, config, i, keep_ratio)
                self.num_passes[i] = len(result.forward)
                network.costs.extend(result.forward)
                passes.extend(plan.widths for plan in planned[: len(result.forward)])
                if "unfit_steps" in result.metrics:
                    network.unfit.append(result.metrics["unfit_steps"] / len(self.labels))
            if passes:
                network.widths.append(passes)

        run.network.plans = watched
        network = Network(run, step, [], replay=run.search.replay)
        return network

    def fixed(self, config: Config) -> Network:
        """Dense or thin. A thin network runs as many forward passes as compact has just run."""
        run = new_run(config, self.shapes, self.device)
        if self.multiple is not None:
            run.network.multiple = self.multiple
            run.plan = run.network.plan(run.plan.mask_U)

        def step() -> None:
            for i in range(self.period):
                for _ in range(self.num_passes[i] - 1 if config.method == "thin" else 0):
                    with torch.no_grad():
                        F.cross_entropy(run.network(self.images, run.plan, update_statistics=False), self.labels)
                self.training_step(run, config, i)

        return Network(run, step, [run.network.pass_cost(run.plan)])

    def recorded(self, name: str) -> Network:
        """Dense or thin. The whole step is recorded once and replayed, and once more for another number of passes.

        It raises RuntimeError if it cannot be recorded.
        """
        recorder, network = self.recorder(self.device), self.build(name)
        replays: dict[tuple[int, ...], Callable[[], None]] = {}

        def step() -> None:
            passes = () if name == "dense" else tuple(self.num_passes)
            if passes not in replays:
                for _ in range(WARM_UP):
                    recorder.warm_up(network.step)
                (replays[passes],) = recorder.record(network.step)
            replays[passes]()

        return replace(network, step=step)

    def compiled(self, mode: str) -> Network:
        """The dense network, compiled by `torch.compile`. Its first step takes minutes, or raises RuntimeError."""
        config = changed(self.config, method="dense")
        network = self.fixed(config)
        network.run.network.model.compile(mode=mode)

        def step() -> None:
            for i in range(self.period):
                network.run.network.clear_gradients()  # a replay may overwrite the memory in which they lie
                torch.compiler.cudagraph_mark_step_begin()
                self.training_step(network.run, config, i)

        return replace(network, step=step)

    def training_step(self, run: RunState, config: Config, i: int, keep_ratio: float = 1.0) -> StepResult:
        """Step i of a period, as the recipe takes it."""
        now = StepSettings(config.train.weight_lr, config.train.score_lr, keep_ratio, update_scores=i == 0)
        return make_method(config).step(run, self.images, self.labels, now)
