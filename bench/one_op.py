# SPDX-License-Identifier: Apache-2.0
"""Each op at its named cases: every backend that can run, beside the one that runs by default.

Its inputs are those of the tests, but for the graph: neighbours drawn from anywhere would measure what no model has.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import gate, graphs, memory
from bench.record import Row, rows_of
from bench.timing import Contender, interleave
from drseg_core import ops
from drseg_core.testing import Case, generator, make_inputs

OPS = ("knn_graph", "edge_weight", "degree_normalize", "edge_coefficient", "graph_propagate", "graph_layer")
# the graphs of an op's own inputs are drawn from N x N numbers
MOST_NODES = 16384


def backends() -> list[str]:
    """Every name that an op has a backend of."""
    return list(dict.fromkeys(row["backend"] for row in ops.backend_report()))


@dataclasses.dataclass(frozen=True)
class _Problem:
    """An op with its inputs.

    Args:
        function: the op. inputs: keyword arguments. wanted: names of those with a gradient. gradient: what comes back
            to the result.
    """

    function: Callable[..., Tensor]
    inputs: dict[str, Any]
    wanted: tuple[str, ...]
    gradient: Tensor | None

    def step(self, backend: str | None) -> tuple[Tensor, Sequence[Tensor]]:
        """The result and the gradients that are wanted."""
        result = self.function(**self.inputs, backend=backend)
        if not self.wanted:
            return result, ()
        return result, torch.autograd.grad(result, [self.inputs[name] for name in self.wanted], self.gradient)

    def wrong(self, op: str, backend: str | None, reference: tuple[Tensor, Sequence[Tensor]]) -> str | None:
        """What differs from the reference."""
        result, gradients = self.step(backend)
        problem = gate.result_of_op(op, result.detach(), reference[0].detach())
        return problem or gate.gradients_of_op(self.wanted, gradients, reference[1])


def last_launches(backends: Mapping[str, str | None]) -> dict[str, Any]:
    """Sizes of the last launches of those ops that ran on Triton, backward and by-products included."""
    if "triton" not in backends.values():
        return {}
    from drseg_kernels import _launch

    return {table: dataclasses.asdict(sizes) for table, sizes in _launch.last_sizes.items()}


def forget_launches() -> None:
    """What ``last_launches`` gives from here on is of what runs from here on."""
    if (launch := sys.modules.get("drseg_kernels._launch")) is not None:
        launch.last_sizes.clear()


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


def _prepare(op: str, case: Case, backward: bool, dtype: torch.dtype, device: str) -> tuple[_Problem, str | None]:
    """The problem, and the backend that runs by default."""
    inputs = make_inputs(op, case, dtype, device)
    if "index" in inputs:
        inputs["index"] = graphs.dino_like_index(case).to(device)
    function: Callable[..., Tensor] = getattr(ops, op)
    with torch.no_grad():
        result = function(**inputs)
    default = ops.last_backend(op)
    floats = tuple(name for name, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point())
    if not backward:
        return _Problem(function, inputs, (), None), default
    given = {name: value.clone().requires_grad_() if name in floats else value for name, value in inputs.items()}
    random = generator(case, 1)
    gradient = torch.randn(result.shape, generator=random).to(device=device, dtype=result.dtype)
    return _Problem(function, given, floats, gradient), default


def engine(
    op: str, case: Case, mode: str, dtype: torch.dtype, device: str
) -> tuple[Callable[[], object], str | None, dict[str, str | None]]:
    """(one call, what is wrong with it, backends) of the backend that an op takes."""
    problem, default = _prepare(op, case, mode == "fwd+bwd", dtype, device)
    return partial(problem.step, default), problem.wrong(op, default, problem.step("reference")), {op: default}


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
    problem, default = _prepare(op, case, mode == "fwd+bwd", dtype, device)
    result, gradients = problem.step("reference")
    # without the way back: what it keeps belongs to the stream of today, and a recorded call may not touch that
    reference = (result.detach(), gradients)
    del result
    able = [
        row["backend"]
        for row in ops.backend_report()
        if row["op"] == op and row["device"] == device and row["available"]
    ]
    if backend is not None:
        able, default = [backend], backend
    contenders, refused = [], []
    for name in sorted(able, key=lambda name: name != default):
        forget_launches()
        wrong = problem.wrong(op, name, reference)
        if wrong is None:
            run = partial(problem.step, name)
            fields: dict[str, Any] = {"backends": {op: name}, "launch": last_launches({op: name})}
            fields["peak_mb"] = memory.rise(run, device)
            contenders.append(Contender(name, run, repeats, fields))
        else:
            refused.append(f"{name}: {wrong}")
    if any(line.startswith(f"{default}:") for line in refused):
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
