"""Options: round trips, help, lists, and the rule for resuming."""

import dataclasses
import re
import subprocess
import sys

import pytest
import yaml

from args import (
    ARCHS,
    ESTIMATORS,
    METHODS,
    OPTIONS,
    SETS,
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
from tests.options.parsing import (
    CONFIGS,
    DEFAULTS,
    PROJECT,
    parse,
    parse_yaml,
)
from utils.errors import UserError

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
        *(Config(run=RunConfig(name=name, resume=f"./{name}", multigpu="0")) for name in NAMES),
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
        ({"epochs": 3.0}, "epochs must be a whole number, at least 1, or auto, got '3.0' (last.pt)"),
        ({"epochs": True}, "epochs must be a whole number, at least 1, or auto, got 'True' (last.pt)"),
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
        "doctor",
        "list",
        "help",
        "search-until",
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
    decided_later = {"name": "the arch", "score_init_constant": "keep_ratio; budget_top with budget_schedule cubic"}
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
    assert "(Zhou et al., NeurIPS 2021).\n" in parts[-1]


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


def test_auto_agrees_with_what_was_chosen(tmp_path):
    config = check_resume(stored_run(), parse_yaml(tmp_path, "epochs: auto\nbatch_size: auto", "--resume"))
    assert (config.train.epochs, config.train.batch_size) == (12, 256)
    with pytest.raises(UserError, match=r"keep_ratio: stored 0\.25, given 0\.5"):
        check_resume(stored_run(), parse_yaml(tmp_path, "epochs: auto\nkeep_ratio: 0.5", "--resume"))


def test_every_conflict_is_listed(tmp_path):
    arguments = parse_yaml(tmp_path, "epochs: 20\nbatch_size: 256", "--resume --prune-rate 0.5 --seed 1")
    with pytest.raises(UserError) as error:
        check_resume(stored_run(), arguments)
    message = str(error.value)
    assert "keep_ratio: stored 0.25, given 0.5 (command line)" in message
    assert "epochs: stored 12, given 20 (file)" in message
    assert "seed: stored 0, given 1 (command line)" in message
    assert "batch_size" not in message


def test_a_run_may_become_longer_on_the_command_line_and_never_shorter(tmp_path):
    config = check_resume(stored_run(), parse("--resume a --epochs 20 --finetune-epochs 50"))
    assert (config.train.epochs, config.finetune.finetune_epochs, config.total_epochs) == (20, 50, 70)
    for shorter in ("--epochs 11", "--finetune-epochs 39", "--no-finetune"):
        with pytest.raises(UserError, match=r"on the command line may make a run longer, not shorter"):
            check_resume(stored_run(), parse(f"--resume a {shorter}"))
    with pytest.raises(UserError, match=r"epochs: stored 12, given 20 \(file\).*\(--epochs on the command line may"):
        check_resume(stored_run(), parse_yaml(tmp_path, "epochs: 20", "--resume a"))


def test_fine_tuning_may_be_added_to_a_run_that_had_none_with_options_of_its_own():
    stored = parse("--no-finetune --epochs 12").config
    config = check_resume(stored, parse("--resume a --finetune --finetune-epochs 3 --finetune-lr 0.02"))
    assert (config.finetune.finetune_epochs, config.finetune.finetune_lr, config.total_epochs) == (3, 0.02, 15)
    with pytest.raises(UserError, match=r"--finetune-lr \(command line\) has no effect: finetune is off"):
        check_resume(stored, parse("--resume a --finetune-lr 0.02"))
    with pytest.raises(UserError, match=r"finetune_lr: stored 0\.001, given 0\.02"):
        check_resume(stored_run(), parse("--resume a --finetune-lr 0.02"))


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
