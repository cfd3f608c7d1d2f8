# SPDX-License-Identifier: Apache-2.0
"""``drseg::edge_coefficient``: schema, fake, autograd and backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from drseg_core.ops import _dispatch, _edges, _triton
from drseg_core.ops._registration import (
    Differentiable,
    backward_of,
    columns,
    define,
    differentiated,
    fake_gradients,
    widest,
)
from drseg_core.ops.edge_coefficient import reference

_dispatch.add_fusion(
    "edge_coefficient",
    ("edge_weight", "degree_normalize"),
    reference.compose,
    _triton.backend("edge_coefficient", raw=True),
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
    norm: str,
    eps: float,
    apart: bool,
    indptr: Tensor | None,
    perm: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    halves = (source, target, inverse_norm, source_bias)
    chosen = _edges.resolve("edge_coefficient", halves, vector, bias, backend)
    options = (norm, eps, apart) if chosen.raw else (norm, eps)
    with _dispatch.without_autocast(source):
        found: tuple[Tensor, Tensor, Tensor] = _edges.run(
            chosen, halves, (index, vector, bias), mask, *options, columns(indptr, perm)
        )
    return found


def _run_backward(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    source: Tensor,
    target: Tensor | None,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    inverse_norm: Tensor | None,
    source_bias: Tensor | None,
    norm: str,
    eps: float,
    apart: bool,
    output_mask: Sequence[bool],
    indptr: Tensor | None,
    perm: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    halves = (source, target, inverse_norm, source_bias)
    chosen = _edges.resolve("edge_coefficient", halves, vector, bias, backend)
    options = (norm, eps, apart) if chosen.raw else (norm, eps)
    given = ((grad, weight, scale), halves, (index, vector, bias), options, output_mask, columns(indptr, perm))
    with _dispatch.without_autocast(source):
        return _edges.run_backward("edge_coefficient", chosen, *given)


def _fake(
    source: Tensor,
    target: Tensor | None,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    inverse_norm: Tensor | None,
    source_bias: Tensor | None,
    mask: Tensor | None,
    norm: str,
    eps: float,
    apart: bool,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = widest(source, target, vector, bias, inverse_norm, source_bias)
    shapes = (index.shape, (0,) if apart else index.shape, (reference.ENDS[norm], *index.shape[:2]))
    first, second, scale = (source.new_empty(shape, dtype=wide) for shape in shapes)
    return first, second, scale


def _fake_backward(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    source: Tensor,
    target: Tensor | None,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    inverse_norm: Tensor | None,
    source_bias: Tensor | None,
    norm: str,
    eps: float,
    apart: bool,
    output_mask: Sequence[bool],
    *others: Any,
) -> tuple[Tensor, ...]:
    return fake_gradients(output_mask, source, target, vector, bias, source_bias)


_forward = define(
    "edge_coefficient",
    "(Tensor source, Tensor? target, Tensor index, Tensor vector, Tensor bias, Tensor? inverse_norm, "
    "Tensor? source_bias, Tensor? mask, str norm, float eps, bool apart, Tensor? indptr, Tensor? perm, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
_backward = define(
    "edge_coefficient_backward",
    "(Tensor grad, Tensor weight, Tensor scale, Tensor source, Tensor? target, Tensor index, Tensor vector, "
    "Tensor bias, Tensor? inverse_norm, Tensor? source_bias, str norm, float eps, bool apart, bool[5] output_mask, "
    "Tensor? indptr, Tensor? perm, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


class _EdgeCoefficient(Differentiable):
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
        norm: str,
        eps: float,
        apart: bool,
        indptr: Tensor | None,
        perm: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = (source, target, index, vector, bias, inverse_norm, source_bias, mask)
        found: tuple[Tensor, Tensor, Tensor] = _forward(*given, norm, eps, apart, indptr, perm, backend)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *given, _, ctx.norm, ctx.eps, ctx.apart, indptr, perm, ctx.backend = inputs
        first, weight, scale = output
        ctx.mark_non_differentiable(weight, scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(first if ctx.apart else weight, scale, *given, indptr, perm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 14
        needs = ctx.needs_input_grad
        mask = [*needs[:2], *needs[3:5], needs[6]]
        *given, indptr, perm = ctx.saved_tensors
        given = (grad, *given, ctx.norm, ctx.eps, ctx.apart, mask, indptr, perm, ctx.backend)
        to_source, to_target, to_vector, to_bias, to_shift = backward_of("edge_coefficient", _backward, mask, *given)
        return to_source, to_target, None, to_vector, to_bias, None, to_shift, *(None,) * 7


def edge_coefficient(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _EdgeCoefficient.call(*arguments) if differentiated(*arguments) else _forward(*arguments)
