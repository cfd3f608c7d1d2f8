# SPDX-License-Identifier: Apache-2.0
"""Each op at its named cases: every backend that can run, beside the one that runs by default."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import gate
import torch
from record import Row, rows_of
from timing import Contender, interleave
from torch import Tensor

from drseg_core import ops
from drseg_core.ops._cases import Case

OPS = ("knn_graph", "edge_weight", "degree_normalize", "graph_propagate")


def _step(function: Callable[..., Tensor], inputs: dict[str, Any], backend: str, backward: bool) -> Tensor:
    result = function(**inputs, backend=backend)
    if backward:
        wanted = [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]
        torch.autograd.grad(result.sum(), wanted)
    return result


def measure(op: str, case: Case, mode: str, *, repeats: int = 7, device: str = "cpu") -> tuple[list[Row], list[str]]:
    """A row for each backend of an op that passed, and what was refused; the default backend is the engine."""
    backward = mode == "fwd+bwd"
    inputs = importlib.import_module(f"drseg_core.ops.{op}.cases").make_inputs(case, device=device)
    dtype = next(value.dtype for value in inputs.values() if isinstance(value, Tensor) and value.is_floating_point())
    function: Callable[..., Tensor] = getattr(ops, op)
    with torch.no_grad():
        reference = function(**inputs, backend="reference")
        function(**inputs)
    default = ops.last_backend(op)
    backends = [
        row["backend"]
        for row in ops.backend_report()
        if row["op"] == op and row["device"] == device and row["available"]
    ]
    given = {
        name: value.clone().requires_grad_(backward)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    contenders, refused = [], []
    for backend in sorted(backends, key=lambda name: name != default):
        run = partial(_step, function, given, backend, backward)
        wrong = gate.result_of_op(op, run().detach(), reference)
        if wrong is None:
            contenders.append(Contender(backend, run, repeats, {"backends": {op: backend}}))
        else:
            refused.append(f"{backend}: {wrong}")
    if any(problem.startswith(f"{default}:") for problem in refused):
        # nothing to relate the others to
        return [], refused
    common = {
        "op": op,
        "case": case.name,
        "sizes": {
            "B": case.batch,
            "h": case.height,
            "w": case.width,
            "D": case.prior,
            "E": case.hidden,
            "C": case.channels,
            "K": case.neighbours,
        },
        "mode": mode,
        "dtype": str(dtype).removeprefix("torch."),
        "data": "case",
    }
    return rows_of(contenders, interleave(contenders, device), common, device), refused
