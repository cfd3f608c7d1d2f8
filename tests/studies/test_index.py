# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest

from drseg_core.studies.index import PAGE, write_index


def variant(title, *values):
    scores = {str(seed): {"a": {"mIoU": value}, "b": {"mIoU": value + 2}} for seed, value in enumerate(values)}
    return {"title": title, "scores": scores}


@pytest.fixture
def out(tmp_path):
    variants = [variant("LOW", 10.0, 20.0), variant("HIGH", 13.0, 21.0), variant("GONE")]
    content = {"study": "sweep-x", "title": "X", "seeds": [0, 1], "seconds": 90.1, "variants": variants}
    (tmp_path / "sweep-x.json").write_text(json.dumps(content))
    return tmp_path


def test_a_line_by_hand(out):
    write_index(out)
    line = next(
        line for line in (out / PAGE).read_text(encoding="utf-8").splitlines() if line.startswith("| [sweep-x]")
    )
    # means over the sets 11, 21 and 14, 22; differences 3 and 1
    assert [part.strip() for part in line.strip("|").split("|")] == [
        "[sweep-x](sweep-x.md)",
        "X",
        "3",
        "2",
        "LOW: 16.0 ± 7.1",
        "HIGH: 18.0 ± 5.7",
        "+2.0 ± 1.4",
        "2",
    ]


def test_rows_of_which_seeds_failed(out):
    variants = [variant("A", 1.0), variant("B", 2.0, 3.0)]
    content = {"study": "sweep-x", "title": "X", "seeds": [0, 1, 2], "variants": variants}
    # as studies wrote it before
    old = {("cells" if key == "variants" else key): value for key, value in content.items()}
    for written in (content, old):
        (out / "sweep-x.json").write_text(json.dumps(written))
        write_index(out)
        assert "| X | 2 | 1 to 2 | A: 2.0 | B: 3.5 ± 0.7 | +1.0 | - |" in (out / PAGE).read_text(encoding="utf-8")


def test_what_is_no_study_or_has_no_scores_yet(out):
    (out / "list.json").write_text("[1]")
    (out / "broken.json").write_text("{")
    row = variant("A")
    (out / "table1.json").write_text(json.dumps({"study": "table1", "title": "T", "seeds": [0], "variants": [row]}))
    (out / "maps.json").write_text(json.dumps({"study": "maps", "title": "Maps", "seeds": [0]}))
    write_index(out)
    page = (out / PAGE).read_text(encoding="utf-8")
    assert "| [table1](table1.md) | T | 1 | 0 | - | - | - | - |\n" in page and page.endswith(
        "* [maps](maps.md): Maps\n"
    )
    assert "list" not in page and "broken" not in page
    # it is no study itself
    before = page
    write_index(out)
    assert (out / PAGE).read_text(encoding="utf-8") == before
