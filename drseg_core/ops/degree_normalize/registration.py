# SPDX-License-Identifier: Apache-2.0
"""``drseg::degree_normalize``: schema, fake, autograd and backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drseg_core.ops import _dispatch, _native, _triton
from drseg_core.ops._registration import Differentiable, backward_of, columns, define, differentiated, widest
from drseg_core.ops.degree_normalize import reference

# the order in which the library counts them
_NORMS = ("sym_row", "sym_count", "sym_inout", "row", "sym_undirected")


def _run_native(
    weight: Tensor, index: Tensor, norm: str, eps: float, csc: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    # its sums along columns are by rows, and need no lists
    (wide,) = _native.operands(weight)
    return torch.ops.drseg_native.degree_normalize(wide, _native.neighbours(index), _NORMS.index(norm), eps)


def _run_native_backward(
    grad: Tensor, weight: Tensor, index: Tensor, norm: str, eps: float, csc: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    grad, wide = _native.operands(grad, weight)
    ends, number = _native.neighbours(index), _NORMS.index(norm)
    return torch.ops.drseg_native.degree_normalize_backward(grad, wide, ends, number, eps).to(weight.dtype)


_dispatch.add_table(
    "degree_normalize",
    _native.backend(_run_native, _run_native_backward, "degree_normalize", "degree_normalize_backward"),
    _triton.backend("degree_normalize"),
    _dispatch.reference_backend(reference.degree_normalize, reference.degree_normalize_backward),
)


def _run(
    weight: Tensor, index: Tensor, norm: str, eps: float, indptr: Tensor | None, perm: Tensor | None, backend: str
) -> Tensor:
    chosen = _dispatch.resolve("degree_normalize", weight, backend)
    with _dispatch.without_autocast(weight):
        return chosen.run(weight, index, norm, eps, columns(indptr, perm))


def _run_backward(
    grad: Tensor,
    weight: Tensor,
    index: Tensor,
    norm: str,
    eps: float,
    indptr: Tensor | None,
    perm: Tensor | None,
    backend: str,
) -> Tensor:
    chosen = _dispatch.resolve("degree_normalize", weight, backend)
    with _dispatch.without_autocast(weight):
        given = (grad, weight, index, norm, eps, columns(indptr, perm))
        return _dispatch.gradients("degree_normalize", chosen, *given)


_forward = define(
    "degree_normalize",
    "(Tensor weight, Tensor index, str norm, float eps, Tensor? indptr, Tensor? perm, str backend) -> Tensor",
    _run,
    lambda weight, *others: weight.new_empty(weight.shape, dtype=widest(weight)),
)
_backward = define(
    "degree_normalize_backward",
    "(Tensor grad, Tensor weight, Tensor index, str norm, float eps, Tensor? indptr, Tensor? perm, str backend) "
    "-> Tensor",
    _run_backward,
    lambda grad, weight, *others: weight.new_empty(weight.shape),
)


class _DegreeNormalize(Differentiable):
    @staticmethod
    def forward(
        weight: Tensor, index: Tensor, norm: str, eps: float, indptr: Tensor | None, perm: Tensor | None, backend: str
    ) -> Tensor:
        return _forward(weight, index, norm, eps, indptr, perm, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, index, ctx.norm, ctx.eps, indptr, perm, ctx.backend = inputs
        ctx.save_for_backward(weight, index, indptr, perm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, index, indptr, perm = ctx.saved_tensors
        given = (grad, weight, index, ctx.norm, ctx.eps, indptr, perm, ctx.backend)
        return *backward_of("degree_normalize", _backward, [True], *given), *(None,) * 6


def degree_normalize(*arguments: Any) -> Tensor:
    return _DegreeNormalize.call(*arguments) if differentiated(*arguments) else _forward(*arguments)
