# SPDX-License-Identifier: Apache-2.0
"""Edge weights ``softplus(vector . relu(source_i + target_j) + bias)`` and their gradients (arXiv 2604.02010, Eq. 8).

``source`` and ``target`` may come as they leave a product: one behind the other in a row, not yet normalised, without
the bias of the first layer. ``hidden_ij`` is then ``r_i source_i + source_bias + r_j target_j``.

With exponents a weight is multiplied by ``exp(exponent)``. Without them their pointers are None, which the compiler
leaves out.

Nothing of the size of all edges times the hidden width is stored: the backward computes the mask of the ReLU again.
Every sum has one order, whatever the device does first:

* Forward: the hidden units of an edge in steps of BLOCK_N, then a tree over the BLOCK_N.
* Gradient to ``source``: the slots of a row in steps of BLOCK_M, then a tree over the BLOCK_M.
* Gradient to ``target``: the same over the edges that end in a node, by the graph's columns.
* Gradient to ``vector``, ``bias`` and ``source_bias``: sums of chunks of rows, then of the chunks, both ascending.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._blocks import exp_of, scaled_slope, softplus, softplus_slope, within
from drseg_kernels._launch import Tile, ceil_div, on_device_of, sizes_of
from drseg_kernels.csc import csc as columns_of

# chunks of rows whose contributions to the gradients of vector and bias are summed apart: enough to fill a device
_MOST_CHUNKS = 1024
_SMALLEST_CHUNK = 8


# source, or both halves in one; target, or None; inverse_norm and source_bias, or None
Halves = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def weights_of(
    source_ptr,
    target_ptr,
    inverse_ptr,
    shift_ptr,
    index_ptr,
    vector_ptr,
    bias_ptr,
    mask_ptr,
    exponent_ptr,
    node,
    k,
    nodes,
    slots,
    width,
    stride,
    NORMED: tl.constexpr,
    SHIFT: tl.constexpr,
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
    if NORMED:
        own_norm = tl.load(inverse_ptr + node)
        norm = tl.load(inverse_ptr + near, mask=slot, other=0.0)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_N):
        c = start + tl.arange(0, BLOCK_N)
        column = c < width
        both = slot[:, None] & column[None, :]
        own = tl.load(source_ptr + node * stride + c, mask=column, other=0.0).to(tl.float32)
        other = tl.load(target_ptr + (near * stride)[:, None] + c[None, :], mask=both, other=0.0).to(tl.float32)
        vector = tl.load(vector_ptr + c, mask=column, other=0.0).to(tl.float32)
        if NORMED:
            own = own * own_norm
            other = other * norm[:, None]
        if SHIFT:
            own = own + tl.load(shift_ptr + c, mask=column, other=0.0).to(tl.float32)
        hidden = own[None, :] + other
        total += tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL) * vector[None, :]
    weight = softplus(tl.sum(total, axis=1) + tl.load(bias_ptr).to(tl.float32))
    if exponent_ptr is not None:
        factor = exp_of(tl.load(exponent_ptr + edge, mask=slot, other=0.0))
    if MASK != "none":
        # a product, not a choice: a row that is not finite must not look healthy because its slots are padding
        present = tl.load(mask_ptr + edge, mask=slot, other=0)
        if MASK == "scores":
            # of a slot that is none; that of a row that is not finite is NaN
            present = tl.where(present == -float("inf"), 0.0, 1.0)
        present = present.to(tl.float32)
        if exponent_ptr is not None:
            # what padding has does not matter
            present = tl.where(present == 0.0, 0.0, factor)
        weight = weight * present
    elif exponent_ptr is not None:
        weight = weight * factor
    return weight


@triton.jit(do_not_specialize=["nodes", "slots"])
def _edge_weight_fwd_kernel(
    source_ptr,
    target_ptr,
    inverse_ptr,
    shift_ptr,
    index_ptr,
    vector_ptr,
    bias_ptr,
    mask_ptr,
    exponent_ptr,
    weight_ptr,
    nodes,
    slots,
    width,
    stride,
    NORMED: tl.constexpr,
    SHIFT: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M edges of one node: rows of source and target (B * N, width) ``stride`` apart; index, mask, exponent and
    weight (B * N, slots); NORMED multiplies both rows by ``inverse`` (B * N,), SHIFT adds ``shift`` (width,) to source.
    """
    node = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    weight = weights_of(
        source_ptr,
        target_ptr,
        inverse_ptr,
        shift_ptr,
        index_ptr,
        vector_ptr,
        bias_ptr,
        mask_ptr,
        exponent_ptr,
        node,
        k,
        nodes,
        slots,
        width,
        stride,
        NORMED,
        SHIFT,
        MASK,
        BLOCK_M,
        BLOCK_N,
    )
    tl.store(weight_ptr + node.to(tl.int64) * slots + k, weight, mask=k < slots)


@triton.jit(do_not_specialize=["rows", "nodes", "slots", "chunk"])
def _edge_weight_bwd_kernel_source(
    grad_ptr,
    weight_ptr,
    exponent_ptr,
    source_ptr,
    target_ptr,
    inverse_ptr,
    shift_ptr,
    index_ptr,
    vector_ptr,
    slope_ptr,
    grad_exponent_ptr,
    grad_source_ptr,
    part_ptr,
    rows,
    nodes,
    slots,
    width,
    stride,
    chunk,
    NORMED: tl.constexpr,
    SHIFT: tl.constexpr,
    SLOPES: tl.constexpr,
    NEED_SOURCE: tl.constexpr,
    NEED_PARAMETERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some hidden units of a chunk of rows: grad_source, and in part (chunks, width + 1, or with SHIFT 2 width + 1) the
    chunk's contributions to the gradients of vector, of source_bias and, last, of bias.

    SLOPES: the gradients of the logits, slope (rows, slots), are known; otherwise they are written here, and those of
    the exponents where these are.
    """
    begin = tl.program_id(0).to(tl.int64) * chunk
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = c < width
    vector = tl.load(vector_ptr + c, mask=column, other=0.0).to(tl.float32)
    if SHIFT:
        shift = tl.load(shift_ptr + c, mask=column, other=0.0).to(tl.float32)
    to_vector = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    to_shift = tl.zeros((BLOCK_N,), tl.float32)
    to_bias = tl.zeros((BLOCK_M,), tl.float32)
    for step in range(0, chunk):
        node = begin + step
        inside = node < rows
        first = (node.to(tl.int32) // nodes).to(tl.int64) * nodes
        own = tl.load(source_ptr + node * stride + c, mask=column & inside, other=0.0).to(tl.float32)
        if NORMED:
            own_norm = tl.load(inverse_ptr + node, mask=inside, other=0.0)
            own = own * own_norm
        if SHIFT:
            own = own + shift
        active = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, slots, BLOCK_M):
            k = start + tl.arange(0, BLOCK_M)
            slot = (k < slots) & inside
            edge = node * slots + k
            if SLOPES:
                slope = tl.load(slope_ptr + edge, mask=slot, other=0.0)
            else:
                # a masked slot has weight 0 and so slope 0
                slope = tl.load(grad_ptr + edge, mask=slot, other=0.0).to(tl.float32)
                weight = tl.load(weight_ptr + edge, mask=slot, other=0.0)
                if exponent_ptr is None:
                    slope = slope * softplus_slope(weight)
                else:
                    if tl.program_id(1) == 0:
                        tl.store(grad_exponent_ptr + edge, slope * weight, mask=slot)
                    slope = slope * scaled_slope(weight, tl.load(exponent_ptr + edge, mask=slot, other=0.0))
                if tl.program_id(1) == 0:
                    tl.store(slope_ptr + edge, slope, mask=slot)
            to_bias += slope
            if NEED_SOURCE or NEED_PARAMETERS:
                near = first + within(tl.load(index_ptr + edge, mask=slot, other=0), nodes)
                both = slot[:, None] & column[None, :]
                other = tl.load(target_ptr + (near * stride)[:, None] + c[None, :], mask=both, other=0.0)
                other = other.to(tl.float32)
                if NORMED:
                    other = other * tl.load(inverse_ptr + near, mask=slot, other=0.0)[:, None]
                hidden = own[None, :] + other
                if NEED_SOURCE:
                    # NaN is not off; the slope of a slot that is none is 0
                    active += tl.where(hidden <= 0.0, 0.0, slope[:, None])
                if NEED_PARAMETERS:
                    # a slot that is none has no hidden unit, which could be infinite
                    unit = tl.where(slot[:, None], tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL), 0.0)
                    to_vector += slope[:, None] * unit
        if NEED_SOURCE:
            to_source = tl.sum(active, axis=0) * vector
            if SHIFT:
                to_shift += to_source
            if NORMED:
                to_source = to_source * own_norm
            tl.store(grad_source_ptr + node * stride + c, to_source, mask=column & inside)
    if NEED_PARAMETERS:
        columns = width + 1
        if SHIFT:
            columns += width
        part = part_ptr + tl.program_id(0).to(tl.int64) * columns
        tl.store(part + c, tl.sum(to_vector, axis=0), mask=column)
        if SHIFT:
            tl.store(part + width + c, to_shift, mask=column)
        if tl.program_id(1) == 0:
            tl.store(part + columns - 1, tl.sum(to_bias, axis=0))


@triton.jit
def sum_of_chunks(
    part_ptr,
    grad_vector_ptr,
    grad_shift_ptr,
    grad_bias_ptr,
    program,
    chunks,
    width,
    SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some of grad_vector (width,), with SHIFT grad_shift (width,), and grad_bias: part over the chunks."""
    columns = width + 1
    if SHIFT:
        columns += width
    c = program * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, chunks, BLOCK_M):
        r = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        both = (r < chunks)[:, None] & (c < columns)[None, :]
        total += tl.load(part_ptr + (r * columns)[:, None] + c[None, :], mask=both, other=0.0)
    value = tl.sum(total, axis=0)
    tl.store(grad_vector_ptr + c, value, mask=c < width)
    if SHIFT:
        tl.store(grad_shift_ptr + (c - width), value, mask=(c >= width) & (c < 2 * width))
    tl.store(grad_bias_ptr + (c - (columns - 1)), value, mask=c == columns - 1)


@triton.jit
def to_target(
    slope_ptr,
    source_ptr,
    target_ptr,
    inverse_ptr,
    shift_ptr,
    indptr_ptr,
    perm_ptr,
    vector_ptr,
    grad_target_ptr,
    node,
    block,
    slots,
    width,
    stride,
    NORMED: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some hidden units of one node: grad_target over the edges that end in it."""
    node = node.to(tl.int64)
    c = block * BLOCK_N + tl.arange(0, BLOCK_N)
    column = c < width
    own = tl.load(target_ptr + node * stride + c, mask=column, other=0.0).to(tl.float32)
    if NORMED:
        own_norm = tl.load(inverse_ptr + node)
        own = own * own_norm
    if SHIFT:
        own = own + tl.load(shift_ptr + c, mask=column, other=0.0).to(tl.float32)
    end = tl.load(indptr_ptr + node + 1).to(tl.int64)
    active = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(tl.load(indptr_ptr + node).to(tl.int64), end, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        incoming = place < end
        edge = tl.load(perm_ptr + place, mask=incoming, other=0)
        slope = tl.load(slope_ptr + edge, mask=incoming, other=0.0)
        row = (edge // slots).to(tl.int64)
        both = incoming[:, None] & column[None, :]
        other = tl.load(source_ptr + (row * stride)[:, None] + c[None, :], mask=both, other=0.0).to(tl.float32)
        if NORMED:
            other = other * tl.load(inverse_ptr + row, mask=incoming, other=0.0)[:, None]
        active += tl.where(own[None, :] + other <= 0.0, 0.0, slope[:, None])
    vector = tl.load(vector_ptr + c, mask=column, other=0.0).to(tl.float32)
    value = tl.sum(active, axis=0) * vector
    if NORMED:
        value = value * own_norm
    tl.store(grad_target_ptr + node * stride + c, value, mask=column)


@triton.jit(do_not_specialize=["slots", "sums", "chunks"])
def _edge_weight_bwd_kernel_target(
    slope_ptr,
    source_ptr,
    target_ptr,
    inverse_ptr,
    shift_ptr,
    indptr_ptr,
    perm_ptr,
    vector_ptr,
    grad_target_ptr,
    part_ptr,
    grad_vector_ptr,
    grad_shift_ptr,
    grad_bias_ptr,
    slots,
    width,
    stride,
    sums,
    chunks,
    NORMED: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The first ``sums`` programs: ``sum_of_chunks``. Every other: ``to_target``. One launch for all that waits for
    the kernel before."""
    program, block = tl.program_id(0), tl.program_id(1)
    if program < sums:
        sum_of_chunks(
            part_ptr,
            grad_vector_ptr,
            grad_shift_ptr,
            grad_bias_ptr,
            program.to(tl.int64) * tl.num_programs(1) + block,
            chunks,
            width,
            SHIFT,
            BLOCK_M,
            BLOCK_N,
        )
    else:
        to_target(
            slope_ptr,
            source_ptr,
            target_ptr,
            inverse_ptr,
            shift_ptr,
            indptr_ptr,
            perm_ptr,
            vector_ptr,
            grad_target_ptr,
            program - sums,
            block,
            slots,
            width,
            stride,
            NORMED,
            SHIFT,
            BLOCK_M,
            BLOCK_N,
        )


def mask_of(mask: Tensor | None, index: Tensor) -> tuple[Tensor, str]:
    """What the kernels read of a mask, and which kind it is; without one something that is never read."""
    if mask is None:
        return index, "none"
    if mask.dtype == torch.bool:
        return mask.contiguous().view(torch.uint8), "flags"
    return mask.contiguous(), "scores"


def laid_out(halves: Halves) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], dict[str, bool], int, int]:
    """Halves as the kernels take them (what is never read is anything), their flags, and the width and stride."""
    source, target, inverse, shift = halves
    source = source.contiguous()
    stride = source.shape[-1]
    width = stride // 2 if target is None else stride
    target = source[..., width:] if target is None else target.contiguous()
    flags = {"NORMED": inverse is not None, "SHIFT": shift is not None}
    inverse, shift = (source if value is None else value.contiguous() for value in (inverse, shift))
    return (source, target, inverse, shift), flags, width, stride


def two_sums(tile: Tile) -> Tile:
    """Sizes of the kernel that keeps two sums per hidden unit: half of the rows, or they do not fit the registers."""
    return dataclasses.replace(tile, block_m=max(1, tile.block_m // 2))


def edge_weight(
    halves: Halves,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    exponent: Tensor | None = None,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Weights (B, N, K) in float32.

    Args:
        halves: source and target (B, N, E) float32, float16 or bfloat16, or both in one (B, N, 2E) and None;
            inverse_norm (B, N), source_bias (E,), or None.
        vector: (E,). bias: one number.
        index: (B, N, K) int32 or int64, clamped into [0, N).
        mask: (B, N, K) bool, or scores; the weight is 0 where it is False, or ``-inf``.
        exponent: (B, N, K) float32, or None; multiplies the weight by its exponential.
        tile: sizes of a program; by default those of the architecture's table, then a rule.
    """
    batch, nodes, slots = index.shape
    weight = torch.empty(index.shape, dtype=torch.float32, device=index.device)
    if weight.numel() == 0:
        return weight
    rows, flags, width, stride = laid_out(halves)
    present, kind = mask_of(mask, index)
    chosen = tile or sizes_of("edge_weight", index.device, rows[0].dtype, nodes, slots, width)
    with on_device_of(index):
        _edge_weight_fwd_kernel[(batch * nodes, ceil_div(slots, chosen.block_m))](
            *rows,
            index.contiguous(),
            vector.contiguous(),
            bias,
            present,
            None if exponent is None else exponent.contiguous(),
            weight,
            nodes,
            slots,
            width,
            stride,
            MASK=kind,
            **flags,
            **chosen.constants(),
            **chosen.options(),
        )
    return weight


def edge_weight_backward(
    grad: Tensor,
    weight: Tensor,
    halves: Halves,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    output_mask: Sequence[bool],
    csc: tuple[Tensor, Tensor] | None = None,
    exponent: Tensor | None = None,
    *,
    slope: Tensor | None = None,
    to_exponent: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, ...]:
    """Gradients to ``source``, ``target``, ``vector``, ``bias``, ``source_bias`` and, where there is one, ``exponent``,
    in their dtypes.

    Args:
        grad, weight: (B, N, K); the other arguments as in ``edge_weight``.
        output_mask: which gradients to compute; the others are empty, the last three if none of them is asked. Halves
            in one have one gradient, which the first entry asks for.
        csc: columns of the graph; made here where they are needed and None.
        exponent: as in the forward.
        slope: (B, N, K) float32 gradients of the logits, where they are known; ``grad`` and ``weight`` are not read.
        to_exponent: the gradient to ``exponent``, where ``slope`` is known.
    """
    batch, nodes, slots = index.shape
    rows, flags, width, stride = laid_out(halves)
    count = batch * nodes
    stacked = halves[1] is None
    wants_source, wants_target = output_mask[0], output_mask[0] if stacked else output_mask[1]
    wants_parameters = any(output_mask[2:5])
    # the sums of source's gradients are those of source_bias
    wants_rows = wants_source or (wants_parameters and flags["SHIFT"])
    needed = (wants_rows, wants_target and not stacked, *(wants_parameters,) * 2, wants_parameters and flags["SHIFT"])
    like = (rows[0], rows[1], vector, bias, rows[3])
    grads = tuple(
        torch.empty(value.shape if need else (0,), dtype=value.dtype, device=value.device)
        for value, need in zip(like, needed, strict=True)
    )
    known = slope is not None
    if exponent is not None and not known:
        to_exponent = torch.empty(index.shape, dtype=torch.float32, device=index.device)
    last = () if to_exponent is None else (to_exponent,)
    if index.numel() == 0:
        return tuple(value.zero_() for value in (*grads, *last))
    grad_source, grad_target, grad_vector, grad_bias, grad_shift = grads
    chosen = tile or sizes_of("edge_weight", index.device, rows[0].dtype, nodes, slots, width)
    near, vector = index.contiguous(), vector.contiguous()
    chunk = max(_SMALLEST_CHUNK, ceil_div(count, _MOST_CHUNKS))
    chunks, blocks = ceil_div(count, chunk), max(1, ceil_div(width, chosen.block_n))
    columns = (2 * width if flags["SHIFT"] else width) + 1
    part = torch.empty(chunks if wants_parameters else 0, columns, dtype=torch.float32, device=index.device)
    common: dict[str, Any] = {**flags, **chosen.constants(), **chosen.options()}
    if slope is None:
        slope = torch.empty(index.shape, dtype=torch.float32, device=index.device)
    else:
        grad = weight = slope
    with on_device_of(index):
        if wants_rows or wants_parameters or not known:
            # the slopes are needed where nothing else is asked of this kernel
            _edge_weight_bwd_kernel_source[(chunks, blocks if wants_rows or wants_parameters else 1)](
                grad.contiguous(),
                weight.contiguous(),
                None if exponent is None or known else exponent.contiguous(),
                *rows,
                near,
                vector,
                slope,
                None if exponent is None or known else to_exponent,
                grad_source,
                part,
                count,
                nodes,
                slots,
                width,
                stride,
                chunk,
                SLOPES=known,
                NEED_SOURCE=wants_rows,
                NEED_PARAMETERS=wants_parameters,
                **{**common, **two_sums(chosen).constants()},
            )
        if wants_target or wants_parameters:
            # never read without the gradient to target
            indptr, perm = (csc or columns_of(index)) if wants_target else (near, near)
            sums = ceil_div(ceil_div(columns, chosen.block_n), blocks) if wants_parameters else 0
            _edge_weight_bwd_kernel_target[(sums + (count if wants_target else 0), blocks)](
                slope,
                *rows,
                indptr,
                perm,
                vector,
                grad_source[..., width:] if stacked else grad_target,
                part,
                grad_vector,
                grad_shift,
                grad_bias,
                slots,
                width,
                stride,
                sums,
                chunks,
                **common,
            )
    return grad_source if wants_source else grad_source.new_empty(0), *grads[1:], *last
