# SPDX-License-Identifier: Apache-2.0
"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["atomic_path", "write_text_atomic"]


def sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable (a rename alone may be lost by a power cut)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same directory; on success it replaces ``path`` durably.

    If the body raises, the temporary file is removed and ``path`` is what it was before.
    The suffix is kept, because writers choose their format by it.

    Example:
        >>> from drseg_core.files import atomic_path
        >>> with atomic_path("numbers.txt") as temporary:
        ...     size = temporary.write_text("1 2 3")
        >>> open("numbers.txt").read()
        '1 2 3'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=f".part{target.suffix}", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; a result is as readable as any other new file
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~mask)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 so that ``path`` holds all of it or what it held before.

    Example:
        >>> from drseg_core.files import write_text_atomic
        >>> write_text_atomic("out/note.txt", "whole or not at all")
        >>> open("out/note.txt").read()
        'whole or not at all'
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
