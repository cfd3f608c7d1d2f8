# SPDX-License-Identifier: Apache-2.0
"""``knn_graph`` of up to 1024 nodes in one launch: a program keeps all scores of its rows in registers.

A product of all columns at a time would take more registers than there are, so they come in chunks, and only the keys
of all of them stay. They stand in ascending index, so the lowest index wins a tie by its place.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._blocks import value_of_bits
from drseg_kernels._knn_select import (
    NONE,
    allowed_pairs,
    decay_between,
    how_to_join,
    join_scores,
    keys_of,
    kth_key,
    take_in_order,
    write_blank,
    write_chosen,
)
from drseg_kernels._knn_sizes import OnChip
from drseg_kernels._launch import LARGEST_GRID_Y, on_device_of, power_of_two_from

# dot products are made of fused steps, half as many as without
OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def dot_products(
    prior_ptr,
    left_node,
    left_mask,
    right_node,
    right_mask,
    channels,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """(LEFT, RIGHT) dot products in float32 of rows of the features, given by their places in the batch (int64)."""
    total = tl.zeros((LEFT, RIGHT), tl.float32)
    d = tl.arange(0, DEPTH)
    left_ptr = prior_ptr + left_node[:, None] * channels + d[None, :]
    right_ptr = prior_ptr + right_node[None, :] * channels + d[:, None]
    for first in range(0, channels, DEPTH):
        inside = d < channels - first
        left = tl.load(left_ptr + first, mask=left_mask[:, None] & inside[None, :], other=0.0)
        right = tl.load(right_ptr + first, mask=right_mask[None, :] & inside[:, None], other=0.0)
        # float32 features are ranked in float32
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def keys_of_products(
    cosine,
    inverse_norm_ptr,
    table_ptr,
    first,
    i,
    row,
    inverse_own,
    j,
    column,
    width,
    JOIN: tl.constexpr,
    INCLUDE_SELF: tl.constexpr,
):
    """Keys of dot products (R, C) of the nodes ``i`` of an image with the nodes ``j``; the score of a node with itself.

    A key says its score, so that no second tile takes registers; only that of the node itself may be FORCED. Its score
    is 0 where it is not among the columns.

    Args:
        first: the place of the image's first node in the batch, int64.
    """
    inverse = tl.load(inverse_norm_ptr + first + j, mask=column, other=0.0)
    both = row[:, None] & column[None, :]
    cosine = cosine * inverse_own[:, None] * inverse[None, :]
    value = join_scores(cosine, decay_between(table_ptr, i, j, width, both), JOIN)
    own = i[:, None] == j[None, :]
    allowed = allowed_pairs(both, inverse_own, inverse, own, INCLUDE_SELF)
    own_value = tl.sum(tl.where(allowed & own, value, 0.0), axis=1)
    return keys_of(value, allowed, own, INCLUDE_SELF), own_value


@triton.jit
def score_tile(
    prior_ptr,
    inverse_norm_ptr,
    table_ptr,
    image,
    i,
    row,
    inverse_own,
    j,
    column,
    nodes,
    width,
    channels,
    JOIN: tl.constexpr,
    INCLUDE_SELF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Keys (ROWS, COLUMNS) of the nodes ``i`` of an image with the nodes ``j``; scores as ``keys_of_products``."""
    first = image * nodes
    cosine = dot_products(prior_ptr, first + i, row, first + j, column, channels, ROWS, COLUMNS, DEPTH)
    return keys_of_products(
        cosine, inverse_norm_ptr, table_ptr, first, i, row, inverse_own, j, column, width, JOIN, INCLUDE_SELF
    )


@triton.jit
def _knn_graph_fwd_kernel_on_chip(
    prior_ptr,
    inverse_norm_ptr,
    table_ptr,
    index_ptr,
    score_ptr,
    nodes,
    width,
    channels,
    k,
    JOIN: tl.constexpr,
    INCLUDE_SELF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``index`` and ``score`` (B, N, k) of ROWS nodes per program; CHUNKS times COLUMNS >= N."""
    SLOTS: tl.constexpr = 64

    image = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = r.to(tl.int32)
    row = r < nodes
    node = image * nodes + r
    inverse_own = tl.load(inverse_norm_ptr + node, mask=row, other=0.0)
    keys = tl.full((ROWS, CHUNKS, COLUMNS), NONE, tl.int32)
    own_value = tl.zeros((ROWS,), tl.float32)
    which = tl.arange(0, CHUNKS)
    j = tl.arange(0, COLUMNS)
    for chunk in range(0, tl.cdiv(nodes, COLUMNS)):
        part, own = score_tile(
            prior_ptr, inverse_norm_ptr, table_ptr, image, i, row, inverse_own, j, j < nodes,
            nodes, width, channels, JOIN, INCLUDE_SELF, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        keys = tl.where((which == chunk)[None, :, None], part[:, None, :], keys)
        own_value += own
        j += COLUMNS
    row_key = tl.reshape(keys, (ROWS, CHUNKS * COLUMNS))
    threshold = kth_key(row_key, row_key, tl.full((ROWS,), NONE, tl.int32), k, False)
    room = k - tl.sum((row_key > threshold[:, None]).to(tl.int32), axis=1)
    found = tl.zeros((ROWS,), tl.int32)
    # written in chunks too: the places and addresses of a whole row would not fit the registers
    j = tl.arange(0, COLUMNS)
    for chunk in range(0, tl.cdiv(nodes, COLUMNS)):
        key = tl.sum(tl.where((which == chunk)[None, :, None], keys, 0), axis=1)
        chosen, place = take_in_order(key, threshold, room)
        value = tl.where(i[:, None] == j[None, :], own_value[:, None], value_of_bits(key))
        write_chosen(index_ptr, score_ptr, node * k + found, chosen, place, j, value)
        found += tl.sum(chosen.to(tl.int32), axis=1)
        room -= tl.sum((key == threshold[:, None]).to(tl.int32), axis=1)
        j += COLUMNS
    s = tl.arange(0, SLOTS)
    finite = inverse_own == inverse_own
    for _ in range(0, k, SLOTS):
        empty = row[:, None] & (s < k)[None, :] & (s[None, :] >= found[:, None])
        write_blank(index_ptr, score_ptr, (node * k)[:, None] + s[None, :], empty, i, finite)
        s += SLOTS


def constants(nodes: int, form: str, include_self: bool, chosen: OnChip) -> dict[str, Any]:
    """Compile-time arguments of the kernel: what is compiled ahead of time and what is launched are one thing."""
    return {
        **how_to_join(form, include_self),
        "ROWS": chosen.rows,
        "COLUMNS": chosen.columns,
        "CHUNKS": power_of_two_from(triton.cdiv(nodes, chosen.columns)),
        "DEPTH": chosen.depth,
    }


def readable(prior: Tensor) -> Tensor:
    """The features as the kernels can multiply them: the interpreter takes bfloat16 for integers in a product."""
    return prior.float() if prior.dtype == torch.bfloat16 and not prior.is_cuda else prior


def on_chip(
    prior: Tensor,
    inverse_norm: Tensor,
    table: Tensor,
    form: str,
    include_self: bool,
    chosen: OnChip,
    index: Tensor,
    score: Tensor,
) -> None:
    """Fills ``index`` and ``score`` (B, N, k); contiguous arguments as of ``knn_graph``, none of them empty."""
    batch, nodes, k = index.shape
    prior = readable(prior)
    with on_device_of(prior):
        for image in range(0, batch, LARGEST_GRID_Y):
            some = slice(image, image + LARGEST_GRID_Y)
            _knn_graph_fwd_kernel_on_chip[(triton.cdiv(nodes, chosen.rows), len(index[some]))](
                prior[some],
                inverse_norm[some],
                table,
                index[some],
                score[some],
                nodes,
                table.shape[1],
                prior.shape[2],
                k,
                **constants(nodes, form, include_self, chosen),
                **chosen.options(),
                **OPTIONS,
            )
