# SPDX-License-Identifier: Apache-2.0
"""What the contract needs to know of each op: how to call it, its inputs, its oracle, and its registered form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import oracle
import torch
from torch import Tensor

from drseg_core import ops
from drseg_core.ops.degree_normalize import cases as degree_cases
from drseg_core.ops.edge_weight import cases as edge_cases
from drseg_core.ops.graph_propagate import cases as propagate_cases
from drseg_core.testing import Case

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """One differentiable op under the contract.

    Args:
        name: of the op.
        function: the public function, keyword arguments and ``backend``.
        make_inputs: seeded inputs of a case, from the op's ``cases.py``.
        oracle: expected output and gradients with their limits.
        differentiable: inputs that get a gradient.
        node_inputs: inputs with a batch dimension.
        registered: arguments of the registered op in order, from the inputs.
        variants: options to run every case with.
    """

    name: str
    function: Callable[..., Tensor]
    make_inputs: Callable[..., Inputs]
    oracle: Callable[[Inputs, Tensor], oracle.Expected]
    differentiable: tuple[str, ...]
    node_inputs: tuple[str, ...]
    registered: Callable[[Inputs], tuple[Any, ...]]
    variants: tuple[dict[str, Any], ...] = ({},)

    def call(self, inputs: Inputs, backend: str) -> Tensor:
        return self.function(**inputs, backend=backend)

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if self.name == "graph_propagate":
            return dtype
        return torch.float64 if dtype == torch.float64 else torch.float32


def _with_mask(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
    """Edge weights with one slot in nine masked, as padding is."""
    inputs = edge_cases.make_inputs(case, dtype, device, seed)
    inputs["mask"] = (torch.arange(inputs["index"].numel()).reshape(inputs["index"].shape) % 9 != 4).to(device)
    return inputs


def with_exponents(make: Callable[..., Inputs]) -> Callable[..., Inputs]:
    """The same inputs with an exponent for every edge, of both signs."""

    def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
        found = make(case, dtype, device, seed)
        random = torch.Generator().manual_seed(seed + 1)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        found["exponent"] = 2 * torch.randn(found["index"].shape, generator=random, dtype=wide).to(device)
        return found

    return inputs


def registered_edges(i: Inputs) -> tuple[Any, ...]:
    """The arguments that the ops which weigh edges share."""
    names = ("source", "target", "index", "vector", "bias", "inverse_norm", "source_bias", "mask")
    return tuple(i.get(name) for name in names)


GRAPH_PROPAGATE = Subject(
    name="graph_propagate",
    function=ops.graph_propagate,
    make_inputs=propagate_cases.make_inputs,
    oracle=oracle.graph_propagate,
    differentiable=("x", "coefficient"),
    node_inputs=("x", "index", "coefficient"),
    registered=lambda i: (i["x"], i["index"], i["coefficient"], i.get("transpose", False), None, None, "auto"),
    variants=({"transpose": False}, {"transpose": True}),
)

EDGE_WEIGHT = Subject(
    name="edge_weight",
    function=ops.edge_weight,
    make_inputs=_with_mask,
    oracle=oracle.edge_weight,
    differentiable=("source", "target", "vector", "bias"),
    node_inputs=("source", "target", "index", "mask"),
    registered=lambda i: (*registered_edges(i), "auto", i.get("exponent")),
)

EDGE_WEIGHT_EXPONENT = replace(
    EDGE_WEIGHT,
    make_inputs=with_exponents(EDGE_WEIGHT.make_inputs),
    differentiable=(*EDGE_WEIGHT.differentiable, "exponent"),
    node_inputs=(*EDGE_WEIGHT.node_inputs, "exponent"),
)

DEGREE_NORMALIZE = Subject(
    name="degree_normalize",
    function=ops.degree_normalize,
    make_inputs=degree_cases.make_inputs,
    oracle=oracle.degree_normalize,
    differentiable=("weight",),
    node_inputs=("weight", "index"),
    registered=lambda i: (i["weight"], i["index"], i.get("norm", "sym_row"), i.get("eps", 1e-6), None, None, "auto"),
    variants=tuple({"norm": norm} for norm in ("sym_row", "sym_count", "sym_inout", "row", "sym_undirected")),
)

SUBJECTS = {subject.name: subject for subject in (GRAPH_PROPAGATE, EDGE_WEIGHT, DEGREE_NORMALIZE)}
