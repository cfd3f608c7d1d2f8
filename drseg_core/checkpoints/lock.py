# SPDX-License-Identifier: Apache-2.0
"""One writer per run folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from drseg_core.errors import CheckpointError
from drseg_core.files import parse_json

LOCK_NAME = ".lock"
_held: set[int] = set()


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the run folder for this process.

    The lock is the kernel's (``flock``), so it ends with the process that holds it, however that process ends, and a
    file left by a dead one locks nothing. The file itself only says who holds it, and is never deleted: deleting
    it would let two writers lock two files of the same name.

    Raises:
        CheckpointError: another process holds it.
    """
    path = run / LOCK_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"train: {run} is in use; {_holder(path)}") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        holder = parse_json(path.read_text(encoding="utf-8"))
        return f"locked by pid {holder['pid']} on host {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "locked by another process"


def _close_in_child() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


# a forked data worker would share the lock, and it may outlive a killed trainer by seconds
os.register_at_fork(after_in_child=_close_in_child)
