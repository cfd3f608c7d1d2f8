# SPDX-License-Identifier: Apache-2.0
"""``knn_graph`` of many nodes with scores that never leave the chip, and patches that are never looked at.

A patch of rows first searches the patches around it. Its k-th best there is a lower bound of its k-th best of all, and
what the decay table and the lengths of the features allow tells the patches that may hold anything as good. Those are
searched next, by several programs, each with candidates of its own: the same kernel, in the same binary, so that equal
features get equal scores. The last kernel selects among what is left. Whoever has no room for another patch keeps its k
best; nothing is ever cut short, and no result depends on who comes first.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels import _patches
from drseg_kernels._blocks import ordered_bits, value_of_bits
from drseg_kernels._knn_candidates import LOWEST, best_of, candidate_of, cut_back, key_and_index, list_live
from drseg_kernels._knn_on_chip import OPTIONS, dot_products, keys_of_products, readable
from drseg_kernels._knn_select import how_to_join, write_blank
from drseg_kernels._knn_sizes import Fused
from drseg_kernels._launch import LARGEST_GRID_Y, on_device_of, power_of_two_from

# Candidates that live at a time, bytes: of 65536 nodes and 75 neighbours a quarter.
WORKSPACE = 128 << 20


# One binary for both searches of a call; none of these is more than a number.
_SIZES = ["first_image", "first_patch", "nodes", "k", "patches", "across", "window_down", "window_across"]


@triton.jit(do_not_specialize=[*_SIZES, "guess", "width"])
def _knn_graph_fwd_kernel_search(
    prior_ptr,
    inverse_norm_ptr,
    table_ptr,
    order_ptr,
    window_ptr,
    candidate_ptr,
    count_ptr,
    threshold_ptr,
    live_ptr,
    listed_ptr,
    first_image,
    first_patch,
    guess,
    nodes,
    width,
    channels,
    k,
    patches,
    across,
    window_down,
    window_across,
    JOIN: tl.constexpr,
    INCLUDE_SELF: tl.constexpr,
    PATCH: tl.constexpr,
    DEPTH: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROOM: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Candidates of a patch of rows among the patches around it (``guess``), or its share of those that it listed.

    A block is a patch of an image. Of each in the workspace: ``candidate`` (PATCH, SEGMENTS, ROOM),
    ``count``, ``threshold`` (PATCH, SEGMENTS), ``live`` (patches,), ``listed`` one number. The guess has the first
    segment, program s of the others segment s + 1.
    """
    block = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    split = tl.program_id(1)
    image = first_image + tl.program_id(2).to(tl.int64)
    here = first_patch + tl.program_id(0).to(tl.int64)
    segment = tl.where(guess != 0, 0, split + 1)
    r = tl.arange(0, PATCH)
    # what is of this patch is few enough for 32 bits
    order_own_ptr = order_ptr + here * PATCH
    count_ptr += block * (PATCH * SEGMENTS)
    threshold_ptr += block * (PATCH * SEGMENTS)
    candidate_ptr += block * (PATCH * SEGMENTS * ROOM)
    live_ptr += block * patches
    at = r * SEGMENTS + segment
    threshold = tl.load(threshold_ptr + r * SEGMENTS, mask=(guess == 0) & (r >= 0), other=LOWEST)
    tl.store(threshold_ptr + at, threshold)
    count = tl.zeros((PATCH,), tl.int32)
    first = image * nodes

    corner = tl.load(window_ptr + 2 * here)
    # from its own patch on: the nearest rows are the best to begin with
    middle = tl.load(window_ptr + 2 * here + 1).to(tl.int64)
    around = window_down.to(tl.int64) * window_across
    visits = tl.where(guess != 0, around, tl.load(listed_ptr + block, mask=guess == 0, other=0))
    for n in range(split, visits, tl.num_programs(1)):
        place = (middle + n) % around
        nearby = corner + place // window_across * across + place % window_across
        other = tl.where(guess != 0, nearby, tl.load(live_ptr + n, mask=guess == 0, other=0).to(tl.int64))
        # nodes are read for every patch, and again after the products: what was made of them would fill the registers
        i = tl.load(order_own_ptr + r)
        j = tl.load(order_ptr + other * PATCH + r)
        product = dot_products(
            prior_ptr, first + tl.maximum(i, 0), i >= 0, first + tl.maximum(j, 0), j >= 0,
            channels, PATCH, PATCH, DEPTH,
        )  # fmt: skip
        i = tl.load(order_own_ptr + r, volatile=True)
        j = tl.load(order_ptr + other * PATCH + r, volatile=True)
        row, column = i >= 0, j >= 0
        i, j = tl.maximum(i, 0), tl.maximum(j, 0)
        inverse_own = tl.load(inverse_norm_ptr + first + i, mask=row, other=0.0)
        key, own_value = keys_of_products(
            product, inverse_norm_ptr, table_ptr, first, i, row, inverse_own, j, column, width, JOIN, INCLUDE_SELF
        )
        more = tl.sum((key >= threshold[:, None]).to(tl.int32), axis=1)
        if tl.max(more, axis=0) > 0:
            if tl.max(count + more, axis=0) > ROOM:
                tl.store(count_ptr + at, count)
                cut_back(
                    candidate_ptr, count_ptr, threshold_ptr, order_own_ptr, segment, k,
                    INCLUDE_SELF, PATCH, SEGMENTS, ROOM, GROUP,
                )  # fmt: skip
                count = tl.load(count_ptr + at)
                threshold = tl.load(threshold_ptr + at)
            passes = key >= threshold[:, None]
            to = (at * ROOM)[:, None] + count[:, None] + tl.cumsum(passes.to(tl.int32), axis=1) - 1
            if INCLUDE_SELF:
                key = tl.where(i[:, None] == j[None, :], ordered_bits(own_value)[:, None], key)
            tl.store(candidate_ptr + to, candidate_of(key, j[None, :]), mask=passes)
            count += tl.sum(passes.to(tl.int32), axis=1)
    tl.store(count_ptr + at, count)


@triton.jit(do_not_specialize=_SIZES)
def _knn_graph_fwd_kernel_narrow(
    inverse_norm_ptr,
    order_ptr,
    window_ptr,
    length_ptr,
    longest_ptr,
    reach_ptr,
    candidate_ptr,
    count_ptr,
    threshold_ptr,
    live_ptr,
    listed_ptr,
    first_image,
    first_patch,
    nodes,
    k,
    patches,
    across,
    window_down,
    window_across,
    JOIN: tl.constexpr,
    INCLUDE_SELF: tl.constexpr,
    PATCH: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROOM: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Thresholds of a patch of rows from what the guess has found, and the patches that may hold anything as good."""
    block = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    image = first_image + tl.program_id(1).to(tl.int64)
    here = first_patch + tl.program_id(0).to(tl.int64)
    r = tl.arange(0, PATCH)
    order_ptr += here * PATCH
    threshold_ptr += block * (PATCH * SEGMENTS)
    cut_back(
        candidate_ptr + block * (PATCH * SEGMENTS * ROOM), count_ptr + block * (PATCH * SEGMENTS), threshold_ptr,
        order_ptr, 0, k,
        INCLUDE_SELF, PATCH, SEGMENTS, ROOM, GROUP,
    )  # fmt: skip
    threshold = tl.load(threshold_ptr + r * SEGMENTS)
    i = tl.load(order_ptr + r)
    row = i >= 0
    i = tl.maximum(i, 0)
    inverse_own = tl.load(inverse_norm_ptr + image * nodes + i, mask=row, other=0.0)
    length = tl.load(length_ptr + image * nodes + i, mask=row, other=0.0)
    # a row that is not finite wants nothing
    listed = list_live(
        live_ptr + block * patches, reach_ptr, longest_ptr + image * patches, length, threshold,
        row & (inverse_own == inverse_own), here.to(tl.int32), tl.load(window_ptr + 2 * here), patches, across,
        window_down, window_across, JOIN, PATCH,
    )  # fmt: skip
    tl.store(listed_ptr + block, listed)


@triton.jit(do_not_specialize=["first_image", "first_patch", "nodes", "k"])
def _knn_graph_fwd_kernel_select(
    inverse_norm_ptr,
    order_ptr,
    candidate_ptr,
    count_ptr,
    index_ptr,
    score_ptr,
    first_image,
    first_patch,
    nodes,
    k,
    INCLUDE_SELF: tl.constexpr,
    PATCH: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROOM: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """``index`` and ``score`` (B, N, k) of ROWS nodes of a patch, from all their candidates; SLOTS >= k."""
    # a comparison of each with each of the row
    AT_A_TIME: tl.constexpr = 16 if SLOTS <= 256 else 4

    # of the rows of all these patches of an image, as they lie in the workspace
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    image = first_image + tl.program_id(1).to(tl.int64)
    i = tl.load(order_ptr + first_patch.to(tl.int64) * PATCH + r)
    row = i >= 0
    i = tl.maximum(i, 0)
    node = image * nodes + i
    inverse_own = tl.load(inverse_norm_ptr + node, mask=row, other=0.0)
    first = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) * ROWS + r) * SEGMENTS
    c = tl.arange(0, SEGMENTS * ROOM)
    count = tl.load(count_ptr + first[:, None] + (c // ROOM)[None, :], mask=row[:, None], other=0)
    held = (c % ROOM)[None, :] < count
    place = (first * ROOM)[:, None] + c[None, :]
    candidate = tl.load(candidate_ptr + place, mask=held, other=0)
    chosen, _ = best_of(candidate, held, i, k, INCLUDE_SELF)
    found = tl.sum(chosen.to(tl.int32), axis=1)
    to = (first * ROOM)[:, None] + tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    # every warp has read the candidates before any of them writes among them, and then the other way about
    tl.debug_barrier()
    tl.store(candidate_ptr + to, candidate, mask=chosen)
    tl.debug_barrier()
    s = tl.arange(0, SLOTS)
    mine = s[None, :] < found[:, None]
    place = (first * ROOM)[:, None] + s[None, :]
    key, index = key_and_index(tl.load(candidate_ptr + place, mask=mine, other=0))
    # the place of a node is the number of those below it
    rank = tl.zeros((ROWS, SLOTS), tl.int32)
    o = tl.arange(0, AT_A_TIME)
    for _ in range(0, k, AT_A_TIME):
        of_row = o[None, :] < found[:, None]
        other = tl.load(candidate_ptr + (first * ROOM)[:, None] + o[None, :], mask=of_row, other=2**31 - 1)
        rank += tl.sum((other.to(tl.int32)[:, None, :] < index[:, :, None]).to(tl.int32), axis=2)
        o += AT_A_TIME
    start = (node * k)[:, None]
    tl.store(index_ptr + start + rank, index, mask=mine)
    tl.store(score_ptr + start + rank, value_of_bits(key), mask=mine)
    empty = row[:, None] & (s < k)[None, :] & (s[None, :] >= found[:, None])
    write_blank(index_ptr, score_ptr, start + s[None, :], empty, i, inverse_own == inverse_own)


def search_constants(k: int, form: str, include_self: bool, chosen: Fused) -> dict[str, Any]:
    """Compile-time arguments of the kernel: what is compiled ahead of time and what is launched are one thing."""
    return {**how_to_join(form, include_self), "DEPTH": chosen.depth, **_places(k, chosen), "GROUP": chosen.group(k)}


def narrow_constants(k: int, form: str, include_self: bool, chosen: Fused) -> dict[str, Any]:
    """Compile-time arguments of the kernel between the two searches."""
    return {**how_to_join(form, include_self), **_places(k, chosen), "GROUP": chosen.group(k)}


def select_constants(k: int, include_self: bool, chosen: Fused) -> dict[str, Any]:
    """Compile-time arguments of the last kernel."""
    slots = max(16, power_of_two_from(k))
    return {"INCLUDE_SELF": include_self, **_places(k, chosen), "ROWS": chosen.select_rows(k), "SLOTS": slots}


def _places(k: int, chosen: Fused) -> dict[str, Any]:
    return {"PATCH": chosen.patch, "SEGMENTS": chosen.segments, "ROOM": chosen.room(k)}


def no_pipeline(num_warps: int) -> dict[str, Any]:
    """What the compiler is told of the kernels that multiply nothing."""
    return {"num_warps": num_warps, "num_stages": 1, **OPTIONS}


def fused(
    prior: Tensor,
    inverse_norm: Tensor,
    table: Tensor,
    form: str,
    include_self: bool,
    chosen: Fused,
    index: Tensor,
    score: Tensor,
) -> None:
    """Fills ``index`` and ``score`` (B, N, k); contiguous arguments as of ``knn_graph``, none of them empty."""
    batch, nodes, k = index.shape
    channels = prior.shape[2]
    prior = readable(prior)
    patches = _patches.cut((table.shape[0], table.shape[1]), chosen.patch)
    order = patches.order(prior.device)
    length = _patches.lengths(prior, inverse_norm)
    longest = patches.longest(length) * _patches.slack(channels)
    search = search_constants(k, form, include_self, chosen)
    select = select_constants(k, include_self, chosen)
    reach = patches.reach(table, search["JOIN"] == "subtract")
    window = patches.window(4 * k, chosen.window)
    windows = patches.windows(window, prior.device)
    # where the patches around it are all there are, the guess is the answer
    more = window[0] * window[1] < patches.count

    rows = chosen.patch * chosen.segments
    # whole images, or some patches of one
    blocks = max(1, WORKSPACE // (8 * rows * (chosen.room(k) + 1) + 4 * patches.count))
    images = min(batch, max(1, blocks // patches.count), LARGEST_GRID_Y)
    some = min(blocks, patches.count)
    blocks = images * some
    candidate = torch.empty(blocks * rows * chosen.room(k), dtype=torch.int64, device=prior.device)
    # nothing is found in a segment that nobody fills
    count, threshold = torch.zeros(2, blocks * rows, dtype=torch.int32, device=prior.device)
    live = torch.empty(blocks * patches.count, dtype=torch.int32, device=prior.device)
    listed = torch.empty(blocks, dtype=torch.int32, device=prior.device)
    candidates = (candidate, count, threshold, live, listed)
    features = (prior, inverse_norm, table, order, windows)
    bounds = (inverse_norm, order, windows, length, longest, reach)
    options = {**chosen.options(channels), **OPTIONS}
    narrow = {**narrow_constants(k, form, include_self, chosen), **no_pipeline(chosen.narrow_warps(k))}
    grid = (patches.count, patches.across, *window)
    with on_device_of(prior):
        for image, patch in itertools.product(range(0, batch, images), range(0, patches.count, some)):
            here, beside = min(some, patches.count - patch), min(images, batch - image)
            first = (image, patch)
            sizes = (nodes, table.shape[1], channels, k, *grid)
            _knn_graph_fwd_kernel_search[(here, 1, beside)](
                *features, *candidates, *first, 1, *sizes, **search, **options
            )
            if more:
                _knn_graph_fwd_kernel_narrow[(here, beside)](*bounds, *candidates, *first, nodes, k, *grid, **narrow)
                _knn_graph_fwd_kernel_search[(here, chosen.splits, beside)](
                    *features, *candidates, *first, 0, *sizes, **search, **options
                )
            _knn_graph_fwd_kernel_select[(here * chosen.patch // select["ROWS"], beside)](
                inverse_norm,
                order,
                candidate,
                count,
                index,
                score,
                *first,
                nodes,
                k,
                **select,
                **no_pipeline(chosen.select_warps(k)),
            )
