# SPDX-License-Identifier: Apache-2.0
"""Linear maps of float32 with its accuracy, from products of float16 on tensor cores, and their gradients.

Both operands are split once. A row, along the axis that is summed over, is multiplied by a power of two, which is
exact, so that its largest finite entry lies in ``[2**12, 2**15)``. Of a scaled entry ``a``, ``high`` is the nearest
float16, and ``low`` is the nearest float16 to ``a - high``. Rows of this size need no factor for ``low``: it keeps its
11 bits down to entries of ``2**-15`` of the largest. The product is

    low . high + high . low + high . high,

``STEP`` terms of the sum at a time, in this order: the sum is still small when the small parts join it. Each such sum
is then added to a float32 total by the ordinary units, which round to nearest. Powers of two come last, in two halves
of one sign, so nothing on the way leaves the range of float32 if the result does not.

The error of ``y = sum_k x_k w_k``, with ``u = 2**-24``, K terms, and ``m_x`` and ``m_w`` the largest entries of the two
rows. Everything but the last line is a multiple of ``sum_k |x_k w_k|``:

* ``8 u`` of the parts. ``high`` is off by at most half a unit in its last place, and ``low`` by half a unit in the last
  place of that, at least 12 bits lower: ``|a - high - low| <= max(2 u |a|, 2**-25)``. This is ``4 u`` for two operands.
  What is dropped, ``low . low``, is at most ``2**-11 |x_k|`` times ``2**-11 |w_k|``, which is ``4 u`` again.
* ``145 u`` of the tensor core. It adds 16 products to a sum at a time. All 17 are brought to the exponent of the
  largest, and what does not fit in 24 bits is cut off: each loses less than ``2 u`` of the largest. The sum is cut off
  in the same way. The largest is at most the sum of ``|high high|`` over the step. For its four additions that is
  ``4 (17 + 1) 2 u = 144 u``. In the eight before, of small parts, nothing is larger than ``2**-10`` of it.
* ``(ceil(K / STEP) + pieces + 1) u`` of the additions in float32.
* ``K 2**-35 m_x m_w`` of entries below ``2**-15`` of the largest: ``2**-25`` is at most ``2**-37`` of the largest.

So, with a little to spare for products of these,

    | y - sum_k x_k w_k |  <=  (160 + ceil(K / STEP) + pieces) u sum_k |x_k w_k|  +  K 2**-35 m_x m_w  +  2**-148

It is a bound for the worst case. By a model of that hardware the error of normal numbers is 1.4 times that of a sum in
float32, one term after the other, at 64 terms, the same at 128, and less than half at 1024. So shorter sums are left to
the library. If few terms of a long one count, float32 is more accurate, too: a single product of parts is off by 1.3 u,
one of float32 by 0.4 u (root mean squares).

A row with an entry that is not finite has NaN in every product, and touches no other row. There are no atomics: a
result has the same bits every time. The gradient to the weight sums over tokens. Its tiles alone would not fill a
device, so the sum goes in pieces, each with scales of its own, and the library adds the pieces in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._launch import FMA, Device, ceil_div, known_device, on_device_of
from drseg_kernels._products import float32_is_whole
from drseg_kernels.prepare_prior import power_below

# terms of a sum that a tensor core adds up by itself
TERMS = 64
STEP = tl.constexpr(TERMS)
# of fewer, a float32 product is more accurate
LEAST_TERMS = 128
# rows near one are multiplied by this before they are split
_LIFT = tl.constexpr(2.0**13)
_BOTH_LIFTS = tl.constexpr(2.0**-26)

# terms of a piece, at least; and about as many programs as fill a device twice
_PIECE, _PROGRAMS = 512, 256
# Additions and multiplications below which the library's product takes no longer than two launches: 9 us at the 31 TF/s
# of an H100 (2026-11).
LEAST_FLOP = 1 << 28

SPLIT = {"BLOCK_M": 8, "BLOCK_D": 256, "num_warps": 4}


@triton.jit
def places(index, near, outer, stride):
    """Where the elements ``index`` (int64) of an axis lie, whose groups of ``near`` are ``outer`` apart."""
    group = (index.to(tl.int32) // near).to(tl.int64)
    return group * outer + (index - group * near) * stride


@triton.jit
def tile_of(source_ptr, at_row, row, k, end, terms, near, outer, stride, DOWN: tl.constexpr, GROUPED: tl.constexpr):
    """Terms ``k`` below ``end`` of some rows, zeros elsewhere; DOWN has the rows as columns."""
    at = k * stride
    if GROUPED:
        at = places(k, near, outer, stride)
    has = (k < end) & (k < terms)
    if DOWN:
        return tl.load(source_ptr + at[:, None] + at_row[None, :], mask=has[:, None] & row[None, :], other=0.0)
    else:
        return tl.load(source_ptr + at_row[:, None] + at[None, :], mask=row[:, None] & has[None, :], other=0.0)


@triton.jit
def split_rows(
    source_ptr,
    parts_ptr,
    exponent_ptr,
    r,
    rows,
    row_near,
    row_outer,
    row_stride,
    first,
    length,
    terms,
    term_near,
    term_outer,
    term_stride,
    stride,
    DOWN: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """High and low parts of ``length`` terms of rows ``r``, zeros behind the last of all, and exponents of scales.

    DOWN: rows lie next to each other in memory, so a tile is read with its rows as columns. GROUPED: terms lie in
    groups.
    """
    row = r < rows
    at_row = places(r, row_near, row_outer, row_stride)
    if DOWN:
        largest = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    else:
        largest = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, length, BLOCK_D):
        k = first + start + tl.arange(0, BLOCK_D)
        size = tile_of(
            source_ptr, at_row, row, k, first + length, terms, term_near, term_outer, term_stride, DOWN, GROUPED
        )
        size = tl.abs(size)
        # neither infinity nor NaN, which compares with nothing
        largest = tl.maximum(largest, tl.where(size < float("inf"), size, 0.0))
    top = tl.max(largest, axis=0 if DOWN else 1)
    scale = power_below(top, top < 0.0)
    tl.store(exponent_ptr + r, 127 - (scale.to(tl.int32, bitcast=True) >> 23), mask=row)

    to_row = 2 * (r * stride + first)
    for start in range(0, length, BLOCK_D):
        k = first + start + tl.arange(0, BLOCK_D)
        value = tile_of(
            source_ptr, at_row, row, k, first + length, terms, term_near, term_outer, term_stride, DOWN, GROUPED
        )
        if DOWN:
            value = value * scale[None, :] * _LIFT
        else:
            value = value * scale[:, None] * _LIFT
        high = value.to(tl.float16)
        low = (value - high.to(tl.float32)).to(tl.float16)
        if DOWN:
            high, low = tl.trans(high), tl.trans(low)
        # by steps: high parts of one, then its low parts
        step = start // STEP + tl.arange(0, BLOCK_D // STEP)
        to = to_row[:, None, None] + (step * (2 * STEP))[None, :, None] + tl.arange(0, STEP)[None, None, :]
        here = row[:, None, None] & (step * STEP < length)[None, :, None]
        tl.store(parts_ptr + to, tl.reshape(high, (BLOCK_M, BLOCK_D // STEP, STEP)), mask=here)
        tl.store(parts_ptr + STEP + to, tl.reshape(low, (BLOCK_M, BLOCK_D // STEP, STEP)), mask=here)


@triton.jit(do_not_specialize=["left_rows", "left_near", "left_term_near", "right_rows", "right_near", "terms"])
def _linear_map_kernel_split(
    left_ptr,
    right_ptr,
    parts_ptr,
    exponent_ptr,
    left_rows,
    left_near,
    left_outer,
    left_stride,
    left_term_near,
    left_term_outer,
    left_term_stride,
    right_rows,
    right_near,
    right_outer,
    right_stride,
    right_term_near,
    right_term_outer,
    right_term_stride,
    terms,
    piece,
    stride,
    LEFT_DOWN: tl.constexpr,
    LEFT_GROUPED: tl.constexpr,
    RIGHT_DOWN: tl.constexpr,
    RIGHT_GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``parts`` (left_rows + right_rows, stride / STEP, 2, STEP) float16, the high and low ones of both operands, and
    ``exponent`` (pieces, left_rows + right_rows) of the powers of two that they are to be multiplied by."""
    rows = left_rows + right_rows
    first = tl.program_id(1).to(tl.int64) * piece
    length = tl.minimum(piece, stride - first).to(tl.int32)
    exponent_ptr += tl.program_id(1).to(tl.int64) * rows
    blocks = tl.cdiv(left_rows, BLOCK_M)
    r = tl.arange(0, BLOCK_M)
    if tl.program_id(0) < blocks:
        split_rows(
            left_ptr,
            parts_ptr,
            exponent_ptr,
            tl.program_id(0).to(tl.int64) * BLOCK_M + r,
            left_rows,
            left_near,
            left_outer,
            left_stride,
            first,
            length,
            terms,
            left_term_near,
            left_term_outer,
            left_term_stride,
            stride,
            LEFT_DOWN,
            LEFT_GROUPED,
            BLOCK_M,
            BLOCK_D,
        )
    else:
        split_rows(
            right_ptr,
            parts_ptr + left_rows.to(tl.int64) * stride * 2,
            exponent_ptr + left_rows,
            (tl.program_id(0) - blocks).to(tl.int64) * BLOCK_M + r,
            right_rows,
            right_near,
            right_outer,
            right_stride,
            first,
            length,
            terms,
            right_term_near,
            right_term_outer,
            right_term_stride,
            stride,
            RIGHT_DOWN,
            RIGHT_GROUPED,
            BLOCK_M,
            BLOCK_D,
        )


@triton.jit
def power_of_two(exponent):
    """2**exponent in float32, for exponents of -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["left_rows", "right_rows"])
def _linear_map_kernel_product(
    parts_ptr,
    exponent_ptr,
    out_ptr,
    left_rows,
    right_rows,
    piece,
    stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``out`` (pieces, left_rows, right_rows): a tile of the sums of one piece, from what the other kernel wrote."""
    tiles = tl.cdiv(right_rows, BLOCK_N)
    tile = tl.program_id(0) // tiles
    r = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (tl.program_id(0) - tile.to(tl.int64) * tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, column = r < left_rows, c < right_rows
    rows = left_rows + right_rows
    first = tl.program_id(1).to(tl.int64) * piece
    left_ptr = parts_ptr + 2 * (first + r * stride)[:, None]
    right_ptr = parts_ptr + 2 * (first + (left_rows + c) * stride)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, tl.minimum(piece, stride - first).to(tl.int32), STEP):
        k = 2 * start + tl.arange(0, STEP)
        left = tl.load(left_ptr + k[None, :], mask=row[:, None], other=0.0)
        right = tl.load(right_ptr + k[:, None], mask=column[None, :], other=0.0)
        left_low = tl.load(left_ptr + STEP + k[None, :], mask=row[:, None], other=0.0)
        right_low = tl.load(right_ptr + STEP + k[:, None], mask=column[None, :], other=0.0)
        # begun with the small ones, so that the compiler does not go on adding to the total itself
        part = tl.dot(left_low, right, out_dtype=tl.float32)
        part = tl.dot(left, right_low, part)
        total += tl.dot(left, right, part)

    exponent_ptr += tl.program_id(1).to(tl.int64) * rows
    of_left = tl.load(exponent_ptr + r, mask=row, other=0)
    of_right = tl.load(exponent_ptr + left_rows + c, mask=column, other=0)
    exponent = of_left[:, None] + of_right[None, :]
    # two halves of one sign: what is between them is between the sum and the result
    half = exponent >> 1
    total = total * _BOTH_LIFTS * power_of_two(half) * power_of_two(exponent - half)
    at = (tl.program_id(1).to(tl.int64) * left_rows + r[:, None]) * right_rows + c[None, :]
    tl.store(out_ptr + at, total, mask=row[:, None] & column[None, :])


class Rows(NamedTuple):
    """An operand as the kernel reads it: its rows, and how far apart rows and terms lie.

    Args:
        source: the tensor. size: how many rows.
        row, term: of each axis how many lie evenly, the distance of such groups, and that within a group.
    """

    source: Tensor
    size: int
    row: tuple[int, int, int]
    term: tuple[int, int, int]


def rows_of(source: Tensor, transposed: bool = False) -> Rows:
    """The rows of (B, N, C), or (N, C): nodes over channels, or ``transposed`` channels over nodes."""
    source = source if source.dim() == 3 else source[None]
    batch, nodes, channels = source.shape
    if 1 not in (source.stride(2), source.stride(1)):
        source = source.contiguous()
    node = (nodes, source.stride(0), source.stride(1))
    if batch == 1 or node[1] == nodes * node[2]:
        # one behind another, over all samples
        node = (batch * nodes, 0, node[2])
    channel = (channels, 0, source.stride(2))
    return Rows(source, channels, channel, node) if transposed else Rows(source, batch * nodes, node, channel)


def layout_of(rows: Rows, side: str, terms: int) -> dict[str, bool]:
    """Compile-time arguments of an operand."""
    return {f"{side}_DOWN": rows.term[2] != 1, f"{side}_GROUPED": rows.term[0] != terms}


def sizes_of(device: Device) -> dict[str, int]:
    """Compile-time arguments and options of the product: what its stages hold fits into the shared memory."""
    if device.shared_bytes >= 200_000:
        # two programs at a time, one of which multiplies while the other adds
        return {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}


def shared_bytes(sizes: dict[str, int]) -> int:
    """Upper bound of a block's shared memory: the parts of both operands in every stage."""
    return 4 * sizes["num_stages"] * TERMS * (sizes["BLOCK_M"] + sizes["BLOCK_N"]) + 1024


def piece_of(tiles: int, terms: int) -> int:
    """Terms of a piece, a multiple of STEP: as many pieces as fill a device, of about 512 terms at least."""
    pieces = max(1, min(ceil_div(terms, _PIECE), _PROGRAMS // tiles))
    return ceil_div(ceil_div(terms, pieces), TERMS) * TERMS


def multiply(left: Rows, right: Rows, terms: int, in_pieces: bool = False) -> Tensor:
    """Sums of products (left.size, right.size) float32 over ``terms``, of rows in float32; no size is zero.

    Without ``in_pieces`` a row has the same bits whatever the others are, and however many.
    """
    device = left.source.device
    sizes = sizes_of(known_device(device))
    tiles = ceil_div(left.size, sizes["BLOCK_M"]) * ceil_div(right.size, sizes["BLOCK_N"])
    stride = ceil_div(terms, TERMS) * TERMS
    piece = piece_of(tiles, terms) if in_pieces else stride
    rows, pieces = left.size + right.size, ceil_div(stride, piece)
    parts = torch.empty(rows, 2 * stride, dtype=torch.float16, device=device)
    exponent = torch.empty(pieces, rows, dtype=torch.int32, device=device)
    out = torch.empty(pieces, left.size, right.size, dtype=torch.float32, device=device)
    blocks = ceil_div(left.size, SPLIT["BLOCK_M"]) + ceil_div(right.size, SPLIT["BLOCK_M"])
    with on_device_of(left.source):
        _linear_map_kernel_split[(blocks, pieces)](
            left.source,
            right.source,
            parts,
            exponent,
            left.size,
            *left.row,
            *left.term,
            right.size,
            *right.row,
            *right.term,
            terms,
            piece,
            stride,
            **layout_of(left, "LEFT", terms),
            **layout_of(right, "RIGHT", terms),
            **SPLIT,
            **FMA,
        )
        _linear_map_kernel_product[(tiles, pieces)](
            parts, exponent, out, left.size, right.size, piece, stride, **sizes, **FMA
        )
    return out[0] if pieces == 1 else out.sum(0)


def takes_parts(device: Device, rows: int, columns: int, terms: int) -> bool:
    """Whether a product goes by parts: where the library would be more accurate, or as fast, it is the library's.

    So it is if a setting allows it to round float32. Its TF32 has the digits of the high parts, and needs no splitting.
    """
    if terms < LEAST_TERMS or rows == 0 or columns == 0 or not float32_is_whole():
        return False
    return device.interpreted or 2 * rows * columns * terms >= LEAST_FLOP


def linear_map(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` (B, N, C) times ``weight`` (E, C), both float32: (B, N, E)."""
    batch, nodes, channels = x.shape
    if not takes_parts(known_device(x.device), batch * nodes, len(weight), channels):
        # of a map as it lies; a product of matrices would take a copy
        down = x.stride(1) == 1 and not x.is_contiguous()
        return torch.bmm(x, weight.t().expand(batch, -1, -1)) if down else F.linear(x, weight)
    return multiply(rows_of(x), rows_of(weight), channels).view(batch, nodes, len(weight))


def linear_map_backward(grad: Tensor, x: Tensor, weight: Tensor, output_mask: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Gradients to ``x`` and ``weight`` from that to the result (B, N, E); one that is not asked for is empty."""
    found: list[Any] = [x.new_empty(0), weight.new_empty(0)]
    tokens, device = x.shape[0] * x.shape[1], known_device(x.device)
    width, channels = weight.shape
    if output_mask[0]:
        if takes_parts(device, tokens, channels, width):
            found[0] = multiply(rows_of(grad), rows_of(weight, True), width).view(x.shape)
        else:
            found[0] = torch.matmul(grad, weight)
    if output_mask[1]:
        if takes_parts(device, width, channels, tokens):
            found[1] = multiply(rows_of(grad, True), rows_of(x, True), tokens, in_pieces=True)
        else:
            found[1] = torch.matmul(grad.reshape(tokens, width).t(), x.reshape(tokens, channels))
    return found[0], found[1]
