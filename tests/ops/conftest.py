# SPDX-License-Identifier: Apache-2.0
"""Runs a contract class for each of its backends and variants."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cls = metafunc.cls
    if cls is None or not hasattr(cls, "backends"):
        return
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", cls.backends)
    if "variant" in metafunc.fixturenames:
        variants = cls.subject.variants
        metafunc.parametrize("variant", variants, ids=["-".join(map(str, v.values())) or "plain" for v in variants])
