# SPDX-License-Identifier: Apache-2.0
"""Propagation coefficients from edge weights and degrees, and the gradient through both degrees (arXiv 2604.02010,
Eq. 9).

A program is one node. Every sum has one order. It takes the slots of a row, or the edges that end in a node (by the
columns), in steps of BLOCK_N, then a tree over the BLOCK_N.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._blocks import within
from drseg_kernels._launch import Tile, on_device_of, sizes_of
from drseg_kernels.csc import csc as columns_of


@triton.jit(do_not_specialize=["slots"])
def _degree_normalize_fwd_kernel_row(weight_ptr, coefficient_ptr, slots, eps, BLOCK_N: tl.constexpr):
    """Norm ``row``: coefficient (B * N, slots) = weight / (its sum over the slots + eps)."""
    first = tl.program_id(0).to(tl.int64) * slots
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, slots, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N)
        total += tl.load(weight_ptr + first + k, mask=k < slots, other=0.0).to(tl.float32)
    degree = tl.sum(total, axis=0) + eps
    for start in range(0, slots, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N)
        weight = tl.load(weight_ptr + first + k, mask=k < slots, other=0.0).to(tl.float32)
        tl.store(coefficient_ptr + first + k, weight / degree, mask=k < slots)


@triton.jit(do_not_specialize=["slots"])
def _degree_normalize_bwd_kernel_row(grad_ptr, weight_ptr, grad_weight_ptr, slots, eps, BLOCK_N: tl.constexpr):
    """Norm ``row``: the gradient to the weights of a row, through its degree."""
    first = tl.program_id(0).to(tl.int64) * slots
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, slots, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N)
        total += tl.load(weight_ptr + first + k, mask=k < slots, other=0.0).to(tl.float32)
    inverse = 1.0 / (tl.sum(total, axis=0) + eps)
    product = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, slots, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N)
        weight = tl.load(weight_ptr + first + k, mask=k < slots, other=0.0).to(tl.float32)
        # a weight meets its degree before a gradient: the product of the two may be too large for a number
        product += weight * inverse * tl.load(grad_ptr + first + k, mask=k < slots, other=0.0).to(tl.float32)
    through = tl.sum(product, axis=0)
    for start in range(0, slots, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N)
        grad = tl.load(grad_ptr + first + k, mask=k < slots, other=0.0).to(tl.float32)
        tl.store(grad_weight_ptr + first + k, inverse * (grad - through), mask=k < slots)


@triton.jit(do_not_specialize=["slots"])
def _degree_normalize_fwd_kernel_scale(
    weight_ptr,
    indptr_ptr,
    perm_ptr,
    start_ptr,
    end_ptr,
    slots,
    eps,
    NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Inverse roots of a node's degrees: start (B * N,) as the start of an edge, end (B * N,) as its end.

    The two are one for ``sym_row`` and ``sym_undirected``, which write ``start`` only.
    """
    node = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, slots, BLOCK_N):
        k = first + tl.arange(0, BLOCK_N)
        total += tl.load(weight_ptr + node * slots + k, mask=k < slots, other=0.0).to(tl.float32)
    row = tl.sum(total, axis=0)
    if NORM == "sym_row":
        tl.store(start_ptr + node, tl.rsqrt(row + eps))
    else:
        last = tl.load(indptr_ptr + node + 1).to(tl.int64)
        total = tl.zeros((BLOCK_N,), tl.float32)
        for first in range(tl.load(indptr_ptr + node).to(tl.int64), last, BLOCK_N):
            place = first + tl.arange(0, BLOCK_N)
            edge = tl.load(perm_ptr + place, mask=place < last, other=0)
            total += tl.load(weight_ptr + edge, mask=place < last, other=0.0).to(tl.float32)
        column = tl.sum(total, axis=0)
        if NORM == "sym_inout":
            tl.store(start_ptr + node, tl.rsqrt(row + eps))
            tl.store(end_ptr + node, tl.rsqrt(column + eps))
        else:
            tl.store(start_ptr + node, tl.rsqrt((row + column) * 0.5 + eps))


@triton.jit(do_not_specialize=["nodes", "slots"])
def _degree_normalize_fwd_kernel_edges(
    weight_ptr,
    index_ptr,
    start_ptr,
    end_ptr,
    coefficient_ptr,
    nodes,
    slots,
    NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Coefficients (B * N, slots) of the edges of one node: the weight times the scales of both ends, or of one."""
    node = tl.program_id(0)
    sample = (node // nodes).to(tl.int64) * nodes
    node = node.to(tl.int64)
    near = tl.load(start_ptr + node)
    for first in range(0, slots, BLOCK_N):
        k = first + tl.arange(0, BLOCK_N)
        slot = k < slots
        edge = node * slots + k
        other = sample + within(tl.load(index_ptr + edge, mask=slot, other=0), nodes)
        weight = tl.load(weight_ptr + edge, mask=slot, other=0.0).to(tl.float32)
        value = weight * near
        if NORM != "row":
            value = value * tl.load(end_ptr + other, mask=slot, other=0.0)
        if NORM == "sym_undirected":
            value = value * 0.5
        tl.store(coefficient_ptr + edge, value, mask=slot)


@triton.jit
def to_degrees(
    grad_ptr,
    weight_ptr,
    index_ptr,
    indptr_ptr,
    perm_ptr,
    start_ptr,
    end_ptr,
    node,
    sample,
    nodes,
    slots,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums of gradient times weight, and with SCALED times the scale of the other end: over the edges that leave a
    node, and over those that end in it. The scale comes first: gradient times weight may be too large for a number."""
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, slots, BLOCK_N):
        k = first + tl.arange(0, BLOCK_N)
        slot = k < slots
        edge = node * slots + k
        if SCALED:
            other = sample + within(tl.load(index_ptr + edge, mask=slot, other=0), nodes)
        share = tl.load(weight_ptr + edge, mask=slot, other=0.0).to(tl.float32)
        if SCALED:
            share = share * tl.load(end_ptr + other, mask=slot, other=0.0)
        total += share * tl.load(grad_ptr + edge, mask=slot, other=0.0).to(tl.float32)
    leaving = tl.sum(total, axis=0)

    last = tl.load(indptr_ptr + node + 1).to(tl.int64)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(tl.load(indptr_ptr + node).to(tl.int64), last, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        incoming = place < last
        edge = tl.load(perm_ptr + place, mask=incoming, other=0)
        share = tl.load(weight_ptr + edge, mask=incoming, other=0.0).to(tl.float32)
        if SCALED:
            share = share * tl.load(start_ptr + edge // slots, mask=incoming, other=0.0)
        total += share * tl.load(grad_ptr + edge, mask=incoming, other=0.0).to(tl.float32)
    return leaving, tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["nodes", "slots"])
def _degree_normalize_bwd_kernel_degree(
    grad_ptr,
    weight_ptr,
    index_ptr,
    indptr_ptr,
    perm_ptr,
    start_ptr,
    end_ptr,
    row_ptr,
    column_ptr,
    nodes,
    slots,
    NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients to a node's degrees: row (B * N,) for the edges that leave it, column for those that end in it.

    ``sym_row`` and ``sym_undirected`` have one degree per node and write ``row`` only.
    """
    node = tl.program_id(0)
    sample = (node // nodes).to(tl.int64) * nodes
    node = node.to(tl.int64)
    start, end = tl.load(start_ptr + node), tl.load(end_ptr + node)
    sums = to_degrees(
        grad_ptr,
        weight_ptr,
        index_ptr,
        indptr_ptr,
        perm_ptr,
        start_ptr,
        end_ptr,
        node,
        sample,
        nodes,
        slots,
        True,
        BLOCK_N,
    )
    # d(degree ** -1/2) = -1/2 degree ** -3/2, factor by factor: the cube of a scale may be too small for a number
    to_start = start * (start * (-0.5 * start * sums[0]))
    to_end = end * (end * (-0.5 * end * sums[1]))
    if NORM == "sym_row":
        tl.store(row_ptr + node, to_start + to_end)
    elif NORM == "sym_inout":
        tl.store(row_ptr + node, to_start)
        tl.store(column_ptr + node, to_end)
    else:
        # half of the coefficient, and half of the degree
        tl.store(row_ptr + node, (to_start + to_end) * 0.25)


@triton.jit(do_not_specialize=["nodes", "slots"])
def _degree_normalize_bwd_kernel_edges(
    grad_ptr,
    index_ptr,
    start_ptr,
    end_ptr,
    row_ptr,
    column_ptr,
    grad_weight_ptr,
    nodes,
    slots,
    NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient (B * N, slots) to the weights of one node's edges: directly, and through the degrees of both ends."""
    node = tl.program_id(0)
    sample = (node // nodes).to(tl.int64) * nodes
    node = node.to(tl.int64)
    near, through_row = tl.load(start_ptr + node), tl.load(row_ptr + node)
    for first in range(0, slots, BLOCK_N):
        k = first + tl.arange(0, BLOCK_N)
        slot = k < slots
        edge = node * slots + k
        other = sample + within(tl.load(index_ptr + edge, mask=slot, other=0), nodes)
        value = tl.load(grad_ptr + edge, mask=slot, other=0.0).to(tl.float32)
        value = value * near * tl.load(end_ptr + other, mask=slot, other=0.0)
        if NORM == "sym_undirected":
            value = value * 0.5
        value = value + through_row
        if NORM != "sym_row":
            value = value + tl.load(column_ptr + other, mask=slot, other=0.0)
        tl.store(grad_weight_ptr + edge, value, mask=slot)


def scales(
    weight: Tensor,
    index: Tensor,
    norm: str,
    eps: float,
    csc: tuple[Tensor, Tensor] | None,
    common: dict[str, Any],
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Factors of the two ends of an edge, each (B * N,); one tensor where they are one. ``into`` is where they go."""
    rows = index.shape[0] * index.shape[1]
    if into is None:
        start = torch.empty(rows, dtype=torch.float32, device=weight.device)
        into = (start, torch.empty_like(start) if norm == "sym_inout" else start)
    # never read for sym_row
    indptr, perm = (index, index) if norm == "sym_row" else csc or columns_of(index)
    _degree_normalize_fwd_kernel_scale[(rows,)](weight, indptr, perm, *into, index.shape[2], eps, NORM=norm, **common)
    return into


def common_of(weight: Tensor, index: Tensor, tile: Tile | None = None) -> dict[str, Any]:
    """Compile-time arguments and options of the kernels here."""
    slots = index.shape[2]
    chosen = tile or sizes_of("degree_normalize", weight.device, weight.dtype, index.shape[1], slots, slots)
    return {"BLOCK_N": chosen.block_n, **chosen.options()}


def at_both_ends(value: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """Values (B, N, K) of edges times the scales (B, N) of both of their ends, in float32."""
    product = torch.empty(index.shape, dtype=torch.float32, device=value.device)
    if product.numel():
        given = (value.contiguous(), index.contiguous(), scale, scale, product, *index.shape[1:])
        with on_device_of(value):
            _degree_normalize_fwd_kernel_edges[(scale.numel(),)](*given, NORM="sym_row", **common_of(value, index))
    return product


def degree_normalize(
    weight: Tensor,
    index: Tensor,
    norm: str,
    eps: float,
    csc: tuple[Tensor, Tensor] | None = None,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Propagation coefficients (B, N, K) in float32.

    Args:
        weight: (B, N, K) float32, float16 or bfloat16. index: (B, N, K) int32 or int64, clamped into [0, N).
        norm: ``sym_row``, ``sym_count``, ``sym_inout``, ``row`` or ``sym_undirected``.
        eps: added to every degree.
        csc: columns of the graph; made here where they are needed and None.
        tile: ``columns`` slots are worked on at a time; by default those of the architecture's table, then a rule.
    """
    slots = index.shape[2]
    if norm == "sym_count":
        return weight.float() / max(slots, 1)
    coefficient = torch.empty(index.shape, dtype=torch.float32, device=weight.device)
    if coefficient.numel() == 0:
        return coefficient
    common = common_of(weight, index, tile)
    weight = weight.contiguous()
    rows = index.shape[0] * index.shape[1]
    with on_device_of(weight):
        if norm == "row":
            _degree_normalize_fwd_kernel_row[(rows,)](weight, coefficient, slots, eps, **common)
            return coefficient
        start, end = scales(weight, index, norm, eps, csc, common)
        _degree_normalize_fwd_kernel_edges[(rows,)](
            weight, index.contiguous(), start, end, coefficient, index.shape[1], slots, NORM=norm, **common
        )
    return coefficient


def degree_normalize_backward(
    grad: Tensor,
    weight: Tensor,
    index: Tensor,
    norm: str,
    eps: float,
    csc: tuple[Tensor, Tensor] | None = None,
    *,
    known: tuple[Tensor, Tensor] | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Gradient (B, N, K) to ``weight`` in its dtype, through the degrees of both ends.

    ``known`` are the scales (B * N,) of both ends of an edge, if somebody has them; the other arguments as in the
    forward.
    """
    slots = index.shape[2]
    if norm == "sym_count":
        return (grad.float() / max(slots, 1)).to(weight.dtype)
    grad_weight = torch.empty(index.shape, dtype=weight.dtype, device=weight.device)
    if grad_weight.numel() == 0:
        return grad_weight
    common = common_of(weight, index, tile)
    grad, weight = grad.contiguous(), weight.contiguous()
    rows = index.shape[0] * index.shape[1]
    with on_device_of(weight):
        if norm == "row":
            _degree_normalize_bwd_kernel_row[(rows,)](grad, weight, grad_weight, slots, eps, **common)
            return grad_weight
        csc = csc or columns_of(index)
        start, end = known or scales(weight, index, norm, eps, csc, common)
        row, near = torch.empty_like(start), index.contiguous()
        # the two are one where a node has one degree
        column = torch.empty_like(start) if norm == "sym_inout" else row
        degrees = (start, end, row, column)
        sizes = (index.shape[1], slots)
        _degree_normalize_bwd_kernel_degree[(rows,)](grad, weight, near, *csc, *degrees, *sizes, NORM=norm, **common)
        _degree_normalize_bwd_kernel_edges[(rows,)](grad, near, *degrees, grad_weight, *sizes, NORM=norm, **common)
    return grad_weight
