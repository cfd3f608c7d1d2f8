# SPDX-License-Identifier: Apache-2.0
"""Runs the tasks of a study, here or in processes that take one after another.

A process imports this module first: it needs no torch, so that each one loads what its tasks need and no more.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, cast

from drseg_core.errors import DRSegError
from drseg_core.training.signals import TrainingStopped

Task = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of a module, and its arguments."""


class Outcome(NamedTuple):
    """What a task gave, or why it gave nothing."""

    result: Any
    problem: str | None


def _outcome(task: Task) -> Outcome:
    function, arguments = task
    try:
        return Outcome(function(*arguments), None)
    except TrainingStopped:
        raise
    except Exception as error:
        kind = "" if isinstance(error, DRSegError) else f"{type(error).__name__}: "
        return Outcome(None, kind + " ".join(str(error).split()))


def _on(task: Task, device: str | None) -> Task:
    """A task whose planned variants run on a device."""
    if device is None:
        return task
    # whoever names a device has planned variants, and with them torch
    from drseg_core.studies.plan import PlannedVariant

    function, arguments = task
    return function, tuple(one.on(device) if isinstance(one, PlannedVariant) else one for one in arguments)


def run_tasks(tasks: Sequence[Task], jobs: int, devices: Sequence[str] = ()) -> Iterator[tuple[int, Outcome]]:
    """Yield (place, outcome) of each task as it ends: here, or in ``jobs`` processes that take one after another.

    With ``devices`` there are ``jobs`` processes on each of them, and variants run on that of their process.

    Whatever a task fails of, the death of its process (killed, out of memory) included, the others go on.

    Raises:
        TrainingStopped: a task was told to stop.
    """
    places = tuple(devices) or (None,)
    count = jobs * len(places)
    if count == 1:
        for place, task in enumerate(tasks):
            yield place, _outcome(_on(task, places[0]))
        return
    # here and not above: a process that imports this module may need none
    import torch

    threads = max(1, torch.get_num_threads() // count)
    waiting, running = collections.deque(enumerate(tasks)), dict[Connection, int]()
    workers = dict[Connection, Any]()
    on = dict[Connection, str | None]()
    try:
        while waiting or running:
            while waiting and len(running) < count:
                idle = next((worker for worker in workers if worker not in running), None)
                if idle is None:
                    # where the fewest are
                    device = min(places, key=[on[worker] for worker in workers].count)
                    idle = _start_worker(workers, threads, device)
                    on[idle] = device
                worker = idle
                running[worker], task = waiting.popleft()
                # one that died while it was idle says so below
                with contextlib.suppress(OSError):
                    worker.send(task)
            for worker in cast("list[Connection]", multiprocessing.connection.wait(list(running))):
                place = running.pop(worker)
                try:
                    outcome = worker.recv()
                except (EOFError, OSError):
                    process = workers.pop(worker)
                    process.join()
                    worker.close()
                    code = process.exitcode
                    outcome = Outcome(None, f"its process died with exit code {code}; expected a result, got none")
                if isinstance(outcome, TrainingStopped):
                    raise outcome
                yield place, outcome
    finally:
        for worker, process in workers.items():
            if worker in running:
                # a training that is told to stop saves its state first
                process.terminate()
            worker.close()
        for process in workers.values():
            process.join()


def _start_worker(workers: dict[Connection, Any], threads: int, device: str | None) -> Connection:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, threads, device))
    process.start()
    # the process has its own copy: when it ends, ours sees the end of the pipe
    theirs.close()
    workers[ours] = process
    return ours


def _work(tasks: Connection, threads: int, device: str | None) -> None:
    # a terminal's Ctrl-C goes to the parent alone, which then tells its processes once to stop
    with contextlib.suppress(OSError):
        os.setsid()
    # where a task loads torch later than with itself
    os.environ["OMP_NUM_THREADS"] = str(threads)
    while True:
        try:
            received = tasks.recv_bytes()
        except (EOFError, OSError):
            # no process asks any more
            return
        # as ``recv`` does; it imports what the task needs, and what fails there is said
        task = ForkingPickler.loads(received)
        # a main module may have loaded it before all this
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        try:
            outcome: Outcome | TrainingStopped = _outcome(_on(task, device))
        except TrainingStopped as stop:
            outcome = stop
        try:
            tasks.send(outcome)
        except OSError:
            # none waits for an answer
            return
