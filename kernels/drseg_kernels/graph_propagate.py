# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of neighbour features ``y_i = sum_k coefficient_ik x_j``, their transpose and gradients
(arXiv 2604.02010, Eq. 9).

Three strategies, one meaning. *Gathered*: a program is one node and some channels, and loads the features of each
edge; the transpose follows reversed lists. *Densified*, for few nodes: a program is a block of nodes and some channels,
builds dense tiles of coefficients on the chip by comparing indices with node numbers, and multiplies them with the
features; the transpose compares the other way and needs no lists. *Union*, for many nodes: densified, but the block is
a patch of the grid, whose nodes share most of their neighbours, and its sources are those alone, each loaded once. A
tile that meets a number that is not finite is computed again edge by edge, because zero times infinity would carry it
to nodes that it is no neighbour of.

Every sum has one order. Gathered: the edges in steps of ROWS, then a tree over the ROWS. Densified and union: the edges
between two nodes in ascending slots, then the nodes in steps of SOURCES. Gradient to a coefficient: the channels in
steps of COLUMNS, then a tree; where sums are dense, by dense products of two groups of nodes, of which each edge takes
its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._blocks import within
from drseg_kernels._launch import on_device_of
from drseg_kernels._reverse import reverse_lists
from drseg_kernels._tile import FUSED, Tile, options, tile_of
from drseg_kernels._union import union_lists


@triton.jit
def gathered_sum(
    x_ptr,
    index_ptr,
    coefficient_ptr,
    begin_ptr,
    edge_ptr,
    node,
    nodes,
    slots,
    channels,
    c,
    TRANSPOSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(COLUMNS,) channels ``c`` of one node of y: over its slots, or over the edges that end in it."""
    sample = (node // nodes).to(tl.int64) * nodes
    node = node.to(tl.int64)
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
    return tl.sum(total, axis=0)


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
    """Some channels of one node of y (B * N, channels)."""
    node = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = gathered_sum(
        x_ptr,
        index_ptr,
        coefficient_ptr,
        begin_ptr,
        edge_ptr,
        node,
        nodes,
        slots,
        channels,
        c,
        TRANSPOSE,
        ROWS,
        COLUMNS,
    )
    tl.store(y_ptr + node.to(tl.int64) * channels + c, total, mask=c < channels)


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


@triton.jit
def group_of(member_ptr, program, nodes, groups, UNION: tl.constexpr, ROWS: tl.constexpr):
    """The sample that a program works on and, of that, its ROWS nodes: a run, or a patch with UNION.

    Where there is no node the number is -1, or ``nodes`` and more.
    """
    sample = (program // groups).to(tl.int64)
    r = (program - sample * groups) * ROWS + tl.arange(0, ROWS)
    if UNION:
        r = tl.load(member_ptr + r)
    return sample, r


@triton.jit
def dense_sum(
    x_ptr,
    index_ptr,
    coefficient_ptr,
    begin_ptr,
    count_ptr,
    union_ptr,
    program,
    base,
    r,
    c,
    nodes,
    slots,
    channels,
    TRANSPOSE: tl.constexpr,
    UNION: tl.constexpr,
    PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOURCES: tl.constexpr,
):
    """(ROWS, COLUMNS) channels ``c`` of nodes ``r`` of y in the sample that begins at node ``base``.

    The sum is over all nodes of the sample, or with UNION over those in the list of ``program``. SLOTS is a power of
    two, at least ``slots``.
    """
    row = (r >= 0) & (r < nodes)
    channel = c < channels
    if UNION:
        first = tl.load(begin_ptr + program)
        last = first + tl.load(count_ptr + program)
    else:
        first, last = 0, nodes
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, SOURCES):
        s = start + tl.arange(0, SOURCES)
        source = s < last
        if UNION:
            # no node has the number of one that is not there
            s = tl.load(union_ptr + s, mask=source, other=-1)
        tile = tl.zeros((ROWS, SOURCES), tl.float32)
        for k in range(0, slots):
            if TRANSPOSE:
                edge = (base + s) * slots + k
                near = within(tl.load(index_ptr + edge, mask=source, other=0), nodes).to(tl.int32)
                share = tl.load(coefficient_ptr + edge, mask=source, other=0.0).to(tl.float32)
                tile += tl.where(r[:, None] == near[None, :], share[None, :], 0.0)
            else:
                edge = (base + r) * slots + k
                near = within(tl.load(index_ptr + edge, mask=row, other=0), nodes).to(tl.int32)
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
            for s in range(first, last):
                node = base + s
                if UNION:
                    node = base + tl.load(union_ptr + s)
                near = within(tl.load(index_ptr + node * slots + k, mask=k < slots, other=0), nodes).to(tl.int32)
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
    return total


@triton.jit(do_not_specialize=["nodes", "slots", "groups"])
def _graph_propagate_fwd_kernel_densified(
    x_ptr,
    index_ptr,
    coefficient_ptr,
    member_ptr,
    begin_ptr,
    count_ptr,
    union_ptr,
    y_ptr,
    nodes,
    slots,
    channels,
    groups,
    TRANSPOSE: tl.constexpr,
    UNION: tl.constexpr,
    PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOURCES: tl.constexpr,
):
    """Some channels of ROWS nodes of y (B * N, channels), in ``groups`` of a sample."""
    program = tl.program_id(0)
    sample, r = group_of(member_ptr, program, nodes, groups, UNION, ROWS)
    base = sample * nodes
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = dense_sum(
        x_ptr,
        index_ptr,
        coefficient_ptr,
        begin_ptr,
        count_ptr,
        union_ptr,
        program,
        base,
        r,
        c,
        nodes,
        slots,
        channels,
        TRANSPOSE,
        UNION,
        PARTS,
        INTERPRETED,
        SLOTS,
        ROWS,
        COLUMNS,
        SOURCES,
    )
    both = ((r >= 0) & (r < nodes))[:, None] & (c < channels)[None, :]
    tl.store(y_ptr + ((base + r) * channels)[:, None] + c[None, :], total, mask=both)


@triton.jit(do_not_specialize=["nodes", "slots"])
def _graph_propagate_bwd_kernel_coefficient(
    start_ptr,
    end_ptr,
    index_ptr,
    dot_ptr,
    nodes,
    slots,
    channels,
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dot (B * N, slots): for ROWS edges of one node, its row of start times the neighbour's row of end.

    BOTH adds its row of end times the neighbour's row of start.
    """
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
        if BOTH:
            own = tl.load(end_ptr + node * channels + c, mask=channel, other=0.0).to(tl.float32)
            other = tl.load(start_ptr + (near * channels)[:, None] + c[None, :], mask=both, other=0.0).to(tl.float32)
            total += own[None, :] * other
    tl.store(dot_ptr + edge, tl.sum(total, axis=1), mask=slot)


@triton.jit
def _add_dots(left_ptr, right_ptr, i, j, node, near, c, channels, total, HALF: tl.constexpr):
    """total + the rows ``i`` of left, where ``node``, times the rows ``j`` of right, where ``near``: channels ``c``."""
    channel = c < channels
    left = tl.load(left_ptr + (i * channels)[:, None] + c[None, :], mask=node[:, None] & channel[None, :], other=0.0)
    right = tl.load(right_ptr + (j * channels)[None, :] + c[:, None], mask=near[None, :] & channel[:, None], other=0.0)
    if HALF:
        # products of half precision are exact in float32, in which the matrix units add them up
        return tl.dot(left, right, total)
    return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")


@triton.jit(do_not_specialize=["nodes", "slots", "groups"])
def _graph_propagate_bwd_kernel_sampled(
    start_ptr,
    end_ptr,
    index_ptr,
    member_ptr,
    begin_ptr,
    count_ptr,
    union_ptr,
    place_ptr,
    dot_ptr,
    nodes,
    slots,
    channels,
    groups,
    BOTH: tl.constexpr,
    HALF: tl.constexpr,
    UNION: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOURCES: tl.constexpr,
):
    """As ``_graph_propagate_bwd_kernel_coefficient``, for the edges from ROWS nodes to some others: all products of
    SOURCES of these with the nodes at a time, of which each edge takes its own, SLOTS edges of a node at a time."""
    program = tl.program_id(0)
    sample, r = group_of(member_ptr, program, nodes, groups, UNION, ROWS)
    base = sample * nodes
    row = (r >= 0) & (r < nodes)
    i = base + r
    if UNION:
        first = tl.load(begin_ptr + program)
        last = first + tl.load(count_ptr + program)
    else:
        first, last = 0, nodes
    # places are counted from the first
    for offset in range(tl.program_id(1) * SOURCES, last - first, tl.num_programs(1) * SOURCES):
        s = first + offset + tl.arange(0, SOURCES)
        source = s < last
        if UNION:
            s = tl.load(union_ptr + s, mask=source, other=0)
        j = base + s
        total = tl.zeros((ROWS, SOURCES), tl.float32)
        for begin in range(0, channels, COLUMNS):
            c = begin + tl.arange(0, COLUMNS)
            total = _add_dots(start_ptr, end_ptr, i, j, row, source, c, channels, total, HALF)
            if BOTH:
                total = _add_dots(end_ptr, start_ptr, i, j, row, source, c, channels, total, HALF)
        for begin in range(0, slots, SLOTS):
            k = begin + tl.arange(0, SLOTS)
            slot = row[:, None] & (k < slots)[None, :]
            edge = (i * slots)[:, None] + k[None, :]
            if UNION:
                place = tl.load(place_ptr + edge, mask=slot, other=0)
            else:
                place = within(tl.load(index_ptr + edge, mask=slot, other=0), nodes)
            place = (place - offset).to(tl.int32)
            here = slot & (place >= 0) & (place < SOURCES)
            tl.store(dot_ptr + edge, tl.gather(total, tl.where(here, place, 0), axis=1), mask=here)


# programs among which the sources of a patch are dealt out
_MOST_SHARES = 8

# features in as many bfloat16 numbers; 0: float32 products
_PARTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def dense_constants(dtype: torch.dtype, transpose: bool, slots: int, tile: Tile, interpreted: bool) -> dict[str, Any]:
    """Compile-time arguments of the densified kernel: what is compiled ahead of time and what is launched are one."""
    return {
        "TRANSPOSE": transpose,
        "UNION": tile.patch > 0,
        "PARTS": _PARTS[dtype],
        "INTERPRETED": interpreted,
        "SLOTS": triton.next_power_of_2(slots),
        **tile.constants(),
    }


def dense_options(transpose: bool, tile: Tile) -> dict[str, Any]:
    """What the compiler is told of the densified kernel; along the edges it finds the registers by itself."""
    return options(tile) if transpose else {**tile.options(), **FUSED}


def sampled_constants(half: bool, slots: int, both: bool, tile: Tile) -> dict[str, Any]:
    """Compile-time arguments of the kernel of dense dot products."""
    # few enough for the registers, whatever the number of slots
    few = min(64, triton.next_power_of_2(slots))
    return {"BOTH": both, "HALF": half, "UNION": tile.patch > 0, "SLOTS": few, **tile.constants()}


@dataclass(frozen=True)
class Groups:
    """Which nodes a dense program computes, and which it sums over.

    Args:
        count: programs of a sample. lists: member, begin, count, node and place of the patches; never read without.
    """

    count: int
    lists: tuple[Tensor, ...]


def groups_of(index: Tensor, tile: Tile, incoming: bool) -> Groups:
    """Groups of a graph's nodes: runs that take all nodes as sources, or patches that take the union of their own."""
    if not tile.patch:
        return Groups(triton.cdiv(index.shape[1], tile.rows), (index,) * 5)
    union = union_lists(index, tile.patch, tile.rows, incoming)
    return Groups(union.member.shape[0], (union.member, union.begin, union.count, union.node, union.place))


def graph_propagate(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    transpose: bool = False,
    *,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Aggregated features (B, N, C); sums in float32.

    Args:
        x: (B, N, C) float32, float16 or bfloat16. coefficient: (B, N, K), any of these.
        index: (B, N, K) int32 or int64, clamped into [0, N).
        transpose: follow the edges from neighbour to node.
        dtype: of the result, by default that of ``x``.
        tile: strategy and sizes; by default those of the device's table, then a rule.
    """
    batch, nodes, slots = index.shape
    channels = x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    if y.numel() == 0 or slots == 0:
        return y.zero_()
    chosen = tile or tile_of("graph_propagate", x.device, nodes, slots, channels)
    x, coefficient, near = x.contiguous(), coefficient.contiguous(), index.contiguous()
    blocks = triton.cdiv(channels, chosen.columns)
    with on_device_of(x):
        if chosen.sources:
            groups = groups_of(index, chosen, transpose)
            _graph_propagate_fwd_kernel_densified[(batch * groups.count, blocks)](
                x,
                near,
                coefficient,
                *groups.lists[:4],
                y,
                nodes,
                slots,
                channels,
                groups.count,
                **dense_constants(x.dtype, transpose, slots, chosen, not x.is_cuda),
                **dense_options(transpose, chosen),
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
        tile: strategy and sizes; by default those of the device's table, then a rule.
    """
    batch, nodes, slots = index.shape
    channels = start.shape[-1]
    dot = torch.empty(index.shape, dtype=dtype, device=start.device)
    if dot.numel() == 0 or channels == 0:
        return dot.zero_()
    chosen = tile or tile_of("graph_propagate_dot", start.device, nodes, slots, channels)
    start, end, near = start.contiguous(), end.contiguous(), index.contiguous()
    with on_device_of(start):
        if chosen.sources:
            # the interpreter multiplies bfloat16 as if it were integers
            exact = (torch.float16, torch.bfloat16) if start.is_cuda else (torch.float16,)
            half = start.dtype == end.dtype and start.dtype in exact
            groups = groups_of(index, chosen, False)
            # a patch has a few hundred sources, which few programs share, or up to so many
            most = min(_MOST_SHARES * chosen.sources, chosen.rows * slots) if chosen.patch else nodes
            grid = (batch * groups.count, triton.cdiv(most, chosen.sources))
            _graph_propagate_bwd_kernel_sampled[grid](
                start,
                end,
                near,
                *groups.lists,
                dot,
                nodes,
                slots,
                channels,
                groups.count,
                **sampled_constants(half, slots, both, chosen),
                **chosen.options(),
                **FUSED,
            )
        else:
            _graph_propagate_bwd_kernel_coefficient[(batch * nodes, triton.cdiv(slots, chosen.rows))](
                start, end, near, dot, nodes, slots, channels, BOTH=both, **chosen.constants(), **options(chosen)
            )
    return dot


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
    grad_x, grad_coefficient = x.new_empty(0), coefficient.new_empty(0)
    if need_x:
        grad_x = graph_propagate(grad, index, coefficient, not transpose, dtype=x.dtype, tile=tile)
    if need_coefficient:
        start, end = (x, grad) if transpose else (grad, x)
        grad_coefficient = edge_dot(start, end, index, coefficient.dtype, tile=tile)
    return grad_x, grad_coefficient
