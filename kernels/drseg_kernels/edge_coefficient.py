# SPDX-License-Identifier: Apache-2.0
"""Edge weights and their degree normalisation in one op (arXiv 2604.02010, Eq. 8 and 9).

Forward: a program is a node. It computes the weights of its slots and, from the registers, their sum. The degree at the
other end of an edge is computed by another program, so the coefficients take a second launch. The degrees of
``sym_inout`` and ``sym_undirected`` count incoming edges, and take a third launch between the two.

Backward: ``sym_row`` has one degree a node. So one launch leads the gradient through it to the weights and on to the
logits. The other norms take the launches of ``degree_normalize``. The rest is that of ``edge_weight``.

The order of every sum is that of the two ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._blocks import scaled_slope, softplus_slope, within
from drseg_kernels._launch import Tile, on_device_of, sizes_of
from drseg_kernels.csc import csc as columns_of
from drseg_kernels.degree_normalize import (
    _degree_normalize_fwd_kernel_edges,
    common_of,
    degree_normalize_backward,
    scales,
    to_degrees,
)
from drseg_kernels.edge_weight import Halves, edge_weight_backward, laid_out, mask_of, weights_of

# scales that the backward needs: one per node, or one for each end of an edge; it finds the degrees of ``row`` itself
ENDS = {"sym_row": 1, "sym_undirected": 1, "sym_inout": 2, "row": 0, "sym_count": 0}


@triton.jit(do_not_specialize=["nodes", "slots"])
def _edge_coefficient_fwd_kernel(
    source_ptr,
    target_ptr,
    inverse_ptr,
    shift_ptr,
    index_ptr,
    vector_ptr,
    bias_ptr,
    mask_ptr,
    exponent_ptr,
    weight_ptr,
    start_ptr,
    coefficient_ptr,
    nodes,
    slots,
    width,
    stride,
    eps,
    NORM: tl.constexpr,
    NORMED: tl.constexpr,
    SHIFT: tl.constexpr,
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
            inverse_ptr,
            shift_ptr,
            index_ptr,
            vector_ptr,
            bias_ptr,
            mask_ptr,
            exponent_ptr,
            node,
            k,
            nodes,
            slots,
            width,
            stride,
            NORMED,
            SHIFT,
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


@triton.jit(do_not_specialize=["nodes", "slots"])
def _edge_coefficient_bwd_kernel_slope(
    grad_ptr,
    weight_ptr,
    exponent_ptr,
    index_ptr,
    indptr_ptr,
    perm_ptr,
    scale_ptr,
    slope_ptr,
    grad_exponent_ptr,
    nodes,
    slots,
    APART: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """slope (B * N, slots) of the edges of one node with norm ``sym_row``: gradients of the logits, directly and
    through the one degree of the node, which its edges in both directions have a share in. With exponents also the
    gradients of these.

    APART: the gradient is one of the weights, and has been multiplied by the scales of both ends.
    """
    node = tl.program_id(0)
    sample = (node // nodes).to(tl.int64) * nodes
    node = node.to(tl.int64)
    scale = tl.load(scale_ptr + node)
    through = to_degrees(
        grad_ptr,
        weight_ptr,
        index_ptr,
        indptr_ptr,
        perm_ptr,
        scale_ptr,
        scale_ptr,
        node,
        sample,
        nodes,
        slots,
        not APART,
        BLOCK_N,
    )
    # d(degree ** -1/2) = -1/2 degree ** -3/2, factor by factor: the cube of a scale may be too small for a number
    through_degree = -0.5 * scale * (through[0] + through[1])
    if APART:
        through_degree = through_degree * scale
    else:
        through_degree = scale * (scale * through_degree)
    for first in range(0, slots, BLOCK_N):
        k = first + tl.arange(0, BLOCK_N)
        slot = k < slots
        edge = node * slots + k
        value = tl.load(grad_ptr + edge, mask=slot, other=0.0).to(tl.float32)
        if not APART:
            other = sample + within(tl.load(index_ptr + edge, mask=slot, other=0), nodes)
            value = value * scale * tl.load(scale_ptr + other, mask=slot, other=0.0)
        value = value + through_degree
        weight = tl.load(weight_ptr + edge, mask=slot, other=0.0)
        if exponent_ptr is None:
            slope = softplus_slope(weight)
        else:
            tl.store(grad_exponent_ptr + edge, value * weight, mask=slot)
            slope = scaled_slope(weight, tl.load(exponent_ptr + edge, mask=slot, other=0.0))
        tl.store(slope_ptr + edge, value * slope, mask=slot)


def edge_coefficient(
    halves: Halves,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    norm: str,
    eps: float,
    apart: bool = False,
    csc: tuple[Tensor, Tensor] | None = None,
    exponent: Tensor | None = None,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients (B, N, K), weights (B, N, K) and scales (S, B, N) with S from ``ENDS``, in float32.

    Args:
        halves, index, vector, bias, mask, exponent: as in ``edge_weight``.
        norm, eps: as in ``degree_normalize``.
        apart: of ``sym_row``, leave the scales to whoever uses the weights: these come first, and nothing second.
        csc: columns of the graph; made here where they are needed and None.
        tile: sizes of a program; by default those of the architecture's table, then a rule.
    """
    batch, nodes, slots = index.shape
    like: dict[str, Any] = {"dtype": torch.float32, "device": index.device}
    weight = torch.empty(index.shape, **like)
    coefficient = torch.empty(0 if apart else index.shape, **like)
    scale = torch.empty(ENDS[norm], batch, nodes, **like)
    if weight.numel() == 0:
        scale.fill_(eps**-0.5)
        return (weight, coefficient, scale) if apart else (coefficient, weight, scale)
    rows, flags, width, stride = laid_out(halves)
    chosen = tile or sizes_of("edge_coefficient", index.device, rows[0].dtype, nodes, slots, width)
    near = index.contiguous()
    present, kind = mask_of(mask, near)
    start = scale[0] if ENDS[norm] else torch.empty(batch, nodes, **like) if norm == "row" else weight
    common = common_of(weight, index)
    with on_device_of(index):
        _edge_coefficient_fwd_kernel[(batch * nodes,)](
            *rows,
            near,
            vector.contiguous(),
            bias,
            present,
            None if exponent is None else exponent.contiguous(),
            weight,
            start,
            coefficient,
            nodes,
            slots,
            width,
            stride,
            eps,
            NORM=norm,
            MASK=kind,
            **flags,
            **chosen.constants(),
            **chosen.options(),
        )
        if norm == "sym_count":
            return coefficient, weight, scale
        if apart:
            return weight, coefficient, scale
        end = scale[-1] if ENDS[norm] else start
        if norm in ("sym_inout", "sym_undirected"):
            scales(weight, index, norm, eps, csc, common, into=(start, end))
        _degree_normalize_fwd_kernel_edges[(batch * nodes,)](
            weight, near, start, end, coefficient, nodes, slots, NORM=norm, **common
        )
    return coefficient, weight, scale


def _slope_or_grad(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    index: Tensor,
    norm: str,
    eps: float,
    apart: bool,
    csc: tuple[Tensor, Tensor] | None,
    exponent: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, tuple[Tensor, Tensor] | None, Tensor | None]:
    """The gradients of the logits, or None and those of the weights; the columns where they were needed; and with the
    gradients of the logits those of the exponents."""
    if index.numel() and norm == "sym_row":
        slope, near = torch.empty_like(weight), index.contiguous()
        to_exponent = None if exponent is None else torch.empty_like(weight)
        csc = csc or columns_of(index)
        common = common_of(weight, index)
        with on_device_of(index):
            _edge_coefficient_bwd_kernel_slope[(index.shape[0] * index.shape[1],)](
                grad.contiguous(),
                weight,
                None if exponent is None else exponent.contiguous(),
                near,
                *csc,
                scale,
                slope,
                to_exponent,
                *index.shape[1:],
                APART=apart,
                **common,
            )
        return slope, grad, csc, to_exponent
    if index.numel() and ENDS[norm]:
        csc = csc or columns_of(index)
        known = (scale[0].flatten(), scale[-1].flatten())
        return None, degree_normalize_backward(grad, weight, index, norm, eps, csc, known=known), csc, None
    return None, degree_normalize_backward(grad, weight, index, norm, eps), csc, None


def logit_gradients(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    index: Tensor,
    norm: str,
    eps: float,
    apart: bool,
    csc: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Gradients (B, N, K) of what softplus is given, and the columns of the graph where they are known.

    For a backend that has kernels for the edge MLP alone. Arguments as in ``edge_coefficient_backward``.
    """
    slope, grad, csc, _ = _slope_or_grad(grad, weight, scale, index, norm, eps, apart, csc)
    # softplus'(x) = 1 - exp(-softplus(x)); a masked slot has weight 0 and so slope 0
    return -grad * torch.expm1(-weight) if slope is None else slope, csc


def edge_coefficient_backward(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    halves: Halves,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    norm: str,
    eps: float,
    apart: bool,
    output_mask: Sequence[bool],
    csc: tuple[Tensor, Tensor] | None = None,
    exponent: Tensor | None = None,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, ...]:
    """Gradients to ``source``, ``target``, ``vector``, ``bias``, ``source_bias`` and, where there is one, ``exponent``,
    in their dtypes.

    Args:
        grad: (B, N, K), of the coefficients, or ``apart`` of the weights, through their scales at both ends but not
            through the degrees in these. weight, scale: as the forward returned them. The other arguments as there.
        output_mask: as in ``edge_weight_backward``.
    """
    slope, grad, csc, to_exponent = _slope_or_grad(grad, weight, scale, index, norm, eps, apart, csc, exponent)
    given = (grad, weight, halves, index, vector, bias, output_mask, csc, exponent)
    return edge_weight_backward(*given, slope=slope, to_exponent=to_exponent, tile=tile)
