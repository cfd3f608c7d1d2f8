# SPDX-License-Identifier: Apache-2.0
"""The same choice of neighbours from products of rounded rows: float16, which a tensor core multiplies.

The rounding error of a score is bounded. With ``r`` the length of a row's rounding error over the row's own length,

    | <x_i, x_j> - <h_i, h_j> |  <=  |x_i - h_i| |x_j| + |h_i| |x_j - h_j|  <=  |x_i| |x_j| (r_i + r_j + r_i r_j),

So a cosine, and a score from which decay is subtracted, is off by at most ``e = r_i + max_j r_j (1 + r_i) + slack``. In
a row of zeros it is exact. (Forms where decay is a factor have float32 products: their scores are small and close
together, and the bound is not.)

Take any border from the k-th best of the rounded scores down to the next. The exact scores of the k that reach it are
above ``border - e``. So a rounded score more than ``2 e`` below the border is not chosen. The exact scores of the
others are below ``border + e``. So a rounded score more than ``2 e`` above the border is chosen. The scores between,
two or three in a row, are computed once more from the float32 rows. Ties are among those, so the lowest index wins
them.

``slack`` is for the sums. A tensor core adds 16 products to a sum at a time. It brings all 17 to the exponent of the
largest, and cuts off what does not fit in 24 bits. Each of the 17 loses less than ``2**-23`` of the largest, which is
at most ``|h_i| |h_j|``: over D channels ``(17 / 16) D 2**-23``. Twice that is taken, and 8 more for the few roundings
behind the product: ``slack = (D + 8) 2**-22``. The rounding of the decay's subtraction goes with the k-th score.

A large image has lists of candidates instead (``knn_live.py``): all that may be among a row's k best. A row with too
many of them has no list, and a kernel computes the whole row in float32. That happens if all rows of a prior are alike.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._blocks import ordered_bits
from drseg_kernels._launch import LARGEST_GRID_Y, Selection, ceil_div, on_device_of
from drseg_kernels._products import multiply
from drseg_kernels._selection import (
    FORCED,
    JOIN_OF,
    NONE,
    OPTIONS,
    allowed_pairs,
    decay_between,
    head_and_tail,
    join_scores,
    keys_of,
    kth_key,
    merge_columns,
    scored_columns,
)

# behind every index
_FAR = tl.constexpr(2**31 - 1)
# entries of a list, at most: a power of two
_LONGEST = tl.constexpr(256)
# of the k-th score, for the rounding of what is subtracted there
_OF_SCORE = tl.constexpr(2.0**-21)


@triton.jit
def score_at(key):
    """The float32 of ``ordered_bits``; NaN of a key that is no candidate's."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def margin_of(border, own_loss, loss, inverse_own, slack):
    """How far from a border (R,) a rounded score of these rows is certain; ``loss`` is the largest of other rows."""
    off = own_loss + loss * (1.0 + own_loss) + slack
    return tl.where(inverse_own == 0.0, 0.0, 2.0 * off + tl.abs(border) * _OF_SCORE)


@triton.jit
def sorted_out(key, value, border, margin):
    """Keys without those that are certainly not chosen, the certain ones forced; and the rest between (R, C)."""
    regular = (key > NONE) & (key < FORCED)
    above, below = value > (border + margin)[:, None], value < (border - margin)[:, None]
    key = tl.where(regular & below, NONE, tl.where(regular & above, FORCED, key))
    # a border that is no number has nothing above or below it, and nothing beside it
    return key, regular & (tl.abs(value - border[:, None]) <= margin[:, None])


@triton.jit
def exact_scores(
    prior_ptr,
    inverse_norm_ptr,
    table_ptr,
    node,
    sample,
    i,
    j,
    has,
    inverse_own,
    width,
    channels,
    JOIN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores (R,) of the pairs (i, j), where there is one, from the float32 rows."""
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, channels, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        both = has[:, None] & (d < channels)[None, :]
        own = tl.load(prior_ptr + (node * channels)[:, None] + d[None, :], mask=both, other=0.0).to(tl.float32)
        other = tl.load(prior_ptr + ((sample + j) * channels)[:, None] + d[None, :], mask=both, other=0.0)
        total += own * other.to(tl.float32)
    inverse = tl.load(inverse_norm_ptr + sample + j, mask=has, other=0.0)
    x_own, x = i % width, j % width
    cell = tl.abs((i - x_own) - (j - x)) + tl.abs(x_own - x)
    decay = tl.load(table_ptr + cell, mask=has, other=0.0)
    return join_scores(tl.sum(total, axis=1) * inverse_own * inverse, decay, JOIN)


@triton.jit(do_not_specialize=["first_image", "begin", "wanted", "stride", "nodes", "width", "k"])
def _knn_graph_fwd_kernel_rounded(
    product_ptr,
    list_ptr,
    prior_ptr,
    inverse_norm_ptr,
    residual_ptr,
    loss_ptr,
    table_ptr,
    index_ptr,
    score_ptr,
    length_ptr,
    count_ptr,
    first_image,
    begin,
    wanted,
    stride,
    nodes,
    width,
    k,
    channels,
    slack,
    JOIN: tl.constexpr,
    INCLUDE_SELF: tl.constexpr,
    LISTED: tl.constexpr,
    COUNT: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``index`` and ``score`` (B, N, k) of BLOCK_M rows from products (images, N, N) of rounded rows.

    LISTED: (B, n, k), of the n rows ``wanted`` from ``begin`` on. Candidates of a row, at most BLOCK_N, are the first
    ``length`` (B, n) of ``list`` and ``product`` (B, n, ``stride``), their indices and rounded scores; -1 is of a row
    without a list. ``loss`` (B,) is the largest residual of an image. COUNT: how many scores of a row were computed
    again, in ``count`` (B, n).
    """
    image = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = r < nodes
    place = (image + first_image) * nodes + r
    if LISTED:
        row = r < wanted
        place = (image + first_image) * wanted + r
        r += begin
    i = r.to(tl.int32)
    tile_row = image * nodes + r
    image += first_image
    sample = image * nodes
    node = sample + r
    inverse_own = tl.load(inverse_norm_ptr + node, mask=row, other=0.0)
    own_loss = tl.load(residual_ptr + node, mask=row, other=0.0)
    c = tl.arange(0, BLOCK_N)
    if LISTED:
        listed = c[None, :] < tl.load(length_ptr + place, mask=row, other=0)[:, None]
        start = (place * stride)[:, None]
        # in ascending index, each with where it lies; both fit into an integer
        both = tl.load(list_ptr + start + c[None, :], mask=listed, other=0) * _LONGEST + c[None, :]
        both = tl.sort(tl.where(listed, both, _FAR), dim=1)
        j = both // _LONGEST
        value = tl.load(product_ptr + start + both % _LONGEST, mask=listed, other=-float("inf"))
        key = keys_of(value, listed, i[:, None] == j, INCLUDE_SELF)
        loss = tl.load(loss_ptr + image)
    else:
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
            0,
            nodes,
            width,
            JOIN,
            INCLUDE_SELF,
        )
        loss = tl.max(tl.load(residual_ptr + sample + c, mask=c < nodes, other=0.0), axis=0)
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
            0,
            nodes,
            width,
            JOIN,
            INCLUDE_SELF,
        )
        loss = tl.maximum(loss, tl.max(tl.load(residual_ptr + sample + c, mask=c < nodes, other=0.0), axis=0))

    border = score_at(kth_key(key, head_key, tl.full(row.shape, NONE, tl.int32), k, TAIL > 0))
    margin = margin_of(border, own_loss, loss, inverse_own, slack)
    key, between = sorted_out(key, value, border, margin)
    # the scores of a row of zeros are exact
    between = between & (inverse_own != 0.0)[:, None]
    remaining = tl.sum((key > NONE).to(tl.int32), axis=1)
    if TAIL > 0:
        head_key, head_between = sorted_out(head_key, head_value, border, margin)
        head_between = head_between & (inverse_own != 0.0)[:, None]
        remaining += tl.sum((head_key > NONE).to(tl.int32), axis=1)
    # where there is room for all that remain, nothing is left to decide
    between = between & (remaining > k)[:, None]
    again = tl.sum(between.to(tl.int32), axis=1)
    if TAIL > 0:
        head_between = head_between & (remaining > k)[:, None]
        again += tl.sum(head_between.to(tl.int32), axis=1)
    if COUNT:
        tl.store(count_ptr + place, again, mask=row)

    # every row takes its next one
    for _ in range(0, tl.max(again, axis=0)):
        at = tl.min(tl.where(between, j, _FAR), axis=1)
        if TAIL > 0:
            at = tl.minimum(at, tl.min(tl.where(head_between, head_j, _FAR), axis=1))
        has = at < _FAR
        exact = exact_scores(
            prior_ptr,
            inverse_norm_ptr,
            table_ptr,
            node,
            sample,
            i,
            tl.where(has, at, 0),
            has,
            inverse_own,
            width,
            channels,
            JOIN,
            BLOCK_M,
            BLOCK_D,
        )
        this = between & (j == at[:, None])
        key = tl.where(this, ordered_bits(exact)[:, None], key)
        value = tl.where(this, exact[:, None], value)
        between = between & (j != at[:, None])
        if TAIL > 0:
            this = head_between & (head_j == at[:, None])
            head_key = tl.where(this, ordered_bits(exact)[:, None], head_key)
            head_value = tl.where(this, exact[:, None], head_value)
            head_between = head_between & (head_j != at[:, None])

    if TAIL == 0:
        head_key, head_value, head_j = key, value, j
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
        place,
        i,
        inverse_own == inverse_own,
        k,
        INCLUDE_SELF,
        True,
        TAIL,
        BLOCK_K,
    )


@triton.jit
def whole_row_columns(
    prior_ptr,
    inverse_norm_ptr,
    table_ptr,
    node,
    sample,
    i,
    inverse_own,
    first,
    nodes,
    width,
    channels,
    JOIN: tl.constexpr,
    INCLUDE_SELF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys and scores (1, BLOCK_N) of a row's columns from ``first`` on, from the float32 rows."""
    j = first + tl.arange(0, BLOCK_N)
    column = j < nodes
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, channels, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        channel = d < channels
        own = tl.load(prior_ptr + (node * channels)[:, None] + d[None, :], mask=channel[None, :], other=0.0)
        at = ((sample + j) * channels)[:, None] + d[None, :]
        other = tl.load(prior_ptr + at, mask=column[:, None] & channel[None, :], other=0.0)
        total += own.to(tl.float32) * other.to(tl.float32)
    inverse = tl.load(inverse_norm_ptr + sample + j, mask=column, other=0.0)
    both = (inverse_own == inverse_own)[:, None] & column[None, :]
    decay = decay_between(table_ptr, i, j, width, both)
    value = join_scores(tl.sum(total, axis=1)[None, :] * inverse_own[:, None] * inverse[None, :], decay, JOIN)
    own_column = i[:, None] == j[None, :]
    return (
        keys_of(value, allowed_pairs(both, inverse_own, inverse, own_column, INCLUDE_SELF), own_column, INCLUDE_SELF),
        value,
        j[None, :],
    )


@triton.jit(do_not_specialize=["begin", "nodes", "width", "k"])
def _knn_graph_fwd_kernel_whole_rows(
    prior_ptr,
    inverse_norm_ptr,
    table_ptr,
    length_ptr,
    index_ptr,
    score_ptr,
    begin,
    nodes,
    width,
    k,
    channels,
    JOIN: tl.constexpr,
    INCLUDE_SELF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``index`` and ``score`` (B, n, k) of one row of the n from ``begin`` on in float32, if its ``length`` (B, n) is
    negative."""
    one = tl.zeros((1,), tl.int32)
    i = begin + tl.program_id(0) + one
    image = tl.program_id(1).to(tl.int64)
    sample = image * nodes
    node = sample + i
    place = image * tl.num_programs(0) + tl.program_id(0) + one
    if tl.load(length_ptr + image * tl.num_programs(0) + tl.program_id(0)) < 0:
        inverse_own = tl.load(inverse_norm_ptr + node)
        for first in range(0, nodes, BLOCK_N):
            key, value, j = whole_row_columns(
                prior_ptr,
                inverse_norm_ptr,
                table_ptr,
                node,
                sample,
                i,
                inverse_own,
                first,
                nodes,
                width,
                channels,
                JOIN,
                INCLUDE_SELF,
                BLOCK_N,
                BLOCK_D,
            )
            if first == 0:
                merge_columns(
                    index_ptr,
                    score_ptr,
                    key,
                    value,
                    j,
                    key,
                    value,
                    j,
                    one == 0,
                    place,
                    i,
                    inverse_own == inverse_own,
                    k,
                    INCLUDE_SELF,
                    True,
                    0,
                    BLOCK_K,
                )
            else:
                # what the columns before have written is read
                tl.debug_barrier()
                merge_columns(
                    index_ptr,
                    score_ptr,
                    key,
                    value,
                    j,
                    key,
                    value,
                    j,
                    one == 0,
                    place,
                    i,
                    inverse_own == inverse_own,
                    k,
                    INCLUDE_SELF,
                    False,
                    0,
                    BLOCK_K,
                )


def constants(nodes: int, k: int, form: str, include_self: bool, counts: bool, chosen: Selection) -> dict[str, Any]:
    """Compile-time arguments and options: what is compiled ahead of time and what is launched are one thing."""
    head, tail = head_and_tail(nodes, chosen)
    # no more than eight columns of a thread, whose keys and scores stay in registers
    warps = max(chosen.num_warps, head // 256)
    return {
        "JOIN": JOIN_OF[form],
        "INCLUDE_SELF": include_self,
        "LISTED": False,
        "COUNT": counts,
        "TAIL": tail,
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": head,
        "BLOCK_K": max(16, triton.next_power_of_2(k)),
        "BLOCK_D": 256,
        "num_warps": warps,
        # left alone, the compiler keeps to 64 there, and spills
        **({"maxnreg": 128} if warps > 2 else {}),
    }


def slack_of(channels: int) -> float:
    """What sums over so many channels may be off by, of a cosine."""
    return (channels + 8) * 2.0**-22


def knn_rounded(
    prior: Tensor,
    inverse_norm: Tensor,
    table: Tensor,
    form: str,
    include_self: bool,
    rounded: Tensor,
    residual: Tensor,
    chosen: Selection,
    index: Tensor,
    score: Tensor,
    counts: Tensor | None,
) -> None:
    """Fills ``index`` and ``score`` (B, N, k); arguments as in ``knn_graph``, contiguous, N at most a tile wide."""
    batch, nodes, channels = prior.shape
    k = index.shape[-1]
    # images share a launch where they fit; the library may sum in another order for another number of images
    images = 1 if torch.are_deterministic_algorithms_enabled() else max(1, chosen.tile_bytes // (4 * nodes * nodes))
    images = min(batch, images, LARGEST_GRID_Y)
    buffer = torch.empty(images, nodes, nodes, dtype=torch.float32, device=prior.device)
    with on_device_of(prior):
        for image in range(0, batch, images):
            part = rounded[image : image + images]
            product = buffer[: len(part)]
            multiply(part, part, product)
            _knn_graph_fwd_kernel_rounded[(ceil_div(nodes, chosen.block_m), len(part))](
                product,
                index,
                prior,
                inverse_norm,
                residual,
                residual,
                table,
                index,
                score,
                index,
                index if counts is None else counts,
                image,
                0,
                nodes,
                0,
                nodes,
                table.shape[1],
                k,
                channels,
                slack_of(channels),
                **constants(nodes, k, form, include_self, counts is not None, chosen),
                **OPTIONS,
            )


# Least entries of a list beyond k, as many as the most scores ever found around a border.
SPARE = 16


def limit_of(k: int) -> int:
    """How many candidates of a row a list may hold for the choice of k."""
    return max(32, triton.next_power_of_2(k + SPARE))


def list_constants(k: int, form: str, include_self: bool, counts: bool, rows: int = 1) -> dict[str, Any]:
    """``constants`` of the choice from lists. A warp has one of the ``rows``; an interpreted program takes more."""
    return {
        "JOIN": JOIN_OF[form],
        "INCLUDE_SELF": include_self,
        "LISTED": True,
        "COUNT": counts,
        "TAIL": 0,
        "BLOCK_M": rows,
        "BLOCK_N": limit_of(k),
        "BLOCK_K": max(16, triton.next_power_of_2(k)),
        "BLOCK_D": 128,
        "num_warps": 1,
    }


def whole_rows(k: int, form: str, include_self: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and options of the kernel for rows that are computed as a whole."""
    sizes = {"BLOCK_N": 64, "BLOCK_K": max(16, triton.next_power_of_2(k)), "BLOCK_D": 32}
    return {"JOIN": JOIN_OF[form], "INCLUDE_SELF": include_self, **sizes}, {"num_warps": 4, **OPTIONS}


def knn_from_lists(
    prior: Tensor,
    inverse_norm: Tensor,
    table: Tensor,
    form: str,
    include_self: bool,
    residual: Tensor,
    loss: Tensor,
    listed: tuple[Tensor, Tensor, Tensor],
    begin: int,
    index: Tensor,
    score: Tensor,
    counts: Tensor | None,
) -> None:
    """Fills ``index`` and ``score`` (B, n, k) of the n nodes from ``begin`` on, B at most as many as a grid is long.

    ``listed``: their candidates and rounded scores (B, n, room), and how many there are (B, n), as ``knn_live.py`` has
    them. ``loss``: (B,) the largest residual of an image. The other arguments are as in ``knn_rounded``.
    """
    batch, nodes, channels = prior.shape
    _, wanted, k = index.shape
    candidates, rough, length = listed
    whole, options = whole_rows(k, form, include_self)
    rows = 1 if prior.is_cuda else 64
    _knn_graph_fwd_kernel_rounded[(ceil_div(wanted, rows), batch)](
        rough,
        candidates,
        prior,
        inverse_norm,
        residual,
        loss,
        table,
        index,
        score,
        length,
        index if counts is None else counts,
        0,
        begin,
        wanted,
        rough.shape[-1],
        nodes,
        table.shape[1],
        k,
        channels,
        slack_of(channels),
        **list_constants(k, form, include_self, counts is not None, rows),
        **OPTIONS,
    )
    _knn_graph_fwd_kernel_whole_rows[(wanted, batch)](
        prior,
        inverse_norm,
        table,
        length,
        index,
        score,
        begin,
        nodes,
        table.shape[1],
        k,
        channels,
        **whole,
        **options,
    )
