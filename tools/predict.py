"""Classes of images, by an exported network.

    python -m tools.predict runs/quickstart/vgg16/prune_rate=0.5/export image.png

Images are prepared as evaluation does it. The folder's own model.py is run, so use folders that you trust.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop, resize

from data.files import UnreadableImage, open_rgb
from tools.command_line import ToolParser, exit_code_of, whole_number
from tools.exported import read_facts, read_network
from utils.errors import UserError


def read_command_line(argv: Sequence[str]) -> Namespace:
    parser = ToolParser(
        "tools.predict",
        "Print the most likely classes of images. The model.py in the folder is run, so use folders that you trust.",
    )
    parser.add_argument("folder", metavar="DIR", help="a folder that tools.export has written")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    parser.add_argument(
        "--top", type=whole_number(1, 1000), default=3, metavar="N", help="classes to print for each image (default: 3)"
    )
    return parser.parse_args(argv)


def prepared(image: Image.Image, images: Mapping[str, Any]) -> Tensor:
    """An image as the network reads it: (1, C, size, size) float32.

    Args:
        image: 8-bit RGB.
        images: how images are prepared, see `DataSplits.facts`.
    """
    size, padding = images["image_size"], images["padding"]
    inner = size - 2 * padding
    grey = images["channels"] == 1
    image = center_crop(resize(image.convert("L") if grey else image, images["resized_to"]), [inner, inner])
    pixels = np.array(image)[None] if grey else np.array(image).transpose(2, 0, 1)
    mean, std = (torch.tensor(images[key]).mul(255).view(-1, 1, 1) for key in ("mean", "std"))
    padded = F.pad(torch.from_numpy(pixels), (padding,) * 4)
    return padded.float().sub(mean).div(std)[None]


def read_image(path: Path) -> Image.Image:
    """An image file as 8-bit RGB.

    Raises: UserError if it is missing, a folder, or no image.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name its files, for example {path}/*.png")
    if not path.exists():
        raise UserError(f"there is no file {path}")
    try:
        return open_rgb(path)
    except UnreadableImage as error:
        raise UserError(f"cannot read image {path} ({error.args[1]})") from error


def run(argv: Sequence[str]) -> int:
    """Prints a line for each image that can be read, and a sentence for each other one."""
    settings = read_command_line(argv)
    folder = Path(settings.folder)
    facts = read_facts(folder)
    network = read_network(folder)
    classes, code = facts["images"]["class_names"], 0
    longest = max(len(path) for path in settings.images)
    for path in settings.images:
        try:
            image = read_image(Path(path))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
            continue
        with torch.inference_mode():
            probabilities = network(prepared(image, facts["images"]))[0].softmax(0)
        likeliest = probabilities.topk(min(settings.top, len(classes)))
        told = [f"{classes[i]} {100 * p:.1f} %" for p, i in zip(*map(Tensor.tolist, likeliest), strict=True)]
        print(f"{path:<{longest}}  {', '.join(told)}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 a user's mistake or an image that cannot be read."""
    return exit_code_of(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
