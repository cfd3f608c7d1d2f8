# SPDX-License-Identifier: Apache-2.0
"""The race of two versions: statistics on made-up times, processes on a tiny case, refs of a tiny repository."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench import jobs, paired, run, source

JOB = jobs.Job("graph_propagate", jobs.CASES["tiny_3x4"], "fwd", "case")
HERE = source.Source("here", source.ROOT, None, "none")


def test_the_interval_holds_the_median_as_often_as_it_says():
    draw = random.Random(0)
    missed = 0
    for _ in range(2000):
        # skewed, as times are; the median is 1
        low, high = paired.interval([draw.lognormvariate(0, 0.2) for _ in range(15)], error=0.05)
        missed += not low <= 1 <= high
    assert missed / 2000 < 0.05


def test_intervals_grow_narrower():
    assert paired.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    values = [float(n) for n in range(31)]
    low, high = paired.interval(values)
    assert 0 < low < 15 < high < 30


class Fake:
    """A worker whose calls take made-up times on a machine whose speed drifts and jumps."""

    def __init__(self, source: source.Source, *_: Any) -> None:
        self.source = source
        self.draw = random.Random(f"{source.name}{Fake.seed}")

    seed = 0
    factor = {"base": 1.0, "new": 1.0}
    answer: dict[str, dict[str, Any]] = {}
    peak = {"base": 100.0, "new": 100.0}
    clock, dies = 0, -1

    def ask(self, do: str, **_: Any) -> dict[str, Any]:
        if do == "build":
            return {"wrong": None, "sizes": {"N": 1}, "backends": {}} | Fake.answer.get(self.source.name, {})
        return {"peak_mb": Fake.peak[self.source.name]}

    def seconds(self, calls: int) -> list[float]:
        Fake.clock += 1
        if Fake.clock == Fake.dies:
            raise paired.LostError(f"{self.source.name}: the process ended with exit code -9")
        weather = 1.3 if Fake.clock // 17 % 2 else 1.0
        noise = self.draw.lognormvariate(0, 0.06) * (3.0 if self.draw.random() < 0.05 else 1.0)
        return [0.1 * weather * noise * Fake.factor[self.source.name]] * calls

    def close(self) -> None:
        pass


def judge(monkeypatch: pytest.MonkeyPatch, seed: int = 0, **changes: Any) -> paired.Verdict:
    monkeypatch.setattr(paired, "Worker", Fake)
    for name, value in {"seed": seed, **changes}.items():
        monkeypatch.setattr(Fake, name, value)
    base, new = (source.Source(name, Path(), None, "") for name in ("base", "new"))
    return paired.judge(base, new, JOB, rounds=61, tolerance=paired.TOLERANCE, device="cpu", threads=None)


def test_a_slowdown_of_15_percent_is_seen_and_none_is_seen_where_there_is_none(monkeypatch: pytest.MonkeyPatch):
    for seed in range(40):
        assert judge(monkeypatch, seed, factor={"base": 1.0, "new": 1.15}).verdict == "slower", seed
        assert judge(monkeypatch, seed, factor={"base": 1.0, "new": 1.0}).fails is False, seed
        assert not judge(monkeypatch, seed, factor={"base": 1.0, "new": 0.8}).fails, seed
    assert judge(monkeypatch, 0, factor={"base": 1.0, "new": 0.3}).verdict == "faster"


@pytest.mark.parametrize(
    ("changes", "verdict", "fails"),
    [
        ({"answer": {"new": {"wrong": "sample 0: row 3 holds a clearly lower node"}}}, "wrong", True),
        ({"answer": {"new": {"error": "RuntimeError: gone"}}}, "lost", True),
        ({"clock": 0, "dies": 9}, "lost", True),
        ({"answer": {"base": {"error": "AttributeError: not there yet"}}}, "new", False),
        ({"answer": {"base": {"sizes": {"N": 2}}}}, "new", False),
        ({"peak": {"base": 100.0, "new": 130.0}}, "memory", True),
        ({"peak": {"base": 100.0, "new": 105.0}}, "same", False),
        ({"peak": {"base": 1.0, "new": 3.0}}, "same", False),
    ],
)
def test_what_is_no_matter_of_time(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], verdict: str, fails: bool):
    found = judge(monkeypatch, **changes)
    assert found.verdict == verdict and found.fails is fails
    assert verdict in paired.table([(JOB, found)])


def test_a_worker_builds_times_and_measures():
    worker = paired.Worker(HERE)
    try:
        built = worker.ask(do="build", job=asdict(JOB))
        assert built["wrong"] is None and built["sizes"]["height"] == 3
        assert built["backends"] == {"graph_propagate": "reference"}
        taken = worker.ask(do="time", calls=3)["seconds"]
        assert len(taken) == 3 and min(taken) > 0
        assert worker.ask(do="peak")["peak_mb"] >= 0
        assert "ModuleNotFoundError" in worker.ask(do="build", job=asdict(JOB) | {"op": "nothing"})["error"]
    finally:
        worker.close()
    assert "exit code" in worker.ask(do="time", calls=1)["error"]


def test_a_ref_is_checked_out_and_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source, "ROOT", tmp_path)
    for command in (["init", "-q"], ["config", "user.email", "a@b"], ["config", "user.name", "a"]):
        source._git(*command)
    (tmp_path / "file").write_text("old")
    source._git("add", "file")
    source._git("commit", "-qm", "one")
    (tmp_path / "file").write_text("new")
    with source.checkout("HEAD") as base:
        assert (base.tree / "file").read_text() == "old" and base.library is None
        assert base.commit == source._git("rev-parse", "HEAD")
        assert base.environment()["PYTHONPATH"].split(os.pathsep)[:2] == [str(base.tree), str(base.tree / "kernels")]
        # what measures and judges is this checkout's
        for lent in ("bench/paired_worker.py", "drseg_core/testing/numerics.py"):
            assert (base.tree / lent).read_text() == (Path(__file__).parents[2] / lent).read_text()
    assert not base.tree.exists() and "drseg-base" not in source._git("worktree", "list")
    with pytest.raises(source.SourceError, match="nothing"), source.checkout("nothing"):
        pass


def test_a_race_needs_only_what_every_version_has():
    code = "import sys; from bench import jobs, memory, timing; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=source.ROOT, capture_output=True, text=True, check=True)
    parts = {name.split(".")[1] for name in done.stdout.split() if name.startswith("drseg_core.")}
    assert parts == {"errors", "ops", "nn", "testing"}


@pytest.mark.parametrize("arguments", [["--gate"], ["--base", "HEAD", "--tolerance", "2"], ["--dtype", "int8"]])
def test_arguments_of_a_race_that_mean_nothing(arguments: list[str]):
    with pytest.raises(SystemExit) as error:
        run.main(arguments)
    assert error.value.code == 2


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("base", ["no-such-ref", ""])
def test_an_unknown_ref_ends_make_regress_before_its_tests(base: str):
    # no Python is there to run them
    words = ["make", "-o", "install", "regress", f"BASE={base}", "BIN=/nowhere"]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    expected = f"regress: BASE is no commit; expected a branch, tag or commit, got {base}".strip()
    assert done.returncode == 2 and done.stderr.splitlines()[0].strip() == expected
    assert "pytest" not in done.stdout


@pytest.mark.parametrize("base", ["", " "])
def test_an_empty_ref_is_refused(base: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as error:
        run.main(["--base", base, "--case", "tiny_3x4"])
    said = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and said[-1].endswith("argument --base: is empty; expected a branch, tag or commit")


def test_an_unknown_ref_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def built(tree: Path) -> None:
        raise AssertionError("a library is built, which takes minutes")

    monkeypatch.setattr(source, "native_library", built)
    assert run.main(["--base", "no-such-ref", "--case", "tiny_3x4"]) == 2
    expected = "no such commit; expected a branch, tag or commit of this repository, got no-such-ref"
    assert f"--base no-such-ref cannot be measured: {expected}" in capsys.readouterr().err
