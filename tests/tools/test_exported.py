"""The folder of an export takes its place whole or not at all, and says what is wrong with it when it is read."""

from __future__ import annotations

import json
import shutil

import pytest

from tools.exported import read_facts, read_network, replacing
from utils.errors import UserError


def test_only_an_export_is_replaced(tmp_path):
    folder = tmp_path / "home"
    for attempt in (1, 2):
        with replacing(folder) as temporary:
            (temporary / "model.json").write_text(str(attempt))
        assert (folder / "model.json").read_text() == str(attempt)
    with pytest.raises(json.JSONDecodeError), replacing(folder):
        json.loads("{")
    assert (folder / "model.json").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "thesis.tex").write_text("")
    for place in (folder, folder / "thesis.tex"):
        with pytest.raises(UserError, match="is not an exported network"), replacing(place):
            pytest.fail("it must not come this far")
    with pytest.raises(UserError, match="cannot write"), replacing(folder / "thesis.tex" / "deeper"):
        pytest.fail("it must not come this far")
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_folders_that_are_no_export(tmp_path):
    with pytest.raises(UserError, match="no readable"):
        read_facts(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="exported in format 99"):
        read_facts(tmp_path)
    (tmp_path / "model.py").write_text("import nothing_of_this_name")
    with pytest.raises(UserError, match=r"needs nothing_of_this_name; run `python -m pip install"):
        read_network(tmp_path)
    (tmp_path / "model.py").write_text("def load(folder): return 1 / 0")
    with pytest.raises(UserError, match="cannot be read"):
        read_network(tmp_path)
