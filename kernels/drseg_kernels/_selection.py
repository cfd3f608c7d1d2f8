# SPDX-License-Identifier: Apache-2.0
"""Scores as keys, and the best k of them: what the kernels of ``knn_graph`` share.

Scores are ranked as int32 keys (``ordered_bits``). No key is ever sorted. The k-th is found by bisection with counts.
Of equal keys at the border a running count takes the first ones, since candidates stand in ascending index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from drseg_kernels._blocks import ordered_bits
from drseg_kernels._launch import Selection, power_of_two_from

# the lowest key: no candidate; and the highest: a candidate that must be taken
NONE = tl.constexpr(-(2**31))
FORCED = tl.constexpr(2**31 - 1)

# gauss differs from additive in the table only
JOIN_OF = {"additive": "subtract", "gauss": "subtract", "multiplicative": "clamped", "product": "product"}


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
    # of cells too far apart the decay is NaN, and with it the score
    key = tl.where(allowed & (value == value), ordered_bits(value), NONE)
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
    """Chosen columns ``j`` (1 or R, C) and their scores, from ``start`` (R,) on."""
    to = start[:, None] + place - 1
    tl.store(index_ptr + to, tl.broadcast_to(j, chosen.shape), mask=chosen)
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
        key, value: (R, C) keys and scores of the nodes j (1 or R, C).
        head_key, head_value, head_j: of columns before these, if there is a TAIL.
        row: (R,) rows that count. node: (R,) their places in the batch, int64. i: (R,) node indices. finite: (R,).
        FIRST: nothing has been merged into these rows yet.
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
    """Keys and scores (R, C) of the columns ``c`` (C,) of a tile, and their nodes (1, C)."""
    column = c < columns
    j = first_column + c
    inverse = tl.load(inverse_norm_ptr + sample + j, mask=column, other=0.0)
    both = row[:, None] & column[None, :]
    product = tl.load(product_ptr + (tile_row * columns)[:, None] + c[None, :], mask=both, other=0.0)
    decay = decay_between(table_ptr, i, j, width, both)
    value = join_scores(product * inverse_own[:, None] * inverse[None, :], decay, JOIN)
    own = i[:, None] == j[None, :]
    allowed = allowed_pairs(both, inverse_own, inverse, own, INCLUDE_SELF)
    return keys_of(value, allowed, own, INCLUDE_SELF), value, j[None, :]


# the fusion of multiply and add is pinned off: Triton's default changes between its versions, and with it the last bits
OPTIONS = {"enable_fp_fusion": False}


# the fewest columns of a tail
_SMALLEST_TAIL = 16


def head_and_tail(columns: int, chosen: Selection) -> tuple[int, int]:
    """How many columns of a tile come first and how many after them; (BLOCK_N, TAIL)."""
    whole = min(chosen.block_n, max(_SMALLEST_TAIL, power_of_two_from(columns)))
    head = whole // 2
    tail = max(_SMALLEST_TAIL, power_of_two_from(columns - head)) if columns > head >= _SMALLEST_TAIL else whole
    return (head, tail) if head + tail < whole else (chosen.block_n, 0)
