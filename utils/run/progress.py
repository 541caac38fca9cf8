"""Progress of one epoch: a bar on a terminal, plain dated lines everywhere else."""

import sys
from collections.abc import Mapping
from datetime import datetime
from time import monotonic
from typing import TextIO

from tqdm import tqdm

# A bar may show new values this often; each time the caller has to wait for the device.
BAR_SECONDS = 0.5


class Progress:
    """Context manager that shows how far one epoch has come.

        with Progress(len(batches), "epoch 3/10") as progress:
            for images, labels in batches:
                loss = train_step(images, labels)
                progress.update(len(images), {"loss": loss.item()} if progress.wants_values() else None)

    Off a terminal it prints one line every `every_steps` steps, and one for the last step:

        2026-01-31 12:00:00 epoch 3/10 step 50/156 loss 1.234 top1 45.60 1234 images/s, 0:12 left

    Args:
        total: steps in the epoch.
        description: what is counted, such as "epoch 3/10".
        initial: steps done before, when an epoch is continued.
        every_steps: steps between two plain lines; a bar on a terminal goes by time instead.
        stream: where to write; standard output if not given.
    """

    def __init__(
        self,
        total: int,
        description: str,
        initial: int = 0,
        every_steps: int = 50,
        stream: TextIO | None = None,
    ) -> None:
        self.total = total
        self.description = description
        self.step = self._initial = initial
        self._stream = stream or sys.stdout
        self._num_images = 0
        self._bar: tqdm | None = None
        self._every_steps = every_steps
        self._shows_next: bool | None = None

    def __enter__(self) -> "Progress":
        if self._stream.isatty():
            self._bar = tqdm(
                total=self.total,
                desc=self.description,
                initial=self.step,
                file=self._stream,
                unit="step",
                dynamic_ncols=True,
            )
        self._start = self._last_shown = monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def wants_values(self) -> bool:
        """Whether the next update will be shown; only then is it worth reading values from the device."""
        # Decided once a step, so that the clock cannot change the answer between this call and the update.
        if self._shows_next is None:
            if self._bar is not None:
                is_due = monotonic() - self._last_shown >= BAR_SECONDS
            else:
                is_due = (self.step + 1) % self._every_steps == 0
            self._shows_next = is_due or self.step + 1 == self.total
        return self._shows_next

    def update(self, num_images: int, values: Mapping[str, float] | None = None) -> None:
        """Count one step.

        Args:
            num_images: images that the step has read.
            values: plain numbers to show, by name; not used unless `wants_values()`.
        """
        shows = self.wants_values()
        self._shows_next = None
        self.step += 1
        self._num_images += num_images
        if self._bar is not None:
            self._bar.update()
        if shows:
            self._show(values or {})

    def _show(self, values: Mapping[str, float]) -> None:
        self._last_shown = monotonic()
        seconds = max(self._last_shown - self._start, 1e-9)
        # Four digits keep their width while a number changes, so the eye can follow it.
        shown = {name: f"{value:#.4g}" for name, value in values.items()}
        rate = f"{self._num_images / seconds:.0f} images/s"
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join([*(f"{name} {value}" for name, value in shown.items()), rate]))
            return
        seconds_left = seconds / (self.step - self._initial) * (self.total - self.step)
        words = [self.description, f"step {self.step}/{self.total}"]
        words += [f"{name} {value}" for name, value in shown.items()]
        announce(" ".join([*words, f"{rate}, {_clock(seconds_left)} left"]), self._stream)


def announce(text: str, stream: TextIO | None = None) -> None:
    """Print one dated line; a progress bar on the same terminal moves below it."""
    tqdm.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}", file=stream or sys.stdout)
    (stream or sys.stdout).flush()


def _clock(seconds: float) -> str:
    """0:12, 12:34 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
