# SPDX-License-Identifier: Apache-2.0
"""Plant the named faults of this folder one by one, and see that the tests that are named for each fail.

    python tests/mutants/run.py                      # all; what was run before is not run again (--fresh: it is)
    python tests/mutants/run.py --only select.h      # those in whose file, words or tests this occurs
    python tests/mutants/run.py --since HEAD~1 --seconds 110

A mutant is four things: what it is, a file, the text that stands there once and the text that stands there instead,
and tests. It is killed where every one of these tests fails. Before, the same tests must pass on the sources as they
are. All of it happens in copies of the tree in ``build/mutants``, one for each core, each with a native library.

Torch is loaded once: each mutant is tested in a child of this process.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10 has pytest's
    import tomli as tomllib

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# an endless loop is no answer of a test
LONGEST = 300.0


@dataclass(frozen=True)
class Mutant:
    """A planted fault.

    Attributes:
        what: in a few words.
        file: in which it is, relative to the root.
        before: text that stands there once.
        after: what stands there instead.
        tests: as pytest takes them, each of which must fail.
        only: an expression for pytest's ``-k``, where a test has many cases.
        every: whether each test must fail, or one of them.
    """

    what: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    only: str = ""
    every: bool = True


def mutants(folder: Path = HERE) -> list[Mutant]:
    found = []
    for path in sorted(folder.glob("*.toml")):
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]:
            found.append(Mutant(**{**entry, "tests": tuple(entry["tests"])}))
    return found


# the text of a file is asked for with every mutant of it
@functools.lru_cache(1024)
def meaning(text: str) -> bytes:
    """The same for sources that differ in nothing but their look."""
    return hashlib.sha256(ast.dump(ast.parse(text)).encode(errors="surrogatepass")).digest()


def problem(mutant: Mutant, root: Path = ROOT) -> str | None:
    """Why it cannot be planted: its text is not there once, changes nothing, or is no Python."""
    path = root / mutant.file
    if not path.is_file():
        return f"{mutant.what}: there is no {mutant.file}"
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.before) != 1:
        return f"{mutant.what}: {mutant.file} has {text.count(mutant.before)} times {mutant.before!r}; expected it once"
    changed = text.replace(mutant.before, mutant.after)
    if path.suffix != ".py":
        return None if changed != text else f"{mutant.what}: it changes nothing"
    try:
        same = meaning(text) == meaning(changed)
    except SyntaxError as error:
        return f"{mutant.what}: {error}"
    return f"{mutant.what}: it changes nothing" if same else None


class Tree:
    """A copy of the tree, in which mutants are planted."""

    def __init__(self, root: Path, place: Path) -> None:
        self.root, self.place = root, place
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.decode().split("\0")
        names = {name for name in listed if name and (root / name).is_file()}
        library = root / "drseg_core" / "_lib"
        names |= {str(path.relative_to(root)) for path in library.glob("*.so")}
        # what is built stays, and is built again only where its sources have changed
        for folder, folders, files in os.walk(place):
            folders[:] = [name for name in folders if name not in ("build", "__pycache__")]
            for name in files:
                path = Path(folder, name)
                if str(path.relative_to(place)) not in names:
                    path.unlink()
        for name in names:
            self._copy(name)

    def _copy(self, name: str) -> None:
        source, target = self.root / name, self.place / name
        if not target.is_file() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)

    def plant(self, mutant: Mutant) -> None:
        path = self.place / mutant.file
        path.write_text(path.read_text(encoding="utf-8").replace(mutant.before, mutant.after), encoding="utf-8")

    def restore(self, mutant: Mutant) -> None:
        self._copy(mutant.file)


def is_native(mutant: Mutant) -> bool:
    return mutant.file.startswith(("csrc/cpu/", "csrc/check.h", "csrc/library.cpp"))


def environment(tree: Path, mutant: Mutant) -> dict[str, str]:
    """What differs for the tests of a mutant: the copy is the package, and kernels are interpreted."""
    changed = {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    # no test here needs pytest's plugins, which take a second to load
    changed["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # Python tells a changed source by its size and by seconds: what one mutant left would be taken for the next
    changed["PYTHONDONTWRITEBYTECODE"] = "1"
    if is_native(mutant):
        changed["DRSEG_NATIVE_LIBRARY"] = str(tree / "build" / "native" / "libdrseg_native.so")
    if "tests/kernels/contract_" in mutant.tests[0]:
        changed["TRITON_INTERPRET"] = "1"
    return changed


def build(tree: Path) -> str | None:
    """Build the native library of a copy, without much optimisation; what the compiler said if it cannot."""
    import torch

    folder = tree / "build" / "native"
    tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    commands = [["cmake", "--build", str(folder), "-j1"]]
    if not (folder / "CMakeCache.txt").is_file():
        configure = ["cmake", "-S", str(tree), "-B", str(folder), "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1"]
        configure += ["-DDRSEG_CUDA=OFF", f"-DDRSEG_OUTPUT_DIR={folder}"]
        commands.insert(0, [*configure, f"-DDRSEG_TORCH_DIR={Path(torch.__file__).parent}"])
    for command in commands:
        done = subprocess.run(command, env=tools, capture_output=True, text=True)
        if done.returncode:
            return done.stdout[-4000:] + done.stderr[-4000:]
    return None


def run_tests(tree: Path, mutant: Mutant, planted: bool) -> dict[str, str]:
    """What comes of a mutant, or of its tests without it, in this process: ``state``, and why where it is no answer."""
    sys.path[:] = [str(tree), str(tree / "kernels")] + [
        entry for entry in sys.path if not Path(entry or ".").resolve().is_relative_to(ROOT) or ".venv" in entry
    ]
    os.environ.update(environment(tree, mutant))
    sys.dont_write_bytecode = True
    os.chdir(tree)
    if is_native(mutant) and (said := build(tree)):
        return {"state": "does not compile", "why": said}
    import pytest

    failed: set[str] = set()

    class Failures:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                failed.update((report.nodeid, report.nodeid.split("[")[0]))

    words = ["-q", "-p", "no:cacheprovider", f"--rootdir={tree}", *mutant.tests]
    words += ["-k", mutant.only] if mutant.only else []
    words += ["-x"] if len(mutant.tests) == 1 or not mutant.every else []
    code = int(pytest.main(words, plugins=[Failures()]))
    package = sys.modules.get("drseg_core")
    if package is not None and not Path(str(package.__file__)).is_relative_to(tree):
        return {"state": "broken", "why": f"drseg_core is {package.__file__}"}
    if code == 2 and not mutant.every and planted:
        # what is imported at the head of a test fails before it
        return {"state": "killed"}
    if code not in (0, 1):
        return {"state": "broken", "why": f"pytest ended with {code}"}
    if not planted:
        return {"state": "pass" if code == 0 else "fail"}
    # a file that cannot be imported fails as a whole, with code 2
    left = [test for test in mutant.tests if test not in failed] if mutant.every or not failed else []
    return {"state": "survived", "why": ", ".join(left)} if left else {"state": "killed"}


@dataclass(frozen=True)
class Job:
    """A mutant that is planted, or the tests of one on the sources as they are."""

    mutant: Mutant
    planted: bool

    def key(self, root: Path) -> str:
        """Changes with all that the answer is read from."""
        mutant = self.mutant
        content = (
            asdict(mutant)
            if self.planted
            else {"tests": mutant.tests, "only": mutant.only, "native": is_native(mutant)}
        )
        names = [mutant.file, *sorted({test.split("::")[0] for test in mutant.tests})]
        texts = [(root / name).read_text(encoding="utf-8") for name in names]
        return hashlib.sha256(json.dumps([content, texts]).encode()).hexdigest()


class Results:
    """Answers, one a line, in a file outside of git."""

    def __init__(self, path: Path, fresh: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.found = {entry["key"]: entry for entry in map(json.loads, lines)}

    def add(self, key: str, job: Job, answer: dict[str, str], seconds: float) -> None:
        entry = {"key": key, "what": job.mutant.what, "planted": job.planted, "seconds": round(seconds, 1), **answer}
        self.found[key] = entry
        # what gives no answer is asked again
        if answer["state"] in ("killed", "survived", "pass"):
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


class Children:
    """Processes that are tested in, one in each copy of the tree."""

    def __init__(self, trees: list[Tree], log: Path) -> None:
        self._free, self._log = list(trees), log
        self._running: dict[int, tuple[Job, Tree, float]] = {}

    def __len__(self) -> int:
        return len(self._running)

    @property
    def full(self) -> bool:
        return not self._free

    def start(self, job: Job) -> None:
        tree = self._free.pop()
        if job.planted:
            tree.plant(job.mutant)
        process = os.fork()
        if process == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            output = os.open(tree.place / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            answer = {"state": "broken", "why": "the process ended"}
            try:
                answer = run_tests(tree.place, job.mutant, job.planted)
            finally:
                (tree.place / "answer").write_text(json.dumps(answer), encoding="utf-8")
                sys.stdout.flush()
                os._exit(0)
        self._running[process] = job, tree, time.monotonic()

    def stop(self) -> None:
        """End what still runs, such as after Ctrl-C."""
        for process in self._running:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)

    def ended(self, end: float) -> Iterator[tuple[Job, dict[str, str], float]]:
        """Waits until some have; those that take too long are stopped."""
        while True:
            now, stopped = time.monotonic(), []
            for process, (_, _, began) in self._running.items():
                if now > min(end, began + LONGEST):
                    os.killpg(process, signal.SIGKILL)
                    stopped.append(process)
            found = [
                process for process in self._running if os.waitpid(process, 0 if process in stopped else os.WNOHANG)[0]
            ]
            for process in found:
                job, tree, began = self._running.pop(process)
                self._free.append(tree)
                tree.restore(job.mutant)
                answer = {"state": "too long" if now <= end else "not run"}
                if process not in stopped:
                    # whoever writes outside of an array may end the process, which no test passes
                    died = {"state": "killed" if job.planted else "fail", "why": "the process died"}
                    written = tree.place / "answer"
                    answer = json.loads(written.read_text(encoding="utf-8")) if written.exists() else died
                (tree.place / "answer").unlink(missing_ok=True)
                if answer["state"] not in ("killed", "pass"):
                    name = re.sub(
                        r"\W+", "-", f"{job.mutant.file} {job.mutant.what}{'' if job.planted else ' without it'}"
                    )
                    shutil.copy(tree.place / "log", self._log / f"{name[:150]}.log")
                yield job, answer, now - began
            if found:
                return
            time.sleep(0.05)


def changed_files(root: Path, since: str) -> set[str] | None:
    """Files that differ from a commit; None where there is no such commit (a clone of one)."""
    done = subprocess.run(["git", "diff", "--name-only", since], cwd=root, capture_output=True, text=True)
    return set(done.stdout.splitlines()) if done.returncode == 0 else None


def run(chosen: list[Mutant], root: Path, place: Path, jobs: int, fresh: bool, seconds: float) -> dict[str, str]:
    """What became of each mutant, by its file and words.

    Args:
        chosen: mutants, those of a file together.
        root: the tree. place: where its copies, the answers and what tests said of survivors go.
        jobs: so many at a time.
        fresh: forget earlier answers.
        seconds: after which nothing is started, and what runs is stopped.
    """
    end = time.monotonic() + seconds
    results = Results(place / "results.jsonl", fresh)
    log = place / "logs"
    log.mkdir(exist_ok=True)
    # as the files are now: they may be edited meanwhile
    keys = {job: job.key(root) for mutant in chosen for job in (Job(mutant, False), Job(mutant, True))}
    # each mutant after the run of its tests without it, which is one for mutants of the same tests
    jobs_of = {key: job for job, key in reversed(keys.items())}
    waiting = [jobs_of[key] for key in dict.fromkeys(keys.values()) if key not in results.found]
    children = Children([Tree(root, place / f"tree{n}") for n in range(min(jobs, len(waiting)))], log)
    said: dict[str, str] = {}

    def next_job() -> Job | None:
        """The first that need not wait; mutants whose tests fail without them are passed over."""
        for job in list(waiting):
            control = results.found.get(keys[Job(job.mutant, False)], {"state": "waits"})["state"]
            if not job.planted or control != "waits":
                waiting.remove(job)
                if not job.planted or control == "pass":
                    return job
        return None

    try:
        while waiting or len(children):
            while not children.full and time.monotonic() < end and (job := next_job()) is not None:
                children.start(job)
            if time.monotonic() >= end:
                waiting.clear()
            if not len(children):
                # nothing runs that others could wait for
                break
            for job, answer, took in children.ended(end):
                results.add(keys[job], job, answer, took)
                kind = "" if job.planted else " (without it)"
                print(f"{answer['state']:>10} {took:6.1f} s  {job.mutant.file}: {job.mutant.what}{kind}", flush=True)
    finally:
        children.stop()
    for mutant in chosen:
        control, state = (
            results.found.get(keys[Job(mutant, planted)], {"state": "not run"})["state"] for planted in (False, True)
        )
        name = f"{mutant.file}: {mutant.what}"
        said[name] = state if control in ("pass", "not run") else f"its tests {control} without it"
    return said


def load() -> None:
    """Load once what every child needs; the package itself is that of its own copy."""
    functools.reduce(lambda _, name: __import__(name), ("pytest", "numpy", "torch"), None)
    # children have sessions of their own, and end with this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], add_help=True)
    parser.add_argument("--only", default="", help="mutants in whose file, words or tests this occurs")
    parser.add_argument("--since", help="mutants in files that differ from this commit, or whose tests do")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop then; what is left was not run")
    parser.add_argument("--jobs", type=int, default=min(8, len(os.sched_getaffinity(0))), help="so many at a time")
    parser.add_argument("--fresh", action="store_true", help="run again what was run before")
    args = parser.parse_args(words)
    chosen = [m for m in mutants() if args.only in " ".join((m.file, m.what, *m.tests))]
    if wrong := [text for text in map(problem, chosen) if text is not None]:
        print(*wrong, sep="\n")
        return 1
    if args.since:
        changed = changed_files(ROOT, args.since)
        if changed is None:
            print(f"there is no {args.since} here to compare with: no mutant is run")
            return 0
        of_file = [m for m in chosen if m.file in changed]
        of_tests = [m for m in chosen if m not in of_file and any(t.split("::")[0] in changed for t in m.tests)]
        chosen = of_file + of_tests
    load()
    began, place = time.monotonic(), ROOT / "build" / "mutants"
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{place} is in use: mutants are being planted there")
            return 1
        said = run(chosen, ROOT, place, max(1, args.jobs), args.fresh, args.seconds)
    table = Counter(said.values())
    for what, state in said.items():
        if state not in ("killed", "not run"):
            print(f"{state}: {what}")
    counts = ", ".join(f"{number} {state}" for state, number in table.most_common())
    print(f"{len(said)} mutants in {time.monotonic() - began:.0f} s: {counts or 'none'}")
    return 0 if set(table) <= {"killed", "not run"} else 1


if __name__ == "__main__":
    sys.exit(main())
