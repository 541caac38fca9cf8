"""IDX, the file format of MNIST and its relatives: unsigned bytes behind a short header."""

import gzip
import lzma
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def read_idx_file(path: Path, num_arrays: int = 1) -> list[np.ndarray]:
    """Read arrays that follow each other in one file (plain, .gz or .xz) and must fill it exactly.

    Returns: read-only uint8 arrays.
    Raises: UserError naming the file if it cannot be read, is damaged, or ends too early or too late.
    """
    opener = _OPENERS.get(path.suffix, open)
    arrays, end = [], 0
    try:
        with opener(path, "rb") as stream:
            content = stream.read()
        for _ in range(num_arrays):
            array, end = _parse_array(content, end)
            arrays.append(array)
        if end != len(content):
            raise ValueError(f"{len(content) - end} bytes are left over at its end")
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"{path} is damaged or not an IDX file of unsigned bytes ({error}); delete it and fetch it again"
        ) from error
    return arrays


def idx_bytes(arrays: Sequence[np.ndarray]) -> bytes:
    """The uint8 arrays as IDX, one behind the other."""
    parts = []
    for array in arrays:
        assert array.dtype == np.uint8
        parts += [struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape), array.tobytes()]
    return b"".join(parts)


def _parse_array(content: bytes, start: int) -> tuple[np.ndarray, int]:
    """The array that starts at this byte, and the byte behind it."""
    header = content[start : start + 4]
    if len(header) < 4 or header[:3] != b"\0\0\x08":
        raise ValueError("no IDX header")
    first = start + 4 + 4 * header[3]
    if len(content) < first:
        raise ValueError("it ends inside a header")
    shape = struct.unpack_from(f">{header[3]}I", content, start + 4)
    end = first + math.prod(shape)
    if len(content) < end:
        raise ValueError(f"it ends after {len(content) - first} of {math.prod(shape)} values")
    return np.frombuffer(content[first:end], dtype=np.uint8).reshape(shape), end
