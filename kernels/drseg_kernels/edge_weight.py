# SPDX-License-Identifier: Apache-2.0
"""Edge weights ``softplus(vector . relu(source_i + target_j) + bias)`` and their gradients (arXiv 2604.02010, Eq. 8).

Nothing of the size of all edges times the hidden width is stored: the backward computes the mask of the ReLU again.
Every sum has one order, whatever the device does first. Forward: the hidden units of an edge in steps of BLOCK_N, then
a tree over the BLOCK_N. Gradient to ``source``: the slots of a row in steps of BLOCK_M, then a tree over the BLOCK_M;
to ``target`` the same over the edges that end in a node, by the graph's columns; to ``vector`` and ``bias`` sums of
chunks of rows, then of the chunks, both in ascending order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._blocks import softplus, softplus_slope, within
from drseg_kernels._launch import Tile, on_device_of, sizes_of
from drseg_kernels.csc import csc as columns_of
from drseg_kernels.degree_normalize import Ends, weight_gradient

# chunks of rows whose contributions to the gradients of vector and bias are summed apart: enough to fill a device
_MOST_CHUNKS = 1024
_SMALLEST_CHUNK = 8


@triton.jit
def weights_of(
    source_ptr,
    target_ptr,
    index_ptr,
    vector_ptr,
    bias_ptr,
    mask_ptr,
    node,
    k,
    nodes,
    slots,
    width,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(BLOCK_M,) weights of the edges in the slots ``k`` of one node."""
    first = (node // nodes).to(tl.int64) * nodes
    node = node.to(tl.int64)
    slot = k < slots
    edge = node * slots + k
    near = first + within(tl.load(index_ptr + edge, mask=slot, other=0), nodes)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_N):
        c = start + tl.arange(0, BLOCK_N)
        column = c < width
        both = slot[:, None] & column[None, :]
        own = tl.load(source_ptr + node * width + c, mask=column, other=0.0).to(tl.float32)
        other = tl.load(target_ptr + (near * width)[:, None] + c[None, :], mask=both, other=0.0).to(tl.float32)
        vector = tl.load(vector_ptr + c, mask=column, other=0.0).to(tl.float32)
        hidden = own[None, :] + other
        # written so that NaN passes
        total += tl.where(hidden < 0.0, 0.0, hidden) * vector[None, :]
    weight = softplus(tl.sum(total, axis=1) + tl.load(bias_ptr).to(tl.float32))
    if MASK != "none":
        # a product, not a choice: a row that is not finite must not look healthy because its slots are padding
        present = tl.load(mask_ptr + edge, mask=slot, other=0)
        if MASK == "scores":
            # of a slot that is none; that of a row that is not finite is NaN
            present = tl.where(present == -float("inf"), 0.0, 1.0)
        weight = weight * present.to(tl.float32)
    return weight


@triton.jit(do_not_specialize=["nodes", "slots"])
def _edge_weight_fwd_kernel(
    source_ptr,
    target_ptr,
    index_ptr,
    vector_ptr,
    bias_ptr,
    mask_ptr,
    weight_ptr,
    nodes,
    slots,
    width,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M edges of one node: source, target (B * N, width), index, mask, weight (B * N, slots)."""
    node = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    weight = weights_of(
        source_ptr,
        target_ptr,
        index_ptr,
        vector_ptr,
        bias_ptr,
        mask_ptr,
        node,
        k,
        nodes,
        slots,
        width,
        MASK,
        BLOCK_M,
        BLOCK_N,
    )
    tl.store(weight_ptr + node.to(tl.int64) * slots + k, weight, mask=k < slots)


@triton.jit(do_not_specialize=["rows", "nodes", "slots", "chunk"])
def _edge_weight_bwd_kernel_source(
    grad_ptr,
    weight_ptr,
    source_ptr,
    target_ptr,
    index_ptr,
    vector_ptr,
    slope_ptr,
    grad_source_ptr,
    part_ptr,
    start_ptr,
    end_ptr,
    row_ptr,
    column_ptr,
    rows,
    nodes,
    slots,
    width,
    chunk,
    NORM: tl.constexpr,
    NEED_SOURCE: tl.constexpr,
    NEED_PARAMETERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some hidden units of a chunk of rows: slope (rows, slots), the gradient of each logit; grad_source; and in part
    (chunks, width + 1) the chunk's contributions to the gradients of vector and, last, of bias.

    With a NORM ``grad`` is the gradient of the normalised weights, see ``degree_normalize.weight_gradient``.
    """
    begin = tl.program_id(0).to(tl.int64) * chunk
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = c < width
    vector = tl.load(vector_ptr + c, mask=column, other=0.0).to(tl.float32)
    to_vector = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    to_bias = tl.zeros((BLOCK_M,), tl.float32)
    for step in range(0, chunk):
        node = begin + step
        inside = node < rows
        first = (node.to(tl.int32) // nodes).to(tl.int64) * nodes
        own = tl.load(source_ptr + node * width + c, mask=column & inside, other=0.0).to(tl.float32)
        active = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, slots, BLOCK_M):
            k = start + tl.arange(0, BLOCK_M)
            slot = (k < slots) & inside
            edge = node * slots + k
            near = first + within(tl.load(index_ptr + edge, mask=slot, other=0), nodes)
            if NORM == "none":
                grad = tl.load(grad_ptr + edge, mask=slot, other=0.0).to(tl.float32)
            else:
                start_scale = tl.load(start_ptr + node, mask=inside, other=0.0)
                through_row = tl.load(row_ptr + node, mask=inside, other=0.0)
                grad = weight_gradient(grad_ptr, end_ptr, column_ptr, edge, slot, near, start_scale, through_row, NORM)
            # a masked slot has weight 0 and so slope 0
            slope = grad * softplus_slope(tl.load(weight_ptr + edge, mask=slot, other=0.0))
            if tl.program_id(1) == 0:
                tl.store(slope_ptr + edge, slope, mask=slot)
            to_bias += slope
            if NEED_SOURCE or NEED_PARAMETERS:
                both = slot[:, None] & column[None, :]
                other = tl.load(target_ptr + (near * width)[:, None] + c[None, :], mask=both, other=0.0)
                hidden = own[None, :] + other.to(tl.float32)
                # NaN is not off; a slot that is none has no hidden unit
                off = (hidden <= 0.0) | (slot[:, None] == 0)
                if NEED_SOURCE:
                    active += tl.where(off, 0.0, slope[:, None])
                if NEED_PARAMETERS:
                    to_vector += slope[:, None] * tl.where(off, 0.0, hidden)
        if NEED_SOURCE:
            tl.store(grad_source_ptr + node * width + c, tl.sum(active, axis=0) * vector, mask=column & inside)
    if NEED_PARAMETERS:
        part = part_ptr + tl.program_id(0).to(tl.int64) * (width + 1)
        tl.store(part + c, tl.sum(to_vector, axis=0), mask=column)
        if tl.program_id(1) == 0:
            tl.store(part + width, tl.sum(to_bias, axis=0))


@triton.jit(do_not_specialize=["slots"])
def _edge_weight_bwd_kernel_target(
    slope_ptr,
    source_ptr,
    target_ptr,
    indptr_ptr,
    perm_ptr,
    vector_ptr,
    grad_target_ptr,
    slots,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some hidden units of one node: grad_target (B * N, width) over the edges that end in it."""
    node = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = c < width
    own = tl.load(target_ptr + node * width + c, mask=column, other=0.0).to(tl.float32)
    end = tl.load(indptr_ptr + node + 1).to(tl.int64)
    active = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(tl.load(indptr_ptr + node).to(tl.int64), end, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        incoming = place < end
        edge = tl.load(perm_ptr + place, mask=incoming, other=0)
        slope = tl.load(slope_ptr + edge, mask=incoming, other=0.0)
        row = (edge // slots).to(tl.int64)
        both = incoming[:, None] & column[None, :]
        other = tl.load(source_ptr + (row * width)[:, None] + c[None, :], mask=both, other=0.0).to(tl.float32)
        active += tl.where(own[None, :] + other <= 0.0, 0.0, slope[:, None])
    vector = tl.load(vector_ptr + c, mask=column, other=0.0).to(tl.float32)
    tl.store(grad_target_ptr + node * width + c, tl.sum(active, axis=0) * vector, mask=column)


@triton.jit(do_not_specialize=["chunks"])
def _edge_weight_bwd_kernel_sum(
    part_ptr, grad_vector_ptr, grad_bias_ptr, chunks, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Some of grad_vector (width,) and, last, grad_bias: the sum of part (chunks, width + 1) over the chunks."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, chunks, BLOCK_M):
        r = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        both = (r < chunks)[:, None] & (c <= width)[None, :]
        total += tl.load(part_ptr + (r * (width + 1))[:, None] + c[None, :], mask=both, other=0.0)
    value = tl.sum(total, axis=0)
    tl.store(grad_vector_ptr + c, value, mask=c < width)
    tl.store(grad_bias_ptr + (c - width), value, mask=c == width)


def mask_of(mask: Tensor | None, index: Tensor) -> tuple[Tensor, str]:
    """What the kernels read of a mask, and which kind it is; without one something that is never read."""
    if mask is None:
        return index, "none"
    if mask.dtype == torch.bool:
        return mask.contiguous().view(torch.uint8), "flags"
    return mask.contiguous(), "scores"


def two_sums(tile: Tile) -> Tile:
    """Sizes of the kernel that keeps two sums per hidden unit: half of the rows, or they do not fit the registers."""
    return dataclasses.replace(tile, block_m=max(1, tile.block_m // 2))


def edge_weight(
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Weights (B, N, K) in float32.

    Args:
        source, target: (B, N, E) float32, float16 or bfloat16. vector: (E,). bias: one number.
        index: (B, N, K) int32 or int64, clamped into [0, N).
        mask: (B, N, K) bool, or scores; the weight is 0 where it is False, or ``-inf``.
        tile: sizes of a program; by default those of the architecture's table, then a rule.
    """
    batch, nodes, slots = index.shape
    width = source.shape[-1]
    weight = torch.empty(index.shape, dtype=torch.float32, device=source.device)
    if weight.numel() == 0:
        return weight
    present, kind = mask_of(mask, index)
    chosen = tile or sizes_of("edge_weight", source.device, source.dtype, nodes, slots, width)
    with on_device_of(source):
        _edge_weight_fwd_kernel[(batch * nodes, triton.cdiv(slots, chosen.block_m))](
            source.contiguous(),
            target.contiguous(),
            index.contiguous(),
            vector.contiguous(),
            bias,
            present,
            weight,
            nodes,
            slots,
            width,
            MASK=kind,
            **chosen.constants(),
            **chosen.options(),
        )
    return weight


def edge_weight_backward(
    grad: Tensor,
    weight: Tensor,
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    output_mask: Sequence[bool],
    csc: tuple[Tensor, Tensor] | None = None,
    *,
    ends: Ends | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to ``source``, ``target``, ``vector`` and ``bias`` in their dtypes.

    Args:
        grad, weight: (B, N, K); the other arguments as in ``edge_weight``.
        output_mask: which gradients to compute; the others are empty, ``vector`` and ``bias`` if neither is asked.
        csc: columns of the graph; made here where they are needed and None.
        ends: given where ``grad`` is that of the normalised weights.
    """
    batch, nodes, slots = index.shape
    width, rows = source.shape[-1], batch * nodes
    wants_source, wants_target, wants_parameters = output_mask[0], output_mask[1], any(output_mask[2:])
    needed = (wants_source, wants_target, wants_parameters, wants_parameters)
    grads = tuple(
        torch.empty(like.shape if need else (0,), dtype=like.dtype, device=like.device)
        for like, need in zip((source, target, vector, bias), needed, strict=True)
    )
    if index.numel() == 0:
        return tuple(value.zero_() for value in grads)  # type: ignore[return-value]
    grad_source, grad_target, grad_vector, grad_bias = grads
    chosen = tile or sizes_of("edge_weight", source.device, source.dtype, nodes, slots, width)
    source, target, vector = source.contiguous(), target.contiguous(), vector.contiguous()
    slope = torch.empty(index.shape, dtype=torch.float32, device=source.device)
    chunk = max(_SMALLEST_CHUNK, triton.cdiv(rows, _MOST_CHUNKS))
    chunks, blocks = triton.cdiv(rows, chunk), triton.cdiv(width, chosen.block_n)
    part = torch.empty(chunks if wants_parameters else 0, width + 1, dtype=torch.float32, device=source.device)
    common: dict[str, Any] = {**chosen.constants(), **chosen.options()}
    # never read without a norm
    scales = (slope,) * 4 if ends is None else (ends.start, ends.end, ends.row, ends.column)
    with on_device_of(source):
        # the slopes are needed where nothing else is asked of the first kernel
        _edge_weight_bwd_kernel_source[(chunks, max(1, blocks) if wants_source or wants_parameters else 1)](
            grad.contiguous(),
            weight.contiguous(),
            source,
            target,
            index.contiguous(),
            vector,
            slope,
            grad_source,
            part,
            *scales,
            rows,
            nodes,
            slots,
            width,
            chunk,
            NORM="none" if ends is None else ends.norm,
            NEED_SOURCE=wants_source,
            NEED_PARAMETERS=wants_parameters,
            **{**common, **two_sums(chosen).constants()},
        )
        if wants_target and blocks:
            indptr, perm = csc or columns_of(index)
            _edge_weight_bwd_kernel_target[(rows, blocks)](
                slope, source, target, indptr, perm, vector, grad_target, slots, width, **common
            )
        if wants_parameters:
            _edge_weight_bwd_kernel_sum[(triton.cdiv(width + 1, chosen.block_n),)](
                part, grad_vector, grad_bias, chunks, width, **common
            )
    return grad_source, grad_target, grad_vector, grad_bias
