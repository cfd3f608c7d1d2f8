# SPDX-License-Identifier: Apache-2.0
"""SIGINT, SIGTERM and SIGHUP: the first asks for a stop after the current step, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from drseg_core.errors import DRSegError


class TrainingStopped(DRSegError):
    """Training ended early by a signal, after its state was saved. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[type[TrainingStopped], tuple[str, int]]:
        return type(self), (str(self), self.exit_code - 128)


class StopSignals:
    """Context in which ``received`` holds the first of SIGINT and SIGTERM (0: none); SIGHUP, which a terminal sends as
    it closes, counts as SIGTERM.

    The second one ends the process with exit code 128 + its number, whatever the process is doing. Outside the main
    thread Python cannot install handlers; then nothing is changed.
    """

    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in self.handled:
                # a background job of a shell is not to be interrupted by its terminal
                if signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        number = signal.SIGTERM if number == signal.SIGHUP else number
        if self.received:
            os._exit(128 + number)
        self.received = number
        # not print: the handler may run in the middle of one
        os.write(2, b"drseg: stopping after this step; a second signal stops at once\n")
