# SPDX-License-Identifier: Apache-2.0
"""``drseg::graph_layer``: schema, fake, autograd and backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from drseg_core.ops import _cuda, _dispatch, _native, _triton
from drseg_core.ops._registration import (
    Differentiable,
    asked_for,
    backward_of,
    columns,
    define,
    differentiated,
    fake_gradients,
    widest,
)
from drseg_core.ops.graph_layer import reference

# as the CUDA library counts them
_CUDA_ACTIVATIONS = {"none": 0, "relu": 1, "layer_norm": 2}
_MOST_NODES, _MOST_SLOTS, _MOST_CHANNELS = 1024, 128, 8192


def _refused_by_cuda(case: Mapping[str, Any]) -> str | None:
    if case["undirected"]:
        return "its kernel follows edges in one direction"
    if case["bytes"] % 16:
        return f"its kernel takes rows that are multiples of 16 bytes, got {case['bytes']} bytes"
    sizes = case["nodes"], case["slots"], case["channels"]
    if any(size > most for size, most in zip(sizes, (_MOST_NODES, _MOST_SLOTS, _MOST_CHANNELS), strict=True)):
        most = f"{_MOST_NODES} nodes, {_MOST_SLOTS} slots and {_MOST_CHANNELS} channels"
        return f"its kernel takes at most {most}, got {sizes[0]}, {sizes[1]} and {sizes[2]}"
    if case["edges"] >= 2**31:
        return f"its kernel counts edges in 32 bits, got {case['edges']} of them"
    return None


def _run_cuda(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    eps: float,
    undirected: bool,
    keep: bool,
    csc: tuple[Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Arguments and results as those of the Triton launcher; ``undirected`` is False, ``csc`` is not used."""
    graph = (_native.neighbours(index), coefficient.float().contiguous(), scale)
    parameters = [None if value is None else value.contiguous() for value in (bias, norm_weight, norm_bias)]
    given = (_cuda.aligned(x), *graph, *parameters)
    y, *kept = torch.ops.drseg_native_cuda.graph_layer(*given, _CUDA_ACTIVATIONS[activation], eps)
    return y, *(kept if keep and activation == "layer_norm" else (value.new_empty(0) for value in kept))


_before_activation = _triton.launcher("graph_layer", "before_activation")
_triton_backward = _triton.launcher("graph_layer", "graph_layer_backward")
_columns_of = _triton.launcher("csc", "csc")


def _run_cuda_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    y: Tensor,
    given: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    undirected: bool,
    output_mask: Sequence[bool],
    csc: tuple[Tensor, Tensor] | None = None,
    added: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As the Triton launcher, whose kernels lead through the activation and make the columns of the graph."""
    if grad.numel() == 0:
        others = (y, given, mean, rstd, bias, norm_weight, norm_bias, activation, undirected, output_mask)
        return _triton_backward(grad, x, index, coefficient, *others, csc, added, scale)
    parameters = (bias, norm_weight, norm_bias)
    wants_x, wants_coefficient = output_mask[:2]
    wants_parameters = any(output_mask[2:]) and any(value is not None for value in parameters)
    saved = (y, given, mean, rstd)
    inner, *found = _before_activation(
        grad, saved, parameters, activation, wants_x or wants_coefficient, wants_parameters
    )
    near = _native.neighbours(index)
    indptr, perm = _native.columns(csc or _columns_of(near)) if wants_x else (None, None)
    rows = (_cuda.aligned(inner.to(x.dtype)), _cuda.aligned(x))
    graph = (near, coefficient.float().contiguous(), scale, indptr, perm)
    on_top = None if added is None or not wants_coefficient else added.float().contiguous()
    to_x, to_coefficient = torch.ops.drseg_native_cuda.graph_layer_backward(*rows, *graph, on_top, wants_coefficient)
    return to_x, to_coefficient.to(coefficient.dtype), *found


_dispatch.add_fusion(
    "graph_layer",
    ("graph_propagate",),
    reference.compose,
    _cuda.backend(
        _run_cuda,
        _run_cuda_backward,
        "graph_layer",
        "graph_layer_backward",
        refuses=_refused_by_cuda,
        dtypes=(torch.float32, torch.bfloat16),
        raw=True,
    ),
    _triton.backend("graph_layer", raw=True),
    widens=True,
)


def _resolve(x: Tensor, index: Tensor, undirected: bool, backend: str, *others: Tensor | None) -> _dispatch.Backend:
    names = ("coefficient", "scale", "bias", "norm_weight", "norm_bias")
    nodes, channels = x.shape[-2:]
    case = {
        "nodes": nodes,
        "slots": index.shape[-1],
        "channels": channels,
        "bytes": channels * x.element_size(),
        "undirected": undirected,
        "edges": index.numel(),
    }
    return _dispatch.resolve("graph_layer", x, backend, case, **dict(zip(names, others, strict=True)))


def _run(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    eps: float,
    undirected: bool,
    keep: bool,
    indptr: Tensor | None,
    perm: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    chosen = _resolve(x, index, undirected, backend, coefficient, scale, bias, norm_weight, norm_bias)
    options = (bias, norm_weight, norm_bias, activation, eps, undirected, keep, columns(indptr, perm))
    with _dispatch.without_autocast(x):
        if chosen.raw:
            return chosen.run(x, index, coefficient, *options, None if scale is None else scale.contiguous())
        complete = coefficient if scale is None else reference.at_both_ends(coefficient, index, scale)
        return chosen.run(x, index, complete, *options)


def _run_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    scale: Tensor | None,
    y: Tensor,
    given: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    undirected: bool,
    output_mask: Sequence[bool],
    indptr: Tensor | None,
    perm: Tensor | None,
    added: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    parameters = (bias, norm_weight, norm_bias)
    chosen = _resolve(x, index, undirected, backend, coefficient, scale, *parameters)
    options = (y, given, mean, rstd, *parameters, activation, undirected, output_mask, columns(indptr, perm))
    with _dispatch.without_autocast(x):
        if chosen.raw:
            raw = (added, None if scale is None else scale.contiguous())
            found = _dispatch.gradients("graph_layer", chosen, grad, x, index, coefficient, *options, *raw)
            return asked_for(found, output_mask)
        complete = coefficient if scale is None else reference.at_both_ends(coefficient, index, scale)
        found = _dispatch.gradients("graph_layer", chosen, grad, x, index, complete, *options)
    to_x, to_coefficient, *others = asked_for(found, output_mask)
    if scale is not None and output_mask[1]:
        to_coefficient = reference.at_both_ends(to_coefficient, index, scale).to(coefficient.dtype)
    if added is not None and output_mask[1]:
        to_coefficient = to_coefficient + added
    return to_x, to_coefficient, *others


def _fake(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    eps: float,
    undirected: bool,
    keep: bool,
    indptr: Tensor | None,
    perm: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    wide, kept = widest(x, coefficient, scale), keep and activation == "layer_norm"
    mean, rstd = (x.new_empty(x.shape[:2] if kept else (0,), dtype=wide) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape if kept else (0,), dtype=wide), mean, rstd


def _fake_backward(grad: Tensor, x: Tensor, index: Tensor, coefficient: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, bias, norm_weight, norm_bias, activation, undirected, output_mask, indptr, perm, added, backend = others
    return fake_gradients(output_mask, x, coefficient, bias, norm_weight, norm_bias)


_forward = define(
    "graph_layer",
    "(Tensor x, Tensor index, Tensor coefficient, Tensor? scale, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "str activation, float eps, bool undirected, bool keep, Tensor? indptr, Tensor? perm, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
_backward = define(
    "graph_layer_backward",
    "(Tensor grad, Tensor x, Tensor index, Tensor coefficient, Tensor? scale, Tensor y, Tensor given, Tensor mean, "
    "Tensor rstd, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, str activation, bool undirected, "
    "bool[5] output_mask, Tensor? indptr, Tensor? perm, Tensor? added, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


class _GraphLayer(Differentiable):
    @staticmethod
    def forward(
        x: Tensor,
        index: Tensor,
        coefficient: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        activation: str,
        eps: float,
        undirected: bool,
        keep: bool,
        indptr: Tensor | None,
        perm: Tensor | None,
        backend: str,
        hand_on: bool,
    ) -> tuple[Tensor, ...]:
        parameters = (bias, norm_weight, norm_bias)
        options = (activation, eps, undirected, keep, indptr, perm, backend)
        found: tuple[Tensor, ...] = _forward(x, index, coefficient, scale, *parameters, *options)
        # for the next layer as it is: what comes back to it here is what the later layers made of it
        return (*found, coefficient.view_as(coefficient)) if hand_on else found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # undirected edges are followed in the transposed direction too
        *given, ctx.activation, _, ctx.undirected, ctx.keep, indptr, perm, ctx.backend, _ = inputs
        x, index, coefficient, scale, *parameters = given
        y, before, mean, rstd = output[:4]
        ctx.mark_non_differentiable(before, mean, rstd)
        ctx.set_materialize_grads(False)
        # of the output only ReLU's mask is needed again
        mask = y if ctx.activation == "relu" else before
        ctx.save_for_backward(x, index, coefficient, scale, mask, before, mean, rstd, *parameters, indptr, perm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
        added = others[3] if len(others) > 3 else None
        if grad is None:
            return None, None, added, *(None,) * 12
        if ctx.activation == "layer_norm" and not ctx.keep:
            raise RuntimeError("graph_layer: keep is False; expected True where a gradient is needed, got a backward")
        needs = ctx.needs_input_grad
        mask = [needs[0], needs[2], *needs[4:7]]
        *given, indptr, perm = ctx.saved_tensors
        given = (grad, *given, ctx.activation, ctx.undirected, mask, indptr, perm, added, ctx.backend)
        to_x, to_coefficient, *grads = backward_of("graph_layer", _backward, mask, *given)
        return to_x, None, to_coefficient, None, *grads, *(None,) * 8


def graph_layer(*arguments: Any) -> tuple[Tensor, ...]:
    """The output, what is kept for the backward, and last the coefficient for another layer."""
    *given, hand_on = arguments
    if not differentiated(*given):
        return *_forward(*given), given[2]
    # an output that is an input is not for the compiler, nor for a transform
    hand_on = (
        hand_on
        and given[2].requires_grad
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )
    found: tuple[Tensor, ...] = _GraphLayer.call(*given, hand_on)
    return found if hand_on else (*found, given[2])
