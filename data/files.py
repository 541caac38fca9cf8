"""Opening image files: upright, in 8-bit RGB, or not at all."""

import warnings
from pathlib import Path

from PIL import Image, ImageOps

from utils.errors import UserError
from utils.paths import kind_of

# The shorter side is resized to the wanted size, so an image of 1 x 1,000,000 pixels would take all memory.
MOST_STRETCHED = 500

# Pillow refuses images of more than 179 million pixels, but only warns of more than 89 million. Here both are refused,
# in all threads and in all processes that decode.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# Damaged EXIF data leave the pixels whole, and nobody reads a warning in every epoch.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


class UnreadableImage(UserError):
    """A file that is no image, or none of 8 bits: `path, reason = error.args`."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)

    def __str__(self) -> str:
        path, reason = self.args
        return (
            f"cannot read image {path} ({reason}); replace it by an 8-bit image and start or resume again, or delete "
            f"it and start a new run; `python -m data.check FOLDER` finds all such files of a folder"
        )


def open_rgb(path: str | Path) -> Image.Image:
    """The decoded image as 8-bit RGB, upright as its EXIF data say, and on white where it is transparent.

    Raises: UnreadableImage.
    """
    try:
        if kind := kind_of(path):
            raise ValueError(f"it is {kind}")  # reading it might wait for ever
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                # Pillow would clip 16-bit and float pixels to 255, which leaves a white image.
                raise ValueError(f"pixels of mode {image.mode} are not 8-bit")
            if max(image.size) > MOST_STRETCHED * min(image.size):
                raise ValueError(f"{image.width}x{image.height} pixels are more than {MOST_STRETCHED} to 1")
            image.load()
            return _opaque(_upright(image))
    except Exception as error:  # for a damaged file Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise UnreadableImage(path, str(error) or type(error).__name__) from error


def _upright(image: Image.Image) -> Image.Image:
    """The image as cameras mean it and viewers show it. EXIF data that cannot be read turn nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as many kinds of errors as there are kinds of damage; the pixels are whole
        return image


def _opaque(image: Image.Image) -> Image.Image:
    """The image in RGB on a white ground. Colours under transparent pixels are whatever a program has left there."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image.convert("RGBA"))
    return ground.convert("RGB")
