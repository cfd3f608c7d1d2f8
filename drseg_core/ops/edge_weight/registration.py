# SPDX-License-Identifier: Apache-2.0
"""``drseg::edge_weight``: schema, fake, autograd and backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drseg_core.ops import _dispatch, _native, _triton
from drseg_core.ops._checks import FLOAT_DTYPES
from drseg_core.ops._dispatch import Backend
from drseg_core.ops.edge_weight import reference


def _run_native(
    source: Tensor, target: Tensor, index: Tensor, vector: Tensor, bias: Tensor, mask: Tensor | None
) -> Tensor:
    given = _native.operands(source, target, vector, bias)
    mask = None if mask is None else mask.contiguous()
    return torch.ops.drseg_native.edge_weight(*given[:2], _native.neighbours(index), *given[2:], mask)


def _run_native_backward(
    grad: Tensor,
    weight: Tensor,
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    need_source: bool,
    need_target: bool,
    need_parameters: bool,
) -> tuple[Tensor, ...]:
    # a masked slot has weight 0, whose slope is 0: the mask itself is not needed again
    grad, weight, *given = _native.operands(grad, weight, source, target, vector)
    grads = torch.ops.drseg_native.edge_weight_backward(grad, weight, *given[:2], _native.neighbours(index), given[2])
    inputs = (source, target, vector, bias)
    needed = (need_source, need_target, need_parameters, need_parameters)
    # the library computes all of them in one pass
    return tuple(
        value.to(like.dtype).reshape(like.shape) if need else like.new_empty(0)
        for value, like, need in zip(grads, inputs, needed, strict=True)
    )


def _run_triton(
    source: Tensor, target: Tensor, index: Tensor, vector: Tensor, bias: Tensor, mask: Tensor | None
) -> Tensor:
    from drseg_kernels.edge_weight import edge_weight as launch

    return launch(source, target, index, vector, bias, mask)


def _run_triton_backward(
    grad: Tensor,
    weight: Tensor,
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    need_source: bool,
    need_target: bool,
    need_parameters: bool,
) -> tuple[Tensor, ...]:
    from drseg_kernels.edge_weight import edge_weight_backward as launch

    return launch(grad, weight, source, target, index, vector, bias, need_source, need_target, need_parameters)


_dispatch.add_table(
    "edge_weight",
    [
        Backend(
            name="native",
            run=_run_native,
            run_backward=_run_native_backward,
            why_not=lambda device: _native.why_not(device, "edge_weight", "edge_weight_backward"),
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
            run=reference.edge_weight,
            run_backward=reference.edge_weight_backward,
            why_not=lambda device: None,
            dtypes=FLOAT_DTYPES,
        ),
    ],
)


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


@torch.library.custom_op("drseg::edge_weight", mutates_args=())
def edge_weight(
    source: Tensor, target: Tensor, index: Tensor, vector: Tensor, bias: Tensor, mask: Tensor | None, backend: str
) -> Tensor:
    chosen = _dispatch.resolve("edge_weight", source, backend, target=target, vector=vector, bias=bias)
    with _dispatch.plain_float32(source):
        return chosen.run(source, target, index, vector, bias, mask)


@edge_weight.register_fake
def _(
    source: Tensor, target: Tensor, index: Tensor, vector: Tensor, bias: Tensor, mask: Tensor | None, backend: str
) -> Tensor:
    return source.new_empty(index.shape, dtype=_wide(source, target, vector, bias))


@torch.library.custom_op("drseg::edge_weight_backward", mutates_args=())
def edge_weight_backward(
    grad: Tensor,
    weight: Tensor,
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    need_source: bool,
    need_target: bool,
    need_parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = _dispatch.resolve("edge_weight", source, backend, target=target, vector=vector, bias=bias)
    assert chosen.run_backward is not None
    given = (grad, weight, source, target, index, vector, bias, mask)
    with _dispatch.plain_float32(source):
        return chosen.run_backward(*given, need_source, need_target, need_parameters)


@edge_weight_backward.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    mask: Tensor | None,
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, target, index, vector, bias, mask, ctx.backend = inputs
    ctx.save_for_backward(output, source, target, index, vector, bias, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, source, target, index, vector, bias, mask = ctx.saved_tensors
    need_source, need_target, _, need_vector, need_bias = ctx.needs_input_grad[:5]
    to_source, to_target, to_vector, to_bias = edge_weight_backward(
        grad,
        weight,
        source,
        target,
        index,
        vector,
        bias,
        mask,
        need_source,
        need_target,
        need_vector or need_bias,
        ctx.backend,
    )
    return (
        to_source if need_source else None,
        to_target if need_target else None,
        None,
        to_vector if need_vector else None,
        to_bias if need_bias else None,
        None,
        None,
    )


edge_weight.register_autograd(_backward, setup_context=_setup_context)
edge_weight_backward.register_autograd(_dispatch.refuse_double_backward("edge_weight"))
