# SPDX-License-Identifier: Apache-2.0
"""``drseg::graph_layer``: schema, fake, autograd and backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drseg_core.ops import _dispatch, _triton
from drseg_core.ops._checks import FLOAT_DTYPES
from drseg_core.ops._dispatch import Backend
from drseg_core.ops.graph_layer import reference


def _run_triton(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    activation: str,
    eps: float,
    undirected: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from drseg_kernels.graph_layer import graph_layer as launch

    return launch(x, index, coefficient, bias, gain, shift, activation, eps, undirected, keep)


def _run_triton_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from drseg_kernels.graph_layer import graph_layer_backward as launch

    return launch(*arguments)


_dispatch.add_table(
    "graph_layer",
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
            run=reference.graph_layer,
            run_backward=reference.graph_layer_backward,
            why_not=lambda device: None,
            dtypes=FLOAT_DTYPES,
        ),
    ],
)


@torch.library.custom_op("drseg::graph_layer", mutates_args=())
def graph_layer(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    activation: str,
    eps: float,
    undirected: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    others = {"coefficient": coefficient, "bias": bias, "gain": gain, "shift": shift}
    chosen = _dispatch.resolve("graph_layer", x, backend, **others)
    with _dispatch.plain_float32(x):
        return chosen.run(x, index, coefficient, bias, gain, shift, activation, eps, undirected, keep)


@graph_layer.register_fake
def _(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    activation: str,
    eps: float,
    undirected: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if torch.float64 in (x.dtype, coefficient.dtype) else torch.float32
    kept = keep and activation == "layer_norm"
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if kept else (0,), dtype=wide),
        x.new_empty(x.shape[:2] if kept else (0,), dtype=wide),
    )


@torch.library.custom_op("drseg::graph_layer_backward", mutates_args=())
def graph_layer_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    y: Tensor,
    normed: Tensor,
    inverse: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    activation: str,
    undirected: bool,
    need_x: bool,
    need_coefficient: bool,
    need_parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    others = {"coefficient": coefficient, "bias": bias, "gain": gain, "shift": shift}
    chosen = _dispatch.resolve("graph_layer", x, backend, **others)
    assert chosen.run_backward is not None
    given = (grad, x, index, coefficient, y, normed, inverse, bias, gain, shift, activation, undirected)
    with _dispatch.plain_float32(x):
        return chosen.run_backward(*given, need_x, need_coefficient, need_parameters)


@graph_layer_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    y: Tensor,
    normed: Tensor,
    inverse: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    activation: str,
    undirected: bool,
    need_x: bool,
    need_coefficient: bool,
    need_parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    to_bias, to_gain, to_shift = (
        grad.new_empty(0) if value is None or not need_parameters else value.new_empty(value.shape)
        for value in (bias, gain, shift)
    )
    return (
        x.new_empty(x.shape if need_x else (0,)),
        coefficient.new_empty(coefficient.shape if need_coefficient else (0,)),
        to_bias,
        to_gain,
        to_shift,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # undirected edges are followed in the transposed direction too
    x, index, coefficient, bias, gain, shift, activation, _, ctx.transpose, _, ctx.backend = inputs
    y, normed, inverse = output
    ctx.mark_non_differentiable(normed, inverse)
    ctx.set_materialize_grads(False)
    # of the output only ReLU's mask is needed again
    mask = y if activation == "relu" else None
    ctx.save_for_backward(x, index, coefficient, mask, normed, inverse, bias, gain, shift)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    x, index, coefficient, y, normed, inverse, bias, gain, shift = ctx.saved_tensors
    activation = "layer_norm" if gain is not None else "none" if y is None else "relu"
    if activation == "layer_norm" and normed.shape != x.shape:
        raise RuntimeError("graph_layer: keep is False; expected True where a gradient is needed, got a backward")
    need_x, _, need_coefficient, *need_parameters = ctx.needs_input_grad[:6]
    grads = graph_layer_backward(
        grad,
        x,
        index,
        coefficient,
        # read for ReLU only
        normed if y is None else y,
        normed,
        inverse,
        bias,
        gain,
        shift,
        activation,
        ctx.transpose,
        need_x,
        need_coefficient,
        any(need_parameters),
        ctx.backend,
    )
    needed = (need_x, need_coefficient, *need_parameters)
    to_x, to_coefficient, *others = (value if need else None for value, need in zip(grads, needed, strict=True))
    return to_x, None, to_coefficient, *others, None, None, None, None, None


graph_layer.register_autograd(_backward, setup_context=_setup_context)
graph_layer_backward.register_autograd(_dispatch.refuse_double_backward("graph_layer"))
