# SPDX-License-Identifier: Apache-2.0
"""Device functions of every way to select: scores from dot products, exact selection of the best, writing a row.

Scores are ranked as int32 keys (``ordered_bits``). No key is ever sorted: the k-th is found by bisection with counts,
and where candidates stand in ascending index, equal keys at the border go to the first of them by a running count.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from drseg_kernels._blocks import ordered_bits

# the lowest key: no candidate; and the highest: a candidate that must be taken
NONE = tl.constexpr(-(2**31))
FORCED = tl.constexpr(2**31 - 1)

# gauss differs from additive in the table only
_JOIN = {"additive": "subtract", "gauss": "subtract", "multiplicative": "clamped", "product": "product"}


def how_to_join(form: str, include_self: bool) -> dict[str, Any]:
    """Compile-time arguments that every kernel of ``knn_graph`` takes."""
    return {"JOIN": _JOIN[form], "INCLUDE_SELF": include_self}


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
    row,
    node,
    i,
    j,
    finite,
    k,
    INCLUDE_SELF: tl.constexpr,
    FIRST: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Merges columns in ascending order, all after those merged before, into the rows of ``index`` and ``score``.

    Args:
        key, value: (R, C) keys and scores. row: (R,) rows that count. node: (R,) their places in the batch, int64.
        i: (R,) and j: (C,) node indices. finite: (R,). FIRST: nothing has been merged into these rows yet.
        SLOTS: a power of two, at least k.
    """
    s = tl.arange(0, SLOTS)
    slot = row[:, None] & (s < k)[None, :]
    place = (node * k)[:, None] + s[None, :]
    if FIRST:
        # never read: there is no list beside the new keys
        kept_key = key
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
        threshold = kth_key(key, kept_key, floor, k, not FIRST)
        before = tl.zeros(row.shape, tl.int32)
        # every warp has read the old lists before any of them writes into the same rows
        tl.debug_barrier()
        room = k - tl.sum((key > threshold[:, None]).to(tl.int32), axis=1)
        if not FIRST:
            room -= tl.sum((kept_key > threshold[:, None]).to(tl.int32), axis=1)
            stays, at = take_in_order(kept_key, threshold, room)
            to = (node * k)[:, None] + at - 1
            tl.store(index_ptr + to, kept_index, mask=stays)
            tl.store(score_ptr + to, kept_value, mask=stays)
            before = tl.sum(stays.to(tl.int32), axis=1)
            room -= tl.sum((kept_key == threshold[:, None]).to(tl.int32), axis=1)
        chosen, at = take_in_order(key, threshold, room)
        write_chosen(index_ptr, score_ptr, node * k + before, chosen, at, j, value)
        found = before + tl.sum(chosen.to(tl.int32), axis=1)
        write_blank(index_ptr, score_ptr, place, slot & (s[None, :] >= found[:, None]), i, finite)
