# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of neighbour features ``y_i = sum_k coefficient_ik x_j``, their transpose and gradients
(arXiv 2604.02010, Eq. 9).

A program is one node and some channels, and loads the features of each edge. The transpose goes along the columns of
the graph. Every sum has one order: the edges in steps of BLOCK_M, then a tree over the BLOCK_M. Gradient to a
coefficient: the channels in steps of BLOCK_N, then a tree.

A program that holds all channels computes both gradients, since both need the same gathered features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._blocks import within
from drseg_kernels._launch import Tile, ceil_div, on_device_of, sizes_of
from drseg_kernels.csc import csc as columns_of


@triton.jit
def gathered_sum(
    x_ptr,
    index_ptr,
    coefficient_ptr,
    scale_ptr,
    indptr_ptr,
    perm_ptr,
    node,
    nodes,
    slots,
    channels,
    c,
    TRANSPOSE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(BLOCK_N,) channels ``c`` of one node of y: over its slots, or over the edges that end in it.

    SCALED: the row at the other end of an edge counts as often as its scale (B * N,) says.
    """
    sample = (node // nodes).to(tl.int64) * nodes
    node = node.to(tl.int64)
    channel = c < channels
    if TRANSPOSE:
        # wide, for what lies beyond the last edge
        first, last = tl.load(indptr_ptr + node).to(tl.int64), tl.load(indptr_ptr + node + 1).to(tl.int64)
    else:
        first, last = node * slots, (node + 1) * slots
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        used = place < last
        if TRANSPOSE:
            edge = tl.load(perm_ptr + place, mask=used, other=0)
            row = (edge // slots).to(tl.int64)
        else:
            edge = place
            row = sample + within(tl.load(index_ptr + edge, mask=used, other=0), nodes)
        share = tl.load(coefficient_ptr + edge, mask=used, other=0.0).to(tl.float32)
        if SCALED:
            share *= tl.load(scale_ptr + row, mask=used, other=0.0)
        both = used[:, None] & channel[None, :]
        x = tl.load(x_ptr + (row * channels)[:, None] + c[None, :], mask=both, other=0.0).to(tl.float32)
        total += share[:, None] * x
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["nodes", "slots"])
def _graph_propagate_fwd_kernel(
    x_ptr,
    index_ptr,
    coefficient_ptr,
    indptr_ptr,
    perm_ptr,
    y_ptr,
    nodes,
    slots,
    channels,
    TRANSPOSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some channels of one node of y (B * N, channels)."""
    node = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = gathered_sum(
        x_ptr,
        index_ptr,
        coefficient_ptr,
        coefficient_ptr,
        indptr_ptr,
        perm_ptr,
        node,
        nodes,
        slots,
        channels,
        c,
        TRANSPOSE,
        False,
        BLOCK_M,
        BLOCK_N,
    )
    tl.store(y_ptr + node.to(tl.int64) * channels + c, total, mask=c < channels)


@triton.jit
def gathered_gradients(
    grad_ptr,
    x_ptr,
    index_ptr,
    coefficient_ptr,
    scale_ptr,
    indptr_ptr,
    perm_ptr,
    grad_x_ptr,
    dot_ptr,
    added_ptr,
    node,
    nodes,
    slots,
    channels,
    TRANSPOSE: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_DOT: tl.constexpr,
    ADDED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_x (B * N, channels) of one node, and dot (B * N, slots) for its edges, along its columns or its slots.

    ``dot`` is the product of the node's row of ``x`` with the row of ``grad`` at the other end; ADDED (B * N, slots)
    is added to it. SCALED: a coefficient is multiplied by the scales (B * N,) of both ends. BLOCK_N holds a row.
    """
    sample = (node // nodes).to(tl.int64) * nodes
    node = node.to(tl.int64)
    c = tl.arange(0, BLOCK_N)
    channel = c < channels
    if NEED_DOT:
        own = tl.load(x_ptr + node * channels + c, mask=channel, other=0.0).to(tl.float32)
    if TRANSPOSE:
        first, last = node * slots, (node + 1) * slots
    else:
        first, last = tl.load(indptr_ptr + node).to(tl.int64), tl.load(indptr_ptr + node + 1).to(tl.int64)
    if SCALED:
        scale = tl.load(scale_ptr + node)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        used = place < last
        if TRANSPOSE:
            edge = place
            row = sample + within(tl.load(index_ptr + edge, mask=used, other=0), nodes)
        else:
            edge = tl.load(perm_ptr + place, mask=used, other=0)
            row = (edge // slots).to(tl.int64)
        both = used[:, None] & channel[None, :]
        grad = tl.load(grad_ptr + (row * channels)[:, None] + c[None, :], mask=both, other=0.0).to(tl.float32)
        if SCALED:
            far = tl.load(scale_ptr + row, mask=used, other=0.0)
        if NEED_X:
            share = tl.load(coefficient_ptr + edge, mask=used, other=0.0).to(tl.float32)
            if SCALED:
                share *= far
            total += share[:, None] * grad
        if NEED_DOT:
            dot = tl.sum(grad * own[None, :], axis=1)
            if SCALED:
                dot *= far * scale
            if ADDED:
                dot += tl.load(added_ptr + edge, mask=used, other=0.0).to(tl.float32)
            tl.store(dot_ptr + edge, dot, mask=used)
    if NEED_X:
        to_x = tl.sum(total, axis=0)
        if SCALED:
            to_x *= scale
        tl.store(grad_x_ptr + node * channels + c, to_x, mask=channel)


@triton.jit(do_not_specialize=["nodes", "slots"])
def _graph_propagate_bwd_kernel(
    grad_ptr,
    x_ptr,
    index_ptr,
    coefficient_ptr,
    indptr_ptr,
    perm_ptr,
    grad_x_ptr,
    dot_ptr,
    nodes,
    slots,
    channels,
    TRANSPOSE: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradients that are needed, along the columns of the graph or, with TRANSPOSE, along its slots."""
    gathered_gradients(
        grad_ptr,
        x_ptr,
        index_ptr,
        coefficient_ptr,
        coefficient_ptr,
        indptr_ptr,
        perm_ptr,
        grad_x_ptr,
        dot_ptr,
        dot_ptr,
        tl.program_id(0),
        nodes,
        slots,
        channels,
        TRANSPOSE,
        NEED_X,
        NEED_DOT,
        False,
        False,
        BLOCK_M,
        BLOCK_N,
    )


@triton.jit(do_not_specialize=["nodes", "slots"])
def _graph_propagate_bwd_kernel_dot(
    start_ptr,
    end_ptr,
    index_ptr,
    dot_ptr,
    nodes,
    slots,
    channels,
    BOTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dot (B * N, slots): for BLOCK_M edges of one node, its row of start times the neighbour's row of end.

    BOTH adds its row of end times the neighbour's row of start.
    """
    node = tl.program_id(0)
    sample = (node // nodes).to(tl.int64) * nodes
    node = node.to(tl.int64)
    k = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = k < slots
    edge = node * slots + k
    near = sample + within(tl.load(index_ptr + edge, mask=slot, other=0), nodes)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, channels, BLOCK_N):
        c = begin + tl.arange(0, BLOCK_N)
        channel = c < channels
        both = slot[:, None] & channel[None, :]
        own = tl.load(start_ptr + node * channels + c, mask=channel, other=0.0).to(tl.float32)
        other = tl.load(end_ptr + (near * channels)[:, None] + c[None, :], mask=both, other=0.0).to(tl.float32)
        total += own[None, :] * other
        if BOTH:
            own = tl.load(end_ptr + node * channels + c, mask=channel, other=0.0).to(tl.float32)
            other = tl.load(start_ptr + (near * channels)[:, None] + c[None, :], mask=both, other=0.0).to(tl.float32)
            total += own[None, :] * other
    tl.store(dot_ptr + edge, tl.sum(total, axis=1), mask=slot)


def graph_propagate(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    transpose: bool = False,
    csc: tuple[Tensor, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Aggregated features (B, N, C); sums in float32.

    Args:
        x: (B, N, C) float32, float16 or bfloat16. coefficient: (B, N, K), any of these.
        index: (B, N, K) int32 or int64, clamped into [0, N).
        transpose: follow the edges from neighbour to node.
        csc: columns of the graph; made here where they are needed and None.
        dtype: of the result, by default that of ``x``.
        tile: sizes of a program; by default those of the architecture's table, then a rule.
    """
    batch, nodes, slots = index.shape
    channels = x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    if y.numel() == 0 or slots == 0:
        return y.zero_()
    chosen = tile or sizes_of("graph_propagate", x.device, x.dtype, nodes, slots, channels)
    near = index.contiguous()
    with on_device_of(x):
        # never read without transpose
        indptr, perm = (csc or columns_of(index)) if transpose else (near, near)
        _graph_propagate_fwd_kernel[(batch * nodes, ceil_div(channels, chosen.block_n))](
            x.contiguous(),
            near,
            coefficient.contiguous(),
            indptr,
            perm,
            y,
            nodes,
            slots,
            channels,
            TRANSPOSE=transpose,
            **chosen.constants(),
            **chosen.options(),
        )
    return y


def edge_dot(
    start: Tensor,
    end: Tensor,
    index: Tensor,
    dtype: torch.dtype,
    both: bool = False,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """(B, N, K) dot products of each edge's two rows, ``start`` at the node and ``end`` at the neighbour.

    Args:
        start, end: (B, N, C). index: (B, N, K). dtype: of the result.
        both: add the product of ``end`` at the node and ``start`` at the neighbour.
        tile: sizes of a program; by default those of the architecture's table, then a rule.
    """
    batch, nodes, slots = index.shape
    channels = start.shape[-1]
    dot = torch.empty(index.shape, dtype=dtype, device=start.device)
    if dot.numel() == 0 or channels == 0:
        return dot.zero_()
    chosen = tile or sizes_of("graph_propagate_dot", start.device, start.dtype, nodes, slots, channels)
    with on_device_of(start):
        _graph_propagate_bwd_kernel_dot[(batch * nodes, ceil_div(slots, chosen.block_m))](
            start.contiguous(),
            end.contiguous(),
            index.contiguous(),
            dot,
            nodes,
            slots,
            channels,
            BOTH=both,
            **chosen.constants(),
            **chosen.options(limit_registers=True),
        )
    return dot


def empty_gradients(x: Tensor, coefficient: Tensor, needed: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Where gradients to ``x`` and ``coefficient`` go, contiguous; of no size where they are not needed."""
    shapes = (x.shape if needed[0] else (0,), coefficient.shape if needed[1] else (0,))
    return x.new_empty(shapes[0]), coefficient.new_empty(shapes[1])


def graph_propagate_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    transpose: bool,
    output_mask: Sequence[bool],
    csc: tuple[Tensor, Tensor] | None = None,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients to ``x`` and ``coefficient`` in their dtypes; empty where ``output_mask`` is False.

    To ``x``: the same propagation in the other direction. To ``coefficient``: the dot product of the gradient at the
    node that receives with the features of the node that sends, for the edges only.
    """
    nodes, slots = index.shape[1:]
    channels = x.shape[-1]
    wants_x, wants_coefficient = output_mask
    grad_x, grad_coefficient = empty_gradients(x, coefficient, output_mask)
    whole = tile or sizes_of("graph_gradients", x.device, x.dtype, nodes, slots, channels)
    if grad.numel() and channels <= whole.block_n:
        near = index.contiguous()
        # products of the rows at both ends are the same from either, and the slots are there
        along_slots = transpose or not wants_x
        own, gathered = (grad, x) if along_slots and not transpose else (x, grad)
        with on_device_of(x):
            indptr, perm = (near, near) if along_slots else csc or columns_of(index)
            _graph_propagate_bwd_kernel[(grad.numel() // channels,)](
                gathered.contiguous(),
                own.contiguous(),
                near,
                coefficient.contiguous(),
                indptr,
                perm,
                grad_x,
                grad_coefficient,
                nodes,
                slots,
                channels,
                TRANSPOSE=along_slots,
                NEED_X=wants_x,
                NEED_DOT=wants_coefficient,
                **whole.constants(),
                **whole.options(limit_registers=True),
            )
        return grad_x, grad_coefficient
    if wants_x:
        grad_x = graph_propagate(grad, index, coefficient, not transpose, csc, dtype=x.dtype, tile=tile)
    if wants_coefficient:
        start, end = (x, grad) if transpose else (grad, x)
        grad_coefficient = edge_dot(start, end, index, coefficient.dtype, tile=tile)
    return grad_x, grad_coefficient
