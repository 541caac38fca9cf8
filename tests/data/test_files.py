"""Single image files: what is read, what is refused, and the command that checks a folder of them."""

import io
import os
import runpy
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from data import check, files
from data.files import UnreadableImage, open_rgb

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))


def as_bytes(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises 100 million pixels. Pillow only warns of fewer than twice 89 million."""
    content = as_bytes(NOISE, "PNG")
    header = b"IHDR" + struct.pack(">II", 10_000, 10_000) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


BAD_FILES = {
    "empty.jpg": (b"", "cannot identify"),
    "text.jpg": (b"not an image", "cannot identify"),
    "truncated.jpg": (as_bytes(NOISE, "JPEG")[:-200], "truncated"),
    "header_only.jpg": (as_bytes(NOISE, "JPEG")[:200], ""),
    "truncated.png": (as_bytes(NOISE, "PNG")[:-30], ""),
    "header_only.png": (as_bytes(NOISE, "PNG")[:20], ""),
    "truncated.bmp": (as_bytes(NOISE, "BMP")[:-30], "truncated"),
    "truncated.webp": (as_bytes(NOISE, "WEBP")[:-30], ""),
    "deep.png": (as_bytes(Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)), "PNG"), "not 8-bit"),
    "float.tiff": (as_bytes(Image.fromarray(np.full((8, 8), 400, dtype=np.float32)), "TIFF"), "not 8-bit"),
    "bomb.png": (bomb(), "exceeds limit"),
    "line.png": (as_bytes(Image.new("L", (1, 501)), "PNG"), "1x501 pixels are more than 500 to 1"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_the_reason(tmp_path, name):
    path, (content, reason) = tmp_path / name, BAD_FILES[name]
    path.write_bytes(content)
    with pytest.raises(UnreadableImage) as caught:
        open_rgb(path)
    message = str(caught.value)
    assert message.startswith(f"cannot read image {path} (")
    assert reason in message
    assert len(message.splitlines()) == 1


def test_importing_the_module_is_enough_to_refuse_what_pillow_only_warns_of(tmp_path):
    """Without the filter that turns all warnings of tests into errors."""
    (tmp_path / "bomb.png").write_bytes(bomb())
    with warnings.catch_warnings():
        warnings.resetwarnings()
        module = runpy.run_path(files.__file__)
        with pytest.raises(module["UnreadableImage"], match="exceeds limit"):
            module["open_rgb"](tmp_path / "bomb.png")


GREY = Image.new("RGB", (8, 8), (51, 51, 51))  # a grey of Pillow's palette too
UNUSUAL_FILES = {
    "padded.jpg": as_bytes(GREY, "JPEG") + bytes(500),
    "a_png.jpg": as_bytes(GREY, "PNG"),
    "grey.jpg": as_bytes(GREY.convert("L"), "JPEG"),
    "cmyk.jpg": as_bytes(GREY.convert("CMYK"), "JPEG"),
    "palette.png": as_bytes(GREY.convert("P"), "PNG", transparency=bytes([255] * 100)),
    "alpha.png": as_bytes(GREY.convert("RGBA"), "PNG"),
    "damaged_exif.jpg": as_bytes(GREY, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
    "other.webp": as_bytes(GREY, "WEBP", lossless=True),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", UNUSUAL_FILES)
def test_unusual_but_whole_images_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(UNUSUAL_FILES[name])
    pixels = np.asarray(open_rgb(tmp_path / name))
    assert pixels.shape == (8, 8, 3)
    assert (pixels == 51).all()


def test_what_is_transparent_becomes_white(tmp_path):
    """Whatever colour lies there unseen; half of the opacity is half of the way."""
    pixels = np.zeros((1, 3, 4), dtype=np.uint8)
    pixels[0, :, 0], pixels[0, :, 3] = 200, (0, 255, 51)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    assert np.asarray(open_rgb(tmp_path / "rgba.png")).tolist() == [[[255] * 3, [200, 0, 0], [244, 204, 204]]]
    grey = Image.fromarray(pixels[:, :, :1].repeat(2, 2))
    grey.putalpha(Image.fromarray(pixels[:, :, 3]))
    grey.save(tmp_path / "grey.png")
    assert np.asarray(open_rgb(tmp_path / "grey.png"))[0, :, 0].tolist() == [255, 200, 244]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.asarray(open_rgb(tmp_path / "palette.png")).tolist() == [[[255] * 3]]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_photographs_are_turned_as_their_exif_data_say(tmp_path, format):
    """Orientation 6: the camera was turned, so that the first row of the file is the right side of the scene."""
    sensor = Image.new("RGB", (32, 16), "black")
    sensor.paste("white", (0, 0, 32, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    sensor.save(tmp_path / "turned", format, exif=exif, lossless=True)
    pixels = np.asarray(open_rgb(tmp_path / "turned"))[:, :, 0] > 127
    assert pixels.shape == (32, 16)
    assert pixels[:, 8:].all()
    assert not pixels[:, :8].any()


def test_pipes_and_devices_are_not_read(tmp_path):
    """Reading a pipe that nobody writes into waits for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zeros.png").symlink_to("/dev/zero")
    for name, kind in (("pipe", "a named pipe"), ("zeros", "a device")):
        with pytest.raises(UnreadableImage, match=f"it is {kind}"):
            open_rgb(tmp_path / f"{name}.png")


# --- the check of all files ---


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_check_names_every_bad_file_and_no_other(tmp_path, capsys):
    for name, content in UNUSUAL_FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "notes.txt").write_bytes(b"no image")
    assert check.main([str(tmp_path)]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("1 file with an ending that is none of images (.txt 1)")
    assert last == "0 of 8 files cannot be read"

    bad = [tmp_path / "train" / "cat" / name for name in (*BAD_FILES, "LOST.JPG")]
    bad[0].parent.mkdir(parents=True)
    for path, (content, _) in zip(bad, BAD_FILES.values(), strict=False):
        path.write_bytes(content)
    bad[-1].symlink_to(tmp_path / "nowhere")
    names = tmp_path / "bad.txt"
    assert check.main([str(tmp_path), "--threads", "3", "--list", str(names)]) == 1
    *lines, _, last = capsys.readouterr().out.splitlines()
    assert names.read_text().splitlines() == sorted(map(str, bad)) == [line.split(" (")[0] for line in lines]
    assert last == "13 of 21 files cannot be read"


def test_check_of_a_folder_without_images_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        check.main([str(tmp_path / "absent")])
    assert caught.value.code == 2
    assert f"no image file in {tmp_path / 'absent'}" in capsys.readouterr().err


def test_check_as_a_command_ends_with_its_exit_code(tmp_path, monkeypatch):
    (tmp_path / "empty.jpg").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["check.py", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(check.__file__, run_name="__main__")
    assert caught.value.code == 1
