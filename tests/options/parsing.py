"""Short ways to parse options and to catch what is refused."""

from pathlib import Path

import pytest

from args import (
    Arguments,
    Config,
    config_to_dict,
    parse_args,
)
from utils.errors import UserError

PROJECT = Path(__file__).parents[2]
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
