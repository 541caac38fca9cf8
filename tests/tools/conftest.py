"""A fixture for tests of tables."""

import json
import sys
from pathlib import Path

import pytest

from tests.tools.stand_in import STAND_IN, TABLE
from tools import reproduce, table_record


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Runs the command in an empty folder with the stand-in for main.py; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(table_record, "TABLES_FOLDER", tmp_path)  # its results go into results/
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def command(*options: str, table: str = TABLE, orders: dict | None = None) -> int:
        Path("table.yaml").write_text(table)
        Path("orders.json").write_text(json.dumps(orders or {}))
        Path("events.txt").write_text("")
        return reproduce.main(["table.yaml", *options], program=[sys.executable, "stand_in.py"])

    return command
