# SPDX-License-Identifier: Apache-2.0
"""Is a kernel right, and how fast is it? Every backend of an op beside its reference.

    python examples/benchmark_a_kernel.py graph_propagate paper_vitl_24x24

``python -m bench run`` does this with more care: interleaved processes, a gate, rows that say what machine it was.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from drseg_core import ops
from drseg_core.testing import CASES, make_inputs, numerics


def main(op: str = "graph_propagate", case: str = "odd_37_nodes", repeats: int = 20) -> dict[str, float]:
    """Median milliseconds of each backend that can run here; one that is wrong is no row."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make_inputs(op, next(one for one in CASES if one.name == case))
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    function = getattr(ops, op)
    right = function(**inputs, backend="reference").double()
    found = {}
    for row in ops.backend_report():
        if row["op"] != op or row["device"] != device or not row["available"]:
            continue
        name = str(row["backend"])
        problem = numerics.compare_values(function(**inputs, backend=name), right, 1e-5).problem
        if problem is not None:
            print(f"{name}: wrong, {problem}")
            continue
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            function(**inputs, backend=name)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - begin))
        found[name] = statistics.median(times)
        print(f"{name}: {found[name]:.3f} ms")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:3])
