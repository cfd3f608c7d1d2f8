# SPDX-License-Identifier: Apache-2.0
"""Device functions of the candidates that a row keeps in global memory, in any order and in segments of ROOM places.

A candidate is an int64: its key above its node. The key says the score, so that of the node itself is made FORCED when
it is read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from drseg_kernels._blocks import ordered_bits
from drseg_kernels._knn_select import FORCED, NONE, kth_key

# the lowest key of a candidate: a score of -inf is none
LOWEST = tl.constexpr(-(2**31) + 2**23)


@triton.jit
def candidate_of(key, index):
    return (key.to(tl.int64) << 32) | index


@triton.jit
def key_and_index(candidate):
    return (candidate >> 32).to(tl.int32), candidate.to(tl.int32)


@triton.jit
def best_of(candidate, held, own, k, INCLUDE_SELF: tl.constexpr):
    """Which candidates (R, C), in any order, are the k best of a row; the key of the last, or ``NONE + 1``.

    Of equal keys the lowest indices win: the complement of an index falls as it rises, so the same search finds them.

    Args:
        held: (R, C) which of them there are. own: (R,) the rows' nodes.
    """
    key, index = key_and_index(candidate)
    key = tl.where(held, key, NONE)
    if INCLUDE_SELF:
        key = tl.where(held & (index == own[:, None]), FORCED, key)
    threshold = kth_key(key, key, tl.full((key.shape[0],), NONE, tl.int32), k, False)
    above, tied = key > threshold[:, None], key == threshold[:, None]
    room = k - tl.sum(above.to(tl.int32), axis=1)
    if tl.max(tl.sum(tied.to(tl.int32), axis=1) - room, axis=0) > 0:
        name = tl.where(tied, -1 - index, NONE)
        last = kth_key(name, name, tl.full((key.shape[0],), NONE, tl.int32), room, False)
        # there is no room where the k best are the FORCED one alone
        tied = tied & (name >= last[:, None]) & (room > 0)[:, None]
    return above | tied, threshold


@triton.jit
def cut_back(
    candidate_ptr,
    count_ptr,
    threshold_ptr,
    order_ptr,
    segment,
    k,
    INCLUDE_SELF: tl.constexpr,
    PATCH: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROOM: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Leaves the k best candidates of a patch of rows; the key of the last becomes the row's threshold, if higher.

    Args:
        count_ptr, threshold_ptr: of the first row's first segment, as ``candidate_ptr``.
        order_ptr: the rows' nodes. segment: which of the SEGMENTS of a row. GROUP: rows at a time.
    """
    s = tl.arange(0, ROOM)
    r = tl.arange(0, GROUP)
    # what other threads have written is there from here on
    tl.debug_barrier()
    for _ in range(0, PATCH, GROUP):
        # of one patch there are few enough for 32 bits
        at = r * SEGMENTS + segment
        count = tl.load(count_ptr + at)
        if tl.max(count, axis=0) > k:
            held = s[None, :] < count[:, None]
            place = (at * ROOM)[:, None] + s[None, :]
            candidate = tl.load(candidate_ptr + place, mask=held, other=0)
            chosen, threshold = best_of(candidate, held, tl.load(order_ptr + r), k, INCLUDE_SELF)
            to = (at * ROOM)[:, None] + tl.cumsum(chosen.to(tl.int32), axis=1) - 1
            before = tl.load(threshold_ptr + at)
            # every warp has read its candidates before any of them writes among them
            tl.debug_barrier()
            tl.store(candidate_ptr + to, candidate, mask=chosen)
            tl.store(count_ptr + at, tl.sum(chosen.to(tl.int32), axis=1))
            tl.store(threshold_ptr + at, tl.maximum(before, threshold))
        r += GROUP
    tl.debug_barrier()


@triton.jit
def list_live(
    live_ptr,
    reach_ptr,
    longest_ptr,
    length,
    threshold,
    searching,
    patch,
    corner,
    patches,
    across,
    window_down,
    window_across,
    JOIN: tl.constexpr,
    AT_A_TIME: tl.constexpr,
):
    """Lists the patches outside a window in which a row may find a candidate; how many they are.

    Args:
        live_ptr: where to. reach_ptr: by patches apart. longest_ptr: of the image's first patch.
        length, threshold, searching: (R,) of the rows of ``patch``, the last one false for those that want nothing.
        corner: the first patch of the window. across: patches of a row of the grid.
    """
    listed = 0
    q = tl.arange(0, AT_A_TIME)
    # the start of a row of patches is the index less the column, as in decay_between
    x, left = patch % across, corner % across
    row, top = patch - x, corner - left
    for _ in range(0, patches, AT_A_TIME):
        inside = q < patches
        x_other = q % across
        row_other = q - x_other
        apart = tl.abs(row - row_other) + tl.abs(x - x_other)
        reach = tl.load(reach_ptr + apart, mask=inside, other=0.0)
        bound = length[:, None] * tl.load(longest_ptr + q, mask=inside, other=0.0)[None, :]
        if JOIN == "subtract":
            bound = bound - reach[None, :]
        else:
            bound = bound * reach[None, :]
        # an equal score may win by its index; where infinity meets zero nothing is known
        may = ((ordered_bits(bound) >= threshold[:, None]) | (bound != bound)) & searching[:, None]
        seen = (row_other >= top) & (row_other < top + window_down * across)
        seen = seen & (x_other >= left) & (x_other < left + window_across)
        live = inside & (seen == 0) & (tl.max(may.to(tl.int32), axis=0) > 0)
        tl.store(live_ptr + listed + tl.cumsum(live.to(tl.int32), axis=0) - 1, q, mask=live)
        listed += tl.sum(live.to(tl.int32), axis=0)
        q += AT_A_TIME
    return listed
