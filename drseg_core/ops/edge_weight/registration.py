# SPDX-License-Identifier: Apache-2.0
"""``drseg::edge_weight``: schema, fake, autograd and backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drseg_core.ops import _dispatch, _native
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
) -> tuple[Tensor, ...]:
    # a masked slot has weight 0, whose slope is 0: the mask itself is not needed again
    grad, weight, *given = _native.operands(grad, weight, source, target, vector)
    grads = torch.ops.drseg_native.edge_weight_backward(grad, weight, *given[:2], _native.neighbours(index), given[2])
    inputs = (source, target, vector, bias)
    return tuple(value.to(like.dtype).reshape(like.shape) for value, like in zip(grads, inputs, strict=True))


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
    chosen = _dispatch.resolve("edge_weight", source, backend)
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = _dispatch.resolve("edge_weight", source, backend)
    assert chosen.run_backward is not None
    with _dispatch.plain_float32(source):
        return chosen.run_backward(grad, weight, source, target, index, vector, bias, mask)


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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        source.new_empty(source.shape),
        target.new_empty(target.shape),
        vector.new_empty(vector.shape),
        bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, target, index, vector, bias, mask, ctx.backend = inputs
    ctx.save_for_backward(output, source, target, index, vector, bias, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, source, target, index, vector, bias, mask = ctx.saved_tensors
    grads = edge_weight_backward(grad, weight, source, target, index, vector, bias, mask, ctx.backend)
    return grads[0], grads[1], None, grads[2], grads[3], None, None


edge_weight.register_autograd(_backward, setup_context=_setup_context)
edge_weight_backward.register_autograd(_dispatch.refuse_double_backward("edge_weight"))
