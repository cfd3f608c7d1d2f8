# SPDX-License-Identifier: Apache-2.0
"""A command in a child process that is killed, or gets an error, at one of the system calls that write its output."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tqdm import tqdm

from tests.cli.conftest import data, folder, one_thread, run, small
from tests.forks import in_child

__all__ = ["data", "folder", "one_thread", "run", "small"]

HERE = Path(__file__).parent
# a command that hangs is a fault too
SECONDS = 120
RENAME = 82
# an exit code that no command has
REFUSED = 98


class Call(NamedTuple):
    """A system call by its number, and the path that it writes to, below the folder that is watched."""

    number: int
    path: str

    @property
    def kind(self) -> tuple[int, str]:
        """The same for calls of another process on the same file."""
        return self.number, re.sub(r"-[0-9a-f]{8}-\d+-[^.]*|(?<=\d)-[a-z0-9_]{8}(?=\.part)", "", self.path)


class Done(NamedTuple):
    """Exit code or minus the signal, what was printed, and the calls; the last one is that of the fault."""

    code: int
    said: str
    calls: list[Call]

    def __repr__(self) -> str:
        last = ", ".join(f"{call.number} {call.path}" for call in self.calls[-3:])
        return f"exit code {self.code} after {len(self.calls)} calls, the last being {last}:\n{self.said[-2000:]}"


Inject = Callable[..., Done]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("faults at system calls are written for Linux on x86-64")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("faults at system calls need a C compiler")
    path = tmp_path_factory.mktemp("library") / "fault.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", HERE / "fault.c", "-o", path], check=True)
    return path


@pytest.fixture(scope="session")
def inject(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inject]:
    """``inject(work, folder, at=3, error=28)``: ``work`` returns an exit code, and writes below ``folder``.

    At the call with this number ``error`` comes back, or with 0 the child is killed. Not before it has happened: with
    ``at=0`` nothing fails. ``once=False`` lets all later calls fail too, as on a disk that stays full.
    """
    place = tmp_path_factory.mktemp("said")

    def call(work: Callable[[], int], folder: Path, *, at: int = 0, error: int = 0, once: bool = True) -> Done:
        log, listing = place / "log", place / "calls"
        listing.write_text("")

        def armed() -> int:
            # its lock is shared by processes: one that was killed would hold it for all that come after
            tqdm.set_lock(threading.RLock())
            watched = f"{folder.resolve()}/".encode()
            if refused := ctypes.CDLL(str(library)).arm(watched, at, error, once, str(listing).encode()):
                print(os.strerror(refused))
                return REFUSED
            return work()

        code, said = in_child(armed, log, SECONDS)
        if code == REFUSED:
            pytest.skip(f"faults at system calls need seccomp ({said.splitlines()[-1]})")
        lines = [line.split(" ", 1) for line in listing.read_text().splitlines()]
        return Done(code, said, [Call(int(number), path) for number, path in lines])

    yield call


def places(calls: list[Call], count: int, seed: int) -> list[int]:
    """Numbers of ``count`` calls, or in the deep run of a hundred, spread over the kinds of calls: a thousand writes
    into one file are one kind."""
    if os.environ.get("DRSEG_DEEP"):
        count = int(os.environ.get("DRSEG_EXAMPLES", 100))
    kinds = [
        [number for number, _ in same]
        for _, same in itertools.groupby(enumerate(calls, 1), key=lambda pair: pair[1].kind)
    ]
    draw = random.Random(seed)
    chosen = draw.sample(kinds, min(count, len(kinds)))
    chosen += draw.choices(kinds, k=count - len(chosen))
    # when all is done but to tidy up
    chosen[0] = kinds[-1]
    return sorted(draw.choice(kind) for kind in chosen)


def one_line(done: Done) -> None:
    """An error is one line with the exit code of what the disk refuses."""
    assert done.code == 7, done
    assert "Traceback" not in done.said and "internal error" not in done.said, done
    assert len([line for line in done.said.splitlines() if line.startswith("drseg: error")]) == 1, done
