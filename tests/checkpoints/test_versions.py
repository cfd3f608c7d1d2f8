# SPDX-License-Identifier: Apache-2.0
"""A machine is named by its processor, whoever made it."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from drseg_core.checkpoints import versions

ELSEWHERE = Path(__file__).parents[1] / "elsewhere"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("intel.cpuinfo", "INTEL(R) XEON(R) PLATINUM 8581C CPU @ 2.30GHz, family 6 model 207"),
        ("arm.cpuinfo", "aarch64, implementer 0x41 part 0xd4f"),
        ("absent", "aarch64"),
    ],
)
def test_a_processor_has_a_name(monkeypatch, file, name):
    monkeypatch.setattr(versions, "CPUINFO", ELSEWHERE / file)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert versions.device_name("cpu") == name
