"""Run folders: one run each, found again, locked; facts, tables and summaries that are whole at any time."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest

from utils.errors import UserError
from utils.run import folder as run_folder
from utils.run import lock as run_lock
from utils.run.folder import (
    base_folder,
    checkpoint_of,
    create_run_folder,
    environment_facts,
    resolve_run,
    write_arrays,
    write_csv,
    write_facts,
    write_json,
)
from utils.run.lock import SILENCE, lock

# Makes ten run folders, each as soon as its twin is ready for the same one; then holds the first one locked.
TWIN = """
import sys, time
from pathlib import Path
from utils.run.folder import create_run_folder
from utils.run.lock import lock
root, own, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
folders = []
for number in range(10):
    (root / f"{own}{number}").touch()
    while not (root / f"{other}{number}").exists():
        pass
    folders.append(create_run_folder(root, "config", f"name{number}", 0.5, config_yaml=""))
with lock(folders[0]):
    print(*folders, sep=";", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[subprocess.Popen, list[Path]]]]:
    """Two processes that asked for the same ten run folders at the same time, and the folders they got."""
    root = tmp_path_factory.mktemp("twins")
    commands = [[sys.executable, "-c", TWIN, str(root), *names] for names in ("ab", "ba")]
    processes = [
        subprocess.Popen(
            command, cwd=run_folder.PROJECT_FOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    yield [(process, [Path(name) for name in process.stdout.readline().strip().split(";")]) for process in processes]
    for process in processes:
        process.kill()
        process.communicate()


def test_runs_of_one_name_are_numbered_and_the_latest_is_found(tmp_path: Path) -> None:
    base = tmp_path / "runs" / "quickstart" / "first" / "prune_rate=0.5"
    arguments = (tmp_path / "runs", "quickstart", "first", 0.5)
    for expected in (base, base / "1", base / "2"):
        assert create_run_folder(*arguments, config_yaml="") == expected
        (expected / "checkpoints" / "last.pt").touch()
        assert base_folder(*arguments) == base
        assert resolve_run(base) == (expected, expected / "checkpoints" / "last.pt")
        assert (expected / "checkpoints").is_dir()


def test_a_gap_is_not_filled_so_the_highest_number_is_the_newest_run(tmp_path: Path) -> None:
    base = create_run_folder(tmp_path, "config", "name", 0.5, config_yaml="")
    (base / "10").mkdir()
    assert create_run_folder(tmp_path, "config", "name", 0.5, config_yaml="") == base / "11"
    (base / "11" / "checkpoints" / "last.pt").touch()
    assert resolve_run(base)[0] == base / "11"


def test_who_comes_second_by_a_moment_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "config" / "name" / "prune_rate=0.5"
    mkdir = os.mkdir

    def mkdir_after_a_faster_process(path: Path, *arguments: object) -> None:
        if Path(path) == base and not base.exists():
            mkdir(path)
        mkdir(path, *arguments)

    monkeypatch.setattr(os, "mkdir", mkdir_after_a_faster_process)
    assert create_run_folder(tmp_path, "config", "name", 0.5, config_yaml="") == base / "1"


def test_two_processes_never_share_a_run_folder(twins: list) -> None:
    (_, folders), (_, other_folders) = twins
    for number, pair in enumerate(zip(folders, other_folders, strict=True)):
        first, second = sorted(pair)
        assert first.parent.name == f"name{number}"
        assert second == first / "1"


def test_a_locked_folder_is_refused_and_taken_over_when_its_process_is_killed(twins: list) -> None:
    process, folders = twins[0]
    holder = rf"in use by process {process.pid} on .*; wait for it or stop it"
    with pytest.raises(UserError, match=holder), lock(folders[0]):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert str(process.pid) in (folders[0] / "run.lock").read_text()
    with lock(folders[0]):
        assert f"process {os.getpid()} on" in (folders[0] / "run.lock").read_text()
    assert (folders[0] / "run.lock").read_text() == ""


def test_a_lock_of_another_host_holds_until_it_is_silent(tmp_path: Path) -> None:
    file = tmp_path / "run.lock"
    file.write_text("process 7 on elsewhere")
    message = r"in use by process 7 on elsewhere, whose last sign of life is \d+ seconds old; .* delete .*run\.lock"
    with pytest.raises(UserError, match=message), lock(tmp_path):
        pass
    long_ago = file.stat().st_mtime - SILENCE - 1
    os.utime(file, (long_ago, long_ago))
    with lock(tmp_path):
        assert f"process {os.getpid()} on" in file.read_text()


def test_a_held_lock_shows_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT", 0.01)
    file = tmp_path / "run.lock"
    with lock(tmp_path):
        os.utime(file, (0, 0))
        until = time.monotonic() + 10
        while file.stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.01)
        touched = file.stat().st_mtime
    assert touched > 0


def test_a_lock_file_may_hold_anything(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_bytes(bytes(range(256)) * 100)
    with lock(tmp_path):
        pass


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "a\\b", "a\nb", "a\0b"])
def test_a_name_must_be_one_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="name must be a plain folder name, got " + re.escape(repr(name))):
        create_run_folder(tmp_path, "config", name, 0.5, config_yaml="")
    with pytest.raises(UserError, match="config must be a plain folder name"):
        create_run_folder(tmp_path, name, "name", 0.5, config_yaml="")
    assert list(tmp_path.iterdir()) == []


def test_a_log_dir_that_is_a_file_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot make the run folder .*--log-dir"):
        create_run_folder(tmp_path / "runs", "config", "name", 0.5, config_yaml="")


def test_a_run_is_found_by_its_folder_or_by_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = create_run_folder(tmp_path, "config", "name", 0.5, config_yaml="")
    last, best = folder / "checkpoints" / "last.pt", folder / "checkpoints" / "best.pt"
    with pytest.raises(UserError, match=r"has no checkpoints/last\.pt \(it has no checkpoint at all\)"):
        resolve_run(folder)
    best.touch()
    with pytest.raises(UserError, match=r"has no checkpoints/last\.pt \(it has best\.pt\)"):
        resolve_run(folder)
    last.touch()
    assert resolve_run(folder) == (folder, last)
    assert resolve_run(str(best)) == (folder, best)
    assert resolve_run(folder, ("best.pt", "last.pt")) == (folder, best)
    best.unlink()
    assert resolve_run(folder, ("best.pt", "last.pt")) == (folder, last)
    monkeypatch.chdir(folder / "checkpoints")
    assert resolve_run("last.pt") == (folder, Path("last.pt"))
    monkeypatch.chdir(folder)
    assert resolve_run("checkpoints/last.pt") == (Path(), Path("checkpoints/last.pt"))


def test_of_several_runs_the_newest_is_taken_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The highest number below one run; above several, the one that has saved last. A file means itself."""
    first, second, third = (create_run_folder(tmp_path, "config", "one", 0.5, config_yaml="") for _ in range(3))
    other = create_run_folder(tmp_path, "config", "two", 0.25, config_yaml="")
    for age, folder in enumerate((second, other, first, third)):  # the second run was the last to save
        file = folder / "checkpoints" / "last.pt"
        file.touch()
        os.utime(file, (10_000 - age, 10_000 - age))

    def taken(path: Path) -> tuple[Path, str]:
        folder, file = resolve_run(path)
        assert file == folder / "checkpoints" / "last.pt"
        said = capsys.readouterr()
        assert said.out == ""
        return folder, said.err

    folder, said = taken(first)
    assert folder == third
    assert f"taking {third}, the newest of 3 runs in {first}, by its number" in said
    for parent, count in ((tmp_path, 4), (tmp_path / "config", 4), (tmp_path / "config" / "one", 3)):
        folder, said = taken(parent)
        assert folder == second
        assert f"taking {second}, the newest of {count} runs in {parent}, by the time of its last.pt" in said
    for alone in (second, third, other, tmp_path / "config" / "two"):
        folder, said = taken(alone)
        assert (folder, said) == (other if alone not in (second, third) else alone, "")
    assert taken(Path(checkpoint_of(first, "last.pt"))) == (first, "")


def test_a_folder_named_like_a_number_that_is_no_run_is_no_repeat(tmp_path: Path) -> None:
    base = create_run_folder(tmp_path, "config", "7", 0.5, config_yaml="")
    (base / "checkpoints" / "last.pt").touch()
    (base / "3").mkdir()
    assert resolve_run(base)[0] == base
    assert resolve_run(tmp_path / "config")[0] == base


def test_a_path_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        resolve_run(tmp_path / "nowhere")
    (tmp_path / "stray.pt").touch()
    with pytest.raises(UserError, match="is not in the checkpoints/ folder of a run"):
        resolve_run(tmp_path / "stray.pt")


def test_facts_are_written_and_a_resumed_run_adds_its_command(tmp_path: Path) -> None:
    first = ["main.py", "--name", "with space"]
    second = ["main.py", "--resume"]
    write_facts(tmp_path, config_yaml="seed: 0\n", command=first, environment={"torch": "2.9"})
    write_facts(tmp_path, config_yaml="seed: 1\n", command=second, environment={"torch": "2.14"})
    lines = (tmp_path / "command.txt").read_text().splitlines()
    assert [shlex.split(line) for line in lines] == [first, second]
    assert (tmp_path / "config.yaml").read_text() == "seed: 1\n"
    assert json.loads((tmp_path / "env.json").read_text()) == {"torch": "2.14"}


def test_environment_facts_are_plain_and_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "do-not-tell")
    facts = environment_facts("cpu")
    text = json.dumps(facts)
    assert "do-not-tell" not in text
    assert "SECRET_TOKEN" not in text
    for name in ("python", "torch", "torchvision", "numpy", "platform", "cpu_capability", "num_threads"):
        assert facts[name], name
    assert facts["gpu"] is None


def test_generations_of_one_processor_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for family, model in ((23, 1), (25, 1)):
        file = tmp_path / f"cpuinfo-{family}"
        core = f"cpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\nflags\t\t: fma avx2 sse\n\n"
        file.write_text(core * 2)
        monkeypatch.setattr(run_folder, "CPU_INFO", file)
        name, flags = run_folder._cpu_facts()
        names.append(name)
        assert flags == ["avx2", "fma"]
    assert names == ["AMD EPYC, family 23 model 1", "AMD EPYC, family 25 model 1"]
    monkeypatch.setattr(run_folder, "CPU_INFO", tmp_path / "none")
    assert run_folder._cpu_facts() == (run_folder.platform.processor(), [])


def test_the_git_state_is_that_of_the_project_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    monkeypatch.setattr(run_folder, "PROJECT_FOLDER", tmp_path.resolve())
    assert run_folder._git_state() == (None, None)
    git("init")
    (tmp_path / "main.py").write_text("a")
    git("add", ".")
    git("commit", "--message", "first")
    commit, dirty = run_folder._git_state()
    assert re.fullmatch("[0-9a-f]{40,64}", commit)
    assert dirty is False
    (tmp_path / "main.py").write_text("b")
    assert run_folder._git_state() == (commit, True)
    # A copy of the project inside another repository.
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(run_folder, "PROJECT_FOLDER", tmp_path.resolve() / "inside")
    assert run_folder._git_state() == (None, None)
    monkeypatch.setenv("PATH", "")
    assert run_folder._git_state() == (None, None)


def test_a_table_is_written_whole_with_the_columns_of_its_first_row(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    write_csv(path, [{"epoch": 0, "loss": 9.0}])
    write_csv(path, [{"epoch": 0, "loss": 0.1 + 0.2, "note": "a, b"}, {"note": "", "epoch": 1, "loss": 1e-20}])
    assert path.read_bytes() == b'epoch,loss,note\n0,0.30000000000000004,"a, b"\n1,1e-20,\n'
    with pytest.raises(ValueError, match="accuracy"):
        write_csv(path, [{"epoch": 0}, {"epoch": 1, "accuracy": 3.0}])
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("summary.json", lambda path, value: write_json(path, {"test_top1": value})),
        ("results.csv", lambda path, value: write_csv(path, [{"test_top1": value}])),
        ("scores.npz", lambda path, value: write_arrays(path, {"test_top1": numpy.array([str(value).encode()])})),
    ],
)
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch, name: str, write: Callable) -> None:
    path = tmp_path / name
    write(path, 85.5)
    before, seen = path.read_bytes(), []

    def crash(source: Path, target: Path) -> None:
        seen.append(Path(source).read_bytes())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write(path, 86.0)
    assert path.read_bytes() == before
    write(path, 86.0)
    assert [path.read_bytes()] == seen
    assert b"86.0" in seen[0]
