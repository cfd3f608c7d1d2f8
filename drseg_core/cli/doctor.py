# SPDX-License-Identifier: Apache-2.0
"""``drseg doctor``."""

from __future__ import annotations

import importlib
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from drseg_core.cli.front import PlainParser
from drseg_core.errors import BackendUnavailableError
from drseg_core.extras import EXTRAS, installed, module_name
from drseg_core.processor import THREADS, WAITING, WAITING_OF_USERS, allowed_cores, choice, quota

USAGE = "drseg doctor"
EPILOG = "Exit code 0: all that is installed can be used; 5: some of it cannot.\n\nexample:\n  drseg doctor\n"


def add_arguments(parser: PlainParser, argv: Sequence[str]) -> None:
    parser.usage, parser.epilog = USAGE, EPILOG


def run(args: Any) -> None:
    print("versions")
    for line in version_lines():
        print(f"  {line}")
    print("extras")
    for line in extra_lines():
        print(f"  {line}")
    problems = list(import_problems())
    print("devices")
    for line in device_lines():
        print(f"  {line}")
    print("threads")
    for line in thread_lines():
        print(f"  {line}")
    print("kernels")
    try:
        for line in kernel_lines():
            print(f"  {line}")
    except BackendUnavailableError as error:
        # a module of DRSEG_BACKENDS
        problems.append(str(error))
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise BackendUnavailableError(f"doctor: {len(problems)} problems found; the first: {problems[0]}")
    print("no problems found")


def version_lines() -> Iterator[str]:
    """Installed libraries."""
    from drseg_core.checkpoints.versions import LIBRARIES, git_revision, library_versions

    found = library_versions()
    yield f"python {found['python']} on {platform.platform()}"
    for name in LIBRARIES:
        yield f"{name} {found.get(name, 'not installed')}"
    if revision := git_revision():
        yield f"source {revision}"


def extra_lines() -> Iterator[str]:
    """For each extra: whether it is installed, or what is missing."""
    for extra, libraries in EXTRAS.items():
        absent = [library for library in libraries if not _is_there(library)]
        yield f"{extra}: " + (
            f"{', '.join(absent)} not installed; pip install 'drseg[{extra}]'" if absent else "installed"
        )


def import_problems() -> Iterator[str]:
    """Libraries that are installed and cannot be imported, and torch beside a torchvision of another build."""
    mismatch = torchvision_mismatch()
    for library in dict.fromkeys(library for libraries in EXTRAS.values() for library in libraries):
        name = module_name(library)
        try:
            importlib.import_module(name)
        except Exception as error:
            if not _is_there(library):
                continue
            text = " ".join(str(error).split()) or type(error).__name__
            if "torchvision::nms" in text or (mismatch and name in ("torchvision", "timm", "open_clip")):
                text += f"; {mismatch or _advice()}"
            yield f"{name} cannot be imported: {text}"


def _is_there(library: str) -> bool:
    # a library without metadata was never installed; one with metadata that cannot be found is a problem
    try:
        return installed(library) or bool(metadata.version(library))
    except metadata.PackageNotFoundError:
        return False


def torchvision_mismatch() -> str | None:
    """Why torch and torchvision cannot belong together, judged by their versions; None if they may."""
    try:
        versions = {name: metadata.version(name) for name in ("torch", "torchvision")}
    except metadata.PackageNotFoundError:
        return None
    labels = {name: version.partition("+")[2] for name, version in versions.items()}
    if (labels["torch"] == "cpu") == (labels["torchvision"] == "cpu"):
        return None
    return f"torch {versions['torch']} and torchvision {versions['torchvision']} are of different builds; {_advice()}"


def _advice() -> str:
    return "install torch and torchvision from the same index"


def device_lines() -> Iterator[str]:
    """The CPU, and every CUDA device or why there is none."""
    import torch

    yield f"cpu: {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {allowed_cores()} cores, " + (
        f"{torch.get_num_threads()} threads"
    )
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        yield f"cuda: none (torch is {build})"
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = facts.total_memory / 2**30
        yield f"cuda:{index}: {facts.name}, sm_{facts.major}{facts.minor}, {memory:.1f} GiB"


def thread_lines(environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """The cores that a command may use, and the two settings of its threads."""
    granted = quota()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    yield f"{allowed_cores()} cores allowed, {'no quota' if granted is None else f'{granted:g} granted'}{load}"
    chosen = choice(environment)
    whose = "as set" if environment.get(THREADS) else "set by commands" if THREADS in chosen else "not set"
    number = environment.get(THREADS) or chosen.get(THREADS) or f"{allowed_cores()} threads"
    yield f"{THREADS}: {number}, {whose}; how many threads share the work; sums may round differently by it"
    own = [f"{name}={environment[name]}" for name in WAITING_OF_USERS if environment.get(name)]
    words = f"{', '.join(own)}, as set" if own else f"{WAITING['OMP_WAIT_POLICY']}, set by commands"
    yield (
        f"OMP_WAIT_POLICY: {words}; active: a thread without work spins, which stalls the others on a busy machine; "
        + ("passive: it sleeps")
    )


def kernel_lines() -> Iterator[str]:
    """Why backends run nothing; for every op and device the backend that runs, and why others do not run it alone."""
    from drseg_core.ops import backend_report

    rows = backend_report()
    reasons = Counter((row["backend"], row["reason"]) for row in rows if not row["available"])
    shared = [reason for reason, count in reasons.items() if count > 1]
    yield from (f"not {backend}: {reason}" for backend, reason in shared)
    for op, device in dict.fromkeys((row["op"], row["device"]) for row in rows):
        own = [row for row in rows if (row["op"], row["device"]) == (op, device)]
        placed = sorted((row for row in own if row["place"] is not None), key=lambda row: int(row["place"]))
        able = [row["backend"] for row in placed]
        yield f"{op} on {device}: {', then '.join(able) if able else 'nothing runs'}"
        for row in own:
            if not row["available"] and (row["backend"], row["reason"]) not in shared:
                yield f"  not {row['backend']}: {row['reason']}"
            elif row["available"] and row["place"] is None:
                yield f"  {row['backend']}: only if named (interpreted)"
