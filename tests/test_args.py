"""Options: precedence, spellings, every kind of refusal, who reads what, round trips and the rule for resuming."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from args import (
    ARCHS,
    ESTIMATORS,
    METHODS,
    OPTIONS,
    REMOVED,
    SETS,
    Arguments,
    Config,
    ModelConfig,
    RunConfig,
    SparsityConfig,
    TrainConfig,
    check_resume,
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    parse_args,
)
from utils.errors import UserError
from utils.option_text import read_yaml
from utils.options import why_unread

PROJECT = Path(__file__).parents[1]
CONFIGS = PROJECT / "configs"
ORIGINAL_COMMAND = (
    "python main.py --config configs/config.yaml --multigpu 0 --score-init-constant 0.5 --prune-rate 0.5 "
    "--arch resnet32 --set CIFAR10 --lr 12e-3"
)
DEFAULTS = config_to_dict(Config())


def parse(command_line: str = "") -> Arguments:
    return parse_args(command_line.split())


def values(command_line: str = "") -> dict[str, object]:
    return config_to_dict(parse(command_line).config)


def parse_yaml(folder: Path, text: str | bytes, command_line: str = "") -> Arguments:
    path = folder / "some.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse_args(["--config", str(path), *command_line.split()])


def refused(*arguments) -> str:
    """The message of the error that the arguments of `parse` or `parse_yaml` raise: always one line."""
    with pytest.raises(UserError) as error:
        parse(*arguments) if isinstance(arguments[0], str) else parse_yaml(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


def flag_with_value(key: str) -> str:
    """A flag that gives an option its default, or where that is none a value that it accepts."""
    return f"--{key.replace('_', '-')}={0.25 if DEFAULTS[key] is None else DEFAULTS[key]}"


# ---- precedence, names, files that ship ----


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    arguments = parse_yaml(tmp_path, "epochs: 7\nkeep_ratio: 0.4\n", "--keep-ratio 0.3")
    assert arguments.config.sparsity.keep_ratio == 0.3
    assert arguments.config.train.epochs == 7
    assert arguments.config.train.batch_size == 256
    assert arguments.origin["keep_ratio"] == "command line"
    assert arguments.origin["epochs"] == "file"
    assert arguments.origin["batch_size"] == "default"
    assert set(arguments.origin) == set(DEFAULTS)


def test_nothing_given_is_the_default_config():
    assert parse().config == Config()
    assert set(parse().origin.values()) == {"default"}


def test_the_command_line_of_the_released_code_parses(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    config = parse(ORIGINAL_COMMAND.removeprefix("python main.py ")).config
    assert (config.run.multigpu, config.data.set, config.model.arch) == ("0", "CIFAR10", "resnet32")
    assert (config.sparsity.keep_ratio, config.sparsity.score_init_constant) == (0.5, 0.5)
    assert config.train.score_lr == 0.012
    assert f" {ORIGINAL_COMMAND}\n" in (CONFIGS / "config.yaml").read_text()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_that_ships_parses(path):
    assert parse_args(["--config", str(path)]).origin["set"] == "file"
    assert not {item.name for item in read_yaml(str(path))} & REMOVED.keys()


def test_the_two_recipes_differ_only_where_the_released_code_differs():
    ours = config_to_dict(parse_args(["--config", str(CONFIGS / "config.yaml")]).config)
    released = config_to_dict(parse_args(["--config", str(CONFIGS / "released.yaml")]).config)
    different = {key: released[key] for key in ours if ours[key] != released[key] and key != "config"}
    assert different == {"holdout": 0.0, "sample_from_training_set": True, "method": "released"}


@pytest.mark.parametrize(
    ("alias", "key", "text", "value"),
    [
        ("prune_rate", "keep_ratio", "0.25", 0.25),
        ("lr", "score_lr", "1e-3", 0.001),
        ("weight_opt_lr", "weight_lr", "0.2", 0.2),
        ("stream", "residual_masks", "tied", "tied"),
        ("retire", "shrink", "off", False),
        ("retire", "shrink", "on", True),
    ],
)
def test_aliases_are_accepted_in_all_places(tmp_path, alias, key, text, value):
    assert values(f"--{alias.replace('_', '-')} {text}")[key] == value
    arguments = parse_yaml(tmp_path, f"{alias}: {text}")
    assert config_to_dict(arguments.config)[key] == value
    assert arguments.origin[key] == "file"
    stored = config_from_dict(
        {alias: text if isinstance(value, bool) else value}, "checkpoint"
    )  # 'on' and 'off' as text
    assert config_to_dict(stored)[key] == value
    # In different places the two names are the same key, and the command line wins.
    below = {"keep_ratio": "0.4", "residual_masks": "free", "shrink": "on"}.get(key, "0.4")
    arguments = parse_yaml(tmp_path, f"{alias}: {below}", f"--{key} {text}")
    assert config_to_dict(arguments.config)[key] == value


def test_every_option_is_declared_once():
    names = [name for entry in OPTIONS.values() for name in entry.names] + list(REMOVED)
    assert len(names) == len(set(names))
    for entry in OPTIONS.values():
        assert set(entry.read_by) <= METHODS.keys(), entry.key
        assert entry.resumed in ("stored", "may change", "this command"), entry.key
        for other, allowed in entry.needs.items():
            assert set(allowed) <= set(OPTIONS[other].choices or (True, False)), entry.key
            assert DEFAULTS[entry.key] == OPTIONS[entry.key].default


def test_dashes_and_underscores_are_the_same(tmp_path):
    for spelling in ("--keep-ratio 0.3", "--keep_ratio 0.3", "--keep_ratio=0.3", "--prune_rate 0.3"):
        assert parse(spelling).config.sparsity.keep_ratio == 0.3
    assert parse_yaml(tmp_path, "keep-ratio: 0.3").config.sparsity.keep_ratio == 0.3
    assert parse("--name a_b").config.run.name == "a_b"
    assert parse("--name=a_b").config.run.name == "a_b"
    assert parse("--K 3").config.sparsity.K == 3


def test_switches():
    for spelling in ("--no-shrink", "--shrink off", "--shrink=false", "--no_shrink", "--retire off"):
        assert parse(spelling).config.sparsity.shrink is False
        assert parse(spelling).config.shrinks is False
    for spelling in ("--shrink", "--shrink on", "--retire on"):
        assert parse(spelling).config.sparsity.shrink is True
        assert parse(spelling).origin["shrink"] == "command line"
    assert parse("--dry_run --no-print_config").config.run.dry_run is True


def test_resume_with_and_without_a_path():
    assert parse().config.run.resume is None
    assert parse("--resume").config.run.resume == "auto"
    assert parse("--resume --evaluate").config.run.resume == "auto"
    assert parse("--resume runs/a").config.run.resume == "runs/a"


def test_the_scores_start_at_the_budget():
    assert SparsityConfig(keep_ratio=0.3).score_init == 0.3
    assert SparsityConfig(keep_ratio=0.3, budget_schedule="cubic").score_init == 1.0
    assert SparsityConfig(keep_ratio=0.3, score_init_constant=0.2, budget_schedule="cubic").score_init == 0.2


def test_estimator_taylor_draws_one_mask(tmp_path):
    assert values()["K"] == 2
    assert values("--estimator taylor")["K"] == 1
    assert parse_yaml(tmp_path, "estimator: taylor").config.sparsity.K == 1
    assert config_from_dict({"estimator": "taylor"}, "here").sparsity.K == 1
    # A method that reads no estimator keeps its two masks.
    assert parse_yaml(tmp_path, "estimator: taylor", "--method released").config.sparsity.K == 2


@pytest.mark.parametrize("method", METHODS)
def test_phases_of_a_method(method):
    config = parse(f"--method {method} --epochs 5 --finetune-epochs 3").config
    assert config.method == method
    assert config.finetunes is (method not in ("dense", "thin", "random"))
    assert config.total_epochs == 8
    config = parse(f"--method {method} --epochs 5 --no-finetune").config
    assert (config.finetunes, config.total_epochs) == (False, 5)


# ---- options that are gone ----

OLD_DEFAULTS = {
    **{"conv_type": "VRPGE", "trainer": "default", "semantics": "unit", "weight_samples": 1, "clip_jointly": False},
    **{"sync_bn": False, "subbatch": 0, "gauge_every": 0, "stream": "free", "retire": "on"},
}


@pytest.mark.parametrize("key", OLD_DEFAULTS)
def test_old_files_and_checkpoints_that_mean_today_s_behaviour_are_read(tmp_path, key):
    assert config_from_dict({key: OLD_DEFAULTS[key]}, "checkpoint") == Config()
    config = parse_yaml(tmp_path, yaml.safe_dump({key: OLD_DEFAULTS[key]})).config
    assert config_to_dict(config) == DEFAULTS | {"config": str(tmp_path / "some.yaml")}


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("semantics", "released", "use method released"),
        ("weight_samples", 2, "use method released"),
        ("clip_jointly", True, "use method released"),
        ("sync_bn", True, "leave it out"),
        ("subbatch", 4, "leave it out"),
        ("gauge_every", 10, "tools.gauge"),
        ("trainer", "other", "leave it out"),
        ("conv_type", "Other", "--method dense"),
    ],
)
def test_other_values_of_options_that_are_gone_are_refused_with_advice(tmp_path, key, value, advice):
    with pytest.raises(UserError, match=re.escape(advice)) as error:
        config_from_dict({key: value}, "last.pt")
    assert f"{key} {value} (last.pt)" in str(error.value)
    assert advice in refused(tmp_path, f"epochs: 3\n{key}: {value}")
    message = refused(f"--{key.replace('_', '-')} {value}")
    assert advice in message
    assert ("unknown option" in message) is (key not in ("trainer", "conv_type"))


def test_a_dense_network_has_an_old_name(tmp_path):
    for method in (
        parse("--conv-type DenseConv").config.method,
        parse_yaml(tmp_path, "conv_type: DenseConv").config.method,
        parse_yaml(tmp_path, "conv_type: DenseConv\nmethod: dense").config.method,
        config_from_dict({"method": "dense", "conv_type": "DenseConv"}, "checkpoint").method,
        parse_yaml(tmp_path, "conv_type: VRPGE\nmethod: thin", "--method dense").config.method,
        parse_yaml(tmp_path, "method: thin", "--conv-type DenseConv").config.method,
    ):
        assert method == "dense"
    assert parse("--conv-type DenseConv").origin["method"] == "command line"
    assert parse("--conv-type VRPGE --trainer default").config == Config()
    assert parse("--conv-type VRPGE --method thin").config.method == "thin"
    assert parse_yaml(tmp_path, "conv_type: DenseConv", "--method l1").config.method == "l1"
    for arguments in (
        ("--method dense --conv-type VRPGE",),
        ("--conv-type DenseConv --method l1",),
        (tmp_path, "method: dense\nconv_type: VRPGE"),
        (tmp_path, "method: dense", "--conv-type VRPGE"),
    ):
        assert "contradict each other" in refused(*arguments)
    assert "given twice" in refused("--conv-type VRPGE --conv-type VRPGE")


# ---- YAML spellings ----


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("score_lr: 12e-3", 0.012),
        ("score_lr: '1e-4'", 0.0001),
        ("score_lr: 1", 1.0),
        ("epochs: 012", 12),
        ("epochs: 1_000", 1000),
        ("name: 012", "012"),
        ("name: on", "on"),
        ("name: 'null'", "null"),
        ("multigpu: 0", "0"),
        ("nesterov: yes", True),
        ("nesterov: FALSE", False),
        ("shrink: 'off'", False),
        ("name: None", None),
        ("name: null", None),
        ("name: ~", None),
        ("name:", None),
        ("score_init_constant: None", None),
        ("# before\nepochs: 3  # after", 3),
        ("\ufeffepochs: 3\r\n", 3),
    ],
)
def test_the_declared_type_decides_what_a_spelling_means(tmp_path, line, value):
    key = re.search(r"(\w+):", line).group(1)
    result = config_to_dict(parse_yaml(tmp_path, line).config)[key]
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: on", "epochs must be a whole number, at least 1, got 'on' (FILE line 1)"),
        ("\nepochs: 3.0", "epochs must be a whole number, at least 1, got '3.0' (FILE line 2)"),
        ("epochs: '3'", "got the text '3' (FILE line 1); write it without quotes"),
        ("epochs: 1e3", "a whole number, at least 1, got '1e3'"),
        ("epochs: ~", "epochs must be a whole number, at least 1, got nothing (null)"),
        ("epochs: \u0663", "a whole number, at least 1"),
        ("data: null", "data must be a text of one line, got nothing (null)"),
        ("name: |\n  a\n  b", r"name must be a text of one line, got 'a\nb'"),
        ("nesterov: 1", "nesterov must be on or off, got '1'"),
        ("lr: .inf", "score_lr must be a finite number, above 0, got '.inf' (FILE line 1, as lr)"),
        ("keep_ratio: 50 %", "keep_ratio must be a finite number, in (0, 1], got '50 %'"),
        ("kep_ratio: 0.5", "unknown key 'kep_ratio' (FILE line 1); did you mean 'keep_ratio'?"),
        ("lr: 1\nk: 3", "unknown key 'k' (FILE line 2); did you mean 'K'?"),
        ("zzzz: 3", "unknown key 'zzzz' (FILE line 1); --help all lists every option"),
        ("lr: 0.1\nepochs: 2\nlr: 0.1", "'lr' is given twice: FILE line 1 and FILE line 3; keep one"),
        (
            "lr: 0.1\n\nscore-lr: 0.1",
            "'lr' (FILE line 1) and 'score_lr' (FILE line 3) are two names of one option; keep one of them",
        ),
        ("multigpu: [0]", "FILE line 1: multigpu must be a single value"),
        ("lr: 1\nsparsity:\n  K: 3", "FILE line 2: sparsity must be a single value"),
        ("<<: {lr: 1}", "FILE line 1: << must be a single value"),
        ("? [a]\n: 1", "FILE line 1: a key must be one word"),
        ("lr: &a 0.1\nweight_lr: *a", "FILE line 1: anchors and aliases (& and *) are not allowed"),
        (
            "name: !!python/object/apply:os.system ['true']",
            "FILE line 1: the tag '!!python/object/apply:os.system' is not allowed; write the plain value",
        ),
        ("!!python/object:os.x {}", "FILE line 1: the tag '!!python/object:os.x' is not allowed"),
        ("lr: !!float 1", "the tag '!!float' is not allowed"),
        ("", "FILE line 1: the file holds no keys"),
        ("# only a comment\n", "FILE line 1: the file holds no keys"),
        ("{}", "FILE line 1: the file holds no keys"),
        ("- lr", "FILE line 1: expected lines 'key: value'"),
        ("lr:0.1", "FILE line 1: expected lines 'key: value' (with a space after the colon)"),
        ("[" * 100_000, "FILE line 1: expected lines 'key: value'"),
        ("lr: 1\n---\nlr: 2", "FILE line 2: expected a single document"),
        ("lr: 1\n\tepochs: 3", "FILE line 2: while scanning for the next token, found character '\\t'"),
        ("lr:\t1", "use spaces instead of tabs"),
        ("lr: 1: 2", "FILE line 1: mapping values are not allowed here"),
        ("lr: 1\nname: \x01", "FILE line 2 holds a control character; remove it"),
        (b"lr: 1\nname: \xff", "FILE line 2 is not UTF-8 text; save the file as UTF-8"),
        ("#" * (2**20 + 1), "config file FILE is larger than 1048576 bytes"),
    ],
)
def test_yaml_mistakes_are_refused_in_words(tmp_path, text, message):
    expected = message.replace("FILE", str(tmp_path / "some.yaml"))
    assert expected in refused(tmp_path, text)


def test_a_file_that_cannot_be_read(tmp_path):
    missing = tmp_path / "missing.yaml"
    expected = f"cannot read the config file {missing}: No such file or directory; check the path"
    assert refused(f"--config {missing}") == expected
    assert "Is a directory" in refused(f"--config {tmp_path}")


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
        ("--lr 1e999", "score_lr must be a finite number, above 0, got '1e999'"),
        ("--epochs 3.0", "epochs must be a whole number, at least 1, got '3.0' (command line)"),
        ("--epochs " + "9" * 5000, "999... (command line)"),
        (
            "--arch resnet33",
            f"arch must be one of {', '.join(ARCHS)}, got 'resnet33' (command line); did you mean 'resnet34'?",
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
    "thin": "keep_ratio budget first_layer_dense last_layer_dense finetune_epochs execution",
    "random": "keep_ratio budget constrain_by_layer residual_masks finetune_epochs",
    "coin": "K alpha estimator score_every rank_masks score_lr",
    "l1": "keep_ratio budget shrink residual_masks bn_batches finetune_lr finetune_policy finetune_batch_size",
    "slimming": "slimming_penalty constrain_by_layer bn_batches finetune_lr shrink",
    "sfp": "keep_ratio bn_batches finetune_batch_size execution",
    "gumbel": "score_lr optimizer score_init_constant budget_schedule constrain_by_layer num_subnets shrink",
}
NOT_READ = {
    "vrpge": "slimming_penalty",
    "released": "estimator score_gradient execution shrink residual_masks score_every rank_masks slimming_penalty",
    "dense": "keep_ratio budget score_lr optimizer execution shrink residual_masks bn_batches finetune_lr num_subnets "
    "first_layer_dense last_layer_dense finetune_policy finetune_batch_size sample_from_training_set slimming_penalty",
    "thin": "K alpha score_lr optimizer constrain_by_layer residual_masks shrink bn_batches budget_schedule",
    "random": "K score_lr shrink bn_batches finetune_lr num_subnets score_init_constant finetune_policy",
    "coin": "slimming_penalty",
    "l1": "K score_lr optimizer constrain_by_layer num_subnets score_init_constant slimming_penalty",
    "slimming": "K alpha estimator score_lr num_subnets sample_from_training_set budget_schedule",
    "sfp": "constrain_by_layer slimming_penalty score_lr",
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
        ("--constrain-by-layer --budget flops", "needs budget channels, got budget flops (command line)"),
        ("--score-init-constant 0.6", "score_init_constant 0.6 (command line) is above keep_ratio 0.5 (default)"),
        ("--epochs 5 --warmup-length 5", "warmup_length 5 (command line) must be below epochs 5 (command line)"),
        ("--nesterov --momentum 0", "needs a momentum above 0, got momentum 0.0 (command line)"),
        ("--holdout 0", "holdout 0.0 (command line) and sample_from_training_set off (default) leave no images"),
        ("--method gumbel --holdout 0", "leave no images to choose the subnet with"),
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


# ---- dictionaries and YAML written back ----

NAMES = (
    "012",
    "on",
    "1e-4",
    "null",
    "~",
    "a: b",
    "# x",
    "'q'",
    '"',
    "caf\u00e9",
    "- a",
    "!x",
    "&a",
    "*a",
    "%",
    "{",
    " a ",
)


@pytest.mark.parametrize(
    "config",
    [
        *(Config(run=RunConfig(name=name, resume=name, multigpu="0")) for name in NAMES),
        *(Config(sparsity=SparsityConfig(keep_ratio=ratio, shrink=False)) for ratio in (5e-324, 0.1 + 0.2, 1 / 3, 1.0)),
        Config(model=ModelConfig(width_mult=12e-3 * 7), train=TrainConfig(weight_decay=1.7e308, epochs=10**9)),
    ],
)
def test_round_trips(config):
    flat = config_to_dict(config)
    assert config_from_dict(flat, "here") == config
    assert all(type(value) in (str, int, float, bool, type(None)) for value in flat.values())
    assert config_from_dict(yaml.safe_load(config_to_yaml(config)), "here") == config
    origin = dict.fromkeys(flat, "command line")
    assert config_from_dict(yaml.safe_load(config_to_yaml(config, origin)), "here") == config


def test_the_resolved_yaml_is_a_config_file(tmp_path):
    first = parse_args(["--config", str(CONFIGS / "released.yaml"), "--name", "on # 012", "--seed", "3"])
    text = config_to_yaml(first.config, first.origin)
    assert "\nseed: 3  # command line\n" in text
    assert "\nepochs: 300  # file\n" in text
    assert "\nsave_every: 0  # default\n" in text
    assert "\n# sparsity - how many units are kept, and how they are searched\n" in text
    second = parse_yaml(tmp_path, text).config
    run = dataclasses.replace(second.run, config=first.config.run.config)
    assert dataclasses.replace(second, run=run) == first.config


def test_a_long_name_stays_readable_on_its_line():
    name = "caf\u00e9 " * 40 + "end"
    assert f"\nname: {name}\n" in config_to_yaml(parse_args(["--name", name]).config)


def test_a_printed_config_does_not_print_again(tmp_path):
    text = config_to_yaml(parse("--print-config").config)
    assert parse_yaml(tmp_path, text).config.run.print_config is False


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"kep_ratio": 0.5}, "unknown key 'kep_ratio' (last.pt); did you mean 'keep_ratio'?"),
        ({"keep_ratio": 50}, "keep_ratio must be in (0, 1], got 50.0 (last.pt)"),
        ({"epochs": 3.0}, "epochs must be a whole number, at least 1, got '3.0' (last.pt)"),
        ({"epochs": True}, "epochs must be a whole number, at least 1, got 'True' (last.pt)"),
        ({"epochs": "3"}, "got the text '3' (last.pt)"),
        ({"epochs": None}, "got nothing (null) (last.pt)"),
        ({"nesterov": 1}, "nesterov must be on or off, got '1' (last.pt)"),
        ({"multigpu": [0]}, "multigpu must be a single value, got list (last.pt)"),
        ({"epochs": 2, "warmup_length": 3}, "warmup_length 3 (last.pt) must be below epochs 2 (last.pt)"),
        ({3: 4}, "unknown key '3' (last.pt)"),
    ],
)
def test_a_stored_dictionary_is_checked_like_a_file(flat, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config_from_dict(flat, "last.pt")


# ---- help and list ----

NEEDED_FIRST = (
    *(
        "config",
        "name",
        "seed",
        "device",
        "resume",
        "evaluate",
        "print-config",
        "dry-run",
        "list",
        "help",
        "set",
        "data",
    ),
    *("image-size", "workers", "arch", "pretrained", "method", "keep-ratio", "budget", "estimator", "epochs"),
    *("batch-size", "score-lr", "weight-lr", "finetune-epochs", "precision"),
)


def help_sections(capsys, monkeypatch, flags: str) -> dict[str, str]:
    """The text of --help by flag, white space made single."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as leaving:
        parse(flags)
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "--help all" in text
    return {section.split()[0]: " ".join(section.split()) for section in re.split(r"\n  --", text)[1:]}


def test_help_shows_what_is_needed_first(capsys, monkeypatch):
    assert set(help_sections(capsys, monkeypatch, "--help")) == set(NEEDED_FIRST)
    assert set(help_sections(capsys, monkeypatch, "-h")) == set(NEEDED_FIRST)


def test_help_all_shows_every_option_with_its_default(capsys, monkeypatch):
    sections = help_sections(capsys, monkeypatch, "--help all")
    assert set(sections) == {key.replace("_", "-") for key in OPTIONS} | {"help", "list"}
    decided_later = {"name": "the arch", "score_init_constant": "keep_ratio; 1 with budget_schedule cubic"}
    for key, value in DEFAULTS.items():
        words = {None: decided_later.get(key, "none")} | {"True": "on", "False": "off"}
        shown = f"{value:g}" if isinstance(value, float) else words.get(value, words.get(str(value), value))
        assert f"(default: {shown})" in sections[key.replace("_", "-")], key
    assert "in (0, 1]; also --prune-rate" in sections["keep-ratio"]
    assert "resnet110_he, vgg11" in sections["arch"]
    assert "free|tied" in sections["residual-masks"]
    assert "divided by 10 at 50 % and at 75 % of the epochs" in sections["lr-policy"]


def test_list_names_every_choice_without_importing_torch():
    program = "import sys; from main import main\ntry: main(['--list'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    *text, imported = done.stdout.splitlines()
    assert imported == "False"
    parts = "\n".join(text).split("\n\n")
    configs = [f"configs/{path.name}" for path in sorted(CONFIGS.glob("*.yaml"))]
    for part, names in zip(parts, (ARCHS, SETS, METHODS, ESTIMATORS, configs), strict=True):
        _, *lines = part.splitlines()
        assert [line.split()[0] for line in lines] == list(names)
        assert all(len(line.split()) > 3 for line in lines)
    assert parts[-1].endswith("(Zhou et al., NeurIPS 2021).")


def test_the_options_are_printed_without_importing_torch():
    program = "import sys; from main import main; main(['--print-config']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("# run - ")
    assert done.stdout.endswith("False\n")


# ---- resuming ----


def stored_run() -> Config:
    return parse("--keep-ratio 0.25 --epochs 12 --multigpu 0 --log-dir elsewhere").config


def test_resuming_takes_the_stored_config():
    config = check_resume(stored_run(), parse("--resume runs/a"))
    assert config == dataclasses.replace(stored_run(), run=dataclasses.replace(stored_run().run, resume="runs/a"))


def test_the_same_command_can_be_given_again(tmp_path):
    given = "epochs: 12\nkeep_ratio: 0.25"
    stored = parse_yaml(tmp_path, given).config
    assert check_resume(stored, parse_yaml(tmp_path, given, "--resume")).train.epochs == 12


def test_every_conflict_is_listed(tmp_path):
    arguments = parse_yaml(tmp_path, "epochs: 20\nbatch_size: 256", "--resume --prune-rate 0.5 --seed 1")
    with pytest.raises(UserError) as error:
        check_resume(stored_run(), arguments)
    message = str(error.value)
    assert "keep_ratio: stored 0.25, given 0.5 (command line)" in message
    assert "epochs: stored 12, given 20 (file)" in message
    assert "seed: stored 0, given 1 (command line)" in message
    assert "batch_size" not in message


def test_what_concerns_only_this_machine_may_change():
    arguments = parse("--resume runs/a --print-freq 7 --save-every 2 --evaluate --name b --dry-run")
    run = check_resume(stored_run(), arguments).run
    assert (run.print_freq, run.save_every, run.evaluate, run.dry_run, run.name) == (7, 2, True, True, "b")
    assert run.log_dir == "elsewhere"


def test_commands_of_the_first_run_are_not_repeated():
    stored = parse("--resume x --evaluate --dry-run").config
    run = check_resume(stored, parse("--resume y")).run
    assert (run.resume, run.evaluate, run.dry_run) == ("y", False, False)


def test_a_new_device_replaces_the_stored_gpu():
    run = check_resume(stored_run(), parse("--resume x --device cpu")).run
    assert (run.device, run.multigpu) == ("cpu", None)
    with pytest.raises(UserError, match="contradict each other"):
        check_resume(stored_run(), parse("--resume x --device cpu --multigpu 0"))


def test_effects_are_judged_by_the_stored_config():
    stored = parse("--set ImageFolder --data here").config
    config = check_resume(stored, parse("--resume x --workers 8 --data there"))
    assert (config.data.workers, config.data.data) == (8, "there")
    with pytest.raises(UserError, match=r"--workers .* has no effect"):
        check_resume(stored_run(), parse("--resume x --workers 8"))
