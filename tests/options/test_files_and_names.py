"""Options: precedence, names, options that are gone, and how YAML spells values."""

import re

import pytest
import yaml

from args import (
    METHODS,
    OPTIONS,
    REMOVED,
    Config,
    SparsityConfig,
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    parse_args,
)
from tests.options.parsing import (
    CONFIGS,
    DEFAULTS,
    ORIGINAL_COMMAND,
    parse,
    parse_yaml,
    refused,
    values,
)
from utils.errors import UserError
from utils.option_text import read_yaml

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
    # its weight_decay is that of the scores
    assert different == {
        **{"holdout": 0.0, "sample_from_training_set": True, "method": "released", "weight_decay": 0.0},
    }


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


AUTOMATIC = {
    *("batch_size", "epochs", "finetune_batch_size", "finetune_epochs", "holdout", "score_lr", "search_epochs"),
}


def test_auto_is_accepted_where_a_rule_exists_and_written_back(tmp_path):
    for key in AUTOMATIC | {"sample_from_training_set"}:
        mode = "decided" if key == "search_epochs" else "epochs"  # where it is read
        assert values(f"--search-until {mode} --{key.replace('_', '-')} auto")[key] == "auto"
        config = parse_yaml(tmp_path, f"{key}: auto").config
        assert parse_yaml(tmp_path, config_to_yaml(config)).config == config
        assert config_from_dict(config_to_dict(config), "stored") == config
    assert "keep_ratio must be a finite number, in (0, 1], got 'auto'" in refused("--keep-ratio auto")
    assert {key for key, entry in OPTIONS.items() if entry.auto} == AUTOMATIC | {"sample_from_training_set"}


def test_every_option_is_declared_once():
    names = [name for entry in OPTIONS.values() for name in entry.names] + list(REMOVED)
    assert len(names) == len(set(names))
    for entry in OPTIONS.values():
        assert set(entry.read_by) <= METHODS.keys(), entry.key
        assert entry.resumed in ("stored", "may change", "may grow", "this command"), entry.key
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
        ("epochs: on", "epochs must be a whole number, at least 1, or auto, got 'on' (FILE line 1)"),
        ("\nepochs: 3.0", "epochs must be a whole number, at least 1, or auto, got '3.0' (FILE line 2)"),
        ("epochs: '3'", "got the text '3' (FILE line 1); write it without quotes"),
        ("epochs: 1e3", "a whole number, at least 1, or auto, got '1e3'"),
        ("epochs: ~", "epochs must be a whole number, at least 1, or auto, got nothing (null)"),
        ("epochs: \u0663", "a whole number, at least 1"),
        ("data: null", "data must be a text of one line, got nothing (null)"),
        ("name: |\n  a\n  b", r"name must be a text of one line, got 'a\nb'"),
        ("nesterov: 1", "nesterov must be on or off, got '1'"),
        ("lr: .inf", "score_lr must be a finite number, above 0, or auto, got '.inf' (FILE line 1, as lr)"),
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


# ---- paths ----


def test_a_tilde_is_the_home_directory_in_every_path_of_a_file_and_of_the_command_line(tmp_path, monkeypatch):
    """A shell reads it in `--data ~/x`, but neither in `--data=~/x` nor in a file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [key for key, entry in OPTIONS.items() if entry.is_path]
    assert set(paths) == {"config", "log_dir", "resume", "data", "pretrained", "widths_of"}
    (tmp_path / "own.yaml").write_text("".join(f"{key}: ~/{key}\n" for key in paths if key != "config"))
    read = values("--config=~/own.yaml --method=thin")
    assert [read[key] for key in paths if key != "config"] == [f"{tmp_path}/{key}" for key in paths if key != "config"]
    assert read["config"] == f"{tmp_path}/own.yaml"
    assert values("--data=~ --set=MNIST")["data"] == str(tmp_path)
    assert values("--log-dir=a/~/b")["log_dir"] == "a/~/b"
    assert values("--name=~")["name"] == "~"  # no path
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError()))
    assert "log_dir: ~/runs means the home directory" in refused("--log-dir=~/runs")


def test_a_tilde_is_the_home_directory_for_tools_too(tmp_path, monkeypatch):
    from tools.command_line import ToolParser

    monkeypatch.setenv("HOME", str(tmp_path))
    parser = ToolParser("tools.any", "")
    parser.add_argument("run")
    parser.add_argument("--out")
    for words in (["~/run", "--out", "~/page"], ["~/run", "--out=~/page"]):
        assert vars(parser.parse_args(words)) == {"run": f"{tmp_path}/run", "out": f"{tmp_path}/page"}
    for tool in (
        "bench_options",
        "export",
        "gauge",
        "picture",
        "predict",
        "report",
        "reproduce",
    ):  # all read by that parser
        text = (CONFIGS.parent / f"tools/{tool}.py").read_text()
        assert "ToolParser(" in text
        assert "ArgumentParser(" not in text
