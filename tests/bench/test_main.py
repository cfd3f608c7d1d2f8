# SPDX-License-Identifier: Apache-2.0
"""``python -m bench`` finds its commands, and imports none before it is asked for."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.__main__ import COMMANDS, main
from bench.command import rows_file

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_takes(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and f"usage: python -m bench {command} " in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_abbreviations_are_refused(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main([command, "--hel"])
    assert stop.value.code == 2 and "usage: python -m bench" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("run", ("repeats", "slow-repeats", "threads", "rounds")),
        ("lposs", ("side", "channels", "classes", "rounds", "threads")),
        ("busy", ("busy", "rounds", "repeats")),
        ("host", ("repeats", "rounds")),
        ("scenes", ("repeats", "threads")),
    ],
)
def test_counts_below_one_are_refused(command: str, options: Sequence[str], capsys: pytest.CaptureFixture[str]):
    for option in options:
        for value in ("0", "-1"):
            with pytest.raises(SystemExit) as stop:
                main([command, f"--{option}", value])
            said = capsys.readouterr().err.splitlines()[-1]
            assert stop.value.code == 2
            assert said.endswith(f"error: argument --{option}: {value} is out of range; expected a number >= 1")


@pytest.mark.parametrize("command", [name for name in COMMANDS if "rows_file" in (BENCH / f"{name}.py").read_text()])
def test_rows_that_cannot_be_written_are_refused_before_anything_is_measured(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    for out, why in (
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "rows.jsonl", f"cannot be written: {os.strerror(errno.EEXIST)}"),
        (tmp_path / "new" / ("x" * 300), f"cannot be written: {os.strerror(errno.ENAMETOOLONG)}"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([command, "--out", str(out)])
        said = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2
        assert said.endswith(f"error: argument --out: {why}; expected a file to add rows to, got {out}")
    assert [one.name for one in tmp_path.rglob("*")] == ["file"]


def test_a_file_for_rows_is_tried_and_left_as_it_is(tmp_path: Path):
    for text in (tmp_path / "new" / "folder" / "rows.jsonl", tmp_path / "rows.jsonl", "/dev/null"):
        assert rows_file(str(text)) == Path(text)
    assert not [*tmp_path.iterdir()]
    (tmp_path / "rows.jsonl").write_text("{}\n")
    rows_file(str(tmp_path / "rows.jsonl"))
    assert (tmp_path / "rows.jsonl").read_text() == "{}\n"


def test_the_commands_are_listed_and_nothing_is_imported_for_it():
    code = "import sys; from bench.__main__ import main; main([]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {command} " in done.stdout for command in COMMANDS)


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["rnu"]) == 2
    assert "bench: command is unknown; expected one of run, profile, probe," in capsys.readouterr().err
