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
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    exponent: Tensor | None = None,
) -> Tensor:
    last = () if exponent is None else (exponent,)
    own, near, vector, bias, *given = _native.operands(source, target, vector, bias, *last)
    mask = None if mask is None else mask.contiguous()
    return torch.ops.drseg_native.edge_weight(own, near, _native.neighbours(index), vector, bias, mask, *given)


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
    exponent: Tensor | None = None,
) -> tuple[Tensor, ...]:
    last = () if exponent is None else (exponent,)
    grad, weight, own, near, wide, *given = _native.operands(grad, weight, source, target, vector, *last)
    edges = (own, near, _native.neighbours(index), wide, *_native.columns(csc))
    # all of them in one pass
    grads = torch.ops.drseg_native.edge_weight_backward(grad, weight, *edges, *given)
    likes = (source, target, vector, bias, *last)
    return tuple(value.to(like.dtype).reshape(like.shape) for value, like in zip(grads, likes, strict=False))


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
    exponent: Tensor | None = None,
) -> Tensor:
    halves = (source, target, inverse_norm, source_bias)
    chosen = _edges.resolve("edge_weight", halves, vector, bias, exponent, backend)
    with _dispatch.without_autocast(source):
        weight: Tensor = _edges.run(chosen, halves, (index, vector, bias), mask, exponent)
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
    exponent: Tensor | None = None,
) -> tuple[Tensor, ...]:
    halves = (source, target, inverse_norm, source_bias)
    chosen = _edges.resolve("edge_weight", halves, vector, bias, exponent, backend)
    given = ((grad, weight), halves, (index, vector, bias), (), output_mask, columns(indptr, perm), exponent)
    with _dispatch.without_autocast(source):
        return _edges.run_backward("edge_weight", chosen, *given)


def _fake(
    source: Tensor,
    target: Tensor | None,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    inverse_norm: Tensor | None,
    source_bias: Tensor | None,
    mask: Tensor | None,
    backend: str,
    exponent: Tensor | None = None,
) -> Tensor:
    wide = widest(source, target, vector, bias, inverse_norm, source_bias, exponent)
    return source.new_empty(index.shape, dtype=wide)


def _fake_backward(
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
    exponent: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return fake_gradients(output_mask, source, target, vector, bias, source_bias, exponent)


_forward = define(
    "edge_weight",
    "(Tensor source, Tensor? target, Tensor index, Tensor vector, Tensor bias, Tensor? inverse_norm, "
    "Tensor? source_bias, Tensor? mask, str backend, Tensor? exponent=None) -> Tensor",
    _run,
    _fake,
)
# a masked slot has weight 0, whose slope is 0: the backward needs the weight and not the mask
_backward = define(
    "edge_weight_backward",
    "(Tensor grad, Tensor weight, Tensor source, Tensor? target, Tensor index, Tensor vector, Tensor bias, "
    "Tensor? inverse_norm, Tensor? source_bias, bool[6] output_mask, Tensor? indptr, Tensor? perm, str backend, "
    "Tensor? exponent=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
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
        exponent: Tensor | None,
    ) -> Tensor:
        # the backward alone goes along columns
        return _forward(source, target, index, vector, bias, inverse_norm, source_bias, mask, backend, exponent)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *given, _, indptr, perm, ctx.backend, exponent = inputs
        ctx.save_for_backward(output, *given, indptr, perm, exponent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        mask = [*needs[:2], *needs[3:5], needs[6], needs[11]]
        *given, indptr, perm, exponent = ctx.saved_tensors
        given = (grad, *given, mask, indptr, perm, ctx.backend, exponent)
        to_source, to_target, *found = backward_of("edge_weight", _backward, mask, *given)
        to_vector, to_bias, to_shift, to_exponent = found
        return to_source, to_target, None, to_vector, to_bias, None, to_shift, *(None,) * 4, to_exponent


def edge_weight(*arguments: Any) -> Tensor:
    if differentiated(*arguments):
        return _EdgeWeight.call(*arguments)
    *given, _, _, backend, exponent = arguments
    return _forward(*given, backend, exponent)
