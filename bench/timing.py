# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: what is compared runs in turns in one process, so that a slow minute hits all of it alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Args:
        name: ``engine``, or what it is compared with.
        run: one call.
        repeats: timed calls; contenders that take a minute get fewer.
        fields: what its row says besides, e.g. ``{"note": "no decay"}``.
    """

    name: str
    run: Callable[[], object]
    repeats: int
    fields: dict[str, Any]


def seconds_of(run: Callable[[], object], device: str = "cpu") -> float:
    """Wall-clock seconds of one call, the device's queue included."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def interleave(contenders: Sequence[Contender], device: str = "cpu") -> list[list[float]]:
    """Seconds of every timed call, a list for each contender; those with fewer repeats are spread over the rounds."""
    seconds: list[list[float]] = [[] for _ in contenders]
    rounds = max((contender.repeats for contender in contenders), default=0)
    for turn in range(rounds):
        for contender, taken in zip(contenders, seconds, strict=True):
            due = (turn + 1) * contender.repeats // rounds
            if due > len(taken):
                taken.append(seconds_of(contender.run, device))
    return seconds
