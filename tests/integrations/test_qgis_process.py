# SPDX-License-Identifier: Apache-2.0
"""What the QGIS plugin does without QGIS: command lines, progress, errors, and how a command is ended."""

from __future__ import annotations

import ast
import configparser
import doctest
import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from drseg_qgis import command, process
from drseg_qgis.process import Cancelled, Failed, Line

import drseg_core
from drseg_core.cli.main import main
from tests.integrations.conftest import ROOT

PLUGIN = ROOT / "integrations" / "qgis" / "drseg_qgis"


class Told:
    """What a command tells while it runs."""

    def __init__(self) -> None:
        self.progress: list[tuple[str, int]] = []
        self.said: list[str] = []

    def run(self, words: list[str], **options: Any) -> Told:
        options = {"cancelled": lambda: False, "environment": os.environ, **options}
        process.run(words, progress=lambda *found: self.progress.append(found), say=self.said.append, **options)
        return self

    def script(self, text: str, **options: Any) -> Told:
        return self.run([sys.executable, "-u", "-c", text], **options)


def test_the_examples_of_the_docstrings() -> None:
    for module in (command, process):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed


@pytest.mark.parametrize("name", ["command", "process"])
def test_no_more_than_the_standard_library(name: str) -> None:
    names = set()
    for node in ast.walk(ast.parse((PLUGIN / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or ".").partition(".")[0])
    assert names - {"__future__"} <= set(sys.stdlib_module_names)


def test_the_plugin_says_what_it_is() -> None:
    found = configparser.ConfigParser()
    found.read(PLUGIN / "metadata.txt")
    general = found["general"]
    assert general["version"] == drseg_core.__version__ and general.getboolean("hasProcessingProvider")
    for key in ("name", "description", "about", "qgisMinimumVersion", "author"):
        assert general[key]


# command lines


def test_values_become_options() -> None:
    values = {
        "RUN": "-run",
        "CLASSES": "-roof; tree",
        "THRESHOLD": 0.3,
        "MIN_AREA": 0,
        "SCORES": True,
        "VIEW": False,
        "AOI": None,
        "DEVICE": "",
        "MORE": "--bands 4,3,2 --scale '0, 3000'",
    }
    made = command.map_with_run("drseg", "a b.tif", "m.tif", values)
    assert made[:6] == ["drseg", "predict", "-run", "a b.tif", "--out=m.tif", "--overwrite"]
    assert sorted(made[6:]) == sorted(
        [
            "--classes=-roof; tree",
            "--threshold=0.3",
            "--scores",
            "--min-area=0",
            "--bands",
            "4,3,2",
            "--scale",
            "0, 3000",
        ]
    )


def test_every_option_is_one_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """In the words of ``--help``, so a name that changes there is noticed here."""
    pytest.importorskip("jsonargparse")
    every = {"CLASSES": "a", "PRESET": "tiny", "RUN": "run"}
    for line, options in (
        (command.map_from_words("drseg", "a.tif", "m.tif", every), command._WORDS),
        (command.map_with_run("drseg", "a.tif", "m.tif", every), command._MAP),
        (command.tile("drseg", "a.tif", "b.tif", "t", every), command._TILE),
    ):
        words = line[1:3] if line[1] == "data" or line[2].startswith("zero-shot") else line[1:2]
        assert main([*words, "--help"]) == 0
        shown = capsys.readouterr().out
        assert not [option for option in (*options.values(), "--out") if f"{option} " not in shown]


def test_where_the_command_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="drseg is not found; expected it in PATH"):
        command.find_executable("")
    for name in ("drseg", "other"):
        (tmp_path / name).touch(0o755)
    assert command.find_executable(None) == str(tmp_path / "drseg")
    assert command.find_executable(str(tmp_path / "other")) == str(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="expected it in .*gone, as the settings say"):
        command.find_executable(str(tmp_path / "gone"))


def test_what_is_for_the_python_of_qgis_stays_there() -> None:
    found = command.own_environment({"PYTHONHOME": "a", "PYTHONPATH": "b", "PROJ_LIB": "c", "PATH": "d", "HOME": "e"})
    assert found == {"PATH": "d", "HOME": "e", "PYTHONUTF8": "1"}


# progress


@pytest.mark.parametrize(
    "line,what,percent,text",
    [
        ("predict:   0%|          | 0.00/3.50k [00:00<?, ?px/s]", "predict", 0, ""),
        ("areas: 100%|##########| 3.50k/3.50k [00:01<00:00, 2.9kpx/s]", "areas", 100, ""),
        ("\x1b[A", None, 0, ""),
        ("\x1b[Awindows:  7%|6 | 1/15 [00:00]drseg: WARNING: a word", "windows", 7, "drseg: WARNING: a word"),
        ("area of each class: 45% of it", None, 0, "area of each class: 45% of it"),
        ("clip: drseg-tiny, random weights", None, 0, "clip: drseg-tiny, random weights"),
    ],
)
def test_lines(line: str, what: str | None, percent: int, text: str) -> None:
    assert Line.of(line) == (what, percent, text)


def test_bars_of_the_library_are_understood() -> None:
    pytest.importorskip("tqdm")
    text = "from tqdm import tqdm\nimport time\n"
    text += "for _ in tqdm(range(4), desc='windows', mininterval=0): print('ä', flush=True)"
    told = Told().script(text, environment={**os.environ, "PYTHONUTF8": "1"})
    assert [found for found in told.progress if found[1] in (0, 50, 100)] == [("windows", n) for n in (0, 50, 100)]
    assert told.said == ["ä"] * 4


# how it ends


def test_the_error_is_the_line_of_the_command() -> None:
    text = "import sys; print('written: a'); sys.exit('{}')"
    with pytest.raises(Failed, match="^predict: no such file$"):
        Told().script(text.format("drseg: error: predict: no such file"))
    with pytest.raises(Failed, match="^--size has a wrong value$"):
        Told().script(text.format("drseg data tile: error: --size has a wrong value\\nusage: drseg data tile"))
    with pytest.raises(Failed, match="^KeyError: 3 "):
        Told().script(text.format("drseg: internal error: KeyError: 3 (--debug shows where)"))
    with pytest.raises(Failed, match="^drseg ended with code 1: lost$"):
        Told().script(text.format("lost"))
    with pytest.raises(Failed, match="^drseg ended with code -9: it said nothing$"):
        Told().script("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(Failed, match=f"^absent-command cannot be started: {os.strerror(errno.ENOENT)}$"):
        Told().run(["absent-command"])


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


FAMILY = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
os.makedirs("work", exist_ok=True)
print(os.getpid(), child.pid, flush=True)
{}
time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to look at processes")
@pytest.mark.parametrize("deaf", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)"])
@pytest.mark.parametrize("before", [False, True])
def test_a_cancelled_command_and_what_it_started_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaf: str, before: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    work, told = tmp_path / "work", Told()
    if before:
        work.mkdir()
    with pytest.raises(Cancelled):
        told.script(
            FAMILY.format(deaf),
            cancelled=lambda: len(told.said) == 1 + bool(deaf),
            begun=[work],
            patience=1 if deaf else 60,
        )
    end = time.monotonic() + 120
    numbers = list(map(int, told.said[0].split()))
    while any(map(alive, numbers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, numbers))
    # what an earlier call kept is not this one's
    assert work.exists() == before


def test_what_a_listener_raises_ends_the_command() -> None:
    begin = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        process.run(
            [sys.executable, "-uc", "import time; print('a'); time.sleep(600)"],
            os.environ,
            progress=lambda *found: None,
            say=lambda line: 1 / 0,
            cancelled=lambda: False,
        )
    assert time.monotonic() - begin < 300


def test_one_that_leaves_a_process_behind_is_not_waited_for() -> None:
    told = Told().script("import subprocess; print('a'); subprocess.Popen(['sleep', '20'])")
    assert told.said == ["a"]


def test_a_cancelled_map_leaves_nothing(executable: Path, tmp_path: Path) -> None:
    pytest.importorskip("rasterio")
    from drseg_core.scenes.synthetic import write_synthetic_scene

    image = write_synthetic_scene(tmp_path / "scene.tif", width=700, height=700)
    out = tmp_path / "maps" / "map.tif"
    words = command.map_from_words(str(executable), str(image), str(out), {"CLASSES": "roof; tree", "PRESET": "tiny"})
    told = Told()

    def cancelled() -> bool:
        return any(what == "windows" and percent for what, percent in told.progress)

    with pytest.raises(Cancelled):
        told.run(words, environment=command.own_environment(os.environ), cancelled=cancelled, begun=[f"{out}.work"])
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
