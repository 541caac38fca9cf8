"""Predictions of an exported network: images are prepared as evaluation does it, and every file gets an answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import build_data
from data.folders import find_image_folder
from data.sources import load_fashion_mnist_mini
from tests.tiny import make_images, run
from tools import export, export_checks, predict
from tools.exported import read_facts, read_network
from tools.predict import prepared, read_image


def photographs(root: Path, count: int = 2) -> Path:
    """Two classes of noise, wider than high and higher than wide, grey and coloured, one with transparency."""
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for label, (height, width) in enumerate([(150, 201), (223, 160)]):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
                kind = ("RGB", "L", "RGBA")[(number + label) % 3]
                Image.fromarray(pixels, "RGBA").convert(kind).save(folder / f"{number}.png")
    return root


@pytest.mark.parametrize("image_size", [0, 6, 12, 40, 128, 160])
def test_an_image_is_what_evaluation_reads(tmp_path, image_size):
    """In memory as stored, smaller, larger and cut; streamed from 128 pixels on."""
    root = make_images(tmp_path) if image_size < 40 else photographs(tmp_path)
    data = build_data("ImageFolder", root, image_size=image_size)
    files = find_image_folder(root)[1].shuffled().files
    read = torch.cat([images for images, _ in data.test.batches(7)])
    assert len(read) == len(files)
    for path, image in zip(files, read, strict=True):
        assert torch.equal(prepared(read_image(Path(path)), data.facts())[0], image)


def test_a_grey_image_gets_its_border(tmp_path):
    data, raw = build_data("FashionMNIST-mini"), load_fashion_mnist_mini()
    read, _ = next(data.test.batches(3))
    for number in range(3):
        Image.fromarray(raw.test_images[number, 0, 2:-2, 2:-2]).save(tmp_path / "image.png")
        assert torch.equal(prepared(read_image(tmp_path / "image.png"), data.facts())[0], read[number])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a run, with the images beside it."""
    root = tmp_path_factory.mktemp("predict")
    trained = run(root / "runs", make_images(root / "images"), epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_checks, "MOST_ROUNDS", 1)
        assert export.main([str(trained.folder), "--to", str(root / "export")]) == 0
    return root / "export"


def test_it_tells_the_classes_that_the_network_finds(folder, capsys):
    """The likeliest first, with their probabilities; the accuracy on the test images is that of the run."""
    root = folder.parent / "images"
    files = sorted(map(str, (root / "test").rglob("*.png")))
    assert predict.main([str(folder), *files, "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(files)
    told = [line.split("  ", 1) for line in lines]
    assert [path.strip() for path, _ in told] == files
    hits = sum(Path(path).parent.name == answers.split(" ")[0] for path, answers in told)
    facts = read_facts(folder)
    assert 100 * hits / len(files) == pytest.approx(facts["result"]["test"]["top1"])
    with torch.no_grad():
        logits = read_network(folder)(prepared(read_image(Path(files[0])), facts["images"]))[0]
    likely = logits.softmax(0).sort(descending=True)
    expected = [f"class{c} {100 * p:.1f} %" for p, c in zip(likely.values[:2], likely.indices[:2], strict=True)]
    assert told[0][1] == ", ".join(expected)
    assert predict.main([str(folder), files[0], "--top", "99"]) == 0
    assert capsys.readouterr().out.count("%") == 6


def test_what_cannot_be_read_does_not_keep_the_others_back(folder, capsys, tmp_path):
    good = str(next((folder.parent / "images" / "test").rglob("*.png")))
    (tmp_path / "text.png").write_text("no image")
    assert predict.main([str(folder), str(tmp_path), str(tmp_path / "gone.png"), str(tmp_path / "text.png"), good]) == 2
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 1
    assert output.out.startswith(good)
    folder_error, gone, text = output.err.splitlines()
    assert folder_error == f"error: {tmp_path} is a folder; name its files, for example {tmp_path}/*.png"
    assert gone == f"error: there is no file {tmp_path / 'gone.png'}"
    assert text.startswith(f"error: cannot read image {tmp_path / 'text.png'} (")


def test_a_folder_that_is_no_export_and_a_wrong_number(folder, tmp_path, capsys):
    assert predict.main([str(tmp_path), "image.png"]) == 2
    assert f"{tmp_path} is no exported network" in capsys.readouterr().err
    assert predict.main([str(folder), "image.png", "--top", "0"]) == 2
    assert "must be a whole number from 1 to 1000" in capsys.readouterr().err
