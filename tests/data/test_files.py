"""Single image files: what is read, what is refused, and the command that checks a folder of them."""

import io
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
    "palette.png": as_bytes(GREY.convert("P"), "PNG", transparency=bytes(range(100))),
    "alpha.png": as_bytes(GREY.convert("RGBA"), "PNG"),
    "other.webp": as_bytes(GREY, "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", UNUSUAL_FILES)
def test_unusual_but_whole_images_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(UNUSUAL_FILES[name])
    pixels = np.asarray(open_rgb(tmp_path / name))
    assert pixels.shape == (8, 8, 3)
    assert (pixels == 51).all()


# --- the check of all files ---


def test_check_names_every_bad_file_and_no_other(tmp_path, capsys):
    for name, content in UNUSUAL_FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "notes.txt").write_bytes(b"no image")
    assert check.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "0 of 7 files cannot be read\n"

    bad = [tmp_path / "train" / "cat" / name for name in (*BAD_FILES, "LOST.JPG")]
    bad[0].parent.mkdir(parents=True)
    for path, (content, _) in zip(bad, BAD_FILES.values(), strict=False):
        path.write_bytes(content)
    bad[-1].symlink_to(tmp_path / "nowhere")
    names = tmp_path / "bad.txt"
    assert check.main([str(tmp_path), "--threads", "3", "--list", str(names)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert names.read_text().splitlines() == sorted(map(str, bad)) == [line.split(" (")[0] for line in lines]
    assert last == "12 of 19 files cannot be read"


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
