# SPDX-License-Identifier: Apache-2.0
"""``drseg::edge_weight``: schema, fake, autograd and backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from drseg_core.ops import _dispatch, _edges, _native, _triton
from drseg_core.ops._registration import (
    Differentiable,
    backward_of,
    columns,
    define,
    differentiated,
    fake_gradients,
    widest,
)
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
    output_mask: Sequence[bool],
    csc: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    grad, weight, *given = _native.operands(grad, weight, source, target, vector)
    edges = (*given[:2], _native.neighbours(index), given[2], *_native.columns(csc))
    # all of them in one pass
    grads = torch.ops.drseg_native.edge_weight_backward(grad, weight, *edges)
    return tuple(
        value.to(like.dtype).reshape(like.shape)
        for value, like in zip(grads, (source, target, vector, bias), strict=True)
    )


_dispatch.add_table(
    "edge_weight",
    _native.backend(_run_native, _run_native_backward, "edge_weight", "edge_weight_backward", "csc"),
    _triton.backend("edge_weight", raw=True),
    _dispatch.reference_backend(reference.edge_weight, reference.edge_weight_backward),
)


def _run(
    source: Tensor,
    target: Tensor | None,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    inverse_norm: Tensor | None,
    source_bias: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> Tensor:
    halves = (source, target, inverse_norm, source_bias)
    chosen = _edges.resolve("edge_weight", halves, vector, bias, backend)
    with _dispatch.without_autocast(source):
        weight: Tensor = _edges.run(chosen, halves, (index, vector, bias), mask)
    return weight


def _run_backward(
    grad: Tensor,
    weight: Tensor,
    source: Tensor,
    target: Tensor | None,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    inverse_norm: Tensor | None,
    source_bias: Tensor | None,
    output_mask: Sequence[bool],
    indptr: Tensor | None,
    perm: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    halves = (source, target, inverse_norm, source_bias)
    chosen = _edges.resolve("edge_weight", halves, vector, bias, backend)
    edges, csc = (index, vector, bias), columns(indptr, perm)
    with _dispatch.without_autocast(source):
        return _edges.run_backward("edge_weight", chosen, (grad, weight), halves, edges, (), output_mask, csc)


def _fake(
    source: Tensor,
    target: Tensor | None,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    inverse_norm: Tensor | None,
    source_bias: Tensor | None,
    *others: Any,
) -> Tensor:
    return source.new_empty(index.shape, dtype=widest(source, target, vector, bias, inverse_norm, source_bias))


_forward = define(
    "edge_weight",
    "(Tensor source, Tensor? target, Tensor index, Tensor vector, Tensor bias, Tensor? inverse_norm, "
    "Tensor? source_bias, Tensor? mask, str backend) -> Tensor",
    _run,
    _fake,
)
# a masked slot has weight 0, whose slope is 0: the backward needs the weight and not the mask
_backward = define(
    "edge_weight_backward",
    "(Tensor grad, Tensor weight, Tensor source, Tensor? target, Tensor index, Tensor vector, Tensor bias, "
    "Tensor? inverse_norm, Tensor? source_bias, bool[5] output_mask, Tensor? indptr, Tensor? perm, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    lambda grad, weight, source, target, index, vector, bias, inverse_norm, source_bias, mask, *others: fake_gradients(
        mask, source, target, vector, bias, source_bias
    ),
)


class _EdgeWeight(Differentiable):
    @staticmethod
    def forward(
        source: Tensor,
        target: Tensor | None,
        index: Tensor,
        vector: Tensor,
        bias: Tensor,
        inverse_norm: Tensor | None,
        source_bias: Tensor | None,
        mask: Tensor | None,
        indptr: Tensor | None,
        perm: Tensor | None,
        backend: str,
    ) -> Tensor:
        # the backward alone goes along columns
        return _forward(source, target, index, vector, bias, inverse_norm, source_bias, mask, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *given, _, indptr, perm, ctx.backend = inputs
        ctx.save_for_backward(output, *given, indptr, perm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        mask = [*needs[:2], *needs[3:5], needs[6]]
        *given, indptr, perm = ctx.saved_tensors
        given = (grad, *given, mask, indptr, perm, ctx.backend)
        to_source, to_target, to_vector, to_bias, to_shift = backward_of("edge_weight", _backward, mask, *given)
        return to_source, to_target, None, to_vector, to_bias, None, to_shift, *(None,) * 4


def edge_weight(*arguments: Any) -> Tensor:
    if differentiated(*arguments):
        return _EdgeWeight.call(*arguments)
    *given, _, _, backend = arguments
    return _forward(*given, backend)
