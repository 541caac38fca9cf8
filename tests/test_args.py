"""Options: precedence, spellings, every refusal by its wording, round trips and the rule for resuming."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from args import (
    ARCHS,
    MASKING_KEYS,
    MAY_CHANGE,
    OPTIONS,
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

CONFIGS = Path(__file__).parents[1] / "configs"
ORIGINAL_COMMAND = (
    "python main.py --config configs/config.yaml --multigpu 0 --score-init-constant 0.5 --prune-rate 0.5 "
    "--arch resnet32 --set CIFAR10 --lr 12e-3"
)


def parse(command_line: str = "") -> Arguments:
    return parse_args(command_line.split())


def parse_yaml(folder: Path, text: str | bytes, command_line: str = "") -> Arguments:
    path = folder / "some.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse_args(["--config", str(path), *command_line.split()])


def refused(*arguments) -> str:
    """The message of the error that the arguments of `parse` or `parse_yaml` raise."""
    with pytest.raises(UserError) as error:
        parse(*arguments) if isinstance(arguments[0], str) else parse_yaml(*arguments)
    return str(error.value)


# ---- precedence, names, files that ship ----


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    arguments = parse_yaml(tmp_path, "epochs: 7\nkeep_ratio: 0.4\n", "--keep-ratio 0.3")
    assert arguments.config.sparsity.keep_ratio == 0.3
    assert arguments.config.train.epochs == 7
    assert arguments.config.train.batch_size == 256
    assert arguments.origin["keep_ratio"] == "command line"
    assert arguments.origin["epochs"] == "file"
    assert arguments.origin["batch_size"] == "default"
    assert set(arguments.origin) == set(config_to_dict(Config()))


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


def test_the_two_recipes_differ_only_where_the_released_code_differs():
    ours = config_to_dict(parse_args(["--config", str(CONFIGS / "config.yaml")]).config)
    released = config_to_dict(parse_args(["--config", str(CONFIGS / "released.yaml")]).config)
    different = {key: released[key] for key in ours if ours[key] != released[key] and key != "config"}
    assert different == {
        "holdout": 0.0,
        "sample_from_training_set": True,
        "semantics": "released",
        "execution": "masked",
        "weight_samples": 2,
        "clip_jointly": True,
    }


@pytest.mark.parametrize(
    ("alias", "key", "text", "value"),
    [
        ("prune_rate", "keep_ratio", "0.25", 0.25),
        ("lr", "score_lr", "1e-3", 0.001),
        ("weight_opt_lr", "weight_lr", "0.2", 0.2),
    ],
)
def test_aliases_are_accepted_in_both_places(tmp_path, alias, key, text, value):
    assert config_to_dict(parse(f"--{alias.replace('_', '-')} {text}").config)[key] == value
    arguments = parse_yaml(tmp_path, f"{alias}: {text}")
    assert config_to_dict(arguments.config)[key] == value
    assert arguments.origin[key] == "file"
    # In different places the two names are the same key, and the command line wins.
    arguments = parse_yaml(tmp_path, f"{alias}: 0.4", f"--{key} {text}")
    assert config_to_dict(arguments.config)[key] == value


def test_names_are_unique():
    names = [name for entry in OPTIONS.values() for name in entry.names]
    assert len(names) == len(set(names))
    assert set(OPTIONS) >= MAY_CHANGE | MASKING_KEYS


def test_dashes_and_underscores_are_the_same(tmp_path):
    for spelling in ("--keep-ratio 0.3", "--keep_ratio 0.3", "--keep_ratio=0.3", "--prune_rate 0.3"):
        assert parse(spelling).config.sparsity.keep_ratio == 0.3
    assert parse_yaml(tmp_path, "keep-ratio: 0.3").config.sparsity.keep_ratio == 0.3
    assert parse("--name a_b").config.run.name == "a_b"
    assert parse("--name=a_b").config.run.name == "a_b"
    assert parse("--K 3").config.sparsity.K == 3


def test_switches():
    assert parse("--no-finetune").config.finetune.finetune is False
    assert parse("--finetune").origin["finetune"] == "command line"
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


# ---- YAML spellings ----


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("score_lr: 12e-3", 0.012),
        ("score_lr: 1e-4", 0.0001),
        ("score_lr: '1e-4'", 0.0001),
        ("score_lr: 1", 1.0),
        ("epochs: 012", 12),
        ("epochs: 1_000", 1000),
        ("name: 012", "012"),
        ("name: on", "on"),
        ("name: 1e-4", "1e-4"),
        ("name: 'null'", "null"),
        ("multigpu: 0", "0"),
        ("nesterov: yes", True),
        ("nesterov: On", True),
        ("nesterov: FALSE", False),
        ("name: None", None),
        ("name: none", None),
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
        ("epochs: 1:30", "a whole number, at least 1, got '1:30'"),
        ("epochs: ~", "epochs must be a whole number, at least 1, got nothing (null)"),
        ("epochs: None", "epochs must be a whole number, at least 1, got nothing (null)"),
        ("epochs: \u0663", "a whole number, at least 1"),
        ("data: null", "data must be a text of one line, got nothing (null)"),
        ("data: ''", "data must be a text of one line, got ''"),
        ("name: |\n  a\n  b", r"name must be a text of one line, got 'a\nb'"),
        ("nesterov: 1", "nesterov must be true or false, got '1'"),
        ("nesterov: 'yes'", "got the text 'yes' (FILE line 1); write it without quotes"),
        ("lr: .inf", "score_lr must be a finite number, above 0, got '.inf' (FILE line 1, as lr)"),
        ("lr: nan", "score_lr must be a finite number, above 0, got 'nan'"),
        ("keep_ratio: 50 %", "keep_ratio must be a finite number, in (0, 1], got '50 %'"),
        ("kep_ratio: 0.5", "unknown key 'kep_ratio' (FILE line 1); did you mean 'keep_ratio'?"),
        ("lr: 1\nk: 3", "unknown key 'k' (FILE line 2); did you mean 'K'?"),
        ("zzzz: 3", "unknown key 'zzzz' (FILE line 1); --help lists every option"),
        ("lr: 0.1\nepochs: 2\nlr: 0.1", "'lr' is given twice: FILE line 1 and FILE line 3; keep one"),
        (
            "lr: 0.1\n\nscore-lr: 0.1",
            "'lr' (FILE line 1) and 'score_lr' (FILE line 3) are two names of one option; keep one of them",
        ),
        ("multigpu: [0]", "FILE line 1: multigpu must be a single value, not a list or a mapping"),
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
        ("lr: 1\n---\nlr: 2", "FILE line 3: a second YAML document starts here; keep one"),
        ("lr: 1\n\tepochs: 3", "FILE line 2 is not valid YAML: found character '\\t'"),
        ("lr:\t1", "use spaces instead of tabs"),
        ("lr: 1: 2", "FILE line 1 is not valid YAML: mapping values are not allowed here"),
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
        ("--holdout 10", "holdout must be in [0, 0.5], got 10.0 (command line); it is a fraction"),
        ("--holdout 0.51", "holdout must be in [0, 0.5], got 0.51"),
        ("--score-init-constant 0", "score_init_constant must be in (0, 1], got 0.0"),
        ("--alpha 1", "alpha must be in [0.5, 1), got 1.0"),
        ("--alpha 0.49", "alpha must be in [0.5, 1), got 0.49"),
        ("--K 0", "K must be in [1, 64], got 0"),
        ("--K 1", "estimator vrpge (default) and K 1 (command line) contradict each other"),
        ("--estimator taylor --K 2", "estimator taylor (command line) and K 2 (command line) contradict each other"),
        ("--estimator taylor --gauge-every 5", "gauge_every 5 (command line) compares estimates from two draws"),
        ("--estimator taylor --method coin", "estimator taylor (command line) learns from gradients, which no coin"),
        (
            "--estimator linear_cv_gates --semantics released --execution masked",
            "leaves the shift of its batch-norm; leave one",
        ),
        ("--K 65", "K must be in [1, 64], got 65"),
        ("--weight-samples 0", "weight_samples must be in [1, 64], got 0"),
        ("--workers 65", "workers must be in [0, 64], got 65"),
        ("--width-mult 0", "width_mult must be in [0.01, 16], got 0.0"),
        ("--epochs 0", "epochs must be at least 1, got 0 (command line)"),
        ("--batch-size 1", "batch_size must be at least 2, got 1"),
        ("--lr 0", "score_lr must be above 0, got 0.0 (command line, as lr)"),
        ("--weight-lr -1", "weight_lr must be above 0, got -1.0"),
        ("--momentum 1", "momentum must be in [0, 1), got 1.0"),
        ("--weight-decay -1", "weight_decay must be at least 0, got -1.0"),
        ("--warmup-length -1", "warmup_length must be at least 0, got -1"),
        ("--label-smoothing 1", "label_smoothing must be in [0, 1), got 1.0"),
        ("--clip-norm 0", "clip_norm must be above 0, got 0.0"),
        ("--budget-end 1.1 --budget-schedule cubic", "budget_end must be in [0, 1], got 1.1"),
        ("--finetune-epochs 0", "finetune_epochs must be at least 1, got 0"),
        ("--num-subnets 1001", "num_subnets must be in [0, 1000], got 1001"),
        ("--bn-batches 0", "bn_batches must be in [1, 10000], got 0"),
        ("--print-freq 0", "print_freq must be at least 1, got 0"),
        ("--save-every -1", "save_every must be at least 0, got -1"),
        ("--seed 2147483648", "seed must be in [0, 2147483647], got 2147483648"),
        ("--seed -1", "seed must be in [0, 2147483647], got -1"),
        ("--image-size 7 --set ImageFolder", "image_size must be 0 (as stored) or in [8, 512], got 7"),
        ("--image-size 513 --set ImageFolder", "image_size must be 0 (as stored) or in [8, 512], got 513"),
        ("--keep-ratio nan", "keep_ratio must be a finite number, in (0, 1], got 'nan'"),
        ("--lr 1e999", "score_lr must be a finite number, above 0, got '1e999'"),
        ("--epochs 3.0", "epochs must be a whole number, at least 1, got '3.0' (command line)"),
        ("--epochs " + "9" * 400, "epochs must be a whole number, at least 1, got '999"),
        ("--epochs " + "9" * 5000, "999... (command line)"),
        (
            "--arch resnet33",
            f"arch must be one of {', '.join(ARCHS)}, got 'resnet33' (command line); did you mean 'resnet34'?",
        ),
        ("--set cifar10", "got 'cifar10' (command line); did you mean 'CIFAR10'?"),
        ("--trainer other", "trainer must be one of default, got 'other'"),
        ("--device gpu", "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("--device cuda:-1", "device must be auto, cpu, cuda or cuda:N, got 'cuda:-1'"),
        ("--multigpu -1", "multigpu must be GPU ids that are not negative, such as 0 or 0,1, got '-1'"),
        ("--multigpu 0,0", "multigpu must be GPU ids that are distinct, such as 0,1, got '0,0'"),
        ("--name a/b", "name must be the name of one folder, not a path, got 'a/b'"),
        ("--name ..", "name must be the name of one folder, not a path, got '..'"),
        ("--kep-ratio 0.5", "unknown option '--kep-ratio' (command line); did you mean '--keep-ratio'?"),
        ("--kep_ratio=0.5", "unknown option '--kep-ratio' (command line); did you mean '--keep-ratio'?"),
        ("--no-finetun", "unknown option '--no-finetun' (command line); did you mean '--no-finetune'?"),
        ("--epoch 3", "unknown option '--epoch' (command line); did you mean '--epochs'?"),
        ("-K 3", "unknown option '-K' (command line); did you mean '--K'?"),
        ("-b 3", "unknown option '-b' (command line); --help lists every option"),
        ("--epochs 3 4", "unexpected word '4' (command line)"),
        ("--finetune true", "a switch takes none (--name or --no-name)"),
        ("--epochs", "command line: argument --epochs: expected one argument; --help lists every option"),
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
        "--K 64 --weight-samples 64",
        "--momentum 0",
        "--seed 2147483647",
        "--set ImageFolder --image-size 8 --workers 0",
        "--set ImageFolder --image-size 0",
        "--budget-schedule cubic --budget-start 0 --budget-end 1",
        "--device cuda:11",
        "--device cuda:1 --multigpu 1",
        "--multigpu 10",
        "--multigpu 0,2,10 --sync-bn",
    ],
)
def test_the_ends_of_the_ranges_are_allowed(command_line):
    parse(command_line)


def test_an_empty_value_is_refused():
    with pytest.raises(UserError, match="name must be a text of one line, got ''"):
        parse_args(["--name", ""])


# ---- options that do not go together ----


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        (
            "--weight-samples 3",
            "weight_samples 3 (command line) is more than K 2 (default): only K masks are drawn; pass at most K",
        ),
        (
            "--budget-schedule cubic --budget-start 0.4",
            "budget_start 0.4 (command line) must be below budget_end 0.4 (default)",
        ),
        (
            "--semantics released",
            "semantics released (command line) cannot run with execution compact (default), because its "
            "dropped channels are not zero; pass --execution masked",
        ),
        (
            "--epochs 5 --warmup-length 5",
            "warmup_length 5 (command line) must be below epochs 5 (command line)",
        ),
        ("--evaluate", "evaluate True (command line) needs a trained run; pass --resume PATH"),
        ("--nesterov --momentum 0", "needs a momentum above 0, got momentum 0.0 (command line)"),
        ("--holdout 0", "holdout 0.0 (command line) leaves no images to choose the subnet with"),
        (
            "--score-init-constant 0.6",
            "score_init_constant 0.6 (command line) is above keep_ratio 0.5 (default): the start would "
            "overspend the budget; pass --score-init-constant 0.5 or less, or --budget-schedule cubic",
        ),
        (
            "--device cpu --multigpu 0",
            "device cpu (command line) and multigpu 0 (command line) contradict each other; pass one of them",
        ),
        ("--device cuda:1 --multigpu 0", "contradict each other"),
        ("--device cuda:1 --multigpu 0,1", "contradict each other"),
        (
            "--sync-bn --rank-masks independent",
            "sync_bn True (command line) needs rank_masks shared, got rank_masks independent (command line); leave",
        ),
        ("--sync-bn --conv-type DenseConv", "needs compact execution, got conv_type DenseConv (command line) and"),
        ("--sync-bn --execution masked", "and execution masked (command line); leave it out"),
        (
            "--conv-type DenseConv --K 3 --lr 1e-3",
            "--K, --score-lr (command line) have no effect: conv_type is DenseConv (no masks, no subnet); "
            "pass another --method, or leave it out",
        ),
        ("--no-finetune --finetune-lr 1", "--finetune-lr (command line) has no effect: finetune is off"),
        ("--budget-end 0.3", "--budget-end (command line) has no effect: budget_schedule is constant"),
        ("--init orthogonal --mode fan_in", "--mode (command line) has no effect: init is orthogonal"),
        ("--image-size 64", "--image-size (command line) has no effect: set is FashionMNIST-mini"),
        ("--set CIFAR10 --workers 3", "--workers (command line) has no effect: set is CIFAR10"),
        ("--data here", "--data (command line) has no effect: set FashionMNIST-mini is in the repository"),
    ],
)
def test_contradictions_and_options_without_effect_are_refused(command_line, message):
    assert message in refused(command_line)


@pytest.mark.parametrize(
    "command_line",
    [
        "--weight-samples 2",
        "--semantics released --execution masked",
        "--holdout 0 --sample-from-training-set",
        "--holdout 0 --conv-type DenseConv",
        "--score-init-constant 0.6 --keep-ratio 0.6",
        "--score-init-constant 0.6 --budget-schedule cubic",
        "--device cpu",
        "--init xavier_normal",
        "--init kaiming_uniform --mode fan_out",
        "--evaluate --resume",
    ],
)
def test_what_goes_together_is_accepted(command_line):
    parse(command_line)


@pytest.mark.parametrize("key", sorted(MASKING_KEYS))
def test_no_masking_option_is_accepted_for_a_dense_network(tmp_path, key):
    value = config_to_dict(Config())[key]
    flag = f"--{key}" if isinstance(value, bool) else f"--{key} {0.5 if value is None else value}"
    assert "has no effect: conv_type is DenseConv" in refused(f"--conv-type DenseConv {flag}")
    # One YAML file serves both kinds of network.
    parse_yaml(tmp_path, config_to_yaml(Config()), "--conv-type DenseConv")


def test_messages_name_the_line_of_the_file(tmp_path):
    message = refused(tmp_path, "epochs: 3\nK: 3\n", "--weight-samples 4")
    assert f"K 3 ({tmp_path / 'some.yaml'} line 2)" in message


# ---- dictionaries and YAML written back ----

FOLDER_NAMES = st.text(min_size=1).filter(
    lambda text: text.isprintable() and text.strip() and not set(text) & set("/\\")
)
CONFIG_EXAMPLES = st.builds(
    lambda run, model, sparsity, train: Config(run=run, model=model, sparsity=sparsity, train=train),
    run=st.builds(
        RunConfig,
        name=st.none() | FOLDER_NAMES.filter(lambda text: text not in (".", "..", "None", "none")),
        seed=st.integers(0, 2**31 - 1),
        multigpu=st.none() | st.integers(0, 100).map(str),
        resume=st.sampled_from([None, "auto", "012"]),
    ),
    model=st.builds(ModelConfig, width_mult=st.floats(0.01, 16), first_layer_dense=st.booleans()),
    sparsity=st.builds(SparsityConfig, keep_ratio=st.floats(0, 1, exclude_min=True)),
    train=st.builds(TrainConfig, weight_decay=st.floats(0, allow_infinity=False), epochs=st.integers(1, 10**9)),
)


@given(CONFIG_EXAMPLES)
@settings(max_examples=50, deadline=None)
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
        ({"nesterov": 1}, "nesterov must be true or false, got '1' (last.pt)"),
        ({"multigpu": [0]}, "multigpu must be a single value, got list (last.pt)"),
        ({"K": 2, "weight_samples": 3}, "weight_samples 3 (last.pt) is more than K 2 (last.pt)"),
        ({3: 4}, "unknown key '3' (last.pt)"),
    ],
)
def test_a_stored_dictionary_is_checked_like_a_file(flat, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config_from_dict(flat, "last.pt")


# ---- help ----


def help_sections(capsys, monkeypatch) -> dict[str, str]:
    """The text of --help by flag, white space made single."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as leaving:
        parse("--help")
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines())
    sections = re.split(r"\n  --", text)
    return {section.split()[0]: " ".join(section.split()) for section in sections}


def test_help_shows_every_key_with_its_default(capsys, monkeypatch):
    sections = help_sections(capsys, monkeypatch)
    decided_later = {"name": "the arch", "score_init_constant": "keep_ratio; 1 with budget_schedule cubic"}
    for key, value in config_to_dict(Config()).items():
        words = {None: decided_later.get(key, "none")} | {"True": "on", "False": "off"}
        shown = f"{value:g}" if isinstance(value, float) else words.get(value, words.get(str(value), value))
        assert f"(default: {shown})" in sections[key.replace("_", "-")], key


def test_help_shows_choices_ranges_aliases_and_groups(capsys, monkeypatch):
    sections = help_sections(capsys, monkeypatch)
    assert "fraction of units KEPT, as in the released code; in (0, 1]; also --prune-rate" in sections["keep-ratio"]
    assert "resnet110_he, vgg11" in sections["arch"]
    assert "unit|released" in sections["semantics"]
    assert "50 % and again from 75 % of the epochs" in sections["lr-policy"]
    everything = " ".join(sections.values())
    for group in dataclasses.fields(Config):
        assert f"{group.name} - {group.type.__doc__.rstrip('.')}:" in everything


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
