# SPDX-License-Identifier: Apache-2.0
"""Runs a command that says how far it is, and ends it as Ctrl-C would. Needs the standard library alone."""

from __future__ import annotations

import codecs
import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

_TICK = 0.1
"""Seconds after which it is asked again whether to go on."""

PATIENCE = 30.0
"""Seconds that a command has to remove what is unfinished, before it is killed."""

# "predict:  45%|####      | 1.2M/2.6M [00:03<00:04, 400kpx/s]", and what another part of the command said behind it
_BAR = re.compile(r"([^:|]+):\s+(\d{1,3})%\|[^\]]*\]?(.*)")
# colours, and the cursor where one bar is drawn below another
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_ERROR = re.compile(r"drseg(?: [\w-]+)*: (?:internal )?error: (.*)")


class Failed(Exception):
    """The command ended with an error; the message is its own line."""


class Cancelled(Exception):
    """The command was asked to end, and has ended."""


class Line(NamedTuple):
    """A line of a command: ``what`` is under way and its ``percent``, if a bar says so, and other ``text``.

    Example:
        >>> Line.of("windows:  45%|####5     | 9/20 [00:01<00:01]")
        Line(what='windows', percent=45, text='')
        >>> Line.of("written: map.tif")
        Line(what=None, percent=0, text='written: map.tif')
    """

    what: str | None
    percent: int
    text: str

    @classmethod
    def of(cls, line: str) -> Line:
        line = _ESCAPE.sub("", line)
        found = _BAR.match(line)
        if found is None:
            return cls(None, 0, line.strip())
        return cls(found[1].strip(), min(100, int(found[2])), found[3].strip())


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    progress: Callable[[str, int], object],
    say: Callable[[str], object],
    cancelled: Callable[[], bool],
    begun: Sequence[str | Path] = (),
    patience: float = PATIENCE,
) -> None:
    """Run a command to its end, in a group of processes of its own.

    Args:
        command: program and arguments.
        environment: all variables that it gets.
        progress: told what is under way and its percent, where one of these changes.
        say: told each line that is no progress.
        cancelled: whether to end it; asked ten times a second.
        begun: folders where the command keeps unfinished work. Where it is ended they are removed, unless they were
            there before.
        patience: seconds that it has to remove what is unfinished, before it is killed.

    Raises:
        Failed: it could not be started, or ended with an error; the message is one line.
        Cancelled: it was ended, by ``cancelled``. What else a function here raises ends it too.
    """
    new = [Path(folder) for folder in begun if not Path(folder).exists()]
    try:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise Failed(f"{command[0]} cannot be started: {error.strerror}") from None
    refused, last, bar = None, "", None
    with process:
        try:
            for line in map(Line.of, _lines(process, cancelled)):
                if line.what is not None and line[:2] != bar:
                    bar = line[:2]
                    progress(line.what, line.percent)
                if line.text:
                    found = _ERROR.match(line.text)
                    refused, last = found[1] if found else refused, line.text
                    say(line.text)
            process.wait()
        except BaseException:
            end(process, patience)
            for folder in new:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    if process.returncode:
        raise Failed(refused or f"drseg ended with code {process.returncode}: {last or 'it said nothing'}")


def _lines(process: subprocess.Popen[bytes], cancelled: Callable[[], bool]) -> Iterator[str]:
    """Lines as they come; one ends with a line feed, or a carriage return where a bar is drawn anew."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    # a pipe cannot be read with a time limit everywhere, so a thread waits
    if process.stdout is not None:
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    while True:
        if cancelled():
            raise Cancelled("drseg was cancelled")
        # before the last look: what it said is there when it has ended
        ended = process.poll() is not None
        try:
            line = lines.get(timeout=_TICK)
        except queue.Empty:
            # something that it started may still hold the pipe
            if ended:
                return
            continue
        if line is None:
            return
        yield line


def _read(pipe: IO[bytes], lines: queue.SimpleQueue[str | None]) -> None:
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    # closed here where the command was ended
    with contextlib.suppress(OSError, ValueError):
        while chunk := os.read(pipe.fileno(), 65536):
            *whole, rest = re.split(r"[\r\n]", rest + decoder.decode(chunk))
            for line in whole:
                lines.put(line)
    lines.put(rest)
    lines.put(None)


def end(process: subprocess.Popen[bytes], patience: float) -> None:
    """End a command that has not ended, and what it has started: what is unfinished it removes itself."""
    if process.poll() is None:
        # drseg unwinds as with Ctrl-C; that itself a program does not hear whose desktop was started in the background
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
