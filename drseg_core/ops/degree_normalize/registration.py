# SPDX-License-Identifier: Apache-2.0
"""``drseg::degree_normalize``: schema, fake, autograd and backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drseg_core.ops import _dispatch, _native, _triton
from drseg_core.ops._registration import Differentiable, backward_of, define, differentiated, widest
from drseg_core.ops.degree_normalize import reference

# the order in which the library counts them
_NORMS = ("sym_row", "sym_count", "sym_inout", "row", "sym_undirected")


def _run_native(weight: Tensor, index: Tensor, norm: str, eps: float) -> Tensor:
    (wide,) = _native.operands(weight)
    return torch.ops.drseg_native.degree_normalize(wide, _native.neighbours(index), _NORMS.index(norm), eps)


def _run_native_backward(grad: Tensor, weight: Tensor, index: Tensor, norm: str, eps: float) -> Tensor:
    grad, wide = _native.operands(grad, weight)
    ends, number = _native.neighbours(index), _NORMS.index(norm)
    return torch.ops.drseg_native.degree_normalize_backward(grad, wide, ends, number, eps).to(weight.dtype)


_dispatch.add_table(
    "degree_normalize",
    _native.backend(_run_native, _run_native_backward, "degree_normalize", "degree_normalize_backward"),
    _triton.backend("degree_normalize"),
    _dispatch.reference_backend(reference.degree_normalize, reference.degree_normalize_backward),
)


def _run(weight: Tensor, index: Tensor, norm: str, eps: float, backend: str) -> Tensor:
    chosen = _dispatch.resolve("degree_normalize", weight, backend)
    with _dispatch.plain_float32(weight):
        return chosen.run(weight, index, norm, eps)


def _run_backward(grad: Tensor, weight: Tensor, index: Tensor, norm: str, eps: float, backend: str) -> Tensor:
    chosen = _dispatch.resolve("degree_normalize", weight, backend)
    with _dispatch.plain_float32(weight):
        return _dispatch.gradients("degree_normalize", chosen, grad, weight, index, norm, eps)


_forward = define(
    "degree_normalize",
    "(Tensor weight, Tensor index, str norm, float eps, str backend) -> Tensor",
    _run,
    lambda weight, *others: weight.new_empty(weight.shape, dtype=widest(weight)),
)
_backward = define(
    "degree_normalize_backward",
    "(Tensor grad, Tensor weight, Tensor index, str norm, float eps, str backend) -> Tensor",
    _run_backward,
    lambda grad, weight, *others: weight.new_empty(weight.shape),
)


class _DegreeNormalize(Differentiable):
    @staticmethod
    def forward(weight: Tensor, index: Tensor, norm: str, eps: float, backend: str) -> Tensor:
        return _forward(weight, index, norm, eps, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, index, ctx.norm, ctx.eps, ctx.backend = inputs
        ctx.save_for_backward(weight, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given = (grad, *ctx.saved_tensors, ctx.norm, ctx.eps, ctx.backend)
        return *backward_of("degree_normalize", _backward, [True], *given), None, None, None, None


def degree_normalize(*arguments: Any) -> Tensor:
    return _DegreeNormalize.apply(*arguments) if differentiated(*arguments) else _forward(*arguments)
