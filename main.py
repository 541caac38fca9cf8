"""Trains, resumes or evaluates one network: `python main.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

try:
    from args import config_to_yaml, parse_args
except ModuleNotFoundError as error:
    sys.exit(f"error: the package {error.name} is not installed; run `python -m pip install -r requirements.txt`")
from utils.errors import RankError, UserError
from utils.output import breakable_output
from utils.ranks.launch import num_started, only_first_rank_speaks, rank_here
from utils.run.memory import keep_freed_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 something could not be written, 2 a user's mistake, 3 diverged, 4 ranks have
    lost each other, 129, 130 or 143 stopped by SIGHUP, Ctrl-C or SIGTERM. With --doctor 1 means that no training could
    start here."""
    with breakable_output() as output:
        try:
            with only_first_rank_speaks():
                code = _run(argv)
        except (UserError, RankError) as error:
            if rank_here() == 0 or error.on_one_rank:
                rank = f"rank {rank_here()}: " if num_started() > 1 else ""
                print(f"{rank}error: {error}", file=sys.stderr)
            code = 4 if isinstance(error, RankError) else 2
        except KeyboardInterrupt:  # before or after the training, which saves first
            print("stopped by Ctrl-C", file=sys.stderr)
            code = 130
    return code or int(output.error is not None)


def _run(argv: Sequence[str] | None) -> int:
    arguments = parse_args(argv)
    asked = arguments.config.run
    if asked.doctor:
        from trainers.doctor import examine

        return examine(arguments.config)
    if asked.print_config and asked.resume is None:
        print(config_to_yaml(arguments.config, arguments.origin), end="")
        return 0
    if not asked.print_config:  # what is printed then is a file
        from utils.run.progress import announce

        announce("the options are read, starting PyTorch")
    keep_freed_memory()
    from trainers.session import Session  # torch takes seconds to import: only once the options are known good

    return Session(arguments, ["main.py", *(sys.argv[1:] if argv is None else argv)]).start()


if __name__ == "__main__":
    sys.exit(main())
