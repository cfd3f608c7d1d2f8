# SPDX-License-Identifier: Apache-2.0
"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drseg_core.errors import ResourceError

FULL_BYTES = 2**20
"""A disk with less room than this is full."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the system calls a disk, a share of one, or a file that can take no more."""

_MANY, _AGAIN = 2000, 60.0
"""A folder of more files is listed again only after so many seconds."""
_listed: dict[Path, tuple[float, list[str]]] = {}

__all__ = ["atomic_path", "write_text_atomic"]


def sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable (a rename alone may be lost by a power cut)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def own_prefix(target: Path) -> str:
    """How the unfinished files of this process for ``target`` begin: with the machine and the process."""
    return f".{target.stem}-{_machine()}-{os.getpid()}-"


@functools.cache
def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def remove_dead(target: Path) -> None:
    """Remove unfinished files for ``target`` of processes of this machine that are no more, such as killed ones."""
    # what is unfinished of an unfinished file has one dot more
    pattern = re.compile(r"\.*" + re.escape(f".{target.stem}-{_machine()}-") + r"(\d+)-.*\.part")
    for name in _hidden(target.parent.absolute()):
        found, path = pattern.match(name), target.parent / name
        if found and not _alive(int(found[1])):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _hidden(folder: Path) -> list[str]:
    """Names that begin with a dot. Maps of thousands of scenes lie in one folder, and each that is written would list
    all of them: many files are listed once a minute."""
    now = time.monotonic()
    last, names = _listed.get(folder, (now - _AGAIN, []))
    if now - last < _AGAIN:
        return names
    found: list[str] = []
    with contextlib.suppress(OSError):
        found = os.listdir(folder)
    names = [name for name in found if name.startswith(".")]
    if len(found) > _MANY:
        _listed[folder] = now, names
    return names


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def disk_is_full(path: Path) -> bool:
    """Whether the disk that holds ``path``, or the nearest folder above it, has no room left to speak of."""
    for folder in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free < FULL_BYTES
    return False


def check_room(path: Path, needed: int, function: str) -> None:
    """Refuse, before all work, what the disk cannot hold.

    Raises:
        ResourceError: less than ``needed`` bytes are free there.
    """
    free = free_bytes(path)
    if free < needed:
        raise ResourceError(
            f"{function}: the disk of {path} is full; expected {needed / 1e6:.0f} MB, got {free / 1e6:.0f} MB"
        )


def free_bytes(path: Path) -> int:
    """Room on the disk that holds ``path``, or the nearest folder above it."""
    folder = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(folder).free


def make_folder(folder: Path) -> None:
    """Make a folder and those above it where they are missing, also while another call removes it."""
    while True:
        try:
            return folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            # mkdir looks twice: what goes in between is no folder to it
            if folder.is_dir():
                return None
            if os.path.lexists(folder):
                raise


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same directory; on success it replaces ``path`` durably.

    If the body raises, the temporary file is removed and ``path`` is what it was before.
    The suffix is kept, because writers choose their format by it.

    Examples:
        >>> from drseg_core.files import atomic_path
        >>> with atomic_path("numbers.txt") as temporary:
        ...     size = temporary.write_text("1 2 3")
        >>> open("numbers.txt").read()
        '1 2 3'
    """
    target = Path(path)
    make_folder(target.parent)
    remove_dead(target)
    descriptor, name = tempfile.mkstemp(prefix=own_prefix(target), suffix=f".part{target.suffix}", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; a result is as readable as any other new file
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o666 & ~mask
        with contextlib.suppress(FileNotFoundError):
            mode = target.stat().st_mode & 0o777
        os.chmod(temporary, mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_directory(target.parent)
    except OSError as error:
        # the system does not say where it has no room
        if error.errno in FULL and error.filename is None:
            error.filename = str(target)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def is_text(name: str) -> bool:
    """Whether the name of a file is UTF-8; where it is not, Python has a half of a pair for a byte."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def parse_json(text: str) -> Any:
    """``json.loads`` of a file from any source: every failure to read it is a ValueError.

    Examples:
        >>> from drseg_core.files import parse_json
        >>> parse_json('{"step": 3}')
        {'step': 3}
        >>> parse_json("[" * 100000)
        Traceback (most recent call last):
        ValueError: nested too deeply
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, so that ``path`` holds all of it, or its former content.

    Examples:
        >>> from drseg_core.files import write_text_atomic
        >>> write_text_atomic("out/note.txt", "whole or not at all")
        >>> open("out/note.txt").read()
        'whole or not at all'
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
