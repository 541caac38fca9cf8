"""The page of a report: HTML that needs nothing but itself. Every text from a run is escaped where it becomes HTML."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tools.run_facts import COUNTED, RunFacts
from tools.step_times import StepTimes
from trainers.devices import thread_words

CSS = """\
:root { color-scheme: light; --ink: #222; --soft: #5c5c5c; --line: #dcdcdc; --tint: #fdf3e4; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1200px; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
.soft, figcaption, footer { color: var(--soft); font-size: .875rem; }
.badge { background: var(--tint); border: 1px solid #e0b36a; border-radius: 4px; padding: .05rem .5rem;
  font-size: .875rem; font-weight: 600; white-space: nowrap; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem 1.5rem;
  margin: 1.25rem 0; padding: 1rem 0; border: solid var(--line); border-width: 1px 0; }
.facts dt { color: var(--soft); font-size: .8125rem; }
.facts dd { margin: 0; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.facts dd small { display: block; font-size: .8125rem; color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 2rem 2.5rem;
  align-items: start; margin-top: 1.5rem; }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; max-width: 560px; height: auto; }
.tables { display: flex; flex-wrap: wrap; gap: .5rem 4rem; margin-top: 2rem; }
.tables > * { max-width: 100%; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .35rem; white-space: nowrap; }
th, td { padding: .35rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; }
thead th { white-space: normal; }
th.name, td.name { text-align: left; }
td.name:nth-child(2) { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; max-width: 18rem; }
th.option, td.option { background: var(--tint); }
details { border-top: 1px solid var(--line); padding: .75rem 0; }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; font-size: 1.1rem; font-weight: 600; overflow-wrap: anywhere; }
footer { margin-top: 3rem; }
"""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, *children: str, **attributes: str) -> Html:
    """An element; children that are not `Html` are escaped, and so are the attributes (`class_` is class)."""
    inside = "".join(child if isinstance(child, Html) else html.escape(child) for child in children)
    given = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{inside}</{name}>")


@dataclass(frozen=True)
class Picture:
    """A picture of the page and the name of its file.

    Attributes:
        alt: what it shows, for readers who cannot see it.
        caption: one sentence below it, or none.
    """

    stem: str
    content: bytes = field(repr=False)
    alt: str
    caption: str = ""

    @property
    def file_name(self) -> str:
        return f"{self.stem}.png"


# ---- numbers in words ----


def percent(ratio: float | None, digits: int = 1) -> str:
    """A fraction as a percentage; "unknown" for None."""
    return "unknown" if ratio is None else f"{100 * ratio:.{digits}f} %"


def duration(seconds: float | None) -> str:
    """Seconds in the units that a reader thinks in."""
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest} s" if minutes < 100 else f"{round(seconds / 60) // 60} h {round(seconds / 60) % 60} min"
    )


def accuracy_words(run: RunFacts) -> str:
    """How many test images are classified correctly, with the interval if it is known."""
    count = run.summary.get("test_images")
    images = "the test images" if run.interval is None else f"{count:,} test images"
    words = f"{run.accuracy:.2f} % of {images} correctly"
    if run.interval is not None:
        words += " (95 % interval {:.1f} % to {:.1f} %)".format(*run.interval)
    return words


def sentences(run: RunFacts, dense: RunFacts | None) -> list[str]:
    """The facts about one run in words, as plain text."""
    options = run.options
    width = "" if options["width_mult"] == 1 else f" at {options['width_mult']:g} times its width"
    told = [f"{options['arch']}{width} was trained on {options['set']} with method {options['method']}."]
    if not run.finished:
        told.append(f"The run is not finished: {run.epochs} of {run.planned_epochs} epochs are done.")
    if run.kept is not None and not run.is_dense:
        budget = f" (budget: {100 * options['keep_ratio']:g} % of the {COUNTED[options['budget']]})"
        told.append(f"It keeps {percent(run.kept)} of the channels{'' if options['method'] == 'dense' else budget}.")
    if run.accuracy is not None:
        told.append(f"It classifies {accuracy_words(run)}.")
        told.append(_origin(run))
    if run.flops_ratio is not None and not run.is_dense:
        params = run.summary.get("params_kept")
        left = "" if params is None else f" and has {percent(params)} of its parameters"
        told.append(f"It needs {percent(run.flops_ratio)} of the FLOPs of the dense network{left}.")
    if run.seconds is not None:
        told.append(
            f"Training {'took' if run.finished else 'has taken'} {duration(run.seconds)}, of which "
            f"{duration(run.train_seconds)} were training steps."
        )
    if run.train_flops_ratio is not None:
        told.append(f"It cost {percent(run.train_flops_ratio)} of the FLOPs of dense training for as many epochs.")
    if dense is not None:
        told.append(
            f'The dense run "{dense.name}" took {duration(dense.seconds)} on the same machine, of which '
            f"{duration(dense.train_seconds)} were training steps."
        )
    return told


def _origin(run: RunFacts) -> str:
    """Which epoch the result is from."""
    if not run.finished:
        return f"This is the network after epoch {run.result_epoch}, the last one that was tested."
    later = run.stretches and run.stretches[-1].phase == "finetune"
    if later and run.result_phase == "search":
        return (
            f"This is the subnet as it was chosen after epoch {run.result_epoch}; the fine-tuning up to epoch "
            f"{run.epochs} did not improve it on held-out images."
        )
    return f"This is the network after epoch {run.result_epoch} of {run.epochs}."


def machine_words(run: RunFacts) -> str:
    """What the run was made with, as far as it is known."""
    facts = run.environment
    processor = facts.get("gpu") or facts.get("cpu") or "an unknown processor"
    threads, commit = facts.get("num_threads"), facts.get("git_commit")
    told = [processor, thread_words(threads) if threads else ""]
    told += [run.options["precision"], f"torch {facts['torch']}" if facts.get("torch") else ""]
    told += [f"commit {commit[:12]}{' with changes' if facts.get('git_dirty') else ''}" if commit else ""]
    return f"Made with {', '.join(filter(None, told))}, seed {run.options['seed']}."


# ---- parts of the page ----


def tiles(run: RunFacts) -> Html:
    """The five numbers that people ask for first."""
    interval = "" if run.interval is None else "{:.1f} to {:.1f} %".format(*run.interval)
    facts = [
        ("test accuracy", "unknown" if run.accuracy is None else f"{run.accuracy:.2f} %", interval),
        ("inference FLOPs", percent(run.flops_ratio), "of dense"),
        ("parameters", percent(run.summary.get("params_kept") if run.finished else None), "of dense"),
        ("channels kept", percent(run.kept), ""),
        ("time", duration(run.seconds), "" if run.finished else "so far"),
    ]
    return element(
        "dl",
        *(
            element("div", element("dt", name), element("dd", value, element("small", unit)))
            for name, value, unit in facts
        ),
        class_="facts",
    )


def table(rows: Sequence[Mapping[str, str]], caption: str = "", marked: Sequence[str] = (), names: int = 1) -> Html:
    """Rows of texts by column.

    Args:
        marked: columns that are highlighted.
        names: how many columns, the first ones, are set flush left.
    """
    columns = list(rows[0])
    classes = ["option" if key in marked else "name" if n < names else "number" for n, key in enumerate(columns)]

    def cells(kind: str, texts: Sequence[str]) -> Html:
        return element("tr", *(element(kind, text, class_=c) for text, c in zip(texts, classes, strict=True)))

    body = element("tbody", *(cells("td", list(row.values())) for row in rows))
    head = element("thead", cells("th", columns))
    title = element("caption", caption) if caption else Html()
    return element("div", element("table", title, head, body), class_="wide")


def gallery(pictures: Sequence[Picture]) -> Html:
    """Pictures side by side where there is room."""
    return element("div", *map(_figure, pictures), class_="figures")


def _figure(picture: Picture) -> Html:
    data = base64.b64encode(picture.content).decode("ascii")
    image = Html(f'<img src="data:image/png;base64,{data}" alt="{html.escape(picture.alt)}">')
    return element("figure", image, *([element("figcaption", picture.caption)] if picture.caption else []))


def run_section(
    run: RunFacts, dense: RunFacts | None, pictures: Sequence[Picture], times: StepTimes | str | None
) -> Html:
    """Everything about one run.

    Args:
        times: the measured step, or why it could not be measured; None: nobody asked for it.
    """
    parts = []
    if not run.finished:
        words = f"unfinished: {run.epochs} of {run.planned_epochs} epochs"
        parts.append(element("p", element("span", words, class_="badge")))
    missing = list(run.missing)
    if dense is None and run.finished and not run.is_dense:
        missing.append(
            "The time against dense is not known. Add a finished dense run of the same network, images, batch size, "
            "number of epochs and machine to the command to see it."
        )
    if isinstance(times, str):
        missing.append(f"The step was not measured, because {times}.")
    parts += [
        element("p", " ".join(sentences(run, dense))),
        tiles(run),
        gallery(pictures),
        _number_tables(run, dense, times),
        *(element("p", sentence, class_="soft") for sentence in missing),
        element("p", machine_words(run), class_="soft"),
    ]
    return Html("".join(parts))


def _number_tables(run: RunFacts, dense: RunFacts | None, times: StepTimes | str | None) -> Html:
    made = []
    if costs := run.costs(dense):
        rows = [{"cost": name, "of dense": percent(ratio)} for name, ratio in costs.items()]
        made.append(table(rows, "Cost against the dense network"))
    if parts := run.parts if run.seconds else {}:
        rows = [
            {"part": name, "seconds": f"{seconds:.1f}", "share": percent(seconds / run.seconds)}
            for name, seconds in parts.items()
        ]
        made.append(table(rows, "Where the seconds went"))
    if isinstance(times, StepTimes):
        step = table(times.rows(), "One training step, in ms")
        made.append(element("div", step, element("p", times.note, class_="soft")))
    return element("div", *made, class_="tables")


def page(title: str, body: Sequence[Html]) -> str:
    """The whole document."""
    head = element(
        "head",
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", Html(CSS)),
    )
    footer = element(
        "footer",
        "FLOPs are multiply-adds of convolutions and linear layers as they are executed. Training FLOPs include "
        "choosing the subnet and held-out images. Seconds are those of a clock, so whatever else ran on the machine "
        "counts, and epochs of training include waiting for images. Intervals are those of Wilson for a binomial "
        "share. They tell how far chance in the choice of the test images can move the accuracy, not how far another "
        "seed would.",
    )
    return (
        f"<!DOCTYPE html>\n{element('html', head, element('body', element('h1', title), *body, footer), lang='en')}\n"
    )
