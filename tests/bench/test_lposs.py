# SPDX-License-Identifier: Apache-2.0
"""The benchmark of label propagation: both sides agree on a small grid, and a missing library is told in one line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from bench import lposs


def test_a_missing_library_is_told(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert lposs.main(["--side", "4"]) == 5
    assert capsys.readouterr().err.startswith("lposs: faiss is not installed; expected faiss-cpu and scipy")


def test_both_sides_agree(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("faiss")
    pytest.importorskip("scipy")
    out = tmp_path / "rows.jsonl"
    words = ["--side", "24", "--channels", "32", "--classes", "3", "--rounds", "1", "--out", str(out)]
    assert lposs.main(words) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["mode"], row["name"]) for row in rows] == [
        (mode, name) for mode in ("graph", "propagation") for name in ("engine", "faiss and scipy")
    ]
    assert all(row["p50_ms"] > 0 for row in rows)
