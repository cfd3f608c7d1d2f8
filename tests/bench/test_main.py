# SPDX-License-Identifier: Apache-2.0
"""``python -m bench`` finds its commands, and imports none before it is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import COMMANDS, main


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


def test_the_commands_are_listed_and_nothing_is_imported_for_it():
    code = "import sys; from bench.__main__ import main; main([]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {command} " in done.stdout for command in COMMANDS)


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["rnu"]) == 2
    assert "bench: command is unknown; expected one of run, profile, probe," in capsys.readouterr().err
