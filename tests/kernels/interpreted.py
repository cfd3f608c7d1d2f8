# SPDX-License-Identifier: Apache-2.0
"""The kernels' contracts under Triton's interpreter and on the emulator of CUDA, beside the other tests."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# seconds that a contract may take
LONGEST = 1800.0
# the longest first: that with the most variants, then by the size of their files
CONTRACTS = sorted(
    (path.name for path in HERE.glob("contract_*.py")),
    key=lambda name: ("degree_normalize" not in name, -(HERE / name).stat().st_size),
)


# what contracts take seconds to load
LOADED = (
    "pytest",
    "numpy",
    "torch",
    "triton.language",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.testing._internal.optests",
)


class Interpreted:
    """Contracts under the interpreter, each a process of one thread, as many at a time as there are cores.

    These are children of a few processes, each of which has loaded torch, and runs one child at a time.
    """

    def __init__(self, names: list[str]) -> None:
        self._parents: set[subprocess.Popen[str]] = set()
        self._of_thread = threading.local()
        self._stopping = False
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)
        self._found = {name: self._pool.submit(self._run, name) for name in names}

    def _needs(self, name: str) -> dict[str, str]:
        import emulated

        return {emulated.VARIABLE: str(emulated.library())} if name.startswith("contract_cuda") else {}

    def _parent(self) -> subprocess.Popen[str]:
        """That of this thread, which ends with this process."""
        parent = getattr(self._of_thread, "parent", None)
        if parent is None or parent.poll() is not None:
            # what is imported is compiled once, and no plugin of pytest is needed, each of which takes time to load
            quick = {"PYTHONDONTWRITEBYTECODE": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
            parent = subprocess.Popen(
                [sys.executable, str(HERE / "interpreted.py")],
                cwd=HERE.parents[1],
                env={**os.environ, **quick, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                # a contract is stopped with the process that it is a child of
                start_new_session=True,
            )
            self._of_thread.parent = parent
            self._parents.add(parent)
        if self._stopping:
            self._kill(parent)
        return parent

    def _kill(self, parent: subprocess.Popen[str]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)

    def _run(self, name: str) -> subprocess.CompletedProcess[str]:
        words = ["-q", "-p", "no:cacheprovider", "--durations=5", str(HERE / name)]
        needs = self._needs(name)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "output")
            parent = self._parent()
            late = threading.Timer(LONGEST, self._kill, [parent])
            late.start()
            try:
                with contextlib.suppress(BrokenPipeError):
                    print(json.dumps([words, needs, str(output)]), file=parent.stdin, flush=True)
                answer = parent.stdout.readline() if parent.stdout else ""
            finally:
                late.cancel()
            said = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
        if answer:
            return subprocess.CompletedProcess(words, int(answer), said)
        parent.wait()
        self._parents.discard(parent)
        return subprocess.CompletedProcess(words, -1, f"{said}\n{name}: stopped, which happens after half an hour")

    def result(self, name: str) -> subprocess.CompletedProcess[str]:
        """What a contract said, which starts now if it was not among ``names``."""
        return (self._found.get(name) or self._pool.submit(self._run, name)).result()

    def stop(self) -> None:
        """End what nobody waits for any more."""
        self._stopping = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for parent in list(self._parents):
            self._kill(parent)


INTERPRETED = pytest.StashKey[Interpreted]()


def serve() -> None:
    """Run pytest in a child for each line of the input, and answer with its exit status."""
    sys.path.insert(0, str(HERE.parents[1]))
    from drseg_core.processor import prepare

    prepare()
    # the tests that somebody waits for come first
    os.nice(5)
    for name in LOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        words, needs, output = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                place = os.open(output, os.O_WRONLY | os.O_CREAT)
                os.dup2(place, 1)
                os.dup2(place, 2)
                os.environ.update(needs)
                status = int(pytest.main(words))
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
