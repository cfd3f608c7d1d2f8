# SPDX-License-Identifier: Apache-2.0
"""The project at a git ref, in a throw-away worktree.

Its native library is built from its own sources. Its benchmark is that of this checkout, so both sides are measured and
judged in the same way.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from drseg_core import testing

ROOT = Path(__file__).resolve().parents[1]


class SourceError(RuntimeError):
    """A ref, or what is needed to build it, is not there."""


@dataclass(frozen=True)
class Source:
    """A tree to import ``drseg_core`` from.

    Args:
        name: what to call it in a table.
        tree: folder. library: its native library; None where it was left out (DRSEG_NATIVE=0, no compiler).
        commit: of the tree.
    """

    name: str
    tree: Path
    library: Path | None
    commit: str

    def environment(self) -> dict[str, str]:
        """Environment of a process that uses this tree and no other."""
        path = [str(self.tree), str(self.tree / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
        found = os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}
        found["DRSEG_NATIVE_LIBRARY"] = str(self.library) if self.library else str(self.tree / "no native library")
        return found


def _git(*command: str) -> str:
    try:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise SourceError(f"git cannot be run: {error}") from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()
        raise SourceError(f"git {' '.join(command)}: failed; {reason[-1] if reason else 'no reason given'}")
    return done.stdout.strip()


def _native_files(tree: Path) -> list[Path]:
    return sorted([tree / "CMakeLists.txt", *(path for path in (tree / "csrc").rglob("*") if path.is_file())])


def _digest(tree: Path) -> str:
    found = hashlib.sha256(torch.__version__.encode())
    for path in _native_files(tree):
        found.update(str(path.relative_to(tree)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def native_library(tree: Path, cache: Path = ROOT / "build" / "bench") -> Path | None:
    """The native library of a tree, built once per content of its sources; None where none is wanted or possible.

    Raises:
        SourceError: the compiler failed.
    """
    if os.environ.get("DRSEG_NATIVE") == "0" or not (tree / "CMakeLists.txt").is_file():
        return None
    # where a virtual environment keeps its tools
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        print("bench: cmake is not on the path, so the native library is left out", file=sys.stderr)
        return None
    home = cache / _digest(tree)
    library = home / "libdrseg_native.so"
    if library.is_file():
        return library
    home.mkdir(parents=True, exist_ok=True)
    print(f"bench: building the native library of {tree}: a minute or two", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        made = Path(scratch) / "out"
        command = [cmake, "-S", str(tree), "-B", scratch, "-DCMAKE_BUILD_TYPE=Release", f"-DDRSEG_OUTPUT_DIR={made}"]
        # the CUDA kernels are another library, which takes nvcc minutes and which no race uses
        command += [f"-DDRSEG_TORCH_DIR={torch.__path__[0]}", "-DDRSEG_CUDA=OFF"]
        for step in (command, [cmake, "--build", scratch, "--parallel", str(os.cpu_count() or 1)]):
            done = subprocess.run(step, capture_output=True, text=True, env=os.environ | {"PATH": path})
            if done.returncode:
                tail = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
                raise SourceError(f"{tree}: the native library does not build; {' '.join(tail)}")
        os.replace(made / library.name, library)
    return library


def _lend(package: Path, place: Path) -> None:
    """Put a package of this checkout into another tree, in the place of what lies there."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(package, place, ignore=shutil.ignore_patterns("results", "__pycache__"))


def working_tree() -> Source:
    """This checkout as it stands, uncommitted changes included."""
    return Source("new", ROOT, native_library(ROOT), _git("rev-parse", "HEAD"))


def commit_of(ref: str) -> str:
    """The commit that a ref names.

    Raises:
        SourceError: git knows no such commit.
    """
    try:
        return _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    except SourceError:
        raise SourceError(f"no such commit; expected a branch, tag or commit of this repository, got {ref}") from None


@contextlib.contextmanager
def checkout(ref: str) -> Iterator[Source]:
    """The project at a ref, in a folder that is gone afterwards.

    Raises:
        SourceError: git knows no such commit, or its native library does not build.
    """
    commit = commit_of(ref)
    with tempfile.TemporaryDirectory(prefix="drseg-base-") as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            for package, place in ((__file__, "bench"), (testing.__file__, "drseg_core/testing")):
                _lend(Path(package).parent, tree / place)
            yield Source("base", tree, native_library(tree), commit)
        finally:
            _git("worktree", "remove", "--force", str(tree))
