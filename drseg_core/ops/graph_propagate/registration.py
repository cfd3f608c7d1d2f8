# SPDX-License-Identifier: Apache-2.0
"""``drseg::graph_propagate``: schema, fake, autograd and backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from drseg_core.ops import _dispatch, _native, _triton
from drseg_core.ops._registration import (
    Differentiable,
    asked_for,
    backward_of,
    columns,
    define,
    differentiated,
    fake_gradients,
    usual,
)
from drseg_core.ops.graph_propagate import reference


def _run_native(
    x: Tensor, index: Tensor, coefficient: Tensor, transpose: bool, csc: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    features, share = _native.operands(x, coefficient)
    given = (features, _native.neighbours(index), share, transpose, *_native.columns(csc))
    return torch.ops.drseg_native.graph_propagate(*given).to(x.dtype)


def _run_native_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    transpose: bool,
    output_mask: Sequence[bool],
    csc: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    grad_x, grad_coefficient = x.new_empty(0), coefficient.new_empty(0)
    if output_mask[0]:
        grad_x = _run_native(grad, index, coefficient, not transpose, csc).to(x.dtype)
    if output_mask[1]:
        start, end = _native.operands(*((x, grad) if transpose else (grad, x)))
        dot = torch.ops.drseg_native.graph_edge_dot(start, end, _native.neighbours(index))
        grad_coefficient = dot.to(coefficient.dtype)
    return grad_x, grad_coefficient


def takes_incoming(x: Tensor, index: Tensor, coefficient: Tensor, lists: Sequence[Tensor], backend: str) -> bool:
    """Whether the backend that runs for ``x`` gathers from listed edges, and nobody follows the call."""
    given = (x, index, coefficient)
    # autograd and a mode of torch follow operators with schemas, and that of the lists has none of ours
    if differentiated(*given) or not usual((*given, *lists)):
        return False
    return _dispatch.resolve("graph_propagate", x, backend, coefficient=coefficient).run is _run_native


def propagate_incoming(x: Tensor, indptr: Tensor, start: Tensor, coefficient: Tensor) -> Tensor:
    features, share = _native.operands(x, coefficient)
    return torch.ops.drseg_native.graph_propagate_listed(features, indptr, start, share).to(x.dtype)


_dispatch.add_table(
    "graph_propagate",
    _native.backend(
        _run_native, _run_native_backward, "graph_propagate", "graph_propagate_listed", "graph_edge_dot", "csc"
    ),
    _triton.backend("graph_propagate"),
    _dispatch.reference_backend(reference.graph_propagate, reference.graph_propagate_backward),
)


def _run(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    transpose: bool,
    indptr: Tensor | None,
    perm: Tensor | None,
    backend: str,
) -> Tensor:
    chosen = _dispatch.resolve("graph_propagate", x, backend, coefficient=coefficient)
    with _dispatch.without_autocast(x):
        return chosen.run(x, index, coefficient, transpose, columns(indptr, perm))


def _run_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    transpose: bool,
    output_mask: Sequence[bool],
    indptr: Tensor | None,
    perm: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    chosen = _dispatch.resolve("graph_propagate", x, backend, coefficient=coefficient)
    given = (grad, x, index, coefficient, transpose, output_mask, columns(indptr, perm))
    with _dispatch.without_autocast(x):
        return asked_for(_dispatch.gradients("graph_propagate", chosen, *given), output_mask)


_forward = define(
    "graph_propagate",
    "(Tensor x, Tensor index, Tensor coefficient, bool transpose, Tensor? indptr, Tensor? perm, str backend) -> Tensor",
    _run,
    lambda x, *others: x.new_empty(x.shape),
)
_backward = define(
    "graph_propagate_backward",
    "(Tensor grad, Tensor x, Tensor index, Tensor coefficient, bool transpose, bool[2] output_mask, Tensor? indptr, "
    "Tensor? perm, str backend) -> (Tensor, Tensor)",
    _run_backward,
    lambda grad, x, index, coefficient, transpose, mask, *others: fake_gradients(mask, x, coefficient),
)


class _GraphPropagate(Differentiable):
    @staticmethod
    def forward(
        x: Tensor,
        index: Tensor,
        coefficient: Tensor,
        transpose: bool,
        indptr: Tensor | None,
        perm: Tensor | None,
        backend: str,
    ) -> Tensor:
        return _forward(x, index, coefficient, transpose, indptr, perm, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, index, coefficient, ctx.transpose, indptr, perm, ctx.backend = inputs
        ctx.save_for_backward(x, index, coefficient, indptr, perm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        *given, indptr, perm = ctx.saved_tensors
        given = (grad, *given, ctx.transpose, mask, indptr, perm, ctx.backend)
        to_x, to_coefficient = backward_of("graph_propagate", _backward, mask, *given)
        return to_x, None, to_coefficient, None, None, None, None


def graph_propagate(*arguments: Any) -> Tensor:
    return _GraphPropagate.call(*arguments) if differentiated(*arguments) else _forward(*arguments)
