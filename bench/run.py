# SPDX-License-Identifier: Apache-2.0
"""Times the ops at their named cases, every backend that can run, and prints one JSON row each.

    python bench/run.py --op graph_propagate --case paper_vitl_24x24 --out bench/results/cpu/ops.jsonl

Backends are interleaved and the median counts. A row is written only when the backend's result passed the gate: the
first backend's result and the reference's must agree within the op's error budget.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from drseg_core import ops  # noqa: E402
from drseg_core.ops import _numerics as numerics  # noqa: E402
from drseg_core.ops._cases import CASES, Case  # noqa: E402

OPS = ("knn_graph", "edge_weight", "degree_normalize", "graph_propagate")


def device_name(device: str) -> str:
    """What the figures belong to."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()} ({torch.get_num_threads()} threads)"


def commit() -> str | None:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or None


def gate(op: str, result: torch.Tensor, reference: torch.Tensor) -> str | None:
    """Why a result must not be timed; None when it may. Selections are held to the gap rule by the tests."""
    if op == "knn_graph":
        share = float((result == reference).float().mean())
        return None if share > 0.999 else f"only {share:.4f} of the neighbours agree with the reference"
    limit = 1e-4 * reference.double().abs().max()
    return numerics.compare_values(result, reference.double(), limit).problem


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(op: str, case: Case, device: str, repeats: int) -> list[dict[str, Any]]:
    """One row for each backend and pass of an op at a case."""
    inputs = importlib.import_module(f"drseg_core.ops.{op}.cases").make_inputs(case, device=device)
    names = [name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    function: Callable[..., torch.Tensor] = getattr(ops, op)
    backends = [
        row["backend"]
        for row in ops.backend_report()
        if row["op"] == op and row["device"] == device and row["available"]
    ]
    with torch.no_grad():
        reference = function(**inputs, backend="reference")
    rows = []
    for backward in (False, True) if op != "knn_graph" else (False,):
        given = {
            name: value.clone().requires_grad_(backward) if name in names else value for name, value in inputs.items()
        }
        seconds: dict[str, list[float]] = {backend: [] for backend in backends}
        problems = {}
        for turn in range(repeats + 1):
            for backend in backends:
                _synchronise(device)
                begin = time.perf_counter()
                result = function(**given, backend=backend)
                if backward:
                    result.sum().backward()
                _synchronise(device)
                if turn:
                    seconds[backend].append(time.perf_counter() - begin)
                else:
                    problems[backend] = gate(op, result.detach(), reference)
        for backend in backends:
            if problems[backend] is not None:
                print(f"{op} {case.name} {backend}: refused: {problems[backend]}", file=sys.stderr)
                continue
            rows.append(
                {
                    "op": op,
                    "case": case.name,
                    "pass": "forward + backward" if backward else "forward",
                    "backend": backend,
                    "median_ms": 1000 * statistics.median(seconds[backend]),
                    "min_ms": 1000 * min(seconds[backend]),
                    "repeats": repeats,
                    "device": device_name(device),
                    "torch": torch.__version__,
                    "commit": commit(),
                    "date": date.today().isoformat(),
                }
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS, action="append", help="op to measure; all by default")
    parser.add_argument("--case", action="append", help="named case; paper_vitl_24x24 by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON-lines file to add the rows to")
    args = parser.parse_args()
    chosen = args.case or ["paper_vitl_24x24"]
    cases = {case.name: case for case in CASES}
    unknown = [name for name in chosen if name not in cases]
    if unknown:
        parser.error(f"unknown case {unknown[0]}; expected one of {', '.join(cases)}")
    for name in chosen:
        for op in args.op or OPS:
            for row in measure(op, cases[name], args.device, args.repeats):
                line = json.dumps(row)
                print(line, flush=True)
                if args.out:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    with args.out.open("a") as file:
                        file.write(line + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
