"""Options of the released code: what its file and flags do here, and what the page about them says."""

from __future__ import annotations

import re

import pytest

from args import OPTIONS, REMOVED
from tests.options.parsing import PROJECT, parse, parse_yaml
from utils.errors import UserError

# configs/config.yaml of the released code; there is no such network, so the command line replaces it.
FILE = """
arch: vgg19_bn_new_fc
data: dataset/
set: CIFAR10
name: VRPGE
optimizer: adam
lr_policy: cosine_lr
epochs: 300
weight_decay: 0
batch_size: 256
conv_type: VRPGE
bn_type: LearnedBatchNorm
init: kaiming_normal
mode: fan_in
nonlinearity: relu
prune_rate: 0.5
score_init_constant: 0.5
K: 2
workers: 4
"""
COMMAND = "--multigpu 0 --score-init-constant 0.5 --prune-rate 0.5 --arch resnet32 --set CIFAR10 --lr 12e-3"


def test_the_file_and_the_command_of_the_released_code_are_read_and_what_differs_is_said(tmp_path):
    arguments = parse_yaml(tmp_path, FILE, COMMAND)
    assert (arguments.config.model.arch, arguments.config.run.name, arguments.config.train.score_lr) == (
        *("resnet32", "VRPGE", 0.012),
    )
    (notice,) = arguments.notices
    assert notice.startswith("weight_decay 0.0 (file) acts on the weights, and in the released code on the scores")
    assert parse_yaml(tmp_path, FILE, f"{COMMAND} --method released").notices == ()
    with pytest.raises(UserError, match="got 'vgg19_bn_new_fc'"):
        parse_yaml(tmp_path, FILE)


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        ("--lr-policy multistep_lr --warmup-length 3", ["lr_policy", "warmup_length"]),
        ("--width-mult 0.5 --weight-decay 5e-4 --lr-policy cosine_lr", ["width_mult"]),
        ("--width-mult 0.5 --method released --lr-policy constant_lr --weight-decay 0", ["width_mult"]),
        ("--epochs 3", []),
    ],
)
def test_a_notice_comes_with_the_names_of_the_released_code_and_only_where_it_matters(flags, keys):
    assert [notice.split()[0] for notice in parse(f"--lr 0.01 {flags}").notices] == keys
    assert parse(f"--score-lr 0.01 {flags}").notices == ()


def test_the_page_says_of_each_option_what_the_program_does_with_it():
    page = (PROJECT / "docs/differences.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (same|other\*?|absent) \|", page, re.MULTILINE)
    names = {name for entry in OPTIONS.values() for name in entry.names} | set(REMOVED)
    assert len(dict(rows)) == len(rows) == 42
    for name, verdict in rows:
        assert (name in names) == (verdict != "absent"), name
    # what the page lists as read by nothing there, and as the names that a notice needs
    for name in ("resume", "evaluate", "pretrained", "label_smoothing", "first_layer_dense", "constrain_by_layer"):
        assert name in names
        assert name not in dict(rows)
