# SPDX-License-Identifier: Apache-2.0
"""Blocks made by the workers of a Dask cluster, or of this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from drseg_core.errors import BackendUnavailableError, DRSegError
from drseg_core.extras import require
from drseg_core.scenes.mosaic import Neighbour
from drseg_core.scenes.predict import Mapper, Work
from drseg_core.scenes.sources import Scene
from drseg_core.scenes.workers import local_workers

_PARTS = 2
"""Of each scene for each worker: one that is slow holds up little."""


class Cluster:
    """Workers that see the same files. :func:`open_cluster` makes one.

    Args:
        client: of ``distributed``.
        recipe: makes the mapper in a worker.
    """

    def __init__(self, client: Any, recipe: Callable[[], Mapper]) -> None:
        self._client, self._recipe, self._name = client, recipe, uuid.uuid4().hex
        self.parts = _PARTS * max(len(client.scheduler_info(n_workers=-1)["workers"]), 1)

    def make(
        self, scenes: Sequence[tuple[Scene, tuple[Neighbour, ...]]], step: str, *, overwrite: bool = False
    ) -> list[Exception | None]:
        """Let the workers make one step of scenes with their neighbours; returns what went wrong with each."""
        futures = [
            [
                self._client.submit(
                    _make,
                    self._recipe,
                    self._name,
                    scene,
                    Work({}, step, part, self.parts, alone=False, neighbours=others),
                    overwrite,
                    torch.get_num_threads(),
                    pure=False,
                )
                for part in range(self.parts)
            ]
            for scene, others in scenes
        ]
        return [next(filter(None, map(_error, some)), None) for some in futures]


def _error(future: Any) -> Exception | None:
    """What went wrong, as a worker or as Dask says it; waits for the worker."""
    return future.exception() or future.result()


@contextlib.contextmanager
def open_cluster(where: str, recipe: Callable[[], Mapper]) -> Iterator[Cluster]:
    """The cluster of a scheduler's address; or of a number, so many processes of this machine while it is open.

    Args:
        where: ``tcp://host:8786``, or a number.
        recipe: makes the mapper.

    Raises:
        ConfigError: ``where`` is neither.
        MissingExtraError: ``distributed`` is not installed.
        BackendUnavailableError: no scheduler answers there.
    """
    workers = local_workers(where)
    require("predict", "cluster")
    from distributed import LocalCluster

    with contextlib.ExitStack() as stack:
        address: Any = where
        if workers is not None:
            stack.enter_context(_same_environment())
            with _deaf_children():
                local = LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    memory_limit=0,
                    dashboard_address=None,
                    # not that a worker takes a while to end
                    silence_logs=logging.ERROR,
                )
            address = stack.enter_context(local)
        yield Cluster(stack.enter_context(_client(address)), recipe)


def _client(address: Any) -> Any:
    from distributed import Client

    log = logging.getLogger("distributed")
    before = log.level
    # the error says it in one line
    log.setLevel(logging.CRITICAL)
    try:
        return Client(address)
    # of the other kinds are connections that lack a library or a setting, such as a certificate
    except (OSError, ImportError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise BackendUnavailableError(
            f"--cluster: no scheduler answers; expected one at {address}, got {reason or type(error).__name__}"
        ) from None
    finally:
        log.setLevel(before)


@contextlib.contextmanager
def _same_environment() -> Iterator[None]:
    """What Dask sets for its workers, a thread of MKL among it, is set in this process and would stay."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes that are started here do not hear Ctrl-C, which a terminal sends to all: this one ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_mappers: dict[str, Mapper] = {}
_reading = threading.Lock()


def _mapper(recipe: Callable[[], Mapper], name: str) -> Mapper:
    """The model of a cluster, read once in a worker; that of the one before goes."""
    with _reading:
        if name not in _mappers:
            _mappers.clear()
            _mappers[name] = recipe()
        return _mappers[name]


def _make(
    recipe: Callable[[], Mapper], name: str, scene: Scene, work: Work, overwrite: bool, threads: int
) -> Exception | None:
    # sums are rounded as they are where the call was made
    torch.set_num_threads(threads)
    mapper = _mapper(recipe, name)
    work = work._replace(facts=mapper.facts)
    try:
        mapper.write(scene.image, scene.out, polygons=scene.polygons, overwrite=overwrite, work=work, progress=False)
    except DRSegError as error:
        # without its cause and context, which may not be text
        return type(error)(str(error))
    return None
