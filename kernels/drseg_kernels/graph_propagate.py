# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of neighbour features ``y_i = sum_k coefficient_ik x_j``, their transpose and gradients
(arXiv 2604.02010, Eq. 9).

Two strategies, one meaning. *Gathered*: a program is one node and some channels, and loads the features of each edge;
the transpose follows reversed lists. *Densified*, for few nodes: a program is a block of nodes and some channels,
builds dense tiles of coefficients on the chip by comparing indices with node numbers, and multiplies them with the
features; the transpose compares the other way and needs no lists. A tile that meets a number that is not finite is
computed again edge by edge, because zero times infinity would carry it to nodes that it is no neighbour of.

Every sum has one order. Gathered: the edges in steps of ROWS, then a tree over the ROWS. Densified: the edges between
two nodes in ascending slots, then the nodes in steps of SOURCES. Gradient to a coefficient: the channels in steps of
COLUMNS, then a tree.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._blocks import within
from drseg_kernels._launch import on_device_of
from drseg_kernels._reverse import reverse_lists
from drseg_kernels._tile import FUSED, Tile, tile_of


@triton.jit(do_not_specialize=["nodes", "slots"])
def _graph_propagate_fwd_kernel_gathered(
    x_ptr,
    index_ptr,
    coefficient_ptr,
    begin_ptr,
    edge_ptr,
    y_ptr,
    nodes,
    slots,
    channels,
    TRANSPOSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some channels of one node of y (B * N, channels): over its slots, or over the edges that end in it."""
    node = tl.program_id(0)
    sample = (node // nodes).to(tl.int64) * nodes
    node = node.to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channel = c < channels
    if TRANSPOSE:
        first, last = tl.load(begin_ptr + node), tl.load(begin_ptr + node + 1)
    else:
        first, last = node * slots, (node + 1) * slots
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, ROWS):
        place = start + tl.arange(0, ROWS)
        used = place < last
        if TRANSPOSE:
            edge = tl.load(edge_ptr + place, mask=used, other=0)
            row = (edge // slots).to(tl.int64)
        else:
            edge = place
            row = sample + within(tl.load(index_ptr + edge, mask=used, other=0), nodes)
        share = tl.load(coefficient_ptr + edge, mask=used, other=0.0).to(tl.float32)
        both = used[:, None] & channel[None, :]
        x = tl.load(x_ptr + (row * channels)[:, None] + c[None, :], mask=both, other=0.0).to(tl.float32)
        total += share[:, None] * x
    tl.store(y_ptr + node * channels + c, tl.sum(total, axis=0), mask=channel)


@triton.jit
def _add_product(left, right, total, PARTS: tl.constexpr, INTERPRETED: tl.constexpr):
    """total + left @ right, exact to float32 rounding.

    PARTS: 0 multiplies in float32. Otherwise the features ``right`` are exact in that many bfloat16 numbers, the
    coefficients ``left`` in three (8 of 24 bits each), and the matrix units multiply the parts, the small ones first;
    the product of the smallest two is below the last bit.
    """
    if PARTS == 0:
        total = tl.dot(left, right, total, input_precision="ieee")
    else:
        high = left.to(tl.bfloat16)
        rest = left - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        main = right.to(tl.bfloat16)
        spare = (right - main.to(tl.float32)).to(tl.bfloat16)
        if INTERPRETED:
            # the interpreter multiplies bfloat16 as if it were integers
            high, middle, low = high.to(tl.float32), middle.to(tl.float32), low.to(tl.float32)
            main, spare = main.to(tl.float32), spare.to(tl.float32)
        total = tl.dot(low, main, total, input_precision="ieee")
        if PARTS == 2:
            total = tl.dot(middle, spare, total, input_precision="ieee")
        total = tl.dot(middle, main, total, input_precision="ieee")
        if PARTS == 2:
            total = tl.dot(high, spare, total, input_precision="ieee")
        total = tl.dot(high, main, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["nodes", "slots"])
def _graph_propagate_fwd_kernel_densified(
    x_ptr,
    index_ptr,
    coefficient_ptr,
    y_ptr,
    nodes,
    slots,
    channels,
    TRANSPOSE: tl.constexpr,
    PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOURCES: tl.constexpr,
):
    """Some channels of ROWS nodes of y (B * N, channels); SLOTS is a power of two, at least ``slots``."""
    blocks = tl.cdiv(nodes, ROWS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) - sample * blocks) * ROWS
    base = sample * nodes
    r = first + tl.arange(0, ROWS)
    row = r < nodes
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channel = c < channels
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, nodes, SOURCES):
        s = start + tl.arange(0, SOURCES).to(tl.int64)
        source = s < nodes
        tile = tl.zeros((ROWS, SOURCES), tl.float32)
        for k in range(0, slots):
            if TRANSPOSE:
                edge = (base + s) * slots + k
                near = within(tl.load(index_ptr + edge, mask=source, other=0), nodes)
                share = tl.load(coefficient_ptr + edge, mask=source, other=0.0).to(tl.float32)
                tile += tl.where(r[:, None] == near[None, :], share[None, :], 0.0)
            else:
                edge = (base + r) * slots + k
                near = within(tl.load(index_ptr + edge, mask=row, other=0), nodes)
                share = tl.load(coefficient_ptr + edge, mask=row, other=0.0).to(tl.float32)
                tile += tl.where(near[:, None] == s[None, :], share[:, None], 0.0)
        both = source[:, None] & channel[None, :]
        x = tl.load(x_ptr + ((base + s) * channels)[:, None] + c[None, :], mask=both, other=0.0).to(tl.float32)
        total = _add_product(tile, x, total, PARTS, INTERPRETED)

    # NaN differs from nothing less than infinity: a tile that is finite has met finite numbers only
    strange = (tl.abs(total) < float("inf")) == 0
    if tl.max(tl.max(strange.to(tl.int32), axis=1), axis=0) > 0:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        if TRANSPOSE:
            k = tl.arange(0, SLOTS)
            for s in range(0, nodes):
                node = base + s
                near = within(tl.load(index_ptr + node * slots + k, mask=k < slots, other=0), nodes)
                share = tl.load(coefficient_ptr + node * slots + k, mask=k < slots, other=0.0).to(tl.float32)
                hit = (r[:, None] == near[None, :]) & (k < slots)[None, :]
                weight = tl.sum(tl.where(hit, share[None, :], 0.0), axis=1)
                x = tl.load(x_ptr + node * channels + c, mask=channel, other=0.0).to(tl.float32)
                linked = tl.max(hit.to(tl.int32), axis=1) > 0
                total += tl.where(linked[:, None], weight[:, None] * x[None, :], 0.0)
        else:
            for k in range(0, slots):
                edge = (base + r) * slots + k
                near = base + within(tl.load(index_ptr + edge, mask=row, other=0), nodes)
                share = tl.load(coefficient_ptr + edge, mask=row, other=0.0).to(tl.float32)
                both = row[:, None] & channel[None, :]
                x = tl.load(x_ptr + (near * channels)[:, None] + c[None, :], mask=both, other=0.0).to(tl.float32)
                total += share[:, None] * x
    tl.store(y_ptr + ((base + r) * channels)[:, None] + c[None, :], total, mask=row[:, None] & channel[None, :])


@triton.jit(do_not_specialize=["nodes", "slots"])
def _graph_propagate_bwd_kernel_coefficient(
    start_ptr,
    end_ptr,
    index_ptr,
    dot_ptr,
    nodes,
    slots,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dot (B * N, slots): for ROWS edges of one node, its row of start times the neighbour's row of end."""
    node = tl.program_id(0)
    sample = (node // nodes).to(tl.int64) * nodes
    node = node.to(tl.int64)
    k = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    slot = k < slots
    edge = node * slots + k
    near = sample + within(tl.load(index_ptr + edge, mask=slot, other=0), nodes)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, channels, COLUMNS):
        c = begin + tl.arange(0, COLUMNS)
        channel = c < channels
        both = slot[:, None] & channel[None, :]
        own = tl.load(start_ptr + node * channels + c, mask=channel, other=0.0).to(tl.float32)
        other = tl.load(end_ptr + (near * channels)[:, None] + c[None, :], mask=both, other=0.0).to(tl.float32)
        total += own[None, :] * other
    tl.store(dot_ptr + edge, tl.sum(total, axis=1), mask=slot)


# features in as many bfloat16 numbers; 0: float32 products
_PARTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def dense_constants(dtype: torch.dtype, transpose: bool, slots: int, tile: Tile, interpreted: bool) -> dict[str, Any]:
    """Compile-time arguments of the densified kernel: what is compiled ahead of time and what is launched are one."""
    return {
        "TRANSPOSE": transpose,
        "PARTS": _PARTS[dtype],
        "INTERPRETED": interpreted,
        "SLOTS": triton.next_power_of_2(slots),
        **tile.constants(),
    }


def gathered(tile: Tile) -> Tile:
    """Sizes for what is gathered with either strategy."""
    return dataclasses.replace(tile, sources=0)


def graph_propagate(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    transpose: bool = False,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Aggregated features (B, N, C) in the dtype of ``x``; sums in float32.

    Args:
        x: (B, N, C) float32, float16 or bfloat16. coefficient: (B, N, K), any of these.
        index: (B, N, K) int32 or int64, clamped into [0, N).
        transpose: follow the edges from neighbour to node.
        tile: strategy and sizes; by default those of the device's table, then a rule.
    """
    batch, nodes, slots = index.shape
    channels = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0 or slots == 0:
        return y.zero_()
    chosen = tile or tile_of("graph_propagate", x.device, nodes, slots, channels)
    x, coefficient, near = x.contiguous(), coefficient.contiguous(), index.contiguous()
    blocks = triton.cdiv(channels, chosen.columns)
    with on_device_of(x):
        if chosen.sources:
            _graph_propagate_fwd_kernel_densified[(batch * triton.cdiv(nodes, chosen.rows), blocks)](
                x,
                near,
                coefficient,
                y,
                nodes,
                slots,
                channels,
                **dense_constants(x.dtype, transpose, slots, chosen, not x.is_cuda),
                **chosen.options(),
                **FUSED,
            )
            return y
        # never read without transpose
        begin, edge = near, near
        if transpose:
            reverse = reverse_lists(index)
            begin, edge = reverse.begin, reverse.edge
        _graph_propagate_fwd_kernel_gathered[(batch * nodes, blocks)](
            x,
            near,
            coefficient,
            begin,
            edge,
            y,
            nodes,
            slots,
            channels,
            TRANSPOSE=transpose,
            **chosen.constants(),
            **chosen.options(),
            **FUSED,
        )
    return y


def graph_propagate_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    transpose: bool,
    need_x: bool,
    need_coefficient: bool,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients to ``x`` and ``coefficient`` in their dtypes; one that is not needed is empty.

    To ``x``: the same propagation in the other direction. To ``coefficient``: the dot product of the gradient at the
    node that receives with the features of the node that sends, for the edges only.
    """
    batch, nodes, slots = index.shape
    channels = x.shape[-1]
    grad_x, grad_coefficient = x.new_empty(0), coefficient.new_empty(0)
    if need_x:
        grad_x = graph_propagate(grad, index, coefficient, not transpose, tile=tile).to(x.dtype)
    if need_coefficient:
        grad_coefficient = torch.empty(index.shape, dtype=coefficient.dtype, device=x.device)
        if index.numel() == 0 or channels == 0:
            return grad_x, grad_coefficient.zero_()
        chosen = gathered(tile or tile_of("graph_propagate", x.device, nodes, slots, channels))
        start, end = (x, grad) if transpose else (grad, x)
        with on_device_of(x):
            _graph_propagate_bwd_kernel_coefficient[(batch * nodes, triton.cdiv(slots, chosen.rows))](
                start.contiguous(),
                end.contiguous(),
                index.contiguous(),
                grad_coefficient,
                nodes,
                slots,
                channels,
                **chosen.constants(),
                **chosen.options(),
                **FUSED,
            )
    return grad_x, grad_coefficient
