"""Where two executions of a network part, and where an exception came from, in words for one sentence."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from utils.channels.compact import CompactForward
from utils.channels.graph import Op
from utils.channels.plan import Plan

TORCH = str(Path(torch.__file__).parent) + os.sep
NOTHING_ELSE = "; a forward must not depend on self.training, nor on anything else but its images"
VISIBLE = 1e-6  # relative difference of two results

Results = dict[nn.Module, list[Tensor | None]]


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """The names of all modules; of the network itself its class."""
    return {module: name or type(module).__name__ for name, module in model.named_modules()}


def words_of(error: Exception) -> str:
    """The first line of an exception, without the address of an object."""
    first = (str(error).strip().splitlines() or [""])[0].split(" at 0x")[0]
    return first.rstrip(".") or type(error).__name__


def place_of_error(error: Exception, model: nn.Module) -> str:
    """The module of the network in whose forward an exception came, with the source line, and a colon; or nothing."""
    names, place, trace = names_of(model), "", error.__traceback__
    while trace is not None:
        module, code = trace.tb_frame.f_locals.get("self"), trace.tb_frame.f_code
        if isinstance(module, nn.Module) and module in names and not code.co_filename.startswith(TORCH):
            place = f"in module {names[module]} ({Path(code.co_filename).name}:{trace.tb_lineno}): "
        trace = trace.tb_next
    return place


def first_difference(
    model: nn.Module, compact: CompactForward, plan: Plan, run: Callable[[], Any], run_compact: Callable[[], Any]
) -> str:
    """Where compact execution parts from another one, as the end of a sentence; nothing if that is not seen.

    Args:
        model: of the network.
        run: a pass of the whole network, whose Python calls its modules.
        run_compact: a pass through `compact` under the plan.
    """
    computed: dict[fx.Node, Tensor | None] = {}
    original = compact._run

    def watched(op: Op, *rest: Any) -> Any:
        result = original(op, *rest)
        computed[op.node] = _copied(result)
        return result

    results = _results(model, run)
    compact._run = watched
    try:
        run_compact()
    finally:
        del compact._run
    graph = compact.graph
    return _other_runs(model, graph.ops, results) or next(
        (f", first behind {graph.where(op)}" for op in graph.ops if _differs(op, results, computed, plan)), ""
    )


def _copied(result: Any) -> Tensor | None:
    """What a later operation may change in place."""
    return result.detach().clone() if isinstance(result, Tensor) else None


def _results(model: nn.Module, run: Callable[[], Any]) -> Results:
    """The results of all modules in one pass, in the order of their runs."""
    results: Results = {}
    handles = [
        module.register_forward_hook(lambda m, _, result: results.setdefault(m, []).append(_copied(result)))
        for module in model.modules()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return results


def _other_runs(model: nn.Module, ops: list[Op], results: Results) -> str:
    """A module that did not run as often as when the network was traced."""
    names = names_of(model)
    traced = Counter(op.module for op in ops if op.node.op == "call_module")
    known = {inner for op in ops if op.module is not None for inner in op.module.modules()}
    for module in results:
        if module not in known and not list(module.children()):
            return f": module {names[module]} runs, which did not run when the network was traced{NOTHING_ELSE}"
    for module, count in traced.items():
        times = len(results.get(module, []))
        if times != count:
            now = f"runs {times} times" if times else "does not run"
            then = f"{count} times" if count > 1 else "once"
            return f": module {names[module]} {now}, and ran {then} when the network was traced{NOTHING_ELSE}"
    return ""


def _differs(op: Op, results: Results, computed: dict[fx.Node, Tensor | None], plan: Plan) -> bool:
    """Whether the next result of a module is another one. Takes it from the results."""
    if op.node.op != "call_module":
        return False
    wanted, found = results[op.module].pop(0), computed[op.node]
    live = torch.from_numpy(plan.live[op.space])
    if wanted is None or found is None or wanted.dim() < 2 or wanted.shape[1] != len(live):
        return False
    wanted, found = wanted[:, live.to(wanted.device)], found[:, : int(live.sum())]
    return wanted.shape != found.shape or bool((wanted - found).abs().max() > VISIBLE * wanted.abs().max())
