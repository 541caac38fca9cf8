"""Paths as users write them."""

import os
from pathlib import Path


def expanded(text: str) -> str:
    """A path whose leading `~` or `~user` is the home directory, as a shell writes it.

    Shells do so only for words of their own. Files, and flags such as `--log-dir=~/runs`, keep the sign.

    Raises: ValueError if nothing says where the home directory is.
    """
    path = os.path.expanduser(text)
    if path == "~" or path.startswith("~/"):
        raise ValueError(f"{text} means the home directory, and nothing says where that is; set HOME")
    return path


def at_home(text: str) -> Path:
    """The `type` of an argument that is a path; see `expanded`."""
    return Path(expanded(text))
