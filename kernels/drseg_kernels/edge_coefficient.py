# SPDX-License-Identifier: Apache-2.0
"""Edge weights and their degree normalisation in one op (arXiv 2604.02010, Eq. 8 and 9).

Forward: a program is a node; it computes the weights of its slots and, from the registers, their sum. A degree at the
other end of an edge is another program's, so the coefficients take a second launch, and ``sym_inout`` and
``sym_undirected``, whose degrees count incoming edges, a third between the two. Backward: one launch for the gradients
of the degrees; what leads from there through the coefficients to the weights happens inside ``edge_weight``'s backward.

The order of every sum is that of the two ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._launch import Tile, on_device_of, sizes_of
from drseg_kernels.csc import csc as columns_of
from drseg_kernels.degree_normalize import (
    _degree_normalize_fwd_kernel_edges,
    common_of,
    degree_normalize_backward,
    scales,
    through_degrees,
)
from drseg_kernels.edge_weight import edge_weight_backward, mask_of, weights_of

# scales that the backward needs: one per node, or one for each end of an edge; it finds the degrees of ``row`` itself
ENDS = {"sym_row": 1, "sym_undirected": 1, "sym_inout": 2, "row": 0, "sym_count": 0}


@triton.jit(do_not_specialize=["nodes", "slots"])
def _edge_coefficient_fwd_kernel(
    source_ptr,
    target_ptr,
    index_ptr,
    vector_ptr,
    bias_ptr,
    mask_ptr,
    weight_ptr,
    start_ptr,
    coefficient_ptr,
    nodes,
    slots,
    width,
    eps,
    NORM: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Edges of one node: weight (B * N, slots); for ``sym_row`` and ``row`` its scale start (B * N,); for
    ``sym_count`` its coefficients."""
    node = tl.program_id(0)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, slots, BLOCK_M):
        k = first + tl.arange(0, BLOCK_M)
        weight = weights_of(
            source_ptr,
            target_ptr,
            index_ptr,
            vector_ptr,
            bias_ptr,
            mask_ptr,
            node,
            k,
            nodes,
            slots,
            width,
            MASK,
            BLOCK_M,
            BLOCK_N,
        )
        edge = node.to(tl.int64) * slots + k
        tl.store(weight_ptr + edge, weight, mask=k < slots)
        if NORM == "sym_count":
            tl.store(coefficient_ptr + edge, weight / slots, mask=k < slots)
        total += tl.where(k < slots, weight, 0.0)
    if NORM == "sym_row":
        tl.store(start_ptr + node, tl.rsqrt(tl.sum(total, axis=0) + eps))
    if NORM == "row":
        tl.store(start_ptr + node, 1.0 / (tl.sum(total, axis=0) + eps))


def edge_coefficient(
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    norm: str,
    eps: float,
    csc: tuple[Tensor, Tensor] | None = None,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients (B, N, K), weights (B, N, K) and scales (S, B, N) with S from ``ENDS``, in float32.

    Args:
        source, target: (B, N, E) float32, float16 or bfloat16. vector: (E,). bias: one number.
        index: (B, N, K) int32 or int64, clamped into [0, N). mask: (B, N, K) bool or scores, or None.
        norm, eps: as in ``degree_normalize``.
        csc: columns of the graph; made here where they are needed and None.
        tile: sizes of a program; by default those of the architecture's table, then a rule.
    """
    batch, nodes, slots = index.shape
    width = source.shape[-1]
    like: dict[str, Any] = {"dtype": torch.float32, "device": source.device}
    weight, coefficient = torch.empty(index.shape, **like), torch.empty(index.shape, **like)
    scale = torch.empty(ENDS[norm], batch, nodes, **like)
    if weight.numel() == 0:
        return coefficient, weight, scale.fill_(eps**-0.5)
    chosen = tile or sizes_of("edge_coefficient", source.device, source.dtype, nodes, slots, width)
    near = index.contiguous()
    present, kind = mask_of(mask, near)
    start = scale[0] if ENDS[norm] else torch.empty(batch, nodes, **like) if norm == "row" else weight
    common = common_of(weight, index)
    with on_device_of(source):
        _edge_coefficient_fwd_kernel[(batch * nodes,)](
            source.contiguous(),
            target.contiguous(),
            near,
            vector.contiguous(),
            bias,
            present,
            weight,
            start,
            coefficient,
            nodes,
            slots,
            width,
            eps,
            NORM=norm,
            MASK=kind,
            **chosen.constants(),
            **chosen.options(),
        )
        if norm == "sym_count":
            return coefficient, weight, scale
        end = scale[-1] if ENDS[norm] else start
        if norm in ("sym_inout", "sym_undirected"):
            scales(weight, index, norm, eps, csc, common, into=(start, end))
        _degree_normalize_fwd_kernel_edges[(batch * nodes,)](
            weight, near, start, end, coefficient, nodes, slots, NORM=norm, **common
        )
    return coefficient, weight, scale


def edge_coefficient_backward(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    norm: str,
    eps: float,
    output_mask: Sequence[bool],
    csc: tuple[Tensor, Tensor] | None = None,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to ``source``, ``target``, ``vector`` and ``bias`` in their dtypes.

    Args:
        grad: (B, N, K), of the coefficients. weight, scale: as the forward returned them. The other arguments as there.
        output_mask: which gradients to compute; the others are empty, ``vector`` and ``bias`` if neither is asked.
    """
    ends = None
    if index.numel() and ENDS[norm]:
        grad = grad.contiguous()
        start, end = scale[0].flatten(), scale[-1].flatten()
        csc = csc or columns_of(index)
        with on_device_of(source):
            ends = through_degrees(grad, weight, index, norm, start, end, csc, common_of(weight, index))
    else:
        grad = degree_normalize_backward(grad, weight, index, norm, eps)
    return edge_weight_backward(
        grad, weight, source, target, index, vector, bias, output_mask, csc, ends=ends, tile=tile
    )
