"""Progress lines and bars, and stopping on a signal."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from utils.run import progress
from utils.run.progress import Progress, announce
from utils.run.signals import StopRequest

DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands at its only entry."""
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


def test_plain_lines_come_every_few_steps_and_at_the_end(clock: list[float]) -> None:
    stream = io.StringIO()
    asked = []
    with Progress(10, "epoch 3/4", every_steps=3, stream=stream) as bar:
        for step in range(10):
            clock[0] += 4.0
            asked.append(bar.wants_values())
            bar.update(32, {"loss": 1.23456 + step, "top1": 45.6})
    lines = stream.getvalue().splitlines()
    assert [index + 1 for index, wants in enumerate(asked) if wants] == [3, 6, 9, 10]
    assert len(lines) == 4
    assert re.fullmatch(DATE + r"epoch 3/4 step 3/10 loss 3\.235 top1 45\.60 8 images/s, 0:28 left", lines[0])
    assert re.fullmatch(DATE + r"epoch 3/4 step 10/10 loss 10\.23 top1 45\.60 8 images/s, 0:00 left", lines[-1])


def test_the_answer_of_a_bar_holds_until_the_update(clock: list[float]) -> None:
    with Progress(10, "epoch", stream=Terminal()) as bar:
        clock[0] += 0.4
        assert not bar.wants_values()
        clock[0] += 0.4
        bar.update(1)
        assert bar.wants_values()


def test_a_continued_epoch_counts_only_its_own_steps_for_speed(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(100, "epoch", initial=98, every_steps=1, stream=stream) as bar:
        clock[0] += 60.0
        bar.update(120)
        clock[0] += 60.0
        bar.update(120)
    first, second = stream.getvalue().splitlines()
    assert first.endswith("epoch step 99/100 2 images/s, 1:00 left")
    assert second.endswith("epoch step 100/100 2 images/s, 0:00 left")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_times_read_like_a_clock(seconds: float, text: str) -> None:
    assert progress._clock(seconds) == text


def test_a_terminal_gets_a_bar_with_values(clock: list[float]) -> None:
    stream = Terminal()
    with Progress(2, "epoch 1/2", stream=stream) as bar:
        for _ in range(2):
            clock[0] += 1.0
            assert bar.wants_values()
            bar.update(32, {"loss": 1.5})
        announce("saved", stream)
    text = stream.getvalue()
    assert "epoch 1/2: 100%" in text
    assert "2/2" in text
    assert "loss 1.500, 32 images/s" in text
    assert re.search(r"\r" + DATE + r"saved\n", text), "the line must start where the bar was wiped away"


def test_a_bar_reads_values_at_most_twice_a_second(clock: list[float]) -> None:
    with Progress(1000, "epoch", stream=Terminal()) as bar:
        shown = 0
        for _ in range(500):
            clock[0] += 0.01
            shown += bar.wants_values()
            bar.update(1)
    assert 8 <= shown <= 10


def test_announcements_are_dated_lines_on_standard_output(capsys: pytest.CaptureFixture) -> None:
    announce("run folder: here")
    assert re.fullmatch(DATE + r"run folder: here\n", capsys.readouterr().out)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_and_handlers_come_back(number: int, exit_code: int) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        assert stop.signal is None
        assert stop.exit_code == 0
        os.kill(os.getpid(), number)
        assert stop.signal == number
        assert stop.exit_code == exit_code
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(RuntimeError), StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_ends_the_process_at_once() -> None:
    script = """
        import os, signal
        from utils.run.signals import StopRequest
        with StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            print("too late", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    project = Path(__file__).resolve().parents[2]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert result.stdout == "still here\n"
    assert result.stderr == ""
    assert result.returncode == -signal.SIGINT
