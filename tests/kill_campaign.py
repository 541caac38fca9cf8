"""Kills runs at random moments and compares what they end with against runs that nothing happened to.

    python -m tests.kill_campaign --kills 50 [--seed 0] [--folder FOLDER]

Runs of several kinds take their turns. Each is started in a process of its own, killed with SIGKILL after a random time
and resumed, up to three times, and then finishes. last.pt, best.pt, results.csv, scores.npz and summary.json have to be
those of the untouched run, bit by bit apart from clocks. A line is printed for each run, and the last one counts.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import main as program
from tests.faults.machine import folder_of, unlike, words
from tests.tiny import make_images

STREAMED = {"image_size": 128, "batch_size": 4, "finetune_batch_size": 4, "arch": "resnet18", "width_mult": 0.03}
KINDS: dict[str, dict[str, object]] = {
    "in memory": {"epochs": 2, "finetune_epochs": 2},
    "units leave early": {"epochs": 3, "score_lr": 0.3, "keep_ratio": 0.2, "budget_schedule": "cubic"},
    "streamed, no workers": STREAMED,
    "streamed, 2 workers": {**STREAMED, "workers": 2},
}
KILLS_OF_A_RUN = 3
RESTARTS = ("the folder", "last.pt", "the same command")


def make_streamed(root: Path) -> Path:
    """Two classes of smooth images of 150 pixels: eight training and two test images each."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 2)):
        for label in range(2):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                coarse = generator.integers(60 * label, 140 + 60 * label, (6, 6, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((150, 150)).save(folder / f"{number}.png")
    return root


def start(arguments: list[str], log: Path) -> int:
    """Runs the program in a process of its own, whose group is its own; the id of both."""
    child = os.fork()
    if child:
        with suppress(OSError):  # the child has done it
            os.setpgid(child, child)
        return child
    code = 70
    try:
        os.setpgid(0, 0)
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        code = program.main(arguments)
        sys.stdout.flush()
    finally:
        os._exit(code)


def killed_after(seconds: float, arguments: list[str], log: Path) -> bool:
    """Kills the program after a time; whether it was still running then."""
    child, end = start(arguments, log), time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if code:
                raise RuntimeError(f"the run ended by itself with {code}: {last_line(log)}")
            return False
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def last_line(log: Path) -> str:
    return (log.read_text().splitlines() or ["it printed nothing"])[-1]


def resumed_by(way: str, root: Path, first: list[str]) -> list[str]:
    """A command line that goes on with the run; all of them have to come to the same."""
    folder = folder_of(root)
    last = folder / "checkpoints/last.pt"
    if way == "last.pt" and last.is_file():
        return ["--resume", str(last)]
    return ["--resume", str(folder)] if way == "the folder" else [*first, "--resume"]


def attack(kind: str, root: Path, images: Path, seconds: float, kills: int, choose: random.Random) -> tuple[int, str]:
    """One run with up to so many kills.

    Returns: how many there were, and what went wrong; "" if nothing did.
    """
    save = {"save_steps": choose.choice([0, 1, 3])}
    first = words(root, images, **{**KINDS[kind], **save})
    arguments, done, log = first, 0, root / "log.txt"
    try:
        for _ in range(kills):
            if not killed_after(choose.uniform(0, seconds), arguments, log):
                break
            done += 1
            if list((root / "runs").rglob("summary.json")):  # it had nothing left to do but to end
                break
            if list((root / "runs").rglob("checkpoints")):
                arguments = resumed_by(choose.choice(RESTARTS), root, first)
        if not list((root / "runs").rglob("summary.json")):
            _, status = os.waitpid(start(arguments, log), 0)
            if code := os.waitstatus_to_exitcode(status):
                return done, f"the last start ended with {code}: {last_line(log)}"
        return done, ", ".join(unlike(root.parent / "untouched" / kind / "done", folder_of(root))[:5])
    except (RuntimeError, ValueError, OSError) as error:
        return done, f"{type(error).__name__}: {error}"


def campaign(kills: int, folder: Path, seed: int, tell: Callable[[str], None] = print) -> int:
    """Returns how many of the kills were made up for."""
    choose = random.Random(seed)
    torch.set_num_threads(1)
    images = {True: make_streamed(folder / "streamed"), False: make_images(folder / "images")}
    seconds: dict[str, float] = {}
    for kind, settings in KINDS.items():
        root, begin = folder / "untouched" / kind, time.monotonic()
        log = folder / f"{kind}.txt"
        _, status = os.waitpid(start(words(root, images["image_size" in settings], **settings), log), 0)
        if status:
            raise RuntimeError(f"the untouched run failed; see {log}")
        seconds[kind] = time.monotonic() - begin
        folder_of(root).rename(root / "done")
    made_up, number = 0, 0
    survived = 0
    while made_up < kills:
        kind = list(KINDS)[number % len(KINDS)]
        root = folder / f"{number}"
        wanted = min(KILLS_OF_A_RUN, kills - made_up)
        done, wrong = attack(kind, root, images["image_size" in KINDS[kind]], seconds[kind], wanted, choose)
        tell(f"run {number + 1}, {kind}: killed {done} times, {wrong or 'bit-equal'}")
        made_up, survived, number = made_up + done, survived + (0 if wrong else done), number + 1
    tell(f"{survived} of {made_up} kills left runs that ended bit-equal to untouched ones")
    return survived


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how many; 50 take some minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where the runs lie and stay; a temporary one by default")
    asked = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        return int(campaign(asked.kills, folder, asked.seed) < asked.kills)


if __name__ == "__main__":
    sys.exit(main())
