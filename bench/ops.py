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


def _step(function: Callable[..., Tensor], inputs: dict[str, Any], backend: str | None, backward: bool) -> Tensor:
    result = function(**inputs, backend=backend)
    if backward:
        wanted = [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]
        torch.autograd.grad(result.sum(), wanted)
    return result


def sizes_of(case: Case) -> dict[str, int]:
    return {
        "B": case.batch,
        "h": case.height,
        "w": case.width,
        "D": case.prior,
        "E": case.hidden,
        "C": case.channels,
        "K": case.neighbours,
    }


def _prepare(
    op: str, case: Case, backward: bool, dtype: torch.dtype, device: str
) -> tuple[dict[str, Any], Tensor, str | None]:
    """Inputs, with gradients where they are wanted; the reference's result; the backend that runs by default."""
    inputs = importlib.import_module(f"drseg_core.ops.{op}.cases").make_inputs(case, dtype, device=device)
    function: Callable[..., Tensor] = getattr(ops, op)
    with torch.no_grad():
        reference = function(**inputs, backend="reference")
        function(**inputs)
    given: dict[str, Any] = {
        name: value.clone().requires_grad_(backward)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    return given, reference, ops.last_backend(op)


def engine(
    op: str, case: Case, mode: str, dtype: torch.dtype, device: str
) -> tuple[Callable[[], object], str | None, dict[str, str | None]]:
    """(one call, what is wrong with it, backends) of the backend that an op takes."""
    backward = mode == "fwd+bwd"
    given, reference, default = _prepare(op, case, backward, dtype, device)
    run = partial(_step, getattr(ops, op), given, default, backward)
    return run, gate.result_of_op(op, run().detach(), reference), {op: default}


def measure(
    op: str,
    case: Case,
    mode: str,
    *,
    repeats: int = 7,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    device: str = "cpu",
) -> tuple[list[Row], list[str]]:
    """A row for each backend of an op that passed, and what was refused; the default backend is the engine.

    ``backend``: the only one that is measured.
    """
    backward = mode == "fwd+bwd"
    given, reference, default = _prepare(op, case, backward, dtype, device)
    function: Callable[..., Tensor] = getattr(ops, op)
    able = [
        row["backend"]
        for row in ops.backend_report()
        if row["op"] == op and row["device"] == device and row["available"]
    ]
    if backend is not None:
        able, default = [backend], backend
    contenders, refused = [], []
    for name in sorted(able, key=lambda name: name != default):
        run = partial(_step, function, given, name, backward)
        wrong = gate.result_of_op(op, run().detach(), reference)
        if wrong is None:
            contenders.append(Contender(name, run, repeats, {"backends": {op: name}}))
        else:
            refused.append(f"{name}: {wrong}")
    if any(problem.startswith(f"{default}:") for problem in refused):
        # nothing to relate the others to
        return [], refused
    common = {
        "op": op,
        "case": case.name,
        "sizes": sizes_of(case),
        "mode": mode,
        "dtype": str(dtype).removeprefix("torch."),
        "data": "case",
    }
    return rows_of(contenders, interleave(contenders, device), common, case, device), refused
