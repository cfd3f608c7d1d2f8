# SPDX-License-Identifier: Apache-2.0
"""Children of this process, in place of new ones: what this one has imported, which takes seconds, is there at once.

What is about the start of a process, its environment or its launcher needs a new one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
Work = Callable[[], int]


class Fork:
    """A child that does ``work``, with the exit code of what that returns. It has the methods of ``subprocess.Popen``
    that tests use.

    Args:
        work: what it does.
        out: the file of what it prints.
        err: that of ``stderr``; else both are one.
        seconds: it is killed then.
        environment: what is set besides.
    """

    def __init__(
        self,
        work: Work,
        out: Path,
        err: Path | None = None,
        *,
        seconds: int = 120,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.returncode: int | None = None
        self._logs = [out] if err is None else [out, err]
        for log in self._logs:
            log.write_text("")
        with warnings.catch_warnings():
            # newer Pythons warn where this process has threads; none of theirs holds what a child needs
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
            self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            outputs = [os.open(log, os.O_WRONLY | os.O_APPEND) for log in self._logs]
            os.dup2(outputs[0], 1)
            os.dup2(outputs[-1], 2)
            # not what pytest listens to
            sys.stdout = os.fdopen(outputs[0], "w", buffering=1)
            sys.stderr = sys.stdout if err is None else os.fdopen(outputs[1], "w", buffering=1)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            os.environ.update(environment or {})
            # those of OpenMP do not live on in a child
            torch.set_num_threads(1)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    @property
    def said(self) -> list[str]:
        """What each output has so far."""
        return [log.read_text(encoding="utf-8", errors="replace") for log in self._logs]

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self) -> int:
        """Exit code, or minus the signal."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        # while nobody waited for it, its number is no other's
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        """Its two outputs, at its end."""
        self.wait()
        out, *err = self.said
        return out, "".join(err)


def in_child(work: Work, log: Path, seconds: int) -> tuple[int, str]:
    """Exit code, or minus the signal, and what was printed, of ``work`` in a child of this process."""
    child = Fork(work, log, seconds=seconds)
    return child.wait(), child.said[0]


def in_ranks(work: Work, logs: Path, count: int = 2, seconds: int = 300) -> list[tuple[int, str, str]]:
    """Exit code, ``stdout`` and ``stderr`` of ``work`` in each of ``count`` children that know of each other.

    As with torchrun they have its variables, and meet at a store of the process that starts them. If one fails, the
    others are killed.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    children = []
    for rank in range(count):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(Fork(work, logs / f"{rank}.out", logs / f"{rank}.err", seconds=seconds, environment=own))
    while any(child.poll() is None for child in children):
        if any(child.returncode for child in children):
            for child in children:
                child.kill()
        time.sleep(0.02)
    return [(child.wait(), *child.communicate()) for child in children]


def in_torchrun(words: Sequence[str], logs: Path, seconds: int = 600, *, anew: bool = True) -> tuple[int, str, str]:
    """Exit code, ``stdout`` and ``stderr`` of a command in two processes of torchrun itself, which is a child here.

    Unless ``anew`` its processes are children of it, which have all imports: those of two new ones take longer than
    most commands.
    """

    def agent() -> int:
        from torch.distributed import run

        run.main(["--nproc-per-node", "2", "--standalone", "-m", "drseg_core", *words])
        return 0

    def agent_of_forks() -> int:
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": 0, "start_method": "fork"}
        elastic_launch(LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, **options), _command)(list(words))
        return 0

    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    work = agent if anew else agent_of_forks
    child = Fork(work, logs / "torchrun.out", logs / "torchrun.err", seconds=seconds, environment=environment)
    return (child.wait(), *child.communicate())


def _command(words: list[str]) -> None:
    from drseg_core.cli.main import main

    if code := main(words):
        raise RuntimeError(f"exit code {code}")
