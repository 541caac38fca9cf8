"""How ranks are started, and which device each of them gets. Nothing here starts a process."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from args import Config, config_from_dict
from main import main
from trainers.devices import check_ranks, find_device, starter
from utils.errors import RankError, UserError
from utils.ranks import launch
from utils.ranks.exchange import num_ranks

VARIABLES = ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")


@pytest.fixture
def two_gpus(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def second_of_two(monkeypatch) -> None:
    place = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for key, value in place.items():
        monkeypatch.setenv(key, value)


def devices(**options: object) -> Config:
    return config_from_dict(options, "test")


class Replaced(Exception):
    """`os.execv` does not come back."""


@pytest.fixture
def replacements(monkeypatch) -> list[tuple[str, list[str]]]:
    """What this process would have become, without variables that a torchrun would get from here."""
    seen: list[tuple[str, list[str]]] = []

    def execv(path: str, command: list[str]) -> None:
        seen.append((path, command))
        raise Replaced

    monkeypatch.setattr(os, "execv", execv)
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # so that it is restored
        monkeypatch.delenv(variable)
    return seen


@pytest.mark.usefixtures("two_gpus")
def test_several_gpus_turn_the_process_into_a_torchrun_of_the_same_options(replacements, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    options = ["--multigpu", "0,1", "--log-dir", str(tmp_path)]
    with pytest.raises(Replaced):
        main(options)
    ((path, command),) = replacements
    assert path == command[0] == sys.executable
    assert command[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(str(launch.PROGRAM), *options),
    ]
    assert launch.PROGRAM.is_file()
    assert [os.environ[variable] for variable in VARIABLES] == ["3", "600"]  # half of the cores, rounded down
    assert list(tmp_path.iterdir()) == []


def test_what_the_user_has_set_for_torchrun_stays(replacements, monkeypatch):
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "5")
    with pytest.raises(Replaced):
        launch.become_torchrun(2, [])
    assert [os.environ[variable] for variable in VARIABLES] == ["5", "5"]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("ids", "message"), [("1,2", "device cuda:2 does not exist, this machine has 2")])
def test_a_gpu_that_is_not_there_is_refused_before_anything_starts(replacements, capsys, ids, message):
    assert main(["--multigpu", ids]) == 2
    assert message in capsys.readouterr().err
    assert replacements == []


@pytest.mark.usefixtures("two_gpus", "second_of_two")
@pytest.mark.parametrize(
    ("options", "device"),
    [({}, "cuda:1"), ({"device": "cuda"}, "cuda:1"), ({"device": "cpu"}, "cpu"), ({"multigpu": "1,0"}, "cuda:0")],
)
def test_every_rank_gets_its_own_gpu(options, device):
    assert find_device(devices(**options)) == torch.device(device)


@pytest.mark.usefixtures("two_gpus", "second_of_two")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:0"}, "--device cuda:0 is one GPU, but torchrun has started 2 processes on this machine"),
        ({"multigpu": "0"}, "--multigpu 0 names 1 GPUs, but torchrun has started 2 processes on this machine"),
    ],
)
def test_ranks_do_not_share_a_gpu(options, message):
    with pytest.raises(UserError, match=message):
        find_device(devices(**options))


def test_variables_of_a_cluster_alone_start_no_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert (launch.num_started(), launch.rank_here(), num_ranks()) == (1, 0, 1)
    assert find_device(devices(device="cpu")) == torch.device("cpu")


def test_what_only_several_processes_read_is_refused_for_one():
    with pytest.raises(UserError, match="there is a single process; start several"):
        check_ranks(Config(), ["rank_masks"])
    check_ranks(Config(), ["seed"])
    check_ranks(devices(multigpu="0,1"), ["rank_masks"])  # asked for two, fell back to the CPU


@pytest.mark.parametrize("key", ["batch_size", "finetune_batch_size"])
def test_batches_that_leave_a_rank_a_single_image_are_refused(second_of_two, key):
    with pytest.raises(UserError, match=rf"^{key} 3 is the total of 2 processes and .*pass at least 4"):
        check_ranks(devices(**{key: 3}), [])
    check_ranks(devices(**{key: 4}), [])


def test_the_command_that_goes_on_starts_as_many_processes(monkeypatch, second_of_two):
    assert starter(devices()) == ["torchrun", "--standalone", "--nproc_per_node", "2"]
    assert starter(devices(multigpu="0,1")) == ["python"]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert starter(devices()) == ["python"]


@pytest.mark.parametrize(("error", "code"), [(UserError("it went wrong"), 2), (RankError("it went wrong"), 4)])
@pytest.mark.parametrize("on_one_rank", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_an_error_is_said_once_and_with_its_rank_where_there_are_several(
    monkeypatch, capsys, request, error, code, on_one_rank, several
):
    def fail(*_: object) -> None:
        print("said to the standard output")
        raise error

    if several:
        request.getfixturevalue("second_of_two")
    error.on_one_rank = on_one_rank
    monkeypatch.setattr("trainers.session.Session.start", fail)
    assert main([]) == code
    said = capsys.readouterr()
    if several:
        assert said.err == ("rank 1: error: it went wrong\n" if on_one_rank else "")  # else rank 0 says it
    else:
        assert said.err == "error: it went wrong\n"
    assert said.out.splitlines()[1:] == ([] if several else ["said to the standard output"])
    assert (said.out == "") == several


def test_who_may_be_the_only_one_to_know():
    """A rank that has lost the others may be the only one left; ranks that differ all know."""
    assert not UserError("an option").on_one_rank
    assert RankError("lost the others").on_one_rank
