# SPDX-License-Identifier: Apache-2.0
"""Neighbours of the highest affinity: the library multiplies a tile of scores, one kernel merges it into the result.

A tile of dot products stays in the L2 cache. For each of its rows the kernel applies the inverse norms and the decay
table in float32, drops what does not beat the row's k-th best so far, and selects among the k best so far and the
rest of the tile. Tiles come in ascending order of their columns, so both lists are in ascending index already: the
lowest index wins a tie by its place, and nothing is ever sorted or cut short.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._blocks import ordered_bits
from drseg_kernels._launch import Configuration, configuration_of, on_device_of

# gauss differs from additive in the table only
_JOIN = {"additive": "subtract", "gauss": "subtract", "multiplicative": "clamped", "product": "product"}

# the fusion of multiply and add is pinned: Triton's default changes between its versions, and with it the last bits
OPTIONS = {"enable_fp_fusion": False}

# only the first axis of a CUDA grid is longer
LARGEST_GRID_Y = 65_535


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Merges a tile of dot products (images, rows, columns) into ``index`` and ``score`` (B, N, k).

    FIRST: nothing has been merged into these rows yet. ROWS of the tile per program; COLUMNS and SLOTS are powers of
    two, at least ``columns`` and ``k``.
    """
    NONE: tl.constexpr = -(2**31)
    FORCED: tl.constexpr = 2**31 - 1

    image = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = r < rows
    i = (first_row + r).to(tl.int32)
    tile_row = image * rows + r
    image += first_image
    node = image * nodes + first_row + r
    c = tl.arange(0, COLUMNS)
    column = c < columns
    j = first_column + c

    inverse_own = tl.load(inverse_norm_ptr + node, mask=row, other=0.0)
    inverse = tl.load(inverse_norm_ptr + image * nodes + j, mask=column, other=0.0)
    both = row[:, None] & column[None, :]
    product = tl.load(product_ptr + (tile_row * columns)[:, None] + c[None, :], mask=both, other=0.0)

    # |dy| * width + |dx| without a product: the start of a row of the grid is the index less the column
    x_own, x = i % width, j % width
    cell = tl.abs((i - x_own)[:, None] - (j - x)[None, :]) + tl.abs(x_own[:, None] - x[None, :])
    decay = tl.load(table_ptr + cell, mask=both, other=0.0)
    value = product * inverse_own[:, None] * inverse[None, :]
    if JOIN == "subtract":
        value = value - decay
    else:
        if JOIN == "clamped":
            value = tl.maximum(value, 0.0)
        value = value * decay

    # NaN differs from itself: a non-finite node is chosen by no row and chooses nothing
    finite = inverse_own == inverse_own
    own = i[:, None] == j[None, :]
    allowed = both & finite[:, None] & (inverse == inverse)[None, :]
    if not INCLUDE_SELF:
        allowed = allowed & (own == 0)
    key = tl.where(allowed, ordered_bits(value), NONE)
    if INCLUDE_SELF:
        key = tl.where(allowed & own, FORCED, key)

    s = tl.arange(0, SLOTS)
    slot = row[:, None] & (s < k)[None, :]
    place = (node * k)[:, None] + s[None, :]
    if FIRST:
        floor = tl.full((ROWS,), NONE, tl.int32)
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
        # the highest key that at least k candidates reach; all candidates where there are fewer
        candidates = tl.sum((key > NONE).to(tl.int32), axis=1)
        bottom = tl.min(tl.where(key > NONE, key, FORCED), axis=1)
        top = tl.max(tl.where(key < FORCED, key, NONE), axis=1)
        if not FIRST:
            candidates += tl.sum((kept_key > NONE).to(tl.int32), axis=1)
            bottom = tl.minimum(bottom, tl.min(tl.where(kept_key > NONE, kept_key, FORCED), axis=1))
            top = tl.maximum(top, tl.max(tl.where(kept_key < FORCED, kept_key, NONE), axis=1))
        low = tl.where(candidates > k, tl.maximum(floor, bottom), NONE + 1)
        high = tl.where(candidates > k, tl.maximum(top, low), low)
        while tl.max((low < high).to(tl.int32), axis=0) > 0:
            # the mean, rounded up; the sum of the two may leave the range of int32
            guess = (low | high) - ((low ^ high) >> 1)
            reach = tl.sum((key >= guess[:, None]).to(tl.int32), axis=1)
            if not FIRST:
                reach += tl.sum((kept_key >= guess[:, None]).to(tl.int32), axis=1)
            high = tl.where(reach > k, high, tl.where(reach == k, guess, tl.maximum(guess - 1, low)))
            low = tl.where(reach >= k, guess, low)
        threshold = low[:, None]

        above = key > threshold
        tied = key == threshold
        room = k - tl.sum(above.to(tl.int32), axis=1)
        before = tl.zeros((ROWS,), tl.int32)
        # every warp has read the old lists before any of them writes into the same rows
        tl.debug_barrier()
        if not FIRST:
            kept_above = kept_key > threshold
            kept_tied = kept_key == threshold
            room -= tl.sum(kept_above.to(tl.int32), axis=1)
            stays = kept_above | (kept_tied & (tl.cumsum(kept_tied.to(tl.int32), axis=1) <= room[:, None]))
            to = place - s[None, :] + tl.cumsum(stays.to(tl.int32), axis=1) - 1
            tl.store(index_ptr + to, kept_index, mask=stays)
            tl.store(score_ptr + to, kept_value, mask=stays)
            before = tl.sum(stays.to(tl.int32), axis=1)
            room -= tl.sum(kept_tied.to(tl.int32), axis=1)
        chosen = above | (tied & (tl.cumsum(tied.to(tl.int32), axis=1) <= room[:, None]))
        to = (node * k)[:, None] + before[:, None] + tl.cumsum(chosen.to(tl.int32), axis=1) - 1
        tl.store(index_ptr + to, tl.broadcast_to(j[None, :], (ROWS, COLUMNS)), mask=chosen)
        tl.store(score_ptr + to, value, mask=chosen)
        found = before + tl.sum(chosen.to(tl.int32), axis=1)
        empty = slot & (s[None, :] >= found[:, None])
        blank = tl.where(finite, -float("inf"), float("nan"))
        tl.store(index_ptr + place, tl.broadcast_to(i[:, None], (ROWS, SLOTS)), mask=empty)
        tl.store(score_ptr + place, tl.broadcast_to(blank[:, None], (ROWS, SLOTS)), mask=empty)


def constants(k: int, form: str, include_self: bool, first: bool, chosen: Configuration) -> dict[str, Any]:
    """Compile-time arguments of the kernel: what is compiled ahead of time and what is launched are one thing."""
    return {
        "JOIN": _JOIN[form],
        "INCLUDE_SELF": include_self,
        "FIRST": first,
        "ROWS": chosen.rows_per_program,
        "COLUMNS": chosen.columns,
        "SLOTS": max(16, triton.next_power_of_2(k)),
    }


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Dot products of the rows of (G, R, D) and (G, T, D) in float32, into (G, R, T)."""
    if left.dtype == torch.float32:
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
    configuration: Configuration | None = None,
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
        configuration: sizes of tiles and programs; by default those of the device's table, then a rule.

    Returns:
        ``index`` (B, N, k) int32, ascending in each row, and ``score`` (B, N, k) float32. Slots without a candidate
        come last and hold the row's own index with score ``-inf``, or NaN in a row that is not finite.
    """
    batch, nodes, _ = prior.shape
    index = torch.empty(batch, nodes, k, dtype=torch.int32, device=prior.device)
    score = torch.empty(batch, nodes, k, dtype=torch.float32, device=prior.device)
    if index.numel() == 0:
        return index, score
    chosen = configuration or configuration_of("knn_graph", prior.device, nodes, k)
    prior, inverse_norm, table = prior.contiguous(), inverse_norm.contiguous(), table.contiguous()
    tile_columns = min(chosen.columns, nodes)
    fitting_rows = chosen.tile_bytes // (4 * tile_columns)
    tile_rows = min(fitting_rows, nodes)
    # images share a tile where they fit; the library may sum in another order for another number of images
    images = 1 if torch.are_deterministic_algorithms_enabled() else max(1, fitting_rows // nodes)
    images = min(batch, images, LARGEST_GRID_Y)
    buffer = torch.empty(images * tile_rows * tile_columns, dtype=torch.float32, device=prior.device)
    with on_device_of(prior):
        for image in range(0, batch, images):
            features = prior[image : image + images]
            for row in range(0, nodes, tile_rows):
                left = features[:, row : row + tile_rows]
                for column in range(0, nodes, tile_columns):
                    right = features[:, column : column + tile_columns]
                    shape = (left.shape[0], left.shape[1], right.shape[1])
                    tile = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
                    _multiply(left, right, tile)
                    programs = triton.cdiv(shape[1], chosen.rows_per_program)
                    _knn_graph_fwd_kernel_merge[(programs, shape[0])](
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
                        **constants(k, form, include_self, column == 0, chosen),
                        num_warps=chosen.num_warps,
                        **OPTIONS,
                    )
    return index, score
