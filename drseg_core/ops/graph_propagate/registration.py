# SPDX-License-Identifier: Apache-2.0
"""``drseg::graph_propagate``: schema, fake, autograd and backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drseg_core.ops import _dispatch, _native, _triton
from drseg_core.ops._checks import FLOAT_DTYPES
from drseg_core.ops._dispatch import Backend
from drseg_core.ops.graph_propagate import reference


def _run_native(x: Tensor, index: Tensor, coefficient: Tensor, transpose: bool) -> Tensor:
    features, share = _native.operands(x, coefficient)
    neighbour = _native.neighbours(index)
    return torch.ops.drseg_native.graph_propagate(features, neighbour, share, transpose).to(x.dtype)


def _run_native_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    transpose: bool,
    need_x: bool,
    need_coefficient: bool,
) -> tuple[Tensor, Tensor]:
    grad_x, grad_coefficient = x.new_empty(0), coefficient.new_empty(0)
    if need_x:
        grad_x = _run_native(grad, index, coefficient, not transpose).to(x.dtype)
    if need_coefficient:
        start, end = _native.operands(*((x, grad) if transpose else (grad, x)))
        dot = torch.ops.drseg_native.graph_edge_dot(start, end, _native.neighbours(index))
        grad_coefficient = dot.to(coefficient.dtype)
    return grad_x, grad_coefficient


def _run_triton(x: Tensor, index: Tensor, coefficient: Tensor, transpose: bool) -> Tensor:
    from drseg_kernels.graph_propagate import graph_propagate as launch

    return launch(x, index, coefficient, transpose)


def _run_triton_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    transpose: bool,
    need_x: bool,
    need_coefficient: bool,
) -> tuple[Tensor, Tensor]:
    from drseg_kernels.graph_propagate import graph_propagate_backward as launch

    return launch(grad, x, index, coefficient, transpose, need_x, need_coefficient)


_dispatch.add_table(
    "graph_propagate",
    [
        Backend(
            name="native",
            run=_run_native,
            run_backward=_run_native_backward,
            why_not=lambda device: _native.why_not(device, "graph_propagate", "graph_edge_dot"),
            dtypes=FLOAT_DTYPES,
        ),
        Backend(
            name="triton",
            run=_run_triton,
            run_backward=_run_triton_backward,
            why_not=_triton.why_not,
            dtypes=_triton.DTYPES,
        ),
        Backend(
            name="reference",
            run=reference.graph_propagate,
            run_backward=reference.graph_propagate_backward,
            why_not=lambda device: None,
            dtypes=FLOAT_DTYPES,
        ),
    ],
)


@torch.library.custom_op("drseg::graph_propagate", mutates_args=())
def graph_propagate(x: Tensor, index: Tensor, coefficient: Tensor, transpose: bool, backend: str) -> Tensor:
    chosen = _dispatch.resolve("graph_propagate", x, backend, coefficient=coefficient)
    with _dispatch.plain_float32(x):
        return chosen.run(x, index, coefficient, transpose)


@graph_propagate.register_fake
def _(x: Tensor, index: Tensor, coefficient: Tensor, transpose: bool, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("drseg::graph_propagate_backward", mutates_args=())
def graph_propagate_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    transpose: bool,
    need_x: bool,
    need_coefficient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = _dispatch.resolve("graph_propagate", x, backend, coefficient=coefficient)
    assert chosen.run_backward is not None
    with _dispatch.plain_float32(x):
        return chosen.run_backward(grad, x, index, coefficient, transpose, need_x, need_coefficient)


@graph_propagate_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    transpose: bool,
    need_x: bool,
    need_coefficient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if need_x else (0,))
    return grad_x, coefficient.new_empty(coefficient.shape if need_coefficient else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, coefficient, ctx.transpose, ctx.backend = inputs
    ctx.save_for_backward(x, index, coefficient)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, index, coefficient = ctx.saved_tensors
    need_x, _, need_coefficient = ctx.needs_input_grad[:3]
    grad_x, grad_coefficient = graph_propagate_backward(
        grad, x, index, coefficient, ctx.transpose, need_x, need_coefficient, ctx.backend
    )
    return grad_x if need_x else None, None, grad_coefficient if need_coefficient else None, None, None


graph_propagate.register_autograd(_backward, setup_context=_setup_context)
graph_propagate_backward.register_autograd(_dispatch.refuse_double_backward("graph_propagate"))
