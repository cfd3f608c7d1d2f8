# SPDX-License-Identifier: Apache-2.0
"""What an exception becomes: one line on stderr and an exit code."""

from __future__ import annotations

import errno
import sys

from drseg_core.errors import ConfigError, DRSegError
from drseg_core.files import FULL

_DISK = FULL | {errno.EIO, errno.EROFS, errno.ENOMEM}
_MEMORY_HINT = {
    "train": "lower --train.batch_size or --train.crop_size",
    "evaluate": "lower --batch-size, or use --mode tile",
    "predict": "lower --tile-size (with zero-shot --batch-size)",
    "rank": "use smaller images",
    "data": "use smaller images",
}


class UsageError(ConfigError):
    """The command line cannot be understood; the message has a second line with the usage."""


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived."""


def failure(error: BaseException, command: str) -> tuple[str, int]:
    """One line for stderr, and the exit code, for what a command raised.

    Args:
        error: the exception.
        command: subcommand that ran, for hints.
    """
    if isinstance(error, KeyboardInterrupt):
        return "drseg: interrupted", 130
    if isinstance(error, Terminated):
        return "drseg: terminated", 143
    if isinstance(error, DRSegError):
        return f"drseg: error: {_one_line(error)}", error.exit_code
    if _out_of_memory(error):
        hint = _MEMORY_HINT.get(command, "use smaller inputs")
        return f"drseg: error: out of memory: {_one_line(error) or 'allocation refused'}; {hint}", 7
    if isinstance(error, OSError) and error.errno in FULL and error.filename is not None:
        return f"drseg: error: {error.filename} cannot be written: the disk is full ({error.strerror})", 7
    if isinstance(error, OSError) and error.errno in _DISK:
        return f"drseg: error: {_of_file(error)}", 7
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"drseg: error: path is too long: {str(error.filename)[:80]}...", 2
    if isinstance(error, PermissionError):
        return f"drseg: error: {_of_file(error)}", 2
    if isinstance(error, ImportError):
        return f"drseg: error: a library cannot be imported: {_one_line(error)}; see drseg doctor", 5
    if isinstance(error, RuntimeError) and "torchvision::nms" in str(error):
        return f"drseg: error: torch and torchvision do not fit together: {_one_line(error)}; see drseg doctor", 5
    name = type(error).__name__
    return f"drseg: internal error: {name}: {_one_line(error)} (--debug shows where)", 1


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _of_file(error: OSError) -> str:
    """The file, and what the system says of it."""
    if error.filename is None or error.strerror is None:
        return _one_line(error)
    return visible(f"{error.filename} cannot be used: {error.strerror}")


def _one_line(error: BaseException) -> str:
    return visible(" ".join(str(error).split()))


def visible(text: str) -> str:
    """Text for a terminal: control characters, which file and class names may hold, are shown as escapes."""
    escaped = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return "".join(escaped)
