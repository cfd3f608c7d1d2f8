# SPDX-License-Identifier: Apache-2.0
"""The benchmark's modules are scripts: they import each other from their own folder."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))


@pytest.fixture(autouse=True)
def _no_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    # the graph is captured as ever; a C++ compiler run per size would take half a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
