"""Paths as users write them, and what lies there."""

import os
import stat
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


def kind_of(path: str | os.PathLike) -> str:
    """What a path is that is neither a file nor a folder; "" for those two, and if there is nothing."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return ""
    kinds = {
        "a named pipe": stat.S_ISFIFO,
        "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
        "a socket": stat.S_ISSOCK,
    }
    return next((kind for kind, is_it in kinds.items() if is_it(mode)), "")
