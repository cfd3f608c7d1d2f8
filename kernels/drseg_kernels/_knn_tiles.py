# SPDX-License-Identifier: Apache-2.0
"""``knn_graph`` by tiles: the library multiplies a tile of scores, one kernel merges it into the result.

A tile of dot products lives until the next one is made. For each of its rows the kernel applies the inverse norms and
the decay table in float32, drops what does not beat the row's k-th best so far, and selects among the k best so far and
the rest of the tile. Tiles come in ascending order of their columns, so both lists are in ascending index already: the
lowest index wins a tie by its place, and nothing is ever sorted or cut short.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._knn_select import (
    allowed_pairs,
    decay_between,
    how_to_join,
    join_scores,
    keys_of,
    merge_columns,
)
from drseg_kernels._launch import LARGEST_GRID_Y, Configuration, on_device_of

# the fusion of multiply and add is pinned: Triton's default changes between its versions, and with it the last bits
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Merges a tile of dot products (images, rows, columns) into ``index`` and ``score`` (B, N, k).

    FIRST: nothing has been merged into these rows yet. ROWS of the tile per program; COLUMNS and SLOTS are powers of
    two, at least ``columns`` and ``k``.
    """
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
    decay = decay_between(table_ptr, i, j, width, both)
    value = join_scores(product * inverse_own[:, None] * inverse[None, :], decay, JOIN)
    own = i[:, None] == j[None, :]
    allowed = allowed_pairs(both, inverse_own, inverse, own, INCLUDE_SELF)
    key = keys_of(value, allowed, own, INCLUDE_SELF)
    finite = inverse_own == inverse_own
    merge_columns(index_ptr, score_ptr, key, value, row, node, i, j, finite, k, INCLUDE_SELF, FIRST, SLOTS)


def constants(k: int, form: str, include_self: bool, first: bool, chosen: Configuration) -> dict[str, Any]:
    """Compile-time arguments of the kernel: what is compiled ahead of time and what is launched are one thing."""
    return {
        **how_to_join(form, include_self),
        "FIRST": first,
        "ROWS": chosen.rows_per_program,
        "COLUMNS": chosen.columns,
        "SLOTS": max(16, triton.next_power_of_2(k)),
    }


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Dot products of the rows of (G, R, D) and (G, T, D) in float32, into (G, R, T)."""
    if left.dtype == torch.float32 and len(left) == 1:
        # the library has faster ways for one product than for a batch of one
        torch.mm(left[0], right[0].mT, out=out[0])
    elif left.dtype == torch.float32:
        torch.bmm(left, right.mT, out=out)
    elif left.is_cuda:
        torch.bmm(left, right.mT, out_dtype=torch.float32, out=out)
    else:
        # the CPU has no product that widens; half-precision features are exact in float32
        torch.bmm(left.float(), right.mT.float(), out=out)


def by_tiles(
    prior: Tensor,
    inverse_norm: Tensor,
    table: Tensor,
    form: str,
    include_self: bool,
    chosen: Configuration,
    index: Tensor,
    score: Tensor,
) -> None:
    """Fills ``index`` and ``score`` (B, N, k); contiguous arguments as of ``knn_graph``, none of them empty.

    Float32 products follow torch's precision setting: the caller turns TF32 off where the result must be exact.
    """
    batch, nodes, k = index.shape
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
