# SPDX-License-Identifier: Apache-2.0
"""``drseg::edge_coefficient``: schema, fake, autograd and backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from drseg_core.ops import _dispatch, _triton
from drseg_core.ops._registration import (
    Differentiable,
    asked_for,
    backward_of,
    columns,
    define,
    differentiated,
    fake_gradients,
    flags_of,
    widest,
)
from drseg_core.ops.edge_coefficient import reference

_dispatch.add_fusion(
    "edge_coefficient", ("edge_weight", "degree_normalize"), reference.compose, _triton.backend("edge_coefficient")
)


def _run(
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    norm: str,
    eps: float,
    indptr: Tensor | None,
    perm: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = _dispatch.resolve("edge_coefficient", source, backend, target=target, vector=vector, bias=bias)
    mask = flags_of(mask, chosen.name)
    with _dispatch.plain_float32(source):
        return chosen.run(source, target, index, vector, bias, mask, norm, eps, columns(indptr, perm))


def _run_backward(
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
    output_mask: Sequence[bool],
    indptr: Tensor | None,
    perm: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    chosen = _dispatch.resolve("edge_coefficient", source, backend, target=target, vector=vector, bias=bias)
    given = (grad, weight, scale, source, target, index, vector, bias, norm, eps, output_mask, columns(indptr, perm))
    with _dispatch.plain_float32(source):
        return asked_for(_dispatch.gradients("edge_coefficient", chosen, *given), output_mask)


def _fake(
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    norm: str,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = widest(source, target, vector, bias)
    scale = source.new_empty((reference.ENDS[norm], *index.shape[:2]), dtype=wide)
    return source.new_empty(index.shape, dtype=wide), source.new_empty(index.shape, dtype=wide), scale


_forward = define(
    "edge_coefficient",
    "(Tensor source, Tensor target, Tensor index, Tensor vector, Tensor bias, Tensor? mask, str norm, float eps, "
    "Tensor? indptr, Tensor? perm, str backend) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
_backward = define(
    "edge_coefficient_backward",
    "(Tensor grad, Tensor weight, Tensor scale, Tensor source, Tensor target, Tensor index, Tensor vector, "
    "Tensor bias, str norm, float eps, bool[4] output_mask, Tensor? indptr, Tensor? perm, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    lambda grad, weight, scale, source, target, index, vector, bias, norm, eps, mask, *others: fake_gradients(
        mask, source, target, vector, bias
    ),
)


class _EdgeCoefficient(Differentiable):
    @staticmethod
    def forward(
        source: Tensor,
        target: Tensor,
        index: Tensor,
        vector: Tensor,
        bias: Tensor,
        mask: Tensor | None,
        norm: str,
        eps: float,
        indptr: Tensor | None,
        perm: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(source, target, index, vector, bias, mask, norm, eps, indptr, perm, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *given, _, ctx.norm, ctx.eps, indptr, perm, ctx.backend = inputs
        _, weight, scale = output
        ctx.mark_non_differentiable(weight, scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, scale, *given, indptr, perm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 11
        mask = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[3:5]]
        *given, indptr, perm = ctx.saved_tensors
        given = (grad, *given, ctx.norm, ctx.eps, mask, indptr, perm, ctx.backend)
        to_source, to_target, to_vector, to_bias = backward_of("edge_coefficient", _backward, mask, *given)
        return to_source, to_target, None, to_vector, to_bias, *(None,) * 6


def edge_coefficient(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _EdgeCoefficient.apply(*arguments) if differentiated(*arguments) else _forward(*arguments)
