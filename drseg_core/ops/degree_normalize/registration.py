# SPDX-License-Identifier: Apache-2.0
"""``drseg::degree_normalize``: schema, fake, autograd and backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drseg_core.ops import _dispatch, _native, _triton
from drseg_core.ops._checks import FLOAT_DTYPES
from drseg_core.ops._dispatch import Backend
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


def _run_triton(weight: Tensor, index: Tensor, norm: str, eps: float) -> Tensor:
    from drseg_kernels.degree_normalize import degree_normalize as launch

    return launch(weight, index, norm, eps)


def _run_triton_backward(grad: Tensor, weight: Tensor, index: Tensor, norm: str, eps: float) -> Tensor:
    from drseg_kernels.degree_normalize import degree_normalize_backward as launch

    return launch(grad, weight, index, norm, eps)


_dispatch.add_table(
    "degree_normalize",
    [
        Backend(
            name="native",
            run=_run_native,
            run_backward=_run_native_backward,
            why_not=lambda device: _native.why_not(device, "degree_normalize", "degree_normalize_backward"),
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
            run=reference.degree_normalize,
            run_backward=reference.degree_normalize_backward,
            why_not=lambda device: None,
            dtypes=FLOAT_DTYPES,
        ),
    ],
)


@torch.library.custom_op("drseg::degree_normalize", mutates_args=())
def degree_normalize(weight: Tensor, index: Tensor, norm: str, eps: float, backend: str) -> Tensor:
    chosen = _dispatch.resolve("degree_normalize", weight, backend)
    with _dispatch.plain_float32(weight):
        return chosen.run(weight, index, norm, eps).contiguous()


@degree_normalize.register_fake
def _(weight: Tensor, index: Tensor, norm: str, eps: float, backend: str) -> Tensor:
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.new_empty(weight.shape, dtype=wide)


@torch.library.custom_op("drseg::degree_normalize_backward", mutates_args=())
def degree_normalize_backward(
    grad: Tensor, weight: Tensor, index: Tensor, norm: str, eps: float, backend: str
) -> Tensor:
    chosen = _dispatch.resolve("degree_normalize", weight, backend)
    assert chosen.run_backward is not None
    with _dispatch.plain_float32(weight):
        return chosen.run_backward(grad, weight, index, norm, eps).contiguous()


@degree_normalize_backward.register_fake
def _(grad: Tensor, weight: Tensor, index: Tensor, norm: str, eps: float, backend: str) -> Tensor:
    return weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, index, ctx.norm, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(weight, index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, index = ctx.saved_tensors
    return degree_normalize_backward(grad, weight, index, ctx.norm, ctx.eps, ctx.backend), None, None, None, None


degree_normalize.register_autograd(_backward, setup_context=_setup_context)
degree_normalize_backward.register_autograd(_dispatch.refuse_double_backward("degree_normalize"))
