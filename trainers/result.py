"""What came out of a finished run: the numbers of summary.json, and the last lines for the terminal."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

from args import Config
from data import DataSplits
from trainers.devices import device_name
from trainers.state import RunState
from utils.choices import named_again
from utils.ranks.exchange import num_ranks
from utils.run.folder import BEST, checkpoint_of

FEW_IMAGES = 500  # of fewer held-out images the last lines warn
KEPT = {  # what keep_ratio is a fraction of -> its words, and the number of the summary that says what is kept of it
    "channels": ("channels kept", "units_kept"),
    "params": ("parameters kept", "params_kept"),
    "flops": ("FLOPs kept", "flops_ratio"),
}


def summarise(run: RunState, config: Config, data: DataSplits, folder: Path) -> dict[str, Any]:
    """The result of a finished run: of the subnet that held-out images chose.

    Accuracies and the standard error are in per cent, ratios are fractions of the dense network or of dense training
    for as many epochs, and times are in seconds.
    """
    network, best = run.network, run.best
    plan = network.plan(best.subnet.mask_U)
    dense = network.num_units == 0
    last, heldout = run.history[-1], best.heldout.get("top1")
    return {
        "arch": config.model.arch,
        "width_mult": config.model.width_mult,
        "set": config.data.set,
        "classes": data.num_classes,
        "method": config.method,
        "keep_ratio": 1.0 if config.method == "dense" else config.sparsity.keep_ratio,
        "budget": None if config.method == "dense" else config.sparsity.budget,
        "test_top1": best.test["top1"],
        "test_top5": best.test["top5"],
        "test_loss": best.test["loss"],
        "test_images": len(data.test),
        "heldout_top1": heldout,
        "heldout_images": len(data.holdout),
        "heldout_standard_error": None if heldout is None else standard_error(heldout, len(data.holdout)),
        "flops_ratio": network.subnet_macs(plan) / network.dense_macs,
        "flops_ratio_padded": network.padded_macs(plan) / network.dense_macs,
        "train_flops_ratio": run.ledger.train_flops_ratio,
        "train_flops_executed": run.ledger.padded_train_flops_ratio,
        "params_kept": network.subnet_parameters(plan) / network.dense_parameters,
        "units_kept": None if dense else float(best.subnet.mask_U.mean()),
        "train_seconds": run.train_seconds,
        "train_cpu_seconds": run.cpu_seconds,
        "seconds": run.train_seconds + run.seconds,
        "epochs": run.epoch,
        "search_epochs": sum(row["phase"] == "search" for row in run.history),
        "best_epoch": best.epoch,
        "best_phase": run.history[best.epoch - 1]["phase"],
        "last_heldout_top1": _number(last["heldout_top1"]),
        "last_test_top1": _number(last["test_top1"]),
        "seed": config.run.seed,
        "execution": "dense" if dense else network.execution,
        "precision": config.train.precision,
        "device": device_name(network.device),
        "ranks": num_ranks(),
        "choice": {name: None if math.isnan(value) else value for name, value in run.choice.items()},
        "data_fingerprint": data.fingerprint,
        "run": str(folder),
    }


def _number(cell: float | str) -> float | None:
    """A cell of results.csv, which is empty where nothing was measured."""
    return None if cell == "" else cell


def standard_error(top1: float, num_images: int) -> float:
    """By how many points an accuracy differs from that on endlessly many images, as a standard deviation.

    Images that are all classified rightly, or all wrongly, count as if half of one were not.

    Args:
        top1: the accuracy in per cent.
        num_images: on which it was measured.
    """
    least = 0.5 / num_images
    p = min(max(top1 / 100, least), 1 - least)
    return 100 * math.sqrt(p * (1 - p) / num_images)


def accuracies(metrics: dict[str, float], num_classes: int, form: str = "{name} {value:.2f} %") -> str:
    """The accuracies of some images as words. Top-5 says nothing where there are five classes or fewer."""
    names = ("top1", "top5") if num_classes > 5 else ("top1",)
    return ", ".join(form.format(name=f"top-{name[3:]}", value=metrics[name]) for name in names)


def print_result(summary: dict[str, Any], config: Config) -> None:
    """Prints the last lines of a run."""
    print("\n" + "\n".join(result_lines(summary, config)))


def result_lines(summary: dict[str, Any], config: Config) -> list[str]:
    """The last lines of a run: what was kept and why, how good it is, what it cost, and what to do next."""
    s, best = summary, shlex.quote(checkpoint_of(summary["run"], BEST))
    test = {name: s[f"test_{name}"] for name in ("top1", "top5")}
    padding = "with padding" if s["execution"] in ("compact", "dense") else f"with {s['execution']} execution"
    lines = {"result from": origin(s)}
    if s["heldout_top1"] is not None:
        lines["held-out accuracy"] = (
            f"{s['heldout_top1']:.2f} % top-1 on the {s['heldout_images']:,} images that decide"
        )
    if s["heldout_top1"] is not None and s["heldout_images"] < FEW_IMAGES:
        lines["warning"] = (
            f"{s['heldout_images']} held-out images are few: the standard error of their accuracy is "
            f"{s['heldout_standard_error']:.1f} points"
        )
    tested = accuracies(test, s["classes"], "{value:.2f} % {name}")
    lines["test accuracy"] = f"{tested} on {s['test_images']:,} images"
    if last := last_epoch(s):
        lines["last epoch"] = last
    if s["budget"] is not None:
        words, key = KEPT[s["budget"]]
        lines[words] = f"{percent(s[key])}, asked for {100 * s['keep_ratio']:g} %"
    lines["inference FLOPs"] = (
        f"{percent(s['flops_ratio'])} of dense, {percent(s['flops_ratio_padded'])} {padding}; "
        f"parameters {percent(s['params_kept'])}"
    )
    lines["training FLOPs"] = (
        f"{percent(s['train_flops_ratio'])} of dense training for as many epochs, "
        f"{percent(s['train_flops_executed'])} with padding"
    )
    rest = s["seconds"] - s["train_seconds"]
    lines["time"] = (
        f"{duration(s['seconds'])}: {duration(s['train_seconds'])} of training steps, {duration(rest)} of evaluating, "
        "choosing and saving"
    )
    lines["run folder"] = s["run"]
    below = Path(config.run.log_dir).resolve() in Path(s["run"]).resolve().parents  # not if somebody has moved it
    curves = config.run.log_dir if below else s["run"]
    lines["curves"] = f"tensorboard --logdir {shlex.quote(curves)} --host 127.0.0.1"
    lines["same number again"] = f"python main.py --evaluate --resume {best}{named_again(config.model.arch)}"
    if s["method"] != "released":  # its dropped channels take part in the result
        lines["take it home"] = f"python -m tools.export {best}{named_again(config.model.arch)}"
    epochs = "1 epoch" if s["epochs"] == 1 else f"{s['epochs']} epochs"
    return [f"trained {s['arch']} on {s['set']}: {epochs}", *(f"{name:17}  {text}" for name, text in lines.items())]


def origin(summary: dict[str, Any]) -> str:
    """Which epoch the result is from, and why it is that one."""
    epoch, epochs, phase = (summary[name] for name in ("best_epoch", "epochs", "best_phase"))
    where = f"epoch {epoch} of {epochs}"
    if phase == "search":
        end = "the end of the search" if summary["choice"] else "pruned, before fine-tuning"
        if epoch == epochs:
            return f"{where}, the end of the search" if summary["choice"] else f"{where}, after which it was pruned"
        return f"{where}, {end}: fine-tuning did not improve on held-out images"
    if summary["heldout_top1"] is None:
        return f"{where}, the last one: no images are held out to choose another"
    if phase == "finetune":
        return f"{where}, fine-tuning: the best on held-out images since the end of the search"
    return f"{where}, the best of {epochs} on held-out images"


def last_epoch(summary: dict[str, Any]) -> str:
    """The accuracies of the last epoch where the result has others; "" where it has not."""
    told = [("held-out", "heldout_top1"), ("test", "test_top1")]
    last = [(name, summary[f"last_{key}"], summary[key]) for name, key in told]
    if all(value in (None, result) for _, value, result in last):
        return ""
    words = " and ".join(f"{value:.2f} % on {name}" for name, value, _ in last if value is not None)
    return f"{words} images; it is not the result"


def percent(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"


def duration(seconds: float) -> str:
    """4.2 s, 41 s, 2 min 41 s or 1 h 2 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
