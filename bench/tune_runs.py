# SPDX-License-Identifier: Apache-2.0
"""What ``tune.py`` times: a kernel's launcher at a case, forward and backward, and what its result is held to."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import gate
import torch
from drseg_kernels import degree_normalize, edge_weight, graph_propagate, knn_graph
from drseg_kernels._knn_sizes import Way
from torch import Tensor

from drseg_core.ops._cases import Case, generator
from drseg_core.ops._dispatch import plain_float32

Run = Callable[[Any], tuple[Tensor, ...]]
Wrong = Callable[[Any], str | None]


def _reference(op: str) -> Any:
    return importlib.import_module(f"drseg_core.ops.{op}.reference")


def _agree(expected: tuple[Tensor, ...]) -> Wrong:
    """Every result within 1e-4 of the largest element (1e-2 in half precision, where results are rounded)."""

    def wrong(got: tuple[Tensor, ...]) -> str | None:
        for number, (value, right) in enumerate(zip(got, expected, strict=True)):
            if not value.isfinite().all():
                return f"result {number} is not finite"
            slack = 1e-4 if value.dtype == torch.float32 else 1e-2
            error = (value.double() - right.double()).abs().max() / right.double().abs().max().clamp_min(1e-30)
            if not error <= slack:
                return f"result {number} is off by {float(error):.1e} of its largest element"
        return None

    return wrong


def _knn_graph(case: Case, dtype: torch.dtype, device: str) -> tuple[Run, Wrong]:
    inputs = importlib.import_module("drseg_core.ops.knn_graph.cases").make_inputs(case, dtype, device)
    reference = _reference("knn_graph")
    prior, inverse = reference.prepare_prior(inputs["prior"])
    table = reference.decay_table(inputs["grid"], inputs["decay"], "additive", torch.float32, prior.device)
    given = (prior, inverse, table, case.neighbours, "additive", True)

    def run(sizes: Any) -> tuple[Tensor, ...]:
        # a way to compute takes the sizes that the device's tables have for it
        how = {"strategy": sizes.strategy} if isinstance(sizes, Way) else {"configuration": sizes}
        with plain_float32(prior):
            return knn_graph.knn_graph(*given, **how)

    def wrong(got: tuple[Tensor, ...]) -> str | None:
        return gate.selection(got[0], inputs["prior"], inputs["grid"], inputs["decay"])

    return run, wrong


def _on_edges(op: str, kernels: Any, case: Case, dtype: torch.dtype, device: str) -> tuple[Run, Wrong]:
    inputs = importlib.import_module(f"drseg_core.ops.{op}.cases").make_inputs(case, dtype, device)
    random = generator(case, 1)
    reference = _reference(op)
    if op == "edge_weight":
        given = [inputs[name] for name in ("source", "target", "index", "vector", "bias")]
        shape = inputs["index"].shape
    elif op == "degree_normalize":
        given = [inputs["weight"], inputs["index"], "sym_row", 1e-6]
        shape = inputs["index"].shape
    else:
        given = [inputs["x"], inputs["index"], inputs["coefficient"], False]
        shape = inputs["x"].shape
    grad = torch.randn(shape, generator=random).to(device)

    def both(module: Any, **options: Any) -> tuple[Tensor, ...]:
        forward, backward = getattr(module, op), getattr(module, f"{op}_backward")
        output = forward(*given, **options)
        if op == "edge_weight":
            needed = dict.fromkeys(("need_source", "need_target", "need_parameters"), True)
            return output, *backward(grad, output, *given, **needed, **options)
        if op == "degree_normalize":
            return output, backward(grad, *given, **options)
        return output, *backward(grad.to(dtype), *given, True, True, **options)

    expected = both(reference)
    return (lambda tile: both(kernels, tile=tile)), _agree(expected)


def make(table: str, case: Case, dtype: torch.dtype, device: str) -> tuple[Run, Wrong]:
    """One call with given sizes, and why its result must not be timed (None where it is right)."""
    if table.startswith("knn_graph"):
        return _knn_graph(case, dtype, device)
    kernels = {"edge_weight": edge_weight, "degree_normalize": degree_normalize, "graph_propagate": graph_propagate}
    return _on_edges(table, kernels[table], case, dtype, device)
