# SPDX-License-Identifier: Apache-2.0
"""Every named mutant can be planted, its tests are there, and what plants them tells killed from survived."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "mutants"), str(ROOT / "tests" / "repo")]
import run as planting  # noqa: E402 - of the folder mutants
from promises import python_files, runs  # noqa: E402 - beside this file

MUTANTS = planting.mutants()


def test_every_mutant_can_be_planted():
    assert [said for said in map(planting.problem, MUTANTS) if said is not None] == []


def test_every_mutant_has_words_of_its_own():
    words = Counter((mutant.file, mutant.what) for mutant in MUTANTS)
    assert [both for both, times in words.items() if times > 1] == []
    texts = Counter((mutant.file, mutant.before, mutant.after) for mutant in MUTANTS)
    assert [text for text, times in texts.items() if times > 1] == []


def test_the_tests_of_every_mutant_are_there():
    there = {(f"tests/{file}", test.name) for file, test in runs(python_files())}
    named = {test for mutant in MUTANTS for test in mutant.tests}
    # a class is part of a name, and the file tells what it inherits
    assert [test for test in sorted(named) if (test.split("::")[0], test.split("::")[-1]) not in there] == []
    assert all(mutant.tests for mutant in MUTANTS)


def test_every_part_has_its_mutants():
    files = [mutant.file for mutant in MUTANTS]
    parts = {
        "csrc/": 30,
        "kernels/": 30,
        ("drseg_core/nn/", "drseg_core/models/"): 20,
        ("drseg_core/checkpoints/", "drseg_core/data/", "drseg_core/training/", "drseg_core/scenes/"): 25,
        "drseg_core/cli/": 3,
    }
    for part, least in parts.items():
        assert sum(file.startswith(part) for file in files) >= least, part
    assert len(MUTANTS) >= 150


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"before": "return a - b"}, "0 times"),
        ({"before": "a"}, "times 'a'; expected it once"),
        ({"after": "return (a + b)"}, "changes nothing"),
        ({"after": "return a +"}, "invalid syntax"),
        ({"file": "gone.py"}, "there is no gone.py"),
    ],
)
def test_a_mutant_that_cannot_be_planted_is_told(tmp_path, change, said):
    (tmp_path / "sums.py").write_text("def add(a, b):\n    return a + b\n")
    fields = {"what": "w", "file": "sums.py", "before": "return a + b", "after": "return a - b", "tests": ("t",)}
    assert planting.problem(planting.Mutant(**fields), tmp_path) is None
    assert said in planting.problem(planting.Mutant(**{**fields, **change}), tmp_path)


SUMS = """
import os


def add(a, b):
    return a + b


def twice(a):
    return 2 * a


def wait(a):
    return a
"""
TESTS = """
import os
from sums import add, twice, wait

def test_add():
    assert add(2, 3) == 5

def test_nothing():
    add(2, 3)

def test_of_itself():
    assert add(2, 3) == 6

def test_wait():
    assert wait(1) == 1

def test_with_cases():
    assert twice(4) == 8
"""
RUN = """
import json, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import pytest
import run
mutants = [run.Mutant(*fields[:4], tuple(fields[4]), *fields[5:]) for fields in json.loads(sys.argv[2])]
root = Path(sys.argv[1])
print("\\n" + json.dumps(run.run(mutants, root, root / "build", 2, False, float(sys.argv[3]))))
"""


def planted(root: Path, mutants: list[list], seconds: float = 600.0) -> tuple[dict[str, str], str]:
    script = RUN.format(folder=str(ROOT / "tests" / "mutants"))
    words = [sys.executable, "-c", script, str(root), json.dumps(mutants), str(seconds)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, cwd=root)
    assert done.returncode == 0, done.stderr
    *said, answer = done.stdout.splitlines()
    return {name.removeprefix("sums.py: "): state for name, state in json.loads(answer).items()}, "\n".join(said)


@pytest.fixture
def project(tmp_path) -> Path:
    """A small one, under git."""
    root = tmp_path / "project"
    (root / "tests").mkdir(parents=True)
    (root / "sums.py").write_text(SUMS)
    (root / "tests" / "test_sums.py").write_text(TESTS)
    (root / "pytest.ini").write_text("[pytest]\n")
    (root / ".gitignore").write_text("build/\n")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


@pytest.mark.promise("C42")
def test_killed_and_survived_are_told_apart(project):
    minus = ["sums.py", "return a + b", "return a - b"]
    mutants = [
        ["killed", *minus, ["tests/test_sums.py::test_add"]],
        ["survived", "sums.py", "return a + b", "return b - a", ["tests/test_sums.py::test_nothing"]],
        [
            "one of two",
            "sums.py",
            "return a + b",
            "return a * b",
            [f"tests/test_sums.py::test_{n}" for n in ("add", "nothing")],
        ],
        ["no control", "sums.py", "return a + b", "return 0", ["tests/test_sums.py::test_of_itself"]],
        ["chosen", "sums.py", "return 2 * a", "return 3 * a", ["tests/test_sums.py"], "cases"],
        ["died", "sums.py", "return a\n", "os.abort()\n", ["tests/test_sums.py::test_wait"]],
        ["broken", "sums.py", "return 2 * a", "return 4 * a", ["tests/test_sums.py::test_gone"]],
    ]
    found, _ = planted(project, mutants)
    assert found == {
        "killed": "killed",
        "survived": "survived",
        "one of two": "survived",
        "no control": "its tests fail without it",
        # of a file no test is named that could be the one that fails
        "chosen": "survived",
        "died": "killed",
        "broken": "its tests broken without it",
    }
    # the sources are as they were
    assert (project / "sums.py").read_text() == SUMS
    # what is known is not asked again; what changed is
    again, said = planted(project, mutants[:2])
    assert again == {"killed": "killed", "survived": "survived"} and said.strip() == ""
    (project / "sums.py").write_text(SUMS.replace("2 * a", "a + a"))
    again, said = planted(project, mutants[:1])
    assert again == {"killed": "killed"} and len(said.strip().splitlines()) == 2 and said.count("without it") == 1


def test_what_there_is_no_time_for_is_not_run(project):
    found, _ = planted(project, [["killed", "sums.py", "a + b", "a - b", ["tests/test_sums.py::test_add"]]], 0.0)
    assert found == {"killed": "not run"}


def test_whoever_stops_leaves_nobody_running(project):
    sleeping = (
        "import os, time\n\ndef test_sleep():\n    open('pid', 'w').write(str(os.getpid()))\n    time.sleep(300)\n"
    )
    (project / "tests" / "test_sleep.py").write_text(sleeping)
    script = RUN.format(folder=str(ROOT / "tests" / "mutants"))
    mutant = ["sleeps", "sums.py", "a + b", "a - b", ["tests/test_sleep.py::test_sleep"]]
    words = [sys.executable, "-c", script, str(project), json.dumps([mutant]), "300"]
    started = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (found := [path for path in (project / "build").glob("tree*/pid") if path.read_text()]):
        assert started.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    started.wait(timeout=120)
    end = time.monotonic() + 120
    while Path(f"/proc/{found[0].read_text()}").exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_files_that_changed(project):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], cwd=project, check=True)
    assert planting.changed_files(project, "HEAD~1") is None
    (project / "sums.py").write_text(SUMS + "\n")
    assert planting.changed_files(project, "HEAD") == {"sums.py"}
