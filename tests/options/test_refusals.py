"""Options: mistakes, what nothing reads, and what contradicts something else."""

import re

import pytest

from args import (
    ARCHS,
    METHODS,
    OPTIONS,
    Config,
    config_to_yaml,
    parse_args,
)
from tests.options.parsing import DEFAULTS, flag_with_value, parse, parse_yaml, refused, values
from utils.errors import UserError
from utils.options import why_unread

# ---- mistakes on the command line ----


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        (
            "--keep-ratio 50",
            "keep_ratio must be in (0, 1], got 50.0 (command line); it is a fraction, not a percentage",
        ),
        ("--prune_rate 0", "keep_ratio must be in (0, 1], got 0.0 (command line, as prune_rate)"),
        ("--alpha 1", "alpha must be in [0.5, 1), got 1.0"),
        ("--epochs 0", "epochs must be at least 1, got 0 (command line)"),
        ("--lr 0", "score_lr must be above 0, got 0.0 (command line, as lr)"),
        ("--keep-ratio nan", "keep_ratio must be a finite number, in (0, 1], got 'nan'"),
        ("--lr 1e999", "score_lr must be a finite number, above 0, or auto, got '1e999'"),
        ("--epochs 3.0", "epochs must be a whole number, at least 1, or auto, got '3.0' (command line)"),
        ("--epochs " + "9" * 5000, "999... (command line)"),
        (
            "--arch resnet33",
            f"arch must be one of {', '.join(ARCHS)}, or PACKAGE.MODULE:FUNCTION for a network of your own, got "
            "'resnet33' (command line); did you mean 'resnet34'?",
        ),
        ("--set cifar10", "got 'cifar10' (command line); did you mean 'CIFAR10'?"),
        ("--estimator disarm", "estimator must be one of vrpge, reinforce, linear_cv_gates, taylor, got 'disarm'"),
        ("--image-size 7 --set ImageFolder", "image_size must be 0 (as stored) or in [8, 512], got 7"),
        ("--image-size 513 --set ImageFolder", "image_size must be 0 (as stored) or in [8, 512], got 513"),
        ("--device gpu", "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("--multigpu -1", "multigpu must be GPU ids that are not negative, such as 0 or 0,1, got '-1'"),
        ("--multigpu 0,0", "multigpu must be GPU ids that are distinct, such as 0,1, got '0,0'"),
        ("--name a/b", "name must be the name of one folder, not a path, got 'a/b'"),
        ("--name ..", "name must be the name of one folder, not a path, got '..'"),
        ("--kep_ratio=0.5", "unknown option '--kep-ratio' (command line); did you mean '--keep-ratio'?"),
        ("--epoch 3", "unknown option '--epoch' (command line); did you mean '--epochs'?"),
        ("-b 3", "unknown option '-b' (command line); --help all lists every option"),
        ("--epochs 3 4", "unexpected word '4' (command line)"),
        ("--finetune maybe", "finetune must be on or off, got 'maybe' (command line)"),
        ("--no-finetune on", "unexpected word 'on' (command line)"),
        ("--epochs", "command line: argument --epochs: expected one argument"),
        ("--lr 1 --lr 1", "'lr' is given twice (command line); keep one"),
        (
            "--lr 1 --score-lr 1",
            "'lr' (command line) and 'score_lr' (command line) are two names of one option; keep one of them",
        ),
        ("--finetune --no-finetune", "'finetune' is given twice (command line); keep one"),
    ],
)
def test_mistakes_on_the_command_line_are_refused_in_words(command_line, message):
    assert message in refused(command_line)


@pytest.mark.parametrize(
    "command_line",
    [
        "--keep-ratio 1",
        "--holdout 0.5",
        "--alpha 0.5",
        "--K 64",
        "--momentum 0",
        "--seed 2147483647",
        "--set ImageFolder --image-size 8 --workers 0",
        "--set ImageFolder --image-size 0",
        "--budget-schedule cubic --budget-start 0 --budget-end 1",
        "--device cuda:11",
        "--device cuda:1 --multigpu 1",
        "--multigpu 10",
        "--multigpu 0,2,10",
    ],
)
def test_the_ends_of_the_ranges_are_allowed(command_line):
    parse(command_line)


def test_an_empty_value_is_refused():
    with pytest.raises(UserError, match="name must be a text of one line, got ''"):
        parse_args(["--name", ""])


# ---- options that nothing reads ----

# Written by hand from what the methods do, to judge the declarations by.
READ = {
    "vrpge": "K alpha estimator score_gradient score_every rank_masks score_lr optimizer shrink residual_masks",
    "released": "K alpha score_lr optimizer score_init_constant budget_schedule constrain_by_layer num_subnets "
    "bn_batches sample_from_training_set keep_ratio finetune_lr first_layer_dense",
    "dense": "arch init weight_lr momentum clip_norm holdout finetune finetune_epochs epochs pretrained",
    "thin": "keep_ratio budget first_layer_dense last_layer_dense finetune_epochs execution widths_of",
    "random": "keep_ratio budget constrain_by_layer residual_masks finetune_epochs",
    "coin": "K alpha estimator score_every rank_masks score_lr",
    "l1": "keep_ratio budget shrink residual_masks bn_batches finetune_lr finetune_policy finetune_batch_size "
    "budget_schedule",
    "slimming": "slimming_penalty constrain_by_layer bn_batches finetune_lr shrink budget_schedule",
    "taylor_cut": "keep_ratio budget shrink residual_masks constrain_by_layer bn_batches finetune_lr budget_schedule",
    "sfp": "keep_ratio bn_batches finetune_batch_size execution",
    "gumbel": "score_lr optimizer score_init_constant budget_schedule constrain_by_layer num_subnets shrink",
}
NOT_READ = {
    "vrpge": "slimming_penalty widths_of",
    "released": "estimator score_gradient execution shrink residual_masks score_every rank_masks slimming_penalty",
    "dense": "keep_ratio budget score_lr optimizer execution shrink residual_masks bn_batches finetune_lr num_subnets "
    "first_layer_dense last_layer_dense finetune_policy finetune_batch_size sample_from_training_set slimming_penalty "
    "widths_of",
    "thin": "K alpha score_lr optimizer constrain_by_layer residual_masks shrink bn_batches budget_schedule",
    "random": "K score_lr shrink bn_batches finetune_lr num_subnets score_init_constant finetune_policy widths_of",
    "coin": "slimming_penalty",
    "l1": "K score_lr optimizer constrain_by_layer num_subnets score_init_constant slimming_penalty",
    "slimming": "K alpha estimator score_lr num_subnets sample_from_training_set",
    "taylor_cut": "K alpha estimator score_lr num_subnets sample_from_training_set slimming_penalty widths_of",
    "sfp": "constrain_by_layer slimming_penalty score_lr budget_schedule",
    "gumbel": "K alpha estimator score_gradient score_every rank_masks slimming_penalty",
}


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_does_not_read_is_refused_on_the_command_line_and_tolerated_in_a_file(tmp_path, method):
    unread = {key for key, entry in OPTIONS.items() if entry.read_by and method not in entry.read_by}
    assert unread >= set(NOT_READ[method].split())
    assert not unread & set(READ[method].split())
    for key in unread:
        message = refused(f"--method {method} {flag_with_value(key)}")
        assert f"--{key.replace('_', '-')} (command line) has no effect: method {method} does not read it" in message
        reader = re.search(r"pass another --method \((\w+)", message)[1]
        with_what_it_needs = {**DEFAULTS, **{other: allowed[0] for other, allowed in OPTIONS[key].needs.items()}}
        assert not why_unread(OPTIONS, with_what_it_needs | {"method": reader}, key)
    # One YAML file serves all methods.
    config = parse_yaml(tmp_path, config_to_yaml(Config()), f"--method {method}").config
    assert config.method == method
    for key in READ[method].split():
        if not OPTIONS[key].needs:
            parse(f"--method {method} {flag_with_value(key)}")


@pytest.mark.parametrize(
    ("key", "without", "needed"),
    [
        ("budget_start", "", "--budget-schedule cubic"),
        ("budget_end", "", "--budget-schedule cubic"),
        ("finetune_epochs", "--no-finetune", ""),
        ("finetune_policy", "--no-finetune", ""),
        ("finetune_batch_size", "--no-finetune", ""),
        ("finetune_lr", "--no-finetune", ""),
        ("finetune_lr", "--finetune-policy continue", "--finetune-policy constant"),
        ("mode", "--init orthogonal", "--init kaiming_uniform"),
        ("nonlinearity", "--init xavier_normal", ""),
        ("data", "", "--set MNIST"),
        ("image_size", "--set CIFAR10", "--set ImageNet"),
        ("workers", "", "--set ImageFolder"),
        ("shrink", "--execution masked", "--execution compact"),
    ],
)
def test_what_another_option_makes_useless_is_refused_on_the_command_line(tmp_path, key, without, needed):
    flag = flag_with_value(key)
    assert f"--{key.replace('_', '-')} (command line) has no effect: " in refused(f"{without} {flag}")
    assert parse(f"{needed} {flag}").origin[key] == "command line"
    text = "\n".join(line for line in config_to_yaml(Config()).splitlines() if line.startswith(f"{key}:"))
    assert parse_yaml(tmp_path, text, without).origin[key] == "file"


def test_the_choice_of_a_subnet_needs_no_finetuning():
    assert values("--no-finetune --num-subnets 3 --bn-batches 7 --sample-from-training-set")["bn_batches"] == 7


# ---- options that contradict each other ----


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        ("--evaluate", "evaluate on (command line) needs a trained run; pass --resume PATH"),
        ("--device cpu --multigpu 0", "device cpu (command line) and multigpu 0 (command line) contradict each other"),
        ("--device cuda:1 --multigpu 0,1", "contradict each other"),
        ("--K 1", "estimator vrpge (default) and K 1 (command line) contradict each other"),
        ("--estimator taylor --K 2", "estimator taylor (command line) and K 2 (command line) contradict each other"),
        ("--method released --K 1", "method released (command line) compares masks"),
        ("--method released --budget flops", "counts channels only, got budget flops (command line)"),
        ("--estimator taylor --rank-masks independent", "got rank_masks independent (command line)"),
        ("--estimator linear_cv_gates --rank-masks independent", "under masks that all processes share"),
        ("--estimator taylor --method coin", "estimator taylor (command line) learns from gradients, which no coin"),
        ("--method thin --execution masked", "method thin (command line) needs compact execution"),
        ("--method random --pretrained w.pt", "pretrained w.pt (command line) cannot be used"),
        ("--budget-schedule cubic --budget-start 0.4", "budget_start 0.4 (command line) must be below budget_end 0.4"),
        ("--method l1 --budget-schedule cubic --no-shrink", "method l1 (command line) with budget_schedule cubic"),
        ("--method taylor_cut --budget-schedule cubic --execution masked", "which needs compact execution and shrink"),
        ("--method thin --widths-of a --pretrained b", "pretrained b (command line) cannot be used"),
        ("--constrain-by-layer --budget flops", "needs budget channels, got budget flops (command line)"),
        ("--score-init-constant 0.6", "score_init_constant 0.6 (command line) is above keep_ratio 0.5 (default)"),
        ("--epochs 5 --warmup-length 5", "warmup_length 5 (command line) must be below epochs 5 (command line)"),
        ("--nesterov --momentum 0", "needs a momentum above 0, got momentum 0.0 (command line)"),
        ("--holdout 0", "holdout 0.0 (command line) and sample_from_training_set off (default) leave no images"),
        ("--method gumbel --holdout 0", "leave no images to choose the subnet with"),
        ("--no-finetune --ema 0.9", "ema 0.9 (command line) averages weights while a fixed network is trained"),
        ("--method l1 --no-finetune --ema 0.9", "with finetune off (command line) method l1 (command line) never does"),
    ],
)
def test_contradictions_are_refused(command_line, message):
    assert message in refused(command_line)


@pytest.mark.parametrize(
    "command_line",
    [
        "--holdout 0 --sample-from-training-set",
        "--method dense --holdout 0",
        "--method slimming --holdout 0 --constrain-by-layer",
        "--score-init-constant 0.6 --keep-ratio 0.6",
        "--score-init-constant 0.6 --budget-schedule cubic",
        "--score-init-constant 0.6 --budget flops",
        "--execution masked",
        "--init xavier_normal",
        "--method released --budget-schedule cubic --K 3",
        "--evaluate --resume",
        "--method thin --no-finetune --ema 0.9",
        "--method slimming --no-shrink",
        "--method taylor_cut --budget-schedule cubic --budget-end 1",
        "--mixup 0.2 --cutmix 1 --rand-augment 2 --ema 0.999",
    ],
)
def test_what_goes_together_is_accepted(command_line):
    parse(command_line)


def test_what_nothing_reads_contradicts_nothing(tmp_path):
    text = "estimator: taylor\nK: 2\nbudget_start: 0.9\nconstrain_by_layer: true\nscore_init_constant: 0.9\nholdout: 0"
    assert parse_yaml(tmp_path, text, "--method l1").config.method == "l1"
    assert "contradict" in refused(tmp_path, text)


def test_messages_name_the_line_of_the_file(tmp_path):
    message = refused(tmp_path, "epochs: 3\nwarmup_length: 4\n")
    assert f"warmup_length 4 ({tmp_path / 'some.yaml'} line 2)" in message
