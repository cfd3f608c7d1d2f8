# SPDX-License-Identifier: Apache-2.0
"""What ``tune.py`` times: a kernel's launcher at a case, forward and backward, and what its result is held to."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from drseg_kernels import graph_propagate, knn_graph
from torch import Tensor

from bench import gate, graphs, selection
from drseg_core.testing import Case, generator, make_inputs

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


def _knn_graph(name: str, case: Case, dtype: torch.dtype, device: str) -> tuple[Run, Wrong]:
    """``name`` of the argument that takes the sizes."""
    # how much a tile adds to the lists depends on the prior: that of a backbone on an image, not clusters anywhere
    nodes, grid, decay = selection.make_prior(case, "dino", device).to(dtype), (case.height, case.width), 1.0
    prior, inverse = _reference("prepare_prior").prepare_prior(nodes)
    table = _reference("knn_graph").decay_table(grid, decay, "additive", torch.float32, prior.device)
    # as PDGR and everybody who asks for no scores has it
    rounded = _reference("prepare_prior").rounding(prior, inverse) if dtype == torch.float32 else ()
    given = (prior, inverse, table, case.neighbours, "additive", True, *rounded)

    def run(sizes: Any) -> tuple[Tensor, ...]:
        return knn_graph.knn_graph(*given, **{name: sizes})

    def wrong(got: tuple[Tensor, ...]) -> str | None:
        return gate.selection(got[0], nodes, grid, decay)

    return run, wrong


def _inputs(op: str, case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Those of the op's cases, on a graph as PDGR has it: how much neighbours share decides what is fastest."""
    return make_inputs(op, case, dtype, device) | {"index": graphs.dino_like_index(case).to(device)}


def _degree_normalize(inputs: dict[str, Any], grad: Tensor, ops: Any, **sizes: Any) -> tuple[Tensor, ...]:
    given = (inputs["weight"], inputs["index"], "sym_row", 1e-6)
    return ops.degree_normalize(*given, **sizes), ops.degree_normalize_backward(grad, *given, **sizes)


def _edges(inputs: dict[str, Any], ops: Any) -> list[Any]:
    """Halves, index, vector and bias as the kernels take them, or as the reference does."""
    source, target, *others = (inputs[name] for name in ("source", "target", "index", "vector", "bias"))
    kernels = ops.__name__.startswith("drseg_kernels")
    return [(source, target, None, None), *others] if kernels else [source, target, *others]


def _edge_weight(inputs: dict[str, Any], grad: Tensor, ops: Any, **sizes: Any) -> tuple[Tensor, ...]:
    given = _edges(inputs, ops)
    output = ops.edge_weight(*given, **sizes)
    # kernels have one gradient more, of a bias that there is none of
    mask = [True] * 4 + [False] * (len(given) == 4)
    return output, *ops.edge_weight_backward(grad, output, *given, mask, **sizes)[:4]


def _edge_coefficient(inputs: dict[str, Any], grad: Tensor, ops: Any, **sizes: Any) -> tuple[Tensor, ...]:
    # its backward has the sizes of edge_weight
    output, weight, _ = ops.edge_coefficient(*_edges(inputs, ops), None, "sym_row", 1e-6, **sizes)
    return output, weight


def _graph_propagate(inputs: dict[str, Any], grad: Tensor, ops: Any, **sizes: Any) -> tuple[Tensor, ...]:
    # both directions; the gradient to coefficients has a table of its own
    given = (inputs["index"], inputs["coefficient"])
    return ops.graph_propagate(inputs["x"], *given, False, **sizes), ops.graph_propagate(grad, *given, True, **sizes)


def _graph_propagate_dot(inputs: dict[str, Any], grad: Tensor, ops: Any, **sizes: Any) -> tuple[Tensor, ...]:
    x, index, coefficient = inputs["x"], inputs["index"], inputs["coefficient"]
    if sizes:
        return (graph_propagate.edge_dot(grad, x, index, coefficient.dtype, **sizes),)
    return (ops.graph_propagate_backward(grad, x, index, coefficient, False, [False, True])[1],)


def _graph_gradients(inputs: dict[str, Any], grad: Tensor, ops: Any, **sizes: Any) -> tuple[Tensor, ...]:
    given = (grad, inputs["x"], inputs["index"], inputs["coefficient"], False, [True, True])
    return tuple(ops.graph_propagate_backward(*given, **sizes))


def _layer(inputs: dict[str, Any], ops: Any, **sizes: Any) -> tuple[Tensor, ...]:
    given = [inputs[name] for name in ("x", "index", "coefficient", "bias", "norm_weight", "norm_bias")]
    found: tuple[Tensor, ...] = ops.graph_layer(*given, "layer_norm", 1e-5, False, True, **sizes)
    return found


def _graph_layer(inputs: dict[str, Any], grad: Tensor, ops: Any, **sizes: Any) -> tuple[Tensor, ...]:
    return _layer(inputs, ops, **sizes)


def _graph_layer_rows(inputs: dict[str, Any], grad: Tensor, ops: Any, **sizes: Any) -> tuple[Tensor, ...]:
    # what comes before propagation is led back; the forward is not timed
    given = [inputs[name] for name in ("x", "index", "coefficient")]
    parameters = [inputs[name] for name in ("bias", "norm_weight", "norm_bias")]
    options = ("layer_norm", False, [False, False, True, True, True])
    rows = {"rows": sizes["tile"]} if sizes else {}
    return tuple(ops.graph_layer_backward(grad, *given, *inputs["saved"], *parameters, *options, **rows)[2:])


# table -> the op whose inputs and reference it has, and one call of what it has the sizes of
_CALLS: dict[str, tuple[str, Callable[..., tuple[Tensor, ...]]]] = {
    "degree_normalize": ("degree_normalize", _degree_normalize),
    "edge_weight": ("edge_weight", _edge_weight),
    "edge_coefficient": ("edge_coefficient", _edge_coefficient),
    "graph_propagate": ("graph_propagate", _graph_propagate),
    "graph_propagate_dot": ("graph_propagate", _graph_propagate_dot),
    "graph_gradients": ("graph_propagate", _graph_gradients),
    "graph_layer": ("graph_layer", _graph_layer),
    "graph_layer_rows": ("graph_layer", _graph_layer_rows),
}


def make(table: str, case: Case, dtype: torch.dtype, device: str) -> tuple[Run, Wrong]:
    """One call with given sizes, and why its result must not be timed (None where it is right)."""
    if table in ("knn_graph", "knn_live"):
        return _knn_graph("live" if table == "knn_live" else "sizes", case, dtype, device)
    op, call = _CALLS[table]
    inputs, reference = _inputs(op, case, dtype, device), _reference(op)
    shape = inputs["x" if op.startswith("graph_") else "index"].shape
    grad = torch.randn(shape, generator=generator(case, 1)).to(device)
    if op.startswith("graph_"):
        grad = grad.to(dtype)
    if table == "graph_layer_rows":
        inputs["saved"] = _layer(inputs, reference)
    expected = call(inputs, grad, reference)
    kernels = importlib.import_module(f"drseg_kernels.{op}")
    return lambda tile: call(inputs, grad, kernels, tile=tile), _agree(expected)
