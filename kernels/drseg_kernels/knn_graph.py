# SPDX-License-Identifier: Apache-2.0
"""Neighbours of the highest affinity: tiles of dot products from the library, merged into lists of the best.

The library multiplies a tile of rows by columns in float32; one kernel per tile turns the products into scores with the
decay table, drops what does not beat the row's k-th best so far, and selects among the k best so far and the rest of
the tile. Tiles come in ascending order of their columns, so both lists are in ascending index already: the lowest index
wins a tie by its place, and nothing is ever sorted or cut short.

One tile that is no power of two wide is cut in two, so that 576 columns are 512 and 64 and not 1024: both parts are
selected from at once.

Scores are ranked as int32 keys (``ordered_bits``). No key is ever sorted: the k-th is found by bisection with counts,
and where candidates stand in ascending index, equal keys at the border go to the first of them by a running count.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._blocks import ordered_bits
from drseg_kernels._launch import LARGEST_GRID_Y, Selection, ceil_div, on_device_of, power_of_two_from, sizes_of

# the lowest key: no candidate; and the highest: a candidate that must be taken
NONE = tl.constexpr(-(2**31))
FORCED = tl.constexpr(2**31 - 1)

# gauss differs from additive in the table only
_JOIN = {"additive": "subtract", "gauss": "subtract", "multiplicative": "clamped", "product": "product"}


@triton.jit
def decay_between(table_ptr, i, j, width, both):
    """Entries of the decay table for nodes i (R,) and j (C,), where ``both`` (R, C) is true."""
    # |dy| * width + |dx| without a product: the start of a row of the grid is the index less the column
    x_own, x = i % width, j % width
    cell = tl.abs((i - x_own)[:, None] - (j - x)[None, :]) + tl.abs(x_own[:, None] - x[None, :])
    return tl.load(table_ptr + cell, mask=both, other=0.0)


@triton.jit
def join_scores(cosine, decay, JOIN: tl.constexpr):
    if JOIN == "subtract":
        value = cosine - decay
    else:
        if JOIN == "clamped":
            cosine = tl.maximum(cosine, 0.0)
        value = cosine * decay
    return value


@triton.jit
def allowed_pairs(both, inverse_own, inverse, own, INCLUDE_SELF: tl.constexpr):
    """Pairs (R, C) that may be chosen. NaN differs from itself: a non-finite node neither chooses nor is chosen."""
    allowed = both & (inverse_own == inverse_own)[:, None] & (inverse == inverse)[None, :]
    if not INCLUDE_SELF:
        allowed = allowed & (own == 0)
    return allowed


@triton.jit
def keys_of(value, allowed, own, INCLUDE_SELF: tl.constexpr):
    key = tl.where(allowed, ordered_bits(value), NONE)
    if INCLUDE_SELF:
        key = tl.where(allowed & own, FORCED, key)
    return key


@triton.jit
def count_from(key, other, least, TWO: tl.constexpr):
    """How many keys of each row (of one or two lists) are at least ``least`` (R,)."""
    total = tl.sum((key >= least[:, None]).to(tl.int32), axis=1)
    if TWO:
        total += tl.sum((other >= least[:, None]).to(tl.int32), axis=1)
    return total


@triton.jit
def kth_key(key, other, floor, k, TWO: tl.constexpr):
    """The highest key that at least k candidates of a row reach; ``NONE + 1`` where there are no more than k.

    Args:
        key, other: (R, C) and, if TWO, (R, C') keys. floor: (R,) a key that is known to be no higher than the answer.
    """
    candidates = count_from(key, other, tl.full(floor.shape, NONE + 1, tl.int32), TWO)
    bottom = tl.min(tl.where(key > NONE, key, FORCED), axis=1)
    top = tl.max(tl.where(key < FORCED, key, NONE), axis=1)
    if TWO:
        bottom = tl.minimum(bottom, tl.min(tl.where(other > NONE, other, FORCED), axis=1))
        top = tl.maximum(top, tl.max(tl.where(other < FORCED, other, NONE), axis=1))
    low = tl.where(candidates > k, tl.maximum(floor, bottom), NONE + 1)
    high = tl.where(candidates > k, tl.maximum(top, low), low)
    while tl.max((low < high).to(tl.int32), axis=0) > 0:
        # the mean, rounded up; the sum of the two may leave the range of int32
        guess = (low | high) - ((low ^ high) >> 1)
        reach = count_from(key, other, guess, TWO)
        high = tl.where(reach > k, high, tl.where(reach == k, guess, tl.maximum(guess - 1, low)))
        low = tl.where(reach >= k, guess, low)
    return low


@triton.jit
def take_in_order(key, threshold, room):
    """Chosen keys of a row and their places from 1 on: all above the threshold, the first ``room`` equal to it."""
    above, tied = key > threshold[:, None], key == threshold[:, None]
    chosen = above | (tied & (tl.cumsum(tied.to(tl.int32), axis=1) <= room[:, None]))
    return chosen, tl.cumsum(chosen.to(tl.int32), axis=1)


@triton.jit
def write_chosen(index_ptr, score_ptr, start, chosen, place, j, value):
    """Chosen columns ``j`` (C,) and their scores, from ``start`` (R,) on."""
    to = start[:, None] + place - 1
    tl.store(index_ptr + to, tl.broadcast_to(j[None, :], chosen.shape), mask=chosen)
    tl.store(score_ptr + to, value, mask=chosen)


@triton.jit
def write_blank(index_ptr, score_ptr, place, empty, i, finite):
    """The slots without a candidate: the row's own index, with score -inf, or NaN in a row that is not finite."""
    blank = tl.where(finite, -float("inf"), float("nan"))
    tl.store(index_ptr + place, tl.broadcast_to(i[:, None], empty.shape), mask=empty)
    tl.store(score_ptr + place, tl.broadcast_to(blank[:, None], empty.shape), mask=empty)


@triton.jit
def merge_columns(
    index_ptr,
    score_ptr,
    key,
    value,
    j,
    head_key,
    head_value,
    head_j,
    row,
    node,
    i,
    finite,
    k,
    INCLUDE_SELF: tl.constexpr,
    FIRST: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Merges columns in ascending order, all after those merged before, into the rows of ``index`` and ``score``.

    Args:
        key, value: (R, C) keys and scores of the nodes j (C,). head_key, head_value, head_j: of columns before these,
            if there is a TAIL. row: (R,) rows that count. node: (R,) their places in the batch, int64.
        i: (R,) node indices. finite: (R,). FIRST: nothing has been merged into these rows yet.
        BLOCK_K: a power of two, at least k.
    """
    s = tl.arange(0, BLOCK_K)
    slot = row[:, None] & (s < k)[None, :]
    place = (node * k)[:, None] + s[None, :]
    if FIRST:
        # without a TAIL never read: there is no list beside the new keys
        kept_key = head_key
        floor = tl.full(row.shape, NONE, tl.int32)
        work = 1
    else:
        kept_index = tl.load(index_ptr + place, mask=slot, other=0)
        kept_value = tl.load(score_ptr + place, mask=slot, other=-float("inf"))
        # false for a padded slot (-inf) and for a row that is not finite (NaN)
        kept = kept_value > -float("inf")
        kept_key = tl.where(kept, ordered_bits(kept_value), NONE)
        if INCLUDE_SELF:
            kept_key = tl.where(kept & (kept_index == i[:, None]), FORCED, kept_key)
        # the k-th best so far: an equal newcomer has the higher index and loses
        floor = tl.min(tl.where(slot, kept_key, FORCED), axis=1)
        work = tl.max(tl.sum((key > floor[:, None]).to(tl.int32), axis=1), axis=0)

    if work > 0:
        two: tl.constexpr = not FIRST or TAIL > 0
        threshold = kth_key(key, kept_key, floor, k, two)
        before = tl.zeros(row.shape, tl.int32)
        room = k - tl.sum((key > threshold[:, None]).to(tl.int32), axis=1)
        if two:
            room -= tl.sum((kept_key > threshold[:, None]).to(tl.int32), axis=1)
            stays, at = take_in_order(kept_key, threshold, room)
            if FIRST:
                write_chosen(index_ptr, score_ptr, node * k, stays, at, head_j, head_value)
            else:
                # every warp has read the old lists before any of them writes into the same rows
                tl.debug_barrier()
                to = (node * k)[:, None] + at - 1
                tl.store(index_ptr + to, kept_index, mask=stays)
                tl.store(score_ptr + to, kept_value, mask=stays)
            before = tl.sum(stays.to(tl.int32), axis=1)
            room -= tl.sum((kept_key == threshold[:, None]).to(tl.int32), axis=1)
        chosen, at = take_in_order(key, threshold, room)
        write_chosen(index_ptr, score_ptr, node * k + before, chosen, at, j, value)
        found = before + tl.sum(chosen.to(tl.int32), axis=1)
        write_blank(index_ptr, score_ptr, place, slot & (s[None, :] >= found[:, None]), i, finite)


@triton.jit
def scored_columns(
    product_ptr,
    inverse_norm_ptr,
    table_ptr,
    tile_row,
    sample,
    row,
    i,
    inverse_own,
    c,
    first_column,
    columns,
    width,
    JOIN: tl.constexpr,
    INCLUDE_SELF: tl.constexpr,
):
    """Keys and scores (R, C) of the columns ``c`` (C,) of a tile, and their nodes."""
    column = c < columns
    j = first_column + c
    inverse = tl.load(inverse_norm_ptr + sample + j, mask=column, other=0.0)
    both = row[:, None] & column[None, :]
    product = tl.load(product_ptr + (tile_row * columns)[:, None] + c[None, :], mask=both, other=0.0)
    decay = decay_between(table_ptr, i, j, width, both)
    value = join_scores(product * inverse_own[:, None] * inverse[None, :], decay, JOIN)
    own = i[:, None] == j[None, :]
    allowed = allowed_pairs(both, inverse_own, inverse, own, INCLUDE_SELF)
    return keys_of(value, allowed, own, INCLUDE_SELF), value, j


# the fusion of multiply and add is pinned off: Triton's default changes between its versions, and with it the last bits
OPTIONS = {"enable_fp_fusion": False}


# one binary serves every size: knowing that a size is a multiple of 16 would widen the loads of the products, and
# lose as much by moving them between the registers of threads afterwards
@triton.jit(
    do_not_specialize=["first_image", "first_row", "first_column", "rows", "columns", "nodes", "width", "k"],
)
def _knn_graph_fwd_kernel_merge(
    product_ptr,
    inverse_norm_ptr,
    table_ptr,
    index_ptr,
    score_ptr,
    first_image,
    first_row,
    first_column,
    rows,
    columns,
    nodes,
    width,
    k,
    JOIN: tl.constexpr,
    INCLUDE_SELF: tl.constexpr,
    FIRST: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Merges a tile of dot products (images, rows, columns) into ``index`` and ``score`` (B, N, k).

    FIRST: nothing has been merged into these rows yet. BLOCK_M rows of the tile per program; BLOCK_N and TAIL together
    are at least ``columns``, BLOCK_K at least ``k``; all are powers of two, but for a TAIL of 0.
    """
    image = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = r < rows
    i = (first_row + r).to(tl.int32)
    tile_row = image * rows + r
    image += first_image
    node = image * nodes + first_row + r
    inverse_own = tl.load(inverse_norm_ptr + node, mask=row, other=0.0)
    sample = image * nodes
    c = tl.arange(0, BLOCK_N)
    key, value, j = scored_columns(
        product_ptr,
        inverse_norm_ptr,
        table_ptr,
        tile_row,
        sample,
        row,
        i,
        inverse_own,
        c,
        first_column,
        columns,
        width,
        JOIN,
        INCLUDE_SELF,
    )
    head_key, head_value, head_j = key, value, j
    if TAIL > 0:
        c = BLOCK_N + tl.arange(0, TAIL)
        key, value, j = scored_columns(
            product_ptr,
            inverse_norm_ptr,
            table_ptr,
            tile_row,
            sample,
            row,
            i,
            inverse_own,
            c,
            first_column,
            columns,
            width,
            JOIN,
            INCLUDE_SELF,
        )
    merge_columns(
        index_ptr,
        score_ptr,
        key,
        value,
        j,
        head_key,
        head_value,
        head_j,
        row,
        node,
        i,
        inverse_own == inverse_own,
        k,
        INCLUDE_SELF,
        FIRST,
        TAIL,
        BLOCK_K,
    )


# the fewest columns of a tail
_SMALLEST_TAIL = 16


def head_and_tail(columns: int, chosen: Selection) -> tuple[int, int]:
    """How many columns of a tile come first and how many after them; (BLOCK_N, TAIL)."""
    whole = min(chosen.block_n, max(_SMALLEST_TAIL, power_of_two_from(columns)))
    head = whole // 2
    tail = max(_SMALLEST_TAIL, power_of_two_from(columns - head)) if columns > head >= _SMALLEST_TAIL else whole
    return (head, tail) if head + tail < whole else (chosen.block_n, 0)


def constants(nodes: int, k: int, form: str, include_self: bool, first: bool, chosen: Selection) -> dict[str, Any]:
    """Compile-time arguments of the kernel: what is compiled ahead of time and what is launched are one thing."""
    # a list beside the new columns leaves no room for a third
    head, tail = head_and_tail(nodes, chosen) if nodes <= chosen.block_n else (chosen.block_n, 0)
    return {
        "JOIN": _JOIN[form],
        "INCLUDE_SELF": include_self,
        "FIRST": first,
        "TAIL": tail,
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": head,
        "BLOCK_K": max(16, triton.next_power_of_2(k)),
    }


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Dot products of the rows of (G, R, D) and (G, T, D) in float32, into (G, R, T)."""
    if left.dtype == torch.float32 and len(left) == 1:
        # the library has faster kernels for one product than for a batch of one
        torch.mm(left[0], right[0].mT, out=out[0])
    elif left.dtype == torch.float32:
        torch.bmm(left, right.mT, out=out)
    elif left.is_cuda:
        torch.bmm(left, right.mT, out_dtype=torch.float32, out=out)
    else:
        # the CPU has no product that widens; half-precision features are exact in float32
        torch.bmm(left.float(), right.mT.float(), out=out)


def knn_graph(
    prior: Tensor,
    inverse_norm: Tensor,
    table: Tensor,
    k: int,
    form: str,
    include_self: bool,
    *,
    sizes: Selection | None = None,
) -> tuple[Tensor, Tensor]:
    """Neighbours and scores of prepared features.

    Float32 products follow torch's precision setting: the caller turns TF32 off where the result must be exact.

    Args:
        prior: (B, N, D) float32, float16 or bfloat16.
        inverse_norm: (B, N) float32, NaN for a node that no other may choose.
        table: (h, w) float32 decay table, h * w = N.
        k: neighbours per node.
        form: ``additive``, ``gauss`` (both subtract the table), ``multiplicative`` or ``product``.
        include_self: the node itself is always, or never, among its neighbours.
        sizes: of tiles and programs; by default those of the architecture's table, then a rule.

    Returns:
        ``index`` (B, N, k) int32, ascending in each row, and ``score`` (B, N, k) float32. Slots without a candidate
        come last and hold the row's own index with score ``-inf``, or NaN in a row that is not finite.
    """
    batch, nodes, _ = prior.shape
    index = torch.empty(batch, nodes, k, dtype=torch.int32, device=prior.device)
    score = torch.empty(batch, nodes, k, dtype=torch.float32, device=prior.device)
    if index.numel() == 0:
        return index, score
    chosen = sizes or sizes_of("knn_graph", prior.device, prior.dtype, nodes, k)
    prior, inverse_norm, table = prior.contiguous(), inverse_norm.contiguous(), table.contiguous()
    tile_columns = min(chosen.block_n, nodes)
    fitting_rows = chosen.tile_bytes // (4 * tile_columns)
    tile_rows = min(fitting_rows, nodes)
    # images share a tile where they fit; the library may sum in another order for another number of images
    images = 1 if torch.are_deterministic_algorithms_enabled() else max(1, fitting_rows // nodes)
    images = min(batch, images, LARGEST_GRID_Y)
    buffer = torch.empty(images * tile_rows * tile_columns, dtype=torch.float32, device=prior.device)
    with on_device_of(prior):
        for image in range(0, batch, images):
            part = prior[image : image + images]
            for row in range(0, nodes, tile_rows):
                left = part[:, row : row + tile_rows]
                for column in range(0, nodes, tile_columns):
                    right = part[:, column : column + tile_columns]
                    shape = (left.shape[0], left.shape[1], right.shape[1])
                    tile = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
                    _multiply(left, right, tile)
                    _knn_graph_fwd_kernel_merge[(ceil_div(shape[1], chosen.block_m), shape[0])](
                        tile,
                        inverse_norm,
                        table,
                        index,
                        score,
                        image,
                        row,
                        column,
                        shape[1],
                        shape[2],
                        nodes,
                        table.shape[1],
                        k,
                        **constants(nodes, k, form, include_self, column == 0, chosen),
                        num_warps=chosen.num_warps,
                        **OPTIONS,
                    )
    return index, score
