# SPDX-License-Identifier: Apache-2.0
"""The kernels' contracts under Triton's interpreter and on the emulator of CUDA, beside the other tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# the longest first: that with the most variants, then by the size of their files
CONTRACTS = sorted(
    (path.name for path in HERE.glob("contract_*.py")),
    key=lambda name: ("degree_normalize" not in name, -(HERE / name).stat().st_size),
)


class Interpreted:
    """Contracts under the interpreter, each one process of one thread, as many at a time as there are cores."""

    def __init__(self, names: list[str]) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._stopping = False
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)
        self._found = {name: self._pool.submit(self._run, name) for name in names}

    def _needs(self, name: str) -> dict[str, str]:
        import emulated

        return {emulated.VARIABLE: str(emulated.library())} if name.startswith("contract_cuda") else {}

    def _run(self, name: str) -> subprocess.CompletedProcess[str]:
        # the tests that somebody waits for come first
        polite = ["nice", "-n", "5"] if shutil.which("nice") else []
        command = [
            *polite,
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--durations=5",
            str(HERE / name),
        ]
        process = subprocess.Popen(
            command,
            cwd=HERE.parents[1],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **self._needs(name)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._running.add(process)
        if self._stopping:
            process.kill()
        try:
            output, _ = process.communicate(timeout=1800)
        except subprocess.TimeoutExpired:
            process.kill()
            output = f"{name} took more than half an hour\n" + process.communicate()[0]
        self._running.discard(process)
        return subprocess.CompletedProcess(command, process.returncode, output)

    def result(self, name: str) -> subprocess.CompletedProcess[str]:
        """What a contract said, which starts now if it was not among ``names``."""
        return (self._found.get(name) or self._pool.submit(self._run, name)).result()

    def stop(self) -> None:
        """End what nobody waits for any more."""
        self._stopping = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self._running):
            process.kill()


INTERPRETED = pytest.StashKey[Interpreted]()
