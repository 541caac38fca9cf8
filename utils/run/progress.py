"""Progress of a whole run: one bar on a terminal, plain dated lines everywhere else."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from time import monotonic
from typing import NamedTuple, TextIO

from tqdm import tqdm

# A bar may show new values this often; each time the caller has to wait for the device.
BAR_SECONDS = 0.5
NARROWEST_BAR = 6  # characters; a narrow terminal shows fewer values instead
BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {unit}"  # the unit holds the values: a postfix would bring a comma


class Stage(NamedTuple):
    """A part of a run whose steps are alike: its name, its epochs, the steps of an epoch and the images of a step."""

    name: str
    epochs: int
    steps: int
    images: int


class Progress:
    """Context manager that shows how far a run has come, and how long the rest of it will take.

        with Progress([Stage("search", 11, 70, 128), Stage("finetune", 2, 70, 128)]) as progress:
            for epoch in range(13):
                progress.begin_epoch(epoch)
                for images, labels in batches:
                    loss = train_step(images, labels)
                    progress.update(len(images), {"loss": loss.item()} if progress.wants_values() else None)

    Off a terminal it prints one line every `every_steps` steps, and one for the last step of an epoch:

        2026-01-31 12:00:00 search epoch 3/13 step 50/70 loss 1.234 top1 45.60 1234 images/s, 0:41 left of this run

    The time left is that of all steps to come and of the ends of their epochs. Steps are as fast as those of the stage
    under way have been, or, in a stage to come, slower or faster by the images that they read. The end of an epoch is
    everything between its last step and the next epoch. It counts as soon as one was seen. What happens once between
    two stages does not count.

    Args:
        stages: of the whole run, in their order.
        every_steps: steps between two plain lines; a bar on a terminal goes by time instead.
        stream: where to write; standard output if not given.
    """

    def __init__(self, stages: Sequence[Stage], every_steps: int = 50, stream: TextIO | None = None) -> None:
        self._bar: tqdm | None = None
        self.plan(stages)
        self._every_steps = every_steps
        self._stream = stream or sys.stdout
        self._shows_next: bool | None = None
        self._place = -1  # of the stage under way
        self._ended: float | None = None  # when the last step of an epoch was done
        self._end_seconds, self._num_ends = 0.0, 0

    def plan(self, stages: Sequence[Stage]) -> None:
        """Replaces the stages between two epochs, because one of them has ended before its time."""
        self._stages = stages
        self._num_epochs = sum(stage.epochs for stage in stages)
        if self._bar is not None:
            self._bar.total = self._num_steps

    @property
    def _num_steps(self) -> int:
        return sum(stage.epochs * stage.steps for stage in self._stages)

    def __enter__(self) -> "Progress":
        if self._stream.isatty():
            self._bar = tqdm(
                total=self._num_steps, file=self._stream, dynamic_ncols=True, unit="", bar_format=BAR_FORMAT
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin_epoch(self, epoch: int, step: int = 0) -> None:
        """Start an epoch, or go on with it.

        Args:
            epoch: finished epochs of the whole run.
            step: finished steps of this epoch.
        """
        place, before, done = 0, 0, 0  # epochs and steps of the stages before
        while epoch >= before + self._stages[place].epochs:
            before += self._stages[place].epochs
            done += self._stages[place].epochs * self._stages[place].steps
            place += 1
        self._stage, self._epoch, self._step = self._stages[place], epoch, step
        self._epochs_left = before + self._stage.epochs - epoch - 1  # of this stage, after this epoch
        self._start = self._last_shown = monotonic()
        self._num_images = 0
        if place != self._place:
            self._place, self._stage_seconds, self._stage_steps = place, 0.0, 0
        elif self._ended is not None:
            self._end_seconds += self._start - self._ended
            self._num_ends += 1
        self._description = f"{self._stage.name} epoch {epoch + 1}/{self._num_epochs}"
        if self._bar is not None:
            self._bar.n = self._bar.last_print_n = done + (epoch - before) * self._stage.steps + step
            self._bar.set_description_str(self._description)

    def wants_values(self) -> bool:
        """Whether the next update will be shown; only then is it worth reading values from the device."""
        # Decided once a step, so that the clock cannot change the answer between this call and the update.
        if self._shows_next is None:
            if self._bar is not None:
                is_due = monotonic() - self._last_shown >= BAR_SECONDS
            else:
                is_due = (self._step + 1) % self._every_steps == 0
            self._shows_next = is_due or self._step + 1 == self._stage.steps
        return self._shows_next

    def update(self, num_images: int, values: Mapping[str, float] | None = None) -> None:
        """Count one step.

        Args:
            num_images: images that the step has read.
            values: plain numbers to show, by name; not used unless `wants_values()`.
        """
        shows = self.wants_values()
        self._shows_next = None
        self._step += 1
        self._stage_steps += 1
        self._num_images += num_images
        if self._bar is not None:
            self._bar.update()
        if shows:
            self._show(values or {})
        if self._step == self._stage.steps:
            self._ended = monotonic()
            self._stage_seconds += self._ended - self._start

    def _show(self, values: Mapping[str, float]) -> None:
        self._last_shown = monotonic()
        seconds = max(self._last_shown - self._start, 1e-9)
        # Four digits keep their width while a number changes, so the eye can follow it.
        shown = [f"{name} {value:#.4g}" for name, value in values.items()]
        rate, left = f"{self._num_images / seconds:.0f} images/s", f"{clock(self._seconds_left(seconds))} left"
        if self._bar is None:
            words = [self._description, f"step {self._step}/{self._stage.steps}", *shown, f"{rate}, {left} of this run"]
            announce(" ".join(words), self._stream)
            return
        words = [left, *shown, rate]
        # beside the description: the percentage and the frame of the bar
        room = shutil.get_terminal_size().columns - len(self._description) - len(" 100%|| ") - NARROWEST_BAR
        while len(words) > 1 and len(", ".join(words)) > room:
            words.pop()
        self._bar.unit = ", ".join(words)
        self._bar.refresh()

    def _seconds_left(self, epoch_seconds: float) -> float:
        """Of the whole run, from a step on that is `epoch_seconds` after the start of its epoch, or of its rest."""
        steps = self._stage.steps - self._step + self._epochs_left * self._stage.steps
        for stage in self._stages[self._place + 1 :]:
            steps += stage.epochs * stage.steps * stage.images / self._stage.images
        ends = self._num_epochs - self._epoch
        seconds = (self._stage_seconds + epoch_seconds) / self._stage_steps * steps
        return seconds + ends * self._end_seconds / max(1, self._num_ends)


def announce(text: str, stream: TextIO | None = None) -> None:
    """Print one dated line; a progress bar on the same terminal moves below it."""
    tqdm.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}", file=stream or sys.stdout)
    (stream or sys.stdout).flush()


def clock(seconds: float) -> str:
    """0:12, 12:34 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
