# SPDX-License-Identifier: Apache-2.0
"""Reading, the model and writing at the same time: one thread each."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from drseg_core.evaluation.inference import Box, ReadWindow

_WAITING = 2
"""Pieces that may wait for the writer: memory stays bounded where it is the slowest."""


@contextlib.contextmanager
def gdal_thread(name: str) -> Iterator[ThreadPoolExecutor]:
    """One further thread, in which GDAL has the options of this one and reports its errors to Python."""
    import rasterio
    from rasterio.env import getenv, hasenv

    options = getenv() if hasenv() else {}

    def prepare() -> None:
        # what is left of it ends with the thread
        rasterio.Env(**options).__enter__()

    with ThreadPoolExecutor(1, thread_name_prefix=name, initializer=prepare) as executor:
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


class ReadAhead:
    """Reads the next part while the last one is worked on. A part that was not foreseen is read when it is asked for.

    Args:
        read: gives a part of the scene; only ever called in ``executor``.
        boxes: the parts that will be asked for, in this order.
        executor: one thread.
    """

    def __init__(self, read: ReadWindow, boxes: Iterable[Box], executor: ThreadPoolExecutor) -> None:
        self._read, self._boxes, self._executor = read, iter(boxes), executor
        self._box: Box | None = None
        self._future: Future[Any] | None = None
        self._foresee()

    def _foresee(self) -> None:
        self._box = next(self._boxes, None)
        self._future = None if self._box is None else self._executor.submit(self._read, *self._box)

    def __call__(self, top: int, bottom: int, left: int, right: int) -> Any:
        if self._future is None or self._box != (top, bottom, left, right):
            return self._executor.submit(self._read, top, bottom, left, right).result()
        found = self._future.result()
        self._foresee()
        return found


class WriteBehind:
    """Calls functions in their order in another thread; what one of them raises, a later call here raises.

    As a context it ends when all is done; where something was raised, when nothing is under way any more.

    Args:
        executor: one thread.
    """

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor = executor
        self._pending: deque[Future[Any]] = deque()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> None:
        while len(self._pending) >= _WAITING:
            self._pending.popleft().result()
        self._pending.append(self._executor.submit(function, *arguments))

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            while kind is None and self._pending:
                self._pending.popleft().result()
        finally:
            # what is written to is closed next
            wait([future for future in self._pending if not future.cancel()])
