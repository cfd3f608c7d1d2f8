# SPDX-License-Identifier: Apache-2.0
"""Rows of figures: what they belong to, as JSON lines for a file and as a table for a reader."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench import counts
from bench.precision import PRECISIONS, Precision
from bench.timing import Contender, gpu_state
from drseg_core.testing import Case

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]

# columns of the table: heading, field, format
_COLUMNS = (
    ("op", "op", "{}"),
    ("case", "case", "{}"),
    ("mode", "mode", "{}"),
    ("dtype", "dtype", "{}"),
    ("data", "data", "{}"),
    ("name", "name", "{}"),
    ("p20 ms", "p20_ms", "{:.2f}"),
    ("p50 ms", "p50_ms", "{:.2f}"),
    ("p80 ms", "p80_ms", "{:.2f}"),
    ("warm ms", "warm_p50_ms", "{:.2f}"),
    ("eager ms", "eager_p50_ms", "{:.2f}"),
    ("host ms", "host_p50_ms", "{:.2f}"),
    ("/ engine", "ratio_to_engine", "{:.2f}"),
    ("of ceiling", "share_of_ceiling", "{:.2f}"),
    ("peak MB", "peak_mb", "{:.0f}"),
    ("process MB", "process_mb", "{:.0f}"),
)


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@functools.cache
def _checkout() -> Row:
    if "DRSEG_COMMIT" in os.environ:
        # a copy on another machine is told what it is a copy of
        return {"commit": os.environ["DRSEG_COMMIT"], "dirty": None}
    # rows and logs that nobody committed change no code
    state = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if state is None else bool(state)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(device: str) -> Row:
    """Where and with what a figure was made."""
    # not needed by a race, which also imports this from trees that have it elsewhere
    from drseg_core.checkpoints.versions import device_name

    return {
        **({"gpu": gpu_state()} if device == "cuda" else {}),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        # what torch found; the native kernels look for the same unless they are told otherwise
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "forced_level": os.environ.get("DRSEG_CPU_LEVEL"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        **_checkout(),
        "date": date.today().isoformat(),
    }


def counted(op: str, case: Case, mode: str, dtype: str, device: str) -> Row:
    """What a call has to compute and move, and what this machine reaches at best, measured in this process."""
    kinds = PRECISIONS[dtype] if op == "pdgr" else Precision(getattr(torch, dtype), getattr(torch, dtype))
    amount = counts.work(op, case, mode, kinds.maps.itemsize)
    # reduced precision saves the CPU nothing: its kernels compute in float32
    kind = kinds.products if device == "cuda" else torch.float32
    gemm, copy = counts.ceilings(device, kind, torch.get_num_threads())
    return {
        "flop": amount.flop,
        "byte": amount.byte,
        "ceiling": {"gflops": gemm / 1e9, "copy_gbs": copy / 1e9, "least_ms": 1000 * amount.seconds(gemm, copy)},
    }


def rows_of(
    contenders: Sequence[Contender],
    seconds: Sequence[Sequence[float]],
    common: Row,
    case: Case,
    device: str = "cpu",
) -> list[Row]:
    """A row for each contender: ``common``, its percentiles, its median over that of the first one, the engine, and
    its share of the ceiling: the least time the counted work takes here over its median. More than 1 is what was
    skipped."""
    common = {**common, **counted(common["op"], case, common["mode"], common["dtype"], device)}
    least = common["ceiling"]["least_ms"]
    median = [float(torch.tensor(taken, dtype=torch.float64).quantile(0.5)) for taken in seconds]
    rows = []
    for contender, taken, middle in zip(contenders, seconds, median, strict=True):
        low, high = torch.tensor(taken, dtype=torch.float64).quantile(torch.tensor([0.2, 0.8]).double()).tolist()
        rows.append(
            {
                **common,
                "name": contender.name,
                "p20_ms": 1000 * low,
                "p50_ms": 1000 * middle,
                "p80_ms": 1000 * high,
                "ratio_to_engine": middle / median[0],
                "share_of_ceiling": least / (1000 * middle),
                "repeats": len(taken),
                **environment(device),
                **contender.fields,
            }
        )
    return rows


COLUMNS_EXPLAINED = """\
name: engine is the backend that runs by default; native, cuda, triton and reference (plain PyTorch) are backends by
name; --help explains the others.
/ engine: time of a row as a multiple of the engine's, so above 1 the engine is faster.
of ceiling: share of what the machine reached in a product or copy of its own; above 1 where work was skipped, or the
machine was faster meanwhile.
peak MB: what a call takes above its inputs. process MB: all of the process, where it has one for itself.
data case: the op's own inputs, where backends stand beside each other.
Times of microseconds are of threads that wait: try --threads 1."""


def table(rows: Sequence[Row]) -> str:
    """The rows for a reader."""
    lines = [[heading for heading, _, _ in _COLUMNS]]
    for row in rows:
        lines.append(["-" if row.get(key) is None else form.format(row[key]) for _, key, form in _COLUMNS])
    width = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.rjust(size) for cell, size in zip(line, width, strict=True)) for line in lines)


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add the rows to a JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
