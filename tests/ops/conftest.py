# SPDX-License-Identifier: Apache-2.0
"""Runs a contract class for every backend that can run here, and each of its variants; backends for one test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from drseg_core import ops
from drseg_core.ops import _dispatch, backend_report

sys.path.insert(0, str(Path(__file__).parent))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cls = metafunc.cls
    if cls is None or not hasattr(cls, "subject"):
        return
    if "backend" in metafunc.fixturenames:
        rows = [row for row in backend_report() if row["op"] == cls.subject.name and row["device"] == "cpu"]
        metafunc.parametrize("backend", [row["backend"] for row in rows if row["available"]])
    if "variant" in metafunc.fixturenames:
        variants = cls.subject.variants[: 1 if hasattr(metafunc.function, "with_one_variant") else None]
        metafunc.parametrize("variant", variants, ids=["-".join(map(str, v.values())) or "plain" for v in variants])


@pytest.fixture
def registered(monkeypatch):
    """Backends that are gone after the test."""
    for name in ("_tables", "_names"):
        monkeypatch.setattr(_dispatch, name, type(getattr(_dispatch, name))(getattr(_dispatch, name)))
    yield ops.register_backend
    monkeypatch.undo()
    _dispatch.table.cache_clear()
