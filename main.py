"""Trains, resumes or evaluates one network: `python main.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from args import config_to_yaml, parse_args
from utils.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 the last checkpoint could not be written, 2 a user's mistake, 3 diverged,
    130 or 143 stopped by Ctrl-C or SIGTERM."""
    try:
        arguments = parse_args(argv)
        if arguments.config.run.print_config and arguments.config.run.resume is None:
            print(config_to_yaml(arguments.config, arguments.origin), end="")
            return 0
        from trainers.session import start  # torch takes seconds to import: only once the options are known good

        return start(arguments, ["main.py", *(sys.argv[1:] if argv is None else argv)])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
