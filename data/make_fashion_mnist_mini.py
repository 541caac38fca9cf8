"""Draw the bundled sample of Fashion-MNIST.

python -m data.make_fashion_mnist_mini --source DIR --output FILE
"""

import argparse
import hashlib
import lzma
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.idx import idx_bytes, read_idx_file
from data.sources import FASHION_MNIST_DEBIAN, FASHION_MNIST_MINI
from utils.paths import at_home

SEED = 20211
TRAIN_PER_CLASS = 1000
TEST_PER_CLASS = 200


def draw_per_class(labels: np.ndarray, per_class: int, random: np.random.Generator) -> np.ndarray:
    """Indices of `per_class` images of each class, without repetition, in random order."""
    chosen = [random.choice(np.flatnonzero(labels == label), per_class, replace=False) for label in np.unique(labels)]
    return random.permutation(np.concatenate(chosen))


def make_sample(source: Path, output: Path) -> str:
    """Write the sample: training images, their labels, test images, their labels, as IDX in one xz file.

    Args:
        source: folder with the four files train-images-idx3-ubyte.gz and so on.
        output: file to write.
    Returns: SHA-256 of the written file, in hexadecimal.
    """
    random = np.random.Generator(np.random.PCG64(SEED))
    arrays = []
    for part, per_class in (("train", TRAIN_PER_CLASS), ("t10k", TEST_PER_CLASS)):
        [images] = read_idx_file(source / f"{part}-images-idx3-ubyte.gz")
        [labels] = read_idx_file(source / f"{part}-labels-idx1-ubyte.gz")
        chosen = draw_per_class(labels, per_class, random)
        arrays += [images[chosen], labels[chosen]]
    # xz at its strongest: 4.5 MB, against 5.2 MB for an npz file; it unpacks in a third of a second.
    compressed = lzma.compress(idx_bytes(arrays), check=lzma.CHECK_CRC64, preset=9 | lzma.PRESET_EXTREME)
    output.write_bytes(compressed)
    return hashlib.sha256(compressed).hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the bundled sample of Fashion-MNIST.")
    parser.add_argument(
        "--source",
        type=at_home,
        default=FASHION_MNIST_DEBIAN,
        help="folder with the four .gz files of Fashion-MNIST (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=at_home, default=FASHION_MNIST_MINI, help="file to write (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    checksum = make_sample(arguments.source, arguments.output)
    print(f"{checksum}  {arguments.output} ({arguments.output.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
