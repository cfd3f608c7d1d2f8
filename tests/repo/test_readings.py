# SPDX-License-Identifier: Apache-2.0
"""docs/readings.md names options that there are, their defaults, and figures that the studies have."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest

from drseg_core.config.schema import Config
from drseg_core.studies.report import spread

DOCS = Path(__file__).parents[2] / "docs"


def rows() -> list[list[str]]:
    lines = (DOCS / "readings.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("| ")]
    # a cell may not hold a bar
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1:]]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_reading_is_what_it_says(row):
    _, option, default, changes, moved = row
    assert str(functools.reduce(getattr, option.strip("`").split("."), Config())) == default and changes
    if moved:
        low, high, name = re.fullmatch(r"\[([\d.]+) to ([\d.]+)\]\(studies/(sweep-[\w-]+)\.md\)", moved).groups()
        variants = json.loads((DOCS / "studies" / f"{name}.json").read_text())["variants"]
        found = [spread(variant["scores"], "mIoU").mean for variant in variants]
        assert (f"{min(found):.1f}", f"{max(found):.1f}") == (low, high)
        assert {path for variant in variants for path in variant["options"]} == {option.strip("`")} or "remote" in name


def test_the_readings_that_matter_are_there():
    named = {row[1].strip("`").removeprefix("model.") for row in rows()}
    wanted = "fusion.tau spsd.alpha graph.gamma graph.decay spsd.prototypes_per_class aggregator.layers graph.layers"
    wanted += " graph.norm_scale fusion.original graph.bias graph.normalize_prior fusion.kind"
    assert set(wanted.split()) <= named
