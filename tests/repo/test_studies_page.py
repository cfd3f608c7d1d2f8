# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/reproduction.md hold the numbers of docs/studies, and the pages there those of their JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from drseg_core.studies.index import PAGE, write_index
from drseg_core.studies.report import Spread, text_of

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "docs" / "studies"
TABLES = ("table1-matched-contrast", "table2-contrast", "table4")


def means(name: str) -> dict[str, dict[str, str]]:
    """Title of each variant to its printed figures."""
    variants = json.loads((STUDIES / f"{name}.json").read_text())["variants"]
    return {
        variant["title"]: {
            key: text_of(None if value is None else Spread(**value)) for key, value in variant["mean"].items()
        }
        for variant in variants
    }


@pytest.mark.parametrize("name", TABLES)
def test_the_page_has_the_numbers_of_the_study(name):
    lines = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8").splitlines()
    begin = next(place for place, line in enumerate(lines) if line.startswith(f"| [{name}]"))
    header = [cell.strip() for cell in lines[begin].strip("|").split("|")]
    rows = {}
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[cells[0]] = dict(zip(header[1:], cells[1:], strict=True))
    found = means(name)
    assert set(rows) == set(found)
    columns = {"mIoU": "mIoU", "fwIoU": "fwIoU", "mACC": "mACC", "boundary IoU": "boundary", "novel classes": "novel"}
    for title, row in rows.items():
        for column, metric in columns.items():
            if column in row:
                assert row[column] == found[title][metric], (title, column)


def test_the_index_has_every_study(tmp_path):
    for path in STUDIES.glob("*.json"):
        shutil.copy(path, tmp_path)
    write_index(tmp_path)
    assert (STUDIES / PAGE).read_text(encoding="utf-8") == (tmp_path / PAGE).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.json")), ids=lambda path: path.stem)
def test_every_page_has_its_numbers_and_its_picture(path):
    content, page = json.loads(path.read_text()), path.with_suffix(".md").read_text(encoding="utf-8")
    assert path.with_suffix(".png").is_file() and len(content["seeds"]) >= 1
    assert content["command"] in page
    for variant in content.get("variants", []):
        if variant["mean"]["mIoU"] is not None:
            assert text_of(Spread(**variant["mean"]["mIoU"])) in page


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.md")), ids=lambda path: path.stem)
def test_no_table_has_two_columns_of_one_heading(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    for line, below in zip(lines, lines[1:], strict=False):
        if below.startswith("|---"):
            header = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(header) == len(set(header)), line
