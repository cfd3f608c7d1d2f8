# SPDX-License-Identifier: Apache-2.0
"""What ``degree_normalize`` means, in plain PyTorch: forward (differentiable), and its gradient written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _slots(index: Tensor) -> int:
    """K, and one where there is none; also of a program whose K is not known yet."""
    count: Any = torch.sym_max(index.shape[2], 1)
    return count


def _column_sum(value: Tensor, neighbour: Tensor) -> Tensor:
    """Sum over the edges that end in each node: (B, N, K) -> (B, N)."""
    total = value.new_zeros(value.shape[:2])
    return total.scatter_add(1, neighbour.flatten(1), value.flatten(1))


def _at_neighbour(value: Tensor, neighbour: Tensor) -> Tensor:
    """Value of each edge's end: (B, N) -> (B, N, K)."""
    return value.gather(1, neighbour.flatten(1)).view(neighbour.shape)


def _scales(weight: Tensor, neighbour: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """Factors of the two ends of an edge, each (B, N): inverse square roots of their degrees."""
    row = weight.sum(-1)
    if norm == "sym_row":
        scale = (row + eps).rsqrt()
        return scale, scale
    column = _column_sum(weight, neighbour)
    if norm == "sym_inout":
        return (row + eps).rsqrt(), (column + eps).rsqrt()
    scale = ((row + column) / 2 + eps).rsqrt()
    return scale, scale


def degree_normalize(
    weight: Tensor, index: Tensor, norm: str, eps: float, csc: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Propagation coefficients (B, N, K) in float32 (float64 for float64 weights).

    ``csc``, ``indptr`` and ``perm`` of the graph's columns, is needed by nobody here.
    """
    weight = _wide(weight)
    neighbour = index.long().clamp(0, torch.sym_max(index.shape[1] - 1, 0))
    if norm == "sym_count":
        return weight / _slots(index)
    if norm == "row":
        return weight / (weight.sum(-1, keepdim=True) + eps)
    start, end = _scales(weight, neighbour, norm, eps)
    coefficient = weight * start[:, :, None] * _at_neighbour(end, neighbour)
    return coefficient / 2 if norm == "sym_undirected" else coefficient


def degree_normalize_backward(
    grad: Tensor, weight: Tensor, index: Tensor, norm: str, eps: float, csc: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Gradient to ``weight``, through the degrees of both ends."""
    dtype = weight.dtype
    grad, weight = _wide(grad), _wide(weight)
    neighbour = index.long().clamp(0, torch.sym_max(index.shape[1] - 1, 0))
    # a weight meets its degree before a gradient, as forward: the product of the two may be too large for a number
    if norm == "sym_count":
        return (grad / _slots(index)).to(dtype)
    if norm == "row":
        inverse = (weight.sum(-1, keepdim=True) + eps).reciprocal()
        return (inverse * (grad - (grad * (weight * inverse)).sum(-1, keepdim=True))).to(dtype)
    if norm == "sym_undirected":
        grad = grad / 2
    start, end = _scales(weight, neighbour, norm, eps)
    far = _at_neighbour(end, neighbour)
    near = start[:, :, None]
    # d(degree ** -1/2) = -1/2 degree ** -3/2, factor by factor: the cube of a scale may be too small for a number
    grad_start = start * (start * (-0.5 * start * (grad * (weight * far)).sum(-1)))
    grad_end = end * (end * (-0.5 * end * _column_sum(grad * (weight * near), neighbour)))
    through_row: Tensor
    if norm == "sym_row":
        through_row, through_column = grad_start + grad_end, None
    elif norm == "sym_inout":
        through_row, through_column = grad_start, grad_end
    else:
        through_row = through_column = (grad_start + grad_end) / 2
    result = grad * near * far + through_row[:, :, None]
    if through_column is not None:
        result = result + _at_neighbour(through_column, neighbour)
    return result.to(dtype)
