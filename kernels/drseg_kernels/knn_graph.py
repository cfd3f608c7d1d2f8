# SPDX-License-Identifier: Apache-2.0
"""Neighbours of the highest affinity: tiles of dot products from the library, merged into lists of the best.

If only the choice of float32 rows matters, rows in float16 give the same: ``knn_rounded.py`` for small images,
``knn_live.py`` for large ones. Otherwise the library multiplies a tile of rows by columns. Then one kernel per tile
turns the products into scores with the decay table. It drops scores that do not beat the row's k-th best so far, and
selects among the k best so far and the rest of the tile. Tiles come in ascending order of their columns, so both lists
are in ascending index already. The lowest index wins a tie by its place. Nothing is ever sorted or cut short.

A tile whose width is no power of two is cut in two parts, which are selected from at once. So 576 columns are 512 and
64, not 1024.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._launch import LARGEST_GRID_Y, Live, Selection, ceil_div, on_device_of, sizes_of
from drseg_kernels._products import multiply, products_are_wide
from drseg_kernels._selection import JOIN_OF, OPTIONS, head_and_tail, merge_columns, scored_columns
from drseg_kernels.knn_live import knn_live, serves
from drseg_kernels.knn_rounded import knn_rounded


# one binary serves every size: knowing that a size is a multiple of 16 would widen the loads of the products, and
# lose as much by moving them between the registers of threads afterwards
@triton.jit(
    do_not_specialize=[
        "first_image",
        "first_row",
        "first_column",
        "rows",
        "columns",
        "nodes",
        "begin",
        "wanted",
        "width",
        "k",
    ],
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
    begin,
    wanted,
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
    """Merges a tile of dot products (images, rows, columns) into ``index`` and ``score`` (B, wanted, k).

    These are ``wanted`` nodes from ``begin`` on. FIRST: nothing has been merged into these rows yet. BLOCK_M rows of
    the tile per program; BLOCK_N and TAIL together are at least ``columns``, BLOCK_K at least ``k``; all are powers of
    two, but for a TAIL of 0.
    """
    image = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = r < rows
    i = (first_row + r).to(tl.int32)
    tile_row = image * rows + r
    image += first_image
    sample = image * nodes
    inverse_own = tl.load(inverse_norm_ptr + sample + first_row + r, mask=row, other=0.0)
    place = image * wanted + first_row - begin + r
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
        place,
        i,
        inverse_own == inverse_own,
        k,
        INCLUDE_SELF,
        FIRST,
        TAIL,
        BLOCK_K,
    )


def constants(nodes: int, k: int, form: str, include_self: bool, first: bool, chosen: Selection) -> dict[str, Any]:
    """Compile-time arguments of the kernel: what is compiled ahead of time and what is launched are one thing."""
    # a list beside the new columns leaves no room for a third
    head, tail = head_and_tail(nodes, chosen) if nodes <= chosen.block_n else (chosen.block_n, 0)
    return {
        "JOIN": JOIN_OF[form],
        "INCLUDE_SELF": include_self,
        "FIRST": first,
        "TAIL": tail,
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": head,
        "BLOCK_K": max(16, triton.next_power_of_2(k)),
    }


def _merge_tiles(
    rows: Tensor,
    inverse_norm: Tensor,
    table: Tensor,
    form: str,
    include_self: bool,
    chosen: Selection,
    index: Tensor,
    score: Tensor,
    begin: int = 0,
) -> None:
    """Fills ``index`` and ``score`` (B, n, k) of the n nodes from ``begin`` on from products of ``rows`` (B, N, D).

    Other arguments are as in ``knn_graph``.
    """
    batch, nodes, _ = rows.shape
    _, wanted, k = index.shape
    tile_columns = min(chosen.block_n, nodes)
    fitting_rows = chosen.tile_bytes // (4 * tile_columns)
    tile_rows = min(fitting_rows, wanted)
    # images share a tile where they fit; the library may sum in another order for another number of images
    images = 1 if torch.are_deterministic_algorithms_enabled() else max(1, fitting_rows // wanted)
    images = min(batch, images, LARGEST_GRID_Y)
    buffer = torch.empty(images * tile_rows * tile_columns, dtype=torch.float32, device=rows.device)
    with on_device_of(rows):
        for image in range(0, batch, images):
            part = rows[image : image + images]
            for row in range(begin, begin + wanted, tile_rows):
                left = part[:, row : min(row + tile_rows, begin + wanted)]
                for column in range(0, nodes, tile_columns):
                    right = part[:, column : column + tile_columns]
                    shape = (left.shape[0], left.shape[1], right.shape[1])
                    tile = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
                    multiply(left, right, tile)
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
                        begin,
                        wanted,
                        table.shape[1],
                        k,
                        **constants(nodes, k, form, include_self, column == 0, chosen),
                        num_warps=chosen.num_warps,
                        **OPTIONS,
                    )


def knn_graph(
    prior: Tensor,
    inverse_norm: Tensor,
    table: Tensor,
    k: int,
    form: str,
    include_self: bool,
    rounded: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    rows: tuple[int, int] | None = None,
    sizes: Selection | None = None,
    live: Live | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Neighbours and scores of prepared features.

    Args:
        prior: (B, N, D) float32, float16 or bfloat16.
        inverse_norm: (B, N) float32, NaN for a node that no other may choose. Times the length of a row it is at most
            one, but for rounding: no cosine is larger.
        table: (h, w) float32 decay table, h * w = N, NaN where a pair is no candidate; its first entry is a number.
        k: neighbours per node.
        form: ``additive``, ``gauss`` (both subtract the table), ``multiplicative`` or ``product``.
        include_self: the node itself is always, or never, among its neighbours.
        rounded, residual: (B, N, D) float16 and (B, N) float32 of ``prepare_prior``, or None. With them the choice is
            the same, and scores may be off by as much as the rounding makes of them (``knn_rounded.py``).
        rows: first and end of the n nodes whose neighbours are wanted; by default all. A small image goes without
            ``rounded`` then.
        sizes: of tiles and programs; by default those of the architecture's table, then a rule.
        live: of the programs for more nodes than a tile of ``sizes`` has columns, likewise.
        counts: (B, n) int32, where it is written how many scores of a row were computed again; None counts nothing.

    Returns:
        ``index`` (B, n, k) int32, ascending in each row, and ``score`` (B, n, k) float32. Slots without a candidate
        come last and hold the row's own index with score ``-inf``, or NaN in a row that is not finite.
    """
    batch, nodes, channels = prior.shape
    begin, end = rows or (0, nodes)
    index = torch.empty(batch, end - begin, k, dtype=torch.int32, device=prior.device)
    score = torch.empty(batch, end - begin, k, dtype=torch.float32, device=prior.device)
    if index.numel() == 0:
        return index, score
    chosen = sizes or sizes_of("knn_graph", prior.device, prior.dtype, nodes, k)
    prior, inverse_norm, table = prior.contiguous(), inverse_norm.contiguous(), table.contiguous()
    given = (prior, inverse_norm, table, form, include_self)
    if nodes > chosen.block_n and prior.dtype != torch.float32:
        # half precision multiplies itself without a loss
        rounded, residual = prior, torch.zeros_like(inverse_norm)
    if rounded is None or residual is None or JOIN_OF[form] != "subtract":
        pass
    elif nodes > chosen.block_n:
        live = live or sizes_of("knn_live", prior.device, prior.dtype, nodes, k)
        if serves(nodes, channels, k, (table.shape[0], table.shape[1]), live):
            short = (rounded.contiguous(), residual.contiguous())
            knn_live(*given, *short, live, begin, index, score, counts)
            return index, score
    elif rows is None and products_are_wide():
        short = (rounded.contiguous(), residual.contiguous())
        knn_rounded(*given, *short, chosen, index, score, counts)
        return index, score
    _merge_tiles(*given, chosen, index, score, begin)
    return index, score
