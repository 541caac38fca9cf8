"""The command lines of the tools beside `main.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from utils.errors import UserError


class ToolParser(argparse.ArgumentParser):
    """Takes no abbreviations, and tells a mistake as a UserError."""

    def __init__(self, module: str, description: str) -> None:
        super().__init__(prog=f"python -m {module}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; --help lists every option")


def exit_code_of(run: Callable[[], int | None]) -> int:
    """Runs a tool: its own exit code (None: 0), or 2 and one sentence for a user's mistake."""
    try:
        return run() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
