# SPDX-License-Identifier: Apache-2.0
"""What the demo does to its folder; the demo itself is run by hand, it takes minutes."""

from __future__ import annotations

import pytest

from drseg_core.cli import demo
from drseg_core.cli.main import main


def test_a_folder_with_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "out is not empty" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_an_earlier_demo_is_replaced(tmp_path):
    out = tmp_path / "demo"
    demo._make_room(out)
    (out / "results.md").write_text("old")
    demo._make_room(out)
    assert [path.name for path in out.iterdir()] == [demo.MARK]


@pytest.mark.promise("C38")
def test_a_command_that_fails_ends_the_demo_with_its_code(tmp_path, capsys):
    with pytest.raises(demo.DRSegError) as failure:
        demo._command("evaluate", tmp_path / "nothing", "--data", "folder:nowhere", "--out", tmp_path / "m.json")
    assert failure.value.exit_code == 3
    assert capsys.readouterr().err
