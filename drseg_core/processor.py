# SPDX-License-Identifier: Apache-2.0
"""The cores that this process may use, and how its threads wait: set for a command before torch is loaded.

OpenMP threads without work spin for milliseconds before they sleep. On two cores beside one other busy process that is
most of the time: the thread with the work waits for its core while the other one spins. A short spin costs nothing on
free cores (``python -m bench busy``), so commands always ask for one.

The number of threads depends on what a process may use, never on the load. Sums round by it, so a seed would give other
weights beside a busy process. And threads that sleep take their fair share of a loaded machine anyway.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

THREADS = "OMP_NUM_THREADS"
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
"""How threads wait: the standard's setting, and libgomp's number of turns, which overrides it there."""
WAITING_OF_USERS = (*WAITING, "KMP_BLOCKTIME")
"""If the user has set one of these, how threads wait is left as it is."""


def allowed_cores() -> int:
    """Cores that this process may run on (its affinity)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota(root: Path = Path("/")) -> float | None:
    """Number of cores that control groups grant this process, the least of its groups; None without a limit.

    Args:
        root: folder that holds ``proc`` and ``sys``.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup"
        if controllers:
            top = next((top / name for name in (controllers, "cpu") if (top / name).is_dir()), top)
        # a container may see its own group at the top, while its path is that of the host
        group = top / path.strip("/")
        found += [_limit(folder) for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return min((limit for limit in found if limit is not None), default=None)


def _limit(group: Path) -> float | None:
    try:
        if (group / "cpu.max").is_file():
            granted, period = (group / "cpu.max").read_text().split()
        else:
            granted, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return None if granted in ("max", "-1") else int(granted) / int(period)
    except (OSError, ValueError):
        return None


def choice(environment: Mapping[str, str], processes: int = 1) -> dict[str, str]:
    """Variables that a command sets: none that the user has set, and no number of threads if torch's own is right.

    Args:
        environment: that of the process.
        processes: how many compute at a time and share the cores.
    """
    found = {}
    cores, granted = allowed_cores(), quota()
    threads = cores if granted is None else min(cores, math.ceil(granted))
    if not environment.get(THREADS) and (processes > 1 or threads < cores):
        found[THREADS] = str(max(1, threads // processes))
    if not any(environment.get(name) for name in WAITING_OF_USERS):
        found |= WAITING
    return found


def prepare(environment: MutableMapping[str, str] = os.environ, processes: int = 1) -> str | None:
    """Set the number of threads and how they wait, for this process and its children.

    OpenMP reads the environment once, when it is loaded with torch: later nothing is set.

    Args:
        environment: that of the process.
        processes: children that compute at a time, each with as many threads as this one.

    Returns:
        One line that says what is set now; None if torch is loaded already.
    """
    if "torch" in sys.modules:
        return None
    chosen = choice(environment, processes)
    environment.update(chosen)
    threads, granted = environment.get(THREADS) or allowed_cores(), quota()
    words = f"CPU threads: {threads}"
    if THREADS in chosen and processes > 1:
        words += f" in each of {processes} workers"
    elif THREADS in chosen:
        words += f" ({granted:g} of {allowed_cores()} cores are granted)"
    elif environment.get(THREADS):
        words += f" ({THREADS})"
    waits = [f"{name}={environment[name]}" for name in WAITING_OF_USERS if environment.get(name)]
    idle = "idle ones sleep at once" if WAITING.items() <= chosen.items() else f"they wait by {', '.join(waits)}"
    return f"{words}; {idle}"
