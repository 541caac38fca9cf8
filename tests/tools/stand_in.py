"""A program that stands in for main.py, a table of its runs, and what they did."""

import csv
from pathlib import Path

PROJECT = Path(__file__).parents[2]

# Writes a run folder as main.py does. `orders.json` says by name of the run what else is to happen; `events.txt` gets a
# line for every start, end and signal.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
import yaml

arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--resume" in arguments:
    folder = Path(arguments["--resume"])
else:
    config = Path(arguments["--config"])
    options = yaml.safe_load(config.read_text())
    first = Path(options["log_dir"]) / config.stem / arguments["--name"] / "prune_rate=x"
    number, folder = 0, first
    while folder.exists():
        number += 1
        folder = first / str(number)
    (folder / "checkpoints").mkdir(parents=True)
    known = json.loads(os.environ.get("TEST_DEFAULTS", "{}"))  # main.py writes the defaults of all options
    starts = {key[2:].replace("-", "_"): arguments[key] for key in ("--pretrained", "--widths-of") if key in arguments}
    assert all(Path(file).read_text() == "trained" for file in starts.values())
    given = {**known, **options, **starts, "seed": int(arguments["--seed"])}
    (folder / "config.yaml").write_text(yaml.safe_dump(given))
options = yaml.safe_load((folder / "config.yaml").read_text())
name = next(part for part in folder.parts if "-seed" in part)
order = json.loads(Path("orders.json").read_text()).get(name, "")


def note(what):
    with open("events.txt", "a") as file:
        file.write(f"{what} {name} {os.environ['OMP_NUM_THREADS']} {os.environ['OMP_WAIT_POLICY']}\\n")


def save(number, frame):
    note("saved")
    (folder / "checkpoints" / "last.pt").write_text("")
    sys.exit(128 + number)


signal.signal(signal.SIGTERM, save)
note("resume" if "--resume" in arguments else "start")
if order == "fail":
    print("error: no luck today", file=sys.stderr)
    sys.exit(3)
if order in ("meet", "ctrl-c together"):  # goes on only if another run is under way at the same time
    deadline = time.monotonic() + 60
    while Path("events.txt").read_text().count("start") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
if order.startswith("ctrl-c"):
    os.kill(os.getppid(), signal.SIGINT)
if order == "wait" or order.startswith("ctrl-c"):
    time.sleep(60)
cpu = os.environ.get("TEST_CPU", "Abacus")
kept, seed, dense = options.get("keep_ratio", 1.0), options["seed"], options.get("method") == "dense"
summary = {
    "heldout_top1": 50.0 + seed,
    "test_top1": 90.0 + seed if dense else 80.0 + 10 * kept + 2 * seed,
    "flops_ratio": 1.0 if dense else kept**2 + seed / 1024,
    "params_kept": kept,
    "train_flops_ratio": kept,
    "train_flops_executed": 1.5 * kept,
    "train_seconds": 100.0 * kept if cpu == "Abacus" else 80.0 * kept + 20,
    "epochs": options["epochs"],
}
(folder / "env.json").write_text(json.dumps({
    "cpu": cpu, "cpu_capability": "AVX2", "num_threads": 2, "torch": "2.14.1", "gpu": os.environ.get("TEST_GPU"),
    "git_commit": "0123456789abcdef", "git_dirty": False,
}))
if "TEST_CPU_SECONDS" in os.environ:
    summary["train_cpu_seconds"] = float(os.environ["TEST_CPU_SECONDS"]) * kept + seed
note("end")
(folder / "checkpoints" / "best.pt").write_text("trained")
(folder / "summary.json").write_text(json.dumps(summary))
"""
TABLE = """
title: A table
note: Three rows.
base: {arch: resnet20_he, epochs: 4, finetune: false}
seeds: [0, 1]
dense: dense
rows:
  dense: {method: dense}
  half: {keep_ratio: 0.5}
  same cost: {keep_ratio: {flops_of: half}, epochs: 8}
compare: [[half, same cost]]
"""


def events(*kinds: str) -> list[str]:
    """What the stand-ins did, in order; without the kind if only one is asked for."""
    words = [line.split() for line in Path("events.txt").read_text().splitlines()]
    return [name if len(kinds) == 1 else f"{kind} {name}" for kind, name, *_ in words if kind in kinds]


def report() -> list[dict[str, str]]:
    with open("results/table.csv", newline="") as file:
        return list(csv.DictReader(file))
