"""A report on runs: `python -m tools.report RUN [RUN ...] --out DIR`.

It writes one HTML page that needs no network and no other file (DIR/index.html), and its pictures as PNG files beside
it. `--table` prints a comparison as plain text instead. Only the folders of the runs are read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tools.command_line import ToolParser, aligned, exit_code_of, import_with_matplotlib
from tools.report_page import Picture, element, gallery, page, percent, run_section, table
from tools.run_facts import RunFacts
from tools.run_files import by_cost, comparison_notes, dense_twin, differing_options, read_runs
from tools.step_times import StepTimes, measure
from utils.errors import UserError

UNKNOWN = "-"


def read_command_line(argv: Sequence[str]) -> argparse.Namespace:
    """Raises: UserError for every mistake."""
    about = "Makes a page about one run, or about several to compare them. Only their folders are read."
    parser = ToolParser("tools.report", about)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, as main.py prints it")
    about = "folder of index.html and its pictures; default: RUN/report for a single run"
    parser.add_argument("--out", type=Path, metavar="DIR", help=about)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--html", action="store_true", help="write the page (the default)")
    form.add_argument("--table", action="store_true", help="print a table as plain text and write nothing")
    about = "time the parts of a training step of each run on this machine, beside a dense and a thin step"
    parser.add_argument("--measure", action="store_true", help=about)
    parser.add_arch()
    settings = parser.parse_args(argv)
    if settings.table and settings.out:
        raise UserError("--table prints a table and writes no file; leave out --out or --table")
    if not settings.table and settings.out is None:
        if len(settings.runs) > 1:
            raise UserError("a report on several runs belongs to none of them; say where it goes with --out DIR")
        settings.out = Path(settings.runs[0]) / "report"
    return settings


# ---- the comparison ----


def comparison(runs: Sequence[RunFacts]) -> list[dict[str, str]]:
    """One row of texts for each run: name, result, costs, and the options that differ."""

    def told(value: float | None, form: str) -> str:
        return UNKNOWN if value is None else form.format(value)

    rows = []
    for run in runs:
        progress = "" if run.finished else f" (unfinished: {run.epochs} of {run.planned_epochs} epochs)"
        rows.append(
            {
                "run": f"{run.name}{progress}",
                "test accuracy": told(run.accuracy, "{:.2f} %"),
                "95 % interval": UNKNOWN if run.interval is None else "{:.1f} to {:.1f} %".format(*run.interval),
                "kept channels": UNKNOWN if run.kept is None else percent(run.kept),
                "inference FLOPs": UNKNOWN if run.flops_ratio is None else percent(run.flops_ratio),
                "training FLOPs": told(run.dense_epochs, "{:.2f} epochs"),
                "seconds": told(run.seconds, "{:.0f}"),
            }
        )
    for key, values in differing_options(runs).items():
        for row, value in zip(rows, values, strict=True):
            row[key] = UNKNOWN if value is None else value
    return rows


def text_report(runs: Sequence[RunFacts], times: Sequence[StepTimes | str | None]) -> str:
    """The comparison for a terminal, with the measured steps if there are any."""
    parts = [aligned(comparison(runs)), "\n".join(comparison_notes(runs))]
    for run, measured in zip(runs, times, strict=True):
        if isinstance(measured, StepTimes):
            parts.append(f"One training step of {run.name}:\n\n{measured.text()}")
        elif measured:
            parts.append(f"The step of {run.name} was not measured, because {measured}.")
    return "\n\n".join(parts)


# ---- the pictures ----


def figures_module() -> ModuleType:
    """Raises: UserError without matplotlib, which only the pictures need."""
    instead = ", or pass --table for a report without pictures"
    return import_with_matplotlib("tools.report_figures", "a report with pictures", instead)


def run_pictures(
    run: RunFacts, dense: RunFacts | None, times: StepTimes | str | None, prefix: str = ""
) -> list[Picture]:
    """All pictures of one run that its folder has the numbers for."""
    draw, made = figures_module(), []

    def add(stem: str, figure: object, alt: str, caption: str = "") -> None:
        made.append(Picture(f"{prefix}{stem}", draw.png(figure), alt, caption))

    if run.history:
        add("accuracy", draw.curves(run, "top1"), f"Accuracy of {run.name} over {run.epochs} epochs")
        add("loss", draw.curves(run, "loss"), f"Loss of {run.name} over {run.epochs} epochs")
    if run.layers:
        so_far = "" if run.finished else "The run is not finished, so this is the best subnet so far."
        add("layers", draw.layer_bars(run), f"Kept channels of {len(run.layers)} layers of {run.name}", so_far)
    if run.scores is not None:
        about = "The colour is the share of a layer's channels that a subnet drawn at that time keeps on average."
        add("layers_over_time", draw.layers_over_time(run), f"Kept share of each layer of {run.name} over time", about)
    if (costs := run.costs(dense)) and not run.is_dense:
        told = ", ".join(f"{name} {percent(ratio)}" for name, ratio in costs.items())
        add("cost", draw.cost_bars(costs), f"Cost of {run.name} against dense: {told}")
    if run.seconds:
        told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in run.parts.items())
        add("seconds", draw.seconds_bar(run.parts), f"Where the seconds of {run.name} went: {told}")
    if run.scores is not None:
        about = (
            "A row is a layer, stretched to the same length. Its channels are in the order of their scores at the end, "
            "the same in all panels. A score is the probability that the channel is kept."
        )
        add("score_map", draw.score_maps(run), f"Scores of {run.name} at several times, and the chosen subnet", about)
    if isinstance(times, StepTimes):
        add("step", draw.step_bars(times), f"Parts of one training step of {run.name}, of a dense and a thin network")
    return made


def comparison_pictures(runs: Sequence[RunFacts]) -> list[Picture]:
    """Accuracy against costs, and the curves of all runs in one picture."""
    draw, made = figures_module(), []
    flops = [None if run.flops_ratio is None else 100 * run.flops_ratio for run in runs]
    axes = [
        ("inference FLOPs", flops, "inference FLOPs, % of the dense network"),
        ("training FLOPs", [run.dense_epochs for run in runs], "training FLOPs, epochs of dense training"),
        ("seconds", [run.seconds for run in runs], "seconds of the whole run"),
    ]
    for what, costs, unit in axes:
        figure = draw.scatter(runs, costs, what, unit)
        made.append(Picture(f"compare_{what.replace(' ', '_')}", draw.png(figure), f"Accuracy against {what}"))
    judge = "heldout" if all(run.column("heldout_top1")[1] for run in runs) else "test"
    word = {"heldout": "held-out", "test": "test"}[judge]
    figure = draw.overlaid(runs, f"{judge}_top1", f"Accuracy on {word} images", "top-1 accuracy, %")
    made.append(Picture("compare_accuracy", draw.png(figure), f"Accuracy of all runs on {word} images over the epochs"))
    figure = draw.overlaid(runs, "train_loss", "Loss on training images", "cross-entropy")
    made.append(Picture("compare_loss", draw.png(figure), "Training loss of all runs over the epochs"))
    return made


# ---- the page ----


def write_page(runs: Sequence[RunFacts], times: Sequence[StepTimes | str | None], out: Path) -> int:
    """Writes index.html and the pictures; returns how many.

    Raises: UserError without matplotlib, or for a folder that cannot be written.
    """
    body, pictures = [], []
    if len(runs) > 1:
        shared = comparison_pictures(runs)
        pictures += shared
        body += [
            table(
                [{"#": str(n)} | row for n, row in enumerate(comparison(runs), start=1)],
                marked=list(differing_options(runs)),
                names=2,
            ),
            *(element("p", note, class_="soft") for note in comparison_notes(runs)),
            gallery(shared),
            element("h2", "The runs one by one"),
        ]
    for number, (run, measured) in enumerate(zip(runs, times, strict=True), start=1):
        dense = dense_twin(run, runs)
        own = run_pictures(run, dense, measured, f"run_{number}_" if len(runs) > 1 else "")
        pictures += own
        section = run_section(run, dense, own, measured)
        if len(runs) > 1:
            section = element("details", element("summary", f"{number} {run.name}"), section)
        body.append(section)
    title = runs[0].name if len(runs) == 1 else f"Comparison of {len(runs)} runs"
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "index.html").write_text(page(title, body), encoding="utf-8")
        for picture in pictures:
            (out / picture.file_name).write_bytes(picture.content)
    except OSError as error:
        raise UserError(f"cannot write the report to {out}: {error.strerror}; choose another --out") from error
    return len(pictures)


def run(argv: Sequence[str]) -> None:
    settings = read_command_line(argv)
    if not settings.table:
        figures_module()  # a package that is missing is told before minutes of measuring
    runs = by_cost(read_runs(settings.runs))
    times: list[StepTimes | str | None] = [None] * len(runs)
    if settings.measure:
        for number, one in enumerate(runs):
            print(f"measuring a training step of {one.name}", file=sys.stderr, flush=True)
            times[number] = measure(one)
    if settings.table:
        print(text_report(runs, times))
        return
    count = write_page(runs, times, settings.out)
    print(f"wrote {settings.out / 'index.html'} and {count} pictures beside it")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 a user's mistake."""
    return exit_code_of(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
