# SPDX-License-Identifier: Apache-2.0
"""What is compiled is captured and run, not generated."""

from __future__ import annotations

from functools import partial

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    # the graph is captured as ever; a C++ compiler run per size would take half a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
