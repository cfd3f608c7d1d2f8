# SPDX-License-Identifier: Apache-2.0
"""``drseg::edge_coefficient``: schema, fake, autograd and backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drseg_core.ops import _dispatch, _triton
from drseg_core.ops._checks import FLOAT_DTYPES
from drseg_core.ops._dispatch import Backend
from drseg_core.ops.edge_coefficient import reference

# scales that the backward needs, see the reference
_ENDS = {"sym_row": 1, "sym_undirected": 1, "sym_inout": 2, "row": 0, "sym_count": 0}


def _run_triton(
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from drseg_kernels.edge_coefficient import edge_coefficient as launch

    return launch(source, target, index, vector, bias, mask, norm, eps)


def _run_triton_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from drseg_kernels.edge_coefficient import edge_coefficient_backward as launch

    return launch(*arguments)


_dispatch.add_table(
    "edge_coefficient",
    [
        Backend(
            name="triton",
            run=_run_triton,
            run_backward=_run_triton_backward,
            why_not=_triton.why_not,
            dtypes=_triton.DTYPES,
        ),
        Backend(
            name="reference",
            run=reference.edge_coefficient,
            run_backward=reference.edge_coefficient_backward,
            why_not=lambda device: None,
            dtypes=FLOAT_DTYPES,
        ),
    ],
)


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


@torch.library.custom_op("drseg::edge_coefficient", mutates_args=())
def edge_coefficient(
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    norm: str,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = _dispatch.resolve("edge_coefficient", source, backend, target=target, vector=vector, bias=bias)
    with _dispatch.plain_float32(source):
        return chosen.run(source, target, index, vector, bias, mask, norm, eps)


@edge_coefficient.register_fake
def _(
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    norm: str,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(source, target, vector, bias)
    return (
        source.new_empty(index.shape, dtype=wide),
        source.new_empty(index.shape, dtype=wide),
        source.new_empty((_ENDS[norm], *index.shape[:2]), dtype=wide),
    )


@torch.library.custom_op("drseg::edge_coefficient_backward", mutates_args=())
def edge_coefficient_backward(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    norm: str,
    eps: float,
    need_source: bool,
    need_target: bool,
    need_parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = _dispatch.resolve("edge_coefficient", source, backend, target=target, vector=vector, bias=bias)
    assert chosen.run_backward is not None
    given = (grad, weight, scale, source, target, index, vector, bias, norm, eps)
    with _dispatch.plain_float32(source):
        return chosen.run_backward(*given, need_source, need_target, need_parameters)


@edge_coefficient_backward.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    norm: str,
    eps: float,
    need_source: bool,
    need_target: bool,
    need_parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        source.new_empty(source.shape if need_source else (0,)),
        target.new_empty(target.shape if need_target else (0,)),
        vector.new_empty(vector.shape if need_parameters else (0,)),
        bias.new_empty(bias.shape if need_parameters else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    source, target, index, vector, bias, _, ctx.norm, ctx.eps, ctx.backend = inputs
    _, weight, scale = output
    ctx.mark_non_differentiable(weight, scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, scale, source, target, index, vector, bias)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    need_source, need_target, _, need_vector, need_bias = ctx.needs_input_grad[:5]
    needs = (need_source, need_target, need_vector or need_bias)
    grads = edge_coefficient_backward(grad, *ctx.saved_tensors, ctx.norm, ctx.eps, *needs, ctx.backend)
    needed = (need_source, need_target, need_vector, need_bias)
    to_source, to_target, to_vector, to_bias = (
        value if need else None for value, need in zip(grads, needed, strict=True)
    )
    return to_source, to_target, None, to_vector, to_bias, None, None, None, None


edge_coefficient.register_autograd(_backward, setup_context=_setup_context)
edge_coefficient_backward.register_autograd(_dispatch.refuse_double_backward("edge_coefficient"))
