# SPDX-License-Identifier: Apache-2.0
"""``drseg::edge_coefficient``: schema, fake, autograd and backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from drseg_core.ops import _cuda, _dispatch, _edges, _native, _triton
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

# the norms of the CUDA kernels, as the library counts them: their degrees are sums over a row's own edges
_CUDA_NORMS = {"sym_row": 0, "row": 1, "sym_count": 2}
_MOST_NODES, _MOST_SLOTS = 1024, 128


def _refused_by_cuda(case: Mapping[str, Any]) -> str | None:
    if case.get("exponent"):
        return "its kernel takes no exponent"
    if case["norm"] not in _CUDA_NORMS:
        return f"its kernel has no norm {case['norm']}"
    if case["nodes"] > _MOST_NODES or case["slots"] > _MOST_SLOTS:
        got = f"{case['nodes']} and {case['slots']}"
        return f"its kernel takes at most {_MOST_NODES} nodes and {_MOST_SLOTS} slots, got {got}"
    if case["edges"] >= 2**31:
        return f"its kernel counts edges in 32 bits, got {case['edges']} of them"
    return None


def _in_pieces(values: Tensor, widths: Sequence[int], width: int) -> Tensor:
    """Parts of rows that lie one behind the other, each filled up with zeros to ``width``."""
    return torch.cat([pad(part, (0, width - part.shape[-1])) for part in values.split(list(widths), -1)], -1)


def _rows_for_cuda(halves: _edges.Halves, vector: Tensor) -> tuple[tuple[Tensor | None, ...], Tensor, int]:
    """Source, target, inverse norm and bias of the first layer, and the vector, as the library takes them; and E.

    It reads rows 16 bytes at a time: they are filled up with zeros.
    """
    source, target, inverse_norm, shift = halves
    if target is not None and target.dtype != source.dtype:
        source, target = source.float(), target.float()
    width = source.shape[-1] if target is not None else source.shape[-1] // 2
    piece = 16 // source.element_size()
    whole = max(1, -(-width // piece)) * piece
    if whole != width:
        source = _in_pieces(source, [width] if target is not None else [width, width], whole)
        target = None if target is None else pad(target, (0, whole - width))
        vector = pad(vector, (0, whole - width))
        shift = None if shift is None else pad(shift, (0, whole - width))
    rows = (
        _cuda.aligned(source),
        None if target is None else _cuda.aligned(target),
        None if inverse_norm is None else inverse_norm.float().contiguous(),
        None if shift is None else shift.contiguous(),
    )
    return rows, vector.contiguous(), width


def _run_cuda(
    halves: _edges.Halves,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    norm: str,
    eps: float,
    apart: bool = False,
    csc: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as those of the Triton launcher; ``csc`` is not used."""
    like: dict[str, Any] = {"dtype": torch.float32, "device": index.device}
    if index.numel() == 0:
        scale = torch.full((reference.ENDS[norm], *index.shape[:2]), eps**-0.5, **like)
        weight = torch.empty(index.shape, **like)
        return (weight, weight.new_empty(0), scale) if apart else (weight.clone(), weight, scale)
    rows, wide_vector, _ = _rows_for_cuda(halves, vector)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, **like).masked_fill_(mask.logical_not(), -torch.inf)
    scores = None if mask is None else mask.float().contiguous()
    given = (*rows, _native.neighbours(index), wide_vector, bias, scores)
    weight, coefficient, scale = torch.ops.drseg_native_cuda.edge_coefficient(*given, _CUDA_NORMS[norm], eps, apart)
    return (weight, coefficient.view(0), scale) if apart else (coefficient, weight, scale)


_logit_gradients = _triton.launcher("edge_coefficient", "logit_gradients")
_triton_backward = _triton.launcher("edge_coefficient", "edge_coefficient_backward")
_columns_of = _triton.launcher("csc", "csc")


def _run_cuda_backward(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    halves: _edges.Halves,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    norm: str,
    eps: float,
    apart: bool,
    output_mask: Sequence[bool],
    csc: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """As the Triton launcher, whose kernels lead through softplus and the degrees and make the columns of the graph."""
    stacked = halves[1] is None
    wants_source, wants_target = output_mask[0], output_mask[0] if stacked else output_mask[1]
    wants_parameters = any(output_mask[2:])
    if index.numel() == 0:
        return _triton_backward(grad, weight, scale, halves, index, vector, bias, norm, eps, apart, output_mask, csc)
    slope, csc = _logit_gradients(grad, weight, scale, index, norm, eps, apart, csc)
    near = _native.neighbours(index)
    rows, wide_vector, width = _rows_for_cuda(halves, vector)
    indptr, perm = _native.columns(csc or _columns_of(near)) if wants_target else (None, None)
    given = (slope.float().contiguous(), *rows, near, wide_vector, indptr, perm, wants_source or wants_parameters)
    to_source, to_target, sums = torch.ops.drseg_native_cuda.edge_gradients(*given)
    whole = wide_vector.shape[0]
    if whole != width:
        # without what filled the rows up
        to_source = torch.cat([part[..., :width] for part in to_source.split(whole, -1)], -1)
        to_target = to_target[..., :width].contiguous()
    source, target, _, shift = halves
    nothing = source.new_empty(0)
    to_vector, to_shift, to_bias = sums.split([whole, whole, 1]) if wants_parameters else (nothing,) * 3
    return (
        to_source.to(source.dtype) if wants_source else nothing,
        nothing if target is None else to_target.to(target.dtype),
        to_vector[:width].to(vector.dtype),
        to_bias.to(bias.dtype).view(bias.shape) if wants_parameters else nothing,
        nothing if shift is None else to_shift[:width].to(shift.dtype),
    )


_dispatch.add_fusion(
    "edge_coefficient",
    ("edge_weight", "degree_normalize"),
    reference.compose,
    _cuda.backend(
        _run_cuda,
        _run_cuda_backward,
        "edge_coefficient",
        "edge_gradients",
        refuses=_refused_by_cuda,
        dtypes=(torch.float32, torch.bfloat16),
        raw=True,
    ),
    _triton.backend("edge_coefficient", raw=True),
)


def _case(norm: str, index: Tensor) -> dict[str, Any]:
    return {"norm": norm, "nodes": index.shape[1], "slots": index.shape[2], "edges": index.numel()}


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
    exponent: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    halves = (source, target, inverse_norm, source_bias)
    chosen = _edges.resolve("edge_coefficient", halves, vector, bias, exponent, backend, _case(norm, index))
    options = (norm, eps, apart) if chosen.raw else (norm, eps)
    with _dispatch.without_autocast(source):
        found: tuple[Tensor, Tensor, Tensor] = _edges.run(
            chosen, halves, (index, vector, bias), mask, exponent, *options, columns(indptr, perm)
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
    exponent: Tensor | None = None,
) -> tuple[Tensor, ...]:
    halves, edges = (source, target, inverse_norm, source_bias), (index, vector, bias)
    chosen = _edges.resolve("edge_coefficient", halves, vector, bias, exponent, backend, _case(norm, index))
    options = (norm, eps, apart) if chosen.raw else (norm, eps)
    given = ((grad, weight, scale), halves, edges, options, output_mask, columns(indptr, perm), exponent)
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
    indptr: Tensor | None,
    perm: Tensor | None,
    backend: str,
    exponent: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = widest(source, target, vector, bias, inverse_norm, source_bias, exponent)
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
    indptr: Tensor | None,
    perm: Tensor | None,
    backend: str,
    exponent: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return fake_gradients(output_mask, source, target, vector, bias, source_bias, exponent)


_forward = define(
    "edge_coefficient",
    "(Tensor source, Tensor? target, Tensor index, Tensor vector, Tensor bias, Tensor? inverse_norm, "
    "Tensor? source_bias, Tensor? mask, str norm, float eps, bool apart, Tensor? indptr, Tensor? perm, str backend, "
    "Tensor? exponent=None) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
_backward = define(
    "edge_coefficient_backward",
    "(Tensor grad, Tensor weight, Tensor scale, Tensor source, Tensor? target, Tensor index, Tensor vector, "
    "Tensor bias, Tensor? inverse_norm, Tensor? source_bias, str norm, float eps, bool apart, bool[6] output_mask, "
    "Tensor? indptr, Tensor? perm, str backend, Tensor? exponent=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
        exponent: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = (source, target, index, vector, bias, inverse_norm, source_bias, mask)
        found: tuple[Tensor, Tensor, Tensor] = _forward(*given, norm, eps, apart, indptr, perm, backend, exponent)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *given, _, ctx.norm, ctx.eps, ctx.apart, indptr, perm, ctx.backend, exponent = inputs
        first, weight, scale = output
        ctx.mark_non_differentiable(weight, scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(first if ctx.apart else weight, scale, *given, indptr, perm, exponent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 15
        needs = ctx.needs_input_grad
        mask = [*needs[:2], *needs[3:5], needs[6], needs[14]]
        *given, indptr, perm, exponent = ctx.saved_tensors
        given = (grad, *given, ctx.norm, ctx.eps, ctx.apart, mask, indptr, perm, ctx.backend, exponent)
        to_source, to_target, *found = backward_of("edge_coefficient", _backward, mask, *given)
        to_vector, to_bias, to_shift, to_exponent = found
        return to_source, to_target, None, to_vector, to_bias, None, to_shift, *(None,) * 7, to_exponent


def edge_coefficient(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _EdgeCoefficient.call(*arguments) if differentiated(*arguments) else _forward(*arguments)
