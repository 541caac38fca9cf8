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
from utils.run.progress import Progress, Stage, announce
from utils.run.signals import StopRequest

DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands at its only entry."""
    times = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: times[0])
    return times


def test_plain_lines_come_every_few_steps_and_at_the_end(now: list[float]) -> None:
    stream = io.StringIO()
    asked = []
    with Progress([Stage("search", 4, 10, 32)], every_steps=3, stream=stream) as shown:
        shown.begin_epoch(3)
        for step in range(10):
            now[0] += 4.0
            asked.append(shown.wants_values())
            shown.update(32, {"loss": 1.23456 + step, "top1": 45.6})
    lines = stream.getvalue().splitlines()
    assert [index + 1 for index, wants in enumerate(asked) if wants] == [3, 6, 9, 10]
    assert len(lines) == 4
    rest = r"top1 45\.60 8 images/s, {} left of this run"
    assert re.fullmatch(DATE + r"search epoch 4/4 step 3/10 loss 3\.235 " + rest.format("0:28"), lines[0])
    assert re.fullmatch(DATE + r"search epoch 4/4 step 10/10 loss 10\.23 " + rest.format("0:00"), lines[-1])


def seconds_left(text: str) -> list[int]:
    return [60 * int(m) + int(s) for m, s in re.findall(r"(\d+):(\d\d) left", text)]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_stage_that_ends_early_leaves_its_epochs_to_the_next(now: list[float], stream: type[io.StringIO]) -> None:
    """Three epochs of 4 steps of 1 s become one, and one of 2 steps of 2 s and half the images three."""
    out = stream()
    with Progress([Stage("search", 3, 4, 8), Stage("finetune", 1, 2, 4)], every_steps=4, stream=out) as shown:
        shown.begin_epoch(0)
        for _ in range(4):
            now[0] += 1.0
            shown.update(8, {})
        shown.plan([Stage("search", 1, 4, 8), Stage("finetune", 3, 2, 4)])
        shown.begin_epoch(1)
        for _ in range(2):
            now[0] += 2.0
            shown.update(4, {})
        text = out.getvalue()
    assert "finetune epoch 2/4" in text
    assert seconds_left(text)[-1] == 8  # two epochs of 2 steps of 2 s
    if stream is Terminal:
        assert "60%" in text  # 6 of 10 steps


def test_the_time_left_is_that_of_the_whole_run(now: list[float]) -> None:
    """Two epochs of 5 steps of 1 s, then three of 2 steps of 3 s and twice the images; ends of epochs of 10 s."""
    stream = io.StringIO()
    with Progress([Stage("search", 2, 5, 8), Stage("finetune", 3, 2, 16)], every_steps=1, stream=stream) as shown:
        for epoch in range(5):
            now[0] += 70.0 if epoch == 2 else 10.0  # a choice between the stages is no end of an epoch
            shown.begin_epoch(epoch)
            for _ in range(5 if epoch < 2 else 2):
                now[0] += 1.0 if epoch < 2 else 3.0
                shown.update(8)
    text = stream.getvalue()
    assert seconds_left(text) == [
        *(9 + 12, 8 + 12, 7 + 12, 6 + 12, 5 + 12),  # a step of fine-tuning as long as two of the search; no end known
        *(4 + 12 + 40, 3 + 12 + 40, 2 + 12 + 40, 1 + 12 + 40, 12 + 40),
        *(15 + 30, 12 + 30, 9 + 20, 6 + 20, 3 + 10, 0 + 10),
    ]
    named = [" ".join(line.split()[2:5]) for line in text.splitlines()[::5]]
    assert named == ["search epoch 1/5", "search epoch 2/5", "finetune epoch 3/5", "finetune epoch 5/5"]


def test_a_run_that_goes_on_counts_only_its_own_steps_for_speed(now: list[float]) -> None:
    stream = io.StringIO()
    with Progress([Stage("search", 3, 100, 120)], every_steps=1, stream=stream) as shown:
        shown.begin_epoch(1, step=98)
        for _ in range(2):
            now[0] += 60.0
            shown.update(120)
        now[0] += 30
        shown.begin_epoch(2)
        now[0] += 60.0
        shown.update(120)
    first, second, third = stream.getvalue().splitlines()
    assert first.endswith("search epoch 2/3 step 99/100 2 images/s, 1:41:00 left of this run")
    assert second.endswith("search epoch 2/3 step 100/100 2 images/s, 1:40:00 left of this run")
    assert third.endswith("search epoch 3/3 step 1/100 2 images/s, 1:39:30 left of this run")


def test_the_answer_of_a_bar_holds_until_the_update(now: list[float]) -> None:
    with Progress([Stage("search", 1, 10, 1)], stream=Terminal()) as shown:
        shown.begin_epoch(0)
        now[0] += 0.4
        assert not shown.wants_values()
        now[0] += 0.4
        shown.update(1)
        assert shown.wants_values()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_times_read_like_a_clock(seconds: float, text: str) -> None:
    assert progress.clock(seconds) == text


def test_a_terminal_gets_one_bar_for_the_whole_run(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with Progress([Stage("search", 1, 2, 32), Stage("finetune", 1, 4, 16)], stream=stream) as shown:
        for epoch, steps in enumerate((2, 4)):
            shown.begin_epoch(epoch)
            for _ in range(steps):
                now[0] += 1.0
                assert shown.wants_values()
                shown.update(32, {"loss": 1.5})
            announce("saved", stream)
    states = [state for state in re.split(r"[\r\n]+", stream.getvalue()) if "left" in state]
    assert re.fullmatch(r"search epoch 1/2  17%\|\S* *\| 0:03 left, loss 1\.500, 32 images/s", states[0])
    assert any(state.startswith("search epoch 1/2  33%") for state in states)
    assert any(state.startswith("finetune epoch 2/2  50%") for state in states)
    assert re.fullmatch(r"finetune epoch 2/2 100%\|\S+\| 0:00 left, loss 1\.500, 32 images/s", states[-1])
    assert stream.getvalue().count("\n") == 3, "two lines, and the end of a single bar"
    assert re.search(r"\r" + DATE + r"saved\n", stream.getvalue()), "the line must start where the bar was wiped away"


def test_the_bar_of_a_run_that_goes_on_starts_where_it_was(now: list[float]) -> None:
    stream = Terminal()
    with Progress([Stage("search", 2, 50, 1), Stage("finetune", 2, 100, 1)], stream=stream) as shown:
        shown.begin_epoch(2, step=49)
        now[0] += 1
        shown.update(1)
    assert "finetune epoch 3/4  50%" in stream.getvalue()


@pytest.mark.parametrize(("columns", "words"), [(64, "loss 1.500"), (80, "top1 45.60"), (110, "9 images/s")])
def test_a_narrow_terminal_shows_fewer_values(
    now: list[float], monkeypatch: pytest.MonkeyPatch, columns: int, words: str
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    with Progress([Stage("search", 10000, 1, 9)], stream=stream) as shown:
        shown.begin_epoch(8999)
        now[0] += 1.0
        shown.update(9, {"loss": 1.5, "top1": 45.6})
    last = re.split(r"[\r\n]+", stream.getvalue().strip())[-1]
    assert last.endswith(words)
    assert len(re.sub(r"\|.*?\|", "||", last)) + 6 <= columns


def test_a_bar_reads_values_at_most_twice_a_second(now: list[float]) -> None:
    with Progress([Stage("search", 1, 1000, 1)], stream=Terminal()) as bar:
        bar.begin_epoch(0)
        shown = 0
        for _ in range(500):
            now[0] += 0.01
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
