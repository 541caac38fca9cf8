"""Decode every image file in a folder and name those that training could not read.

python -m data.check FOLDER [--threads N] [--list FILE]

Training opens a file when it needs it and ends when it meets a bad one, so a large set is worth a check before the
first run. The exit code is 0 if all files are good, 1 if some are bad, and 2 if there is nothing to check.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool

from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from data.files import UnreadableImage, open_rgb
from data.folders import Walk
from utils.errors import UserError
from utils.paths import at_home


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.check", description="Decode every image file in a folder and name the bad ones."
    )
    parser.add_argument("folder", type=at_home, help="such as that of --data; all folders in it are searched")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: %(default)s, one a core")
    parser.add_argument("--list", type=at_home, help="file for the names of bad files: xargs -d '\\n' rm < LIST")
    arguments = parser.parse_args(argv)
    walk, files = Walk(), []
    if arguments.folder.is_dir():
        try:
            files = sorted(walk.files(arguments.folder))
        except (UserError, OSError) as error:
            parser.error(str(error))
    if not files:
        parser.error(f"there is no image file in {arguments.folder} ({', '.join(IMG_EXTENSIONS)})")
    bad = []
    for path, reason in bad_images(files, max(arguments.threads, 1)):
        bad.append(path)
        tqdm.write(f"{path} ({reason})", sys.stdout)
    if arguments.list:
        arguments.list.write_bytes(b"".join(os.fsencode(f"{path}\n") for path in bad))
    walk.announce_left_out("check", arguments.folder)
    print(f"{len(bad)} of {len(files)} files cannot be read")
    return 1 if bad else 0


def bad_images(files: Sequence[str], threads: int) -> Iterator[tuple[str, str]]:
    """The files that cannot be read, in the given order, each with the reason."""
    with ThreadPool(threads) as pool, tqdm(total=len(files), unit="file", leave=False, disable=None) as bar:
        for path, reason in zip(files, pool.imap(_reason, files, chunksize=16), strict=True):
            bar.update()
            if reason is not None:
                yield path, reason


def _reason(path: str) -> str | None:
    try:
        open_rgb(path)
    except UnreadableImage as error:
        return error.args[1]
    return None


if __name__ == "__main__":
    sys.exit(main())
